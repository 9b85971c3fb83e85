"""What a restoration prints and writes: progress, scores, maps, a picture, a .json.

    filled = sum_k n_k m_k / sum_k n_k p_k     power in the missing wedge                     (1)
    change = |F(after - before)| / |F before|  over the measured coefficients                 (2)
    FSC(x, truth) = <x_1, y_2> + <x_2, y_1> / 2 |x| <y_1, y_2>^(1/2),   x = (x_1 + x_2) / 2   (3)

In shell k, n_k coefficients are missing, of mean power m_k, and p_k is the mean power of those that
were measured. filled is 1 if all directions hold the same power. Shell 0, the background, is left
out of both.

(3) needs no truth. x_1 is made of half map y_1 alone and x_2 of y_2 alone, by any method. The noise
of y_2 knows nothing of x_1, so that the mean of <x_1, y_2>, a sum over a shell of the transform, is
<x_1, truth>. Ours; on real maps with noise added it was .02 off the true FSC_AUC (RESULTS.md,
section 16).

`say` is what prints a line: `print`, or `silent` for no output.
"""

import json
import math
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fsc
import mrc
import posterior
from checkpoint import Prior
from files import AtomicOutputs, without_nan
from fourier import rfft3, stored_half
from memory import check_memory
from mrc import MAP_SUFFIXES, SUFFIXES, Map
from report_picture import draw

# Of a difference of two numbers of (3), over real maps with noise added.
EXPECTED_ERROR = 0.01


@dataclass
class Result:
    """What a task returns: maps (D, H, W) on the grid of `grid`, and facts for the .json.

    densities have the grey scale of `grid`. What is shown has background 0 and bright protein.
    """

    grid: Map  # its grid and header are those of the result
    densities: dict[str, Tensor]  # to write, by the suffix of their names; "" is the result
    shown: dict[str, Tensor]  # to score and draw, by name: the input, classical answers
    report: dict[str, Any]
    region: Tensor | None = None  # coefficients to score apart: those that the wedge misses
    across: int = 1  # axis (z, y, x) that pictures are cut across

    @property
    def maps(self) -> dict[str, Map]:
        return {end: replace(self.grid, density=x) for end, x in self.densities.items()}


# ---- Progress


def silent(*_) -> None:
    """Takes the place of `print` where nothing is wanted."""


class Progress:
    """Counts steps; every few seconds it says how far the run is and how long it will take."""

    def __init__(self, total: int, say=print, what: str = "step"):
        self.total = total
        self.say = say
        self.what = what
        self.done = 0
        self.begin = self.last = time.perf_counter()

    def __call__(self, steps: int = 1) -> None:
        # Every five seconds, and at the end.
        self.done += steps
        now = time.perf_counter()
        if now - self.last > 5 or self.done == self.total:
            self.last = now
            passed = now - self.begin
            left = passed / self.done * (self.total - self.done)
            self.say(f"  {self.what} {self.done}/{self.total}  {passed:.0f} s  ETA {left:.0f} s")


def say_work(prior: Prior, shape, samples: int, steps: int, words: str, say=print) -> None:
    """Say how much work is ahead. Raises ValueError if there is no memory for it."""
    # Eight samples are drawn together. Each takes some ten maps, such as x, v and y.
    needed = 4 * 10 * min(samples, 8) * math.prod(shape)
    grid = " x ".join(str(n) for n in shape)
    check_memory(needed, f"sampling on {grid} voxels", "give a smaller map or fewer --samples")

    # Tiles overlap as little as fits, posterior_tiles.draw_tiles.
    tiles = math.prod(math.ceil(n / prior.box) for n in shape)
    device = posterior.device_of(prior)
    work = f"{samples} sample(s) x {steps} steps x {tiles} tile(s) of {prior.box}^3"
    say(f"{work} on {device}; {words}")


# ---- Scores


def score(
    maps: dict[str, Tensor],
    truth: Tensor,
    region: Tensor | None,
    voxel_size: float | tuple[float, float, float],
) -> dict[str, dict]:
    """FSC of each map (D, H, W) with the truth: the curve, FSC_AUC, and FSC_0.5 in Å.

    region: boolean (D, H, W) in `fftfreq` layout, coefficients that are also scored by themselves.
    voxel_size: in Å, one number or (z, y, x).
    """
    # The shells, and the coefficients of the truth, serve all maps.
    box, voxel = fsc.shell_side(truth.shape, voxel_size)
    n = box // 2 + 1
    shell = fsc.shells(truth.shape, voxel_size, half=True).clamp_(max=n)
    weights = {"whole": fsc.half_weight(truth.shape)}
    if region is not None:
        weights["missing"] = fsc.half_weight(truth.shape, region)
    T = rfft3(truth)
    scores = {}
    for name, x in maps.items():
        X = rfft3(x)
        curves = {part: fsc.correlate_shells(X, T, shell, w, n) for part, w in weights.items()}
        resolution = fsc.resolution(curves["whole"], voxel, 0.5, box=box)
        scores[name] = {
            "auc": float(fsc.auc(curves["whole"])),
            "fsc_05": float(resolution),
            "whole": curves["whole"].tolist(),
        }
        if region is not None:
            scores[name]["auc_missing"] = float(fsc.auc(curves["missing"]))
            scores[name]["missing"] = curves["missing"].tolist()
    return scores


