"""The page itself: what stands where, and what is called when; each visitor's pictures are kept in a state of their own."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from scripts.pages.drawing import NO_CLASS, Models, Wish, drawn, kept_of, load, reconstructed
from utils import plots

NO_MODEL = """**There is no transformer below `{runs}` yet.** `make demo` trains a tokenizer and a transformer on the embedded
images in ten minutes; then start the page again. Other models: `--ckpt`."""
KEPT_PICTURES = 24  # in the gallery of a visitor
THEME = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])  # of the system: others would be fetched from elsewhere


def build(checkpoints: list[str], runs: str) -> gr.Blocks:
    """checkpoints: to choose from, the first one at first; runs: where they were looked for."""
    with gr.Blocks(title="M-VAR", analytics_enabled=False) as page:
        gr.Markdown("# M-VAR: images scale by scale")
        if not checkpoints:
            gr.Markdown(NO_MODEL.format(runs=runs))
            return page
        checkpoint = gr.Dropdown(checkpoints, value=checkpoints[0], label="Checkpoint")
        label = gr.Dropdown(
            names_of(load(checkpoints[0])), value=0, label="Class (type to search)", filterable=True, elem_id="class"
        )
        checkpoint.change(lambda chosen: gr.Dropdown(names_of(models_of(chosen)), value=0), checkpoint, label)
        with gr.Accordion("How tokens are drawn", open=True), gr.Row():
            guidance = gr.Number(1.5, label="Guidance", elem_id="guidance")
            top_k = gr.Number(0, label="Top-k (0: all)", precision=0)
            top_p = gr.Number(0.96, label="Top-p (0: all)")
            temperature = gr.Number(1.0, label="Temperature")
            smooth = gr.Checkbox(False, label="Smooth")
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
            count = gr.Number(4, label="Images", precision=0)
        wishes = [checkpoint, label, guidance, top_k, top_p, temperature, smooth, seed, count]
        history = gr.State([])  # of this visitor: (picture, command)
        with gr.Tab("Draw"):
            button = gr.Button("Draw", variant="primary", elem_id="draw")
            picture = gr.Image(label="Picture", elem_id="picture", interactive=False, format="png")
            progress = gr.Markdown(elem_id="progress")
            command = gr.Code(label="The same on a command line", language="shell", elem_id="command")
        with gr.Tab("Through the tokenizer"):
            upload = gr.File(label="A picture", elem_id="upload")
            steps = gr.Image(label="Original, after each scale", interactive=False, format="png", elem_id="steps")
            ratio = gr.Markdown(elem_id="ratio")
        with gr.Tab("Edit"):
            gr.Markdown("Paint over what is to be drawn anew, as the class chosen above.")
            editor = gr.ImageEditor(type="pil", label="Picture and mask", elem_id="editor")
            edit = gr.Button("Draw the painted part anew", variant="primary", elem_id="edit")
            edited = gr.Image(label="Picture", interactive=False, format="png", elem_id="edited")
            edit_progress = gr.Markdown(elem_id="edit_progress")
        with gr.Tab("Gallery"):
            gallery = gr.Gallery(label="Drawn so far", elem_id="gallery")
            chosen = gr.Code(label="Command of the picture that is clicked", language="shell", elem_id="chosen")
        button.click(draw, [*wishes, history], [picture, progress, command, history]).then(shown, history, gallery)
        upload.change(through_tokenizer, [checkpoint, upload], [steps, ratio])
        edit.click(draw_edit, [*wishes, editor], [edited, edit_progress])
        gallery.select(command_of, history, chosen)
    return page


def names_of(models: Models) -> list[tuple[str, int]]:
    """(name, label) of every class, and of none."""
    return [*((name, label) for label, name in enumerate(models.names)), ("no class", NO_CLASS)]


def told_to_visitor(message: object) -> gr.Error:
    """What the page shows, and the terminal does not."""
    return gr.Error(str(message), print_exception=False)


def models_of(checkpoint: str) -> Models:
    try:
        return load(checkpoint)
    except (ValueError, OSError) as error:
        raise told_to_visitor(error) from error


def wish_of(*values: Any) -> Wish:
    """What the fields say; gr.Error, which the page shows, where they say nonsense."""
    try:
        if any(value is None for value in values):
            raise ValueError("a field is empty: give a number")
        checkpoint, label, guidance, top_k, top_p, temperature, smooth, seed, count = values
        numbers = {"guidance": float(guidance), "top_k": int(top_k), "top_p": float(top_p), "temperature": float(temperature)}
        return Wish(checkpoint, int(label), **numbers, smooth=bool(smooth), seed=int(seed), count=int(count))
    except (ValueError, TypeError) as error:
        raise told_to_visitor(str(error)) from error


def draw(*values: Any) -> Iterator[tuple]:
    """The fields and the visitor's pictures -> picture, progress, command and pictures, after each scale."""
    *fields, history = values
    wish = wish_of(*fields)
    try:
        for step in drawn(models_of(wish.checkpoint), wish):
            yield grid_of(step.pictures), told(step.scale, step.seconds), "", history
    except ValueError as error:
        raise told_to_visitor(str(error)) from error
    history = [*history, (grid_of(step.pictures), wish.command())][-KEPT_PICTURES:]
    yield grid_of(step.pictures), told("done", step.seconds), wish.command(), history


def told(scale: str, seconds: list[float]) -> str:
    times = ", ".join(f"{1000 * each:.0f}" for each in seconds)
    return f"{scale}: {sum(seconds):.2f} s (milliseconds by scale: {times})"


def grid_of(pictures: np.ndarray) -> Image.Image:
    return plots.grid([pictures], [""])


def through_tokenizer(checkpoint: str, path: str | None) -> tuple[Image.Image | None, str]:
    """A file that was uploaded -> its pictures after each scale, and what they say."""
    if path is None:
        return None, ""
    models = models_of(checkpoint)
    try:
        made = reconstructed(models, path)
    except (ValueError, OSError) as error:
        raise told_to_visitor(str(error).replace(path, path.rpartition("/")[2])) from error
    heads = ["original", *(f"{height}x{width}" for height, width in models.tokenizer.pyramid.shapes)]
    row = np.concatenate([made.original[None], made.after_scales])
    return plots.grid([row], [""], heads), f"PSNR {made.psnr:.2f} dB"


def draw_edit(*values: Any) -> Iterator[tuple]:
    """The fields and what was painted -> picture and progress, after each scale."""
    *fields, painted = values
    wish = wish_of(*fields)
    if not painted or painted["background"] is None:
        raise told_to_visitor("there is no picture yet: give one, and paint over a part of it")
    picture = painted["background"].convert("RGB")
    marked = Image.new("L", picture.size, 0)
    for layer in painted["layers"]:
        marked.paste(255, mask=layer.getchannel("A").point(lambda alpha: 255 * (alpha > 0)))
    models = models_of(wish.checkpoint)
    try:
        for step in drawn(models, wish, kept_of(models, picture, marked)):
            yield grid_of(step.pictures), told(step.scale, step.seconds)
    except ValueError as error:
        raise told_to_visitor(str(error)) from error


def shown(history: list[tuple]) -> list[tuple]:
    """For the gallery, newest first."""
    return list(reversed(history))


def command_of(history: list[tuple], event: gr.SelectData) -> str:
    return shown(history)[event.index][1]
