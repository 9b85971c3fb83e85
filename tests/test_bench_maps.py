"""What bench_maps.py promises: the network's calls are told from the rest. No speed is tested."""

import pytest
import torch

import bench_maps
from checkpoint import Prior


def test_the_time_of_the_networks_calls_is_counted_apart(monkeypatch):
    def one_second(function, device):
        function()
        return 1.0

    # 4^3 tiles in calls of 8; sliding windows of 8 every 12 voxels would leave gaps, so every 4.
    monkeypatch.setattr(bench_maps, "seconds", one_second)
    monkeypatch.setattr(bench_maps, "STRIDE", 4)
    device = torch.device("cpu")
    for task, side, calls, steps in (("wedge", 32, 8, 4), ("sharpen", 16, 7, 1)):
        net = bench_maps.Timed(bench_maps.Identity(), device)
        prior = Prior(net, "hdit", 1.5, 8, 0.0, 1.0, sha256="")
        row = bench_maps.measure_map(task, prior, side, device)
        assert (row["s"], row["network s"]) == (1 / steps, calls)
        assert row["ratio"] == pytest.approx(1 / steps / calls)


def test_the_exponent_of_a_cost_that_goes_with_the_voxels_is_one():
    assert bench_maps.exponent([2, 4, 8], [8, 64, 512]) == pytest.approx(1)
    assert bench_maps.exponent([2, 4], [4, 16]) == pytest.approx(2 / 3)
