"""Pairs of an observed and a wanted density that CryoLVM is fine-tuned on, simulated or real.

    sharpen     deposited map -> molmap of its model at the same resolution R (CryoLVM 4.2)
    superres    deposited map -> molmap of its model at 1.8 Å                 (CryoLVM 4.3)
    wedge3d     molmap and noise, less the missing wedge -> molmap            (CryoLVM 4.4)

A deposited map is simulated in five steps. rho_b is the model's density with B-factor b per atom,
m is about 1 inside the molecule and 0 outside.

    b   = b_0 + R^2 (4 + 8 Phi(f))                  Phi(f), in 0..1, varies smoothly         (1)
    x_1 = rho_b + (1 - m) solvent                   smooth density outside the molecule      (2)
    x_2 = x_1 + n,  E|F n|^2 = a(k) S(1/R) (R |k|)^-u      S the power of rho_b per shell    (3)
    x_3 = F^-1[exp(B |k|^2 / 4) F x_2]              sharpening, in every second map          (4)
    y   = lowpass(x_3, R) min(4 m, 1)               the mask, in every second map            (5)

(1) lets amplitudes fall to e^-1 .. e^-3 at 1/R. (3) makes noise as strong as the signal there, so
the FSC is 0.5. a(k) is 1, or in every second map larger in directions with too few views.
Resolutions and lengths in Å, B-factors in Å^2, frequencies k in 1/Å.
Departure 1: (1) to (5) are ours. CryoLVM trains on deposited maps and their models (`read_pairs`).
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from atoms import Structure, molmap, placed, read_model
from augment import RandomItems, flip, mirror_or_not, random_crop, uniform
from degrade import (
    add_spectral_noise,
    anisotropic_noise_power,
    cone_mask,
    orientation_alpha,
    radial_power,
    wedge_mask,
)
from fourier import apply_fourier, lowpass, wavenumber
from mrc import read_map, resample_map
from volume import CLIP, density_mask, find_grey_scale, normalise, pad

FINE = 1.8  # Å: the resolution that superres wants, and of the model before anything blurs it

PAIRS = "pairs.csv"  # columns map, model (two files beside it) and resolution (Å)


# ---- A map as it might be deposited ------------------------------------------------------------


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
) -> Tensor:
    """A simulated deposited map y of (5): (D, H, W) float32 in Z/Å^3, zero mean in empty regions.

    xyz (A, 3) in Å, atomic_number (A,), b_factor (A,) in Å^2; resolution R in Å; the grid as in
    `molmap`.
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


# ---- Simulated pairs ---------------------------------------------------------------------------


def simulated_pair(
    task: str,
    xyz: Tensor,
    atomic_number,
    b_factor: Tensor,
    resolution: float,
    generator: Generator,
    *,
    missing: str = "wedge",
    **grid,
) -> tuple[Tensor, Tensor]:
    """The observed and the wanted map of a task, (D, H, W) each, in Z/Å^3.

    Atoms as in `deposited`; grid: voxel_size, shape, origin of `molmap`. wedge3d loses what a tilt
    range of 50 to 70 degrees misses: missing="wedge", or "cone", the formula that the paper prints.
    """
    wanted_resolution = FINE if task == "superres" else resolution
    wanted, _, _ = molmap(xyz, atomic_number, wanted_resolution, **grid)
    if task != "wedge3d":
        observed = deposited(
            xyz, atomic_number, resolution, b_factor=b_factor, generator=generator, **grid
        )
        return observed, wanted

    # The measured region of a random tilt range.
    angle = uniform(50, 70, generator)
    shape = wanted.shape
    measured = wedge_mask(shape, (-angle, angle)) if missing == "wedge" else cone_mask(shape, angle)

    # White noise of up to a tenth of the maximum.
    noise = torch.randn(shape, generator=generator)
    noise = noise * (uniform(0, 0.1, generator) * wanted.max())
    return apply_fourier(wanted + noise, measured), wanted


def pair_crops(
    pair: Tensor, box: int, count: int, generator: Generator, anywhere: float = 0.5
) -> list[Tensor]:
    """`count` cubes of a pair (2, D, H, W), each (2, box, box, box).

    The share `anywhere` of them is cut anywhere, so that the network sees solvent. The others are
    cut around voxels of the molecule. (With anywhere = 0, restored solvent showed the grid of
    tiles, up to 9 % of the maximum.)
    """
    molecule = density_mask(pair[1])
    crops = []
    for _ in range(count):
        mask = None if uniform(0, 1, generator) < anywhere else molecule
        crops.append(random_crop(pair, box, generator, mask))
    return crops


