"""sampling_choice.py: a map gets the shipped prior that was trained on voxels like its own."""

import pytest
import torch

import checkpoint
import sampling_choice
from fourier import lowpass
from mrc import Map
from report import silent


def noise(seed: int) -> torch.Tensor:
    return torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(seed))


def half_maps(limit: float) -> list[Map]:
    """Two halves with the same detail up to `limit` Å, and white noise of their own."""
    shared = 10 * lowpass(noise(0), limit, 1.5)
    return [Map(shared + noise(seed), 1.5) for seed in (1, 2)]


@pytest.mark.parametrize(
    "maps, name",
    [
        ([], "hdit_tiny.pt"),
        ([Map(noise(0), 1.5)], "hdit_tiny.pt"),
        ([Map(noise(0), 2.1)], "hdit_tiny.pt"),
        ([Map(noise(0), (1.5, 1.5, 3.0))], "hdit_tiny_l.pt"),
        ([Map(noise(0), 5.2)], "hdit_tiny_l.pt"),
        (half_maps(4.0), "hdit_tiny.pt"),
        (half_maps(8.0), "hdit_tiny.pt"),
        (half_maps(20.0), "hdit_tiny_l.pt"),
        ([Map(noise(0), 1.5), Map(noise(1)[1:], 1.5)], "hdit_tiny.pt"),  # the task refuses them
    ],
)
def test_coarse_voxels_and_coarse_half_maps_get_the_coarse_prior(maps, name):
    said = []
    assert sampling_choice.shipped_prior(maps, said.append).name == name
    assert len(said) == (name == "hdit_tiny_l.pt")


def test_voxels_that_no_prior_knows_are_left_to_the_task_to_speak_of():
    said = []
    sampling_choice.shipped_prior([Map(noise(0), 7.0)], said.append)
    assert not said


def test_each_network_is_read_once_and_a_named_one_is_taken_for_every_map(monkeypatch):
    read = []
    monkeypatch.setattr(checkpoint, "load", lambda path, **_: read.append(path))
    networks = sampling_choice.Networks(None, "", silent)
    paths = [networks.for_maps([Map(noise(0), size)])[0].name for size in (1.5, 3.0, 1.5)]
    assert paths == ["hdit_tiny.pt", "hdit_tiny_l.pt", "hdit_tiny.pt"] and len(read) == 2
    networks = sampling_choice.Networks("mine.pt", "", silent)
    assert networks.for_maps([Map(noise(0), 3.0)])[0].name == "mine.pt"
