"""What two half maps say about the quality of a map.

    FSC_true = (FSC_masked - FSC_random) / (1 - FSC_random)   without the mask's correlation   (1)
    C = sqrt(2 FSC / (1 + FSC))                               weight of the half maps' mean    (2)
    ln <|F|>(s) = ln F_0 - B s^2 / 4                          Guinier plot, s in 1/Å           (3)
    sphericity = pi^(1/3) (6 V)^(2/3) / A                     surface |s| = s_0.143            (4)

Half maps are real-space maps (D, H, W) from the two halves of the particles. Shells, curves and
conventions are those of fsc.py. Voxel sizes are in Å, directions are (x, y, z).

(1): Chen et al. 2013, Ultramicroscopy 135:24. (2), (3): Rosenthal & Henderson 2003, J. Mol. Biol.
333:721. (4), directional FSC: Tan et al. 2017, Nat. Methods 14:793. Local resolution: Cardone et
al. 2013, J. Struct. Biol. 184:226. Masked FSC, B-factor and sharpening follow RELION's postprocess.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fourier import freq_grid, irfft3, raised_cosine, rfft3
from fsc import (
    correlate_shells,
    fsc,
    half_weight,
    radius,
    resolution,
    shell_side,
    shell_sum,
    shells,
)
from mrc import Map

# In standard deviations of chance. The best of all shifts of 28 real maps with up to 10 times their
# own noise, white or low-passed, reached 4.
CLEAR_SHIFT = 6.0

# Two grey scales


def match_half_maps(half_map_1: Tensor, half_map_2: Tensor) -> tuple[Tensor, list[str]]:
    """Half map 2 in the grey scale of half map 1, both with background 0: (D, H, W); notes.

    The factor is the ratio of amplitudes in shells with FSC above 0.5. It is left out where
    noise may make it: within 5 % of 1, or within four standard errors and what 100 % more noise in
    one half would do.
    Raises ValueError if one is the other times a factor, or filtered: an FSC would be 1 everywhere.
    """
    A, B = rfft3(half_map_1), rfft3(half_map_2)
    shape = half_map_1.shape
    shell = shells(shape, half=True).clamp(max=min(shape) // 2 + 1)
    weight = half_weight(shape)

    def sums(x: Tensor) -> Tensor:
        # Shell 0 is the mean, which background decides.
        return shell_sum(x * weight, shell, min(shape) // 2 + 1)[1:]

    # Power and correlation per shell. Where there is hardly any power, only rounding differs.
    power_1, power_2 = sums(A.abs() ** 2), sums(B.abs() ** 2)
    shared = sums((A * B.conj()).real)
    curve = shared / (power_1 * power_2).sqrt().clamp(min=1e-300)
    filled = (power_1 > 1e-8 * power_1.max()) & (power_2 > 1e-8 * power_2.max())
    total = shared.sum() / (power_1.sum() * power_2.sum()).sqrt()
    if total.abs() > 0.9999 or (curve.abs() > 0.9999)[filled].all():
        raise ValueError(
            f"the half maps correlate {float(total):.5f}: they are the same map, or one is a "
            "scaled or filtered copy; give two independent half maps"
        )

    # Amplitudes where the halves agree by more than chance, whose spread is 1 / sqrt(count).
    count = sums(torch.ones(shell.shape)) / 2  # a coefficient and its mirror image are one
    agree = filled & (curve.abs() > (2.5 / count.sqrt()).clamp(min=0.5))
    if not agree.any():
        return half_map_2, []
    factor = float((power_2[agree].sum() / power_1[agree].sum()).sqrt())

    # The error of its logarithm. The ratio of the powers of n coefficients with correlation r has a
    # relative variance of 2 (1 - r^2) / n. Noise has the share 1 - r of the power.
    power = (power_1 * power_2).sqrt()[agree]
    r = curve[agree].abs()
    variance = (power**2 * (1 - r**2) / (2 * count[agree])).sum() / power.sum() ** 2
    noise_share = ((1 - r) * power).sum() / power.sum()
    by_noise = float(4 * variance.sqrt() + noise_share / 2)
    if shared[agree].sum() < 0:
        factor = -factor
    elif abs(math.log(factor)) <= max(0.05, by_noise):
        return half_map_2, []
    note = f"half map 2 has {factor:.4g} times the grey scale of half map 1"
    return half_map_2 / factor, [note]


def place_notes(half_map_1: Map, half_map_2: Map) -> list[str]:
    """A note if two half maps say that they lie at different places."""
    shift = np.subtract(half_map_2.corner, half_map_1.corner)
    if (np.abs(shift) <= 0.01 * np.array(half_map_1.voxel_size)).all():
        return []
    z, y, x = shift
    return [
        f"half map 2 lies {x:g} {y:g} {z:g} Å (x y z) from half map 1, by their headers; "
        "compared voxel by voxel all the same",
    ]


def shift_notes(half_map_1: Tensor, half_map_2: Tensor) -> list[str]:
    """A note if half maps (D, H, W) correlate better, beyond chance, when moved by whole voxels."""
    # Their correlation for every shift of half map 2, without the mean.
    shape = half_map_1.shape
    A, B = (rfft3(x - x.mean()) for x in (half_map_1, half_map_2))
    power_1, power_2 = A.abs().square(), B.abs().square()
    weight = half_weight(shape)
    total = float(((weight * power_1).sum() * (weight * power_2).sum()).sqrt())
    found = (irfft3(A * B.conj(), shape) * math.prod(shape) / total).abs()
    shift = [int(i) for i in torch.unravel_index(found.argmax(), shape)]
    gain = float(found.max() - found[0, 0, 0])

    # By chance, noise changes it by this standard deviation. Noise has the share 1 - FSC^2.
    n = min(shape) // 2 + 1
    curve = F.pad(fsc(half_map_1, half_map_2.roll(shift, (0, 1, 2))).nan_to_num(), (0, 1))
    noise = (1 - curve**2)[shells(shape, half=True).clamp_(max=n)]
    chance = float((weight * noise * power_1 * power_2).sum().sqrt()) / total
    if gain < max(0.01, CLEAR_SHIFT * chance):
        return []
    z, y, x = (i - side if i > side // 2 else i for i, side in zip(shift, shape))
    return [
        f"the half maps correlate {float(found.max()):.2f} instead of "
        f"{float(found[0, 0, 0]):.2f} when half map 2 is moved by {x} {y} {z} voxels (x y z): "
        "align them first"
    ]


# FSC under a mask


class MaskedFSC(NamedTuple):
    """FSC curves (n,) of half maps under a mask."""

    corrected: Tensor  # (1)
    unmasked: Tensor
    masked: Tensor
    randomised: Tensor  # the FSC of the masked, phase-randomised half maps
    randomised_from: int  # first shell with random phases; the last shell + 1: none


def randomise_phases(x: Tensor, shell: int, seed: int = 0, voxel_size=1.0) -> Tensor:
    """x (D, H, W) with the phases of white noise at all frequencies of radius >= `shell`.

    White noise has uniform phases and the mirror symmetry that a real map needs.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = rfft3(torch.randn(x.shape, generator=generator).to(x.device))
    X = rfft3(x)
    beyond = radius(x.shape, voxel_size, half=True, device=x.device) >= shell
    X = torch.where(beyond, X.abs() * torch.sgn(noise), X)
    return irfft3(X, x.shape)


