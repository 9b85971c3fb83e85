"""Density maps: files, grids, grey scale, crops, rotations, tiles, batches.

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
Departure 2: the release rotates CryoFM-S's maps by cubic splines; we, as for CryoFM-L, trilinearly.
Departure 3: D.2 gives no sigma for the blending window; we use a quarter of the tile.
"""
import bz2
import gzip
import itertools
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mrcfile.dtypes import HEADER_DTYPE
from torch import Generator, Tensor

from degrade import molmap
from fsc import read_model

Triple = tuple[float, float, float]                     # (z, y, x)

# ---- 1. Maps -------------------------------------------------------------------------------------

MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}  # MRC mode -> numpy type
SUFFIXES = (".mrc", ".map", ".ccp4")                    # written plain or followed by .gz or .bz2


def triple(value: float | Iterable[float]) -> Triple:
    """One number for all three axes, or three (z, y, x)."""
    return tuple(np.broadcast_to(np.asarray(value, dtype=np.float64), 3).tolist())


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if packing == ".gz":                        # no name, no time: equal maps, equal files
                stream = gzip.GzipFile("", "wb", fileobj=file, mtime=0)
            else:
                stream = bz2.BZ2File(file, "wb") if packing else file
            stream.write(header.tobytes() + map.extended_header)
            stream.write(data)
            stream.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


# ---- 2. Fourier resampling -----------------------------------------------------------------------

def resample(map: Map, voxel_size: float | Triple) -> Map:
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
        shift = (s * v for s, v in zip(map.nstart, map.voxel_size))
        origin, nstart = tuple(o + s for o, s in zip(map.origin, shift)), (0, 0, 0)
    density = fourier_resample(map.density, new)
    return replace(map, density=density, voxel_size=voxel_size, origin=origin, nstart=nstart)


def fourier_resample(x: Tensor, shape: Iterable[int]) -> Tensor:
    """Band-limited interpolation (3) of x (..., D, H, W) to (..., *shape), axis after axis.

    Exact for functions below both Nyquist frequencies; to a finer grid and back returns x. Voxel 0,
    the mean and the amplitudes stay. float32 or wider.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    steps = zip((-3, -2, -1), x.shape[-3:], shape, strict=True)
    for dim, old, new in sorted(steps, key=lambda step: step[2] / step[1]):   # shrink first: leaner
        if old == new:
            continue
        short = min(old, new)
        f = torch.fft.rfft(x, dim=dim, norm="forward").narrow(dim, 0, short // 2 + 1)
        if short % 2 == 0:
            # The short grid's Nyquist coefficient is k = +n/2 and -n/2 in one, apart in the long one.
            f.narrow(dim, short // 2, 1).mul_(2 if new < old else 0.5)
        x = torch.fft.irfft(f, n=new, dim=dim, norm="forward")                # (3), pads with zeros
    return x


# ---- 3. Grey scale, crops, rotations, tiles ------------------------------------------------------

class Scale(NamedTuple):
    """What takes a map to network scale and back; `maximum` is p of (4), in the map's own units."""
    maximum: float
    mean: float
    std: float


def normalise(density: Tensor, mean: float, std: float,
              percentile: float = 99.999) -> tuple[Tensor, Scale]:
    """(4) for one map of any shape: the map in network scale, and what `denormalise` wants.

    Raises ValueError if the percentile is not positive: dark protein, or hardly any density.
    """
    flat = density.detach().flatten().float()
    position = percentile / 100 * (flat.numel() - 1)    # between two values, as numpy.percentile
    low = math.floor(position)
    top = torch.topk(flat, flat.numel() - low).values   # a few values; torch.quantile stops at 2^24
    below, above = float(top[-1]), float(top[max(len(top) - 2, 0)])
    maximum = below + (position - low) * (above - below)
    if not maximum > 0:
        raise ValueError(f"the map's {percentile} percentile is {maximum:g} and must be positive; "
                         "where protein is dark, multiply the map by -1")
    return (density.clamp(0, maximum) / maximum - mean) / std, Scale(maximum, mean, std)      # (4)


