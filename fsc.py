"""Fourier shell correlation, and every other number that says how good a map is.

    FSC(k) = Re sum_k A conj(B) / sqrt(sum_k |A|^2 sum_k |B|^2)         sums over shell k                     (1)
    FSC_true = (FSC_masked - FSC_random) / (1 - FSC_random)             the mask's own correlation taken out  (2)
    C = sqrt(2 FSC / (1 + FSC))                                         weight of the mean of two half maps   (3)
    ln <|F|>(s) = ln F_0 - B s^2 / 4                                    Guinier plot, s in 1/Å                (4)
    sphericity = pi^(1/3) (6 V)^(2/3) / A                               V, A of the surface |s| = s_0.143     (5)
    F(s) = sum_j n_j f_j(s) exp(-B_j s^2 / 4) exp(-2 pi i s . x_j)      an atomic model's structure factors   (6)
    f(s) = sum_i a_i exp(-b_i s^2 / 4)                                  electron scattering by one atom       (7)
    Q = corr(density on shells of radius R about an atom, exp(-R^2 / (2 sigma^2)))                            (8)

Shell k holds the frequencies that round to k / box cycles per voxel, box the shortest side, each coefficient of the
full transform counted once. A radial filter multiplies A on a shell by one number: it cannot change (1), so no
B-factor or Wiener step moves an FSC. Voxel sizes and origins are those of data.Map, one number or (z, y, x);
positions of atoms are (x, y, z).
(1): Harauz & van Heel 1986, Optik 73:146. (2): Chen et al. 2013, Ultramicroscopy 135:24. (3), (4): Rosenthal &
Henderson 2003, J. Mol. Biol. 333:721. (5): Tan et al. 2017, Nat. Methods 14:793. (6), map-model correlations and
d_model: Afonine et al. 2018, Acta Cryst. D74:814. (7): Int. Tables C, table 4.3.2.2. (8): Pintilie et al. 2020,
Nat. Methods 17:328. CryoFM's FSC_AUC and FSC_0.5: its appendix C.1.
Departure 1: CryoFM's release bins by ceil(radius) and leaves out the zero frequency; we round. Binning alone moves
FSC_AUC by up to 0.05, so `fsc` and what calls it take convention="ours", "relion" or "cryofm".
Departures 2 and 3, from exactness and from cctbx: `structure_factors`, `_crossing`.
"""
import argparse
import gzip
import io
import itertools
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CONVENTIONS = ("ours", "relion", "cryofm")

# ---- 1. Shells ---------------------------------------------------------------------------------------------------------


def triple(value) -> tuple[float, float, float]:
    """One number for all three axes, or three (z, y, x)."""
    return tuple(torch.as_tensor(value, dtype=torch.float64).expand(3).tolist())


def shell_side(shape, voxel_size=1.0, convention: str = "ours") -> tuple[int, float]:
    """(box, voxel size in Å) of the side that makes the shells 0 .. box//2: k is k / (box * voxel size) in 1/Å.

    The shortest side; "cryofm": the x axis.
    """
    sides = list(zip(shape[-3:], triple(voxel_size)))
    return sides[2] if convention == "cryofm" else min(sides, key=lambda side: side[0] * side[1])


def freq_grid(shape, *, half: bool = False, dtype=torch.float64, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """The Fourier grid of a box (D, H, W): kz, ky, kx in cycles per voxel, in `fftfreq` layout.

    Shapes (D, 1, 1), (1, H, 1), (1, 1, W), to be broadcast: |k| is (kz**2 + ky**2 + kx**2).sqrt(). With `half`, kx is
    the axis of rfftn, (1, 1, W//2 + 1). float64, so that ties between shells and edges of a wedge fall as in numpy.
    """
    D, H, W = shape
    kz, ky = (torch.fft.fftfreq(n, dtype=dtype, device=device) for n in (D, H))
    kx = (torch.fft.rfftfreq if half else torch.fft.fftfreq)(W, dtype=dtype, device=device)
    return kz[:, None, None], ky[None, :, None], kx[None, None, :]


def radius(shape, voxel_size=1.0, *, half: bool = False, device=None) -> Tensor:
    """|k| in shells, not rounded: float64 (D, H, W), or (D, H, W//2 + 1) with `half`."""
    box, voxel = shell_side(shape, voxel_size)
    axes = zip(freq_grid(shape, half=half, device=device), triple(voxel_size))
    z, y, x = ((k * (voxel / v)) ** 2 for k, v in axes)   # cycles per voxel of the shortest side
    return (z + y + x).sqrt_().mul_(box)


def shells(shape, voxel_size=1.0, *, half: bool = False, convention: str = "ours", device=None) -> Tensor:
    """The shell of every Fourier coefficient: int64 (D, H, W), or (D, H, W//2 + 1) with `half`.

    "ours", "relion": round(radius). "cryofm": shell k holds (k - 1) / W < |k| <= k / W, as many as the x axis has.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; want one of {', '.join(CONVENTIONS)}")
    if convention != "cryofm":
        return radius(shape, voxel_size, half=half, device=device).add_(0.5).long()
    kz, ky, kx = freq_grid(shape, half=half, device=device)
    nyquist = shape[-1] // 2 / shape[-1]                # edges and |k| differ in the last bit, and so do the ties,
    edges = torch.arange(shape[-1] // 2 + 1, dtype=torch.float64, device=device) * (nyquist / (shape[-1] // 2))
    return torch.searchsorted(edges, (kz**2 + ky**2 + kx**2).sqrt())      # just as in the release


def half_weight(shape, region: Tensor | None = None, *, convention: str = "ours", device=None) -> Tensor:
    """How often a sum over the full transform meets each coefficient of the half one: float32, to be broadcast.

    Twice for 0 < x < W/2, which stand for their mirror images too; once for x = 0 and an even box's Nyquist plane.
    region: (D, H, W) in `fftfreq` layout, what to count. "relion" counts every stored coefficient once.
    """
    half = shape[-1] // 2 + 1
    weight = torch.ones(1, 1, half, device=device)
    if convention != "relion":
        weight[..., 1 : (shape[-1] + 1) // 2] = 2
    if region is None:
        return weight
    if region.shape != shape:
        raise ValueError(f"region has shape {tuple(region.shape)}; want {tuple(shape)}, the map's, in fftfreq layout")
    region = region.to(device, torch.float32)
    if convention != "relion":                          # the mean of the region at k and at -k
        region = (region + region.flip(0, 1, 2).roll((1, 1, 1), (0, 1, 2))) / 2
    return weight * region[..., :half]


def shell_sum(x: Tensor, shell: Tensor, n: int) -> Tensor:
    """Sums of x (..., *shell.shape) over shells 0 .. n-1 in float64: (..., n). `shell` holds 0 .. n; n is dropped."""
    x = x.flatten(-shell.ndim).to(torch.float64)
    return x.new_zeros(*x.shape[:-1], n + 1).index_add_(-1, shell.flatten(), x)[..., :n]


def rfft3(x: Tensor) -> Tensor:
    return torch.fft.rfftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(-3, -2, -1))


def fsc(a: Tensor, b: Tensor, region: Tensor | None = None, *, convention: str = "ours", voxel_size=1.0) -> Tensor:
    """Fourier shell correlation (1).

    a, b: (..., D, H, W) real-space maps (or arrays) on one grid, any units. region: (D, H, W) boolean in `fftfreq`
    layout, the coefficients to count: ~wedge_mask(...) scores the missing wedge alone. voxel_size only matters where
    it differs between the axes. Returns float64 (..., n) in [-1, 1], n = box//2 + 1, box the shortest side ("cryofm":
    W, and shell 0 is nan); nan where a shell has no coefficient or no power. Raises ValueError if the shapes differ.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or a.ndim < 3:
        raise ValueError(f"fsc: maps of shapes {tuple(a.shape)} and {tuple(b.shape)}; want two maps on one grid")
    shape = a.shape[-3:]
    shell = shells(shape, voxel_size, half=True, convention=convention, device=a.device)
    n = shell_side(shape, voxel_size, convention)[0] // 2 + 1
    weight = half_weight(shape, region, convention=convention, device=a.device)
    curve = _correlate(rfft3(a), rfft3(b), shell.clamp_(max=n), weight, n)
    if convention == "cryofm":
        curve[..., 0] = math.nan
    return curve