def say_scores(
    title: str,
    scores: dict[str, dict],
    say=print,
    hands: dict | None = None,
    side: float = math.inf,
) -> None:
    """Print one row per map.

    hands: for each map, whether its mirror image was scored. side: of the box in Å.
    """
    # The last column depends on what was compared.
    header = f"{title:29} FSC_AUC  FSC_0.5"
    if hands:
        header += "  hand"
    elif any("missing" in values for values in scores.values()):
        header += "  FSC_AUC in the missing wedge"
    say(header)

    # One row per map.
    for name, values in scores.items():
        resolution = fsc.resolution_words(values["fsc_05"], side)
        row = f"  {name:27} {values['auc']:8.3f} {resolution:>8}"
        if hands:
            row += "  mirrored" if hands[name] else "  as it is"
        elif "missing" in values:
            row += f"{values['auc_missing']:8.3f}"
        say(row)


# ---- What tells without a truth whether it worked


def compare_without_truth(result: Result, say=print) -> Result:
    """The result with what can be said of it without a truth; prints it."""
    shown = result.shown
    facts = {}
    # Half maps: how far they agree, before and after.
    if "fsc_of_halves" in result.report:
        facts |= compare_halves(result, say)

    # A missing wedge: what was put into it, and whether the measured part is still the input's.
    elif result.region is not None and "input" in shown:
        filled, change = wedge_numbers(shown, result)
        facts = {"wedge_power": filled, "measured_change": change}
        words = ", ".join(f"{name} {value:.2f}" for name, value in filled.items())
        say(f"power in the missing wedge (1: as much as in measured directions): {words}")
        words = ", ".join(f"{name} {value:.1%}" for name, value in change.items())
        say(f"change of the measured coefficients: {words}")

    # Other tasks.
    elif "input" in shown and "restored" in shown:
        both = torch.stack([shown["input"].flatten(), shown["restored"].flatten()]).double()
        facts = {"correlation_with_input": float(torch.corrcoef(both)[0, 1])}
        say(f"correlation of result and input: {facts['correlation_with_input']:.3f}")
    return replace(result, report=result.report | facts)


def compare_halves(result: Result, say=print) -> dict[str, float]:
    """Resolution in Å and FSC_AUC of the half maps before and after; prints them."""
    # The curves begin with shell 1. Shell 0 is the mean, which halves share.
    box, voxel_size = fsc.shell_side(result.grid.density.shape, result.grid.voxel_size)
    facts = {}
    names = {"given": "fsc_of_halves", "restored": "fsc_of_restored_halves"}
    for name, key in names.items():
        if key in result.report:
            curve = torch.tensor([1.0, *result.report[key]], dtype=torch.float64)
            resolution = float(fsc.resolution(curve, voxel_size, box=box))
            auc = float(fsc.auc(curve))
            facts |= {f"halves_{name}_0143": resolution, f"halves_{name}_auc": auc}
            words = fsc.resolution_words(resolution, box * voxel_size)
            say(f"half maps as {name}: FSC 0.143 at {words}, FSC_AUC {auc:.3f}")
    if "halves_restored_auc" in facts:
        say("  (restored halves share the prior, so that their FSC is no gold standard)")
    if "expected_auc" in result.report:
        say_expected(result.report["expected_auc"], say)
    return facts


def say_expected(expected: dict[str, float], say=print) -> None:
    """Print the numbers of `expected_auc`, and a warning if the result is not the best answer."""
    words = ", ".join(f"{name} {value:.3f}" for name, value in expected.items())
    say(f"FSC_AUC with the unknown truth, expected from each half against the other: {words}")
    # The result comes last.
    best = max(expected, key=expected.get)
    result = list(expected)[-1]
    if expected[result] < expected[best] - EXPECTED_ERROR:
        say(
            f"warning: by this measure {best} is better than the result ({result}), so "
            "this map, or the directions given for its noise, may not suit the method"
        )


