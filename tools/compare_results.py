"""Compare two results folders of one experiment: every number, and the weights tensor by tensor.

    python -m tools.compare_results results/a results/b

Rows of metrics.csv are matched by student, seed, snapshot, sampling seed, metric, extractor and
number of samples; value, stderr, images and flops must be equal bit for bit, and so must all
tensors of the teachers', feature networks' and students' weights. Exit code 1 on any difference.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

KEYS = ["student", "seed", "snapshot", "sample_seed", "metric", "extractor", "num_samples"]
VALUES = ["value", "stderr", "images", "flops"]
WEIGHTS = (
    "teachers/*/*.safetensors",
    "features/*/*.safetensors",
    "students/*/*/model/*.safetensors",
)


def compare_metrics(a: Path, b: Path) -> list[str]:
    # Text, so that equality means the same digits.
    left, right = (
        pd.read_csv(folder / "tables" / "metrics.csv", dtype=str).fillna("").set_index(KEYS)[VALUES]
        for folder in (a, b)
    )
    lines = [f"metrics.csv: {row} is only in {a}" for row in left.index.difference(right.index)]
    lines += [f"metrics.csv: {row} is only in {b}" for row in right.index.difference(left.index)]
    common = left.index.intersection(right.index)
    unequal = (left.loc[common] != right.loc[common]).any(axis=1)
    lines += [f"metrics.csv: {row} differs" for row in common[unequal]]
    print(f"metrics.csv: {len(common)} rows in common, {int(unequal.sum())} differ")
    return lines


def _weights(folder: Path) -> dict[str, Path]:
    """Weights by path; the cached reference features of extractors are not weights."""
    files = (path for pattern in WEIGHTS for path in folder.glob(pattern))
    return {str(p.relative_to(folder)): p for p in files if not p.name.startswith("reference-")}


def compare_weights(a: Path, b: Path) -> list[str]:
    left, right = _weights(a), _weights(b)
    lines = [f"{name} is only in one folder" for name in sorted(set(left) ^ set(right))]
    count = 0
    for name in sorted(set(left) & set(right)):
        one, other = load_file(left[name]), load_file(right[name])
        lines += [f"{name}: {key} is only in one file" for key in set(one) ^ set(other)]
        for key in set(one) & set(other):
            count += 1
            if not torch.equal(one[key], other[key]):
                lines.append(f"{name}: {key} differs")
    print(f"weights: {len(set(left) & set(right))} files, {count} tensors in common")
    return lines


def main() -> int:
    a, b = map(Path, sys.argv[1:])
    lines = compare_metrics(a, b) + compare_weights(a, b)
    print("\n".join(lines) if lines else "identical")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
