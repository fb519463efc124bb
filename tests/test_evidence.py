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
