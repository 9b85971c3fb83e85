"""Noise out of two half maps, or out of one map whose noise is described (CryoFM 5.1, 5.2).

    restored = (x_1 + x_2) / 2,   x_i: mean of the posterior's samples given half map i          (1)

Each half is restored by itself, so that the FSC of x_1 and x_2 compares two results that share
nothing but the prior. The classical answer is the Wiener filter of the average.

CryoFM: arXiv:2410.08631, appendices D and E.
Departure 1: where much of the density is negative, "auto" takes the Wiener filter.
Departure 2: and where the half maps expect it to be closer to the truth (report.py (3)).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

import augment
import degrade
import fourier
import fsc
import grey_scale
import mrc
import posterior
from checkpoint import Prior
from classical import positive_wiener, wiener
from mrc import Map
from posterior import Moments, Observation
from report import EXPECTED_ERROR, Progress, Result, expected_auc, say_work
from sampling_checks import (
    NEGATIVE_TO_REFUSE,
    check_agreement,
    keeps_every_shell,
    negative_power,
    without_clamps,
    without_detail,
)
from sampling_grey_scale import in_work_scale, say_scale, say_spectrum, scale_facts
from sampling_posterior import (
    choose_method,
    is_coarse,
    relative_voxel_size,
    steps_of,
    uncertainty_maps,
)
from sampling_settings import AnisotropicSettings, DenoiseSettings

POSITIVE = "Wiener, positive"
EVERY_SHELL = "Wiener, every shell"


@in_work_scale
def restore_half_maps(
    half_map_1: Map,
    half_map_2: Map | None,
    prior: Prior,
    settings: DenoiseSettings = DenoiseSettings(),
    say=print,
) -> Result:
    """Take the noise out of two half maps, or out of one map whose noise the settings describe.

    Each half is restored by itself with its own seeds, so that their FSC stays fair. The result ""
    is the mean of "_half1" and "_half2". "_std" is the standard deviation that we expect
    of its error (uncertainty.py), "_snr" the result over it.
    Raises ValueError if the half maps do not share one grid, or hold no signal.
    """
    # Noise and signal, from the difference between the halves.
    halves = [half_map_1] if half_map_2 is None else [half_map_1, half_map_2]
    densities = [half.density for half in halves]
    powers, signal = noise_of_half_maps(halves, settings)

    # Bring the half maps to the prior's grid, grey scale and spectrum, with their noise.
    voxel_size = half_map_1.voxel_size
    method = choose_method(half_map_1, prior, settings, "Wiener", say)
    observations = []
    spectrum = None
    if method != "wiener" or not is_coarse(half_map_1, prior):
        for half, power in zip(halves, powers):
            observations.append(observe_half_map(half, power, prior, settings))
        spectrum = observations[0].spectrum
        method = without_detail(observations[0], settings, method, "Wiener", say)

    # The classical answers. The prior and every clamp expect density above 0.
    found = classical_answers(halves, powers, signal, spectrum, prior, settings)
    if found.negative > NEGATIVE_TO_REFUSE:
        method = without_clamps(method, settings, found.negative, say)
    say_method(observations, method, found.chosen == POSITIVE, settings, say)
    facts = {"method": method, "negative_power": found.negative} | scale_facts(observations)
    words = "noise as given"
    expected = {}
    if half_map_2:
        curve, resolution, side = agreement(*densities, voxel_size)
        facts |= {"fsc_of_halves": curve, "resolution_0143": resolution}
        words = f"FSC 0.143 at {fsc.resolution_words(resolution, side)}"
        # The score that the halves expect of each answer. The chosen one comes last.
        expected = facts["expected_auc"] = expected_of(found, densities, settings, voxel_size)
    if method == "wiener":
        return classical_result(half_map_1, found, settings, facts)

    # Say how much work is ahead.
    sampler = posterior.DENOISE[method] | steps_of(settings)
    steps = sampler["steps"]
    count = settings.samples * len(halves)
    box = observations[0].y.shape
    facts |= {"steps": steps, "box": list(box)}
    say_work(prior, box, count, steps, words, say)

    # Restore each half by itself.
    tick = Progress(count * steps, say)
    pooled = Moments()
    restored_halves = []
    for i, observation in enumerate(observations):
        seed = settings.seed + i * augment.HELD_OUT  # streams that the halves do not share
        moments = Moments()
        numbers = dict(samples=settings.samples, seed=seed, tick=tick)
        posterior.add_samples(prior, observation, sampler, moments, pooled, **numbers)
        x = posterior.with_fine_detail(moments.mean, found.of_halves["Wiener"][i])
        restored_halves.append(settings.inside_mask(x, densities[i]))

    if half_map_2:
        expected |= expected_auc(densities, {"restored": restored_halves}, voxel_size)
        if settings.method == "auto" and choose_expected(found, expected, say):
            facts["method"] = "wiener"
            found.shown["prior"] = torch.stack(restored_halves).mean(0)
            return classical_result(half_map_1, found, settings, facts)

    # The result is the mean of the restored halves.
    restored = torch.stack(restored_halves).mean(0)
    written = {"": restored}
    if half_map_2:
        # Not a gold standard: the halves share the prior, and what it adds to both correlates.
        facts["fsc_of_restored_halves"], *_ = agreement(*restored_halves, voxel_size)
        written |= {"_half1": restored_halves[0], "_half2": restored_halves[1]}
    maps, spread_facts = uncertainty_maps(
        prior, observations, sampler, settings, pooled, restored, say=say
    )
    facts |= spread_facts
    return Result(half_map_1, written | maps, found.shown | {"restored": restored}, facts)


@dataclass
class Classical:
    """The answers to half maps without a prior, by name."""

    average: Tensor  # of the half maps
    shown: dict[str, Tensor]  # the average and its filters
    of_halves: dict[str, list[Tensor]]  # the filters, each of one half map alone
    chosen: str  # which of them is the answer of method "wiener"
    negative: float  # share of the signal's power that is negative density


def classical_answers(
    halves: list[Map],
    powers: list[Tensor],
    signal: Tensor,
    spectrum: Tensor | None,
    prior: Prior,
    settings: DenoiseSettings,
) -> Classical:
    """Wiener filters of the average, which has less noise, and of each half map.

    powers: of the noise of each half, signal: of what they share, both by shell. spectrum: in which
    density is clamped. Where much of it is negative, a filter without a clamp is the chosen one.
    """
    # The noise of the average, and of the halves.
    first = halves[0]
    voxel_size = first.voxel_size
    relative = relative_voxel_size(first, prior)
    densities = [half.density for half in halves]
    average = torch.stack(densities).mean(0)
    noise = settings.noise_on_grid(torch.stack(powers).sum(0) / len(powers) ** 2, first)
    noises = [settings.noise_on_grid(power, half) for half, power in zip(halves, powers)]

    # Filter the average and each half; then clamp, in the prior's spectrum.
    filtered = wiener(average, noise, signal, voxel_size)
    filters = [wiener(y, p, signal, voxel_size) for y, p in zip(densities, noises)]
    positive, *positives = [
        grey_scale.in_spectrum(spectrum, x, clamp, relative) for x in (filtered, *filters)
    ]
    name = "average" if len(halves) == 2 else "input"
    shown = {name: average, "Wiener": filtered, POSITIVE: positive}
    of_halves = {"Wiener": filters, POSITIVE: positives}

    # How much of the signal is below 0, in that spectrum.
    gain = grey_scale.expand(spectrum, average.shape, relative)
    negative = negative_power(
        [fourier.apply_fourier(y, gain) for y in densities],
        [p * gain**2 for p in noises],
        degrade.expand_shells(signal, average.shape, voxel_size) * gain**2,
        voxel_size,
    )
    # Where noise hides it (NaN), the usual answer stays.
    if not negative > NEGATIVE_TO_REFUSE:
        return Classical(average, shown, of_halves, POSITIVE, negative)

    # A clamp would lose it.
    def every_shell(y: Tensor, noise: Tensor) -> Tensor:
        return wiener(y, noise, keeps_every_shell(noise, signal, voxel_size))

    shown[EVERY_SHELL] = every_shell(average, noise)
    of_halves[EVERY_SHELL] = [every_shell(y, p) for y, p in zip(densities, noises)]
    return Classical(average, shown, of_halves, EVERY_SHELL, negative)


def classical_result(
    half_map_1: Map, found: Classical, settings: DenoiseSettings, facts: dict
) -> Result:
    """The chosen one of the classical answers as the result."""
    restored = settings.inside_mask(found.shown[found.chosen], found.average)
    return Result(half_map_1, {"": restored}, found.shown | {"restored": restored}, facts)


def choose_expected(found: Classical, expected: dict[str, float], say=print) -> bool:
    """Whether a classical answer is expected to be better than the prior's (Departure 2).

    Then it becomes the chosen one, and the last one of `expected`.
    """
    filters = [name for name in found.of_halves if name in expected]
    best = max(filters, key=expected.get)
    restored = expected["restored"]
    if expected[best] <= restored + 2 * EXPECTED_ERROR:
        return False
    say(
        f"FSC_AUC with the truth, expected from the half maps: {best} {expected[best]:.3f}, prior "
        f"{restored:.3f}; so {best} is written, and --method prior writes the other"
    )
    found.chosen = best
    expected["prior"] = expected.pop("restored")
    expected[best] = expected.pop(best)
    return True


def say_method(
    observations: list[Observation], method: str, clamped: bool, settings: DenoiseSettings, say
) -> None:
    """Say in which grey scale and spectrum a method works. clamped: whether it has no negatives."""
    if method != "wiener":
        say_scale(observations[0], settings, say)
    if observations and (method != "wiener" or clamped):
        say_spectrum(observations[0].spectrum, method, say)


def expected_of(
    found: Classical, halves: list[Tensor], settings: DenoiseSettings, voxel_size
) -> dict[str, float]:
    """`expected_auc` of the average and of classical answers, with half maps outside of the mask.

    The chosen one comes last.
    """
    answers = {"average": halves}
    names = [name for name in found.of_halves if name != found.chosen]
    # Where noise is the same in all directions, a Wiener filter alone changes no shell's FSC.
    if not isinstance(settings, AnisotropicSettings):
        names.remove("Wiener")
    for name in (*names, found.chosen):
        pair = found.of_halves[name]
        answers[name] = [settings.inside_mask(x, y) for x, y in zip(pair, halves)]
    return expected_auc(halves, answers, voxel_size)


def clamp(x: Tensor) -> Tensor:
    """Without negative density."""
    return x.clamp(min=0)


def noise_of_half_maps(halves: list[Map], settings: DenoiseSettings) -> tuple[list[Tensor], Tensor]:
    """Noise power of each map and signal power, per shell: `posterior.noise_and_signal`.

    halves: half maps on one grid, or one map, whose noise is in the settings.
    """
    # Two half maps of one grid are wanted, or one map and its noise.
    first, last = halves[0], halves[-1]
    if settings.describes_one_map != (len(halves) == 1):
        raise ValueError("give two half maps, or one map with --noise-from-fsc or --snr")
    if first.density.shape != last.density.shape or not np.allclose(
        first.voxel_size, last.voxel_size, rtol=1e-3
    ):
        raise ValueError(
            f"{tuple(first.density.shape)} voxels of {first.voxel_size[2]:g} Å, but {last.path} "
            f"has {tuple(last.density.shape)} of {last.voxel_size[2]:g} Å; give maps of one grid"
        )
    curve = None
    if len(halves) == 1:
        # A map that is the mean of two halves has twice their SNR, degrade.py (3).
        if settings.snr:
            curve = settings.snr / (1 + settings.snr)
        else:
            curve = 2 * settings.noise_from_fsc / (1 + settings.noise_from_fsc)
        # No map is without noise.
        curve = torch.as_tensor(curve, dtype=torch.float64).clamp(max=1 - 1e-6)
        curve = curve.expand(first.density.shape[-1] // 2)
    densities = [half.density for half in halves]
    powers, signal = posterior.noise_and_signal(densities, curve, first.voxel_size)
    if len(halves) == 2:
        check_agreement(*densities, first.voxel_size)
    return powers, signal


def agreement(
    half_map_1: Tensor, half_map_2: Tensor, voxel_size
) -> tuple[list[float], float, float]:
    """FSC of two half maps from shell 1 on, FSC_0.143 and the box side in Å, as fsc.py counts."""
    curve = fsc.fsc(half_map_1, half_map_2, voxel_size=voxel_size)
    box, voxel = fsc.shell_side(half_map_1.shape, voxel_size)
    return curve[1:].tolist(), float(fsc.resolution(curve, voxel, box=box)), box * voxel


def observe_half_map(
    half: Map, power: Tensor, prior: Prior, settings: DenoiseSettings
) -> Observation:
    """The observation of a half map with its noise power per shell."""
    work = mrc.resample_map(half, prior.voxel_size)
    y = work.density

    # Resampling keeps F y / N, so |F y|^2 goes with the square of N, the number of voxels.
    gain = (y.numel() / half.density.numel()) ** 2
    noise = settings.noise_on_grid(power * gain, work)

    # Sampling starts from the Wiener filter, and reaches only what the half map's grid held.
    held = fourier.below_nyquist(y.shape, half.density.shape)
    sigma = (noise / y.numel()).sqrt()
    voxel_size = work.voxel_size
    classical = partial(positive_wiener, voxel_size=voxel_size)
    return posterior.observe(prior, y, held, sigma, classical, settings.maximum, voxel_size)
