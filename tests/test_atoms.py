"""The promises of atoms.py: molmap, PDB and mmCIF files, archives of structures."""

import gzip
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from atoms import atoms_inside, molmap, read_model, read_structures

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
    given = molmap(
        *model,
        voxel_size=f["grid_step_xyz"][::-1].copy(),
        shape=f["grid_map_cut5"].shape,
        origin=f["grid_origin_xyz"][::-1].copy(),
    )[0]
    for ours, name in ((density, "map_cut5"), (uncut, "map_nocut"), (given, "grid_map_cut5")):
        assert ours.dtype == torch.float32 and ours.shape == f[name].shape
        assert np.abs(ours.numpy() - f[name]).max() < 1e-6 * f[name].max()
    assert float(uncut.sum() * f["step"] ** 3) == pytest.approx(f["atomic_number"].sum(), rel=1e-4)


def slow_molmap(xyz, weight, b, resolution, step, origin, shape, cutoff):
    """(1) atom by atom, float64, on a grid whose triples are z, y, x."""
    rho = np.zeros(shape)
    axes = [o + np.arange(n) * h for o, n, h in zip(origin, shape, step)]
    for (x, y, z), w, B in zip(xyz, weight, b):
        s2 = (resolution / (np.pi * np.sqrt(2))) ** 2 + B / (8 * np.pi**2)
        d = np.meshgrid(axes[0] - z, axes[1] - y, axes[2] - x, indexing="ij")
        box = np.all([np.abs(a) <= cutoff * np.sqrt(s2) for a in d], axis=0)
        rho += box * w * (2 * np.pi * s2) ** -1.5 * np.exp(-sum(a**2 for a in d) / (2 * s2))
    return rho


@pytest.mark.parametrize("cutoff", [5.0, 1.5])  # 1.5: the edge of the box is a step of 30 %
def test_molmap_equals_the_sum_over_atoms_with_b_factors_inside_around_and_outside_the_grid(cutoff):
    r = np.random.default_rng(1)
    shape, step, origin = (21, 10, 17), (1.1, 1.6, 0.9), (100.0, -20.0, 3.0)
    xyz = r.uniform(-12, 30, (60, 3)) + np.array(origin)[::-1]
    weight, b = r.uniform(1, 16, 60), r.choice([0.0, 30.0, 400.0], 60)
    ours = molmap(
        xyz, weight, 3.1, voxel_size=step, shape=shape, origin=origin, b_factor=b, cutoff=cutoff
    )[0]
    slow = slow_molmap(xyz, weight, b, 3.1, step, origin, shape, cutoff)
    assert np.abs(ours.numpy() - slow).max() < 4e-6 * slow.max()  # float32 distances of up to 20 Å


