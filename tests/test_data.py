"""data.py: crops of maps, and crops of densities that are simulated from models."""

import math

import numpy as np
import pytest
import torch

import atoms
import augment
import data
import data_chains
import data_deposited
import mrc
import volume

PEAK, SOLVENT = (1 - 0.05) / 0.13, -0.05 / 0.13  # 1 and 0 in network scale
SCALE = dict(mean=0.05, std=0.13)


# ---- Maps ------------------------------------------------------------------------------------


def gaussians(shape, *centres, sigma=2.0):
    """Sum of Gaussians of height 1 about centres (z, y, x) in voxels from the middle of the box."""
    grid = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    return sum(
        torch.exp(-sum((a - c) ** 2 for a, c in zip(grid, centre)) / (2 * sigma**2))
        for centre in centres
    )


def write(folder, name, density, voxel_size=1.5):
    mrc.write_map(folder / name, mrc.Map(density, voxel_size))


def one_map(density, label="a"):
    return data.Volume(label, density / density.max())


@pytest.mark.parametrize("cubic, atol", [(False, 0.12), (True, 0.01)])
def test_random_crops_show_the_map_around_a_voxel_of_the_molecule(cubic, atol):
    # A round blob looks the same at every orientation, so a crop must be the blob, shifted.
    box, crop, sigma = 21, 16, 2.0  # odd: the blob's top is a voxel
    items = data.MapCrops(
        [one_map(gaussians((box,) * 3, (0, 0, 0), sigma=sigma))],
        crop=crop,
        crops=2,
        cubic=cubic,
        **SCALE,
    )
    offsets = []
    for x in torch.cat([items[i] for i in range(12)])[:, 0]:
        assert x.shape == (crop,) * 3
        value = x * 0.13 + 0.05  # back on 0..1
        weight = (value - 0.3).clamp(min=0) ** 2
        if weight.sum() == 0:
            continue
        axes = [weight.sum([d for d in range(3) if d != axis]) for axis in range(3)]
        centre = [float((w * torch.arange(crop)).sum() / w.sum()) - (crop - 1) / 2 for w in axes]
        if max(map(abs, centre)) > 5:  # the blob is cut: no centre of mass
            continue
        want = gaussians((crop,) * 3, centre, sigma=sigma)
        # Trilinear interpolation flattens a top by (h^2 / 8) f'' per axis at most; splines hardly.
        torch.testing.assert_close(value, want, rtol=0, atol=atol)
        offsets.append(math.hypot(*centre))
    # The crop's centre lies in the mask: 4.3 voxels (density > 0.1), and 3 more along each axis.
    assert len(offsets) > 5 and max(offsets) <= 4.3 + 3 * 3**0.5 and np.ptp(offsets) > 1


def test_crops_beyond_a_map_are_filled_up_with_solvent():
    items = data.MapCrops([one_map(gaussians((9, 9, 9), (0, 0, 0)))], crop=16, crops=4, **SCALE)
    for x in items[0][:, 0]:
        assert x.max() < PEAK + 1e-5 and x.min() == pytest.approx(SOLVENT)
        assert int((x > SOLVENT + 1e-6).sum()) <= 11**3


