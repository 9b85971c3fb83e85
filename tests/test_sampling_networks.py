"""sampling_networks.py: what is said of the shipped fine-tuned networks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
from sampling_networks import ask_network
from sampling_settings import NetworkSettings

WEIGHTS = Path(__file__).parent.parent / "weights"


@pytest.mark.parametrize("task", ["sharpen", "superres"])
def test_known_losses_are_said_of_the_shipped_network_alone(task):
    shipped = checkpoint.load(WEIGHTS / f"scunet_tiny_{task}.pt", kind="scunet")
    # The answer does not matter here.
    shipped = replace(shipped, net=torch.nn.Identity())
    density = torch.rand(24, 24, 24, generator=torch.Generator().manual_seed(0))

    for network in (shipped, replace(shipped, sha256="0" * 64)):
        said = []
        ask_network(density, network, NetworkSettings(), said.append)
        is_said = any("on 16 deposited maps" in line for line in said)
        assert is_said == (network is shipped)
