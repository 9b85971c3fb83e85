"""Pairs of what was observed and what is wanted, for CryoLVM.

(Equations and departures of the file that this one came from; keep what belongs here.)
Density maps: files, grids, grey scale, crops, rotations, tiles, batches; `python data.py prepare` for EMDB's.

    r_i = origin + (nstart + i) v                      position of voxel i, v the voxel size      (1)
    n' = round(n v / v_wanted),  v' = n v / n'         a new grid over the same box               (2)
    f'_k = f_k for |k| < min(n, n') / 2, else 0        f_k = 1/n sum_i x_i exp(-2 pi i k i / n)   (3)
    x = (clip(density, 0, p) / p - mean) / std         p the 99.999 percentile: network scale     (4)
    rotated(r) = density(R r)                          r = (x, y, z) from the centre of the box   (5)
    M = sum_k w y_k / sum_k w                          tiles y_k blended under the window w       (6)

Volumes are float32 (D, H, W) = (z, y, x), lengths Å; voxel_size, origin and nstart are triples in
that same order (z, y, x). (1): MRC2014, Cheng et al. 2015, J. Struct. Biol. 192:146. (2), (3):
band-limited interpolation, voxel 0 stays in place and values keep their scale. (4): CryoFM
(arXiv:2410.08631) §4.2, clipping as in its release; crops and rotations: its appendix F.1.
(6): CryoLVM, appendix D.2, Algorithm 1.
Departure 1: how F.1 dilates the mask of random crops is not stated; we use a 3^3 cube, three times.
Departure 2: the release turns a whole map, applies (4) again and crops it. We apply (4) once, choose the
middle of the crop first and turn no more than the crop shows: a crop of 64^3 from a map of 384^3 costs
4 MB of reading instead of 113 MB, and 216 times fewer interpolated voxels.
Departure 3: D.2 gives no sigma for the blending window; we use a quarter of the tile.
Departure 4: 4.1 removes helices and "problematic cases" by eye; `RULES` goes by method and title.
"""
import csv
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from atoms import molmap, placed, read_model
from augment import ENDLESS, item_generator, mirror_or_not, randint, random_crop, uniform
from degrade import add_spectral_noise, anisotropic_noise_power, cone_mask, orientation_alpha, radial_power, wedge_mask
from fourier import apply_fourier, lowpass
from fsc import radius
from mrc import read_map, resample_map
from volume import density_mask, normalise, pad


