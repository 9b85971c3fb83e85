"""What fourier.py promises: diagonal operators, the low pass, resampling."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fourier
from degrade import wedge_mask
from fourier import apply_fourier, hermitian_part, lowpass, resample

ORACLES = Path(__file__).parent / "oracles"
SHAPES = [(6, 8, 10), (5, 7, 9), (4, 5, 6)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fft(x):
    return torch.fft.fftn(x, dim=(-3, -2, -1))


# ---- Grids


@pytest.mark.parametrize("half", [False, True])
def test_the_wavenumber_is_the_length_of_numpys_frequencies_in_inverse_angstrom(half):
    shape, voxel = (6, 5, 8), (1.0, 2.0, 1.5)
    last_axis = np.fft.rfftfreq if half else np.fft.fftfreq
    kz, ky = np.fft.fftfreq(6, 1.0), np.fft.fftfreq(5, 2.0)
    kx = last_axis(8, 1.5)
    want = np.sqrt(kz[:, None, None] ** 2 + ky[:, None] ** 2 + kx**2)
    ours = fourier.wavenumber(shape, voxel, half=half)
    np.testing.assert_allclose(ours.numpy(), want, rtol=1e-14)


def test_below_nyquist_keeps_the_coefficients_that_the_coarser_grid_has_and_no_others():
    # 25 and 10: in float32, 5 / 25 * 25 < 5.
    for new, old in itertools.product((4, 5, 24, 25), (3, 4, 10, 25)):
        kept = fourier.below_nyquist((new, new, 6), (old, old, 6))
        cycles = range(-(new // 2), (new + 1) // 2)
        want = {k for k in cycles if old >= new or 2 * abs(k) < old}
        along_z = kept[:, 0, 0].nonzero().flatten()
        assert {int(i) - new * (int(i) >= (new + 1) // 2) for i in along_z} == want
        assert torch.equal(kept, kept[:, :1, :1] & kept[:1, :, :1].expand(kept.shape))


# ---- Operators


def test_an_asymmetric_wedge_in_an_even_box_is_self_adjoint_and_idempotent():
    shape = (16, 10, 8)
    mask = wedge_mask(shape, (-40, 60))
    even = hermitian_part(mask)
    assert not torch.equal(mask[..., 4], even[..., 4])  # the masks differ at kx = -Nyquist
    x, y = random(2, 1, *shape)
    Ax, Ay = apply_fourier(x, mask), apply_fourier(y, mask)
    torch.testing.assert_close((Ax * y).sum(), (x * Ay).sum())
    torch.testing.assert_close(apply_fourier(Ax, mask), Ax)
    # Measured coefficients are untouched, all others are zero.
    torch.testing.assert_close(fft(Ax)[0], fft(x)[0] * even, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_hermitian_part_holds_the_coefficients_whose_mirror_image_is_in_the_mask(shape):
    mask = random(*shape) < 0.5
    want = torch.empty_like(mask)
    for z, y, x in np.ndindex(*shape):
        want[z, y, x] = mask[z, y, x] and mask[-z % shape[0], -y % shape[1], -x % shape[2]]
    assert torch.equal(hermitian_part(mask), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_apply_fourier_equals_the_full_transform(shape):
    w = random(*shape)
    w = w + fourier.mirror(w)
    x = random(2, 3, *shape, seed=1)
    want = torch.fft.ifftn(fft(x) * w, dim=(-3, -2, -1)).real
    torch.testing.assert_close(apply_fourier(x, w), want)


def test_weights_for_another_box_are_refused_in_one_line():
    with pytest.raises(ValueError, match="the map is") as error:
        apply_fourier(torch.zeros(8, 8, 8), wedge_mask((8, 8, 10)))
    assert "\n" not in str(error.value)


# ---- Low pass


def test_the_low_pass_equals_the_filter_of_relion_postprocess():
    f = np.load(ORACLES / "fsc_masked.npz")
    half_map_1, half_map_2 = torch.from_numpy(f["half1"]), torch.from_numpy(f["half2"])
    mean = (half_map_1.double() + half_map_2) / 2
    N, voxel = len(mean), float(f["apix"])

    # The rest of RELION's filter: FSC weight and B-factor.
    freq = np.fft.fftfreq(N)
    kz, ky, kx = np.meshgrid(freq, freq, freq, indexing="ij")
    radius = np.sqrt(kz**2 + ky**2 + kx**2) * N
    shell = np.floor(radius + 0.5).astype(int)
    curve = np.clip(f["fsc_true"], 0, None)
    weight = np.sqrt(2 * curve / (1 + curve))[np.minimum(shell, len(curve) - 1)]
    weight = np.where(shell <= int(f["weight_imax"]), weight, 0)
    weight = weight * np.exp(-float(f["bfactor"]) / 4 * (radius / (N * voxel)) ** 2)
    sharpened = apply_fourier(mean, torch.from_numpy(weight * (radius <= N / 2)))

    cutoff = round(N * voxel / float(f["resolution_0143"]))  # RELION rounds it to a shell
    ours = lowpass(sharpened, N * voxel / cutoff, voxel).numpy()
    assert np.abs(ours - f["sharpened"]).max() < 1e-6 * np.abs(f["sharpened"]).max()


def test_the_low_pass_scales_plane_waves_by_its_raised_cosine():
    # Anisotropic voxels in a box that is no cube: 24, 20 and 24 Å, so a shell is 1/24 1/Å.
    shape, voxel = (12, 20, 16), (2.0, 1.0, 1.5)
    z, y, x = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    cycles = [(0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 4), (0, 1, 4), (1, 2, 3), (5, 0, 0)]
    for kz, ky, kx in cycles:
        wave = torch.from_numpy(np.cos(2 * np.pi * (kz * z + ky * y + kx * x) + 0.3))
        s = math.sqrt((kz / 24) ** 2 + (ky / 20) ** 2 + (kx / 24) ** 2)
        angle = np.interp(s - 1 / 6, (-1.5 / 24, 1.5 / 24), (0, np.pi))
        gain = 0.5 + 0.5 * math.cos(angle)
        torch.testing.assert_close(lowpass(wave, 6.0, voxel, edge=3), wave * gain)


def test_a_low_pass_without_a_positive_resolution_is_refused():
    for resolution in (0, -1, math.nan):
        with pytest.raises(ValueError, match="positive"):
            lowpass(torch.zeros(8, 8, 8), resolution, 1.5)


# ---- Resampling


def trigonometric(x, new):
    """The direct sum of (3) along the last axis, over k = -n/2 .. n/2 of the shorter grid."""
    old = x.shape[-1]
    out = torch.zeros(*x.shape[:-1], new, dtype=torch.complex128)
    i = torch.arange(old, dtype=torch.float64)
    j = torch.arange(new, dtype=torch.float64)
    last = min(old, new) // 2
    for k in range(-last, last + 1):
        X = (x * torch.exp(-2j * math.pi * k * i / old)).sum(-1, keepdim=True) / old
        # The one Nyquist coefficient of the old grid appears twice in this sum.
        weight = 0.5 if 2 * abs(k) == old else 1.0
        out += weight * X * torch.exp(2j * math.pi * k * j / new)
    return out.real


SIDES = [(8, 6), (8, 5), (7, 6), (7, 5), (6, 8), (6, 9), (5, 8), (5, 9), (6, 3), (3, 6), (4, 1)]


@pytest.mark.parametrize("old, new", SIDES)
def test_fourier_resampling_equals_the_direct_sum(old, new):
    x = random(2, old, old + 1, old)  # has power at Nyquist, too
    want = trigonometric(x, new + 1)
    want = trigonometric(want.transpose(-1, -2), new).transpose(-1, -2)
    want = trigonometric(want.transpose(-1, -3), old).transpose(-1, -3)
    ours = resample(x, (old, new, new + 1))
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-13)


def test_fourier_resampling_equals_the_oracle():
    f = np.load(ORACLES / "fourier_resample.npz")
    names = [key.removesuffix("_source") for key in f.files if key.endswith("_source")]
    assert len(names) == 4
    for name in names:
        target = torch.from_numpy(f[name + "_target"])
        ours = resample(torch.from_numpy(f[name + "_source"]), target.shape)
        assert (ours - target).abs().max() < 1e-6 * target.abs().max()


def test_a_finer_grid_and_back_returns_the_map():
    for shape in ((8, 9, 10), (7, 7, 6)):
        x = random(*shape)
        fine = resample(x, (12, 10, 17))
        torch.testing.assert_close(resample(fine, shape), x, rtol=0, atol=1e-14)
    assert resample(x.bfloat16(), (12, 10, 17)).dtype == torch.float32
