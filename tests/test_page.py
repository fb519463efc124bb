"""The page: what it computes, and with Gradio, Selenium and Chromium at hand, the page itself in a browser."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY_TOKENIZER, assert_refused, run_in_process, script
from PIL import Image
from small_models import small_transformer

import sample
from models.editing import covered
from models.storage import Description, save_model
from models.tokenizer import VQVAE
from scripts.pages.drawing import NO_CLASS, Wish, checkpoints_below, drawn, kept_of, load, reconstructed, usable
from utils import cli
from utils.class_names import parse_classes
from utils.runs.checkpoints import CHECKSUMS, checkpoint_path, checkpoints, seal
from utils.sampling.config import SampleConfig
from utils.sampling.editing import marked

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return path


# --- what it computes ---------------------------------------------------------------------------------------------------


def test_pictures_grow_scale_by_scale(trained_var):
    models, wish = load(str(trained_var)), Wish(str(trained_var), 1, top_k=0, seed=3, count=2)
    steps = list(drawn(models, wish))
    assert [step.scale for step in steps] == ["x".join(map(str, shape)) for shape in models.transformer.pyramid.shapes]
    assert len(steps[-1].seconds) == len(steps)
    assert all(step.pictures.shape == steps[0].pictures.shape for step in steps)
    again = list(drawn(models, wish))
    assert np.array_equal(steps[-1].pictures, again[-1].pictures)


def test_the_command_line_of_a_picture_draws_it(trained_var, tokenizer, tmp_path, monkeypatch, capsys):
    wish = Wish(str(trained_var), 2, guidance=2.5, top_k=5, top_p=0.9, temperature=0.8, seed=7, count=3)
    *_, last = drawn(load(str(trained_var)), wish)
    words = subprocess.run(["xargs", "-n1"], input=wish.command(), capture_output=True, text=True, check=True).stdout.split()
    flags = [word.replace("samples.png", str(tmp_path / "a.npz")) for word in words[2:]]
    code, _, errors = run_in_process(sample.main, [*flags, "--format=npz"], monkeypatch, capsys)
    assert code == 0, errors
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        theirs = {image.tobytes() for image in archive["arr_0"]}
    assert {image.tobytes() for image in last.pictures} == theirs


@pytest.mark.parametrize("label", [0, 2, NO_CLASS])
def test_the_command_line_says_all_of_a_wish(label):
    """To the last digit, and with a checkpoint whose name begins with a dash."""
    numbers = {"guidance": 2.0000001, "top_k": 17, "top_p": 0.12345678, "temperature": 1 / 3}
    wish = Wish("-runs/of mine", label, **numbers, smooth=True, seed=(1 << 63) - 1, count=3)
    config = cli.parse(SampleConfig, "", shlex.split(wish.command())[2:])
    assert (config.ckpt, config.num, config.seed) == (wish.checkpoint, wish.count, wish.seed)
    assert [config.drawing(setting) for setting in config.sweep()] == [wish.how()]
    transformer = small_transformer()
    num_classes = transformer.config.num_classes
    names = [f"{(n + 1) % num_classes}" for n in range(num_classes)]  # each is the label of another one
    assert parse_classes(config.classes, names, num_classes) == [wish.label_of(transformer)]


@pytest.mark.parametrize("label", [3, 99, -2])
def test_a_label_that_a_checkpoint_has_not_is_refused(label, trained_var):
    models, wish = load(str(trained_var)), Wish(str(trained_var), label, count=1)
    with pytest.raises(ValueError, match=f"label {label}: .* has 0 to 2: choose one of its classes"):
        next(drawn(models, wish))


def test_a_stale_label_is_told_to_the_visitor(trained_var):
    gradio = pytest.importorskip("gradio")
    from scripts.pages import layout

    assert dict(layout.names_of(load(str(trained_var)))) == {"cat": 0, "dog": 1, "fox": 2, "no class": NO_CLASS}
    with pytest.raises(gradio.Error, match="label 99: "):
        next(layout.draw(str(trained_var), 99, 1.5, 0, 0.96, 1.0, False, 0, 1, []))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "0 images: give 1 to"),
        ({"count": 99}, "99 images: give 1 to"),
        ({"seed": -1}, "seed -1: give a whole number of 0 or more"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance": -1.0}, "guidance_scale=-1"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_nonsense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Wish("somewhere", 0, **values)


def test_reconstructions_and_edits(trained_var, photo, tmp_path):
    models = load(str(trained_var))
    made = reconstructed(models, str(photo))
    assert made.after_scales.shape == (models.transformer.pyramid.num_scales, *made.original.shape)
    with Image.open(photo) as picture:
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (24, 10, 40, 30))
        kept = kept_of(models, picture, mask)
        assert 0 < torch.stack([part.float().mean() for part in kept.places]).mean() < 1
        with pytest.raises(ValueError, match="the mask is empty"):
            kept_of(models, picture, Image.new("L", picture.size, 0))
        with pytest.raises(ValueError, match="nothing of the picture would be kept: paint over less of it"):
            kept_of(models, picture, Image.new("L", picture.size, 255))
        stroke = Image.new("L", picture.size, 0)
        stroke.paste(255, (24, 10, 40, 11))  # in no middle of a pixel of the tokenizer's
        assert torch.equal(~kept_of(models, picture, stroke).places[-1], covered(marked(stroke, models.tokenizer), (4, 4)))
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="not a readable image"):
        reconstructed(models, str(tmp_path / "notes.txt"))


def test_runs_are_found(trained_var, tokenizer, tmp_path):
    assert checkpoints_below(tmp_path) == []
    shutil.copytree(trained_var, tmp_path / "runs" / "var")
    shutil.copytree(tokenizer, tmp_path / "runs" / "tokenizer")
    assert checkpoints_below(tmp_path) == [str(tmp_path / "runs" / "var")]


def test_runs_are_found_below_a_folder_that_is_called_checkpoints(trained_var, tmp_path):
    run = tmp_path / "checkpoints" / "mine" / "var"
    shutil.copytree(trained_var, run)
    assert checkpoints_below(run.parent) == checkpoints_below(tmp_path / "checkpoints") == [str(run)]


def without_tokenizer(run: Path, copy: Path) -> Path:
    """A copy of a run, which names a tokenizer that is not there."""
    shutil.copytree(run, copy)
    for file in copy.glob("**/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": str(copy / "gone")}))
    for checkpoint in checkpoints(copy):
        (checkpoint / CHECKSUMS).unlink()
        seal(checkpoint)
    return copy


def test_runs_that_cannot_be_had_are_left_out(trained_var, tmp_path, capsys):
    gone = [str(without_tokenizer(trained_var, tmp_path / name)) for name in ("newest", "oldest")]
    assert usable([gone[0], str(trained_var), gone[1]]) == [str(trained_var)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, run in zip(lines, gone, strict=True):
        assert line.startswith(f"left out: {run} names its tokenizer {run}/gone, which cannot be had: put it there")
        assert "--vae" not in line


def test_the_page_ends_where_no_run_can_be_had(trained_var, tmp_path, capsys):
    page, run = script("page"), without_tokenizer(trained_var, tmp_path / "var")
    with pytest.raises(ValueError, match=f"--runs={tmp_path}: no transformer there can be used"):
        page.to_choose_from(page.PageConfig(runs=str(tmp_path)))
    assert f"left out: {run} names its tokenizer" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=f"{run} names its tokenizer {run}/gone, which cannot be had"):
        page.to_choose_from(page.PageConfig(runs="nowhere", ckpt=str(run)))
    assert page.to_choose_from(page.PageConfig(runs="nowhere")) == []


def test_a_tokenizer_that_is_another_one_by_now_is_refused(trained_var, tmp_path):
    run = without_tokenizer(trained_var, tmp_path / "var")
    torch.manual_seed(9)
    (run / "gone").mkdir()
    save_model(run / "gone", VQVAE(TINY_TOKENIZER), Description("tokenizer"))
    with pytest.raises(ValueError, match=f"{run}: was trained on tokens of another tokenizer than {run}/gone"):
        load(str(run))


def test_a_run_that_goes_on_is_loaded_again(trained_var, tmp_path):
    run = tmp_path / "var"
    shutil.copytree(trained_var, run)
    first = load(str(run))
    assert load(str(run)) is first
    newer = checkpoint_path(run, 4)
    shutil.copytree(checkpoint_path(run, 2), newer)
    assert load(str(run)) is not first
    second = load(str(run))
    os.utime(newer / "model.safetensors", ns=(1, 1))  # as if written again
    assert load(str(run)) is not second


def test_a_port_that_is_none_is_refused(monkeypatch, capsys):
    code, _, errors = run_in_process(script("page").main, ["--port=0"], monkeypatch, capsys)
    assert_refused(code, errors, "--port=0: give 1 to 65535")


# --- in a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(trained_var, tmp_path_factory):
    pytest.importorskip("gradio")
    pytest.importorskip("selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no Chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "scripts/page.py", "--ckpt", trained_var, f"--port={port}", "--runs=nowhere"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "the page is at" in line:
            break
    else:
        raise AssertionError("".join(lines))
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


class Browser:
    """A visitor."""

    def __init__(self, address: str):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1500"):
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.get(address)

    def find(self, selector: str):
        return self.until(lambda: self.driver.find_element("css selector", selector))

    def text(self, selector: str) -> str:
        return self.driver.find_element("css selector", selector).text

    def toasts(self) -> str:
        return " ".join(element.text for element in self.driver.find_elements("css selector", ".toast-body"))

    def open_tab(self, name: str) -> None:
        tabs = self.driver.find_elements("css selector", "button[role=tab]")
        next(tab for tab in tabs if tab.text == name).click()

    def fill(self, selector: str, text: str) -> None:
        field = self.find(selector)
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(text)
        field.send_keys("\t")

    @staticmethod
    def until(found: Callable, seconds: float = 60):
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := found():
                    return value
            except WebDriverException:
                pass
            time.sleep(0.1)
        raise AssertionError("it did not come")


@pytest.fixture
def visitors(address):
    browsers = []

    def open_page() -> Browser:
        browsers.append(Browser(address))
        return browsers[-1]

    yield open_page
    for browser in browsers:
        browser.driver.quit()


def test_two_visitors_draw_and_keep_their_pictures_apart(visitors, address):
    first, second = visitors(), visitors()
    for visitor, seed in ((first, "3"), (second, "4")):
        visitor.find("#draw")
        visitor.fill("#seed input", seed)
    for visitor in (first, second):
        visitor.find("#draw").click()
    for visitor, seed in ((first, "3"), (second, "4")):
        visitor.until(lambda visitor=visitor: "done" in visitor.text("#progress"))
        visitor.until(lambda visitor=visitor, seed=seed: f"--seed={seed}" in visitor.text("#command"))
        visitor.open_tab("Gallery")
        visitor.until(lambda visitor=visitor: len(visitor.driver.find_elements("css selector", "#gallery img")) >= 1)


def test_a_class_is_searched_and_nonsense_is_told(visitors):
    visitor = visitors()
    field = visitor.find("#class input")
    field.click()
    field.send_keys("\b" * 20 + "no cl")
    options = "#class [role=option]"
    visitor.until(lambda: [o.text.strip("✓ \n") for o in visitor.driver.find_elements("css selector", options)] == ["no class"])
    field.send_keys("\n")
    visitor.until(lambda: field.get_attribute("value") == "no class")
    visitor.fill("#seed input", "-3")
    visitor.find("#draw").click()
    visitor.until(lambda: "seed -3: give a whole number of 0 or more" in visitor.toasts())


def test_a_picture_goes_through_the_tokenizer_and_a_text_does_not(visitors, photo, tmp_path):
    visitor = visitors()
    visitor.find("#draw")
    visitor.open_tab("Through the tokenizer")
    visitor.find("#upload input[type=file]").send_keys(str(photo))
    visitor.until(lambda: "PSNR" in visitor.text("#ratio"))
    (tmp_path / "notes.txt").write_text("no picture")
    visitor.find("#upload button[aria-label*='lear'], #upload button[aria-label*='emove']").click()
    visitor.until(lambda: visitor.driver.find_elements("css selector", "#upload input[type=file]"))
    visitor.find("#upload input[type=file]").send_keys(str(tmp_path / "notes.txt"))
    visitor.until(lambda: "not a readable image" in visitor.toasts())


def test_a_painted_part_is_drawn_anew(visitors, photo, tmp_path):
    from selenium.webdriver import ActionChains

    visitor = visitors()
    visitor.find("#draw")
    visitor.open_tab("Edit")
    visitor.find("#edit").click()
    visitor.until(lambda: "there is no picture yet" in visitor.toasts() or "the mask is empty" in visitor.toasts())
    with Image.open(photo) as small:
        small.resize((480, 400)).save(tmp_path / "large.png")  # of a small one the brush covers every token
    visitor.find("#editor input[type=file]").send_keys(str(tmp_path / "large.png"))
    canvas = visitor.find("#editor canvas")
    time.sleep(2)
    ActionChains(visitor.driver).move_to_element(canvas).click_and_hold().move_by_offset(12, 8).move_by_offset(
        -9, 9
    ).release().perform()
    time.sleep(1)
    visitor.find("#edit").click()
    visitor.until(lambda: "done" in visitor.text("#edit_progress") or "s (milliseconds" in visitor.text("#edit_progress"))
