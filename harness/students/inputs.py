"""The inputs of a student's training: data, teacher, feature networks, teacher pairs."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from harness.config.jobs import Student, StudentRun
from harness.data import datasets
from harness.data.datasets import Dataset
from harness.denoiser import Condition, Denoiser
from harness.discriminators.class_table import CLASS_TABLE_SHA256, load_class_table, table_file
from harness.io.artifacts import sha256_file
from harness.io.records import Cost, TeacherRecord
from harness.teachers.text_embeddings import load_embeddings
from harness.training.ledger import Ledger

logger = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What a student trains with. required: the networks that the method requires, by kind.
    embeddings: map prompt numbers to conditions. ledger: the cost of the teacher pairs. hashes: of
    what came from files. shared_machine: other work ran while the pairs' seconds were measured."""

    dataset: Dataset
    teacher: Denoiser
    required: dict[str, nn.Module] = field(default_factory=dict)
    pairs: dict[str, Tensor] | None = None
    embeddings: Callable[[Tensor], Condition] | None = None
    ledger: Ledger = field(default_factory=Ledger)
    hashes: dict[str, str | dict | None] | None = None
    shared_machine: bool = False


def load_inputs(run: StudentRun) -> Inputs:
    """Read the inputs of a student's run from the experiment's folders."""
    from harness.features.base import FeatureMaps, load_extractor
    from harness.features.lpips import TRUNK_SHA256, load_lpips
    from harness.features.timm_backbones import load_backbone
    from harness.networks import load_codec, load_denoiser, pipeline_sha256
    from harness.teachers.pairs import load_pairs

    needs, folder = run.student.requirements, run.teacher
    dataset = datasets.load(run.data, images=needs.real_images)
    hashes: dict[str, str | dict | None] = {
        "data": dataset.images_sha256,
        "teacher": TeacherRecord.read(folder / "teacher.json").sha256,
        "method": {path.name: sha256_file(path) for path in run.method_source},
        "pairs": None,
        "features": None,
    }
    teacher = load_denoiser(folder, hashes["teacher"], run.device)
    if needs.pixels:
        teacher.codec = load_codec(folder, run.device)
    inputs = Inputs(dataset, teacher, embeddings=load_embeddings(folder), hashes=hashes)
    if inputs.embeddings:
        hashes["prompts"] = inputs.embeddings.sha256
    if pipeline := pipeline_sha256(folder):
        hashes["pipeline"] = pipeline
    required = inputs.required
    if needs.features:
        extractor = load_extractor(run.features, dataset)
        required["features"], hashes["features"] = FeatureMaps(extractor.network), extractor.sha256
    if needs.backbones:
        required["backbones"] = nn.ModuleList(map(load_backbone, needs.backbones))
        hashes["backbones"] = {b.name: b.sha256 for b in required["backbones"]}
    if needs.class_table:
        table, hashes["class_table"] = load_class_table(table_file(needs.class_table))
        if hashes["class_table"] != CLASS_TABLE_SHA256:
            logger.warning("%s is not the table of GDD's authors", needs.class_table)
        required["class_table"] = nn.Embedding.from_pretrained(table)
    if needs.lpips:
        required["lpips"], hashes["lpips"] = load_lpips(), TRUNK_SHA256
    if needs.pairs:
        record, inputs.pairs = load_pairs(run.pairs)
        cost = Cost(flops=record.flops, passes={"teacher": [record.evaluations, 0]})
        inputs.ledger.charge("pairs", cost, record.seconds)
        inputs.shared_machine = record.contended
        hashes["pairs"] = record.sha256
    return inputs


def fetch_pretrained(students: Iterable[Student]) -> None:
    """Download the pretrained networks and class tables that students require, and read the tables.
    Raises `UserError`."""
    from harness.features.lpips import trunk_file
    from harness.features.timm_backbones import weights_file

    requirements = [student.requirements for student in students]
    for name in sorted({name for needs in requirements for name in needs.backbones}):
        weights_file(name)
    for source in sorted({needs.class_table for needs in requirements if needs.class_table}):
        load_class_table(table_file(source))
    if any(needs.lpips for needs in requirements):
        trunk_file()
