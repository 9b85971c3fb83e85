"""What the microscope does to a density map: blur, missing wedge, spectral noise, projection at any orientation.

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

import torch
import torch.nn.functional as F
from torch import Tensor

from fourier import XYZ, freq_grid, hartley, mirror, triple
from fsc import fsc


def wedge_mask(shape, tilt_range=(-60, 60), tilt_axis: str = "y", *,
               voxel_size=1.0, device=None) -> Tensor:
    """Where a tilt series measures (2): boolean (D, H, W) in `fftfreq` layout, True = measured.

    tilt_range: smallest and largest tilt in degrees. A specimen turned right-handedly by a about the
    tilt axis and projected along the beam measures one plane: axis "y", beam z: kz = kx tan a;
    axis "x", beam z: kz = -ky tan a; axis "z", beam x: kx = ky tan a (the CryoFM release's choice).
    voxel_size, one number or (z, y, x), matters only where voxels are no cubes: angles are physical ones.
    Raises ValueError for another axis, or unless -90 < min < max < 90.
    """
    low, high = tilt_range
    if not -90 < low < high < 90:
        raise ValueError(f"tilt range {low} {high}: give smallest and largest tilt, inside (-90, 90) degrees")
    kz, ky, kx = (k / v for k, v in zip(freq_grid(shape, device=device), triple(voxel_size)))
    if tilt_axis not in ("x", "y", "z"):
        raise ValueError(f"tilt axis {tilt_axis!r}: give x, y or z")
    along_beam, across = {"y": (kz, kx), "x": (kz, -ky), "z": (kx, ky)}[tilt_axis]
    angle = torch.rad2deg(torch.atan2(torch.where(across < 0, -along_beam, along_beam), across.abs()))
    # 1e-9 degrees: a coefficient exactly at the last tilt counts, however atan2 rounds.
    measured = (angle >= low - 1e-9) & (angle <= high + 1e-9) | ((along_beam == 0) & (across == 0))
    return measured.expand(tuple(shape)).clone()


def cone_mask(shape, angle: float = 60, *, device=None) -> Tensor:
    """CryoLVM's region (3), a missing cone about kz: boolean (D, H, W) in `fftfreq` layout, True = measured.

    angle in degrees. Raises ValueError unless 0 < angle < 90.
    """
    if not 0 < angle < 90:
        raise ValueError(f"cone angle {angle}: give one inside (0, 90) degrees")
    kz, ky, kx = freq_grid(shape, device=device)
    return kz.abs() <= (kx ** 2 + ky ** 2).sqrt() * math.tan(math.radians(angle))     # Departure 1


def noise_shells(shape, device=None) -> Tensor:
    """The power shell of every coefficient: (D, H, W) int64; corners beyond Nyquist hold W//2 and more."""
    kz, ky, kx = freq_grid(shape, device=device)
    return (shape[-1] * (kz ** 2 + ky ** 2 + kx ** 2).sqrt() + 1e-9).long()     # 1e-9: whole radii


def shell_mean(values: Tensor) -> Tensor:
    """Mean over each power shell, (..., D, H, W) in `fftfreq` layout -> (..., W//2), float64."""
    shell, n = noise_shells(values.shape[-3:], values.device), values.shape[-1] // 2
    inside = shell < n
    total = values.new_zeros(*values.shape[:-3], n, dtype=torch.float64)
    return total.index_add(-1, shell[inside], values[..., inside].double()) / shell[inside].bincount(minlength=n)


def radial_power(x: Tensor) -> Tensor:
    """Mean |F x|^2 of each shell: (..., D, H, W) -> (..., W//2), float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return shell_mean(torch.fft.fftn(x, dim=XYZ).abs() ** 2)


def expand_shells(power: Tensor, shape) -> Tensor:
    """Power per shell (..., n) on the grid (..., D, H, W); beyond Nyquist the last value is kept."""
    return power[..., noise_shells(shape, power.device).clamp(max=power.shape[-1] - 1)]


def noise_power(half_1: Tensor, half_2: Tensor) -> Tensor:
    """Noise power of half_1 per shell from two half maps (5): (..., D, H, W) each -> (..., W//2), float64.

    Raises ValueError if the halves differ in shape or are the same map.
    """
    if half_1.shape == half_2.shape and torch.equal(half_1, half_2):
        raise ValueError("noise_power: both half maps are the same map; give two independent ones")
    return noise_power_from_fsc(half_1, fsc(half_1, half_2, convention="cryofm")[..., 1:])


def noise_power_from_fsc(x: Tensor, curve: Tensor, *, clean: bool = False) -> Tensor:
    """Noise power per shell (5) from an FSC between half maps, shells 1 .. W//2: (..., W//2), float64.

    x: (..., D, H, W), the noisy map, P = P_x / (1 + SNR); or, with `clean`, the map before the noise
    that is to be added, P = P_x / SNR. A shell with FSC <= 0 counts as 1e-9, as in the release.
    Raises ValueError if the curve has another number of shells.
    """
    if curve.shape[-1] != x.shape[-1] // 2:
        raise ValueError(f"the FSC has {curve.shape[-1]} shells; a box of {x.shape[-1]} needs shells "
                         f"1 .. {x.shape[-1] // 2}")
    curve = curve.double().clamp(1e-9, 1)
    return radial_power(x) * (1 - curve) / (curve if clean else 1)      # 1 / (1 + SNR) = 1 - FSC


def anisotropic_noise_power(power: Tensor, alpha: Tensor) -> Tensor:
    """Direction-dependent noise power (6) that keeps every shell's mean: (..., D, H, W), float64.

    power: (..., W//2) per shell; alpha: (D, H, W) relative noise power (Departure 4) in `fftfreq`
    layout, even. CryoFM 5.2: `1 + 49 * ~hermitian_part(wedge_mask(shape))`; from particle
    orientations: `orientation_alpha`.
    """
    return alpha * expand_shells(power / shell_mean(alpha), alpha.shape)


def orientation_alpha(rotations: Tensor, shape, *, half_width: float = 5.0, limit: float = 50.0) -> Tensor:
    """Relative noise power by direction from particle orientations (CryoFM D.2): (D, H, W) float64.

    rotations: (P, 3, 3) as in (7); a particle seen along d measures the central slice k . d = 0, here
    every k within half_width degrees of it. alpha = 1 / (share of the particles that measure k,
    relative to the mean over directions), at most `limit`, where next to none do.
    Raises ValueError unless rotations are (P, 3, 3), P > 0.
    """
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3) or len(rotations) == 0:
        raise ValueError(f"orientation_alpha: rotations {tuple(rotations.shape)}; give (P, 3, 3), P > 0")
    d = rotations[:, :, 2].double()                             # the beam in the volume's frame
    centre = [(torch.arange(n, dtype=d.dtype, device=d.device) + 0.5) * math.pi / 90 for n in (45, 180)]
    theta, phi = torch.meshgrid(centre, indexing="ij")          # 2-degree cells; -k is measured with k
    k = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)
    band = math.sin(math.radians(half_width))
    seen = sum(((k @ part.T).abs() <= band).double().sum(-1) for part in d.split(512))
    mean = (seen * theta.sin()).sum() / theta.sin().sum()
    kz, ky, kx = freq_grid(shape, device=d.device)
    flip = torch.where(kz < 0, -1.0, 1.0)
    theta = torch.atan2((kx ** 2 + ky ** 2).sqrt(), kz.abs())
    phi = torch.atan2(flip * ky, flip * kx) % (2 * math.pi)
    cell = [(angle * 90 / math.pi).long().clamp(max=n - 1) for angle, n in ((theta, 45), (phi, 180))]
    alpha = mean / seen[cell[0], cell[1]].clamp(min=mean / limit)
    return (alpha + mirror(alpha)) / 2                          # cells straddle kz = 0; noise is even


def add_spectral_noise(x: Tensor, power: Tensor, *, noise: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
    """x plus Gaussian noise of a given power spectrum (5): (..., D, H, W) -> the same.

    power: E|F noise|^2 per shell (..., W//2) or per coefficient (..., D, H, W), even. noise: standard
    normal, one per Hartley coefficient (Departure 3), x's shape; drawn with `generator` if not given.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device) if noise is None else noise
    power = power if power.shape[-3:] == x.shape[-3:] else expand_shells(power, x.shape[-3:])
    return x + hartley(power.sqrt().to(noise.dtype) * noise) / math.prod(x.shape[-3:])


def euler_matrix(angles: Tensor) -> Tensor:
    """R = Rz(rot) Ry(tilt) Rz(psi) of intrinsic ZYZ Euler angles in degrees, (..., 3) -> (..., 3, 3)."""
    (a, b, c), (p, q, r) = (f(torch.deg2rad(angles)).unbind(-1) for f in (torch.cos, torch.sin))
    rows = [a * b * c - p * r, -a * b * r - p * c, a * q,
            p * b * c + a * r, -p * b * r + a * c, p * q,
            -q * c, q * r, b]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def project(volume: Tensor, rotations: Tensor, shifts: Tensor | None = None) -> Tensor:
    """Projections of a volume along its rotated z axis (7), in real space and differentiable in everything.

    volume: (..., N, N, N), the object inside the ball of radius N/2 about voxel N//2; rotations:
    (P, 3, 3), image-frame column vectors (x, y, z) to volume-frame ones; shifts: (P, 2) voxels
    (x, y) by which the object is displaced in the image. Returns (..., P, N, N), sums over voxels.
    Trilinear on a grid twice as fine (exact Fourier interpolation): 0.9 % of the maximum off where the
    given grid would be 3.5 % off (Gaussians of 1.7 voxels). Takes about 40 P N^3 bytes.
    Raises ValueError if the volume is not a cube or the rotations are not (P, 3, 3).
    """
    N = volume.shape[-1]
    if volume.shape[-3:] != (N, N, N) or rotations.ndim != 3 or rotations.shape[1:] != (3, 3):
        raise ValueError(f"project: volume {tuple(volume.shape)} and rotations {tuple(rotations.shape)}; "
                         "give (..., N, N, N) and (P, 3, 3)")
    P, dtype = len(rotations), torch.promote_types(volume.dtype, torch.float32)
    spectrum = torch.fft.fftshift(torch.fft.fftn(volume.to(dtype), dim=XYZ), dim=XYZ)
    M, before = 2 * N, N - N // 2                               # zero frequency: N//2 -> M//2
    spectrum = F.pad(spectrum, (before, N - before) * 3)
    fine = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=XYZ), dim=XYZ).real * 8

    r = torch.arange(N, device=volume.device, dtype=dtype) - N // 2
    z, y, x = torch.meshgrid(r, r, r, indexing="ij")
    if shifts is not None:
        x, y = (w - s[:, None, None, None].to(dtype) for w, s in zip((x, y), shifts.T))
    R = rotations.to(dtype)[..., None, None, None]              # products by hand: autocast leaves them alone
    point = torch.stack([R[:, i, 0] * x + R[:, i, 1] * y + R[:, i, 2] * z for i in range(3)], -1)
    point = 2 * (2 * (point + N // 2)) / (M - 1) - 1            # fine voxel 0 .. M-1 -> -1 .. 1
    # The P volumes of sample points lie one behind the other along z, so that no copy of the map is made.
    maps = fine.reshape(1, -1, M, M, M)
    samples = F.grid_sample(maps, point.reshape(1, P * N, N, N, 3), align_corners=True)
    return samples.reshape(*volume.shape[:-3], P, N, N, N).sum(-3)