@pytest.mark.parametrize("box, crop", [(15, 24), (40, 24)])  # padded, cropped
def test_centre_crops_are_the_middle_of_the_map_in_every_orientation(box, crop):
    far = (0.0, 3.0, 4.0)  # 5 voxels from the middle
    one = one_map(gaussians((box,) * 3, far, sigma=1.2))
    items, directions = data.MapCrops([one], crop=crop, crops=2, center=True, **SCALE), []
    for x in torch.cat([items[i] for i in range(8)])[:, 0]:
        assert (
            x.shape == (crop,) * 3 and x.max() <= PEAK + 1e-5 and x.min() == pytest.approx(SOLVENT)
        )
        weight = (x - SOLVENT).clamp(min=0)
        # Voxel box // 2 came to crop // 2 and then all turned about (crop - 1) / 2.
        shift = (box - 1) / 2 - box // 2 + crop // 2 - (crop - 1) / 2
        grid = torch.meshgrid(*[torch.arange(crop) - (crop - 1) / 2] * 3, indexing="ij")
        directions.append(torch.stack([(weight * a).sum() / weight.sum() for a in grid]))
    directions = torch.stack(directions)
    want = math.hypot(*(c + shift for c in far))
    torch.testing.assert_close(directions.norm(dim=1), torch.full((16,), want), rtol=0, atol=0.1)
    assert (directions / want).mean(0).norm() < 0.6  # of 16 uniform directions: 0.25 +- 0.1


@pytest.mark.parametrize(
    "augmentation, orientations", [("center", 1), ("random", 1), ("rot24", 24)]
)
def test_an_augmentation_without_interpolation_gives_its_orientations(augmentation, orientations):
    # The slopes of a ramp along z, y, x tell how a crop was turned, its values where it was cut.
    box = 17
    z, y, x = torch.meshgrid(*[torch.arange(box, dtype=torch.float32)] * 3, indexing="ij")
    step = 0.8 / (21 * (box - 1))
    ramp = 0.2 + (z + 4 * y + 16 * x) * step
    settings = dict(crop=2, crops=20, augmentation=augmentation, mean=0.0, std=1.0)
    items = data.MapCrops([one_map(ramp)], **settings)
    crops = torch.cat([items[i] for i in range(20)])[:, 0]
    inside = crops[crops.flatten(1).amin(1) > 0]
    first = inside[:, 0, 0, 0]
    ends = (inside[:, 1, 0, 0], inside[:, 0, 1, 0], inside[:, 0, 0, 1])
    slopes = torch.stack([(end - first) / step for end in ends], 1).round().int()
    found = {tuple(row) for row in slopes.tolist()}
    assert len(found) == orientations and (1, 4, 16) in found
    assert all(sorted(abs(s) for s in slope) == [1, 4, 16] for slope in found)
    places = len(inside.mean((1, 2, 3)).mul(1e4).round().unique())
    assert places == 1 if augmentation == "center" else places > 100


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="augmentation 'rot48': choose center, random, rot24, so3"):
        data.MapCrops([], crop=8, crops=1, augmentation="rot48", **SCALE)


def test_random_centres_are_uniform_over_the_density_mask():
    x = gaussians((17, 19, 21), (4, 0, 0), (-8, 2, 10), sigma=1.0)
    mask, count, g = (
        volume.density_mask(x),
        torch.zeros(17, 19, 21),
        torch.Generator().manual_seed(0),
    )
    for _ in range(4000):
        count[tuple(augment.random_centre(x.numpy(), g))] += 1
    assert not count[~mask].any()
    expected = 4000 / int(mask.sum())
    chi_square = float(((count[mask] - expected) ** 2 / expected).sum()) / (int(mask.sum()) - 1)
    assert chi_square == pytest.approx(1, abs=0.25)  # 1 +- sqrt(2 / 700) where uniform
    with pytest.raises(ValueError, match="leave this map out"):
        augment.random_centre(np.zeros((2, 2, 2), np.float32), g, tries=100)


@pytest.mark.parametrize("settings", [dict(cubic=True), dict(cubic=False), dict(center=True)])
def test_rotating_a_batch_later_gives_the_same_crops(settings):
    volumes = [one_map(gaussians((20,) * 3, (0, 0, c)).half().float(), str(c)) for c in (1, -3)]
    settings = dict(crop=8, crops=2, **settings, **SCALE)
    now = data.MapCrops(volumes, **settings)
    later = data.MapCrops(volumes, rotate_later=True, **settings)
    batch = torch.utils.data.default_collate([later[i] for i in range(3)])
    want = torch.stack([now[i] for i in range(3)])
    torch.testing.assert_close(later.rotate_windows(*batch), want, rtol=0, atol=1e-5)


