"""What data.py promises of maps, resampling, grey scale, crops, rotations and tiles."""

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

import augment
import mrc
import volume

ORACLES = Path(__file__).parent / "oracles"
AXIS_ORDERS = list(itertools.permutations((1, 2, 3)))


def oracle(name):
    return ORACLES / name


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def field(header, name):
    return header[name].tolist()


def positions():
    """(z, y, x) = (4, 5, 6) voxels that know where they are: 100 z + 10 y + x."""
    z, y, x = np.meshgrid(range(4), range(5), range(6), indexing="ij")
    return 100 * z + 10 * y + x


def make_file(path, values_zyx, *, axes=(1, 2, 3), order="<", kind="f4", mode=2, pack=bytes, **fields):
    """An MRC file built field by field: axes = (mapc, mapr, maps), cell 1.1 x 1.2 x 1.3 Å per voxel."""
    header = np.zeros((), HEADER_DTYPE.newbyteorder(order))
    stored = values_zyx.transpose([3 - a for a in axes[::-1]])                  # sections, rows, columns
    header["nz"], header["ny"], header["nx"] = stored.shape
    header["mz"], header["my"], header["mx"] = values_zyx.shape
    header["cella"] = tuple(n * v for n, v in zip(values_zyx.shape[::-1], (1.1, 1.2, 1.3)))
    header["cellb"], header["ispg"], header["mode"] = (90, 90, 90), 1, mode
    header["mapc"], header["mapr"], header["maps"] = axes
    for name, start in zip(("nxstart", "nystart", "nzstart"), axes):
        header[name] = 10 * start                                               # 10 along x, 20 y, 30 z
    header["origin"], header["nversion"], header["map"] = (1.5, -2.5, 3.5), 20141, b"MAP "
    header["machst"] = (0x44, 0x44, 0, 0) if order == "<" else (0x11, 0x11, 0, 0)
    header["label"][0], header["nlabl"] = b"made by a test", 1
    extended = fields.pop("extended", b"")
    header["nsymbt"] = len(extended)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(pack(header.tobytes() + extended + stored.astype(order + kind).tobytes()))
    return path


# ---- Reading and writing ---------------------------------------------------------------------------

def test_oracle_files_are_read_in_canonical_order_and_written_back_with_their_header(tmp_path):
    expected = np.load(oracle("mrc_expected.npz"))
    refused = ("voxel_zero.mrc", "cell_angle_100.mrc")
    files = [f for f in sorted(oracle("mrc").iterdir()) if f.name not in refused]
    assert len(files) == 13
    for file in files:
        want = {key: expected[f"{file.name.split('.')[0]}/{key}"]
                for key in ("data_zyx", "voxel_xyz", "origin_xyz_header", "nstart_xyz", "first_voxel_xyz_angstrom")}
        map = mrc.read_map(file)
        assert map.density.dtype == torch.float32
        np.testing.assert_array_equal(map.density, want["data_zyx"].astype(np.float32))
        np.testing.assert_allclose(map.voxel_size[::-1], want["voxel_xyz"], rtol=1e-6)
        assert map.origin[::-1] == tuple(want["origin_xyz_header"])
        assert map.nstart[::-1] == tuple(want["nstart_xyz"])
        first = [o + s * v for o, s, v in zip(map.origin, map.nstart, map.voxel_size)]       # (1)
        np.testing.assert_allclose(first[::-1], want["first_voxel_xyz_angstrom"], rtol=1e-6)

        mrc.write_map(tmp_path / file.name, map)
        assert mrcfile.validate(tmp_path / file.name)
        with mrcfile.open(file) as before, mrcfile.open(tmp_path / file.name) as after:
            np.testing.assert_array_equal(before.data, after.data)                           # stored order
            assert before.extended_header.tobytes() == after.extended_header.tobytes()
            for name in set(before.header.dtype.names) - {"mode", "dmean", "rms"}:           # rounding
                assert before.header[name].tobytes() == after.header[name].tobytes(), (file.name, name)
            assert after.header.mode == 2 and after.data.dtype.kind == "f"


