"""What memory.py promises: a refusal with numbers before memory runs out."""

import pytest
import torch
from made_maps import prior_of
from torch import nn

import memory
import mrc
from sampling_networks import sharpen, super_resolve
from sampling_prior import generate, log_likelihood
from sampling_settings import AbInitioSettings, GenerateSettings, LikelihoodSettings
from sampling_tasks import ab_initio


def test_a_grid_is_refused_that_is_too_large_or_that_memory_cannot_hold(monkeypatch):
    map = mrc.Map(torch.ones(36, 20, 9), 10.0)
    with pytest.raises(ValueError, match="36 x 20 x 9 voxels of 10 x 10 x 10 Å to 36000 x.*1024"):
        mrc.resample_map(map, 0.01)
    with pytest.raises(ValueError, match="--voxel-size"):
        mrc.resample_map(map, 1e-300)  # a count that is no float
    monkeypatch.setattr(memory, "free_memory", lambda: 0.5 * memory.GIB)
    assert mrc.resample_map(map, 5.0).density.shape == (72, 40, 18)
    # 720 x 400 x 180 voxels at 16 bytes.
    with pytest.raises(ValueError, match="takes about 0.772 GiB of memory, and 0.5 GiB are free"):
        mrc.resample_map(map, 0.5)


def test_free_memory_is_positive():
    assert memory.free_memory() > 0


@pytest.mark.parametrize("task", [sharpen, super_resolve])
def test_voxels_more_than_twice_the_networks_are_refused(task):
    network = prior_of(nn.Identity(), 12, "scunet", 1.0, 0, 1)
    with pytest.raises(ValueError, match="voxels of 2.1 Å.*give a map of 2 Å at most"):
        task(mrc.Map(torch.ones(12, 12, 12), (1.0, 2.1, 1.0)), network)


def test_settings_that_need_too_much_are_refused_before_the_work(monkeypatch):
    prior = prior_of(nn.Identity(), 16)
    with pytest.raises(ValueError, match=r"4 densities of 100000\^3 voxels.*smaller --box"):
        generate(prior, GenerateSettings(box=100_000))
    with pytest.raises(ValueError, match="samples is 1e\\+09; give 1 to 1000"):
        GenerateSettings(samples=10**9)
    with pytest.raises(ValueError, match="probes is 10001; give 2 to 10,000"):
        LikelihoodSettings(probes=10_001)
    with pytest.raises(ValueError, match="images of 48 Å show no particle that is off by"):
        ab_initio(mrc.Map(torch.ones(9, 32, 32), 1.5), prior, AbInitioSettings(max_shift=25))

    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="4 probes.*fewer --probes"):
        log_likelihood(mrc.Map(torch.ones(16, 16, 16), 1.5), prior, LikelihoodSettings())
