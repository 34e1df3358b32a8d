"""The work of each process in tests/test_processes.py; a single process does the same."""

import json
import sys
from pathlib import Path

import torch

from harness.sampling import one_step_generator, sample
from harness.students.run import assemble
from harness.training.distributed import processes
from harness.training.trainer import Trainer
from harness.validation import load_experiment
from harness.workflow.dry_run import dry_run_inputs

STEPS = 20
STUDENTS = ("dmd", "sid", "sim", "gdd")
IMAGES = 600


def work(folder: Path) -> dict[str, list[list[float]]]:
    """Losses of all phases in 20 steps of every method; sampled images in a file."""
    torch.set_num_threads(1)
    experiment, losses = load_experiment(Path("tests/data/tiny.yaml")), {}
    for student in STUDENTS:
        torch.manual_seed(0)
        inputs = dry_run_inputs(experiment, student)
        run = assemble(experiment.student_run(student, 0), inputs, folder / student, "test")
        trainer, losses[student] = Trainer(run), []
        for _ in range(STEPS):
            trainer.step()
            row = trainer.metrics.collect(trainer.processes)
            losses[student].append([v for k, v in row.items() if k.startswith("loss/")])
        losses[student].append([trainer.ledger.flops, *trainer.ledger.passes["student"]])
    # The processes disagree, as their clocks do.
    agreed = processes().agree(7.5 + processes().rank)
    (folder / f"agreed{processes().rank}").write_text(str(agreed))
    generate = one_step_generator(inputs.teacher, 2.5)
    blocks = list(sample(generate, IMAGES, (1, 8, 8), 10, seed=3, group=processes()))
    if processes().first:
        torch.save([torch.cat(part) for part in zip(*blocks, strict=True)], folder / "images.pt")
    return losses


if __name__ == "__main__":
    out = Path(sys.argv[1])
    losses = work(out)
    if processes().first:
        (out / "losses.json").write_text(json.dumps(losses))
