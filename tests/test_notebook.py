"""The notebook, cell by cell, with a tiny model in place of the demo's."""

import json
from pathlib import Path

from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"


def test_every_cell_runs(trained_var, monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict = {}
    shown = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] != "code":
            continue
        *before, last = "".join(cell["source"]).splitlines()
        exec("\n".join(before), names)
        if last.startswith("plots."):
            shown.append(eval(last, names))
        else:
            exec(last, names)
        if "CHECKPOINT" in names:
            names["CHECKPOINT"] = trained_var
    assert len(shown) == 4
    assert all(isinstance(picture, Image.Image) for picture in shown)
