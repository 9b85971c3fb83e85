"""CryoFM's tables, row by row, with its own noise (arXiv:2410.08631, Tables 1, 2, 3, 5, 8, 9).

    python data_prepare.py structures structures/val.tsv       # writes structures/val.npz
    python tests/benchmark_paper.py structures/val.npz         # the degraded and the classical map
    python tests/benchmark_paper.py structures/val.npz --methods prior --count 8
    python tests/benchmark_paper.py structures/val.npz --methods paper --box 32 --count 2
    python tests/benchmark_paper.py structures/train.npz --held-out --methods paper --box 32 \\
        --count 2 --rows 4.3 wedge --steps 50 200 1000 --lambda-max 1 5 10    # Tables 8 and 9

A structure is simulated at 3 Å on 64^3 voxels of 1.5 Å, cropped to --box and set to 0 .. 1. It gets
two half maps with noise of their own, P = P_structure / SNR and SNR = FSC / (1 - FSC), where FSC is
a column of CURVES. For the rows +-A the curve is that of 3.2 Å, and P is 50 times as large outside
of the tilt range. P is not rescaled, so that every shell has more noise than in the row 3.2. The
wedge row has one map without noise and a tilt range of +-60 degrees. The tilt axis is z.

Each half is restored by itself. Scored is the mean of both against the structure, with the shells
of the authors' release. Methods:

    classical   the Wiener filter and positivity (POCS for the wedge), noise from the halves
    prior       what `sampling.py` does, one sample of each half
    paper       Algorithm 1 (2 for the wedge), one sample of each half, in the grey scale of the
                structure, as in the release. Noise power from the halves (D.1, D.2).

lambda_max is a length in the space of all voxels. The paper's maps have 64^3, so at --box 32 the
same number gives the observation sqrt(8) times the weight beside |x|.

operator-noise and per-time are Algorithm 1 with fresh noise in A, as in the release, and with a
weight of the observation that does not depend on the number of steps.

Every score is added to --csv at once, and a second run goes on from there. After a change of the
code give another file.
"""

import argparse
import csv
import functools
import itertools
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_wedge import BOX, VOXEL_SIZE, WEIGHTS, read_inputs, truth_of

import degrade
import fourier
import posterior
import volume
from checkpoint import Prior
from fsc import auc, fsc, resolution
from mrc import Map
from posterior import Observation
from report import silent
from sampling_half_maps import restore_half_maps
from sampling_settings import AnisotropicSettings, DenoiseSettings, WedgeSettings
from sampling_tasks import restore_wedge

# FSC of half maps in the authors' release (github.com/ByteDance-Seed/cryofm, Apache-2.0), rounded
# to five places. The last shell of a 64^3 box of 1.5 Å is 1/3.
CURVES = """
1/Å         3.2      4.3      6.1      8.5       15
0.01042  0.99999  0.99979  0.99981  0.99941  0.99634
0.02083  0.99987  0.99889  0.99952  0.99844  0.98661
0.03125  0.99980  0.99516  0.99794  0.99377  0.95762
0.04167  0.99870  0.98637  0.99349  0.94862  0.83881
0.05208  0.99753  0.98155  0.96612  0.83194  0.58829
0.06250  0.99366  0.97149  0.89705  0.75589  0.17361
0.07292  0.99427  0.95794  0.88723  0.67796  0.03828
0.08333  0.99395  0.94797  0.88044  0.66413  0.03068
0.09375  0.99178  0.93872  0.84799  0.56779  0.03135
0.10417  0.98826  0.91005  0.81129  0.39245  0.01327
0.11458  0.98207  0.83908  0.69333  0.17286  0.00112
0.12500  0.96947  0.74440  0.51020  0.06960  0.01442
0.13542  0.95656  0.62988  0.42626  0.01867  0.00685
0.14583  0.93812  0.54108  0.28704  0.04136  0.00158
0.15625  0.92858  0.45808  0.18951  0.00060  0.00000
0.16667  0.94048  0.31667  0.13112  0.00000  0.00000
0.17708  0.94189  0.33437  0.13173  0.00000  0.00000
0.18750  0.95503  0.25409  0.09464  0.00000  0.00000
0.19792  0.96308  0.19708  0.04993  0.00000  0.00000
0.20833  0.95190  0.08710  0.04425  0.00000  0.00000
0.21875  0.92150  0.02695  0.03208  0.00000  0.00000
0.22917  0.87068  0.02053  0.01723  0.00000  0.00000
0.23958  0.82670  0.00075  0.00196  0.00000  0.00000
0.25000  0.64430  0.00000  0.00000  0.00000  0.00000
0.26042  0.58429  0.00000  0.00000  0.00000  0.00000
0.27083  0.47629  0.00000  0.00000  0.00000  0.00000
0.28125  0.39362  0.00000  0.00000  0.00000  0.00000
0.29167  0.29103  0.00000  0.00000  0.00000  0.00000
0.30208  0.22423  0.00000  0.00000  0.00000  0.00000
0.31250  0.13443  0.00000  0.00000  0.00000  0.00000
0.32292  0.05567  0.00000  0.00000  0.00000  0.00000
0.33333  0.03632  0.00000  0.00000  0.00000  0.00000
"""

