"""What report.py promises: progress, scores, and files that appear together."""

import json
import sys

import pytest
import torch
from made_maps import molecule, names, prior_of, random, wedge
from torch import nn

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
