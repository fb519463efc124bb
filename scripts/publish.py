"""Put a tokenizer or transformer of ours on the Hugging Face hub: model.safetensors, config.json and a model card.

Of a run, the averaged weights of its last complete checkpoint. Log in first, with `hf auth login` or HF_TOKEN.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import HfApi, errors, get_token, hf_hub_download

from models.hub import HUB_ERRORS, LOG_IN, HubName, reason
from models.model_card import is_edited, read_scores
from models.precision import cast_for_file_
from models.storage import Description, weights_hash
from models.tokenizer import VQVAE
from models.transformer import ScaleTransformer
from utils import cli
from utils.checkpoint import DTYPE_HELP, DTYPES, load_description, load_tokenizer, load_tokenizer_for, load_transformer
from utils.cli import argument, flag
from utils.data.token_cache import check_trained_on

LOCAL = ("data_path", "local_out_dir_path", "out", "vae", "token_cache", "init_from", "refine", "lpips_weights", "gan_weights")


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
    dtype: str = flag("", DTYPE_HELP, choices=DTYPES)
    private: bool = flag(False, "let nobody else see it: the repository is made so, or has to be so already")
    keep_card: bool = flag(False, "leave the card that is there, which people have edited")
    replace_card: bool = flag(False, "write another one in its place")

    def __post_init__(self):
        name = HubName.parse(self.repository)
        if name is None or name != (self.repository, None, None):
            raise ValueError(f"{self.repository}: no name of a repository: give owner/name")
        if self.dataset and not self.scores:
            raise ValueError(f"--dataset={self.dataset}: says what --scores belong to: give these too")
        if self.keep_card and self.replace_card:
            raise ValueError("--keep_card with --replace_card: give one of them")


def read_scores_of(path: str) -> dict:
    """ValueError for what are no scores."""
    try:
        scores = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}): give what scripts/evaluate.py --json wrote") from error
    if not isinstance(scores, dict) or not scores:
        raise ValueError(f"{path}: holds no scores: give what scripts/evaluate.py --json wrote")
    try:
        read_scores(scores)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return scores


def public_tokenizer(config: PublishConfig, named: str | None) -> str:
    """The tokenizer that others can have too; named: by the checkpoint. ValueError where there is none."""
    tokenizer = config.tokenizer or named or ""
    if HubName.parse(tokenizer) is None or Path(tokenizer).exists():
        what = f"its tokenizer is {tokenizer}, which only this machine has" if tokenizer else "it does not name its tokenizer"
        raise ValueError(f"{config.source}: {what}: publish that and give --tokenizer owner/name")
    return tokenizer


def check_scores(scores: dict, model: VQVAE | ScaleTransformer, source: str, unrounded: str) -> None:
    """ValueError for scores of other weights than those of the model; what does not say whose it is, is told.

    unrounded: hash of the weights before they were cast.
    """
    kind = model.description.kind
    known = (scores.get("dump") or {}).get(f"{kind}_sha256") or (scores.get("tokenizer") or {}).get("weights_sha256")
    if known and known == unrounded != weights_hash(model):
        raise ValueError(
            f"{source}: the scores are of its weights before --dtype rounds them: score what scripts/export_checkpoint.py "
            "makes of it with the same --dtype, and publish that, or leave --dtype out"
        )
    if known and known != weights_hash(model):
        raise ValueError(
            f"{source}: the scores are of weights with hash {known[:12]}, these have {weights_hash(model)[:12]}: "
            "score samples of these, or give --scores of them"
        )
    if not known:
        print(f"the scores do not say of which weights they are; those of dumps by sample.py do: {source}", file=sys.stderr)


def public(training: dict) -> dict:
    """Settings of a run without the paths of the machine that it ran on."""
    return {
        name: value
        for name, value in training.items()
        if name not in LOCAL and not (isinstance(value, str) and Path(value).is_absolute())
    }


def check_repository(config: PublishConfig) -> None:
    """Look before anything is loaded: OSError where the hub would not take it.

    ValueError where others see what is to be private, or a card that people have edited would be lost.
    """
    if get_token() is None:
        raise OSError(f"{config.repository}: not published: there is no token here: {LOG_IN}")
    name = HubName(config.repository)
    try:
        found = HfApi().model_info(config.repository)
    except errors.RepositoryNotFoundError:
        return  # it will be made
    except HUB_ERRORS as error:
        raise OSError(f"{config.repository}: not published: {reason(error, name)}") from error
    if config.private and not found.private:
        raise ValueError(f"{config.repository}: is public: make it private on the hub first, or leave --private out")
    try:
        card = Path(hf_hub_download(config.repository, "README.md")).read_text()
    except HUB_ERRORS:
        return
    if is_edited(card) and not (config.keep_card or config.replace_card):
        raise ValueError(f"{config.repository}: people have written in its card: give --keep_card, or --replace_card")


def load(config: PublishConfig, description: Description) -> VQVAE | ScaleTransformer:
    """The model, described for others. ValueError for a transformer whose tokenizer they cannot have, or have another of."""
    if description.kind == "tokenizer":
        model, tokenizer = load_tokenizer(config.source), None
    else:
        tokenizer = public_tokenizer(config, description.tokenizer)
        model = load_transformer(config.source)
    if tokenizer and description.tokenizer_hash and not config.any_tokenizer:
        published = load_tokenizer_for(tokenizer, model.pyramid)
        check_trained_on(description.tokenizer_hash, published, config.source, tokenizer)
    model.description = replace(model.description, tokenizer=tokenizer, training=public(description.training))
    return model


def main() -> None:
    config = cli.parse(PublishConfig, __doc__)
    description = load_description(config.source)
    if description is None:
        raise ValueError(f"{config.source}: a released file: turn it into ours with scripts/convert_official.py")
    if description.kind == "tokenizer" and config.tokenizer:
        raise ValueError(f"{config.source}: is a tokenizer itself: leave --tokenizer out")
    if description.kind == "transformer":
        public_tokenizer(config, description.tokenizer)
    scores = read_scores_of(config.scores) if config.scores else None
    check_repository(config)
    model = load(config, description)
    unrounded = weights_hash(model) if scores else ""
    cast_for_file_(model, config.dtype or model.description.precision)
    if scores:
        check_scores(scores, model, config.source, unrounded)
    card = {
        "scores": scores,
        "dataset": config.dataset or None,
        "license": config.license or None,
    }
    private = True if config.private else None  # None: as the owner has set it for new repositories
    left_out = ["README.md"] if config.keep_card else None
    url = model.push_to_hub(config.repository, private=private, model_card_kwargs=card, ignore_patterns=left_out)
    print(f"published {config.source}: {url}")


if __name__ == "__main__":
    cli.run(main)
