"""Claims of abinitio_poses.py: poses are found, and one density is laid onto another.

The density is that of a protein-like chain that data_chains.py builds by rule.
"""

import functools
import math

import pytest
import torch

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
    return images, R, torch.nn.functional.pad(shift, (0, 1))


def rotation_angle(a, b):
    """Degrees of the turn from a to b, (..., 3, 3): |a - b| = 2 sqrt 2 sin(angle / 2)."""
    distance = (a - b).double().flatten(-2).norm(dim=-1)
    return torch.rad2deg(2 * torch.asin((distance / math.sqrt(8)).clamp(max=1)))


def test_poses_of_clean_projections_are_found():
    images, R, shift = projections()
    found = abinitio_poses.find_poses(density(), images, max_shift=2, radius=12)
    angle = rotation_angle(found.rotations, R)
    assert angle.median() < 1.5
    assert (angle < 3).float().mean() >= 0.9
    assert (found.shifts - shift).norm(dim=1).median() < 0.1


def low_passed_without_mean(x):
    """Images x (..., N, N) of the frequencies 0 < |k| <= 5."""
    r = torch.fft.fftfreq(BOX) * BOX
    k2 = r[:, None] ** 2 + r**2
    return torch.fft.ifft2(torch.fft.fft2(x) * ((k2 <= 25) & (k2 > 0))).real


def test_search_finds_the_least_psi_cor_of_all_poses_on_the_grid():
    images = projections()[0][:3]
    k = abinitio_poses.frequencies(5)
    grid = abinitio_poses.so3_grid(0).float()
    shifts = abinitio_poses.shift_grid(2, 1)
    y = abinitio_poses.coefficients(images, k)
    found = abinitio_poses.search(density(), y, k, grid, shifts)

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
