"""Tasks of CryoLVM's fine-tuned networks: one pass over a map, by sliding windows.

    network = checkpoint.load("weights/scunet_tiny_sharpen.pt")
    result = sharpen(mrc.read_map("in.mrc"), network)

`ask_network` brings a map to the grey scale that the network was trained on, asks it for the map
that is wanted, and goes back. The missing wedge by a network is `sampling_tasks.fill_wedge`.

CryoLVM: sections 4.2 (sharpen) and 4.3 (superres), appendix D.
Departure 1: D.2 normalises the fused map and does not say by what. We undo D.1, so that the result
has the input's grey scale.
Departure 2: superres learnt from maps that were divided by their own maxima. A map of 1.8 Å is far
more peaked than its input, so undoing D.1 leaves 0.1 to 0.3 of the input's grey scale. We scale the
result to agree with the input where both have detail.
"""

import torch
from torch import Tensor

import fourier
import fsc
import mrc
import posterior
import volume
from checkpoint import Prior
from mrc import Map
from report import Progress, Result
from sampling_checks import check_detail, check_given_maximum
from sampling_grey_scale import in_work_scale
from sampling_settings import NetworkSettings
from sliding_windows import sliding_windows

# Between 5 and 10 Å a network should keep the map. The FSC of result and input was .89 to 1 on 20
# real maps, and .6 to .7 on the two whose results were the worst.
KEPT_BAND = 1 / 10, 1 / 5
LEAST_KEPT = 0.8

# Where shipped networks lose to the classical answer (RESULTS.md, sections 7 and 8), by the SHA-256
# of their files.
KNOWN_LOSSES = {
    "eac69d901da8": "on 16 deposited maps its correlation with the model in the mask was .702 "
    "(deposited .694, negative density set to 0 .710), its Q-score .461 (.484, .478)",
    "d15599e9dd8d": "three quarters of a map of 1.8 Å lie beyond what 4 to 6 Å show, so most of "
    "its detail is a guess; on 16 deposited maps its correlation with the model in the mask was "
    ".647 (a B-factor .632, deposited .694), its Q-score .421 (.483, .484)",
}


@in_work_scale
def sharpen(
    map: Map, network: Prior, settings: NetworkSettings = NetworkSettings(), say=print
) -> Result:
    """Undo the falloff of high frequencies: one pass of the network.

    Raises ValueError if the voxels are far too coarse for the network.
    """
    check_detail(map, network, "another --ckpt, or use fsc.py --sharpen on the half maps")
    work = mrc.resample_map(map, network.voxel_size)
    found, facts = ask_network(work.density, network, settings, say)
    return answer_of_network(map, found, settings, facts, say)


def answer_of_network(
    map: Map, found: Tensor, settings: NetworkSettings, facts: dict, say=print
) -> Result:
    """The Result on the grid of a map, from an answer on the network's grid."""
    y = map.density
    restored = fourier.resample(found, y.shape)
    facts["fsc_with_input_5_to_10"] = kept = agreement_in_band(restored, y, map.voxel_size)
    if kept < LEAST_KEPT:
        say(
            f"warning: between 5 and 10 Å the FSC of result and input is {kept:.2f}, usual is .9 "
            "or more: the network changes what it should keep, this map is unlike those it learnt"
        )
    restored = settings.inside_mask(restored, y)
    return Result(map, {"": restored}, {"input": y, "restored": restored}, facts)


@in_work_scale
def super_resolve(
    map: Map, network: Prior, settings: NetworkSettings = NetworkSettings(), say=print
) -> Result:
    """Find detail beyond the map's resolution. The finer voxel size, its or the network's, is used.

    Raises ValueError if the voxels are far too coarse for the network.
    """
    map = finer_grid(map, network)
    work = mrc.resample_map(map, network.voxel_size)
    found, facts = ask_network(work.density, network, settings, say)

    # Departure 2: scale the result by least squares at 10 Å.
    seen = work.density.clamp(facts["minimum"], facts["maximum"])
    factor = low_frequency_ratio(seen, found, work.voxel_size)
    facts["grey_scale_factor"] = factor
    say(f"grey scale: times {factor:.3g}, so that detail coarser than 10 Å is as in the input")
    return answer_of_network(map, found * factor, settings, facts, say)


def agreement_in_band(x: Tensor, y: Tensor, voxel_size) -> float:
    """The mean FSC of two maps (D, H, W) over the shells of KEPT_BAND; nan if there are none."""
    curve = fsc.fsc(x, y, voxel_size=voxel_size)
    box, voxel = fsc.shell_side(y.shape, voxel_size)
    frequency = torch.arange(len(curve)) / (box * voxel)
    low, high = KEPT_BAND
    return float(curve[(frequency >= low) & (frequency <= high)].nanmean())


def low_frequency_ratio(density: Tensor, x: Tensor, voxel_size) -> float:
    """The factor that takes x (D, H, W) nearest to the density, both low-passed to 10 Å.

    1 if they disagree.
    """
    a, b = (fourier.lowpass(v, 10.0, voxel_size) for v in (density, x))
    a, b = a - a.mean(), b - b.mean()
    shared = float((a * b).sum())
    return shared / float(b.square().sum()) if shared > 0 else 1.0


def finer_grid(map: Map, network: Prior) -> Map:
    """The map at its own voxel size or at the network's, whichever is finer.

    Raises ValueError if the voxels are far too coarse for the network.
    """
    check_detail(map, network, "or another --ckpt")
    work = mrc.resample_map(map, network.voxel_size)
    return work if work.density.numel() > map.density.numel() else map


def check_stride(settings: NetworkSettings, network: Prior) -> None:
    """Raises ValueError if tiles would leave gaps."""
    if settings.stride > network.box:
        raise ValueError(
            f"--stride {settings.stride}: give {network.box} at most, the side of a tile in voxels"
        )


def ask_network(
    density: Tensor, network: Prior, settings: NetworkSettings, say=print
) -> tuple[Tensor, dict]:
    """The network's answer (D, H, W) to a map at its voxel size, in the map's units; facts."""
    check_stride(settings, network)
    # Clip and scale the map to 0 .. 1 as in training, then to network scale. These networks
    # learnt from blurred maps that were divided by their own percentile, so that is the maximum.
    low, high = network.percentiles
    if settings.percentile is not None:
        high = settings.percentile
    brightest = volume.top_value(density, high)
    if settings.percentile is not None and not brightest > 0:
        raise ValueError(f"--percentile {high:g}: not above solvent in this map; 99.999 is usual")
    x, scale = volume.normalise(density, network.mean, network.std, high, settings.maximum, low)
    check_given_maximum(brightest, settings, say)
    device = posterior.device_of(network)
    loss = KNOWN_LOSSES.get(network.sha256[:12])
    if loss:
        say(f"the shipped network is small: {loss}; compare with the map's positive density")

    def progress(calls):
        tiles = sum(len(call) for call in calls)
        say(f"{tiles} tile(s) of {network.box}^3 on {device}, {len(calls)} call(s) of the network")
        tick = Progress(len(calls), say)
        for call in calls:
            yield call
            tick()

    found = sliding_windows(
        network.net,
        x.to(device),
        network.box,
        settings.stride,
        settings.fusion,
        progress=progress,
    )
    facts = {
        "method": "network",
        "stride": settings.stride,
        "fusion": settings.fusion,
        "percentile": high,
        "minimum": scale.minimum,
        "maximum": scale.maximum,
        "box": list(density.shape),
    }
    return volume.denormalise(found.cpu(), scale), facts