def expected_auc(
    halves: list[Tensor], answers: dict[str, list[Tensor]], voxel_size
) -> dict[str, float]:
    """FSC_AUC with the unknown truth that (3) expects of each answer.

    halves: y_1 and y_2 (D, H, W). answers: x_1 and x_2 by name. A shell in which the halves share
    nothing counts as 0.
    """
    shape = halves[0].shape
    box, _ = fsc.shell_side(shape, voxel_size)
    n = box // 2 + 1
    shell = fsc.shells(shape, voxel_size, half=True).clamp_(max=n)
    weight = fsc.half_weight(shape).expand(shell.shape)
    Y_1, Y_2 = (rfft3(y) for y in halves)
    shared = fsc.shell_sum(weight * (Y_1 * Y_2.conj()).real, shell, n)

    found = {}
    for name, (x_1, x_2) in answers.items():
        X_1, X_2 = rfft3(x_1), rfft3(x_2)
        product = (X_1 * Y_2.conj() + X_2 * Y_1.conj()).real / 2
        power = ((X_1 + X_2) / 2).abs().square()
        product, power = fsc.shell_sum(torch.stack([weight * product, weight * power]), shell, n)
        curve = product / (power * shared.clamp(min=0)).sqrt()  # (3)
        curve = torch.where(shared * power > 0, curve.clamp(-1, 1), 0.0)
        found[name] = float(fsc.auc(curve))
    return found


def wedge_numbers(
    maps: dict[str, Tensor], result: Result
) -> tuple[dict[str, float], dict[str, float]]:
    """filled (1) and change (2) of each map (D, H, W), by name. nan where nothing was measured.

    maps["input"] is the map before.
    """
    # How often each stored coefficient counts, apart for the missing and the measured ones.
    grid = result.grid
    shape = result.region.shape
    box, _ = fsc.shell_side(shape, grid.voxel_size)
    n = box // 2 + 1
    shell = fsc.shells(shape, grid.voxel_size, half=True).clamp_(max=n).int()
    missing = stored_half(result.region)
    weight = fsc.half_weight(shape)
    parts = {"missing": weight * missing, "measured": weight * ~missing}

    def shell_sums(part: str, power: Tensor | None = None) -> Tensor:
        """Sums over the shells 1 .. n-1: of the power, or the number of coefficients."""
        values = parts[part] if power is None else parts[part] * power
        return fsc.shell_sum(values, shell, n)[1:]

    # What was measured, and how many coefficients each shell has.
    Y = rfft3(maps["input"])
    before_power = shell_sums("measured", Y.abs().square()).sum()
    count = shell_sums("missing")
    measured_count = shell_sums("measured")
    both = (count > 0) & (measured_count > 0)

    filled, change = {}, {}
    for name, x in maps.items():
        X = rfft3(x)
        power = X.abs().square()
        expected = (count * shell_sums("measured", power) / measured_count)[both].sum()
        filled[name] = float(shell_sums("missing", power)[both].sum() / expected)  # (1)
        difference = shell_sums("measured", X.sub_(Y).abs().square()).sum()
        change[name] = float((difference / before_power).sqrt())  # (2)
    return filled, change


# ---- Files


def report_files(out: Path) -> list[Path]:
    """The .json and .png beside a map `out`. Raises ValueError if `out` has no name of a map."""
    if not out.name.lower().endswith(MAP_SUFFIXES):
        raise ValueError(f"{out}: maps are written as {', '.join(SUFFIXES)}, plain or .gz, .bz2")
    return [out.with_name(mrc.stem(out) + end) for end in (".json", ".png")]


def write_report(
    result: Result,
    names: dict[str, Path],
    inputs: dict[str, Any],
    prior: Prior,
    begin: float,
    overwrite: bool = False,
    say=print,
    label: str = "cryofm sampling.py",
) -> None:
    """Write the maps of a result, a .json and a picture; all files appear together.

    names: the file of each suffix. inputs: what else the .json holds. begin: time.perf_counter()
    at the start of the run. label: what the headers of the maps say about their origin.
    """
    # The .json repeats all that it takes to make the map again.
    out = names[""]
    maps = {names[end]: map for end, map in result.maps.items()}
    json_path, picture_path = report_files(out)
    content = inputs | {
        "command": sys.argv,
        "checkpoint_sha256": prior.sha256,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": time.perf_counter() - begin,
        "output": [str(path) for path in maps],
        "voxel_size": result.grid.voxel_size,
        "fsc": {},
    }
    content |= result.report

    # The names appear together when the block ends.
    written = [*maps, json_path]
    with AtomicOutputs() as outputs:
        for path, map in maps.items():
            mrc.write_map(path, map, overwrite, label, outputs.open)
        with outputs.open(json_path) as file:
            file.write(json.dumps(without_nan(content), indent=1).encode() + b"\n")
        figure = draw(result, content)
        if figure:
            with outputs.open(picture_path) as file:
                figure.savefig(file, dpi=110, format="png")
            written.append(picture_path)

    # Say what was written, and what to look at first.
    files = ", ".join(path.name for path in written)
    if figure is None:
        files += ", no picture (pip install matplotlib)"
    seconds = time.perf_counter() - begin
    last = f"wrote {out.parent}/: {files}  ({seconds:.0f} s); open {out.name}"
    if content.get("warnings"):
        last += f", but first read the {len(content['warnings'])} warning(s) above"
    say(last)
