import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest
from commands import ROOT

from models.storage import from_dict
from utils import cli
from utils.cli import argument, arguments, flag, required


@dataclass(frozen=True)
class Example:
    source: str = required("where from")
    size: int = flag(3, "how large", "--length")
    fast: bool = flag(False, "at once")
    rate: float | None = flag(None, "how often")

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"--size={self.size}: give 0 or more")


@dataclass(frozen=True)
class Positional:
    command: str = argument("what to do", choices=("show", "count"))
    runs: tuple[str, ...] = arguments("of what")
    size: int = flag(3, "how large")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--source=a"], Example("a")),
        (["--source", "a", "--length=5", "--fast"], Example("a", 5, True)),
        (["--source=a", "--fast=False", "--rate=0.5"], Example("a", rate=0.5)),
        (["--source=a", "--fast=1"], Example("a", fast=True)),
    ],
)
def test_flags_fill_the_dataclass(words, expected):
    assert cli.parse(Example, "", words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments are required: --source"),
        (["--source=a", "--size=-1"], "--size=-1: give 0 or more"),
        (["--source=a", "--rate=nan"], "argument --rate: 'nan' is not finite: give a number that ends"),
        (["--source=a", "--rate=-inf"], "'-inf' is not finite"),
        (["--source=a", "--rate=often"], "invalid float value: 'often'"),
        (["--source=a", "--fast=maybe"], "'maybe' is neither true nor false"),
        (["--source=a", "--siz=1"], "unrecognized arguments: --siz=1"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Example, "", words)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["show", "a", "b", "--size=5"], ["show", "--size=5", "a", "b"], ["--size=5", "show", "a", "b"]]
)
def test_words_without_a_flag_fill_the_dataclass_by_their_place(words):
    assert cli.parse(Positional, "", words) == Positional("show", ("a", "b"), 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: command, runs"),
        (["show"], "required: runs"),
        (["draw", "a"], "argument command: invalid choice: 'draw' (choose from "),
    ],
)
def test_wrong_and_missing_words_get_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Positional, "", words)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("size", ["[0] * 10**18", "torch.empty(10**18)"], ids=["of Python", "of torch"])
def test_a_lack_of_memory_gets_one_line(size):
    program = f"import torch\nfrom utils import cli\ncli.run(lambda: {size})"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "error: out of memory (" in result.stderr
    assert result.stderr.endswith(": give smaller batches or a smaller model\n")
    assert result.stderr.count("\n") == 1


def test_a_lost_worker_that_comes_up_where_nothing_can_be_raised_is_not_told():
    """torch's signal handler raises wherever it interrupts."""
    program = (
        "from utils import cli\nclass Ends:\n    def __init__(self, text): self.text = text\n"
        "    def __del__(self): raise RuntimeError(self.text)\n"
        "def main():\n    Ends('DataLoader worker (pid 1) is killed')\n    Ends('another')\ncli.run(main)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "DataLoader worker" not in result.stderr
    assert "RuntimeError: another" in result.stderr


def test_the_traceback_can_be_asked_for(tmp_path):
    program = "from utils import cli\ndef main(): raise ValueError('wrong\\nhere')\ncli.run(main)"
    shown = {}
    for wanted in ("0", "1"):
        environment = {**os.environ, "MVAR_TRACEBACK": wanted, "RANK": "1"}
        words = [sys.executable, "-c", program]
        result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        shown[wanted] = result.stderr
    assert shown["0"].endswith("[rank 1]: error: wrong here\n")
    assert "Traceback" in shown["1"]


def test_configuration_survives_a_dictionary_and_unknown_keys_do_not():
    example = Example("a", 7)
    assert from_dict(Example, asdict(example), "file") == example
    with pytest.raises(ValueError, match="file: Example has no field colour"):
        from_dict(Example, {**asdict(example), "colour": 1}, "file")
    with pytest.raises(ValueError, match="file: Example needs source"):
        from_dict(Example, {}, "file")
