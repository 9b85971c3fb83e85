"""What fsc.py promises: shells, FSC, FSC_AUC, resolution."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fourier
from fsc import auc, fsc, resolution, shells

ORACLES = Path(__file__).parent / "oracles"


def oracle(name):
    return {key: torch.from_numpy(value) for key, value in np.load(ORACLES / name).items()}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direct_fsc(a, b, counted, side):
    """(1) as a loop over every coefficient of the full float64 transform.

    side: Å of each axis. The shells are those of the shortest one.
    """
    A = np.fft.fftn(a.double().numpy())
    B = np.fft.fftn(b.double().numpy())
    kz, ky, kx = (np.fft.fftfreq(n, 1 / n) / length for n, length in zip(a.shape, side))
    shortest = min(range(3), key=lambda i: side[i])
    n = a.shape[shortest] // 2 + 1
    sums = np.zeros((3, n))
    for z, y, x in np.ndindex(*a.shape):
        radius = side[shortest] * math.hypot(kz[z], ky[y], kx[x])
        shell = math.floor(radius + 0.5)
        if shell < n and counted[z, y, x]:
            p, q = A[z, y, x], B[z, y, x]
            sums[:, shell] += (p * q.conjugate()).real, abs(p) ** 2, abs(q) ** 2
    return torch.from_numpy(sums[0] / np.sqrt(sums[1] * sums[2]))


def assert_close(a, b, atol=2e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- Shells


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 9, 8), (6, 10, 5)])
def test_rounding_up_and_down_give_the_shells_of_cryofms_fsc_and_noise_power(shape):
    W = shape[-1]
    k = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    squared = sum(axis**2 for axis in k) * W**2
    # 1e-9: a whole radius belongs to its own shell, however it was rounded.
    up = np.ceil(np.sqrt(squared) - 1e-9).clip(max=W // 2 + 1)
    down = np.floor(np.sqrt(squared) + 1e-9)
    assert np.array_equal(shells(shape, rounding="down"), down)
    off = shells(shape, rounding="up").numpy() != up
    # The release's edges are not exact, so a tie may fall into the next shell.
    assert np.allclose(squared[off], np.round(np.sqrt(squared[off])) ** 2)


# ---- Curves


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 7, 7), (6, 9, 8), (10, 6, 7)])
def test_fsc_equals_the_direct_sum_over_the_full_fft(shape):
    a, b = noise(*shape, seed=1), noise(*shape, seed=2)
    b = b + 0.7 * a + 3
    everything = torch.ones(shape, dtype=torch.bool)
    assert_close(fsc(a, b), direct_fsc(a, b, everything, shape))


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 7, 7), (6, 9, 8)])
def test_fsc_over_a_region_counts_exactly_its_coefficients(shape):
    a, b = noise(*shape, seed=1), noise(*shape, seed=2)
    region = noise(*shape, seed=3) > 0  # without mirror symmetry, so both halves matter
    region[0, 0, 0] = True
    assert_close(fsc(a, b, region), direct_fsc(a, b, region, shape))


def test_shells_of_anisotropic_voxels_are_spheres_in_angstrom():
    a, b = noise(8, 6, 9, seed=1), noise(8, 6, 9, seed=2)
    voxel = (1.0, 2.1, 1.3)
    side = [n * v for n, v in zip(a.shape, voxel)]
    everything = torch.ones(a.shape, dtype=torch.bool)
    assert_close(fsc(a, b, voxel_size=voxel), direct_fsc(a, b, everything, side))


@pytest.mark.parametrize("case", ["even", "odd", "noncubic"])
def test_curves_areas_and_resolutions_of_every_convention_equal_the_oracle(case):
    f = oracle("fsc.npz")
    a, b, voxel = f[f"{case}_vol1"], f[f"{case}_vol2"], float(f["apix"])
    box = min(a.shape)
    in_shell = torch.bincount(shells(a.shape).flatten())[: box // 2 + 1]
    assert in_shell.tolist() == f[f"{case}_n_voxels_round"].tolist()

    ours = fsc(a, b)
    assert_close(ours, f[f"{case}_fsc_round"])
    assert_close(auc(ours), f[f"{case}_auc_mean"], 1e-6)
    assert_close(resolution(ours, voxel, box=box), f[f"{case}_res0143_linear"], 1e-5)
    assert_close(resolution(ours, voxel, 0.5, box=box), f[f"{case}_res05_linear"], 1e-5)

    released = fsc(a, b, convention="cryofm")
    assert_close(released[1:], f[f"{case}_fsc_ceil"])
    assert_close(auc(released), f[f"{case}_auc_mean_ceil"], 1e-6)

    if case != "noncubic":
        relion = fsc(a, b, convention="relion")
        best = resolution(relion, voxel, box=box, convention="relion")
        assert_close(relion, f[f"{case}_fsc_half"])
        assert_close(best, f[f"{case}_res0143_lastabove_half"], 1e-6)


def test_fsc_in_the_missing_wedge_equals_the_oracle():
    f = oracle("pocs_wedge.npz")
    shape = f["truth"].shape
    kz, _, kx = fourier.freq_grid(shape)
    measured = (kz.abs() <= kx.abs() * math.tan(math.pi / 3)).expand(shape)
    curve = fsc(f["truth"], f["pocs_50"], ~measured)
    assert curve[0].isnan()  # no coefficient is missing in this shell
    assert_close(curve[1:], f["fsc_missing_region_pocs50"][1:])


def test_a_batch_gives_what_each_map_gives_alone():
    a, b = noise(2, 3, 8, 8, 8, seed=1), noise(2, 3, 8, 8, 8, seed=2)
    together = fsc(a, b)
    for i, j in np.ndindex(2, 3):
        alone = fsc(a[i, j], b[i, j])
        assert torch.equal(together[i, j], alone)
        assert torch.equal(resolution(together, 1.5)[i, j], resolution(alone, 1.5))


def test_maps_in_half_precision_are_summed_in_full_precision():
    a, b = noise(8, 8, 8, seed=1).bfloat16(), noise(8, 8, 8, seed=2).bfloat16()
    assert_close(fsc(a, b), fsc(a.double(), b.double()))


def test_a_radial_filter_leaves_the_fsc_as_it_is():
    a, b = noise(12, 12, 12, seed=1), noise(12, 12, 12, seed=2)
    gain = torch.exp(-0.3 * shells(a.shape, half=True))
    filtered = torch.fft.irfftn(torch.fft.rfftn(a + b) * gain, s=a.shape)
    assert_close(fsc(filtered, b), fsc(a + b, b))


def test_a_shell_without_power_is_nan_and_auc_leaves_it_out():
    a = noise(8, 8, 8)
    flat = torch.ones(8, 8, 8)  # power at the zero frequency only
    assert fsc(a, flat).isnan().tolist() == [False, True, True, True, True]
    assert float(auc(torch.tensor([1.0, 0.8, math.nan, 0.2]))) == pytest.approx(0.5)


# ---- Resolution


def test_resolution_reads_the_first_crossing():
    curve = torch.tensor([1.0, 0.9, 0.7, 0.3, 0.6, 0.1])  # box 10: shell k at k / 10
    assert float(resolution(curve, 2.0, 0.5)) == pytest.approx(20 / 2.5)
    assert float(resolution(curve, 2.0, 0.5, convention="relion")) == pytest.approx(20 / 2)
    assert float(resolution(curve, 2.0, 0.5, box=11)) == pytest.approx(22 / 2.5)


def test_a_curve_that_never_falls_gives_the_nyquist_limit():
    curve = torch.tensor([1.0, 0.9, 0.7, 0.3, 0.6, 0.1])
    assert float(resolution(curve, 2.0, 0.05)) == pytest.approx(4.0)


def test_the_zero_frequency_counts_as_one_when_resolution_is_read():
    curve = torch.tensor([-1.0, 0.2, 0.1])
    assert float(resolution(curve, 1.0, 0.6)) == pytest.approx(4 / 0.5)
    at_zero = resolution(torch.tensor([1.0, 0.1]), 1.0, convention="relion")
    assert float(at_zero) == math.inf


def test_resolution_skips_shells_that_are_nan():
    curve = torch.tensor([math.nan, 0.9, math.nan, 0.1])
    assert float(resolution(curve, 1.0, 0.5)) == pytest.approx(6 / 2)
    assert resolution(torch.full((4,), math.nan), 1.0).isnan()


# ---- Errors


def test_maps_on_two_grids_a_foreign_region_and_an_unknown_convention_are_refused():
    a = noise(8, 8, 8)
    with pytest.raises(ValueError, match="one grid"):
        fsc(a, noise(8, 8, 9))
    with pytest.raises(ValueError, match="region has shape"):
        fsc(a, a, torch.ones(8, 8, 9))
    with pytest.raises(ValueError, match="want one of ours, relion, cryofm"):
        fsc(a, a, convention="eman")
