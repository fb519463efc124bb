"""What a study asks: a plan, written in TOML and checked before anything runs.

    question = "What are windows worth?"
    data = "embedded"                    # or a folder with train/ and val/
    seeds = 3                            # of every row: 0, 1, ...
    tokenizer = { preset = "f8-32", max_steps = 1400 }    # flags of scripts/train_tokenizer.py; or { source = "..." }
    common = { depth = 6, width = 192 }  # flags of train.py of every row
    samples = 1000                       # of each run, to be scored
    sampling = { cfg = 1.5 }             # flags of sample.py
    reference = ""                       # scripts/evaluate.py scores by Inception against it; empty: two judges by the images

    [[comparisons]]
    name = "equal steps"
    steps = 600                          # or minutes = 2.0, or teraflops = 150.0: the budget of each row
    baseline = "M-VAR"                   # the row that all others are compared with
    rows."M-VAR" = { family = "mvar" }
    rows.Markov = { family = "markov" }

A comparison may have a grid instead of rows, or beside them: lists of values by flag, of which all combinations are rows.
"""

import difflib
import itertools
import math
import re
import tomllib
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from utils.runs.config import TrainConfig
from utils.runs.tokenizer_config import TokenizerTraining
from utils.sampling.config import SampleConfig

EMBEDDED = "embedded"  # the images that come with the repository
Flags = dict[str, Any]
# flags that a study sets itself, by command
OF_TRAINING = ("data_path", "token_cache", "vae", "seed", "max_steps", "max_minutes", "val_every", "save_every", "keep")
OF_TRAINING += ("local_out_dir_path", "val_fd", "val_samples")
OF_TOKENIZER = ("data_path", "out", "save_every", "val_every")
OF_SAMPLING = ("ckpt", "vae", "out", "num", "seed", "format", "overwrite", "classes", "history")
NOWHERE = {"data_path": "DIR", "out": "DIR"}  # what flags of a tokenizer are checked with
BUDGETS = ("steps", "minutes", "teraflops")


@dataclass(frozen=True)
class Comparison:
    """Rows that are trained alike but for their flags, with as much of something for each.

    budget: one of BUDGETS, and how much of it: steps, minutes, or 1e12 floating-point operations of training. fit_by: a flag;
    for each of its values the loss of the rows is fitted over their parameters and operations.
    """

    name: str
    budget: tuple[str, float]
    rows: dict[str, Flags]
    baseline: str
    question: str = ""
    fit_by: str = ""

    @property
    def slug(self) -> str:
        """Of names of files."""
        return "_".join(re.findall(r"\w+", self.name))