def test_an_item_depends_on_seed_and_index_alone():
    volumes = [one_map(gaussians((12,) * 3, (0, 0, c)), name) for name, c in (("a", 1), ("b", -3))]
    chains = data_chains.ProceduralChains(seed=4)
    for make in (
        lambda seed: data.MapCrops(volumes, crop=8, crops=2, seed=seed, **SCALE),
        lambda seed: data.MapCrops(volumes, crop=8, crops=2, center=True, seed=seed, **SCALE),
        lambda seed: data.SimulatedCrops(chains, crop=8, crops=2, box=16, seed=seed, **SCALE),
    ):
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
    write(tmp_path, "emd_3.mrc", -gaussians((16, 16, 16), (0, 0, 0)))  # dark protein
    hardly_any = gaussians((40, 40, 40), (0.5, 0.5, 0.5), sigma=0.3)
    write(tmp_path, "emd_4.ccp4", hardly_any)
    (tmp_path / "emd_5.mrc").write_bytes((tmp_path / "emd_2.mrc").read_bytes()[:2000])
    write(tmp_path, "emd_6.mrc", gaussians((16, 16, 16), (0, 0, 0)), voxel_size=3.54)
    (tmp_path / "notes.txt").write_text("not a map")
    volumes, refused = data.read_volumes(tmp_path, 1.5)
    assert [v.label for v in volumes] == ["emd_1", "emd_2", "emd_3"]
    # The first was resampled from 3 to 1.5 Å, the second padded to a cube.
    assert [v.density.shape for v in volumes] == [(40, 40, 40), (24, 24, 24), (16, 16, 16)]
    top = gaussians((16, 24, 20), (0, 0, 0)).max()
    want = (gaussians((16, 24, 20), (0, 0, 0)) / top).half()
    torch.testing.assert_close(volumes[1].density[4:20, :, 2:22], want, rtol=0, atol=1e-3)
    want = gaussians((16, 16, 16), (0, 0, 0))
    torch.testing.assert_close(volumes[2].density, (want / want.max()).half(), rtol=0, atol=1e-3)
    assert volumes[2].notes == ("protein is dark: inverted",)
    for name, line in zip(("emd_4.ccp4", "emd_5.mrc", "emd_6.mrc"), refused, strict=True):
        assert name in line and "\n" not in line
    assert "hardly any density" in refused[0]
    assert "truncated" in refused[1]
    assert "voxels of 3.54 Å hold none of the detail" in refused[2]


def test_centre_crops_need_density_in_the_middle(tmp_path):
    write(tmp_path, "emd_6.mrc", gaussians((40, 40, 40), (0, 0, 14), sigma=1.5))  # off the middle
    assert "emd_6" in [v.label for v in data.read_volumes(tmp_path, 1.5)[0]]
    assert any("emd_6" in line for line in data.read_volumes(tmp_path, 1.5, box=16)[1])


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        data.read_volumes(tmp_path / "nowhere", 1.5)


# ---- Models ----------------------------------------------------------------------------------


def structure(xyz, z=6.0, b=0.0, label="a"):
    xyz = np.asarray(xyz, dtype=np.float32)
    return atoms.Structure(
        label, xyz, np.full(len(xyz), z, np.float32), np.full(len(xyz), b, np.float32)
    )


def moments(density, voxel_size):
    """Sum, centre (z, y, x) and covariance of a density, in Å."""
    n = density.shape[0]
    r = voxel_size * torch.stack(
        torch.meshgrid(*[torch.arange(n, dtype=torch.float64)] * 3, indexing="ij"), -1
    )
    w = density.double()
    centre = (w[..., None] * r).sum((0, 1, 2)) / w.sum()
    d = (r - centre).flatten(0, 2)
    return w.sum() * voxel_size**3, centre, d.T @ (w.flatten()[:, None] * d) / w.sum()


