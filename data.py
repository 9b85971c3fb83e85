"""Density maps: files, grids, grey scale, crops, rotations, tiles, batches; `python data.py prepare` for EMDB's.

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
import argparse
import bz2
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mrcfile.dtypes import HEADER_DTYPE
from torch import Generator, Tensor

from degrade import apply_fourier, cone_mask, deposited, molmap, uniform, wedge_mask
from fsc import read_model, triple

Triple = tuple[float, float, float]                     # (z, y, x)

# ---- 1. Maps -------------------------------------------------------------------------------------

MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}  # MRC mode -> numpy type
SUFFIXES = (".mrc", ".map", ".ccp4")                    # written plain or followed by .gz or .bz2


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
    with written_whole(path) as file:
        stream = contextlib.nullcontext(file)
        if packing == ".gz":                            # no name, no time: equal maps, equal files
            stream = gzip.GzipFile("", "wb", fileobj=file, mtime=0)
        elif packing:
            stream = bz2.BZ2File(file, "wb")
        with stream as packed:
            packed.write(header.tobytes() + map.extended_header)
            packed.write(data)


@contextlib.contextmanager
def written_whole(path: Path):
    """A binary file to write to under a temporary name; on disk, it takes the place of `path`.

    A crash or kill -9 at any byte leaves what `path` was. The temporary name is always the same, so
    that the next write clears up what a killed one left. Raises OSError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # RuntimeError: what torch.save makes of a failed write
        raise OSError(f"{path}: not written, is the disk full? What was there is unharmed ({error})") from error
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
        origin, nstart = map.corner, (0, 0, 0)
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


def rotate(x: Tensor, rotation: Tensor, box: int | None = None, cubic: bool = False) -> Tensor:
    """(5) for x (..., D, H, W) and R (3, 3) on (x, y, z) columns, or x (B, ..., D, H, W) and R (B, 3, 3).

    Turns the specimen by R^T about the middle of the box, (n - 1) / 2; 0 from outside. Trilinear, or
    cubic B-splines. box: only the middle box^3 voxels of the result, (..., box, box, box).
    """
    R = rotation.to(x).reshape(-1, 3, 3)
    D, H, W = x.shape[-3:]
    shape = (D, H, W) if box is None else (box,) * 3
    side, wanted = (x.new_tensor(sides[::-1]) for sides in ((D, H, W), shape))
    theta = F.pad(R * wanted / side[:, None], (0, 1))   # affine_grid measures each axis by its side
    grid = F.affine_grid(theta, (len(R), 1, *shape), align_corners=False)
    sample = _cubic_sample if cubic else functools.partial(F.grid_sample, align_corners=False)
    return sample(x.reshape(len(R), -1, D, H, W), grid).view(*x.shape[:-3], *shape)


def _cubic_sample(x: Tensor, grid: Tensor) -> Tensor:
    """grid_sample by cubic B-splines through the voxels of x (B, C, D, H, W): sum_j c_j B(i - j) = x_i.

    The four taps of an axis are two linear look-ups at weighted places, so 8 trilinear samples of c
    make one cubic sample: Sigg & Hadwiger 2005, GPU Gems 2 §20; Ruijters & Thévenaz 2012.
    """
    for n in x.shape[-3:]:                              # solved along D, then H, then W
        i = torch.arange(n, device=x.device)
        spline = x.new_tensor([4 / 6, 1 / 6, 0])[(i - i[:, None]).abs().clamp(max=2)]          # B(i - j)
        x = torch.tensordot(x, torch.linalg.inv(spline), ([-3], [0]))          # its axis is now the last
    sides = x.new_tensor(x.shape[:-4:-1])               # W, H, D
    p = ((grid + 1) * sides - 1) / 2                    # in voxels
    a = p - p.floor()
    w_1, w_2, w_3 = (4 - 6 * a ** 2 + 3 * a ** 3) / 6, (1 + 3 * a + 3 * a ** 2 - 3 * a ** 3) / 6, a ** 3 / 6
    high = w_2 + w_3
    pairs = ((p.floor() - 1 + w_1 / (1 - high), 1 - high), (p.floor() + 1 + w_3 / high, high))
    total = 0
    for corner in itertools.product((0, 1), repeat=3):
        place = torch.stack([pairs[k][0][..., axis] for axis, k in enumerate(corner)], -1)
        weight = math.prod(pairs[k][1][..., axis] for axis, k in enumerate(corner))
        total = total + weight[:, None] * F.grid_sample(x, (2 * place + 1) / sides - 1, align_corners=False)
    return total


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
          shape: Iterable[int], window: Tensor | None = None) -> Tensor:
    """(6), Algorithm 1 of CryoLVM: tiles (..., tile, tile, tile) at their corners -> (..., *shape).

    tiles: the stack from `cut`, or whatever yields tiles one by one, so that memory stays bounded.
    window: the weights w (tile, tile, tile), positive (default: `gaussian_window`).
    """
    total = None
    for tile, corner in zip(tiles, corners, strict=True):
        if total is None:
            window = (gaussian_window(tile.shape[-1]) if window is None else window).to(tile)
            total, weight = tile.new_zeros(*tile.shape[:-3], *shape), tile.new_zeros(*shape)
        crop(total, corner, tile.shape[-1]).add_(tile * window)
        crop(weight, corner, tile.shape[-1]).add_(window)
    return total / weight                               # (6); weights are positive, no epsilon


# ---- 4. Training crops from maps -----------------------------------------------------------------

MAP_SUFFIXES = tuple(s + packing for s in SUFFIXES for packing in ("", ".gz", ".bz2"))
MODEL_SUFFIXES = tuple(s + packing for s in (".pdb", ".ent", ".cif", ".mmcif")
                       for packing in ("", ".gz"))


