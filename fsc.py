"""Fourier shell correlation.

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
from torch import Tensor

from fourier import freq_grid, rfft3, triple

CONVENTIONS = ("ours", "relion", "cryofm")


def shell_side(shape, voxel_size=1.0, convention: str = "ours") -> tuple[int, float]:
    """(box, voxel size in Å) of the side that makes the shells 0 .. box//2: k is k / (box * voxel size) in 1/Å.

    The shortest side; "cryofm": the x axis.
    """
    sides = list(zip(shape[-3:], triple(voxel_size)))
    return sides[2] if convention == "cryofm" else min(sides, key=lambda side: side[0] * side[1])


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
    curve = correlate_shells(rfft3(a), rfft3(b), shell.clamp_(max=n), weight, n)
    if convention == "cryofm":
        curve[..., 0] = math.nan
    return curve


def correlate_shells(A: Tensor, B: Tensor, shell: Tensor, weight, n: int) -> Tensor:
    cross, power_a, power_b = (shell_sum(real_dot(X, Y).mul_(weight), shell, n) for X, Y in ((A, B), (A, A), (B, B)))
    return cross / (power_a * power_b).sqrt()           # (1)


def real_dot(A: Tensor, B: Tensor) -> Tensor:
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


if __name__ == "__main__":
    from fsc_score import main

    main()
