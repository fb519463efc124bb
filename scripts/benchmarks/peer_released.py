"""A process in which an unmodified checkout of FoundationVision/VAR samples; scripts/benchmarks/peer.py starts it and asks.

    python scripts/benchmarks/peer_released.py CHECKOUT FOLDER DEPTH

It takes the tokenizer's weights from FOLDER/vae.pth, leaves those of the transformer in FOLDER/var.pth, and then answers a line
of JSON with a line of JSON. Its package `models` is the checkout's: nothing of ours but the clock is imported here.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT, FOLDER, DEPTH = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sys.path[0] = str(CHECKOUT)
sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from models import build_vae_var
from scripts.benchmarks.timing import timed


def requests() -> Iterator[dict]:
    """What is asked, one after the other; what the checkout prints goes elsewhere."""
    yield from map(json.loads, sys.stdin)


def answer(channel: int, reply: dict) -> None:
    os.write(channel, (json.dumps(reply) + "\n").encode())


def main() -> None:
    channel = os.dup(1)
    os.dup2(2, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    vae, var = build_vae_var(device, depth=DEPTH, init_adaln_gamma=0.5, init_head=1.0)
    vae.load_state_dict(torch.load(FOLDER / "vae.pth", map_location=device, weights_only=True))
    for model in (vae, var):
        model.eval().requires_grad_(False)
    torch.save(var.state_dict(), FOLDER / "var.pth")
    answer(channel, {"ready": True})
    for request in requests():
        torch.set_num_threads(request["threads"])
        labels = torch.tensor(request["labels"], device=device)
        how = {"cfg": request["cfg"], "top_k": request["top_k"], "top_p": request["top_p"]}

        def sample(request=request, labels=labels, how=how) -> torch.Tensor:
            # as its demo_sample.ipynb does, which names float16 and says that bfloat16 can be faster
            half = torch.float16 if request["precision"] == "float16" else torch.bfloat16
            enabled = request["precision"] != "float32"
            with torch.inference_mode(), torch.autocast(device.type, enabled=enabled, dtype=half, cache_enabled=True):
                return var.autoregressive_infer_cfg(B=len(labels), label_B=labels, g_seed=request["seed"], **how)

        seconds, peak, images = timed(sample, device)
        if request["images"]:
            np.save(request["images"], images.float().cpu().numpy())
        answer(channel, {"seconds": seconds, "peak_bytes": peak})


if __name__ == "__main__":
    main()
