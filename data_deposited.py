"""A map as it might be deposited, simulated from an atomic model.

Deposited maps differ from clean simulations: some parts move and are blurred, some are sharpened
until they ring, some are masked, and all have noise. Five steps make such a map of resolution R.
rho_b is the model's density at 1.8 Å with B-factor b per atom. f is a smooth field (`smooth_field`)
and Phi the normal distribution function. m is the molecule's shape, 1 inside and 0 outside, blurred
by a Gaussian.

    b   = b_0 + R^2 (4 + 8 Phi(f))                  Phi(f), in 0..1, varies smoothly         (1)
    x_1 = rho_b + (1 - m) solvent                   smooth density outside the molecule      (2)
    x_2 = x_1 + n,  E|F n|^2 = a(k) S(1/R) (R |k|)^-u      S the power of rho_b per shell    (3)
    x_3 = F^-1[exp(B min(|k|, 1/R)^2 / 4) F x_2]    sharpening in half of the maps, B <= 8 R^2 (4)
    y   = lowpass(x_3, R) min(4 m, 1)               the mask, in half of the maps            (5)

(1) lets amplitudes fall to e^-1 .. e^-3 at 1/R, by B = 8 R^2 on average, and (4) undoes at most
that. (3) makes noise as strong as the signal at 1/R, so the FSC of two such maps is 0.5 there.
a(k) is 1, or in half of the maps larger in directions with too few views and smaller in the others.
Voxels are cubic. Resolutions and lengths in Å, B-factors in Å^2, frequencies k in 1/Å.
Nothing here is from the papers.

The networks of CryoLVM learn from maps with the noise n (data_pairs.py). A prior learns what a map
would be without noise, so its maps lack (3), and so do the whole maps of data_wedges.py
(`random_density`).
"""

import math

import torch
from torch import Generator, Tensor

from atoms import Structure, molmap, placed
from augment import uniform
from degrade import (
    add_spectral_noise,
    anisotropic_noise_power,
    orientation_alpha,
    radial_power,
)
from fourier import apply_fourier, lowpass, wavenumber

FINE = 1.8  # Å: the resolution that superres wants, and of the model before B-factors blur it


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
    """a(k) of (3), up to a factor per shell, for 64 views that crowd about a direction: (D, H, W).

    axis: that direction, (3,).
    """
    spread = torch.randn(64, 3, generator=generator) * uniform(0.1, 0.6, generator)
    beam = spread + axis

    # Only the third column of a rotation, the beam, matters.
    rotations = torch.zeros(64, 3, 3)
    rotations[:, :, 2] = beam / beam.norm(dim=1, keepdim=True)
    return orientation_alpha(rotations, shape, limit=uniform(2, 10, generator))


def noise_spectrum(rho: Tensor, resolution: float, voxel_size: float, generator) -> Tensor:
    """S(1/R) (R |k|)^-u of (3) per shell, u uniform in 0..1: (W // 2,)."""
    # The power of the signal in the shell of 1/R, or the last one if 1/R is beyond Nyquist.
    n = rho.shape[-1] // 2
    cutoff = rho.shape[-1] * voxel_size / resolution
    signal = radial_power(rho)[min(int(cutoff), n - 1)]

    # R |k| = shell / cutoff. Shell 0 takes the value of shell 1.
    shell = torch.arange(n).clamp(min=1)
    return signal * (shell / cutoff) ** -uniform(0, 1, generator)


def half_of_the_time(generator: Generator) -> bool:
    """True with probability 1/2."""
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
    """A simulated deposited map y of (5): (D, H, W) float32 in Z/Å^3, about 0 outside the molecule.

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

    # Where the molecule is. A Gaussian does not ring, as a sharp low-pass would.
    inside = (rho > 0.05 * rho.max()).float()
    k2 = wavenumber(shape, voxel_size) ** 2
    sigma = uniform(3, 6, generator)
    m = apply_fourier(inside, torch.exp(-2 * math.pi**2 * sigma**2 * k2)).clamp(0, 1)

    # Solvent whose 3 sigma are 2 to 8 % of the maximum.                                         (2)
    white = torch.randn(rho.shape, generator=generator)
    solvent = lowpass(white, uniform(8, 16, generator), voxel_size)
    strength = uniform(0.02, 0.08, generator) * rho.max() / solvent.std() / 3
    x = rho + (1 - m) * solvent * strength

    # Noise, in half of the maps with preferred views.                                           (3)
    if noisy:
        power = noise_spectrum(rho, resolution, voxel_size, generator)
        if half_of_the_time(generator):
            power = anisotropic_noise_power(power, preferred_views(direction[0], shape, generator))
        x = add_spectral_noise(x, power, generator=generator)

    # Half of the maps are sharpened, signal and noise alike.                                    (4)
    if half_of_the_time(generator):
        sharpening = uniform(0, 8, generator) * resolution**2
        x = apply_fourier(x, torch.exp(sharpening / 4 * k2.clamp(max=1 / resolution**2)))

    # Nothing beyond R is left. Half of the maps are masked, 3 to 7 Å outside the molecule.      (5)
    y = lowpass(x, resolution, voxel_size)
    return y * (m * 4).clamp(max=1) if half_of_the_time(generator) else y


def random_density(
    structure: Structure,
    generator: Generator,
    *,
    box: int,
    voxel_size: float,
    resolution: tuple[float, float],
    as_deposited: float = 0.0,
) -> Tensor:
    """A simulated map of a model at a random pose: (box, box, box) in Z/Å^3.

    voxel_size in Å; the map's resolution is uniform in `resolution` (Å). The share `as_deposited`
    of maps looks deposited, (5), but without noise. The atoms are rotated, not the grid, so nothing
    is interpolated.
    """
    xyz, b_factor = placed(structure, generator)

    # The origin of `placed` becomes voxel box // 2.
    model = (xyz, structure.atomic_number, uniform(*resolution, generator))
    grid = dict(
        b_factor=b_factor,
        voxel_size=voxel_size,
        shape=(box,) * 3,
        origin=-voxel_size * (box // 2),
    )
    # Without a share, no number is drawn, so that clean maps do not depend on it.
    if as_deposited and uniform(0, 1, generator) < as_deposited:
        return deposited(*model, generator=generator, noisy=False, **grid)
    return molmap(*model, **grid)[0]
