"""What every command shares: flags and arguments described by a dataclass, and errors as one line."""

import argparse
import dataclasses
import math
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn, TypeVar

from utils.allocator import keep_memory

Config = TypeVar("Config")
LOST_WORKER = "DataLoader worker"  # how torch begins to say that one has ended
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def flag(default: Any, help: str, *aliases: str, choices: tuple | None = None) -> Any:
    """A field of a configuration dataclass that is also the flag --name (and the given aliases) of a command."""
    metadata = {"help": help, "aliases": aliases, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *aliases: str, choices: tuple | None = None) -> Any:
    """The same without a default."""
    return dataclasses.field(metadata={"help": help, "aliases": aliases, "choices": choices})


def argument(help: str, choices: tuple | None = None) -> Any:
    """A field that is read from the word at its place on the command line, without a flag."""
    return dataclasses.field(metadata={"help": help, "choices": choices, "nargs": None})


def arguments(help: str) -> Any:
    """One or more such words, a tuple[str, ...]."""
    return dataclasses.field(metadata={"help": help, "choices": None, "nargs": "+"})


def check_idle(config: Any, names: Iterable[str], reason: str, defaults: dict[str, Any] | None = None) -> None:
    """ValueError where one of these flags, which would change nothing here, has another value than its default.

    reason: why it changes nothing, and the mend. defaults: further values that nobody has given.
    """
    by_name = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if value not in (by_name[name], (defaults or {}).get(name, by_name[name])):
            raise ValueError(f"--{name}={value}: {reason}")


def check_finite(config: Any) -> None:
    """ValueError where a flag is NaN or infinite, as TOML's numbers may be too: NaN is neither below a limit nor above one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{field.name}={value}: is not finite: give a number that ends")


class Parser(argparse.ArgumentParser):
    """Complains in one line and takes no abbreviations, so that a misspelt flag cannot pass for another."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> NoReturn:
        complain(self.prog, f"{message} (--help lists all flags)")
        sys.exit(2)


def parse(
    config_class: type[Config],
    description: str,
    arguments: list[str] | None = None,
    defaults: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Config:
    """Read the command line into the dataclass; wrong flags and values end the program with one line and exit code 2.

    defaults: from the values of all flags, those of flags that are not given, where one of them decides about others.
    """
    parser = Parser(description)
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if "nargs" in field.metadata:  # positional
            parser.add_argument(field.name, type=_plain_type(types[field.name]), **field.metadata)
            continue
        names = ["--" + field.name, *field.metadata["aliases"]]
        options: dict[str, Any] = {"dest": field.name, "help": field.metadata["help"]}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
        kind = _plain_type(types[field.name])
        if kind is bool:  # --flag, --flag=1 and --flag=True are all in use
            options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "0|1"}
        else:
            options |= {"type": _or_word(kind, types[field.name]), "choices": field.metadata["choices"]}
        parser.add_argument(*names, **options)
    try:
        values = vars(parser.parse_args(arguments))
        if defaults is not None:
            parser.set_defaults(**defaults(values))
            values = vars(parser.parse_args(arguments))
        return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except ValueError as error:
        parser.error(str(error))


def _plain_type(annotation: Any) -> type:
    """int of int, of int | None, of int | Literal["auto"] and of tuple[int, ...]."""
    return next((part for part in typing.get_args(annotation) if part is not type(None)), annotation)


def _or_word(kind: type, annotation: Any) -> Callable[[str], Any]:
    """What reads a value of this kind, or one of the words of a Literal beside it."""
    words = [
        word for part in typing.get_args(annotation) if typing.get_origin(part) is Literal for word in typing.get_args(part)
    ]
    if kind is float:
        return _finite
    if not words:
        return kind

    def read(text: str) -> Any:
        return text if text in words else kind(text)

    read.__name__ = f"{kind.__name__} or {' or '.join(words)}"  # for argparse's message
    return read


def _finite(text: str) -> float:
    """NaN would pass for any number: it is neither below a limit nor above one."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite: give a number that ends")
    return value


_finite.__name__ = "float"  # for argparse's message


def _boolean(text: str) -> bool:
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false: give 0 or 1")


def complain(program: str, message: str) -> None:
    """One line on stderr; ranks other than the first say who they are."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"{program}{f' [rank {rank}]' if rank else ''}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def lost_worker(error: Exception) -> OSError:
    """What torch says of a process that loads data and has ended, in one line with the mend."""
    return OSError(
        f"a process that loads images has ended ({_in_short(error)}): see that there is memory enough, and files enough may be "
        "open (ulimit -n), or give fewer --workers"
    )


def lacks_memory(error: Exception) -> bool:
    """Whether there was none left: Python's, a CPU's or a GPU's, for which torch has no error in common."""
    by_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and by_torch)


class _Unraisable:
    """What Python does with errors that cannot be raised where they come up, such as the end of a weak reference.

    Those of torch's signal handler are left out: it raises wherever it interrupts, and the loader notices the loss itself.
    """

    def __init__(self):
        self.usual = sys.unraisablehook

    def __call__(self, told: Any) -> None:
        if not str(told.exc_value).startswith(LOST_WORKER):
            self.usual(told)


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def run(main: Callable[[], None]) -> NoReturn:
    """Call a command's main; users' mistakes end it with one line and exit code 1.

    With MVAR_TRACEBACK=1 in the environment the whole traceback is shown.
    """
    keep_memory()
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable()
    is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        main()
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error).startswith(LOST_WORKER):  # raised wherever it is noticed
            error = lost_worker(error)
        if lacks_memory(error):
            error = OSError(f"out of memory ({_in_short(error)}): give smaller batches or a smaller model")
        if isinstance(error, (ValueError, OSError, FloatingPointError)) and os.environ.get("MVAR_TRACEBACK") != "1":
            complain(os.path.basename(sys.argv[0]), str(error))
        elif is_one_of_many:
            traceback.print_exc()
        else:
            raise
        if is_one_of_many:
            # one of many ranks goes at once: cleaning up could wait for the others, who wait for this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        sys.exit(1)
    sys.exit(0)
