"""What a student's run is made from, read from the experiment's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from harness.config.experiment import Experiment
from harness.data import datasets
from harness.data.datasets import Dataset
from harness.denoiser import Denoiser
from harness.io.artifacts import read_json, sha256_file
from harness.teachers.text_embeddings import Embeddings, load_embeddings
from harness.training.ledger import Cost


@dataclass
class Inputs:
    """What a student's run is made from. `charge`: what its teacher pairs cost (name, cost,
    seconds). `hashes`: of everything here that came from a file."""

    dataset: Dataset
    teacher: Denoiser
    features: nn.Module | None = None
    backbones: nn.ModuleList | None = None
    lpips: nn.Module | None = None
    pairs: dict[str, Tensor] | None = None
    embeddings: Embeddings | None = None  # of prompts, if the teacher takes some
    charge: tuple[str, Cost, float] | None = None
    hashes: dict[str, str | dict | None] | None = None
    contended: bool = False  # the pairs' seconds were measured beside other work


def load_inputs(experiment: Experiment, student: str) -> Inputs:
    """Read a student's data, teacher, feature network and pairs from the experiment's folder."""
    import methods
    from harness.features.base import load_extractor
    from harness.features.lpips import TRUNK_SHA256, load_lpips
    from harness.features.timm_backbones import load_backbone
    from harness.networks import load_codec, load_denoiser, parts_sha256
    from harness.teachers.pairs import load_pairs

    needs = experiment.requirements(student)
    folder = experiment.teacher_dir(experiment.teacher_of(student))
    dataset = datasets.load(experiment.data_dir(), images=needs.real_images)
    source = Path(methods.__path__[0]) / f"{experiment.students[student].method}.py"
    hashes: dict[str, str | dict | None] = {
        "data": dataset.images_sha256,
        "teacher": read_json(folder / "teacher.json")["sha256"],
        "method": sha256_file(source),
        "pairs": None,
        "features": None,
    }
    teacher = load_denoiser(folder, hashes["teacher"], experiment.device)
    if needs.pixels:
        teacher.codec = load_codec(folder, experiment.device)
    inputs = Inputs(dataset, teacher, embeddings=load_embeddings(folder), hashes=hashes)
    if inputs.embeddings:
        hashes["prompts"] = inputs.embeddings.record["sha256"]
    if parts := parts_sha256(folder):
        hashes["parts"] = parts
    if needs.features:
        extractor = load_extractor(experiment.features_dir(needs.features), dataset)
        inputs.features, hashes["features"] = extractor.network, extractor.sha256
    if needs.backbones:
        inputs.backbones = nn.ModuleList(map(load_backbone, needs.backbones))
        hashes["backbones"] = {b.name: b.sha256 for b in inputs.backbones}
    if needs.lpips:
        inputs.lpips, hashes["lpips"] = load_lpips(), TRUNK_SHA256
    if needs.pairs:
        record, inputs.pairs = load_pairs(experiment.pairs_dir(experiment.pairs_name(student)))
        cost = Cost(record["flops"], {"teacher": [record["evaluations"], 0]})
        inputs.charge = ("pairs", cost, record["seconds"])
        inputs.contended = record["contended"]
        hashes["pairs"] = record["sha256"]
    return inputs
