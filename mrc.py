"""Map and stack files (MRC/CCP4).

(Equations and departures of the file that this one came from; keep what belongs here.)
Density maps: files, grids, grey scale, crops, rotations, tiles, batches; `python data.py prepare` for EMDB's.

    r_i = origin + (nstart + i) v                      position of voxel i, v the voxel size      (1)
    n' = round(n v / v_wanted),  v' = n v / n'         a new grid over the same box               (2)
    f'_k = f_k for |k| < min(n, n') / 2, else 0        f_k = 1/n sum_i x_i exp(-2 pi i k i / n)   (3)
    x = (clip(density, 0, p) / p - mean) / std         p the 99.999 percentile: network scale     (4)
    rotated(r) = density(R r)                          r = (x, y, z) from the centre of the box   (5)
    M = sum_k w y_k / sum_k w                          tiles y_k blended under the window w       (6)

Volumes are float32 (D, H, W) = (z, y, x), lengths Å; voxel_size, origin and nstart are triples in
that same order (z, y, x). (1): MRC2014, Cheng et al. 2015, J. Struct. Biol. 192:146. (2), (3):
band-limited interpolation, voxel 0 stays in place and values keep their scale. (4): CryoFM
(arXiv:2410.08631) §4.2, clipping as in its release; crops and rotations: its appendix F.1.
(6): CryoLVM, appendix D.2, Algorithm 1.
Departure 1: how F.1 dilates the mask of random crops is not stated; we use a 3^3 cube, three times.
Departure 2: the release turns a whole map, applies (4) again and crops it. We apply (4) once, choose the
middle of the crop first and turn no more than the crop shows: a crop of 64^3 from a map of 384^3 costs
4 MB of reading instead of 113 MB, and 216 times fewer interpolated voxels.
Departure 3: D.2 gives no sigma for the blending window; we use a quarter of the tile.
Departure 4: 4.1 removes helices and "problematic cases" by eye; `RULES` goes by method and title.
"""
import bz2
import contextlib
import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import mrcfile
import numpy as np
import torch
from mrcfile.dtypes import HEADER_DTYPE
from torch import Tensor

from files import atomic_write
from fourier import resample, triple

Triple = tuple[float, float, float]                     # (z, y, x)

MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}  # MRC mode -> numpy type

SUFFIXES = (".mrc", ".map", ".ccp4")                    # written plain or followed by .gz or .bz2

MAP_SUFFIXES = tuple(s + packing for s in SUFFIXES for packing in ("", ".gz", ".bz2"))


def stem(path: Path) -> str:
    name = path.name
    for end in (".gz", ".bz2", ".mrcs", *SUFFIXES):
        name = name[:-len(end)] if name.lower().endswith(end) else name
    return name


@dataclass(eq=False)
class Map:
    """A density map and the header facts needed to write it back as it came.

    density (D, H, W) = (z, y, x), float32, any scale; voxel_size (Å; one number stands for three),
    origin (Å) and nstart (voxels) are (z, y, x) whatever the order of the axes in the file. `header`
    is the file's own, in its byte order, for all else (axis order, cell, space group, labels);
    `path` is the file read. `dataclasses.replace(map, density=...)` is the same map, other values.
    Raises ValueError if density is not three-dimensional or the voxel size is not positive.
    """
    density: Tensor
    voxel_size: float | Triple
    origin: Triple = (0.0, 0.0, 0.0)
    nstart: tuple[int, int, int] = (0, 0, 0)
    header: np.ndarray | None = None
    extended_header: bytes = b""
    path: Path | None = None

    def __post_init__(self):
        self.voxel_size, self.origin = triple(self.voxel_size), triple(self.origin)
        if self.density.ndim != 3:
            raise ValueError(f"a map is (D, H, W); this array is {tuple(self.density.shape)}")
        if not all(0 < v < math.inf for v in self.voxel_size):
            raise ValueError(f"voxel size {self.voxel_size} Å (z, y, x): it must be positive")

    @property
    def corner(self) -> Triple:
        """(1) of voxel (0, 0, 0), where a model in the map's frame begins: Å, z, y, x."""
        return tuple(o + n * v for o, n, v in zip(self.origin, self.nstart, self.voxel_size))


