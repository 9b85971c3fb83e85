"""What report.py promises: progress, scores, and files that appear together."""

import json
import sys

import pytest
import torch
from made_maps import filtered, molecule, names, prior_of, random, wedge
from torch import nn

import fourier
import fsc
import mrc
import report
from report import Progress, Result

SHAPE = (16, 16, 16)
PRIOR = prior_of(nn.Identity(), 16)


@pytest.fixture
def result():
    truth = molecule(SHAPE)
    restored = truth + 0.1 * random(SHAPE)
    shown = {"input": truth + 0.3 * random(SHAPE, 1), "restored": restored}
    facts = {"method": "pocs", "gap": float("nan"), "truth_voxel_size": (1.5, 1.5, 1.5)}
    region = ~wedge(SHAPE)
    facts["fsc"] = report.score(shown, truth, region, 1.5)
    return Result(mrc.Map(truth, 1.5), {"": restored, "_std": truth}, shown, facts, region)


def write(result, folder, **settings):
    files = {"": folder / "out.mrc", "_std": folder / "out_std.mrc"}
    report.write_report(result, files, {"settings": {"seed": 3}}, PRIOR, 0.0, **settings)


def test_progress_says_the_last_step(capsys):
    tick = Progress(3, what="round")
    tick()
    tick(2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("  round 3/3  0 s  ETA 0 s")


def test_scores_are_those_of_fsc_over_all_and_over_the_region(result):
    truth, region = result.grid.density, result.region
    for name, x in result.shown.items():
        found, curve = result.report["fsc"][name], fsc.fsc(x, truth)
        assert found["auc"] == float(fsc.auc(curve))
        assert found["fsc_05"] == float(fsc.resolution(curve, 1.5, 0.5))
        assert found["auc_missing"] == float(fsc.auc(fsc.fsc(x, truth, region)))


def test_the_table_has_a_row_for_each_map(result, capsys):
    scores = result.report["fsc"]
    report.say_scores("with truth.mrc", scores)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == f"{'with truth.mrc':29} FSC_AUC  FSC_0.5  FSC_AUC in the missing wedge"
    for row, (name, found) in zip(rows, scores.items(), strict=True):
        numbers = [f"{found['auc']:.3f}", f"{found['fsc_05']:.2f}", "Å"]
        assert row.split() == [name, *numbers, f"{found['auc_missing']:.3f}"]
    report.say_scores("aligned to a.mrc", scores, hands={"input": True, "restored": False})
    assert [row.split("  ")[-1] for row in capsys.readouterr().out.splitlines()] == [
        "hand",
        "mirrored",
        "as it is",
    ]


def test_the_json_says_how_the_map_was_made_and_holds_no_nan(result, tmp_path, capsys):
    write(result, tmp_path)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["settings"] == {"seed": 3}
    assert content["method"] == "pocs"
    assert content["gap"] is None
    assert content["torch"] == torch.__version__
    assert content["command"] == sys.argv
    assert content["output"] == [str(tmp_path / name) for name in ("out.mrc", "out_std.mrc")]
    line = capsys.readouterr().out
    assert "out.mrc, out_std.mrc, out.json" in line
    assert line.endswith("; open out.mrc\n")


def test_without_matplotlib_everything_else_is_written(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(result, tmp_path)
    assert names(tmp_path) == ["out.json", "out.mrc", "out_std.mrc"]
    assert "no picture (pip install matplotlib)" in capsys.readouterr().out


@pytest.mark.parametrize("scored", [True, False])
def test_a_picture_is_drawn_where_matplotlib_is_installed(result, tmp_path, scored):
    pytest.importorskip("matplotlib.figure")
    if not scored:
        result.report["fsc"] = {}
    write(result, tmp_path, say=report.silent)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_no_file(result, tmp_path):
    result.densities["_std"] = torch.full(SHAPE, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        write(result, tmp_path)
    assert names(tmp_path) == []


def test_the_power_in_the_wedge_is_relative_to_the_measured_directions(result):
    white = random((24, 24, 24))
    measured = wedge(white.shape)
    before = filtered(white, measured)
    half = before + (white - before) / 2  # a quarter of the power in the wedge
    for x, filled in ((before, 0), (half, 0.25), (white, 1)):
        found = Result(mrc.Map(x, 1.5), {"": x}, {}, {}, ~measured)
        power, change = report.wedge_numbers({"input": before, "restored": x}, found)
        assert power["input"] == pytest.approx(0, abs=1e-6)
        assert power["restored"] == pytest.approx(filled, abs=0.05)
        assert change["restored"] == pytest.approx(0, abs=1e-6)


def test_the_change_of_the_measured_coefficients_is_their_relative_distance(result):
    x = random(SHAPE)
    found = Result(mrc.Map(x, 1.5), {"": x}, {}, {}, ~wedge(SHAPE))
    # A background changes nothing.
    change = report.wedge_numbers({"input": x, "restored": 1.3 * x + 5}, found)[1]
    assert change["restored"] == pytest.approx(0.3, abs=1e-5)


def test_half_maps_are_compared_before_and_after_where_there_is_no_truth(result, capsys):
    given, restored = [1.0, 0.9, 0.6, 0.0], [1.0, 1.0, 0.8, 0.4]
    result.report = {"fsc_of_halves": given, "fsc_of_restored_halves": restored}
    result.grid = mrc.Map(random((8, 8, 8)), 1.5)
    facts = report.compare_without_truth(result).report
    assert facts["halves_given_auc"] == pytest.approx(sum(given) / 4)
    assert facts["halves_restored_auc"] == pytest.approx(sum(restored) / 4)
    crossing = 3 + (0.6 - 0.143) / 0.6
    assert facts["halves_given_0143"] == pytest.approx(8 * 1.5 / crossing)
    assert facts["halves_restored_0143"] == pytest.approx(8 * 1.5 / 4)
    assert "no gold standard" in capsys.readouterr().out


def test_the_label_says_which_program_and_network_made_the_map(result, tmp_path):
    write(result, tmp_path, label="cryofm sampling.py wedge hdit_tiny 1a2b3c4d")
    labels = mrc.read_map(tmp_path / "out_std.mrc").header["label"].tolist()
    assert labels[0] == b"cryofm sampling.py wedge hdit_tiny 1a2b3c4d"


def test_slices_have_a_plane_and_a_scale_bar_and_power_its_frequencies(result, tmp_path):
    pytest.importorskip("matplotlib.figure")
    result.grid = mrc.Map(result.grid.density, (1.5, 1.5, 3.0))
    figure = report.draw(result, result.report | {"truth_voxel_size": (1.5, 1.5, 3.0)})
    panels = {axis.get_title(): axis for axis in figure.axes}
    slice_panel = panels["input\nxz slice"]
    (bar,) = slice_panel.lines
    assert bar.get_xdata()[1] - bar.get_xdata()[0] == pytest.approx(10)  # of 16 * 3 Å
    assert [text.get_text() for text in slice_panel.texts] == ["10 Å"]
    assert slice_panel.get_xlim() == (0, 48) and slice_panel.get_ylim() == (0, 24)
    power_panel = panels["restored: Fourier power\nkx kz plane (1/Å)"]
    assert power_panel.get_xlim() == pytest.approx((-8.5 / 48, 7.5 / 48))
    assert any(title.startswith("standard deviation") for title in panels)


# ---- Half maps without a truth


def test_the_expected_fsc_is_that_with_the_truth_which_it_never_sees():
    truth = molecule((40, 36, 38))
    halves = [truth + 0.1 * random(truth.shape, seed) for seed in (1, 2)]
    blur = [fourier.lowpass(y, 6.0, 1.5) for y in halves]
    answers = {
        "average": halves,
        "positive": [y.clamp(min=0) for y in halves],
        "blurred and positive": [y.clamp(min=0.1) for y in blur],
        "something else": [molecule(truth.shape, atom_count=20)] * 2,
    }
    expected = report.expected_auc(halves, answers, 1.5)
    for name, (x_1, x_2) in answers.items():
        true = float(fsc.auc(fsc.fsc((x_1 + x_2) / 2, truth, voxel_size=1.5)))
        assert expected[name] == pytest.approx(true, abs=0.03), name


def test_a_result_that_the_other_half_contradicts_comes_with_a_warning():
    said = []
    report.say_expected({"average": 0.80, "Wiener, positive": 0.79, "restored": 0.75}, said.append)
    assert "warning: by this measure average is better than the result (restored)" in said[-1]
    said.clear()
    report.say_expected({"average": 0.80, "restored": 0.795}, said.append)
    assert len(said) == 1 and "average 0.800, restored 0.795" in said[0]
