"""Tests of mrc.py: map and stack files of every kind that programs write."""

import bz2
import gzip
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from mrcfile.dtypes import HEADER_DTYPE

import files
import mrc

TESTS = Path(__file__).parent
ORACLES = TESTS / "oracles"
MAPS = TESTS.parent / "maps"  # deposited maps, not in the repository
AXIS_ORDERS = list(itertools.permutations((1, 2, 3)))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions():
    """(4, 5, 6) voxels that know where they are: 100 z + 10 y + x."""
    z, y, x = np.meshgrid(range(4), range(5), range(6), indexing="ij")
    return 100 * z + 10 * y + x


def make_file(
    path, values_zyx, *, axes=(1, 2, 3), order="<", kind="f4", mode=2, pack=bytes, **fields
):
    """An MRC file made field by field: axes = (mapc, mapr, maps), 1.1 x 1.2 x 1.3 Å per voxel."""
    stored = values_zyx.transpose([3 - axis for axis in axes[::-1]])  # sections, rows, columns
    header = np.zeros((), HEADER_DTYPE.newbyteorder(order))
    header["nz"], header["ny"], header["nx"] = stored.shape
    header["mz"], header["my"], header["mx"] = values_zyx.shape
    header["cella"] = tuple(n * v for n, v in zip(values_zyx.shape[::-1], (1.1, 1.2, 1.3)))
    header["cellb"] = (90, 90, 90)
    header["ispg"] = 1
    header["mode"] = mode
    header["mapc"], header["mapr"], header["maps"] = axes
    for name, axis in zip(("nxstart", "nystart", "nzstart"), axes):
        header[name] = 10 * axis  # 10 along x, 20 along y, 30 along z
    header["origin"] = (1.5, -2.5, 3.5)
    header["nversion"] = 20141
    header["map"] = b"MAP "
    header["machst"] = (0x44, 0x44, 0, 0) if order == "<" else (0x11, 0x11, 0, 0)
    header["label"][0] = b"made by a test"
    header["nlabl"] = 1
    extended = fields.pop("extended", b"")
    header["nsymbt"] = len(extended)
    for name, value in fields.items():
        header[name] = value
    content = header.tobytes() + extended + stored.astype(order + kind).tobytes()
    path.write_bytes(pack(content))
    return path


def make_stack(path, images, voxel_size=3.0, **fields):
    """A stack (P, H, W) as RELION writes it: space group 0, MZ = 1."""
    _, height, width = images.shape
    cell = (width * voxel_size, height * voxel_size, voxel_size)
    return make_file(path, images, **{"ispg": 0, "mz": 1, "cella": cell, **fields})


def same_fields(file, other, *, but=()):
    """Whether two headers agree in every field but some."""
    names = set(file.header.dtype.names) - set(but)
    differing = [
        name for name in names if file.header[name].tobytes() != other.header[name].tobytes()
    ]
    return differing == []


# ---- Reading and writing: what a file says is kept


def test_oracle_files_are_read_in_canonical_order_and_written_back_with_their_header(tmp_path):
    expected = np.load(ORACLES / "mrc_expected.npz")
    refused = ("voxel_zero.mrc", "cell_angle_100.mrc")
    oracles = [path for path in sorted((ORACLES / "mrc").iterdir()) if path.name not in refused]
    assert len(oracles) == 13
    for path in oracles:
        name = path.name.split(".")[0]
        map = mrc.read_map(path)
        assert map.density.dtype == torch.float32
        np.testing.assert_array_equal(map.density, expected[f"{name}/data_zyx"].astype("f4"))
        voxel_xyz = expected[f"{name}/voxel_xyz"]
        np.testing.assert_allclose(map.voxel_size[::-1], voxel_xyz, rtol=1e-6)
        assert map.origin[::-1] == tuple(expected[f"{name}/origin_xyz_header"])
        assert map.nstart[::-1] == tuple(expected[f"{name}/nstart_xyz"])
        assert map.notes == ()

        mrc.write_map(tmp_path / path.name, map)
        assert mrcfile.validate(tmp_path / path.name)
        with mrcfile.open(path) as before, mrcfile.open(tmp_path / path.name) as after:
            np.testing.assert_array_equal(before.data, after.data)  # stored order
            assert before.extended_header.tobytes() == after.extended_header.tobytes()
            assert same_fields(before, after, but=("mode", "dmean", "rms"))  # these are rounded
            assert after.header.mode == 2
            assert after.data.dtype.kind == "f"