def deposited(xyz: Tensor, atomic_number, resolution: float, *, voxel_size: float, shape, origin, b_factor: Tensor,
              generator: torch.Generator) -> Tensor:
    """A map as it might be deposited (9): (D, H, W) float32 in Z/Å^3, zero mean where there is nothing.

    rho is the model at 1.8 Å with B-factors that vary smoothly from place to place, 4 to 12 R^2: amplitudes at 1/R fall to
    e^-1 .. e^-3, local resolution varies. solvent: smooth density outside the molecule, 2 to 8 % of the maximum. n: at 1/R
    as strong as the signal, so that FSC is 0.5 there; u in 0..1; in every second map stronger in directions that too few
    particles were seen from. Every second map is sharpened, as depositors do, signal and noise alike: B from 0 to the mean
    8 R^2 by which the signal fell. Every second map is cut out softly 4 to 8 Å around the model, as segments are.

    xyz (A, 3), atomic_number (A,), b_factor (A,) in Å^2 and the grid as in `molmap`; resolution R in Å.
    """
    draw = lambda low, high: uniform(low, high, generator)
    # B = R^2 (4 + 8 Phi(f)), f of five plane waves 30 to 80 Å long: about normal, so B is about uniform.
    direction = torch.randn(5, 3, generator=generator)
    wave = direction / direction.norm(dim=1, keepdim=True) / torch.empty(5).uniform_(30, 80, generator=generator)[:, None]
    f = (2 * math.pi * (xyz.float() @ wave.T + torch.rand(5, generator=generator))).cos().sum(1) * (2 / 5) ** 0.5
    b = b_factor + resolution ** 2 * (4 + 8 * torch.special.ndtr(f))
    grid = dict(voxel_size=voxel_size, shape=shape, origin=origin)
    rho = molmap(xyz, atomic_number, 1.8, b_factor=b, cutoff=4, **grid)[0]

    near = lowpass((rho > 0.05 * rho.max()).float(), draw(8, 16), voxel_size).clamp(0, 1)  # 1 inside, 0 some Å away
    solvent = lowpass(torch.randn(rho.shape, generator=generator), draw(8, 16), voxel_size)
    x = rho + (1 - near) * solvent * (draw(0.02, 0.08) * rho.max() / solvent.std() / 3)

    n, shell = shape[-1] // 2, shape[-1] * voxel_size / resolution              # the shell of 1/R
    power = radial_power(rho)[min(int(shell), n - 1)] * (torch.arange(n).clamp(min=1) / shell) ** -draw(0, 1)
    if draw(0, 1) < 0.5:                                                         # views crowd about one direction
        views = torch.randn(64, 3, generator=generator) * draw(0.1, 0.6) + direction[0] / direction[0].norm()
        z = views / views.norm(dim=1, keepdim=True)
        rotations = torch.zeros(64, 3, 3)
        rotations[:, :, 2] = z                                                  # only the beam matters
        power = anisotropic_noise_power(power, orientation_alpha(rotations, shape, limit=draw(2, 10)))
    x = add_spectral_noise(x, power, generator=generator)
    if draw(0, 1) < 0.5:
        k2 = (radius(shape, voxel_size) / (min(shape) * voxel_size)) ** 2
        x = apply_fourier(x, torch.exp(draw(0, 8) * resolution ** 2 / 4 * k2.clamp(max=1 / resolution ** 2)))
    x = lowpass(x, resolution, voxel_size)
    if draw(0, 1) < 0.5:
        x = x * (near * 4).clamp(max=1)
    return x


def simulated_pair(task: str, xyz: Tensor, atomic_number, b_factor: Tensor, resolution: float, generator: Generator, *,
                   missing: str = "wedge", **grid) -> tuple[Tensor, Tensor]:
    """What was observed and what is wanted, (D, H, W) each, in Z/Å^3; grid: voxel_size, shape, origin of `molmap`.

    sharpen, superres    `degrade.deposited` -> `molmap` at the same resolution, or at 1.8 Å (CryoLVM 4.2, 4.3)
    wedge3d              `molmap` and noise, less what a tilt range of 50 to 70 degrees misses -> all of it (4.4)
    missing: "wedge", or "cone", the formula as the paper prints it.
    """
    wanted = molmap(xyz, atomic_number, 1.8 if task == "superres" else resolution, **grid)[0]
    if task != "wedge3d":
        return deposited(xyz, atomic_number, resolution, b_factor=b_factor, generator=generator, **grid), wanted
    angle = uniform(50, 70, generator)
    region = wedge_mask(wanted.shape, (-angle, angle)) if missing == "wedge" else cone_mask(wanted.shape, angle)
    noise = torch.randn(wanted.shape, generator=generator) * (uniform(0, 0.1, generator) * wanted.max())
    return apply_fourier(wanted + noise, region), wanted


def pair_crops(pair: Tensor, box: int, count: int, generator: Generator, anywhere: float = 0.5) -> list[Tensor]:
    """Cubes of a pair (2, D, H, W): this share of them cut anywhere, for solvent is to be learnt too, the others around points of
    the molecule. (When all were, what came of solvent was a grid of tiles, up to 9 % of the maximum.)"""
    mask = density_mask(pair[1])
    return [random_crop(pair, box, generator, None if uniform(0, 1, generator) < anywhere else mask) for _ in range(count)]


