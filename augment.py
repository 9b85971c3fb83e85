"""Random crops and orientations, each a function of a seed.

Volumes are (D, H, W) = (z, y, x); "..." stands for any dimensions before these. Crops and
rotations are those of CryoFM (arXiv:2410.08631), appendix F.1. Orientations with reflections are
those of CryoLVM, appendix E.

Departure 1: CryoFM's release turns a whole map, normalises it again and crops it. We normalise
once, choose the middle of the crop first, and turn only what the crop shows. So a crop of 64^3 from
a map of 384^3 costs 4 MB of reading, not 113 MB, and 216 times fewer interpolated voxels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from volume import ROTATIONS_24, crop

# How training crops of maps are cut and turned (CryoFM, F.1): data.MapCrops.
AUGMENTATIONS = ("center", "random", "rot24", "so3")

ENDLESS = 2**62  # the length of a data set in which every index is another crop
COUNTED = 1_000_003  # the first items of a seed, whose streams count up from seed * COUNTED
HELD_OUT = 2**31  # added to a seed, it gives the seed of the held-out items


# ---- Random numbers --------------------------------------------------------------------------


def item_generator(seed: int, i: int) -> Generator:
    """The generator of item i of a data set, or of sample i of a prior.

    The item depends on seed and i alone, not on the worker or the order of drawing. Of the number
    that starts a generator torch uses the low 32 bits, so there are 2^32 streams. Those of a seed
    fill half of this circle: seed and seed + HELD_OUT never share a stream, whatever their items.
    """
    # The first items count up.
    start = seed * COUNTED
    if i < COUNTED:
        return Generator().manual_seed((start + i) % 2**63)
    # Counting on would give item 0 of seed + 1. Scatter the items over the rest of the half.
    offset = COUNTED + splitmix64(splitmix64(seed) + i) % (HELD_OUT - COUNTED)
    return Generator().manual_seed((start + offset) % 2**63)


def splitmix64(x: int) -> int:
    """64 bits in which each bit of x has changed half of the bits (Steele et al. 2014).

    Numbers that differ by little, such as counted items, come out unrelated.
    """
    # A step along the sequence, then two rounds of shift and multiply.
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def randint(high: int, generator: Generator) -> int:
    """One of 0 ... high - 1."""
    return int(torch.randint(high, (), generator=generator))


# ---- Orientations ----------------------------------------------------------------------------


def random_rotation(generator: Generator) -> Tensor:
    """A rotation matrix (3, 3), uniform over SO(3): from a quaternion of uniform direction."""
    # Four Gaussian numbers have no preferred direction.
    q = torch.randn(4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm()).tolist()
    # The rotation matrix of the quaternion w + x i + y j + z k, row by row.
    entries = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.tensor(entries).view(3, 3)


def rot24(x: Tensor, generator: Generator) -> Tensor:
    """x (..., D, H, W) in one of its 24 orientations along the axes, all equally likely (F.1)."""
    # Permute the spatial axes, which come last, then flip some.
    order, signs = ROTATIONS_24[randint(24, generator)]
    first = x.ndim - 3
    x = x.permute(*range(first), *(first + axis for axis in order))
    return x.flip([first + axis for axis in range(3) if signs[axis] < 0])


def mirror_or_not(x: Tensor, generator: Generator) -> Tensor:
    """x (..., D, H, W) in one of all 48 orientations along the axes, reflections included."""
    x = rot24(x, generator)
    # Every reflection is a rotation after one mirror.
    reflect = torch.rand((), generator=generator) < 0.5
    return x.flip(-1) if reflect else x


def flip(x: Tensor, generator: Generator) -> Tensor:
    """x (..., D, H, W), mirrored or not along each axis (CryoLVM, appendix E).

    All 8 are equally likely, and each keeps a missing wedge of a symmetric tilt range in its place.
    """
    mirrored = torch.rand(3, generator=generator) < 0.5
    return x.flip([x.ndim - 3 + axis for axis in range(3) if mirrored[axis]])


# ---- Crops -----------------------------------------------------------------------------------


def random_crop(x: Tensor, box: int, generator: Generator, mask: Tensor | None = None) -> Tensor:
    """A cube of x (..., D, H, W) around a random voxel of mask (D, H, W), shifted to lie inside.

    Without a mask, every position is equally likely (F.1).
    Raises ValueError if the mask is empty or x is smaller than the cube.
    """
    sides = x.shape[-3:]
    if mask is None:
        # Draw the corner.
        corner = [randint(max(n - box, 0) + 1, generator) for n in sides]
        return crop(x, corner, box)

    # Draw the middle among the voxels of the mask.
    voxels = mask.flatten().nonzero()
    if len(voxels) == 0:
        raise ValueError("no voxel to centre the random crop on; lower the mask's threshold")
    voxel = int(voxels[randint(len(voxels), generator)])
    centre = np.unravel_index(voxel, sides)

    # Move the cube inside the map.
    corner = [max(min(int(c) - box // 2, n - box), 0) for c, n in zip(centre, sides)]
    return crop(x, corner, box)


def random_centre(x: np.ndarray, generator: Generator, tries: int = 200_000) -> list[int]:
    """A voxel (z, y, x) of x's `density_mask`, all equally likely, without reading the whole map.

    By rejection: a voxel is in the mask if one of the 7^3 around it is above the threshold.
    Raises ValueError if none of `tries` random voxels was in the mask.
    """
    for _ in range(tries):
        # In a file that is mapped into memory, this reads a few pages.
        centre = [randint(n, generator) for n in x.shape]
        around = tuple(slice(max(c - 3, 0), c + 4) for c in centre)
        if x[around].max() > 0.1:
            return centre
    raise ValueError("hardly any voxel to centre the random crop on; leave this map out")


def window(x: np.ndarray, centre: Iterable[int], side: int) -> Tensor:
    """side^3 voxels of x, 0 outside of it: voxel `centre` becomes voxel side // 2 (Departure 1).

    float16 if x is, float32 otherwise.
    """
    kind = torch.float16 if x.dtype == np.float16 else torch.float32
    out = torch.zeros((side, side, side), dtype=kind)

    # The slices of the voxels that x and the window share, in each of the two.
    in_x = []
    in_window = []
    for c, n in zip(centre, x.shape):
        first = c - side // 2
        start = max(first, 0)
        stop = min(first + side, n)
        in_x.append(slice(start, stop))
        in_window.append(slice(start - first, stop - first))
    out.numpy()[tuple(in_window)] = x[tuple(in_x)]
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
        # Draw the entry and all that is random about the item from one generator.
        generator = item_generator(self.seed, i)
        entry = self.entries[randint(len(self.entries), generator)]
        return self.draw(entry, generator)
