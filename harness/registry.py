"""Registries of classes by name, and plug-in files that add to them."""

import contextlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from harness.errors import UserError, did_you_mean
from harness.io.artifacts import sha256_file

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Registry(Generic[T]):
    """Entries by name. `kind` is for messages. All modules of `package` are imported at the first
    look-up, so that a new entry is a new file. base: class of all entries. check: what is wrong
    with an entry under a name, in words, or None."""

    def __init__(
        self,
        kind: str,
        package: str | None = None,
        base: type | None = None,
        check: Callable[[str, T], str | None] = lambda name, entry: None,
    ):
        self.kind, self._package, self._base, self._check = kind, package, base, check
        self._entries: dict[str, T] = {}
        self._sources: dict[str, Path] = {}

    def register(self, name: str, source: Callable | None = None) -> Callable[[T], T]:
        """Decorator that adds an entry. A malformed or duplicate name is a `ValueError`, as is an
        entry of another class or one that lacks something. source: what the entry's file defines,
        if that is not the entry itself."""
        if not NAME.fullmatch(name):
            raise ValueError(f"{self.kind} name {name!r}: use letters, digits, '.', '_' and '-'")

        def decorate(entry: T) -> T:
            if _importing:  # the names of the repository are taken
                self._import_package()
            if problem := self._problem(name, entry):
                raise ValueError(f"{self.kind} {name!r} {problem}")
            file = Path(inspect.getsourcefile(source or entry)).resolve()
            if name in self._entries and file != self._sources[name]:
                file = self._sources[name]
                raise ValueError(f"{self.kind} {name!r} is already registered ({file})")
            self._entries[name], self._sources[name] = entry, file
            return entry

        return decorate

    def _problem(self, name: str, entry: T) -> str | None:
        if self._base is not None:
            if not (isinstance(entry, type) and issubclass(entry, self._base)):
                return f"is not a subclass of {self._base.__name__}"
            if missing := sorted(getattr(entry, "__abstractmethods__", ())):
                return f"does not define {', '.join(missing)}"
        return self._check(name, entry)

    def _import_package(self) -> None:
        if self._package is not None:
            package, self._package = importlib.import_module(self._package), None
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")

    def __iter__(self) -> Iterator[str]:
        """Names in the order of registration."""
        self._import_package()
        return iter(list(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __getitem__(self, name: str) -> T:
        if name not in self:
            hint = did_you_mean(name, self)
            raise UserError(f"unknown {self.kind} {name!r}{hint}", "unknown-name")
        return self._entries[name]

    def plugin(self, name: str) -> Path | None:
        """The plug-in file that registered an entry; None for the repository's entries."""
        source = self._sources.get(name) if name in self else None
        return source if source in _plugins.values() else None

    def plugin_sha256(self, name: str) -> str | None:
        """The hash of this file."""
        file = self.plugin(name)
        return None if file is None else sha256_file(file)


_plugins: dict[str, Path] = {}  # module name -> file
_importing: list[Path] = []  # plug-ins that are being imported


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
    _importing.append(path)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name], _plugins[name]
        message = f"plugins: {path} could not be imported: {_reason(path, error)}"
        raise UserError(message, "plugin") from error
    finally:
        _importing.remove(path)


@contextlib.contextmanager
def plugin_errors(file: Path | None, what: str) -> Iterator[None]:
    """Turn an error in a plug-in file, except a `UserError`, into one line (code "plugin"). file:
    None for code of the repository, whose errors stay as they are. what: the key or the entry."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if file is None:
            raise
        raise UserError(f"{what}: error in {file}: {_reason(file, error)}", "plugin") from error


def _reason(file: Path, error: BaseException) -> str:
    """An error as "line 3: KeyError: 'x'", with the last line of the file that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())[:300]}"
