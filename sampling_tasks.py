"""The tasks: each a plain function of maps, a network and settings that returns a Result.

    map = mrc.read_map("in.mrc")
    prior = checkpoint.load("weights/hdit_tiny.pt")
    result = restore_wedge(map, prior, WedgeSettings(tilt_range=(-50, 60)))
    mrc.write_map("out.mrc", result.maps[""])

With the flow prior a task brings the map to the prior's grid and grey scale, with its noise, as an
Observation (posterior.py). It draws samples and goes back to the map's grid. The result is the mean
of the samples, because FSC rewards the mean of the posterior. Their spread says where not to trust
it. CryoLVM's fine-tuned networks need one pass (sampling_networks.py). `in_work_scale` finds the
background of the maps and the sign of protein, and gives them back in the result. `say` is called
with each line to print; report.silent prints nothing.

CryoFM: arXiv:2410.08631, sections 5.1-5.4, appendices B.2, D and E. CryoLVM: sections 4.2-4.4.
Departure 1: where voxels are much coarser than the network's, or much of the density is negative,
"auto" takes the classical answer.
Departure 2: for the wedge by CryoLVM's network we put the measured coefficients back, which the
paper does not do. The map "_network" is without.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor

import abinitio
import degrade
import fourier
import fsc
import grey_scale
import mrc
import posterior
import volume
from checkpoint import Prior
from memory import check_grid
from mrc import Map
from posterior import Moments, Observation
from report import Progress, Result, expected_auc, say_work
from sampling_checks import (
    NEGATIVE_TO_REFUSE,
    check_positivity,
    check_wedge,
    keeps_every_shell,
    negative_power,
    say_too_fine,
    without_clamps,
)
from sampling_grey_scale import in_work_scale, say_scale, scale_facts
from sampling_networks import ask_network
from sampling_settings import (
    AbInitioSettings,
    DenoiseSettings,
    NetworkWedgeSettings,
    SampleSettings,
    TiltSettings,
    WedgeSettings,
)

# ---- Missing wedge (CryoFM 5.2, CryoLVM 4.4)


@in_work_scale
def restore_wedge(
    map: Map, prior: Prior, settings: WedgeSettings = WedgeSettings(), say=print
) -> Result:
    """Fill in what a limited tilt range left out.

    The result "" keeps every measured coefficient. "_mean" is the posterior mean, where measured
    coefficients lose their noise too. "_std" is the spread of the samples.
    """
    # Refuse what cannot work.
    y = map.density
    measured = settings.measured(map)
    check_map(map, measured, settings, say)
    method = choose_method(map, prior, settings.method, "POCS", say)

    # Bring the map to the prior's grid, grey scale and spectrum, with its noise. Non-negativity
    # works better in that spectrum, so that the classical answer gets it, too.
    facts = {}
    spectrum = None
    if method != "pocs" or not is_coarse(map, prior):
        observation, noise = observe_wedge(map, prior, settings)
        spectrum = observation.spectrum
        say_scale(observation, settings, say)
        facts = scale_facts([observation])

    # The classical answer is shown beside the result, or is the result itself.
    answer = classical_wedge(map, measured, settings, spectrum, relative_voxel_size(map, prior))
    if method == "pocs":
        return replace(answer, report=answer.report | facts)
    sampler = posterior.WEDGE[method] | steps_of(settings)
    steps = sampler["steps"]
    estimated = settings.noise is None
    words = f"noise {noise:.3f} of the map's maximum" + (" (estimated)" if estimated else "")
    say_work(prior, observation.y.shape, settings.samples, steps, words, say)

    # The prior takes density for positive. Do the measured data?
    sigma = noise * volume.top_value(y, 99.999)
    misfit = check_positivity(answer.shown["POCS"], y, measured, sigma, say)

    # Draw samples of the posterior.
    moments = Moments()
    tick = Progress(settings.samples * steps, say)
    draw(prior, observation, sampler, settings.samples, settings.seed, tick, moments)

    # Go back to the grid of the map.
    mean = posterior.with_fine_detail(moments.mean, answer.shown["POCS"])
    restored = settings.inside_mask(fourier.put_back(mean, y, measured), y)
    mean = settings.inside_mask(mean, y)
    densities = {"": restored, "_mean": mean}

    # One sample has no spread.
    if settings.samples > 1:
        std = fourier.resample(moments.std(), y.shape).clamp(min=0)
        densities["_std"] = settings.inside_mask(std, 0)
    facts |= {
        "method": method,
        "noise": noise,
        "noise_estimated": estimated,
        "positive_misfit": misfit,
        "steps": steps,
        "box": list(observation.y.shape),
    }
    shown = answer.shown | {"restored": restored, "posterior mean": mean}
    return replace(answer, densities=densities, shown=shown, report=facts)


def check_map(
    map: Map, measured: Tensor, settings: WedgeSettings | NetworkWedgeSettings, say=print
) -> None:
    """Raises ValueError where protein is dark or the wedge is not empty."""
    volume.normalise(map.density, 0, 1)  # raises for dark protein
    check_wedge(map, measured, settings, settings.discard_measured, say)


def classical_wedge(
    map: Map,
    measured: Tensor,
    settings: WedgeSettings | NetworkWedgeSettings,
    spectrum: Tensor | None = None,
    voxel_size=1.0,
) -> Result:
    """The answer of POCS; spectrum, voxel_size: of grey_scale.in_spectrum."""
    y = map.density

    def complete(x: Tensor) -> Tensor:
        return posterior.pocs(x, measured)

    classical = grey_scale.in_spectrum(spectrum, y, complete, voxel_size)
    restored = settings.inside_mask(classical, y)
    return Result(
        grid=map,
        densities={"": restored},
        shown={"input": y, "POCS": classical, "restored": restored},
        report={"method": "pocs"},
        region=~measured,
        across="zyx".index(settings.tilt_axis),
    )


def is_coarse(map: Map, prior: Prior) -> bool:
    """Whether the voxels hold no detail that the network knows (Departure 1)."""
    return max(map.voxel_size) > 2 * prior.voxel_size


def relative_voxel_size(map: Map, prior: Prior) -> list[float]:
    """Voxel size of a map over the prior's (z, y, x)."""
    return [v / prior.voxel_size for v in map.voxel_size]


