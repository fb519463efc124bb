"""Put a tokenizer or transformer of ours on the Hugging Face hub: model.safetensors, config.json and a model card.

Of a run, the averaged weights of its last complete checkpoint. Log in first, with `hf auth login` or HF_TOKEN.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.hub import HubName
from utils import cli
from utils.checkpoint import load_description, load_tokenizer, load_tokenizer_for, load_transformer
from utils.cli import argument, flag
from utils.data.token_cache import fingerprint, is_of, short


@dataclass(frozen=True)
class PublishConfig:
    """Arguments of scripts/publish.py."""

    source: str = argument("run or checkpoint directory")
    repository: str = argument("owner/name on the hub; made where there is none")
    tokenizer: str = flag("", "of a transformer: where on the hub its tokenizer is, owner/name[:file]")
    any_tokenizer: bool = flag(False, "do not compare it with the one that the transformer was trained with")
    scores: str = flag("", "file that scripts/evaluate.py --json wrote, for the model card")
    dataset: str = flag("", "name of the images that --scores compares with, for the model card")
    license: str = flag("", "its identifier on the hub, such as mit; empty: none is claimed")
    private: bool = flag(False, "where the repository is made, let nobody else see it")

    def __post_init__(self):
        name = HubName.parse(self.repository)
        if name is None or name != (self.repository, None, None):
            raise ValueError(f"{self.repository}: no name of a repository: give owner/name")
        if self.dataset and not self.scores:
            raise ValueError(f"--dataset={self.dataset}: says what --scores belong to: give these too")


def read_json(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}): give what scripts/evaluate.py --json wrote") from error


def public_tokenizer(config: PublishConfig, named: str | None) -> str:
    """The tokenizer that others can have too; named: by the checkpoint. ValueError where there is none."""
    tokenizer = config.tokenizer or named or ""
    if HubName.parse(tokenizer) is None or Path(tokenizer).exists():
        what = f"its tokenizer is {tokenizer}, which only this machine has" if tokenizer else "it does not name its tokenizer"
        raise ValueError(f"{config.source}: {what}: publish that and give --tokenizer owner/name")
    return tokenizer


def main() -> None:
    config = cli.parse(PublishConfig, __doc__)
    description = load_description(config.source)
    if description is None:
        raise ValueError(f"{config.source}: a released file: turn it into ours with scripts/convert_official.py")
    if description.kind == "transformer":
        tokenizer = public_tokenizer(config, description.tokenizer)
        model = load_transformer(config.source)
        known = description.tokenizer_hash
        if known and not config.any_tokenizer:
            published = load_tokenizer_for(tokenizer, model.pyramid)
            if not is_of(known, published):
                raise ValueError(
                    f"{config.source}: was trained on tokens of a tokenizer with hash {short(known)}, {tokenizer} has "
                    f"{short(fingerprint(published))}: give --tokenizer of that one, or --any_tokenizer"
                )
        model.description = replace(description, tokenizer=tokenizer)
    elif config.tokenizer:
        raise ValueError(f"{config.source}: is a tokenizer itself: leave --tokenizer out")
    else:
        model = load_tokenizer(config.source)
    card = {
        "scores": read_json(config.scores) if config.scores else None,
        "dataset": config.dataset or None,
        "license": config.license or None,
    }
    private = True if config.private else None  # None: as the owner has set it for new repositories
    url = model.push_to_hub(config.repository, private=private, model_card_kwargs=card)
    print(f"published {config.source}: {url}")


if __name__ == "__main__":
    cli.run(main)
