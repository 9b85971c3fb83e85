"""What fourier.resample promises."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fourier

ORACLES = Path(__file__).parent / "oracles"


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- Resampling ------------------------------------------------------------------------------------

def trigonometric(x, new):
    """The direct sum of (3) along the last axis, over k = -n/2 ... n/2 of the shorter grid."""
    old = x.shape[-1]
    out = torch.zeros(*x.shape[:-1], new, dtype=torch.complex128)
    i, j = torch.arange(old, dtype=torch.float64), torch.arange(new, dtype=torch.float64)
    for k in range(-(min(old, new) // 2), min(old, new) // 2 + 1):
        f_k = (x * torch.exp(-2j * math.pi * k * i / old)).sum(-1, keepdim=True) / old
        weight = 0.5 if 2 * abs(k) == old else 1.0        # old's one Nyquist term appears twice in this sum
        out += weight * f_k * torch.exp(2j * math.pi * k * j / new)
    return out.real


@pytest.mark.parametrize("old, new", [(8, 6), (8, 5), (7, 6), (7, 5), (6, 8), (6, 9), (5, 8), (5, 9), (6, 3), (3, 6),
                                      (4, 1)])
def test_fourier_resampling_equals_the_direct_sum(old, new):
    x = random(2, old, old + 1, old, dtype=torch.float64)                                    # power at Nyquist too
    want = trigonometric(x, new + 1)
    want = trigonometric(want.transpose(-1, -2), new).transpose(-1, -2)
    want = trigonometric(want.transpose(-1, -3), old).transpose(-1, -3)
    torch.testing.assert_close(fourier.resample(x, (old, new, new + 1)), want, rtol=0, atol=1e-13)


def test_fourier_resampling_equals_the_oracle():
    oracle = np.load(ORACLES / "fourier_resample.npz")
    names = [key.removesuffix("_source") for key in oracle.files if key.endswith("_source")]
    assert len(names) == 4
    for name in names:
        target = torch.from_numpy(oracle[name + "_target"])
        got = fourier.resample(torch.from_numpy(oracle[name + "_source"]), target.shape)
        assert (got - target).abs().max() < 1e-6 * target.abs().max()


def test_a_finer_grid_and_back_returns_the_map():
    for shape in ((8, 9, 10), (7, 7, 6)):
        x = random(*shape, dtype=torch.float64)
        fine = fourier.resample(x, (12, 10, 17))
        torch.testing.assert_close(fourier.resample(fine, shape), x, rtol=0, atol=1e-14)
    assert fourier.resample(x.bfloat16(), (12, 10, 17)).dtype == torch.float32
