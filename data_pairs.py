"""Pairs of an observed and a wanted density that CryoLVM is fine-tuned on, simulated or real.

    sharpen     deposited map -> molmap of its model at the same resolution R (CryoLVM 4.2)
    superres    deposited map -> molmap of its model at 1.8 Å                 (CryoLVM 4.3)

The pairs of wedge3d are in data_wedges.py. How a deposited map is simulated: data_deposited.py.
Resolutions and lengths in Å.
Departure 1: CryoLVM trains on deposited maps and their models (`read_pairs`). Without such a list,
    we simulate the deposited maps, too.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from atoms import Structure, molmap, placed, read_model
from augment import RandomItems, mirror_or_not, random_crop, uniform
from data_deposited import FINE, deposited
from data_quality import on_training_grid
from files import entry_of
from mrc import read_map
from volume import CLIP, density_mask, find_grey_scale, normalise, pad

PAIRS = "pairs.csv"  # columns map, model (two files beside it) and resolution (Å)


# ---- Simulated pairs ---------------------------------------------------------------------------


def simulated_pair(
    task: str,
    xyz: Tensor,
    atomic_number,
    b_factor: Tensor,
    resolution: float,
    generator: Generator,
    **grid,
) -> tuple[Tensor, Tensor]:
    """The observed and the wanted map of a task, (D, H, W) each, in Z/Å^3.

    Atoms as in `deposited`; grid: voxel_size, shape, origin of `molmap`.
    """
    wanted_resolution = FINE if task == "superres" else resolution
    wanted, _, _ = molmap(xyz, atomic_number, wanted_resolution, **grid)
    observed = deposited(
        xyz, atomic_number, resolution, b_factor=b_factor, generator=generator, **grid
    )
    return observed, wanted


def scale_pair(observed: Tensor, wanted: Tensor, percentiles: tuple[float, float]) -> Tensor:
    """Two maps (D, H, W), each scaled by its own percentiles to 0..1: (2, D, H, W)."""
    low, high = percentiles
    return torch.stack([normalise(x, 0, 1, high, low=low)[0] for x in (observed, wanted)])


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
            voxel_size=self.voxel_size,
            shape=(self.box,) * 3,
            origin=-self.voxel_size * (self.box // 2),
        )
        pair = scale_pair(*pair, self.percentiles)
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

    Raises OSError or ValueError for unreadable files, for voxels that are too coarse, and for a
    model outside of its map.
    """
    source = on_training_grid(read_map(map_file), voxel_size)
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
    pair = scale_pair(density, wanted, percentiles)
    return Pair(entry_of(map_file), pair.half())


def read_pairs(
    folder: str | Path, task: str, voxel_size: float, say=print, percentiles=CLIP
) -> list[Pair]:
    """The pairs that FOLDER/pairs.csv lists, on the grid of voxel_size (Å).

    A pair that cannot be read is skipped. say: gets a line for each.
    Raises OSError or ValueError (one line) for a bad list, and if no pair can be read.
    """
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
