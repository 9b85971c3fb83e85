"""What atoms.py promises: density from atoms."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from atoms import molmap

ORACLES = Path(__file__).parent / "oracles"


def fixture(name):
    return np.load(ORACLES / name)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: molmap(np.zeros((0, 3)), [], 3.0), "atoms > 0"),
        (lambda: molmap([[0.0, 0, math.nan]], [6], 3.0), "finite"),
        (lambda: molmap([[0.0, 0, 0]], [6, 7], 3.0), "one value per atom"),
        (lambda: molmap([[0.0, 0, 0]], [6], 3.0, b_factor=[-1.0]), "at least 0"),
        (lambda: molmap([[0.0, 0, 0]], [6], 0.0), "positive"),
        (lambda: molmap([[0.0, 0, 0]], [6], 3.0, voxel_size=-1), "positive"),
        (lambda: molmap([[0.0, 0, 0]], [6], 3.0, origin=0), "without a shape"),
    ],
)
def test_bad_input_of_molmap_is_one_clear_line(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