def correct_for_mask(masked: Tensor, randomised: Tensor, randomised_from: int) -> Tensor:
    """(1), from two shells after the first randomised one on. Before it, the masked FSC.

    A shell is nan where (1) fails: the mask alone makes the maps equal or opposite, so that (1)
    divides by about 0, or the result is below -1, which no correlation is.
    """
    corrected = (masked - randomised) / (1 - randomised)  # (1)
    holds = (randomised.abs() <= 0.999) & (corrected >= -1)
    corrected = torch.where(holds, corrected.clamp(max=1), math.nan)
    start = randomised_from + 2
    return torch.cat([masked[:start], corrected[start:]])


def masked_fsc(
    half_map_1: Tensor,
    half_map_2: Tensor,
    mask: Tensor,
    *,
    convention: str = "ours",
    voxel_size=1.0,
    seed: int = 0,
) -> MaskedFSC:
    """FSC of half maps under a mask, corrected for what the mask alone correlates (1).

    half maps, mask: (D, H, W). The mask lies between 0 and 1 and is best soft-edged. Phases are
    randomised from the first shell whose unmasked FSC is below 0.8, as in RELION.
    Raises ValueError if the mask does not fit.
    """
    shape = half_map_1.shape
    low, high = mask.min(), mask.max()
    if mask.shape != shape or not 0 <= low <= high <= 1 or high == 0:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)}, values {low:g} to {high:g}; "
            f"want {tuple(shape)}, values from 0 to 1"
        )

    # The curves of the maps as they are.
    settings = {"convention": convention, "voxel_size": voxel_size}
    unmasked = fsc(half_map_1, half_map_2, **settings)
    masked = fsc(half_map_1 * mask, half_map_2 * mask, **settings)

    # Find the first shell that the half maps share too little of.
    below = (k for k, value in enumerate(unmasked.tolist()) if k > 0 and value < 0.8)
    start = next(below, len(unmasked))

    # What correlates beyond that shell without a signal comes from the mask.
    random_1 = randomise_phases(half_map_1, start, seed, voxel_size)
    random_2 = randomise_phases(half_map_2, start, seed + 1, voxel_size)
    randomised = fsc(random_1 * mask, random_2 * mask, **settings)
    corrected = correct_for_mask(masked, randomised, start)
    return MaskedFSC(corrected, unmasked, masked, randomised, start)


