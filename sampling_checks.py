"""Checks of a map before a task begins: does it hold what the task takes for granted?

    missing power   mean_k (|F y|_k^2) over the missing region, relative to what it would hold if it
                    had the measured region's power in every shell; 0 for an empty wedge      (1)
    negative power  mean of sum_r a b [a < 0] and sum_r a b [b < 0], relative to sum_r a b    (2)

a and b are two Wiener filtered half maps. Their noise is independent, so (2) counts signal alone.
Where noise hides the sign of weak density, (2) is too low if the sum of the density is positive,
and too high if it is negative. Limits are ours; RESULTS.md, sections 15 and 16, says on which maps
they were measured.
"""

import math
from dataclasses import fields, replace

import torch
from torch import Generator, Tensor

import degrade
import fourier
import fsc
import volume
from checkpoint import Prior
from classical import wiener
from mrc import Map
from posterior import Observation
from sampling_settings import DenoiseSettings, GreySettings, Settings, TiltSettings, flag_of

# A wedge that was cut out in Fourier space and rounded holds up to 3e-4. Cropping or masking such a
# map lets 2 to 10 % leak in, and a tilt range that is 5 degrees too narrow on either side 12 %.
LEAK_TO_NOTE = 1e-3
LEAK_TO_REFUSE = 0.1

# Real maps hold .3 or more in the outermost 5 degrees of a tilt range that was measured.
END_STEP = 5.0

# Simulated maps hold up to .02. From .1 on the average of real half maps is better than its
# positive part at low noise.
NEGATIVE_TO_REFUSE = 0.1

# The brightest density of the classical answer over the sharp density's. It was .24 to 1.2 on 24
# real maps, .13 at least with four times their own noise, 6 to 13 on white noise alone, and 5 to 7
# on maps without any detail finer than 12 Å.
USUAL_BRIGHTNESS = 0.1, 4.0
POSSIBLE_BRIGHTNESS = 1e-3, 1e3
# Of the FSC of half maps in any shell, in standard deviations of chance. Half maps of noise alone
# reached 1.7, real ones with four times their own noise 4 at least.
LEAST_AGREEMENT = 3.0
# Share of voxels with one value, and a voxel over its neighbours.
EQUAL_TO_NOTE = 0.1
HOT = 5.0


def say_unused(settings: Settings, method: str, say=print) -> None:
    """Name the flags that were given and that the method does not use."""
    flags = [flag_of(name) for name in settings.set_in_vain(method)]
    if flags:
        say(f"{', '.join(flags)}: not used by method {method}")


def check_detail(map: Map, network: Prior, instead: str) -> None:
    """Raises ValueError if the voxels hold none of the detail that a network was trained on."""
    voxel_size = max(map.voxel_size)
    if voxel_size > 2 * network.voxel_size:
        raise ValueError(
            f"voxels of {voxel_size:g} Å hold none of the detail that this network of "
            f"{network.voxel_size:g} Å knows; give a map of {2 * network.voxel_size:g} Å at most, "
            f"{instead}"
        )


def missing_power(map: Map, measured: Tensor, missing: Tensor | None = None) -> tuple[float, float]:
    """(1) for a map and its mask `measured` (D, H, W), and the region's share of all power.

    missing: the region (default: all that was not measured). The mean of the map does not count.
    """
    if missing is None:
        missing = ~measured
    y = map.density - map.density.mean()
    power = fourier.fft3(y).abs().square()
    box, _ = fsc.shell_side(y.shape, map.voxel_size)
    n = box // 2 + 1
    shell = fsc.shells(y.shape, map.voxel_size).clamp_(max=n)

    # What the missing region would hold, shell by shell.
    count = fsc.shell_sum(measured, shell, n).clamp(min=1)
    mean = fsc.shell_sum(power * measured, shell, n) / count
    expected = (mean * fsc.shell_sum(missing, shell, n))[1:].sum()
    found = fsc.shell_sum(power * missing, shell, n)[1:].sum()
    share = (power * missing).sum() / power.sum().clamp(min=1e-30)
    return float(found / expected.clamp(min=1e-30)), float(share)  # (1)


def check_wedge(map: Map, measured: Tensor, settings: TiltSettings, discard: bool, say) -> None:
    """Say how much of the map lies where nothing was measured, and would be thrown away.

    Say also if tilts that were measured, by the settings, hold nothing.
    Raises ValueError if what is thrown away is far more than leaks into a wedge, unless `discard`.
    """
    low, high = settings.tilt_range
    first, last = tilts_with_power(map, settings)
    if (first, last) != (low, high):
        say(
            f"warning: tilts of {low:g} to {high:g} degrees about {settings.tilt_axis} count as "
            f"measured, but only those of {first:g} to {last:g} hold power in this map. The others "
            f"stay empty; if they were not taken, give --tilt-range {first:g} {last:g}"
        )

    leak, share = missing_power(map, measured)
    if leak < LEAK_TO_NOTE:
        return
    words = (
        f"the region that tilts of {low:g} to {high:g} degrees about {settings.tilt_axis} leave "
        f"out holds {share:.1%} of the map's power, {leak:.1%} of what it would hold if measured"
    )
    if leak < LEAK_TO_REFUSE:
        say(f"{words}; it is thrown away (as much leaks in when a map is cropped or masked)")
    elif discard:
        say(f"{words}; it is thrown away")
    else:
        raise ValueError(
            f"{words}: restoring would throw it away. {emptiest_wedge(map, settings)} "
            "To go on all the same, give --discard-measured"
        )


