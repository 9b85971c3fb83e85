"""What a restoration costs beside its network: time and memory against the size of the map.

    ratio  = time of a step / time of the network's calls in it                                (1)
    beyond = (peak of a step - before it - what a call of the network adds) / one float32 map  (2)
    exponent = slope of the logarithm of a cost against that of the number of voxels           (3)

A step is one of WEDGE_STEPS of `posterior.sample_posterior` for one sample of a missing wedge (a
run has 20), or a whole pass of `sliding_windows`. (1) is a ratio within one process, so a busy
machine disturbs it less than the times. The identity takes the place of the network where only the
rest is to be measured: the network's time goes with the number of tiles, and 512^3 voxels have
4,096 of them.
"""

import math
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import degrade
import fourier
import posterior
from bench_peers import seconds
from checkpoint import Prior
from memory import GIB
from sliding_windows import sliding_windows

STRIDE = 12  # of sampling_settings.NetworkSettings
WEDGE_STEPS = 4


class Timed(nn.Module):
    """A network that adds up the seconds of its calls."""

    def __init__(self, net: nn.Module, device: torch.device):
        super().__init__()
        self.net = net
        self.device = device
        self.seconds = 0.0

    def forward(self, *inputs: Tensor) -> Tensor:
        answers = []
        self.seconds += seconds(lambda: answers.append(self.net(*inputs)), self.device)
        return answers[0]


class Identity(nn.Module):
    """Takes the place of a velocity or a fine-tuned network."""

    def forward(self, x: Tensor, *_) -> Tensor:
        return x.clone()


def wedge_steps(prior: Prior, side: int, device: torch.device):
    """A function without arguments: steps of one sample of a map of side^3 voxels. How many."""
    # What the numbers are does not matter.
    y = torch.randn(side, side, side, device=device)
    measured = fourier.hermitian_part(degrade.wedge_mask(y.shape)).to(device)
    observation = posterior.Observation(y, measured, 0.0, y)

    def take_steps() -> Tensor:
        generators = [Generator().manual_seed(0)]
        return posterior.sample_posterior(
            prior, observation, generators, steps=WEDGE_STEPS, t_start=0.5, inner=2
        )

    return take_steps, WEDGE_STEPS


def sharpen_pass(prior: Prior, side: int, device: torch.device):
    """A function without arguments: a pass of sliding windows over side^3 voxels. How many."""
    x = torch.rand(side, side, side, device=device)

    def pass_over() -> Tensor:
        return sliding_windows(prior.net, x, prior.box, STRIDE)

    return pass_over, 1


STEPS = {"wedge": wedge_steps, "sharpen": sharpen_pass}


def memory_of_process(which: str, reset: bool = False) -> float:
    """GiB of this process: "VmRSS" now, "VmHWM" at its peak; nan where the system does not say.

    reset: let the peak begin anew.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) / 2**20


def measure_map(task: str, prior: Prior, side: int, device: torch.device) -> dict:
    """A row: seconds of a step, of the network in it, (1) and (2). prior.net is a Timed."""
    take_steps, count = STEPS[task](prior, side, device)
    warm_up, _ = STEPS[task](prior, 2 * prior.box, device)
    with torch.no_grad():
        # A small map takes one call of the network of full size, and warms up.
        before = memory_of_process("VmHWM", reset=True)
        warm_up()
        call = memory_of_process("VmHWM") - before

        # The step itself.
        prior.net.seconds = 0.0
        before = memory_of_process("VmRSS", reset=True)
        whole = seconds(take_steps, device) / count
    network = prior.net.seconds / count
    beyond = memory_of_process("VmHWM") - before - call
    row = {"map": f"{side}^3", "s": whole, "us per voxel": 1e6 * whole / side**3}
    row |= {"network s": network, "ratio": whole / network}  # (1)
    return row | {"maps beyond a call": beyond * GIB / (4 * side**3)}  # (2)


def exponent(sides: list[int], costs: list[float]) -> float:
    """(3) by least squares, for at least two sides."""
    x = torch.tensor(sides, dtype=torch.float64).pow(3).log()
    y = torch.tensor(costs, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
