"""Fourier grids, operators that are diagonal in Fourier space, and resampling.

    A x = F^-1[w F x],  w real,  w(-k) = w(k)                                 (1)
    put_back(x, y) = x + F^-1[w F(y - x)]                                     (2)
    x(r) = 1/N sum_k (F x)(k) exp(2 pi i k r),  |k| below both Nyquist limits (3)

(1) is its own transpose, A = A^T. It is a projection, A A = A, where w is a mask. This is the
operator of CryoFM (arXiv:2410.08631), appendix E.1 and Algorithm 2. (2) replaces coefficients of x
by those of y, each by the share w (Algorithm 2, line 3, for a mask w). (3) resamples a map.

F is the unnormalised FFT, zero frequency first (the layout of `fftfreq`), in float32 or wider.
Volumes are (..., D, H, W) = (z, y, x), of N = D H W voxels. Triples that belong to a grid (shape,
voxel_size) have the same order. Frequencies are in cycles per voxel unless 1/Å is stated.

Departure 1: an even box has -Nyquist but no +Nyquist plane, so a mask need not have a mirror image
there. Operators use the part of a mask that has one (`hermitian_part`), or A A = A would not hold.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

XYZ = (-3, -2, -1)  # the spatial axes (z, y, x) of (..., D, H, W)


# Grids


def triple(value) -> tuple[float, float, float]:
    """One number for all three axes, or three (z, y, x): returns three."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return tuple(value.expand(3).tolist())


def freq_grid(shape, voxel_size=1.0, *, half: bool = False, device=None) -> list[Tensor]:
    """The Fourier grid kz, ky, kx of a box (D, H, W): shapes (D, 1, 1), (1, H, 1), (1, 1, W).

    The unit is cycles per voxel, or 1/Å with voxel_size in Å (one number or z, y, x). With `half`,
    kx is the axis of rfftn, (1, 1, W//2 + 1). All are float64, so that ties between shells and
    edges of a wedge fall as they do in numpy.
    """
    # Frequencies along each axis, shaped to be broadcast.
    D, H, W = shape
    options = {"dtype": torch.float64, "device": device}
    last_axis = torch.fft.rfftfreq if half else torch.fft.fftfreq
    kz = torch.fft.fftfreq(D, **options).view(-1, 1, 1)
    ky = torch.fft.fftfreq(H, **options).view(1, -1, 1)
    kx = last_axis(W, **options).view(1, 1, -1)
    return [k / voxel for k, voxel in zip((kz, ky, kx), triple(voxel_size))]


def wavenumber(shape, voxel_size=1.0, *, half: bool = False, device=None) -> Tensor:
    """|k| of every coefficient: float64 (D, H, W), or (D, H, W//2 + 1) with `half`.

    Units and arguments are those of `freq_grid`.
    """
    kz, ky, kx = freq_grid(shape, voxel_size, half=half, device=device)
    return (kz**2 + ky**2 + kx**2).sqrt_()


def below_nyquist(shape, old_shape) -> Tensor:
    """Which coefficients of a grid (D, H, W) another grid over the same box has, too: boolean.

    shape: the grid whose coefficients are asked for; old_shape: the other grid.
    """
    kept = torch.tensor(True)
    for k, new, old in zip(freq_grid(shape), shape, old_shape):
        # Whole numbers compare exactly. Without round, k = 5 of 25 counts as less than 10 / 2.
        cycles = (k * new).round().abs()
        kept = kept & ((2 * cycles < old) | (old >= new))
    return kept


# Transforms


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fft3(x: Tensor) -> Tensor:
    """F x over the last three axes."""
    return torch.fft.fftn(at_least_float32(x), dim=XYZ)


def rfft3(x: Tensor) -> Tensor:
    """The half of F x that is stored for a real map: (..., D, H, W) -> (..., D, H, W//2 + 1)."""
    return torch.fft.rfftn(at_least_float32(x), dim=XYZ)


