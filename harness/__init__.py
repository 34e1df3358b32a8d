"""Distil one-step diffusion students under controlled budgets and compare them by one protocol."""

__version__ = "0.1.0"

# Part of everything that decides results: raise it when a change of code changes them, and finished
# runs are made again instead of being compared with new ones.
RESULTS_FORMAT = 3
# The same of scores, and the form of their files: these are made again, and nothing is trained.
SCORES_FORMAT = 5

# Looked up here by users, and by diffusers where it loads a pipeline's parts.
_HOMES = {
    "OneStepPipeline": "harness.students.export",
    "SongUNet": "harness.networks.edm_unet",
    "DhariwalUNet": "harness.networks.edm_unet",
    "ModelMixin": "diffusers",
}


def __getattr__(name: str):
    """Imported when asked for: their libraries take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
