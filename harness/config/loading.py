"""Read experiment files: YAML, `extends`, overrides."""

import json
from pathlib import Path

from harness.errors import UserError


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
        text = Path(path).read_text(encoding="utf-8")
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
    base = raw.pop("extends", None)
    if base is None:
        return merge({}, raw)
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected one file name, got {base!r}", "invalid-value")
    return merge(read_experiment(path.parent / base, (*_parents, path.resolve())), raw)
