"""Distil one-step diffusion students under controlled budgets and compare them by one protocol."""

__version__ = "0.1.0"

# Part of all fingerprints. Raise it when a change of code changes results: finished runs are then
# repeated instead of compared with new ones.
RESULTS_FORMAT = 4
# The same for scores and the format of their files: everything is scored again, nothing retrained.
SCORES_FORMAT = 6

# Public names. diffusers looks up the classes of an exported pipeline here, too.
_MODULES = {
    "OneStepPipeline": "harness.students.pipeline",
    "load_plugin": "harness.registry",
    "SongUNet": "harness.networks.edm_unet",
    "DhariwalUNet": "harness.networks.edm_unet",
    "ModelMixin": "diffusers",
}


def __getattr__(name: str):
    """Import public names on first use: their libraries take seconds to import. The network classes
    of loaded plug-ins are public, too."""
    import importlib
    import sys

    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    networks = sys.modules.get("harness.networks.registry")
    # Class names only: Python looks up submodules here as well, while they are being imported.
    if networks is not None and name[0].isupper() and name in networks.BACKBONES:
        return networks.BACKBONES[name].model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
