"""What fsc.py promises about maps: shells, FSC, resolution, half maps, the program. Atomic models: test_map_model.py."""
import json
import math
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

import fourier
import fsc as fsc_module
import fsc_half_maps
from fsc import auc, fsc, resolution, shells
from fsc_half_maps import (
    correct_for_mask,
    direction_grid,
    directional_fsc,
    guinier_b_factor,
    local_resolution,
    masked_fsc,
    randomise_phases,
    sharpen,
    sphericity,
)
from fsc_score import main

ORACLES = Path(__file__).parent / "oracles"


def fixture(name):
    path = ORACLES / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return {k: torch.from_numpy(v) for k, v in np.load(path).items()}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direct_fsc(a, b, counted, side):
    """(1) as a loop over every coefficient of the full float64 transform; side: Å of each axis, shells by the shortest."""
    A, B = (np.fft.fftn(x.double().numpy()) for x in (a, b))
    frequency = [np.fft.fftfreq(n, 1 / n) / length for n, length in zip(a.shape, side)]
    shortest = min(range(3), key=lambda i: side[i])
    n = a.shape[shortest] // 2 + 1
    sums = np.zeros((3, n))
    for z, y, x in np.ndindex(*a.shape):
        shell = math.floor(side[shortest] * math.hypot(frequency[0][z], frequency[1][y], frequency[2][x]) + 0.5)
        if shell < n and counted[z, y, x]:
            p, q = A[z, y, x], B[z, y, x]
            sums[:, shell] += (p * q.conjugate()).real, abs(p) ** 2, abs(q) ** 2
    return torch.from_numpy(sums[0] / np.sqrt(sums[1] * sums[2]))


# ---- Shells and curves

@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 7, 7), (6, 9, 8), (10, 6, 7)])
def test_fsc_equals_the_direct_sum_over_the_full_fft(shape):
    a, b = noise(*shape, seed=1), noise(*shape, seed=2)
    b = b + 0.7 * a + 3
    everything = torch.ones(shape, dtype=torch.bool)
    torch.testing.assert_close(fsc(a, b), direct_fsc(a, b, everything, shape), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 7, 7), (6, 9, 8)])
def test_fsc_over_a_region_counts_exactly_its_coefficients(shape):
    a, b = noise(*shape, seed=1), noise(*shape, seed=2)
    region = noise(*shape, seed=3) > 0                  # no mirror symmetry: half of it says nothing about the rest
    region[0, 0, 0] = True
    torch.testing.assert_close(fsc(a, b, region), direct_fsc(a, b, region, shape), atol=2e-6, rtol=0)


