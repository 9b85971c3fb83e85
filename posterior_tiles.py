"""The prior on a map of any size: its velocity by tiles, drawn anew at every step.

    v(x, t) = sum_i T_i v(T_i^-1 x, t) / (number of tiles that cover a voxel)                 (1)

T_i puts a tile, a cube of the prior's box, in its place on the map, in one of the 24 orientations
along the axes. Maps are periodic, as their Fourier transforms are. Ours: Departure 2 of
posterior.py.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.utils.checkpoint
from torch import Generator, Tensor

import augment
import flow
import volume
from checkpoint import Prior


class Tile(NamedTuple):
    """A cube of a periodic map, seen in one of the 24 orientations along the axes."""

    number: int  # of its map
    # Slices of the map, and where they lie in the tile: 1 pair of slices, or up to 8 where the tile
    # goes on at the other end of the periodic map.
    pieces: list[tuple[tuple[slice, ...], tuple[slice, ...]]]
    order: tuple[int, int, int]  # of its axes, for permute
    flips: list[int]  # axes to flip after that


def solvent_around(
    prior: Prior, x: Tensor, t: float, generators: list[Generator]
) -> tuple[Tensor, tuple[slice, ...]]:
    """Maps x (K, D, H, W) at time t with every side at least the prior's box, and where x is.

    Solvent at time t is around them, with fresh noise. Copies of the map would be there otherwise,
    because tiles are periodic.
    """
    sides = [max(n, prior.box) for n in x.shape[1:]]
    before = [side // 2 - n // 2 for side, n in zip(sides, x.shape[1:])]
    inside = (slice(None), *(slice(b, b + n) for b, n in zip(before, x.shape[1:])))
    if list(x.shape[1:]) == sides:
        return x, inside

    no_density = -prior.mean / prior.std
    around = (1 - t) * no_density + t * flow.draw_noise(generators, sides, x.device)
    around[inside] = x
    return around, inside


def draw_tiles(
    shape: torch.Size, box: int, generators: list[Generator], turned: bool = True
) -> tuple[list[Tile], list[list[Tensor]]]:
    """Tiles that cover maps (D, H, W), one map per generator, with as little overlap as fits.

    Also how many tiles cover each voxel: for each map three factors, along z, y and x.

    They begin at a random corner and have a random orientation. Both are drawn anew at every call,
    so that no seam stays in one place. Along a side shorter than the box, whose tile is that of
    `solvent_around`, the tile begins where it does not cut the map in two.
    turned: False leaves a map that fits into one tile as it is.
    """
    turned = turned or max(shape) > box
    tiles, covers = [], []
    for number, generator in enumerate(generators):
        axes, cover = [], []
        # The starts along each axis, spread evenly around the periodic map.
        for n in shape:
            side = max(n, box)
            count = math.ceil(n / box)
            first = 0
            if turned and n < box:
                before = box // 2 - n // 2
                first = before - augment.randint(box - n + 1, generator)
            elif turned:
                first = augment.randint(n, generator)
            starts = [(first + i * n // count) % side for i in range(count)]
            axes.append([periodic_slices(start, box, side) for start in starts])
            voxels = torch.tensor(starts)[:, None] + torch.arange(box)
            cover.append((voxels % side).flatten().bincount(minlength=side))

        # One orientation for the whole map.
        order, signs = (0, 1, 2), (1, 1, 1)
        if turned:
            order, signs = volume.ROTATIONS_24[augment.randint(24, generator)]
        flips = [axis - 3 for axis in range(3) if signs[axis] < 0]
        for axis_slices in itertools.product(*axes):
            pieces = [tuple(zip(*piece)) for piece in itertools.product(*axis_slices)]
            tiles.append(Tile(number, pieces, order, flips))
        covers.append(cover)
    return tiles, covers


def periodic_slices(start: int, length: int, side: int) -> list[tuple[slice, slice]]:
    """Where a tile lies on a periodic axis: slices of the axis and of the tile, one pair or two."""
    inside = min(length, side - start)
    slices = [(slice(start, start + inside), slice(0, inside))]
    if inside < length:
        slices.append((slice(0, length - inside), slice(inside, length)))
    return slices


def tiled_velocity(
    prior: Prior,
    x: Tensor,
    t: float,
    generators: list[Generator],
    tiles_per_call: int = 8,
    turned: bool = True,
) -> Tensor:
    """v(x, t) for maps x (K, D, H, W) of any size, by tiles of the prior's box (1).

    x is in network scale; each map has its own generator, which draws its tiles. Around a side
    shorter than the box is solvent. turned: of `draw_tiles`.
    """
    tiles, covers = draw_tiles(x.shape[1:], prior.box, generators, turned)
    x, inside = solvent_around(prior, x, t, generators)
    total = torch.zeros_like(x)
    for i in range(0, len(tiles), tiles_per_call):
        part = tiles[i : i + tiles_per_call]
        # Cut the tiles out, in their orientation, and ask the network.
        views = [cut_tile(x, tile, prior.box) for tile in part]
        batch = torch.stack(views)[:, None]  # (tiles, 1, box, box, box)
        times = torch.full((len(part),), t, device=x.device)
        with flow.autocast(x.device):
            if x.requires_grad:
                # The gradient of posterior.py (7) computes each batch again, so that memory holds
                # one batch at a time.
                v = torch.utils.checkpoint.checkpoint(prior.net, batch, times, use_reentrant=False)
            else:
                v = prior.net(batch, times)

        # Turn each velocity back and add it where its tile came from.
        for tile, velocity in zip(part, v[:, 0]):
            inverse = [tile.order.index(axis) for axis in range(3)]
            velocity = velocity.flip(tile.flips).permute(inverse)
            for of_map, of_tile in tile.pieces:
                total[tile.number][of_map].add_(velocity[of_tile])

    # Take the mean where tiles overlap.
    for number, (along_z, along_y, along_x) in enumerate(covers):
        for factor in (along_z[:, None, None], along_y[:, None], along_x):
            total[number].div_(factor.to(x))
    return total[inside]


def cut_tile(x: Tensor, tile: Tile, box: int) -> Tensor:
    """A tile (box, box, box) of maps x (K, D, H, W), in its orientation."""
    cube = x.new_empty(box, box, box)
    for of_map, of_tile in tile.pieces:
        cube[of_tile] = x[tile.number][of_map]
    return cube.permute(tile.order).flip(tile.flips)
