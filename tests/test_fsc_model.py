"""The promises of fsc_model.py: Phenix's maps, masks and correlations, MapQ's Q-scores."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from atoms import ATOMIC_NUMBER
from fsc_model import (
    ELEMENTS,
    correlation,
    map_model_cc,
    model_map,
    molecular_mask,
    q_score,
    structure_factors,
    trilinear,
    voxels_near,
)

ORACLES = Path(__file__).parent / "oracles"


@pytest.fixture(scope="module")
def oracle():
    """The numbers of Phenix and MapQ for a map and its model; see oracles/README.md."""
    return dict(np.load(ORACLES / "map_model.npz"))


@pytest.fixture(scope="module")
def density(oracle):
    return torch.from_numpy(oracle["map_zyx"])


@pytest.fixture(scope="module")
def atoms(oracle):
    """xyz, atomic_number, b_iso."""
    number = torch.tensor([ATOMIC_NUMBER[element] for element in oracle["elements"]])
    return torch.from_numpy(oracle["coords_xyz"]), number, torch.from_numpy(oracle["b_iso"])


@pytest.fixture(scope="module")
def voxel_size(oracle):
    return float(oracle["voxel"])


def few_atoms(seed=0):
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    xyz = xyz * torch.tensor([15.0, 18, 20]) + torch.tensor([3.0, -2, 7])
    b_iso = torch.tensor([20.0, 35, 50, 15, 90, 40], dtype=torch.float64)
    return xyz, torch.tensor([6, 7, 8, 16, 6, 1]), b_iso


# ---- Model maps


@pytest.mark.parametrize("d_min", [0.0, 3.1, 6.2])
def test_structure_factors_equal_the_direct_sum_over_atoms(d_min):
    xyz, number, b_iso = few_atoms()
    shape, voxel, origin = (16, 15, 12), (1.25, 1.2, 1.3), (7.0, -2.0, 3.0)
    occupancy = torch.linspace(0.5, 1, 6)
    kz, ky, kx = (np.fft.fftfreq(n, v) for n, v in zip(shape, voxel))
    direct = torch.zeros(16, 15, 7, dtype=torch.complex128)
    for i, j, l in np.ndindex(16, 15, 7):
        s = torch.tensor([abs(kx[l]), ky[j], kz[i]])  # x, y, z in 1/Å
        if d_min * s.norm() > 1 or i == 8 or l == 6:  # no Nyquist planes
            continue
        s2 = s.square().sum()
        for a in range(6):
            phase = 2 * math.pi * float(s @ (xyz[a] - torch.tensor(origin[::-1])))
            _, heights, widths = ELEMENTS[int(number[a])]
            terms = [h * torch.exp(-(w + b_iso[a]) / 4 * s2) for h, w in zip(heights, widths)]
            direct[i, j, l] += occupancy[a] * sum(terms) * np.exp(-1j * phase)

    def error(**settings):
        settings |= {"occupancy": occupancy, "d_min": d_min}
        ours = structure_factors(shape, xyz, number, b_iso, voxel, origin, **settings)
        return (ours - direct).abs().max() / direct.abs().max()

    assert error() < 2e-2  # Departure 1: tails cut, some aliasing
    if d_min == 0:
        assert error(wing_cutoff=1e-6) < 1e-3  # on so fine a grid only the tails matter


def test_a_box_coarser_than_the_resolution_and_unknown_elements_are_refused():
    xyz, number, b_iso = few_atoms()
    with pytest.raises(ValueError, match="no frequency"):
        model_map((8, 8, 8), xyz, number, b_iso, 100.0, 1.0)
    with pytest.raises(ValueError, match="factors for He"):
        model_map((8, 8, 8), xyz, torch.full_like(number, 2), b_iso, 4.0, 1.0)


def test_voxels_near_an_atom_are_all_within_reach_of_it_through_the_faces():
    shape, voxel, origin, centre = (7, 6, 5), (1.0, 1.3, 0.9), (0.5, 0.0, -0.4), (3.3, 7.5, 0.2)
    xyz = torch.tensor([centre[::-1]])
    index, distance = voxels_near(shape, xyz, 1.9, voxel, origin)
    near = distance <= 1.9
    found = sorted(zip(index[near].tolist(), distance[near].tolist()))

    expected = []
    for z, y, x in np.ndindex(*shape):
        difference = np.array((z, y, x)) * voxel + origin - np.array(centre)
        side = np.array(shape) * voxel
        distance = np.linalg.norm((difference + side / 2) % side - side / 2)  # nearest image
        if distance <= 1.9:
            expected.append(((z * 6 + y) * 5 + x, distance))
    assert [i for i, _ in found] == [i for i, _ in expected]
    np.testing.assert_allclose([r for _, r in found], [r for _, r in expected], atol=1e-6)


def test_model_map_and_mask_are_phenixs(oracle, density, atoms, voxel_size):
    ours = model_map(density.shape, *atoms, float(oracle["resolution"]), voxel_size)
    assert correlation(ours, torch.from_numpy(oracle["map_calc_zyx"])) > 1 - 1e-6
    bits = np.unpackbits(oracle["inside_mask_packed"], count=density.numel())
    inside = torch.from_numpy(bits).view(density.shape).bool()
    assert torch.equal(molecular_mask(density.shape, *atoms[:2], voxel_size), inside)


def test_the_mask_gives_back_what_the_probe_took_but_no_atom():
    # One carbon: 1.775 Å, plus 1.1 for the probe, minus 0.9 of shrinking.
    xyz, v = torch.tensor([[6.0, 6.0, 6.0]]), 0.25
    mask = molecular_mask((48, 48, 48), xyz, torch.tensor([6]), v)
    axis = torch.arange(48) * v - 6
    r = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    assert mask[r < 1.775].all() and not mask[r >= 1.775 + 1.1].any()
    assert r[mask].max() == pytest.approx(1.775 + 1.1 - 0.9, abs=v)


def test_the_mask_leaves_out_hydrogens():
    xyz = torch.tensor([[6.0, 6.0, 6.0]])
    assert not molecular_mask((48, 48, 48), xyz, torch.tensor([1]), 0.25).any()


# ---- Correlations


def test_the_four_correlations_are_phenixs(oracle, density, atoms, voxel_size):
    ours = map_model_cc(density, *atoms, float(oracle["resolution"]), voxel_size)
    for name, value in ours.items():
        assert value == pytest.approx(float(oracle[name]), abs=2e-5), name


def test_correlations_follow_the_model_and_the_grid_when_both_move(density, atoms, voxel_size):
    xyz, *others = atoms
    resting = map_model_cc(density, xyz, *others, 4.0, voxel_size)
    moved = xyz + torch.tensor([3.0, -5, 11])
    assert map_model_cc(density, moved, *others, 4.0, voxel_size, (11, -5, 3)) == pytest.approx(
        resting, abs=1e-6
    )


def test_a_model_that_covers_the_whole_map_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="frame of the map"):
        map_model_cc(torch.rand(3, 3, 3), torch.zeros(1, 3), 7 * one.long(), one, 2.0, 0.8)


# ---- Q-scores


@pytest.mark.parametrize("sigma", [0.6, 0.4])
def test_q_scores_are_mapqs_whatever_the_chunk(oracle, density, atoms, voxel_size, sigma):
    ours = q_score(density, atoms[0], voxel_size, sigma=sigma, chunk=25)
    np.testing.assert_allclose(ours, oracle[f"qscore_sigma0{round(10 * sigma)}"], atol=1e-6)
    assert torch.equal(ours, q_score(density, atoms[0], voxel_size, sigma=sigma))


def test_an_atom_that_looks_like_the_reference_scores_one():
    v, origin = 0.2, (-3.0, -4.0, -5.0)
    xyz = torch.tensor([[-2.0, -0.9, 0.1]])
    z, y, x = (torch.arange(32) * v + o - c for o, c in zip(origin, xyz[0].flip(0)))
    square = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2
    density = 3 * torch.exp(-square / (2 * 0.6**2)) - 1
    assert float(q_score(density, xyz, v, origin)) == pytest.approx(1, abs=1e-3)
    assert float(q_score(-density, xyz, v, origin)) == pytest.approx(-1, abs=1e-3)
    assert float(q_score(density, xyz, v, origin, sigma=1.2)) < 0.95


def test_trilinear_interpolation_is_exact_for_a_linear_map_and_zero_outside():
    voxel, origin = (1.1, 0.9, 1.3), (4.0, -2.0, 1.0)
    z, y, x = (torch.arange(n) * v + o for n, v, o in zip((5, 6, 7), voxel, origin))
    density = 2 * z[:, None, None] - 3 * y[:, None] + 0.5 * x + 1
    xyz = torch.tensor([[1.7, -0.3, 6.6], [8.0, 2.2, 4.4], [0.0, -9.0, 4.0]], dtype=torch.float64)
    values = trilinear(density, xyz, voxel, origin)
    expected = 2 * xyz[:2, 2] - 3 * xyz[:2, 1] + 0.5 * xyz[:2, 0] + 1
    np.testing.assert_allclose(values[:2], expected, atol=1e-5)
    assert values[2] == 0