def small_copy(map: Map) -> Map:
    """The low frequencies of a map, 96 voxels along each axis at most: faster, and they tell."""
    shape = [min(n, 96) for n in map.density.shape]
    voxel_size = [v * n / m for v, n, m in zip(map.voxel_size, map.density.shape, shape)]
    return replace(map, density=fourier.resample(map.density, shape), voxel_size=voxel_size)


def tilts_with_power(map: Map, settings: TiltSettings) -> tuple[float, float]:
    """The tilt range without its ends, in steps of END_STEP, that hold hardly any power.

    "Hardly any" is less than LEAK_TO_REFUSE of what they would hold by (1).
    """
    small = small_copy(map)

    def is_empty(inner: tuple[float, float], outer: tuple[float, float]) -> bool:
        measured = replace(settings, tilt_range=inner).measured(small)
        end = replace(settings, tilt_range=outer).measured(small) & ~measured
        return bool(end.any()) and missing_power(small, measured, end)[0] < LEAK_TO_REFUSE

    low, high = settings.tilt_range
    while high - low > 4 * END_STEP and is_empty((low + END_STEP, high), (low, high)):
        low += END_STEP
    while high - low > 4 * END_STEP and is_empty((low, high - END_STEP), (low, high)):
        high -= END_STEP
    return low, high


def emptiest_wedge(map: Map, settings: TiltSettings) -> str:
    """A sentence on the axis and the tilt range that leave out the least of a map's power.

    Where the settings have no axis to set, only the range.
    """
    small = small_copy(map)
    shape, voxel_size = small.density.shape, small.voxel_size

    # Another sign of the tilts is the smallest mistake.
    low, high = settings.tilt_range
    mirrored = replace(settings, tilt_range=(-high, -low)).measured(small)
    leak, _ = missing_power(small, mirrored)
    if leak < LEAK_TO_REFUSE:
        words = f"--tilt-range {-high:g} {-low:g}"
        return f"Emptier is the region that {words}, the other sign, leaves out ({leak:.1%})."

    can_turn = "tilt_axis" in {setting.name for setting in fields(settings)}
    axes = "yxz" if can_turn else settings.tilt_axis
    found = []
    for axis in axes:
        for tilt in (40, 50, 60, 70):
            mask = degrade.wedge_mask(shape, (-tilt, tilt), axis, voxel_size=voxel_size)
            leak, _ = missing_power(small, fourier.hermitian_part(mask))
            found.append((leak, axis, tilt))

    # Of several empty ones, the first is the widest.
    leak, axis, tilt = min(found)
    for candidate in found:
        if candidate[0] < max(LEAK_TO_NOTE, 1.5 * leak) and candidate[1] == axis:
            leak, axis, tilt = candidate
            break
    if leak < LEAK_TO_REFUSE:
        words = f"--tilt-range -{tilt} {tilt}"
        if can_turn:
            words = f"--tilt-axis {axis} {words}"
        return f"Emptier is the region that {words} leaves out ({leak:.1%})."
    if can_turn:
        return (
            "No other axis or range leaves out an empty region "
            f"({leak:.0%} at least), so that this map seems to have no missing wedge."
        )
    return (
        f"No other range about {axes} leaves out an empty region ({leak:.0%} at least), and "
        "--model scunet knows no other axis."
    )


def negative_power(maps: list[Tensor], powers: list[Tensor], signal: Tensor, voxel_size) -> float:
    """(2) for two half maps (D, H, W), or for one map.

    powers: the noise |F|^2 of each map, per coefficient (D, H, W). signal: per shell.
    """
    # One map y is split in two: y + n and y - n with n like its noise are independent, too.
    if len(maps) == 1:
        y = maps[0]
        power = powers[0]
        noisy = degrade.add_spectral_noise(y, power, generator=Generator().manual_seed(0))
        maps = [noisy, 2 * y - noisy]
        powers = [2 * power] * 2
    a, b = (wiener(y, p, signal, voxel_size) for y, p in zip(maps, powers))
    product = (a * b).double()
    negative = (product * (a < 0)).sum() + (product * (b < 0)).sum()
    total = float(product.sum())
    return float(negative) / 2 / total if total > 0 else math.nan  # (2)


