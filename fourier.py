"""Fourier grids, operators that are diagonal in Fourier space, and resampling.

(Equations and departures of the file that this one came from; keep what belongs here.)
What the microscope does to a density map: blur, missing wedge, spectral noise, projection at any orientation.

    rho(r) = sum_a Z_a (2 pi s_a^2)^-3/2 exp(-|r - r_a|^2 / 2 s_a^2)                         (1)
             s_a^2 = (resolution / (pi sqrt 2))^2 + B_a / (8 pi^2)
    wedge: measured where  min <= atan2(sign(kx) kz, |kx|) <= max,  and on the tilt axis     (2)
    cone:  measured where  |kz| <= sqrt(kx^2 + ky^2) tan(angle)                              (3)
    A x = F^-1[w F x],  w real, w(-k) = w(k):  A = A^T, and A A = A where w is a mask        (4)
    y = V + noise,  E|F noise|^2 = P(|k|),  P = P_y / (1 + SNR),  SNR = FSC / (1 - FSC)      (5)
    P(k) = alpha(k) P(|k|) / mean of alpha over the shell                                    (6)
    image(x, y) = integral dz V(R (x, y, z)^T)                                               (7)
    (F image)(kx, ky) = (F V)(R (kx, ky, 0)^T),  R = Rz(rot) Ry(tilt) Rz(psi)                (8)
    deposited = lowpass(e^(B |k|^2 / 4) (rho + solvent + n)),  E|F n|^2 = alpha(k) S(1/R) (R |k|)^-u     (9)

(1): ChimeraX `molmap`, with B-factors. (2): Dynamo, IMOD, IsoNet2, RELION 5. (3): CryoLVM, the
formula as printed. (4): CryoFM (arXiv:2410.08631) appendix E.1, Algorithm 2's A. (5): CryoFM eq. 3
and appendix D.1. (6): CryoFM 5.2 and D.2. (7): CryoFM 5.4 and E.2. (8): the central
slice theorem (DeRosier & Klug 1968); RELION's Euler angles. (9): ours, what CryoLVM learns from where no
pairs of a deposited map and its model are given; S is the power of rho per shell, R the resolution.
F is the unnormalised FFT in `fftfreq` layout (zero frequency first), float32 or wider; powers are
|F|^2. Volumes are (D, H, W) = (z, y, x); triples of a grid (shape, voxel_size, origin) are in that
order too, positions of atoms and directions are x, y, z.

Departure 1: (3) is a missing cone (91 % measured at 60 degrees); the CryoLVM paper calls it a wedge.
Departure 2: an even box has no +Nyquist plane, so (2) with an asymmetric range is not mirror
symmetric there; operators use the part that is (`hermitian_part`), or A A = A would not hold.
Departure 3: eq. 3 adds real numbers to a complex transform, which leaves no real map; noise is added
to the real Hartley transform, as in the release, and E|F noise|^2 is P all the same.
Departure 4: 5.2 prints alpha times the noise, D.2 alpha times its power; we follow D.2 and the release.
"""
import math
from collections.abc import Iterable

import torch
import torch.utils.checkpoint
from torch import Tensor

XYZ = (-3, -2, -1)                                              # the spatial axes of (..., D, H, W)


def triple(value) -> tuple[float, float, float]:
    """One number for all three axes, or three (z, y, x)."""
    return tuple(torch.as_tensor(value, dtype=torch.float64).expand(3).tolist())


def freq_grid(shape, *, half: bool = False, dtype=torch.float64, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """The Fourier grid of a box (D, H, W): kz, ky, kx in cycles per voxel, in `fftfreq` layout.

    Shapes (D, 1, 1), (1, H, 1), (1, 1, W), to be broadcast: |k| is (kz**2 + ky**2 + kx**2).sqrt(). With `half`, kx is
    the axis of rfftn, (1, 1, W//2 + 1). float64, so that ties between shells and edges of a wedge fall as in numpy.
    """
    D, H, W = shape
    kz, ky = (torch.fft.fftfreq(n, dtype=dtype, device=device) for n in (D, H))
    kx = (torch.fft.rfftfreq if half else torch.fft.fftfreq)(W, dtype=dtype, device=device)
    return kz[:, None, None], ky[None, :, None], kx[None, None, :]


def wavenumber(shape, voxel_size=1.0, *, half: bool = False, device=None) -> Tensor:
    """|k| of every coefficient of a box (D, H, W): float64 (D, H, W), or (D, H, W//2 + 1) with `half`.

    In cycles per voxel, or in 1/Å where voxel_size (one number or z, y, x) is in Å.
    """
    axes = zip(freq_grid(shape, half=half, device=device), triple(voxel_size))
    z, y, x = ((k / v) ** 2 for k, v in axes)
    return (z + y + x).sqrt()


def rfft3(x: Tensor) -> Tensor:
    return torch.fft.rfftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(-3, -2, -1))


