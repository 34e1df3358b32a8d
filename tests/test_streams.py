import pytest
import torch

from harness.streams import Stream, philox_4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers from the authors' library Random123
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_equals_published_values(counter, key, expected):
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_values_depend_on_seed_path_and_index_only():
    stream, index = Stream(3, "evaluation"), torch.arange(40)
    whole = stream.normal(index, (1, 3, 5))
    assert torch.equal(whole[17:23], stream.normal(index[17:23], (1, 3, 5)))
    assert torch.equal(whole.flip(0), stream.normal(index.flip(0), (1, 3, 5)))
    assert not torch.equal(whole, Stream(4, "evaluation").normal(index, (1, 3, 5)))
    assert not torch.equal(whole, Stream(3, "training").normal(index, (1, 3, 5)))
    large = torch.tensor([2**40 + 1, 1])
    assert not torch.equal(*stream.normal(large, (4,)))


def test_distributions():
    index, n = torch.arange(4000), 4000 * 25
    normal = Stream(0, "n").normal(index, (25,)).double()
    assert abs(normal.mean()) < 4 / n**0.5
    assert abs(normal.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(normal.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((normal[:, 0] * normal[:, 13]).mean()) < 4 / 4000**0.5
    uniform = Stream(0, "u").uniform(index, (25,)).double()
    assert uniform.min() >= 0 and uniform.max() <= 1
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    counts = Stream(0, "i").integers(index, 10, (25,)).flatten().bincount()
    assert len(counts) == 10
    assert ((counts - n / 10).abs() < 5 * (n * 0.09) ** 0.5).all()
