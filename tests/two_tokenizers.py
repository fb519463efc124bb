"""Train a tokenizer on two ranks and say whether both ended with the same one, for tests/test_train_tokenizer.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dist import Ranks, process_group
from scripts.train_tokenizer import ImageReconstruction, run_config
from trainer import Trainer
from utils import cli
from utils.runs.tokenizer_config import TokenizerTraining


def train(config: TokenizerTraining, ranks: Ranks) -> None:
    """A function of its own, so that what spreads models over the ranks is gone before the group is."""
    task = ImageReconstruction(config, ranks)
    first = task.tokenizer.quantizer.codebook.weight.detach().clone()
    Trainer(task, run_config(config), ranks).fit()
    for part, model in (("tokenizer", task.tokenizer), ("discriminator", task.critic.model)):
        weights = ranks.gather(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        if ranks.is_main and torch.equal(weights[0], weights[1]):
            print(f"the same {part} on both ranks")
    if ranks.is_main and bool((task.tokenizer.quantizer.codebook.weight != first).any(dim=1).all()):
        print("all codes have moved")


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = cli.parse(TokenizerTraining, "")
    with process_group() as ranks:
        train(config, ranks)