class SimulatedPairs(torch.utils.data.Dataset):
    """Pairs from models: item i is (crops, 2, crop, crop, crop), `simulated_pair` on [0, 1].

    A function of (seed, i), of a random structure at a resolution uniform in `resolution` (Å).
    """
    def __init__(self, structures, *, task: str, crop: int, crops: int, box: int, voxel_size: float,
                 resolution: tuple[float, float], missing: str = "wedge", seed: int = 0):
        self.structures, self.task, self.crop, self.crops, self.box = structures, task, crop, crops, box
        self.voxel_size, self.resolution, self.missing, self.seed = voxel_size, resolution, missing, seed

    def __getitem__(self, i: int) -> Tensor:
        g = item_generator(self.seed, i)
        structure = self.structures[randint(len(self.structures), g)]
        xyz, b = placed(structure, g)
        pair = simulated_pair(self.task, xyz, structure.atomic_number, b, uniform(*self.resolution, g), g, missing=self.missing,
                              voxel_size=self.voxel_size, shape=(self.box,) * 3, origin=-self.voxel_size * (self.box // 2))
        pair = torch.stack([normalise(x, 0, 1)[0] for x in pair])
        # wedge3d: crops of molecules alone, as its weights were trained; and a wedge has an orientation, so only the atoms are turned.
        crops = pair_crops(pair, self.crop, self.crops, g, anywhere=0 if self.task == "wedge3d" else 0.5)
        return torch.stack(crops if self.task == "wedge3d" else [mirror_or_not(x, g) for x in crops])

    def __len__(self) -> int:
        return ENDLESS


PAIRS = "pairs.csv"                                     # columns map, model, resolution: two files beside it, and Å


class Pair(NamedTuple):
    """Observed and wanted (2, D, H, W) float16 on [0, 1]."""
    label: str
    maps: Tensor


def read_pairs(folder: str | Path, task: str, voxel_size: float) -> list[Pair]:
    """Deposited maps and their models, listed in FOLDER/pairs.csv -> pairs on the grid of voxel_size (Å).

    What is wanted is `molmap` of the model at the map's resolution, or at 1.8 Å for superres (CryoLVM 4.2, 4.3).
    Raises OSError or ValueError (one line) for a file that is missing or no map or model, for a model outside of its map,
    and for wedge3d, which learns from simulated pairs.
    """
    if task == "wedge3d":
        raise ValueError(f"{folder}: wedge3d learns from models (PDB, mmCIF, .npz), not from pairs")
    folder, pairs = Path(folder), []
    with open(folder / PAIRS, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        try:
            map_file, model_file, resolution = folder / row["map"], folder / row["model"], float(row["resolution"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder / PAIRS}: wants the columns map, model, resolution (Å); this row is {row}") from None
        source, model = resample_map(read_map(map_file), voxel_size), read_model(model_file)
        wanted = molmap(model.xyz, model.atomic_number, 1.8 if task == "superres" else resolution,
                        voxel_size=source.voxel_size, shape=source.density.shape, origin=source.corner)[0]
        if not wanted.max() > 0:
            raise ValueError(f"{model_file}: none of its atoms lies in {map_file}; they must share one frame")
        pair = torch.stack([normalise(x, 0, 1)[0] for x in (source.density, wanted)]).half()
        pairs.append(Pair(map_file.name.split(".")[0], pair))
    return pairs


class MapPairs(torch.utils.data.Dataset):
    """As SimulatedPairs, from `read_pairs`: item i is (crops, 2, crop, crop, crop) of one pair, a function of (seed, i)."""
    def __init__(self, pairs: list[Pair], *, crop: int, crops: int, seed: int = 0):
        self.pairs, self.crop, self.crops, self.seed = pairs, crop, crops, seed

    def __getitem__(self, i: int) -> Tensor:
        g = item_generator(self.seed, i)
        pair = pad(self.pairs[randint(len(self.pairs), g)].maps.float(), self.crop)
        return torch.stack([mirror_or_not(x, g) for x in pair_crops(pair, self.crop, self.crops, g)])

    def __len__(self) -> int:
        return ENDLESS