def test_every_real_map_is_read_with_the_voxel_size_of_its_table():
    folder = oracle("data/maps")
    rows = [line.split("\t") for line in (folder / "maps.tsv").read_text().splitlines()]
    assert len(rows) == 20
    for row in rows[1:]:
        line = dict(zip(rows[0], row))
        map = mrc.read_map(folder / line["file"])
        assert "x".join(str(n) for n in map.density.shape) == line["shape_zyx"]
        assert map.voxel_size == pytest.approx((float(line["voxel_A"]),) * 3, rel=1e-3)
        assert map.origin[::-1] == pytest.approx([float(o) for o in line["origin_xyz_A"].split(",")], abs=0.01)
        for value, name in ((map.density.min(), "vmin"), (map.density.max(), "vmax"), (map.density.std(), "std")):
            assert float(value) == pytest.approx(float(line[name]), rel=2e-3)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("axes", AXIS_ORDERS)
def test_every_axis_and_byte_order_is_read_alike_and_kept_in_the_file(tmp_path, axes, order):
    values = positions()
    path = make_file(tmp_path / "in.mrc", values, axes=axes, order=order, extended=b"x" * 80, exttyp=b"SERI")
    map = mrc.read_map(path)
    np.testing.assert_array_equal(map.density, values)
    assert map.voxel_size == pytest.approx((1.3, 1.2, 1.1))
    assert map.origin == (3.5, -2.5, 1.5) and map.nstart == (30, 20, 10)

    changed = torch.from_numpy(values).flip(0).float() * 2 - 7                               # other values, same grid
    mrc.write_map(tmp_path / "out.mrc", replace(map, density=changed))
    assert mrcfile.validate(tmp_path / "out.mrc")
    np.testing.assert_array_equal(mrc.read_map(tmp_path / "out.mrc").density, changed)
    with mrcfile.open(path) as before, mrcfile.open(tmp_path / "out.mrc") as after:
        for name in set(before.header.dtype.names) - {"dmin", "dmax", "dmean", "rms"}:
            assert before.header[name].tobytes() == after.header[name].tobytes(), name
        assert field(after.header, "dmin") == changed.min() and field(after.header, "dmax") == changed.max()
        assert after.header.dmean == pytest.approx(after.data.mean(), rel=1e-6)
        assert after.header.rms == pytest.approx(after.data.std(), rel=1e-6)
        assert after.extended_header.tobytes() == b"x" * 80


@pytest.mark.parametrize("mode, kind, values", [
    (0, "i1", (-128, 127)), (1, "i2", (-32768, 32767)), (2, "f4", (-1e30, 1e30)),
    (6, "u2", (0, 65535)), (12, "f2", (-65504, 65504))])
@pytest.mark.parametrize("order", "<>")
def test_modes_keep_their_extreme_values(tmp_path, mode, kind, values, order):
    array = np.zeros((3, 4, 5))
    array[0, 0, :2] = values
    map = mrc.read_map(make_file(tmp_path / "in.mrc", array, mode=mode, kind=kind, order=order))
    np.testing.assert_array_equal(map.density, array.astype(np.float32))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("flags, value", [(1, -56), (0, 200)])
def test_imod_bytes_are_signed_only_where_its_flag_says_so(tmp_path, order, flags, value):
    extra = np.zeros(84, "u1")                                                               # bytes 112-195
    extra[40:48] = np.array([1146047817, flags], order + "i4").view("u1")
    array = np.zeros((3, 4, 5))
    array[1, 2, 3] = 200 if value == 200 else -56                                            # the same byte
    kind = "u1" if value == 200 else "i1"
    path = make_file(tmp_path / "in.mrc", array, mode=0, kind=kind, order=order, extra2=extra.tobytes())
    assert mrc.read_map(path).density[1, 2, 3] == value


def test_compression_is_told_by_content_when_reading_and_by_name_when_writing(tmp_path):
    values = positions()
    for i, pack in enumerate((bytes, gzip.compress, bz2.compress)):
        map = mrc.read_map(make_file(tmp_path / f"{i}.mrc", values, pack=pack))             # all named .mrc
        np.testing.assert_array_equal(map.density, values)
    for name, magic in (("o.map", None), ("o.CCP4", None), ("o.mrc.gz", b"\x1f\x8b"), ("o.map.bz2", b"BZh")):
        mrc.write_map(tmp_path / name, map)
        assert magic is None or (tmp_path / name).read_bytes().startswith(magic)
        with mrcfile.open(tmp_path / name) as file:
            np.testing.assert_array_equal(file.data, values)
    mrc.write_map(tmp_path / "other.mrc.gz", map)
    assert (tmp_path / "o.mrc.gz").read_bytes() == (tmp_path / "other.mrc.gz").read_bytes()
    assert (tmp_path / "o.mrc.gz").read_bytes()[3:8] == bytes(5)                             # no name, no time inside