def test_every_deposited_map_is_read_with_the_voxel_size_of_its_table():
    if not (MAPS / "maps.tsv").exists():
        pytest.skip("no maps/maps.tsv; python data_prepare.py --help says how to fetch maps")
    lines = (MAPS / "maps.tsv").read_text().splitlines()
    names, *rows = (line.split("\t") for line in lines)
    for values in rows:
        row = dict(zip(names, values))
        map = mrc.read_map(MAPS / row["file"])
        assert "x".join(map_side for map_side in map_sides(map)) == row["shape_zyx"]
        assert map.voxel_size == pytest.approx((float(row["voxel_A"]),) * 3, rel=1e-3)
        origin = [float(o) for o in row["origin_xyz_A"].split(",")]
        assert map.origin[::-1] == pytest.approx(origin, abs=0.01)
        assert float(map.density.min()) == pytest.approx(float(row["vmin"]), rel=2e-3)
        assert float(map.density.max()) == pytest.approx(float(row["vmax"]), rel=2e-3)
        assert float(map.density.std()) == pytest.approx(float(row["std"]), rel=2e-3)


def map_sides(map):
    return [str(n) for n in map.density.shape]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("axes", AXIS_ORDERS)
def test_every_axis_and_byte_order_is_read_alike_and_kept_in_the_file(tmp_path, axes, order):
    values = positions()
    extra = {"extended": b"x" * 80, "exttyp": b"SERI"}
    path = make_file(tmp_path / "in.mrc", values, axes=axes, order=order, **extra)
    map = mrc.read_map(path)
    np.testing.assert_array_equal(map.density, values)
    assert map.voxel_size == pytest.approx((1.3, 1.2, 1.1))
    assert map.origin == (3.5, -2.5, 1.5)
    assert map.nstart == (30, 20, 10)

    # Other values on the same grid.
    changed = torch.from_numpy(values).flip(0).float() * 2 - 7
    out = tmp_path / "out.mrc"
    mrc.write_map(out, replace(map, density=changed))
    assert mrcfile.validate(out)
    np.testing.assert_array_equal(mrc.read_map(out).density, changed)
    with mrcfile.open(path) as before, mrcfile.open(out) as after:
        assert same_fields(before, after, but=("dmin", "dmax", "dmean", "rms"))
        assert after.header["dmin"].item() == changed.min()
        assert after.header["dmax"].item() == changed.max()
        assert after.header.dmean == pytest.approx(after.data.mean(), rel=1e-6)
        assert after.header.rms == pytest.approx(after.data.std(), rel=1e-6)
        assert after.extended_header.tobytes() == b"x" * 80


