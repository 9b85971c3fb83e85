"""How true is what fills a missing wedge? It is tried on tilts that are hidden for a test.

    r_k  = Re <x, y>_k / <x, x>_k                over the n_k hidden coefficients of shell k    (1)
    e_k  = (<y, y>_k / <x, x>_k - r_k^2) / n_k   squared standard error of r_k                  (2)
    r'_k = sum_j w_kj r_j,  e'_k = sum_j w_kj^2 e_j,   w_kj ~ n_j exp(-(k - j)^2 / 2 s^2)       (3)
    c_k  = 1 - (1 - r'_k) max(0, 1 - 2 e'_k / (1 - r'_k)^2)                                     (4)

The tilts at both ends of the measured range are taken out of the map y, and filled in as the wedge
will be. That gives x. r_k makes |y - r x|^2 smallest. Noise that is independent between
coefficients knows nothing of x, so that r_k is right for the truth, too. (In a map that was masked
or cropped it is not quite independent.) (3) averages over neighbouring shells. The weights w_kj of
a shell k add up to 1, and r_j is cut to -1 .. 3, so that no shell rules the others. (4) moves r' to
1 by what chance can do, in the form of the non-negative garrote (Breiman 1995): where noise hides
the answer, c is 1.

What fills the wedge is multiplied by c_k, .01 to 1. Where a method guesses, its detail fades out
and does not stand there like a measurement. A factor per shell changes no FSC within the wedge. The
FSC of the whole map rises where much was guessed, because wrong coefficients weigh less beside
measured ones. The hidden tilts lie closer to measured ones than the middle of the wedge does, so
that the score there may flatter.

Ours; the idea is that of cross-validation, like the free R factor of crystallography (Brünger
1992). RESULTS.md, section 1, has what it does to real maps. The constants were chosen on half of
them, and on held-out training structures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fourier
import fsc
from mrc import Map
from sampling_settings import TiltSettings

SHARE = 1 / 12  # of the tilt range, hidden at each of its ends: 10 degrees of +-60
WIDTH = 2.0  # s of (3), in shells
NO_BETTER_THAN_CHANCE = 0.05  # FSC_AUC; a crop of a noisy average had .025, real maps .1 and more
# FSC_AUC by which POCS must beat the prior to be taken. On two real maps it was ahead by less, and
# behind by .04 and .12 in the wedge. CryoLVM's network gets no margin.
MARGIN = 0.02
LEAST = 0.01  # of c_k: a shell is never emptied, so that its FSC stays


@dataclass(frozen=True)
class HiddenTilts:
    """How well a method filled in the hidden tilts."""

    auc: float  # FSC_AUC with what was measured there, noise included; nan if nothing was hidden
    factor: Tensor  # c_k by shell, up to the corners


def try_on_hidden_tilts(
    map: Map, settings: TiltSettings, fill: Callable[[Map, TiltSettings], dict[str, Tensor]]
) -> dict[str, HiddenTilts]:
    """How well each method fills in tilts that were measured, by its name.

    fill: takes a map and settings of a smaller tilt range; returns the filled maps (D, H, W).
    """
    low, high = settings.tilt_range
    angle = SHARE * (high - low)
    narrow = replace(settings, tilt_range=(low + angle, high - angle))
    seen = narrow.measured(map)
    hidden = settings.measured(map) & ~seen

    filled = fill(replace(map, density=fourier.apply_fourier(map.density, seen)), narrow)
    return {name: compare(x, map, hidden) for name, x in filled.items()}


def compare(x: Tensor, map: Map, hidden: Tensor) -> HiddenTilts:
    """(1) to (4) for what was filled in, x (D, H, W).

    hidden: boolean (D, H, W), `fftfreq` layout, with the mirror image of each coefficient.
    """
    # Sums over the hidden coefficients of each shell, one after the other: maps may be large.
    shell = fsc.shells(x.shape, map.voxel_size, half=True)
    shells = int(shell.max()) + 1
    weight = fsc.half_weight(x.shape) * fourier.stored_half(hidden)
    X, Y = fourier.rfft3(x), fourier.rfft3(map.density)
    product = fsc.shell_sum(fsc.real_dot(X, Y).mul_(weight), shell, shells)
    power_x = fsc.shell_sum(fsc.real_dot(X, X).mul_(weight), shell, shells)
    power_y = fsc.shell_sum(fsc.real_dot(Y, Y).mul_(weight), shell, shells)
    count = fsc.shell_sum(weight, shell, shells)
    factor = factor_of(product, power_x, power_y, count)

    # The FSC, up to Nyquist.
    box, _ = fsc.shell_side(x.shape, map.voxel_size)
    curve = (product / (power_x * power_y).sqrt())[: box // 2 + 1]
    return HiddenTilts(float(fsc.auc(curve)), factor)


def factor_of(product: Tensor, power_x: Tensor, power_y: Tensor, count: Tensor) -> Tensor:
    """c_k of (4) from the sums over shells in (1) and (2). 1 if nothing was filled in at all."""
    # Leave out shells where nothing was filled in.
    filled = power_x > 0
    if not filled.any():
        return torch.ones_like(product)
    power_x = torch.where(filled, power_x, 1.0)
    ratio = product / power_x  # (1)
    error = (power_y / power_x - ratio**2) / count.clamp(min=1)  # (2)
    ratio = torch.where(filled, ratio.clamp(-1, 3), 0.0)
    error = torch.where(filled, error.clamp(0, 4), 0.0)  # 4: squared distance of the cuts from 1

    # Each shell's weights add up to 1. The error of a mean takes their squares.               (3)
    k = torch.arange(len(count), dtype=ratio.dtype)
    logarithm = count.log() - (k[:, None] - k) ** 2 / (2 * WIDTH**2)
    weight = logarithm.masked_fill(~filled, -torch.inf).softmax(1)
    ratio = weight @ ratio
    error = weight**2 @ error

    by_chance = 2 * error / ((1 - ratio) ** 2).clamp(min=torch.finfo(ratio.dtype).tiny)
    return (1 - (1 - ratio) * (1 - by_chance).clamp(min=0)).clamp(LEAST, 1)  # (4)


def scale_missing(x: Tensor, measured: Tensor, factor: Tensor, voxel_size) -> Tensor:
    """A filled map (D, H, W) whose missing coefficients are multiplied by c_k.

    measured: boolean (D, H, W), `fftfreq` layout.
    """
    # Put 0 in place of the share 1 - c_k of each missing coefficient.
    shell = fsc.shells(x.shape, voxel_size, half=True)
    lost = (1 - factor).float()[shell] * ~fourier.stored_half(measured)
    return fourier.put_back(x, torch.zeros_like(x), lost)


def say_tests(tests: dict[str, HiddenTilts], settings: TiltSettings, say=print) -> None:
    """Print how well hidden tilts were filled in."""
    low, high = settings.tilt_range
    if any(math.isnan(test.auc) for test in tests.values()):
        say("test: too few tilts were measured to hide some of them")
        return
    words = ", ".join(f"{name} {test.auc:.3f}" for name, test in tests.items())
    say(
        f"test: {SHARE * (high - low):.3g} degrees of measured tilts at each end were hidden and "
        f"filled in; FSC_AUC with what was measured there, noise included: {words}"
    )
    if max(test.auc for test in tests.values()) < NO_BETTER_THAN_CHANCE:
        say(
            "warning: no method filled them in better than chance, so the wedge stays nearly "
            "empty; check --tilt-range, --tilt-axis and the sign of protein"
        )


def judge(
    tests: dict[str, HiddenTilts], method: str, settings: TiltSettings, say=print
) -> tuple[str, Tensor, dict]:
    """The method after the tests, c_k of what it fills in, and facts for the .json.

    "auto" takes POCS where it was clearly better than the method.
    """
    say_tests(tests, settings, say)
    if settings.method == "auto" and method != "pocs" and pocs_is_better(tests, method, say):
        method = "pocs"
    facts = {
        "hidden_auc": {name: test.auc for name, test in tests.items()},
        "fill_factor": {name: test.factor.tolist() for name, test in tests.items()},
    }
    return method, tests["POCS" if method == "pocs" else method].factor, facts


def pocs_is_better(tests: dict[str, HiddenTilts], name: str, say=print) -> bool:
    """Whether POCS filled in the hidden tilts clearly better than method `name`; says so."""
    margin = MARGIN if name == "prior" else 0.0
    better = tests["POCS"].auc > tests[name].auc + margin
    if better:
        say(f"POCS was better in this test and fills in the wedge; --method {name} takes the other")
    return better
