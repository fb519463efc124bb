"""The map of the house: which rooms there are, and which may import from which. An arrow that is not here is a decision."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A file belongs to the room of its longest prefix; from top to bottom, so that every arrow points downwards.
ROOMS = {
    "scripts/checks/": "checks",
    "scripts/benchmark": "benchmarks",  # benchmark.py and benchmarks/
    "scripts/": "commands",
    "train.py": "commands",
    "sample.py": "commands",
    "trainer.py": "trainer",
    "utils/checkpoint.py": "loading",
    "utils/official.py": "loading",
    "utils/tasks/": "tasks",
    "utils/losses/": "losses",
    "utils/studies/": "studies",
    "utils/runs/": "runs",
    "utils/sampling/": "sampling",
    "utils/metrics/": "metrics",
    "utils/analysis/": "analysis",
    "utils/data/": "data",
    "dist.py": "dist",
    "utils/": "utils",
    "models/": "models",
}
ALLOWED = {
    "checks": {"loading", "runs", "sampling", "metrics", "data", "utils", "models"},
    "benchmarks": {"commands", "trainer", "loading", "runs", "data", "dist", "utils", "models"},
    "commands": {
        "trainer",
        "loading",
        "tasks",
        "losses",
        "studies",
        "runs",
        "sampling",
        "metrics",
        "analysis",
        "data",
        "dist",
        "utils",
        "models",
    },
    "trainer": {"runs", "data", "dist", "utils"},
    "loading": {"runs", "data", "models"},
    "tasks": {"losses", "runs", "metrics", "data", "dist", "utils", "models"},
    "losses": {"dist", "utils", "models"},
    "studies": {"runs", "sampling", "utils", "models"},
    "runs": {"sampling", "metrics", "data", "dist", "utils", "models"},
    "sampling": {"metrics", "data", "utils", "models"},
    "metrics": {"data", "dist", "utils", "models"},
    "analysis": {"utils", "models"},
    "data": {"utils", "models"},
    "dist": set(),
    "utils": set(),
    "models": set(),
}
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("", "models", "utils", "scripts")
    for path in (ROOT.glob("*.py") if folder == "" else (ROOT / folder).rglob("*.py"))
)


def room_of(path: Path) -> str:
    fitting = [prefix for prefix in ROOMS if path.as_posix().startswith(prefix)]
    assert fitting, f"{path} is in no room: is it in the right place?"
    return ROOMS[max(fitting, key=len)]


def file_of(module: str) -> Path | None:
    """The file of a module of ours, None for others."""
    path = Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def imports(path: Path) -> set[Path]:
    """Files of ours that a file imports anywhere in it, for type hints too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if file_of(name) else node.module for name in names]
        else:
            continue
        found |= {file for file in map(file_of, names) if file is not None}
    return found - {path}


GRAPH = {path: imports(path) for path in FILES}


def test_no_room_imports_from_one_that_it_may_not():
    arrows = {(room_of(path), room_of(target)): (path, target) for path in FILES for target in GRAPH[path]}
    new = {f"{a} -> {b}": files for (a, b), files in arrows.items() if a != b and b not in ALLOWED[a]}
    assert not new
    unused = {f"{a} -> {b}" for a, targets in ALLOWED.items() for b in targets if (a, b) not in arrows}
    assert not unused, "an arrow that is gone is taken off the map"


def test_the_map_has_no_circle():
    order = list(ALLOWED)
    assert all(order.index(a) < order.index(b) for a, targets in ALLOWED.items() for b in targets)


def test_scores_and_losses_know_nothing_of_each_other():
    """A score by what was trained against would flatter: neither reaches the other, not over third files either."""
    for start, forbidden in (("losses", "metrics"), ("metrics", "losses")):
        reached = {path for path in FILES if room_of(path) == start}
        while more := {target for path in reached for target in GRAPH[path]} - reached:
            reached |= more
        assert not [path for path in reached if room_of(path) == forbidden]


@pytest.mark.parametrize("folder", ["", "models", "utils", "scripts"])
def test_no_files_import_each_other_in_a_circle(folder):
    left = {path: {target for target in GRAPH[path]} for path in FILES if path.as_posix().startswith(folder)}
    while True:  # take away whatever imports nothing that is left
        free = [path for path, targets in left.items() if not targets & left.keys()]
        if not free:
            break
        for path in free:
            del left[path]
    assert not left


def test_models_stand_alone():
    """They can be taken into another project: nothing of ours but themselves, no ranks, no training."""
    outside = {target for path in FILES if path.parts[0] == "models" for target in GRAPH[path] if target.parts[0] != "models"}
    assert not outside


SLOW = ("matplotlib", "sklearn", "timm", "torch_fidelity", "torchmetrics", "torchvision")  # a second or more each
SLOW_PARTS = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor")


def test_what_takes_seconds_is_imported_where_it_is_needed():
    """So that a command says at once that a flag is wrong, and none waits for what it does not use."""
    for path in FILES:
        if room_of(path) == "checks":
            continue
        for node in ast.parse((ROOT / path).read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(SLOW_PARTS) or name.split(".")[0] in SLOW], path


def test_no_file_is_too_long_to_be_read():
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 450, max(lengths, key=lengths.get)
    assert lengths["trainer.py"] < 350
