"""data_quality.py: the rules by which CryoLVM chooses its pairs, and its epochs as steps."""

import csv

import pytest
import torch

import data_prepare
import data_quality
import mrc

ATOM = "ATOM  {0:5d}  {1:<3s} {2} A{3:4d}    {4:8.3f}{5:8.3f}{6:8.3f}  1.00 20.00           {7}\n"


def model(side_chains=True, residue="LEU", glycines=0):
    """A chain of five residues along x, with or without side chains, then some glycines."""
    lines = []
    for i in range(5 + glycines):
        glycine = i >= 5
        atoms = {"N": 0.0, "CA": 1.4, "C": 2.4, "O": 2.9}
        if side_chains and not glycine:
            atoms["CB"] = 1.5
        for name, x in atoms.items():
            place = (20 + 3.8 * i + x, 20, 20)
            code = "GLY" if glycine else residue
            lines.append(ATOM.format(len(lines) + 1, name, code, i + 1, *place, name[0]))
    return "".join(lines)


@pytest.fixture
def folder(tmp_path):
    """Four candidates, of which the first breaks no rule."""
    models = {
        1: model(glycines=2),
        2: model(side_chains=False, glycines=2),
        3: model(residue="UNK"),
        4: model(),
    }
    rows = ["map,model,resolution,resolution_method"]
    for number, text in models.items():
        density = torch.zeros(50, 60, 70)
        density[20:30, 20:30, 20:30] = 1
        mrc.write_map(tmp_path / f"emd_{number}.mrc", mrc.Map(density, 1.5))
        (tmp_path / f"{number}.pdb").write_text(text)
        threshold = "FSC 0.5 CUT-OFF" if number == 4 else "FSC 0.143 CUT-OFF"
        rows.append(f"emd_{number}.mrc,{number}.pdb,3.5,{threshold}")
    (tmp_path / "candidates.csv").write_text("\n".join(rows))
    return tmp_path


def chosen(folder):
    with open(folder / "pairs.csv", newline="") as file:
        return [row["map"] for row in csv.DictReader(file)]


def test_each_rule_removes_the_candidate_that_breaks_it_and_no_other(folder, capsys):
    data_prepare.main(["pairs", str(folder / "candidates.csv")])
    out = capsys.readouterr().out
    assert chosen(folder) == ["emd_1.mrc"]
    assert "emd_2.mrc: rule 1: backbone atoms only" in out
    assert "emd_3.mrc: rule 2: 5 unknown residues" in out
    assert "emd_4.mrc: rule 5" in out
    assert "rules 3 (missing chains) and 6 (sequence identity) go unchecked" in out


def test_oblique_axes_break_rule_4(folder, capsys):
    # Bytes 52 to 63 of the header hold the angles of the cell.
    content = bytearray((folder / "emd_1.mrc").read_bytes())
    content[56:60] = torch.tensor([100.0]).numpy().tobytes()
    (folder / "emd_1.mrc").write_bytes(content)
    with pytest.raises(ValueError, match="no candidate is left"):
        data_quality.choose_pairs(folder / "candidates.csv", None)
    assert "emd_1.mrc: unreadable or rule 4" in capsys.readouterr().out
    assert not (folder / "pairs.csv").exists()


def test_entries_of_the_test_set_are_left_out_and_older_pairs_stay(folder):
    (folder / "test.txt").write_text("1\n")
    with pytest.raises(ValueError, match="no candidate is left"):
        data_quality.choose_pairs(folder / "candidates.csv", folder / "test.txt")
    (folder / "pairs.csv").write_text("by hand")
    with pytest.raises(FileExistsError, match="pairs.csv: exists"):
        data_quality.choose_pairs(folder / "candidates.csv", None)


@pytest.mark.parametrize("name", ["EMD-1.map", "emd_1.v2.mrc", "emd_1_box.mrc"])
def test_an_entry_of_the_test_set_is_left_out_by_any_of_its_names(folder, name):
    (folder / "emd_1.mrc").rename(folder / name)
    row = {"map": name, "model": "1.pdb", "resolution": "3.5"}
    problem, _ = data_quality.candidate_problem(row, folder, {"emd_1"})
    assert problem == "held out by --held-out"
    assert data_quality.candidate_problem(row, folder, {"emd_2"})[0] == ""


def test_an_epoch_shows_every_window_once(folder):
    # 75 x 90 x 105 Å: windows of 48 begin at 0, 24, 27 | 0, 24, 42 | 0, 24, 48, 57.
    assert data_quality.windows((50, 60, 70), (1.5, 1.5, 1.5)) == 3 * 3 * 4
    assert data_quality.windows((20, 20, 20), (1.0, 1.0, 1.0)) == 1
    # 36 windows are two steps of 32.
    said = []
    data_quality.choose_pairs(folder / "candidates.csv", None, said.append)
    assert said[-1].endswith("--steps 1000")


@pytest.mark.parametrize(
    "text, ids",
    [
        ("EMD-1234\nemd_20026\n", {"emd_1234", "emd_20026"}),
        ("1234\n 20026 \n", {"emd_1234", "emd_20026"}),
        ("map_id,apix\nemd_1234.mrc,1.5\n", {"emd_1234"}),
    ],
)
def test_a_list_names_entries_in_any_usual_way(text, ids, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    assert data_quality.read_ids(tmp_path / "list.txt") == ids


def test_a_list_without_entries_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("1A74 and others")
    with pytest.raises(ValueError, match="names no entry of the EMDB"):
        data_quality.read_ids(tmp_path / "list.txt")
