"""Which classes people mean, by label or by name, and what labels stand for."""

import csv

SHOWN_CLASSES = 20  # of which it is told what their labels stand for


def parse_classes(text: str, class_names: list[str], num_classes: int) -> list[int]:
    """'0,3,Bag' -> [0, 3, 8]; label:2 and name:2 say which is meant where a class is called 2.

    ValueError for an unknown class, and for a number that is one class's label and another one's name.
    """
    words = [text] if text in class_names else next(csv.reader([text], skipinitialspace=True))
    return [_parse_class(word, class_names, num_classes) for word in words]


def _parse_class(word: str, class_names: list[str], num_classes: int) -> int:
    kind, _, rest = word.partition(":")
    if kind in ("label", "name") and rest and word not in class_names:
        by_label, by_name = (rest if kind == "label" else ""), (rest if kind == "name" else "")
    else:
        by_label = by_name = rest = word
    if by_label == "none":
        return num_classes
    label = int(by_label) if by_label.isdecimal() and int(by_label) < num_classes else None
    named = class_names.index(by_name) if by_name in class_names else None
    if label is not None and named is not None and label != named:
        raise ValueError(
            f"--classes: {rest} is the label of class {class_names[label]!r} and the name of the class with label {named}: "
            f"give label:{rest} or name:{rest}"
        )
    found = label if label is not None else named
    if found is None:
        known = f", or names such as {class_names[0]!r}" if class_names else ""
        raise ValueError(f"--classes: no class {rest!r}: give numbers from 0 to {num_classes - 1}{known}")
    return found


def told_classes(labels: list[int], names: list[str]) -> str:
    """What labels stand for, in one line."""
    different = list(dict.fromkeys(labels))
    shown = ", ".join(f"label {label} = {names[label]!r}" for label in different[:SHOWN_CLASSES])
    return f"classes: {shown}{f' and {len(different) - SHOWN_CLASSES} more' if len(different) > SHOWN_CLASSES else ''}"
