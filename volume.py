"""Grey scale, crops, rotations and tiles of density maps.

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
import functools
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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


def cube(density: Tensor) -> tuple[Tensor, dict]:
    """A map as it is trained on, float16 (n, n, n) on 0..1, and its statistics, before padding.

    A cube, padded with 0, so that no rotation turns density out of it.
    Raises ValueError if hardly any voxel is above a tenth of the 99.999 percentile.
    """
    x, scale = normalise(density, 0, 1)
    filled = float((x > 0.1).float().mean())
    if filled < 1e-4:
        raise ValueError(f"hardly any density: {filled:.1e} of its voxels are above a tenth of the top")
    statistics = dict(maximum=scale.maximum, mean=float(x.mean()), std=float(x.std()), filled=filled)
    return pad(x, max(x.shape)).half(), statistics


# Axis orders and flips whose matrix has determinant +1; the other 24 would change handedness.
ROTATIONS_24 = [(order, signs) for order in itertools.permutations(range(3))
                for signs in itertools.product((1, -1), repeat=3)
                if np.linalg.det(np.eye(3)[list(order)] * signs) > 0]


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


def cut_tiles(x: Tensor, corners: list[tuple[int, int, int]], tile: int) -> Tensor:
    """The cubes of x (..., D, H, W) at the corners: (len(corners), ..., tile, tile, tile)."""
    return torch.stack([crop(x, corner, tile) for corner in corners])


def blend_tiles(tiles: Iterable[Tensor], corners: list[tuple[int, int, int]],
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
