"""What README.md and the pages of docs/ say that can be looked up: links, flags, figures. tests/test_pages.py runs commands."""

import re
import shlex

import pytest
import torch
from commands import ROOT
from printed import PAGES, Block, blocks, inline_commands, parse

from models.attention import Attention
from models.families import FAMILIES
from models.pyramid import Pyramid
from models.transformer import PRESETS, ScaleTransformer, build_transformer, family_config

README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
FOLDERS = (".", "docs", "results", "tests/golden", "data/fashion-mnist", "data/squeezenet")
WRITTEN = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
BLOCKS = [block for page in PAGES for block in blocks(page) if block.kind == "bash"]


# --- commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_the_flags_of_every_block_are_read(block):
    """Of those too that tests/test_pages.py runs, with the numbers that are printed."""
    assert block.commands
    for words in block.commands:
        foreign = words[:2] == ["python", "evaluator.py"]
        assert foreign == block.marker.startswith("needs another checkout")
        if not foreign and words[0] not in ("mkdir", "cp") and words[:2] != ["python", "-c"]:
            parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_are_read(page):
    for words in inline_commands(page):
        if words[1] != "evaluator.py":
            parse(words)


def test_every_variable_of_a_command_is_explained():
    text = (ROOT / "docs" / "training.md").read_text()
    section = text[text.index("\n## ImageNet\n") : text.index("\n## Images\n")]
    comments = " ".join(line for line in section.splitlines() if line.startswith("#"))
    used = set(re.findall(r"\$(\w+)", section))
    assert used == {"GPUS", "NODES", "HEAD", "JOB", "DATA", "RUN", "VAE"}
    assert all(re.search(rf"\b{name}\b", comments) for name in used)