def mirror(weights: Tensor) -> Tensor:
    """w(k) -> w(-k) on a grid in `fftfreq` layout, (..., D, H, W)."""
    return weights.flip(XYZ).roll((1, 1, 1), XYZ)


def hermitian_part(mask: Tensor) -> Tensor:
    """The coefficients of a boolean mask (..., D, H, W) whose mirror image -k is in it too (Departure 2)."""
    return mask & mirror(mask)


def apply_fourier(x: Tensor, weights: Tensor) -> Tensor:
    """F^-1[weights F x], (4). x: (..., D, H, W) real; weights: (D, H, W) or as x, in `fftfreq` layout.

    weights are a boolean mask, of which the Hermitian part is used, or real with w(-k) = w(k).
    Runs in float32 (float64 for float64 x), whatever autocast says. Raises ValueError if the boxes differ.
    """
    shape = x.shape[-3:]
    if weights.shape[-3:] != shape:
        raise ValueError(f"weights for a box {tuple(weights.shape[-3:])}, but the map is {tuple(shape)}")
    if weights.dtype == torch.bool:
        weights = hermitian_part(weights)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    half = weights[..., :shape[-1] // 2 + 1].to(x.dtype)
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=XYZ) * half, s=shape, dim=XYZ)


def put_back(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """(3) on maps x (..., D, H, W), y (D, H, W); weights (D, H, W) in `fftfreq` layout, even in k. Float32, outside autocast."""
    X, Y = torch.fft.rfftn(x, dim=XYZ), torch.fft.rfftn(y)
    return torch.fft.irfftn(X + weights[..., :x.shape[-1] // 2 + 1] * (Y - X), s=y.shape, dim=XYZ)


def lowpass(density: Tensor, resolution: float, voxel_size, *, edge: float = 2.0) -> Tensor:
    """Low-pass filter: 1 below 1/resolution, 0 above, a raised cosine `edge` shells wide between.

    density: (..., D, H, W); resolution in Å; voxel_size in Å, one number or (z, y, x). A shell is
    1 / (longest side of the box in Å) wide; edge = 0 cuts sharply and keeps 1/resolution itself.
    RELION's filter (`lowPassFilterMap`, edge 2), but the cutoff is not rounded to a whole shell.
    Raises ValueError unless resolution and voxel_size are positive and edge is not negative.
    """
    voxel = triple(voxel_size)
    if not (resolution > 0 and min(voxel) > 0 and edge >= 0):
        raise ValueError(f"lowpass: resolution {resolution} Å and voxel size {voxel} Å must be positive, "
                         f"edge {edge} at least 0")
    shape = density.shape[-3:]
    kz, ky, kx = (k / v for k, v in zip(freq_grid(shape, device=density.device), voxel))
    s = (kz ** 2 + ky ** 2 + kx ** 2).sqrt()                            # 1/Å
    shell = 1 / max(n * v for n, v in zip(shape, voxel))
    beyond = (s - 1 / resolution) / shell                               # in shells
    ramp = (beyond / edge + 0.5).clamp(0, 1) if edge else (beyond > 1e-9).double()
    return apply_fourier(density, 0.5 + 0.5 * torch.cos(math.pi * ramp))


def hartley(x: Tensor) -> Tensor:
    """Hartley transform Re F - Im F, (..., D, H, W) -> the same: real, and its own inverse times D H W."""
    X = torch.fft.fftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=XYZ)
    return X.real - X.imag


def resample(x: Tensor, shape: Iterable[int]) -> Tensor:
    """Band-limited interpolation (3) of x (..., D, H, W) to (..., *shape), axis after axis.

    Exact for functions below both Nyquist frequencies; to a finer grid and back returns x. Voxel 0,
    the mean and the amplitudes stay. float32 or wider.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    steps = zip((-3, -2, -1), x.shape[-3:], shape, strict=True)
    for dim, old, new in sorted(steps, key=lambda step: step[2] / step[1]):   # shrink first: leaner
        if old == new:
            continue
        short = min(old, new)
        f = torch.fft.rfft(x, dim=dim, norm="forward").narrow(dim, 0, short // 2 + 1)
        if short % 2 == 0:
            # The short grid's Nyquist coefficient is k = +n/2 and -n/2 in one, apart in the long one.
            f.narrow(dim, short // 2, 1).mul_(2 if new < old else 0.5)
        x = torch.fft.irfft(f, n=new, dim=dim, norm="forward")                # (3), pads with zeros
    return x


def below_nyquist(shape, old_shape) -> Tensor:
    """Coefficients of the grid `shape` that the grid `old_shape` over the same box also had: boolean, `fftfreq` layout."""
    kept = [(torch.fft.fftfreq(n) * n).abs() < m / 2 if m < n else torch.ones(n, dtype=torch.bool)
            for n, m in zip(shape, old_shape)]
    return kept[0][:, None, None] & kept[1][:, None] & kept[2]
