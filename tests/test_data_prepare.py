"""data_prepare.py: EMDB's maps on the training grid, prepared or skipped for a stated reason."""

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

import data
import data_prepare
import mrc
import train
import train_objectives

ROOT = Path(__file__).parent.parent

# As EMDB's search exports it, with quotes around what holds a comma.
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
"""  # noqa: E501
REASONS = {
    1001: "",
    1002: "",
    1003: "resolution",
    1004: "resolution",
    1005: "not single particle",
    1006: "no half maps",
    1007: "helical",
    1008: "not single particle",
    1009: "side longer than 40 Å",
    1010: "not usable",
    1012: "not in the metadata",
}


def gaussian(shape, voxel, sigma=4.0):
    """A blob off the middle, so that a shift or a swap of axes would show; sigma in Å."""
    grid = torch.meshgrid(
        *(torch.arange(n) * voxel - 0.4 * n * voxel for n in shape), indexing="ij"
    )
    return torch.exp(-sum(a**2 for a in grid) / (2 * sigma**2))


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


def test_each_rule_of_the_paper_removes_the_entries_it_names_and_no_other(emdb):
    prepare(emdb)
    rows = index(emdb / "out")
    # No half map, no mask, no entry without a file.
    assert set(rows) == {f"emd_{number}" for number in REASONS}
    for number, reason in REASONS.items():
        skipped = rows[f"emd_{number}"]["skipped"]
        assert skipped.startswith(reason) and bool(skipped) == bool(reason), (number, skipped)
    assert "emd_1010.map.gz" in rows["emd_1010"]["skipped"]
    made = sorted(file.name for file in (emdb / "out").glob("*.npy"))
    assert made == ["emd_1001.npy", "emd_1002.npy"]


def test_without_metadata_only_the_maps_themselves_are_judged(emdb):
    skipped = {row["entry"] for row in prepare(emdb, metadata=None) if row["skipped"]}
    assert skipped == {"emd_1009", "emd_1010"}  # too large, cut short


def test_a_lower_resolution_is_accepted_if_asked_for(emdb):
    rows = prepare(emdb, voxel_size=1.0, max_resolution=4.0)
    taken = {row["entry"] for row in rows if not row["skipped"]}
    assert taken == {"emd_1001", "emd_1002", "emd_1003"}


def test_entries_without_half_maps_are_accepted_if_asked_for(emdb, capsys):
    rows = prepare(emdb, half_maps=False)
    taken = {row["entry"] for row in rows if not row["skipped"]}
    assert taken == {"emd_1001", "emd_1002", "emd_1006"}
    data_prepare.main(["urls", str(emdb / "emdb.csv"), "--no-half-maps"])
    assert "emd_1006.map.gz" in capsys.readouterr().out


def test_literal_percentiles_clip_both_ends_and_training_must_ask_for_them(emdb):
    prepare(emdb, literal_percentiles=True)
    stored = np.load(emdb / "out/emd_1001.npy")
    assert (stored == 0).mean() > 0.01 and (stored == 1).mean() == pytest.approx(0.01, abs=0.003)
    with pytest.raises(ValueError, match="prepared with percentiles .1.0, 99.0."):
        data.read_volumes(emdb / "out", 1.5)
    flags = ["--model", "tiny-mae", "--data", str(emdb / "out"), "--voxel-size", "1.5"]
    cfg = train.parse([*flags, "--crop", "24", "--literal-percentiles"])
    first, _ = train_objectives.datasets(cfg)
    assert first[0].shape == (4, 1, 24, 24, 24)


def test_entries_of_a_list_are_never_trained_on(emdb):
    (emdb / "test_set.txt").write_text("EMD-1001\nEMD-9999\n")
    rows = prepare(emdb, excluded=emdb / "test_set.txt")
    skipped = {row["entry"]: row["skipped"] for row in rows}
    assert skipped["emd_1001"] == "held out by --held-out" and not skipped["emd_1002"]
    volumes, _ = data.read_volumes(emdb / "out", 1.5)
    assert [volume.label for volume in volumes] == ["emd_1002"]
    # The folder remembers the list.
    with pytest.raises(ValueError, match="begun with .*emd_1001.*; give these"):
        prepare(emdb)


def write_mrc(path, values, axes):
    """An MRC file of 1 Å per voxel whose columns, rows and sections are the given axes."""
    with mrcfile.new(path) as file:
        file.set_data(values.transpose([3 - axis for axis in axes[::-1]]))
        header = file.header
        header.mapc, header.mapr, header.maps = axes
        header.mz, header.my, header.mx = values.shape
        header.cella = values.shape[::-1]


@pytest.mark.parametrize("axes", [(1, 2, 3), (3, 1, 2)])
def test_a_prepared_map_is_the_density_on_the_new_grid_from_0_to_1(tmp_path, axes):
    # A blob, and along x a wave of 2.3 Å. The new grid, of 1.5 Å, shows the blob but not the wave,
    # because its Nyquist limit is 3 Å.
    (tmp_path / "emdb").mkdir()
    shape = (48, 40, 44)
    fine = 3 * torch.cos(2 * torch.pi * 19 / 44 * torch.arange(44))
    density = 7 * gaussian(shape, 1.0) + fine
    write_mrc(tmp_path / "emdb/emd_7.map", density.numpy(), axes)
    (row,) = prepare(tmp_path, metadata=None, max_side=50)
    stored = np.load(tmp_path / "out/emd_7.npy", mmap_mode="r")
    assert stored.dtype == np.float16 and stored.shape == (32, 32, 32)
    new = [round(n / 1.5) for n in shape]  # 32, 27, 29
    grid = torch.meshgrid(
        *(torch.arange(m) * n / m - 0.4 * n for n, m in zip(shape, new)), indexing="ij"
    )
    want = 7 * torch.exp(-sum(a**2 for a in grid) / 32).numpy()
    top = np.percentile(want, 99.999)
    want = np.clip(want / top, 0, 1)
    inner = stored[:, 16 - 27 // 2 : 16 - 27 // 2 + 27, 16 - 29 // 2 : 16 - 29 // 2 + 29]
    np.testing.assert_allclose(inner, want, atol=1e-3)  # float16 holds 5e-4
    assert np.count_nonzero(stored) == np.count_nonzero(inner)  # padded with solvent
    for name, value in (
        ("maximum", top),
        ("mean", want.mean()),
        ("std", want.std()),
        ("filled", (want > 0.1).mean()),
    ):
        written = float(index(tmp_path / "out")["emd_7"][name])
        assert written == pytest.approx(float(value), rel=2e-3)
    assert row["voxel_size"].split() == [f"{n / m:.5f}" for n, m in zip(shape, new)]


def test_a_stopped_run_goes_on_where_it_was(emdb, monkeypatch):
    whole = prepare(emdb, "whole", metadata=None)
    prepare_map = data_prepare.prepare_map
    made = []

    def stops_after_four(file, *settings):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(file.name)
        return prepare_map(file, *settings)

    monkeypatch.setattr(data_prepare, "prepare_map", stops_after_four)
    with pytest.raises(KeyboardInterrupt):
        prepare(emdb, metadata=None)

    # A run that was killed leaves half a row. A map may be deleted by hand.
    with open(emdb / "out/index.csv", "a") as file:
        file.write("emd_1005,,tra")
    (emdb / "out/emd_1004.npy").unlink()
    again = []

    def counted(file, *settings):
        again.append(file.name)
        return prepare_map(file, *settings)

    monkeypatch.setattr(data_prepare, "prepare_map", counted)
    prepare(emdb, metadata=None)
    assert set(made) & set(again) == {"emd_1004.map.gz"}
    assert sorted(index(emdb / "out").items()) == sorted(index(emdb / "whole").items())
    assert len(index(emdb / "out")) == len(whole) == len(REASONS)


def test_a_folder_is_not_continued_with_other_settings(emdb):
    prepare(emdb)
    with pytest.raises(ValueError, match="begun with .*1.5.*; give these, or another folder"):
        prepare(emdb, voxel_size=3.0)


def test_two_processes_prepare_the_same_maps_as_one(emdb):
    one, two = prepare(emdb, "one"), prepare(emdb, "two", workers=2)
    assert sorted(map(str, one)) == sorted(map(str, two))
    assert index(emdb / "two").keys() == index(emdb / "one").keys()
    for entry in ("emd_1001", "emd_1002"):
        assert (emdb / f"one/{entry}.npy").read_bytes() == (emdb / f"two/{entry}.npy").read_bytes()


def test_a_full_disk_stops_the_run_with_one_line_and_no_half_written_map(emdb):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # bytes; a map has 16,000
    try:
        with pytest.raises(OSError, match="emd_1001.npy: not written") as error:
            prepare(emdb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and not list((emdb / "out").glob("*.npy"))
    taken = {row["entry"] for row in prepare(emdb) if not row["skipped"]}
    assert taken == {"emd_1001", "emd_1002"}


def test_train_reads_a_prepared_folder_by_its_index(emdb, capsys):
    prepare(emdb)
    (emdb / "out/emd_1.npy").write_bytes(b"of another run")  # not in the index
    cfg = train.parse(["--model", "tiny", "--data", str(emdb / "out"), "--crop", "16"])
    first, second = train_objectives.datasets(cfg)
    volumes = first.entries + second.entries
    assert sorted(v.label for v in volumes) == ["emd_1001", "emd_1002"]
    assert all(isinstance(v.voxels(), np.memmap) for v in volumes)
    raw, _ = data.read_volumes(emdb / "emdb/structures/EMD-1001/map", 1.5)
    np.testing.assert_array_equal(raw[0].voxels(), np.load(emdb / "out/emd_1001.npy"))
    assert first[0].shape == (4, 1, 16, 16, 16)
    assert "0 maps skipped, 2 read" in capsys.readouterr().out


def test_a_prepared_folder_with_another_voxel_size_or_a_damaged_map_is_refused(emdb):
    prepare(emdb)
    with pytest.raises(ValueError, match="prepared at 1.5 Å per voxel, wanted are 3"):
        data.read_volumes(emdb / "out", 3.0)
    (emdb / "out/emd_1002.npy").write_bytes((emdb / "out/emd_1002.npy").read_bytes()[:-1])
    volumes, refused = data.read_volumes(emdb / "out", 1.5)
    assert [v.label for v in volumes] == ["emd_1001"]
    assert len(refused) == 1 and "emd_1002.npy" in refused[0]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("settings.json", lambda text: "null", "settings.json: damaged"),
        ("settings.json", lambda text: "{}", "settings.json: damaged"),
        ("settings.json", lambda text: text[:-3], "settings.json: damaged"),
        ("settings.json", lambda text: text.replace("1.5", '"x"'), "settings.json: damaged"),
        ("index.csv", lambda text: text.replace("file", "x", 1), "index.csv: damaged"),
        ("index.csv", lambda text: text.replace(",,", "\n", 1), "index.csv: damaged"),
        ("index.csv", lambda text: text.replace(",,", ",,,,", 1), "index.csv: damaged"),
    ],
)
def test_a_damaged_table_of_a_prepared_folder_is_named(emdb, name, change, message):
    prepare(emdb)
    path = emdb / "out" / name
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        data.read_volumes(emdb / "out", 1.5)
    with pytest.raises(ValueError, match=message):
        prepare(emdb)


@pytest.mark.parametrize("damage", [lambda x: x[0], lambda x: x[:0], lambda x: x.astype("f8")])
def test_a_prepared_map_of_another_kind_is_refused(emdb, damage):
    prepare(emdb)
    file = sorted((emdb / "out").glob("*.npy"))[0]
    np.save(file, damage(np.load(file)))
    volumes, refused = data.read_volumes(emdb / "out", 1.5)
    assert file.stem not in [volume.label for volume in volumes]
    assert len(refused) == 1 and f"{file}: " in refused[0] and "prepare it again" in refused[0]


def test_an_archive_replaces_a_file_only_if_asked_to_and_never_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "ATOM      1  CA  ALA A   1      16.000  -8.000  50.000  1.00 20.00           C\n"
    Path("entries").mkdir()
    Path("entries/1abc.pdb").write_text(line)
    Path("list.tsv").write_text("label\tpdb_id\tchains\tatoms\na\t1ABC\t\t1\n")
    Path("old.npz").write_bytes(b"old")
    command = ["structures", "list.tsv", "--from", "entries", "-o"]
    with pytest.raises(FileExistsError, match="old.npz: exists"):
        data_prepare.main([*command, "old.npz"])
    for name in ("list.tsv", "entries/1abc.pdb"):
        with pytest.raises(FileExistsError, match=f"{name}: is the input"):
            data_prepare.main([*command, name, "--overwrite"])
    data_prepare.main([*command, "old.npz", "--overwrite"])
    assert Path("old.npz").read_bytes() != b"old"


def test_train_holds_out_the_same_entries_as_the_index():
    labels = [f"emd_{i}" for i in range(30_000, 34_000)]
    parts = train_objectives.split([data.Volume(label, torch.zeros(1)) for label in labels])
    held_out = {label for label in labels if data_prepare.held_out(label)}
    assert {v.label for v in parts[1]} == held_out
    assert len(parts[1]) == pytest.approx(200, abs=45)  # binomial: 14


def test_cryolvm_gets_crops_of_48_voxels_scaled_to_0_to_1(emdb):
    prepare(emdb, voxel_size=1.0, max_resolution=4.0)
    volumes, refused = data.read_volumes(emdb / "out", 1.0)
    crops = data.MapCrops(volumes, crop=48, crops=2, mean=0.0, std=1.0)
    x = torch.cat([crops[i] for i in range(4)])
    assert not refused and x.shape == (8, 1, 48, 48, 48) and x.min() == 0 and 0.9 < x.max() <= 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("emdb_id,title\n", "no column half_map_filename, resolution, structure"),
        ("", "no column emdb_id"),
        (METADATA.replace("EMD-1003", "1A2B"), "'1a2b' is none"),
        (METADATA + "\n,\n", "emdb_id '' is none"),
    ],
)
def test_bad_metadata_are_refused(emdb, text, message):
    (emdb / "emdb.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(emdb)


def test_metadata_that_are_not_text_are_refused(emdb):
    (emdb / "emdb.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="emdb.csv: no text"):
        prepare(emdb)


def test_a_folder_without_maps_and_bad_settings_are_refused_before_anything_is_written(emdb):
    (emdb / "empty").mkdir()
    with pytest.raises(OSError, match="no such folder"):
        data_prepare.prepare(emdb / "none", emdb / "never", 1.5)
    with pytest.raises(ValueError, match="no map of an EMDB entry"):
        data_prepare.prepare(emdb / "empty", emdb / "never", 1.5)
    with pytest.raises(ValueError, match="--voxel-size 0"):
        data_prepare.prepare(emdb, emdb / "never", 0)
    for name, value in {"max_side": float("inf"), "max_resolution": float("nan")}.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value:g}: give"):
            data_prepare.prepare(emdb, emdb / "never", 1.5, **{name: value})
    with pytest.raises(ValueError, match="--workers 99999999: give 1 to 512"):
        data_prepare.prepare(emdb, emdb / "never", 1.5, workers=99999999)
    assert not (emdb / "never").exists()


def test_the_program_prints_an_error_as_one_line(emdb):
    program = [sys.executable, str(ROOT / "data_prepare.py"), "maps"]
    folders = [str(emdb / "none"), str(emdb / "out")]
    done = subprocess.run(program + folders, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"data_prepare.py: {emdb / 'none'}: no such folder\n"


def test_the_program_prints_progress_and_reasons(emdb, capsys):
    folders = [str(emdb / "emdb"), str(emdb / "out")]
    options = ["--metadata", str(emdb / "emdb.csv"), "--max-side", "40", "--workers", "1"]
    data_prepare.main(["maps", *folders, *options])
    out = capsys.readouterr().out
    assert "11 maps: 7 done or ruled out, 4 to prepare" in out
    assert "4/4" in out and "ETA 0:00:00" in out
    assert "     2 skipped: resolution not stated" in out
    assert "     1 skipped: not usable" in out
    assert json.loads((emdb / "out/settings.json").read_text())["voxel_size"] == 1.5


def test_the_program_prints_the_urls_of_the_entries_that_the_metadata_allow(emdb, capsys):
    data_prepare.main(["urls", str(emdb / "emdb.csv")])
    urls = capsys.readouterr().out.split()
    names = [url.split("/")[-1] for url in urls]
    assert names == [f"emd_{n}.map.gz" for n in (1001, 1002, 1009, 1010, 1011)]
    folder = "https://ftp.ebi.ac.uk/pub/databases/emdb/structures/EMD-1001/map/"
    assert urls[0] == folder + "emd_1001.map.gz"
