"""The fused operations of EDM's blocks. Without a GPU, Triton's interpreter runs the kernels."""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from harness import kernels
from harness.networks import fused, triton_ops
from harness.networks.edm_unet import Conv2d, DhariwalUNet, SongUNet, UNetBlock
from harness.precision import full_precision
from tests.conftest import DATA, ROOT
from tests.test_edm_networks import error, from_official, golden, golden_denoiser

AGREES = kernels.agrees
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Settings of the blocks of all networks: ADM or not, resampling, filter, attention.
BLOCKS = {
    "ddpmpp": (False, "", (1, 1), False),
    "ddpmpp-up": (False, "up", (1, 1), False),
    "ddpmpp-down": (False, "down", (1, 1), False),
    "ddpmpp-attention": (False, "", (1, 1), True),
    "ncsnpp-up": (False, "up", (1, 3, 3, 1), False),
    "ncsnpp-down": (False, "down", (1, 3, 3, 1), False),
    "adm": (True, "", (1, 1), False),
    "adm-up": (True, "up", (1, 1), False),
    "adm-down": (True, "down", (1, 1), False),
    "adm-attention": (True, "", (1, 1), True),
}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Use kernels on CPU, too, without the comparison before the first use; on a GPU convolutions
    must not use TF32."""
    monkeypatch.setattr(kernels, "agrees", lambda name, check: True)
    with kernels.kernels("always"), full_precision():
        yield


@pytest.fixture
def large_tiles():
    """Fewer programs: the interpreter's time depends more on their number than on their size."""
    sizes = triton_ops.TILE, triton_ops.CHANNELS, triton_ops.WIDTH, triton_ops.WARPS
    if DEVICE == "cpu":
        triton_ops.set_tiles(1 << 14, 256, 256, 4)
    yield
    triton_ops.set_tiles(*sizes)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that a test launches."""
    names, launch = [], triton_ops.launch

    def record(kernel, *arguments, **constants):
        names.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(triton_ops, "launch", record)
    return names


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.detach().double() - reference).norm() / reference.norm())


def images(*size: int, dtype=torch.float32, layout=torch.channels_last) -> Tensor:
    return torch.randn(size).to(DEVICE, dtype).contiguous(memory_format=layout)


def gradients(function, tensors: list, settings: tuple, dy: Tensor) -> list[Tensor]:
    """The result, then the gradient by each tensor that is not None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, *settings)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y))]


def compare(operation, plain, tensors: list, settings: tuple, dtype: torch.dtype) -> None:
    """Compare an operation with its plain version in float64. In bfloat16, results are within one
    unit in the last place, since the interpreter truncates."""
    reference_inputs = [None if t is None else t.double() for t in tensors]
    shape = plain(*reference_inputs, *settings).shape
    dy = images(*shape, dtype=dtype)
    reference = gradients(plain, reference_inputs, settings, dy)
    for ours, expected in zip(gradients(operation, tensors, settings, dy), reference, strict=True):
        if ours.dtype == torch.bfloat16:
            allowed = 2**-7 * expected.abs() + 1e-4 * expected.abs().max()
            assert ((ours.double() - expected).abs() <= allowed).all()
        else:
            assert relative(ours, expected) < 1e-6


# Batch, channels, height, width, groups; dimensions of the shift; whether there is a modulation and
# SiLU. Odd sizes, one image, groups with padding, more pixels than a tile has rows.
NORMS = [
    (3, 24, 5, 5, 6, 2, False, True),
    (2, 48, 12, 13, 4, 1, True, True),
    (1, 32, 8, 8, 8, 0, False, False),
    (2, 384, 3, 1, 32, 2, False, True),
]


@pytest.mark.contract
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm_equals_the_plain_one_in_float64(case, dtype):
    torch.manual_seed(0)
    n, c, height, width, groups, shift_dim, modulated, silu = case
    shift = {0: None, 1: torch.randn(c), 2: torch.randn(n, c)}[shift_dim]
    parameters = shift, torch.randn(c), torch.randn(c), torch.randn(n, 2 * c) if modulated else None
    parameters = [None if p is None else p.to(DEVICE) for p in parameters]
    x = images(n, c, height, width, dtype=dtype) + 0.5
    settings = groups, 1e-5, silu
    compare(fused._Norm.apply, fused.plain_norm, [x, *parameters], settings, dtype)


