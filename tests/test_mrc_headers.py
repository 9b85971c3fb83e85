"""Tests of mrc.py: headers that are wrong, files that are refused, and stacks of images."""

import bz2
import gzip
import math
import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from test_mrc import make_file, make_stack, positions, random

import mrc

ORACLES = Path(__file__).parent / "oracles"


# ---- Headers that are wrong, but whose meaning is clear


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("stamp", [(0, 0, 0, 0), (0x44, 0x44, 0, 0), (0x11, 0x11, 0, 0)])
@pytest.mark.parametrize("mode, kind", [(0, "i1"), (2, "f4")])
def test_a_wrong_machine_stamp_does_not_matter(tmp_path, order, stamp, mode, kind):
    values = positions() - 128 if mode == 2 else positions() % 128
    how = {"order": order, "mode": mode, "kind": kind, "machst": stamp}
    np.testing.assert_array_equal(
        mrc.read_map(make_file(tmp_path / "in.mrc", values, **how)).density, values
    )
    images = random(3, 24, 24).numpy() + 2 if mode == 2 else np.ones((3, 24, 24))
    images[:, 12, 12] = 100
    stack = mrc.read_stack(make_stack(tmp_path / "in.mrcs", images, **how))
    assert (stack.density[:, 12, 12] > 90).all()


def imod_fields(order, flags):
    """Bytes 112 to 195 of a header, with IMOD's stamp and flags."""
    extra = np.zeros(84, "u1")
    extra[40:48] = np.array([1146047817, flags], order + "i4").view("u1")
    return {"extra2": extra.tobytes(), "mode": 0, "order": order}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("flags, kind, value", [(1, "i1", -56), (0, "u1", 200)])
def test_imod_bytes_are_signed_only_if_its_flag_says_so(tmp_path, order, flags, kind, value):
    array = np.zeros((3, 4, 5))
    array[1, 2, 3] = value  # the same byte in both cases
    path = make_file(tmp_path / "in.mrc", array, kind=kind, **imod_fields(order, flags))
    assert mrc.read_map(path).density[1, 2, 3] == value


@pytest.mark.parametrize("order", "<>")
def test_a_stack_of_imods_unsigned_bytes_equals_the_stack_of_floats(tmp_path, order):
    images = np.random.default_rng(0).integers(0, 100, (3, 24, 24))
    images[:, 8:16, 8:16] += 150
    plain = mrc.read_stack(make_stack(tmp_path / "float.mrcs", images))
    fields = imod_fields(order, 0)
    imod = mrc.read_stack(make_stack(tmp_path / "imod.mrcs", images, kind="u1", **fields))
    assert torch.equal(imod.density, plain.density)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_header_without_the_word_map_is_read_with_a_note(tmp_path, order, pack):
    path = make_file(tmp_path / "in.mrc", positions(), order=order, pack=pack, map=b"")
    map = mrc.read_map(path)
    np.testing.assert_array_equal(map.density, positions())
    assert len(map.notes) == 1
    assert "the word MAP" in map.notes[0]
    mrc.write_map(tmp_path / "out.mrc", map)
    assert mrcfile.validate(tmp_path / "out.mrc")


@pytest.mark.parametrize("order", "<>")
def test_an_axis_order_of_0_is_taken_for_x_y_z_with_a_note(tmp_path, order):
    unset = {"mapc": 0, "mapr": 0, "maps": 0}
    map = mrc.read_map(make_file(tmp_path / "in.mrc", positions(), order=order, **unset))
    np.testing.assert_array_equal(map.density, positions())
    assert map.nstart == (30, 20, 10)
    assert len(map.notes) == 1
    assert "MAPC, MAPR, MAPS" in map.notes[0]
    mrc.write_map(tmp_path / "out.mrc", map)
    assert mrcfile.validate(tmp_path / "out.mrc")


