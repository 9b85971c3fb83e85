"""What `data.py prepare` promises: EMDB's maps on the training grid, each entry there or skipped with its reason."""

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import make_file

import data
import data_prepare
import mrc
import train
import train_objectives

ROOT = Path(__file__).parent.parent

# As https://www.ebi.ac.uk/emdb/api/search/...?wt=csv&fl=emdb_id,title,... writes it: quotes where there are commas.
METADATA = """emdb_id,title,structure_determination_method,resolution,half_map_filename
EMD-1001,"Apoferritin, in ice",singleParticle,1.8,"emd_1001_half_map_1.map.gz,emd_1001_half_map_2.map.gz"
EMD-1002,Ribosome,singleParticle,2.99,emd_1002_half_map_1.map.gz
EMD-1003,Not good enough,singleParticle,3.0,emd_1003_half_map_1.map.gz
EMD-1004,Resolution not stated,singleParticle,,emd_1004_half_map_1.map.gz
EMD-1005,Membrane,subtomogramAveraging,2.5,emd_1005_half_map_1.map.gz
EMD-1006,No halves,singleParticle,2.5,
EMD-1007,Tau filaments from a brain,singleParticle,2.5,emd_1007_half_map_1.map.gz
EMD-1008,Flagellum,helical,2.5,emd_1008_half_map_1.map.gz
EMD-1009,Too large,singleParticle,2.5,emd_1009_half_map_1.map.gz
EMD-1010,Cut short,Single particle,2.5,emd_1010_half_map_1.map.gz
EMD-1011,Not downloaded,singleParticle,2.5,emd_1011_half_map_1.map.gz
"""
REASONS = {1001: "", 1002: "", 1003: "resolution", 1004: "resolution", 1005: "not single particle", 1006: "no half maps",
           1007: "helical", 1008: "not single particle", 1009: "side longer than 40 Å", 1010: "unreadable",
           1012: "not in the metadata"}


def gaussian(shape, voxel, sigma=4.0):
    """About the middle of the first half of each axis, in Å: nothing that resampling could move unseen."""
    grid = torch.meshgrid(*(torch.arange(n) * voxel - 0.4 * n * voxel for n in shape), indexing="ij")
    return torch.exp(-sum(a ** 2 for a in grid) / (2 * sigma ** 2))


@pytest.fixture
def emdb(tmp_path):
    """A folder as EMDB's archive lays it out, and its metadata; boxes 30 Å wide, 1 Å per voxel."""
    for number in REASONS:
        folder = tmp_path / f"emdb/structures/EMD-{number}/map"
        folder.mkdir(parents=True)
        size = (60, 30, 30) if number == 1009 else (30, 30, 30)
        mrc.write_map(folder / f"emd_{number}.map.gz", mrc.Map(5 * gaussian(size, 1.0), 1.0))
    cut = tmp_path / "emdb/structures/EMD-1010/map/emd_1010.map.gz"
    cut.write_bytes(cut.read_bytes()[:3000])
    other = tmp_path / "emdb/structures/EMD-1001/other"
    other.mkdir()
    for name in ("emd_1001_half_map_1.map.gz", "emd_1001_msk_1.map"):
        mrc.write_map(other / name, mrc.Map(gaussian((30, 30, 30), 1.0), 1.0))
    (tmp_path / "emdb.csv").write_text(METADATA)
    return tmp_path


def prepare(folder, out="out", **settings):
    settings = dict(dict(voxel_size=1.5, metadata=folder / "emdb.csv", max_side=40.0), **settings)
    return data_prepare.prepare(folder / "emdb", folder / out, say=lambda _: None, **settings)


def index(folder):
    with open(folder / "index.csv", newline="") as file:
        return {row["entry"]: row for row in csv.DictReader(file)}


def test_every_rule_of_the_paper_leaves_out_what_it_names_and_nothing_else(emdb):
    prepare(emdb)
    rows = index(emdb / "out")
    assert set(rows) == {f"emd_{number}" for number in REASONS}              # no half map, no mask, none that is not there
    for number, reason in REASONS.items():
        skipped = rows[f"emd_{number}"]["skipped"]
        assert skipped.startswith(reason) and bool(skipped) == bool(reason), (number, skipped)
    assert "emd_1010.map.gz" in rows["emd_1010"]["skipped"]
    assert sorted(file.name for file in (emdb / "out").glob("*.npy")) == ["emd_1001.npy", "emd_1002.npy"]
    without = {row["entry"] for row in prepare(emdb, "all", metadata=None) if row["skipped"]}
    assert without == {"emd_1009", "emd_1010"}                               # what the maps themselves show
    lvm = {row["entry"] for row in prepare(emdb, "lvm", voxel_size=1.0, max_resolution=4.0) if not row["skipped"]}
    assert lvm == {"emd_1001", "emd_1002", "emd_1003"}


