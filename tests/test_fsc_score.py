"""The promises of the program behind `python fsc.py`: its files, its numbers, its errors."""

import csv
import json
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import mrcfile
import numpy as np
import pytest
import torch

from fsc import auc, fsc, radius, resolution
from fsc_half_maps import local_resolution, masked_fsc, sharpen
from fsc_score import main
from fsc_tables import emdb_xml

ORACLES = Path(__file__).parent / "oracles"


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(name, density, voxel_size=1.5):
    with mrcfile.new(name) as file:
        file.set_data(np.asarray(density))
        file.voxel_size = voxel_size


def score(command):
    main(command.split())


def refusal(command):
    """The error of a command: one line, and no file is written."""
    before = sorted(Path().iterdir())
    with pytest.raises(SystemExit) as error:
        score(command)
    assert "\n" not in str(error.value)
    assert sorted(Path().iterdir()) == before
    return str(error.value)


@pytest.fixture
def maps(tmp_path, monkeypatch):
    """Half maps a.mrc and b.mrc and a mask.mrc in the current folder."""
    shape = (16, 16, 16)
    spectrum = torch.fft.rfftn(noise(*shape, seed=1)) * (radius(shape, half=True) < 5)
    signal = 5 * torch.fft.irfftn(spectrum, s=shape)
    mask = torch.zeros(shape)
    mask[3:13, 3:13, 3:13] = 1
    maps = {"a": signal + noise(*shape, seed=2), "b": signal + noise(*shape, seed=3), "mask": mask}
    monkeypatch.chdir(tmp_path)
    for name, density in maps.items():
        write(f"{name}.mrc", density)
    return maps


# ---- Two maps


