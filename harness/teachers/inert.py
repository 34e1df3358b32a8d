"""What a foreign pickle gets hold of while it is read: stand-ins that it can do nothing with.

A pickle is a program for a small machine that calls what it names and may then set the state of
whatever it holds. State set on a tensor would bypass the checks of its bounds; on a function or a
class it would reach the next file.
"""

from __future__ import annotations

import pickle

from torch import Tensor


class Refused(pickle.UnpicklingError):
    """The file holds something that it has no reason to hold."""


class Inert:
    """No state may be set, neither an instance's nor (the method is static) the class's."""

    @staticmethod
    def __setstate__(state) -> None:
        raise Refused("a state where such a file sets none")


class InertFunction(Inert):
    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


class InertValue(Inert):
    """A tensor, or what else is taken out again when all is read."""

    def __init__(self, value: Tensor | object):
        self.value = value


def told(error: Exception) -> str:
    """Its message, fit for a terminal: the names in it are the file's and may hold anything."""
    printable = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(printable.split())[:300]
