"""Fourier shell correlation (FSC): how far two maps agree at each resolution.

    FSC(k) = Re sum_k A conj(B) / sqrt(sum_k |A|^2 sum_k |B|^2)      sums over shell k      (1)
    FSC_AUC = mean of FSC(k) over the shells 1 .. box//2                                    (2)
    resolution = 1 / (the spatial frequency where the FSC first falls below a threshold)    (3)

A and B are the Fourier coefficients of the two maps. Shell k holds the frequencies that round to
k / box cycles per voxel, where box is the shortest side. Each coefficient of the full transform
counts once. Radii are physical, so a shell is a sphere in 1/Å for voxels of any shape. A filter
that multiplies each shell of A by one number cannot change (1), so no B-factor and no Wiener filter
changes an FSC. Voxel sizes are in Å, one number or (z, y, x).

(1): Harauz & van Heel 1986, Optik 73:146. (2), and (3) at 0.5: CryoFM (arXiv:2410.08631), appendix
C.1. The threshold 0.143: Rosenthal & Henderson 2003, J. Mol. Biol. 333:721.
Departure 1: CryoFM's release bins by ceil(radius) and leaves out the zero frequency. We round. The
binning alone moves FSC_AUC by up to 0.05, so `fsc` and the functions that call it take
convention="ours", "relion" or "cryofm".
"""

import itertools
import math

import torch
from torch import Tensor

from fourier import mirror, rfft3, stored_half, triple, wavenumber

# How each convention rounds a radius to a shell (`shells`).              Departure 1
CONVENTIONS = {"ours": "nearest", "relion": "nearest", "cryofm": "up"}


# Shells


def shell_side(shape, voxel_size=1.0, convention: str = "ours") -> tuple[int, float]:
    """(voxels, voxel size in Å) of the side that makes the shells: the shortest one.

    Its voxels are called box below. The shells are 0 .. box//2, and shell k is at
    k / (box * voxel size) in 1/Å. With convention "cryofm" it is always the x axis.
    """
    sides = list(zip(shape, triple(voxel_size)))
    if convention == "cryofm":
        return sides[2]
    return min(sides, key=lambda side: side[0] * side[1])


def radius(shape, voxel_size=1.0, *, half: bool = False, device=None) -> Tensor:
    """|k| in shells, not rounded: float64 (D, H, W), or (D, H, W//2 + 1) with `half`."""
    box, voxel = shell_side(shape, voxel_size)
    # Relative voxel sizes are exactly 1 for cubes. Ties between two shells then stay exact.
    relative = [v / voxel for v in triple(voxel_size)]
    return wavenumber(shape, relative, half=half, device=device).mul_(box)


def shells(
    shape, voxel_size=1.0, *, half: bool = False, rounding: str = "nearest", device=None
) -> Tensor:
    """The shell of every Fourier coefficient: int64 (D, H, W), or (D, H, W//2 + 1) with `half`.

    rounding "nearest" gives round(radius). CryoFM's release has two more, both in shells of the x
    axis (W): shell k of "up" (its FSC) holds (k - 1) / W < |k| <= k / W, and shell k of "down" (its
    noise power) holds k / W <= |k| < (k + 1) / W, |k| in cycles per voxel of the x axis.
    """
    if rounding == "nearest":
        return radius(shape, voxel_size, half=half, device=device).add_(0.5).long()

    # The release knows cubes only, whose relative voxel sizes are exactly 1.
    W = shape[-1]
    voxel = triple(voxel_size)
    relative = [v / voxel[2] for v in voxel]
    frequency = wavenumber(shape, relative, half=half, device=device)
    if rounding == "down":
        return (W * frequency + 1e-9).long()  # 1e-9: a whole radius stays in its own shell

    # "up": edges and |k| differ in the last bit. We compute both as the release does, so that ties
    # fall as they do there.
    last = W // 2
    nyquist = last / W
    edges = torch.arange(last + 1, dtype=torch.float64, device=device) * (nyquist / last)
    return torch.searchsorted(edges, frequency)


def shell_sum(x: Tensor, shell: Tensor, n: int) -> Tensor:
    """Sums of x (..., *shell.shape) over the shells 0 .. n-1: float64 (..., n).

    shell: int64, 0 .. n. What lies in shell n is left out, so clamp(max=n) drops the corners.
    """
    # One flat axis of coefficients, and one more shell for what is left out.
    x = x.flatten(-shell.ndim).to(torch.float64)
    total = x.new_zeros(*x.shape[:-1], n + 1)
    total.index_add_(-1, shell.flatten(), x)
    return total[..., :n]


