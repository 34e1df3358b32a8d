"""Colour, shape and dashes of every student, the same on every page and in every figure.

A method has a hue, and a student with the method's name has its plain style. Other students of the
method have the same hue in two tones, with a shape and dashes that follow from the student's name.
Shapes, dashes and labels distinguish the students for colour-blind readers and in grey print.
"""

import zlib
from collections.abc import Iterable
from typing import NamedTuple

from harness.config.experiment import Experiment

# Two tones of each hue. All have a contrast of at least 3 to the page, light or dark.
HUES = {
    "blue": ("#0072B2", "#3F97E0"),
    "vermillion": ("#C44E00", "#F0692A"),
    "pink": ("#B0508F", "#D36CB0"),
    "green": ("#007F5C", "#1AA37C"),
    "brown": ("#8A5A3C", "#B57F5C"),
    "orange": ("#9A6B00", "#BF8A00"),
    "violet": ("#7A52CC", "#9C7BEB"),
    "teal": ("#007C8A", "#13A0B0"),
    "red": ("#C2304A", "#E8616F"),
    "grey": ("#6E6E6E", "#8F8F8F"),
    "olive": ("#6B7500", "#8A9620"),
}
SHAPES = (
    *("circle", "square", "triangle-up", "diamond", "cross"),
    *("triangle-down", "triangle-right", "triangle-left"),
)
GLYPHS = dict(zip(SHAPES, "●■▲◆✚▼▶◀", strict=True))  # in the page's legend
SOLID, DASHED, DOTTED, MIXED = (1, 0), (6, 4), (1, 3), (6, 3, 1, 3)
VARIANT_DASHES = (DASHED, DOTTED, MIXED)
# Hue and shape of the methods in this repository, far apart for colour-blind readers. Those of
# other methods follow from their names.
METHODS = {
    "dmd": ("blue", "circle"),
    "sid": ("vermillion", "square"),
    "sim": ("pink", "triangle-up"),
    "gdd": ("green", "diamond"),
    "regression": ("brown", "cross"),
}
# With this start, the students of the shipped experiments differ within a method, and the common
# ablations in shape from the plain styles, too.
CHECKSUM_START = 32746
FREE_HUES = tuple(hue for hue in HUES if hue not in {hue for hue, _ in METHODS.values()})


class Style(NamedTuple):
    colour: str
    shape: str
    dash: tuple[int, ...]

    @property
    def glyph(self) -> str:
        return GLYPHS[self.shape]


def _free_slot(name: str, slots: int, taken: set[int]) -> int:
    """The slot of a name: its checksum, or the next slot that is free."""
    start = zlib.crc32(name.encode(), CHECKSUM_START)
    free = (slot for i in range(slots) if (slot := (start + i) % slots) not in taken)
    slot = next(free, start % slots)
    taken.add(slot)
    return slot


def _methods(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Hue and shape of each method."""
    known, taken = dict(METHODS), set()
    for name in sorted(set(names) - set(METHODS)):
        slot = _free_slot(name, len(FREE_HUES), taken)
        known[name] = FREE_HUES[slot], SHAPES[zlib.crc32(name.encode()) % len(SHAPES)]
    return known


def styles(methods: dict[str, str]) -> dict[str, Style]:
    """The style of each student. methods: student -> method.

    A method's plain style and up to 14 other students of the method all differ. A style depends on
    the other students only if the checksums of two names give the same style: then that of the
    second in the alphabet moves on.
    """
    bases, found, taken = _methods(methods.values()), {}, {}
    for student in sorted(methods):
        hue, plain = bases[methods[student]]
        if student.replace("-", "_") == methods[student]:
            found[student] = Style(HUES[hue][0], plain, SOLID)
            continue
        shapes = [shape for shape in SHAPES if shape != plain]
        slot = _free_slot(student, 2 * len(shapes), taken.setdefault(methods[student], set()))
        tone, shape = divmod(slot, len(shapes))
        dash = VARIANT_DASHES[slot % len(VARIANT_DASHES)]
        found[student] = Style(HUES[hue][tone], shapes[shape], dash)
    return {student: found[student] for student in methods}


def student_styles(experiment: Experiment) -> dict[str, Style]:
    """The styles of an experiment's students, in its order."""
    return styles({name: student.method for name, student in experiment.students.items()})
