"""Map and stack files (MRC/CCP4).

    r_i = corner + i v            position of voxel i in the specimen, v the voxel size    (1)
    corner = origin, or nstart v where the origin is 0                                     (2)
    n' = round(n v / wanted)      voxels of a new grid over the same box                   (3)
    v' = n v / n'                 its voxel size                                           (4)

Volumes are float32 (D, H, W) = (z, y, x), lengths are Å. voxel_size, origin and nstart are triples
in the same order (z, y, x), whatever the order of the axes in the file.

(1): MRC2014, Cheng et al. 2015, J. Struct. Biol. 192:146. (2): the standard adds both fields, but
files that set both mean the same place twice, so we follow ChimeraX. (3), (4): `resample` of
fourier.py keeps voxel 0 in place and the values' scale.

The package mrcfile knows the header's layout and the modes. Four things are done by hand, because
mrcfile refuses such files or reads them wrongly: machine stamps that lie about the byte order,
headers with missing words, IMOD's unsigned bytes, and extended headers that are announced but
absent. What was assumed about a file is told in `Map.notes`.
"""

import bz2
import contextlib
import gzip
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.utils import dtype_from_mode
from torch import Tensor

from files import atomic_write, refuse_existing
from fourier import resample, triple
from memory import check_grid

Triple = tuple[float, float, float]  # (z, y, x)

SUFFIXES = (".mrc", ".map", ".ccp4")  # plain, or followed by .gz or .bz2
MAP_SUFFIXES = tuple(suffix + packing for suffix in SUFFIXES for packing in ("", ".gz", ".bz2"))

REAL_MODES = (0, 1, 2, 6, 12)

# Header fields. An axis is 1 = x, 2 = y, 3 = z. The first three groups are in the order of the
# file (sections, rows, columns), the samplings belong to z, y, x.
SIZES = ("nz", "ny", "nx")
STARTS = ("nzstart", "nystart", "nxstart")
AXES = ("maps", "mapr", "mapc")
SAMPLINGS = ("mz", "my", "mx")

IMOD_STAMP = 1146047817
FARTHEST_ORIGIN = 1e7  # Å; anything beyond is not a position
MAX_PROJECTIONS = 2000


def stem(path: Path) -> str:
    """The name of a map or stack file without its suffixes."""
    name = path.name
    for suffix in (".gz", ".bz2", ".mrcs", *SUFFIXES):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


@dataclass(eq=False)
class Map:
    """A density map, and what is needed to write it back as it came.

    density: (D, H, W) = (z, y, x), float32, any grey scale.
    voxel_size: Å, one number or (z, y, x). origin: Å. nstart: voxels.
    header, extended_header: the file's own, for everything else (axis order, cell, labels).
    path: the file that was read. notes: sentences about what was assumed when reading it.
    `dataclasses.replace(map, density=...)` is the same map with other values.
    Raises ValueError if density is not three-dimensional or the voxel size is not positive.
    """

    density: Tensor
    voxel_size: float | Triple
    origin: Triple = (0.0, 0.0, 0.0)
    nstart: tuple[int, int, int] = (0, 0, 0)
    header: np.ndarray | None = None
    extended_header: bytes = b""
    path: Path | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        self.voxel_size = triple(self.voxel_size)
        self.origin = triple(self.origin)
        if self.density.ndim != 3:
            raise ValueError(f"a map is (D, H, W); this array is {tuple(self.density.shape)}")
        if not all_positive(self.voxel_size):
            raise ValueError(f"voxel size {self.voxel_size} Å (z, y, x): it must be positive")

    @property
    def corner(self) -> Triple:
        """Position of voxel (0, 0, 0) in the frame of an atomic model: Å, (z, y, x)."""
        if any(self.origin):
            return self.origin
        return tuple(n * v for n, v in zip(self.nstart, self.voxel_size))  # (2)


def all_positive(lengths: Iterable[float]) -> bool:
    return all(0 < length < math.inf for length in lengths)


# ---- Reading ---------------------------------------------------------------------------------