def test_space_group_0_is_a_volume_unless_mz_is_1(tmp_path):
    values = positions()
    map = mrc.read_map(make_file(tmp_path / "tomogram.mrc", values, ispg=0))
    np.testing.assert_array_equal(map.density, values)
    mrc.write_map(tmp_path / "out.mrc", map)
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.header.ispg == 0 and file.header.mz == 4
    with pytest.raises(ValueError, match="stack of 4 images"):
        mrc.read_map(make_file(tmp_path / "stack.mrc", values, ispg=0, mz=1))
    with pytest.raises(ValueError, match="stack of 4 images"):
        mrc.read_map(make_file(tmp_path / "named.mrcs.gz", values, pack=gzip.compress))


def test_a_given_voxel_size_replaces_the_header_s_and_reaches_the_file(tmp_path):
    path = make_file(tmp_path / "in.mrc", positions(), cella=(0, 0, 0))
    with pytest.raises(ValueError, match="--voxel-size"):
        mrc.read_map(path)
    mrc.write_map(tmp_path / "out.mrc", mrc.read_map(path, voxel_size=1.5))
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.voxel_size.tolist() == (1.5, 1.5, 1.5)
        assert file.header.cella.tolist() == (9.0, 7.5, 6.0)
        assert file.header.origin.tolist() == (1.5, -2.5, 3.5)
    with pytest.raises(ValueError, match="positive"):
        mrc.read_map(path, voxel_size=-1)


def test_the_oracles_without_voxel_size_or_right_angles_are_refused():
    with pytest.raises(ValueError, match="--voxel-size"):
        mrc.read_map(oracle("mrc/voxel_zero.mrc"))
    with pytest.raises(ValueError, match="orthogonal"):
        mrc.read_map(oracle("mrc/cell_angle_100.mrc"))


def test_a_map_on_a_part_of_its_unit_cell_keeps_cell_and_sampling(tmp_path):
    map = mrc.read_map(make_file(tmp_path / "in.mrc", positions(), mx=60, my=50, mz=40, cella=(66, 60, 52)))
    assert map.voxel_size == pytest.approx((1.3, 1.2, 1.1))
    mrc.write_map(tmp_path / "out.mrc", map)
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.header.cella.tolist() == (66, 60, 52)
        assert [field(file.header, name) for name in ("mx", "my", "mz")] == [60, 50, 40]


def test_headers_older_than_mrc2014_come_out_valid(tmp_path):
    label = [b"first", b"", b"third"] + [b""] * 7                                            # a gap, a wrong count
    path = make_file(tmp_path / "in.mrc", positions(), nversion=0, machst=(0, 0, 0, 0), nlabl=7, label=label)
    mrc.write_map(tmp_path / "out.mrc", mrc.read_map(path))
    assert mrcfile.validate(tmp_path / "out.mrc")
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.get_labels() == ["first", "third"]


def test_a_map_made_here_is_written_with_its_own_voxel_size_and_origin(tmp_path):
    map = mrc.Map(random(4, 5, 6), (3.0, 2.0, 1.0), origin=(30.0, 20.0, 10.0))
    mrc.write_map(tmp_path / "out.mrc", map)
    assert mrcfile.validate(tmp_path / "out.mrc")
    with mrcfile.open(tmp_path / "out.mrc") as file:
        assert file.voxel_size.tolist() == (1.0, 2.0, 3.0) and file.header.origin.tolist() == (10.0, 20.0, 30.0)
        np.testing.assert_array_equal(file.data, map.density)


def spoil(values, value):
    values = values.astype(np.float32)
    values[1, 2, 3] = value
    return values


