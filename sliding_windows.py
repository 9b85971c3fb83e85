"""A fine-tuned network on a map of any size: CryoLVM Algorithm 1.

    M = sum_k w f(x_k) / sum_k w                                data.py (6)                                     (10)
"""
import math

import torch.utils.checkpoint
from torch import Tensor

import flow
import volume

WINDOWS = {"gaussian": volume.gaussian_window, "mean": lambda box: torch.ones(box, box, box)}


@torch.no_grad()
def sliding_windows(net, x: Tensor, box: int, stride: int, fusion: str = "gaussian", *, tiles_per_call: int = 4,
                    progress=iter) -> Tensor:
    """(10) for one map (D, H, W) of any size in network scale: what `net`, (B, 1, box, box, box) -> the same, makes of it.

    fusion: a key of WINDOWS. progress: takes the list of calls and yields them. Sides shorter than the box are padded with
    solvent, 0, for the time being. Tiles of nothing but solvent are not left out: the network's biases answer them, too.
    Cubes are cut, evaluated and fused call by call: memory is that of five maps and of one call.
    Raises ValueError if the stride leaves gaps.
    """
    padded = volume.pad(x, box)
    corners = volume.tile_starts(padded.shape, box, stride)
    # Calls of equal size: a last one of a single tile would take torch's slow 3-D convolution on a CPU.
    count = math.ceil(len(corners) / tiles_per_call)
    calls = [corners[i * len(corners) // count:(i + 1) * len(corners) // count] for i in range(count)]

    def answers():
        for call in progress(calls):
            with flow.autocast(x.device):
                batch = net(volume.cut_tiles(padded, call, box)[:, None])[:, 0]
            yield from batch.float()
    fused = volume.blend_tiles(answers(), corners, padded.shape, WINDOWS[fusion](box))
    first = [m // 2 - n // 2 for n, m in zip(x.shape, padded.shape)]                    # where data.pad put x
    return fused[tuple(slice(f, f + n) for f, n in zip(first, x.shape))]
