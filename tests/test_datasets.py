"""What data.py's datasets promise: crops of maps, densities of models, and textbook structures built by rule."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import atoms
import augment
import data
import data_chains
import mrc
import volume

ORACLES = Path(__file__).parent / "oracles"
PEAK, SOLVENT = (1 - 0.05) / 0.13, -0.05 / 0.13         # 1 and 0 in network scale
SCALE = dict(mean=0.05, std=0.13)


def oracle(name):
    return ORACLES / name


# ---- Maps ------------------------------------------------------------------------------------------

def gaussians(shape, *centres, sigma=2.0):
    """Sum of Gaussians of height 1 about centres (z, y, x) in voxels from the middle of the box."""
    grid = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    return sum(torch.exp(-sum((a - c) ** 2 for a, c in zip(grid, centre)) / (2 * sigma ** 2)) for centre in centres)


def write(folder, name, density, voxel_size=1.5):
    mrc.write_map(folder / name, mrc.Map(density, voxel_size))


def one_map(density, label="a"):
    return data.Volume(label, density / density.max())


@pytest.mark.parametrize("cubic, atol", [(False, 0.12), (True, 0.01)])
def test_random_crops_show_the_map_around_a_voxel_of_the_molecule(cubic, atol):
    # A round blob looks the same at every orientation, so a crop must be the blob, shifted.
    box, crop, sigma = 21, 16, 2.0                       # odd: the blob's top is a voxel
    items = data.MapCrops([one_map(gaussians((box,) * 3, (0, 0, 0), sigma=sigma))], crop=crop, crops=2, cubic=cubic, **SCALE)
    offsets = []
    for x in torch.cat([items[i] for i in range(12)])[:, 0]:
        assert x.shape == (crop,) * 3
        value = x * 0.13 + 0.05                          # back on 0..1
        weight = (value - 0.3).clamp(min=0) ** 2
        if weight.sum() == 0:
            continue
        axes = [weight.sum([d for d in range(3) if d != axis]) for axis in range(3)]
        centre = [float((w * torch.arange(crop)).sum() / w.sum()) - (crop - 1) / 2 for w in axes]
        if max(map(abs, centre)) > 5:                    # the blob is cut: no centre of mass
            continue
        want = gaussians((crop,) * 3, centre, sigma=sigma)
        # Trilinear interpolation flattens a top by (h^2 / 8) f'' per axis at most; splines hardly.
        torch.testing.assert_close(value, want, rtol=0, atol=atol)
        offsets.append(math.hypot(*centre))
    # The mask (density > 0.1: 4.3 voxels, and 3 more along each axis by dilation) holds the crop's centre.
    assert len(offsets) > 5 and max(offsets) <= 4.3 + 3 * 3 ** 0.5 and np.ptp(offsets) > 1


def test_crops_beyond_a_map_are_filled_up_with_solvent():
    items = data.MapCrops([one_map(gaussians((9, 9, 9), (0, 0, 0)))], crop=16, crops=4, **SCALE)
    for x in items[0][:, 0]:
        assert x.max() < PEAK + 1e-5 and x.min() == pytest.approx(SOLVENT)
        assert int((x > SOLVENT + 1e-6).sum()) <= 11 ** 3


@pytest.mark.parametrize("box, crop", [(15, 24), (40, 24)])            # padded, cropped
def test_centre_crops_are_the_middle_of_the_map_in_every_orientation(box, crop):
    far = (0.0, 3.0, 4.0)                                # 5 voxels from the middle
    one = one_map(gaussians((box,) * 3, far, sigma=1.2))
    items, directions = data.MapCrops([one], crop=crop, crops=2, center=True, **SCALE), []
    for x in torch.cat([items[i] for i in range(8)])[:, 0]:
        assert x.shape == (crop,) * 3 and x.max() <= PEAK + 1e-5 and x.min() == pytest.approx(SOLVENT)
        weight = (x - SOLVENT).clamp(min=0)
        # Voxel box // 2 came to crop // 2 and then all turned about (crop - 1) / 2.
        shift = (box - 1) / 2 - box // 2 + crop // 2 - (crop - 1) / 2
        grid = torch.meshgrid(*[torch.arange(crop) - (crop - 1) / 2] * 3, indexing="ij")
        directions.append(torch.stack([(weight * a).sum() / weight.sum() for a in grid]))
    directions = torch.stack(directions)
    want = math.hypot(*(c + shift for c in far))
    torch.testing.assert_close(directions.norm(dim=1), torch.full((16,), want), rtol=0, atol=0.1)
    assert (directions / want).mean(0).norm() < 0.6      # of 16 uniform directions: 0.25 +- 0.1


def test_random_centres_are_uniform_over_the_density_mask():
    x = gaussians((17, 19, 21), (4, 0, 0), (-8, 2, 10), sigma=1.0)
    mask, count, g = volume.density_mask(x), torch.zeros(17, 19, 21), torch.Generator().manual_seed(0)
    for _ in range(4000):
        count[tuple(augment.random_centre(x.numpy(), g))] += 1
    assert not count[~mask].any()
    expected = 4000 / int(mask.sum())
    chi_square = float(((count[mask] - expected) ** 2 / expected).sum()) / (int(mask.sum()) - 1)
    assert chi_square == pytest.approx(1, abs=0.25)      # 1 +- sqrt(2 / 700) where uniform
    with pytest.raises(ValueError, match="leave this map out"):
        augment.random_centre(np.zeros((2, 2, 2), np.float32), g, tries=100)


def test_what_a_gpu_finishes_is_what_a_worker_would_have():
    volumes = [one_map(gaussians((20,) * 3, (0, 0, c)).half().float(), str(c)) for c in (1, -3)]
    for settings in (dict(cubic=True), dict(cubic=False), dict(center=True)):
        here, later = (data.MapCrops(volumes, crop=8, crops=2, finished=finished, **settings, **SCALE)
                       for finished in (True, False))
        batch = torch.utils.data.default_collate([later[i] for i in range(3)])
        torch.testing.assert_close(later.finish(*batch), torch.stack([here[i] for i in range(3)]), rtol=0, atol=1e-5)


def test_an_item_is_a_function_of_seed_and_index():
    volumes = [one_map(gaussians((12,) * 3, (0, 0, c)), name) for name, c in (("a", 1), ("b", -3))]
    chains = data_chains.ProceduralChains(seed=4)
    for make in (lambda seed: data.MapCrops(volumes, crop=8, crops=2, seed=seed, **SCALE),
                 lambda seed: data.MapCrops(volumes, crop=8, crops=2, center=True, seed=seed, **SCALE),
                 lambda seed: data.SimulatedCrops(chains, crop=8, crops=2, box=16, seed=seed, **SCALE)):
        first, again, other = make(0), make(0), make(1)
        want = [first[i] for i in (0, 1, 5)]
        for i, item in zip((5, 1, 0), reversed(want)):  # in any order, after any others
            torch.rand(7)
            assert torch.equal(again[i], item)
            assert not torch.equal(other[i], item)
        assert not torch.equal(want[0], want[1])


def test_folders_of_maps_are_read_on_one_grid_and_bad_files_named(tmp_path):
    write(tmp_path, "emd_1.map.gz", 7 * gaussians((20, 20, 20), (0, 0, 0)), voxel_size=3.0)
    write(tmp_path, "emd_2.mrc", gaussians((16, 24, 20), (0, 0, 0)))
    write(tmp_path, "emd_3.mrc", -gaussians((16, 16, 16), (0, 0, 0)))                       # dark protein
    write(tmp_path, "emd_4.ccp4", gaussians((40, 40, 40), (0.5, 0.5, 0.5), sigma=0.3))      # next to nothing
    (tmp_path / "emd_5.mrc").write_bytes((tmp_path / "emd_2.mrc").read_bytes()[:2000])
    (tmp_path / "notes.txt").write_text("not a map")
    volumes, refused = data.read_volumes(tmp_path, 1.5)
    assert [v.label for v in volumes] == ["emd_1", "emd_2"]
    assert [v.density.shape for v in volumes] == [(40, 40, 40), (24, 24, 24)]               # 3 Å -> 1.5 Å; a cube
    top = gaussians((16, 24, 20), (0, 0, 0)).max()
    want = (gaussians((16, 24, 20), (0, 0, 0)) / top).half()
    torch.testing.assert_close(volumes[1].density[4:20, :, 2:22], want, rtol=0, atol=1e-3)
    for name, line in zip(("emd_3.mrc", "emd_4.ccp4", "emd_5.mrc"), refused, strict=True):
        assert name in line and "\n" not in line
    assert "multiply the map by -1" in refused[0] and "hardly any density" in refused[1] and "truncated" in refused[2]

    write(tmp_path, "emd_6.mrc", gaussians((40, 40, 40), (0, 0, 14), sigma=1.5))            # off the middle
    assert "emd_6" in [v.label for v in data.read_volumes(tmp_path, 1.5)[0]]
    assert any("emd_6" in line for line in data.read_volumes(tmp_path, 1.5, box=16)[1])
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        data.read_volumes(tmp_path / "nowhere", 1.5)


# ---- Models ----------------------------------------------------------------------------------------

def structure(xyz, z=6.0, b=0.0, label="a"):
    xyz = np.asarray(xyz, dtype=np.float32)
    return atoms.Structure(label, xyz, np.full(len(xyz), z, np.float32), np.full(len(xyz), b, np.float32))


def moments(density, voxel_size):
    """Sum, centre (z, y, x) and covariance of a density, in Å."""
    n = density.shape[0]
    r = voxel_size * torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64)] * 3, indexing="ij"), -1)
    w = density.double()
    centre = (w[..., None] * r).sum((0, 1, 2)) / w.sum()
    d = (r - centre).flatten(0, 2)
    return w.sum() * voxel_size ** 3, centre, d.T @ (w.flatten()[:, None] * d) / w.sum()


def test_a_simulated_map_holds_the_model_at_a_random_orientation_and_resolution():
    atoms = np.array([[-6.0, 0, 0], [6, 0, 0], [0, 2, 0], [0, -2, 0]])
    model, longest, sizes = structure(atoms, z=8), [], []
    for i in range(20):
        g = torch.Generator().manual_seed(i)
        density = data.random_density(model, g, box=40, voxel_size=1.0, resolution=(3.0, 5.0))
        total, _, covariance = moments(density, 1.0)
        assert float(total) == pytest.approx(4 * 8, rel=1e-3)           # Z/Å^3: the electrons of the nuclei
        values, axes = torch.linalg.eigh(covariance)
        sigma = values - torch.tensor([0, 2.0, 18.0])                   # of the atoms, and s^2 on top of each
        assert float(sigma.max() - sigma.min()) < 0.02
        longest.append(axes[:, 2].abs())
        sizes.append(float(sigma.mean().sqrt()) * math.pi * math.sqrt(2))
    assert 3 <= min(sizes) < 3.5 and 4.5 < max(sizes) <= 5              # sigma = resolution / (pi sqrt 2)
    spread = torch.stack(longest).square().mean(0)                      # uniform: 1/3 each
    torch.testing.assert_close(spread, torch.full((3,), 1 / 3, dtype=spread.dtype), rtol=0, atol=0.2)


def test_half_of_the_simulated_maps_are_blurred_by_their_b_factors():
    model = structure(np.random.default_rng(0).normal(size=(50, 3)))
    model.b_factor[25:] = 200
    sharp, widths = structure(model.xyz), []
    for i in range(40):
        with_b, without = (data.random_density(m, torch.Generator().manual_seed(i), box=32, voxel_size=1.0, resolution=(3, 3))
                           for m in (model, sharp))
        widths.append(float(moments(with_b, 1.0)[2].trace() - moments(without, 1.0)[2].trace()))
    blurred = [w for w in widths if w > 0.01]
    assert 10 <= len(blurred) <= 30
    assert max(blurred) < 1.05 * 3 * 100 / (8 * math.pi ** 2)           # trace of B / 8 pi^2, half of the atoms
    assert max(blurred) > 0.7 * 3 * 100 / (8 * math.pi ** 2)


def test_simulated_crops_are_in_network_scale_and_mostly_in_the_molecule():
    model = structure(np.random.default_rng(0).normal(size=(300, 3)) * 4)
    items = data.SimulatedCrops([model], crop=16, crops=4, box=48, voxel_size=1.5, **SCALE)
    x = torch.cat([items[i] for i in range(10)])[:, 0]
    assert x.min() == pytest.approx(SOLVENT, abs=1e-5) and x.max() == pytest.approx(PEAK, abs=1e-4)
    filled = (x > SOLVENT + 0.1 / 0.13).flatten(1).any(1).float().mean()
    assert 0.75 < filled < 1                             # three in four, and some of the others by chance


# ---- Structures built by rule ----------------------------------------------------------------------

def dihedral(a, b, c, d):
    """IUPAC torsion angles in degrees; positive: seen along b-c, d lies clockwise of a."""
    n_1, n_2 = np.cross(b - a, c - b), np.cross(c - b, d - c)
    y = np.sum(np.cross(n_1, n_2) * (c - b), -1) / np.linalg.norm(c - b, axis=-1)
    return np.degrees(np.arctan2(y, np.sum(n_1 * n_2, -1)))


def angle(a, b, c):
    cosine = np.sum((a - b) * (c - b), -1) / np.linalg.norm(a - b, axis=-1) / np.linalg.norm(c - b, axis=-1)
    return np.degrees(np.arccos(cosine))


def length(a, b):
    return np.linalg.norm(a - b, axis=-1)


def chains(count=12):
    """(N, CA, C, O), each (R, 3), and "HHHCCEE..." of some chains."""
    for i in range(count):
        ca, towards_o, kinds = data_chains.fold(np.random.default_rng(i))
        assert len(kinds) == len(ca) == len(towards_o) + 1
        yield data_chains.backbone(ca, towards_o).transpose(1, 0, 2), kinds[1:-1]


def inside(kinds, kind, width=4):
    """Where `width` residues of one kind begin that are not at the end of an element."""
    return [i for i in range(1, len(kinds) - width - 1) if set(kinds[i - 1:i + width + 1]) == {kind}]


def test_bonds_and_peptides_are_those_of_proteins():
    for (n, ca, c, o), kinds in chains():                # Å; Engh & Huber 1991
        np.testing.assert_allclose(length(n, ca), 1.458, atol=0.02)
        np.testing.assert_allclose(length(ca, c), 1.525, atol=0.002)
        np.testing.assert_allclose(length(c[:-1], n[1:]), 1.329, atol=0.002)
        np.testing.assert_allclose(length(c, o), 1.231, atol=0.002)
        np.testing.assert_allclose(length(ca[:-1], ca[1:]), 3.80, atol=0.002)
        np.testing.assert_allclose(np.abs(dihedral(ca[:-1], c[:-1], n[1:], ca[1:])), 180, atol=0.5)     # trans
        tau = angle(n, ca, c)
        regular = np.array(inside(kinds, "H") + inside(kinds, "E"))
        np.testing.assert_allclose(tau[regular], 111, atol=3)
        assert 80 < tau.min() and np.percentile(tau, 90) < 140 and tau.max() < 175


def test_helices_are_right_handed_with_the_rise_turn_and_hydrogen_bonds_of_alpha_helices():
    seen = 0
    for (n, ca, c, o), kinds in chains():
        i = np.array(inside(kinds, "H", 5), dtype=int)
        seen += len(i)
        np.testing.assert_allclose(length(ca[i], ca[i + 2]), 5.4, atol=0.1)
        np.testing.assert_allclose(length(ca[i], ca[i + 3]), 5.0, atol=0.1)
        np.testing.assert_allclose(length(ca[i], ca[i + 4]), 6.2, atol=0.1)
        np.testing.assert_allclose(dihedral(ca[i], ca[i + 1], ca[i + 2], ca[i + 3]), 50, atol=2)        # right-handed
        np.testing.assert_allclose(dihedral(c[i], n[i + 1], ca[i + 1], c[i + 1]), -57, atol=1)          # phi
        np.testing.assert_allclose(dihedral(n[i], ca[i], c[i], n[i + 1]), -47, atol=1)                  # psi
        np.testing.assert_allclose(length(o[i], n[i + 4]), 2.9, atol=0.25)                              # O...H-N
        # 1.5 Å of rise per residue: along the axis, the cross product of two second differences.
        second = ca[i] - 2 * ca[i + 1] + ca[i + 2], ca[i + 1] - 2 * ca[i + 2] + ca[i + 3]
        axis = data_chains.unit(np.cross(*second))
        np.testing.assert_allclose(np.sum((ca[i + 2] - ca[i + 1]) * axis, -1), 1.5, atol=0.01)
    assert seen > 200


def test_strands_lie_4_8_apart_joined_by_hydrogen_bonds():
    seen, spacings, bonds = 0, [], []
    for (n, ca, c, o), kinds in chains():
        i = np.array(inside(kinds, "E"), dtype=int)
        seen += len(i)
        if not len(i):
            continue
        np.testing.assert_allclose(length(ca[i], ca[i + 2]), 6.6, atol=0.05)                            # 3.3 Å each
        np.testing.assert_allclose(dihedral(c[i], n[i + 1], ca[i + 1], c[i + 1]), -119, atol=1)         # phi
        np.testing.assert_allclose(dihedral(n[i], ca[i], c[i], n[i + 1]), 117, atol=1)                  # psi
        j = np.array([k for k in range(len(kinds) - 1) if kinds[k:k + 2] == "EE"])
        middle, separate = (ca[:-1] + ca[1:]) / 2, np.abs(i[:, None] - j) > 5       # of the pleat
        spacings += list(np.where(separate, length(middle[i][:, None], middle[j]), 99).min(1))
        bonds += list(np.where(separate, length(o[i][:, None], n[j]), 99).min(1))
    assert seen > 100
    assert np.median(spacings) == pytest.approx(4.8, abs=0.15)
    bonded = [b for b in bonds if b < 3.5]               # the edges of a sheet have none outwards
    assert len(bonded) > 0.6 * len(bonds) and np.median(bonded) == pytest.approx(2.9, abs=0.3)


def test_side_chains_make_l_amino_acids_without_overlaps():
    left = right = residues = 0
    for (n, ca, c, o), kinds in chains(6):
        xyz, number = data_chains.side_chains(np.stack([n, ca, c, o], 1), np.random.default_rng(0))
        d = data_chains.distances(xyz, xyz) + 9 * np.eye(len(xyz))
        assert d.min() > 1.1                             # the shortest bond, C=O, has 1.23 Å
        assert np.sort(d, 1)[:, 0].max() < 1.7           # and every atom has a bond
        # CB of an L amino acid from N, CA, C: the formula of ideal tetrahedral geometry (Dunbrack & Karplus 1993).
        b_, c_ = ca - n, c - ca
        a_ = np.cross(b_, c_)
        for sign in (1, -1):
            cb = -0.58273431 * sign * a_ + 0.56802827 * b_ - 0.54067466 * c_ + ca
            found = (data_chains.distances(cb, xyz).min(1) < 0.5).sum()
            left, right = left + found * (sign > 0), right + found * (sign < 0)
        residues += len(ca)
    assert left > 0.85 * residues                        # 7 % are glycines
    assert right < 0.1 * residues


def packing(xyz):
    """Atoms per Å^3 in balls of 8 Å about the atoms of the core, and the radius of gyration in Å."""
    xyz = torch.as_tensor(xyz).double()
    r = (xyz - xyz.mean(0)).norm(dim=1)
    gyration = r.square().mean().sqrt()
    within = (torch.cdist(xyz, xyz[r < 0.6 * gyration]) < 8).double().sum(0)
    return float(within.mean() / (4 / 3 * math.pi * 8 ** 3)), float(gyration)


def test_chains_are_as_big_dense_and_compact_as_proteins():
    models = [data_chains.ProceduralChains()[i] for i in range(24)]
    residues = [len(data_chains.fold(np.random.default_rng((0, i)))[2]) - 2 for i in range(24)]
    density, gyration = np.array([packing(m.xyz) for m in models]).T
    assert min(residues) >= 60 and max(residues) <= 400 and max(residues) > 2 * min(residues)
    np.testing.assert_allclose([len(m.xyz) / n for m, n in zip(models, residues)], 7.6, atol=0.6)
    assert 0.043 < density.mean() < 0.050 and density.min() > 0.036     # 120 experimental ones: 0.046, 0.040 - 0.050
    ratio = gyration / (2.2 * np.array(residues) ** 0.38)               # Å, Skolnick et al. 1997
    assert 0.9 < ratio.mean() < 1.05 and ratio.max() < 1.25
    z = np.concatenate([m.atomic_number for m in models])
    for number, share in ((6, 0.632), (7, 0.168), (8, 0.189), (16, 0.005)):             # experimental ones
        assert (z == number).mean() == pytest.approx(share, abs=0.01)
    for m in models:
        np.testing.assert_allclose(m.xyz.mean(0), 0, atol=1e-3)
        assert m.b_factor.min() >= 0 and m.b_factor.argmax() == np.square(m.xyz).sum(1).argmax()


def test_chains_are_as_dense_as_experimental_structures():
    models = [m for m in atoms.read_structures(oracle("data/models/val.npz")) if 600 < len(m.xyz) < 3000]
    experimental = np.mean([packing(m.xyz)[0] for m in models])
    ours = np.mean([packing(data_chains.ProceduralChains()[i].xyz)[0] for i in range(12)])
    assert ours == pytest.approx(experimental, rel=0.1)


def test_a_chain_is_a_function_of_seed_and_index():
    a, again, other, next_one = (data_chains.ProceduralChains(seed)[i] for seed, i in ((0, 3), (0, 3), (1, 3), (0, 4)))
    np.testing.assert_array_equal(a.xyz, again.xyz)
    np.testing.assert_array_equal(a.atomic_number, again.atomic_number)
    for b in (other, next_one):
        assert a.xyz.shape != b.xyz.shape or not np.allclose(a.xyz, b.xyz)
