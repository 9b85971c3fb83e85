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
Half maps have a file of their own, sampling_half_maps.py.
Departure 1: for the wedge by CryoLVM's network we put the measured coefficients back, which the
paper does not do. The map "_network" is without.
"""

import math
from dataclasses import replace

from torch import Generator, Tensor

import abinitio
import fourier
import grey_scale
import mrc
import posterior
import volume
import wedge_check
from checkpoint import Prior
from classical import fill_in, pocs
from memory import check_grid
from mrc import Map
from posterior import Moments, Observation
from report import Progress, Result, say_work, silent
from sampling_checks import (
    check_wedge,
    say_unused,
    without_detail,
)
from sampling_grey_scale import in_work_scale, say_scale, say_spectrum, scale_facts
from sampling_networks import ask_network, check_stride
from sampling_posterior import (
    choose_method,
    is_coarse,
    relative_voxel_size,
    steps_of,
    uncertainty_maps,
)
from sampling_settings import (
    AbInitioSettings,
    NetworkWedgeSettings,
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
    coefficients lose their noise too. "_std" is the standard deviation that we expect of
    the error of "_mean" (uncertainty.py), "_snr" the mean over it. What fills the wedge is scaled
    by how true it was for tilts that were hidden (wedge_check.py), except by method "paper". "_std"
    knows nothing of that factor, so that it is too large where a filling fades out.
    """
    # Refuse what cannot work.
    y = map.density
    measured = settings.measured(map)
    check_map(map, measured, settings, say)
    method = choose_method(map, prior, settings, "POCS", say)

    # Bring the map to the prior's grid, grey scale and spectrum, with its noise. Non-negativity
    # works better in that spectrum, so that the classical answer gets it, too.
    facts = {}
    observation, noise = None, settings.noise
    if method != "pocs" or not is_coarse(map, prior):
        observation, noise = observe_wedge(map, prior, settings)
        facts = scale_facts([observation])
        method = without_detail(observation, settings, method, "POCS", say)
        if method != "pocs":
            say_scale(observation, settings, say)
        say_spectrum(observation.spectrum, method, say)

    # Say how much work is ahead.
    sampler = posterior.WEDGE.get(method, {}) | steps_of(settings)
    if method != "pocs":
        words = f"noise {noise:.3f} of the map's maximum"
        words += " (estimated)" if settings.noise is None else ""
        words += "; twice, first for a test" if method != "paper" else ""
        say_work(prior, observation.y.shape, settings.samples, sampler["steps"], words, say)

    # Fill in tilts that are hidden for a test. How much of that is true?
    if method != "paper":
        tests = try_prior(map, prior, settings, noise, method, say)
        method, factor, test_facts = wedge_check.judge(tests, method, settings, say)
        facts |= test_facts

    # The classical answer is shown beside the result, or is the result itself.
    voxel_size = relative_voxel_size(map, prior)
    answer = classical_wedge(map, measured, settings, observation, voxel_size)
    if method == "pocs":
        return scaled(answer, factor, settings, facts)

    # Draw samples of the posterior.
    moments = Moments()
    tick = Progress(settings.samples * sampler["steps"], say)
    numbers = dict(samples=settings.samples, seed=settings.seed, tick=tick)
    posterior.add_samples(prior, observation, sampler, moments, **numbers)

    # Go back to the grid of the map.
    mean = posterior.with_fine_detail(moments.mean, answer.shown["POCS"])
    if method != "paper":
        mean = wedge_check.scale_missing(mean, measured, factor, map.voxel_size)
    restored = settings.inside_mask(fourier.put_back(mean, y, measured), y)
    mean = settings.inside_mask(mean, y)
    densities = {"": restored, "_mean": mean}

    # How far the posterior mean may be from the truth.
    missing = ~observation.measured.cpu()
    maps, spread_facts = uncertainty_maps(
        prior, [observation], sampler, settings, moments, mean, missing, say
    )
    densities |= maps
    facts |= spread_facts
    facts |= {
        "method": method,
        "noise": noise,
        "noise_estimated": settings.noise is None,
        "steps": sampler["steps"],
        "box": list(observation.y.shape),
    }
    shown = answer.shown | {"restored": restored, "posterior mean": mean}
    return replace(answer, densities=densities, shown=shown, report=facts)


