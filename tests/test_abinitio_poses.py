"""Claims of abinitio_poses.py: grids, central slices, poses found, one density laid onto another.

Unless an oracle is read, the density is that of a protein-like chain that data_chains.py builds.
"""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import abinitio_poses
import atoms
import augment
import degrade
import fourier
import fsc
import volume
from abinitio import psi_cor
from data_chains import ProceduralChains

BOX = 32
ORACLES = Path(__file__).parent / "oracles"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_rotations(n, seed=0):
    generator = rng(seed)
    return torch.stack([augment.random_rotation(generator) for _ in range(n)]).float()


@functools.cache
def density():
    """A chain in 32^3 voxels of 3 Å, at 8 Å."""
    chain = ProceduralChains()[1]
    box = dict(voxel_size=3.0, shape=(BOX,) * 3, origin=-48.0)
    return atoms.molmap(chain.xyz, chain.atomic_number, 8.0, **box)[0]


@functools.cache
def projections():
    """40 images of the density, their rotations and their shifts."""
    R = random_rotations(40)
    shift = torch.rand(40, 2, generator=rng(1)) * 3 - 1.5
    images = degrade.project(density(), R, shift)
    return images, R, F.pad(shift, (0, 1))


def rotation_angle(a, b):
    """Degrees of the turn from a to b, (..., 3, 3): |a - b| = 2 sqrt 2 sin(angle / 2)."""
    distance = (a - b).double().flatten(-2).norm(dim=-1)
    return torch.rad2deg(2 * torch.asin((distance / math.sqrt(8)).clamp(max=1)))


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


# ---- Grids of rotations


def test_angles_between_rotations_equal_scipy():
    oracle = np.load(ORACLES / "so3.npz")
    R = degrade.euler_matrix(torch.from_numpy(oracle["euler_zyz_deg"]))
    angles = rotation_angle(R[:, None], R)
    np.testing.assert_allclose(angles, oracle["geodesic_deg"], atol=1e-5)


def test_healpix_equals_healpy():
    oracle = np.load(ORACLES / "so3.npz")
    for nside in (1, 2):
        theta, phi = abinitio_poses.healpix(nside)
        np.testing.assert_allclose(theta, oracle[f"healpix{nside}_ring_theta"], atol=1e-12)
        np.testing.assert_allclose(phi, oracle[f"healpix{nside}_ring_phi"], atol=1e-12)


@pytest.mark.parametrize("nside", [4, 8])
def test_healpix_rings_are_mirror_images_and_every_direction_has_the_same_area(nside):
    theta, phi = abinitio_poses.healpix(nside)
    assert len(theta) == 12 * nside**2
    torch.testing.assert_close(theta.cos(), -theta.cos().flip(0))
    # Equal areas: the mean of x_i x_j over the grid is that over the sphere, 1/3 or 0.
    d = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], 1)
    third = torch.eye(3, dtype=d.dtype) / 3
    torch.testing.assert_close(d.T @ d / len(d), third, atol=0.3 / nside**2, rtol=0)


def test_the_grid_of_rotations_equals_the_oracle_and_covers_all_rotations():
    oracle = np.load(ORACLES / "so3.npz")
    grid = abinitio_poses.so3_grid(0)
    assert len(grid) == 72
    hopf = degrade.euler_matrix(torch.from_numpy(oracle["hopf_euler_zyz_deg"]))
    apart = rotation_angle(grid[:, None], hopf)
    assert apart.amin(0).max() < 1e-5
    assert apart.amin(1).max() < 1e-5

    # The distance of random rotations, given as quaternions, from the grid.
    q = torch.from_numpy(oracle["cover_random_quat_xyzw"])
    v = q[:, :3]
    length = v.norm(dim=1, keepdim=True)
    half_angle = torch.atan2(length, q[:, 3:])
    R = abinitio_poses.turn_by(torch.rad2deg(2 * half_angle) * v / length)
    nearest = rotation_angle(R[:, None], grid).amin(1)
    np.testing.assert_allclose(nearest, oracle["cover_distance_deg"], atol=1e-5)


# ---- Central slices


def projection_oracle(N):
    """A volume (N, N, N), rotations and the closed form of its projections."""
    oracle = np.load(ORACLES / "projection.npz")
    names = ("volume", "rotation_xyz", "projections")
    return [torch.from_numpy(oracle[f"n{N}_{name}"]).float() for name in names]


@pytest.mark.parametrize("N", [24, 21])
def test_slices_equal_the_closed_form_of_the_projections(N):
    volume, R, images = projection_oracle(N)
    k = abinitio_poses.frequencies(N // 2 - 1)
    ours = abinitio_poses.slices(volume, R, k)
    # Interpolation leaves 1.4 %.
    assert relative_error(ours, abinitio_poses.coefficients(images, k)) < 0.02

    # In three dimensions nothing is projected.
    k = abinitio_poses.frequencies(6, 3)
    ours = abinitio_poses.slices(volume, torch.eye(3)[None], k)
    assert relative_error(ours, abinitio_poses.coefficients(volume[None], k)) < 0.03


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 15, 15), (2, 10, 10, 10)])
def test_dot_products_of_coefficients_are_dot_products_of_low_passed_maps(shape):
    N = shape[-1]
    dims = len(shape) - 1
    x = torch.randn(shape, generator=rng())
    k = abinitio_poses.frequencies(4, dims)
    r = torch.fft.fftfreq(N) * N
    grid = torch.meshgrid([r] * dims, indexing="ij")
    k2 = torch.stack(grid).square().sum(0)
    inside = (k2 < 16.001) & (k2 > 0.001)
    axes = tuple(range(-dims, 0))
    low = torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * inside, dim=axes).real
    a, b = abinitio_poses.coefficients(x, k)
    assert 2 * len(k) == inside.sum()
    torch.testing.assert_close((a.conj() * b).sum().real, (low[0] * low[1]).sum())


