"""Teacher pairs (DMD's regression set): the teacher's images and conditions.

The noise that each was made from is a function of its number, `harness.streams.PAIR_NOISE`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from harness.config.experiment import Experiment
from harness.config.schema import Sampler
from harness.data import datasets
from harness.denoiser import Denoiser, map_condition
from harness.errors import UserError
from harness.io.artifacts import digest, load_tensors, read_json, save_tensors, write_json
from harness.io.locks import run_lock
from harness.networks import load_denoiser, parts_sha256
from harness.sampling import BLOCK, balanced_labels, check_finite, heun
from harness.streams import PAIR_NOISE
from harness.teachers.text_embeddings import Embeddings, load_embeddings
from harness.training.distributed import processes
from harness.training.ledger import measure

SHARD = 16  # blocks of images in a file


def make_pairs(experiment: Experiment, name: str, alone: bool = True) -> dict:
    """Generate a pair set shard by shard (a killed job goes on where it stopped).

    `alone`: whether its seconds were measured without other work beside it.
    """
    teacher_name, count = experiment.pair_sets[name].teacher, experiment.pair_sets[name].count
    folder, device = experiment.pairs_dir(name), experiment.device
    sampler = experiment.pair_sampler(name)
    made_by = experiment.teacher_dir(teacher_name)
    sha256 = read_json(made_by / "teacher.json")["sha256"]
    teacher = load_denoiser(made_by, sha256, device)
    dataset = datasets.load(experiment.data_dir(), images=False)
    asked, block = (dataset.num_conditions, load_embeddings(made_by)), experiment.evaluation.block
    # What came later stands there only where it is something else than before.
    later = {"parts": parts_sha256(made_by), "block": block if block != BLOCK else None}
    later["prompts"] = asked[1].record["sha256"] if asked[1] else None
    later = {name: value for name, value in later.items() if value is not None}
    key = digest([experiment.pairs_spec(name), sha256, *([later] if later else [])])
    group = processes()
    with group.leading(run_lock(folder)):
        per_shard = SHARD * block
        records = [folder / key / f"shard-{start:08d}.json" for start in range(0, count, per_shard)]
        # Processes take turns at the shards.
        for number in range(group.rank, len(records), group.size):
            start, path = number * per_shard, records[number]
            size, tensor_path = min(per_shard, count - start), path.with_suffix(".safetensors")
            if not (path.exists() and tensor_path.exists()):
                tensors, record = _make_shard(teacher, sampler, asked, start, size, device, block)
                record["sha256"] = save_tensors(tensor_path, tensors)
                write_json(path, record)
            print(f"pairs {name}: {start + size} of {count}", file=sys.stderr, flush=True)
        group.wait()
        if not group.first:
            return {}
        shards = [read_json(path) | {"file": f"{key}/{path.stem}.safetensors"} for path in records]
        record = {
            "pairs": count,
            "key": key,
            "sampler": sampler.settings(),
            "evaluations": count * sampler.nfe,
            "flops": sum(shard["flops"] for shard in shards),
            "seconds": sum(shard["seconds"] for shard in shards),
            "contended": not alone,
            "sha256": digest([shard["sha256"] for shard in shards]),
            "shards": shards,
        }
        write_json(folder / "pairs.json", record)
    return record


@torch.no_grad()
def _make_shard(
    teacher: Denoiser,
    sampler: Sampler,
    asked: tuple[int, Embeddings | None],
    start: int,
    size: int,
    device: str,
    block: int,
) -> tuple[dict[str, Tensor], dict]:
    """Pairs `start` to `start + size - 1`, and what they cost. `asked`: how many things the teacher
    can be asked for and, if they are prompts, their embeddings."""
    classes, embeddings, shape = *asked, teacher.image_shape
    parts: dict[str, list[Tensor]] = {"x": [], "condition": []}
    seconds, flops_per_image = 0.0, 0.0
    for first in range(start, start + size, block):
        index = torch.arange(first, first + block)
        z, condition = PAIR_NOISE.normal(index, shape), None
        if classes:
            labels = balanced_labels(index, classes, PAIR_NOISE.child("label"))
            condition = embeddings(labels) if embeddings else labels
            condition = map_condition(lambda part: part.to(device), condition)
        if not flops_per_image:
            with measure({}) as cost:
                teacher(z.to(device), torch.ones(block, device=device), condition)
            flops_per_image = cost.flops / block * sampler.nfe
        started = time.perf_counter()
        x = heun(teacher, z.to(device), condition, **sampler.settings()).float().cpu()
        seconds += time.perf_counter() - started
        check_finite(x, "images or latents")
        wanted = min(block, start + size - first)
        parts["x"].append(x[:wanted])
        if classes:
            parts["condition"].append(labels[:wanted])
    cost = {"seconds": seconds, "flops": round(flops_per_image * size)}
    return {k: torch.cat(v) for k, v in parts.items() if v}, cost


def load_pairs(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """`pairs.json` and the tensors x `(N, C, H, W)` and, with classes, condition `(N,)`."""
    record, start = read_json(folder / "pairs.json"), 0
    pairs: dict[str, Tensor] = {}
    for shard in record["shards"]:
        tensors = load_tensors(folder / shard["file"], shard["sha256"], owner=folder)
        for name, part in tensors.items():  # in place: twice the memory could be too much
            if name not in pairs:
                pairs[name] = part.new_empty(record["pairs"], *part.shape[1:])
            pairs[name][start : start + len(part)] = part
        start += len(tensors["x"])
    if start != record["pairs"] or not pairs:
        raise UserError(
            f"{folder / 'pairs.json'} names {start} of {record['pairs']} pairs; delete it and run "
            "again"
        )
    return record, pairs
