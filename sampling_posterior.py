"""What the tasks with the flow prior share: the choice of a method, samples, and their uncertainty.

Departure 1: where voxels are much coarser than the network's, "auto" takes the classical answer.
"""

import torch
from torch import Tensor

import fourier
import fsc
import uncertainty
from checkpoint import Prior
from mrc import Map
from posterior import Moments, Observation
from report import Progress
from sampling_checks import say_unused
from sampling_settings import SampleSettings, Settings


def is_coarse(map: Map, prior: Prior) -> bool:
    """Whether the voxels hold no detail that the network knows (Departure 1)."""
    return max(map.voxel_size) > 2 * prior.voxel_size


def relative_voxel_size(map: Map, prior: Prior) -> list[float]:
    """Voxel size of a map over the prior's (z, y, x)."""
    return [v / prior.voxel_size for v in map.voxel_size]


def choose_method(map: Map, prior: Prior, settings: Settings, classical: str, say=print) -> str:
    """The method. "auto" means the prior, or the classical method if voxels are far too coarse."""
    method = settings.method
    coarse = is_coarse(map, prior)
    if method == "auto" and coarse:
        say(
            f"voxels of {max(map.voxel_size):g} Å hold no detail that this network "
            f"({prior.voxel_size:g} Å) knows: {classical} instead; name a --method to use it all "
            "the same"
        )
        method = classical.lower()
    elif method == "auto":
        method = "prior"
    elif coarse and method != classical.lower():
        say(
            f"warning: voxels of {max(map.voxel_size):g} Å hold no detail that this network "
            f"({prior.voxel_size:g} Å) knows; compare with --method {classical.lower()}"
        )
    say_unused(settings, method, say)
    if coarse:
        say_unused(settings, f"{method} on coarse voxels", say)
    return method


def steps_of(settings: SampleSettings) -> dict[str, int]:
    """The number of steps, if given, to replace that of the method."""
    return {"steps": settings.steps} if settings.steps else {}


def uncertainty_maps(
    prior: Prior,
    observations: list[Observation],
    sampler: dict,
    settings: SampleSettings,
    moments: Moments,
    mean: Tensor,
    region: Tensor | None = None,
    say=print,
) -> tuple[dict[str, Tensor], dict]:
    """ "_std" and "_snr" on the grid of the restored map `mean` (D, H, W), and facts for the .json.

    moments: of all samples of the observations, on the prior's grid. region: see
    uncertainty.measure. One sample says nothing, so there are no maps of it.
    """
    if moments.count < 2:
        return {}, {}

    # Without references there is only the spread of the samples.
    facts = {"std_calibrated": prior.references is not None}
    if prior.references is None:
        say("_std is the spread of the samples, less than the error: --ckpt holds no references")
        std = moments.std()
    else:
        # Restore densities whose truth is known, and see how wrong that is.
        say(f"restoring {uncertainty.COUNT} reference densities, to learn how wrong results are")
        each = settings.samples * len(observations) * sampler["steps"]
        tick = Progress(uncertainty.COUNT * each, say)
        found = uncertainty.measure(prior, observations, sampler, settings.samples, region, tick)
        std = found.std(moments)
        # The map's grid may be coarser than the prior's.
        shares = [n / m for n, m in zip(mean.shape, observations[0].y.shape)]
        curve = found.fsc[: 1 + round(min(1.0, *shares) * (len(found.fsc) - 1))]
        facts |= {
            "interval_90": found.interval,
            "expected_fsc": curve.tolist(),
            "expected_fsc_step": 1 / (found.box * prior.voxel_size),
        }
        where = " in the missing region" if region is not None else ""
        say(
            f"reference densities, restored likewise, reach FSC_AUC {float(fsc.auc(curve)):.2f}"
            f"{where} (real maps: less), and 90 % of their voxels lie within "
            f"{found.interval:.2f} _std of the truth"
        )

    # Back to the map's grid. Detail that the prior's grid cannot hold was not restored, so count
    # all of it as error.
    least = float(std.min())
    std = fourier.resample(std, mean.shape).clamp(min=least)
    detail = mean - fourier.resample(fourier.resample(mean, observations[0].y.shape), mean.shape)
    std = (std.square() + detail.square().mean()).sqrt()

    # Density far above its expected error (_snr over 3) is unlikely to be an error.
    snr = torch.where(std > 0, mean / std.clamp(min=1e-30), 0)
    maps = {"_std": settings.inside_mask(std, 0), "_snr": settings.inside_mask(snr, 0)}
    if settings.mask is not None:
        facts["std_outside_mask"] = 0.0
        say("_std and _snr are 0 outside of --mask, where the input is kept and not restored")
    return maps, facts