def test_one_volume_of_space_group_401_is_read_and_several_are_refused(tmp_path):
    map = mrc.read_map(make_file(tmp_path / "one.mrc", positions(), ispg=401))
    np.testing.assert_array_equal(map.density, positions())
    for mz in (2, 1, 0):
        path = make_file(tmp_path / "several.mrc", positions(), ispg=401, mz=mz)
        with pytest.raises(ValueError, match="a stack of volumes .space group 401"):
            mrc.read_map(path)


def test_symmetry_records_that_are_announced_but_absent_are_no_loss(tmp_path):
    path = make_file(tmp_path / "in.mrc", positions(), nsymbt=160)
    map = mrc.read_map(path)
    np.testing.assert_array_equal(map.density, positions())
    assert map.extended_header == b""
    assert len(map.notes) == 1
    assert "160 bytes" in map.notes[0]
    mrc.write_map(tmp_path / "out.mrc", map)
    assert mrcfile.validate(tmp_path / "out.mrc")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_an_impossible_origin_is_taken_for_0_with_a_note(tmp_path, value):
    path = make_file(tmp_path / "in.mrc", positions(), origin=(1.5, value, 3.5))
    map = mrc.read_map(path)
    assert map.origin == (3.5, 0, 1.5)
    assert len(map.notes) == 1
    assert "the header's origin" in map.notes[0]
    mrc.write_map(tmp_path / "out.mrc", map)
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.header.origin.tolist() == (1.5, 0, 3.5)


def test_space_group_0_is_a_volume_unless_mz_is_1(tmp_path):
    values = positions()
    map = mrc.read_map(make_file(tmp_path / "tomogram.mrc", values, ispg=0))
    np.testing.assert_array_equal(map.density, values)
    mrc.write_map(tmp_path / "out.mrc", map)
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.header.ispg == 0
        assert file.header.mz == 4
    with pytest.raises(ValueError, match="stack of 4 images"):
        mrc.read_map(make_file(tmp_path / "stack.mrc", values, ispg=0, mz=1))
    with pytest.raises(ValueError, match="stack of 4 images"):
        mrc.read_map(make_file(tmp_path / "named.mrcs.gz", values, pack=gzip.compress))


# ---- Refused


def refused(path, match, read=mrc.read_map, kind=ValueError):
    """Check that an error is one line and names the file."""
    with pytest.raises(kind, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_oracles_without_voxel_size_or_right_angles_are_refused():
    refused(ORACLES / "mrc/voxel_zero.mrc", "--voxel-size")
    refused(ORACLES / "mrc/cell_angle_100.mrc", "orthogonal")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"nx": 2**31 - 1, "ny": 2**31 - 1}, "truncated"),
        ({"nx": -6}, "damaged header"),
        ({"mapr": 1}, "damaged header"),
        ({"nsymbt": -1}, "damaged header"),
        ({"nsymbt": 161, "extended": b"x"}, "truncated"),
        ({"cellb": (90, 100, 90)}, "orthogonal"),
        ({"mx": 0}, "--voxel-size"),
        ({"mode": 3}, "complex"),
        ({"mode": 4, "kind": "c8"}, "complex"),
        ({"mode": 101}, "mode 101"),
        ({"mode": 101, "map": b""}, "not an MRC file"),
        ({"mapr": 1, "map": b""}, "not an MRC file"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, fields, message):
    refused(make_file(tmp_path / "in.mrc", positions(), **fields), message)


@pytest.mark.parametrize(
    "values, message",
    [
        (math.nan, "1 values are NaN"),
        (-math.inf, "1 values are NaN or infinite"),
    ],
)
def test_values_that_are_not_finite_are_refused(tmp_path, values, message):
    array = positions().astype("f4")
    array[1, 2, 3] = values
    refused(make_file(tmp_path / "in.mrc", array), message)


def test_a_map_without_density_and_a_single_image_are_refused(tmp_path):
    refused(make_file(tmp_path / "a.mrc", np.full((4, 5, 6), 2.5)), "every voxel is 2.5")
    refused(make_file(tmp_path / "b.mrc", positions()[:1], ispg=0), "single image")