def read_map(path: str | Path, voxel_size: float | Triple | None = None) -> Map:
    """Read a volume, plain or compressed by gzip or bzip2 (told by content, not by name).

    Modes 0, 1, 2, 6 and 12, either byte order and any axis order are read. voxel_size (Å) replaces
    the header's. Space group 0, usual for tomograms, is read as a volume, unless MZ = 1 or a name
    in .mrcs says that it is a stack of images.
    Raises OSError if there is no such file, and ValueError (one line) if it is not one volume in
    real space, on orthogonal axes, with finite values that vary and a voxel size.
    """
    # A map without any density has no grey scale.
    map = read_mrc(Path(path), voxel_size, volume_problem)
    if map.density.min() == map.density.max():
        raise ValueError(f"{path}: every voxel is {map.density.max():g}; give a map with density")
    return map


def read_stack(path: str | Path, voxel_size: float | None = None) -> Map:
    """Read a stack of square images (.mrcs, or space group 0 with MZ = 1) as a map (P, N, N).

    The background of every image is 0: the mean of what lies outside the circle of radius
    N/2 - 1 is subtracted. voxel_size (Å) replaces the header's.
    Raises OSError if there is no such file, and ValueError (one line) for a volume, one image, more
    than MAX_PROJECTIONS images, images that are not square, not finite, flat, far from 1 or dark on
    bright background, and for no voxel size.
    """
    stack = read_mrc(Path(path), voxel_size, stack_problem)
    images = stack.density

    # A flat image is an empty place in a stack. It has no scale.
    flat = images.amin((1, 2)) == images.amax((1, 2))
    if flat.any():
        number = int(flat.nonzero()[0]) + 1
        raise ValueError(f"{path}: image {number} is flat; take it out of the stack")

    # Sums of squares must stay among the numbers that float32 knows.
    size = float(images.double().square().mean().sqrt())
    if not 1e-10 < size < 1e10:
        raise ValueError(f"{path}: pixels of about {size:.1e}; multiply them to be near 1")

    # The background is what lies outside the circle that a particle fits in.
    side = images.shape[-1]
    squares = (torch.arange(side) - side // 2).square()
    outside = squares[:, None] + squares >= (side / 2 - 1) ** 2
    background = images[:, outside].mean(1)
    images = images - background[:, None, None]

    # Protein is bright, so its densities add up to more than the background's.
    if images.sum() <= 0:
        raise ValueError(
            f"{path}: the protein is darker than its surroundings; multiply the images by -1"
        )
    return replace(stack, density=images)


def read_mrc(path: Path, voxel_size, find_problem) -> Map:
    """A volume (D, H, W) or a stack (P, H, W).

    find_problem(path, header) says in words why the header is not what the caller wants, or None.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    notes = []
    with open_unpacked(path) as stream:
        # Judge the header before the data are read, which may be large.
        header = read_header(stream.read(HEADER_DTYPE.itemsize), notes)
        problem = data_problem(header) or find_problem(path, header)
        if problem:
            raise ValueError(problem)
        density, extended_header = read_data(stream.read(), header, notes)

        # Pixels of images have no depth, so the header's may be unset.
        if voxel_size is None:
            voxel_size = header_voxel_size(header)
            if is_stack(path, header):
                voxel_size = (voxel_size[2],) * 3
            if not all_positive(voxel_size):
                raise ValueError(
                    f"the header's voxel size is {voxel_size} Å (z, y, x); "
                    "give the true one with --voxel-size"
                )

        # Where the map is. STARTS are in the order of the file, the origin is x, y, z.
        origin = tuple(float(header["origin"][axis]) for axis in "zyx")
        nstart = tuple(integers(header, STARTS)[i] for i in zyx_order(header))
        return Map(density, voxel_size, origin, nstart, header, extended_header, path, tuple(notes))


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed. ValueErrors that are raised meanwhile name the file."""
    with open(path, "rb") as file:
        start = file.read(212)

    # A plain map begins with its width, which can look like gzip's first bytes.
    opener = open
    if start[208:211] != b"MAP":
        opener = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}.get(start[:2], open)
    with opener(path, "rb") as stream:
        try:
            yield stream
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: truncated or damaged archive ({error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def read_header(raw: bytes, notes: list[str]) -> np.ndarray:
    """The header in the byte order of the file, with missing words put in, each with a note."""
    if len(raw) < HEADER_DTYPE.itemsize:
        raise ValueError("not an MRC file (shorter than a header); convert it to .mrc first")

    # Machine stamps are often wrong. MAPC is 1, 2 or 3 and NX is small, in one byte order only.
    small_number = raw[64:68] if any(raw[64:68]) else raw[:4]
    order = "<" if 0 < int.from_bytes(small_number, "little") < 2**16 else ">"
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order)).reshape(()).copy()

    # An axis order that was never set is the usual one.
    if integers(header, AXES) == [0, 0, 0]:
        set_fields(header, AXES, (3, 2, 1))
        notes.append("the axis order (MAPC, MAPR, MAPS) is 0 in the header; taken for x, y, z")

    # Some old programs do not write the word. Then the sizes, axes and mode must make sense.
    if raw[208:211] != b"MAP":
        small = all(0 < n < 2**16 for n in integers(header, SIZES))
        if not small or data_problem(header):
            raise ValueError("not an MRC file (no MAP at byte 208); convert it to .mrc first")
        notes.append("the header lacks the word MAP, but makes sense; read as MRC")

    # Some programs leave the origin unset, so that it holds anything.
    origin = header["origin"].tolist()
    possible = tuple(x if abs(x) < FARTHEST_ORIGIN else 0.0 for x in origin)  # NaN is not
    if possible != origin:
        header["origin"] = possible
        notes.append(f"the header's origin (x, y, z) is {origin} Å; taken for {possible}")
    return header