def denormalise(x: Tensor, scale: Scale) -> Tensor:
    """The inverse of (4), back in the map's own units.

    What clipping took is lost: negative values come back as 0, those above `scale.maximum` (one
    voxel in 100,000) as that. All others come back, and what a network puts beyond stays beyond.
    """
    return (x * scale.std + scale.mean) * scale.maximum


def crop(x: Tensor, corner: Iterable[int], box: int) -> Tensor:
    """The cube of `box` voxels of x (..., D, H, W) from corner (z, y, x) on: a view of x.

    Raises ValueError if it does not lie inside x.
    """
    sides, corner = x.shape[-3:], tuple(corner)
    if any(start < 0 or start + box > n for start, n in zip(corner, sides, strict=True)):
        raise ValueError(f"a cube of {box} voxels at {corner} leaves the box {tuple(sides)}; "
                         "pad it first")
    for dim, start in zip((-3, -2, -1), corner):
        x = x.narrow(dim, start, box)
    return x


def center_crop(x: Tensor, box: int) -> Tensor:
    """The central cube of x (..., D, H, W) (F.1): voxel n // 2 becomes voxel box // 2."""
    return crop(x, [n // 2 - box // 2 for n in x.shape[-3:]], box)


def pad(x: Tensor, box: int, value: float = 0.0) -> Tensor:
    """x (..., D, H, W) with every side at least `box`, voxel n // 2 in the middle as in center_crop.

    value: solvent in the scale of x, 0 for a density, -mean / std in network scale.
    """
    before = [max(n, box) // 2 - n // 2 for n in x.shape[-3:]]
    after = [max(n, box) - n - b for n, b in zip(x.shape[-3:], before)]
    sides = [side for pair in zip(before, after) for side in pair]
    return F.pad(x, sides[4:] + sides[2:4] + sides[:2], value=value)          # last axis first


def density_mask(density: Tensor, threshold: float = 0.1, dilations: int = 3) -> Tensor:
    """Where to centre random crops: density (D, H, W) on 0..1 above the threshold, dilated."""
    x = (density > threshold).float()[None]
    for _ in range(dilations):
        x = F.max_pool3d(x, 3, stride=1, padding=1)     # Departure 1
    return x[0] > 0


def random_crop(x: Tensor, box: int, generator: Generator, mask: Tensor | None = None) -> Tensor:
    """A cube of x (..., D, H, W) around a random voxel of mask (D, H, W), moved inside (F.1).

    Without a mask every position is equally likely.
    Raises ValueError if the mask is empty or x smaller than the cube.
    """
    sides = x.shape[-3:]
    if mask is None:
        return crop(x, [_randint(max(n - box, 0) + 1, generator) for n in sides], box)
    voxels = mask.flatten().nonzero()
    if len(voxels) == 0:
        raise ValueError("no voxel to centre the random crop on; lower the mask's threshold")
    centre = np.unravel_index(int(voxels[_randint(len(voxels), generator)]), sides)
    return crop(x, [max(min(int(c) - box // 2, n - box), 0) for c, n in zip(centre, sides)], box)


def _randint(high: int, generator: Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


# Axis orders and flips whose matrix has determinant +1; the other 24 would change handedness.
ROTATIONS_24 = [(order, signs) for order in itertools.permutations(range(3))
                for signs in itertools.product((1, -1), repeat=3)
                if np.linalg.det(np.eye(3)[list(order)] * signs) > 0]


def rot24(x: Tensor, generator: Generator) -> Tensor:
    """x (..., D, H, W) in one of its 24 orientations along the axes, all equally likely (F.1)."""
    order, signs = ROTATIONS_24[_randint(24, generator)]
    x = x.permute(*range(x.ndim - 3), *(axis - 3 + x.ndim for axis in order))
    return x.flip([axis - 3 for axis in range(3) if signs[axis] < 0])


def random_rotation(generator: Generator) -> Tensor:
    """A rotation matrix (3, 3), uniform over SO(3): from a quaternion of uniform direction."""
    q = torch.randn(4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm()).tolist()
    return torch.tensor([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                         [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                         [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """(5) for x (..., D, H, W) and R (3, 3) on (x, y, z) columns; trilinear, 0 from outside.

    Turns the specimen by R^T about the middle of the box, (n - 1) / 2. Departure 2.
    """
    D, H, W = x.shape[-3:]
    side = torch.tensor([W, H, D], dtype=x.dtype, device=x.device)
    theta = rotation.to(x) * side / side[:, None]       # affine_grid measures each axis by its side
    grid = F.affine_grid(F.pad(theta, (0, 1))[None], (1, 1, D, H, W), align_corners=False)
    return F.grid_sample(x.reshape(1, -1, D, H, W), grid, align_corners=False).view(x.shape)


def tile_starts(shape: Iterable[int], tile: int, stride: int) -> list[tuple[int, int, int]]:
    """Corners (z, y, x) of cubes of `tile` voxels that cover a box; the last on an axis ends with it.

    Raises ValueError if a side is shorter than the tile, or the stride leaves gaps.
    """
    shape = tuple(shape)
    if min(shape) < tile or not 0 < stride <= tile:
        raise ValueError(f"tiles of {tile} voxels every {stride} cannot cover the box {shape}; "
                         "pad it to one tile at least, and keep the stride within a tile")
    return list(itertools.product(*([*range(0, n - tile, stride), n - tile] for n in shape)))


def gaussian_window(box: int) -> Tensor:
    """Algorithm 1's weights (box, box, box): a Gaussian scaled to 1 in the corners, 3 at its peak."""
    i = torch.arange(box) - (box - 1) / 2
    g = torch.exp(-i**2 / (2 * (box / 4)**2))           # Departure 3
    w = g[:, None, None] * g[:, None] * g
    return 1 + 2 * (w - w.min()) / (w.max() - w.min()).clamp(min=1e-12)


def cut(x: Tensor, corners: list[tuple[int, int, int]], tile: int) -> Tensor:
    """The cubes of x (..., D, H, W) at the corners: (len(corners), ..., tile, tile, tile)."""
    return torch.stack([crop(x, corner, tile) for corner in corners])


def blend(tiles: Iterable[Tensor], corners: list[tuple[int, int, int]],
          shape: Iterable[int]) -> Tensor:
    """(6), Algorithm 1 of CryoLVM: tiles (..., tile, tile, tile) at their corners -> (..., *shape).

    tiles: the stack from `cut`, or whatever yields tiles one by one, so that memory stays bounded.
    """
    total = None
    for tile, corner in zip(tiles, corners, strict=True):
        if total is None:
            window = gaussian_window(tile.shape[-1]).to(tile)
            total, weight = tile.new_zeros(*tile.shape[:-3], *shape), tile.new_zeros(*shape)
        crop(total, corner, tile.shape[-1]).add_(tile * window)
        crop(weight, corner, tile.shape[-1]).add_(window)
    return total / weight                               # (6); weights are 1 or more, no epsilon


# ---- 4. Densities simulated from atomic models ---------------------------------------------------

@dataclass(frozen=True)
class Structure:
    """Atoms of one model: xyz (A, 3) in Å as (x, y, z), centred; atomic_number (A,); b_factor (A,) in Å^2."""
    label: str
    xyz: np.ndarray
    atomic_number: np.ndarray
    b_factor: np.ndarray


def load_archive(path) -> list[Structure]:
    """An archive of many structures (.npz): flat arrays xyz (in 0.01 Å), element, bfactor, one structure after another,
    cut at atom_start; `label` names them."""
    with np.load(path) as archive:
        keys = {"label", "atom_start", "xyz", "element", "bfactor"}
        if not keys <= set(archive):
            raise ValueError(f"{path}: no archive of structures (arrays {sorted(keys - set(archive))} are missing)")
        label, start, xyz, element, b_factor = (archive[k] for k in ("label", "atom_start", "xyz", "element", "bfactor"))
    cut = [slice(a, b) for a, b in zip(start, start[1:])]
    return [Structure(str(name), xyz[s].astype(np.float32) / 100, element[s].astype(np.float32), b_factor[s].astype(np.float32))
            for name, s in zip(label, cut)]


def read_structures(path) -> list[Structure]:
    """Structures of an archive (.npz, see load_archive), of one PDB or mmCIF file, or of all those in a folder."""
    path = Path(path)
    if path.suffix == ".npz":
        return load_archive(path)
    names = (".pdb", ".ent", ".cif", ".pdb.gz", ".ent.gz", ".cif.gz")
    files = sorted(p for p in path.iterdir() if p.name.lower().endswith(names)) if path.is_dir() else [path]
    models = [(p, read_model(p)) for p in files]
    return [Structure(p.name.split(".")[0], (m.xyz - m.xyz.mean(0)).numpy().astype(np.float32),
                      m.atomic_number.numpy().astype(np.float32), m.b_iso.numpy().astype(np.float32)) for p, m in models]


def random_density(structure: Structure, generator: torch.Generator, *, box: int, voxel_size: float,
                   resolution: tuple[float, float]) -> Tensor:
    """One simulated map (D, D, D), box voxels a side, in Z/Å^3: the model turned at random and placed off-centre.

    The atoms are turned, not the grid, so no interpolation is involved. Resolution is uniform in `resolution` (Å). Half
    of the maps have B = 0, the others the deposited B-factors above their 5th percentile, times a uniform number.
    """
    uniform = lambda low=0.0, high=1.0: low + (high - low) * float(torch.rand((), generator=generator))
    xyz = torch.from_numpy(structure.xyz)
    # A small molecule stays whole, up to half its margin off-centre; of a large one any part can be in the middle.
    anchor = xyz[torch.randint(len(xyz), (1,), generator=generator)] * uniform()
    xyz = (xyz - anchor) @ random_rotation(generator).T
    b = torch.zeros(len(xyz))
    if uniform() < 0.5:
        b = torch.from_numpy(structure.b_factor)
        b = (b - b.quantile(0.05)).clamp(min=0) * uniform()
    return molmap(xyz, structure.atomic_number, uniform(*resolution), voxel_size=voxel_size, shape=(box,) * 3,
                          origin=-voxel_size * (box // 2), b_factor=b)[0]


class SimulatedCrops(torch.utils.data.Dataset):
    """Training crops from atomic models: item i is (crops, 1, crop, crop, crop) in network scale, a function of (seed, i).

    Each item simulates one map of box^3 voxels, clip-normalises it as a whole, and cuts `crops` crops: three in four
    around a point of the molecule, the others anywhere.
    """
    def __init__(self, structures: list[Structure], *, crop: int, crops: int, box: int = 64, voxel_size: float = 1.5,
                 resolution: tuple[float, float] = (2.5, 4.0), mean: float, std: float, seed: int = 0):
        self.structures, self.crop, self.crops, self.box = structures, crop, crops, max(box, crop)
        self.voxel_size, self.resolution, self.mean, self.std, self.seed = voxel_size, resolution, mean, std, seed

    def __getitem__(self, i: int) -> Tensor:
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + i) % 2 ** 63)
        structure = self.structures[int(torch.randint(len(self.structures), (1,), generator=g))]
        density = random_density(structure, g, box=self.box, voxel_size=self.voxel_size, resolution=self.resolution)
        x = normalise(density, self.mean, self.std)[0]
        mask = density_mask(x * self.std + self.mean)
        crops = [random_crop(x, self.crop, g, mask if torch.rand((), generator=g) < 0.75 else None)
                 for _ in range(self.crops)]
        return torch.stack(crops)[:, None]

    def __len__(self) -> int:
        return 2 ** 62                                   # endless: every index is another random map