@pytest.mark.parametrize(
    "mode, kind, values",
    [
        (0, "i1", (-128, 127)),
        (1, "i2", (-32768, 32767)),
        (2, "f4", (-1e30, 1e30)),
        (6, "u2", (0, 65535)),
        (12, "f2", (-65504, 65504)),
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_modes_keep_their_extreme_values(tmp_path, mode, kind, values, order):
    array = np.zeros((3, 4, 5))
    array[0, 0, :2] = values
    path = make_file(tmp_path / "in.mrc", array, mode=mode, kind=kind, order=order)
    np.testing.assert_array_equal(mrc.read_map(path).density, array.astype("f4"))


def test_compression_is_told_by_content_when_reading_and_by_name_when_writing(tmp_path):
    values = positions()
    for i, pack in enumerate((bytes, gzip.compress, bz2.compress)):
        map = mrc.read_map(make_file(tmp_path / f"{i}.mrc", values, pack=pack))
        np.testing.assert_array_equal(map.density, values)
    first_bytes = {"o.map": b"", "o.CCP4": b"", "o.mrc.gz": b"\x1f\x8b", "o.map.bz2": b"BZh"}
    for name, magic in first_bytes.items():
        mrc.write_map(tmp_path / name, map)
        assert (tmp_path / name).read_bytes().startswith(magic)
        with mrcfile.open(tmp_path / name) as file:
            np.testing.assert_array_equal(file.data, values)


def test_equal_maps_make_equal_gzip_files(tmp_path):
    map = mrc.Map(random(4, 5, 6), 1.5)
    for name in ("a.mrc.gz", "b.mrc.gz"):
        mrc.write_map(tmp_path / name, map)
    content = (tmp_path / "a.mrc.gz").read_bytes()
    assert content == (tmp_path / "b.mrc.gz").read_bytes()
    assert content[3:8] == bytes(5)  # neither a name nor a time inside


def test_a_given_voxel_size_replaces_the_headers_and_reaches_the_file(tmp_path):
    path = make_file(tmp_path / "in.mrc", positions(), cella=(0, 0, 0))
    with pytest.raises(ValueError, match="--voxel-size"):
        mrc.read_map(path)
    with pytest.raises(ValueError, match="in.mrc: .*positive"):
        mrc.read_map(path, voxel_size=-1)
    mrc.write_map(tmp_path / "out.mrc", mrc.read_map(path, voxel_size=1.5))
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.voxel_size.tolist() == (1.5, 1.5, 1.5)
        assert file.header.cella.tolist() == (9.0, 7.5, 6.0)
        assert file.header.origin.tolist() == (1.5, -2.5, 3.5)


def test_a_map_on_a_part_of_its_unit_cell_keeps_cell_and_sampling(tmp_path):
    part = {"mx": 60, "my": 50, "mz": 40, "cella": (66, 60, 52)}
    map = mrc.read_map(make_file(tmp_path / "in.mrc", positions(), **part))
    assert map.voxel_size == pytest.approx((1.3, 1.2, 1.1))
    mrc.write_map(tmp_path / "out.mrc", map)
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert {name: file.header[name].tolist() for name in part} == part


def test_a_map_made_here_is_written_with_its_own_voxel_size_and_origin(tmp_path):
    map = mrc.Map(random(4, 5, 6), (3.0, 2.0, 1.0), origin=(30.0, 20.0, 10.0))
    mrc.write_map(tmp_path / "out.mrc", map)
    assert mrcfile.validate(tmp_path / "out.mrc")
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.voxel_size.tolist() == (1.0, 2.0, 3.0)
        assert file.header.origin.tolist() == (10.0, 20.0, 30.0)
        np.testing.assert_array_equal(file.data, map.density)


def test_stem_drops_every_suffix_of_maps_and_stacks():
    for name in ("a.b.mrc", "a.b.MAP.GZ", "a.b.ccp4.bz2", "a.b.mrcs", "a.b.mrcs.gz"):
        assert mrc.stem(Path("folder") / name) == "a.b"


# ---- Labels


@pytest.mark.parametrize("before", [0, 3, 10])
def test_a_label_says_which_program_wrote_the_map(tmp_path, before):
    old = [f"label {i}" for i in range(before)]
    fields = {"label": [text.encode() for text in old] + [b""] * (10 - before), "nlabl": before}
    map = mrc.read_map(make_file(tmp_path / "in.mrc", positions(), **fields))
    mrc.write_map(tmp_path / "out.mrc", map, label="sampling.py --task wedge")
    assert mrcfile.validate(tmp_path / "out.mrc")
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.get_labels() == [*old[:9], "sampling.py --task wedge"]


def test_headers_older_than_mrc2014_come_out_valid(tmp_path):
    label = [b"first", b"", b"third"] + [b""] * 7  # a gap, and a wrong count
    old = {"nversion": 0, "machst": (0, 0, 0, 0), "nlabl": 7, "label": label}
    path = make_file(tmp_path / "in.mrc", positions(), **old)
    mrc.write_map(tmp_path / "out.mrc", mrc.read_map(path))
    assert mrcfile.validate(tmp_path / "out.mrc")
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.get_labels() == ["first", "third"]


# ---- Where a map is


@pytest.mark.parametrize(
    "origin, nstart, corner",
    [
        ((0, 0, 0), (0, 0, 0), (0, 0, 0)),
        ((0, 0, 0), (10, 20, -30), (11, 24, -39)),
        ((1.5, 0, 3.5), (0, 0, 0), (1.5, 0, 3.5)),
        ((11, 24, -39), (10, 20, -30), (11, 24, -39)),  # the same place twice
    ],
)
def test_a_non_zero_origin_says_where_the_map_is(tmp_path, origin, nstart, corner):
    starts = dict(zip(("nxstart", "nystart", "nzstart"), nstart))
    path = make_file(tmp_path / "in.mrc", positions(), origin=origin, **starts)
    map = mrc.read_map(path)
    assert map.corner[::-1] == pytest.approx(corner, rel=1e-6)
    mrc.write_map(tmp_path / "out.mrc", map)
    with mrcfile.open(path) as before, mrcfile.open(tmp_path / "out.mrc") as after:
        assert same_fields(before, after, but=("dmin", "dmax", "dmean", "rms"))


def wave(map):
    """A plane wave of the specimen, sampled on a map's grid."""
    phase = 0
    for axis, periods in enumerate((2, 3, 1)):
        n = map.density.shape[axis]
        voxel_size = map.voxel_size[axis]
        place = map.corner[axis] + torch.arange(n, dtype=torch.float64) * voxel_size
        part = 2 * math.pi * periods * (place + 5) / (n * voxel_size)
        phase = phase + part.view([n if i == axis else 1 for i in range(3)])
    return torch.cos(phase)


@pytest.mark.parametrize(
    "origin, nstart, new_nstart",
    [
        ((4.0, -3.0, 2.5), (0, 0, 0), (0, 0, 0)),
        ((4.0, -3.0, 2.5), (6, -10, 16), (3, -7, 15)),
        ((4.0, -3.0, 2.5), (1, 2, 3), (0, 0, 0)),
        ((0, 0, 0), (6, -10, 16), (3, -7, 15)),
        ((0, 0, 0), (1, 2, 3), (0, 0, 0)),  # becomes the origin
    ],
)
def test_a_resampled_map_stays_where_it_was(origin, nstart, new_nstart):
    empty = torch.zeros(12, 20, 16, dtype=torch.float64)
    map = mrc.Map(empty, (1.0, 1.5, 2.0), origin=origin, nstart=nstart)
    map = replace(map, density=wave(map))
    new = mrc.resample_map(map, 2.1)
    assert new.density.shape == (6, 14, 15)  # 5.7, 14.3, 15.2
    assert new.voxel_size == pytest.approx((12 / 6, 30 / 14, 32 / 15))  # the same box
    assert new.nstart == new_nstart
    assert new.corner == pytest.approx(map.corner)
    torch.testing.assert_close(new.density, wave(new), rtol=0, atol=1e-12)


def test_resampling_to_the_same_grid_is_free_and_to_no_grid_is_refused():
    map = mrc.Map(torch.zeros(12, 20, 16), (1.0, 1.5, 2.0))
    assert mrc.resample_map(map, (1.0, 1.5, 2.0)) is map
    with pytest.raises(ValueError, match="positive"):
        mrc.resample_map(map, 0)


def test_a_resampled_map_is_written_with_its_new_cell(tmp_path):
    map = mrc.read_map(make_file(tmp_path / "in.mrc", positions(), axes=(3, 1, 2)))
    fine = mrc.resample_map(map, 0.55)
    assert fine.density.shape == (9, 11, 12)
    mrc.write_map(tmp_path / "out.mrc", fine)
    assert mrcfile.validate(tmp_path / "out.mrc")
    back = mrc.read_map(tmp_path / "out.mrc")
    np.testing.assert_array_equal(back.density, fine.density)
    assert back.voxel_size == pytest.approx(fine.voxel_size)
    assert back.origin == pytest.approx(fine.origin)
    assert back.header["cella"].tolist() == pytest.approx((6 * 1.1, 5 * 1.2, 4 * 1.3))


# ---- What is on the disk is safe


def test_nothing_is_overwritten_unless_asked_and_the_input_never(tmp_path):
    path = make_file(tmp_path / "in.mrc", positions())
    map = mrc.read_map(path)
    before = path.read_bytes()
    negative = replace(map, density=-map.density)
    out = tmp_path / "out.mrc"

    (tmp_path / "link.mrc").symlink_to(path)
    for name in ("in.mrc", "link.mrc"):
        with pytest.raises(FileExistsError, match="input"):
            mrc.write_map(tmp_path / name, map, overwrite=True)
    mrc.write_map(out, map)
    with pytest.raises(FileExistsError, match="--overwrite"):
        mrc.write_map(out, negative)
    np.testing.assert_array_equal(mrc.read_map(out).density, map.density)
    mrc.write_map(out, negative, overwrite=True)
    np.testing.assert_array_equal(mrc.read_map(out).density, -map.density)
    assert path.read_bytes() == before


def test_maps_that_cannot_be_written_are_refused(tmp_path):
    map = mrc.Map(random(4, 5, 6), 1.5)
    with pytest.raises(ValueError, match=".ccp4"):
        mrc.write_map(tmp_path / "out.png", map)
    with pytest.raises(OSError, match="no such folder"):
        mrc.write_map(tmp_path / "nowhere" / "out.mrc", map)
    with pytest.raises(ValueError, match="NaN"):
        mrc.write_map(tmp_path / "nan.mrc", replace(map, density=map.density / 0))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    map = mrc.Map(random(4, 5, 6), 1.5)
    out = tmp_path / "out.mrc"
    mrc.write_map(out, map)
    before = out.read_bytes()

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        mrc.write_map(out, replace(map, density=-map.density), overwrite=True)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_map_can_appear_together_with_other_outputs(tmp_path):
    map = mrc.Map(random(4, 5, 6), 1.5)
    out = tmp_path / "out.mrc"
    with files.AtomicOutputs() as outputs:
        mrc.write_map(out, map, open_output=outputs.open)
        assert not out.exists()
    assert torch.equal(mrc.read_map(out).density, map.density)