# FSC_AUC in the paper. "degraded": Tables 1, 2, 5 and 9. The others by (lambda_max, steps) of
# Tables 8 and 9. 5 and 1000 are the paper's choice. At 5, 50 and +-30 it prints the number of 1,
# 1000 and +-30 again.
PAPER = """
                 3.2     4.3     6.1     8.5      15   +-45   +-30   +-15   wedge
degraded       .8876   .5527   .4969   .3275   .2014  .6623  .6324  .6111   .7988
paper  50  1   .2511   .2573   .1811   .1736   .1349  .1994  .1638  .1391     nan
paper  200 1   .7301   .5525   .4985   .3855   .2476  .5965  .4836  .4126     nan
paper 1000 1   .9512   .6771   .6082   .3928   .2460  .8745  .8191  .7741     nan
paper  50  5   .4618   .4140   .3577   .3140   .2156  .3778  .8191  .2576   .9295
paper  200 5   .8994   .6417   .5808   .4115   .2678  .7923  .6694  .5714   .9295
paper 1000 5   .9545   .6843   .6191   .3794   .2313  .8879  .8453  .8053   .9310
paper  50 10   .4989   .4312   .3904   .3381   .2249  .4012  .3027  .2568     nan
paper  200 10  .9025   .6397   .5798   .4103   .2631  .7926  .6713  .5503     nan
paper 1000 10  .9536   .6649   .6183   .3752   .2314  .8780  .8329  .7926     nan
"""
ROWS = PAPER.split("\n")[1].split()
VARIANTS = {"paper": {}, "operator-noise": {"operator_noise": True}, "per-time": {"per_time": True}}
ALPHA = 50  # noise power outside of the tilt range over inside
COLUMNS = ["structure", "prior", "box", "row", "result", "auc", "auc_missing", "fsc_05", "seconds"]
Settings = DenoiseSettings | WedgeSettings


# ---- The degraded maps


def settings_of(row: str) -> Settings:
    """What sampling.py would be told about the maps of a row."""
    # The maps are in the grey scale of the structure, so that nothing needs to be found.
    known = {"background": 0.0, "invert": False, "samples": 1}
    if row == "wedge":
        return WedgeSettings(tilt_axis="z", **known)
    if row.startswith("+-"):
        angle = float(row[2:])
        known |= {"alpha": ALPHA, "tilt_axis": "z"}
        return AnisotropicSettings(tilt_range=(-angle, angle), **known)
    return DenoiseSettings(**known)


