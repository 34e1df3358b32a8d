"""`harness plan`: the printed table. tests/test_paper_configs.py tests the counts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from harness.cli import main
from harness.data.datasets import prepare
from harness.errors import UserError
from harness.io.records import DataRecord
from harness.networks import build_denoiser
from harness.training.ledger import measure
from harness.validation import parse_experiment
from harness.workflow import plan, speed
from harness.workflow.dry_run import SavedTensorMemory, dry_run_dataset


def test_every_student_has_a_row(tiny, tmp_path, capsys):
    """Local files may be missing. A budget in seconds gives no number of images."""
    sid, gdd = tiny["students"]["sid"], tiny["students"]["gdd-i"]
    tiny["students"] = {"sid": sid | {"budget": [{"unit": "seconds", "amount": 5}]}, "gdd-i": gdd}
    tiny["teachers"]["edm"]["source"] = "missing.pkl"
    for key in ("images", "batch"):
        del tiny["teachers"]["edm"][key]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny, sort_keys=False))
    assert main(["plan", "--configfile", str(tmp_path / "x.yaml"), "--tflops", "0.001"]) == 0
    output = capsys.readouterr().out
    header, _, *lines = (line for line in output.splitlines() if "|" in line)
    names = [name.strip() for name in header.strip("|").split("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in cells}
    assert list(rows) == ["sid", "gdd-i"]
    sid, gdd = rows["sid"], rows["gdd-i"]
    assert sid["images"] == sid["PFLOPs"] == sid["hours"] == "–"
    assert sid["auxiliary (M)"] == sid["trained (M)"] == sid["parameters (M)"] == "0.02"
    # Two points of the grid (64 and 128 images) and the end; 17,961 float32 weights.
    assert sid["snapshots"] == "–" and gdd["snapshots"] == "3 x 71.8 kB"
    # Seconds give no number of snapshots: at least one. 4 x 71.8 kB for the only seed.
    assert "The snapshots of all runs take at least 287 kB;" in output
    assert gdd["trained (M)"] == "0.01" and gdd["micro-batch"] == "16" and gdd["images"] == "160"
    work = 160 * float(gdd["GFLOPs/image"])
    assert float(gdd["PFLOPs"]) == pytest.approx(work / 1e6, rel=1e-3)
    assert float(gdd["hours"]) == pytest.approx(work / 3600, rel=1e-2)  # at one GFLOP/s


def test_plan_reads_the_prepared_data(tiny, tmp_path, monkeypatch):
    """Without declarations the size and the classes of a source are unknown. Data that were
    prepared with other settings do not count."""
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    tiny["data"] = {"name": "x", "source": "set", "held_out": 0.0}
    for i in range(8):
        Path(f"set/{i}").mkdir()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(f"set/{i}/x.png")
    experiment = parse_experiment(tiny, "x")
    with pytest.raises(UserError, match=r"data\.resolution or data\.resize") as error:
        dry_run_dataset(experiment, 2)
    assert error.value.code == "missing-key"
    prepare(experiment.data, experiment.paths.data, fingerprint=experiment.prepared_data)
    dataset = dry_run_dataset(experiment, 2)
    assert dataset.image_shape == (3, 4, 4) and dataset.num_classes == 8
    tiny["data"] |= {"num_classes": 8, "resize": {"size": 16}}
    changed = dry_run_dataset(parse_experiment(tiny, "x"), 2)
    assert changed.image_shape == (3, 16, 16) and changed.num_classes == 8


def test_hours_are_of_the_machine_at_hand(tiny, tmp_path, monkeypatch, capsys):
    estimate = dict.fromkeys(("parameters", "trainable", "auxiliary", "micro_batch", "memory"), 1)
    estimate |= {"flops_per_image": 1e9, "images": 160.0, "flops": 3.6e12, "snapshots": 1}
    estimate |= {"snapshot_bytes": 4, "fits": lambda size: 1}
    monkeypatch.setattr(plan, "Estimate", lambda *arguments: SimpleNamespace(**estimate))
    teacher = SimpleNamespace(flops=1.8e12)
    monkeypatch.setattr(plan, "TeacherEstimate", lambda *arguments: teacher)
    monkeypatch.setattr(speed, "matrix_rate", lambda *arguments: 5e9)  # FLOP/s
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0, 0))
    tiny["students"] = {name: tiny["students"][name] for name in ("sid", "gdd")}
    tiny["training"]["seeds"] = [0, 1]

    def hours(**changes) -> tuple[list[str], str]:
        plan.print_plan(parse_experiment(tiny | changes, "tiny.yaml", tmp_path))
        *table, text = capsys.readouterr().out.strip().splitlines()
        return [line.split("|")[-2].strip() for line in table if "|" in line][2:], text

    found, text = hours()
    assert found == ["1", "1"]
    assert text.startswith(
        "Each run (2 per student), at 0.001 TFLOP/s, 20% (assumed) of a matrix product's rate on one "
        "thread of this CPU. 4 hours for all runs, one after another. Before them: teacher edm 0.5 "
        "hours. Feature networks, samples and scores come on top."
    )
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0, 0))
    assert "thread of this CPU (measured beside other work, load 999.0). 4 hours" in hours()[1]
    found, text = hours(device="cuda")
    assert found == ["1e-05", "1e-05"]  # 100 TFLOP/s
    assert ", at 100 TFLOP/s, assumed: this machine has no cuda. " in text
    rates = {"sid": 2e9}
    monkeypatch.setattr(speed, "trained_rates", lambda experiment: rates)
    found, text = hours()
    assert found == ["0.5", "0.5"]
    assert ", at the rate of the runs trained on this machine (sid). 2 hours for all runs" in text


def test_tensors_saved_under_autocast_count_as_bfloat16():
    first, second = (torch.nn.Linear(1000, 1000, device="meta") for _ in "ab")
    memory, size = SavedTensorMemory(), 10 * 1000 * 4  # bytes in float32
    with memory.track([first, second]), torch.autocast("cpu", torch.bfloat16):
        x = first(torch.empty(10, 1000, device="meta")).sin()
        assert memory.current == 2 * size / 2  # the inputs of the layer and of the sine
        with torch.autocast("cpu", enabled=False):
            x = second(x).sin()
        assert memory.current == 2 * size / 2 + 2 * size
        x = x.cos()
        index = torch.zeros(10, dtype=torch.int64, device="meta")
        x = x[index]  # saves the index, as it is
        assert memory.current == 3 * size / 2 + 2 * size + 80
    del x
    assert memory.current == 0


def test_networks_in_float32_do_not_halve_their_memory(tiny, monkeypatch):
    """GDD's features and discriminator run in float32, whatever the precision of the run."""
    monkeypatch.setattr(plan, "PERIOD", 1)
    saved = {}
    for precision in ("fp32", "bf16"):
        tiny["training"]["precision"] = precision
        saved[precision] = plan.Estimate(parse_experiment(tiny, "tiny.yaml"), "gdd").saved
    assert 0.55 * saved["fp32"] < saved["bf16"] < 0.65 * saved["fp32"]


