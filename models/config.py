"""Configuration dataclasses <-> plain dictionaries for JSON, strict in both directions."""

import dataclasses
from typing import Any, TypeVar

Config = TypeVar("Config")


def to_dict(config: Any) -> dict:
    """A dataclass as a dictionary that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(config_class: type[Config], values: dict, source: str) -> Config:
    """The dataclass again. ValueError names unknown and missing keys and `source`, the file they came from."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING)
    if unknown or missing:
        raise ValueError(
            f"{source}: {config_class.__name__} has no field {', '.join(unknown)}: it was written by other code"
            if unknown
            else f"{source}: {config_class.__name__} needs {', '.join(missing)}"
        )
    return config_class(**values)
