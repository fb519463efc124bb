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
    known = {"Two commands", "Train on ImageNet", "Train on your own images", "Sample from released weights"}
    assert {name for name in SECTIONS if "```bash" in SECTIONS[name]} == known
    makefile = (ROOT / "Makefile").read_text()
    assert [words[:1] for words in commands("Two commands")] == [["make"], ["make"]]
    assert all(f"\n{words[1]}:" in makefile for words in commands("Two commands"))


@pytest.mark.parametrize("section", ["Train on ImageNet", "Sample from released weights"])
def test_marked_commands_parse(section):
    assert SECTIONS[section].lstrip().startswith("*These commands need")
    for words in commands(section):
        name = next(word for word in words if word.endswith(".py"))
        config = CONFIGS.get(name) or script("cache_tokens").CacheConfig
        cli.parse(config, "", words[words.index(name) + 1 :])


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