@dataclass(eq=False, kw_only=True)
class SimulatedPairs(RandomItems):
    """Training pairs from models, `Structure`s: item i is (crops, 2, D, D, D), scaled to 0..1.

    All crops of an item come from one `simulated_pair` of box^3 voxels, at a resolution uniform in
    `resolution` (Å).
    """

    task: str
    crop: int
    crops: int
    box: int
    voxel_size: float  # Å
    resolution: tuple[float, float]  # Å
    missing: str = "wedge"
    percentiles: tuple[float, float] = CLIP

    def draw(self, structure: Structure, generator: Generator) -> Tensor:
        # Simulate the pair and scale both maps to 0..1.
        xyz, b_factor = placed(structure, generator)
        pair = simulated_pair(
            self.task,
            xyz,
            structure.atomic_number,
            b_factor,
            uniform(*self.resolution, generator),
            generator,
            missing=self.missing,
            voxel_size=self.voxel_size,
            shape=(self.box,) * 3,
            origin=-self.voxel_size * (self.box // 2),
        )
        low, high = self.percentiles
        pair = torch.stack([normalise(x, 0, 1, high, low=low)[0] for x in pair])

        # A wedge has an orientation, which flips keep and rotations do not. All crops show the
        # molecule. The shipped weights were trained so, but without flips.
        if self.task == "wedge3d":
            crops = pair_crops(pair, self.crop, self.crops, generator, anywhere=0)
            return torch.stack([flip(x, generator) for x in crops])
        crops = pair_crops(pair, self.crop, self.crops, generator)
        return torch.stack([mirror_or_not(x, generator) for x in crops])


# ---- Real pairs --------------------------------------------------------------------------------


class Pair(NamedTuple):
    """An observed and a wanted map, (2, D, H, W) float16, scaled to 0..1."""

    label: str
    maps: Tensor


def read_pair(
    map_file: Path,
    model_file: Path,
    task: str,
    resolution: float,
    voxel_size,
    say=print,
    percentiles=CLIP,
) -> Pair:
    """A deposited map and `molmap` of its model, on the grid of voxel_size (Å).

    Atoms are weighted by their occupancies. say: gets a line for what was assumed about the model.

    Raises OSError or ValueError for unreadable files, and for a model outside of its map.
    """
    source = resample_map(read_map(map_file), voxel_size)
    model = read_model(model_file)
    for note in model.notes:
        say(f"{model_file}: {note}")

    # Simulate what is wanted on the grid of the map.
    wanted, _, _ = molmap(
        model.xyz,
        model.atomic_number * model.occupancy.clamp(0, 1),
        FINE if task == "superres" else resolution,
        voxel_size=source.voxel_size,
        shape=source.density.shape,
        origin=source.corner,
    )
    if not wanted.max() > 0:
        raise ValueError(
            f"{model_file}: none of its atoms lies in {map_file}; they must share one frame"
        )

    # Scale both to 0..1, the map from its background on.
    density = find_grey_scale(source.density).to_work(source.density)
    low, high = percentiles
    pair = torch.stack([normalise(x, 0, 1, high, low=low)[0] for x in (density, wanted)])
    return Pair(map_file.name.split(".")[0], pair.half())


def read_pairs(
    folder: str | Path, task: str, voxel_size: float, say=print, percentiles=CLIP
) -> list[Pair]:
    """The pairs that FOLDER/pairs.csv lists, on the grid of voxel_size (Å).

    A pair that cannot be read is skipped. say: gets a line for each.
    Raises OSError or ValueError (one line) for a bad list, if no pair can be read, and for wedge3d,
    which learns from simulated pairs.
    """
    if task == "wedge3d":
        raise ValueError(f"{folder}: wedge3d learns from models (PDB, mmCIF, .npz), not from pairs")
    folder = Path(folder)
    rows = read_pair_list(folder)

    # One row of the list makes one pair. A bad file must not stop the others.
    pairs = []
    refused = []
    for map_file, model_file, resolution in rows:
        try:
            pair = read_pair(map_file, model_file, task, resolution, voxel_size, say, percentiles)
            pairs.append(pair)
        except (ValueError, OSError) as error:
            named = str(map_file) in str(error) or str(model_file) in str(error)
            refused.append(str(error) if named else f"{map_file}: {error}")
            say(f"skipped {refused[-1]}")
    say(f"{folder / PAIRS}: {len(refused)} pairs skipped, {len(pairs)} read")
    if refused and not pairs:
        raise ValueError(f"{folder / PAIRS}: no pair can be used, the first: {refused[0]}")
    return pairs


def read_pair_list(folder: Path) -> list[tuple[Path, Path, float]]:
    """(map, model, resolution in Å) of each row of FOLDER/pairs.csv.

    Raises OSError without the list, ValueError for a row without these columns.
    """
    # utf-8-sig drops the byte-order mark that spreadsheets write.
    with open(folder / PAIRS, newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    rows = []
    for row in table:
        try:
            resolution = float(row["resolution"])
            rows.append((folder / row["map"], folder / row["model"], resolution))
        except (KeyError, TypeError, ValueError):
            resolution = math.nan
        if not 0 < resolution < math.inf:
            raise ValueError(
                f"{folder / PAIRS}: wants the columns map, model, resolution (Å); this row is {row}"
            )
    return rows


@dataclass(eq=False, kw_only=True)
class MapPairs(RandomItems):
    """Training pairs from `read_pairs`: item i is (crops, 2, D, D, D) of one pair."""

    crop: int
    crops: int

    def draw(self, pair: Pair, generator: Generator) -> Tensor:
        # A map may be smaller than a crop.
        maps = pad(pair.maps.float(), self.crop)
        crops = pair_crops(maps, self.crop, self.crops, generator)
        return torch.stack([mirror_or_not(x, generator) for x in crops])