def choose_method(map: Map, prior: Prior, method: str, classical: str, say=print) -> str:
    """The method. "auto" means the prior, or the classical method if voxels are far too coarse."""
    if method != "auto":
        return method
    if not is_coarse(map, prior):
        return "prior"
    say(
        f"voxels of {max(map.voxel_size):g} Å hold no detail that this network "
        f"({prior.voxel_size:g} Å) knows: {classical} instead; name a --method to use it all the "
        "same"
    )
    return classical.lower()


def on_network_grid(map: Map, prior: Prior, settings: TiltSettings) -> tuple[Map, Tensor]:
    """The map at the network's voxel size, and which of its coefficients were measured."""
    work = mrc.resample_map(map, prior.voxel_size)
    # A finer grid has coefficients that the map never had. They do not count as measured.
    held = fourier.below_nyquist(work.density.shape, map.density.shape)
    return work, settings.measured(work) & held


def observe_wedge(map: Map, prior: Prior, settings: WedgeSettings) -> tuple[Observation, float]:
    """The observation of a map with a missing wedge; its noise as a fraction of the maximum."""
    # The prior lives on its own grid.
    y = map.density
    work, measured = on_network_grid(map, prior, settings)
    maximum = volume.normalise(y, 0, 1)[1].maximum

    # Resampling keeps F y / N of each coefficient, so the standard deviation of white noise goes
    # with the root of N, the number of voxels. It is estimated on the coarser of the two grids,
    # because the corners of the finer one, beyond Nyquist, may be empty.
    gain = math.sqrt(work.density.numel() / y.numel())
    if settings.noise is not None:
        noise = settings.noise
    elif gain <= 1:
        noise = posterior.estimate_noise(work.density, measured) / gain / maximum
    else:
        noise = posterior.estimate_noise(y, settings.measured(map)) / maximum

    sigma = noise * maximum * gain
    observation = posterior.observe(
        prior, work.density, measured, sigma, posterior.pocs, settings.maximum
    )
    # Algorithm 2 as printed has no noise in y.
    if settings.method == "paper":
        observation = replace(observation, sigma=torch.zeros_like(observation.sigma))
    return observation, noise


