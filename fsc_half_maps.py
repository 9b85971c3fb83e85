"""What two half maps say about the quality of a map.

(Equations and departures of the file that this one came from; keep what belongs here.)
Fourier shell correlation, and every other number that says how good a map is.

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
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

import mrc
from fourier import freq_grid, rfft3, triple
from fsc import correlate_shells, fsc, half_weight, radius, resolution, shell_side, shell_sum, shells


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
        curves.append(correlate_shells(*(x[cone] for x in terms), n))
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


def read_fsc(path: str, m: mrc.Map) -> Tensor:
    """FSC of half maps in shells 1 .. W//2 of a map's noise power, inside of 0..1: of a .csv of fsc.py the curve without a mask, at
    each shell's middle; or one number per line from shell 1 on."""
    n = m.density.shape[-1] // 2
    try:
        lines = [line.split(",") for line in Path(path).read_text().splitlines() if line.strip()]
        if table := lines[0][0] == "shell":
            column = lines[0].index("unmasked") if "unmasked" in lines[0] else 3
            s, curve = np.array([(float(line[1]), float(line[column])) for line in lines[1:]]).T
            curve = np.interp((np.arange(n) + 0.5) / (2 * n * m.voxel_size[2]), s, curve)
        else:
            curve = np.array([float(line) for line, in lines])
    except (ValueError, IndexError):
        raise ValueError(f"{path}: neither a .csv of fsc.py nor one FSC value per line") from None
    if len(curve) != n or not np.isfinite(curve).all():
        raise ValueError(f"{path}: {len(curve)} shells; a box of {m.density.shape[-1]} needs shells 1 to {n}")
    return torch.from_numpy(curve).clamp(1e-6, 1 - 1e-6)