@pytest.mark.parametrize("missing", [False, True])
def test_disk_of_embeddings_says_which_prompts_are_assumed(missing, tmp_path, tiny, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    if not missing:
        prompts.write_text("a cat\na dog\n")
    network = {"type": "UNet2DConditionModel", "cross_attention_dim": 4, "sample_size": 8}
    tiny["data"] = {"name": "x", "prompts": str(prompts), "image_shape": [3, 64, 64]}
    tiny["teachers"] = {"sd": {"source": "missing", "network": network}}
    tiny["students"] = {"sim": {"method": "sim"}}
    experiment = parse_experiment(tiny, "tiny.yaml", files=False, check=False)
    teacher = SimpleNamespace(null_condition=lambda _: {"embeddings": torch.empty(1, 77, 768)})
    monkeypatch.setattr(plan, "dry_run_pipeline", lambda section: teacher)
    text = plan._embedding_sizes(experiment)
    if missing:  # 10^6 x 77 x 768 float16 numbers
        assert text.endswith(f"teacher sd: 118.3 GB, if {prompts} has 1,000,000 prompts.")
    else:
        assert text == " Embeddings of 2 prompts for teacher sd: 0.0 GB."


PREPARED = {
    **{"name": "digits", "registered": True, "class_names": [], "train_images": 1438},
    **{"held_out_images": 359, "image_shape": [1, 8, 8], "images_sha256": "i", "sha256": "d"},
}


@pytest.fixture
def gpu(monkeypatch):
    """A function that sets the memory of a GPU, in bytes; there is no driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def set_memory(size: int) -> None:
        facts = SimpleNamespace(total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)

    return set_memory


def test_training_requests_its_share_of_a_gpu(tiny, tmp_path, gpu, monkeypatch):
    """The estimate with its allowance, the context and the real images, rounded up to percents."""
    memory = {"sid": 8, "gdd": 10, "dmd": 8, "edm": 4}  # GiB

    def estimate(experiment, name):
        return SimpleNamespace(memory=memory[name] * 2**30)

    monkeypatch.setattr(plan, "Estimate", estimate)
    monkeypatch.setattr(plan, "TeacherEstimate", estimate)
    tiny["device"] = "cuda"
    tiny["students"]["dmd"]["settings"]["regression"] = "lpips"
    gpu(80 * 2**30)

    def shares() -> list[int]:
        experiment = parse_experiment(tiny, "tiny.yaml", tmp_path, files=False, check=False)
        kinds = ["run"] * 3 + ["teacher"]
        return [plan.gpu_percent(experiment, *job) for job in zip(kinds, memory, strict=True)]

    # 2 GiB of context; 1.25 times the estimate, or twice with LPIPS; before the data are prepared,
    # 4 GiB of real images for GDD and the teacher: 12, 18.5, 18 and 11 GiB.
    assert shares() == [15, 24, 23, 14]
    DataRecord.model_validate(PREPARED).write(tmp_path / "tiny" / "data" / "data.json")
    assert shares() == [15, 19, 23, 9]  # 0.1 MB of images: 12, 14.5, 18 and 7 GiB
    gpu(13 * 2**30)
    assert shares() == [93, 100, 100, 54]


def test_training_of_unknown_memory_requests_a_whole_gpu(tiny, tmp_path, gpu, monkeypatch):
    gpu(2**60)
    tiny["device"] = "cuda"
    tiny["students"] = {"sid": tiny["students"]["sid"]}
    tiny["training"]["budget"] = [{"unit": "seconds", "amount": 5}]
    assert plan.gpu_percent(parse_experiment(tiny, "", tmp_path), "run", "sid") == 100
    tiny["training"]["budget"] = [{"unit": "images", "amount": 160}]
    tiny["teachers"]["edm"] = {"source": "missing.pkl"}  # without its network
    imported = parse_experiment(tiny, "", tmp_path, files=False)
    assert plan.gpu_percent(imported, "run", "sid") == 100
    assert plan.gpu_percent(imported, "teacher", "edm") == 100
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert plan.gpu_percent(parse_experiment(tiny, "", tmp_path, False), "run", "sid") == 100


def test_the_estimate_of_a_teacher_counts_its_own_training(tiny, tmp_path):
    """Three times a forward pass per image: forward, and backward to inputs and weights."""
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path)
    estimate = plan.TeacherEstimate(experiment, "edm")
    network = build_denoiser(tiny["teachers"]["edm"]["network"], (1, 8, 8), 10)
    with torch.no_grad(), measure({}) as cost:
        network(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert estimate.parameters == sum(p.numel() for p in network.parameters())
    assert 2.8 * cost.flops < estimate.flops_per_image <= 3 * cost.flops
    assert estimate.flops == estimate.flops_per_image * 1280
