"""A fine-tuned network on a map of any size: CryoLVM Algorithm 1.

    M = sum_k w f(x_k) / sum_k w                                                              (1)

The network f answers cubes x_k of its box, one every `stride` voxels. The answers are fused under a
window w. (1): CryoLVM appendix D.2; appendix G.4 compares strides and the plain mean.
"""

import math

import torch
from torch import Tensor

import flow
import volume


def mean_window(box: int) -> Tensor:
    return torch.ones(box, box, box)


WINDOWS = {"gaussian": volume.gaussian_window, "mean": mean_window}


@torch.no_grad()
def sliding_windows(
    net,
    x: Tensor,
    box: int,
    stride: int,
    fusion: str = "gaussian",
    *,
    tiles_per_call: int = 4,
    progress=iter,
) -> Tensor:
    """(1) for one map (D, H, W) of any size in network scale.

    net: (B, 1, box, box, box) -> the same. fusion: a key of WINDOWS. progress: takes the list of
    calls and yields them. Short sides are padded with solvent, 0, and cut again. Tiles that hold
    only solvent are computed, too, because the network's answer to them is not 0. Memory is that
    of five maps and of one call. Raises ValueError if the stride leaves gaps.
    """
    # Cut the padded map into tiles, which begin at these corners.
    padded = volume.pad(x, box)
    corners = volume.tile_starts(padded.shape, box, stride)

    # Calls of about equal size, because torch on a CPU would use a slow convolution for a last call
    # of one tile.
    count = math.ceil(len(corners) / tiles_per_call)
    bounds = [i * len(corners) // count for i in range(count + 1)]
    calls = [corners[first:last] for first, last in zip(bounds, bounds[1:])]

    # Cut, answer and fuse the tiles call by call, so that memory holds the tiles of one call.
    def answers():
        for call in progress(calls):
            tiles = volume.cut_tiles(padded, call, box)[:, None]  # (B, 1, box, box, box)
            with flow.autocast(x.device):
                batch = net(tiles)[:, 0]
            yield from batch.float()

    fused = volume.blend_tiles(answers(), corners, padded.shape, WINDOWS[fusion](box))
    # Cut the padding off. `volume.pad` put voxel n // 2 of x at voxel m // 2 of the padded map.
    for dim, (n, m) in enumerate(zip(x.shape, padded.shape)):
        fused = fused.narrow(dim, m // 2 - n // 2, n)
    return fused