def try_prior(
    map: Map, prior: Prior, settings: WedgeSettings, noise: float | None, method: str, say=print
) -> dict[str, wedge_check.HiddenTilts]:
    """How well POCS, and the prior if it is the method, fill in tilts that are hidden from them.

    noise: of the map, as a fraction of its maximum. It stays when tilts are hidden.
    """
    sampler = posterior.WEDGE.get(method, {"steps": 0}) | steps_of(settings)
    tick = Progress(settings.samples * sampler["steps"], say, "step of the test")

    def fill(given: Map, narrow: WedgeSettings) -> dict[str, Tensor]:
        seen = narrow.measured(given)
        observation = None
        if method != "pocs" or not is_coarse(map, prior):
            # As a fraction of the maximum, noise grows when hidden tilts take some of that away.
            before, after = (volume.positive_maximum(x.density) for x in (map, given))
            observation, _ = observe_wedge(given, prior, narrow, noise * before / after)
        voxel_size = relative_voxel_size(map, prior)
        pocs = classical_wedge(given, seen, narrow, observation, voxel_size).shown["POCS"]
        if method == "pocs":
            return {"POCS": pocs}
        moments = Moments()
        numbers = dict(samples=settings.samples, seed=settings.seed, tick=tick)
        posterior.add_samples(prior, observation, sampler, moments, **numbers)
        return {"POCS": pocs, method: posterior.with_fine_detail(moments.mean, pocs)}

    return wedge_check.try_on_hidden_tilts(map, settings, fill)


def check_map(
    map: Map, measured: Tensor, settings: WedgeSettings | NetworkWedgeSettings, say=print
) -> None:
    """Raises ValueError where protein is dark or the wedge is not empty."""
    volume.positive_maximum(map.density)  # raises for dark protein
    check_wedge(map, measured, settings, settings.discard_measured, say)


def classical_wedge(
    map: Map,
    measured: Tensor,
    settings: WedgeSettings | NetworkWedgeSettings,
    observation: Observation | None = None,
    voxel_size=1.0,
) -> Result:
    """The answer of POCS, in the spectrum of the observation. voxel_size: over the prior's."""
    y = map.density

    def complete(x: Tensor) -> Tensor:
        return pocs(x, measured)

    if observation is not None and observation.y.shape == y.shape:
        # The sampler begins with it, on the same grid.
        classical = observation.to_map(observation.start)
    else:
        spectrum = observation.spectrum if observation else None
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


def scaled(
    answer: Result, factor: Tensor, settings: WedgeSettings | NetworkWedgeSettings, facts: dict
) -> Result:
    """The answer of POCS, scaled where nothing was measured, with facts for the .json."""
    y = answer.grid.density
    filled = wedge_check.scale_missing(
        answer.shown["POCS"], ~answer.region, factor, answer.grid.voxel_size
    )
    restored = settings.inside_mask(filled, y)
    shown = answer.shown | {"restored": restored}
    report = answer.report | facts
    return replace(answer, densities={"": restored}, shown=shown, report=report)


def on_network_grid(map: Map, prior: Prior, settings: TiltSettings) -> tuple[Map, Tensor]:
    """The map at the network's voxel size, and which of its coefficients were measured."""
    work = mrc.resample_map(map, prior.voxel_size)
    # A finer grid has coefficients that the map never had. They do not count as measured.
    held = fourier.below_nyquist(work.density.shape, map.density.shape)
    return work, settings.measured(work) & held