def test_a_simulated_map_holds_the_model_at_a_random_orientation_and_resolution():
    atoms = np.array([[-6.0, 0, 0], [6, 0, 0], [0, 2, 0], [0, -2, 0]])
    model, longest, sizes = structure(atoms, z=8), [], []
    for i in range(20):
        g = torch.Generator().manual_seed(i)
        density = data_deposited.random_density(
            model, g, box=40, voxel_size=1.0, resolution=(3.0, 5.0)
        )
        total, _, covariance = moments(density, 1.0)
        assert float(total) == pytest.approx(4 * 8, rel=1e-3)  # Z/Å^3: the electrons of the nuclei
        values, axes = torch.linalg.eigh(covariance)
        sigma = values - torch.tensor([0, 2.0, 18.0])  # of the atoms, and s^2 on top of each
        assert float(sigma.max() - sigma.min()) < 0.02
        longest.append(axes[:, 2].abs())
        sizes.append(float(sigma.mean().sqrt()) * math.pi * math.sqrt(2))
    assert 3 <= min(sizes) < 3.5 and 4.5 < max(sizes) <= 5  # sigma = resolution / (pi sqrt 2)
    spread = torch.stack(longest).square().mean(0)  # uniform: 1/3 each
    torch.testing.assert_close(
        spread, torch.full((3,), 1 / 3, dtype=spread.dtype), rtol=0, atol=0.2
    )


def test_the_share_of_maps_that_look_deposited_is_as_asked(monkeypatch):
    marked = torch.full((8, 8, 8), -1.0)
    given = []

    def deposited(xyz, z, resolution, *, noisy, **settings):
        given.append(noisy)
        return marked

    monkeypatch.setattr(data_deposited, "deposited", deposited)
    model = structure(np.zeros((1, 3)))
    settings = dict(box=8, voxel_size=1.0, resolution=(3.0, 5.0))

    def share(wanted):
        maps = [
            data_deposited.random_density(
                model, torch.Generator().manual_seed(i), as_deposited=wanted, **settings
            )
            for i in range(200)
        ]
        return sum(x is marked for x in maps) / len(maps)

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0.2 < share(0.3) < 0.4
    assert given and not any(given)  # a prior learns maps without noise


def test_half_of_the_simulated_maps_are_blurred_by_their_b_factors():
    model = structure(np.random.default_rng(0).normal(size=(50, 3)))
    model.b_factor[25:] = 200
    sharp, widths = structure(model.xyz), []
    for i in range(40):
        with_b, without = (
            data_deposited.random_density(
                m, torch.Generator().manual_seed(i), box=32, voxel_size=1.0, resolution=(3, 3)
            )
            for m in (model, sharp)
        )
        widths.append(float(moments(with_b, 1.0)[2].trace() - moments(without, 1.0)[2].trace()))
    blurred = [w for w in widths if w > 0.01]
    assert 10 <= len(blurred) <= 30
    assert max(blurred) < 1.05 * 3 * 100 / (
        8 * math.pi**2
    )  # trace of B / 8 pi^2, half of the atoms
    assert max(blurred) > 0.7 * 3 * 100 / (8 * math.pi**2)


def test_simulated_crops_are_in_network_scale_and_mostly_in_the_molecule():
    model = structure(np.random.default_rng(0).normal(size=(300, 3)) * 4)
    items = data.SimulatedCrops([model], crop=16, crops=4, box=48, voxel_size=1.5, **SCALE)
    x = torch.cat([items[i] for i in range(10)])[:, 0]
    assert x.min() == pytest.approx(SOLVENT, abs=1e-5) and x.max() == pytest.approx(PEAK, abs=1e-4)
    filled = (x > SOLVENT + 0.1 / 0.13).flatten(1).any(1).float().mean()
    assert 0.75 < filled < 1  # three in four, and some of the others by chance
