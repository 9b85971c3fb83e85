"""Is the uncertainty honest? The tables of RESULTS.md, "Uncertainty".

    python data_prepare.py structures structures/val.tsv       # writes structures/val.npz
    python tests/benchmark_uncertainty.py structures/val.npz --count 8

Each structure is degraded as in benchmark_denoise.py (half maps) or benchmark_wedge.py, and
restored with default settings. One row per structure and case, with

    auc, classical     FSC_AUC of the result and of the classical answer (wedge: posterior mean and
                       POCS, in the missing region)
    expected           FSC_AUC of the restored references, known without the truth
    molecule, rest     share of voxels where the truth lies within interval_90 _std of the result
    gauss              the same share of the molecule within 1.645 _std
    error_over_std     root mean squares in the molecule (density above a tenth of the maximum)

Rows that the csv holds already are skipped. --picture draws the expected scores against the true.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_denoise import degrade_truth
from benchmark_wedge import VOXEL_SIZE, WEIGHTS, read_inputs, truth_of

import degrade
import fourier
from fsc import auc, fsc
from mrc import Map
from report import silent
from sampling_half_maps import restore_half_maps
from sampling_settings import DenoiseSettings, WedgeSettings
from sampling_tasks import restore_wedge

# name -> nominal resolution (Å) and B-factor (Å^2) of half maps, or noise of a map with a wedge
CASES = {
    "half maps 3.2": (3.2, None),
    "half maps 4.3": (4.3, None),
    "half maps 6.1": (6.1, None),
    "half maps 4.3, B = 100": (4.3, 100.0),
    "wedge, noise 0.03": 0.03,
    "wedge, noise 0.1": 0.1,
}
COLUMNS = ["case", "structure", "auc", "classical", "expected", "molecule", "rest", "gauss"]
COLUMNS += ["error_over_std", "seconds"]


def score(x: Tensor, truth: Tensor, std: Tensor, interval: float) -> list[float]:
    """The last four columns but seconds, for a result x and its truth (D, H, W)."""
    error = (x - truth).abs()
    inside = (error <= interval * std).float()
    gauss = (error <= 1.645 * std).float()
    molecule = truth > 0.1 * truth.max()
    ratio = (error[molecule].square().mean() / std[molecule].square().mean()).sqrt()
    shares = (inside[molecule].mean(), inside[~molecule].mean(), gauss[molecule].mean())
    return [float(value) for value in (*shares, ratio)]


def half_maps(truth: Tensor, case, generator, prior, settings: dict) -> list[float]:
    clean, power = degrade_truth(truth, *case)
    halves = []
    for _ in range(2):
        noisy = degrade.add_spectral_noise(clean, power, generator=generator)
        halves.append(Map(noisy, VOXEL_SIZE))
    result = restore_half_maps(*halves, prior, DenoiseSettings(**settings), silent)
    x = result.densities[""]
    curves = [fsc(y, truth) for y in (x, result.shown["Wiener, positive"])]
    numbers = [float(auc(curve)) for curve in curves]
    expected = float(auc(torch.tensor(result.report["expected_fsc"])))
    interval = result.report["interval_90"]
    return [*numbers, expected, *score(x, clean, result.densities["_std"], interval)]


def wedge(truth: Tensor, noise: float, generator, prior, settings: dict) -> list[float]:
    measured = fourier.hermitian_part(degrade.wedge_mask(truth.shape, (-60, 60)))
    y = truth + noise * torch.randn(truth.shape, generator=generator)
    y = fourier.apply_fourier(y, measured)
    result = restore_wedge(Map(y, VOXEL_SIZE), prior, WedgeSettings(**settings), silent)
    x = result.densities["_mean"]
    missing_truth = fourier.apply_fourier(truth, ~measured)
    numbers = []
    for answer in (x, result.shown["POCS"]):
        curve = fsc(fourier.apply_fourier(answer, ~measured), missing_truth)
        numbers.append(float(auc(curve)))
    expected = float(auc(torch.tensor(result.report["expected_fsc"])))
    interval = result.report["interval_90"]
    return [*numbers, expected, *score(x, truth, result.densities["_std"], interval)]


def say_table(rows: list[list]) -> None:
    """Means over the structures of each case, and how well `expected` predicts."""
    print(f"{'case':24}" + "".join(f"{name:>15}" for name in ("n", *COLUMNS[2:])))
    for case in CASES:
        values = torch.tensor([[float(v) for v in row[2:]] for row in rows if row[0] == case])
        if len(values):
            means = "".join(f"{value:15.3f}" for value in values.mean(0).tolist())
            print(f"{case:24}{len(values):15}{means}")
    differences = torch.tensor([float(row[4]) - float(row[2]) for row in rows])
    print(
        f"expected - true FSC_AUC: mean {differences.mean():+.3f}, "
        f"root mean square {differences.square().mean().sqrt():.3f}"
    )


def draw(rows: list[list], path: str) -> None:
    """Draw the expected FSC_AUC of every row against the true one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for case in CASES:
        points = [(float(row[2]), float(row[4])) for row in rows if row[0] == case]
        if points:
            axes.scatter(*zip(*points), s=14, label=case)
    axes.axline((0.5, 0.5), slope=1, color="grey", linewidth=0.8)
    axes.set_xlabel("FSC_AUC with the truth")
    axes.set_ylabel("expected without the truth")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("structures", help="archive of structures (.npz)")
    add("--held-out", action="store_true", help="of a training archive, those held out")
    add("--ckpt", default=str(WEIGHTS))
    add("--first", type=int, default=0, help="structure to begin with")
    add("--count", type=int, default=8)
    add("--cases", nargs="+", default=list(CASES), choices=CASES)
    add("--samples", type=int, default=4)
    add("--csv", default="runs/uncertainty.csv")
    add("--picture", help="draws `expected` against `auc` (needs matplotlib)")
    args = cli.parse_args()
    prior, structures = read_inputs(
        args.ckpt, args.structures, args.held_out, args.first, args.count
    )

    # Rows of an earlier run stay.
    path = Path(args.csv)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.reader(file))[1:]
    else:
        path.write_text(",".join(COLUMNS) + "\n")
    done = {(row[0], row[1]) for row in rows}

    settings = {"samples": args.samples, "method": "prior"}
    for i, structure in enumerate(structures):
        truth = truth_of(structure)
        for case in args.cases:
            if (case, structure.label) in done:
                continue
            begin = time.perf_counter()
            generator = torch.Generator().manual_seed(args.first + i)
            restore = wedge if case.startswith("wedge") else half_maps
            numbers = restore(truth, CASES[case], generator, prior, settings)
            seconds = time.perf_counter() - begin
            row = [case, structure.label, *(f"{value:.4f}" for value in numbers), f"{seconds:.0f}"]
            rows.append(row)
            with open(path, "a", newline="") as file:
                csv.writer(file).writerow(row)
    say_table(rows)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
