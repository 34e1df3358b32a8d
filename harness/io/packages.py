"""Optional packages: which extra of the installation has each."""

from importlib.util import find_spec

from harness.errors import Problem, UserError

EXTRAS = {  # module -> extra of pyproject.toml
    **dict.fromkeys(("transformers", "sentencepiece", "peft"), "text-to-image"),
    **dict.fromkeys(("timm", "lpips"), "pretrained"),
    **dict.fromkeys(("tensorboard", "wandb"), "loggers"),
    "pyarrow": "parquet",
}


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # already imported, and without its file
        return True


def missing(module: str) -> str:
    """The message for a package that is not installed."""
    extra = EXTRAS[module]
    install = f"pip install -e '.[{extra}]' in the project's folder"
    return f"needs the package {module}, which is not installed: {install}"


def require(module: str, user: str) -> None:
    """Raise a `UserError` if an optional package is not installed. user: what needs it."""
    if not is_installed(module):
        raise UserError(f"{user} {missing(module)}", "missing-package")


def package_problems(key: str, module: str) -> list[Problem]:
    """An error of an experiment whose key needs an optional package that is not installed."""
    return [] if is_installed(module) else [Problem(key, "missing-package", missing(module))]
