"""Agreement of a map with an atomic model.

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
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from atoms import ATOMIC_NUMBER, SYMBOLS
from fourier import freq_grid, rfft3, triple
from fsc import correlate_shells, real_dot, shell_sum

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
    cross, power = (F.pad(real_dot(x, model).cumsum(0), (1, 0))[count] for x in (obs, model))
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
        cc = correlate_shells(obs, model, bins, 1, n)
        return torch.cat([cc[:low], _smooth(cc[low:])]) if n - low > 10 else cc

    value = curve(model)
    thresholds = {"d_fsc_model_05": 0.5, "d_fsc_model_0143": 0.143, "d_fsc_model_0": 0.0}
    out = {name: _crossing(mean_d, value, t) for name, t in thresholds.items()}
    limit = out["d_fsc_model_0"] if out["d_fsc_model_0"] > 0 else _crossing(mean_d, curve(model_b0), 0.0)
    out["d_model_b0"] = _best_cut(obs, model_b0, d)
    use = ~(d < limit)                                  # all where the limit is nan
    obs, model_b0, d = obs[use], model_b0[use], d[use]
    cross, power = real_dot(obs, model_b0), real_dot(model_b0, model_b0)
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
