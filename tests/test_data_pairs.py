"""data_pairs.py: pairs of an observed and a wanted density."""

import pytest
import torch
from made_maps import GRID, small_chain

import atoms
import augment
import data_pairs
import fsc_model
import mrc


@pytest.fixture(scope="module")
def structure():
    return small_chain()


# ---- Pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task, resolution", [("sharpen", 4.0), ("superres", 1.8)])
def test_the_wanted_map_is_molmap_at_the_same_resolution_or_at_1_8_angstrom(
    structure, task, resolution
):
    xyz, b = torch.from_numpy(structure.xyz), torch.zeros(len(structure.xyz))
    wanted = data_pairs.simulated_pair(
        task, xyz, structure.atomic_number, b, 4.0, torch.Generator().manual_seed(0), **GRID
    )[1]
    torch.testing.assert_close(
        wanted, atoms.molmap(xyz, structure.atomic_number, resolution, **GRID)[0]
    )


def test_both_maps_of_a_pair_are_cut_and_rotated_alike(structure, monkeypatch):
    # Observed and wanted are the same map, so their crops must be equal.
    def same(task, xyz, z, b, resolution, generator, **grid):
        return (atoms.molmap(xyz, z, resolution, **grid)[0],) * 2

    monkeypatch.setattr(data_pairs, "simulated_pair", same)
    pairs = data_pairs.SimulatedPairs(
        [structure], task="sharpen", crop=16, crops=3, box=32, voxel_size=1.0, resolution=(3, 4)
    )
    for i in range(4):
        x = pairs[i]
        assert x.shape == (3, 2, 16, 16, 16) and torch.equal(x[:, 0], x[:, 1])
        assert float(x.min()) >= 0 and float(x.max()) <= 1
        assert all(float(crop.max()) > 0.1 for crop in x)
    assert torch.equal(pairs[0], pairs[0]) and not torch.equal(pairs[0], pairs[1])


def test_half_of_the_crops_are_cut_anywhere():
    pair = torch.zeros(2, 64, 64, 64)
    pair[:, 4:8, 30:34, 50:54] = 1  # cut anywhere, fewer than 1 crop of 16^3 in 60 shows it
    crops = data_pairs.pair_crops(pair, 16, 400, torch.Generator().manual_seed(0))
    assert 170 < sum(float(x.max()) > 0 for x in crops) < 235


def test_crops_of_a_pair_are_turned(structure, monkeypatch):
    ramp = torch.arange(1.0, 33.0)[:, None, None].expand(32, 32, 32)  # along z
    monkeypatch.setattr(data_pairs, "simulated_pair", lambda *args, **grid: (ramp, ramp))
    settings = dict(crop=16, crops=4, box=32, voxel_size=4.0, resolution=(8, 9))
    pairs = data_pairs.SimulatedPairs([structure], task="sharpen", **settings)
    slopes = torch.cat([pairs[i] for i in range(4)]).diff(dim=2)  # (16 crops, 2, 15, 16, 16)
    # A crop that was turned by 90 degrees is flat along z.
    assert 0 in slopes.sum((1, 2, 3, 4)).sign().tolist()


def test_crops_come_in_all_48_orientations_of_a_cube():
    x = torch.arange(8.0).view(2, 2, 2)
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(augment.mirror_or_not(x, generator).flatten().tolist()) for _ in range(600)}
    assert len(seen) == 48
    for values in seen:
        assert sorted(values) == list(range(8))
        # Neighbours stay neighbours, so 0 and 7 lie on a diagonal.
        corners = torch.tensor(values).view(2, 2, 2)
        zero = (corners == 0).nonzero()[0]
        seven = (corners == 7).nonzero()[0]
        assert (zero - seven).abs().sum() == 3


def write_pdb(path, xyz, shift):
    """Atoms in the PDB's columns, carbon and oxygen in turn."""
    lines = []
    for i, (x, y, z) in enumerate((xyz + shift).tolist()):
        element = "CO"[i % 2]
        atom = f"ATOM  {i + 1:5d}  {element}   ALA A{i // 5 + 1:4d}"
        lines.append(f"{atom}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00           {element}")
    path.write_text("\n".join(lines) + "\nEND\n")


@pytest.fixture
def folder(tmp_path):
    """A map that is molmap of its model at 4 Å, off the origin; and the list of pairs."""
    xyz = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) * 20
    write_pdb(tmp_path / "a.pdb", xyz, torch.tensor([100.0, -20.0, 7.0]))
    model = atoms.read_model(tmp_path / "a.pdb")
    density, voxel_size, origin = atoms.molmap(
        model.xyz, model.atomic_number, 4.0, voxel_size=1.0, shape=(50, 45, 40)
    )
    mrc.write_map(tmp_path / "a.mrc", mrc.Map(density, voxel_size, origin))
    (tmp_path / "pairs.csv").write_text("map,model,resolution\na.mrc,a.pdb,4.0\n")
    return tmp_path