def _correlate(A: Tensor, B: Tensor, shell: Tensor, weight, n: int) -> Tensor:
    cross, power_a, power_b = (shell_sum(_dot(X, Y).mul_(weight), shell, n) for X, Y in ((A, B), (A, A), (B, B)))
    return cross / (power_a * power_b).sqrt()           # (1)


def _dot(A: Tensor, B: Tensor) -> Tensor:
    return (A.real * B.real).addcmul_(A.imag, B.imag)   # Re A conj(B)


def auc(curve: Tensor) -> Tensor:
    """FSC_AUC: plain mean of the FSC over shells 1 .. box//2, without those that are nan. (..., n) -> (...)."""
    return torch.as_tensor(curve)[..., 1:].nanmean(-1)


def resolution(curve: Tensor, voxel_size: float, threshold: float = 0.143, *, box: int | None = None,
               convention: str = "ours") -> Tensor:
    """Resolution in Å: where the FSC first falls below the threshold. (..., n) -> (...); float() it for one curve.

    Linear interpolation in frequency between that shell and the one before; "relion": the last shell before it,
    not interpolated. The last shell (Nyquist) if the curve never falls; nan for a curve of nan. voxel_size, box:
    of the side that makes the shells (`shell_side`); box defaults to 2 (n - 1), an odd one must be given.
    """
    curve = torch.as_tensor(curve)
    if curve.ndim > 1:
        return torch.stack([resolution(c, voxel_size, threshold, box=box, convention=convention) for c in curve])
    # The zero frequency itself only compares the maps' means: it counts as 1.
    known = [(0, 1.0)] + [(k, v) for k, v in enumerate(curve.tolist()) if k > 0 and not math.isnan(v)]
    at = known[-1][0] if len(known) > 1 else math.nan
    for (above, value), (k, next_value) in itertools.pairwise(known):
        if next_value < threshold:
            part = 0.0 if convention == "relion" else (value - threshold) / (value - next_value)
            at = above + part * (k - above)
            break
    side = (2 * (len(curve) - 1) if box is None else box) * voxel_size
    return curve.new_tensor(side / at if at else math.inf)


# ---- 2. Half maps ------------------------------------------------------------------------------------------------------


class MaskedFSC(NamedTuple):
    """Curves (n,): `corrected` is (2), `randomised` the FSC of the masked, phase-randomised half maps."""
    corrected: Tensor
    unmasked: Tensor
    masked: Tensor
    randomised: Tensor
    randomised_from: int                                # first shell with random phases; the last shell + 1: none