def test_inputs_may_have_any_layout():
    """Contiguous tensors, and slices of channels: gradients of a concatenation."""
    torch.manual_seed(0)
    wide = images(2, 40, 4, 6)
    parameters = [torch.randn(16, device=DEVICE) for _ in "abc"]
    for x in (wide[:, 8:24], wide[:, 8:24].contiguous(), wide[:, :16].transpose(2, 3)):
        settings = [x, *parameters, None], (4, 1e-5, True), torch.float32
        compare(fused._Norm.apply, fused.plain_norm, *settings)
        settings = [x, parameters[0], wide[:, 24:].reshape(x.shape)], (0.7,), torch.float32
        compare(fused.residual, fused.plain_residual, *settings)
    x, leaf = wide[:, :16], wide.clone().requires_grad_()
    layer = nn.GroupNorm(4, 16, device=DEVICE)
    parts = [fused.norm(part, layer, silu=False) for part in leaf.split([16, 24], 1)[:1]]
    torch.cat([*parts, leaf[:, 16:]], 1).square().sum().backward()  # its gradient is a slice
    expected = leaf.detach().requires_grad_()
    torch.cat([layer(expected[:, :16]), expected[:, 16:]], 1).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad, atol=1e-5, rtol=1e-5)


def test_slices_of_channels_are_not_copied():
    x = images(2, 24, 4, 6)
    assert triton_ops._rows(x[:, 8:])[0].data_ptr() == x[:, 8:].data_ptr()
    assert triton_ops._rows(x[:1])[1] == 24 and triton_ops._rows(x[:, :, :1, :1])[0].shape[2] == 1
    expanded = x[:, :1].expand(-1, 8, -1, -1)
    assert triton_ops._rows(expanded)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_resampling_equal_the_plain_ones_in_float64(dtype):
    torch.manual_seed(0)
    h, x = images(3, 24, 5, 7, dtype=dtype), images(3, 24, 5, 7, dtype=dtype)
    bias = torch.randn(24, device=DEVICE)
    for scale in (0.7, 1.0):
        compare(fused.residual, fused.plain_residual, [h, bias, x], (scale,), dtype)
    for taps in ((1, 1), (1, 3, 3, 1)):
        f = torch.tensor(taps, dtype=torch.float32, device=DEVICE)
        f, same = (torch.outer(f, f) / f.sum() ** 2)[None, None], (len(taps) - 1) // 2
        for up, padding in ((False, same), (True, same), (False, 0), (True, 0)):
            case = [images(2, 24, 6, 8, dtype=dtype)], (f, up, padding), dtype
            compare(fused.resampled, fused.plain_resample, *case)


def test_variance_is_exact_for_a_mean_far_above_it():
    """At most twice the error of PyTorch's own group norm in float32."""
    torch.manual_seed(0)
    x, layer = 1e4 + images(2, 32, 16, 16), nn.GroupNorm(8, 32).to(DEVICE)
    expected = layer.double()(x.double())
    layer.float()
    ours, theirs = (relative(y, expected) for y in (fused.norm(x, layer, silu=False), layer(x)))
    assert ours < 2 * theirs


def test_first_and_second_derivatives_in_float64():
    torch.manual_seed(0)
    sizes = (2, 8, 3, 2), (2, 8), (8,), (8,), (2, 16)
    inputs = [torch.randn(s, dtype=torch.float64, device=DEVICE).requires_grad_() for s in sizes]
    taps = torch.full((1, 1, 2, 2), 0.25, device=DEVICE)
    other = torch.randn_like(inputs[0]).requires_grad_()
    for function, tensors in (
        (lambda *t: fused._Norm.apply(*t, 4, 1e-5, True), inputs),
        (lambda h, b, x: fused.residual(h, b, x, 0.7), [inputs[0], inputs[2], other]),
        (lambda x: fused.resampled(x, taps, True, 0), inputs[:1]),
    ):
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_create_graph_where_an_operation_reads_its_own_result():
    """Gradients by its weights are those of each use alone."""
    torch.manual_seed(0)
    layer = nn.GroupNorm(2, 8, device=DEVICE).double()
    x, found = images(2, 8, 3, 2, dtype=torch.float64).requires_grad_(), []
    for create_graph in (False, True):
        y = fused.norm(fused.norm(x, layer), layer)
        inputs = x, layer.weight, layer.bias
        found.append(torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=create_graph))
    torch.testing.assert_close(*found)