def half_weight(
    shape, region: Tensor | None = None, *, convention: str = "ours", device=None
) -> Tensor:
    """How often each coefficient that `rfft3` stores counts in a sum: float32, to be broadcast.

    Twice if a coefficient stands for its mirror image, too, otherwise once. Convention "relion"
    counts every stored coefficient once.
    region: (D, H, W), the coefficients to count. Raises ValueError if it has another shape.
    """
    W = shape[-1]
    # Planes along x: 0 and W/2 hold their own mirror images, those between stand for two planes.
    weight = torch.ones(1, 1, W // 2 + 1, device=device)
    if convention != "relion":
        weight[..., 1 : (W + 1) // 2] = 2
    if region is None:
        return weight

    if region.shape != shape:
        raise ValueError(
            f"region has shape {tuple(region.shape)}; want {tuple(shape)}, the map's, in fftfreq "
            "layout"
        )
    region = region.to(device, torch.float32)
    if convention != "relion":
        # A stored coefficient stands for k and -k: take the mean of the region at both.
        region = (region + mirror(region)) / 2
    return weight * stored_half(region)


# Curves


def real_dot(A: Tensor, B: Tensor) -> Tensor:
    """Re A conj(B)."""
    return (A.real * B.real).addcmul_(A.imag, B.imag)


def correlate_shells(A: Tensor, B: Tensor, shell: Tensor, weight, n: int) -> Tensor:
    """(1) of Fourier coefficients A and B over the shells 0 .. n-1: float64 (..., n).

    A, B: (..., *shell.shape). weight: how often each coefficient counts, as `half_weight` gives it.
    """
    # Numerator and denominator of (1), shell by shell.
    cross = shell_sum(real_dot(A, B).mul_(weight), shell, n)
    power_a = shell_sum(real_dot(A, A).mul_(weight), shell, n)
    power_b = shell_sum(real_dot(B, B).mul_(weight), shell, n)
    return cross / (power_a * power_b).sqrt()  # (1)


def fsc(
    a: Tensor,
    b: Tensor,
    region: Tensor | None = None,
    *,
    convention: str = "ours",
    voxel_size=1.0,
) -> Tensor:
    """Fourier shell correlation (1): float64 (..., box//2 + 1) in [-1, 1].

    a, b: (..., D, H, W) real-space maps (or arrays) on one grid, any units. region: boolean
    (D, H, W) in `fftfreq` layout, the coefficients to count: ~wedge_mask(...) scores the missing
    wedge alone. voxel_size only matters where it differs between the axes. A shell without a
    coefficient or without power is nan, and so is shell 0 with convention "cryofm".
    Raises ValueError if the shapes differ or the convention is unknown.
    """
    a = torch.as_tensor(a)
    b = torch.as_tensor(b)
    if a.shape != b.shape or a.ndim < 3:
        raise ValueError(
            f"fsc: maps of shapes {tuple(a.shape)} and {tuple(b.shape)}; want two maps on one grid"
        )
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; want one of {', '.join(CONVENTIONS)}")

    # The shells, and how often each stored coefficient counts.
    shape = a.shape[-3:]
    box, _ = shell_side(shape, voxel_size, convention)
    n = box // 2 + 1
    rounding = CONVENTIONS[convention]
    shell = shells(shape, voxel_size, half=True, rounding=rounding, device=a.device)
    weight = half_weight(shape, region, convention=convention, device=a.device)

    curve = correlate_shells(rfft3(a), rfft3(b), shell.clamp_(max=n), weight, n)
    if convention == "cryofm":
        curve[..., 0] = math.nan
    return curve


def auc(curve: Tensor) -> Tensor:
    """FSC_AUC (2), a plain mean without the shells that are nan. (..., n) -> (...)."""
    return torch.as_tensor(curve)[..., 1:].nanmean(-1)


def resolution(
    curve: Tensor,
    voxel_size: float,
    threshold: float = 0.143,
    *,
    box: int | None = None,
    convention: str = "ours",
) -> Tensor:
    """Resolution (3) in Å of an FSC: (..., n) -> (...). Use float() for one curve.

    We interpolate linearly in frequency between the first shell below the threshold and the shell
    before it. Convention "relion" takes the shell before it. A curve that never falls gives the
    last shell (Nyquist), a curve of nan gives nan. voxel_size and box belong to the side that makes
    the shells (`shell_side`). box defaults to 2 (n - 1), so an odd one must be given. Where the
    first shell is below, the resolution is beyond the box; print it by `resolution_words`.
    """
    curve = torch.as_tensor(curve)
    if curve.ndim > 1:
        each = [resolution(c, voxel_size, threshold, box=box, convention=convention) for c in curve]
        return torch.stack(each)

    # The zero frequency only compares the maps' means, so it counts as 1.
    known = [(0, 1.0)]
    for shell, value in enumerate(curve.tolist()):
        if shell > 0 and not math.isnan(value):
            known.append((shell, value))

    # Find the first shell below the threshold. Without one, the last shell counts.
    crossing = known[-1][0] if len(known) > 1 else math.nan
    for (before, value), (shell, next_value) in itertools.pairwise(known):
        if next_value < threshold:
            part = (value - threshold) / (value - next_value)
            crossing = before if convention == "relion" else before + part * (shell - before)
            break

    # From shells to Å.
    if box is None:
        box = 2 * (len(curve) - 1)
    side = box * voxel_size
    return curve.new_tensor(side / crossing if crossing else math.inf)


def resolution_words(resolution: float, side: float) -> str:
    """A resolution in Å as it is printed. side: of the box in Å.

    (3) lies beyond the box where already the first shell is below the threshold. All that is known
    then is that no shell reaches it.
    """
    return f"> {side:.2f} Å" if resolution > side else f"{resolution:.2f} Å"


if __name__ == "__main__":
    from fsc_score import main

    main()
