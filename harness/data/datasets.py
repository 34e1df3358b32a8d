"""Data sets: uint8 images with labels, one fixed split into training and held-out part.

The split is stratified and depends on the data set alone: generators and feature networks train
on the training part, which is also the reference of every distance; the held-out part gives
accuracies and the real-against-real floor. Where nothing needs images, a set may be no more than
their shape and classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.config.schema import DataSection
from harness.data.captioned_digits import (
    DIGIT_WORDS,
    SIZE,
    TEMPLATES,
    Attributes,
    captions,
    draw,
)
from harness.data.prompts import Prompts, prompts_of, read_prompts
from harness.errors import UserError
from harness.io.artifacts import (
    canonical,
    digest,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    verify,
    write_json,
    write_text,
)
from harness.streams import Stream

# Bytes of a file of prepared images, at most, and what of them its header may take.
SHARD, HEADER = 60_000_000, 10_000
CLASS_TEMPLATES = ("a photo of a {}", "a {}", "a small picture of the {}")


@dataclass(frozen=True)
class Images:
    """`pixels` uint8 `(N, C, H, W)`, `labels` int64 `(N,)`, all 0 in a set without classes."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def blocks(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and labels of at most `size` images at a time."""
        return zip(self.pixels.split(size), self.labels.split(size), strict=True)


@dataclass(frozen=True)
class Dataset:
    """`sha256`: of the file that holds the images, or of the list of several files' hashes; of the
    record of a set without them; with prompts of these, too, and `images_sha256` is without.
    `prompts`: texts whose numbers labels are, of a set where texts are asked for;
    `evaluation_prompts`: those that samples are scored on. `attributes`: what prompts name, if a
    program can check images for it: its names, `check(pixels, labels)` -> bool `(B, K)`,
    `classes(labels)`, and `meanings()`, equal for prompts that differ in wording only."""

    name: str
    train: Images
    held_out: Images
    class_names: tuple[str, ...]
    sha256: str
    attributes: Attributes | None = None
    prompts: Prompts | None = None
    evaluation_prompts: Prompts | None = None
    only_images_sha256: str | None = None

    @property
    def images_sha256(self) -> str:
        return self.only_images_sha256 or self.sha256

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train.pixels.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_conditions(self) -> int:
        """How many things a generator can be asked for: prompts, or classes."""
        return len(self.prompts) if self.prompts else self.num_classes

    @property
    def num_evaluated(self) -> int:
        """How many of them it is asked for when it is scored."""
        return len(self.evaluation_prompts) if self.evaluation_prompts else self.num_classes

    def classes(self, labels: Tensor) -> Tensor:
        """The classes of labels; of captions, those that they name."""
        return self.attributes.classes(labels) if self.attributes else labels

    @property
    def caption_templates(self) -> tuple[str, ...]:
        """Captions of a class by its name, for networks that compare images with texts; the first
        one is for scoring."""
        return TEMPLATES if self.class_names == DIGIT_WORDS else CLASS_TEMPLATES