def randomise_phases(x: Tensor, shell: int, seed: int = 0, voxel_size=1.0) -> Tensor:
    """x (D, H, W) with the phases of all frequencies of radius >= `shell` replaced by those of white noise.

    White noise has uniform phases and the mirror symmetry that a real map needs.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    X, N = rfft3(x), rfft3(noise)
    beyond = radius(x.shape, voxel_size, half=True, device=x.device) >= shell
    return torch.fft.irfftn(torch.where(beyond, X.abs() * torch.sgn(N), X), s=x.shape)


def correct_for_mask(masked: Tensor, randomised: Tensor, randomised_from: int) -> Tensor:
    """(2), from two shells after the first randomised one; before it the masked FSC."""
    corrected, i = masked.clone(), slice(randomised_from + 2, None)
    corrected[i] = (masked[i] - randomised[i]) / (1 - randomised[i])
    return corrected


def masked_fsc(half_map_1: Tensor, half_map_2: Tensor, mask: Tensor, *, convention: str = "ours", voxel_size=1.0,
               seed: int = 0) -> MaskedFSC:
    """FSC of half maps under a mask, corrected for what the mask alone correlates (Chen et al. 2013; RELION).

    half maps, mask: (D, H, W), the mask between 0 and 1, best soft-edged. Phases are randomised from the first shell
    whose unmasked FSC is below 0.8. Raises ValueError if the mask does not fit.
    """
    if mask.shape != half_map_1.shape or not (0 <= mask.min() and 0 < mask.max() <= 1):
        raise ValueError(f"mask: shape {tuple(mask.shape)}, values {mask.min():g} to {mask.max():g}; "
                         f"want {tuple(half_map_1.shape)}, values from 0 to 1")
    halves, score = (half_map_1, half_map_2), lambda a, b: fsc(a, b, convention=convention, voxel_size=voxel_size)
    unmasked, masked = score(*halves), score(*(x * mask for x in halves))
    start = next((k for k, v in enumerate(unmasked.tolist()) if k > 0 and v < 0.8), len(unmasked))
    randomised = score(*(randomise_phases(x, start, seed + i, voxel_size) * mask for i, x in enumerate(halves)))
    return MaskedFSC(correct_for_mask(masked, randomised, start), unmasked, masked, randomised, start)


def fsc_weight(curve: Tensor) -> Tensor:
    """(3) per shell, zero from the first shell with FSC < 0.0001 on. (n,) -> (n,)."""
    curve = curve.clone()
    curve[0] = 1                                        # the zero frequency says nothing but the sign of the means
    good = (curve >= 1e-4).long().cumprod(0)            # nan is not good
    return torch.where(good > 0, 2 * curve / (1 + curve), 0).sqrt()


def guinier_b_factor(density: Tensor, curve: Tensor, voxel_size: float, resolution: float, lowest: float = 10.0) -> float:
    """-B of (4) in Å², RELION's sign: what `sharpen` needs to undo the decay (negative: the map will be sharpened).

    Straight line through ln<|F|> of the weighted (3) map against s^2, from `lowest` Å to `resolution` Å.
    density (D, H, W): the mean of the half maps. Raises ValueError with fewer than 3 shells in that range.
    """
    n, shell = len(curve), shells(density.shape, half=True, device=density.device)
    amplitude, count = (shell_sum(x, shell.clamp(max=n), n) for x in (rfft3(density).abs(), torch.ones_like(shell)))
    s2 = (torch.arange(n, dtype=torch.float64, device=density.device) / (min(density.shape) * voxel_size)) ** 2
    log = (amplitude / count * fsc_weight(curve)).log()
    fit = (s2 >= lowest**-2) & (s2 <= resolution**-2) & log.isfinite()
    if fit.sum() < 3:
        raise ValueError(f"only {int(fit.sum())} shells between {lowest:g} and {resolution:g} Å: too few for a "
                         "Guinier fit; give the B-factor")
    x, y = s2[fit] - s2[fit].mean(), log[fit]
    return 4 * float((x * y).sum() / (x * x).sum())


def sharpen(density: Tensor, curve: Tensor, voxel_size: float, b_factor: float, resolution: float) -> Tensor:
    """The mean of two half maps, weighted (3), sharpened by exp(-b_factor s^2 / 4), low-passed: RELION's postprocess.

    density (D, H, W); curve (n,) their FSC; b_factor in Å², negative sharpens (`guinier_b_factor`); resolution in Å:
    a raised cosine two shells wide about it ends the map. Raises ValueError if the curve is not the map's.
    """
    box = min(density.shape)
    if len(curve) != box // 2 + 1:
        raise ValueError(f"the curve has {len(curve)} shells; a map with shortest side {box} has {box // 2 + 1}")
    r = radius(density.shape, half=True, device=density.device)
    weight = F.pad(fsc_weight(curve), (0, 1)).to(r)[r.add(0.5).long().clamp(max=len(curve))]
    last = math.floor(box * voxel_size / resolution + 0.5)
    low_pass = 0.5 + 0.5 * torch.cos(torch.pi * ((r - (last - 1)) / 2).clamp(0, 1))
    gain = weight * torch.exp(-b_factor / 4 * (r / (box * voxel_size)) ** 2) * low_pass * (r <= box / 2)
    return torch.fft.irfftn(rfft3(density) * gain.to(density.dtype), s=density.shape)


def direction_grid(n: int = 10) -> Tensor:
    """Unit vectors (x, y, z) on a hemisphere: (n, 4n, 3), row i at the polar angle (i + 1/2) / n of 90 degrees."""
    theta = (torch.arange(n, dtype=torch.float64) + 0.5)[:, None] / n * torch.pi / 2
    phi = torch.arange(4 * n, dtype=torch.float64)[None] / (4 * n) * 2 * torch.pi
    return torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos().expand(n, 4 * n)], -1)


def directional_fsc(a: Tensor, b: Tensor, directions: Tensor | None = None, half_angle: float = 20.0, *,
                    voxel_size=1.0) -> Tensor:
    """FSC within cones (Tan et al. 2017): only the frequencies within half_angle degrees of +- each direction.

    a, b: (D, H, W); directions: (..., 3) as (x, y, z), default `direction_grid()`. Returns (..., n).
    """
    directions = direction_grid() if directions is None else torch.as_tensor(directions, dtype=torch.float64)
    directions = (directions / directions.norm(dim=-1, keepdim=True)).to(a.device)
    n = shell_side(a.shape, voxel_size)[0] // 2 + 1
    shell = shells(a.shape, voxel_size, half=True, device=a.device)
    inside = shell < n                                  # the corners of the box leave for good
    flat = lambda x: x.expand(shell.shape)[inside]
    k = freq_grid(a.shape, half=True, device=a.device)
    k = torch.stack([flat(x / v) for x, v in zip(k, triple(voxel_size))][::-1], -1)       # (M, 3): x, y, z
    reach = math.cos(math.radians(half_angle)) * k.norm(dim=-1)
    terms = [flat(x) for x in (rfft3(a), rfft3(b), shell, half_weight(a.shape, device=a.device))]
    curves = []
    for u in directions.reshape(-1, 3):
        cone = ((k @ u).abs() >= reach).nonzero()[:, 0]
        curves.append(_correlate(*(x[cone] for x in terms), n))
    return torch.stack(curves).view(*directions.shape[:-1], n)


def sphericity(resolution: Tensor) -> float:
    """(5) of the surface 1 / resolution(direction), resolutions on `direction_grid(n)`: (n, 4n). 1 for a sphere."""
    r = 1 / resolution.double()
    n, m = r.shape
    opposite = lambda row: row.roll(m // 2, -1)         # beyond the pole, and beyond the equator since r(-u) = r(u)
    padded = torch.cat([opposite(r[:1]), r, opposite(r[-1:])])
    step = torch.pi / 2 / n                             # of both angles
    sin = ((torch.arange(n, dtype=torch.float64, device=r.device) + 0.5) * step).sin()[:, None]
    r_theta = (padded[2:] - padded[:-2]) / (2 * step)
    r_phi = (r.roll(-1, 1) - r.roll(1, 1)) / (2 * step) / sin
    solid_angle = 2 * sin / sin.sum() * 2 * torch.pi / m          # both hemispheres, 4 pi in all
    volume = (r**3 / 3 * solid_angle).sum()
    area = (r * (r**2 + r_theta**2 + r_phi**2).sqrt() * solid_angle).sum()
    return float(torch.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area)


def local_resolution(half_map_1: Tensor, half_map_2: Tensor, voxel_size: float, *, window: int | None = None,
                     step: int | None = None, threshold: float = 0.5, batch: int = 64) -> Tensor:
    """Resolution in Å at every voxel: FSC in a sliding window (Cardone et al. 2013, J. Struct. Biol. 184:226).

    half maps (D, H, W), cubic voxels. window: its side in voxels, soft (a raised cosine of the radius); default seven
    times the global resolution. step: voxels between windows (default window//6); between their centres the result is
    interpolated. Windows without density get the coarsest resolution, window * voxel_size.
    """
    shape, device = half_map_1.shape, half_map_1.device
    if window is None:
        whole = float(resolution(fsc(half_map_1, half_map_2), voxel_size, box=min(shape)))
        window = max(10, min(round(7 * whole / voxel_size), min(shape)))
    if not 4 <= window <= min(shape):
        raise ValueError(f"window is {window} voxels; want 4 to {min(shape)}, the map's shortest side")
    step = step or max(1, window // 6)
    centres = [torch.linspace(0, n - 1, math.ceil((n - 1) / step) + 1).round().long() for n in shape]
    at = torch.cartesian_prod(*centres).to(device)      # window i of the padded map is centred on voxel i
    axis = torch.arange(window, device=device) - window // 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() / (window / 2)
    soft = 0.5 + 0.5 * torch.cos(torch.pi * distance.clamp(max=1))
    pad = (window // 2, window - 1 - window // 2) * 3
    views = [F.pad(x, pad).unfold(0, window, 1).unfold(1, window, 1).unfold(2, window, 1) for x in (half_map_1, half_map_2)]
    values = torch.cat([resolution(fsc(*(v[tuple(i.T)] * soft for v in views)), voxel_size, threshold, box=window)
                        for i in at.split(batch)])
    coarsest = window * voxel_size
    coarse = values.nan_to_num(coarsest, posinf=coarsest).clamp(max=coarsest).view(1, 1, *map(len, centres)).float()
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0]


# ---- 3. Maps and atomic models -----------------------------------------------------------------------------------------

SYMBOLS = """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr
    Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir
    Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu
"""
ATOMIC_NUMBER = {symbol.upper(): z for z, symbol in enumerate(SYMBOLS.split(), 1)} | {"D": 1}

# Element, van der Waals radius in Å (cctbx, for the molecular mask), a_1 .. a_5 and b_1 .. b_5 of (7).
ELEMENTS = """
    H 1.2 .0349 .1201 .197 .0573 .1195 .5347 3.5867 12.3471 18.9525 38.6269
    C 1.775 .0893 .2563 .757 1.0487 .3575 .2465 1.71 6.4094 18.6113 50.2523
    N 1.5 .1022 .3219 .7982 .8197 .1715 .2451 1.7481 6.1925 17.3894 48.1431
    O 1.45 .0974 .2921 .691 .699 .2039 .2067 1.3815 4.6943 12.7105 32.4726
    F 1.47 .1083 .3175 .6487 .5846 .1421 .2057 1.3439 4.2788 11.3932 28.7881
    Na 2.27 .2142 .6853 .7692 1.6589 1.4482 .3334 2.3446 10.083 48.3037 138.27
    Mg 1.73 .2314 .6866 .9677 2.1882 1.1339 .3278 2.272 10.9241 39.2898 101.9748
    P 1.9 .2548 .6106 1.4541 2.3204 .8477 .2908 1.874 8.5176 24.3434 63.2996
    S 1.8 .2497 .5628 1.3899 2.1865 .7715 .2681 1.6711 7.0267 19.5377 50.3888
    Cl 1.75 .2443 .5397 1.3919 2.0197 .6621 .2468 1.5242 6.1537 16.6687 42.3086
    K 2.75 .4115 1.4031 2.2784 2.6742 2.2162 .3703 3.3874 13.1029 68.9592 194.4329
    Ca 1.95 .4054 1.388 2.1602 3.7532 2.2063 .3499 3.0991 11.9608 53.9353 142.3892
    V 1.06 .3876 1.275 1.9109 2.8314 1.8979 .2967 2.378 8.7981 35.9528 101.7201
    Cr 1.13 .4046 1.3696 1.8941 2.08 1.2196 .2986 2.3958 9.1406 37.4701 113.7121
    Mn 1.19 .3796 1.2094 1.7815 2.542 1.5937 .2699 2.0455 7.4726 31.0604 91.5622
    Fe 1.26 .3946 1.2725 1.7031 2.314 1.4795 .2717 2.0443 7.6007 29.9714 86.2265
    Co 1.13 .4118 1.3161 1.6493 2.193 1.283 .2742 2.0372 7.7205 29.968 84.9383
    Ni 1.63 .386 1.1765 1.5451 2.073 1.3814 .2478 1.766 6.3107 25.2204 74.3146
    Cu 1.4 .4314 1.3208 1.5236 1.4671 .8562 .2694 1.9223 7.3474 28.9892 90.6246
    Zn 1.39 .4288 1.2646 1.4472 1.8294 1.0934 .2593 1.7998 6.75 25.586 73.5284
    Se 1.9 .4477 1.1678 1.5843 2.8087 1.1956 .2405 1.5442 6.3231 19.461 52.0233
    Br 1.85 .4798 1.1948 1.8695 2.6953 .8203 .2504 1.5963 6.9653 19.8492 50.3233
    Sr 2.02 .6703 1.4926 3.3368 4.46 3.1501 .319 2.2287 10.3504 52.3291 151.2216
    Mo 1.75 .6773 1.4798 3.1788 3.0824 1.8384 .292 2.0606 8.1129 30.5336 100.0658
    Cd 1.58 .6364 1.4247 2.7802 2.5973 1.7886 .2407 1.6823 5.6588 20.7219 69.1109
    I 1.98 .7047 1.9484 2.594 4.1526 1.5057 .2455 1.8638 6.7639 21.8007 56.4395
    W 1.26 .9853 2.1167 3.357 3.7981 2.2798 .2569 1.6745 7.0098 26.9234 81.391
    Ir 1.22 1.0194 2.0645 3.4425 3.4914 1.6976 .2554 1.6475 6.5966 23.2269 70.0272
    Pt 1.72 .9148 1.8096 3.2134 3.2953 1.5754 .2263 1.3813 5.3243 17.5987 60.0171
    Au 1.66 .9674 1.8916 3.3993 3.0524 1.2607 .2358 1.4712 5.6758 18.7119 61.5286
    Hg 1.55 1.0033 1.9469 3.4396 3.1548 1.418 .2413 1.5298 5.8009 19.452 60.5753
"""
TABLE = {ATOMIC_NUMBER[s.upper()]: list(map(float, row)) for s, *row in map(str.split, ELEMENTS.strip().splitlines())}


class Model(NamedTuple):
    """N atoms: xyz (N, 3) Å as (x, y, z), float64; atomic_number (N,); b_iso (N,) Å²; occupancy (N,); residue (N,)
    numbers 0 .. R-1; labels, R strings "chain/number/name"."""
    xyz: Tensor
    atomic_number: Tensor
    b_iso: Tensor
    occupancy: Tensor
    residue: Tensor
    labels: list[str]


def read_model(path) -> Model:
    """The first model of a PDB or mmCIF file (.pdb, .ent, .cif, .mmcif, plain or .gz): all atoms, all alternatives.

    PDB is read here, mmCIF by gemmi. Raises OSError without the file; ValueError if it cannot be read, holds no atoms
    or no known element, and for mmCIF without gemmi.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        rows = list((_cif_atoms if {".cif", ".mmcif"} & set(path.suffixes) else _pdb_atoms)(path))
    except (ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no atoms; want a PDB or mmCIF file")
    keys, elements, xyz, occupancy, b_iso = zip(*rows)
    unknown = {e for e in elements if e.upper() not in ATOMIC_NUMBER}
    if unknown:
        raise ValueError(f"{path}: no such element as {', '.join(sorted(unknown))}; mend columns 77-78")
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    real = lambda x: torch.tensor(x, dtype=torch.float64)
    return Model(real(xyz), torch.tensor([ATOMIC_NUMBER[e.upper()] for e in elements]), real(b_iso), real(occupancy),
                 torch.tensor([number[key] for key in keys]), ["/".join(key) for key in number])


def _pdb_atoms(path: Path):
    """(residue, element, xyz, occupancy, B) of each atom, by the columns of the PDB format, version 3.3."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", errors="replace") as lines:
        for line in lines:
            if line.startswith("ENDMDL"):
                return
            if line.startswith(("ATOM  ", "HETATM")):
                name, element = line[12:16], line[76:78].strip()
                if not element:                         # older files; columns 13-14 tell, but for "HG11" and the like
                    element = "H" if name[0] == "H" and name[3] != " " else name[:2].strip(" 0123456789")
                yield ((line[21].strip(), line[22:27].strip(), line[17:20].strip()), element,
                       [float(line[i : i + 8]) for i in (30, 38, 46)],
                       float(line[54:60].strip() or 1), float(line[60:66].strip() or 0))


def _cif_atoms(path: Path):
    try:
        import gemmi
    except ImportError:
        raise ValueError("reading mmCIF needs gemmi; pip install gemmi, or give a PDB file") from None
    for site in gemmi.read_structure(str(path))[0].all():
        yield ((site.chain.name, str(site.residue.seqid), site.residue.name), site.atom.element.name,
               site.atom.pos.tolist(), site.atom.occ, site.atom.b_iso)


def _element(atomic_number: int) -> tuple[float, list[float], list[float]]:
    """Radius, a and b of ELEMENTS."""
    if atomic_number not in TABLE:
        raise ValueError(f"no scattering factors for {SYMBOLS.split()[atomic_number - 1]}; remove these atoms from the "
                         "model, or add a line to ELEMENTS in fsc.py")
    r, *ab = TABLE[atomic_number]
    return r, ab[:5], ab[5:]


def scattering_factor(atomic_number: int, s2: Tensor) -> Tensor:
    """(7) at squared frequencies s2 (1/Å²): the electron scattering factor in Å."""
    return sum(a * torch.exp(-b / 4 * s2) for a, b in zip(*_element(atomic_number)[1:]))


def structure_factors(shape, xyz: Tensor, atomic_number: Tensor, b_iso: Tensor, voxel_size, origin=0.0, *,
                      occupancy: Tensor | None = None, d_min: float = 0.0, wing_cutoff: float = 1e-3) -> Tensor:
    """(6) on the half transform of a box: complex64 (D, H, W//2 + 1), zero beyond 1 / d_min.

    xyz (N, 3) Å; atomic_number, b_iso (Å²), occupancy (N,); origin: where voxel (0, 0, 0) is, in Å. Periodic. The
    Nyquist planes of even sides, which cannot tell k from -k, stay zero. Ten Eyck 1977, Acta Cryst. A33:486: atoms
    blurred by an extra B against aliasing (Int. Tables B, 1.3.4.4.5) are sampled, transformed, and sharpened again.
    Departure 2: to equal Phenix, grid, extra B and the cut through an atom's tail (wing_cutoff of the mean peak) are
    cctbx's; they leave F wrong by up to 1 % of the largest, correlations by up to 0.0004 (FSC: 0.0003).
    """
    k = freq_grid(shape, half=True, device=xyz.device)
    s2 = sum((q / v) ** 2 for q, v in zip(k, triple(voxel_size)))         # 1 / d^2
    use = s2 * d_min**2 <= 1 + 1e-9
    for q, n in zip(k, shape):
        use = use & (2 * (q * n).round().abs() < n)
    d = float(s2[use].max().rsqrt())                    # the finest spacing wanted
    if not 0 < d < math.inf:
        raise ValueError(f"the box holds no frequency up to {d_min} Å; the resolution must be finer than its sides")
    step, accuracy = (d / 3, 2) if d < 5 else (2.0 if d < 10 else 3.0, 3)           # digits
    wing_cutoff *= 1 if d < 5 else 0.1
    side = [n * v for n, v in zip(shape, triple(voxel_size))]
    grid = [next(m for m in itertools.count(2 * int(length / (2 * step)) + 1) if 30**30 % m == 0) for length in side]
    sigma = d / (2 * step)                              # factors 2, 3, 5 only
    extra = accuracy * d**2 / (sigma * (sigma - 1)) - float(b_iso.min())

    # One term a exp(-b s^2 / 4) of (7) is height exp(-pi r^2 / width) in real space.
    a, b = torch.tensor([_element(z)[1:] for z in atomic_number.tolist()], dtype=torch.float64, device=xyz.device).unbind(1)
    width = (b + b_iso.double()[:, None] + extra) / (4 * torch.pi)
    height = a * width**-1.5 * (1 if occupancy is None else occupancy.double()[:, None])
    sampled = _sample_atoms(grid, xyz, height, width, wing_cutoff, [l / n for l, n in zip(side, grid)], origin)
    X = torch.fft.rfftn(sampled) * (math.prod(side) / math.prod(grid))
    z, y, x = ((q * n).round().long() for q, n in zip(k, shape))          # the same frequencies on that grid
    X = X[z % grid[0], y % grid[1], x.clamp(max=grid[2] // 2)]
    return torch.where(use, X * torch.exp(extra / 4 * s2).float(), 0)


def _sample_atoms(grid, xyz: Tensor, height: Tensor, width: Tensor, cutoff: float, step, origin) -> Tensor:
    """Sum over atoms of sum_i height_i exp(-pi r^2 / width_i), cut where it falls below `cutoff` of the mean peak."""
    low, high = torch.zeros_like(width[:, 0]), 3 * width.amax(1).sqrt()
    for _ in range(50):                                 # bisection for that radius
        r = (low + high) / 2
        peak = (height * torch.exp(-torch.pi * r[:, None] ** 2 / width)).sum(1) > cutoff * height.sum(1).mean()
        low, high = torch.where(peak, r, low), torch.where(peak, high, r)
    # cctbx cuts at the farthest grid line along an axis that still lies within the radius.
    h = torch.tensor(step, dtype=torch.float64, device=xyz.device)
    before = (xyz.double().flip(-1) - torch.tensor(triple(origin), dtype=torch.float64).to(h.device)).remainder(h)
    cut = torch.cat([low[:, None] - (low[:, None] - first).remainder(h) for first in (before, h - before)], 1).amax(1)
    density, reach = torch.zeros(math.prod(grid), device=xyz.device), float(low.max())
    chunk = max(1, int(2**21 / math.prod(2 * reach / v + 2 for v in step)))
    for i in torch.arange(len(xyz), device=xyz.device).split(chunk):
        index, r = voxels_near(grid, xyz[i], reach, step, origin)
        atom, near = (r <= cut[i, None] + 1e-9).nonzero(as_tuple=True)
        r2, height_i, rate = r[atom, near].square().float(), height[i].float(), (-torch.pi / width[i]).float()
        value = sum(height_i[atom, j] * torch.exp(rate[atom, j] * r2) for j in range(5))
        density.index_add_(0, index[atom, near], value)
    return density.view(grid)


def model_map(shape, xyz: Tensor, atomic_number: Tensor, b_iso: Tensor, resolution: float, voxel_size, origin=0.0, *,
              occupancy: Tensor | None = None) -> Tensor:
    """Electrostatic potential of a model, (6) up to 1 / resolution as in Phenix: float32 (D, H, W)."""
    X = structure_factors(shape, xyz, atomic_number, b_iso, voxel_size, origin, occupancy=occupancy, d_min=resolution)
    return torch.fft.irfftn(X, s=tuple(shape)) / math.prod(triple(voxel_size))


def voxels_near(shape, xyz: Tensor, reach: float, voxel_size, origin=0.0) -> tuple[Tensor, Tensor]:
    """Voxels about each atom, all within `reach` Å and more: flat index into a periodic box and distance, (N, K)."""
    v, o = (torch.tensor(triple(t), dtype=torch.float64, device=xyz.device) for t in (voxel_size, origin))
    at = (xyz.double().flip(-1) - o) / v
    sides = [torch.arange(-r, r + 1, device=xyz.device) for r in (reach / v + 0.5).long().tolist()]
    voxel = at.round().long()[:, None] + torch.cartesian_prod(*sides)
    z, y, x = (voxel % torch.tensor(shape, device=xyz.device)).unbind(-1)
    return (z * shape[1] + y) * shape[2] + x, ((voxel - at[:, None]) * v).norm(dim=-1)


def molecular_mask(shape, xyz: Tensor, atomic_number: Tensor, voxel_size, origin=0.0, *, probe: float = 1.1,
                   shrink: float = 0.9) -> Tensor:
    """Voxels inside a model, without its hydrogens: boolean (D, H, W). Jiang & Brünger 1994, J. Mol. Biol. 243:100.

    Solvent is where a sphere of `probe` Å finds room, grown by `shrink` Å (less than the probe).
    """
    inside = torch.zeros(math.prod(shape), dtype=torch.bool, device=xyz.device)
    for element in atomic_number[atomic_number > 1].unique().tolist():
        reach = _element(element)[0] + probe
        for part in xyz[atomic_number == element].split(2048):
            index, distance = voxels_near(shape, part, reach, voxel_size, origin)
            inside[index[distance < reach]] = True
    solvent = grown = ~inside.view(*shape)
    v = torch.tensor(triple(voxel_size))
    for offset in torch.cartesian_prod(*(torch.arange(-r, r + 1) for r in (shrink / v).long().tolist())):
        if (offset * v).norm() < shrink:
            grown = grown | solvent.roll(offset.tolist(), (0, 1, 2))
    return ~grown


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two arrays of one size."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def map_model_cc(density: Tensor, xyz: Tensor, atomic_number: Tensor, b_iso: Tensor, resolution: float, voxel_size,
                 origin=0.0, *, occupancy: Tensor | None = None) -> dict[str, float]:
    """Correlation of a map with a model's, as phenix.map_model_cc: cc_box, cc_mask, cc_volume, cc_peaks.

    density (D, H, W); xyz (N, 3) Å, atomic_number, b_iso, occupancy (N,); resolution in Å. Over all voxels, the n
    voxels inside the molecular mask, the n highest of the model's map, the n highest of either map.
    """
    calc = model_map(density.shape, xyz, atomic_number, b_iso, resolution, voxel_size, origin, occupancy=occupancy)
    inside = molecular_mask(density.shape, xyz, atomic_number, voxel_size, origin)
    n = int(inside.sum())
    if not 0 < n < inside.numel():
        raise ValueError(f"the model covers {n} of {inside.numel()} voxels; is it in the frame of the map?")
    high = lambda m: m >= m.flatten().kthvalue(m.numel() - n).values      # element n, from 0, of m sorted down
    over = {"cc_box": torch.ones_like(inside), "cc_mask": inside, "cc_volume": high(calc),
            "cc_peaks": high(calc) | high(density)}
    return {name: correlation(density[where], calc[where]) for name, where in over.items()}


def atom_radius(resolution: float, b_iso: float) -> float:
    """Radius in Å of the spheres of `cc_per_residue`, as Phenix chooses it: the resolution, or twice the inflection
    point of a carbon atom's image at that resolution and mean B-factor if that is larger; 3 to 10 Å."""
    s = torch.linspace(0, 1 / resolution, 2001, dtype=torch.float64)
    r = torch.arange(0, max(15.0, resolution), 0.1, dtype=torch.float64)
    f = scattering_factor(6, s**2) * torch.exp(-b_iso / 4 * s**2)
    image = torch.trapezoid(s**2 * f * torch.sinc(2 * r[:, None] * s), s)
    first = int((image.diff(n=2) > 0).nonzero()[0]) + 1           # where the curvature changes sign
    return max(3.0, min(10.0, max(resolution, float(r[first - 1] + r[first]))))


def cc_per_residue(density: Tensor, calc: Tensor, xyz: Tensor, residue: Tensor, reach: float, voxel_size,
                   origin=0.0) -> Tensor:
    """Correlation of two maps within `reach` Å of each residue's atoms; Phenix: `atom_radius`. residue (N,) -> (R,)."""
    size, keys = density.numel(), []
    for i in torch.arange(len(xyz), device=xyz.device).split(2048):
        index, distance = voxels_near(density.shape, xyz[i], reach, voxel_size, origin)
        keys.append((residue[i, None] * size + index)[distance <= reach].unique())
    keys = torch.cat(keys).unique()                     # every voxel once per residue
    of, voxel = keys // size, keys % size
    mean = lambda x: x.new_zeros(int(residue.max()) + 1).index_add_(0, of, x) / of.bincount()
    a, b = (m.flatten()[voxel].double() for m in (density, calc))
    a, b = a - mean(a)[of], b - mean(b)[of]
    return mean(a * b) / (mean(a * a) * mean(b * b)).sqrt()


# phenix.mtriage's map-model FSC, rule for rule: bins of at least 100, 250, 500 reflections, smoothing, a parabola
# through the crossing. Its numbers differ from `resolution(fsc(map, model_map))`, which is the plain reading.


def _mtriage_bins(d: Tensor) -> Tensor:
    """The bin of each reflection, 0 the coarsest; d in Å rises. 500 a bin, 250 from where d > 5 Å, 100 from d > 10 Å."""
    sizes, start = [], 0
    while start < len(d):
        least = 100 if d[start] > 10 else 250 if d[start] > 5 else 500
        end = start + least
        end += end < len(d) and bool(d[end - 1] - d[start] <= 0.005)
        sizes.append((end if len(d) - end >= least else len(d)) - start)
        start += sizes[-1]
    return torch.arange(len(sizes)).flip(0).repeat_interleave(torch.tensor(sizes)).to(d.device)


def _smooth(y: Tensor, half_window: int = 10) -> Tensor:
    """Savitzky-Golay filter of degree 2 with the ends mirrored. (n,), n > half_window -> (n,)."""
    k = torch.arange(-half_window, half_window + 1, dtype=y.dtype, device=y.device)
    kernel = torch.linalg.pinv(torch.stack([k**0, k, k**2], 1))[0]
    return F.conv1d(F.pad(y[None, None], (half_window, half_window), "reflect"), kernel[None, None])[0, 0]


def _crossing(d: Tensor, curve: Tensor, threshold: float) -> float:
    """d in Å where a parabola through 11 bins about the first one below the threshold meets it; nan if none is.

    Departure 3: cctbx stops its fit of the parabola early, up to 0.007 Å off on the maps we tried; ours is the best.
    """
    below = (curve < threshold).nonzero()
    if len(below) == 0:
        return math.nan
    i = int(below[0])
    at, near = float(d[i]), slice(max(0, i - 5), min(i + 6, len(curve) - 1))
    x = 1 / d[near]
    fit = torch.linalg.lstsq(torch.stack([x**0, x, x**2], 1), curve[near, None] - threshold)
    c, b, a = fit.solution[:, 0].tolist()
    square = b * b - 4 * a * c
    roots = [(-b + sign * square**0.5) / (2 * a) for sign in (1, -1)] if square >= 0 and a != 0 else []
    roots = [1 / root for root in roots if root > 0]
    best = min(roots, key=lambda root: abs(root - at), default=at)
    return best if len(roots) == 1 or abs(best - at) <= 0.25 else at


def _best_cut(obs: Tensor, model: Tensor, d: Tensor) -> float:
    """The trial resolution at which the model's map, cut there, correlates best with all of obs. d falls."""
    start = float(d[-1])
    end = next(e for limit, e in ((5, 10), (10, 20), (20, 40), (math.inf, 100)) if start < limit)
    trials = [i / 10 for i in [*range(int(start * 10), 30), *range(30, 61), *range(65, 105)]] + list(range(11, 100))
    trials = torch.tensor([t for t in trials if start <= t <= end], dtype=torch.float64, device=d.device)
    count = torch.searchsorted(-d, -trials)             # reflections with d > trial
    cross, power = (F.pad(_dot(x, model).cumsum(0), (1, 0))[count] for x in (obs, model))
    return float(trials[(cross / power.sqrt()).argmax()])


def map_model_resolution(density: Tensor, xyz: Tensor, atomic_number: Tensor, b_iso: Tensor, voxel_size, origin=0.0, *,
                         occupancy: Tensor | None = None) -> dict:
    """Resolution of a map from its model, as phenix.mtriage without masking (Afonine et al. 2018).

    d_fsc_model_05, _0143, _0: where the map-model FSC falls below 0.5, 0.143, 0 (nan: never). d_model: the cut-off at
    which the model's map, all B = b_iso_overall (fitted), correlates best with the map; d_model_b0: with B = 0.
    Å and Å². "curve": (bins, 2), 1/Å and FSC.
    """
    # Everything turns from (z, y, x) to (x, y, z): cctbx's reflections run over h, k, l >= 0, one of each pair of
    # mirror images, without Nyquist planes; that order and the last bit of its right angle decide which of equal d
    # comes first, and bins cut between them.
    density, xyz = density.permute(2, 1, 0), xyz.flip(-1)
    voxel_size, origin = triple(voxel_size)[::-1], triple(origin)[::-1]
    last = [(n - 1) // 2 for n in density.shape]
    sides = [torch.arange(first, m + 1, device=density.device) for first, m in zip((-last[0], -last[1], 0), last)]
    h, k, l = torch.cartesian_prod(*sides).T
    hkl = torch.stack([h, k, l])[:, (l > 0) | ((l == 0) & ((h > 0) | ((h == 0) & (k > 0))))]
    h, k, l = hkl.double()
    x, y, z = (1 / (n * v) for n, v in zip(density.shape, voxel_size))
    c = math.cos(math.radians(90.00000000000001))
    d = 1 / (h * h * (x * x) + k * k * (y * y) + l * l * (z * z)
             + 2 * h * k * (x * y * c) + 2 * h * l * (x * z * c) + 2 * k * l * (y * z * c)).sqrt()
    d, order = d.sort(stable=True)
    d, order, bins = (t.flip(0) for t in (d, order, _mtriage_bins(d)))    # from low resolution to high
    part = lambda X: X[tuple(hkl)][order].to(torch.complex128)
    calc = lambda b: part(structure_factors(density.shape, xyz, atomic_number, b, voxel_size, origin, occupancy=occupancy))
    obs, model, model_b0 = part(rfft3(density)), calc(b_iso), calc(torch.zeros_like(b_iso))

    n = int(bins[-1]) + 1
    mean_d = shell_sum(d, bins, n) / bins.bincount()
    low = int((mean_d > 15).sum())                      # not smoothed
    def curve(model):
        cc = _correlate(obs, model, bins, 1, n)
        return torch.cat([cc[:low], _smooth(cc[low:])]) if n - low > 10 else cc

    value = curve(model)
    thresholds = {"d_fsc_model_05": 0.5, "d_fsc_model_0143": 0.143, "d_fsc_model_0": 0.0}
    out = {name: _crossing(mean_d, value, t) for name, t in thresholds.items()}
    limit = out["d_fsc_model_0"] if out["d_fsc_model_0"] > 0 else _crossing(mean_d, curve(model_b0), 0.0)
    out["d_model_b0"] = _best_cut(obs, model_b0, d)
    use = ~(d < limit)                                  # all where the limit is nan
    obs, model_b0, d = obs[use], model_b0[use], d[use]
    cross, power = _dot(obs, model_b0), _dot(model_b0, model_b0)
    decay = lambda b: torch.exp(-b / 4 * d**-2)
    cc = lambda b: float((cross * decay(b)).sum() / (power * decay(b) ** 2).sum().sqrt())
    b = max(range(-500, 500, 5), key=cc)
    return out | {"d_model": _best_cut(obs, model_b0 * decay(b), d), "b_iso_overall": float(b),
                  "curve": torch.stack([1 / mean_d, value], 1)}


def _spiral(n: int) -> Tensor:
    """n points on the unit sphere along a spiral (Saff & Kuijlaars 1997): (n, 3)."""
    h = torch.linspace(-1, 1, n, dtype=torch.float64)
    flat = (1 - h**2).sqrt()
    theta = F.pad((3.6 / (n**0.5 * flat[1:-1])).cumsum(0), (1, 1))
    return torch.stack([flat * theta.cos(), flat * theta.sin(), h], -1)


def trilinear(density: Tensor, xyz: Tensor, voxel_size, origin=0.0) -> Tensor:
    """Values of density (D, H, W) at positions xyz (..., 3) in Å; zero outside. float64 (...)."""
    v, o = (torch.tensor(triple(t)[::-1], dtype=torch.float64, device=density.device) for t in (voxel_size, origin))
    grid = 2 * (xyz - o) / v / (torch.tensor(density.shape[::-1], device=density.device) - 1) - 1
    values = F.grid_sample(density.double()[None, None], grid.view(1, 1, 1, -1, 3), align_corners=True)
    return values.view(xyz.shape[:-1])


def q_score(density: Tensor, xyz: Tensor, voxel_size, origin=0.0, *, sigma: float = 0.6, chunk: int = 512) -> Tensor:
    """Q-score (8) of every atom, as MapQ computes it. density (D, H, W); xyz (N, 3) Å, no hydrogens. Returns (N,).

    Radii 0, 0.1 .. 2 Å. On each, 8, 10, 12 .. 106 points on a spiral are tried until at least 8 of them have no atom
    closer than 0.9 R, and these count; a shell that never has 8 is left out. The centre counts 8 times. (MapQ scales
    the reference to the map's range; a correlation does not notice.)
    """
    density, xyz, scores = density.double(), xyz.double(), []
    for atoms in xyz.split(chunk):
        distance = torch.cdist(atoms, xyz)
        k = int((distance < 1.9 * 2).sum(1).max())      # no farther atom comes within 0.9 R of a shell
        near = xyz[distance.topk(k, largest=False).indices] - atoms[:, None]          # (A, k, 3)
        near2 = near.square().sum(-1)
        value = trilinear(density, atoms, voxel_size, origin)
        one = torch.ones_like(value)
        sums = 8 * torch.stack([one, value, value**2, one, one, value], -1)           # n, v, v^2, g, g^2, v g
        for R in torch.arange(1, 21).mul(0.1).tolist():
            g = math.exp(-(R**2) / (2 * sigma**2))
            # |R u - d|^2 < (0.9 R)^2 is u . d > (0.19 R^2 + d^2) / (2 R).
            blocked_at = (0.19 * R * R + near2) / (2 * R)
            pending = torch.arange(len(atoms), device=xyz.device)
            for n in range(8, 108, 2):
                u = _spiral(n).to(xyz.device)
                free = (near[pending] @ u.T <= blocked_at[pending, :, None]).all(1)   # (pending, n)
                done = free.sum(1) >= 8
                i, w = pending[done], free[done].double()
                v = trilinear(density, atoms[i, None] + R * u, voxel_size, origin)
                count, total = w.sum(1), (w * v).sum(1)
                sums[i] += torch.stack([count, total, (w * v * v).sum(1), g * count, g * g * count, g * total], -1)
                pending = pending[~done]
                if len(pending) == 0:
                    break
        n, v, vv, r, rr, vr = sums.unbind(-1)
        scores.append((vr - v * r / n) / ((vv - v * v / n) * (rr - r * r / n)).sqrt())
    return torch.cat(scores)


# ---- 4. The program ----------------------------------------------------------------------------------------------------

USAGE = """
  fsc.py half_1.mrc half_2.mrc [--mask mask.mrc]     two half maps
  fsc.py map.mrc --truth truth.mrc                   a map and what it should be
  fsc.py map.mrc --model model.pdb [--resolution 3]  a map and an atomic model (.pdb, .cif)"""

# As RELION names and draws them.
STAR = {"corrected": "_rlnFourierShellCorrelationCorrected", "unmasked": "_rlnFourierShellCorrelationUnmaskedMaps",
        "masked": "_rlnFourierShellCorrelationMaskedMaps",
        "randomised": "_rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"}
COLOUR = {"corrected": "black", "unmasked": "green", "masked": "blue", "randomised": "red", "map_model": "black"}


def parse(argv=None) -> argparse.Namespace:
    cli = argparse.ArgumentParser(usage=USAGE, description="Prints a table; writes PREFIX.json, .csv and .png.")
    cli.add_argument("maps", nargs="+", metavar="MAP", help="one map, or two half maps")
    cli.add_argument("--truth", metavar="MAP", help="the map to compare with")
    cli.add_argument("--model", metavar="PDB", help="the atomic model to compare with")
    cli.add_argument("--mask", metavar="MAP", help="soft mask, 0 to 1; for half maps the FSC is corrected for it")
    cli.add_argument("--voxel-size", type=float, metavar="Å", help="instead of the headers'")
    cli.add_argument("--resolution", type=float, metavar="Å", help="of the map, for --model (default: its d_model)")
    cli.add_argument("--convention", choices=CONVENTIONS, default="ours", help="of shells and crossings")
    cli.add_argument("--directional", action="store_true", help="FSC in cones of 20 degrees, and the sphericity")
    cli.add_argument("--local-resolution", metavar="OUT", help="write the local resolution (Å, FSC 0.5) as a map")
    cli.add_argument("--sharpen", metavar="OUT", help="write the mean of the half maps, FSC-weighted and sharpened")
    cli.add_argument("--b-factor", type=float, metavar="Å²", help="for --sharpen, negative; default: fitted")
    cli.add_argument("--seed", type=int, default=0, help="of the random phases")
    cli.add_argument("-o", "--out", metavar="PREFIX", help="of the files written (default: MAP's name and _fsc)")
    cli.add_argument("--star", action="store_true", help="write RELION's postprocess table too")
    cli.add_argument("--overwrite", action="store_true", help="replace files that exist")
    cli.add_argument("--quiet", action="store_true", help="print nothing but errors")
    args = cli.parse_args(argv)
    halves, d = len(args.maps) == 2, args.resolution
    if halves + bool(args.truth) + bool(args.model) != 1 or len(args.maps) > 2:
        raise ValueError("give two half maps, or one map and --truth, or one map and --model")
    if not halves and (args.sharpen or args.local_resolution or args.star):
        raise ValueError("--sharpen, --local-resolution and --star want two half maps")
    if args.model and (args.mask or args.directional):
        raise ValueError("--mask and --directional want two maps")
    if d is not None and not (args.model and 0 < d < math.inf) or args.b_factor is not None and not args.sharpen:
        raise ValueError("--resolution (Å, positive) goes with --model, --b-factor with --sharpen")
    return args


def read_maps(args: argparse.Namespace) -> tuple[list, float | tuple[float, float, float]]:
    """All maps of the command line, which must share one grid, and their voxel size: one number where it is cubic."""
    from data import read_map
    paths = args.maps + [p for p in (args.truth, args.mask) if p]
    maps = [read_map(p, args.voxel_size) for p in paths]
    shape, voxel_size = maps[0].density.shape, maps[0].voxel_size
    for path, m in zip(paths, maps):
        if m.density.shape != shape or any(abs(v / w - 1) > 0.01 for v, w in zip(m.voxel_size, voxel_size)):
            raise ValueError(f"{path}: {tuple(m.density.shape)} voxels of {m.voxel_size} Å, but {paths[0]} has "
                             f"{tuple(shape)} of {voxel_size}; bring them onto one grid (or give --voxel-size)")
    return maps, voxel_size[0] if max(voxel_size) < 1.001 * min(voxel_size) else voxel_size


def compare(args: argparse.Namespace) -> tuple[dict, dict[str, Tensor], list[str], list[tuple]]:
    """Half maps, or a map and the truth: numbers, curves (the best first), notes; no residues."""
    from data import write_map
    maps, voxel_size = read_maps(args)
    a, b, *mask = (m.density for m in maps)
    if not args.truth and torch.equal(a, b):
        raise ValueError(f"{args.maps[0]} and {args.maps[1]} hold the same map; give two independent half maps")
    if (args.sharpen or args.local_resolution) and not isinstance(voxel_size, float):
        raise ValueError(f"{args.maps[0]}: voxels of {voxel_size} Å; --sharpen and --local-resolution want cubes")
    how = {"convention": args.convention, "voxel_size": voxel_size}
    box, voxel = shell_side(a.shape, voxel_size, args.convention)
    numbers, notes = {"box": box, "voxel_size": voxel}, []
    if mask:
        curves = masked_fsc(a, b, mask[0], seed=args.seed, **how)._asdict()
        start = curves.pop("randomised_from")
    else:
        curves = {"unmasked": fsc(a, b, **how)}
    if args.truth:                                      # not independent: the correction does not apply
        curves = {name: curves[name] for name in ("masked", "unmasked") if name in curves}
        numbers["correlation"] = correlation(a, b)
    elif mask:
        numbers["phases_randomised_from"] = box * voxel / start
        end = box * voxel / resolution(curves["corrected"], voxel, box=box, convention=args.convention)
        at_end = float(curves["randomised"][(torch.arange(box // 2 + 1) - end).abs().argmin()])
        if at_end > 0.1:
            notes.append(f"the mask alone correlates {at_end:.2f} at the resolution: use a softer or wider mask")
    if args.directional:
        side, size = shell_side(a.shape, voxel_size)
        each = directional_fsc(a, b, voxel_size=voxel_size)
        each[..., 1:5] = math.nan                       # fewer than 20 coefficients in a cone: chance
        each = resolution(each, size, box=side)
        numbers |= {"sphericity": sphericity(each), "best_direction": float(each.min()), "worst_direction": float(each.max())}
    if args.sharpen:
        mean, curve = (a + b) / 2, fsc(a, b) if args.convention == "cryofm" else next(iter(curves.values()))
        end = float(resolution(curve, voxel_size, box=min(a.shape), convention="relion"))
        factor = guinier_b_factor(mean, curve, voxel_size, end) if args.b_factor is None else args.b_factor
        numbers["b_factor"], sharp = factor, sharpen(mean, curve, voxel_size, factor, end)
        write_map(args.sharpen, replace(maps[0], density=sharp), args.overwrite)
    if args.local_resolution:
        local = local_resolution(a, b, voxel_size)
        numbers["local_resolution_median"] = float(local.median())
        write_map(args.local_resolution, replace(maps[0], density=local), args.overwrite)
    return numbers, curves, notes, []


def compare_model(args: argparse.Namespace) -> tuple[dict, dict[str, Tensor], list[str], list[tuple]]:
    """A map and an atomic model: numbers, curve, notes, and a row (label, atoms, CC, Q-score) per residue."""
    (m,), voxel_size = read_maps(args)
    density, model, notes = m.density, read_model(args.model), []
    first = torch.tensor(m.corner, dtype=torch.float64)
    at = (model.xyz.flip(1) - first) / torch.tensor(m.voxel_size, dtype=torch.float64)
    inside = ((at >= 0) & (at <= torch.tensor(density.shape) - 1)).all(1)
    if not inside.any():
        raise ValueError(f"{args.model}: no atom lies in {args.maps[0]}; bring the model into the frame of the map")
    if not inside.all():
        notes.append(f"{int((~inside).sum())} of {len(inside)} atoms lie outside the map and are left out")
    xyz, atomic_number, b_iso, occupancy, residue = (x[inside] for x in model[:5])
    grid = {"voxel_size": voxel_size, "origin": first.tolist()}
    atoms = {"xyz": xyz, "atomic_number": atomic_number, "b_iso": b_iso, "occupancy": occupancy, **grid}
    box, voxel = shell_side(density.shape, voxel_size, args.convention)
    numbers = {"box": box, "voxel_size": voxel, "atoms": len(xyz)} | map_model_resolution(density, **atoms)
    d, _ = args.resolution or numbers["d_model"], numbers.pop("curve")
    if args.resolution is None:
        notes.append(f"no --resolution given: correlations at {d:g} Å, the map's d_model")
    numbers |= {"resolution": d} | map_model_cc(density, resolution=d, **atoms)

    present, residue = residue.unique(return_inverse=True)
    calc = model_map(density.shape, resolution=d, **atoms)
    cc = cc_per_residue(density, calc, xyz, residue, atom_radius(d, float(b_iso.mean())), **grid)
    q, heavy = torch.full_like(b_iso, math.nan), atomic_number > 1
    q[heavy] = q_score(density, xyz[heavy], **grid)
    numbers |= {"cc_per_residue_mean": float(cc.nanmean()), "q_score_mean": float(q.nanmean())}
    rows = [(model.labels[i], int((residue == j).sum()), float(cc[j]), float(q[residue == j].nanmean()))
            for j, i in enumerate(present.tolist())]

    # The plain reading of the map-model FSC: the model's map to Nyquist, our shells, no smoothing.
    full = torch.fft.irfftn(structure_factors(density.shape, **atoms), s=density.shape)
    return numbers, {"map_model": fsc(density, full, convention=args.convention, voxel_size=voxel_size)}, notes, rows


def table(numbers: dict) -> str:
    unit = lambda name: ("" if name.startswith(("box", "atoms", "correlation", "sphericity", "cc_", "q_"))
                         else " Å²" if name.startswith("b_") else " Å")
    lines = [f"{'':14}{'FSC 0.143':>12}{'FSC 0.5':>12}{'FSC_AUC':>10}"]
    lines += [f"{name:14}{v['resolution_0143']:10.2f} Å{v['resolution_05']:10.2f} Å{v['auc']:10.4f}"
              for name, v in numbers.items() if isinstance(v, dict)]
    return "\n".join(lines + [f"{name:24}{v:12.5g}{unit(name)}" for name, v in numbers.items() if not isinstance(v, dict)])


def star(s: list[float], curves: dict[str, Tensor], numbers: dict) -> str:
    """RELION's postprocess.star: data_general and data_fsc. Without a mask the corrected curve is the unmasked one."""
    curves = {"corrected": curves["unmasked"]} | curves
    best = numbers.get("corrected", numbers["unmasked"])["resolution_0143"]
    names = ["_rlnSpectralIndex", "_rlnResolution", "_rlnAngstromResolution", *(STAR[name] for name in curves)]
    lines = ["data_general", "", f"_rlnFinalResolution {best:.6f}", "", "data_fsc", "", "loop_"]
    lines += [f"{name} #{i}" for i, name in enumerate(names, 1)]
    for k, values in enumerate(zip(s, (1 / f if f else 999.0 for f in s), *(c.tolist() for c in curves.values()))):
        lines.append(f"{k:6d} " + " ".join(f"{v:12.6f}" for v in values))
    return "\n".join(lines) + "\n"


def picture(s: list[float], curves: dict[str, Tensor], numbers: dict, threshold: float) -> bytes:
    """PNG of the curves over 1/Å, with Å above and lines at 0.143 and 0.5; the legend gives Å at the threshold."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        label = {"randomised": "phase-randomised"}.get(name, name.replace("_", "-"))
        if name in numbers:
            label += f", {numbers[name][f'resolution_{threshold:g}'.replace('.', '')]:.2f} Å"
        ax.plot(s, curve, color=COLOUR[name], lw=2 if COLOUR[name] == "black" else 1, label=label)
    for t in (0.143, 0.5):
        ax.axhline(t, color="0.5", lw=0.8, ls="--")
        ax.annotate(f"{t:g}", (s[-1], t), xytext=(-2, 2), textcoords="offset points", ha="right", color="0.4")
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    low = min(float(curve[1:].nan_to_num(0).min()) for curve in curves.values())
    ax.set(xlim=(0, s[-1]), ylim=(min(-0.1, low - 0.05), 1.02), xlabel="spatial frequency (1/Å)",
           ylabel="Fourier shell correlation")
    ax.legend(frameon=False, title=f"resolution at FSC = {threshold:g}")
    ticks = [t for t in ax.get_xticks() if 0 < t <= s[-1]]
    top = ax.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{1 / t:.3g}" for t in ticks])
    top.set_xlabel("resolution (Å)")
    figure.savefig(file := io.BytesIO(), dpi=150, format="png")
    return file.getvalue()


def run(args: argparse.Namespace) -> None:
    from data import SUFFIXES
    name = args.maps[0]
    for end in (".gz", ".bz2", *SUFFIXES):
        name = name.removesuffix(end)
    ends = (".json", ".csv", ".png") + (".star",) * args.star + ("_residues.csv",) * bool(args.model)
    paths = {end: Path(f"{args.out or f'{name}_fsc'}{end}") for end in ends}
    for path in (written := [*paths.values(), *(Path(p) for p in (args.sharpen, args.local_resolution) if p)]):
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path} exists; choose another name (-o) or give --overwrite")
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent}: no such folder; make it first")

    numbers, curves, notes, residues = compare_model(args) if args.model else compare(args)
    box, voxel_size, scores = numbers["box"], numbers["voxel_size"], {}
    threshold = 0.143 if len(args.maps) == 2 else 0.5
    for name in (name for name in curves if name != "randomised"):
        at = {t: float(resolution(curves[name], voxel_size, t, box=box, convention=args.convention)) for t in (0.143, 0.5)}
        scores[name] = {"resolution_0143": at[0.143], "resolution_05": at[0.5], "auc": float(auc(curves[name]))}
        if not (curves[name][1:] < threshold).any():
            notes.append(f"{name}: never below {threshold:g}; {at[threshold]:.2f} Å is the grid's limit, not the map's")
    numbers, s = scores | numbers, [k / (box * voxel_size) for k in range(box // 2 + 1)]

    line = lambda values: ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values) + "\n"
    shell_rows = zip(range(len(s)), s, (1 / f if f else math.inf for f in s), *(c.tolist() for c in curves.values()))
    files = {".csv": line(["shell", "per_angstrom", "angstrom", *curves]) + "".join(map(line, shell_rows)),
             "_residues.csv": line(["residue", "atoms", "cc", "q_score"]) + "".join(map(line, residues))}
    if args.star:
        files[".star"] = star(s, curves, numbers)
    try:
        files[".png"] = picture(s, curves, numbers, threshold)
    except ImportError:
        written.remove(paths.pop(".png"))
        notes.append("no picture: pip install matplotlib")
    everything = {"command": sys.argv, "torch": torch.__version__, "settings": vars(args), "notes": notes} | numbers
    everything = json.loads(json.dumps(everything), parse_constant=lambda _: None)          # JSON knows no nan
    files[".json"] = json.dumps(everything, indent=1) + "\n"
    for end, path in paths.items():                     # each appears whole or not at all
        content, temporary = files[end], path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content if end == ".png" else content.encode())
        os.replace(temporary, path)
    if not args.quiet:
        given = [f"--{k} {vars(args)[k]}" for k in ("truth", "model", "mask", "convention") if vars(args)[k]]
        print(*args.maps, *given)
        print(table(numbers), *("note: " + n for n in notes), f"wrote {' '.join(map(str, written))}", sep="\n")


def main(argv=None) -> None:
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"fsc.py: {error}")


if __name__ == "__main__":
    main()