def read_data(raw: bytes, header: np.ndarray, notes: list[str]) -> tuple[Tensor, bytes]:
    """The density (z, y, x) and the extended header, from what follows the header in a file."""
    # The type of a value in the file.
    kind = dtype_from_mode(int(header["mode"]))
    if kind == np.int8 and has_unsigned_bytes(header):
        kind = np.dtype("u1")
    kind = kind.newbyteorder(header["nx"].dtype.byteorder)
    shape = integers(header, SIZES)

    # Python's integers do not overflow, even if the header asks for more than any disk holds.
    count = math.prod(shape)
    size = count * kind.itemsize

    # Symmetry records may be announced without being there. Then the data alone fill the file.
    extended_size = int(header["nsymbt"])
    if extended_size and len(raw) == size:
        notes.append(f"the extended header of {extended_size} bytes is absent; data are complete")
        extended_size = 0

    # More bytes than wanted do no harm.
    wanted = extended_size + size
    if len(raw) < wanted:
        raise ValueError(
            f"truncated, {len(raw)} of {wanted} bytes after the header are there; copy it again"
        )

    # Bring sections, rows and columns into the order z, y, x.
    stored = np.frombuffer(raw, kind, count, extended_size).reshape(shape)
    values = stored.transpose(zyx_order(header))
    density = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))

    # One value that is not finite would spread over the whole Fourier transform.
    bad = int((~torch.isfinite(density)).sum())
    if bad:
        raise ValueError(f"{bad} values are NaN or infinite; replace them (by 0) first")
    return density, raw[:extended_size]


def volume_problem(path: Path, header: np.ndarray) -> str | None:
    """Why a file is not one volume that we can work with; None if it is."""
    shape = integers(header, SIZES)
    if min(shape) == 1:
        return f"a single image ({shape} voxels); give a volume"
    if is_stack(path, header):
        return (
            f"a stack of {shape[0]} images where a volume is wanted; "
            "if it is one, name it .mrc and set its space group to 1 and MZ to NZ"
        )
    if header["ispg"] > 400 and header["mz"] != shape[0]:
        return f"a stack of volumes (space group {header['ispg']}); give one volume per file"
    angles = header["cellb"].tolist()
    if any(angle != 0 and abs(angle - 90) > 1e-3 for angle in angles):  # 0 means never set
        return f"the cell angles are {angles}; resample it to an orthogonal cell first"
    return None