def check_agreement(half_map_1: Tensor, half_map_2: Tensor, voxel_size) -> None:
    """Raises ValueError if two half maps (D, H, W) agree in no shell by more than chance."""
    shape = half_map_1.shape
    curve = fsc.fsc(half_map_1, half_map_2, voxel_size=voxel_size)[1:]
    shell = fsc.shells(shape, voxel_size, half=True).clamp_(max=len(curve) + 1)
    weight = fsc.half_weight(shape).expand(shell.shape)
    # A coefficient and its mirror image are one. The FSC of n by chance has a spread of n^(-1/2).
    count = fsc.shell_sum(weight, shell, len(curve) + 1)[1:] / 2
    best = float((curve * count.sqrt()).nan_to_num().max())
    if best < LEAST_AGREEMENT:
        raise ValueError(
            f"no signal: the half maps agree in no shell by more than chance (at best "
            f"{best:.1f} times its spread, {LEAST_AGREEMENT:g} are wanted)"
        )


def check_given_maximum(brightest: float, settings: GreySettings, say=print) -> None:
    """Says if the MAX of --grey-scale is far from a map's brightest density above solvent.

    Raises ValueError if the map would be all solvent, or all protein.
    """
    if settings.maximum is None:
        return
    share = brightest / settings.maximum
    words = (
        f"--grey-scale {settings.maximum:g}: the brightest density of this map is {share:.3g} "
        "times that; 0.2 to 1.3 times is usual"
    )
    low, high = POSSIBLE_BRIGHTNESS
    if not low <= share <= high:
        raise ValueError(f"{words}; give another MAX, or leave it out")
    low, high = USUAL_BRIGHTNESS
    if not low <= share <= high:
        say(f"warning: {words}")


def without_detail(
    observation: Observation, settings, method: str, classical: str, say=print
) -> str:
    """The method for an observation that may hold nothing of what the prior knows.

    Raises ValueError if the given grey scale cannot be that of the map.
    """
    scale = observation.scale
    start = observation.start.cpu() * scale.std + scale.mean
    brightness = volume.top_value(start, 99.999)
    if settings.maximum is not None:
        check_given_maximum(brightness * scale.maximum, settings, say)
    elif brightness > USUAL_BRIGHTNESS[1]:
        words = (
            "warning: this map holds no detail that the prior knows: it is noise alone, or blurred "
            "more than all it was trained on. If it is noise, every result of it means nothing"
        )
        # Noise that was given may be wrong.
        given = [name for name in ("noise", "snr") if getattr(settings, name, None) is not None]
        if given:
            words += f". Or {flag_of(given[0])} does not fit it"
        if settings.method == "auto":
            say(f"{words}; {classical} instead, name a --method to use the prior all the same")
            say_unused(settings, classical.lower(), say)
            return classical.lower()
        say(words)
    return method


def say_unlike_a_map(density: Tensor, say=print) -> None:
    """Say what makes the likelihood of a map (D, H, W) unlike that of others: padding, hot voxels.

    Measured on the middle of the demo's truth: 77 % of the voxels set to 0 took it from 2.1 (with
    3 % of noise) to 6.1 nats per voxel, and one voxel of three times the maximum from 4.9 to 5.2.
    """
    # The value that most voxels have, if one has many.
    share = float((density == density.flatten().mode().values).float().mean())
    if share > EQUAL_TO_NOTE:
        say(
            f"warning: {share:.0%} of the voxels hold one value, as outside of a mask; such voxels "
            "raise log p much (2 to 6 nats per voxel on the demo), compare maps of one mask"
        )

    # A hot voxel is far brighter than all 26 voxels around it. Protein is not.
    top = int(density.flatten().argmax())
    corner = [int(i) for i in torch.unravel_index(torch.tensor(top), density.shape)]
    around = density[tuple(slice(max(i - 1, 0), i + 2) for i in corner)].flatten()
    if len(around) > 1:
        brightest, next_brightest = around.topk(2).values.tolist()
        if brightest > HOT * max(next_brightest, 0):
            z, y, x = corner
            say(
                f"warning: voxel {z} {y} {x} (z y x) is over {HOT:g} times as bright as all around "
                "it; such hot voxels set the grey scale and change log p, clip them or give "
                "--grey-scale"
            )


def keeps_every_shell(noise: Tensor, signal: Tensor, voxel_size, floor: float = 0.02) -> Tensor:
    """Signal power per coefficient (D, H, W) that is `floor` of the noise at least.

    A Wiener filter with it keeps some of every shell, and so the FSC of the map it filters.
    """
    expanded = degrade.expand_shells(signal, noise.shape, voxel_size)
    return torch.maximum(expanded, floor * noise)


def without_clamps(method: str, settings: DenoiseSettings, negative: float, say=print) -> str:
    """The method for a map of which the share `negative` of the signal's power is negative."""
    words = f"{negative:.0%} of the signal's power is negative density, which no prior here knows"
    if method == "wiener":
        say(f"{words}, so that the result keeps it")
    elif settings.method == "auto":
        say(f"{words}: Wiener filter instead; name a --method to use the prior all the same")
        say_unused(settings, "wiener", say)
        method = "wiener"
    else:
        say(f"{words}: --method {method} will lose it")
    return method
