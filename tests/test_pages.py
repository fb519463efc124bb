"""A reader who types the commands of README.md and docs/ gets what they say: all that need nothing special are run here.

Fewer steps, minutes and images, else as they are printed; those that need something are read by tests/test_readme.py.
"""

import shutil
from unittest.mock import patch

import pytest
from printed import PAGES, blocks, run_page

from utils.data import fashion_mnist
from utils.data.fashion_mnist import read_fashion_mnist

FEW = 400  # of the embedded images, in file order: their names are then those of the whole set
WITH_COMMANDS = [page for page in PAGES if any(not block.marker for block in blocks(page))]


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The root of a repository in which `make demo` has written its images, after the commands of the README."""
    root = tmp_path_factory.mktemp("reader")
    few = [array[:FEW] for array in read_fashion_mnist()]
    with patch.object(fashion_mnist, "read_fashion_mnist", lambda: few):
        fashion_mnist.export_fashion_mnist(root / "out" / "demo" / "images")
    return root, run_page("README.md", root)


@pytest.fixture(scope="module")
def demo(readme):
    """The same with what else `make demo` leaves, which other pages begin with; not to be changed."""
    root, _ = readme
    for name, made in (("tokenizer", "tokenizer"), ("refined", "tokenizer"), ("tokens", "tokens"), ("transformer", "run")):
        shutil.copytree(root / "out" / made, root / "out" / "demo" / name)
    return root


def test_the_readme(readme):
    root, (variables,) = readme
    assert variables["out"].images.shape == (2, 3, 32, 32)
    assert (root / "out" / "samples.png").exists()


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if page != "README.md"])
def test_the_page(page, demo, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(demo, root)
    run_page(page, root)


def test_there_are_such_pages():
    """Most of the documentation can be tried by anybody."""
    wanted = {"README.md", *(f"docs/{name}.md" for name in ("own_images", "checkpoints", "evaluation", "pictures", "training"))}
    assert wanted <= set(WITH_COMMANDS)
