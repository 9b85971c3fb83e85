"""The denoising tables of RESULTS.md, on half maps with noise of a smooth, made-up spectrum.

    python data_prepare.py structures structures/val.tsv       # writes structures/val.npz
    python tests/benchmark_denoise.py structures/val.npz

Two half maps of each structure (3 Å, 64^3 voxels of 1.5 Å, or other --resolution, --voxel-size)
get spectral noise of a nominal resolution R: their signal-to-noise ratio falls as exp(-b s^2) with
the spatial frequency s, where b makes their FSC 0.95 at 2 R and 0.143 at R. For anisotropic noise
(R = 4.3 Å) the power outside of a tilt range is 50 times that inside, and each shell keeps its
mean. The paper's own noise is in benchmark_paper.py.

Each half is restored by itself, with all estimates from the halves. Scored is the mean of both
against the truth: FSC_AUC, FSC_0.5, and the share of failures (FSC_0.5 > 30 Å). A radial Wiener
filter changes no FSC, so its row equals that of the average.

--b-factor B: half maps as a refinement makes them, the signal decayed by exp(-B s^2 / 4) and the
noise white. --calibration: how often the truth lies in the 90 % band of the samples.
"""

import argparse
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_wedge import (
    BOX,
    RESOLUTION,
    VOXEL_SIZE,
    WEIGHTS,
    read_inputs,
    truth_of,
    write_rows,
)

import augment
import degrade
import fourier
import posterior
import volume
from checkpoint import Prior
from classical import wiener
from fsc import auc, fsc, resolution
from mrc import Map
from sampling_half_maps import observe_half_map
from sampling_settings import AnisotropicSettings, DenoiseSettings

PRIOR = posterior.DENOISE["prior"]
VARIANTS = {
    "prior": PRIOR,
    "prior, from noise": PRIOR | {"t_start": 1.0},
    "prior, deterministic": PRIOR | {"fresh_noise": False},
}


