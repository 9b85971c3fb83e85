"""What degrade.py promises: masks, spectral noise, projection."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import degrade
import fourier
from degrade import cone_mask, project, wedge_mask

ORACLES = Path(__file__).parent / "oracles"


def oracle(name):
    return np.load(ORACLES / name)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def fft(x):
    return torch.fft.fftn(x, dim=(-3, -2, -1))


def frequencies(shape):
    """kz, ky, kx of a box as numpy makes them, each (D, H, W)."""
    return np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")


# ---- Masks


def mask_of(kind, shape, numbers):
    if kind == "y":
        return wedge_mask(shape, tuple(map(int, numbers)))
    if kind == "x":
        return wedge_mask(shape, (-60, 60), "x")
    return cone_mask(shape, 60)


def test_masks_equal_the_oracles_in_every_shape():
    f = oracle("wedge_masks.npz")
    for key in f:
        box, kind, *numbers = key.split("_")
        shape = tuple(map(int, box.split("x")))
        want = np.unpackbits(f[key], count=math.prod(shape)).reshape(shape)
        ours = mask_of(kind, shape, numbers)
        assert ours.dtype == torch.bool
        assert np.array_equal(np.fft.fftshift(ours.numpy()), want), key


def test_wedges_about_y_and_z_equal_the_release():
    f = oracle("parity/wedge_masks.npz")
    names = {"y": "default_plane12_rot1", "z": "cryofm1_plane01_rot0"}
    for n in (8, 9, 16, 32):
        for tilt in (15, 45, 60):
            for axis, name in names.items():
                ours = wedge_mask((n, n, n), (-tilt, tilt), axis).numpy()
                want = f[f"n{n}_tilt{tilt}_{name}"]
                assert np.array_equal(np.fft.fftshift(ours), want), (n, tilt, name)
    kept = wedge_mask((64, 64, 64), tilt_axis="z").sum()
    assert kept == int(f["n64_tilt60_cryofm1_kept_count"])


def test_the_tilt_axis_is_measured_whatever_the_range():
    mask = wedge_mask((8, 10, 12), (20, 60))
    assert mask[0, :, 0].all()
    assert not mask[0, 0, 1] and not mask[1, 0, 0]


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("tilt", [-35.0, 20.0])
def test_the_plane_that_a_right_handed_tilt_measures_is_in_the_wedge_of_that_tilt_only(axis, tilt):
    # A right-handed rotation about the tilt axis; the beam is another axis.
    turn = "xyz".index(axis)
    beam = 0 if axis == "z" else 2
    i, j = (turn + 1) % 3, (turn + 2) % 3
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    R = np.eye(3)
    R[[i, j, i, j], [i, j, j, i]] = c, c, -s, s

    # A projection along the beam measures the frequencies with no component along it.
    k_image = np.random.default_rng(0).uniform(-0.45, 0.45, (200, 3))
    k_image[:, beam] = 0
    third_axis = 3 - turn - beam
    k_image = k_image[np.abs(k_image[:, third_axis]) > 0.2]
    n = 64
    k_specimen = k_image @ R  # R^T k_image
    k = tuple(np.rint(n * k_specimen).astype(int).T % n)

    measured = wedge_mask((n, n, n), (tilt - 4, tilt + 4), axis).permute(2, 1, 0)  # x, y, z
    mirrored = wedge_mask((n, n, n), (-tilt - 4, -tilt + 4), axis).permute(2, 1, 0)
    assert measured[k].all() and not mirrored[k].any()


# ---- Spectral noise


@pytest.mark.parametrize("D", [16, 32])
def test_spectral_statistics_equal_the_release(D):
    f = oracle("parity/spectral.npz")
    half_1, half_2 = (torch.from_numpy(f[f"D{D}_half{i}"]) for i in (1, 2))

    def assert_equal(ours, name, rtol):
        want = f[f"D{D}_{name}"]
        if want.ndim == 3:
            want = np.fft.ifftshift(want)
        np.testing.assert_allclose(ours.numpy(), want, rtol=rtol)

    # The release has 1 - FSC where FSC = 0.9992 from float32 transforms: hence 2e-4.
    power = degrade.noise_power(half_1, half_2)
    alpha = 1 + 49 * ~wedge_mask((D, D, D), (-60, 60), "z")
    volume = degrade.expand_shells(power, (D, D, D))
    anisotropic = degrade.anisotropic_noise_power(power, alpha)
    assert_equal(degrade.radial_power(half_1), "radial_power_half1", 1e-6)
    assert_equal(power, "noise_power_radial", 2e-4)
    assert_equal(volume, "noise_power_volume", 2e-4)
    assert_equal(anisotropic, "noise_power_volume_anisotropic_amp50_tilt60", 2e-4)
    H = torch.fft.fftshift(fourier.hartley(torch.fft.ifftshift(half_1)))
    np.testing.assert_allclose(H.numpy(), f[f"D{D}_hartley_half1"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 5, 3), (4, 6, 5)])
def test_spectral_noise_has_exactly_the_power_asked_for(shape):
    n = math.prod(shape)
    P = torch.rand(shape, generator=rng(), dtype=torch.float64)
    P = P + fourier.mirror(P)
    zero = torch.zeros(n, *shape, dtype=torch.float64)
    unit = torch.eye(n, dtype=torch.float64)

    # The noise is linear in its normal numbers, so the responses to unit vectors give E|F noise|^2.
    noise = unit.view(n, *shape)
    coloured = degrade.add_spectral_noise(zero, P, noise=noise)
    torch.testing.assert_close((fft(coloured).abs() ** 2).sum(0), P)

    # Power n is white noise of variance 1.
    white = degrade.add_spectral_noise(zero, torch.full_like(P, n), noise=noise).view(n, n)
    torch.testing.assert_close(white.T @ white, unit)
    coloured = coloured.view(n, n)
    assert not torch.allclose(coloured.T @ coloured, unit, atol=0.1)


def test_noise_drawn_for_a_half_map_curve_gives_that_curve_back():
    shape, curve = (2, 48, 48, 48), torch.linspace(0.95, 0.3, 24)
    clean = torch.randn(48, 48, 48, generator=rng()).expand(shape)
    power = degrade.noise_power_from_fsc(clean, curve, clean=True)
    noisy = degrade.add_spectral_noise(clean, power, generator=rng(1))
    from_halves = degrade.noise_power(noisy[0], noisy[1])
    from_curve = degrade.noise_power_from_fsc(noisy, curve)
    # Shells below 8 hold too few coefficients. The mean over the others is good to a percent.
    for error in (from_halves / power[0] - 1, (from_curve / power - 1).mean(0)):
        assert float(error[8:].abs().max()) < 0.15
        assert float(error[8:].mean().abs()) < 0.02


def test_anisotropic_noise_power_keeps_shell_means_and_the_ratio_between_directions():
    shape = (12, 14, 16)  # shells count along x: 1/16 cycles per voxel
    alpha = torch.rand(shape, generator=rng(), dtype=torch.float64) + 0.5
    power = torch.rand(8, generator=rng(1), dtype=torch.float64)
    P = degrade.anisotropic_noise_power(power, alpha)
    kz, ky, kx = frequencies(shape)
    radius = np.floor(16 * np.sqrt(kz**2 + ky**2 + kx**2) + 1e-9)
    for shell in range(8):
        inside = torch.from_numpy(radius == shell)
        assert float(P[inside].mean()) == pytest.approx(float(power[shell]))
        ratio = (P / alpha)[inside]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_orientation_alpha_of_side_views_is_the_share_of_slices_through_a_direction():
    turn = torch.arange(3600, dtype=torch.float64) * (2 * math.pi / 3600)
    R = torch.zeros(3600, 3, 3, dtype=torch.float64)
    R[:, 0, 2] = turn.cos()  # only the beam, the third column, matters
    R[:, 1, 2] = turn.sin()
    shape, band = (32, 32, 32), math.sin(math.radians(5))
    alpha = degrade.orientation_alpha(R, shape)
    assert torch.equal(alpha, fourier.mirror(alpha))

    def share(sin):
        """The share of beams d with |k . d| = sin |cos phi| <= band, phi uniform."""
        return 2 / np.pi * np.arcsin(np.minimum(1, band / np.maximum(sin, 1e-9)))

    # Closed form: the share of each direction, relative to the mean over the sphere.
    kz, ky, kx = frequencies(shape)
    sin = np.sqrt(ky**2 + kx**2) / np.maximum(np.sqrt(kz**2 + ky**2 + kx**2), 1e-9)
    theta = (np.arange(90000) + 0.5) * np.pi / 180000
    mean = (share(np.sin(theta)) * np.sin(theta)).sum() / np.sin(theta).sum()
    want = mean / share(sin)

    away = sin > math.sin(math.radians(12))  # where a 2-degree cell resolves it
    ours = alpha.numpy()
    np.testing.assert_allclose(ours[away], want[away], rtol=0.1)
    assert np.abs(ours[away] / want[away] - 1).mean() < 0.02
    assert alpha[5, 0, 0] < 0.1  # every side view measures the axis


def test_orientation_alpha_is_low_only_on_the_slice_that_a_view_measures():
    shape = (24, 20, 22)
    d = torch.tensor([2.0, -3.0, 4.0]) / math.sqrt(29)  # x, y, z
    columns = torch.stack([d, torch.eye(3)[0], torch.eye(3)[1]], 1)
    R = torch.linalg.qr(columns)[0].flip(1)
    alpha = degrade.orientation_alpha(R[None], shape)

    # Degrees between each frequency and the central slice across d.
    kz, ky, kx = (torch.from_numpy(k).float() for k in frequencies(shape))
    k = torch.stack([kx, ky, kz], -1)
    sin = (k @ d).abs() / k.norm(dim=-1).clamp(min=1e-9)
    off = torch.rad2deg(torch.asin(sin.clamp(max=1)))

    # alpha is averaged over k and -k on Nyquist planes, so leave them out.
    inner = torch.ones(shape, dtype=torch.bool)
    inner[12], inner[:, 10], inner[:, :, 11], inner[0, 0, 0] = False, False, False, False
    assert (alpha[inner & (off < 3)] < 1).all()
    assert (alpha[inner & (off > 7)] > 5).all()


@pytest.mark.parametrize("axis", ["y", "x", "z"])
def test_a_subtomogram_measures_what_its_tilt_series_does_turned_by_its_orientation(axis):
    # Tilts of unlike ends tell a wrong sign, a turn by 90 degrees a wrong order.
    shape, tilt_range = (24, 24, 24), (-30, 60)
    mask = fourier.hermitian_part(degrade.wedge_mask(shape, tilt_range, axis)).float()
    near = torch.nn.functional.avg_pool3d(torch.fft.fftshift(mask)[None], 5, 1, 2)[0]
    series = {"tilt_range": tilt_range, "tilt_axis": axis, "half_width": 3.0}
    alpha = degrade.orientation_alpha(torch.eye(3)[None], shape, **series)
    inner = (slice(1, None),) * 3  # on Nyquist planes alpha is averaged over k and -k
    alpha = torch.fft.fftshift(alpha)[inner]
    inside, outside = near[inner] == 1, near[inner] == 0
    assert inside.sum() > 1000 and outside.sum() > 1000
    assert (alpha[inside] < 10).all()
    assert (alpha[outside] == 50).all()

    # Rz(90 degrees): what lay along x in the tomogram lies along y in the map.
    turn = degrade.euler_matrix(torch.tensor([[90.0, 0, 0]], dtype=torch.float64))
    turned = torch.fft.fftshift(degrade.orientation_alpha(turn, shape, **series))[inner]
    wanted = torch.rot90(alpha, 1, (2, 1))
    assert float(((turned == 50) == (wanted == 50)).float().mean()) > 0.98


# ---- Projection


def volume_and_rotations(N):
    f = oracle("projection.npz")
    return torch.from_numpy(f[f"n{N}_volume"]), torch.from_numpy(f[f"n{N}_rotation_xyz"])


def test_euler_angles_are_those_of_scipy():
    f = oracle("so3.npz")
    R = degrade.euler_matrix(torch.from_numpy(f["euler_zyz_deg"]))
    np.testing.assert_allclose(R.numpy(), f["matrix_intrinsic_ZYZ"], atol=1e-12)


@pytest.mark.parametrize("N", [24, 21])
def test_projections_equal_the_closed_form(N):
    volume, R = volume_and_rotations(N)
    want = oracle("projection.npz")[f"n{N}_projections"]
    ours = project(volume, R)
    assert np.abs(ours.numpy() - want).max() < 0.01 * want.max()
    batch = project(torch.stack([volume, 2 * volume]), R)
    assert torch.equal(batch[1], 2 * ours)
    unrotated = project(volume, torch.eye(3)[None])[0]
    torch.testing.assert_close(unrotated, volume.sum(0), atol=1e-5 * float(want.max()), rtol=0)


def test_shifts_displace_the_object_in_the_image():
    volume, R = volume_and_rotations(24)
    shifts = torch.tensor([[2.0, -1.0]] * len(R))  # x, y
    moved = project(volume, R, shifts)
    want = project(volume, R).roll((-1, 2), (-2, -1))
    inner = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(moved[inner], want[inner], atol=1e-4, rtol=1e-4)


def test_projection_gradients_equal_central_differences():
    volume = torch.randn(5, 5, 5, generator=rng(), dtype=torch.float64, requires_grad=True)
    R = torch.linalg.qr(torch.randn(2, 3, 3, generator=rng(1), dtype=torch.float64))[0]
    shifts = torch.tensor([[0.3, -0.2], [0.11, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, (volume, R.requires_grad_(), shifts))


# ---- Errors

X = torch.zeros(8, 8, 8)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: wedge_mask((8, 8, 8), (-90, 60)), "inside"),
        (lambda: wedge_mask((8, 8, 8), (60, -60)), "smallest and largest"),
        (lambda: wedge_mask((8, 8, 8), (-60, math.nan)), "inside"),
        (lambda: wedge_mask((8, 8, 8), tilt_axis="w"), "x, y or z"),
        (lambda: cone_mask((8, 8, 8), 90), "inside"),
        (lambda: degrade.noise_power(X, X), "same map"),
        (lambda: degrade.noise_power_from_fsc(X, torch.zeros(5)), "needs shells 1 .. 4"),
        (lambda: degrade.orientation_alpha(torch.zeros(0, 3, 3), (8, 8, 8)), "P > 0"),
        (lambda: project(X[:4], torch.eye(3)[None]), "N, N, N"),
        (lambda: project(X, torch.eye(3)), "P, 3, 3"),
    ],
)
def test_bad_input_is_refused_in_one_clear_line(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
