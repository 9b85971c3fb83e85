"""How much of what fills a missing wedge is true: asked of tilts that are hidden for a test.

    r_k = Re <x, y>_k / <x, x>_k                      over the hidden coefficients of shell k   (1)
    e_k = (<y, y>_k / <x, x>_k - r_k^2) / n_k          squared standard error of r_k             (2)
    c   = 1 - (1 - r) max(0, 1 - 2 e / (1 - r)^2)      of r and e, smoothed over shells          (3)

The tilts at both ends of the measured range are taken out of the map y, and filled in as the wedge
will be. That gives x. r_k makes |y - r x|^2 smallest. The noise of y knows nothing of x, so that
r_k is right for the truth, too. (3) moves r towards 1 by what chance can do (James & Stein 1961).
What fills the wedge is multiplied by c_k, .01 to 1: where a method guesses, its detail fades out
and does not stand there like a measurement.

A factor per shell changes no FSC within the wedge. That of the whole map gains, because wrong
coefficients weigh less beside measured ones. Ours; the idea is that of cross-validation, like the
free R factor of crystallography (Brünger 1992). RESULTS.md, section 1, has what it does to real
maps. (3) and its constants were chosen on half of them, and on held-out training structures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fourier
import fsc
from mrc import Map
from sampling_settings import TiltSettings

HIDDEN = 1 / 12  # of the tilt range, at each of its ends: 10 degrees of +-60
LEAST = 0.01  # of (3): a shell is never emptied, so that its FSC stays
SMOOTH = 2.0  # shells: standard deviation of the Gaussian over which (1) and (2) are averaged


@dataclass(frozen=True)
class Answer:
    """How well a method filled in the hidden tilts."""

    auc: float  # FSC_AUC with what was measured there; its noise counts as signal
    factor: Tensor  # c_k of (3) by shell, up to the corners


def hide_tilts(
    map: Map, settings: TiltSettings, fill: Callable[[Map, TiltSettings], dict[str, Tensor]]
) -> dict[str, Answer]:
    """How well each method fills in tilts that were measured, by its name.

    fill: takes a map and settings of a smaller tilt range; returns the filled maps (D, H, W).
    """
    low, high = settings.tilt_range
    angle = HIDDEN * (high - low)
    narrow = replace(settings, tilt_range=(low + angle, high - angle))
    seen = narrow.measured(map)
    hidden = settings.measured(map) & ~seen

    answers = fill(replace(map, density=fourier.apply_fourier(map.density, seen)), narrow)
    return {name: compare(x, map, hidden) for name, x in answers.items()}


def compare(x: Tensor, map: Map, hidden: Tensor) -> Answer:
    """(1) to (3) for what was filled in, x (D, H, W).

    hidden: boolean (D, H, W), `fftfreq` layout.
    """
    # Sums over the hidden coefficients of each shell, one after the other: maps may be large.
    shell = fsc.shells(x.shape, map.voxel_size, half=True)
    n = int(shell.max()) + 1
    weight = fsc.half_weight(x.shape, hidden)
    X, Y = fourier.rfft3(x), fourier.rfft3(map.density)
    pairs = ((X, Y), (X, X), (Y, Y))
    product, power, data = (
        fsc.shell_sum(fsc.real_dot(A, B).mul_(weight), shell, n) for A, B in pairs
    )
    count = fsc.shell_sum(weight.expand(shell.shape), shell, n)
    factor = factor_of(product, power, data, count)

    # The FSC, up to Nyquist.
    box, _ = fsc.shell_side(x.shape, map.voxel_size)
    curve = (product / (power * data).sqrt())[: box // 2 + 1]
    return Answer(float(fsc.auc(curve)), factor)


def factor_of(product: Tensor, power: Tensor, data: Tensor, count: Tensor) -> Tensor:
    """c_k of (3) from the sums over shells in (1) and (2). 1 where nothing was filled in."""
    tiny = torch.finfo(power.dtype).tiny
    ratio = product / power.clamp(min=tiny)  # (1)
    error = (data / power.clamp(min=tiny) - ratio**2).clamp(min=0) / count.clamp(min=1)  # (2)

    # Average over neighbouring shells. Each counts by the number of its coefficients.
    k = torch.arange(len(count), dtype=power.dtype)
    near = torch.exp(-((k[:, None] - k) ** 2) / (2 * SMOOTH**2)) * count * (power > 0)
    total = near.sum(1, keepdim=True)
    near = near / total.clamp(min=tiny)
    ratio, error = near @ ratio, near**2 @ error

    below = 1 - ratio
    chance = 2 * error / (below**2).clamp(min=tiny)
    factor = (1 - below * (1 - chance).clamp(min=0)).clamp(LEAST, 1)  # (3)
    return torch.where(total[:, 0] > 0, factor, 1.0)


def scale_missing(x: Tensor, measured: Tensor, factor: Tensor, voxel_size) -> Tensor:
    """A filled map (D, H, W) whose missing coefficients are multiplied by c_k.

    measured: boolean (D, H, W), `fftfreq` layout.
    """
    shell = fsc.shells(x.shape, voxel_size, half=True)
    lost = (1 - factor).float()[shell] * ~fourier.stored_half(measured)
    return fourier.put_back(x, torch.zeros_like(x), lost)


def say_hidden(answers: dict[str, Answer], settings: TiltSettings, say=print) -> dict:
    """Print how well hidden tilts were filled in; returns it for the .json."""
    low, high = settings.tilt_range
    words = ", ".join(f"{name} {answer.auc:.3f}" for name, answer in answers.items())
    say(
        f"test: {HIDDEN * (high - low):.3g} degrees of measured tilts at each end were hidden and "
        f"filled in; FSC_AUC with what was measured there, noise included: {words}"
    )
    return {
        "hidden_auc": {name: answer.auc for name, answer in answers.items()},
        "fill_factor": {name: answer.factor.tolist() for name, answer in answers.items()},
    }


def pocs_is_better(answers: dict[str, Answer], name: str, say=print) -> bool:
    """Whether POCS filled in the hidden tilts better than method `name`; says so."""
    better = answers["POCS"].auc > answers[name].auc
    if better:
        say(f"POCS was better in this test: it fills in the wedge; --method {name} goes on")
    return better