def test_the_program_writes_the_numbers_it_prints(maps, capsys):
    score("a.mrc b.mrc --mask mask.mrc --convention relion --star --directional")
    screen = capsys.readouterr().out
    expected = masked_fsc(maps["a"], maps["b"], maps["mask"], convention="relion")
    curves = torch.stack(expected[:4], 1)
    best = float(resolution(expected.corrected, 1.5, convention="relion"))
    written = json.loads(Path("a_fsc.json").read_text())
    assert written["corrected"]["resolution_0143"] == best and f"{best:.2f} Å" in screen

    header = Path("a_fsc.csv").read_text().splitlines()[0]
    assert header.endswith("corrected,unmasked,masked,randomised")
    rows = np.loadtxt("a_fsc.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows[:, 3:], curves, atol=1e-5)
    np.testing.assert_allclose(rows[:, 1], np.arange(9) / (16 * 1.5), atol=1e-6)

    star = Path("a_fsc.star").read_text().splitlines()
    names = [line.split()[0] for line in star if line.startswith("_rln")]
    assert names[1:4] == ["_rlnSpectralIndex", "_rlnResolution", "_rlnAngstromResolution"]
    last = [float(word) for word in star[-1].split()[3:]]
    np.testing.assert_allclose(last, curves[-1], atol=1e-6)


def test_the_program_writes_the_sharpened_map_and_the_local_resolution(maps):
    command = "a.mrc b.mrc --mask mask.mrc --convention relion --b-factor -40"
    score(f"{command} --sharpen sharp.mrc --local-resolution local.mrc")
    curve = masked_fsc(maps["a"], maps["b"], maps["mask"], convention="relion").corrected
    best = float(resolution(curve, 1.5, convention="relion"))
    sharp = sharpen((maps["a"] + maps["b"]) / 2, curve, 1.5, -40, best)
    np.testing.assert_allclose(mrcfile.read("sharp.mrc"), sharp, atol=1e-5)
    local = local_resolution(maps["a"], maps["b"], 1.5)
    np.testing.assert_allclose(mrcfile.read("local.mrc"), local, rtol=1e-5)
    written = json.loads(Path("a_fsc.json").read_text())
    assert written["local_resolution_median"] == pytest.approx(float(local.median()))


def test_no_resolution_is_printed_beyond_the_box(maps, capsys):
    write("c.mrc", noise(16, 16, 16, seed=9))
    score("a.mrc c.mrc")
    row = next(line for line in capsys.readouterr().out.splitlines() if "unmasked" in line)
    assert row.split()[1:7] == [">", "24.00", "Å"] * 2


def test_a_background_and_a_factor_of_one_half_map_do_not_change_the_scores(maps, capsys):
    read = mrcfile.read
    score("a.mrc b.mrc --mask mask.mrc -o plain")
    # A power of two, so that both are exact but for the sum with 50.
    write("other.mrc", torch.from_numpy(8 * read("b.mrc")) + 50 * float(read("b.mrc").max()))
    capsys.readouterr()
    score("a.mrc other.mrc --mask mask.mrc -o other")
    out = capsys.readouterr().out
    assert "found and subtracted" in out and "times the grey scale" in out
    want, found = (json.loads(Path(f"{name}.json").read_text()) for name in ("plain", "other"))
    for curve in ("corrected", "masked", "unmasked"):
        assert found[curve]["auc"] == pytest.approx(want[curve]["auc"], abs=0.01)


def test_a_map_and_its_truth_are_compared(maps):
    score("a.mrc --truth b.mrc --quiet -o out")
    written = json.loads(Path("out.json").read_text())
    assert written["unmasked"]["auc"] == pytest.approx(float(auc(fsc(maps["a"], maps["b"]))))
    flat = np.corrcoef(maps["a"].flatten(), maps["b"].flatten())[0, 1]
    assert written["correlation"] == pytest.approx(flat, abs=1e-6)


def test_one_coefficient_does_not_decide_the_worst_direction(tmp_path, monkeypatch):
    # Signal up to shell 10, but the two coefficients at +-1 along z disagree.
    monkeypatch.chdir(tmp_path)
    n = 32
    signal = torch.fft.rfftn(noise(n, n, n, seed=1)) * (radius((n, n, n), half=True) < 10) * 10
    for name, sign in (("a", 1), ("b", -1)):
        spectrum = signal + torch.fft.rfftn(noise(n, n, n, seed=ord(name)))
        spectrum[1, 0, 0] = spectrum[-1, 0, 0] = 3000 * sign
        write(f"{name}.mrc", torch.fft.irfftn(spectrum, s=(n, n, n)), voxel_size=1.0)
    score("a.mrc b.mrc --directional --quiet")
    written = json.loads(Path("a_fsc.json").read_text())
    assert n / 15 < written["best_direction"] < written["worst_direction"] < n / 8
    assert written["sphericity"] > 0.95


def test_a_curve_that_never_falls_is_reported_as_the_limit_of_the_grid(maps, capsys):
    score("a.mrc --truth a.mrc -o same")
    note = "unmasked: never below 0.5; 3.00 Å is the grid's limit"
    assert note in capsys.readouterr().out
    assert note in json.loads(Path("same.json").read_text())["notes"][0]


def test_without_matplotlib_all_but_the_picture_is_written(maps, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    score("a.mrc b.mrc")
    assert "pip install matplotlib" in capsys.readouterr().out
    assert Path("a_fsc.csv").exists() and not Path("a_fsc.png").exists()


def test_emdbs_xml_holds_the_best_curve(maps):
    score("a.mrc b.mrc --mask mask.mrc --quiet")
    root = ElementTree.parse("a_fsc.xml").getroot()
    assert root.tag == "fsc" and root.get("title") == "FSC, corrected"
    assert root.get("xaxis") == "Resolution (A-1)"
    assert root.get("yaxis") == "Correlation Coefficient"
    points = [[float(c.find(axis).text) for axis in "xy"] for c in root.findall("coordinate")]
    corrected = masked_fsc(maps["a"], maps["b"], maps["mask"]).corrected
    np.testing.assert_allclose(points, np.stack([np.arange(9) / 24, corrected], 1), atol=1e-6)


def test_emdbs_xml_leaves_out_shells_that_are_nan():
    columns = {"per_angstrom": [0.0, 0.1, 0.2], "corrected": [1.0, float("nan"), 0.5]}
    root = ElementTree.fromstring(emdb_xml(columns, "corrected"))
    assert [point.find("x").text for point in root] == ["0.000000", "0.200000"]


def test_a_mask_of_one_voxel_gives_no_resolution_and_says_so(maps, capsys):
    mask = torch.zeros(16, 16, 16)
    mask[8, 8, 8] = 1
    write("one.mrc", mask)
    score("a.mrc b.mrc --mask one.mrc")
    written = json.loads(Path("a_fsc.json").read_text())
    assert set(written["corrected"].values()) == {None}
    assert "the mask alone correlates too much to be corrected" in capsys.readouterr().out


def test_masks_that_leave_0_to_1_by_rounding_are_clamped_with_a_note(maps, capsys):
    score("a.mrc b.mrc --mask mask.mrc --quiet -o exact")
    write("rounded.mrc", maps["mask"] * 1.00001 - 1e-6)
    score("a.mrc b.mrc --mask rounded.mrc -o rounded")
    assert "rounded.mrc: values leave 0 to 1 by up to 9e-06" in capsys.readouterr().out
    exact, rounded = (json.loads(Path(f"{name}.json").read_text()) for name in ("exact", "rounded"))
    assert rounded["corrected"] == pytest.approx(exact["corrected"], abs=1e-4)


def test_a_mask_that_is_zero_everywhere_is_refused(maps):
    write("zero.mrc", torch.zeros(16, 16, 16))
    assert "zero.mrc: every voxel is 0" in refusal("a.mrc b.mrc --mask zero.mrc")


@pytest.mark.parametrize("sign", [1, -1])
def test_sharpening_under_a_mask_of_one_voxel_is_refused_by_the_name_of_the_mask(maps, sign):
    # One voxel makes every shell of two maps equal or opposite.
    one = torch.zeros(16, 16, 16)
    one.view(-1)[(maps["a"] * maps["b"] * sign).argmax()] = 1
    write("one.mrc", one)
    message = refusal("a.mrc b.mrc --mask one.mrc --sharpen sharp.mrc --b-factor -20")
    assert "the FSC under one.mrc cannot be corrected" in message


def test_sharpening_maps_that_agree_nowhere_is_refused(maps):
    write("c.mrc", -maps["b"])
    assert "agree in no shell" in refusal("a.mrc c.mrc --sharpen sharp.mrc")


def test_a_note_on_a_map_that_is_compared_with_itself_is_told_once(maps, capsys):
    with mrcfile.open("a.mrc", "r+") as file:
        file.header.origin.x = math.nan
    score("a.mrc --truth a.mrc")
    assert capsys.readouterr().out.count("the header's origin") == 1
    assert len([n for n in json.loads(Path("a_fsc.json").read_text())["notes"] if "nan" in n]) == 1


# ---- What is refused


def test_an_inverted_half_map_stays_inverted_and_no_note_says_otherwise(maps, capsys):
    write("c.mrc", -maps["b"])
    score("a.mrc c.mrc")
    screen = capsys.readouterr().out
    assert "times the grey scale of half map 1" in screen and "brought" not in screen
    assert json.loads(Path("a_fsc.json").read_text())["unmasked"]["auc"] < 0


def test_files_are_replaced_only_when_asked(maps):
    score("a.mrc b.mrc --quiet -o out")
    assert "out.json: exists" in refusal("a.mrc b.mrc --quiet -o out")
    score("a.mrc b.mrc --quiet -o out --overwrite")


@pytest.mark.parametrize("name", ["a.mrc", "b.mrc", "mask.mrc"])
def test_no_input_is_ever_overwritten(maps, name):
    command = f"a.mrc b.mrc --mask mask.mrc --sharpen {name} --overwrite"
    assert "is the input" in refusal(command)
    assert np.array_equal(mrcfile.read(name), maps[name.removesuffix(".mrc")])


def test_maps_that_do_not_fit_or_cannot_be_read_are_refused(maps):
    write("small.mrc", noise(8, 8, 8))
    write("wide.mrc", noise(16, 16, 16), voxel_size=3.0)
    Path("text.mrc").write_text("not a map")
    assert "one grid" in refusal("a.mrc small.mrc")
    assert "--voxel-size" in refusal("a.mrc wide.mrc")
    assert "not an MRC" in refusal("a.mrc text.mrc")
    assert "none.mrc" in refusal("a.mrc none.mrc")


@pytest.mark.parametrize(
    "command, message",
    [
        ("a.mrc", "two half maps, or"),
        ("a.mrc b.mrc a.mrc", "two half maps, or"),
        ("a.mrc a.mrc", "hold the same map"),
        ("a.mrc --truth b.mrc --star", "want two half maps"),
        ("a.mrc b.mrc --b-factor -50", "--sharpen"),
        ("a.mrc b.mrc --resolution 3", "--model"),
        ("a.mrc --model m.pdb --resolution -3", "positive"),
        ("a.mrc --truth b.mrc --mask a.mrc", "a mask is 0 to 1"),
        (". b.mrc", "no such file"),
        ("a.mrc b.mrc -o none/x", "none: no such folder"),
        ("a.mrc b.mrc --sharpen out.txt", "ends in .mrc"),
        ("a.mrc b.mrc --sharpen out.mrc --local-resolution out.mrc", "give two"),
    ],
)
def test_arguments_that_would_be_ignored_or_make_no_sense_are_refused(maps, command, message):
    assert message in refusal(command)


# ---- A map and a model


def pdb_line(number, xyz, element, name, residue, b_factor):
    position = "".join(f"{c:8.3f}" for c in xyz)
    ending = f"{position}  1.00{b_factor:6.2f}          {element:>2s}"
    return f"ATOM  {number:5d}  {name:3s} ALA A{residue:4d}    {ending}\n"


@pytest.fixture(params=["origin", "nstart"])
def map_and_model(request, tmp_path, monkeypatch):
    """The oracle's map.mrc and model.pdb, both moved, with one atom far away: its numbers."""
    monkeypatch.chdir(tmp_path)
    oracle = np.load(ORACLES / "map_model.npz")
    voxel_size = float(oracle["voxel"])
    write("map.mrc", oracle["map_zyx"], voxel_size)
    # Headers place a map by an origin in Å, or by the index of the first voxel.
    with mrcfile.open("map.mrc", "r+") as file:
        if request.param == "origin":
            file.header.origin = (10, 20, -30)
            shift = np.array([10, 20, -30])
        else:
            file.header.nxstart, file.header.nystart, file.header.nzstart = 4, 5, -6
            shift = np.array([4, 5, -6]) * voxel_size
    xyz = oracle["coords_xyz"] + shift
    names = ("elements", "atom_names", "residue_number", "b_iso")
    atoms = zip(range(1, 100), xyz, *(oracle[name] for name in names))
    far = pdb_line(99, (999, 0, 0), "C", "CA", 99, 20)
    Path("model.pdb").write_text("".join(pdb_line(*atom) for atom in atoms) + far)
    Path("far.pdb").write_text(far)
    return oracle


def test_the_program_prints_phenixs_numbers_for_files_in_any_frame(map_and_model, capsys):
    oracle = map_and_model
    score("map.mrc --model model.pdb --resolution 4")
    assert "1 of 60 atoms lie outside" in capsys.readouterr().out
    written = json.loads(Path("map_fsc.json").read_text())
    for name in ("cc_box", "cc_mask", "cc_volume", "cc_peaks"):
        assert written[name] == pytest.approx(float(oracle[name]), abs=1e-4), name
    assert written["d_model"] == pytest.approx(float(oracle["mtriage_d_model"]))
    assert written["d_fsc_model_0"] is None  # JSON has no nan
    assert written["q_score_mean"] == pytest.approx(oracle["qscore_sigma06"].mean(), abs=1e-4)


def test_the_program_lists_the_q_score_of_every_residue(map_and_model):
    oracle = map_and_model
    score("map.mrc --model model.pdb --resolution 4 --quiet")
    with open("map_fsc_residues.csv") as file:
        row = list(csv.DictReader(file))[2]
    third = oracle["residue_number"] == 3
    assert row["residue"] == "A/3/ALA" and int(row["atoms"]) == third.sum()
    expected = oracle["qscore_sigma06"][third].mean()
    assert float(row["q_score"]) == pytest.approx(expected, abs=1e-4)


def test_elements_without_scattering_factors_are_named_and_the_others_are_scored(
    map_and_model, capsys
):
    score("map.mrc --model model.pdb --resolution 4 --quiet -o all")
    lines = Path("model.pdb").read_text()
    inside = lines.splitlines()[0][30:54]
    odd = f"HETATM  901 AL   ALF A 201    {inside}  1.00 20.00          AL\n"
    unknown = f"HETATM  902  Q   UNL A 202    {inside}  1.00 20.00           Q\n"
    Path("odd.pdb").write_text(lines + odd + unknown)
    score("map.mrc --model odd.pdb --resolution 4 -o odd")
    printed = capsys.readouterr().out
    assert "atoms without scattering factors are left out: 1 Al" in printed
    assert "atoms of unknown elements are left out: 1 Q" in printed
    before, after = (json.loads(Path(f"{name}.json").read_text()) for name in ("all", "odd"))
    for key in ("atoms", "cc_mask", "d_model", "q_score_mean", "map_model"):
        assert after[key] == before[key]


def test_a_model_without_any_occupied_atom_is_refused(map_and_model):
    lines = Path("model.pdb").read_text().splitlines()
    Path("zero.pdb").write_text("\n".join(f"{line[:54]}  0.00{line[60:]}" for line in lines))
    assert "zero.pdb: all 60 atoms have occupancy 0" in refusal("map.mrc --model zero.pdb -o z")
    # The atom far away is occupied, those in the map are not.
    lines = [f"{line[:54]}  0.00{line[60:]}" for line in lines[:-1]] + lines[-1:]
    Path("far.pdb").write_text("\n".join(lines))
    assert "none of the 59 atoms in the map" in refusal("map.mrc --model far.pdb -o z")


def test_a_model_beside_the_map_is_refused(map_and_model):
    assert "no atom lies in" in refusal("map.mrc --model far.pdb -o far")


def test_nothing_is_written_if_a_later_file_cannot_be(maps, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("fsc_score.csv_table", full_disk)
    before = sorted(Path().iterdir())
    assert "no space" in refusal("a.mrc b.mrc --sharpen sharp.mrc --b-factor -40")
    assert sorted(Path().iterdir()) == before


def test_written_maps_say_what_made_them_and_notes_on_inputs_are_printed(maps, capsys):
    with mrcfile.open("b.mrc", "r+") as file:
        file.header.origin = (math.nan, 0, 0)
    score("a.mrc b.mrc --sharpen sharp.mrc --b-factor -40")
    assert "note: b.mrc: the header's origin" in capsys.readouterr().out
    with mrcfile.open("sharp.mrc") as file:
        assert file.get_labels()[-1] == "cryofm fsc.py --sharpen, B-factor -40.0"


def test_halves_that_agree_in_no_shell_are_not_sharpened(maps):
    write("c.mrc", 0.3 * noise(*maps["a"].shape, seed=9) - maps["a"])
    assert "nothing is left" in refusal("a.mrc c.mrc --sharpen sharp.mrc --b-factor -40")