def test_phase_displaces_an_image_as_project_does():
    volume, R, _ = projection_oracle(24)
    shift = torch.tensor([[1.5, -0.75]] * len(R))
    k = abinitio_poses.frequencies(8)
    expected = abinitio_poses.coefficients(degrade.project(volume, R, shift), k)
    ours = abinitio_poses.coefficients(degrade.project(volume, R), k)
    ours = ours * abinitio_poses.phase(k, F.pad(shift, (0, 1)), 24)
    assert relative_error(ours, expected) < 0.005


def test_the_gradient_of_slices_is_a_direct_sum_and_agrees_with_real_space():
    volume, R, _ = projection_oracle(24)
    k = abinitio_poses.frequencies(4)
    V = volume.clone().requires_grad_()
    y = abinitio_poses.coefficients(torch.randn(len(R), 24, 24, generator=rng()), k)

    def gradient(p):
        return torch.autograd.grad((p.conj() * y).real.sum(), V)[0]

    by_slices = gradient(abinitio_poses.slices(V, R, k))
    in_space = gradient(abinitio_poses.coefficients(degrade.project(V, R), k))

    # The adjoint of (2): a wave for every coefficient.
    r = torch.arange(24) - 12
    z, y_, x = torch.meshgrid(r, r, r, indexing="ij")
    place = torch.stack([x, y_, z], -1).view(-1, 3).float()
    direct = 0
    for rotation, c in zip(R, y):
        angle = 2 * math.pi / 24 * (place @ (rotation @ k.T))
        direct = direct + (torch.polar(torch.ones(()), angle) * c).real.sum(1)
    direct = (direct * math.sqrt(2) / 24).view(24, 24, 24)

    # The error grows with the distance from the middle, as the docstring of slices says.
    for d, error in ((3, 0.01), (6, 0.03), (11, 0.12)):
        inside = place.norm(dim=1).view(24, 24, 24) < d
        assert relative_error(by_slices[inside], direct[inside]) < error
    # 7 %: the projection in real space interpolates, too.
    low = [fourier.lowpass(g * inside, 6, 1) for g in (by_slices, in_space)]
    assert relative_error(*low) < 0.1


# ---- Search


def test_poses_of_clean_projections_are_found():
    images, R, shift = projections()
    found = abinitio_poses.find_poses(density(), images, max_shift=2, radius=12)
    angle = rotation_angle(found.rotations, R)
    assert angle.median() < 1.5
    assert (angle < 3).float().mean() >= 0.9
    assert (found.shifts - shift).norm(dim=1).median() < 0.1


@pytest.mark.parametrize("max_shift", [0, 0.01, 0.5])
def test_no_image_is_shifted_by_more_than_the_limit(max_shift):
    images, _, shift = projections()
    assert shift.norm(dim=1).max() > 0.6
    found = abinitio_poses.find_poses(density(), images[:6], max_shift=max_shift, radius=12)
    assert float(found.shifts.norm(dim=1).max()) <= max_shift + 1e-6


def low_passed_without_mean(x):
    """Images x (..., N, N) of the frequencies 0 < |k| <= 5."""
    r = torch.fft.fftfreq(BOX) * BOX
    k2 = r[:, None] ** 2 + r**2
    return torch.fft.ifft2(torch.fft.fft2(x) * ((k2 <= 25) & (k2 > 0))).real


def test_search_finds_the_least_psi_cor_of_all_poses_on_the_grid():
    images = projections()[0][:3]
    grid = abinitio_poses.so3_grid(0).float()
    shifts = abinitio_poses.shift_grid(2, 1)
    found = abinitio_poses.search(density(), images, 5, grid, shifts)

    # Slow: project every pose in real space and compare with every image.
    losses = []
    for shift in shifts:
        p = degrade.project(density(), grid, shift[:2].expand(len(grid), 2))
        losses.append(psi_cor(low_passed_without_mean(p)[:, None], low_passed_without_mean(images)))
    losses = torch.stack(losses)  # (S, R, P)
    for i in range(3):
        least = losses[..., i].min()
        assert abs(found.correlations[i, 0] + least) < 0.01
        s = (shifts == found.shifts[i, 0]).all(1).nonzero().item()
        r = (grid == found.rotations[i, 0]).all((1, 2)).nonzero().item()
        assert losses[s, r, i] - least < 0.01


@pytest.mark.parametrize("mirrored", [False, True])
def test_align_undoes_a_turn_a_shift_and_a_mirror(mirrored):
    fine = fourier.resample(density(), (2 * BOX,) * 3)
    moved = volume.rotate(fine, random_rotations(1, 7)[0])[::2, ::2, ::2]
    moved = moved.roll((2, -1, 1), (0, 1, 2))
    found = abinitio_poses.align(moved.flip(1) if mirrored else moved, density())
    assert found.mirrored == mirrored
    assert found.correlation > 0.99
    assert fsc.fsc(found.density, density())[:11].min() > 0.95
