"""The metrics, one file per family; every file in this package is imported."""

from importlib import import_module

# In the order of rows and columns; further files follow alphabetically.
for _family in (
    *("frechet_distances", "kernel_distances", "manifolds", "image_pairs"),
    *("classifier_scores", "text_and_ratings"),
):
    import_module(f"{__name__}.{_family}")
