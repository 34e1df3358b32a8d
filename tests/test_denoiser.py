import math
from functools import partial

import pytest
import torch
from torch import nn

from harness.denoiser import EDMDenoiser, one_step
from harness.errors import UserError
from harness.io.artifacts import write_json
from harness.networks import WEIGHTS, build_denoiser, load_denoiser, save_denoiser
from harness.sampling import (
    BLOCK,
    heun,
    noise_and_labels,
    one_step_generator,
    placed_for_sampling,
    sample,
    step_noise,
)
from harness.streams import Stream
from harness.transfers import ahead

NETWORK = {
    "type": "UNet2DModel",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def tiny_denoiser(seed: int = 0, channels: int = 1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_denoiser(NETWORK, (channels, 8, 8), 10, 0.5)


class Echo(EDMDenoiser):
    """A backbone that returns its scaled input times c_noise."""

    def __init__(self):
        super().__init__(nn.Identity(), num_classes=0, sigma_data=0.5)

    def null_condition(self, batch):
        return None

    def run_backbone(self, x, c_noise, condition, **extras):
        return x * c_noise.view(-1, 1, 1, 1)


def test_preconditioning_matches_edm_table_1():
    x, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.002, 0.7, 80.0])
    s = sigma.view(-1, 1, 1, 1)
    expected = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * (
        x / (s**2 + 0.25).sqrt() * s.log() / 4
    )
    torch.testing.assert_close(Echo()(x, sigma), expected)


def test_none_means_the_null_label_and_labels_change_the_output():
    denoiser, x, sigma = tiny_denoiser(), torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    with torch.no_grad():
        without = denoiser(x, sigma)
        assert torch.equal(without, denoiser(x, sigma, torch.full((4,), 10)))
        assert not torch.allclose(without, denoiser(x, sigma, torch.zeros(4, dtype=torch.long)))
        assert denoiser(x, torch.tensor([1e-3, 0.1, 5.0, 80.0])).isfinite().all()


def test_output_is_float32_under_bfloat16_autocast():
    denoiser, x = tiny_denoiser(), torch.randn(2, 1, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = denoiser(x, torch.full((2,), 0.5))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, denoiser(x, torch.full((2,), 0.5)), atol=0.05, rtol=0.05)


def test_one_step_evaluates_the_denoiser_at_sigma_init():
    denoiser, z, labels = tiny_denoiser(), torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    expected = denoiser(2.5 * z, torch.full((2,), 2.5), labels)
    assert torch.equal(one_step(denoiser, z, labels, 2.5), expected)


def test_heun_converges_to_the_flow_of_a_gaussian():
    """Data N(0, s²): D(x; σ) = x s²/(s² + σ²), and the flow shrinks x by s / sqrt(s² + σ_max²)."""
    s, z = 0.5, torch.randn(8, 1, 2, 2, dtype=torch.float64)
    calls = []

    def denoiser(x, sigma, condition):
        calls.append(float(sigma[0]))
        return x * s**2 / (s**2 + sigma.view(-1, 1, 1, 1) ** 2)

    exact = 80 * z * s / math.sqrt(s**2 + 80**2)
    errors = []
    for steps in (18, 72):
        calls.clear()
        x = heun(denoiser, z, steps=steps)
        assert len(calls) == 2 * steps - 1
        errors.append((x - exact).abs().max() / exact.abs().max())
    assert errors[0] < 0.06
    assert errors[1] < errors[0] / 8  # second order
    assert calls[0] == pytest.approx(80) and calls[-1] == pytest.approx(0.002)


def test_stochastic_sampler_preserves_the_variance_of_a_gaussian():
    """Churn adds noise and removes it again. With the exact denoiser of N(0, s²) the standard
    deviation stays s, but single images differ from the deterministic sampler's."""
    s, z = 0.5, torch.randn(4096, 1, 1, 1, dtype=torch.float64)

    def denoiser(x, sigma, condition):
        return x * s**2 / (s**2 + sigma.view(-1, 1, 1, 1) ** 2)

    churn = {"steps": 64, "s_churn": 20.0, "s_min": 0.05, "s_max": 50.0}
    noise = step_noise(torch.arange(4096), (1, 1, 1), seed=3)
    x, plain = heun(denoiser, z, None, noise, **churn), heun(denoiser, z, steps=64)
    assert x.std().item() == pytest.approx(s, rel=0.05)
    assert plain.std().item() == pytest.approx(s, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([x.flatten(), plain.flatten()]))[0, 1]) < 0.9
    with pytest.raises(ValueError, match="s_churn needs noise"):
        heun(denoiser, z, **churn)


def test_samples_do_not_depend_on_their_number():
    generate = one_step_generator(tiny_denoiser(), 2.5)

    def images(count):
        return torch.cat([x for x, _ in sample(generate, count, (1, 8, 8), 10, seed=5)])

    many = images(2 * BLOCK + 9)
    assert len(many) == 2 * BLOCK + 9
    assert torch.equal(many[:7], images(7))
    assert torch.equal(many[: BLOCK + 1], images(BLOCK + 1))
    rest = sample(generate, 22, (1, 8, 8), 10, seed=5, block=4, start=12)
    assert [len(labels) for _, labels in rest] == [4, 4, 2]
    assert not list(sample(generate, 22, (1, 8, 8), 10, seed=5, block=4, start=22))