def test_shells_of_anisotropic_voxels_are_spheres_in_angstrom():
    a, b, voxel = noise(8, 6, 9, seed=1), noise(8, 6, 9, seed=2), (1.0, 2.1, 1.3)
    side = [n * v for n, v in zip(a.shape, voxel)]
    everything = torch.ones(a.shape, dtype=torch.bool)
    torch.testing.assert_close(fsc(a, b, voxel_size=voxel), direct_fsc(a, b, everything, side), atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", ["even", "odd", "noncubic"])
def test_curves_areas_and_resolutions_of_every_convention_equal_the_fixture(case):
    f = fixture("fsc.npz")
    a, b, voxel = f[f"{case}_vol1"], f[f"{case}_vol2"], float(f["apix"])
    box, ours = min(a.shape), fsc(a, b)
    assert torch.bincount(shells(a.shape).flatten())[: box // 2 + 1].tolist() == f[f"{case}_n_voxels_round"].tolist()
    close = lambda x, name, atol: torch.testing.assert_close(x, f[f"{case}_{name}"], atol=atol, rtol=0)
    close(ours, "fsc_round", 2e-6)
    close(auc(ours), "auc_mean", 1e-6)
    close(resolution(ours, voxel, box=box), "res0143_linear", 1e-5)
    close(resolution(ours, voxel, 0.5, box=box), "res05_linear", 1e-5)
    released = fsc(a, b, convention="cryofm")
    close(released[1:], "fsc_ceil", 2e-6)
    close(auc(released), "auc_mean_ceil", 1e-6)
    if case != "noncubic":
        relion = fsc(a, b, convention="relion")
        close(relion, "fsc_half", 2e-6)
        close(resolution(relion, voxel, box=box, convention="relion"), "res0143_lastabove_half", 1e-6)


def test_fsc_in_the_missing_wedge_equals_the_fixture():
    f = fixture("pocs_wedge.npz")
    kz, _, kx = fourier.freq_grid(f["truth"].shape)
    measured = (kz.abs() <= kx.abs() * math.tan(math.pi / 3)).expand(f["truth"].shape)
    curve = fsc(f["truth"], f["pocs_50"], ~measured)
    assert curve[0].isnan()                             # no coefficient there
    torch.testing.assert_close(curve[1:], f["fsc_missing_region_pocs50"][1:], atol=2e-6, rtol=0)


def test_a_batch_gives_what_each_map_gives_alone_whatever_its_precision():
    a, b = noise(2, 3, 8, 8, 8, seed=1), noise(2, 3, 8, 8, 8, seed=2)
    together = fsc(a, b)
    alone = torch.stack([torch.stack([fsc(a[i, j], b[i, j]) for j in range(3)]) for i in range(2)])
    assert torch.equal(together, alone)
    assert torch.equal(resolution(together, 1.5)[1, 2], resolution(alone[1, 2], 1.5))
    half = fsc(a.bfloat16(), b.bfloat16())              # rounds the maps, not the sums
    torch.testing.assert_close(half, fsc(a.bfloat16().double(), b.bfloat16().double()), atol=2e-6, rtol=0)


def test_a_radial_filter_leaves_the_fsc_as_it_is():
    a, b = noise(12, 12, 12, seed=1), noise(12, 12, 12, seed=2)
    gain = torch.exp(-0.3 * shells(a.shape, half=True))
    filtered = torch.fft.irfftn(torch.fft.rfftn(a + b) * gain, s=a.shape)
    torch.testing.assert_close(fsc(filtered, b), fsc(a + b, b), atol=2e-6, rtol=0)


def test_a_shell_without_power_is_nan_and_auc_leaves_it_out():
    a = noise(8, 8, 8)
    flat = torch.ones(8, 8, 8)                          # power at the zero frequency only
    assert fsc(a, flat).isnan().tolist() == [False, True, True, True, True]
    assert float(auc(torch.tensor([1.0, 0.8, math.nan, 0.2]))) == pytest.approx(0.5)


def test_resolution_reads_the_first_crossing():
    curve = torch.tensor([1.0, 0.9, 0.7, 0.3, 0.6, 0.1])          # box 10: shell k at k / 10 cycles per voxel
    assert float(resolution(curve, 2.0, 0.5)) == pytest.approx(20 / 2.5)
    assert float(resolution(curve, 2.0, 0.5, convention="relion")) == pytest.approx(20 / 2)
    assert float(resolution(curve, 2.0, 0.5, box=11)) == pytest.approx(22 / 2.5)
    assert float(resolution(curve, 2.0, 0.05)) == pytest.approx(4.0)        # never falls: Nyquist
    assert float(resolution(torch.tensor([-1.0, 0.2, 0.1]), 1.0, 0.6)) == pytest.approx(4 / 0.5)    # from FSC(0) = 1
    assert float(resolution(torch.tensor([math.nan, 0.9, math.nan, 0.1]), 1.0, 0.5)) == pytest.approx(6 / 2)
    assert resolution(torch.full((4,), math.nan), 1.0).isnan()
    assert float(resolution(torch.tensor([1.0, 0.1]), 1.0, convention="relion")) == math.inf


# ---- Half maps

def test_masked_curves_and_their_correction_equal_the_fixture():
    f = fixture("fsc_masked.npz")
    m = masked_fsc(f["half1"], f["half2"], f["mask"], convention="relion")
    assert m.randomised_from == int(f["randomize_at"])
    torch.testing.assert_close(m.unmasked, f["fsc_unmasked"], atol=2e-6, rtol=0)
    torch.testing.assert_close(m.masked, f["fsc_masked"], atol=2e-6, rtol=0)
    frozen = fsc(f["rand1"] * f["mask"], f["rand2"] * f["mask"], convention="relion")     # other random phases
    torch.testing.assert_close(frozen, f["fsc_random_masked"], atol=2e-6, rtol=0)
    true = correct_for_mask(m.masked, frozen, m.randomised_from)
    torch.testing.assert_close(true, f["fsc_true"], atol=2e-6, rtol=0)
    best = resolution(true, float(f["apix"]), convention="relion")
    assert float(best) == pytest.approx(float(f["resolution_0143"]))


def test_random_phases_keep_amplitudes_and_all_below_the_first_shell():
    x = noise(9, 10, 12, seed=5) + 2
    y = randomise_phases(x, 3, seed=7)
    X, Y = torch.fft.fftn(x), torch.fft.fftn(y)
    torch.testing.assert_close(Y.abs(), X.abs(), atol=1e-3, rtol=1e-4)      # a lost mirror symmetry would show here
    below = fsc_module.radius(x.shape) < 3
    torch.testing.assert_close(Y[below], X[below], atol=1e-3, rtol=0)
    turned = torch.angle(Y[~below] / X[~below])
    assert abs(torch.exp(1j * turned).mean()) < 4 / math.sqrt(turned.numel())         # uniform: no mean direction
    assert torch.equal(y, randomise_phases(x, 3, seed=7)) and not torch.equal(y, randomise_phases(x, 3, seed=8))


def test_the_correction_takes_out_what_a_tight_mask_correlates():
    n = 32                                              # a signal up to shell 6, noise beyond, under a small hard ball
    r = fsc_module.radius((n, n, n), half=True)
    signal = torch.fft.irfftn(torch.fft.rfftn(noise(n, n, n, seed=1)) * (r < 6), s=(n, n, n)) * 20
    axis = torch.arange(n) - n // 2
    ball = ((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) < 6**2).float()
    m = masked_fsc(signal + noise(n, n, n, seed=2), signal + noise(n, n, n, seed=3), ball)
    tail = slice(m.randomised_from + 2, 13)
    assert m.masked[tail].mean() > 0.3                  # the mask leaks signal into the noise shells
    assert abs(m.corrected[tail].mean()) < 0.1
    assert torch.equal(m.corrected[: m.randomised_from + 2], m.masked[: m.randomised_from + 2])


def test_a_mask_that_does_not_fit_is_refused():
    a = noise(8, 8, 8)
    for mask in (torch.ones(8, 8, 9), torch.zeros(8, 8, 8), 2 * torch.ones(8, 8, 8), -torch.ones(8, 8, 8)):
        with pytest.raises(ValueError, match="values from 0 to 1"):
            masked_fsc(a, a, mask)


def test_sharpened_map_equals_relions_postprocess():
    f = fixture("fsc_masked.npz")
    mean = (f["half1"] + f["half2"]) / 2
    ours = sharpen(mean, f["fsc_true"], float(f["apix"]), float(f["bfactor"]), float(f["resolution_0143"]))
    torch.testing.assert_close(ours, f["sharpened"], atol=3e-6, rtol=0)


def test_the_weight_is_zero_from_the_first_worthless_shell_on():
    curve = torch.tensor([-1.0, 0.8, 0.5, -0.1, 0.4])   # the zero frequency says nothing
    expected = torch.tensor([1, (1.6 / 1.8) ** 0.5, (1 / 1.5) ** 0.5, 0, 0])
    torch.testing.assert_close(fsc_half_maps.fsc_weight(curve), expected)


def test_guinier_fit_returns_the_b_factor_that_blurred_a_point():
    n, voxel = 48, 1.3
    s2 = (fsc_module.radius((n, n, n), half=True) / (n * voxel)) ** 2
    blurred = torch.fft.irfftn(torch.exp(-90 / 4 * s2).to(torch.complex64), s=(n, n, n))
    perfect = torch.ones(n // 2 + 1)
    b = guinier_b_factor(blurred, perfect, voxel, 3.0)
    assert b == pytest.approx(-90, rel=0.01)            # a shell averages over its width
    point = sharpen(blurred, perfect, voxel, b, 2 * voxel * n / (n - 2))
    curve = torch.fft.rfftn(point)[0, 0, 1:20].real
    assert float(curve.max() / curve.min()) == pytest.approx(1, abs=0.05)   # white again up to the low pass
    with pytest.raises(ValueError, match="too few"):
        guinier_b_factor(blurred, perfect, voxel, 7.5)        # shells 7 and 8 only


def test_directional_fsc_equals_the_fixture():
    f = fixture("fsc_masked.npz")
    ours = directional_fsc(f["half1"], f["half2"], f["directions_xyz"], float(f["cone_half_angle_deg"]))
    compare = f["n_voxels_directional"] > 0
    torch.testing.assert_close(ours[compare], f["fsc_directional"][compare], atol=2e-6, rtol=0)
    assert ours[~compare].isnan().all() and compare.sum() > 80


def test_sphericity_equals_the_closed_form_for_spheroids():
    cos = direction_grid(30)[..., 2]
    assert sphericity(torch.full(cos.shape, 4.0)) == pytest.approx(1)
    for c in (2.0, 0.5):                                # axes 1, 1, c of the surface 1 / resolution
        radius = (1 - cos**2 + cos**2 / c**2) ** -0.5
        e = math.sqrt(1 - min(c, 1 / c) ** 2)
        area = (2 * math.pi * (1 + c / e * math.asin(e)) if c > 1
                else 2 * math.pi * (1 + (1 - e * e) / e * math.atanh(e)))
        closed = math.pi ** (1 / 3) * (6 * 4 / 3 * math.pi * c) ** (2 / 3) / area
        assert sphericity(1 / radius) == pytest.approx(closed, rel=2e-3)


def test_local_resolution_is_the_fsc_of_the_window_about_each_voxel():
    n, w, voxel = 25, 10, 2.0
    r = fsc_module.radius((n, n, n), half=True)
    signal = torch.fft.irfftn(torch.fft.rfftn(noise(n, n, n, seed=1)) * torch.exp(-r / 4), s=(n, n, n)) * 20
    sd = torch.linspace(0.1, 10, n)                     # ever noisier along x
    a, b = signal + sd * noise(n, n, n, seed=2), signal + sd * noise(n, n, n, seed=3)
    local = local_resolution(a, b, voxel, window=w, step=4)       # windows on every fourth voxel, interpolated between
    axis = torch.arange(w) - w // 2
    r = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    soft = torch.where(r < w / 2, 0.5 + 0.5 * torch.cos(math.pi * r / (w / 2)), 0)
    for z, y, x in ((12, 12, 8), (8, 16, 16), (16, 8, 12)):
        cut = tuple(slice(i - w // 2, i + w // 2) for i in (z, y, x))
        expected = float(resolution(fsc(a[cut] * soft, b[cut] * soft), voxel, 0.5))
        assert 2 * voxel < expected < w * voxel and float(local[z, y, x]) == pytest.approx(expected, rel=1e-5)
    between = (local[8, 8, 8] + local[8, 8, 12]) / 2
    assert float(local[8, 8, 10]) == pytest.approx(float(between), rel=1e-5)
    assert local[..., :4].median() < local[..., 10:14].median() < local[..., 21:].median()


# ---- The program

@pytest.fixture
def files(tmp_path):
    signal = 5 * torch.fft.irfftn(torch.fft.rfftn(noise(16, 16, 16, seed=1))
                                  * (fsc_module.radius((16, 16, 16), half=True) < 5), s=(16, 16, 16))
    mask = torch.zeros(16, 16, 16)
    mask[3:13, 3:13, 3:13] = 1
    maps = {"a": signal + noise(16, 16, 16, seed=2), "b": signal + noise(16, 16, 16, seed=3), "mask": mask}
    for name, x in maps.items():
        with mrcfile.new(tmp_path / f"{name}.mrc") as m:
            m.set_data(x.numpy())
            m.voxel_size = 1.5
    return tmp_path, maps


def test_the_program_writes_the_numbers_it_prints(files, capsys):
    folder, maps = files
    a, b, mask = (str(folder / f"{n}.mrc") for n in ("a", "b", "mask"))
    main([a, b, "--mask", mask, "--star", "--directional", "--convention", "relion",
          "--local-resolution", str(folder / "local.mrc"), "--sharpen", str(folder / "sharp.mrc"), "--b-factor", "-40"])
    screen = capsys.readouterr().out
    expected = masked_fsc(maps["a"], maps["b"], maps["mask"], convention="relion")
    best = float(resolution(expected.corrected, 1.5, convention="relion"))
    written = json.loads((folder / "a_fsc.json").read_text())
    assert written["corrected"]["resolution_0143"] == best and f"{best:.2f} Å" in screen
    rows = np.loadtxt(folder / "a_fsc.csv", delimiter=",", skiprows=1)
    assert (folder / "a_fsc.csv").read_text().splitlines()[0].endswith("corrected,unmasked,masked,randomised")
    np.testing.assert_allclose(rows[:, 3:], torch.stack(expected[:4], 1), atol=1e-5)
    np.testing.assert_allclose(rows[:, 1], np.arange(9) / (16 * 1.5), atol=1e-6)
    star = (folder / "a_fsc.star").read_text().splitlines()
    assert [line.split()[0] for line in star if line.startswith("_rln")][1:4] == [
        "_rlnSpectralIndex", "_rlnResolution", "_rlnAngstromResolution"]
    np.testing.assert_allclose([float(x) for x in star[-1].split()[3:]], torch.stack(expected[:4], 1)[-1], atol=1e-6)
    mean = (maps["a"] + maps["b"]) / 2
    with mrcfile.open(folder / "sharp.mrc") as m:
        np.testing.assert_allclose(m.data, sharpen(mean, expected.corrected, 1.5, -40, best), atol=1e-5)
    local = local_resolution(maps["a"], maps["b"], 1.5)
    with mrcfile.open(folder / "local.mrc") as m:
        np.testing.assert_allclose(m.data, local, rtol=1e-5)
    assert written["local_resolution_median"] == pytest.approx(float(local.median()))


def test_the_program_compares_with_a_truth_and_overwrites_only_when_asked(files):
    folder, maps = files
    arguments = [str(folder / "a.mrc"), "--truth", str(folder / "b.mrc"), "--quiet", "-o", str(folder / "out")]
    main(arguments)
    written = json.loads((folder / "out.json").read_text())
    assert written["unmasked"]["auc"] == pytest.approx(float(auc(fsc(maps["a"], maps["b"]))))
    flat = np.corrcoef(maps["a"].flatten(), maps["b"].flatten())[0, 1]
    assert written["correlation"] == pytest.approx(flat, abs=1e-6)
    with pytest.raises(SystemExit, match="out.json exists"):
        main(arguments)
    main([*arguments, "--overwrite"])


def test_bad_input_gets_one_line_and_no_file(files):
    folder, _ = files
    with mrcfile.new(folder / "small.mrc") as m:
        m.set_data(noise(8, 8, 8).numpy())
        m.voxel_size = 1.5
    with mrcfile.new(folder / "wide.mrc") as m:
        m.set_data(noise(16, 16, 16).numpy())
        m.voxel_size = 3.0
    (folder / "text.mrc").write_text("not a map")
    before = sorted(folder.iterdir())
    for other, message in (("small.mrc", "one grid"), ("wide.mrc", "--voxel-size"), ("text.mrc", "not an MRC"),
                           ("none.mrc", "none.mrc")):
        with pytest.raises(SystemExit, match=message) as error:
            main([str(folder / "a.mrc"), str(folder / other)])
        assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before


def test_arguments_that_would_be_ignored_or_make_no_sense_get_one_line_and_no_file(files):
    folder, _ = files
    a, b = (str(folder / f"{n}.mrc") for n in "ab")
    before = sorted(folder.iterdir())
    for arguments, message in (
            ([a], "two half maps, or"), ([a, b, a], "two half maps, or"), ([a, a], "hold the same map"),
            ([a, "--truth", b, "--star"], "want two half maps"), ([a, b, "--b-factor", "-50"], "--sharpen"),
            ([a, b, "--resolution", "3"], "--model"), ([a, "--model", "m.pdb", "--resolution", "-3"], "positive"),
            ([a, "--truth", b, "--mask", a], "values from 0 to 1"), ([".", b], "no such file"),
            ([a, b, "-o", str(folder / "none" / "x")], "none: no such folder")):
        with pytest.raises(SystemExit, match=message) as error:
            main(arguments)
        assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before


def test_one_coefficient_does_not_decide_the_worst_direction(tmp_path):
    n = 32                                              # signal to shell 10; the two coefficients at +-1 along z disagree
    r = fsc_module.radius((n, n, n), half=True)
    signal = torch.fft.rfftn(noise(n, n, n, seed=1)) * (r < 10) * 10
    for name in "ab":
        X = signal + torch.fft.rfftn(noise(n, n, n, seed=ord(name)))
        X[1, 0, 0], X[-1, 0, 0] = (3000, 3000) if name == "a" else (-3000, -3000)
        with mrcfile.new(tmp_path / f"{name}.mrc") as m:
            m.set_data(torch.fft.irfftn(X, s=(n, n, n)).numpy())
            m.voxel_size = 1.0
    main([str(tmp_path / "a.mrc"), str(tmp_path / "b.mrc"), "--directional", "--quiet"])
    written = json.loads((tmp_path / "a_fsc.json").read_text())
    assert n / 15 < written["best_direction"] < written["worst_direction"] < n / 8 and written["sphericity"] > 0.95


def test_a_curve_that_never_falls_is_reported_as_the_limit_of_the_grid(files, capsys):
    folder, _ = files
    main([str(folder / "a.mrc"), "--truth", str(folder / "a.mrc"), "-o", str(folder / "same")])
    note = "unmasked: never below 0.5; 3.00 Å is the grid's limit"
    assert note in capsys.readouterr().out and note in json.loads((folder / "same.json").read_text())["notes"][0]


def test_without_matplotlib_all_but_the_picture_is_written(files, monkeypatch, capsys):
    folder, _ = files
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    main([str(folder / "a.mrc"), str(folder / "b.mrc")])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (folder / "a_fsc.csv").exists() and not (folder / "a_fsc.png").exists()