# -- blocks ---------------------------------------------------------------------------------------


def make_block(name: str, dtype=torch.float32, width: int = 64) -> UNetBlock:
    adm, resample, taps, attention = BLOCKS[name]

    class Config(SimpleNamespace):
        def get(self, key, default):
            return getattr(self, key, default)

    settings = {"dropout": 0.0, "model_channels": 8, "channel_mult_emb": 2}
    config = Config(**settings, resample_filter=taps)
    inputs = width if resample else width + 8
    block = UNetBlock(inputs, width, config, adm, attention, resample)
    torch.manual_seed(0)
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    return block.to(DEVICE, dtype, memory_format=torch.channels_last)


def cast(block: nn.Module, dtype: torch.dtype) -> dict:
    convolutions = [m.weight for m in block.modules() if isinstance(m, Conv2d) and m.kernel]
    return fused.CastWeights()(convolutions, dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_the_plain_ones_in_float64(name, large_tiles):
    block = make_block(name)
    x, emb = images(2, block.conv0.weight.shape[1], 4, 4), torch.randn(2, 16, device=DEVICE)
    y = block(x, emb, cast(block, torch.float32))
    dy = torch.randn_like(y)
    y.backward(dy)
    double = copy.deepcopy(block).double()
    expected = double(x.double(), emb.double())
    double.zero_grad()
    expected.backward(dy.double())
    assert relative(y, expected) < 1e-6
    for (key, p), reference in zip(block.named_parameters(), double.parameters(), strict=True):
        assert relative(p.grad, reference.grad) < 2e-6, key
    low = block(x.bfloat16(), emb, cast(block, torch.bfloat16))
    assert low.dtype == torch.bfloat16 and relative(low, expected) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsnpp-down", "adm-attention"])
def test_second_derivatives_of_blocks(name, large_tiles):
    """With `create_graph`, in float64, by the image and the embedding, and then by the weights."""
    block = make_block(name, torch.float64, width=8 if name != "adm-attention" else 64)
    x = torch.randn(1, block.conv0.weight.shape[1], 2, 2, dtype=torch.float64, device=DEVICE)
    emb = torch.randn(1, 16, dtype=torch.float64, device=DEVICE)
    weights, inputs = cast(block, torch.float64), (x.requires_grad_(), emb.requires_grad_())
    penalties = []
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for options in ((weights,), ()):
            y = block(*inputs, *options)
            gradient = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            penalty = sum(g.square().sum() for g in gradient)
            penalties.append([penalty, *torch.autograd.grad(penalty, list(block.parameters()))])
        function = lambda x, e: block(x, e, weights)  # noqa: E731
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    # Compiled kernels take eps and the residual's factor as float32.
    rtol = 1e-6 if DEVICE == "cuda" else 1e-9
    torch.testing.assert_close(*penalties, rtol=rtol, atol=rtol / 1e3)


# -- networks -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_fused_networks_match_the_official_ones(name, large_tiles, launched):
    data = golden(name)
    denoiser = golden_denoiser(data).to(DEVICE, memory_format=torch.channels_last)
    x = torch.from_numpy(data["x"]).requires_grad_()
    inputs = [x, torch.from_numpy(data["sigma"]).float(), None]
    if "labels" in data:
        inputs[2] = torch.from_numpy(data["labels"]).to(DEVICE)
    names = {"augment_labels"} & data.keys()
    extras = {key: torch.from_numpy(data[key]).to(DEVICE) for key in names}
    output = denoiser(inputs[0].to(DEVICE), inputs[1].to(DEVICE), inputs[2], **extras).cpu()
    assert error(output, data["output"]) < 1e-5
    (output * torch.from_numpy(data["v"])).sum().backward()
    assert error(x.grad, data["grad_x"]) < 1e-4
    assert {"_norm_forward", "_norm_backward", "_residual_backward", "_resample"} <= {*launched}


def small(kind: type = SongUNet, **settings) -> nn.Module:
    settings = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1} | settings
    torch.manual_seed(0)
    network = kind(8, 3, 3, attn_resolutions=[], dropout=0.0, **settings)
    return network.to(DEVICE, memory_format=torch.channels_last)