# Sharpening

LOWEST = 10.0  # Å, where the Guinier fit begins


def fsc_weight(curve: Tensor) -> Tensor:
    """(2) per shell, zero from the first shell with FSC < 0.0001 on: (n,) -> (n,)."""
    curve = curve.clone()
    curve[0] = 1  # the zero frequency only compares the maps' means
    good = (curve >= 1e-4).long().cumprod(0)  # nan is not good
    return torch.where(good > 0, 2 * curve / (1 + curve), 0).sqrt()  # (2)


def guinier_b_factor(density: Tensor, curve: Tensor, voxel_size: float, d_min: float) -> float:
    """-B of (3) in Å², the value that `sharpen` needs to undo the decay of the amplitudes.

    The sign is RELION's: negative means that the map will be sharpened. We fit a straight line to
    ln<|F|> of the map weighted by (2) against s^2, from 10 Å (LOWEST) to d_min.
    density: (D, H, W), the mean of the half maps. curve: (n,), their FSC. d_min: their resolution
    in Å.
    Raises ValueError with fewer than 3 shells in that range.
    """
    # Mean amplitude of each shell, weighted.
    n = len(curve)
    device = density.device
    shell = shells(density.shape, half=True, device=device).clamp_(max=n)
    amplitude = shell_sum(rfft3(density).abs(), shell, n)
    count = shell_sum(torch.ones_like(shell), shell, n)
    log = (amplitude / count * fsc_weight(curve)).log()

    # Choose the shells to fit.
    side = min(density.shape) * voxel_size
    s2 = (torch.arange(n, dtype=torch.float64, device=device) / side) ** 2
    fit = (s2 >= LOWEST**-2) & (s2 <= d_min**-2) & log.isfinite()
    if fit.sum() < 3:
        raise ValueError(
            f"only {int(fit.sum())} shells between {LOWEST:g} and {d_min:g} Å: too few for a "
            "Guinier fit; give the B-factor (--b-factor)"
        )

    # The slope of the straight line through them is -B / 4.
    x = s2[fit] - s2[fit].mean()
    slope = (x * log[fit]).sum() / (x * x).sum()
    return 4 * float(slope)  # (3)


def sharpen(
    density: Tensor, curve: Tensor, voxel_size: float, b_factor: float, d_min: float
) -> Tensor:
    """The mean of two half maps, weighted by (2) and sharpened by exp(-b_factor s^2 / 4).

    density: (D, H, W). curve: (n,), the half maps' FSC. b_factor: in Å², negative sharpens
    (`guinier_b_factor`). d_min: the map's resolution in Å. A raised cosine two shells wide about
    it ends the map.
    Raises ValueError if the curve is not the map's.
    """
    box = min(density.shape)
    n = box // 2 + 1
    if len(curve) != n:
        raise ValueError(
            f"the curve has {len(curve)} shells; a map with shortest side {box} has {n}"
        )
    r = radius(density.shape, half=True, device=density.device)
    side = box * voxel_size

    # FSC weight of each coefficient, 0 beyond the last shell.
    weight = F.pad(fsc_weight(curve), (0, 1)).to(r)
    weight = weight[r.add(0.5).long().clamp_(max=n)]

    # B-factor, and the low pass at the shell of the resolution.
    last = math.floor(side / d_min + 0.5)
    low_pass = raised_cosine((r - (last - 1)) / 2)
    gain = weight * torch.exp(-b_factor / 4 * (r / side) ** 2) * low_pass * (r <= box / 2)
    return irfft3(rfft3(density) * gain.to(density.dtype), density.shape)


