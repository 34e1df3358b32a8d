"""The metrics, one file per family, in the order of rows and columns; further files follow."""

from harness.evaluation.metrics import distances, image_pairs, scores

__all__ = ["distances", "image_pairs", "scores"]