def stack_problem(path: Path, header: np.ndarray) -> str | None:
    """Why a file is not a stack of projections that we can work with; None if it is."""
    count, height, width = integers(header, SIZES)
    if count < 2:
        return "a single image; ab initio needs two projections or more"
    if not is_stack(path, header):
        return (
            f"a volume of {count} x {height} x {width} voxels where a stack of projections is "
            "wanted; if it is one, name it .mrcs"
        )
    if count > MAX_PROJECTIONS:
        return f"{count} projections; give at most {MAX_PROJECTIONS}, such as class averages"
    if height != width:
        return f"images of {height} x {width} pixels; crop them to squares"
    if width < 24:
        return f"images of {width} pixels; give 24 or more"
    return None


def data_problem(header: np.ndarray) -> str | None:
    """Why the data cannot be read at all; None if they can."""
    shape = integers(header, SIZES)
    axes = integers(header, AXES)
    mode = int(header["mode"])
    if min(shape) < 1 or sorted(axes) != [1, 2, 3] or header["nsymbt"] < 0:
        return f"damaged header ({shape} voxels, axes {axes}); write the file anew"
    if mode not in REAL_MODES:
        return f"complex or unknown numbers (MRC mode {mode}); write mode 2 (float32)"
    return None


# ---- The header ------------------------------------------------------------------------------


def integers(header: np.ndarray, names: tuple[str, ...]) -> list[int]:
    return [int(header[name]) for name in names]


def set_fields(header: np.ndarray, names: tuple[str, ...], values: Iterable[int]) -> None:
    for name, value in zip(names, values, strict=True):
        header[name] = value


def zyx_order(header: np.ndarray) -> list[int]:
    """Which of the file's dimensions (section, row, column) is z, which y and which x."""
    axes = integers(header, AXES)
    return [axes.index(axis) for axis in (3, 2, 1)]


