"""Distil one-step diffusion students under controlled budgets and compare them by one protocol."""

__version__ = "0.1.0"

# Part of all fingerprints. Raise it when a change of code changes results: finished runs are then
# repeated instead of compared with new ones.
RESULTS_FORMAT = 4
# The same for scores and the format of their files: everything is scored again, nothing retrained.
SCORES_FORMAT = 6

# Public classes, which diffusers also looks up here when it loads an exported pipeline.
_MODULES = {
    "OneStepPipeline": "harness.students.export",
    "SongUNet": "harness.networks.edm_unet",
    "DhariwalUNet": "harness.networks.edm_unet",
    "ModelMixin": "diffusers",
}


def __getattr__(name: str):
    """Import public classes on first use: their libraries take seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
