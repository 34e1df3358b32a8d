"""Read experiment files: YAML, `extends:`, overrides."""

from __future__ import annotations

import json
from pathlib import Path

from harness.errors import UserError


def read_yaml(path: Path) -> dict:
    """A YAML mapping; a key that stands twice is refused, since one would silently vanish."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):  # <<: *anchor
                continue
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"{path}: line {line}: key {key!r} stands twice")
            seen.add(key)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    Loader.add_constructor(
        yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
        lambda loader, node: mapping(loader, node, deep=True),
    )
    try:
        text = Path(path).read_text(encoding="utf-8")
        # A snapshot of a resolved experiment: YAML 1.1 would read its 1e-06 as text.
        value = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, Loader)
    except OSError:
        raise UserError(f"{path}: no such experiment file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: an experiment file holds keys and values, not {value!r}")
    return value


def merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`, mapping by mapping; a null removes the key."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def resolve(path: Path, _chain: tuple[Path, ...] = ()) -> dict:
    """The file's content with `extends: other.yaml` (relative to the file) merged underneath."""
    path = Path(str(path))
    if path.resolve() in _chain:
        raise UserError(f"{path}: extends: leads back to the file itself")
    raw = read_yaml(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: names one file, not {base!r}")
    return merge(resolve(path.parent / base, (*_chain, path.resolve())), raw)
