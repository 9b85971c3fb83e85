"""The map-model FSC and the resolutions of phenix.mtriage, without masking.

    FSC(bin) = Re sum F_obs conj(F_model) / sqrt(sum |F_obs|^2 sum |F_model|^2)               (1)
    d_model = the resolution d at which F_model(s <= 1/d), blurred by one B-factor, correlates
              best with all of F_obs                                                          (2)

Source: Afonine et al. 2018, Acta Cryst. D74:814. Bins, smoothing and trial resolutions are those
of cctbx, so that the numbers equal Phenix's. `fsc.fsc` on the model's map is the plain FSC.

Departure 1: cctbx stops fitting the parabola of `_crossing` early, up to 0.007 Å off on the maps
that we tried. We take the best parabola.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fourier import rfft3, triple
from fsc import correlate_shells, real_dot, shell_sum
from fsc_model import structure_factors


def map_model_resolution(
    density: Tensor,
    xyz: Tensor,
    atomic_number: Tensor,
    b_iso: Tensor,
    voxel_size,
    origin=0.0,
    *,
    occupancy: Tensor | None = None,
) -> dict:
    """Resolution of a map from its model, in Å, as phenix.mtriage says it.

    d_fsc_model_05, _0143, _0: where the FSC (1) falls below 0.5, 0.143, 0 (nan: never).
    d_model: (2) with all B = b_iso_overall (fitted, Å²); d_model_b0: with B = 0.
    "curve": (bins, 2), 1/Å and FSC. density (D, H, W); xyz (N, 3) Å; atomic_number, b_iso (Å²) and
    occupancy (N,); voxel_size, origin in Å.
    """
    # Turn everything from (z, y, x) to (x, y, z), the order of cctbx's reflections.
    density = density.permute(2, 1, 0)
    xyz = xyz.flip(-1)
    voxel_size = triple(voxel_size)[::-1]
    origin = triple(origin)[::-1]
    hkl, d = _reflections(density.shape, voxel_size, density.device)
    bins = _bins(d.flip(0)).flip(0)

    # Structure factors of the map and of the model, with its B-factors and without.
    def calculate(b_factor: Tensor) -> Tensor:
        atoms = (xyz, atomic_number, b_factor, voxel_size, origin)
        return structure_factors(density.shape, *atoms, occupancy=occupancy)[hkl].cdouble()

    observed = rfft3(density)[hkl].cdouble()
    model = calculate(b_iso)
    model_b0 = calculate(torch.zeros_like(b_iso))

    # The FSC, and where it falls below the thresholds.                                         (1)
    mean_d = shell_sum(d, bins, int(bins[-1]) + 1) / bins.bincount()
    curve = _curve(observed, model, bins, mean_d)
    numbers = {
        "d_fsc_model_05": _crossing(mean_d, curve, 0.5),
        "d_fsc_model_0143": _crossing(mean_d, curve, 0.143),
        "d_fsc_model_0": _crossing(mean_d, curve, 0.0),
        "d_model_b0": _best_cut(observed, model_b0, d),
        "curve": torch.stack([1 / mean_d, curve], 1),
    }

    # The overall B-factor, from the reflections up to where the FSC falls below 0.
    limit = numbers["d_fsc_model_0"]
    if not limit > 0:
        limit = _crossing(mean_d, _curve(observed, model_b0, bins, mean_d), 0.0)
    used = ~(d < limit)  # all where the limit is nan
    observed = observed[used]
    model_b0 = model_b0[used]
    d = d[used]
    b_factor = _overall_b_factor(observed, model_b0, d)
    blurred = model_b0 * torch.exp(-b_factor / 4 * d**-2)
    return numbers | {
        "d_model": _best_cut(observed, blurred, d),  # (2)
        "b_iso_overall": float(b_factor),
    }


def _reflections(shape, voxel_size, device) -> tuple[tuple[Tensor, ...], Tensor]:
    """cctbx's reflections from low resolution to high: indices (h, k, l) and d in Å, (M,) each.

    One of each pair of mirror images, without Nyquist planes.
    """
    # All h, k and l >= 0; of l = 0 the half with h > 0; of h = l = 0 the half with k > 0.
    h_max, k_max, l_max = ((n - 1) // 2 for n in shape)
    h = torch.arange(-h_max, h_max + 1, device=device)
    k = torch.arange(-k_max, k_max + 1, device=device)
    l = torch.arange(l_max + 1, device=device)
    hkl = torch.cartesian_prod(h, k, l).T
    h, k, l = hkl
    first_on_line = (h == 0) & (k > 0)
    first_in_plane = (l == 0) & ((h > 0) | first_on_line)
    hkl = hkl[:, (l > 0) | first_in_plane]

    # The order of the reflections and the last bit of cctbx's right angle decide which of equal d
    # comes first, and bins end between them.
    h, k, l = hkl.double()

    # 1/d^2 by the formula for cells of any angles.
    x, y, z = (1 / (n * v) for n, v in zip(shape, voxel_size))
    cosine = math.cos(math.radians(90.00000000000001))
    hh = h * h * (x * x)
    kk = k * k * (y * y)
    ll = l * l * (z * z)
    hk = 2 * h * k * (x * y * cosine)
    hl = 2 * h * l * (x * z * cosine)
    kl = 2 * k * l * (y * z * cosine)
    d = 1 / (hh + kk + ll + hk + hl + kl).sqrt()

    # Sort by d, as cctbx does, and turn the order around.
    d, order = d.sort(stable=True)
    return tuple(hkl[:, order.flip(0)]), d.flip(0)


def _bins(d: Tensor) -> Tensor:
    """The bin of each reflection, 0 the coarsest; d in Å rises: (M,) -> (M,).

    A bin holds 500 reflections, 250 from where d > 5 Å, 100 from where d > 10 Å.
    """
    sizes = []
    start = 0
    while start < len(d):
        least = 500
        if d[start] > 5:
            least = 250
        if d[start] > 10:
            least = 100

        # Do not part reflections of almost equal d.
        end = start + least
        if end < len(d) and d[end - 1] - d[start] <= 0.005:
            end += 1
        # Do not leave too few for another bin.
        if len(d) - end < least:
            end = len(d)
        sizes.append(end - start)
        start = end
    bins = torch.arange(len(sizes)).flip(0)
    bins = bins.repeat_interleave(torch.tensor(sizes))
    return bins.to(d.device)


def _curve(observed: Tensor, model: Tensor, bins: Tensor, mean_d: Tensor) -> Tensor:
    """FSC (1) in each bin, smoothed from 15 Å on: (bins,)."""
    # Bins coarser than 15 Å stay as they are.
    curve = correlate_shells(observed, model, bins, 1, len(mean_d))
    rough = int((mean_d > 15).sum())
    if len(curve) - rough <= 10:
        return curve
    return torch.cat([curve[:rough], _smooth(curve[rough:])])


def _smooth(y: Tensor, half_window: int = 10) -> Tensor:
    """Savitzky-Golay filter of degree 2 with the ends mirrored. (n,), n > half_window -> (n,)."""
    # The filter is the value at 0 of a parabola fitted to the window.
    k = torch.arange(-half_window, half_window + 1, dtype=y.dtype, device=y.device)
    powers = torch.stack([k**0, k, k**2], 1)
    kernel = torch.linalg.pinv(powers)[0]
    padded = F.pad(y[None, None], (half_window, half_window), "reflect")
    return F.conv1d(padded, kernel[None, None])[0, 0]


def _crossing(d: Tensor, curve: Tensor, threshold: float) -> float:
    """d in Å where a curve falls below the threshold; nan if it never does.

    A parabola through 11 bins around the first bin below the threshold is followed there.
    """
    below = (curve < threshold).nonzero()
    if len(below) == 0:
        return math.nan
    i = int(below[0])
    first = float(d[i])

    # Departure 1: the best parabola a x^2 + b x + c in x = 1/d.
    near = slice(max(0, i - 5), min(i + 6, len(curve) - 1))
    x = 1 / d[near]
    powers = torch.stack([x**0, x, x**2], 1)
    fit = torch.linalg.lstsq(powers, curve[near, None] - threshold)
    c, b, a = fit.solution[:, 0].tolist()

    # Where it meets the threshold.
    square = b * b - 4 * a * c
    roots = []
    if square >= 0 and a != 0:
        roots = [(-b + sign * square**0.5) / (2 * a) for sign in (1, -1)]
    crossings = [1 / root for root in roots if root > 0]

    # Take the crossing nearest to the first bin below the threshold, or that bin if none is near.
    if len(crossings) == 1:
        return crossings[0]
    best = min(crossings, key=lambda crossing: abs(crossing - first), default=first)
    return best if abs(best - first) <= 0.25 else first


# Finest resolution of the data, coarsest trial resolution; both in Å.
COARSEST_TRIAL = ((5, 10), (10, 20), (20, 40), (math.inf, 100))


def _best_cut(observed: Tensor, model: Tensor, d: Tensor) -> float:
    """(2): the trial resolution in Å at which the model, cut there, correlates best; d falls."""
    finest = float(d[-1])
    coarsest = next(coarse for fine, coarse in COARSEST_TRIAL if finest < fine)

    # Steps of 0.1 Å up to 6 and from 6.5 to 10.4, then of 1 Å.
    tenths = [*range(int(finest * 10), 61), *range(65, 105)]
    trials = [i / 10 for i in tenths] + list(range(11, 100))
    trials = [trial for trial in trials if finest <= trial <= coarsest]
    trials = torch.tensor(trials, dtype=torch.float64, device=d.device)

    # Sums over all reflections with d > trial. The power of `observed` is the same for all trials.
    count = torch.searchsorted(-d, -trials)
    cross = F.pad(real_dot(observed, model).cumsum(0), (1, 0))[count]
    power = F.pad(real_dot(model, model).cumsum(0), (1, 0))[count]
    best = (cross / power.sqrt()).argmax()
    return float(trials[best])


def _overall_b_factor(observed: Tensor, model: Tensor, d: Tensor) -> int:
    """The B-factor in Å², of -500, -495 .. 495, that makes the model most like the map."""
    cross = real_dot(observed, model)
    power = real_dot(model, model)

    def correlation(b_factor: int) -> float:
        decay = torch.exp(-b_factor / 4 * d**-2)
        return float((cross * decay).sum() / (power * decay**2).sum().sqrt())

    return max(range(-500, 500, 5), key=correlation)