def _digits() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """1,797 handwritten digits, 8 x 8, 17 grey levels (Alpaydin and Kaynak 1998; scikit-learn)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    return pixels.unsqueeze(1), torch.from_numpy(digits.target).long(), DIGIT_WORDS


def _read_digits(section: DataSection) -> tuple[Images, Images, tuple[str, ...]]:
    return _split(section, *_digits())


def _read_captioned_digits(section: DataSection) -> tuple[Images, Images, tuple[str, ...]]:
    """Every handwritten digit is in one part only, whatever it is drawn in."""
    pixels, labels, names = _digits()
    parts = stratified_split(labels, section.held_out)
    train, held = (Images(*draw(pixels[part], labels[part], part)) for part in parts)
    return train, held, names


@dataclass(frozen=True)
class Embedded:
    """A set that needs no file; `read` gives both parts and the class names."""

    read: Callable[[DataSection], tuple[Images, Images, tuple[str, ...]]]
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = DIGIT_WORDS


EMBEDDED = {
    "digits": Embedded(_read_digits, (1, 8, 8)),
    "captioned-digits": Embedded(_read_captioned_digits, (3, SIZE, SIZE)),
}


def read(section: DataSection) -> tuple[Images, Images, tuple[str, ...]]:
    """The training part, the held-out part and the class names of a set, embedded or not.

    A set with an official test set holds that out; of others `held_out` says how much.
    """
    if section.source is None and section.name in EMBEDDED:
        return EMBEDDED[section.name].read(section)
    from harness.data.torchvision_sets import OFFICIAL, read_official, recognises
    from harness.io.downloads import fetch, is_address

    path = None
    if section.source is not None:
        path = Path(section.source).expanduser()
        if is_address(section.source) or not path.is_dir():
            path = fetch(section.source, section.sha256)
    if path is None or recognises(section.name, path):
        parts = read_official(section.name, path)
        train, test = (
            Images(torch.from_numpy(pixels), torch.from_numpy(labels).long() * section.labels)
            for pixels, labels in parts
        )
        return train, test, OFFICIAL[section.name].class_names if section.labels else ()
    from harness.data.image_archive import read_images

    if section.prompts is None:
        images = read_images(path, section.labels, section.num_classes, section.resolution)
        return _split(section, *images)
    count = len(read_prompts(fetch(section.prompts, section.prompts_sha256)))
    pixels, labels, _ = read_images(path, section.labels, count, section.resolution)
    # Labels are prompts' numbers: there are no classes to hold out a share of each of.
    return _split(section, pixels, labels, (), classes=torch.zeros_like(labels))


def _split(
    section: DataSection,
    pixels: Tensor,
    labels: Tensor,
    class_names: tuple[str, ...],
    classes: Tensor | None = None,
) -> tuple[Images, Images, tuple[str, ...]]:
    """`classes`: what a share of each is held out of, if not of the labels."""
    train, held = stratified_split(labels if classes is None else classes, section.held_out)
    # Nothing held out: no second copy of what may be gigabytes.
    kept = pixels[train] if len(held) else pixels
    return Images(kept, labels[train]), Images(pixels[held], labels[held]), class_names


def stratified_split(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out part: `held_out` of each class, always the same."""
    rank = Stream(0, "split").uniform(torch.arange(len(labels)))
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = members[rank[members].argsort()]
        chosen.append(order[: round(held_out * len(order))])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    if mask.all():
        raise UserError(f"data.held_out: {held_out} leaves no image for training")
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def check_sizes(dataset: Dataset, fewest: tuple[int, int]) -> None:
    """Refuse a set that metrics could not be computed on. `fewest`: images of the training part,
    and of the held-out part; where nothing is held out, or there are no images, nothing fails."""
    for part, images, least in zip(
        ("training", "held-out"), (dataset.train, dataset.held_out), fewest, strict=True
    ):
        if 0 < len(images) < least:
            more = "" if part == "training" else ", or none (data.held_out: 0)"
            raise UserError(
                f"data: {dataset.name} has {len(images)} {part} images, and the metrics need "
                f"{least} or more{more}"
            )


def prepare(section: DataSection, folder: Path, fewest: tuple[int, int] = (1, 1)) -> dict:
    """Read a data set from its source, split it and write it to `folder`; returns `data.json`.
    `fewest`: of `check_sizes`."""
    if not section.has_images:
        return _prepare_without_images(section, folder)
    texts = _copy_prompts(section, folder)
    train, held, class_names = read(section)
    check_sizes(Dataset(section.name, train, held, class_names, ""), fewest)
    shards, sha256 = _write_shards(folder, train, held)
    record = {
        "name": section.name,
        "sha256": sha256,
        "class_names": list(class_names),
        "train_images": len(train),
        "held_out_images": len(held),
        "image_shape": list(train.pixels.shape[1:]),
        "shards": shards,
    }
    if section.captioned:
        record["captions"] = len(captions()[0])
    return _write_record(record, texts, folder)


def _write_record(record: dict, texts: dict, folder: Path) -> dict:
    """Write `data.json`; texts are part of the set, and of its hash."""
    if texts:
        sha256 = record["sha256"]
        record |= texts | {"sha256": digest([sha256, texts]), "images_sha256": sha256}
    write_json(folder / "data.json", record)
    return record


def _copy_prompts(section: DataSection, folder: Path) -> dict:
    """Keep the prompt files beside the data; what `data.json` says of them."""
    from harness.io.downloads import fetch

    records = {}
    for key, (source, sha256) in section.prompt_files.items():
        path = fetch(source, sha256)
        prompts = read_prompts(path)
        write_text(folder / f"{key}.txt", "\n".join(prompts.texts) + "\n")
        records[key] = {"prompts": len(prompts), "sha256": sha256_file(folder / f"{key}.txt")}
    return records