def list_files(path: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder with one of the suffixes, by name; a file is returned as it is.

    Raises FileNotFoundError if there is no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.name.lower().endswith(suffixes)]


class Volume(NamedTuple):
    """A map to train on, (4) on 0..1, on the grid of the crops: a tensor (n, n, n), or its .npy file."""
    label: str
    density: Tensor | Path

    def voxels(self) -> np.ndarray:
        """(n, n, n); of a file only the pages that are looked at are read."""
        if isinstance(self.density, Path):              # opened for each crop: thousands would not stay open
            return np.load(self.density, mmap_mode="r")
        return self.density.numpy()


def cube(map: Map) -> tuple[Tensor, dict]:
    """A map as it is trained on, float16 (n, n, n) on 0..1, and its statistics, before padding.

    A cube, padded with 0, so that no rotation turns density out of it.
    Raises ValueError if hardly any voxel is above a tenth of the 99.999 percentile.
    """
    x, scale = normalise(map.density, 0, 1)
    filled = float((x > 0.1).float().mean())
    if filled < 1e-4:
        raise ValueError(f"hardly any density: {filled:.1e} of its voxels are above a tenth of the top")
    statistics = dict(maximum=scale.maximum, mean=float(x.mean()), std=float(x.std()), filled=filled)
    return pad(x, max(x.shape)).half(), statistics


def held_out(label: str) -> bool:
    """Whether a map is never trained on: one in twenty, by the hash of its name."""
    return zlib.crc32(label.encode()) % 20 == 0


def read_volumes(path: str | Path, voxel_size: float,
                 box: int | None = None) -> tuple[list[Volume], list[str]]:
    """The maps of a folder (or one file) on the grid of voxel_size (Å); and a line for each refused.

    A folder that `prepare` made is mapped into memory, any other read and resampled: 2 bytes per voxel.
    Refused is what cannot be read, has hardly any density or, with `box`, none in its middle (not
    looked at where prepared). Raises ValueError if the folder was prepared for another voxel size.
    """
    path, volumes, refused = Path(path), [], []
    prepared = (path / SETTINGS).exists()
    if prepared:
        made_for = json.loads((path / SETTINGS).read_text())["voxel_size"]
        if made_for != voxel_size:
            raise ValueError(f"{path}: prepared at {made_for:g} Å per voxel, wanted are {voxel_size:g}; "
                             "give another --data or --voxel-size")
        files = [path / f"{row['entry']}.npy" for row in read_index(path) if not row["skipped"]]
    else:
        files = list_files(path, MAP_SUFFIXES)
    for file in files:
        try:
            if prepared:
                np.load(density := file, mmap_mode="r")  # is it there, and whole
            else:
                density = cube(resample(read_map(file), voxel_size))[0]
                if box and not center_crop(density, min(box, len(density))).max() > 0.1:
                    raise ValueError(f"hardly any density in the middle {box} voxels; centre it first")
        except (ValueError, OSError, EOFError) as error:                       # EOFError: an empty .npy
            refused.append(str(error) if str(file) in str(error) else f"{file}: {error}")
        else:
            volumes.append(Volume(file.name.split(".")[0], density))
    return volumes, refused


ENDLESS = 2 ** 62                                       # items: every index is another crop


def item_generator(seed: int, i: int) -> Generator:
    """What item i of a dataset, or sample i of a prior, is drawn with: the same whoever draws it, and whenever."""
    return Generator().manual_seed((seed * 1_000_003 + i) % 2 ** 63)


