"""scripts/study.py as a command: stopped, gone on with, with a run that fails."""

import json
import os
import signal
import subprocess
import time

import pytest
from commands import ROOT, make_images, make_tokenizer
from forked import run_forked

from utils.processes import environment, shell_words

PLAN = """
question = "Does it go on?"
data = "{folder}/images"
seeds = 1
tokenizer = {{ source = "{folder}/tokenizer" }}
common = {{ depth = 1, width = 64, heads = 1, bs = 8 }}
samples = 20
sampling = {{ batch = 16 }}

[[comparisons]]
name = "some steps"
steps = 4
rows.VAR = {{ family = "var" }}
rows.impossible = {{ family = "var", tblr = 1e30 }}
rows."M-VAR" = {{ family = "mvar" }}
"""


def study(folder, *words):
    return ["scripts/study.py", folder / "plan.toml", "--out", folder / "out", "--results", folder / "results", *words]


def scores(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").glob("*/samples-*.json")}


def test_a_study_is_stopped_and_gone_on_with(tmp_path):
    """What is there is not made again; the tables tell what is missing, and which run has failed and why; nothing runs on."""
    make_images(tmp_path / "images")
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "plan.toml").write_text(PLAN.format(folder=tmp_path))
    process = subprocess.Popen(
        shell_words(*study(tmp_path, "--jobs=1")), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and not scores(tmp_path):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, output
    first = scores(tmp_path)
    assert len(first) == 1
    assert "Not complete" in (tmp_path / "results" / "plan.md").read_text()

    result = run_forked("scripts/study.py", "plan.toml", "--out=out", "--results=results", cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("study.py: error: 1 of 3 runs failed, such as impossible, seed 0: train.py ended with exit code 1")
    assert "not finite" in last or "nan" in last
    assert first.items() < scores(tmp_path).items()

    stored = json.loads((tmp_path / "results" / "plan.json").read_text())
    runs = [run for run in stored["runs"] if "failed" not in run]
    assert [(run["row"], run["seed"]) for run in runs] == [("VAR", 0), ("M-VAR", 0)]
    for run in runs:
        assert run["steps"] == 4
        assert [step for step, _ in run["curve"]] == [1, 2, 3, 4]
        assert run["val_loss"] == run["curve"][-1][1]
        assert run["fd"] > 0
        assert run["sampling_seconds"] > 0
    table = (tmp_path / "results" / "plan.md").read_text()
    assert "| impossible | 0, 1 failed |" in table
    assert "failed: impossible, seed 0: train.py ended with exit code 1" in table
    assert (tmp_path / "results" / "plan_some_steps.png").exists()
    assert len((tmp_path / "results" / "plan.csv").read_text().splitlines()) == 1 + 3

    text = (tmp_path / "plan.toml").read_text()
    (tmp_path / "plan.toml").write_text(text.replace("rows.VAR", "rows.other"))
    result = run_forked(*study(tmp_path))
    assert result.returncode == 1
    assert "has runs that the plan does not ask for, such as some steps: VAR, seed 0: give another --results" in result.stderr
    assert (tmp_path / "results" / "plan.md").read_text() == table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.toml"], "none.toml: no such plan"),
        (["{folder}/plan.toml", "--jobs=0"], "--jobs=0: give 1 or more"),
        (["{folder}/plan.toml", "--out={folder}/plan.toml"], "is a file: give --out the name of a directory"),
        (["{folder}/plan.toml"], "images': not there: put a folder with train/ and val/ there"),
    ],
)
def test_what_cannot_be_studied_is_told_in_one_line(tmp_path, words, message):
    (tmp_path / "plan.toml").write_text(PLAN.format(folder=tmp_path))
    folders = ["--out={folder}/out", "--results={folder}/results"]
    words = [word.format(folder=tmp_path) for word in (words if len(words) > 1 else [*words, *folders])]
    result = run_forked("scripts/study.py", *words)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