def half_map_fsc(column: str, box: int) -> Tensor:
    """A column of CURVES at the shells 1 .. box//2 of a box of VOXEL_SIZE."""
    header, *lines = CURVES.strip().splitlines()
    numbers = np.loadtxt(lines)
    frequency = np.arange(1, box // 2 + 1) / (box * VOXEL_SIZE)
    curve = np.interp(frequency, numbers[:, 0], numbers[:, header.split().index(column)])
    return torch.from_numpy(curve)


def degrade_truth(row: str, truth: Tensor, settings: Settings, seed: int) -> list[Map]:
    """Two half maps of a density (D, H, W), or one map with a missing wedge."""
    grid = Map(truth, VOXEL_SIZE)
    if row == "wedge":
        return [Map(fourier.apply_fourier(truth, settings.measured(grid)), VOXEL_SIZE)]

    # The noise power per shell, and per coefficient.
    anisotropic = row.startswith("+-")
    curve = half_map_fsc("3.2" if anisotropic else row, truth.shape[-1])
    power = degrade.noise_power_from_fsc(truth, curve, clean=True)
    power = degrade.expand_shells(power, truth.shape)
    if anisotropic:
        power = torch.where(settings.measured(grid), power, ALPHA * power)
    generator = torch.Generator().manual_seed(seed)
    halves = [degrade.add_spectral_noise(truth, power, generator=generator) for _ in range(2)]
    return [Map(half, VOXEL_SIZE) for half in halves]


# ---- The restored maps


def by_the_program(maps: list[Map], prior: Prior, settings: Settings, method: str) -> Tensor:
    """The result of sampling.py with --method."""
    if isinstance(settings, WedgeSettings):
        method = "pocs" if method == "classical" else method
        result = restore_wedge(*maps, prior, replace(settings, method=method), silent)
    else:
        method = "wiener" if method == "classical" else method
        result = restore_half_maps(*maps, prior, replace(settings, method=method), silent)
    return result.densities[""]


def by_the_paper(
    maps: list[Map], truth: Tensor, prior: Prior, settings: Settings, sampler: dict
) -> Tensor:
    """The mean of one sample for each map, all in the grey scale of the truth."""
    # Which coefficients were measured, and the noise of each.
    y = torch.stack([map.density for map in maps])
    if isinstance(settings, WedgeSettings):
        measured = settings.measured(maps[0])
        y, sigma = y[0], 0.0
    else:
        measured = torch.ones(truth.shape, dtype=torch.bool)
        powers = posterior.noise_and_signal(list(y))[0]
        noises = [settings.noise_on_grid(power, maps[0]) for power in powers]
        sigma = (torch.stack(noises) / truth.numel()).sqrt()

    # The paper's samplers begin with noise, so that `start` is not used.
    x, scale = volume.normalise(truth, prior.mean, prior.std)
    y = volume.to_network_scale(y, scale)
    sigma = torch.as_tensor(sigma, dtype=torch.float32) / scale.maximum / prior.std
    observation = Observation(y, measured, sigma, x, scale)
    drawn = posterior.draw_samples(prior, observation, sampler, samples=len(maps), seed=0)
    return torch.stack(list(drawn)).mean(0)


def runs_of_the_paper(args: argparse.Namespace, row: str) -> dict[str, dict]:
    """The settings of the paper's sampler for each result that was asked for, by its name."""
    runs = {}
    if row == "wedge":
        # Algorithm 2 has no lambda_max. Its results stand at 5, as in PAPER.
        for steps in args.steps if "paper" in args.methods else []:
            runs[f"paper {steps} 5"] = posterior.WEDGE["paper"] | {"steps": steps}
        return runs
    for method in [method for method in args.methods if method in VARIANTS]:
        for steps, lambda_max in itertools.product(args.steps, args.lambda_max):
            numbers = {"steps": steps, "lambda_max": lambda_max}
            sampler = posterior.DENOISE["paper"] | VARIANTS[method] | numbers
            runs[f"{method} {steps} {lambda_max:g}"] = sampler
    return runs


# ---- Scores


def score(x: Tensor, truth: Tensor, settings: Settings) -> list[float]:
    """FSC_AUC, FSC_AUC in the missing wedge (nan without one), and FSC_0.5 in Å."""
    curve = fsc(x, truth, convention="cryofm")
    missing = float("nan")
    if isinstance(settings, WedgeSettings):
        region = ~settings.measured(Map(truth, VOXEL_SIZE))
        missing = float(auc(fsc(x, truth, region, convention="cryofm")))
    return [float(auc(curve)), missing, float(resolution(curve, VOXEL_SIZE, 0.5))]


def read_scores(path: Path) -> dict[tuple, list[float]]:
    """What earlier runs wrote: scores and seconds by structure, prior, box, row and result."""
    if not path.exists():
        append_line(path, COLUMNS)
    with open(path, newline="") as file:
        lines = list(csv.reader(file))[1:]
    return {tuple(line[:5]): [float(value) for value in line[5:]] for line in lines}


def append_line(path: Path, line: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        csv.writer(file).writerow(line)


def paper_says(row: str, result: str) -> str:
    """FSC_AUC of a result in the paper, or a dash."""
    for line in PAPER.strip().splitlines()[1:]:
        words = line.split()
        if " ".join(words[: -len(ROWS)]) == result:
            return words[ROWS.index(row) - len(ROWS)].replace("nan", "-")
    return "-"


def say_table(table: dict[tuple[str, str], list]) -> None:
    """Mean and standard deviation over the structures without failures, as Markdown."""
    print("| row | result | structures | failures | FSC_AUC | FSC_0.5, Å | missing | s | paper |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        for name in [name for other, name in table if other == row]:
            found = table[row, name]
            good = torch.tensor([scores for scores in found if scores[2] <= 30]).reshape(-1, 4)
            mean = good.mean(0).tolist()
            std = good.std(0, correction=len(good) > 1).tolist()
            cells = [row, name, f"{len(found)}", f"{len(found) - len(good)}"]
            cells += [f"{mean[0]:.4f} ± {std[0]:.4f}", f"{mean[2]:.2f} ± {std[2]:.2f}"]
            missing = f"{mean[1]:.3f} ± {std[1]:.3f}" if row == "wedge" else "-"
            cells += [missing, f"{mean[3]:.1f}", paper_says(row, name)]
            print("|", " | ".join(cells), "|", flush=True)


# ---- The command


def answers(
    args: argparse.Namespace, prior: Prior, row: str, truth: Tensor, seed: int
) -> dict[str, functools.partial]:
    """What makes each result of a row that was asked for, by the result's name."""
    settings = settings_of(row)
    maps = degrade_truth(row, truth, settings, seed)
    densities = torch.stack([map.density for map in maps])
    found = {"degraded": functools.partial(densities.mean, 0)}
    for method in args.methods:
        if method not in VARIANTS:
            found[method] = functools.partial(by_the_program, maps, prior, settings, method)
    for name, sampler in runs_of_the_paper(args, row).items():
        found[name] = functools.partial(by_the_paper, maps, truth, prior, settings, sampler)
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("structures", help="archive of structures (.npz)")
    add("--held-out", action="store_true", help="of a training archive, those held out")
    add("--ckpt", default=str(WEIGHTS))
    add("--count", type=int, default=32)
    add("--box", type=int, default=BOX, help="voxels per side: the middle of each map")
    add("--rows", nargs="+", default=ROWS, choices=ROWS)
    add("--methods", nargs="+", default=["classical"], choices=["classical", "prior", *VARIANTS])
    add("--steps", type=int, nargs="+", default=[1000], help="of the paper's samplers")
    add("--lambda-max", type=float, nargs="+", default=[5.0], help="of Algorithm 1")
    add("--csv", type=Path, default=Path("runs/paper.csv"))
    args = cli.parse_args()

    # The structures, and the prior.
    prior, structures = read_inputs(args.ckpt, args.structures, args.held_out, count=args.count)

    # Restore and score what the .csv does not have yet.
    done = read_scores(args.csv)
    table = defaultdict(list)
    for seed, structure in enumerate(structures):
        truth = volume.center_crop(truth_of(structure), args.box)
        truth = volume.normalise(truth, 0.0, 1.0)[0]
        for row in args.rows:
            for name, make in answers(args, prior, row, truth, seed).items():
                key = (structure.label, prior.sha256[:8], str(args.box), row, name)
                if key not in done:
                    begin = time.perf_counter()
                    x = make()
                    seconds = time.perf_counter() - begin
                    done[key] = [*score(x, truth, settings_of(row)), seconds]
                    append_line(args.csv, [*key, *done[key]])
                table[row, name].append(done[key])
    say_table(table)


if __name__ == "__main__":
    main()
