"""What the microscope does to a density map: missing wedge, spectral noise, projection.

    wedge: measured where  min <= atan2(sign(kx) kz, |kx|) <= max,  and on the tilt axis     (1)
    cone:  measured where  |kz| <= sqrt(kx^2 + ky^2) tan(angle)                              (2)
    y = V + noise,  E|F noise|^2 = P(|k|),  P = P_y / (1 + SNR),  SNR = FSC / (1 - FSC)      (3)
    P(k) = alpha(k) P(|k|) / mean of alpha over the shell                                    (4)
    image(x, y) = integral dz V(R (x, y, z)^T),  R = Rz(rot) Ry(tilt) Rz(psi)                (5)

(1): Dynamo, IMOD, IsoNet2, RELION 5. (2): CryoLVM, the formula as printed. (3): CryoFM
(arXiv:2410.08631), eq. 3 and appendix D.1. (4): CryoFM 5.2 and D.2. (5): CryoFM 5.4 and E.2, with
RELION's Euler angles.
F is the unnormalised FFT, zero frequency first (`fftfreq` layout), in float32 or wider. Powers are
|F|^2. Volumes are (D, H, W) = (z, y, x). Directions and shifts are x, y, z. Power shells are those
of CryoFM's release: shell k holds k / W <= |k| < (k + 1) / W, k = 0 .. W//2 - 1, with |k| in
cycles per voxel of the x axis. voxel_size (one number or z, y, x) matters where voxels are no
cubes. A shell is then a sphere in 1/Å, and two grids over one box have the same shells.

Departure 1: (2) is a missing cone (91 % measured at 60 degrees). CryoLVM's text calls it a wedge.
Departure 2: eq. 3 adds real numbers to a complex transform, which leaves no real map. We add noise
to the real Hartley transform, as the release does. E|F noise|^2 is P all the same.
Departure 3: CryoFM 5.2 prints alpha times the noise, D.2 alpha times its power. We follow D.2 and
the release.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fourier import XYZ, fft3, freq_grid, hartley, mirror, triple
from fsc import fsc, shell_sum, shells

# What a tilt series measures


def wedge_mask(
    shape, tilt_range=(-60, 60), tilt_axis: str = "y", *, voxel_size=1.0, device=None
) -> Tensor:
    """Where a tilt series measures (1): boolean (D, H, W) in `fftfreq` layout, True = measured.

    tilt_range: smallest and largest tilt in degrees. A specimen turned right-handedly by a about
    the tilt axis and projected along the beam measures one plane. Axis "y", beam z: kz = kx tan a.
    Axis "x", beam z: kz = -ky tan a. Axis "z", beam x: kx = ky tan a (the CryoFM release's choice).
    voxel_size: one number or (z, y, x). Angles are physical, so it matters where voxels are no
    cubes. Raises ValueError for another axis, or unless -90 < min < max < 90.
    """
    low, high = tilt_range
    if not -90 < low < high < 90:
        raise ValueError(
            f"tilt range {low} {high}: give smallest and largest tilt, inside (-90, 90) degrees"
        )
    if tilt_axis not in ("x", "y", "z"):
        raise ValueError(f"tilt axis {tilt_axis!r}: give x, y or z")
    kz, ky, kx = freq_grid(shape, voxel_size, device=device)
    along_beam, across = {"y": (kz, kx), "x": (kz, -ky), "z": (kx, ky)}[tilt_axis]

    # The tilt angle that measures each coefficient. k and -k have the same one.
    along_beam = torch.where(across < 0, -along_beam, along_beam)
    angle = torch.rad2deg(torch.atan2(along_beam, across.abs()))
    # 1e-9 degrees: a coefficient exactly at the last tilt counts, however atan2 rounds.
    in_range = (angle >= low - 1e-9) & (angle <= high + 1e-9)
    on_tilt_axis = (along_beam == 0) & (across == 0)
    measured = in_range | on_tilt_axis  # (1)
    return measured.expand(tuple(shape)).clone()


def cone_mask(shape, angle: float = 60, *, device=None) -> Tensor:
    """CryoLVM's region (2), a missing cone about kz: boolean (D, H, W) in `fftfreq` layout.

    angle: in degrees. True = measured. Raises ValueError unless 0 < angle < 90.
    """
    if not 0 < angle < 90:
        raise ValueError(f"cone angle {angle}: give one inside (0, 90) degrees")
    kz, ky, kx = freq_grid(shape, device=device)
    across = (kx**2 + ky**2).sqrt()
    return kz.abs() <= across * math.tan(math.radians(angle))  # (2), Departure 1


# Power per shell


def noise_shells(shape, device=None, voxel_size=1.0) -> Tensor:
    """The power shell of every coefficient: int64 (D, H, W). Beyond Nyquist it is W//2 or more."""
    return shells(shape, voxel_size, rounding="down", device=device)


@functools.lru_cache(1)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training
def kept_shells(shape, device, voxel_size) -> Tensor:
    """`noise_shells` in int16, because they are kept: half maps need the same ones many times."""
    return noise_shells(shape, device, voxel_size).short()


def shell_mean(values: Tensor, voxel_size=1.0) -> Tensor:
    """Mean over each power shell: (..., D, H, W) in `fftfreq` layout -> (..., W//2), float64."""
    n = values.shape[-1] // 2
    shell = kept_shells(values.shape[-3:], values.device, triple(voxel_size)).int().clamp_(max=n)
    count = shell.flatten().bincount(minlength=n)[:n]
    return shell_sum(values, shell, n) / count


def radial_power(x: Tensor, voxel_size=1.0) -> Tensor:
    """Mean |F x|^2 of each shell: (..., D, H, W) -> (..., W//2), float64."""
    return shell_mean(fft3(x).abs() ** 2, voxel_size)


def expand_shells(power: Tensor, shape, voxel_size=1.0) -> Tensor:
    """Power per shell (..., n) on the grid (..., D, H, W). Corners have the last shell's value.

    The power may belong to another grid over the same box, with more or fewer shells.
    """
    last = power.shape[-1] - 1
    shell = kept_shells(tuple(shape), power.device, triple(voxel_size)).int().clamp_(max=last)
    return power.index_select(-1, shell.flatten()).unflatten(-1, shell.shape)


# Noise


def noise_power(half_1: Tensor, half_2: Tensor, voxel_size=1.0) -> Tensor:
    """Noise power of half_1 per shell from two half maps (3): (..., W//2), float64.

    half_1, half_2: (..., D, H, W). Raises ValueError if they differ in shape or are the same map.
    """
    if half_1.shape == half_2.shape and torch.equal(half_1, half_2):
        raise ValueError("noise_power: both half maps are the same map; give two independent ones")
    curve = fsc(half_1, half_2, convention="cryofm", voxel_size=voxel_size)
    return noise_power_from_fsc(half_1, curve[..., 1:], voxel_size=voxel_size)


def noise_power_from_fsc(
    x: Tensor, curve: Tensor, *, clean: bool = False, voxel_size=1.0
) -> Tensor:
    """Noise power per shell (3) from an FSC between half maps: (..., W//2), float64.

    x: (..., D, H, W), the noisy map. With `clean` it is the map before the noise that is to be
    added, and P = P_x / SNR. curve: (..., W//2), shells 1 .. W//2. A shell with FSC <= 0 counts as
    1e-9, as in the release. Raises ValueError if the curve has another number of shells.
    """
    box = x.shape[-1]
    if curve.shape[-1] != box // 2:
        raise ValueError(
            f"the FSC has {curve.shape[-1]} shells; a box of {box} needs shells 1 .. {box // 2}"
        )
    curve = curve.double().clamp(1e-9, 1)
    power = radial_power(x, voxel_size) * (1 - curve)  # (3): 1 / (1 + SNR) = 1 - FSC
    return power / curve if clean else power


def anisotropic_noise_power(power: Tensor, alpha: Tensor, voxel_size=1.0) -> Tensor:
    """Direction-dependent noise power (4) that keeps every shell's mean: float64 (..., D, H, W).

    power: (..., n) per shell, of this grid or of another one over the same box. alpha: (D, H, W),
    the relative noise power (Departure 3) in `fftfreq` layout, even in k. CryoFM 5.2 takes
    `1 + 49 * ~fourier.hermitian_part(wedge_mask(shape))`. `orientation_alpha` computes it from
    particle orientations.
    """
    # A map's grid and the prior's differ in the number of shells, so each is expanded by itself.
    power = expand_shells(power, alpha.shape, voxel_size)
    mean = expand_shells(shell_mean(alpha, voxel_size), alpha.shape, voxel_size)
    return alpha * (power / mean)  # (4)


def orientation_alpha(
    rotations: Tensor,
    shape,
    *,
    tilt_range=None,
    tilt_axis: str = "y",
    half_width: float = 5.0,
    limit: float = 50.0,
    voxel_size=1.0,
) -> Tensor:
    """Relative noise power by direction from particle orientations (CryoFM D.2): float64 (D, H, W).

    rotations: (P, 3, 3) as in (5). A particle seen along d measures the central slice k . d = 0,
    here every k within half_width degrees of it. alpha is 1 / (share of the particles that measure
    k, relative to the mean over directions). It is `limit` at most, where hardly any particle does.
    tilt_range, tilt_axis: of subtomograms, which a tilt series sees along many directions.
    Raises ValueError unless rotations are (P, 3, 3), P > 0.
    """
    if rotations.shape[1:] != (3, 3) or len(rotations) == 0:
        raise ValueError(
            f"orientation_alpha: rotations {tuple(rotations.shape)}; give (P, 3, 3), P > 0"
        )
    # All directions from which all particles are seen, in the volume's frame.
    views = torch.tensor([[0.0, 0, 1]]) if tilt_range is None else beams(tilt_range, tilt_axis)
    beam = (rotations.double() @ views.to(rotations.device).double().T).mT.reshape(-1, 3)

    # Cells of 2 degrees on the hemisphere z >= 0, because -k is measured with k.
    cells = torch.arange(180, dtype=beam.dtype, device=beam.device)
    centres = (cells + 0.5) * math.pi / 90
    theta, phi = torch.meshgrid(centres[:45], centres, indexing="ij")
    sin = theta.sin()
    k = torch.stack([sin * phi.cos(), sin * phi.sin(), theta.cos()], -1)  # (45, 180, 3)

    # Count the particles that measure each cell, and take the mean over the hemisphere.
    band = math.sin(math.radians(half_width))
    seen = torch.zeros_like(theta)
    for part in beam.split(512):
        seen += ((k @ part.T).abs() <= band).sum(-1)
    mean = (seen * sin).sum() / sin.sum()

    # Find the cell of each coefficient. Those with z < 0 take the cell of -k.
    kz, ky, kx = freq_grid(shape, voxel_size, device=beam.device)
    flip = torch.where(kz < 0, -1.0, 1.0)
    theta = torch.atan2((kx**2 + ky**2).sqrt(), kz.abs())
    phi = torch.atan2(flip * ky, flip * kx) % (2 * math.pi)
    row = (theta * 90 / math.pi).long().clamp(max=44)
    column = (phi * 90 / math.pi).long().clamp(max=179)
    alpha = mean / seen[row, column].clamp(min=mean / limit)

    # On kz = 0 the cells of k and -k differ, but noise is even in k. Take the mean of both.
    return (alpha + mirror(alpha)) / 2


def beams(tilt_range, tilt_axis: str = "y") -> Tensor:
    """Directions along which a tilt series sees its specimen, every 5 degrees: (T, 3), x, y, z.

    Each is normal to the plane that `wedge_mask` calls measured at that tilt.
    """
    low, high = tilt_range
    tilts = torch.linspace(low, high, math.ceil((high - low) / 5) + 1, dtype=torch.float64)
    sin, cos = torch.deg2rad(tilts).sin(), torch.deg2rad(tilts).cos()
    zero = torch.zeros_like(sin)
    directions = {"y": (-sin, zero, cos), "x": (zero, sin, cos), "z": (cos, -sin, zero)}
    return torch.stack(directions[tilt_axis], -1)


def add_spectral_noise(
    x: Tensor,
    power: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    voxel_size=1.0,
) -> Tensor:
    """x plus Gaussian noise of a given power spectrum (3): (..., D, H, W) -> the same.

    power: E|F noise|^2 per shell (..., W//2) or per coefficient (..., D, H, W), even in k. noise:
    standard normal, one per Hartley coefficient (Departure 2), x's shape; drawn with `generator` if
    not given. voxel_size: as in `expand_shells`.
    """
    shape = x.shape[-3:]
    if noise is None:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
    if power.shape[-3:] != shape:
        power = expand_shells(power, shape, voxel_size)
    noise = hartley(power.sqrt().to(noise.dtype) * noise) / math.prod(shape)
    return x + noise


# Projection


def euler_matrix(angles: Tensor) -> Tensor:
    """R of (5) from intrinsic ZYZ Euler angles in degrees: (..., 3) -> (..., 3, 3)."""
    # Write the product of the three rotations out, row by row.
    angles = torch.deg2rad(angles)
    cos_rot, cos_tilt, cos_psi = torch.cos(angles).unbind(-1)
    sin_rot, sin_tilt, sin_psi = torch.sin(angles).unbind(-1)
    entries = [
        cos_rot * cos_tilt * cos_psi - sin_rot * sin_psi,
        -cos_rot * cos_tilt * sin_psi - sin_rot * cos_psi,
        cos_rot * sin_tilt,
        sin_rot * cos_tilt * cos_psi + cos_rot * sin_psi,
        -sin_rot * cos_tilt * sin_psi + cos_rot * cos_psi,
        sin_rot * sin_tilt,
        -sin_tilt * cos_psi,
        sin_tilt * sin_psi,
        cos_tilt,
    ]
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def project(volume: Tensor, rotations: Tensor, shifts: Tensor | None = None) -> Tensor:
    """Projections of a volume along its rotated z axis (5): (..., P, N, N), sums over voxels.

    volume: (..., N, N, N), the object inside the ball of radius N/2 about voxel N//2. rotations:
    (P, 3, 3), image-frame column vectors (x, y, z) to volume-frame ones. shifts: (P, 2) voxels
    (x, y) by which the object is displaced in the image. Works in real space and is differentiable
    in all three. Takes about 40 P N^3 bytes. Raises ValueError if the volume is not a cube or the
    rotations are not (P, 3, 3).
    """
    N = volume.shape[-1]
    if volume.shape[-3:] != (N, N, N) or rotations.shape[1:] != (3, 3):
        raise ValueError(
            f"project: volume {tuple(volume.shape)} and rotations {tuple(rotations.shape)}; "
            "give (..., N, N, N) and (P, 3, 3)"
        )
    P = len(rotations)

    # Interpolate onto a grid twice as fine, exactly, by zeros around the spectrum. Trilinear
    # samples of it are 0.9 % of the maximum off. On the given grid they would be 3.5 % off
    # (Gaussians of 1.7 voxels).
    spectrum = torch.fft.fftshift(fft3(volume), dim=XYZ)
    before = N - N // 2  # zero frequency: N//2 -> M//2
    M = 2 * N
    spectrum = F.pad(spectrum, (before, N - before) * 3)
    fine = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=XYZ), dim=XYZ).real * 8

    # The voxels of each image's frame, each (P, N, N, N) where there are shifts.
    dtype = fine.dtype
    r = torch.arange(N, device=volume.device, dtype=dtype) - N // 2
    z, y, x = torch.meshgrid(r, r, r, indexing="ij")
    if shifts is not None:
        shift_x, shift_y = shifts.to(dtype).T[..., None, None, None]
        x = x - shift_x
        y = y - shift_y

    # R (x, y, z)^T, (5). Written out, because autocast would round a matrix product.
    R = rotations.to(dtype)[..., None, None, None]
    rows = [R[:, i, 0] * x + R[:, i, 1] * y + R[:, i, 2] * z for i in range(3)]
    point = torch.stack(rows, -1)  # (P, N, N, N, 3)
    point = 2 * (2 * (point + N // 2)) / (M - 1) - 1  # fine voxel 0 .. M-1 -> -1 .. 1

    # The P volumes of points lie one behind the other along z, so that no copy of the map is made.
    maps = fine.reshape(1, -1, M, M, M)
    points = point.reshape(1, P * N, N, N, 3)
    samples = F.grid_sample(maps, points, align_corners=True)
    return samples.reshape(*volume.shape[:-3], P, N, N, N).sum(-3)  # (5)
