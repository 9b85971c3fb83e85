"""Data sets of single densities: crops of maps, and crops of maps that are simulated from models.

    map, clipped and scaled to 0..1 -> random centre -> window -> rotate -> crop -> network scale

Both follow CryoFM (arXiv:2410.08631), section 4.2 and appendix F.1. Items are (crops, 1, D, D, D)
in network scale (volume.normalise), D voxels per side of a crop. Lengths in Å.

Departure 1: the release rotates a whole map, normalises it again and cuts a crop out of it. We
normalise once, choose the middle of the crop first and rotate no more than the crop shows. A crop
of 64^3 from a map of 384^3 then reads 4 MB, not 113 MB, and interpolates 216 times fewer voxels.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from atoms import Structure
from augment import (
    AUGMENTATIONS,
    RandomItems,
    random_centre,
    random_crop,
    random_rotation,
    rot24,
    window,
)
from data_deposited import random_density
from data_prepare import SETTINGS, read_index, read_settings
from data_quality import on_training_grid
from files import entry_of, list_files
from mrc import MAP_SUFFIXES, read_map
from volume import CLIP, GreyScale, center_crop, cube, density_mask, normalise, rotate


class Volume(NamedTuple):
    """A map to train on, scaled to 0..1: a tensor (n, n, n), or the .npy file that holds it."""

    label: str
    density: Tensor | Path
    notes: tuple[str, ...] = ()  # on the background and the sign that were taken out of it

    def voxels(self) -> np.ndarray:
        """(n, n, n). Of a file, only the pages that a crop needs are read."""
        # A file is opened for each crop, because thousands of files would not stay open.
        if isinstance(self.density, Path):
            return np.load(self.density, mmap_mode="r")
        return self.density.numpy()


def prepared_files(folder: Path, voxel_size: float, percentiles=CLIP) -> list[Path]:
    """The .npy files of a folder that data_prepare made, one per entry that was not skipped.

    Raises ValueError if the folder was prepared for another voxel size or other percentiles.
    """
    # The settings say for what voxel size, and how densities were clipped.
    settings = read_settings(folder)
    clipped = tuple(settings.get("percentiles", CLIP))
    if clipped != percentiles:
        raise ValueError(
            f"{folder}: prepared with percentiles {clipped}, wanted are {percentiles}; "
            "--literal-percentiles must be given to both data_prepare.py and train.py, or neither"
        )
    made_for = settings["voxel_size"]
    if made_for != voxel_size:
        raise ValueError(
            f"{folder}: prepared at {made_for:g} Å per voxel, wanted are {voxel_size:g}; "
            "give another --data or --voxel-size"
        )
    return [folder / f"{row['entry']}.npy" for row in read_index(folder) if not row["skipped"]]


def read_cube(
    file: Path, voxel_size: float, box: int | None, percentiles=CLIP
) -> tuple[Tensor, tuple[str, ...]]:
    """A deposited map on the grid of voxel_size (Å), scaled to 0..1: (n, n, n) float16; notes.

    Raises ValueError if its voxels are too coarse, or if it holds hardly any density or, with
    `box`, none in its middle.
    """
    # Resample, scale to 0..1 and pad to a cube.
    density, statistics = cube(on_training_grid(read_map(file), voxel_size).density, percentiles)
    if box and center_crop(density, min(box, len(density))).max() <= 0.1:
        raise ValueError(f"hardly any density in the middle {box} voxels; centre it first")
    grey = GreyScale(statistics["background"], statistics["sign"])
    return density, tuple(grey.notes)


def read_volumes(
    path: str | Path, voxel_size: float, box: int | None = None, percentiles=CLIP
) -> tuple[list[Volume], list[str]]:
    """The maps of a folder (or one file) on the grid of voxel_size (Å), and a line per refused map.

    A prepared folder is mapped into memory. Any other map is read and resampled, 2 bytes per voxel.
    A map is refused if it cannot be read, or is no density above a background (volume.cube). With
    `box`, its middle must hold some (not checked where prepared). percentiles: as in volume.CLIP.
    Raises ValueError if the folder was prepared for another voxel size or other percentiles.
    """
    # A folder that data_prepare made says so by its settings.
    path = Path(path)
    prepared = (path / SETTINGS).exists()
    if prepared:
        files = prepared_files(path, voxel_size, percentiles)
    else:
        files = list_files(path, MAP_SUFFIXES)

    # One bad file must not stop the others: note why it is left out.
    volumes = []
    refused = []
    for file in files:
        notes = ()
        try:
            if prepared:
                x = np.load(file, mmap_mode="r")  # raises if the file is missing or cut short
                if x.ndim != 3 or x.size == 0 or x.dtype != np.float16:
                    raise ValueError(f"{x.dtype} {x.shape}, not a prepared map; prepare it again")
                density = file
            else:
                density, notes = read_cube(file, voxel_size, box, percentiles)
        except (ValueError, OSError, EOFError) as error:  # EOFError: an empty .npy
            refused.append(str(error) if str(file) in str(error) else f"{file}: {error}")
        else:
            volumes.append(Volume(entry_of(file), density, notes))
    return volumes, refused


@dataclass(eq=False, kw_only=True)
class MapCrops(RandomItems):
    """Training crops from maps, `Volume`s: item i is (crops, 1, D, D, D) in network scale.

    All crops of an item come from one map, each at an orientation of its own.
    center=False, as CryoFM-S: each crop lies around a random voxel of `density_mask`.
    center=True, as CryoFM-L: each crop is the centre of the map, cut out and then rotated (F.1).
    augmentation: "so3" turns a crop by any rotation, "rot24" to one of 24 orientations along the
    axes, "random" not at all. "center" is the centre of the map, not turned.

    With rotate_later, items of "so3" are the arguments of `rotate_windows`, so that a GPU rotates a
    whole batch at once: windows (crops, 1, S, S, S) and rotations (crops, 3, 3).
    """

    crop: int
    crops: int
    mean: float
    std: float
    center: bool = False
    augmentation: str = "so3"
    cubic: bool = False  # interpolate by B-splines (CryoFM-S), or trilinearly (CryoFM-L)
    rotate_later: bool = False

    def __post_init__(self):
        if self.augmentation not in AUGMENTATIONS:
            names = ", ".join(AUGMENTATIONS)
            raise ValueError(f"augmentation {self.augmentation!r}: choose {names}")

    def draw(self, volume: Volume, generator: Generator) -> Tensor | tuple[Tensor, Tensor]:
        x = volume.voxels()
        center = self.center or self.augmentation == "center"
        turned = self.augmentation == "so3"

        # A rotated crop can show voxels as far as its half diagonal. 10 more voxels let the
        # coefficients of the spline settle.
        side = self.crop
        if turned and not center:
            side = 2 * math.ceil((math.sqrt(3) * self.crop + 10) / 2)

        # Departure 1: cut a window for each crop out of the map, then rotate only the window.
        windows = []
        for _ in range(self.crops):
            centre = [n // 2 for n in x.shape] if center else random_centre(x, generator)
            windows.append(window(x, centre, side))
        if self.augmentation == "rot24":
            windows = [rot24(part, generator) for part in windows]
        windows = torch.stack(windows)[:, None]  # (crops, 1, side, side, side)
        if not turned:
            return self.to_network_scale(windows.float())

        # Each is rotated by a random rotation of its own.
        rotations = torch.stack([random_rotation(generator) for _ in range(self.crops)])
        if self.rotate_later:
            return windows, rotations
        return self.rotate_windows(windows, rotations)

    def rotate_windows(self, windows: Tensor, rotations: Tensor) -> Tensor:
        """Windows (..., 1, n, n, n) and rotations (..., 3, 3) -> crops (..., 1, D, D, D)."""
        # (..., 1, n, n, n) -> (all crops, 1, n, n, n)
        flat = windows.flatten(0, -5).float()
        x = rotate(flat, rotations.flatten(0, -3), self.crop, self.cubic)
        x = self.to_network_scale(x)
        return x.view(*windows.shape[:-3], *x.shape[-3:])

    def to_network_scale(self, x: Tensor) -> Tensor:
        # Clamp, because a spline overshoots.
        return (x.clamp(0, 1) - self.mean) / self.std


@dataclass(eq=False, kw_only=True)
class SimulatedCrops(RandomItems):
    """Training crops from models, `Structure`s: item i is (crops, 1, D, D, D) in network scale.

    All crops of an item come from one simulated map of box^3 voxels, normalised as a whole. Three
    crops in four are cut around a voxel of the molecule, the others anywhere.
    """

    crop: int
    crops: int
    box: int
    mean: float
    std: float
    voxel_size: float = 1.5  # Å
    resolution: tuple[float, float] = (2.5, 4.0)  # Å
    as_deposited: float = 0.0  # share of maps, see `random_density`

    def draw(self, structure: Structure, generator: Generator) -> Tensor:
        # Simulate a map and bring it to network scale.
        density = random_density(
            structure,
            generator,
            box=self.box,
            voxel_size=self.voxel_size,
            resolution=self.resolution,
            as_deposited=self.as_deposited,
        )
        x, _ = normalise(density, self.mean, self.std)
        molecule = density_mask(x * self.std + self.mean)

        # Cut the crops out of it.
        crops = []
        for _ in range(self.crops):
            mask = molecule if torch.rand((), generator=generator) < 0.75 else None
            crops.append(random_crop(x, self.crop, generator, mask))
        return torch.stack(crops)[:, None]
