"""What sliding_windows.py promises: CryoLVM's Algorithm 1 on maps of any size."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from made_maps import close, random
from torch import nn

from model_scunet import SCUNet, SCUNetConfig
from sliding_windows import sliding_windows


class Uneven(nn.Module):
    """Its answer depends on the place within the tile and on all of the tile."""

    def forward(self, x):
        place = torch.linspace(-1, 2, x[0].numel()).view(x.shape[1:])
        return x.square() * place + x.mean((1, 2, 3, 4), keepdim=True)


def dense(net, x, box, stride, fusion):
    """Algorithm 1 of CryoLVM in float64, voxel by voxel and tile by tile."""
    middle, sigma = (box - 1) / 2, box / 4
    d2 = sum((axis - middle) ** 2 for axis in np.indices((box,) * 3))
    w = np.ones((box,) * 3)
    if fusion == "gaussian":
        w = np.exp(-d2 / (2 * sigma**2))
        w = 1 + 2 * (w - w.min()) / (w.max() - w.min())
    starts = [sorted({min(i, n - box) for i in range(0, n, stride)}) for n in x.shape]
    total, weight = np.zeros(x.shape), np.zeros(x.shape)
    for corner in itertools.product(*starts):
        part = tuple(slice(i, i + box) for i in corner)
        total[part] += w * net(x[part][None, None].double())[0, 0].numpy()
        weight[part] += w
    return torch.from_numpy(total / weight)


@pytest.mark.parametrize("fusion", ["gaussian", "mean"])
@pytest.mark.parametrize(
    "shape, box, stride",
    [((8, 8, 8), 8, 2), ((9, 13, 16), 8, 3), ((11, 8, 10), 8, 8), ((13, 9, 12), 7, 4)],
)
def test_fusion_equals_the_dense_sum_of_algorithm_1(shape, box, stride, fusion):
    x = random(shape)
    fused = sliding_windows(Uneven(), x, box, stride, fusion)
    assert close(fused, dense(Uneven(), x, box, stride, fusion))


@pytest.mark.parametrize("fusion", ["gaussian", "mean"])
@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 6, 7), (1, 8, 19), (16, 3, 9), (13, 17, 21)])
def test_the_identity_gives_back_any_map(shape, fusion):
    x = random(shape)
    assert close(sliding_windows(nn.Identity(), x, 8, 2, fusion), x, 1e-6)


class Recorder(nn.Module):
    """Calls another network and records something of every batch."""

    def __init__(self, net, record):
        super().__init__()
        self.net, self.record, self.found = net, record, []

    def forward(self, x):
        self.found.append(self.record(x))
        return self.net(x)


def test_a_map_smaller_than_the_box_is_seen_with_solvent_around_it():
    x, net = random((3, 8, 5)), Recorder(Uneven(), torch.clone)
    out = sliding_windows(net, x, 8, 2)
    wanted = torch.zeros(8, 8, 8)
    wanted[3:6, :, 2:7] = x  # voxel n // 2 in the middle, 4
    (seen,) = net.found
    assert torch.equal(seen[0, 0], wanted)
    assert close(out, Uneven()(wanted[None, None])[0, 0, 3:6, :, 2:7])


def test_tiles_per_call_changes_no_result_and_leaves_no_tile_alone():
    torch.manual_seed(0)
    scunet = SCUNet(SCUNetConfig(width=16, depths=(1, 1, 2, 1, 1), d_head=8)).eval()
    x = random((12, 20, 17)).clamp(0, 1)  # 1 * 3 * 3 tiles
    answers = []
    for tiles, sizes in {99: [9], 1: [1] * 9, 2: [1, 2, 2, 2, 2], 8: [4, 5]}.items():
        net = Recorder(Float32(scunet), len)
        answers.append(sliding_windows(net, x, 12, 4, tiles_per_call=tiles))
        assert net.found == sizes
        assert close(answers[-1], answers[0])


class Float32(nn.Module):
    """A network that autocast leaves alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.net(x)


def resident(x=None):
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm (Linux)")
def test_tiles_do_not_pile_up_in_memory():
    x = torch.ones(96, 64, 64)  # 12^2 * 23 tiles of 108 KiB: 350 MiB; a map: 1.5 MiB
    sliding_windows(nn.Identity(), x[:30, :30, :30], 30, 3)
    before = resident()
    net = Recorder(nn.Identity(), resident)
    sliding_windows(net, x, 30, 3)
    assert len(net.found) > 300
    assert max(net.found) - before < 64 * 2**20