@dataclass(frozen=True)
class Plan:
    """All of it. tokenizer: flags of its training, or `source`, one that is there. data_from: how to get data that is not."""

    name: str
    question: str
    comparisons: tuple[Comparison, ...]
    tokenizer: Flags
    data: str = EMBEDDED
    data_from: str = ""
    seeds: int = 3
    common: Flags = field(default_factory=dict)
    samples: int = 1000
    sampling: Flags = field(default_factory=dict)
    reference: str = ""

    def __post_init__(self):
        for name, least in (("seeds", 1), ("samples", 10)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: give {least} or more")
        if not self.comparisons:
            raise ValueError("nothing to compare: give [[comparisons]] with rows")
        names = [comparison.name for comparison in self.comparisons]
        pictures = [comparison.slug for comparison in self.comparisons]
        if twice := [name for name, slug in zip(names, pictures, strict=True) if pictures.count(slug) > 1]:
            raise ValueError(f"comparisons are named {' and '.join(map(repr, twice))}: give each letters of its own")

    def flags_of(self, comparison: Comparison, row: str) -> Flags:
        """Of train.py, without what the study sets."""
        return self.common | comparison.rows[row]


def read_plan(path: str | Path) -> Plan:
    """FileNotFoundError or ValueError, which names the file, the place in it and the value, where it is no plan."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such plan: give a file such as studies/families.toml")
    try:
        contents = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no TOML ({error}): correct it there") from error
    try:
        return _plan_of(path.stem, contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _plan_of(name: str, contents: Flags) -> Plan:
    _check_names(contents, [part.name for part in fields(Plan) if part.name != "name"], "a plan")
    for needed in ("question", "tokenizer", "comparisons"):
        if needed not in contents:
            raise ValueError(f"{needed} is missing: a plan says it")
    for key, kind in (
        ("question", str),
        ("data", str),
        ("data_from", str),
        ("reference", str),
        ("seeds", int),
        ("samples", int),
    ):
        if key in contents:
            _check_type(key, contents[key], kind)
    for key in ("tokenizer", "common", "sampling"):
        _check_type(key, contents.setdefault(key, {}), dict)
    tokenizer, common = contents["tokenizer"], contents["common"]
    if "source" in tokenizer:
        _check_names(tokenizer, ["source"], "tokenizer with a source")
        _check_type("source", tokenizer["source"], str)
    else:
        _check_flags(tokenizer, TokenizerTraining, OF_TOKENIZER, "tokenizer")
        _built(lambda: TokenizerTraining(**NOWHERE, **tokenizer), "tokenizer")
    kinds = _kinds_of(SampleConfig)
    for key, value in contents["sampling"].items():  # numbers that sample.py reads as texts, as it takes several
        if kinds.get(key) is str and type(value) in (int, float):
            contents["sampling"][key] = str(value)
    _check_flags(contents["sampling"], SampleConfig, OF_SAMPLING, "sampling")
    _built(lambda: SampleConfig(ckpt="RUN", out="samples.npz", format="npz", **contents["sampling"]), "sampling")
    _check_flags(common, TrainConfig, OF_TRAINING, "common")
    _check_type("comparisons", contents["comparisons"], list)
    comparisons = tuple(_comparison_of(part, common) for part in contents["comparisons"])
    return Plan(name, **{**contents, "comparisons": comparisons})


def _comparison_of(contents: Flags, common: Flags) -> Comparison:
    _check_type("comparisons", contents, dict)
    known = ["name", "question", "baseline", "fit_by", "rows", "grid", *BUDGETS]
    _check_names(contents, known, "a comparison")
    name = contents.get("name", "")
    _check_type("name", name, str)
    where = f"comparison {name!r}"
    if not name:
        raise ValueError("a comparison has no name: give it one")
    given = [budget for budget in BUDGETS if budget in contents]
    if len(given) != 1:
        raise ValueError(f"{where}: has {' and '.join(given) or 'no budget'}: give one of {', '.join(BUDGETS)}")
    budget = given[0]
    _check_type(budget, contents[budget], int if budget == "steps" else float)
    if not 0 < contents[budget] < math.inf:
        raise ValueError(f"{where}: {budget} = {contents[budget]}: give more than 0, and a number that ends")
    for key, kind in (("rows", dict), ("grid", dict), ("baseline", str), ("question", str), ("fit_by", str)):
        if key in contents:
            _check_type(key, contents[key], kind)
    rows = dict(contents.get("rows", {}))
    for row, flags in _grid_rows(contents.get("grid", {}), where).items():
        rows.setdefault(row, flags)
    if not rows:
        raise ValueError(f"{where}: has no rows: give rows, or a grid")
    for row, flags in rows.items():
        place = f"{where}, row {row!r}"
        _check_type(place, flags, dict)
        _check_flags(flags, TrainConfig, OF_TRAINING, place)
        _built(lambda flags=flags: TrainConfig(**(common | flags), token_cache="DIR"), place)
        if budget == "teraflops" and (other := partial_steps(common | flags)):
            raise ValueError(f"{place}: {other}: its steps cost other operations than whole ones: give steps or minutes")
    baseline = contents.get("baseline", next(iter(rows)))
    if baseline not in rows:
        raise ValueError(f"{where}: baseline = {baseline!r} is no row: give one of {', '.join(rows)}")
    fit_by = contents.get("fit_by", "")
    if fit_by and not all(fit_by in common | flags for flags in rows.values()):
        raise ValueError(f"{where}: fit_by = {fit_by!r}: is not a flag of every row")
    return Comparison(name, (budget, contents[budget]), rows, baseline, contents.get("question", ""), fit_by)


def partial_steps(flags: Flags) -> str:
    """The flag by which a step is less or more than that of all scales and weights, whose operations are known; or ""."""
    plain = {"scale_groups": ("together", "each"), "objective": ("likelihood",), "pg": (0,), "lora": (0,), "train_only": ("",)}
    other = (f"{name} = {flags[name]!r}" for name, values in plain.items() if name in flags and flags[name] not in values)
    return next(other, "")


def _grid_rows(grid: Flags, where: str) -> dict[str, Flags]:
    """All combinations, by names such as "family=mvar depth=4"."""
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: grid has {name} = {values!r}: give a list of values")
    rows = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    return {" ".join(f"{name}={value}" for name, value in row.items()): row for row in rows}


def _check_names(values: Flags, known: list[str], what: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{what} has no {name!r}: {mend}")


KINDS = {dict: "a table", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _check_type(name: str, value: Any, kind: type) -> None:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} = {value!r}: is to be {KINDS[kind]}")


def _check_flags(flags: Flags, config_class: type, own: tuple[str, ...], where: str) -> None:
    """Flags that the command has, with values that they can have, and none that the study sets."""
    kinds = _kinds_of(config_class)
    choices = {part.name: part.metadata["choices"] for part in fields(config_class)}
    for name, value in flags.items():
        if name in own:
            raise ValueError(f"{where}: {name} is set by the study: leave it out")
        _check_names({name: value}, [key for key in kinds if key not in own], where)
        _check_type(f"{where}: {name}", value, kinds[name])
        if choices[name] and value not in choices[name]:
            raise ValueError(f"{where}: {name} = {value!r}: give one of {', '.join(map(str, choices[name]))}")


def _kinds_of(config_class: type) -> dict[str, type]:
    """Of every flag; str of str | None, int of int | Literal["auto"]."""
    hints = typing.get_type_hints(config_class)
    return {name: next((part for part in typing.get_args(hint) if part in KINDS), hint) for name, hint in hints.items()}


def _built(build: Callable[[], object], where: str) -> None:
    try:
        build()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