class MapCrops(torch.utils.data.Dataset):
    """Training crops from maps: item i is (crops, 1, crop, crop, crop) in network scale.

    A function of (seed, i): a random volume, turned at random, (5). center=False, CryoFM-S: each crop
    around another voxel that `density_mask` would hold. center=True, CryoFM-L: each is the centre of
    the map, cut out and then turned (F.1). cubic: by B-splines (CryoFM-S), or trilinear (CryoFM-L).
    finished=False leaves the turning to `finish`, for a GPU, which does it for a whole batch at once;
    items are then its arguments. Departure 2.
    """
    def __init__(self, volumes: list[Volume], *, crop: int, crops: int, center: bool = False, cubic: bool = False,
                 mean: float, std: float, seed: int = 0, finished: bool = True):
        self.volumes, self.crop, self.crops, self.center, self.cubic = volumes, crop, crops, center, cubic
        self.mean, self.std, self.seed, self.finished = mean, std, seed, finished
        # Voxels per side that a turned crop can show, and some for the spline's coefficients to settle.
        self.window = crop if center else 2 * math.ceil((math.sqrt(3) * crop + 10) / 2)

    def __getitem__(self, i: int) -> Tensor | tuple[Tensor, Tensor]:
        g = item_generator(self.seed, i)
        x = self.volumes[_randint(len(self.volumes), g)].voxels()
        windows = []
        for _ in range(self.crops):
            centre = [n // 2 for n in x.shape] if self.center else random_centre(x, g)
            windows.append(window(x, centre, self.window))
        rotations = torch.stack([random_rotation(g) for _ in range(self.crops)])
        parts = torch.stack(windows)[:, None], rotations
        return self.finish(*parts) if self.finished else parts

    def finish(self, windows: Tensor, rotations: Tensor) -> Tensor:
        """Windows (..., 1, n, n, n) and R (..., 3, 3) -> crops (..., 1, crop, crop, crop)."""
        x = rotate(windows.flatten(0, -5).float(), rotations.flatten(0, -3), self.crop, self.cubic)
        x = (x.clamp(0, 1) - self.mean) / self.std      # a spline overshoots
        return x.view(*windows.shape[:-3], *x.shape[-3:])

    def __len__(self) -> int:
        return ENDLESS


def window(x: np.ndarray, centre: Iterable[int], side: int) -> Tensor:
    """side^3 voxels of x, voxel `centre` becoming voxel side // 2; 0 outside of x. In the type of x."""
    out = torch.zeros((side,) * 3, dtype=torch.float16 if x.dtype == np.float16 else torch.float32)
    first = [c - side // 2 for c in centre]
    there = [(max(f, 0), min(f + side, n)) for f, n in zip(first, x.shape)]
    here = tuple(slice(a - f, b - f) for (a, b), f in zip(there, first))
    out.numpy()[here] = x[tuple(slice(a, b) for a, b in there)]
    return out


def random_centre(x: np.ndarray, generator: Generator, tries: int = 1_000_000) -> list[int]:
    """A voxel (z, y, x) of `density_mask`, all equally likely, without looking at all of the map x.

    By rejection: a voxel is in the mask where one of the 7^3 around it is above the threshold.
    Raises ValueError if none of so many was.
    """
    for _ in range(tries):
        c = [_randint(n, generator) for n in x.shape]
        if x[tuple(slice(max(i - 3, 0), i + 4) for i in c)].max() > 0.1:
            return c
    raise ValueError("hardly any voxel to centre the random crop on; leave this map out")


# ---- 5. Maps of the EMDB, prepared once: `python data.py prepare` ---------------------------------

INDEX, SETTINGS = "index.csv", "settings.json"          # in the folder, beside emd_1234.npy, ...
COLUMNS = ("entry", "skipped", "split", "box", "voxel_size", "maximum", "mean", "std", "filled", "file")

# What of CryoFM section 4.1 a program can apply to an entry: column of the metadata, the entry stays
# if; or why not. Columns are those of EMDB's search (README); 4.1's last rule needs the map itself.
RULES = (
    ("resolution", lambda text, limit: re.fullmatch(r"\d+\.?\d*", text) and 0 < float(text) < limit,
     "resolution not stated, or not better than asked"),
    ("structure_determination_method",
     lambda text, _: re.sub("[^a-z]", "", text.lower()) == "singleparticle", "not single particle"),
    ("half_map_filename", lambda text, _: text, "no half maps"),
    ("title", lambda text, _: not re.search("helical|filament|fibril|microtubule", text, re.I),
     "helical, by its title"),
)


def read_metadata(path: str | Path) -> dict[str, dict]:
    """emd_1234 -> its row of a CSV that EMDB's search has exported: `emdb_id` and the columns of RULES.

    Raises OSError without the file, ValueError if a column is missing or an id is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text; wanted is a CSV of EMDB's search") from None
    table = csv.DictReader(io.StringIO(text, newline=""))
    wanted = ["emdb_id", *(column for column, _, _ in RULES)]
    if missing := set(wanted) - set(table.fieldnames or ()):
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; export {','.join(wanted)}")
    rows = {(row["emdb_id"] or "").strip().lower().replace("-", "_"): row for row in table}
    for label in rows:
        if not re.fullmatch(r"emd_\d+", label):
            raise ValueError(f"{path}: emdb_id {label!r} is none; they look like EMD-1234")
    return rows


def rejected(row: dict, max_resolution: float) -> str:
    """Why an entry of the metadata is left out; "" if it is not."""
    return next((why for column, keep, why in RULES
                 if not keep((row[column] or "").strip(), max_resolution)), "")


def read_index(folder: Path) -> list[dict]:
    """The rows of a prepared folder: one for each entry, with its statistics or why it was skipped."""
    if not (folder / INDEX).exists():
        return []
    with open(folder / INDEX, newline="") as file:      # a run that was killed may have left half a row
        return [row for row in csv.DictReader(file) if row["file"] is not None]


def prepare_one(file: Path, out: Path, voxel_size: float, max_side: float) -> dict:
    """One map -> out/emd_1234.npy, float16 (n, n, n) on 0..1; returns its row of the index."""
    label = file.name.split(".")[0].lower()
    row = dict(entry=label, file=file, split="test" if held_out(label) else "train")
    try:
        map = read_map(file)
        side = max(n * v for n, v in zip(map.density.shape, map.voxel_size))
        if side > max_side:
            return dict(row, skipped=f"side longer than {max_side:g} Å")
        map = resample(map, voxel_size)                 # a low-pass too: see (3)
        x, statistics = cube(map)
    except (ValueError, OSError) as error:
        return dict(row, skipped=f"unreadable: {error}")
    with written_whole(out / f"{label}.npy") as target:
        np.save(target, x.numpy())
    statistics = {name: f"{value:.5g}" for name, value in statistics.items()}
    return dict(row, skipped="", box=len(x), voxel_size=" ".join(f"{v:.5f}" for v in map.voxel_size), **statistics)


def prepare(folder: str | Path, out: str | Path, voxel_size: float, metadata: str | Path | None = None,
            max_resolution: float = 3.0, max_side: float = 576.0, workers: int = 1, say=print) -> list[dict]:
    """The entries' maps below `folder` (emd_1234.map.gz, ...) -> the folder `out`, which train.py reads.

    Each is curated (4.1: RULES where there is metadata, max_side in Å), brought to voxel_size (Å) by
    (2) and (3), clipped and normalised, (4) on 0..1, padded to a cube and stored as float16. The index
    has a row for each, with its statistics, or why it was skipped. A run that was stopped goes on
    where it was; maps that were skipped are looked at again. Returns the rows.
    Raises ValueError and OSError for folders, metadata and disks that will not do; one map never stops it.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    name = re.compile(r"emd_\d+\.(map|mrc|ccp4)(\.gz|\.bz2)?", re.I)          # no half maps, no masks
    files = {file.name.split(".")[0].lower(): file for file in sorted(folder.rglob("*")) if name.fullmatch(file.name)}
    if not files:
        raise ValueError(f"{folder}: no map of an EMDB entry, emd_1234.map.gz or the like, here or below")
    if not (0 < voxel_size < math.inf and workers >= 1):
        raise ValueError(f"--voxel-size {voxel_size:g}, --workers {workers}: want a positive number of Å and a worker or more")
    entries = None if metadata is None else read_metadata(metadata)
    settings = dict(voxel_size=voxel_size, max_resolution=max_resolution, max_side=max_side)
    out.mkdir(parents=True, exist_ok=True)
    if (out / SETTINGS).exists() and (before := json.loads((out / SETTINGS).read_text())) != settings:
        raise ValueError(f"{out}: begun with {before}; give these, or another folder")
    (out / SETTINGS).write_text(json.dumps(settings))

    rows, todo = [], []
    done = {row["entry"]: row for row in read_index(out) if not row["skipped"] and (out / f"{row['entry']}.npy").exists()}
    for label, file in files.items():
        why = ""
        if entries is not None:
            why = rejected(entries[label], max_resolution) if label in entries else "not in the metadata"
        if why:
            rows.append(dict(entry=label, file=file, skipped=why))
        elif label in done:
            rows.append(done[label])
        else:
            todo.append(file)
    say(f"{len(files)} maps: {len(rows)} done or ruled out, {len(todo)} to prepare"
        + ("" if metadata else "; no --metadata, so resolution, method and half maps go unchecked"))

    with open(out / (INDEX + ".new"), "w", newline="") as file:
        index = csv.DictWriter(file, COLUMNS)
        index.writeheader()
        index.writerows(rows)
        file.flush()
        os.replace(file.name, out / INDEX)              # and the rows to come are appended to it
        began = said = time.monotonic()
        for n, row in enumerate(_prepared(todo, workers, out, voxel_size, max_side), 1):
            rows.append(row)
            index.writerow(row)
            file.flush()
            now = time.monotonic()
            if now - said > 10 or n == len(todo):
                eta, said = timedelta(seconds=round((now - began) / n * (len(todo) - n))), now
                skipped = sum(bool(row["skipped"]) for row in rows)
                say(f"{n}/{len(todo)}  {n / (now - began):.2f} maps/s  ETA {eta}  {skipped} skipped")
    taken = [row for row in rows if not row["skipped"]]
    for why, count in Counter(row["skipped"].split(":")[0] for row in rows if row["skipped"]).most_common():
        say(f"{count:6d} skipped: {why}")
    say(f"{len(taken):6d} in {out}, {sum(row['split'] == 'test' for row in taken)} of them held out; reasons and "
        f"statistics: {out / INDEX}")
    return rows


def _prepared(files: list[Path], workers: int, *settings) -> Iterable[dict]:
    """The rows of prepare_one for each file, as they come from that many processes."""
    if workers == 1:
        yield from (prepare_one(file, *settings) for file in files)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        for future in as_completed([pool.submit(prepare_one, file, *settings) for file in files]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C: each finishes its map


# ---- 6. Training crops simulated from atomic models ----------------------------------------------

@dataclass(frozen=True)
class Structure:
    """Atoms of one model: xyz (A, 3) = (x, y, z) in Å, centred; atomic_number; b_factor in Å^2."""
    label: str
    xyz: np.ndarray
    atomic_number: np.ndarray
    b_factor: np.ndarray


def read_archive(path: Path) -> list[Structure]:
    """Many structures in one .npz: flat arrays over all atoms, structure i from atom_start[i] on.

    xyz (A, 3) in 0.01 Å, element (A,), bfactor (A,) in Å^2; label (n,), atom_start (n + 1,).
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz archive, or a truncated one; copy it again")
    with np.load(path) as archive:
        wanted = ("label", "atom_start", "xyz", "element", "bfactor")
        if missing := set(wanted) - set(archive):
            raise ValueError(f"{path}: no archive of structures, {', '.join(sorted(missing))} missing")
        label, start, *arrays = (archive[name] for name in wanted)
    xyz, element, b_factor = (array.astype(np.float32) for array in arrays)
    return [Structure(str(name), xyz[a:b] / 100, element[a:b], b_factor[a:b])
            for name, a, b in zip(label, start, start[1:])]


def read_structures(path: str | Path) -> list[Structure]:
    """The structures of an archive (.npz), of one PDB or mmCIF file, or of a folder of these.

    Raises OSError without the file, ValueError (one line) if one cannot be read.
    """
    files = list_files(path, (".npz", *MODEL_SUFFIXES))
    if [file.suffix for file in files] == [".npz"]:
        return read_archive(files[0])
    models = [(file, read_model(file)) for file in files if file.suffix != ".npz"]
    return [Structure(file.name.split(".")[0], (m.xyz - m.xyz.mean(0)).numpy().astype(np.float32),
                      *(x.numpy().astype(np.float32) for x in (m.atomic_number, m.b_iso)))
            for file, m in models]


def placed(structure: Structure, generator: Generator) -> tuple[Tensor, Tensor]:
    """(xyz, b_factor) of a model turned at random and placed off-centre.

    Half of the models have B = 0, the others the deposited B-factors above their 5th percentile, times a uniform number.
    """
    xyz = torch.from_numpy(structure.xyz)
    # A small molecule stays whole; of one larger than the box any part can be in the middle.
    anchor = xyz[torch.randint(len(xyz), (1,), generator=generator)] * uniform(0, 1, generator)
    xyz = (xyz - anchor) @ random_rotation(generator).T
    b = torch.zeros(len(xyz))
    if uniform(0, 1, generator) < 0.5:
        b = torch.from_numpy(structure.b_factor)
        b = (b - b.quantile(0.05)).clamp(min=0) * uniform(0, 1, generator)
    return xyz, b


def random_density(structure: Structure, generator: Generator, *, box: int, voxel_size: float,
                   resolution: tuple[float, float]) -> Tensor:
    """One simulated map (box, box, box) in Z/Å^3 of a `placed` model; resolution uniform in `resolution` (Å).

    The atoms are turned, not the grid, so no interpolation is involved.
    """
    xyz, b = placed(structure, generator)
    return molmap(xyz, structure.atomic_number, uniform(*resolution, generator), voxel_size=voxel_size,
                  shape=(box,) * 3, origin=-voxel_size * (box // 2), b_factor=b)[0]


class SimulatedCrops(torch.utils.data.Dataset):
    """Training crops from models: item i is (crops, 1, crop, crop, crop) in network scale.

    A function of (seed, i): a random structure's map of box^3 voxels, clipped and normalised as a
    whole, (4); three crops in four are cut around a point of the molecule, the others anywhere.
    `structures` is any sequence of them.
    """
    def __init__(self, structures, *, crop: int, crops: int, box: int, voxel_size: float = 1.5,
                 resolution: tuple[float, float] = (2.5, 4.0), mean: float, std: float,
                 seed: int = 0):
        self.structures, self.crop, self.crops, self.box = structures, crop, crops, box
        self.voxel_size, self.resolution = voxel_size, resolution
        self.mean, self.std, self.seed = mean, std, seed

    def __getitem__(self, i: int) -> Tensor:
        g = item_generator(self.seed, i)
        structure = self.structures[_randint(len(self.structures), g)]
        density = random_density(structure, g, box=self.box, voxel_size=self.voxel_size,
                                 resolution=self.resolution)
        x = normalise(density, self.mean, self.std)[0]
        mask = density_mask(x * self.std + self.mean)
        crops = [random_crop(x, self.crop, g, mask if torch.rand((), generator=g) < 0.75 else None)
                 for _ in range(self.crops)]
        return torch.stack(crops)[:, None]

    def __len__(self) -> int:
        return ENDLESS


# ---- 7. Pairs to learn a restoration from: CryoLVM ------------------------------------------------

def mirror_or_not(x: Tensor, generator: Generator) -> Tensor:
    """x (..., D, H, W) in one of all 48 orientations along the axes: flips and 90-degree rotations (CryoLVM, appendix E)."""
    x = rot24(x, generator)
    return x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x


def simulated_pair(task: str, xyz: Tensor, atomic_number, b_factor: Tensor, resolution: float, generator: Generator, *,
                   missing: str = "wedge", **grid) -> tuple[Tensor, Tensor]:
    """What was observed and what is wanted, (D, H, W) each, in Z/Å^3; grid: voxel_size, shape, origin of `molmap`.

    sharpen, superres    `degrade.deposited` -> `molmap` at the same resolution, or at 1.8 Å (CryoLVM 4.2, 4.3)
    wedge3d              `molmap` and noise, less what a tilt range of 50 to 70 degrees misses -> all of it (4.4)
    missing: "wedge", or "cone", the formula as the paper prints it.
    """
    wanted = molmap(xyz, atomic_number, 1.8 if task == "superres" else resolution, **grid)[0]
    if task != "wedge3d":
        return deposited(xyz, atomic_number, resolution, b_factor=b_factor, generator=generator, **grid), wanted
    angle = uniform(50, 70, generator)
    region = wedge_mask(wanted.shape, (-angle, angle)) if missing == "wedge" else cone_mask(wanted.shape, angle)
    noise = torch.randn(wanted.shape, generator=generator) * (uniform(0, 0.1, generator) * wanted.max())
    return apply_fourier(wanted + noise, region), wanted


def pair_crops(pair: Tensor, box: int, count: int, generator: Generator, anywhere: float = 0.5) -> list[Tensor]:
    """Cubes of a pair (2, D, H, W): this share of them cut anywhere, for solvent is to be learnt too, the others around points of
    the molecule. (When all were, what came of solvent was a grid of tiles, up to 9 % of the maximum.)"""
    mask = density_mask(pair[1])
    return [random_crop(pair, box, generator, None if uniform(0, 1, generator) < anywhere else mask) for _ in range(count)]


class SimulatedPairs(torch.utils.data.Dataset):
    """Pairs from models: item i is (crops, 2, crop, crop, crop), `simulated_pair` on [0, 1].

    A function of (seed, i), of a random structure at a resolution uniform in `resolution` (Å).
    """
    def __init__(self, structures, *, task: str, crop: int, crops: int, box: int, voxel_size: float,
                 resolution: tuple[float, float], missing: str = "wedge", seed: int = 0):
        self.structures, self.task, self.crop, self.crops, self.box = structures, task, crop, crops, box
        self.voxel_size, self.resolution, self.missing, self.seed = voxel_size, resolution, missing, seed

    def __getitem__(self, i: int) -> Tensor:
        g = item_generator(self.seed, i)
        structure = self.structures[_randint(len(self.structures), g)]
        xyz, b = placed(structure, g)
        pair = simulated_pair(self.task, xyz, structure.atomic_number, b, uniform(*self.resolution, g), g, missing=self.missing,
                              voxel_size=self.voxel_size, shape=(self.box,) * 3, origin=-self.voxel_size * (self.box // 2))
        pair = torch.stack([normalise(x, 0, 1)[0] for x in pair])
        # wedge3d: crops of molecules alone, as its weights were trained; and a wedge has an orientation, so only the atoms are turned.
        crops = pair_crops(pair, self.crop, self.crops, g, anywhere=0 if self.task == "wedge3d" else 0.5)
        return torch.stack(crops if self.task == "wedge3d" else [mirror_or_not(x, g) for x in crops])

    def __len__(self) -> int:
        return ENDLESS


PAIRS = "pairs.csv"                                     # columns map, model, resolution: two files beside it, and Å


class Pair(NamedTuple):
    """Observed and wanted (2, D, H, W) float16 on [0, 1]."""
    label: str
    maps: Tensor


def read_pairs(folder: str | Path, task: str, voxel_size: float) -> list[Pair]:
    """Deposited maps and their models, listed in FOLDER/pairs.csv -> pairs on the grid of voxel_size (Å).

    What is wanted is `molmap` of the model at the map's resolution, or at 1.8 Å for superres (CryoLVM 4.2, 4.3).
    Raises OSError or ValueError (one line) for a file that is missing or no map or model, for a model outside of its map,
    and for wedge3d, which learns from simulated pairs.
    """
    if task == "wedge3d":
        raise ValueError(f"{folder}: wedge3d learns from models (PDB, mmCIF, .npz), not from pairs")
    folder, pairs = Path(folder), []
    with open(folder / PAIRS, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        try:
            map_file, model_file, resolution = folder / row["map"], folder / row["model"], float(row["resolution"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder / PAIRS}: wants the columns map, model, resolution (Å); this row is {row}") from None
        source, model = resample(read_map(map_file), voxel_size), read_model(model_file)
        wanted = molmap(model.xyz, model.atomic_number, 1.8 if task == "superres" else resolution,
                        voxel_size=source.voxel_size, shape=source.density.shape, origin=source.corner)[0]
        if not wanted.max() > 0:
            raise ValueError(f"{model_file}: none of its atoms lies in {map_file}; they must share one frame")
        pair = torch.stack([normalise(x, 0, 1)[0] for x in (source.density, wanted)]).half()
        pairs.append(Pair(map_file.name.split(".")[0], pair))
    return pairs


class MapPairs(torch.utils.data.Dataset):
    """As SimulatedPairs, from `read_pairs`: item i is (crops, 2, crop, crop, crop) of one pair, a function of (seed, i)."""
    def __init__(self, pairs: list[Pair], *, crop: int, crops: int, seed: int = 0):
        self.pairs, self.crop, self.crops, self.seed = pairs, crop, crops, seed

    def __getitem__(self, i: int) -> Tensor:
        g = item_generator(self.seed, i)
        pair = pad(self.pairs[_randint(len(self.pairs), g)].maps.float(), self.crop)
        return torch.stack([mirror_or_not(x, g) for x in pair_crops(pair, self.crop, self.crops, g)])

    def __len__(self) -> int:
        return ENDLESS


# ---- 8. Structures built by rule: something to train on with nothing downloaded ------------------
# One chain through layers of helices or strands, side chains grown where there is room. Textbook
# geometry: Pauling, Corey & Branson 1951 (helix), Chothia et al. 1977, 1981 (packing, twist),
# Engh & Huber 1991 (bonds and angles); frequencies (%) of residues: UniProtKB/Swiss-Prot.

# The trans peptide between CA (0, 0) and the next CA (3.80, 0), O on the side of +y: CA-C 1.525,
# C-N 1.329, N-CA 1.458, C-O 1.231 Å; angles CA-C-N 117.2, C-N-CA 121.7, CA-C-O 120.1 degrees.
PEPTIDE = {"N": (2.407, -0.387), "C": (1.434, 0.518), "O": (1.653, 1.730)}
# Slots 0..3 of a residue are N, CA, C, O. "S4" is a sulphur bonded to slot 4, and so on from slot 4
# (CB) on. Aromatic rings stay open.
RESIDUES = """A 8.3 C1|R 5.5 C1 C4 C5 N6 C7 N8 N8|N 4.1 C1 C4 O5 N5|D 5.5 C1 C4 O5 O5|C 1.4 C1 S4|
    Q 3.9 C1 C4 C5 O6 N6|E 6.7 C1 C4 C5 O6 O6|G 7.1|H 2.3 C1 C4 N5 C5 C6 N7|I 5.9 C1 C4 C4 C5|
    L 9.7 C1 C4 C5 C5|K 5.8 C1 C4 C5 C6 N7|M 2.4 C1 C4 S5 C6|F 3.9 C1 C4 C5 C5 C6 C7 C8|
    P 4.7 C1 C4 C5|S 6.6 C1 O4|T 5.3 C1 O4 C4|W 1.1 C1 C4 C5 C5 N6 C7 C7 C9 C10 C11|
    Y 2.9 C1 C4 C5 C5 C6 C7 C8 O10|V 6.9 C1 C4 C4"""
ATOMIC_NUMBER = {"C": 6, "N": 7, "O": 8, "S": 16}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def axis_rotation(axis: int, degrees: float) -> np.ndarray:
    """Right-handed rotation (3, 3) of (x, y, z) columns about axis 0, 1 or 2."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    R = np.eye(3)
    R[i, i] = R[j, j] = math.cos(math.radians(degrees))
    R[j, i] = math.sin(math.radians(degrees))
    R[i, j] = -R[j, i]
    return R


def element(kind: str, n: int, phase: float) -> tuple[np.ndarray, np.ndarray]:
    """A helix "H" or strand "E" along z: CA (n, 3), and where each peptide's O points (n - 1, 3)."""
    k = np.arange(n)
    if kind == "H":                                     # 1.5 Å and 100 degrees per residue
        turn = np.radians(100) * k + phase
        radius = math.sqrt(3.8 ** 2 - 1.5 ** 2) / (2 * math.sin(np.radians(50)))      # 2.28 Å
        ca = np.stack([radius * np.cos(turn), radius * np.sin(turn), 1.5 * (k - k.mean())], 1)
        # Along the axis and a tenth outwards: phi -57, psi -47.
        middle = (turn + np.radians(50))[:-1]
        return ca, np.stack([0.1 * np.cos(middle), 0.1 * np.sin(middle), np.ones(n - 1)], 1)
    sign = (-1.0) ** k                                  # 3.3 Å per residue: phi -119, psi 117
    pleat = math.sqrt(3.8 ** 2 - 3.3 ** 2) / 2
    ca = np.stack([0 * sign, pleat * sign, 3.3 * (k - k.mean())], 1)
    return ca, np.outer(-sign[:-1], (1, 0, 0))          # to one neighbour, to the other


def arc(a: np.ndarray, b: np.ndarray, n: int, outward: np.ndarray) -> np.ndarray:
    """A loop: n CA between those at a and b on an arc of a circle, all CA-CA 3.8 Å: (n, 3)."""
    half = np.linspace(1e-3, math.pi / (n + 1), 1000)   # half the angle that one CA-CA spans
    chord = 3.8 * np.sin((n + 1) * half) / np.sin(half)
    half = np.interp(-np.linalg.norm(b - a), -chord, half)
    u = unit(b - a)
    w = unit(outward - (outward @ u) * u)
    angle = (2 * np.arange(1, n + 1) - (n + 1))[:, None] * half
    radius, rim = 1.9 / np.sin(half), np.cos((n + 1) * half)
    return (a + b) / 2 + radius * (np.sin(angle) * u + (np.cos(angle) - rim) * w)


def layout(rng: np.random.Generator) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Layers of helices or of strands, each element as (kind, CA, towards O), in chain order."""
    side = (150 * rng.uniform(85, 375)) ** (1 / 3)      # Å, of a cube with 150 Å^3 per residue
    layers = max(2, round(side / 10))                   # 10 Å apart
    elements = []
    for layer in range(layers):
        kind = "HE"[rng.integers(2)]
        rise, spacing = (1.5, 10.0) if kind == "H" else (3.3, 4.8)                     # Å
        length, count = round(0.75 * side / rise), max(2, round(side / spacing))
        tilt = axis_rotation(1, rng.normal(0, 8))
        for j in range(count)[::(-1) ** layer]:         # there and back
            ca, towards_o = element(kind, length, rng.uniform(0, 2 * math.pi))
            if len(elements) % 2:                       # up and down in turn
                along = -1 if kind == "H" else 1        # a helix's O point down then, a strand's not
                ca, towards_o = ca[::-1], towards_o[::-1] * (1, 1, along)
            # Neighbours twist by -5 degrees per 4.8 Å; in proteins -20, but our layers are flat.
            x = (j - (count - 1) / 2) * spacing
            turn = tilt @ axis_rotation(0, -5 * x / 4.8)
            middle = tilt @ (x, 0, 0) + (0, 10 * (layer - (layers - 1) / 2), 0)
            elements.append((kind, ca @ turn.T + middle, towards_o @ turn.T))
    return elements


def fold(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
    """A chain: CA (R, 3); where each peptide's O points (R - 1, 3), nan in loops; "HHHCCEE..."."""
    (kinds, *chain), *rest = layout(rng)
    kinds, chain = kinds * len(chain[0]), [chain]
    placed = np.concatenate([chain[0][0], *(ca for _, ca, _ in rest)])
    for i, (kind, ca, towards_o) in enumerate(rest):
        a, b, choices = chain[-1][0][-1], ca[0], []
        for _ in range(5):                              # of five arcs the one with most room
            n = max(2, math.ceil(0.4 * np.linalg.norm(b - a)) + rng.integers(-1, 2))
            choices.append(arc(a, b, n, (0, 0, (-1) ** i) + 0.5 * rng.normal(size=3)))
        loop = min(choices, key=lambda points: (distances(points, placed) ** -6).sum())
        placed = np.concatenate([placed, loop])
        chain += [(loop, np.full((len(loop) + 1, 3), math.nan)), (ca, towards_o)]
        kinds += "C" * len(loop) + kind * len(ca)
    return *(np.concatenate(parts) for parts in zip(*chain)), kinds


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def backbone(ca: np.ndarray, towards_o: np.ndarray) -> np.ndarray:
    """N, CA, C, O of all residues but the first and last: (R - 2, 4, 3)."""
    x = unit(np.diff(ca, axis=0))
    y = unit(towards_o - (towards_o * x).sum(1, keepdims=True) * x)

    def to_c(i, y):                                     # unit vector CA(i) -> C(i) for peptide i
        return unit(PEPTIDE["C"][0] * x[i] + PEPTIDE["C"][1] * y)

    def to_n(i, y):                                     # CA(i + 1) -> N(i + 1)
        return unit((PEPTIDE["N"][0] - 3.8) * x[i] + PEPTIDE["N"][1] * y)

    # In loops peptides turn about CA-CA, one after another and three times over, until N-CA-C is
    # nearest to 111 degrees on both sides.
    angle, wanted = np.arange(12)[:, None] * math.pi / 6, math.cos(math.radians(111))
    loops = np.flatnonzero(np.isnan(y[:, 0]))
    y[loops] = unit(np.cross(x[loops - 1], x[loops])) * (-1.0) ** loops[:, None]
    for i in [*loops] * 3:
        turned = np.cos(angle) * y[i] + np.sin(angle) * np.cross(x[i], y[i])
        miss = ((to_c(i, turned) @ to_n(i - 1, y[i - 1]) - wanted) ** 2
                + (to_n(i, turned) @ to_c(i + 1, y[i + 1]) - wanted) ** 2)
        y[i] = turned[miss.argmin()]
    at = {name: ca[:-1] + a * x + b * y for name, (a, b) in PEPTIDE.items()}
    return np.stack([at["N"][:-1], ca[1:-1], at["C"][1:], at["O"][1:]], 1)


def side_chains(backbone: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All atoms of the chain (A, 3) and their atomic numbers (A,): residues at random, by frequency.

    Atom by atom, bonds 1.5 Å and angles 111 degrees, in the one of four random directions with most
    room; where all lie within 2 Å of another atom, that side chain ends.
    """
    residues = [line.split() for line in RESIDUES.split("|")]
    frequency, R = np.array([float(r[1]) for r in residues]), len(backbone)
    xyz, number = np.full((R, 14, 3), math.nan), np.zeros((R, 14), dtype=int)
    parent = np.zeros((R, 14), dtype=int)               # of each slot; of CA it is N, of N it is C
    xyz[:, :4], number[:, :4], parent[:, 0] = backbone, (7, 6, 6, 8), 2
    for r, choice in enumerate(rng.choice(len(residues), R, p=frequency / frequency.sum())):
        for slot, bond in enumerate(residues[choice][2:], 4):
            number[r, slot], parent[r, slot] = ATOMIC_NUMBER[bond[0]], int(bond[1:])
    for slot in range(4, 14):
        there = ~np.isnan(xyz[..., 0])
        r = np.flatnonzero((number[:, slot] > 0) & there[np.arange(R), parent[:, slot]])
        c = parent[r, slot]
        b = parent[r, c]
        a = parent[r, b]
        # CB stands where L amino acids have it; the others at any dihedral angle a-b-c-new.
        dihedral = np.full((len(r), 1), -122.8) if slot == 4 else rng.uniform(0, 360, (len(r), 4))
        new = extend(xyz[r, a], xyz[r, b], xyz[r, c], np.radians(dihedral))     # (n, 1 or 4, 3)
        room = distances(new.reshape(-1, 3), xyz[there]).reshape(*dihedral.shape, there.sum())
        room[np.arange(len(r)), :, there.ravel().cumsum()[14 * r + c] - 1] = math.inf  # but c
        room, best = room.min(2).max(1), room.min(2).argmax(1)
        r, new = r[room > 2], new[np.arange(len(r)), best][room > 2]
        free = ~np.triu(distances(new, new) < 2, 1).any(0)                  # of each other
        xyz[r[free], slot] = new[free]
    there = ~np.isnan(xyz[..., 0])
    return xyz[there], number[there]


def extend(a: np.ndarray, b: np.ndarray, c: np.ndarray, dihedral: np.ndarray) -> np.ndarray:
    """NeRF (Parsons et al. 2005): points (n, k, 3) 1.5 Å from c (n, 3), at b-c-new 111 degrees."""
    z = unit(c - b)
    y = unit(np.cross(b - a, z))
    x = np.cross(y, z)
    turned = np.cos(dihedral)[..., None] * x[:, None] + np.sin(dihedral)[..., None] * y[:, None]
    angle = math.radians(111)
    return c[:, None] + 1.5 * (-math.cos(angle) * z[:, None] + math.sin(angle) * turned)


class ProceduralChains:
    """A sequence of n structures of 60 to 400 residues, each a function of (seed, index)."""
    def __init__(self, seed: int = 0, n: int = 100_000):
        self.seed, self.n = seed, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Structure:
        rng = np.random.default_rng((self.seed, index))
        ca, towards_o, _ = fold(rng)
        xyz, number = side_chains(backbone(ca, towards_o), rng)
        xyz = (xyz - xyz.mean(0)).astype(np.float32)
        square = (xyz ** 2).sum(1)
        b_factor = 60 * square / square.max()           # of a body that rocks about its centre
        return Structure(f"chain{index}", xyz, number.astype(np.float32), b_factor)


# ---- The program ---------------------------------------------------------------------------------

def main(argv=None) -> None:
    """`prepare` and `urls`; see the README for EMDB's side of it."""
    cli = argparse.ArgumentParser(description="Training maps from EMDB's.")
    commands = cli.add_subparsers(required=True, dest="command")
    one = commands.add_parser("prepare", help="deposited maps -> a folder for train.py --data",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("folder", help="holds emd_1234.map.gz and so on, at any depth")
    one.add_argument("out", help="folder for emd_1234.npy and index.csv")
    one.add_argument("--voxel-size", type=float, default=1.5, help="Å; CryoFM-S 1.5, CryoFM-L 3, CryoLVM 1")
    one.add_argument("--metadata", help="CSV of EMDB's search; without it only the maps themselves are judged")
    one.add_argument("--max-side", type=float, default=576.0, help="Å")
    one.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; each holds three copies of a map")
    two = commands.add_parser("urls", help="where to download the maps that the metadata do not rule out")
    two.add_argument("metadata", help="CSV of EMDB's search")
    for command in (one, two):
        command.add_argument("--max-resolution", type=float, default=3.0, help="Å; CryoFM 3, CryoLVM 4")
    args = vars(cli.parse_args(argv))
    if args.pop("command") == "prepare":
        prepare(**args)
        return
    for label, row in read_metadata(args["metadata"]).items():
        if not rejected(row, args["max_resolution"]):
            print(f"https://ftp.ebi.ac.uk/pub/databases/emdb/structures/{label.upper().replace('_', '-')}/map/{label}.map.gz")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))       # its processes end as with Ctrl-C
    try:
        main()
    except BrokenProcessPool:
        sys.exit("data.py: a process was killed, out of memory perhaps; fewer --workers, and the same command goes on")
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; the same command goes on")
