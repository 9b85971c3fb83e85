"""Grey scale, crops, rotations and tiles of density maps.

    x = (clip(density, 0, p) / p - mean) / std         network scale; p: 99.999 percentile   (1)
    rotated(r) = density(R r)                          r = (x, y, z) from the box's middle   (2)
    density(r) = sum_j c_j B(r - j)                    interpolation by cubic B-splines      (3)
    M = sum_k w y_k / sum_k w                          tiles y_k blended under a window w    (4)

Volumes are float32 (D, H, W) = (z, y, x); "..." stands for any dimensions before these.

(1): CryoFM (arXiv:2410.08631) section 4.2, clipping as in its release. (2) and crops: its appendix
F.1. (3): Sigg & Hadwiger 2005, GPU Gems 2, chapter 20. (4): CryoLVM appendix D.2, Algorithm 1.

Departure 1: F.1 does not say how the mask of random crops is dilated. We use a cube of 3^3 voxels,
three times.
Departure 2: D.2 gives no sigma for the blending window. We use a quarter of the tile.
Departure 3: (1) wants solvent at 0 and bright protein. EMDB's maps mostly are so, other maps are
not. `find_grey_scale` measures both. Ours.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- Grey scale ------------------------------------------------------------------------------

# Percentiles that become 0 and 1. A low one of 0 stands for the value 0.
CLIP = (0.0, 99.999)  # (1)
LITERAL = (1.0, 99.0)  # "the 0.01 - 0.99 percentile range" of CryoLVM's D.1; saturates protein

LEAST_SKEW = 0.4  # of a smoothed map; below it, the sign of protein is not clear


@dataclass(frozen=True)
class GreyScale:
    """Where solvent lies in a map's grey scale, and whether protein is brighter than it.

    background: in the map's units. sign: 1 for bright protein, -1 for dark protein. unclear: the
    sign is a guess. given: the background was not measured. contrary: the sign was given, and the
    map looks like the other one.
    """

    background: float = 0.0
    sign: int = 1
    unclear: bool = False
    given: bool = False
    contrary: bool = False

    @property
    def notes(self) -> list[str]:
        """What was found and is done about it."""
        notes = []
        if self.background != 0:
            origin = "as given" if self.given else "found and"
            notes.append(f"background {self.background:.5g} {origin} subtracted")
        if self.sign < 0:
            notes.append("protein is dark: inverted")
        if self.unclear:
            notes.append("not clear whether protein is bright or dark: taken for bright")
        return notes

    @property
    def is_plain(self) -> bool:
        return self.background == 0 and self.sign == 1

    def to_work(self, x: Tensor) -> Tensor:
        """The map with its background at 0 and bright protein."""
        return x if self.is_plain else self.sign * (x - self.background)

    def to_map(self, x: Tensor) -> Tensor:
        """The inverse of `to_work`."""
        return x if self.is_plain else self.sign * x + self.background


def find_background(density: Tensor) -> float:
    """The value around which most voxels lie, in a map of any shape: that of the solvent.

    The median of what is left when voxels far from the median are left out, again and again. On
    simulated maps with noise it is 0.025 of the maximum off at most, also in boxes full of protein.
    """
    # A quarter of a million voxels say enough. The stride is odd, so that it meets all columns of
    # most boxes.
    flat = density.detach().flatten()
    values = flat[:: flat.numel() >> 18 | 1].double()
    for _ in range(30):
        middle = values.median()
        distance = (values - middle).abs()
        spread = 1.4826 * distance.median()  # the standard deviation, if it is Gaussian noise
        # More than half of the voxels share one value, as outside of a mask.
        if spread == 0:
            break
        near = values[distance <= 2 * spread]
        if len(near) == len(values):
            break
        values = near
    return float(values.median())


def skewness(x: Tensor) -> float:
    """mean of x^3 over (mean of x^2)^(3/2): positive if bright values are farther from 0."""
    x = x.detach().double()
    return float((x**3).mean() / (x**2).mean() ** 1.5)


def find_sign(density: Tensor, background: float) -> int:
    """1 if protein is brighter than the background, -1 if it is darker, 0 if that is not clear.

    density: (D, H, W). Protein fills the smaller part of a box and is far from the background, so
    the values are skewed to its side. Noise is not. The mean over 3^3 voxels has less noise.
    """
    if density.min() == density.max():
        return 0
    x = density.detach().double() - background
    smooth = F.avg_pool3d(F.pad(x[None, None], (1,) * 6), 3, stride=1)  # also of one slice
    skew, smooth_skew = skewness(x), skewness(smooth)
    # Where the two disagree, neither is the protein's.
    if abs(smooth_skew) < LEAST_SKEW or skew * smooth_skew <= 0:
        return 0
    return 1 if skew > 0 else -1


def find_grey_scale(
    density: Tensor,
    background: float | None = None,
    invert: bool | None = None,
    tolerance: float = 0.03,
) -> GreyScale:
    """The grey scale of a map (D, H, W). A background or a sign that is given is not measured.

    A background within `tolerance` of 0, relative to the brightest protein, counts as 0.
    """
    # Dark protein, or bright protein.
    level = find_background(density) if background is None else background
    found = find_sign(density, level)
    sign = -1 if found < 0 else 1
    if invert is not None:
        sign = -1 if invert else 1

    # Most maps have their background near 0, and are left as they are.
    top = top_value(sign * (density - level), 99.999)
    if background is None and abs(level) <= tolerance * top:
        level = 0.0
    return GreyScale(
        level,
        sign,
        unclear=invert is None and found == 0,
        given=background is not None,
        contrary=invert is not None and found == -sign,
    )


class Scale(NamedTuple):
    """The numbers of (1), for network scale and back. In the map's units, `maximum` is p.

    minimum: 0, or the low percentile of `normalise`.
    """

    maximum: float
    mean: float
    std: float
    minimum: float = 0.0


def normalise(
    density: Tensor,
    mean: float,
    std: float,
    percentile: float = 99.999,
    maximum: float | None = None,
    low: float = 0.0,
) -> tuple[Tensor, Scale]:
    """One map of any shape in network scale (1), and the scale that `denormalise` needs.

    maximum: p of (1) instead of the map's percentile. low: a percentile that becomes 0 in (1), as
    in LITERAL, instead of the value 0.
    Raises ValueError as `positive_maximum` does, or if the low percentile is as high as p.
    """
    if maximum is None:
        maximum = positive_maximum(density, percentile)

    # As many values lie below a percentile as above the opposite one of the negative map.
    minimum = -top_value(-density, 100 - low) if low else 0.0
    if not maximum > minimum:
        raise ValueError(f"the map's {low} percentile is {minimum:g}, and its maximum is no larger")
    x = (density.clamp(minimum, maximum) - minimum) / (maximum - minimum)
    return (x - mean) / std, Scale(maximum, mean, std, minimum)  # (1)


def positive_maximum(density: Tensor, percentile: float = 99.999) -> float:
    """p of (1): a high percentile of a map of any shape, its maximum but for outliers.

    Raises ValueError if it is not positive: dark protein, or hardly any density.
    """
    maximum = top_value(density, percentile)
    if not maximum > 0:
        raise ValueError(
            f"the map's {percentile} percentile is {maximum:g} and must be positive: protein is "
            "darker than the background, or hardly any voxel holds density"
        )
    return maximum


def top_value(density: Tensor, percentile: float) -> float:
    """A high percentile of a map of any shape."""
    # The percentile lies between two values, as in numpy.percentile. torch.topk sorts only the few
    # largest ones, and torch.quantile refuses more than 2^24.
    flat = density.detach().flatten().float()
    position = percentile / 100 * (flat.numel() - 1)
    low = math.floor(position)
    top = torch.topk(flat, flat.numel() - low).values
    below = float(top[-1])
    above = float(top[max(len(top) - 2, 0)])
    return below + (position - low) * (above - below)


def to_network_scale(density: Tensor, scale: Scale) -> Tensor:
    """(1) without clipping, for observations: their noise goes below 0. Undone by `denormalise`."""
    x = (density - scale.minimum) / (scale.maximum - scale.minimum)
    return (x - scale.mean) / scale.std


def denormalise(x: Tensor, scale: Scale) -> Tensor:
    """The inverse of (1): a map in its own units.

    What `normalise` clipped stays clipped: negative values come back as 0, and those above
    `scale.maximum` (one voxel in 100,000) as the maximum. Nothing is clipped here, so values of a
    network may lie beyond.
    """
    return (x * scale.std + scale.mean) * (scale.maximum - scale.minimum) + scale.minimum


def cube(density: Tensor, percentiles: tuple[float, float] = CLIP) -> tuple[Tensor, dict]:
    """A map as it is trained on, float16 (n, n, n) on 0..1, and its statistics before padding.

    Its background and its sign are found and taken out. It is padded with 0 to a cube, so that no
    rotation turns density out of it.
    Raises ValueError if hardly any voxel is above a tenth of the 99.999 percentile, or if it is no
    density above a background: a tomogram, a local-resolution map.
    """
    grey = find_grey_scale(density)
    density = grey.to_work(density)
    refuse_full(density, grey)

    # An empty map, or one with a single bright voxel, teaches nothing.
    low, high = percentiles
    x, scale = normalise(density, 0, 1, high, low=low)
    filled = float((x > 0.1).float().mean())
    if filled < 1e-4:
        share = f"{filled:.1e} of its voxels are above a tenth of the top"
        raise ValueError(f"hardly any density: {share}")
    statistics = {
        "maximum": scale.maximum,
        "mean": float(x.mean()),
        "std": float(x.std()),
        "filled": filled,
        "background": grey.background,
        "sign": grey.sign,
    }
    return pad(x, max(x.shape)).half(), statistics


def refuse_full(density: Tensor, grey: GreyScale) -> None:
    """ValueError if a map in work scale is no protein above solvent. The limits are ours.

    Of 28 maps with protein none has more than 0.36 of its voxels beyond a tenth of the top, and a
    tomogram has 0.57. Another one has 0.26 and a skewness of 0.5, because it is as dark as it is
    bright; of maps with more than 0.2 beyond and protein, all have 1.9 or more.
    A local-resolution map is flat outside of the molecule, and far from 0.
    """
    top = top_value(density, 99.999)
    beyond = float((density.abs() > 0.1 * top).float().mean())
    if beyond > 0.2 and abs(skewness(density)) < 1:
        raise ValueError(
            f"full of density: {beyond:.0%} of its voxels are beyond a tenth of the top, on both "
            f"sides of the background {grey.background:.4g}; a tomogram, or mostly noise"
        )
    if beyond > 0.5:
        raise ValueError(
            f"full of density: {beyond:.0%} of its voxels are beyond a tenth of the top above the "
            f"background {grey.background:.4g}; a tomogram, or a map of something else"
        )
    flat = float((density == 0).float().mean())
    if flat > 0.5 and grey.background > top:
        raise ValueError(
            f"full of density: {flat:.0%} of its voxels are {grey.background:.4g}, farther from 0 "
            f"than the others from it ({top:.4g}), as in a local-resolution map; if it is a "
            "density, subtract the background"
        )
    if grey.unclear:
        raise ValueError("not clear whether protein is bright or dark in this map")


def density_mask(density: Tensor, threshold: float = 0.1, dilations: int = 3) -> Tensor:
    """Where random crops may be centred: density (D, H, W) on 0..1 above the threshold, dilated."""
    x = (density > threshold).float()[None]
    for _ in range(dilations):
        x = F.max_pool3d(x, 3, stride=1, padding=1)  # Departure 1
    return x[0] > 0


def soft_mask(mask: Tensor, name: str) -> tuple[Tensor, list[str]]:
    """A mask on 0..1 as it was read from the file `name`, and notes on what was clamped.

    Raises ValueError if values lie more than 1e-4 outside 0..1, which rounding does not explain, or
    if no value is above 0.
    """
    low = float(mask.min())
    high = float(mask.max())
    if not -1e-4 <= low <= high <= 1 + 1e-4:
        raise ValueError(f"{name}: values from {low:g} to {high:g}; a mask is 0 to 1")
    if high <= 1e-4:
        raise ValueError(f"{name}: 0 everywhere; give a mask that is 1 in the region to keep")
    if low >= 0 and high <= 1:
        return mask, []
    outside = max(-low, high - 1)
    note = f"{name}: values leave 0 to 1 by up to {outside:.1g}, as rounding does; clamped"
    return mask.clamp(0, 1), [note]


# ---- Crops -----------------------------------------------------------------------------------


def crop(x: Tensor, corner: Iterable[int], box: int) -> Tensor:
    """The cube of `box` voxels of x (..., D, H, W) that begins at corner (z, y, x): a view of x.

    Raises ValueError if the cube does not lie inside x.
    """
    sides = x.shape[-3:]
    corner = tuple(corner)
    if any(start < 0 or start + box > n for start, n in zip(corner, sides, strict=True)):
        raise ValueError(
            f"a cube of {box} voxels at {corner} leaves the box {tuple(sides)}; pad it first"
        )
    region = [slice(start, start + box) for start in corner]
    return x[..., *region]


def center_crop(x: Tensor, box: int) -> Tensor:
    """The central cube of x (..., D, H, W): voxel n // 2 becomes voxel box // 2 (F.1)."""
    return crop(x, [n // 2 - box // 2 for n in x.shape[-3:]], box)


def pad(x: Tensor, box: int, value: float = 0.0) -> Tensor:
    """x (..., D, H, W) with every side at least `box`; voxel n // 2 stays in the middle.

    value is the solvent in the scale of x: 0 for a density, -mean / std in network scale.
    """
    widths = []
    for n in reversed(x.shape[-3:]):  # F.pad wants the last axis first
        side = max(n, box)
        before = side // 2 - n // 2
        widths += [before, side - n - before]
    return F.pad(x, widths, value=value)


# ---- Rotations -------------------------------------------------------------------------------

# The 24 rotations of the cube: axis orders and flips whose matrix has determinant +1. The other 24
# would change the handedness.
ROTATIONS_24 = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
    if np.linalg.det(np.eye(3)[list(order)] * signs) > 0
]


def rotate(x: Tensor, rotation: Tensor, box: int | None = None, cubic: bool = False) -> Tensor:
    """The map turned by (2), trilinear or, with `cubic`, by cubic B-splines.

    x: (..., D, H, W) with one rotation (3, 3), or (B, ..., D, H, W) with (B, 3, 3), which act on
    (x, y, z) columns. The specimen is turned by R^T about the middle of the box, (n - 1) / 2, and 0
    comes in from outside. box: return only the middle box^3 voxels of the result.
    """
    rotation = rotation.to(x).reshape(-1, 3, 3)
    count = len(rotation)
    D, H, W = x.shape[-3:]
    shape = (D, H, W) if box is None else (box, box, box)

    # affine_grid measures each axis by its own side, in the order x, y, z.
    side = x.new_tensor((W, H, D))
    wanted = x.new_tensor(shape[::-1])
    theta = F.pad(rotation * wanted / side[:, None], (0, 1))
    grid = F.affine_grid(theta, (count, 1, *shape), align_corners=False)

    volumes = x.reshape(count, -1, D, H, W)
    turned = sample_cubic(volumes, grid) if cubic else sample_linear(volumes, grid)
    return turned.view(*x.shape[:-3], *shape)


def sample_linear(x: Tensor, grid: Tensor) -> Tensor:
    """x (B, C, D, H, W) at the places of grid (B, D', H', W', 3), which run from -1 to 1."""
    return F.grid_sample(x, grid, align_corners=False)


def sample_cubic(x: Tensor, grid: Tensor) -> Tensor:
    """`sample_linear` by (3).

    Two of the four taps of an axis are one linear look-up at a place between them. So an axis needs
    two look-ups, and 8 trilinear samples of c make one cubic sample (Ruijters & Thévenaz 2012).
    """
    # Solve (3) for the coefficients c, along D, then H, then W. Each solved axis becomes the last.
    c = x
    for n in x.shape[-3:]:
        i = torch.arange(n, device=x.device)
        distance = (i - i[:, None]).abs().clamp(max=2)
        spline = x.new_tensor([4 / 6, 1 / 6, 0])[distance]  # B at 0, 1 and 2 voxels
        c = torch.tensordot(c, torch.linalg.inv(spline), ([-3], [0]))

    # Places in voxels, and their distance a from the voxel before.
    sides = x.new_tensor(x.shape[:-4:-1])  # W, H, D
    place = ((grid + 1) * sides - 1) / 2
    voxel = place.floor()
    a = place - voxel

    # Weights of the taps voxel, voxel + 1 and voxel + 2. All four sum to 1, so that of voxel - 1 is
    # the rest.
    w_1 = (4 - 6 * a**2 + 3 * a**3) / 6
    w_2 = (1 + 3 * a + 3 * a**2 - 3 * a**3) / 6
    w_3 = a**3 / 6

    # One look-up for the lower two taps and one for the upper two, on each axis. Sum over all 8.
    upper = w_2 + w_3
    lower = 1 - upper
    places = (voxel - 1 + w_1 / lower, voxel + 1 + w_3 / upper)
    weights = (lower, upper)
    total = 0
    for corner in itertools.product((0, 1), repeat=3):
        at = torch.stack([places[k][..., axis] for axis, k in enumerate(corner)], -1)
        weight = math.prod(weights[k][..., axis] for axis, k in enumerate(corner))
        total = total + weight[:, None] * sample_linear(c, (2 * at + 1) / sides - 1)
    return total


# ---- Tiles -----------------------------------------------------------------------------------


def tile_starts(shape: Iterable[int], tile: int, stride: int) -> list[tuple[int, int, int]]:
    """Corners (z, y, x) of cubes of `tile` voxels that cover a box; the last one ends with it.

    Raises ValueError if a side is shorter than the tile, or if the stride leaves gaps.
    """
    shape = tuple(shape)
    if min(shape) < tile or not 0 < stride <= tile:
        raise ValueError(
            f"tiles of {tile} voxels every {stride} cannot cover the box {shape}; "
            "pad it to one tile at least, and keep the stride within a tile"
        )
    # Along each axis, and then all combinations.
    starts = [[*range(0, n - tile, stride), n - tile] for n in shape]
    return list(itertools.product(*starts))


def gaussian_window(box: int) -> Tensor:
    """Weights (box, box, box) of Algorithm 1: a Gaussian scaled to 1 in the corners, 3 at most."""
    # One Gaussian along each axis, and their product.
    i = torch.arange(box) - (box - 1) / 2
    g = torch.exp(-(i**2) / (2 * (box / 4) ** 2))  # Departure 2
    w = g[:, None, None] * g[:, None] * g
    low = w.min()
    return 1 + 2 * (w - low) / (w.max() - low).clamp(min=1e-12)


def cut_tiles(x: Tensor, corners: list[tuple[int, int, int]], tile: int) -> Tensor:
    """The cubes of x (..., D, H, W) at the corners: (len(corners), ..., tile, tile, tile)."""
    return torch.stack([crop(x, corner, tile) for corner in corners])


def blend_tiles(
    tiles: Iterable[Tensor],
    corners: list[tuple[int, int, int]],
    shape: Iterable[int],
    window: Tensor | None = None,
) -> Tensor:
    """Tiles (..., tile, tile, tile) at their corners -> one map (..., *shape), by (4).

    tiles: the stack from `cut_tiles`, or a generator of single tiles, which needs less memory.
    window: the positive weights w (tile, tile, tile); default: `gaussian_window`.
    """
    total = None
    for tile, corner in zip(tiles, corners, strict=True):
        # The first tile says how many channels there are, and on which device.
        box = tile.shape[-1]
        if total is None:
            window = gaussian_window(box) if window is None else window
            window = window.to(tile)
            total = tile.new_zeros(*tile.shape[:-3], *shape)
            weight = tile.new_zeros(*shape)

        crop(total, corner, box).add_(tile * window)
        crop(weight, corner, box).add_(window)
    return total / weight  # (4); every voxel has a positive weight