# Directional resolution


def direction_grid(n: int = 10) -> Tensor:
    """Unit vectors (x, y, z) on a hemisphere: (n, 4n, 3), row i at (i + 1/2) / n of 90 degrees."""
    rows = torch.arange(n, dtype=torch.float64) + 0.5
    columns = torch.arange(4 * n, dtype=torch.float64)
    theta = rows / n * torch.pi / 2
    phi = columns / (4 * n) * 2 * torch.pi
    theta, phi = torch.meshgrid(theta, phi, indexing="ij")
    return torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)


def directional_fsc(
    a: Tensor,
    b: Tensor,
    directions: Tensor | None = None,
    half_angle: float = 20.0,
    *,
    voxel_size=1.0,
) -> Tensor:
    """FSC within cones: only the frequencies within half_angle degrees of +- each direction.

    a, b: (D, H, W). directions: (..., 3) as (x, y, z), default `direction_grid()`.
    Returns (..., n), n = box//2 + 1.
    """
    # Unit vectors (..., 3).
    if directions is None:
        directions = direction_grid()
    directions = torch.as_tensor(directions, dtype=torch.float64)
    directions = (directions / directions.norm(dim=-1, keepdim=True)).to(a.device)

    # Drop the corners of the box once for all cones: M coefficients are left.
    box, _ = shell_side(a.shape, voxel_size)
    n = box // 2 + 1
    shell = shells(a.shape, voxel_size, half=True, device=a.device)
    weight = half_weight(a.shape, device=a.device)
    kz, ky, kx = freq_grid(a.shape, voxel_size, half=True, device=a.device)
    inside = shell < n
    everything = [rfft3(a), rfft3(b), shell, weight, kx, ky, kz]
    A, B, shell, weight, *k = (x.expand(inside.shape)[inside] for x in everything)
    k = torch.stack(k, -1)  # (M, 3)
    reach = math.cos(math.radians(half_angle)) * k.norm(dim=-1)

    # One curve per cone.
    curves = []
    for direction in directions.reshape(-1, 3):
        cone = ((k @ direction).abs() >= reach).nonzero()[:, 0]
        curves.append(correlate_shells(A[cone], B[cone], shell[cone], weight[cone], n))
    return torch.stack(curves).view(*directions.shape[:-1], n)


