"""The README's denoising tables: `python tests/benchmark_denoise.py ../shared/data/models/val.npz`, the paper's protocol.

Two half maps of each structure (3 Å, 64^3 voxels of 1.5 Å) get spectral noise of a nominal resolution R: their signal-to-noise
ratio falls as exp(-b s^2) with the spatial frequency s, b such that their FSC is 0.95 at 2 R and 0.143 at R. For anisotropic
noise (R = 4.3 Å) the power outside of a tilt range is 50 times that inside. Each half is restored by itself, noise and all
estimated from the halves; scored is the mean of both against the truth: FSC_AUC, FSC_0.5, and the share of failures
(FSC_0.5 > 30 Å). The FSC of an average is that of its half maps' Wiener filter wherever that is a radial filter.

--b-factor B: half maps as they come out of a refinement instead, the signal decayed by exp(-B s^2 / 4) and the noise white.
--steps and --variants compare the ways to sample; --calibration counts how often the truth lies in the 90 % band of the samples.
"""
import argparse
import csv
import math
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_wedge import BOX, VOXEL_SIZE, truth_of  # noqa: E402

import atoms  # noqa: E402
import checkpoint  # noqa: E402
import degrade  # noqa: E402
import fourier  # noqa: E402
import posterior  # noqa: E402
import train_objectives  # noqa: E402
import volume  # noqa: E402
from fsc import auc, fsc, resolution  # noqa: E402

VARIANTS = {  # the settings of a sampler but for its steps
    "prior": posterior.DENOISE["prior"],
    "prior, from noise": posterior.DENOISE["prior"] | {"t_start": 1.0},
    "prior, deterministic": posterior.DENOISE["prior"] | {"fresh_noise": False},
    "prior, trust as for the wedge": posterior.DENOISE["prior"] | {"leak": None},
    "paper": posterior.DENOISE["paper"],
    "paper, operator noise": posterior.DENOISE["paper"] | {"operator_noise": True},
    "paper, weight independent of N": posterior.DENOISE["paper"] | {"per_time": True},
}


