"""What each job of the workflow asks a cluster for: partition, GPUs, minutes, memory.

It follows from what `harness.workflow.plan` counts, and from what a profile says of the cluster
(profiles/slurm/profile.yaml). Without a cluster nothing here is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

from pydantic import Field, ValidationError

from harness.config.experiment import Experiment
from harness.config.schema import Positive, Section, micro_batch
from harness.errors import UserError, did_you_mean

# A job is given twice the time that was counted and a quarter more memory, since a job that is cut
# off costs more than one that ends early. Tried again it gets that memory once more; not more time,
# since it resumes.
SAFETY, MEMORY_SAFETY = 2.0, 1.25
# Minutes for what is not counted: start-up, reading, figures, downloads.
MINUTES = 30
# MB of a process before it holds anything: Python and torch, the two Snakemakes around it, and on a
# GPU CUDA's libraries.
CPU_MB, GPU_MB = 4096, 8192

# Rules whose jobs use the experiment's device. Of them, those that several processes share.
ON_DEVICE = {"features", "teacher", "pairs", "train", "score", "score_references", "agreement"}
SHARED = ON_DEVICE - {"features", "agreement"}
# Rules whose seconds count where a budget is in seconds.
TIMED = {"pairs", "train"}


class Cluster(Section):
    """What a profile says of a cluster. Without partitions its default one is used."""

    gpu_partition: str | None = Field(None, min_length=1)
    cpu_partition: str | None = Field(None, min_length=1)
    account: str | None = Field(None, min_length=1)
    gres: str = Field("gpu", pattern=r"^\w+(:[\w.]+)?$", description="what Slurm calls a GPU")
    gpu_tflops: float = Field(gt=0, description="what a GPU sustains in these networks")
    cpu_tflops: float = Field(gt=0, description="what a core does")
    longest: Positive | None = Field(None, description="minutes that the partitions allow")

    def asked(self, experiment: Experiment, rule: str) -> list[str]:
        """Names of the resources that a rule's jobs ask for."""
        gpu = on_gpu(experiment, rule)
        partition = self.gpu_partition if gpu else self.cpu_partition
        exclusive = rule in TIMED and experiment.seconds_budget
        optional = {
            "gres": gpu,
            "slurm_partition": partition,
            "slurm_account": self.account,
            "slurm_extra": exclusive,
        }
        return ["runtime", "mem_mb", "cpus_per_task", *(key for key in optional if optional[key])]


def read_cluster(raw: Mapping) -> Cluster:
    """The part `cluster` of a profile's configuration; mistakes are told all at once."""
    try:
        return Cluster.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            hint = did_you_mean(key, Cluster.model_fields)
            unknown = item["type"] == "extra_forbidden"
            lines.append(f"cluster.{key}: {'unknown key' + hint if unknown else item['msg']}")
        raise UserError("\n  ".join(["the profile's config:", *lines])) from None


def on_gpu(experiment: Experiment, rule: str) -> bool:
    """Whether a rule's jobs are for a GPU. `auto` is one here: the machine that submits jobs tells
    nothing of those that run them."""
    return rule in ON_DEVICE and experiment.device_setting != "cpu"


def processes(experiment: Experiment, rule: str, name: str) -> int:
    """How many processes share a job, `auto` being one."""
    setting = experiment.process_setting
    if setting == "auto" or rule not in SHARED:
        return 1
    batch = experiment.job_batch(rule, name)
    return setting if batch is None else micro_batch(batch, setting)


@cache
def request(
    experiment: Experiment, cluster: Cluster, rule: str, name: str = "", attempt: int = 1
) -> dict[str, int | str]:
    """The resources of one job; `name`: its student, teacher, feature network or pair set."""
    from harness.workflow.plan import work

    todo, gpu = work(experiment, rule, name), on_gpu(experiment, rule)
    count = processes(experiment, rule, name)
    rate = 1e12 * count * (cluster.gpu_tflops if gpu else cluster.cpu_tflops)
    seconds = min(todo.flops / rate, todo.at_most) + todo.seconds
    minutes = MINUTES + math.ceil(SAFETY * seconds / 60)
    held = count * todo.own + (0 if gpu else todo.shared)
    memory = count * (GPU_MB if gpu else CPU_MB) + MEMORY_SAFETY * held / 2**20
    asked = {
        "runtime": min(minutes, cluster.longest or minutes),
        "mem_mb": attempt * math.ceil(memory),
        "cpus_per_task": count,
        "gres": f"{cluster.gres}:{count}",
        "slurm_partition": cluster.gpu_partition if gpu else cluster.cpu_partition,
        "slurm_account": cluster.account,
        "slurm_extra": "--exclusive",
    }
    return {key: asked[key] for key in cluster.asked(experiment, rule)}