def test_labels_are_balanced_and_depend_on_the_index():
    _, labels = noise_and_labels(torch.arange(1000), (1,), 10, seed=0)
    assert (labels.view(100, 10).sort(dim=1).values == torch.arange(10)).all()
    _, part = noise_and_labels(torch.arange(137, 151), (1,), 10, seed=0)
    assert torch.equal(part, labels[137:151])
    assert not torch.equal(labels, noise_and_labels(torch.arange(1000), (1,), 10, seed=1)[1])
    assert not torch.equal(labels[:10], labels[10:20])
    stream = Stream(0, "evaluation", "label")  # of each round by itself
    for number in (0, 57):
        order = stream.uniform(torch.tensor([number]), (10,))[0].argsort(stable=True)
        assert torch.equal(labels[10 * number :][:10], order)


def test_saved_denoiser_is_loaded_unchanged(tmp_path):
    denoiser, x, sigma = tiny_denoiser().eval(), torch.randn(2, 1, 8, 8), torch.ones(2)
    sha256 = save_denoiser(denoiser, tmp_path / "d", {"sigma_init": 2.5})
    again = load_denoiser(tmp_path / "d", sha256)
    assert torch.equal(denoiser(x, sigma), again(x, sigma))
    from diffusers import UNet2DModel

    assert UNet2DModel.from_pretrained(tmp_path / "d", low_cpu_mem_usage=False) is not None


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]), "damaged"),
        (lambda d: (d / WEIGHTS).unlink(), "missing-file"),
        (lambda d: (d / "config.json").unlink(), "missing-file"),
        (lambda d: (d / "denoiser.json").write_text("{"), "damaged"),
        (lambda d: write_json(d / "config.json", {"_class_name": "UNet2DMode"}), "unknown-name"),
    ],
)
def test_damaged_folder_is_rejected(tmp_path, damage, code):
    save_denoiser(tiny_denoiser(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        load_denoiser(tmp_path)
    assert error.value.code == code


def test_weights_of_another_run_are_rejected(tmp_path):
    sha256 = save_denoiser(tiny_denoiser(0), tmp_path)
    save_denoiser(tiny_denoiser(1), tmp_path)
    with pytest.raises(UserError) as error:
        load_denoiser(tmp_path, sha256)
    assert error.value.code == "damaged"


@pytest.mark.parametrize(("device", "items_ahead"), [("cpu", 0), ("cuda:1", 1)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_next_item_is_made_before_one_is_used_on_a_gpu(device, items_ahead, count):
    made = []
    stream = ahead(lambda item: made.append(item) or -item, range(count), device)
    for i, value in enumerate(stream):
        assert value == -i
        assert len(made) == min(i + 1 + items_ahead, count)
    assert made == list(range(count))
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda item: 1 / item, [1, 0, 2], device))


def test_sampling_in_bf16_is_autocast_of_the_network_alone():
    network, seen = tiny_denoiser(), []

    class Codec(nn.Module):
        def forward(self, latents):
            seen.append((torch.is_autocast_enabled("cpu"), latents.dtype))
            return latents.repeat(1, 3, 1, 1)

    def generate(z, condition, noise):
        return seen.append(torch.is_autocast_enabled("cpu")) or heun(network, z, condition, steps=2)

    inputs = generate, 5, (1, 8, 8), 10, 0
    (half, labels), *_ = sample(*inputs, block=8, codec=Codec(), precision="bf16")
    assert seen == [True, (False, torch.float32), (False, torch.float32)]
    (full, same_labels), *_ = sample(*inputs, block=8, codec=Codec())
    assert half.dtype == torch.uint8 and half.shape == (5, 3, 8, 8)
    assert torch.equal(labels, same_labels)
    change = (half.int() - full.int()).abs()  # 8 bits of mantissa in 3 evaluations
    assert 0 < change.double().mean() < 8
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert heun(network, torch.zeros(2, 1, 8, 8), labels[:2], steps=2).dtype == torch.float64


def test_values_that_are_not_finite_are_counted_when_a_block_is_delivered():
    def generate(z, condition, noise):
        return torch.where(torch.arange(len(z)).view(-1, 1, 1, 1) % 3 == 0, torch.inf, z)

    for codec in (None, nn.Identity(), nn.Flatten(0, 0), nn.ReLU()):
        blocks = sample(generate, 8, (1, 8, 8), 10, seed=0, block=4, codec=codec)
        with pytest.raises(UserError, match="2 of 4 generated images or latents contain NaN"):
            next(blocks)
    broken = nn.Threshold(0.5, math.nan)  # of a codec, with finite latents
    with pytest.raises(UserError, match="4 of 4"):
        next(sample(lambda z, *_: z, 8, (1, 8, 8), 10, seed=0, block=4, codec=broken))


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu_while_it_samples():
    denoiser, settings = Echo().cuda(), {"steps": 3, "s_churn": 5.0}

    def images(device):
        blocks = sample(
            partial(heun, denoiser.to(device), **settings), 20, (3, 8, 8), 10, 0, device, block=4
        )
        return torch.cat([x for x, _ in blocks])

    expected = images("cpu")
    images("cuda")  # the first use checks the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = images("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "layout"), [("fp32", False), ("bf16", True)])
def test_half_precision_samples_in_channels_last_on_a_gpu(precision, layout):
    denoiser = placed_for_sampling(tiny_denoiser().cuda(), precision)
    weights = [
        p for p in denoiser.parameters() if p.dim() == 4 and p.shape[2] > 1 and p.shape[1] > 1
    ]
    assert weights
    assert {p.is_contiguous(memory_format=torch.channels_last) for p in weights} == {layout}
