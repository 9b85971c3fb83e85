"""What fsc.py promises about maps and atomic models: Phenix's and MapQ's numbers, and the files they come from."""
import csv
import gzip
import json
import math
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from atoms import ATOMIC_NUMBER, read_model
from fsc_model import (
    atom_radius,
    cc_per_residue,
    correlation,
    map_model_cc,
    map_model_resolution,
    model_map,
    molecular_mask,
    q_score,
    scattering_factor,
    structure_factors,
    trilinear,
    voxels_near,
)
from fsc_score import main

ORACLES = Path(__file__).parent / "oracles"


@pytest.fixture(scope="module")
def f():
    path = ORACLES / "oracles" / "map_model.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    f = dict(np.load(path))
    f["atoms"] = (torch.from_numpy(f["coords_xyz"]), torch.tensor([ATOMIC_NUMBER[e] for e in f["elements"]]),
                  torch.from_numpy(f["b_iso"]))
    f["map"], f["d"], f["v"] = torch.from_numpy(f["map_zyx"]), float(f["resolution"]), float(f["voxel"])
    return f


def few_atoms(seed=0):
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(6, 3, generator=g, dtype=torch.float64) * torch.tensor([15.0, 18, 20]) + torch.tensor([3.0, -2, 7])
    return xyz, torch.tensor([6, 7, 8, 16, 6, 1]), torch.tensor([20.0, 35, 50, 15, 90, 40], dtype=torch.float64)


# ---- Model maps

@pytest.mark.parametrize("d_min", [0.0, 3.1, 6.2])
def test_structure_factors_equal_the_direct_sum_over_atoms(d_min):
    xyz, z, b = few_atoms()
    shape, voxel, origin, occupancy = (16, 15, 12), (1.25, 1.2, 1.3), (7.0, -2.0, 3.0), torch.linspace(0.5, 1, 6)
    k = [np.fft.fftfreq(n, v) for n, v in zip(shape, voxel)]
    direct = torch.zeros(16, 15, 7, dtype=torch.complex128)
    for i, j, l in np.ndindex(16, 15, 7):
        s = torch.tensor([abs(k[2][l]), k[1][j], k[0][i]])        # x, y, z in 1/Å
        if (d_min * s.norm() <= 1) and i != 8 and l != 6:         # no Nyquist planes
            for a in range(6):
                phase = 2 * math.pi * float(s @ (xyz[a] - torch.tensor(origin[::-1])))
                f = scattering_factor(int(z[a]), s.square().sum()) * torch.exp(-b[a] / 4 * s.square().sum())
                direct[i, j, l] += occupancy[a] * f * complex(math.cos(phase), -math.sin(phase))
    largest = direct.abs().max()
    error = lambda **how: (structure_factors(shape, xyz, z, b, voxel, origin, occupancy=occupancy, d_min=d_min, **how)
                           - direct).abs().max() / largest
    assert error() < 2e-2                               # Departure 2: tails cut, some aliasing
    if d_min == 0:
        assert error(wing_cutoff=1e-6) < 1e-3           # on so fine a grid only the tails matter


def test_a_box_coarser_than_the_resolution_and_unknown_elements_are_refused():
    xyz, z, b = few_atoms()
    with pytest.raises(ValueError, match="no frequency"):
        model_map((8, 8, 8), xyz, z, b, 100.0, 1.0)
    with pytest.raises(ValueError, match="factors for He"):
        model_map((8, 8, 8), xyz, torch.full_like(z, 2), b, 4.0, 1.0)


def test_voxels_near_an_atom_are_all_within_reach_of_it_through_the_faces():
    shape, voxel, xyz = (7, 6, 5), (1.0, 1.3, 0.9), torch.tensor([[0.2, 7.5, 3.3]])
    index, distance = voxels_near(shape, xyz, 1.9, voxel, origin=(0.5, 0.0, -0.4))
    found = sorted(zip(index[distance <= 1.9].tolist(), distance[distance <= 1.9].tolist()))
    side, expected = [n * v for n, v in zip(shape, voxel)], []
    for z, y, x in np.ndindex(*shape):
        r = [(i * v + o - c + s / 2) % s - s / 2 for i, v, o, c, s in
             zip((z, y, x), voxel, (0.5, 0.0, -0.4), (3.3, 7.5, 0.2), side)]      # the nearest image
        if math.hypot(*r) <= 1.9:
            expected.append(((z * 6 + y) * 5 + x, math.hypot(*r)))
    assert [i for i, _ in found] == [i for i, _ in expected]
    np.testing.assert_allclose([r for _, r in found], [r for _, r in expected], atol=1e-6)


