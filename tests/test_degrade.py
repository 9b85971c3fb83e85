"""The promises of degrade.py: molmap, masks, diagonal operators, spectral noise, projection."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import abinitio
import degrade
import fourier
from atoms import molmap
from degrade import project, wedge_mask
from fourier import apply_fourier, hermitian_part

ORACLES = Path(__file__).parent / "oracles"

def rotation_angle(a, b):
    """Angle in degrees of the rotation that takes a to b; (..., 3, 3) each, broadcast: |a - b| = 2 sqrt 2 sin(angle / 2)."""
    d = (a - b).double().flatten(-2).norm(dim=-1)
    return torch.rad2deg(2 * torch.asin((d / math.sqrt(8)).clamp(max=1)))



def fixture(name):
    return np.load(ORACLES / name)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def fft(x):
    return torch.fft.fftn(x, dim=(-3, -2, -1))


# ---- Atomic models

def test_molmap_equals_chimerax_on_its_default_grid_on_a_given_one_and_without_a_cutoff():
    f = fixture("molmap.npz")
    model = f["coords_xyz"], f["atomic_number"], float(f["resolution"])
    density, voxel_size, origin = molmap(*model)
    assert voxel_size == pytest.approx((float(f["step"]),) * 3)
    assert origin[::-1] == pytest.approx(f["origin_xyz"])
    uncut = molmap(*model, cutoff=math.inf)[0]
    given = molmap(*model, voxel_size=f["grid_step_xyz"][::-1].copy(), shape=f["grid_map_cut5"].shape,
                   origin=f["grid_origin_xyz"][::-1].copy())[0]
    for ours, name in ((density, "map_cut5"), (uncut, "map_nocut"), (given, "grid_map_cut5")):
        assert ours.dtype == torch.float32 and ours.shape == f[name].shape
        assert np.abs(ours.numpy() - f[name]).max() < 1e-6 * f[name].max()
    assert float(uncut.sum() * f["step"] ** 3) == pytest.approx(f["atomic_number"].sum(), rel=1e-4)


def slow_molmap(xyz, weight, b, resolution, step, origin, shape, cutoff):
    """(1) atom by atom, float64, on a grid whose triples are z, y, x."""
    rho = np.zeros(shape)
    axes = [o + np.arange(n) * h for o, n, h in zip(origin, shape, step)]
    for (x, y, z), w, B in zip(xyz, weight, b):
        s2 = (resolution / (np.pi * np.sqrt(2))) ** 2 + B / (8 * np.pi ** 2)
        d = np.meshgrid(axes[0] - z, axes[1] - y, axes[2] - x, indexing="ij")
        box = np.all([np.abs(a) <= cutoff * np.sqrt(s2) for a in d], axis=0)
        rho += box * w * (2 * np.pi * s2) ** -1.5 * np.exp(-sum(a ** 2 for a in d) / (2 * s2))
    return rho


@pytest.mark.parametrize("cutoff", [5.0, 1.5])                  # 1.5: the edge of the box is a step of 30 %
def test_molmap_equals_the_sum_over_atoms_with_b_factors_inside_around_and_outside_the_grid(cutoff):
    r = np.random.default_rng(1)
    shape, step, origin = (21, 10, 17), (1.1, 1.6, 0.9), (100.0, -20.0, 3.0)
    xyz = r.uniform(-12, 30, (60, 3)) + np.array(origin)[::-1]
    weight, b = r.uniform(1, 16, 60), r.choice([0.0, 30.0, 400.0], 60)
    ours = molmap(xyz, weight, 3.1, voxel_size=step, shape=shape, origin=origin, b_factor=b, cutoff=cutoff)[0]
    slow = slow_molmap(xyz, weight, b, 3.1, step, origin, shape, cutoff)
    assert np.abs(ours.numpy() - slow).max() < 4e-6 * slow.max()           # float32 distances of up to 20 Å


def test_molmap_gradients_equal_central_differences():
    xyz = torch.tensor([[1.0, 2.0, 3.2], [3.1, 2.4, 1.5]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([10.0, 90.0], requires_grad=True)
    grid = dict(voxel_size=1.0, shape=(6, 5, 7), origin=(0.0, 0.0, 0.0))
    c = torch.randn(6, 5, 7, generator=rng())
    (molmap(xyz, [6, 8], 3.0, b_factor=b, **grid)[0] * c).sum().backward()

    def value(xyz, b):
        return (slow_molmap(xyz, (6, 8), b, 3.0, (1, 1, 1), (0, 0, 0), (6, 5, 7), 5.0) * c.numpy()).sum()

    at_xyz, at_b = xyz.detach().numpy(), b.detach().double().numpy()
    for atom in range(2):
        move = np.zeros(2)
        move[atom] = 1e-3
        slope = (value(at_xyz, at_b + move) - value(at_xyz, at_b - move)) / 2e-3
        assert float(b.grad[atom]) == pytest.approx(slope, abs=1e-5)
        for axis in range(3):
            move = np.zeros((2, 3))
            move[atom, axis] = 1e-4
            slope = (value(at_xyz + move, at_b) - value(at_xyz - move, at_b)) / 2e-4
            assert float(xyz.grad[atom, axis]) == pytest.approx(slope, abs=1e-4)


def test_molmap_of_atoms_that_all_lie_elsewhere_is_zero():
    assert molmap([[500.0, 0, 0]], [6], 3.0, voxel_size=1.5, shape=(8, 8, 8), origin=0.0)[0].eq(0).all()


# ---- Masks and operators

def test_masks_equal_the_oracles_in_every_shape():
    f = fixture("wedge_masks.npz")
    for key in f:
        box, kind, *numbers = key.split("_")
        shape = tuple(map(int, box.split("x")))
        want = np.unpackbits(f[key], count=math.prod(shape)).reshape(shape)
        ours = {"y": lambda: wedge_mask(shape, tuple(map(int, numbers))),
                "x": lambda: wedge_mask(shape, (-60, 60), "x"),
                "cone": lambda: degrade.cone_mask(shape, 60)}[kind]()
        assert ours.dtype == torch.bool and np.array_equal(np.fft.fftshift(ours.numpy()), want), key


def test_wedges_about_y_and_z_equal_the_release():
    f = fixture("parity/wedge_masks.npz")
    for n, tilt in ((n, tilt) for n in (8, 9, 16, 32) for tilt in (15, 45, 60)):
        for axis, name in (("y", "default_plane12_rot1"), ("z", "cryofm1_plane01_rot0")):
            ours = wedge_mask((n, n, n), (-tilt, tilt), axis).numpy()
            assert np.array_equal(np.fft.fftshift(ours), f[f"n{n}_tilt{tilt}_{name}"]), (n, tilt, name)
    assert wedge_mask((64, 64, 64), tilt_axis="z").sum() == int(f["n64_tilt60_cryofm1_kept_count"])


def test_the_tilt_axis_is_measured_whatever_the_range():
    mask = wedge_mask((8, 10, 12), (20, 60))
    assert mask[0, :, 0].all() and not mask[0, 0, 1] and not mask[1, 0, 0]


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("tilt", [-35.0, 20.0])
def test_the_plane_that_a_right_handed_tilt_measures_is_in_the_wedge_of_that_tilt_only(axis, tilt):
    turn, beam = "xyz".index(axis), 0 if axis == "z" else 2
    i, j = (turn + 1) % 3, (turn + 2) % 3
    R = np.eye(3)                                               # right-handed about +axis
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    R[[i, j, i, j], [i, j, j, i]] = c, c, -s, s
    image = np.random.default_rng(0).uniform(-0.45, 0.45, (200, 3))
    image[:, beam] = 0                                          # a projection along the beam knows these k
    image = image[np.abs(np.delete(image, (turn, beam), 1)[:, 0]) > 0.2]
    n = 64
    k = tuple(np.rint(n * (image @ R)).astype(int).T % n)       # k_specimen = R^T k_image, nearest voxel
    measured = wedge_mask((n, n, n), (tilt - 4, tilt + 4), axis).permute(2, 1, 0)      # indexed x, y, z
    mirrored = wedge_mask((n, n, n), (-tilt - 4, -tilt + 4), axis).permute(2, 1, 0)
    assert measured[k].all() and not mirrored[k].any()


def test_wedge_is_self_adjoint_and_idempotent():                # even box, asymmetric range: the trap
    shape = (16, 10, 8)
    mask = wedge_mask(shape, (-40, 60))
    assert not torch.equal(mask[..., 4], hermitian_part(mask)[..., 4])      # the trap is set: kx = -Nyquist
    def A(x):
        return apply_fourier(x, mask)

    x, y = torch.randn(2, 1, *shape, generator=rng(), dtype=torch.float64)
    torch.testing.assert_close((A(x) * y).sum(), (x * A(y)).sum())
    torch.testing.assert_close(A(A(x)), A(x))
    F = fft(A(x))[0]
    torch.testing.assert_close(F[A.weights], fft(x)[0][A.weights])          # measured: untouched
    torch.testing.assert_close(F[~A.weights], torch.zeros_like(F[~A.weights]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(6, 8, 10), (5, 7, 9), (4, 5, 6)])
def test_hermitian_part_is_the_mask_and_its_mirror_image(shape):
    mask = torch.rand(shape, generator=rng()) < 0.7
    want = torch.empty_like(mask)
    for z, y, x in np.ndindex(*shape):
        want[z, y, x] = mask[z, y, x] and mask[-z % shape[0], -y % shape[1], -x % shape[2]]
    assert torch.equal(hermitian_part(mask), want)


@pytest.mark.parametrize("shape", [(6, 8, 10), (5, 7, 9), (4, 5, 6)])
def test_apply_fourier_equals_the_full_transform(shape):
    w = torch.randn(shape, generator=rng(), dtype=torch.float64)
    w = w + fourier.mirror(w)
    x = torch.randn(2, 3, *shape, generator=rng(1), dtype=torch.float64)
    torch.testing.assert_close(apply_fourier(x, w), torch.fft.ifftn(fft(x) * w, dim=(-3, -2, -1)).real)


def test_lowpass_equals_the_filter_of_relion_postprocess():
    f = fixture("fsc_masked.npz")
    mean = (torch.from_numpy(f["half1"]).double() + torch.from_numpy(f["half2"])) / 2
    N, apix = len(mean), float(f["apix"])
    freq = np.fft.fftfreq(N)
    radius = np.sqrt(sum(a ** 2 for a in np.meshgrid(freq, freq, freq, indexing="ij"))) * N
    shell = np.floor(radius + 0.5).astype(int)
    curve, last = np.clip(f["fsc_true"], 0, None), int(f["weight_imax"])
    weight = np.where(shell <= last, np.sqrt(2 * curve / (1 + curve))[np.minimum(shell, len(curve) - 1)], 0)
    weight = weight * np.exp(-float(f["bfactor"]) / 4 * (radius / (N * apix)) ** 2) * (radius <= N / 2)
    sharpened = apply_fourier(mean, torch.from_numpy(weight))
    cutoff = round(N * apix / float(f["resolution_0143"]))      # RELION rounds it to a shell
    ours = fourier.lowpass(sharpened, N * apix / cutoff, apix).numpy()
    assert np.abs(ours - f["sharpened"]).max() < 1e-6 * np.abs(f["sharpened"]).max()


def test_lowpass_scales_plane_waves_by_its_raised_cosine():     # anisotropic voxels, a box that is no cube
    shape, voxel = (12, 20, 16), (2.0, 1.0, 1.5)                # 24, 20 and 24 Å: a shell is 1/24 1/Å
    z, y, x = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    for kz, ky, kx in ((0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 4), (0, 1, 4), (1, 2, 3), (5, 0, 0), (2, 3, 4)):
        wave = torch.from_numpy(np.cos(2 * np.pi * (kz * z + ky * y + kx * x) + 0.3))
        s = math.sqrt((kz / 24) ** 2 + (ky / 20) ** 2 + (kx / 24) ** 2)
        soft = np.interp(s - 1 / 6, (-1.5 / 24, 1.5 / 24), (0, np.pi))
        torch.testing.assert_close(fourier.lowpass(wave, 6.0, voxel, edge=3), wave * (0.5 + 0.5 * math.cos(soft)))
        torch.testing.assert_close(fourier.lowpass(wave, 6.0, voxel, edge=0), wave * (s <= 1 / 6 + 1e-9))


# ---- Spectral noise

@pytest.mark.parametrize("D", [16, 32])
def test_spectral_statistics_equal_the_release(D):
    f = fixture("parity/spectral.npz")
    half_1, half_2 = (torch.from_numpy(f[f"D{D}_half{i}"]) for i in (1, 2))

    def equal(ours, name, rtol, shift=False):
        want = f[f"D{D}_{name}"]
        np.testing.assert_allclose(ours.numpy(), np.fft.ifftshift(want) if shift else want, rtol=rtol)

    power = degrade.noise_power(half_1, half_2)
    alpha = 1 + 49 * ~wedge_mask((D, D, D), (-60, 60), "z")
    equal(degrade.radial_power(half_1), "radial_power_half1", 1e-6)
    # 1 - FSC where FSC = .9992, from the release's float32 transforms: hence 2e-4
    equal(power, "noise_power_radial", 2e-4)
    equal(degrade.expand_shells(power, (D, D, D)), "noise_power_volume", 2e-4, shift=True)
    equal(degrade.anisotropic_noise_power(power, alpha), "noise_power_volume_anisotropic_amp50_tilt60", 2e-4, shift=True)
    H = torch.fft.fftshift(fourier.hartley(torch.fft.ifftshift(half_1)))
    np.testing.assert_allclose(H.numpy(), f[f"D{D}_hartley_half1"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 5, 3), (4, 6, 5)])
def test_spectral_noise_has_exactly_the_power_asked_for(shape):
    n = math.prod(shape)
    P = torch.rand(shape, generator=rng(), dtype=torch.float64)
    P = P + fourier.mirror(P)
    zero, unit = torch.zeros(n, *shape, dtype=torch.float64), torch.eye(n, dtype=torch.float64).view(n, *shape)
    response = fft(degrade.add_spectral_noise(zero, P, noise=unit))         # linear in the noise
    torch.testing.assert_close((response.abs() ** 2).sum(0), P)             # so this is E |F noise|^2
    flat = degrade.add_spectral_noise(zero, P, noise=unit).view(n, n)
    white = degrade.add_spectral_noise(zero, torch.full(shape, float(n), dtype=torch.float64), noise=unit).view(n, n)
    torch.testing.assert_close(white.T @ white, torch.eye(n, dtype=torch.float64))     # power n: variance 1
    assert not torch.allclose(flat.T @ flat, torch.eye(n, dtype=torch.float64), atol=0.1)


def test_noise_drawn_for_a_half_map_curve_gives_that_curve_back():
    shape, curve = (2, 48, 48, 48), torch.linspace(0.95, 0.3, 24)
    clean = torch.randn(48, 48, 48, generator=rng()).expand(shape)
    power = degrade.noise_power_from_fsc(clean, curve, clean=True)
    noisy = degrade.add_spectral_noise(clean, power, generator=rng(1))
    from_halves = degrade.noise_power(noisy[0], noisy[1])
    from_curve = degrade.noise_power_from_fsc(noisy, curve)
    # Shells below 8 hold too few coefficients to say much; the mean over the others is good to a percent.
    for error in (from_halves / power[0] - 1, (from_curve / power - 1).mean(0)):
        assert float(error[8:].abs().max()) < 0.15 and float(error[8:].mean().abs()) < 0.02


def test_anisotropic_noise_power_keeps_shell_means_and_the_ratio_between_directions():
    shape = (12, 14, 16)                                        # shells count along x: 1/16 cycles per voxel
    alpha = torch.rand(shape, generator=rng(), dtype=torch.float64) + 0.5
    power = torch.rand(8, generator=rng(1), dtype=torch.float64)
    P = degrade.anisotropic_noise_power(power, alpha)
    kz, ky, kx = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    radius = np.floor(16 * np.sqrt(kz ** 2 + ky ** 2 + kx ** 2) + 1e-9)
    for shell in range(8):
        inside = torch.from_numpy(radius == shell)
        assert float(P[inside].mean()) == pytest.approx(float(power[shell]))
        ratio = (P / alpha)[inside]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_orientation_alpha_of_side_views_is_the_share_of_slices_through_a_direction():
    turn = torch.arange(3600, dtype=torch.float64) * (2 * math.pi / 3600)
    R = torch.zeros(3600, 3, 3, dtype=torch.float64)
    R[:, 0, 2], R[:, 1, 2] = turn.cos(), turn.sin()             # only the beam, the third column, matters
    shape, band = (32, 32, 32), math.sin(math.radians(5))
    alpha = degrade.orientation_alpha(R, shape)
    assert torch.equal(alpha, fourier.mirror(alpha))
    kz, ky, kx = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    sin = np.sqrt(ky ** 2 + kx ** 2) / np.maximum(np.sqrt(kz ** 2 + ky ** 2 + kx ** 2), 1e-9)

    def share(sin):                                             # |k . d| = sin |cos phi| <= band, phi uniform
        return 2 / np.pi * np.arcsin(np.minimum(1, band / np.maximum(sin, 1e-9)))

    theta = (np.arange(90000) + 0.5) * np.pi / 180000
    mean = (share(np.sin(theta)) * np.sin(theta)).sum() / np.sin(theta).sum()
    want = mean / share(sin)
    away = sin > math.sin(math.radians(12))                     # where a 2-degree cell resolves it
    np.testing.assert_allclose(alpha.numpy()[away], want[away], rtol=0.1)
    assert np.abs(alpha.numpy()[away] / want[away] - 1).mean() < 0.02
    assert alpha[5, 0, 0] < 0.1                                 # every side view measures the axis


def test_orientation_alpha_is_low_only_on_the_slice_that_a_view_measures():
    d = torch.tensor([2.0, -3.0, 4.0]) / math.sqrt(29)          # x, y, z
    R = torch.linalg.qr(torch.stack([d, torch.eye(3)[0], torch.eye(3)[1]], 1))[0].flip(1)
    alpha = degrade.orientation_alpha(R[None], (24, 20, 22))
    kz, ky, kx = torch.meshgrid(*(torch.fft.fftfreq(n) for n in (24, 20, 22)), indexing="ij")
    k = torch.stack([kx, ky, kz], -1)
    off = torch.rad2deg(torch.asin(((k @ d).abs() / k.norm(dim=-1).clamp(min=1e-9)).clamp(max=1)))
    inner = torch.ones(24, 20, 22, dtype=torch.bool)
    inner[12], inner[:, 10], inner[:, :, 11], inner[0, 0, 0] = False, False, False, False   # Nyquist is averaged
    assert (alpha[inner & (off < 3)] < 1).all() and (alpha[inner & (off > 7)] > 5).all()


# ---- Projection

@pytest.mark.parametrize("N", [24, 21])
def test_projections_equal_the_closed_form(N):
    f = fixture("projection.npz")
    volume, R = (torch.from_numpy(f[f"n{N}_{name}"]) for name in ("volume", "rotation_xyz"))
    want = f[f"n{N}_projections"]
    ours = project(volume, R)
    assert np.abs(ours.numpy() - want).max() < 0.01 * want.max()
    assert torch.equal(project(torch.stack([volume, 2 * volume]), R)[1], 2 * ours)      # a batch of volumes
    identity = project(volume, torch.eye(3)[None])[0]
    torch.testing.assert_close(identity, volume.sum(0), atol=1e-5 * float(want.max()), rtol=0)


def test_shifts_displace_the_object_in_the_image():
    f = fixture("projection.npz")
    volume, R = (torch.from_numpy(f[f"n24_{name}"]) for name in ("volume", "rotation_xyz"))
    shifts = torch.tensor([[2.0, -1.0]] * len(R))               # x, y
    moved, want = project(volume, R, shifts), project(volume, R).roll((-1, 2), (-2, -1))
    torch.testing.assert_close(moved[:, 3:-3, 3:-3], want[:, 3:-3, 3:-3], atol=1e-4, rtol=1e-4)


def test_projection_gradients_equal_central_differences():
    volume = torch.randn(5, 5, 5, generator=rng(), dtype=torch.float64, requires_grad=True)
    R = torch.linalg.qr(torch.randn(2, 3, 3, generator=rng(1), dtype=torch.float64))[0].requires_grad_()
    shifts = torch.tensor([[0.3, -0.2], [0.11, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, (volume, R, shifts))


# ---- Orientations and central slices

def test_euler_angles_and_angles_between_rotations_equal_scipy():
    f = fixture("so3.npz")
    R = degrade.euler_matrix(torch.from_numpy(f["euler_zyz_deg"]))
    np.testing.assert_allclose(R.numpy(), f["matrix_intrinsic_ZYZ"], atol=1e-12)
    np.testing.assert_allclose(rotation_angle(R[:, None], R[None]).numpy(), f["geodesic_deg"], atol=1e-5)


def test_the_grid_of_rotations_is_healpix_times_in_plane_angles():
    f = fixture("so3.npz")
    for nside in (1, 2):
        for ours, name in zip(abinitio.healpix(nside), ("theta", "phi")):
            np.testing.assert_allclose(ours.numpy(), f[f"healpix{nside}_ring_{name}"], atol=1e-12)
    grid = abinitio.so3_grid(0)
    apart = rotation_angle(grid[:, None], degrade.euler_matrix(torch.from_numpy(f["hopf_euler_zyz_deg"])))
    assert len(grid) == 72 and float(apart.amin(0).max()) < 1e-5 and float(apart.amin(1).max()) < 1e-5
    q = torch.from_numpy(f["cover_random_quat_xyzw"])
    x, y, z, w = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    R = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                     2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                     2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], 1).view(-1, 3, 3)
    nearest = rotation_angle(R[:, None], grid).amin(1)
    np.testing.assert_allclose(nearest.numpy(), f["cover_distance_deg"], atol=1e-5)


@pytest.mark.parametrize("nside", [4, 8])
def test_healpix_rings_are_mirror_images_and_every_direction_has_the_same_area(nside):
    theta, phi = abinitio.healpix(nside)
    assert len(theta) == 12 * nside ** 2
    torch.testing.assert_close(theta.cos(), -theta.cos().flip(0))
    # Equal areas: the mean over the grid of a polynomial of the direction is its mean over the sphere.
    d = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], 1)
    torch.testing.assert_close(d.T @ d / len(d), torch.eye(3, dtype=d.dtype) / 3, atol=0.3 / nside ** 2, rtol=0)


@pytest.mark.parametrize("N", [24, 21])
def test_slices_equal_the_closed_form_of_the_projections(N):
    f = fixture("projection.npz")
    volume, R, want = (torch.from_numpy(f[f"n{N}_{name}"]).float() for name in ("volume", "rotation_xyz", "projections"))
    k = abinitio.frequencies(N // 2 - 1)
    ours, want = abinitio.slices(volume, R, k), abinitio.coefficients(want, k)
    assert float((ours - want).norm() / want.norm()) < 0.02             # interpolation: 1.4 %
    k = abinitio.frequencies(6, 3)                                       # in three dimensions nothing is projected
    want = abinitio.coefficients(volume[None], k)
    assert float((abinitio.slices(volume, torch.eye(3)[None], k) - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 15, 15), (2, 10, 10, 10)])
def test_dot_products_of_coefficients_are_dot_products_of_low_passed_maps(shape):
    N, dims = shape[-1], len(shape) - 1
    x, k = torch.randn(shape, generator=rng()), abinitio.frequencies(4, dims)
    axes = tuple(range(-dims, 0))
    inside = sum((torch.fft.fftfreq(N) * N).reshape(-1, *[1] * i) ** 2 for i in range(dims)) <= 16.001
    inside[(0,) * dims] = False
    low = torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * inside, dim=axes).real
    a, b = abinitio.coefficients(x, k)
    assert 2 * len(k) == int(inside.sum())
    torch.testing.assert_close((a.conj() * b).sum().real, (low[0] * low[1]).sum())


def test_phase_displaces_an_image_as_project_does():
    f = fixture("projection.npz")
    volume, R = (torch.from_numpy(f[f"n24_{name}"]).float() for name in ("volume", "rotation_xyz"))
    shift, k = torch.tensor([[1.5, -0.75]] * len(R)), abinitio.frequencies(8)
    want = abinitio.coefficients(project(volume, R, shift), k)
    ours = abinitio.coefficients(project(volume, R), k) * abinitio.phase(k, F.pad(shift, (0, 1)), 24)
    assert float((ours - want).norm() / want.norm()) < 0.005


def test_the_gradient_by_slices_is_the_direct_sum_and_at_low_resolution_the_gradient_in_real_space():
    f = fixture("projection.npz")
    volume, R = (torch.from_numpy(f[f"n24_{name}"]).float() for name in ("volume", "rotation_xyz"))
    k, v = abinitio.frequencies(4), volume.clone().requires_grad_()
    y = abinitio.coefficients(torch.randn(len(R), 24, 24, generator=rng()), k)
    by_slices, = torch.autograd.grad((abinitio.slices(v, R, k).conj() * y).real.sum(), v)
    in_space, = torch.autograd.grad((abinitio.coefficients(project(v, R), k).conj() * y).real.sum(), v)
    r = torch.arange(24) - 12
    z, y_, x = torch.meshgrid(r, r, r, indexing="ij")
    place = torch.stack([x, y_, z], -1).view(-1, 3).float()
    direct = sum((torch.polar(torch.ones(()), 2 * math.pi / 24 * (place @ (S @ k.T))) * c).real.sum(1) for S, c in zip(R, y))
    direct = (direct * math.sqrt(2) / 24).view(24, 24, 24)
    for d, error in ((3, 0.01), (6, 0.03), (11, 0.12)):         # the docstring of slices
        inside = place.norm(dim=1).view(24, 24, 24) < d
        assert float((by_slices - direct)[inside].norm() / direct[inside].norm()) < error
    low = [fourier.lowpass(g * inside, 6, 1) for g in (by_slices, in_space)]
    assert float((low[0] - low[1]).norm() / low[1].norm()) < 0.1        # 7 %: trilinear in real space


# ---- Errors

X = torch.zeros(8, 8, 8)


@pytest.mark.parametrize("call, says", [
    (lambda: molmap(np.zeros((0, 3)), [], 3.0), "atoms > 0"),
    (lambda: molmap([[0.0, 0, math.nan]], [6], 3.0), "finite"),
    (lambda: molmap([[0.0, 0, 0]], [6, 7], 3.0), "one value per atom"),
    (lambda: molmap([[0.0, 0, 0]], [6], 3.0, b_factor=[-1.0]), "at least 0"),
    (lambda: molmap([[0.0, 0, 0]], [6], 0.0), "positive"),
    (lambda: molmap([[0.0, 0, 0]], [6], 3.0, voxel_size=-1), "positive"),
    (lambda: molmap([[0.0, 0, 0]], [6], 3.0, origin=0), "without a shape"),
    (lambda: wedge_mask((8, 8, 8), (-90, 60)), "inside"),
    (lambda: wedge_mask((8, 8, 8), (60, -60)), "smallest and largest"),
    (lambda: wedge_mask((8, 8, 8), (-60, math.nan)), "inside"),
    (lambda: wedge_mask((8, 8, 8), tilt_axis="w"), "x, y or z"),
    (lambda: degrade.cone_mask((8, 8, 8), 90), "inside"),
    (lambda: apply_fourier(X, wedge_mask((8, 8, 10))), "the map is"),
    (lambda: fourier.lowpass(X, 0, 1.5), "positive"),
    (lambda: degrade.noise_power(X, X), "same map"),
    (lambda: degrade.noise_power_from_fsc(X, torch.zeros(5)), "needs shells 1 .. 4"),
    (lambda: degrade.orientation_alpha(torch.zeros(0, 3, 3), (8, 8, 8)), "P > 0"),
    (lambda: project(X[:4], torch.eye(3)[None]), "N, N, N"),
    (lambda: project(X, torch.eye(3)), "P, 3, 3"),
])
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