@pytest.mark.parametrize("read", [mrc.read_map, mrc.read_stack])
def test_what_is_no_mrc_file_is_refused(tmp_path, read):
    contents = {
        "empty": b"",
        "text": b"ATOM      1  N\n" * 200,
        "bytes": bytes(range(256)) * 8,
        "zeros": bytes(4096),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused(path, "not an MRC file", read)
    refused(tmp_path / "none.mrc", "no such file", read, OSError)
    refused(tmp_path, "no such file", read, OSError)


@pytest.mark.parametrize("read", [mrc.read_map, mrc.read_stack])
@pytest.mark.parametrize(
    "pack, size, message",
    [
        (bytes, 600, "not an MRC file"),
        (bytes, 1400, "truncated"),
        (gzip.compress, 200, "damaged archive"),
        (bz2.compress, 200, "damaged archive"),
    ],
)
def test_a_file_that_was_cut_short_is_refused(tmp_path, read, pack, size, message):
    if read is mrc.read_map:
        path = make_file(tmp_path / "in.mrc", positions(), pack=pack)
    else:
        path = make_stack(tmp_path / "in.mrcs", random(4, 24, 24).numpy(), pack=pack)
    os.truncate(path, size)
    refused(path, message, read)


# ---- Stacks of images


@pytest.mark.parametrize(
    "name, fields", [("a.mrcs", {"ispg": 1, "mz": 3}), ("b.mrc", {}), ("c.mrcs.gz", {})]
)
def test_a_stack_is_read_with_its_background_at_zero(tmp_path, name, fields):
    images = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    images[:, 8:16, 8:16] += 5
    pack = gzip.compress if name.endswith(".gz") else bytes
    path = make_stack(tmp_path / name, images.numpy() + 7, pack=pack, **fields)
    stack = mrc.read_stack(path)
    assert stack.voxel_size == (3.0, 3.0, 3.0)

    i = torch.arange(24) - 12
    outside = i[:, None] ** 2 + i**2 >= 11**2
    assert float(stack.density[:, outside].mean(1).abs().max()) < 1e-5
    found = stack.density - stack.density.mean((1, 2), True)
    expected = images - images.mean((1, 2), True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pixels_have_no_depth_so_the_headers_may_be_unset(tmp_path):
    images = np.zeros((3, 24, 24))
    images[:, 12, 12] = 1
    path = make_stack(tmp_path / "a.mrcs", images, cella=(24 * 2.0, 24 * 2.0, 0))
    assert mrc.read_stack(path).voxel_size == (2.0, 2.0, 2.0)
    assert mrc.read_stack(path, voxel_size=1.5).voxel_size == (1.5, 1.5, 1.5)


FLAT = np.stack([np.random.rand(24, 24), np.zeros((24, 24))])
DARK = -np.pad(np.random.rand(3, 8, 8), ((0, 0), (8, 8), (8, 8)))


@pytest.mark.parametrize(
    "name, images, fields, message",
    [
        ("a.mrc", np.ones((24, 24, 24)), {"ispg": 1, "mz": 24}, "a volume of 24 x 24 x 24 voxels"),
        ("a.mrcs", np.ones((2001, 24, 24)), {}, "at most 2000"),
        ("a.mrcs", np.ones((3, 24, 30)), {}, "squares"),
        ("a.mrcs", np.ones((1, 24, 24)), {}, "single image"),
        ("a.mrcs", np.ones((3, 12, 12)), {}, "24 or more"),
        ("a.mrcs", np.ones((3, 24, 24)), {"voxel_size": 0}, "--voxel-size"),
        ("a.mrcs", FLAT, {}, "image 2 is flat"),
        ("a.mrcs", np.ones((4, 24, 24)), {"mode": 4, "kind": "c8"}, "complex or unknown numbers"),
        ("a.mrcs", DARK, {}, "multiply the images by -1"),
        ("a.mrcs", -1e-30 * DARK, {}, "multiply them to be near 1"),
        ("a.mrcs", -1e30 * DARK, {}, "multiply them to be near 1"),
    ],
)
def test_a_stack_that_cannot_be_used_is_refused(tmp_path, name, images, fields, message):
    refused(make_stack(tmp_path / name, images, **fields), message, mrc.read_stack)
