"""What fsc_half_maps.py promises: masked FSC, sharpening, directional and local resolution."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fsc import fsc, radius, resolution
from fsc_half_maps import (
    correct_for_mask,
    direction_grid,
    directional_fsc,
    fsc_weight,
    guinier_b_factor,
    local_resolution,
    masked_fsc,
    match_half_maps,
    place_notes,
    randomise_phases,
    read_fsc,
    sharpen,
    shift_notes,
    sphericity,
)
from mrc import Map

ORACLES = Path(__file__).parent / "oracles"


def oracle(name):
    return {key: torch.from_numpy(value) for key, value in np.load(ORACLES / name).items()}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filtered_noise(n, gain, seed=1):
    """Noise (n, n, n) whose coefficients were multiplied by gain(radius in shells)."""
    gain = gain(radius((n, n, n), half=True))
    return torch.fft.irfftn(torch.fft.rfftn(noise(n, n, n, seed=seed)) * gain, s=(n, n, n))


def assert_close(a, b, atol=2e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- FSC under a mask


def test_a_half_map_is_brought_to_the_grey_scale_of_the_other():
    signal = filtered_noise(24, lambda r: 30 * torch.exp(-((r / 3) ** 2)))
    a, b = signal + 0.1 * noise(24, 24, 24), signal + 0.1 * noise(24, 24, 24, seed=2)
    same, notes = match_half_maps(a, b)
    assert same is b and not notes
    for factor in (10, 0.2, -3):
        found, notes = match_half_maps(a, factor * b)
        assert (found - b).abs().max() < 0.01 * b.abs().max()
        assert "times the grey scale" in notes[0]


def test_noise_is_not_taken_for_another_grey_scale():
    # One half may have more noise than the other, or there may be no signal.
    signal = filtered_noise(24, lambda r: 30 * torch.exp(-((r / 3) ** 2)))
    for level, seed in itertools.product((1, 4, 8), range(4)):
        a = signal + level * noise(24, 24, 24, seed=10 + seed)
        b = signal + 1.2 * level * noise(24, 24, 24, seed=20 + seed)
        assert not match_half_maps(a, b)[1]
        a, b = noise(8, 8, 8, seed=10 + seed), noise(8, 8, 8, seed=20 + seed)
        assert not match_half_maps(a, b)[1]


@pytest.mark.parametrize("factor", [1, 2, -0.5])
def test_a_scaled_or_filtered_copy_is_no_second_half_map(factor):
    a = noise(16, 16, 16)
    gain = torch.exp(-((radius(a.shape, half=True) / 20) ** 2))  # hardly varies within a shell
    for copy in (factor * a, factor * torch.fft.irfftn(torch.fft.rfftn(a) * gain.float())):
        with pytest.raises(ValueError, match="independent"):
            match_half_maps(a, copy)


def test_half_maps_that_lie_apart_get_a_note():
    x = noise(8, 8, 8)
    here, moved = Map(x, 1.5), Map(x, 1.5, origin=(0, 0, 3))
    assert not place_notes(here, here)
    assert "half map 2 lies 3 0 0 Å" in place_notes(here, moved)[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_half_maps_that_are_shifted_get_a_note_and_noisy_ones_do_not(sign):
    signal = filtered_noise(24, lambda r: 30 * torch.exp(-((r / 6) ** 2)))
    a, b = (signal + 2 * noise(24, 24, 24, seed=seed) for seed in (1, 2))
    assert not shift_notes(a, sign * b)
    (note,) = shift_notes(a, sign * b.roll((1, -2), (0, 2)))
    assert "when half map 2 is moved by 2 0 -1 voxels (x y z)" in note
    # In noise some other shift is always better, by chance.
    for seed in range(5):
        a, b = (signal / 100 + noise(24, 24, 24, seed=10 * seed + i) for i in (1, 2))
        assert not shift_notes(a, b)


def test_masked_curves_and_their_correction_equal_the_oracle():
    f = oracle("fsc_masked.npz")
    m = masked_fsc(f["half1"], f["half2"], f["mask"], convention="relion")
    assert m.randomised_from == int(f["randomize_at"])
    assert_close(m.unmasked, f["fsc_unmasked"])
    assert_close(m.masked, f["fsc_masked"])

    # The oracle has other random phases, so take its randomised maps.
    random_1, random_2 = f["rand1"] * f["mask"], f["rand2"] * f["mask"]
    randomised = fsc(random_1, random_2, convention="relion")
    assert_close(randomised, f["fsc_random_masked"])
    corrected = correct_for_mask(m.masked, randomised, m.randomised_from)
    assert_close(corrected, f["fsc_true"])
    best = resolution(corrected, float(f["apix"]), convention="relion")
    assert float(best) == pytest.approx(float(f["resolution_0143"]))


def test_random_phases_keep_all_amplitudes_and_the_shells_below_the_first():
    x = noise(9, 10, 12, seed=5) + 2
    y = randomise_phases(x, 3, seed=7)
    X, Y = torch.fft.fftn(x), torch.fft.fftn(y)
    torch.testing.assert_close(Y.abs(), X.abs(), atol=1e-3, rtol=1e-4)  # needs mirror symmetry
    below = radius(x.shape) < 3
    assert_close(Y[below], X[below], 1e-3)

    # Uniform phases have no mean direction.
    turned = torch.angle(Y[~below] / X[~below])
    assert abs(torch.exp(1j * turned).mean()) < 4 / math.sqrt(turned.numel())
    assert torch.equal(y, randomise_phases(x, 3, seed=7))
    assert not torch.equal(y, randomise_phases(x, 3, seed=8))


def test_the_correction_removes_what_a_tight_mask_correlates():
    n = 32  # a signal up to shell 6, noise beyond, under a small hard ball
    signal = 20 * filtered_noise(n, lambda r: r < 6)
    axis = torch.arange(n) - n // 2
    ball = ((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) < 6**2).float()
    m = masked_fsc(signal + noise(n, n, n, seed=2), signal + noise(n, n, n, seed=3), ball)
    start = m.randomised_from + 2
    assert m.masked[start:13].mean() > 0.3  # the mask leaks signal into the noise shells
    assert abs(m.corrected[start:13].mean()) < 0.1
    assert torch.equal(m.corrected[:start], m.masked[:start])


def test_the_correction_is_nan_where_the_mask_alone_correlates_and_never_leaves_minus_1_to_1():
    masked = torch.tensor([1, 1, 0.9, 0.5, 0.6, 1.0, 0.2, 0.9], dtype=torch.float64)
    randomised = torch.tensor([1, 1, 0.9, 0.2, 1.0, -1.0, 0.9, 1 - 1e-8], dtype=torch.float64)
    corrected = correct_for_mask(masked, randomised, 1)
    nan = math.nan  # divided by 0; opposite maps; (0.2 - 0.9) / 0.1 = -7; divided by 1e-8
    wanted = torch.tensor([1, 1, 0.9, 0.375, nan, nan, nan, nan], dtype=torch.float64)
    torch.testing.assert_close(corrected, wanted, equal_nan=True)


@pytest.mark.parametrize("voxel", [(3, 3, 3), (8, 8, 8), (8, 3, 11)])
def test_a_mask_of_one_voxel_has_no_corrected_fsc(voxel):
    n = 16
    mask = torch.zeros(n, n, n)
    mask[voxel] = 1
    m = masked_fsc(noise(n, n, n, seed=1), noise(n, n, n, seed=2), mask)
    assert m.corrected[m.randomised_from + 2 :].isnan().all()


def test_a_mask_that_does_not_fit_is_refused():
    a, ones = noise(8, 8, 8), torch.ones(8, 8, 8)
    for mask in (torch.ones(8, 8, 9), 0 * ones, 2 * ones, -ones, math.nan * ones):
        with pytest.raises(ValueError, match="values from 0 to 1"):
            masked_fsc(a, a, mask)


# ---- Sharpening


def test_the_sharpened_map_equals_relions_postprocess():
    f = oracle("fsc_masked.npz")
    mean = (f["half1"] + f["half2"]) / 2
    voxel, b_factor, best = (float(f[key]) for key in ("apix", "bfactor", "resolution_0143"))
    assert_close(sharpen(mean, f["fsc_true"], voxel, b_factor, best), f["sharpened"], 3e-6)


def test_a_curve_of_another_box_cannot_sharpen():
    with pytest.raises(ValueError, match="4 shells; a map with shortest side 8 has 5"):
        sharpen(noise(8, 8, 8), torch.ones(4), 1.0, -50, 4.0)


def test_the_weight_is_zero_from_the_first_shell_without_correlation_on():
    curve = torch.tensor([-1.0, 0.8, 0.5, -0.1, 0.4])  # the zero frequency does not count
    expected = torch.tensor([1, (1.6 / 1.8) ** 0.5, (1 / 1.5) ** 0.5, 0, 0])
    torch.testing.assert_close(fsc_weight(curve), expected)


def test_the_guinier_fit_returns_the_b_factor_that_blurred_a_point():
    n, voxel = 48, 1.3
    s2 = (radius((n, n, n), half=True) / (n * voxel)) ** 2
    blurred = torch.fft.irfftn(torch.exp(-90 / 4 * s2).to(torch.complex64), s=(n, n, n))
    perfect = torch.ones(n // 2 + 1)
    b = guinier_b_factor(blurred, perfect, voxel, 3.0)
    assert b == pytest.approx(-90, rel=0.01)  # a shell averages over its width

    # Sharpening makes the point white again, up to the low pass.
    point = sharpen(blurred, perfect, voxel, b, 2 * voxel * n / (n - 2))
    amplitude = torch.fft.rfftn(point)[0, 0, 1:20].real
    assert float(amplitude.max() / amplitude.min()) == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="too few"):
        guinier_b_factor(blurred, perfect, voxel, 7.5)  # shells 7 and 8 only


# ---- Directional and local resolution


def test_directional_fsc_equals_the_oracle():
    f = oracle("fsc_masked.npz")
    half_angle = float(f["cone_half_angle_deg"])
    ours = directional_fsc(f["half1"], f["half2"], f["directions_xyz"], half_angle)
    counted = f["n_voxels_directional"] > 0
    assert_close(ours[counted], f["fsc_directional"][counted])
    assert ours[~counted].isnan().all() and counted.sum() > 80


def test_sphericity_equals_the_closed_form_for_spheroids():
    cos = direction_grid(30)[..., 2]
    assert sphericity(torch.full(cos.shape, 4.0)) == pytest.approx(1)
    for c in (2.0, 0.5):  # axes 1, 1, c of the surface 1 / resolution
        r = (1 - cos**2 + cos**2 / c**2) ** -0.5
        e = math.sqrt(1 - min(c, 1 / c) ** 2)
        if c > 1:
            area = 2 * math.pi * (1 + c / e * math.asin(e))
        else:
            area = 2 * math.pi * (1 + (1 - e * e) / e * math.atanh(e))
        closed = math.pi ** (1 / 3) * (6 * 4 / 3 * math.pi * c) ** (2 / 3) / area
        assert sphericity(1 / r) == pytest.approx(closed, rel=2e-3)


def test_local_resolution_is_the_fsc_of_the_window_about_each_voxel():
    n, w, voxel = 25, 10, 2.0
    signal = 20 * filtered_noise(n, lambda r: torch.exp(-r / 4))
    sd = torch.linspace(0.1, 10, n)  # ever noisier along x
    a = signal + sd * noise(n, n, n, seed=2)
    b = signal + sd * noise(n, n, n, seed=3)
    local = local_resolution(a, b, voxel, window=w, step=4)

    # Every fourth voxel is the centre of a window.
    axis = torch.arange(w) - w // 2
    r = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    soft = torch.where(r < w / 2, 0.5 + 0.5 * torch.cos(math.pi * r / (w / 2)), 0)
    for z, y, x in ((12, 12, 8), (8, 16, 16), (16, 8, 12)):
        cut = tuple(slice(i - w // 2, i + w // 2) for i in (z, y, x))
        expected = float(resolution(fsc(a[cut] * soft, b[cut] * soft), voxel, 0.5))
        assert 2 * voxel < expected < w * voxel
        assert float(local[z, y, x]) == pytest.approx(expected, rel=1e-5)

    # Between the centres it is interpolated.
    between = (local[8, 8, 8] + local[8, 8, 12]) / 2
    assert float(local[8, 8, 10]) == pytest.approx(float(between), rel=1e-5)
    assert local[..., :4].median() < local[..., 10:14].median() < local[..., 21:].median()


# ---- Files


def test_a_csv_of_fsc_py_is_read_at_the_middle_of_each_shell(tmp_path):
    file = tmp_path / "fsc.csv"
    lines = ["shell,per_angstrom,angstrom,corrected,unmasked"]
    for shell in range(9):
        lines.append(f"{shell},{shell / 16},0,0,{1 - shell / 10}")  # 16 voxels of 1 Å
    file.write_text("\n".join(lines))
    ours = read_fsc(file, 8, 2.0)  # 8 voxels of 2 Å: its shell k begins where shell k begins here
    np.testing.assert_allclose(ours, [0.95, 0.85, 0.75, 0.65])

    # A grid that goes on beyond the curve is that of another map.
    with pytest.raises(ValueError, match="ends at 2 Å, the map's grid at 1 Å"):
        read_fsc(file, 32, 0.5)

    # Convention cryofm has no shell 0.
    lines[1] = "0,0,inf,nan,nan"
    file.write_text("\n".join(lines))
    np.testing.assert_allclose(read_fsc(file, 8, 2.0), [0.9, 0.85, 0.75, 0.65])


def test_a_csv_is_read_at_the_middle_of_the_shells_of_an_odd_box(tmp_path):
    file = tmp_path / "fsc.csv"
    rows = [f"{shell},{shell / 36},0,{1 - shell / 36}" for shell in range(19)]  # 1 - frequency
    file.write_text("\n".join(["shell,per_angstrom,angstrom,unmasked", *rows]))

    # degrade.noise_shells: shell k of 9 voxels holds k / 9 <= |k| < (k + 1) / 9 cycles per voxel.
    middles = (np.arange(4) + 0.5) / (9 * 2.0)
    np.testing.assert_allclose(read_fsc(file, 9, 2.0), 1 - middles)


def test_a_file_with_one_number_per_line_holds_the_shells_from_1_on(tmp_path):
    file = tmp_path / "curve.txt"
    file.write_text("0.9\n0.5\n\n0\n")
    np.testing.assert_allclose(read_fsc(file, 6, 1.0), [0.9, 0.5, 1e-6])
    with pytest.raises(ValueError, match="a box of 8 needs shells 1 to 4"):
        read_fsc(file, 8, 1.0)
    file.write_text("a curve")
    with pytest.raises(ValueError, match="curve.txt: neither"):
        read_fsc(file, 6, 1.0)