def call(network: nn.Module, x: Tensor | None = None) -> Tensor:
    x = torch.ones(2, 3, 8, 8) if x is None else x
    return network(x.to(DEVICE), torch.tensor([0.1, 0.2], device=DEVICE))


@pytest.mark.contract
def test_which_pass_runs(launched):
    network = small()
    call(network)
    assert launched

    def launches(function) -> bool:
        launched.clear()
        function()
        return bool(launched)

    def jvp(network=network):
        x, direction = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        _, tangent = torch.func.jvp(lambda x: call(network, x), (x,), (direction,))
        with kernels.kernels("off"):
            step = 1e-2 * direction
            difference = (call(network, x + step) - call(network, x - step)) / 2e-2
        assert relative(tangent, difference.double()) < 1e-2

    def jvp_of_adm():
        adm = small(DhariwalUNet)
        for p in adm.parameters():  # the last layers of a new network are zero
            nn.init.normal_(p, std=0.1)
        jvp(adm)

    def counted():
        with FlopCounterMode(display=False) as counter:
            call(network)
        with kernels.kernels("off"), FlopCounterMode(display=False) as reference:
            call(network)
        assert counter.get_total_flops() == reference.get_total_flops() > 0

    def off():
        with kernels.kernels("off"):
            call(network)

    def double_backward():
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(call(network, x).sum(), x, create_graph=True)
            gradient.square().sum().backward()

    assert not launches(jvp) and not launches(jvp_of_adm)
    assert not launches(counted) and not launches(off)
    assert launches(double_backward)
    assert not launches(lambda: call(small().to(memory_format=torch.contiguous_format)))
    with kernels.kernels("gpu"):
        assert launches(lambda: call(network)) == (DEVICE == "cuda")
    network.to("meta")
    with torch.device("meta"):
        assert not launches(lambda: network(torch.ones(2, 3, 8, 8), torch.ones(2)))


def test_kernels_that_differ_are_turned_off_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "agrees", AGREES)
    monkeypatch.setattr(kernels, "_agreement", {})
    network, x = small(), torch.randn(2, 3, 8, 8)
    with kernels.kernels("off"):
        expected = call(network, x)
    monkeypatch.setattr(fused, "plain_residual", lambda h, b, x, scale: h + x + b[:, None, None])
    with kernels.kernels("always"), torch.no_grad():
        assert torch.equal(call(network, x), expected)
        assert torch.equal(call(network, x), expected)
    (record,) = caplog.records
    assert "harness.networks.fused" in record.message and "residual sum: relative" in record.message


@pytest.mark.slow
def test_the_comparison_before_the_first_use_passes(large_tiles, launched):
    for dtype in (torch.float32, torch.bfloat16):
        fused.check(torch.device(DEVICE), dtype)
    assert len({*launched}) == 5


@pytest.mark.contract
def test_weights_are_cast_once_per_update():
    network = small()
    call(network)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2, fused=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        call(network).sum().backward()
        copies = network._cast._copies
        call(network)
        assert network._cast._copies is copies
        optimizer.step()
        call(network)
    assert network._cast._copies is not copies
    for p, low in network._cast._copies.items():
        assert torch.equal(low, p.bfloat16()) and low.stride() == p.stride()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters() if p.grad is not None)
    again = copy.deepcopy(network)
    assert again._cast is not network._cast
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert not call(network).any() and call(again).any()


