"""What a restoration leaves beside its maps: progress, scores, a picture, a .json.
"""
import argparse
import math
import platform
import sys
import time
from pathlib import Path

import torch.utils.checkpoint
from torch import Tensor

import fsc
from checkpoint import Prior
from files import write_json
from mrc import MAP_SUFFIXES, SUFFIXES, stem


def say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, flush=True)


def say_work(args: argparse.Namespace, prior: Prior, shape, samples: int, steps: int, more: str) -> None:
    say(args, f"{samples} sample(s) x {steps} steps x {math.prod(math.ceil(n / prior.box) for n in shape)} tile(s) of "
              f"{prior.box}^3 on {args.device}; {more}")


class Progress:
    """Called once a step: prints how far the run is and how long it will take, every few seconds."""
    def __init__(self, args: argparse.Namespace, total: int, what: str = "step"):
        self.args, self.total, self.done, self.what = args, total, 0, what
        self.begin = self.last = time.perf_counter()

    def __call__(self) -> None:
        self.done += 1
        now = time.perf_counter()
        if now - self.last > 5 or self.done == self.total:
            self.last = now
            left = (now - self.begin) / self.done * (self.total - self.done)
            say(self.args, f"  {self.what} {self.done}/{self.total}  {now - self.begin:.0f} s  ETA {left:.0f} s")


def score(maps: dict[str, Tensor], truth: Tensor, region: Tensor | None, voxel_size: float) -> dict[str, dict]:
    """FSC of each map with the truth: curve, FSC_AUC, FSC_0.5 in Å; over all coefficients and over those of a region."""
    scores = {}
    for name, x in maps.items():
        whole = fsc.fsc(x, truth)
        scores[name] = {"auc": float(fsc.auc(whole)), "fsc_05": float(fsc.resolution(whole, voxel_size, 0.5, box=min(truth.shape))),
                        "whole": whole.tolist()}
        if region is not None:
            missing = fsc.fsc(x, truth, region)
            scores[name] |= {"auc_missing": float(fsc.auc(missing)), "missing": missing.tolist()}
    return scores


def draw(path: Path, maps: dict[str, Tensor], scores: dict[str, dict], voxel_size: float, across: int) -> None:
    """Central slices (D, H, W), one grey scale, cut where the wedge shows: across the tilt axis; the FSC beside them."""
    from matplotlib.figure import Figure
    panels = len(maps) + bool(scores)
    rows = 1 if panels < 5 else 2
    columns = -(-panels // rows)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    high = lambda x: float(torch.quantile(x.flatten()[::7][:10 ** 7], 0.9995))
    top = high(maps["restored"]) if "restored" in maps else max(map(high, maps.values()))
    for ax, (name, x) in zip(axes, maps.items()):
        ax.imshow(x.select(across, x.shape[across] // 2).numpy(), cmap="gray_r", vmin=-0.15 * top, vmax=top, origin="lower")
        ax.set_title(name)
        ax.set_axis_off()
    if scores:
        part = "missing" if "missing" in next(iter(scores.values())) else "whole"
        n = len(next(iter(scores.values()))["whole"])
        frequency = [k / (2 * (n - 1)) / voxel_size for k in range(n)]
        for i, (name, values) in enumerate(scores.items()):
            auc = values["auc_missing" if part == "missing" else "auc"]
            axes[-1].plot(frequency, values[part], color=f"C{i}", label=f"{name} {auc:.2f}")
            if part == "missing":
                axes[-1].plot(frequency, values["whole"], color=f"C{i}", lw=0.8, ls="--")
        axes[-1].set(title="FSC: missing wedge (-), whole (--)" if part == "missing" else "FSC with the truth", xlabel="1/Å",
                     ylim=(-0.1, 1.02), xlim=(0, frequency[-1]))
        axes[-1].legend(frameon=False, fontsize=8)
    for ax in axes[panels:]:
        ax.set_axis_off()
    figure.savefig(path, dpi=110, format="png")


def report_files(out: Path) -> list[Path]:
    """The names that `write_report` writes beside a map `out`. Raises ValueError if `out` is no name of a map."""
    if not out.name.lower().endswith(MAP_SUFFIXES):
        raise ValueError(f"{out}: maps are written as {', '.join(SUFFIXES)}, plain or with .gz, .bz2")
    return [out.with_name(stem(out) + end) for end in (".json", ".png")]


def write_report(args: argparse.Namespace, out: Path, shown: dict[str, Tensor], prior: Prior, begin: float, report: dict) -> None:
    """The .json and the picture beside `out`."""
    settings = {"command": sys.argv, "settings": vars(args), "checkpoint_sha256": prior.sha256, "torch": torch.__version__,
                "python": platform.python_version(), "seconds": time.perf_counter() - begin}
    json_path, picture = report_files(out)
    write_json(json_path, settings | report)
    voxel_size = min(report.get("truth_voxel_size") or report.get("voxel_size", (prior.voxel_size,)))
    try:
        draw(picture, shown, report.get("fsc", {}), voxel_size, "zyx".index(args.tilt_axis))
        written = [out.name, json_path.name, picture.name]
    except ImportError:
        written = [out.name, json_path.name, "no picture (pip install matplotlib)"]
    say(args, f"wrote {out.parent}/: {', '.join(written)}  ({time.perf_counter() - begin:.0f} s)")