BAD = {
    "missing": (lambda p: p, OSError, "no such file"),
    "folder": (lambda p: p.parent, OSError, "no such file"),
    "empty": (lambda p: p.touch() or p, ValueError, "not an MRC"),
    "text": (lambda p: p.write_text("ATOM      1  N\n" * 200) and p, ValueError, "not an MRC"),
    "random": (lambda p: p.write_bytes(bytes(range(256)) * 8) and p, ValueError, "not an MRC"),
    "short": (lambda p: os.truncate(make_file(p, positions()), 1400) or p, ValueError, "truncated"),
    "header": (lambda p: os.truncate(make_file(p, positions()), 600) or p, ValueError, "not an MRC"),
    "gzip": (lambda p: os.truncate(make_file(p, positions(), pack=gzip.compress), 200) or p, ValueError, "archive"),
    "bzip2": (lambda p: os.truncate(make_file(p, positions(), pack=bz2.compress), 200) or p, ValueError, "archive"),
    "huge": (lambda p: make_file(p, positions(), nx=2**31 - 1, ny=2**31 - 1), ValueError, "truncated"),
    "negative": (lambda p: make_file(p, positions(), nx=-6), ValueError, "damaged header"),
    "axes": (lambda p: make_file(p, positions(), mapr=1), ValueError, "damaged header"),
    "nan": (lambda p: make_file(p, spoil(positions(), np.nan)), ValueError, "1 values are NaN"),
    "infinite": (lambda p: make_file(p, spoil(positions(), -np.inf)), ValueError, "1 values are NaN or inf"),
    "constant": (lambda p: make_file(p, np.full((4, 5, 6), 2.5)), ValueError, "every voxel is 2.5"),
    "angle": (lambda p: make_file(p, positions(), cellb=(90, 100, 90)), ValueError, "orthogonal"),
    "no sampling": (lambda p: make_file(p, positions(), mx=0), ValueError, "--voxel-size"),
    "mode 3": (lambda p: make_file(p, positions(), mode=3), ValueError, "complex"),
    "mode 4": (lambda p: make_file(p, positions(), mode=4, kind="c8"), ValueError, "complex"),
    "mode 101": (lambda p: make_file(p, positions(), mode=101), ValueError, "mode 101"),
    "volumes": (lambda p: make_file(p, positions(), ispg=401, mz=2), ValueError, "stack of volumes"),
    "image": (lambda p: make_file(p, positions()[:1], ispg=0), ValueError, "single image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path, name):
    make, kind, words = BAD[name]
    path = make(tmp_path / "in.mrc")
    with pytest.raises(kind, match=words) as error:
        mrc.read_map(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_overwritten_unless_asked_and_the_input_never(tmp_path):
    path = make_file(tmp_path / "in.mrc", positions())
    map, before = mrc.read_map(path), path.read_bytes()
    (tmp_path / "link.mrc").symlink_to(path)
    for name in ("in.mrc", "link.mrc"):
        with pytest.raises(FileExistsError, match="input"):
            mrc.write_map(tmp_path / name, map, overwrite=True)
    mrc.write_map(tmp_path / "out.mrc", map)
    with pytest.raises(FileExistsError, match="--overwrite"):
        mrc.write_map(tmp_path / "out.mrc", replace(map, density=-map.density))
    np.testing.assert_array_equal(mrc.read_map(tmp_path / "out.mrc").density, map.density)
    mrc.write_map(tmp_path / "out.mrc", replace(map, density=-map.density), overwrite=True)
    np.testing.assert_array_equal(mrc.read_map(tmp_path / "out.mrc").density, -map.density)
    with pytest.raises(ValueError, match=".ccp4"):
        mrc.write_map(tmp_path / "out.png", map)
    with pytest.raises(OSError, match="no such folder"):
        mrc.write_map(tmp_path / "nowhere" / "out.mrc", map)
    with pytest.raises(ValueError, match="NaN"):
        mrc.write_map(tmp_path / "nan.mrc", replace(map, density=map.density / 0))
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    map = mrc.read_map(make_file(tmp_path / "in.mrc", positions()))
    mrc.write_map(tmp_path / "out.mrc", map)
    before = (tmp_path / "out.mrc").read_bytes()

    def full_disk(*args):
        raise OSError("no space left on device")
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        mrc.write_map(tmp_path / "out.mrc", replace(map, density=-map.density), overwrite=True)
    assert (tmp_path / "out.mrc").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.mrc", "out.mrc"]


# ---- Resampling ------------------------------------------------------------------------------------

def test_a_resampled_map_stays_where_it_was():
    """A plane wave in the specimen's frame (1) has the same phase at the same place on every grid."""
    shape, voxel = (12, 20, 16), (1.0, 1.5, 2.0)

    def wave(map):
        r = [o + (s + torch.arange(n, dtype=torch.float64)) * v
             for o, s, n, v in zip(map.origin, map.nstart, map.density.shape, map.voxel_size)]
        phase = [2 * math.pi * k * (x + 5) / (n * v) for k, x, n, v in zip((2, 3, 1), r, shape, voxel)]
        return torch.cos(phase[0][:, None, None] + phase[1][:, None] + phase[2])

    for nstart, want in (((0, 0, 0), (0, 0, 0)), ((6, -10, 16), (3, -7, 15)), ((1, 2, 3), (0, 0, 0))):
        map = mrc.Map(torch.zeros(shape, dtype=torch.float64), voxel, origin=(4.0, -3.0, 2.5), nstart=nstart)
        map = replace(map, density=wave(map))
        new = mrc.resample_map(map, 2.1)
        assert new.density.shape == (6, 14, 15)                                              # 5.7, 14.3, 15.2
        assert new.voxel_size == pytest.approx((12 / 6, 30 / 14, 32 / 15))                   # same box
        assert new.nstart == want                                                            # whole, or in the origin
        torch.testing.assert_close(new.density, wave(new), rtol=0, atol=1e-12)
    assert mrc.resample_map(map, voxel) is map
    with pytest.raises(ValueError, match="positive"):
        mrc.resample_map(map, 0)


def test_a_resampled_map_is_written_with_its_new_cell(tmp_path):
    map = mrc.resample_map(mrc.read_map(make_file(tmp_path / "in.mrc", positions(), axes=(3, 1, 2))), 0.55)
    assert map.density.shape == (9, 11, 12)
    mrc.write_map(tmp_path / "out.mrc", map)
    assert mrcfile.validate(tmp_path / "out.mrc")
    back = mrc.read_map(tmp_path / "out.mrc")
    np.testing.assert_array_equal(back.density, map.density)
    assert back.voxel_size == pytest.approx(map.voxel_size) and back.origin == pytest.approx(map.origin)
    assert back.header["cella"].tolist() == pytest.approx((6 * 1.1, 5 * 1.2, 4 * 1.3))


# ---- Grey scale ------------------------------------------------------------------------------------

def test_normalise_is_equation_4_and_denormalise_its_inverse_but_for_clipping():
    x = random(30, 31, 32)
    top = np.percentile(x.double().numpy(), 99.9)
    want = (np.clip(x.double().numpy(), 0, top) / top - 0.04) / 0.09
    y, scale = volume.normalise(x, 0.04, 0.09, percentile=99.9)
    assert scale.maximum == pytest.approx(top, rel=1e-6)
    np.testing.assert_allclose(y, want, atol=2e-6)
    torch.testing.assert_close(volume.denormalise(y, scale), x.clamp(0, scale.maximum), rtol=0, atol=1e-5)
    for q in (0, 50, 99.999, 100):
        _, scale = volume.normalise(x + 10, 0, 1, percentile=q)
        assert scale.maximum == pytest.approx(np.percentile(x.numpy() + 10, q), rel=1e-6)
    with pytest.raises(ValueError, match="must be positive"):
        volume.normalise(-x.abs(), 0.04, 0.09)


# ---- Crops, rotations ------------------------------------------------------------------------------

def test_center_crop_and_pad_keep_the_middle_and_undo_each_other():
    for n, box in itertools.product((4, 5), (7, 8)):
        x = random(2, n, n, n)
        padded = volume.pad(x, box, value=-1.5)
        assert padded.shape[-3:] == (box,) * 3 and (padded == -1.5).sum() == 2 * (box**3 - n**3)
        assert torch.equal(padded[:, box // 2, box // 2, box // 2], x[:, n // 2, n // 2, n // 2])
        assert torch.equal(volume.center_crop(padded, n), x)
    x = random(3, 9, 6)
    assert torch.equal(volume.pad(x, 6)[2:5], x) and volume.pad(x, 6).shape == (6, 9, 6)   # only short sides grow
    with pytest.raises(ValueError, match="pad it first"):
        volume.center_crop(x, 6)


def test_random_crops_reach_every_position_and_nothing_else():
    x, rng = torch.arange(3 * 4 * 5).view(3, 4, 5), torch.Generator().manual_seed(0)
    corners = {int(augment.random_crop(x, 3, rng)[0, 0, 0]) for _ in range(100)}
    assert corners == {20 * z + 5 * y + x for z in range(1) for y in range(2) for x in range(3)}


def test_the_random_crop_is_centred_on_a_voxel_of_the_mask():
    x, rng = torch.arange(20**3).view(20, 20, 20), torch.Generator().manual_seed(0)
    mask = torch.zeros(20, 20, 20, dtype=torch.bool)
    mask[5, 10, 14] = mask[10, 10, 10] = mask[0, 19, 3] = True
    middles = {int(augment.random_crop(x, 6, rng, mask)[3, 3, 3]) for _ in range(60)}
    assert middles == {int(x[5, 10, 14]), int(x[10, 10, 10]), int(x[3, 17, 3])}              # moved inside
    with pytest.raises(ValueError, match="threshold"):
        augment.random_crop(x, 6, rng, mask & False)


def test_the_density_mask_is_all_within_three_voxels_of_density():
    density = (random(12, 13, 14).abs() > 2.9).float() * 0.2 + 0.05
    mask, above = volume.density_mask(density), (density > 0.1).nonzero()
    assert 1 <= len(above) <= 20
    for voxel in itertools.product(range(12), range(13), range(14)):
        near = (above - torch.tensor(voxel)).abs().max(1).values.min() <= 3
        assert mask[voxel] == near


def test_rot24_draws_all_rotations_of_the_cube_and_no_reflection():
    x, rng = random(5, 5, 5), torch.Generator().manual_seed(0)
    proper = [torch.tensor(np.eye(3)[list(p)] * s, dtype=torch.float32)
              for p in itertools.permutations(range(3)) for s in itertools.product((1, -1), repeat=3)]
    proper = [volume.rotate(x, r) for r in proper if torch.linalg.det(r) > 0]
    assert len(proper) == 24
    seen = set()
    for _ in range(200):
        y = augment.rot24(x, rng)
        distance = torch.stack([(y - turned).abs().max() for turned in proper])
        assert distance.min() < 1e-5
        seen.add(int(distance.argmin()))
    assert len(seen) == 24
    assert augment.rot24(random(2, 1, 4, 4, 4), rng).shape == (2, 1, 4, 4, 4)


def test_rotate_samples_the_map_at_R_r():
    """On a linear field trilinear interpolation is exact: out(r) = slope . R r, wherever R r is inside."""
    shape, slope = (9, 12, 11), torch.tensor([0.3, -0.7, 0.5])                               # slope along x, y, z
    z, y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    r = torch.stack((x, y, z), -1)
    R = augment.random_rotation(torch.Generator().manual_seed(3))
    turned = r @ R.T
    inside = (turned.abs() <= (torch.tensor(shape[::-1]) - 1) / 2).all(-1)
    assert 0.2 < inside.float().mean() < 0.9
    out = volume.rotate((r @ slope).expand(2, 1, *shape), R)
    want = (turned @ slope).expand(2, 1, *shape)
    torch.testing.assert_close(out[..., inside], want[..., inside], rtol=0, atol=1e-5)


def test_rotate_turns_a_batch_as_its_maps_and_shows_the_middle_of_the_whole_turn():
    x, rng = random(3, 2, 13, 13, 13), torch.Generator().manual_seed(0)
    R = torch.stack([augment.random_rotation(rng) for _ in range(3)])
    for cubic in (False, True):
        whole = torch.stack([volume.rotate(a, b, cubic=cubic) for a, b in zip(x, R)])
        torch.testing.assert_close(volume.rotate(x, R, cubic=cubic), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(volume.rotate(x, R, box=7, cubic=cubic), whole[..., 3:10, 3:10, 3:10], rtol=0, atol=1e-5)


def b_spline(x):
    """Cubic: its definition by pieces, Unser 1999 eq. 4."""
    x = x.abs()
    return torch.where(x < 1, 2 / 3 - x ** 2 + x ** 3 / 2, torch.where(x < 2, (2 - x) ** 3 / 6, torch.zeros_like(x)))


def test_cubic_rotation_equals_the_direct_sum_over_all_splines():
    shape, R = (6, 8, 7), augment.random_rotation(torch.Generator().manual_seed(1)).double()
    x = random(*shape, dtype=torch.float64)
    i = [torch.arange(n, dtype=torch.float64) for n in shape]
    inverse = [torch.linalg.inv(b_spline(k - k[:, None])) for k in i]
    c = torch.einsum("ai,bj,ck,ijk->abc", *inverse, x)
    grid = torch.stack(torch.meshgrid(*(k - (n - 1) / 2 for k, n in zip(i, shape)), indexing="ij")[::-1], -1)      # x, y, z
    place = ((grid @ R.T).flip(-1) + torch.tensor([(n - 1) / 2 for n in shape])).view(-1, 3)                 # z, y, x
    taps = [b_spline(place[:, axis, None] - i[axis]) for axis in range(3)]
    want = torch.einsum("pa,pb,pc,abc->p", *taps, c).view(shape)
    torch.testing.assert_close(volume.rotate(x, R, cubic=True), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(volume.rotate(x, torch.eye(3), cubic=True), x, rtol=0, atol=1e-12)              # voxels stay


def test_random_rotations_are_uniform_over_SO3():
    rng = torch.Generator().manual_seed(0)
    R = torch.stack([augment.random_rotation(rng) for _ in range(4000)]).double()
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=R.dtype).expand_as(R), rtol=0, atol=1e-6)
    assert torch.linalg.det(R).min() > 0.999
    # Uniform: the angle has the distribution (a - sin a) / pi, and R times any fixed rotation too.
    turn = augment.random_rotation(rng).double()
    for sample in (R, R @ turn):
        angle = torch.acos(((sample.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)).sort().values
        gap = ((angle - angle.sin()) / math.pi - torch.arange(4000) / 4000).abs().max()
        assert gap < 1.63 / 4000**0.5                                                        # Kolmogorov, 1 %


# ---- Tiles -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, tile, stride", [((13, 17, 10), 8, 5), ((8, 8, 8), 8, 3), ((16, 9, 11), 4, 4)])
def test_tiles_blend_back_to_the_map_they_came_from(shape, tile, stride):
    x = random(2, *shape)
    corners = volume.tile_starts(shape, tile, stride)
    assert len(set(corners)) == len(corners)
    assert len(corners) == math.prod(math.ceil((n - tile) / stride) + 1 for n in shape)
    tiles = volume.cut_tiles(x, corners, tile)
    torch.testing.assert_close(volume.blend_tiles(tiles, corners, shape), x, rtol=0, atol=2e-6)
    torch.testing.assert_close(volume.blend_tiles(iter(tiles), corners, shape), x, rtol=0, atol=2e-6)


def test_blending_is_the_weighted_mean_of_every_tile_over_a_voxel():
    corners = volume.tile_starts((7, 6, 5), 4, 2)
    tiles, window = random(len(corners), 4, 4, 4), volume.gaussian_window(4)
    got = volume.blend_tiles(tiles, corners, (7, 6, 5))
    for voxel in itertools.product(range(7), range(6), range(5)):
        inner = [tuple(v - c for v, c in zip(voxel, corner)) for corner in corners]
        over = [(float(window[i]), float(tile[i])) for tile, i in zip(tiles, inner) if all(0 <= a < 4 for a in i)]
        want = sum(w * y for w, y in over) / sum(w for w, _ in over)
        assert float(got[voxel]) == pytest.approx(want, abs=1e-6)


def test_the_blending_window_is_a_gaussian_between_1_and_3():
    w = volume.gaussian_window(9)
    assert w[4, 4, 4] == 3 and w[0, 0, 8] == 1
    gauss = lambda z, y, x: math.exp(-((z - 4)**2 + (y - 4)**2 + (x - 4)**2) / (2 * 2.25**2))
    want = 1 + 2 * (gauss(3, 6, 5) - gauss(0, 0, 0)) / (1 - gauss(0, 0, 0))
    assert float(w[3, 6, 5]) == pytest.approx(want, rel=1e-6)


def test_tiles_that_cannot_cover_the_box_are_refused():
    with pytest.raises(ValueError, match="cannot cover"):
        volume.tile_starts((20, 64, 64), 32, 16)
    with pytest.raises(ValueError, match="cannot cover"):
        volume.tile_starts((64, 64, 64), 32, 33)