@pytest.mark.slow
def test_no_image_is_copied_within_a_network(large_tiles):
    """Only the first convolution, which adds its bias, and the image itself at both ends."""
    network = small(channel_mult=[1, 2], model_channels=16)
    with torch.autocast(DEVICE, torch.bfloat16):
        call(network).sum().backward()  # casts the weights
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            call(network).sum().backward()
    copies = [e for e in record.events() if e.name == "aten::copy_" and len(e.input_shapes[0]) == 4]
    images = [e.input_shapes[0] for e in copies if e.input_shapes[0][0] == 2]
    channels = [shape[1] for shape in images]
    assert sorted(set(channels)) == [3, 16] and channels.count(16) == 1


def test_frozen_weights_get_no_gradient():
    network = small()
    frozen = next(network.enc.children()).weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    found = []
    for mode in ("always", "off"):
        network.zero_grad()
        with kernels.kernels(mode), torch.autocast(DEVICE, torch.bfloat16):
            call(network, x).square().sum().backward()
        assert frozen.grad is None
        found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad]))
    assert relative(found[0], found[1].double()) < 0.1


# -- compilation ----------------------------------------------------------------------------------


def specialisation(value) -> object:
    """What Triton compiles for: dtypes, and whether integers are multiples of 16."""
    if isinstance(value, Tensor):
        return value.dtype
    return value % 16 == 0 if isinstance(value, int) else type(value)


@pytest.mark.parametrize(
    ("name", "limit"), [("edm-cifar10-32x32-uncond-vp", 16), ("edm-imagenet-64x64-cond-adm", 24)]
)
def test_number_of_compilations(name, limit, monkeypatch):
    """Of the official networks, forward and backward in bfloat16, with two batch sizes."""
    settings = json.loads((DATA / "edm_state_dicts.json").read_text())[name]["init_kwargs"]
    compiled = set()

    def record(kernel, grid, *arguments, **constants):
        facts = *map(specialisation, arguments), *map(str, constants.values())
        compiled.add((kernel.__name__, *facts))

    monkeypatch.setattr(triton_ops, "launch", record)
    with torch.device("meta"):
        network = from_official(settings).backbone.to(memory_format=torch.channels_last)
        weights = {p: p.bfloat16() for p in network.parameters() if p.dim() == 4}
        monkeypatch.setattr(type(network), "_fused_weights", lambda self, x: weights)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not for meta
        size, classes = network.config["img_resolution"], network.config["label_dim"]
        for batch in (4, 6):
            labels = torch.zeros(batch, classes) if classes else None
            x = torch.ones(batch, 3, size, size)
            network(x, torch.ones(batch), labels).sum().backward()
    assert 5 < len(compiled) <= limit, len(compiled)


@pytest.mark.slow
@pytest.mark.contract
def test_kernels_compile_for_an_h100():
    """Needs no GPU. Registers must not spill to memory in a way that costs time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 18 and all(row["bytes"] > 1000 for row in rows)
    assert all(row["stack"] <= 64 for row in rows if "stack" in row)


@pytest.mark.slow
def test_operators_are_registered_correctly():
    """Their schemas, and the shapes that they have on fake tensors."""
    x, c = images(2, 8, 4, 6), torch.randn(8, device=DEVICE)
    y, statistics = triton_ops.NORM_FORWARD(x, c, c, c, torch.cat([c, c]), 2, 1e-5, True)
    f = torch.full((1, 1, 2, 2), 0.25, device=DEVICE)
    for operator, arguments in (
        (triton_ops.NORM_FORWARD, (x, c, c, c, torch.cat([c, c]), 2, 1e-5, True)),
        (triton_ops.NORM_BACKWARD, (y, x, c, c, c, torch.cat([c, c]), statistics, 2, True)),
        (triton_ops.RESIDUAL_FORWARD, (x, c, y, 0.5)),
        (triton_ops.RESIDUAL_BACKWARD, (x, 0.5)),
        (triton_ops.RESAMPLE, (x, f, True, 0, 4.0, 8, 12)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
