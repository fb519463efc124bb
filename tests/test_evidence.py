import json
import subprocess
import sys

from utils import evidence


def test_a_stored_figure_has_its_circumstances(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(evidence.ROOT / "scripts" / "checks" / "soak.py"), "--kills", "3"])
    evidence.store(tmp_path / "new" / "figures.json", {"rows": [1.5]})
    stored = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert set(stored) == {"command", "device", "versions", "commit", "rows"}
    assert stored["command"] == "python scripts/checks/soak.py --kills 3"
    assert set(stored["versions"]) == {"python", "torch"}


def test_the_commit_is_that_of_the_repository_and_unknown_elsewhere(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert evidence.commit() == "unknown"
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "a")
    clean = evidence.commit()
    assert len(clean) == 7
    (tmp_path / "file").write_text("b")
    assert evidence.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert evidence.commit() == "unknown"


def test_runs_grow_one_by_one_and_stand_in_a_table_with_their_spread(tmp_path, capsys):
    columns = {"distance": evidence.over_seeds("fd", ".1f"), "loss": evidence.over_seeds("loss", ".2f")}
    stored = evidence.GrowingRuns(tmp_path / "runs.json", columns)
    assert not stored.has(row="a", seed=0)
    for run in (
        {"row": "a", "seed": 0, "fd": 1.0},
        {"row": "a", "seed": 1, "fd": 3.0},
        {"row": "b", "seed": 0, "fd": 2.0, "loss": 5},
    ):
        stored.add(run, data="images")
    assert stored.has(row="a", seed=1)
    assert not stored.has(row="b", seed=1)
    again = json.loads((tmp_path / "runs.json").read_text())
    assert (again["data"], [run["fd"] for run in again["runs"]]) == ("images", [1.0, 3.0, 2.0])
    assert (tmp_path / "runs.md").read_text().splitlines() == [
        "|  | seeds | distance | loss |",
        "|---|---|---|---|",
        "| a | 2 | 2.0 ± 1.4 |  |",
        "| b | 1 | 2.0 | 5.00 |",
    ]
    assert len(capsys.readouterr().out.splitlines()) == 3