def sphericity(resolutions: Tensor) -> float:
    """(4) of the surface 1 / resolution(direction): 1 for a sphere.

    resolutions: (n, 4n), in Å, on the directions of `direction_grid(n)`.
    """
    r = 1 / resolutions.double()
    n, m = r.shape
    step = torch.pi / 2 / n  # of both angles

    # r(-u) = r(u), so the row beyond the pole, or beyond the equator, is the opposite half of the
    # first, or the last, row.
    beyond_pole = r[:1].roll(m // 2, -1)
    beyond_equator = r[-1:].roll(m // 2, -1)
    padded = torch.cat([beyond_pole, r, beyond_equator])

    # Derivatives by the polar angle, and along the circle of latitude.
    rows = torch.arange(n, dtype=torch.float64, device=r.device) + 0.5
    sin = (rows * step).sin()[:, None]
    r_theta = (padded[2:] - padded[:-2]) / (2 * step)
    r_phi = (r.roll(-1, 1) - r.roll(1, 1)) / (2 * step) / sin

    # Volume and area of both hemispheres. The solid angles add up to 4 pi.
    solid_angle = 2 * sin / sin.sum() * 2 * torch.pi / m
    volume = (r**3 / 3 * solid_angle).sum()
    area = (r * (r**2 + r_theta**2 + r_phi**2).sqrt() * solid_angle).sum()
    return float(torch.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area)  # (4)


# Local resolution


def windows_about_voxels(x: Tensor, side: int) -> Tensor:
    """Windows of x (D, H, W) as views (D, H, W, side, side, side): one centred on each voxel.

    Beyond the box they hold 0.
    """
    before = side // 2
    padded = F.pad(x, (before, side - 1 - before) * 3)
    return padded.unfold(0, side, 1).unfold(1, side, 1).unfold(2, side, 1)


def soft_window(side: int) -> Tensor:
    """A soft ball in a cube of `side` voxels: a raised cosine of the radius, (side, side, side)."""
    axis = torch.arange(side) - side // 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    return raised_cosine(distance / (side / 2))


def local_resolution(
    half_map_1: Tensor,
    half_map_2: Tensor,
    voxel_size: float,
    *,
    window: int | None = None,
    step: int | None = None,
) -> Tensor:
    """Resolution in Å at every voxel, (D, H, W): where the FSC in a sliding window falls below 0.5.

    half maps: (D, H, W), cubic voxels. window: side of the soft window in voxels, default seven
    times the global resolution. step: voxels between windows, default window//6. Between their
    centres the result is interpolated. Windows without density get the coarsest resolution,
    window * voxel_size. Raises ValueError if the window does not fit.
    """
    # The default window depends on the resolution of the whole map.
    shape = half_map_1.shape
    if window is None:
        overall = float(resolution(fsc(half_map_1, half_map_2), voxel_size, box=min(shape)))
        window = max(10, min(round(7 * overall / voxel_size), min(shape)))
    if not 4 <= window <= min(shape):
        raise ValueError(
            f"window is {window} voxels; want 4 to {min(shape)}, the map's shortest side"
        )
    if step is None:
        step = max(1, window // 6)

    # The windows' centres form a coarse grid.
    counts = [math.ceil((n - 1) / step) + 1 for n in shape]
    centres = [torch.linspace(0, n - 1, m).round().long() for n, m in zip(shape, counts)]

    # Resolution in the windows, 64 at a time.
    windows_1 = windows_about_voxels(half_map_1, window)
    windows_2 = windows_about_voxels(half_map_2, window)
    soft = soft_window(window).to(half_map_1.device)
    values = []
    for batch in torch.cartesian_prod(*centres).split(64):
        z, y, x = batch.T
        curves = fsc(windows_1[z, y, x] * soft, windows_2[z, y, x] * soft)
        values.append(resolution(curves, voxel_size, 0.5, box=window))

    # Interpolate between the centres.
    coarsest = window * voxel_size
    values = torch.cat(values).nan_to_num(coarsest, posinf=coarsest).clamp(max=coarsest)
    coarse = values.view(1, 1, *counts).float()
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0]


# Files


def read_fsc(path: str, box: int, voxel_size: float) -> Tensor:
    """FSC of half maps in the shells 1 .. box//2 of a map's noise power (degrade.py): float64.

    path: a .csv of fsc.py for half maps, whose curve without a mask is read at each shell's middle,
    or a text file with one number per line, from shell 1 on. box, voxel_size: voxels and Å along
    the x axis. The values are clamped to lie inside 0 .. 1. Raises ValueError for any other file.
    """
    n = box // 2
    end = math.inf
    try:
        # Split the file into cells. A file that is no text raises a ValueError, too.
        text = Path(path).read_text()
        lines = [line.split(",") for line in text.splitlines() if line.strip()]
        if lines[0][0] == "shell":
            # A table: take the curve without a mask at the middle of each shell.
            header, *rows = lines
            column = header.index("unmasked")
            points = np.array([(float(row[1]), float(row[column])) for row in rows])
            # Shell 0 is nan in CryoFM's convention.
            frequency, curve = points[np.isfinite(points[:, 1])].T
            middle = (np.arange(n) + 0.5) / (box * voxel_size)
            end = frequency[-1] + 1 / (box * voxel_size)
            curve = np.interp(middle, frequency, curve)
        else:
            curve = np.array([float(number) for (number,) in lines])
    except (ValueError, IndexError):
        message = f"{path}: neither half maps' .csv of fsc.py nor one FSC value per line"
        raise ValueError(message) from None
    if end < (n - 0.5) / (box * voxel_size):
        raise ValueError(
            f"{path}: the curve ends at {1 / frequency[-1]:.3g} Å, the map's grid at "
            f"{2 * voxel_size:.3g} Å; give the FSC of half maps of this grid"
        )
    if not np.isfinite(curve).all():
        raise ValueError(f"{path}: a value is NaN or infinite; give the FSC of shells 1 to {n}")
    if len(curve) != n:
        raise ValueError(f"{path}: {len(curve)} shells; a box of {box} needs shells 1 to {n}")
    return torch.from_numpy(curve).clamp(1e-6, 1 - 1e-6)
