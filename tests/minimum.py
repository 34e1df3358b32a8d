"""A plugin of pytest for `make test-minimum`: the lowest versions are installed, and no test is
skipped, because a package that is missing would hide what the tests are for."""

import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MINIMA = ROOT / "constraints-minimum.txt"
EXTRAS = ("text-to-image", "pretrained", "loggers")  # that `make test-minimum` installs


def pins() -> dict[str, Version]:
    """The pinned version of each package, by canonical name."""
    lines = [line.partition("#")[0].strip() for line in MINIMA.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    """The requirements of pyproject.toml that `make test-minimum` installs, and pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]
    lines += [line for line in optional["dev"] if Requirement(line).name == "pytest"]
    return [Requirement(line) for line in lines]


def installed() -> dict[str, Version]:
    """The versions of those pinned packages that are installed, without local parts such as
    "+cpu"."""
    found = {}
    for name in pins():
        try:
            found[name] = Version(Version(version(name)).public)
        except PackageNotFoundError:
            continue
    return found


def differences(found: Mapping[str, Version]) -> Iterator[str]:
    """How installed versions differ from the pins. Only direct requirements must be installed: some
    of the others belong to one platform."""
    direct = {canonicalize_name(requirement.name) for requirement in requirements()}
    for name, pin in pins().items():
        if name not in found:
            if name in direct:
                yield f"{name} is not installed, not {pin}"
        elif found[name] != pin:
            yield f"{name} {found[name]} is installed, not {pin}"


def pytest_sessionstart(session: pytest.Session) -> None:
    if lines := list(differences(installed())):
        remedy = f"these are not the versions of {MINIMA.name}; remove .venv-minimum"
        pytest.exit("\n".join([f"{remedy} and run make test-minimum:", *lines]), returncode=1)


def _reject(report: pytest.CollectReport | pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.longrepr,)
        report.outcome, report.longrepr = "failed", f"not allowed with minimum versions: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    _reject((yield).get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """A module may skip all its tests."""
    _reject((yield).get_result())
