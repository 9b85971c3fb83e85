"""Data sets that train.py reads: crops of maps, simulated crops.

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
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from atoms import Structure, molmap, placed
from augment import ENDLESS, item_generator, randint, random_centre, random_crop, random_rotation, uniform, window
from data_prepare import SETTINGS, read_index
from files import list_files
from mrc import MAP_SUFFIXES, read_map, resample_map
from volume import center_crop, cube, density_mask, normalise, rotate


class Volume(NamedTuple):
    """A map to train on, (4) on 0..1, on the grid of the crops: a tensor (n, n, n), or its .npy file."""
    label: str
    density: Tensor | Path

    def voxels(self) -> np.ndarray:
        """(n, n, n); of a file only the pages that are looked at are read."""
        if isinstance(self.density, Path):              # opened for each crop: thousands would not stay open
            return np.load(self.density, mmap_mode="r")
        return self.density.numpy()


def read_volumes(path: str | Path, voxel_size: float,
                 box: int | None = None) -> tuple[list[Volume], list[str]]:
    """The maps of a folder (or one file) on the grid of voxel_size (Å); and a line for each refused.

    A folder that `prepare` made is mapped into memory, any other read and resampled: 2 bytes per voxel.
    Refused is what cannot be read, has hardly any density or, with `box`, none in its middle (not
    looked at where prepared). Raises ValueError if the folder was prepared for another voxel size.
    """
    path, volumes, refused = Path(path), [], []
    prepared = (path / SETTINGS).exists()
    if prepared:
        made_for = json.loads((path / SETTINGS).read_text())["voxel_size"]
        if made_for != voxel_size:
            raise ValueError(f"{path}: prepared at {made_for:g} Å per voxel, wanted are {voxel_size:g}; "
                             "give another --data or --voxel-size")
        files = [path / f"{row['entry']}.npy" for row in read_index(path) if not row["skipped"]]
    else:
        files = list_files(path, MAP_SUFFIXES)
    for file in files:
        try:
            if prepared:
                np.load(density := file, mmap_mode="r")  # is it there, and whole
            else:
                density = cube(resample_map(read_map(file), voxel_size).density)[0]
                if box and not center_crop(density, min(box, len(density))).max() > 0.1:
                    raise ValueError(f"hardly any density in the middle {box} voxels; centre it first")
        except (ValueError, OSError, EOFError) as error:                       # EOFError: an empty .npy
            refused.append(str(error) if str(file) in str(error) else f"{file}: {error}")
        else:
            volumes.append(Volume(file.name.split(".")[0], density))
    return volumes, refused


class MapCrops(torch.utils.data.Dataset):
    """Training crops from maps: item i is (crops, 1, crop, crop, crop) in network scale.

    A function of (seed, i): a random volume, turned at random, (5). center=False, CryoFM-S: each crop
    around another voxel that `density_mask` would hold. center=True, CryoFM-L: each is the centre of
    the map, cut out and then turned (F.1). cubic: by B-splines (CryoFM-S), or trilinear (CryoFM-L).
    finished=False leaves the turning to `finish`, for a GPU, which does it for a whole batch at once;
    items are then its arguments. Departure 2.
    """
    def __init__(self, volumes: list[Volume], *, crop: int, crops: int, center: bool = False, cubic: bool = False,
                 mean: float, std: float, seed: int = 0, finished: bool = True):
        self.volumes, self.crop, self.crops, self.center, self.cubic = volumes, crop, crops, center, cubic
        self.mean, self.std, self.seed, self.finished = mean, std, seed, finished
        # Voxels per side that a turned crop can show, and some for the spline's coefficients to settle.
        self.window = crop if center else 2 * math.ceil((math.sqrt(3) * crop + 10) / 2)

    def __getitem__(self, i: int) -> Tensor | tuple[Tensor, Tensor]:
        g = item_generator(self.seed, i)
        x = self.volumes[randint(len(self.volumes), g)].voxels()
        windows = []
        for _ in range(self.crops):
            centre = [n // 2 for n in x.shape] if self.center else random_centre(x, g)
            windows.append(window(x, centre, self.window))
        rotations = torch.stack([random_rotation(g) for _ in range(self.crops)])
        parts = torch.stack(windows)[:, None], rotations
        return self.finish(*parts) if self.finished else parts

    def finish(self, windows: Tensor, rotations: Tensor) -> Tensor:
        """Windows (..., 1, n, n, n) and R (..., 3, 3) -> crops (..., 1, crop, crop, crop)."""
        x = rotate(windows.flatten(0, -5).float(), rotations.flatten(0, -3), self.crop, self.cubic)
        x = (x.clamp(0, 1) - self.mean) / self.std      # a spline overshoots
        return x.view(*windows.shape[:-3], *x.shape[-3:])

    def __len__(self) -> int:
        return ENDLESS


def random_density(structure: Structure, generator: Generator, *, box: int, voxel_size: float,
                   resolution: tuple[float, float]) -> Tensor:
    """One simulated map (box, box, box) in Z/Å^3 of a `placed` model; resolution uniform in `resolution` (Å).

    The atoms are turned, not the grid, so no interpolation is involved.
    """
    xyz, b = placed(structure, generator)
    return molmap(xyz, structure.atomic_number, uniform(*resolution, generator), voxel_size=voxel_size,
                  shape=(box,) * 3, origin=-voxel_size * (box // 2), b_factor=b)[0]


class SimulatedCrops(torch.utils.data.Dataset):
    """Training crops from models: item i is (crops, 1, crop, crop, crop) in network scale.

    A function of (seed, i): a random structure's map of box^3 voxels, clipped and normalised as a
    whole, (4); three crops in four are cut around a point of the molecule, the others anywhere.
    `structures` is any sequence of them.
    """
    def __init__(self, structures, *, crop: int, crops: int, box: int, voxel_size: float = 1.5,
                 resolution: tuple[float, float] = (2.5, 4.0), mean: float, std: float,
                 seed: int = 0):
        self.structures, self.crop, self.crops, self.box = structures, crop, crops, box
        self.voxel_size, self.resolution = voxel_size, resolution
        self.mean, self.std, self.seed = mean, std, seed

    def __getitem__(self, i: int) -> Tensor:
        g = item_generator(self.seed, i)
        structure = self.structures[randint(len(self.structures), g)]
        density = random_density(structure, g, box=self.box, voxel_size=self.voxel_size,
                                 resolution=self.resolution)
        x = normalise(density, self.mean, self.std)[0]
        mask = density_mask(x * self.std + self.mean)
        crops = [random_crop(x, self.crop, g, mask if torch.rand((), generator=g) < 0.75 else None)
                 for _ in range(self.crops)]
        return torch.stack(crops)[:, None]

    def __len__(self) -> int:
        return ENDLESS
