"""The arguments of backbones, checked when an experiment is read. The modules of diffusers take
seconds to import, so their source is parsed instead."""

import ast
import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.errors import did_you_mean
from harness.networks.registry import BACKBONES

UNKNOWN = inspect.Parameter.empty  # no default, or one that is not a literal


@lru_cache
def defaults(name: str) -> Mapping[str, Any] | None:
    """Argument -> default of the constructor of a registered backbone; None if it takes any."""
    path = getattr(BACKBONES[name], "model", "")
    package, _, rest = path.partition(".")
    if package in ("diffusers", "harness"):
        module, _, class_name = rest.rpartition(".")
        root = Path(find_spec(package).submodule_search_locations[0])
        source = root.joinpath(*module.split(".")).with_suffix(".py")
        return _parsed(source, class_name) if source.is_file() else None
    model = BACKBONES[name].model_class()
    build = model.denoiser_class.build if BACKBONES[name].reads_weights else model.__init__
    parameters = [p for p in inspect.signature(build).parameters.values() if p.name != "self"]
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters}


def _parsed(source: Path, class_name: str) -> Mapping[str, Any] | None:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = classes[class_name].body if class_name in classes else []
    found = [f for f in functions if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    if not found or found[0].args.kwarg:
        return None
    arguments = found[0].args
    names = [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]
    values: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    values += [*arguments.defaults, *arguments.kw_defaults]
    return {n: _literal(value) for n, value in zip(names, values, strict=True)}


def _literal(value: ast.expr | None) -> Any:
    try:
        return UNKNOWN if value is None else ast.literal_eval(value)
    except ValueError:
        return UNKNOWN


def argument_problems(network: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Unknown arguments of a network, and texts in place of numbers or the reverse: (argument,
    error code, message) of each. `network`: its class under `type`, and its arguments."""
    known = defaults(network["type"])
    for key, value in network.items():
        if known is None or key == "type" or value is None:
            continue
        if key not in known:
            hint = did_you_mean(key, [name for name in known if name != "self"])
            yield key, "unknown-key", f"{network['type']} has no such argument{hint}"
            continue
        default = known[key]
        text = isinstance(value, str)
        if text and isinstance(default, bool | int | float | tuple | list):
            expected = "a list" if isinstance(default, tuple | list) else "a number"
            expected = "true or false" if isinstance(default, bool) else expected
            yield key, "invalid-value", f"expected {expected}, such as {default!r}, not {value!r}"
        elif not text and isinstance(default, str):
            yield key, "invalid-value", f"expected a text, such as {default!r}, not {value!r}"