def stored_half(weights: Tensor) -> Tensor:
    """Weights on the full grid (..., D, H, W) -> on the half that `rfft3` stores."""
    return weights[..., : weights.shape[-1] // 2 + 1]


def irfft3(X: Tensor, shape) -> Tensor:
    """The real maps of a box `shape` (D, H, W) from the half spectrum of `rfft3`."""
    return torch.fft.irfftn(X, s=shape, dim=XYZ)


def hartley(x: Tensor) -> Tensor:
    """Hartley transform Re F - Im F of (..., D, H, W): real. Applied twice it gives D H W x."""
    X = fft3(x)
    return X.real - X.imag


# Operators


def mirror(weights: Tensor) -> Tensor:
    """w(k) -> w(-k) on a full grid (..., D, H, W)."""
    return weights.flip(XYZ).roll((1, 1, 1), XYZ)


def hermitian_part(mask: Tensor) -> Tensor:
    """The coefficients k of a boolean mask (..., D, H, W) for which -k is in it too."""
    return mask & mirror(mask)  # Departure 1


def weigh_(X: Tensor, weights: Tensor) -> Tensor:
    """Multiply what `rfft3` stores by real weights, in place; returns X.

    weights: on the full grid, or on the stored half. That half of a spectrum stands for all of it,
    because x and A x are real.
    """
    if weights.shape[-1] != X.shape[-1]:
        weights = stored_half(weights)
    # As pairs of real numbers, because torch would copy the weights to complex numbers first.
    torch.view_as_real(X).mul_(weights[..., None])
    return X


def apply_fourier(x: Tensor, weights: Tensor) -> Tensor:
    """A x, (1), for real maps x (..., D, H, W), in float32 or wider whatever autocast says.

    weights: a boolean mask, of which the Hermitian part is used, or real and even in k; (D, H, W)
    or x's shape. Raises ValueError if the boxes differ.
    """
    shape = x.shape[-3:]
    box = weights.shape[-3:]
    if box != shape:
        raise ValueError(
            f"weights for a box {tuple(box)}, but the map is {tuple(shape)}; give both one shape"
        )
    if weights.dtype == torch.bool:
        weights = hermitian_part(weights)
    return irfft3(weigh_(rfft3(x), weights), shape)  # (1)


def put_back(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """(2): x with y's coefficients, each by the share `weights`.

    x: (..., D, H, W); y: (D, H, W). weights: (D, H, W), even in k (of a mask: `hermitian_part`), or
    its `stored_half`.
    """
    # One transform each way, because F is linear.
    change = irfft3(weigh_(rfft3(y - x), weights), y.shape)
    return change.add_(x)  # (2)


def raised_cosine(distance: Tensor) -> Tensor:
    """A soft edge: 1 where distance <= 0, falling to 0 at distance 1 and beyond."""
    return 0.5 + 0.5 * torch.cos(math.pi * distance.clamp(0, 1))


def lowpass(density: Tensor, resolution: float, voxel_size, *, edge: float = 2.0) -> Tensor:
    """Low-pass filter: 1 below 1/resolution, 0 above, a raised cosine `edge` shells wide between.

    density: (..., D, H, W). resolution: in Å. voxel_size: in Å, one number or (z, y, x). A shell is
    1 / (longest side of the box in Å) wide. This is RELION's filter (`lowPassFilterMap`, edge 2),
    but we do not round the cutoff to a shell.
    Raises ValueError unless resolution, voxel_size and edge are positive.
    """
    voxel = triple(voxel_size)
    if not min(resolution, edge, *voxel) > 0:
        raise ValueError(
            f"lowpass: resolution {resolution} Å, voxel size {voxel} Å and edge {edge} shells must "
            "be positive"
        )
    # Frequencies beyond the cutoff, counted in shells.
    shape = density.shape[-3:]
    longest_side = max(n * v for n, v in zip(shape, voxel))
    shell = 1 / longest_side  # 1/Å
    frequency = wavenumber(shape, voxel, device=density.device)
    beyond = (frequency - 1 / resolution) / shell
    return apply_fourier(density, raised_cosine(beyond / edge + 0.5))


# Resampling


def resample(x: Tensor, shape: Iterable[int]) -> Tensor:
    """Band-limited interpolation (3) of x (..., D, H, W) to (..., *shape), in float32 or wider.

    Exact for functions below both Nyquist frequencies: to a finer grid and back returns x. Voxel 0
    stays in place, and so do the mean and the amplitudes.
    """
    x = at_least_float32(x)
    steps = list(zip(XYZ, x.shape[-3:], shape, strict=True))
    # Shrink first, because the other axes then have less to transform.
    steps.sort(key=lambda step: step[2] / step[1])
    for dim, old, new in steps:
        if old == new:
            continue
        # Keep the frequencies that both grids have. irfft pads with zeros.
        short = min(old, new)
        X = torch.fft.rfft(x, dim=dim, norm="forward").narrow(dim, 0, short // 2 + 1)
        if short % 2 == 0:
            # k = +n/2 and -n/2 are one coefficient of the short grid and two of the long one.
            nyquist = X.narrow(dim, short // 2, 1)
            nyquist.mul_(2 if new < old else 0.5)
        x = torch.fft.irfft(X, n=new, dim=dim, norm="forward")  # (3)
    return x