def test_molmap_gradients_equal_central_differences():
    xyz = torch.tensor([[1.0, 2.0, 3.2], [3.1, 2.4, 1.5]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([10.0, 90.0], requires_grad=True)
    grid = dict(voxel_size=1.0, shape=(6, 5, 7), origin=(0.0, 0.0, 0.0))
    c = torch.randn(6, 5, 7, generator=rng())
    (molmap(xyz, [6, 8], 3.0, b_factor=b, **grid)[0] * c).sum().backward()

    def value(xyz, b):
        slow = slow_molmap(xyz, (6, 8), b, 3.0, (1, 1, 1), (0, 0, 0), (6, 5, 7), 5.0)
        return (slow * c.numpy()).sum()

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
    grid = {"voxel_size": 1.5, "shape": (8, 8, 8), "origin": 0.0}
    assert molmap([[500.0, 0, 0]], [6], 3.0, **grid)[0].eq(0).all()


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


def test_atoms_inside_lie_between_the_first_and_the_last_voxel():
    # Voxels 0, 2, 4 Å along z from 10 Å; 0 .. 3 Å along y from 20 Å; 0 .. 6 Å along x from 30 Å.
    xyz = torch.tensor([[30, 20, 10], [36, 23, 14], [36.1, 23, 14], [36, 19.9, 14], [14, 23, 36]])
    inside = atoms_inside(xyz.double(), (3, 4, 5), (2.0, 1.0, 1.5), (10.0, 20.0, 30.0))
    assert inside.tolist() == [True, True, False, False, False]


# ---- Files

PDB = """\
CRYST1   10.000   10.000   10.000  90.00  90.00  90.00 P 1
MODEL        1
ATOM      1  N   ALA A   1      -1.500   2.250 100.125  1.00 20.00           N
ATOM      2  CA AALA A   1       0.000   0.500   1.000  0.60 30.50           C
ATOM      3  CA BALA A   1       0.100   0.500   1.000  0.40 31.00           C
ATOM      4 HG11 ALA A   1       3.000   3.000   3.000  1.00 10.00
ATOM      5  SG  CYS A   1A      4.000   4.000   4.000  1.00 12.00
HETATM    6 CA    CA B   2       5.000   5.000   5.000  0.50 40.00          CA
TER
ENDMDL
MODEL        2
ATOM      1  N   ALA A   1       9.000   9.000   9.000  1.00 20.00           N
ENDMDL
"""


def test_a_pdb_file_is_read_by_its_columns(tmp_path):
    (tmp_path / "m.pdb").write_text(PDB)
    with gzip.open(tmp_path / "m.pdb.gz", "wt") as file:
        file.write(PDB)
    for name in ("m.pdb", "m.pdb.gz"):
        model = read_model(tmp_path / name)
        assert len(model.xyz) == 6  # the first model only
        assert model.xyz[0].tolist() == [-1.5, 2.25, 100.125]
        assert model.atomic_number.tolist() == [7, 6, 6, 1, 16, 20]  # columns 77-78, or the name's
        assert model.b_iso.tolist() == [20, 30.5, 31, 10, 12, 40]
        assert model.occupancy.tolist() == [1, 0.6, 0.4, 1, 1, 0.5]
        assert model.labels == ["A/1/ALA", "A/1A/CYS", "B/2/CA"]
        assert model.residue.tolist() == [0, 0, 0, 0, 1, 2]


def test_mmcif_gives_the_model_of_the_same_pdb_file(tmp_path):
    gemmi = pytest.importorskip("gemmi", reason="reading mmCIF needs gemmi")
    (tmp_path / "m.pdb").write_text(PDB)
    document = gemmi.read_structure(str(tmp_path / "m.pdb")).make_mmcif_document()
    document.write_file(str(tmp_path / "m.cif"))
    pdb, cif = read_model(tmp_path / "m.pdb"), read_model(tmp_path / "m.cif")
    assert pdb.labels == cif.labels
    for ours, gemmis in zip(pdb[:5], cif[:5]):
        torch.testing.assert_close(ours, gemmis)  # gemmi reads occupancies as float32


def test_models_that_cannot_be_read_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty.pdb").write_text("REMARK nothing\n")
    only_unknown = PDB.splitlines()[2].removesuffix(" N") + "XX\n"
    (tmp_path / "odd.pdb").write_text(only_unknown)
    (tmp_path / "bad.pdb").write_text(PDB.replace("2.250", " ****"))
    (tmp_path / "m.cif").write_text("data_x\n")
    monkeypatch.setitem(sys.modules, "gemmi", None)
    for name, message in (
        ("empty.pdb", "no atoms"),
        ("odd.pdb", "no atoms of known elements; .*1 XX"),
        ("bad.pdb", "bad.pdb: could not read line 3 .*[*]{4}"),
        ("m.cif", "pip install gemmi"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path / name)
    with pytest.raises(OSError, match="no such file"):
        read_model(tmp_path / "none.pdb")


def test_archives_and_pdb_files_hold_the_same_structures(tmp_path):
    xyz = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9.25], [-1, 0, 1]])
    np.savez(
        tmp_path / "a.npz",
        label=["one", "two"],
        atom_start=[0, 3, 4],
        xyz=np.int16(100 * xyz),
        element=np.uint8([6, 7, 8, 16]),
        bfactor=np.uint8([1, 2, 3, 4]),
    )
    one, two = read_structures(tmp_path / "a.npz")
    assert (one.label, two.label) == ("one", "two") and two.atomic_number.tolist() == [16]
    np.testing.assert_allclose(one.xyz, xyz[:3], atol=1e-6)
    lines = []
    for i, (e, (x, y, z)) in enumerate(zip("CNO", xyz), 1):
        atom = f"ATOM  {i:5d}  {e:<3} ALA A{i:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
        lines.append(f"{atom}  1.00{i:6.2f}          {e:>2}")
    (tmp_path / "one.pdb").write_text("\n".join(lines))
    (tmp_path / "notes.txt").write_text("not a model")
    (tmp_path / "other").mkdir()
    for name in ("3.2A.pdb", "3.4A.PDB"):  # two models, not one called 3
        (tmp_path / "other" / name).write_text("\n".join(lines))
    assert [model.label for model in read_structures(tmp_path / "other")] == ["3.2A", "3.4A"]
    *archived, read = read_structures(tmp_path)  # a folder: all archives and models in it
    assert [model.label for model in archived] == ["one", "two"]
    (again,) = read_structures(tmp_path / "one.pdb")
    for model in (read, again):
        assert model.label == "one"
        np.testing.assert_allclose(model.xyz, xyz[:3] - xyz[:3].mean(0), atol=1e-5)
        assert model.atomic_number.tolist() == one.atomic_number.tolist()
        assert model.b_factor.tolist() == one.b_factor.tolist()


def test_files_that_are_no_archives_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, label=["a"], xyz=np.zeros((1, 3)))
    message = "a.npz: no archive of structures, atom_start, bfactor, element missing"
    with pytest.raises(ValueError, match=message):
        read_structures(path)
    truncated = path.read_bytes()[:-20]
    for content in (b"", b"junk", truncated):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="a.npz: not an .npz archive, or a truncated or damaged one"
        ):
            read_structures(path)
    with pytest.raises(FileNotFoundError, match="none.npz: no such file"):
        read_structures(tmp_path / "none.npz")


