"""LoRA: trained parameters, shared weights and exported weights."""

import copy

import pytest
import torch

from harness.config.schema import LoopSettings
from harness.context import Context, TrainingData
from harness.denoiser import Denoiser, clone_denoiser
from harness.errors import UserError
from harness.method import OptimizerConfig, Phase
from harness.networks import build_denoiser, load_denoiser, save_denoiser
from harness.teachers.pipelines import PipelineFolder
from harness.training.loop import train
from harness.training.lora import add_adapters, is_adapted, merged
from harness.training.run import TrainingRun
from tests import pipelines


@pytest.fixture(scope="module", params=[pipelines.stable_diffusion, pipelines.pixart])
def teacher(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    request.param().save_pretrained(folder)
    pipeline = PipelineFolder(folder)
    return pipeline.denoiser(pipeline.text_encoder().encode([""])).requires_grad_(False)


def inputs():
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3.0, 0.7])


def adapted(teacher: Denoiser) -> Denoiser:
    student = clone_denoiser(teacher)
    torch.manual_seed(0)
    add_adapters(student, teacher, rank=2, alpha=4.0)
    return student


def test_student_starts_as_teacher_and_shares_its_weights(teacher):
    student = adapted(teacher)
    with torch.no_grad():
        assert torch.equal(student(*inputs()), teacher(*inputs()))
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    constant = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    assert constant == {p.data_ptr() for p in teacher.parameters()}
    assert not is_adapted(teacher) and is_adapted(student)


def pull(context: Context) -> torch.Tensor:
    return (context.generated().x - 1).square().mean()


def run(teacher: Denoiser, folder, images: int) -> TrainingRun:
    optimizer = OptimizerConfig(lr=1e-2)
    return TrainingRun(
        name="lora",
        folder=folder,
        run_id="k",
        seed=0,
        networks={"student": adapted(teacher)},
        frozen={"teacher": teacher},
        main="student",
        phases=[Phase("generator", "student", pull, optimizer)],
        data=TrainingData(teacher.image_shape, 0, 2.5),
        batch=2,
        budget=[{"unit": "images", "amount": images}],
        export=save_denoiser,
        loop=LoopSettings(checkpoint_seconds=0),
    )


@pytest.mark.contract
def test_training_exports_merged_weights_and_keeps_the_teacher(teacher, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    training = run(teacher, tmp_path / "run", 8)
    outcome = train(training)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    student = training.networks["student"]
    with torch.no_grad():
        expected = student.eval()(*inputs())
    assert (expected - teacher(*inputs())).abs().max() > 1e-3
    folder = tmp_path / "run" / "snapshots" / outcome.snapshots[-1]["name"]
    whole = load_denoiser(folder, outcome.snapshots[-1]["sha256"])
    assert whole.state_dict().keys() == teacher.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(whole(*inputs()), expected, rtol=1e-4, atol=1e-4)
    # The saved state holds trained weights and their moments only.
    state = sum(p.stat().st_size for p in (tmp_path / "run").glob("state-*.safetensors"))
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert state < 4 * 4.5 * trained + 40_000 < 4 * sum(p.numel() for p in teacher.parameters())


def test_resume_equals_uninterrupted(teacher, tmp_path):
    whole = train(run(teacher, tmp_path / "whole", 8))
    train(run(teacher, tmp_path / "parts", 4))
    parts = train(run(teacher, tmp_path / "parts", 8))
    assert parts.snapshots[-1]["sha256"] == whole.snapshots[-1]["sha256"]


def test_merging_does_not_change_the_adapted_network(teacher):
    student = adapted(teacher)
    for name, parameter in student.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = student.eval()(*inputs())
    one = merged(student)
    assert not is_adapted(one) and is_adapted(student)
    torch.testing.assert_close(one(*inputs()), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(student(*inputs()), expected)


def test_network_without_attention_is_rejected():
    network = {"type": "SongUNet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1}
    plain = build_denoiser(network | {"attn_resolutions": []}, (3, 8, 8), 0)
    with pytest.raises(UserError) as error:
        add_adapters(clone_denoiser(plain), plain, 2, 2.0)
    assert error.value.code == "lora-targets"
