"""A map as it might be deposited, simulated from an atomic model.

Deposited maps differ from clean simulations: some parts move and are blurred, some are sharpened
until they ring, some are masked, and all have noise. Five steps make such a map of resolution R.
rho_b is the model's density with B-factor b per atom, m is about 1 inside the molecule and 0
outside.

    b   = b_0 + R^2 (4 + 8 Phi(f))                  Phi(f), in 0..1, varies smoothly         (1)
    x_1 = rho_b + (1 - m) solvent                   smooth density outside the molecule      (2)
    x_2 = x_1 + n,  E|F n|^2 = a(k) S(1/R) (R |k|)^-u      S the power of rho_b per shell    (3)
    x_3 = F^-1[exp(B |k|^2 / 4) F x_2]              sharpening, in every second map          (4)
    y   = lowpass(x_3, R) min(4 m, 1)               the mask, in every second map            (5)

(1) lets amplitudes fall to e^-1 .. e^-3 at 1/R. (3) makes noise as strong as the signal there, so
the FSC is 0.5. a(k) is 1, or in every second map larger in directions with too few views.
Resolutions and lengths in Å, B-factors in Å^2, frequencies k in 1/Å. All of it is ours.

The networks of CryoLVM learn from maps with the noise n (data_pairs.py). A prior learns what a map
would be without noise, so its maps lack (3) (data.py).
"""

import math

import torch
from torch import Generator, Tensor

from atoms import molmap
from augment import uniform
from degrade import (
    add_spectral_noise,
    anisotropic_noise_power,
    orientation_alpha,
    radial_power,
)
from fourier import apply_fourier, lowpass, wavenumber

FINE = 1.8  # Å: the resolution that superres wants, and of the model before anything blurs it


def smooth_field(xyz: Tensor, direction: Tensor, generator: Generator) -> Tensor:
    """f of (1) at the atoms xyz (A, 3): about standard normal, smooth over 30 to 80 Å: (A,).

    A sum of plane waves along the unit vectors `direction` (n, 3).
    """
    # Waves with random lengths (Å) and phases.
    n = len(direction)
    wavelength = torch.empty(n).uniform_(30, 80, generator=generator)
    wavevector = direction / wavelength[:, None]
    phase = torch.rand(n, generator=generator)
    waves = (2 * math.pi * (xyz.float() @ wavevector.T + phase)).cos()  # (A, n)

    # The variance of a cosine is 1/2, so that of their sum is n / 2.
    return waves.sum(1) * (2 / n) ** 0.5


def preferred_views(axis: Tensor, shape, generator: Generator) -> Tensor:
    """a(k) of (3), (D, H, W), for 64 views that crowd about the direction `axis` (3,)."""
    spread = torch.randn(64, 3, generator=generator) * uniform(0.1, 0.6, generator)
    beam = spread + axis

    # Only the third column of a rotation, the beam, matters.
    rotations = torch.zeros(64, 3, 3)
    rotations[:, :, 2] = beam / beam.norm(dim=1, keepdim=True)
    return orientation_alpha(rotations, shape, limit=uniform(2, 10, generator))


def noise_spectrum(rho: Tensor, resolution: float, voxel_size: float, generator) -> Tensor:
    """S(1/R) (R |k|)^-u of (3) per shell, u uniform in 0..1: (W // 2,)."""
    # The power of the signal in the shell of 1/R. In a coarse grid the last shell is below it.
    n = rho.shape[-1] // 2
    cutoff = rho.shape[-1] * voxel_size / resolution
    signal = radial_power(rho)[min(int(cutoff), n - 1)]

    # R |k| = shell / cutoff. Shell 0 takes the value of shell 1.
    shell = torch.arange(n).clamp(min=1)
    return signal * (shell / cutoff) ** -uniform(0, 1, generator)


def every_second(generator: Generator) -> bool:
    """True in half of all calls."""
    return uniform(0, 1, generator) < 0.5


def deposited(
    xyz: Tensor,
    atomic_number,
    resolution: float,
    *,
    b_factor: Tensor,
    voxel_size: float,
    shape,
    origin,
    generator: Generator,
    noisy: bool = True,
) -> Tensor:
    """A simulated deposited map y of (5): (D, H, W) float32 in Z/Å^3, zero mean in empty regions.

    xyz (A, 3) in Å, atomic_number (A,), b_factor (A,) in Å^2; resolution R in Å; the grid as in
    `molmap`. noisy=False leaves out (3).
    """
    # The molecule, sharp but for B-factors that vary from place to place.                       (1)
    direction = torch.randn(5, 3, generator=generator)
    direction = direction / direction.norm(dim=1, keepdim=True)
    share = torch.special.ndtr(smooth_field(xyz, direction, generator))  # uniform in 0..1
    b = b_factor + resolution**2 * (4 + 8 * share)
    grid = dict(voxel_size=voxel_size, shape=shape, origin=origin)
    rho, _, _ = molmap(xyz, atomic_number, FINE, b_factor=b, cutoff=4, **grid)

    # Where the molecule is: m falls from 1 to 0 over some Å.
    inside = (rho > 0.05 * rho.max()).float()
    m = lowpass(inside, uniform(8, 16, generator), voxel_size).clamp(0, 1)

    # Solvent whose 3 sigma are 2 to 8 % of the maximum.                                         (2)
    noise = torch.randn(rho.shape, generator=generator)
    solvent = lowpass(noise, uniform(8, 16, generator), voxel_size)
    strength = uniform(0.02, 0.08, generator) * rho.max() / solvent.std() / 3
    x = rho + (1 - m) * solvent * strength

    # Noise, in every second map with preferred views.                                           (3)
    if noisy:
        power = noise_spectrum(rho, resolution, voxel_size, generator)
        if every_second(generator):
            power = anisotropic_noise_power(power, preferred_views(direction[0], shape, generator))
        x = add_spectral_noise(x, power, generator=generator)

    # Depositors sharpen every second map, signal and noise alike. The signal fell by 8 R^2.     (4)
    if every_second(generator):
        sharpening = uniform(0, 8, generator) * resolution**2
        k2 = (wavenumber(shape, voxel_size) ** 2).clamp(max=1 / resolution**2)
        x = apply_fourier(x, torch.exp(sharpening / 4 * k2))

    # Nothing beyond R is left, and every second map is cut out 4 to 8 Å around its model.       (5)
    y = lowpass(x, resolution, voxel_size)
    return y * (m * 4).clamp(max=1) if every_second(generator) else y