def test_model_map_and_mask_are_phenixs(f):
    calc = model_map(f["map"].shape, *f["atoms"], f["d"], f["v"])
    assert correlation(calc, torch.from_numpy(f["map_calc_zyx"])) > 1 - 1e-6
    inside = np.unpackbits(f["inside_mask_packed"], count=f["map"].numel()).reshape(f["map"].shape).astype(bool)
    assert np.array_equal(molecular_mask(f["map"].shape, *f["atoms"][:2], f["v"]), inside)


def test_the_mask_gives_back_what_the_probe_took_but_no_atom(f):
    xyz, v = torch.tensor([[6.0, 6.0, 6.0]]), 0.25                # one carbon: 1.775 Å, plus 1.1, minus 0.9
    mask = molecular_mask((48, 48, 48), xyz, torch.tensor([6]), v)
    r = (torch.stack(torch.meshgrid(*[torch.arange(48) * v] * 3, indexing="ij"), -1) - 6).norm(dim=-1)
    assert mask[r < 1.775].all() and not mask[r >= 1.775 + 1.1].any()
    assert r[mask].max() == pytest.approx(1.775 + 1.1 - 0.9, abs=v)
    assert not molecular_mask((48, 48, 48), xyz, torch.tensor([1]), v).any()        # hydrogens are left out


# ---- Correlations, resolutions, Q-scores

def test_the_four_correlations_are_phenixs(f):
    for name, value in map_model_cc(f["map"], *f["atoms"], f["d"], f["v"]).items():
        assert value == pytest.approx(float(f[name]), abs=2e-5), name


def test_correlations_follow_the_model_and_the_grid_when_both_move(f):
    xyz, z, b = f["atoms"]
    moved = map_model_cc(f["map"], xyz + torch.tensor([3.0, -5, 11]), z, b, f["d"], f["v"], origin=(11, -5, 3))
    assert moved == pytest.approx(map_model_cc(f["map"], *f["atoms"], f["d"], f["v"]), abs=1e-6)
    with pytest.raises(ValueError, match="frame of the map"):
        map_model_cc(torch.rand(3, 3, 3), xyz[:1] * 0, z[:1], b[:1], 2.0, 0.8)      # inside everywhere


def test_correlation_per_residue_is_phenixs(f):
    number = {}                                         # its table holds the SG of residues 2 and 8 on lines of their own
    residue = torch.tensor([number.setdefault((int(n), a == "SG"), len(number))
                            for n, a in zip(f["residue_number"], f["atom_names"])])
    assert [n for n, _ in number] == f["cc_per_residue_seq"].tolist()
    calc, radius = model_map(f["map"].shape, *f["atoms"], f["d"], f["v"]), atom_radius(f["d"], float(f["b_iso"].mean()))
    assert radius == pytest.approx(float(f["atom_radius"]))
    ours = cc_per_residue(f["map"], calc, f["atoms"][0], residue, radius, f["v"])
    np.testing.assert_allclose(ours, f["cc_per_residue"], atol=1e-4)


def test_atom_radius_grows_with_the_b_factor_as_in_phenix():
    # mmtbx.maps.mtriage.get_atom_radius of cctbx-base 2025.11
    for d, b, radius in ((3, 60, 3), (3, 150, 3.1), (3, 250, 3.7), (2.5, 200, 3.3), (5, 400, 5), (12, 50, 10)):
        assert atom_radius(d, b) == pytest.approx(radius, abs=1e-6)


def test_map_model_resolutions_are_mtriages(f):
    ours = map_model_resolution(f["map"], *f["atoms"], f["v"])
    np.testing.assert_allclose(ours["curve"], f["fsc_model_d_dinv_fsc"][:, 1:], atol=5e-5)
    for name in ("d_model", "d_model_b0", "b_iso_overall", "d_fsc_model_05", "d_fsc_model_0143", "d_fsc_model_0"):
        assert ours[name] == pytest.approx(float(f["mtriage_" + name]), abs=2e-4, nan_ok=True), name


@pytest.mark.parametrize("sigma", [0.6, 0.4])
def test_q_scores_are_mapqs_whatever_the_chunk(f, sigma):
    ours = q_score(f["map"], f["atoms"][0], f["v"], sigma=sigma, chunk=25)
    np.testing.assert_allclose(ours, f[f"qscore_sigma0{round(10 * sigma)}"], atol=1e-6)
    assert torch.equal(ours, q_score(f["map"], f["atoms"][0], f["v"], sigma=sigma))


def test_an_atom_that_looks_like_the_reference_scores_one():
    v, origin = 0.2, (-3.0, -4.0, -5.0)
    axis = [torch.arange(32) * v + o for o in origin]
    at = lambda x, y, z: (axis[0][:, None, None] - z) ** 2 + (axis[1][:, None] - y) ** 2 + (axis[2] - x) ** 2
    xyz = torch.tensor([[-2.0, -0.9, 0.1]])
    density = 3 * torch.exp(-at(*xyz[0]) / (2 * 0.6**2)) - 1
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