def half_map_fsc(nominal: float, box: int, voxel_size: float = VOXEL_SIZE) -> torch.Tensor:
    """FSC of half maps, shells 1 .. box//2."""
    s = torch.arange(1, box // 2 + 1).double() / (box * voxel_size)
    snr, doubled = 0.143 / 0.857, 0.95 / 0.05
    snr = snr * torch.exp(math.log(doubled / snr) * (1 - (s * nominal) ** 2) / 0.75)
    return snr / (1 + snr)


def decayed(truth: torch.Tensor, nominal: float, b_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The truth with a B-factor, and the power per shell of white noise that makes the FSC of half maps 0.143 at `nominal` Å."""
    box = truth.shape[-1]
    s2 = (torch.arange(1, box // 2 + 1) / (box * VOXEL_SIZE)).square()
    signal = fourier.apply_fourier(truth, degrade.expand_shells(torch.exp(-b_factor * s2 / 4), truth.shape))
    power = degrade.radial_power(signal)
    return signal, torch.full_like(power, float(power[round(box * VOXEL_SIZE / nominal) - 1]) * 0.857 / 0.143)


def alpha_of(half_angle: int | None, shape) -> torch.Tensor | None:
    return None if half_angle is None else 1 + 49 * ~fourier.hermitian_part(degrade.wedge_mask(shape, (-half_angle, half_angle)))


def restored(prior, halves, alpha, settings, samples, seed):
    """As sampling.py does it: Wiener of the average, and all samples of each half."""
    shape = halves[0].shape
    powers, signal, _ = posterior.noise_and_signal(halves)
    grid = lambda P: degrade.expand_shells(P, shape) if alpha is None else degrade.anisotropic_noise_power(P, alpha)
    classical = posterior.wiener(sum(halves) / 2, grid(sum(powers) / 4), signal)
    everywhere = torch.ones(shape, dtype=torch.bool)
    drawn = [list(posterior.draw_samples(prior, y, everywhere, posterior.wiener(y, grid(P), signal).clamp(min=0),
                                        (grid(P) / y.numel()).sqrt(), settings, samples=samples, seed=seed + (i << 32)))
             for i, (y, P) in enumerate(zip(halves, powers))]
    return classical, torch.stack([torch.stack(d) for d in drawn])             # (2, samples, D, H, W)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("structures", help="archive of structures (.npz)")
    cli.add_argument("--held-out", action="store_true", help="of a training archive, those that train.py holds out: to choose settings on")
    cli.add_argument("--ckpt", default=str(Path(__file__).parent.parent / "weights" / "hdit_tiny.pt"))
    cli.add_argument("--count", type=int, default=32)
    cli.add_argument("--box", type=int, default=BOX, help="voxels per side: the middle of each map")
    cli.add_argument("--levels", type=float, nargs="*", default=[3.2, 4.3, 6.1, 8.5, 15.0], help="nominal resolutions, Å")
    cli.add_argument("--angles", type=int, nargs="*", default=[45, 30, 15], help="half angles of anisotropic noise at 4.3 Å")
    cli.add_argument("--b-factor", type=float, metavar="B", help="Å^2")
    cli.add_argument("--samples", type=int, default=1, help="of each half")
    cli.add_argument("--variants", nargs="+", default=["prior"], choices=VARIANTS)
    cli.add_argument("--steps", type=int, nargs="*", default=[], help="default: the variant's own")
    cli.add_argument("--calibration", action="store_true")
    cli.add_argument("--csv", default="runs/denoise.csv")
    args = cli.parse_args()
    prior = checkpoint.load(args.ckpt, kind="hdit")
    structures = atoms.read_structures(args.structures)
    if args.held_out:
        structures = train_objectives.split(structures)[1]
    structures = structures[:args.count]
    print(f"{len(structures)} structures, {args.samples} sample(s) of each half, torch {torch.__version__}, {torch.get_num_threads()} "
          f"thread(s), {Path(args.ckpt).name} {prior.sha256[:8]}", flush=True)
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["structure", "nominal", "half_angle", "result", "steps", "auc", "fsc_05", "seconds"])
        for nominal, angle in [(r, None) for r in args.levels] + [(4.3, a) for a in args.angles]:
            table, inside = {}, []
            for i, structure in enumerate(structures):
                truth = volume.center_crop(truth_of(structure), args.box)
                alpha, g = alpha_of(angle, truth.shape), torch.Generator().manual_seed(i)
                if args.b_factor is None:
                    clean, power = truth, degrade.noise_power_from_fsc(truth, half_map_fsc(nominal, args.box), clean=True)
                else:
                    clean, power = decayed(truth, nominal, args.b_factor)
                power = power if alpha is None else degrade.anisotropic_noise_power(power, alpha)
                halves = [degrade.add_spectral_noise(clean, power, generator=g) for _ in range(2)]
                for variant in args.variants:
                    for steps in args.steps or [VARIANTS[variant]["steps"]]:
                        begin = time.perf_counter()
                        classical, drawn = restored(prior, halves, alpha, VARIANTS[variant] | {"steps": steps}, args.samples, seed=0)
                        seconds = time.perf_counter() - begin
                        results = {("average", 0): sum(halves) / 2, ("Wiener", 0): classical, ("Wiener, positive", 0): classical.clamp(min=0),
                                   (variant, steps): drawn.mean((0, 1))}
                        for (name, n), x in results.items():
                            if n == 0 and len(table.get((name, n), [])) > i:
                                continue                     # once per structure, not per variant
                            curve = fsc(x, truth)
                            score = float(auc(curve)), float(resolution(curve, VOXEL_SIZE, 0.5))
                            table.setdefault((name, n), []).append(score)
                            rows.writerow([structure.label, nominal, angle, name, n, *(f"{v:.4f}" for v in score), f"{seconds:.1f}"])
                if args.calibration:
                    pooled = drawn.flatten(0, 1)
                    mean, band = pooled.mean(0), 1.645 * pooled.std(0)
                    molecule = truth > 0.1
                    inside.append([float(((clean - mean).abs() <= band)[where].float().mean()) for where in (molecule, ~molecule)])
                file.flush()
            print(f"{nominal} Å" + (f", +-{angle} degrees" if angle else "") + f"    {'FSC_AUC':>14} {'FSC_0.5':>16}   failures")
            for (name, n), scores in table.items():
                scores = torch.tensor(scores)
                good = scores[scores[:, 1] <= 30]
                mean, sd = good.mean(0).tolist(), good.std(0, correction=len(good) > 1).tolist()
                print(f"  {name:32}{n or '':5} {mean[0]:.3f} ({sd[0]:.3f}) {mean[1]:7.2f} ({sd[1]:.2f}) Å   {1 - len(good) / len(scores):.2f}",
                      flush=True)
            if inside:
                print("  truth in the 90 % band: {:.2f} of the molecule's voxels, {:.2f} of the others".format(
                    *torch.tensor(inside).mean(0).tolist()), flush=True)


if __name__ == "__main__":
    main()
