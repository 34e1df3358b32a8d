"""`harness methods`: the methods, their settings, and where each default comes from."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic.fields import FieldInfo

from harness.method import METHODS, Method

LIMITS = {
    **{Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")},
    **{MultipleOf: ("a multiple of", "multiple_of"), MinLen: ("length at least", "min_length")},
}


def _type(annotation: Any) -> str:
    """A type as users know it: `float`, `one | sid`, `tuple of float, float`."""
    if annotation is type(None):
        return "none"
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        return "list of " + ", ".join(_type(part) for part in parts if part is not Ellipsis)
    if parts := get_args(annotation):
        return " | ".join(map(_type, parts))
    return {"str": "text", "bool": "true | false"}.get(annotation.__name__, annotation.__name__)


def limits(field: FieldInfo) -> str:
    """The range of a setting, such as "above 0, at most 1"."""
    found = [(LIMITS[type(limit)], limit) for limit in field.metadata if type(limit) in LIMITS]
    return ", ".join(f"{words} {getattr(limit, name):g}" for (words, name), limit in found)


def _yaml(value: Any) -> str:
    """A default as an experiment would state it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def summary(name: str) -> Iterator[str]:
    """The lines of one method in the list of all."""
    method = METHODS[name]
    yield f"{name}: {method.paper}{'' if method.data_free else ' (needs real images)'}"
    for key, field in method.Config.model_fields.items():
        origin = field.json_schema_extra["origin"]
        yield f"    {key} = {field.default!r}  ({origin}: {field.description})"


def page(name: str) -> str:
    """All that a user of a method must know: paper, docstring and settings."""
    from tabulate import tabulate

    method = METHODS[name]
    module = sys.modules[method.__module__]
    rows, header = [], ("setting", "default", "type and range", "origin")
    for key, field in method.Config.model_fields.items():
        facts = ", ".join(filter(None, (_type(field.annotation), limits(field))))
        origin = f"{field.json_schema_extra['origin']}: {field.description}"
        rows.append((key, _yaml(field.default), facts, origin))
    images = "no real images" if method.data_free else "real images"
    return "\n".join(
        (
            f"{name}: {method.paper or 'no paper'}; needs {images}",
            f"File: {Path(inspect.getsourcefile(method))}",
            "",
            _docstring(method, module),
            "",
            "Settings, under students.<name>.settings or, for all students, training.settings:",
            "",
            tabulate(rows, header, disable_numparse=True),
        )
    )


def _docstring(method: type[Method], module) -> str:
    return inspect.cleandoc(module.__doc__ or method.__doc__ or "(no docstring)")


def print_methods(name: str | None) -> None:
    """Print one method, or all of them in short."""
    if name is not None:
        print(page(name))
        return
    for other in METHODS:
        print(*summary(other), sep="\n")
    print("\n`harness methods NAME` shows one of them with its equations and deviations.")
