"""What a restoration prints and writes: progress, scores, maps, a picture, a .json.

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
from fsc_picture import draw_fsc
from memory import check_memory
from mrc import MAP_SUFFIXES, SUFFIXES, Map


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
    across: int = 1  # axis that pictures are cut across

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

    # Tiles overlap as little as fits, posterior.draw_tiles.
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
    box, voxel = fsc.shell_side(truth.shape, voxel_size)
    scores = {}
    for name, x in maps.items():
        # Over all coefficients.
        curve = fsc.fsc(x, truth, voxel_size=voxel_size)
        resolution = fsc.resolution(curve, voxel, 0.5, box=box)
        found = {"auc": float(fsc.auc(curve)), "fsc_05": float(resolution), "whole": curve.tolist()}

        # Over the region alone.
        if region is not None:
            missing = fsc.fsc(x, truth, region, voxel_size=voxel_size)
            found["auc_missing"] = float(fsc.auc(missing))
            found["missing"] = missing.tolist()
        scores[name] = found
    return scores


def say_scores(title: str, scores: dict[str, dict], say=print, hands: dict | None = None) -> None:
    """Print one row per map. hands: for each map, whether its mirror image was scored."""
    # The last column depends on what was compared.
    header = f"{title:29} FSC_AUC  FSC_0.5"
    if hands:
        header += "  hand"
    elif any("missing" in values for values in scores.values()):
        header += "  FSC_AUC in the missing wedge"
    say(header)

    # One row per map.
    for name, values in scores.items():
        row = f"  {name:27} {values['auc']:8.3f} {values['fsc_05']:6.2f} Å"
        if hands:
            row += "  mirrored" if hands[name] else "  as it is"
        elif "missing" in values:
            row += f"{values['auc_missing']:8.3f}"
        say(row)


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
) -> None:
    """Write the maps of a result, a .json and a picture; all files appear together.

    names: the file of each suffix. inputs: what else the .json holds. begin: time.perf_counter()
    at the start of the run.
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
            mrc.write_map(path, map, overwrite, "sampling.py", outputs.open)
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
    say(f"wrote {out.parent}/: {files}  ({seconds:.0f} s); open {out.name}")


# ---- The picture


def draw(result: Result, content: dict[str, Any]):
    """A figure of central slices in one grey scale, beside the FSC; None without matplotlib.

    content: of the .json. Across the tilt axis a slice shows the wedge.
    """
    # matplotlib is optional.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None

    maps, scores, across = result.shown, content["fsc"], result.across
    # One panel per map, and one for the curves.
    panels = len(maps) + bool(scores)
    rows = 1 if panels < 5 else 2
    columns = math.ceil(panels / rows)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()

    # One grey scale for all: that of the restored map where there is one.
    # Noise in the input would set the scale otherwise.
    scaling = [maps["restored"]] if "restored" in maps else maps.values()
    top = max(brightest(x) for x in scaling)
    for axis, (name, x) in zip(axes, maps.items()):
        middle = x.select(across, x.shape[across] // 2)
        axis.imshow(middle.numpy(), cmap="gray_r", vmin=-0.15 * top, vmax=top, origin="lower")
        axis.set_title(name)
    if scores:
        axes[panels - 1].set_axis_on()
        # All maps have the grid of the truth.
        shape = next(iter(maps.values())).shape
        box, voxel_size = fsc.shell_side(shape, content["truth_voxel_size"])
        draw_scores(axes[panels - 1], scores, box * voxel_size)
    return figure


def brightest(x: Tensor) -> float:
    """A value that hardly any voxel exceeds, from a part of the voxels."""
    return float(torch.quantile(x.flatten()[::7][: 10**7], 0.9995))


def draw_scores(axis, scores: dict[str, dict], side: float) -> None:
    """The FSC of each map with the truth. Where a region was scored, it is drawn solid.

    side: of the box in Å, the one that makes the shells.
    """
    # A label that begins with "_" stays out of the legend.
    curves, styles = {}, {}
    for i, (name, values) in enumerate(scores.items()):
        label = f"{name} {values.get('auc_missing', values['auc']):.2f}"
        curves[label] = values.get("missing", values["whole"])
        styles[label] = {"color": f"C{i}"}
        if "missing" in values:
            curves[f"_{name}"] = values["whole"]
            styles[f"_{name}"] = {"color": f"C{i}", "lw": 0.8, "ls": "--"}

    # Shell k is at k cycles per box.
    shells = len(values["whole"])
    frequency = [k / side for k in range(shells)]
    draw_fsc(axis, frequency, curves, styles)
    has_region = "missing" in values
    axis.set_title("FSC: missing wedge (-), whole (--)" if has_region else "FSC with the truth")