def read_map(path: str | Path, voxel_size: float | Triple | None = None) -> Map:
    """Read an MRC/CCP4 map, plain or compressed by gzip or bzip2 (told by content, not by name).

    Modes 0, 1, 2, 6, 12, either byte order, any axis order. voxel_size (Å) replaces the header's.
    Space group 0, usual for tomograms, is read as a volume, unless MZ = 1 or a name in .mrcs says
    that it is a stack of images. Raises OSError if there is no such file and ValueError (one line)
    if it is not one volume in real space, on orthogonal axes, with finite values that vary and a
    voxel size.
    """
    path = Path(path)
    raw = _read_bytes(path)
    if len(raw) < 1024 or raw[208:211] != b"MAP":
        raise ValueError(f"{path}: not an MRC file (no MAP at byte 208); convert it to .mrc first")
    # Machine stamps are often wrong; MAPC is 1, 2 or 3 in one byte order only.
    order = "<" if int.from_bytes(raw[64:68], "little") in (1, 2, 3) else ">"
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order), count=1).reshape(()).copy()
    _check_header(path, header)

    kind = MODES[int(header["mode"])]
    imod_flags = np.frombuffer(raw, order + "i4", 1, 156)[0]
    if kind == "i1" and raw[152:156] in (b"IMOD", b"DOMI") and not imod_flags & 1:
        kind = "u1"                                     # IMOD's older bytes are unsigned
    shape = [int(header[name]) for name in ("nz", "ny", "nx")]
    start, count = 1024 + int(header["nsymbt"]), math.prod(shape)
    wanted = start + count * np.dtype(kind).itemsize
    if len(raw) < wanted:
        raise ValueError(f"{path}: truncated, {len(raw)} of {wanted} bytes are there; copy it again")
    # File axis j (section, row, column) runs along axes[j], 1 = x, 2 = y, 3 = z; ours are 3, 2, 1.
    axes = _file_axes(header)
    to_zyx = [axes.index(a) for a in (3, 2, 1)]
    data = np.frombuffer(raw, order + kind, count, start).reshape(shape).transpose(to_zyx)
    density = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
    if not torch.isfinite(density).all():
        bad = int((~torch.isfinite(density)).sum())
        raise ValueError(f"{path}: {bad} values are NaN or infinite; replace them (by 0) first")
    if density.min() == density.max():
        raise ValueError(f"{path}: every voxel is {density.max():g}; a map with density is wanted")
    if voxel_size is None:
        voxel_size = _header_voxel_size(header)
        if not all(0 < v < math.inf for v in voxel_size):
            raise ValueError(f"{path}: the header's voxel size is {voxel_size} Å (z, y, x); "
                             "give the true one with --voxel-size")
    nstart = [int(header[name]) for name in ("nzstart", "nystart", "nxstart")]   # the file's order
    return Map(density, voxel_size, tuple(float(header["origin"][a]) for a in "zyx"),
               tuple(nstart[j] for j in to_zyx), header, raw[1024:start], path)


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    raw = path.read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b" and raw[208:211] != b"MAP":
            raw = gzip.decompress(raw)
        elif raw[:3] == b"BZh" and raw[208:211] != b"MAP":
            raw = bz2.decompress(raw)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged archive ({error}); copy it again") from None
    return raw


def _file_axes(header: np.ndarray) -> list[int]:
    return [int(header[name]) for name in ("maps", "mapr", "mapc")]


def _header_voxel_size(header: np.ndarray) -> Triple:
    """Cell edge over its sampling, both stored as x, y, z in any axis order; 0 where one is unset."""
    samples = [int(header["m" + a]) for a in "zyx"]
    return tuple(float(header["cella"][a]) / m if m > 0 else 0.0 for a, m in zip("zyx", samples))