# ---- Files and the program

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
        m = read_model(tmp_path / name)
        assert m.xyz[0].tolist() == [-1.5, 2.25, 100.125] and len(m.xyz) == 6       # the first model only
        assert m.atomic_number.tolist() == [7, 6, 6, 1, 16, 20]                     # columns 77-78, or the name's
        assert m.b_iso.tolist() == [20, 30.5, 31, 10, 12, 40] and m.occupancy.tolist() == [1, 0.6, 0.4, 1, 1, 0.5]
        assert m.labels == ["A/1/ALA", "A/1A/CYS", "B/2/CA"] and m.residue.tolist() == [0, 0, 0, 0, 1, 2]


def test_mmcif_gives_the_model_of_the_same_pdb_file(tmp_path):
    gemmi = pytest.importorskip("gemmi", reason="reading mmCIF needs gemmi")
    (tmp_path / "m.pdb").write_text(PDB)
    gemmi.read_structure(str(tmp_path / "m.pdb")).make_mmcif_document().write_file(str(tmp_path / "m.cif"))
    pdb, cif = read_model(tmp_path / "m.pdb"), read_model(tmp_path / "m.cif")
    assert torch.equal(pdb.xyz, cif.xyz) and torch.equal(pdb.atomic_number, cif.atomic_number)
    assert torch.equal(pdb.b_iso, cif.b_iso) and pdb.labels == cif.labels and torch.equal(pdb.residue, cif.residue)


def test_models_that_cannot_be_read_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty.pdb").write_text("REMARK nothing\n")
    (tmp_path / "odd.pdb").write_text(PDB.replace("          CA\n", "          XX\n"))
    (tmp_path / "bad.pdb").write_text(PDB.replace("2.250", " ****"))
    (tmp_path / "m.cif").write_text("data_x\n")
    monkeypatch.setitem(__import__("sys").modules, "gemmi", None)
    for name, message in (("empty.pdb", "no atoms"), ("odd.pdb", "element as XX"), ("bad.pdb", "bad.pdb: could not"),
                          ("m.cif", "pip install gemmi")):
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path / name)
    with pytest.raises(OSError, match="no such file"):
        read_model(tmp_path / "none.pdb")


def test_the_program_prints_phenixs_numbers_for_files_in_any_frame(f, tmp_path, capsys):
    with mrcfile.new(tmp_path / "map.mrc") as m:
        m.set_data(f["map_zyx"])
        m.voxel_size = f["v"]
        m.header.origin = (10, 20, -30)                 # it counts, and nstart does not
        m.header.nxstart = 4
    shift, lines = np.array([10, 20, -30]), []
    for i, (xyz, e, name, n, b) in enumerate(zip(f["coords_xyz"] + shift, f["elements"], f["atom_names"],
                                                 f["residue_number"], f["b_iso"]), 1):
        position = "".join(f"{c:8.3f}" for c in xyz)
        lines.append(f"ATOM  {i:5d}  {name:3s} ALA A{n:4d}    {position}  1.00{b:6.2f}          {e:>2s}")
    lines.append("ATOM     99  CA  ALA A  99     999.000   0.000   0.000  1.00 20.00           C")
    (tmp_path / "model.pdb").write_text("\n".join(lines) + "\nEND\n")
    main([str(tmp_path / "map.mrc"), "--model", str(tmp_path / "model.pdb"), "--resolution", "4"])
    assert "1 of 60 atoms lie outside" in capsys.readouterr().out
    written = json.loads((tmp_path / "map_fsc.json").read_text())
    for name in ("cc_box", "cc_mask", "cc_volume", "cc_peaks"):
        assert written[name] == pytest.approx(float(f[name]), abs=1e-4), name
    assert written["d_model"] == pytest.approx(float(f["mtriage_d_model"])) and written["d_fsc_model_0"] is None
    assert written["q_score_mean"] == pytest.approx(f["qscore_sigma06"].mean(), abs=1e-4)
    with open(tmp_path / "map_fsc_residues.csv") as file:
        rows = list(csv.DictReader(file))
    third = f["residue_number"] == 3
    assert rows[2]["residue"] == "A/3/ALA" and int(rows[2]["atoms"]) == third.sum()
    assert float(rows[2]["q_score"]) == pytest.approx(f["qscore_sigma06"][third].mean(), abs=1e-4)
    assert float(rows[2]["cc"]) == pytest.approx(f["cc_per_residue"][f["cc_per_residue_seq"] == 3][0], abs=1e-4)
    (tmp_path / "far.pdb").write_text(lines[-1])
    with pytest.raises(SystemExit, match="no atom lies in"):
        main([str(tmp_path / "map.mrc"), "--model", str(tmp_path / "far.pdb"), "-o", str(tmp_path / "far")])
