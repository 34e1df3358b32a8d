"""Teacher pairs (DMD's regression set): images of the teacher, and their conditions. Their noise is
a function of their number (`harness.streams.PAIR_NOISE`), so it is not stored."""

import logging
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harness.config.jobs import PairJob
from harness.data import datasets
from harness.denoiser import Condition, Denoiser, map_condition
from harness.errors import UserError
from harness.io.artifacts import digest
from harness.io.locks import machine_slot, run_lock
from harness.io.records import PairRecord, TeacherRecord
from harness.io.shards import TensorShards
from harness.networks import load_denoiser, pipeline_sha256
from harness.precision import set_precision
from harness.sampling import (
    Delivery,
    balanced_labels,
    heun,
    not_finite,
    placed_for_sampling,
    sampling_autocast,
)
from harness.streams import PAIR_NOISE
from harness.teachers.text_embeddings import load_embeddings
from harness.training.distributed import processes
from harness.training.ledger import measure
from harness.transfers import ahead, to_device

logger = logging.getLogger(__name__)
SHARD = 16  # blocks per file


def make_pairs(job: PairJob) -> PairRecord | None:
    """Generate a pair set, continuing after its complete shards; the first process returns the
    record."""
    set_precision(job.device, job.tf32, static_shapes=True)
    pairs, group, slot = job.pairs, processes(), machine_slot(exclusive=job.exclusive)
    with group.leading(run_lock(job.folder)), group.leading(slot) as exclusive:
        sha256 = TeacherRecord.read(job.teacher / "teacher.json").sha256
        teacher = load_denoiser(job.teacher, sha256, job.device)
        teacher = placed_for_sampling(teacher, job.precision)
        embeddings = load_embeddings(job.teacher)
        conditions = datasets.load(job.data, images=False).num_conditions, embeddings
        inputs = [sha256, pipeline_sha256(job.teacher), embeddings and embeddings.sha256]
        run_id = digest([job.fingerprint, *inputs])
        shards, size = TensorShards(job.folder / run_id, owner=job.folder), SHARD * job.block
        # Processes take turns at the shards.
        for number in range(group.rank, -(-pairs.count // size), group.size):
            rows = range(pairs.count)[number * size : (number + 1) * size]
            if not shards.has(number):
                tensors, cost = _make_shard(job, teacher, conditions, rows)
                shards.write(number, tensors, **cost)
            logger.info("generated %d of %d pairs", rows.stop, pairs.count)
        group.wait()
        if not group.first:
            return None
        record = PairRecord(
            name=pairs.name,
            fingerprint=digest(job.fingerprint),
            run_id=run_id,
            pairs=pairs.count,
            sampler=pairs.sampler.model_dump(),
            evaluations=pairs.count * pairs.sampler.nfe,
            tf32=job.tf32,
            precision=job.precision,
            **{key: sum(shard[key] for shard in shards.records) for key in ("flops", "seconds")},
            contended=not exclusive,
            sha256=shards.finish()["sha256"],
        )
        record.write(job.folder / "pairs.json")
    return record


@torch.no_grad()
def _make_shard(job: PairJob, teacher: Denoiser, conditions: tuple, rows: range) -> tuple:
    """Tensors of the pairs with numbers `rows`, and their cost. conditions: the number of classes
    or prompts (0: unconditional), and the prompts' embeddings or None."""
    num_conditions, embeddings = conditions
    sampler, device = job.pairs.sampler, job.device

    def inputs(first: int) -> tuple[Tensor, Tensor | None, Condition]:
        index = torch.arange(first, first + job.block)
        z, labels = PAIR_NOISE.normal(to_device(index, device), teacher.image_shape), None
        if num_conditions:
            labels = balanced_labels(index, num_conditions, PAIR_NOISE.child("label"))
        condition = embeddings(labels) if embeddings and num_conditions else labels
        return z, labels, map_condition(partial(to_device, device=device), condition)

    def launch(first: int) -> tuple[Delivery, Tensor | None]:
        z, labels, condition = inputs(first)
        with sampling_autocast(device, job.precision):
            x = heun(teacher, z, condition, **sampler.model_dump()).float()
        return Delivery(x, not_finite(x)), labels

    z, _, condition = inputs(rows.start)
    with measure({}) as cost, sampling_autocast(device, job.precision):
        teacher(z, torch.ones(job.block, device=device), condition)
    flops = cost.flops / job.block * sampler.nfe * len(rows)
    blocks: dict[str, list[Tensor]] = {"x": []} | ({"condition": []} if num_conditions else {})
    started = time.perf_counter()
    for delivery, labels in ahead(launch, rows[:: job.block], device):
        blocks["x"].append(delivery.wait())
        if num_conditions:
            blocks["condition"].append(labels)
    seconds = time.perf_counter() - started
    tensors = {name: torch.cat(parts)[: len(rows)] for name, parts in blocks.items()}
    return tensors, {"seconds": seconds, "flops": round(flops)}


def load_pairs(folder: Path) -> tuple[PairRecord, dict[str, Tensor]]:
    """Load `pairs.json` and the tensors x `(N, C, H, W)` and, with classes or prompts, condition
    int64 `(N,)`."""
    record = PairRecord.read(folder / "pairs.json")
    tensors = TensorShards(folder / record.run_id, owner=folder).load()
    if len(tensors.get("x", ())) != record.pairs:
        message = f"{folder / 'pairs.json'} does not match its shards; delete it and run again"
        raise UserError(message, "damaged")
    return record, tensors
