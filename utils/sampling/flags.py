"""How people write down the way tokens are drawn: flags of sample.py, and one flag of training for its validations."""

import re

from models.generate import SamplingConfig

SHORT = {"cfg": "guidance_scale", "cfg_schedule": "guidance_schedule", "cfg_scales": "guidance_scales"}  # flag -> field


def guided_scales(text: str) -> tuple[int, int] | None:
    """'3-8' -> (3, 8), '8' -> (8, 8), '' -> None. ValueError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise ValueError(f"--cfg_scales={text}: give the first and the last guided scale, counted from 1, such as 3-8")
    first, last = match.groups()
    return int(first), int(last or first)


def temperatures(text: str) -> tuple[float, float]:
    """'0.9' -> (0.9, 0.9), '1,0.5' -> (1.0, 0.5). ValueError for anything else."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 2 or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"--temperature={text}: give a number above 0, or two with a comma: of the first and the last scale")
    return values[0], values[-1]


READ = {
    "cfg": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "cfg_schedule": str,
    "cfg_scales": guided_scales,
    "temperature": lambda text: temperatures(text.replace(":", ",")),
}


def read_sampling(text: str) -> SamplingConfig:
    """'cfg=2 cfg_scales=3-8 temperature=1:0.5' -> the configuration; what is not named is as published.

    ValueError, without the name of a flag, for other words.
    """
    fields = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in READ:
            raise ValueError(f"{word!r}: give some of {', '.join(READ)}, such as cfg=2 top_k=900")
        try:
            fields[SHORT.get(name, name)] = READ[name](value)
        except ValueError as error:
            raise ValueError(f"{word!r}: {error}") from error
    return SamplingConfig(**fields)
