"""Compare the speed of the evaluation with the libraries that it agrees with.

    python benchmarks/evaluation.py [--threads 2] [--dim 2048] [--images 2000] [--network inception]

Prints two kinds of ratios (above 1: this project is faster). From covariances to the Fréchet
distance, against `scipy.linalg.sqrtm`, which clean-fid and older programs use. From images on disk
to Fréchet distance, kernel distance, class score, precision and recall, against torch-fidelity with
the same definitions and the same network. Its weights are random; speed does not depend on them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate

from harness.data.datasets import Dataset, Images
from harness.evaluation.agreement import ImagePair, torch_fidelity_arguments, write_images
from harness.evaluation.frechet import frechet_distance, frechet_of_few, gaussian_statistics
from harness.features.base import FEATURES, FeatureExtractor, parse_settings


def timed(compute: Callable, repeats: int) -> tuple[float, object]:
    """Best time in seconds, and the value."""
    best, value = float("inf"), None
    for _ in range(repeats):
        started = time.perf_counter()
        value = compute()
        best = min(best, time.perf_counter() - started)
    return best, value


def distances(dim: int, repeats: int) -> list[list]:
    """Rows of Fréchet distances: full covariances, and fewer samples than dimensions."""
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    features = [torch.randn(2 * dim, dim, generator=generator) @ mix for _ in "ab"]
    one, two = map(gaussian_statistics, features)
    few = features[0][: dim // 4]

    def with_sqrtm(mean1, cov1, mean2, cov2) -> float:
        root = sqrtm(cov1.numpy() @ cov2.numpy()).real
        trace = cov1.trace() + cov2.trace() - 2 * root.trace()
        return ((mean1 - mean2).square().sum() + trace).item()

    rows = []
    for name, compute, compute_reference in (
        (f"{dim} features", lambda: frechet_distance(*one, *two), lambda: with_sqrtm(*one, *two)),
        (
            f"{dim} features, {len(few)} samples",
            lambda: frechet_of_few(few, *two),
            lambda: with_sqrtm(*gaussian_statistics(few), *two),
        ),
    ):
        seconds, value = timed(compute, repeats)
        reference_seconds, reference = timed(compute_reference, repeats)
        ratio = f"{reference_seconds / seconds:.1f}"
        rows.append([name, seconds, reference_seconds, ratio, abs(value / reference - 1)])
    return rows


def random_extractor(name: str, size: int) -> FeatureExtractor:
    """An extractor with random weights for `size` x `size` images."""
    torch.manual_seed(0)
    raw = {"type": name} if name == "inception" else {"type": name, "images": 1}
    extractor = FEATURES[name](name, parse_settings(raw))
    if name == "inception":  # no file: the library's network keeps its random weights
        library = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
        with (
            mock.patch(f"{library}.load_state_dict"),
            mock.patch("harness.features.inception.load_pickled", return_value={}),
        ):
            extractor.network = extractor.load_network(Path()).eval()
    else:
        extractor.network = extractor.build(empty_dataset(size))
    return extractor


def empty_dataset(size: int) -> Dataset:
    """A data set of ten classes without images."""
    empty = Images(torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0))
    return Dataset("none", empty, empty, tuple("0123456789"), "")


def read(folder: Path) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1).contiguous()


def end_to_end(name: str, count: int, size: int, repeats: int) -> list:
    """The row of all metrics, from image files."""
    import torch_fidelity

    extractor = random_extractor(name, size)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / part for part in ("generated", "real")]
        for target in folders:
            pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator)
            write_images(pixels.to(torch.uint8), target)

        def compute() -> dict:
            return ImagePair(extractor, *map(read, folders), 3).values

        pair = ImagePair(extractor, *map(read, folders), 3)
        # torch-fidelity reads images in four processes.
        arguments = torch_fidelity_arguments(pair, folders) | {"save_cpu_ram": False}

        def compute_reference() -> dict:
            return torch_fidelity.calculate_metrics(**arguments)

        seconds, values = timed(compute, repeats)
        reference_seconds, reference = timed(compute_reference, repeats)
    distance = next(v for k, v in values.items() if k == "fd" or k.startswith("fid-"))
    agreement = abs(distance / reference["frechet_inception_distance"] - 1)
    ratio = f"{reference_seconds / seconds:.1f}"
    return [f"{count} + {count} images, {name}", seconds, reference_seconds, ratio, agreement]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--network", choices=("cnn", "inception"), default="cnn")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = distances(args.dim, args.repeats)
    rows.append(end_to_end(args.network, args.images, args.size, args.repeats))
    header = ["task", "this project, s", "library, s", "ratio", "relative difference"]
    form = ("", ".3g", ".3g", "", ".1e")
    print(tabulate(rows, header, tablefmt="github", floatfmt=form, disable_numparse=[3]))
    print(f"{args.threads} threads; libraries: scipy.linalg.sqrtm, torch-fidelity")


if __name__ == "__main__":
    main()
