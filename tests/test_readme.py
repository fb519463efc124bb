"""Every command of the README is run here, or it stands in a section that says what it needs, and then its flags are parsed."""

import re
import shlex

import pytest
from commands import ROOT, run_in_shell, script

from sample import SampleConfig
from utils import cli
from utils.data import export_fashion_mnist
from utils.recipe import TrainConfig

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, flags=re.M | re.S))
CONFIGS = {"train.py": TrainConfig, "sample.py": SampleConfig}


def commands(section: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", SECTIONS[section], flags=re.S)
    return [shlex.split(line, comments=True) for line in "".join(blocks).splitlines() if not line.startswith("#")]


def test_every_command_is_in_a_section_known_here():
    known = {"Three commands", "Train on ImageNet", "Train on your own images", "Sample from released weights"}
    assert {name for name in SECTIONS if "```bash" in SECTIONS[name]} == known
    makefile = (ROOT / "Makefile").read_text()
    assert [words[:1] for words in commands("Three commands")] == 3 * [["make"]]
    assert all(f"\n{words[1]}:" in makefile for words in commands("Three commands"))


@pytest.mark.parametrize("section", ["Train on ImageNet", "Sample from released weights"])
def test_marked_commands_parse(section):
    assert SECTIONS[section].lstrip().startswith("*These commands need")
    for words in commands(section):
        name = next(word for word in words if word.endswith(".py"))
        config = CONFIGS.get(name) or script("cache_tokens").CacheConfig
        cli.parse(config, "", words[words.index(name) + 1 :])


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


def test_the_commands_of_the_training_page_parse():
    blocks = "".join(re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.S))
    configs = {"cache_tokens.py": "CacheConfig", "export_checkpoint.py": "ExportConfig", "plot_run.py": "PlotConfig"}
    configs["benchmark.py"] = "BenchmarkConfig"
    lines = [shlex.split(line) for line in blocks.splitlines()]
    assert len(lines) == 5
    for words in lines:
        name = next(word for word in words if word.endswith(".py")).removeprefix("scripts/")
        config = getattr(script(name.removesuffix(".py")), configs[name])
        cli.parse(config, "", words[words.index(f"scripts/{name}") + 1 :])


def test_the_commands_for_own_images_run(tmp_path):
    export_fashion_mnist(tmp_path / "demo" / "images")
    for words in commands("Train on your own images"):
        assert words[0] == "python"
        words = [re.sub("^out/", f"{tmp_path}/", word) for word in words[1:]]
        if "--max_minutes" in words:
            words[words.index("--max_minutes") + 1] = "0.05"
        result = run_in_shell(*words, OMP_NUM_THREADS="2")
        assert result.returncode == 0, (words, result.stderr)
    assert (tmp_path / "samples.png").exists()
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    variables = {}
    exec(code.replace("out/", f"{tmp_path}/"), variables)
    assert variables["out"].images.shape == (2, 3, 32, 32)


def test_scripts_of_the_presets_are_the_commands_of_the_readme():
    for words in commands("Train on ImageNet")[:5]:
        depth = next(word for word in words if word.startswith("--depth=")).removeprefix("--depth=")
        text = (ROOT / "scripts" / f"d{depth}.sh").read_text()
        assert " ".join(words[words.index("train.py") :]) in text
