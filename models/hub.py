"""The Hugging Face hub: names there, downloads with clear errors, and what both model classes inherit to be had from it.

Everything that concerns the hub is left to huggingface_hub: cache, revisions, offline mode, tokens, uploads. Ours are the two
files that make a model (models/storage.py) and the card (models/model_card.py).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants, errors, hf_hub_download

from models.model_card import Facts, card_text, eval_results, read_scores, signed
from models.storage import CONFIG, WEIGHTS, Description, first_line, read_model, save_model, weights_file

TAGS = ["image-generation", "visual-autoregressive", "pytorch"]
TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ text }}"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
# What the client raises; HTTPError is the base of its transport errors, which are no OSErrors. RuntimeError is what the
# versions 1.3 to 1.6 come to without a network: they close a connection that was refused, and try it again.
HUB_ERRORS = (errors.HTTPError, errors.EntryNotFoundError, errors.HFValidationError, OSError, RuntimeError)


class HubName(NamedTuple):
    """owner/name[@revision][:file]; without a file it means a model in our format."""

    repository: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """None where the text cannot be such a name."""
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?", text)
        return cls(*match.groups()) if match else None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def download(name: HubName, **options) -> Path:
    """The weights file in the client's cache, for a model in our format with config.json beside it.

    What is in the cache already is not loaded again, and serves where there is no network. options: of hf_hub_download.
    FileNotFoundError, in one line with the mend, where the file cannot be had.
    """
    file = name.file or CONFIG
    try:
        path = Path(hf_hub_download(name.repository, file, revision=name.revision, **options))
        if name.file is None:
            # of the same commit, whatever is pushed meanwhile: the cache has a folder for each
            file, commit = WEIGHTS, path.parent.name
            path = Path(hf_hub_download(name.repository, file, revision=commit, **options))
    except HUB_ERRORS as error:
        cache = options.get("cache_dir") or constants.HF_HUB_CACHE
        raise FileNotFoundError(f"{name}: no such path here, and {reason(error, name, file, cache)}") from error
    return path


def reason(error: Exception, name: HubName, file: str = "", cache: str | Path = "") -> str:
    """What went wrong between us and the hub, and the mend, in one line."""
    offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ and not offline:
        error = error.__cause__  # why what is not in the cache was not downloaded
    repo_id, page, message = name.repository, f"{constants.ENDPOINT}/{name.repository}", first_line(error)
    unreachable = f"the hub at {constants.ENDPOINT} is out of reach ({message}): check the network, or give a path"
    other = f"it could not be had from the hub ({message})"
    allow = "unset HF_HUB_OFFLINE to download it" if offline else "download it without local_files_only"
    foreign = "" if name.file else f"it is no model of this project: name a file of it, as in {name}:FILE, "
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    retry = f"check the rights of your token, or {LOG_IN}" if status in (401, 403) else "try again later, or give a path"
    reasons = {  # the first that fits
        errors.LocalEntryNotFoundError: f"{file} is not in the cache {cache}: {allow}",
        errors.GatedRepoError: f"{repo_id} is for those who have accepted its conditions: accept them at {page}, then {LOG_IN}",
        errors.RepositoryNotFoundError: f"there is no {repo_id} on the hub, or it is private: check the spelling, or {LOG_IN}",
        errors.RevisionNotFoundError: f"{repo_id} has no revision {name.revision}: see {page}/commits/main",
        errors.EntryNotFoundError: f"{repo_id} has no {file}: {foreign}see {page}/tree/{name.revision or 'main'}",
        errors.HfHubHTTPError: f"the hub at {constants.ENDPOINT} answered {status}: {retry}",
        errors.HTTPError: unreachable,
        RuntimeError: unreachable if "client has been closed" in message else other,
        errors.HFValidationError: f"the hub has no such names ({message}): check the spelling",
        BaseException: other,
    }
    return next(text for kind, text in reasons.items() if isinstance(error, kind))


class HubModel(PyTorchModelHubMixin, library_name="m-var", tags=TAGS, model_card_template=TEMPLATE):
    """from_pretrained, save_pretrained and push_to_hub, in the format of models/storage.py and with our card.

    A model carries its description, so that what is loaded from a run is saved with its class names, tokenizer and settings.
    model_card_kwargs of save_pretrained and push_to_hub are the arguments of `generate_model_card`. As with all models of the
    client, save_pretrained leaves a README.md that is there already as it is.
    """

    config_class: ClassVar[type]  # of the one argument of the constructor
    description: Description  # of the class: its kind and nothing else
    facts: Callable[..., Facts]  # for the card; its one argument says where the model is loaded from

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "HubModel":
        """A model in eval mode, on the CPU, from "owner/name[@revision]" on the hub or a checkpoint directory of ours.

        Of a directory, the averaged weights where there are any. ValueError or FileNotFoundError for anything else; released
        files, runs and sharded checkpoints are read by utils.checkpoint.
        """
        directory = Path(source)
        if not directory.is_dir():
            name = HubName.parse(str(source))
            if name is None or name.file is not None:
                raise FileNotFoundError(f"{source}: no such directory: give a checkpoint directory or owner/name on the hub")
            name = name._replace(revision=revision or name.revision)
            options = {"cache_dir": cache_dir, "token": token, "force_download": force_download}
            directory = download(name, **options, local_files_only=local_files_only).parent
        if missing := [name for name in (CONFIG, WEIGHTS) if not (directory / name).exists()]:
            raise FileNotFoundError(
                f"{source}: has no {' and no '.join(missing)}: give a checkpoint directory; of a run or of shards, "
                "scripts/export_checkpoint.py makes one"
            )
        return read_model(cls, weights_file(directory))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(save_directory, self, self.description)

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options) -> str:
        """Upload model.safetensors, config.json and the card; returns the URL of the commit. options: as in the client.

        OSError, in one line with the mend, where the hub does not take it.
        """
        try:
            return super().push_to_hub(repo_id, model_card_kwargs={"name": repo_id, **(model_card_kwargs or {})}, **options)
        except HUB_ERRORS as error:
            raise OSError(f"{repo_id}: not published: {reason(error, HubName(repo_id))}") from error

    def generate_model_card(
        self, *, name: str | None = None, scores: dict | None = None, license: str | None = None, dataset: str | None = None
    ) -> ModelCard:
        """The README.md of the model: what it is, how to load it, how it was trained, how good it is.

        name: owner/name on the hub. scores: what scripts/evaluate.py --json wrote, or names with numbers such as {"FID": 3.07}.
        license: its identifier on the hub, such as "mit"; none is claimed without. dataset: on which it was scored.
        """
        facts, columns = self.facts(name or "DIRECTORY"), read_scores(scores or {})
        card = super().generate_model_card(text=card_text(facts, self.description.training, scores or {}, columns))
        card.data.license = license
        if columns:
            card.data.model_name = name or facts.title
            card.data.eval_results = eval_results(scores, columns, dataset)
        return ModelCard(signed(str(card)))
