"""Every command of the README is run here, or it stands in a section that says what it needs, and then its flags are parsed."""

import re
import shlex

import pytest
from commands import ROOT, export_some, script
from forked import run_forked

from sample import SampleConfig
from utils import cli
from utils.runs.config import TrainConfig
from utils.runs.tokenizer_config import TokenizerTraining, recipe

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, flags=re.M | re.S))
CONFIGS = {"train.py": TrainConfig, "sample.py": SampleConfig, "train_tokenizer.py": TokenizerTraining}
SCRIPT_CONFIGS = {
    "analyze_attention.py": "AnalyzeConfig",
    "benchmark.py": "Arguments",
    "cache_tokens.py": "CacheConfig",
    "convert_official.py": "ConvertConfig",
    "export_checkpoint.py": "ExportConfig",
    "plot_run.py": "PlotConfig",
    "publish.py": "PublishConfig",
}
EVALUATE_CONFIGS = {"stats": "StatsConfig", "reconstruction": "ReconstructionConfig"}


def parse(words: list[str]) -> None:
    """The flags of a command of this project, however it is started."""
    path = next(word for word in words if word.endswith(".py"))
    rest = words[words.index(path) + 1 :]
    name = path.removeprefix("scripts/")
    if name == "evaluate.py":
        config = getattr(script("evaluate"), EVALUATE_CONFIGS.get(rest[0], "EvaluateConfig"))
        rest = rest[rest[0] in EVALUATE_CONFIGS :]
    else:
        config = CONFIGS.get(name) or getattr(script(name.removesuffix(".py")), SCRIPT_CONFIGS[name])
    cli.parse(config, "", rest, defaults=recipe if config is TokenizerTraining else None)


def commands(section: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", SECTIONS[section], flags=re.S)
    return [shlex.split(line, comments=True) for line in "".join(blocks).splitlines() if not line.startswith("#")]


def test_every_command_is_in_a_section_known_here():
    known = {"Three commands", "Train on ImageNet", "Train on your own images", "Sample from released weights", "Evaluate"}
    assert {name for name in SECTIONS if "```bash" in SECTIONS[name]} == known
    makefile = (ROOT / "Makefile").read_text()
    assert [words[:1] for words in commands("Three commands")] == 3 * [["make"]]
    assert all(f"\n{words[1]}:" in makefile for words in commands("Three commands"))


@pytest.mark.parametrize("section", ["Train on ImageNet", "Sample from released weights", "Evaluate"])
def test_marked_commands_parse(section):
    assert re.match(r"\s*\*(These commands|The first three of these commands) need", SECTIONS[section])
    for words in commands(section):
        parse(words)


def test_every_variable_of_a_command_is_explained():
    section = SECTIONS["Train on ImageNet"]
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


@pytest.mark.parametrize(
    ("page", "count"), [("training", 8), ("evaluation", 7), ("speed", 7), ("tokenizer", 4), ("finetuning", 6), ("pictures", 9)]
)
def test_the_commands_of_the_pages_parse(page, count):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = "\n".join(re.findall(r"^ *```bash\n(.*?)```", text, flags=re.S | re.M))
    lines = [shlex.split(line) for line in blocks.splitlines() if line.strip()]
    assert len(lines) == count
    for words in lines:
        if words[0] != "scripts/checks/gpu_check.sh" and words[1] != "evaluator.py":  # that one is of another project
            parse(words)


def test_the_commands_for_own_images_run(tmp_path):
    export_some(tmp_path / "demo" / "images")
    for words in commands("Train on your own images"):
        assert words[0] == "python"
        words = [re.sub("^out/", f"{tmp_path}/", word) for word in words[1:]]
        if "--max_minutes" in words:
            words[words.index("--max_minutes") + 1] = "0.05"
        result = run_forked(*words)
        assert result.returncode == 0, (words, result.stderr)
    assert (tmp_path / "samples.png").exists()
    for words in commands("Evaluate")[3:]:
        words = [re.sub("^out/", f"{tmp_path}/", word) for word in words[1:]]
        words = ["40" if word in ("500", "200") else word for word in words]
        result = run_forked(*words)
        assert result.returncode == 0, (words, result.stderr)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    variables = {}
    exec(code.replace("out/", f"{tmp_path}/"), variables)
    assert variables["out"].images.shape == (2, 3, 32, 32)


def test_scripts_of_the_presets_are_the_commands_of_the_readme():
    for words in commands("Train on ImageNet")[:5]:
        depth = next(word for word in words if word.startswith("--depth=")).removeprefix("--depth=")
        text = (ROOT / "scripts" / f"d{depth}.sh").read_text()
        assert " ".join(words[words.index("train.py") :]) in text