def _texts(record: dict, folder: Path) -> dict[str, Attributes | Prompts | str]:
    """What a set of `data.json` is asked for, if that is texts, as `Dataset` has it."""
    if record.get("captions"):
        texts, attributes = captions()
        prompts = prompts_of(texts)
        return {"attributes": attributes, "prompts": prompts, "evaluation_prompts": prompts}
    found = {}
    for key in ("prompts", "evaluation_prompts"):
        if key in record:
            verify(folder / f"{key}.txt", record[key]["sha256"], owner=folder)
            found[key] = read_prompts(folder / f"{key}.txt", told=True)
    if not found:
        return {}
    found.setdefault("evaluation_prompts", found["prompts"])
    return found | {"only_images_sha256": record["images_sha256"]}


def _write_shards(folder: Path, train: Images, held: Images) -> tuple[list[dict], str]:
    """The images in files of at most `SHARD` bytes, which can be carried one by one: their names
    and hashes, and the hash of the whole. A set that fits into one file is that file."""
    per_image = train.pixels[0].numel() + train.labels.element_size()
    size = max(1, (SHARD - HEADER) // per_image)
    count = -(-(len(train) + len(held)) // size)
    shards = []
    for number in range(count):
        tensors = {}
        for name, part, before in (("train", train, 0), ("held_out", held, len(train))):
            rows = slice(max(0, number * size - before), max(0, (number + 1) * size - before))
            tensors |= {f"{name}_pixels": part.pixels[rows], f"{name}_labels": part.labels[rows]}
        file = "images.safetensors" if count == 1 else f"images-{number:03d}.safetensors"
        shards.append({"file": file, "sha256": save_tensors(folder / file, tensors)})
    return shards, shards[0]["sha256"] if count == 1 else digest(shards)


def _prepare_without_images(section: DataSection, folder: Path) -> dict:
    record = {
        "name": section.name,
        "class_names": [str(i) for i in range(section.num_classes or 0)],
        "train_images": 0,
        "held_out_images": 0,
        "image_shape": list(section.image_shape),
    }
    record["sha256"] = hashlib.sha256(canonical(record).encode()).hexdigest()
    return _write_record(record, _copy_prompts(section, folder), folder)


def load(folder: Path, images: bool = True) -> Dataset:
    """The data set that `prepare` wrote; both parts are empty where it has no images, or where
    `images` says that no more than their shape and classes is asked for."""
    record = read_json(folder / "data.json")
    if not record["train_images"] or not images:
        shape, names = record["image_shape"], tuple(record["class_names"])
        none = Images(torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
        texts = _texts(record, folder)
        return Dataset(record["name"], none, none, names, record["sha256"], **texts)
    train, held = (
        Images(
            torch.empty(record[f"{part}_images"], *record["image_shape"], dtype=torch.uint8),
            torch.empty(record[f"{part}_images"], dtype=torch.int64),
        )
        for part in ("train", "held_out")
    )
    start = {"train": 0, "held_out": 0}
    one = [{"file": "images.safetensors", "sha256": record["sha256"]}]  # before there were shards
    for shard in record.get("shards", one):  # in place: a second copy could be too much
        tensors = load_tensors(folder / shard["file"], shard["sha256"], owner=folder)
        for name, part in (("train", train), ("held_out", held)):
            pixels = tensors[f"{name}_pixels"]
            rows = slice(start[name], start[name] + len(pixels))
            part.pixels[rows], part.labels[rows] = pixels, tensors[f"{name}_labels"]
            start[name] = rows.stop
    names = tuple(record["class_names"])
    return Dataset(record["name"], train, held, names, record["sha256"], **_texts(record, folder))


# Bytes of images that a run keeps on its device; of more, each batch is brought there.
ON_DEVICE = 4 << 30


def placement(data: Tensor, device: str) -> torch.device:
    """Where a set of images is kept: on the device, unless it would take too much of it."""
    return torch.device(device) if data.nbytes <= ON_DEVICE else data.device


def placed(images: Images, device: str) -> dict[str, Tensor]:
    """Pixels and labels where a run keeps them, as `Sources` takes them."""
    place = placement(images.pixels, device)
    return {"pixels": images.pixels.to(place), "labels": images.labels.to(place)}