def is_stack(path: Path, header: np.ndarray) -> bool:
    """Whether a file holds images and no volume, by its name or its header."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".bz2")
    return name.endswith(".mrcs") or (header["ispg"] == 0 and header["mz"] == 1)


def has_unsigned_bytes(header: np.ndarray) -> bool:
    """Whether bytes run from 0 to 255: in files of IMOD, unless bit 0 of its flags is set."""
    stamp, flags = np.frombuffer(header.tobytes(), header["nx"].dtype, 2, offset=152)
    return bool(stamp == IMOD_STAMP and not flags & 1)


def header_voxel_size(header: np.ndarray) -> Triple:
    """Edge of the cell over its sampling, (z, y, x) in any axis order; 0 where one is unset."""
    edges = [float(header["cella"][axis]) for axis in "zyx"]
    samplings = integers(header, SAMPLINGS)
    return tuple(edge / m if m > 0 else 0.0 for edge, m in zip(edges, samplings))


# ---- Writing ---------------------------------------------------------------------------------


def write_map(
    path: str | Path, map: Map, overwrite: bool = False, label: str = "", open_output=atomic_write
) -> None:
    """Write a map as float32 (mode 2) with statistics, in the axis and byte order of its file.

    path ends in .mrc, .map or .ccp4, or in these and .gz or .bz2. The rest of the header is copied,
    origin and nstart both, because programs differ on which they use. The cell changes only with
    the grid or the voxel size. label says which program wrote the map. The file appears whole or
    not at all; `open_output=outputs.open` makes it appear with other AtomicOutputs.
    Raises FileExistsError if path exists and overwrite is False, or if it is the file that was
    read, and ValueError for another suffix or values that are not finite.
    """
    path = Path(path)
    if not path.name.lower().endswith(MAP_SUFFIXES):
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: maps are written as {suffixes}, plain or with .gz, .bz2")
    refuse_existing([path], [map.path] if map.path else [], overwrite)

    density = map.density.detach().to("cpu", torch.float32)
    if not torch.isfinite(density).all():
        raise ValueError(f"{path}: not written, because the map holds NaN or infinite values")

    # Bring the values into the order of the file.
    header = header_of(map, density, label)
    dimensions = [3 - axis for axis in integers(header, AXES)]
    stored = density.numpy().transpose(dimensions)
    stored = np.ascontiguousarray(stored, dtype=header["rms"].dtype)

    # The suffix says whether the file is compressed.
    with open_output(path) as file, packed(file, path.suffix.lower()) as stream:
        stream.write(header.tobytes() + map.extended_header)
        stream.write(stored)


def packed(file: BinaryIO, suffix: str):
    """A stream that compresses into a file if the suffix says so."""
    if suffix == ".gz":
        # Without a name and a time inside, equal maps make equal files.
        return gzip.GzipFile("", "wb", fileobj=file, mtime=0)
    if suffix == ".bz2":
        return bz2.BZ2File(file, "wb")
    return contextlib.nullcontext(file)


def header_of(map: Map, density: Tensor, label: str) -> np.ndarray:
    """The header to write: the one that was read, brought up to date."""
    # A map that was made by a program gets a new header.
    if map.header is None:
        header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
        header["cellb"] = (90, 90, 90)
        header["ispg"] = 1
        set_fields(header, AXES, (3, 2, 1))
    else:
        header = map.header.copy()

    # The grid. A map may be a part of its unit cell, so the cell stays if the grid does.
    dimensions = [3 - axis for axis in integers(header, AXES)]
    shape = [density.shape[i] for i in dimensions]
    same_voxels = np.allclose(header_voxel_size(header), map.voxel_size, rtol=1e-6, atol=0)
    if shape != integers(header, SIZES) or not same_voxels:
        set_fields(header, SAMPLINGS, density.shape)
        edges = [n * v for n, v in zip(density.shape, map.voxel_size)]
        header["cella"] = tuple(reversed(edges))
    set_fields(header, SIZES, shape)
    set_fields(header, STARTS, [map.nstart[i] for i in dimensions])
    header["origin"] = tuple(reversed(map.origin))

    # The values.
    wide = density.double()
    header["mode"] = 2
    header["nsymbt"] = len(map.extended_header)
    header["dmin"] = float(wide.min())
    header["dmax"] = float(wide.max())
    header["dmean"] = float(wide.mean())
    header["rms"] = float(wide.std(correction=0))

    # What older files leave unset and mrcfile.validate asks for.
    header["map"] = b"MAP "
    big_endian = header["rms"].dtype.byteorder == ">"
    header["machst"] = (0x11, 0x11, 0, 0) if big_endian else (0x44, 0x44, 0, 0)
    if header["nversion"] not in (20140, 20141):
        header["nversion"] = 20141

    # Labels without gaps. There is room for ten, so a new one may replace the last.
    labels = [old for old in header["label"].tolist() if old.strip()]
    if label:
        labels = [*labels[:9], label.encode("ascii", "replace")]
    header["nlabl"] = len(labels)
    header["label"] = labels + [b""] * (10 - len(labels))
    return header


# ---- Another grid ----------------------------------------------------------------------------


def resample_map(map: Map, voxel_size: float | Triple) -> Map:
    """The same box on the grid whose voxel size (Å) is nearest to the wanted one, (3) and (4).

    The result's voxel_size says what it became. The first voxel stays where it is: nstart counts
    new voxels if that is a whole number, and becomes the origin if not. The way back exactly to
    the old grid is `replace(old_map, density=fourier.resample(x, old_map.density.shape))`.
    Raises ValueError if voxel_size is not positive, or if the new grid is beyond `check_grid`.
    """
    wanted = triple(voxel_size)
    if not all_positive(wanted):
        raise ValueError(f"the wanted voxel size {voxel_size} Å must be positive")
    old = map.density.shape
    sides = [n * v for n, v in zip(old, map.voxel_size)]  # Å
    new = [max(1, math.floor(min(side / w, 1e9) + 0.5)) for side, w in zip(sides, wanted)]  # (3)
    if list(old) == new:
        return map
    check_grid(new, old, map.voxel_size)
    new_voxel_size = tuple(side / n for side, n in zip(sides, new))  # (4)

    # A shift of s voxels of the old grid is one of s m / n voxels of the new grid.
    starts = [s * m for s, m in zip(map.nstart, new)]
    if all(start % n == 0 for start, n in zip(starts, old)):
        origin = map.origin
        nstart = tuple(start // n for start, n in zip(starts, old))
    else:
        origin = map.corner
        nstart = (0, 0, 0)
    place = {"voxel_size": new_voxel_size, "origin": origin, "nstart": nstart}
    return replace(map, density=resample(map.density, new), **place)