def test_a_damaged_bit_of_an_archive_is_one_line_or_does_not_matter(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"xyz": np.int16([[1, 2, 3], [4, 5, 6]]), "element": np.uint8([6, 7])}
    np.savez_compressed(path, label=["a"], atom_start=[0, 2], bfactor=np.uint8([8, 9]), **arrays)
    content = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(content), 7):  # all bits, one in seven
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            (structure,) = read_structures(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert structure.xyz.tolist() == (np.float32(arrays["xyz"]) / 100).tolist()
    assert refused > 300


def test_arrays_of_an_archive_that_do_not_fit_together_are_refused(tmp_path):
    good = dict(label=["a", "b"], atom_start=[0, 1, 2], xyz=np.zeros((2, 3)))
    good |= dict(element=[6, 7], bfactor=[0, 0])
    for bad in (dict(atom_start=[0, 1]), dict(atom_start=[0, 1, 3]), dict(element=[6])):
        np.savez(tmp_path / "a.npz", **good | bad)
        with pytest.raises(ValueError, match="arrays do not fit together"):
            read_structures(tmp_path / "a.npz")


@pytest.mark.parametrize("kind", ["c8", "U5", "?"])
def test_an_archive_whose_coordinates_are_no_real_numbers_is_refused(tmp_path, kind):
    fields = dict(label=["a"], atom_start=[0, 2], element=[6, 6], bfactor=[9, 9])
    np.savez(tmp_path / "a.npz", xyz=np.zeros((2, 3)).astype(kind), **fields)
    with pytest.raises(ValueError, match="other than real numbers"):
        read_structures(tmp_path / "a.npz")


# ---- What training sees


def pdb_atom(name, element, x, *, alternate=" ", occupancy=1.0):
    start = f"ATOM      1  {name:<3}{alternate}ALA A   1    {x:8.3f}{0:8.3f}{0:8.3f}"
    return f"{start}{occupancy:6.2f}{20:6.2f}          {element:>2}\n"


def test_alternate_locations_and_occupancies_count_each_atom_once(tmp_path):
    plain = [pdb_atom("N", "N", 0), pdb_atom("CA", "C", 1.5), pdb_atom("O", "O", 2.5)]
    halves = [
        pdb_atom(name, element, x, alternate=letter, occupancy=0.5)
        for name, element, x in (("N", "N", 0), ("CA", "C", 1.5), ("O", "O", 2.5))
        for letter in "AB"
    ]
    partial = [*plain[:2], pdb_atom("O", "O", 2.5, occupancy=0.25)]
    electrons = []
    for name, lines in (("plain", plain), ("halves", halves), ("partial", partial)):
        (tmp_path / f"{name}.pdb").write_text("".join(lines))
        said = []
        (structure,) = read_structures(tmp_path / f"{name}.pdb", said.append)
        electrons.append(structure.atomic_number.tolist())
        assert any("3 alternate locations are left out" in line for line in said) == (
            name == "halves"
        )
    assert electrons == [[7, 6, 8], [7, 6, 8], [7, 6, 2]]
    assert len(read_model(tmp_path / "halves.pdb").xyz) == 6  # a comparison keeps all


def test_unknown_elements_are_counted_named_and_left_out(tmp_path):
    lines = [pdb_atom("CA", "C", 0), pdb_atom("X1", "X", 1), pdb_atom("X2", "X", 2)]
    (tmp_path / "a.pdb").write_text("".join(lines))
    model = read_model(tmp_path / "a.pdb")
    assert model.atomic_number.tolist() == [6]
    assert model.notes == ("atoms of unknown elements are left out: 2 X",)


def test_a_model_without_occupancy_is_refused(tmp_path):
    (tmp_path / "a.pdb").write_text(pdb_atom("CA", "C", 0, occupancy=0))
    for read in (read_model, read_structures):
        with pytest.raises(ValueError, match="a.pdb: all 1 atoms have occupancy 0"):
            read(tmp_path / "a.pdb")


def test_one_bad_model_of_a_large_folder_is_skipped_and_more_than_1_percent_stop(tmp_path):
    for i in range(120):
        (tmp_path / f"{i:03}.pdb").write_text(pdb_atom("CA", "C", 0))
    (tmp_path / "005.pdb").write_text(pdb_atom("CA", "C", math.nan))
    said = []
    assert len(read_structures(tmp_path, said.append)) == 119
    assert "005.pdb: atom CA of residue A/1/ALA has position" in said[0]
    assert said[1].endswith("1 of 120 models skipped")
    (tmp_path / "006.pdb").write_text("")
    with pytest.raises(ValueError, match="2 of 120 models cannot be used, more than 1 %.*005.pdb"):
        read_structures(tmp_path, said.append)
