"""What the program behind `python fsc.py` promises: its files, its numbers, its errors."""
import json

import mrcfile
import numpy as np
import pytest
import torch

from fsc import auc, fsc, radius, resolution
from fsc_half_maps import local_resolution, masked_fsc, sharpen
from fsc_score import main


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def files(tmp_path):
    signal = 5 * torch.fft.irfftn(torch.fft.rfftn(noise(16, 16, 16, seed=1))
                                  * (radius((16, 16, 16), half=True) < 5), s=(16, 16, 16))
    mask = torch.zeros(16, 16, 16)
    mask[3:13, 3:13, 3:13] = 1
    maps = {"a": signal + noise(16, 16, 16, seed=2), "b": signal + noise(16, 16, 16, seed=3), "mask": mask}
    for name, x in maps.items():
        with mrcfile.new(tmp_path / f"{name}.mrc") as m:
            m.set_data(x.numpy())
            m.voxel_size = 1.5
    return tmp_path, maps


def test_the_program_writes_the_numbers_it_prints(files, capsys):
    folder, maps = files
    a, b, mask = (str(folder / f"{n}.mrc") for n in ("a", "b", "mask"))
    main([a, b, "--mask", mask, "--star", "--directional", "--convention", "relion",
          "--local-resolution", str(folder / "local.mrc"), "--sharpen", str(folder / "sharp.mrc"), "--b-factor", "-40"])
    screen = capsys.readouterr().out
    expected = masked_fsc(maps["a"], maps["b"], maps["mask"], convention="relion")
    best = float(resolution(expected.corrected, 1.5, convention="relion"))
    written = json.loads((folder / "a_fsc.json").read_text())
    assert written["corrected"]["resolution_0143"] == best and f"{best:.2f} Å" in screen
    rows = np.loadtxt(folder / "a_fsc.csv", delimiter=",", skiprows=1)
    assert (folder / "a_fsc.csv").read_text().splitlines()[0].endswith("corrected,unmasked,masked,randomised")
    np.testing.assert_allclose(rows[:, 3:], torch.stack(expected[:4], 1), atol=1e-5)
    np.testing.assert_allclose(rows[:, 1], np.arange(9) / (16 * 1.5), atol=1e-6)
    star = (folder / "a_fsc.star").read_text().splitlines()
    assert [line.split()[0] for line in star if line.startswith("_rln")][1:4] == [
        "_rlnSpectralIndex", "_rlnResolution", "_rlnAngstromResolution"]
    np.testing.assert_allclose([float(x) for x in star[-1].split()[3:]], torch.stack(expected[:4], 1)[-1], atol=1e-6)
    mean = (maps["a"] + maps["b"]) / 2
    with mrcfile.open(folder / "sharp.mrc") as m:
        np.testing.assert_allclose(m.data, sharpen(mean, expected.corrected, 1.5, -40, best), atol=1e-5)
    local = local_resolution(maps["a"], maps["b"], 1.5)
    with mrcfile.open(folder / "local.mrc") as m:
        np.testing.assert_allclose(m.data, local, rtol=1e-5)
    assert written["local_resolution_median"] == pytest.approx(float(local.median()))


def test_the_program_compares_with_a_truth_and_overwrites_only_when_asked(files):
    folder, maps = files
    arguments = [str(folder / "a.mrc"), "--truth", str(folder / "b.mrc"), "--quiet", "-o", str(folder / "out")]
    main(arguments)
    written = json.loads((folder / "out.json").read_text())
    assert written["unmasked"]["auc"] == pytest.approx(float(auc(fsc(maps["a"], maps["b"]))))
    flat = np.corrcoef(maps["a"].flatten(), maps["b"].flatten())[0, 1]
    assert written["correlation"] == pytest.approx(flat, abs=1e-6)
    with pytest.raises(SystemExit, match="out.json exists"):
        main(arguments)
    main([*arguments, "--overwrite"])


def test_bad_input_gets_one_line_and_no_file(files):
    folder, _ = files
    with mrcfile.new(folder / "small.mrc") as m:
        m.set_data(noise(8, 8, 8).numpy())
        m.voxel_size = 1.5
    with mrcfile.new(folder / "wide.mrc") as m:
        m.set_data(noise(16, 16, 16).numpy())
        m.voxel_size = 3.0
    (folder / "text.mrc").write_text("not a map")
    before = sorted(folder.iterdir())
    for other, message in (("small.mrc", "one grid"), ("wide.mrc", "--voxel-size"), ("text.mrc", "not an MRC"),
                           ("none.mrc", "none.mrc")):
        with pytest.raises(SystemExit, match=message) as error:
            main([str(folder / "a.mrc"), str(folder / other)])
        assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before


def test_arguments_that_would_be_ignored_or_make_no_sense_get_one_line_and_no_file(files):
    folder, _ = files
    a, b = (str(folder / f"{n}.mrc") for n in "ab")
    before = sorted(folder.iterdir())
    for arguments, message in (
            ([a], "two half maps, or"), ([a, b, a], "two half maps, or"), ([a, a], "hold the same map"),
            ([a, "--truth", b, "--star"], "want two half maps"), ([a, b, "--b-factor", "-50"], "--sharpen"),
            ([a, b, "--resolution", "3"], "--model"), ([a, "--model", "m.pdb", "--resolution", "-3"], "positive"),
            ([a, "--truth", b, "--mask", a], "values from 0 to 1"), ([".", b], "no such file"),
            ([a, b, "-o", str(folder / "none" / "x")], "none: no such folder")):
        with pytest.raises(SystemExit, match=message) as error:
            main(arguments)
        assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before


def test_one_coefficient_does_not_decide_the_worst_direction(tmp_path):
    n = 32                                              # signal to shell 10; the two coefficients at +-1 along z disagree
    r = radius((n, n, n), half=True)
    signal = torch.fft.rfftn(noise(n, n, n, seed=1)) * (r < 10) * 10
    for name in "ab":
        X = signal + torch.fft.rfftn(noise(n, n, n, seed=ord(name)))
        X[1, 0, 0], X[-1, 0, 0] = (3000, 3000) if name == "a" else (-3000, -3000)
        with mrcfile.new(tmp_path / f"{name}.mrc") as m:
            m.set_data(torch.fft.irfftn(X, s=(n, n, n)).numpy())
            m.voxel_size = 1.0
    main([str(tmp_path / "a.mrc"), str(tmp_path / "b.mrc"), "--directional", "--quiet"])
    written = json.loads((tmp_path / "a_fsc.json").read_text())
    assert n / 15 < written["best_direction"] < written["worst_direction"] < n / 8 and written["sphericity"] > 0.95


def test_a_curve_that_never_falls_is_reported_as_the_limit_of_the_grid(files, capsys):
    folder, _ = files
    main([str(folder / "a.mrc"), "--truth", str(folder / "a.mrc"), "-o", str(folder / "same")])
    note = "unmasked: never below 0.5; 3.00 Å is the grid's limit"
    assert note in capsys.readouterr().out and note in json.loads((folder / "same.json").read_text())["notes"][0]


def test_without_matplotlib_all_but_the_picture_is_written(files, monkeypatch, capsys):
    folder, _ = files
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    main([str(folder / "a.mrc"), str(folder / "b.mrc")])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (folder / "a_fsc.csv").exists() and not (folder / "a_fsc.png").exists()