def test_no_number_of_gpus_is_assumed():
    """Nowhere does a command or a default say how many there are."""
    files = [path for folder in ("", "scripts", "utils", "models", "docs") for path in (ROOT / folder).glob("*.*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".sh", ".md")}
    assert len(texts) > 30
    assert not [path for path, text in texts.items() if re.search(r"nproc_per_node=\d|nnodes=\d|\b(8|eight) (GPU|A100)", text)]


def test_scripts_of_the_presets_are_the_commands_printed():
    published = next(block for block in blocks("docs/training.md") if "GPUs" in block.marker)
    depths = []
    for words in published.commands:
        depths.append(next(word for word in words if word.startswith("--depth=")).removeprefix("--depth="))
        text = (ROOT / "scripts" / f"d{depths[-1]}.sh").read_text()
        assert " ".join(words[words.index("train.py") :]) in text
    assert depths == ["12", "16", "20", "24", "30"]


def test_markers_are_in_words_that_readers_understand():
    shown = {block.marker for block in BLOCKS} - {""}
    assert shown
    assert all(re.match(r"needs \w|takes (\d+ )?(minutes|hours)", marker) for marker in shown), shown


def test_a_line_that_is_no_marker_is_none(monkeypatch, tmp_path):
    page = ("text", "", "*Made by hand.*", "```bash", "python a.py", "```", "", "*needs GPUs*", "```bash")
    page += ("# why", "python b.py --c 'd e'  # how", "```", "")
    (tmp_path / "page.md").write_text("\n".join(page))
    monkeypatch.setattr("printed.ROOT", tmp_path)
    first, second = blocks("page.md")
    assert (first.marker, second.marker) == ("", "needs GPUs")
    assert second.commands == [["python", "b.py", "--c", "d e"]]
    assert isinstance(first, Block)


def test_a_wrong_flag_is_found():
    with pytest.raises(SystemExit):
        parse(shlex.split("torchrun --nproc_per_node=$GPUS train.py --depht=12"))


# --- links --------------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    """Markdown without blocks of code and code within sentences, where brackets are no links."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S), flags=re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = sum(name == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", name) is not None for name in found)
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"[a-z]+:", target):  # elsewhere
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert file.is_relative_to(ROOT), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{path.name}: {target}: {sorted(anchors(file.read_text()))}"


def test_anchors_are_those_of_github():
    page = "# A page\n## Adapters (LoRA)\n## 3. The `x`, again\n```\n# no heading\n```\n## A page\n"
    assert anchors(page) == {"a-page", "adapters-lora", "3-the-x-again", "a-page-1"}


def test_pages_that_the_code_names_are_there():
    folders = ("", "models", "utils", "scripts", "notebooks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if folder or path.parent == ROOT]
    named = {
        (path.name, page)
        for path in files
        if path.suffix in (".py", ".sh", ".ipynb", ".toml") or path.name == "Makefile"
        for page in re.findall(r"\bdocs/\w+\.(?:md|png)\b", path.read_text())
    }
    assert named
    assert not [pair for pair in named if not (ROOT / pair[1]).exists()]


def test_every_page_is_listed_in_the_readme():
    assert not [page for page in PAGES if page != "README.md" and f"({page})" not in README]


def test_the_readme_is_short():
    """What it is, two commands, own images, released weights, where to read on: details stand in docs/."""
    assert len(README[: README.index("## Licence and citations")].splitlines()) <= 110


# --- figures of docs/models.md ------------------------------------------------------------------------------------------


def rows(first: str) -> dict[str, list[str]]:
    """A table of docs/models.md, by the first cell of each row, from the first cell of its head."""
    table = re.search(rf"^\| {re.escape(first)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", MODELS, flags=re.M)[1]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {head: rest for head, *rest in cells}


def test_every_family_stands_in_the_table():
    assert [name.split("`")[0] for name in rows("`--family`")] == list(FAMILIES)[:4]


def test_functions_that_stand_beside_equations_are_there():
    code = "".join(path.read_text() for folder in ("models", "utils") for path in (ROOT / folder).rglob("*.py"))
    named = {name.split(".")[-1] for name in re.findall(r"(?<!\$)`([A-Za-z_]\w*(?:\.\w+)?)`(?!\$)", MODELS)}
    assert len(named) > 30
    assert not [name for name in named if not re.search(rf"\b{name}\b", code)]


def test_presets_have_the_numbers_of_parameters_printed():
    printed = rows("preset")
    assert set(printed) <= set(PRESETS)
    for name, (flags, counts, *_) in printed.items():
        families = ["var"] if counts.startswith("VAR") else ["mvar", "var"]
        with torch.device("meta"):
            models = [ScaleTransformer(build_transformer(family, **PRESETS[name]).config) for family in families]
        millions = [f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}" for model in models]
        shown = counts.removeprefix("VAR ").split(" / ")
        assert shown == millions[: len(shown)], name
        parse(["python", "train.py", *shlex.split(flags)])


@pytest.mark.parametrize("column", [2, 3, 4])
def test_scores_of_each_kind_are_those_printed(column):
    head = re.search(r"^\| \| \|(.+)\|$", MODELS, flags=re.M)[1].split("|")[column - 2]
    tokens, pixels = re.fullmatch(r" ([\d,]+)(?: tokens)? \((\d+) px\) ", head).groups()
    pyramid = Pyramid.parse(pixels)
    assert pyramid.num_tokens == int(tokens.replace(",", ""))
    for family in list(FAMILIES)[:4]:
        config = family_config(family, 16, pyramid.sides, 1000)
        with torch.device("meta"):
            attention = next(mixer for mixer in FAMILIES[family].build(config.mixers(family)) if isinstance(mixer, Attention))
        scores = attention.attention_multiply_adds - 3 * pyramid.num_tokens * config.width**2
        scores //= 2 * config.width
        line = re.search(rf"^\| `{family}` \| \$.*$", MODELS, flags=re.M)[0]
        assert line.split("|")[column + 1].strip() == f"{scores:,} ({100 * scores / pyramid.num_tokens**2:.1f} %)"


def test_states_have_the_sizes_printed():
    printed = rows("mixer")
    config = family_config("mvar", 4, (1, 2, 3), 10)
    width, pyramid = config.width, config.pyramid
    scan = FAMILIES["mvar"].build(config.mixers("mvar"))[1]
    found = sum(tensor.numel() for tensor in scan.init_state(1))
    assert printed["Mamba-2, E = 2C inner channels, N = 64"][1].startswith("3 (E + 2N) + E N")
    inner, states = 2 * width, 64
    assert found == 3 * (inner + 2 * states) + inner * states
    attention = FAMILIES["var"].build(config.mixers("var"))[0]
    _, state = attention(torch.zeros(1, pyramid.num_tokens, width), pyramid.scales)
    assert printed["attention with history"][1] == "2 L C"
    assert sum(tensor.numel() for tensor in state) == 2 * pyramid.num_tokens * width