def test_real_pairs_lie_on_one_grid_and_in_one_frame(folder):
    (pair,) = data_pairs.read_pairs(folder, "sharpen", 1.0)
    assert pair.label == "a" and pair.maps.shape == (2, 50, 45, 40)
    torch.testing.assert_close(pair.maps[0], pair.maps[1], rtol=0, atol=1e-3)  # float16
    crops = data_pairs.MapPairs([pair], crop=48, crops=2)[3]  # larger than the map on two sides
    assert crops.shape == (2, 2, 48, 48, 48)
    torch.testing.assert_close(crops[:, 0], crops[:, 1], rtol=0, atol=1e-3)


def test_real_pairs_are_resampled_and_superres_wants_a_finer_map(folder):
    (pair,) = data_pairs.read_pairs(folder, "sharpen", 1.25)
    assert pair.maps.shape == (2, 40, 36, 32)
    assert fsc_model.correlation(*pair.maps.float()) > 0.99
    (pair,) = data_pairs.read_pairs(folder, "superres", 1.0)
    assert fsc_model.correlation(*pair.maps.float()) < 0.8


def test_a_pair_whose_voxels_are_too_coarse_is_left_out(folder):
    # 1 Å voxels are enough for 0.5 Å per voxel, but not for 0.4: the network would learn the blur.
    assert data_pairs.read_pairs(folder, "sharpen", 0.5)
    with pytest.raises(ValueError, match="hold none of the detail of 0.4 Å per voxel"):
        data_pairs.read_pair(folder / "a.mrc", folder / "a.pdb", "sharpen", 4.0, 0.4)


@pytest.mark.parametrize(
    "table, message",
    [
        ("map,model\na.mrc,a.pdb\n", "wants the columns map, model, resolution"),
        ("map,model,resolution\na.mrc,a.pdb,fine\n", "wants the columns .* 'fine'"),
        ("map,model,resolution\na.mrc,b.pdb,4.0\n", "b.pdb"),
        ("map,model,resolution\na.mrc,far.pdb,4.0\n", "far.pdb: none of its atoms lies in .*a.mrc"),
    ],
)
def test_a_bad_list_of_pairs_is_one_clear_line(folder, table, message):
    write_pdb(folder / "far.pdb", torch.zeros(3, 3), 900.0)
    (folder / "pairs.csv").write_text(table)
    with pytest.raises((ValueError, OSError), match=message) as error:
        data_pairs.read_pairs(folder, "sharpen", 1.0)
    assert "\n" not in str(error.value)


def test_a_list_with_a_byte_order_mark_is_read(folder):
    content = (folder / "pairs.csv").read_bytes().replace(b"\n", b"\r\n")
    (folder / "pairs.csv").write_bytes(b"\xef\xbb\xbf" + content)
    assert len(data_pairs.read_pairs(folder, "sharpen", 1.0)) == 1


def test_a_pair_that_cannot_be_read_is_skipped_by_name(folder):
    (folder / "cut.mrc").write_bytes((folder / "a.mrc").read_bytes()[:5000])
    rows = "cut.mrc,a.pdb,4.0\na.mrc,a.pdb,4.0\na.mrc,none.pdb,4.0\n"
    (folder / "pairs.csv").write_text("map,model,resolution\n" + rows)
    said = []
    pairs = data_pairs.read_pairs(folder, "sharpen", 1.0, said.append)
    assert [pair.label for pair in pairs] == ["a"]
    assert "cut.mrc: truncated" in said[0] and "none.pdb: no such file" in said[1]
    assert said[2].endswith("pairs.csv: 2 pairs skipped, 1 read")


def test_alternate_locations_do_not_count_twice_in_a_pair(folder):
    (plain,) = data_pairs.read_pairs(folder, "sharpen", 1.0)
    lines = (folder / "a.pdb").read_text().splitlines()[:-1]
    halves = [
        f"{line[:16]}{letter}{line[17:54]}  0.50{line[60:]}" for line in lines for letter in "AB"
    ]
    # The first 30 atoms twice at half occupancy, the others once at full occupancy.
    (folder / "a.pdb").write_text("\n".join(halves[:60] + lines[30:]))
    (pair,) = data_pairs.read_pairs(folder, "sharpen", 1.0)
    torch.testing.assert_close(pair.maps[1], plain.maps[1], rtol=0, atol=1e-3)  # float16
