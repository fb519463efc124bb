"""scripts/checks/gpu_check.sh as far as it goes without a GPU."""

import json
import subprocess
import sys

import pytest
import torch
from commands import ROOT, environment


def gpu_check(*words) -> subprocess.CompletedProcess:
    command = ["scripts/checks/gpu_check.sh", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(PYTHON=sys.executable), capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    result = gpu_check(tmp_path / "out")
    assert result.returncode == 1
    assert "finds no CUDA GPU: run it where one is, or give --cpu" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_its_steps_on_a_cpu(tmp_path):
    (tmp_path / "attention.json").write_text("of an earlier run")
    result = gpu_check("--cpu", tmp_path)
    assert result.returncode == 0, result.stderr
    correctness = json.loads((tmp_path / "correctness.json").read_text())
    assert correctness["command"] == f"scripts/checks/gpu_check.sh --cpu {tmp_path}"
    assert correctness["tests"] > 20
    assert (correctness["exit_code"], correctness["failures"], correctness["errors"]) == (0, 0, 0)
    for name in ("scan_d16", "training_d16", "sampling_d16", "training_d24", "sampling_d24", "attention", "table"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert f"\n{name}\n| " in result.stdout