def _check_header(path: Path, header: np.ndarray) -> None:
    shape = [int(header[name]) for name in ("nz", "ny", "nx")]
    mode, group, mz = (int(header[name]) for name in ("mode", "ispg", "mz"))
    angles = [float(header["cellb"][name]) for name in ("alpha", "beta", "gamma")]
    name = path.name.lower().removesuffix(".gz").removesuffix(".bz2")
    images = name.endswith(".mrcs") or (group == 0 and mz == 1 and shape[0] > 1)
    for wrong, message in (
            (min(shape) < 1 or sorted(_file_axes(header)) != [1, 2, 3] or header["nsymbt"] < 0,
             f"damaged header ({shape} voxels, axes {_file_axes(header)}); write the file anew"),
            (mode in (3, 4), f"complex values (mode {mode}); a map in real space is wanted"),
            (mode not in MODES, f"unknown MRC mode {mode}; write it as mode 2 (float32)"),
            (images, f"a stack of {shape[0]} images where a volume is wanted; "
                     "if it is one, name it .mrc and set its space group to 1 and MZ to NZ"),
            (group > 400, f"a stack of volumes (space group {group}); give one volume per file"),
            (min(shape) == 1, f"a single image ({shape} voxels); a volume is wanted"),
            (any(angle != 0 and abs(angle - 90) > 1e-3 for angle in angles),  # 0 means never set
             f"the cell angles are {angles}; resample it to an orthogonal cell first")):
        if wrong:
            raise ValueError(f"{path}: {message}")


def write_map(path: str | Path, map: Map, overwrite: bool = False) -> None:
    """Write `map` as float32 (mode 2) with statistics, in its file's own axis and byte order.

    path ends in .mrc, .map or .ccp4, or in these and .gz or .bz2. The rest of the header is copied,
    origin and nstart both (programs differ on which they use); the cell changes only with the grid
    or the voxel size. The file appears whole or not at all. Raises FileExistsError if path exists
    and overwrite is False, or if it is the file that was read; ValueError for another suffix or
    values that are not finite.
    """
    path = Path(path)
    name = path.name.lower()
    packing = path.suffix.lower() if name.endswith((".gz", ".bz2")) else ""
    if not name.removesuffix(packing).endswith(SUFFIXES):
        raise ValueError(f"{path}: maps are written as .mrc, .map or .ccp4, plain or with .gz, .bz2")
    if path.exists() and map.path is not None and map.path.exists() and path.samefile(map.path):
        raise FileExistsError(f"{path}: is the input, never overwritten; give another name")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists; give another name or --overwrite")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
    density = map.density.detach().to("cpu", torch.float32)
    if not torch.isfinite(density).all():
        raise ValueError(f"{path}: not written, the map holds NaN or infinite values")

    header = _header_for(map, density)
    data = density.numpy().transpose([3 - a for a in _file_axes(header)])
    data = np.ascontiguousarray(data, dtype=header["rms"].dtype)      # float32 in its byte order
    with atomic_write(path) as file:
        stream = contextlib.nullcontext(file)
        if packing == ".gz":                            # no name, no time: equal maps, equal files
            stream = gzip.GzipFile("", "wb", fileobj=file, mtime=0)
        elif packing:
            stream = bz2.BZ2File(file, "wb")
        with stream as packed:
            packed.write(header.tobytes() + map.extended_header)
            packed.write(data)


def _header_for(map: Map, density: Tensor) -> np.ndarray:
    if map.header is None:
        header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
        header["mapc"], header["mapr"], header["maps"], header["ispg"] = 1, 2, 3, 1
        header["cellb"] = (90, 90, 90)
    else:
        header = map.header.copy()
    axes = _file_axes(header)
    shape = [density.shape[3 - a] for a in axes]
    if (shape != [header["nz"], header["ny"], header["nx"]]
            or not np.allclose(_header_voxel_size(header), map.voxel_size, rtol=1e-6, atol=0)):
        header["mz"], header["my"], header["mx"] = density.shape
        header["cella"] = tuple(n * v for n, v in zip(density.shape, map.voxel_size))[::-1]
    header["nz"], header["ny"], header["nx"] = shape
    header["nzstart"], header["nystart"], header["nxstart"] = (map.nstart[3 - a] for a in axes)
    header["origin"] = map.origin[::-1]
    header["mode"], header["nsymbt"] = 2, len(map.extended_header)
    wide = density.double()
    header["dmin"], header["dmax"] = float(wide.min()), float(wide.max())
    header["dmean"], header["rms"] = float(wide.mean()), float(wide.std(correction=0))
    # What older files leave unset and mrcfile.validate asks for.
    header["map"] = b"MAP "
    big_endian = header["rms"].dtype.byteorder == ">"
    header["machst"] = (0x11, 0x11, 0, 0) if big_endian else (0x44, 0x44, 0, 0)
    if header["nversion"] not in (20140, 20141):
        header["nversion"] = 20141
    labels = [label for label in header["label"].tolist() if label.strip()]
    header["label"], header["nlabl"] = labels + [b""] * (10 - len(labels)), len(labels)
    return header