def half_map_fsc(nominal: float, box: int, voxel_size: float = VOXEL_SIZE) -> Tensor:
    """FSC of half maps, shells 1 .. box//2."""
    s = torch.arange(1, box // 2 + 1).double() / (box * voxel_size)
    snr, doubled = 0.143 / 0.857, 0.95 / 0.05
    snr = snr * torch.exp(math.log(doubled / snr) * (1 - (s * nominal) ** 2) / 0.75)
    return snr / (1 + snr)


def degrade_truth(
    truth: Tensor, nominal: float, b_factor: float | None, voxel_size: float = VOXEL_SIZE
) -> tuple[Tensor, Tensor]:
    """The density without noise, and the noise power per shell of half maps."""
    box = truth.shape[-1]
    if b_factor is None:
        curve = half_map_fsc(nominal, box, voxel_size)
        return truth, degrade.noise_power_from_fsc(truth, curve, clean=True)
    # As a refinement leaves them: a decayed signal and white noise.
    s2 = (torch.arange(1, box // 2 + 1) / (box * voxel_size)).square()
    decay = degrade.expand_shells(torch.exp(-b_factor * s2 / 4), truth.shape)
    clean = fourier.apply_fourier(truth, decay)
    power = degrade.radial_power(clean)
    shell = round(box * voxel_size / nominal) - 1
    return clean, torch.full_like(power, float(power[shell]) * 0.857 / 0.143)


def settings_of(half_angle: int | None) -> DenoiseSettings:
    if half_angle is None:
        return DenoiseSettings()
    return AnisotropicSettings(tilt_range=(-half_angle, half_angle))


def restore(
    prior: Prior, halves: list[Map], settings: DenoiseSettings, sampler: dict, samples: int
) -> tuple[Tensor, Tensor]:
    """The Wiener filter of the average, and all samples of both halves (2 samples, D, H, W)."""
    # As sampling_half_maps.restore_half_maps does it, but all samples come back.
    densities = [half.density for half in halves]
    powers, signal = posterior.noise_and_signal(densities)
    noise = settings.noise_on_grid(sum(powers) / 4, halves[0])
    classical = wiener(sum(densities) / 2, noise, signal)
    drawn = []
    for i, (half, power) in enumerate(zip(halves, powers)):
        observation = observe_half_map(half, power, prior, settings)
        seed = i * augment.HELD_OUT
        drawn += posterior.draw_samples(prior, observation, sampler, samples=samples, seed=seed)
    # The prior's grid may be coarser; what it cannot hold is 0 here.
    return classical, fourier.resample(torch.stack(drawn), classical.shape)


def in_band(clean: Tensor, truth: Tensor, drawn: Tensor) -> list[float]:
    """Share of voxels where the truth lies in the 90 % band: of the molecule, of the others."""
    inside = ((clean - drawn.mean(0)).abs() <= 1.645 * drawn.std(0)).float()
    molecule = truth > 0.1
    return [float(inside[molecule].mean()), float(inside[~molecule].mean())]


def one_level(args, prior: Prior, structures: list, nominal: float, angle: int | None) -> list:
    """Restore and score all structures at one noise level; prints the table, returns the rows."""
    table, bands, rows = defaultdict(list), [], []
    settings = settings_of(angle)
    for i, structure in enumerate(structures):
        # Two half maps with noise of their own.
        truth = truth_of(structure, args.voxel_size, args.resolution)
        truth = volume.center_crop(truth, args.box)
        clean, power = degrade_truth(truth, nominal, args.b_factor, args.voxel_size)
        power = settings.noise_on_grid(power, Map(truth, args.voxel_size))
        generator = torch.Generator().manual_seed(i)
        halves = []
        for _ in range(2):
            noisy = degrade.add_spectral_noise(clean, power, generator=generator)
            halves.append(Map(noisy, args.voxel_size))
        results = {("average", 0): (halves[0].density + halves[1].density) / 2}

        # Restore them in every way that was asked for.
        begin = time.perf_counter()
        for variant in args.variants:
            for steps in args.steps or [VARIANTS[variant]["steps"]]:
                sampler = VARIANTS[variant] | {"steps": steps}
                classical, drawn = restore(prior, halves, settings, sampler, args.samples)
                results["Wiener", 0] = classical
                results["Wiener, positive", 0] = classical.clamp(min=0)
                results[variant, steps] = drawn.mean(0)
        seconds = time.perf_counter() - begin
        bands.append(in_band(clean, truth, drawn))

        # Score.
        for (name, steps), x in results.items():
            curve = fsc(x, truth)
            score = [float(auc(curve)), float(resolution(curve, args.voxel_size, 0.5))]
            table[name, steps].append(score)
            numbers = [f"{value:.4f}" for value in score]
            rows.append([structure.label, nominal, angle, name, steps, *numbers, f"{seconds:.1f}"])

    # The table of this level.
    title = f"{nominal} Å" + (f", +-{angle} degrees" if angle else "")
    print(f"{title}    {'FSC_AUC':>14} {'FSC_0.5':>16}   failures")
    for (name, steps), scores in table.items():
        say_row(f"{name:32}{steps or '':5}", torch.tensor(scores))
    if args.calibration:
        molecule, others = torch.tensor(bands).mean(0).tolist()
        print(f"  truth in the 90 % band: {molecule:.2f} of the molecule, {others:.2f} of the rest")
    return rows


def say_row(title: str, scores: Tensor) -> None:
    """Mean and standard deviation of the scores (structures, 2) that are no failures."""
    good = scores[scores[:, 1] <= 30]
    mean, std = good.mean(0).tolist(), good.std(0, correction=len(good) > 1).tolist()
    failures = 1 - len(good) / len(scores)
    numbers = f"{mean[0]:.3f} ({std[0]:.3f}) {mean[1]:7.2f} ({std[1]:.2f}) Å   {failures:.2f}"
    print(f"  {title} {numbers}", flush=True)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("structures", help="archive of structures (.npz)")
    add("--held-out", action="store_true", help="of a training archive, those held out")
    add("--ckpt", default=str(WEIGHTS))
    add("--count", type=int, default=32)
    add("--box", type=int, default=BOX, help="voxels per side: the middle of each map")
    add("--voxel-size", type=float, default=VOXEL_SIZE, help="Å")
    add("--resolution", type=float, default=RESOLUTION, help="of the truth, in Å")
    add("--levels", type=float, nargs="*", default=[3.2, 4.3, 6.1, 8.5, 15.0], help="Å")
    add("--angles", type=int, nargs="*", default=[45, 30, 15], help="half tilt ranges, at 4.3 Å")
    add("--b-factor", type=float, metavar="B", help="Å^2")
    add("--samples", type=int, default=1, help="of each half")
    add("--variants", nargs="+", default=["prior"], choices=VARIANTS)
    add("--steps", type=int, nargs="*", default=[], help="default: the variant's own")
    add("--calibration", action="store_true")
    add("--csv", default="runs/denoise.csv")
    args = cli.parse_args()
    # The structures, and the prior.
    prior, structures = read_inputs(args.ckpt, args.structures, args.held_out, count=args.count)

    rows = [["structure", "nominal", "half_angle", "result", "steps", "auc", "fsc_05", "seconds"]]
    for nominal in args.levels:
        rows += one_level(args, prior, structures, nominal, None)
    for angle in args.angles:
        rows += one_level(args, prior, structures, 4.3, angle)
    write_rows(args.csv, rows)


if __name__ == "__main__":
    main()