def observe_wedge(
    map: Map, prior: Prior, settings: WedgeSettings, noise: float | None = None
) -> tuple[Observation, float]:
    """The observation of a map with a missing wedge; its noise as a fraction of the maximum.

    noise: default that of the settings, or else estimated.
    """
    # The prior lives on its own grid.
    y = map.density
    work, measured = on_network_grid(map, prior, settings)
    maximum = volume.positive_maximum(y)

    # Resampling keeps F y / N of each coefficient, so the standard deviation of white noise goes
    # with the root of N, the number of voxels. It is estimated on the coarser of the two grids,
    # because the corners of the finer one, beyond Nyquist, may be empty.
    gain = math.sqrt(work.density.numel() / y.numel())
    noise = settings.noise if noise is None else noise
    if noise is None and gain <= 1:
        noise = posterior.estimate_noise(work.density, measured) / gain / maximum
    elif noise is None:
        noise = posterior.estimate_noise(y, settings.measured(map)) / maximum

    sigma = noise * maximum * gain
    observation = posterior.observe(
        prior, work.density, measured, sigma, pocs, settings.maximum, work.voxel_size
    )
    return observation, noise


@in_work_scale
def fill_wedge(
    map: Map, network: Prior, settings: NetworkWedgeSettings = NetworkWedgeSettings(), say=print
) -> Result:
    """Fill in the missing wedge with CryoLVM's fine-tuned network.

    The result "" keeps every measured coefficient. "_network" is what the network made of the map.
    """
    # As with the prior: the choice of a method, and tilts that are hidden for a test.
    y = map.density
    measured = settings.measured(map)
    check_map(map, measured, settings, say)
    check_stride(settings, network)
    method = "pocs"
    if choose_method(map, network, settings, "POCS", say) != "pocs":
        method = "network"
    # On a large map each POCS takes a minute.
    say("POCS, here and with some measured tilts hidden for a test")

    def fill(given: Map, narrow: NetworkWedgeSettings) -> dict[str, Tensor]:
        pocs = classical_wedge(given, narrow.measured(given), narrow).shown["POCS"]
        if method == "pocs":
            return {"POCS": pocs}
        found, _ = ask_for_wedge(given, network, narrow, silent)
        return {"POCS": pocs, method: posterior.with_fine_detail(found, pocs)}

    tests = wedge_check.try_on_hidden_tilts(map, settings, fill)
    method, factor, facts = wedge_check.judge(tests, method, settings, say)
    answer = classical_wedge(map, measured, settings)
    if method == "pocs":
        return scaled(answer, factor, settings, facts)

    # Departure 1: put the measured coefficients back. `alone` is the network's answer without.
    found, network_facts = ask_for_wedge(map, network, settings, say)
    restored = posterior.with_fine_detail(found, answer.shown["POCS"])
    restored = wedge_check.scale_missing(restored, measured, factor, map.voxel_size)
    restored = settings.inside_mask(fourier.put_back(restored, y, measured), y)
    alone = settings.inside_mask(fourier.resample(found, y.shape), y)
    shown = answer.shown | {"restored": restored, "network": alone}
    densities = {"": restored, "_network": alone}
    return replace(answer, densities=densities, shown=shown, report=facts | network_facts)


def ask_for_wedge(
    map: Map, network: Prior, settings: NetworkWedgeSettings, say
) -> tuple[Tensor, dict]:
    """What the network makes of a map, on its own grid, and facts for the .json."""
    # Remove what the map has in the wedge, and put there what it held in training.
    work, known = on_network_grid(map, network, settings)
    seen = fill_in(work.density, known, network.fill)
    return ask_network(seen, network, settings, say)


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
            f"--max-shift is {settings.max_shift:g} Å; images of {side * voxel_size:g} Å show no "
            f"particle that is off by more than {side * voxel_size / 2:g} Å"
        )
    method = settings.method
    say_unused(settings, method, say)
    if is_coarse(stack, prior) and method != "classical":
        say(
            f"warning: pixels of {voxel_size:g} Å hold no detail that this network "
            f"({prior.voxel_size:g} Å) knows; compare with --method classical"
        )
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
