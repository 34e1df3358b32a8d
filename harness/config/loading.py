"""Read experiment files: YAML, `extends`, overrides; and report errors in their keys."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness.errors import Problem, UserError, did_you_mean
from harness.io.artifacts import read_text


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML (or JSON) file. Duplicate keys are rejected: YAML keeps only one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag.endswith(":merge"):  # <<: *anchor
                    continue
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise UserError(f"{path}: line {line}: duplicate key {key!r}", "duplicate-key")
                seen.add(key)
            return super().construct_mapping(node, deep=True)

    try:
        text = read_text(path)
        # JSON for snapshots: YAML 1.1 reads 1e-06 as text.
        value = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, Loader)
    except OSError:
        raise UserError(f"{path}: experiment file not found", "missing-file") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}", "invalid-yaml") from None
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


def read_experiment(path: Path, _parents: tuple[Path, ...] = ()) -> dict:
    """The content of a file on top of the file that `extends` names (relative to it)."""
    path = Path(path)
    if path.resolve() in _parents:
        raise UserError(f"{path}: extends: circular reference", "circular-extends")
    raw = read_yaml(path)
    if (base := raw.pop("extends", None)) is None:
        return merge({}, raw)
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected one file name, got {base!r}", "invalid-value")
    return merge(read_experiment(path.parent / base, (*_parents, path.resolve())), raw)


def translate(error: ValidationError, model: type[BaseModel], where: str = "") -> Iterator[Problem]:
    """A pydantic error of `model` as problems; `where` is the key of the validated section."""
    for item in error.errors():
        key = ".".join(filter(None, (where, *map(str, item["loc"]))))
        if item["type"] == "extra_forbidden":
            hint = did_you_mean(str(item["loc"][-1]), _keys_at(model, item["loc"][:-1]))
            yield Problem(key, "unknown-key", f"unknown key{hint}")
        elif item["type"] == "missing":
            yield Problem(key, "missing-key", "missing")
        else:
            message = f"{item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"
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