def steps_of(settings: SampleSettings) -> dict[str, int]:
    """The number of steps, if given, to replace that of the method."""
    return {"steps": settings.steps} if settings.steps else {}


def draw(prior, observation, sampler, samples: int, seed: int, tick, *moments: Moments) -> None:
    """Add samples of the posterior to all moments."""
    for sample in posterior.draw_samples(
        prior, observation, sampler, samples=samples, seed=seed, tick=tick
    ):
        for moment in moments:
            moment.add(sample)


@in_work_scale
def fill_wedge(
    map: Map, network: Prior, settings: NetworkWedgeSettings = NetworkWedgeSettings(), say=print
) -> Result:
    """Fill in the missing wedge with CryoLVM's fine-tuned network.

    The result "" keeps every measured coefficient. "_network" is what the network made of the map.
    """
    # The classical answer, as for the prior.
    y = map.density
    measured = settings.measured(map)
    check_map(map, measured, settings, say)
    answer = classical_wedge(map, measured, settings)
    if choose_method(map, network, settings.method, "POCS", say) == "pocs":
        return answer
    say_too_fine(map, network, say)

    # The network was trained on maps with zeros in the wedge, so remove what the map has there.
    work, known = on_network_grid(map, network, settings)
    seen = fourier.put_back(torch.zeros_like(work.density), work.density, known)
    found, facts = ask_network(seen, network, settings, say)

    # Departure 2: put the measured coefficients back. `alone` is the network's answer without.
    restored = posterior.with_fine_detail(found, answer.shown["POCS"])
    restored = settings.inside_mask(fourier.put_back(restored, y, measured), y)
    alone = settings.inside_mask(fourier.resample(found, y.shape), y)
    shown = answer.shown | {"restored": restored, "network": alone}
    densities = {"": restored, "_network": alone}
    return replace(answer, densities=densities, shown=shown, report=facts)