def resample_map(map: Map, voxel_size: float | Triple) -> Map:
    """The same box on the grid whose voxel size (Å) is nearest to the wanted one: (2), (3).

    The result's voxel_size says what it became. The first voxel stays where it is (1): nstart counts
    new voxels if it stays whole, and becomes part of the origin if not. For the way back exactly to
    the old grid: `replace(old_map, density=fourier_resample(x, old_map.density.shape))`.
    Raises ValueError if voxel_size is not positive.
    """
    wanted, old = triple(voxel_size), map.density.shape
    if not all(0 < v < math.inf for v in wanted):
        raise ValueError(f"the wanted voxel size {voxel_size} Å must be positive")
    sides = [n * v for n, v in zip(old, map.voxel_size)]                                  # Å
    new = [max(1, math.floor(side / w + 0.5)) for side, w in zip(sides, wanted)]          # (2)
    if list(old) == new:
        return map
    voxel_size = tuple(side / m for side, m in zip(sides, new))
    if all(s * m % n == 0 for s, n, m in zip(map.nstart, old, new)):
        origin, nstart = map.origin, tuple(s * m // n for s, n, m in zip(map.nstart, old, new))
    else:
        origin, nstart = map.corner, (0, 0, 0)
    density = resample(map.density, new)
    return replace(map, density=density, voxel_size=voxel_size, origin=origin, nstart=nstart)


MAX_PROJECTIONS = 2000


@contextlib.contextmanager
def opened(path: Path, **how):
    """mrcfile.open, whose errors do not name the file."""
    try:
        with mrcfile.open(path, **how) as file:
            yield file
    except (ValueError, EOFError, OSError) as error:     # no MRC file, cut short, a damaged .gz
        raise ValueError(f"{path}: {error}") from None


def read_stack(path: str | Path, voxel_size: float | None = None) -> Map:
    """A stack of square images (.mrcs, or space group 0 with MZ = 1): density is (P, N, N), background 0, protein bright.

    Raises OSError if there is no such file and ValueError (one line) for a volume, one image, more than MAX_PROJECTIONS,
    images that are not square or not finite, or no voxel size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with opened(path, header_only=True) as file:
        P, *sides = (int(file.header[n]) for n in ("nz", "ny", "nx"))
        group, mz, mode, voxel = int(file.header.ispg), int(file.header.mz), int(file.header.mode), float(file.voxel_size.x)
    name = path.name.lower().removesuffix(".gz").removesuffix(".bz2")
    voxel = voxel if voxel_size is None else voxel_size
    for wrong, message in (
            (mode in (3, 4), "complex numbers; give images, not their transforms"),
            (P < 2, "a single image; ab initio wants two projections or more"),
            (not (name.endswith(".mrcs") or (group == 0 and mz == 1)),
             f"a volume of {P} x {sides[0]} x {sides[1]} voxels where a stack of projections is wanted; if it is one, name it .mrcs"),
            (P > MAX_PROJECTIONS, f"{P} projections; give at most {MAX_PROJECTIONS}, such as class averages or a random part"),
            (sides[0] != sides[1], f"images of {sides[0]} x {sides[1]} pixels; crop them to squares"),
            (sides[0] < 24, f"images of {sides[0]} pixels; 24 or more are wanted"),
            (not 0 < voxel < math.inf, f"the header's voxel size is {voxel:g} Å; give the true one with --voxel-size")):
        if wrong:
            raise ValueError(f"{path}: {message}")
    with opened(path) as file:
        images = torch.from_numpy(file.data.astype("float32")).reshape(P, *sides)
    if not images.isfinite().all() or (images.amin((1, 2)) == images.amax((1, 2))).any():
        raise ValueError(f"{path}: an image holds NaN or infinite values, or is flat; take it out of the stack")
    r2 = (torch.arange(sides[0]) - sides[0] // 2).square()
    outside = r2[:, None] + r2 >= (sides[0] / 2 - 1) ** 2
    images = images - images[:, outside].mean(1)[:, None, None]
    if images.sum() <= 0:
        raise ValueError(f"{path}: the protein is darker than its surroundings; multiply the images by -1")
    return Map(images, voxel)
