"""Random crops and orientations, each a function of a seed.

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
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from volume import ROTATIONS_24, crop

ENDLESS = 2 ** 62                                       # items: every index is another crop


def item_generator(seed: int, i: int) -> Generator:
    """What item i of a dataset, or sample i of a prior, is drawn with: the same whoever draws it, and whenever."""
    return Generator().manual_seed((seed * 1_000_003 + i) % 2 ** 63)


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def randint(high: int, generator: Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


def random_rotation(generator: Generator) -> Tensor:
    """A rotation matrix (3, 3), uniform over SO(3): from a quaternion of uniform direction."""
    q = torch.randn(4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm()).tolist()
    return torch.tensor([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                         [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                         [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def rot24(x: Tensor, generator: Generator) -> Tensor:
    """x (..., D, H, W) in one of its 24 orientations along the axes, all equally likely (F.1)."""
    order, signs = ROTATIONS_24[randint(24, generator)]
    x = x.permute(*range(x.ndim - 3), *(axis - 3 + x.ndim for axis in order))
    return x.flip([axis - 3 for axis in range(3) if signs[axis] < 0])


def mirror_or_not(x: Tensor, generator: Generator) -> Tensor:
    """x (..., D, H, W) in one of all 48 orientations along the axes: flips and 90-degree rotations (CryoLVM, appendix E)."""
    x = rot24(x, generator)
    return x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x


def random_crop(x: Tensor, box: int, generator: Generator, mask: Tensor | None = None) -> Tensor:
    """A cube of x (..., D, H, W) around a random voxel of mask (D, H, W), moved inside (F.1).

    Without a mask every position is equally likely.
    Raises ValueError if the mask is empty or x smaller than the cube.
    """
    sides = x.shape[-3:]
    if mask is None:
        return crop(x, [randint(max(n - box, 0) + 1, generator) for n in sides], box)
    voxels = mask.flatten().nonzero()
    if len(voxels) == 0:
        raise ValueError("no voxel to centre the random crop on; lower the mask's threshold")
    centre = np.unravel_index(int(voxels[randint(len(voxels), generator)]), sides)
    return crop(x, [max(min(int(c) - box // 2, n - box), 0) for c, n in zip(centre, sides)], box)


def random_centre(x: np.ndarray, generator: Generator, tries: int = 1_000_000) -> list[int]:
    """A voxel (z, y, x) of `density_mask`, all equally likely, without looking at all of the map x.

    By rejection: a voxel is in the mask where one of the 7^3 around it is above the threshold.
    Raises ValueError if none of so many was.
    """
    for _ in range(tries):
        c = [randint(n, generator) for n in x.shape]
        if x[tuple(slice(max(i - 3, 0), i + 4) for i in c)].max() > 0.1:
            return c
    raise ValueError("hardly any voxel to centre the random crop on; leave this map out")


def window(x: np.ndarray, centre: Iterable[int], side: int) -> Tensor:
    """side^3 voxels of x, voxel `centre` becoming voxel side // 2; 0 outside of x. In the type of x."""
    out = torch.zeros((side,) * 3, dtype=torch.float16 if x.dtype == np.float16 else torch.float32)
    first = [c - side // 2 for c in centre]
    there = [(max(f, 0), min(f + side, n)) for f, n in zip(first, x.shape)]
    here = tuple(slice(a - f, b - f) for (a, b), f in zip(there, first))
    out.numpy()[here] = x[tuple(slice(a, b) for a, b in there)]
    return out


@dataclass(eq=False)
class RandomItems(torch.utils.data.Dataset):
    """An endless data set: item i is drawn from a random entry, and is a function of (seed, i).

    A data set is a dataclass that adds its settings and `draw(entry, generator)`, which returns
    an item. `entries` is any sequence.
    """

    entries: Sequence
    _: KW_ONLY
    seed: int = 0

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int):
        generator = item_generator(self.seed, i)
        entry = self.entries[randint(len(self.entries), generator)]
        return self.draw(entry, generator)