@pytest.mark.parametrize("axes", [(1, 2, 3), (3, 1, 2)])
def test_a_prepared_map_is_the_density_on_the_new_grid_from_0_to_1(tmp_path, axes):
    # A blob and, along x, a wave finer than the new grid can show: one goes onto the grid, the other goes.
    (tmp_path / "emdb").mkdir()
    shape = (48, 40, 44)
    fine = 3 * torch.cos(2 * torch.pi * 19 / 44 * torch.arange(44))          # period 2.3 Å; Nyquist of 1.5 Å is 3 Å
    density = 7 * gaussian(shape, 1.0) + fine
    make_file(tmp_path / "emdb/emd_7.map", density.numpy(), axes=axes, cella=(44, 40, 48))
    row, = prepare(tmp_path, metadata=None, max_side=50)
    stored = np.load(tmp_path / "out/emd_7.npy", mmap_mode="r")
    assert stored.dtype == np.float16 and stored.shape == (32, 32, 32) and isinstance(stored, np.memmap)
    new = [round(n / 1.5) for n in shape]                                    # 32, 27, 29
    grid = torch.meshgrid(*(torch.arange(m) * n / m - 0.4 * n for n, m in zip(shape, new)), indexing="ij")
    want = 7 * torch.exp(-sum(a ** 2 for a in grid) / 32).numpy()
    top = np.percentile(want, 99.999)
    want = np.clip(want / top, 0, 1)
    inner = stored[:, 16 - 27 // 2:16 - 27 // 2 + 27, 16 - 29 // 2:16 - 29 // 2 + 29]
    np.testing.assert_allclose(inner, want, atol=1e-3)                       # float16 holds 5e-4
    assert np.count_nonzero(stored) == np.count_nonzero(inner)               # padded with solvent
    for name, value in (("maximum", top), ("mean", want.mean()), ("std", want.std()), ("filled", (want > 0.1).mean())):
        assert float(index(tmp_path / "out")["emd_7"][name]) == pytest.approx(float(value), rel=2e-3)
    assert row["voxel_size"].split() == [f"{n / m:.5f}" for n, m in zip(shape, new)]


def test_a_run_that_was_stopped_goes_on_where_it_was(emdb, monkeypatch):
    whole = prepare(emdb, "whole", metadata=None)
    made = []

    def counted(file, *settings, one=data_prepare.prepare_one):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(file)
        return one(file, *settings)

    with monkeypatch.context() as patch:
        patch.setattr(data_prepare, "prepare_one", counted)
        with pytest.raises(KeyboardInterrupt):
            prepare(emdb, metadata=None)
    with open(emdb / "out/index.csv", "a") as file:                          # killed in the middle of a row
        file.write("emd_1005,,tra")
    (emdb / "out/emd_1004.npy").unlink()                                     # a row whose map is gone
    done, made = made, [None] * 5
    monkeypatch.setattr(data_prepare, "prepare_one", counted)
    prepare(emdb, metadata=None)
    assert {file.name for file in done} & {file.name for file in made[5:]} == {"emd_1004.map.gz"}
    assert sorted(index(emdb / "out").items()) == sorted(index(emdb / "whole").items())
    assert len(index(emdb / "out")) == len(whole) == len(REASONS)
    with pytest.raises(ValueError, match="begun with .*1.5.*; give these, or another folder"):
        prepare(emdb, voxel_size=3.0)


def test_processes_prepare_what_one_would(emdb):
    one, two = prepare(emdb, "one"), prepare(emdb, "two", workers=2)
    assert sorted(map(str, one)) == sorted(map(str, two))
    assert index(emdb / "two").keys() == index(emdb / "one").keys()
    for entry in ("emd_1001", "emd_1002"):
        assert (emdb / f"one/{entry}.npy").read_bytes() == (emdb / f"two/{entry}.npy").read_bytes()


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_what_was_done(emdb):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))             # bytes; a map has 16,000
    try:
        with pytest.raises(OSError, match="emd_1001.npy: not written, is the disk full") as error:
            prepare(emdb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and not list((emdb / "out").glob("*.npy"))
    assert {row["skipped"] for row in prepare(emdb) if row["entry"] in ("emd_1001", "emd_1002")} == {""}


def test_train_reads_a_prepared_folder_by_its_index(emdb, capsys):
    prepare(emdb)
    (emdb / "out/emd_1.npy").write_bytes(b"of another run")                  # not in the index
    cfg = train.parse(["--model", "tiny", "--data", str(emdb / "out"), "--crop", "16"])
    first, second = train_objectives.datasets(cfg)
    assert sorted(v.label for v in first.volumes + second.volumes) == ["emd_1001", "emd_1002"]
    assert all(isinstance(v.voxels(), np.memmap) for v in first.volumes + second.volumes)
    raw, _ = data.read_volumes(emdb / "emdb/structures/EMD-1001/map", 1.5)
    np.testing.assert_array_equal(raw[0].voxels(), np.load(emdb / "out/emd_1001.npy"))
    assert first[0].shape == (4, 1, 16, 16, 16) and "0 maps skipped, 2 read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="prepared at 1.5 Å per voxel, wanted are 3"):
        data.read_volumes(emdb / "out", 3.0)
    (emdb / "out/emd_1002.npy").write_bytes((emdb / "out/emd_1002.npy").read_bytes()[:-1])
    volumes, refused = data.read_volumes(emdb / "out", 1.5)
    assert [v.label for v in volumes] == ["emd_1001"] and len(refused) == 1 and "emd_1002.npy" in refused[0]


def test_the_split_is_a_function_of_the_entry_and_the_one_train_makes():
    labels = [f"emd_{i}" for i in range(30_000, 34_000)]
    parts = train_objectives.split([data.Volume(label, torch.zeros(1)) for label in labels])
    assert {v.label for v in parts[1]} == {label for label in labels if data_prepare.held_out(label)}
    assert len(parts[1]) == pytest.approx(200, abs=45)                       # binomial: 14


def test_the_corpus_of_cryolvm_comes_as_48_cubed_crops_from_0_to_1(emdb):
    prepare(emdb, voxel_size=1.0, max_resolution=4.0)
    volumes, refused = data.read_volumes(emdb / "out", 1.0)
    crops = data.MapCrops(volumes, crop=48, crops=2, mean=0.0, std=1.0)
    x = torch.cat([crops[i] for i in range(4)])
    assert not refused and x.shape == (8, 1, 48, 48, 48) and x.min() == 0 and 0.9 < x.max() <= 1


def test_bad_input_is_one_clear_line(emdb):
    (emdb / "empty").mkdir()
    for folder, kind, match in ((emdb / "none", OSError, "no such folder"),
                                (emdb / "empty", ValueError, "no map of an EMDB entry")):
        with pytest.raises(kind, match=match):
            data_prepare.prepare(folder, emdb / "out", 1.5)
    for text, match in (("emdb_id,title\n", "no column half_map_filename, resolution, structure"), ("", "no column emdb_id"),
                        (METADATA.replace("EMD-1003", "1A2B"), "'1a2b' is none"), (METADATA + "\n,\n", "emdb_id '' is none")):
        (emdb / "emdb.csv").write_text(text)
        with pytest.raises(ValueError, match=match):
            prepare(emdb)
    (emdb / "emdb.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="emdb.csv: no text"):
        prepare(emdb)
    with pytest.raises(ValueError, match="--voxel-size 0"):
        data_prepare.prepare(emdb, emdb / "never", 0)
    assert not (emdb / "never").exists()
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), "prepare", str(emdb / "none"), str(emdb / "out")],
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"data.py: {emdb / 'none'}: no such folder\n")


def test_the_program_prints_progress_reasons_and_urls(emdb, capsys):
    data_prepare.main(["prepare", str(emdb / "emdb"), str(emdb / "out"), "--metadata", str(emdb / "emdb.csv"), "--max-side", "40",
               "--workers", "1"])
    out = capsys.readouterr().out
    assert "11 maps: 7 done or ruled out, 4 to prepare" in out and "ETA 0:00:00  9 skipped" in out
    assert "     2 skipped: resolution not stated" in out and "     1 skipped: unreadable" in out
    assert json.loads((emdb / "out/settings.json").read_text())["voxel_size"] == 1.5
    data_prepare.main(["urls", str(emdb / "emdb.csv")])
    urls = capsys.readouterr().out.split()
    assert [url.split("/")[-1] for url in urls] == [f"emd_{n}.map.gz" for n in (1001, 1002, 1009, 1010, 1011)]
    assert urls[0] == "https://ftp.ebi.ac.uk/pub/databases/emdb/structures/EMD-1001/map/emd_1001.map.gz"