# ---- Noise (CryoFM 5.1, 5.2)


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
    is the mean of "_half1" and "_half2". "_std" is the spread of all samples of both.
    Raises ValueError if the half maps do not share one grid, or hold no signal.
    """
    # Noise and signal, from the difference between the halves.
    halves = [half_map_1] if half_map_2 is None else [half_map_1, half_map_2]
    powers, signal, curve = noise_of_half_maps(halves, settings)

    # Bring the half maps to the prior's grid, grey scale and spectrum, with their noise.
    voxel_size = half_map_1.voxel_size
    method = choose_method(half_map_1, prior, settings.method, "Wiener", say)
    observations = []
    spectrum = None
    if method != "wiener" or not is_coarse(half_map_1, prior):
        for half, power in zip(halves, powers):
            observations.append(observe_half_map(half, power, prior, settings))
        spectrum = observations[0].spectrum
        say_scale(observations[0], settings, say)

    # The classical answer is the Wiener filter of the average, which has less noise.
    average = torch.stack([half.density for half in halves]).mean(0)
    noise = torch.stack(powers).sum(0) / len(powers) ** 2
    noise = settings.noise_on_grid(noise, half_map_1)
    relative = relative_voxel_size(half_map_1, prior)
    classical = posterior.wiener(average, noise, signal, voxel_size)
    positive = grey_scale.in_spectrum(spectrum, classical, clamp, relative)
    name = "average" if half_map_2 else "input"
    shown = {name: average, "Wiener": classical, "Wiener, positive": positive}

    # The prior, and every clamp, take density for positive. In the prior's spectrum more is.
    noises = [settings.noise_on_grid(power, half) for half, power in zip(halves, powers)]
    densities = [half.density for half in halves]
    filtered = [posterior.wiener(y, p, signal, voxel_size) for y, p in zip(densities, noises)]
    gain = grey_scale.expand(spectrum, average.shape, relative)
    negative = negative_power(
        [fourier.apply_fourier(y, gain) for y in densities],
        [p * gain**2 for p in noises],
        degrade.expand_shells(signal, average.shape, voxel_size) * gain**2,
        voxel_size,
    )
    answer = positive
    if negative > NEGATIVE_TO_REFUSE:
        answer = posterior.wiener(average, noise, keeps_every_shell(noise, signal, voxel_size))
        method = without_clamps(method, settings.method, negative, say)
    resolution = resolution_of(curve, half_map_1)
    facts = {
        "method": method,
        "fsc_of_halves": curve.tolist(),
        "resolution_0143": resolution,
        "negative_power": negative,
    } | scale_facts(observations)
    if half_map_2:
        # What the halves say of each answer. That of the method comes last.
        positives = [grey_scale.in_spectrum(spectrum, x, clamp, relative) for x in filtered]
        answers = {"average": densities, "Wiener, positive": positives}
        if answer is not positive:
            kept = [keeps_every_shell(power, signal, voxel_size) for power in noises]
            pairs = zip(densities, noises, kept)
            answers["Wiener, every shell"] = [posterior.wiener(*pair) for pair in pairs]
        facts["expected_auc"] = expected_auc(densities, answers, voxel_size)
    if method == "wiener":
        restored = settings.inside_mask(answer, average)
        return Result(half_map_1, {"": restored}, shown | {"restored": restored}, facts)

    # Say how much work is ahead.
    sampler = posterior.DENOISE[method] | steps_of(settings)
    steps = sampler["steps"]
    count = settings.samples * len(halves)
    box = mrc.resample_map(half_map_1, prior.voxel_size).density.shape
    facts |= {"steps": steps, "box": list(box)}
    say_work(prior, box, count, steps, f"FSC 0.143 at {resolution:.2f} Å", say)

    # Restore each half by itself.
    tick = Progress(count * steps, say)
    pooled = Moments()
    restored_halves = []
    for i, observation in enumerate(observations):
        seed = settings.seed + (i << 32)  # far apart, so that the halves share no noise
        moments = Moments()
        draw(prior, observation, sampler, settings.samples, seed, tick, moments, pooled)
        restored_halves.append(posterior.with_fine_detail(moments.mean, filtered[i]))

    if half_map_2:
        answers = {"restored": restored_halves}
        facts["expected_auc"] |= expected_auc(densities, answers, voxel_size)

    # The result is the mean of the restored halves.
    restored = settings.inside_mask(torch.stack(restored_halves).mean(0), average)
    densities = {"": restored}
    if half_map_2:
        # Not a gold standard: the halves share the prior, and what it adds to both correlates.
        curve = fsc.fsc(*restored_halves, convention="cryofm", voxel_size=voxel_size)[1:]
        facts["fsc_of_restored_halves"] = curve.tolist()
        for i, half in enumerate(halves):
            x = settings.inside_mask(restored_halves[i], half.density)
            densities[f"_half{i + 1}"] = x
    if pooled.count > 1:
        std = fourier.resample(pooled.std(), average.shape).clamp(min=0)
        densities["_std"] = settings.inside_mask(std, 0)
    return Result(half_map_1, densities, shown | {"restored": restored}, facts)


def clamp(x: Tensor) -> Tensor:
    """Without negative density."""
    return x.clamp(min=0)


def noise_of_half_maps(
    halves: list[Map], settings: DenoiseSettings
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`posterior.noise_and_signal` of half maps on one grid, or of one map by its settings."""
    # Two half maps of one grid are wanted, or one map and its noise.
    first, last = halves[0], halves[-1]
    if settings.describes_one_map != (len(halves) == 1):
        raise ValueError("give two half maps, or one map with noise_from_fsc or snr")
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
        snr = settings.snr or 2 / (1 / settings.noise_from_fsc - 1)
        curve = torch.as_tensor(snr / (1 + snr), dtype=torch.float64)
        curve = curve.expand(first.density.shape[-1] // 2)
    densities = [half.density for half in halves]
    return posterior.noise_and_signal(densities, curve, first.voxel_size)


def resolution_of(curve: Tensor, map: Map) -> float:
    """FSC_0.143 in Å of a curve over shells 1 .. W//2."""
    # The curve begins with shell 1. Shell 0 is the mean, which halves share. Its shells are those
    # of the x axis.
    curve = torch.cat([curve.new_ones(1), curve])
    return float(fsc.resolution(curve, map.voxel_size[2], box=map.density.shape[-1]))


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
    return posterior.observe(prior, y, held, sigma, posterior.positive_wiener, settings.maximum)


# ---- Ab initio (CryoFM 5.4)


def ab_initio(
    stack: Map, prior: Prior, settings: AbInitioSettings = AbInitioSettings(), say=print
) -> Result:
    """A density from a stack of projections (P, N, N) of unknown pose, see abinitio.py."""
    # The density is found at the prior's voxel size, on the CPU.
    count, side, _ = stack.density.shape
    voxel_size = stack.voxel_size[2]
    n = box_of_stack(stack, prior)
    if settings.max_shift > side * voxel_size / 2:
        raise ValueError(
            f"max_shift is {settings.max_shift:g} Å; images of {side * voxel_size:g} Å show no "
            f"particle that is off by more than {side * voxel_size / 2:g} Å"
        )
    method = settings.method
    say(f"{count} projections of {voxel_size:g} Å, {method} on {n}^3 voxels on the CPU")

    # Only the network runs on the GPU, so move the maps there and the velocity back.
    device = posterior.device_of(prior)

    def velocity(x: Tensor, t: float, generators: list[Generator]) -> Tensor:
        turned = method != "paper"
        v = posterior.tiled_velocity(prior, x.to(device), t, generators, turned=turned)
        return v.to(x.device)

    # Without a prior there is one density, otherwise samples.
    moments = Moments()
    shown = {}
    for name, x in abinitio.samples_of(
        velocity,
        prior,
        fourier.resample(stack.density, (count, n, n)),
        method,
        samples=settings.samples,
        seed=settings.seed,
        max_shift=settings.max_shift / (side * voxel_size / n),
        steps=settings.steps,
        losses=settings.losses,
        progress=lambda total, what: Progress(total, say, what),
    ):
        if name == "classical":
            shown["classical"] = x
        if name == method:
            moments.add(x)
    shown["restored"] = moments.mean
    say("projections do not tell a density from its mirror image: if helices turn left, mirror it")

    # Go back to the pixel size of the images.
    cube = (side,) * 3
    densities = {"": fourier.resample(moments.mean, cube)}
    if moments.count > 1:
        densities["_std"] = fourier.resample(moments.std(), cube)
    facts = {"method": method, "projections": count, "box": [n] * 3}
    return Result(Map(densities[""], voxel_size), densities, shown, facts)


def box_of_stack(stack: Map, prior: Prior) -> int:
    """Voxels per side of the prior's grid over the images of a stack.

    Raises ValueError if there is no memory for that grid.
    """
    _, side, _ = stack.density.shape
    n = max(24, round(min(side * stack.voxel_size[2] / prior.voxel_size, 1e9)))
    check_grid((n, n, n), stack.density.shape, stack.voxel_size)
    return n
