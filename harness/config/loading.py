"""Read experiment files: YAML, `extends`, overrides; and report errors in their keys."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness.errors import Problem, UserError, did_you_mean
from harness.io.artifacts import read_text
from harness.io.downloads import expand

# Numbers as in YAML 1.2. In YAML 1.1, 1e-6 is text, 1:30 is 90, 010 is 8, and 2024-01-01 is a date.
NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
LARGEST = 2**63  # integers of torch have 64 bits


def _loader(path: Path) -> type:
    """A YAML loader that rejects duplicate keys, of which YAML keeps one, and keys that are not
    text."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag.endswith(":merge"):  # <<: *anchor
                    continue
                key, where = key_node.value, f"{path}: line {key_node.start_mark.line + 1}"
                if not isinstance(key, str):
                    raise UserError(f"{where}: a key must be text, not a list", "invalid-name")
                if not isinstance(self.construct_object(key_node), str):
                    message = f"YAML does not read the key {key} as text; write {key!r} in quotes"
                    raise UserError(f"{where}: {message}", "invalid-name")
                if key in seen:
                    raise UserError(f"{where}: duplicate key {key!r}", "duplicate-key")
                seen.add(key)
            return super().construct_mapping(node, deep=True)

        def construct_document(self, node):
            self.deep_construct = True  # a mapping that contains itself is an error
            return super().construct_document(node)

    kept = ("bool", "null", "merge", "value")
    Loader.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0].rpartition(":")[2] in kept]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, pattern in NUMBERS.items():
        whole = re.compile(f"(?:{pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", whole, list("-+.0123456789"))
    return Loader


def read_yaml(path: Path, named_by: str = "") -> dict:
    """The mapping in a YAML or (for snapshots) JSON file. named_by: the key that names the file,
    with its place, if it is not the command line."""
    import yaml

    try:
        text = read_text(path)
        json_file = Path(path).suffix == ".json"
        value = json.loads(text) if json_file else yaml.load(text, _loader(path))
    except (FileNotFoundError, NotADirectoryError):
        if named_by:
            raise UserError(f"{named_by}: {path} does not exist", "missing-file") from None
        here = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
        message = f"{path}: experiment file not found{here}; name one with --configfile, or change"
        message += " to the folder of the project"
        raise UserError(message, "missing-file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not an experiment file", "missing-file") from None
    except (yaml.YAMLError, ValueError) as error:  # also JSON's, and of a tag such as !!int
        reason = " ".join(str(error).split()).replace(' in "<unicode string>"', "")
        reason += "; indent with spaces" if r"'\t'" in reason else ""
        raise UserError(f"{path}: {reason}", "invalid-yaml") from None
    except (KeyError, AttributeError):  # of !!bool x and !!timestamp x
        raise UserError(
            f"{path}: a tag such as !!bool has an invalid value", "invalid-yaml"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply", "invalid-yaml") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, got {value!r}", "invalid-yaml")
    return value


def merge(base: dict, overrides: dict) -> dict:
    """`overrides` on top of `base`, recursively; a null removes the key."""
    merged = dict(base)
    for key, value in overrides.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def value_problems(value: Any, key: str = "") -> Iterator[Problem]:
    """Values of a configuration that no key can have: keys that are not text, infinite numbers,
    integers beyond 64 bits, home folders of unknown users, and types that YAML adds to JSON's."""
    if isinstance(value, dict):
        for name, item in value.items():
            place = f"{key}.{name}".lstrip(".")
            if not isinstance(name, str):
                message = f"a key must be text; write {str(name)!r} in quotes"
                yield Problem(place, "invalid-name", message)
            elif place != "claims":  # prose
                yield from value_problems(item, place)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from value_problems(item, f"{key}.{number}")
    elif isinstance(value, str):
        if re.match(r"~[\w.-]+(/|$)", value):
            try:
                expand(value)
            except UserError as error:
                yield Problem(key, error.code, str(error))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(key, "not-finite", f"must be a finite number, not {value}")
    elif isinstance(value, int) and abs(value) >= LARGEST:
        yield Problem(key, "too-large", "must be below 2^63")
    elif not isinstance(value, bool | int | float | None):
        kind = type(value).__name__
        yield Problem(key, "invalid-value", f"must be text, a number, a list or keys, not a {kind}")


def read_experiment(path: Path, _parents: tuple[Path, ...] = ()) -> dict:
    """The content of a file on top of the file that `extends` names (relative to it)."""
    path = expand(path)
    if path.resolve() in _parents:
        raise UserError(f"{path}: extends: circular reference", "circular-extends")
    raw = read_yaml(path, f"{_parents[-1]}: extends" if _parents else "")
    if (base := raw.pop("extends", None)) is None:
        return merge({}, raw)
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected one file name, got {base!r}", "invalid-value")
    return merge(read_experiment(path.parent / expand(base), (*_parents, path.resolve())), raw)


# Types of pydantic's errors -> messages in the terms of YAML; others keep pydantic's.
EXPECTED = {
    **dict.fromkeys(("list_type", "tuple_type"), "expected a list, such as [0, 1]"),
    **dict.fromkeys(("dict_type", "model_type"), "expected keys and values"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "expected an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "expected a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false"),
    **dict.fromkeys(("too_short", "string_too_short"), "must not be empty"),
    "string_type": "expected text",
}


def translate(error: ValidationError, model: type[BaseModel], where: str = "") -> Iterator[Problem]:
    """A pydantic error of `model` as problems; `where` is the key of the validated section."""
    for item in error.errors():
        key = ".".join(filter(None, (where, *map(str, item["loc"]))))
        if item["type"] == "extra_forbidden":
            hint = did_you_mean(str(item["loc"][-1]), _keys_at(model, item["loc"][:-1]))
            yield Problem(key, "unknown-key", f"unknown key{hint}")
        elif item["type"] == "missing":
            yield Problem(key, "missing-key", "missing")
        elif item["type"] == "value_error":  # of a validator, whose message is complete
            yield Problem(key, "invalid-value", str(item["ctx"]["error"]))
        else:
            kind, text = item["type"], item["msg"].replace("Input should", "must", 1)
            message = EXPECTED.get(kind, text)
            if not kind.endswith("too_short"):
                message += f", not {item['input']!r}"
            if kind == "string_type" and isinstance(item["input"], bool | int | float):
                message += "; put text in quotes that YAML reads otherwise"
            yield Problem(key, "invalid-value", message)


def _keys_at(model: type[BaseModel] | None, location: tuple) -> list[str]:
    """The valid keys of the section at a location inside `model`."""
    for part in location:
        if model and part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation)
    return sorted(model.model_fields) if model else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as dict[str, StudentSection]."""
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_section_in, get_args(annotation))), None)
