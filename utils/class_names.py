"""Which classes people mean, by label or by name, and what labels stand for.

A checkpoint has the names of the folders that it was trained on. Where these are ImageNet's synsets (n02099601), or where a
checkpoint of 1,000 classes has no names, as released ones, classes are called as in ImageNet, whose names the package timm has.
"""

import csv
import difflib
import functools
import re
from collections import Counter
from collections.abc import Sequence

NO_CLASS, DRAWN = "none", "random"  # words of --classes that are no class; after label: where a class is called so
SHOWN_CLASSES = 20  # of which it is told what their labels stand for
IMAGENET_CLASSES = 1000
NEAR = 3  # names that are proposed for one that is not known
SYNSET = re.compile(r"n\d{8}")


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Synset -> all names of the class, such as "tabby, tabby cat", in the order of the labels."""
    from timm.data import ImageNetInfo  # here, as it takes seconds

    known = ImageNetInfo()
    return {known.index_to_label_name(label): known.index_to_description(label) for label in range(known.num_classes())}


def all_names(class_names: Sequence[str], num_classes: int) -> list[list[str]]:
    """What each class is called, the name to be shown first: from the names in a checkpoint, which may be none."""
    if not class_names and num_classes == IMAGENET_CLASSES:
        class_names = list(imagenet_names())
    if class_names and all(SYNSET.fullmatch(name) for name in class_names):
        known = imagenet_names()
        return [[*known[name].split(", "), name] if name in known else [name] for name in class_names]
    return [[name] for name in class_names] or [[str(label)] for label in range(num_classes)]


def shown_names(class_names: Sequence[str], num_classes: int) -> list[str]:
    """One name for every label; two classes of one name (ImageNet has two cranes) have their labels behind it."""
    first = [names[0] for names in all_names(class_names, num_classes)]
    counts = Counter(first)
    return [f"{name} ({label})" if counts[name] > 1 else name for label, name in enumerate(first)]


def parse_classes(text: str, class_names: Sequence[str], num_classes: int) -> list[int]:
    """'0,3,Bag' -> [0, 3, 8]; label:2 and name:2 say which is meant where a class is called 2.

    Names are those of `all_names`, capitals do not matter. ValueError for an unknown class, with names that are near, and for
    a number, or the word none, that is one class's label and another one's name.
    """
    try:
        words = [text] if text in class_names else next(csv.reader([text], skipinitialspace=True))
    except csv.Error as error:
        raise ValueError(f"--classes={text!r}: {error}: give names with commas between them") from error
    return [_parse_class(word.strip(), class_names, num_classes) for word in words]


def are_drawn(text: str, class_names: Sequence[str]) -> bool:
    """Whether --classes asks for labels at random. ValueError where a class is called so."""
    if text == DRAWN and DRAWN in class_names:
        raise ValueError(f"--classes={text}: is a class's name, and means labels at random: give name:{text} or label:{text}")
    return text in (DRAWN, f"label:{DRAWN}")


def _parse_class(word: str, class_names: Sequence[str], num_classes: int) -> int:
    kind, _, rest = word.partition(":")
    if kind in ("label", "name") and rest and word not in class_names:
        by_label, by_name = (rest if kind == "label" else ""), (rest if kind == "name" else "")
    else:
        by_label = by_name = rest = word
    if by_label == NO_CLASS and by_name and NO_CLASS in class_names:
        raise ValueError(f"--classes: {rest} is a class's name, and means no class: give name:{rest} or label:{rest}")
    if by_label == NO_CLASS:
        return num_classes
    label = int(by_label) if by_label.isdecimal() and int(by_label) < num_classes else None
    if label is not None and not (by_name and class_names):  # a number is no name of ImageNet's
        return label
    named = _label_of(by_name, class_names, num_classes)
    if label is not None and named is not None and label != named:
        raise ValueError(
            f"--classes: {rest} is the label of class {class_names[label]!r} and the name of the class with label {named}: "
            f"give label:{rest} or name:{rest}"
        )
    found = label if label is not None else named
    if found is None:
        raise ValueError(f"--classes: no class {rest!r}: {_proposal(rest, class_names, num_classes)}")
    return found


def _label_of(name: str, class_names: Sequence[str], num_classes: int) -> int | None:
    """The label of the class of this name, None where there is none. ValueError where there are several."""
    if name in class_names:
        return list(class_names).index(name)
    known = all_names(class_names, num_classes)
    for same in (str, str.lower):
        called = [same(name) in map(same, names) for names in known]
        labels = [label for label, is_called in enumerate(called) if is_called]
        if len(labels) > 1:
            raise ValueError(f"--classes: {name!r} are the classes {', '.join(map(str, labels))}: give the label of one")
        if labels:
            return labels[0]
    return None


def _proposal(word: str, class_names: Sequence[str], num_classes: int) -> str:
    known = all_names(class_names, num_classes)
    spellings = {name.lower(): name for names in known for name in names if not name.isdecimal()}
    near = [spellings[match] for match in difflib.get_close_matches(word.lower(), spellings, NEAR)]
    if near:
        return f"is it {' or '.join(map(repr, near))}?"
    example = f", or names such as {known[0][0]!r}" if spellings else ""
    return f"give numbers from 0 to {num_classes - 1}{example}"


def told_classes(labels: list[int], names: list[str]) -> str:
    """What labels stand for, in one line."""
    different = list(dict.fromkeys(labels))
    shown = ", ".join(f"label {label} = {names[label]!r}" for label in different[:SHOWN_CLASSES])
    return f"classes: {shown}{f' and {len(different) - SHOWN_CLASSES} more' if len(different) > SHOWN_CLASSES else ''}"
