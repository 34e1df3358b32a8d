"""Registries of classes by name, and plug-in files that add to them."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from harness.errors import UserError, did_you_mean
from harness.io.artifacts import sha256_file

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Registry(Generic[T]):
    """Entries by name. `kind` is for messages. All modules of `package` are imported at the first
    look-up, so that a new entry is a new file."""

    def __init__(self, kind: str, package: str | None = None):
        self.kind, self._package = kind, package
        self._entries: dict[str, T] = {}
        self._sources: dict[str, Path] = {}

    def register(self, name: str, source: Callable | None = None) -> Callable[[T], T]:
        """Decorator that adds an entry; a malformed or duplicate name is a `ValueError`. source:
        what the entry's file defines, if that is not the entry itself."""
        if not NAME.fullmatch(name):
            raise ValueError(f"{self.kind} name {name!r}: use letters, digits, '.', '_' and '-'")

        def decorate(entry: T) -> T:
            file = Path(inspect.getsourcefile(source or entry)).resolve()
            if name in self._entries and file != self._sources[name]:
                file = self._sources[name]
                raise ValueError(f"{self.kind} {name!r} is already registered ({file})")
            self._entries[name], self._sources[name] = entry, file
            return entry

        return decorate

    def __iter__(self) -> Iterator[str]:
        """Names in the order of registration."""
        if self._package is not None:
            package, self._package = importlib.import_module(self._package), None
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
        return iter(list(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __getitem__(self, name: str) -> T:
        if name not in self:
            hint = did_you_mean(name, self)
            raise UserError(f"unknown {self.kind} {name!r}{hint}", "unknown-name")
        return self._entries[name]

    def plugin_sha256(self, name: str) -> str | None:
        """Hash of the plug-in file that registered an entry; None for the repository's entries."""
        source = self._sources[name] if name in self else None
        return sha256_file(source) if source in _plugins.values() else None


_plugins: dict[str, Path] = {}  # module name -> file


def load_plugin(path: Path) -> None:
    """Import a Python file, whose decorators register what it defines; each file once."""
    path = Path(path).expanduser().resolve()
    if path in _plugins.values():
        return
    if not path.is_file():
        raise UserError(f"plugins: {path} does not exist", "missing-file")
    name = f"harness_plugins_{len(_plugins)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _plugins[name] = module, path
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name], _plugins[name]
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"plugins: {path} could not be imported: {reason}", "plugin") from error
