"""Restore maps with a trained prior: `python sampling.py --task wedge in.mrc` writes in_wedge.mrc.
"""
import argparse
import itertools
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.utils.checkpoint
from torch import Generator, Tensor

import abinitio
import augment
import checkpoint
import degrade
import flow
import fourier
import fsc
import mrc
import volume
from checkpoint import Prior
from files import refuse_existing
from fourier import below_nyquist, put_back
from fsc_half_maps import read_fsc
from posterior import (
    DENOISE,
    METHODS,
    Moments,
    draw_samples,
    estimate_noise,
    noise_and_signal,
    on_grid_of,
    pocs,
    tiled_velocity,
    wedge_samples,
    wiener,
)
from report import Progress, report_files, say, say_work, score, write_report
from sliding_windows import WINDOWS, sliding_windows
from star import read_angles


class Result(NamedTuple):
    """What a task hands over; all maps (D, H, W) have the grid and the grey scale of its input."""
    maps: dict[str, Tensor]                  # to write, by the suffix of their names; "" is the result
    inputs: dict[str, Tensor]                # what each of them was before, for --mask
    shown: dict[str, Tensor]                 # to score and draw, by name: the input, classical answers
    report: dict
    region: Tensor | None = None             # coefficients to score apart: those that the wedge misses


def wedge(args: argparse.Namespace, sources: list[mrc.Map], prior: Prior) -> Result:
    """--task wedge: "" keeps every measured coefficient as it is; "_mean" is the posterior mean, where the measured ones
    lose their noise too; "_std" is the spread of the samples. With --model scunet "_network" is what it made of the map."""
    source, = sources
    y, report, measured_here = source.density, {}, measured_by(source, args)
    top = volume.normalise(y, 0, 1)[1].maximum             # raises for dark protein
    method = choose(args, source, prior, "pocs")
    classical = pocs(y, measured_here)
    shown = {"input": y, "POCS": classical}
    if method == "pocs":
        return Result({"": classical}, {"": y}, shown | {"restored": classical}, {"method": method}, ~measured_here)

    # The samples live on the prior's grid.
    work = mrc.resample_map(source, prior.voxel_size)
    shape = work.density.shape
    measured = measured_by(work, args) & below_nyquist(shape, y.shape)
    if prior.kind == "scunet":                           # trained on maps without what the wedge misses
        seen = put_back(torch.zeros_like(work.density), work.density, measured)
        answer, report = ask_network(args, prior, seen)
        maps = {"": put_back(on_grid_of(y, answer, classical), y, measured_here), "_network": fourier.resample(answer, y.shape)}
        shown |= {"restored": maps[""], "network": maps["_network"]}
        return Result(maps, {"": y, "_network": y}, shown, report, ~measured_here)
    # White noise has one power per coefficient: its standard deviation goes with the root of how many coefficients there are.
    gain = math.sqrt(work.density.numel() / y.numel())
    if args.noise is not None:
        noise = args.noise
    elif gain <= 1:                                      # on the coarser grid: the finer one may have no corners beyond Nyquist
        noise = estimate_noise(work.density, measured) / gain / top
    else:
        noise = estimate_noise(y, measured_here) / top
    steps = args.steps or METHODS[method]["steps"]
    report = dict(method=method, noise=noise, noise_estimated=args.noise is None, steps=steps, box=list(shape))
    say_work(args, prior, shape, args.samples, steps, f"noise {noise:.3f} of the map's maximum"
             + " (estimated)" * (args.noise is None))
    moments = Moments()
    for sample in wedge_samples(prior, work.density, measured, method, samples=args.samples, seed=args.seed,
                                noise=noise * top * gain, steps=steps, tick=Progress(args, args.samples * steps)):
        moments.add(sample)
    mean = on_grid_of(y, moments.mean, classical)
    maps = {"": put_back(mean, y, measured_here), "_mean": mean}
    if args.samples > 1:
        maps["_std"] = fourier.resample(moments.std(), y.shape).clamp(min=0)
    return Result(maps, {"": y, "_mean": y}, shown | {"restored": maps[""], "posterior mean": mean}, report, ~measured_here)


def denoise(args: argparse.Namespace, sources: list[mrc.Map], prior: Prior) -> Result:
    """--task denoise, anisotropic: each half map by itself, with its own seeds, so that their FSC stays fair; "" is their mean.

    A single map needs --noise-from-fsc or --snr. "_std" is the spread of all samples of both halves.
    """
    here = sources[0].density.shape
    curve = None
    if len(sources) == 2:
        a, b = sources
        if a.density.shape != b.density.shape or not np.allclose(a.voxel_size, b.voxel_size, rtol=1e-3):
            raise ValueError(f"{tuple(a.density.shape)} voxels of {a.voxel_size[2]:g} Å, but {b.path} has "
                             f"{tuple(b.density.shape)} of {b.voxel_size[2]:g} Å; half maps share one grid")
    else:
        # A map that is the mean of two halves has twice their SNR, (5) of degrade.py.
        snr = args.snr or 2 / (1 / read_fsc(args.noise_from_fsc, here[-1], sources[0].voxel_size[2]) - 1)
        curve = torch.as_tensor(snr / (1 + snr), dtype=torch.float64).expand(here[-1] // 2)
    powers, signal, curve = noise_and_signal([m.density for m in sources], curve)
    grid = lambda power, m: power_on_grid(args, power, m)
    average = torch.stack([m.density for m in sources]).mean(0)
    noise_of_average = torch.stack(powers).sum(0) / len(powers) ** 2
    classical = wiener(average, grid(noise_of_average, sources[0]), signal)
    shown = {"input" if len(sources) == 1 else "average": average, "Wiener": classical, "Wiener, positive": classical.clamp(min=0)}
    method = choose(args, sources[0], prior, "wiener")
    resolution = float(fsc.resolution(torch.cat([curve.new_ones(1), curve]), sources[0].voxel_size[2], box=here[-1]))
    report = dict(method=method, fsc=curve.tolist(), resolution_0143=resolution)
    if method == "wiener":
        maps = {"": classical.clamp(min=0)}
        return Result(maps, {"": average}, shown | {"restored": maps[""]}, report)

    works = [mrc.resample_map(m, prior.voxel_size) for m in sources]
    there = works[0].density.shape
    N, gain = works[0].density.numel(), (works[0].density.numel() / average.numel()) ** 2      # of |F y|^2, by resampling
    measured = below_nyquist(there, here)
    settings = DENOISE[method] | ({"steps": args.steps} if args.steps else {})
    report.update(steps=settings["steps"], box=list(there))
    count = args.samples * len(sources)
    say_work(args, prior, there, count, settings["steps"], f"FSC 0.143 at {resolution:.2f} Å")
    tick, pooled, restored = Progress(args, count * settings["steps"]), Moments(), []
    for i, (source, work, power) in enumerate(zip(sources, works, powers)):
        P = grid(power * gain, work)
        first = wiener(work.density, P, signal * gain).clamp(min=0)
        moments = Moments()
        for sample in draw_samples(prior, work.density, measured, first, (P / N).sqrt(), settings, samples=args.samples,
                                   seed=args.seed + (i << 32), tick=tick):
            moments.add(sample)
            pooled.add(sample)
        restored.append(on_grid_of(source.density, moments.mean, wiener(source.density, grid(power, source), signal)))
    maps, inputs = {"": torch.stack(restored).mean(0)}, {"": average}
    if len(sources) == 2:
        maps |= {"_half1": restored[0], "_half2": restored[1]}
        inputs |= {"_half1": sources[0].density, "_half2": sources[1].density}
        # Not a gold standard: the halves share the prior, and what it adds to both correlates.
        report["fsc_of_restored_halves"] = fsc.fsc(*restored, convention="cryofm")[1:].tolist()
    if pooled.count > 1:
        maps["_std"] = fourier.resample(pooled.std(), here).clamp(min=0)
    return Result(maps, inputs, shown | {"restored": maps[""]}, report)


def enhance(args: argparse.Namespace, sources: list[mrc.Map], prior: Prior) -> Result:
    """--task sharpen (CryoLVM 4.2), superres (4.3): one pass of the network fine-tuned for it."""
    source, = sources
    answer, report = ask_network(args, prior, mrc.resample_map(source, prior.voxel_size).density)
    maps = {"": fourier.resample(answer, source.density.shape)}
    return Result(maps, {"": source.density}, {"input": source.density, "restored": maps[""]}, report)


def ask_network(args: argparse.Namespace, prior: Prior, density: Tensor) -> tuple[Tensor, dict]:
    """(10) for a map (D, H, W) at the network's voxel size and in its own units: the answer in the same, and facts to report."""
    x, scale = volume.normalise(density, prior.mean, prior.std, args.percentile)          # D.1

    def progress(calls):
        say(args, f"{sum(map(len, calls))} tile(s) of {prior.box}^3 on {args.device}, {len(calls)} call(s) of the network")
        tick = Progress(args, len(calls))
        for call in calls:
            yield call
            tick()
    answer = sliding_windows(prior.net, x.to(args.device), prior.box, args.stride, args.fusion, progress=progress)
    report = dict(method="network", stride=args.stride, fusion=args.fusion, percentile=args.percentile, box=list(density.shape))
    return volume.denormalise(answer.cpu(), scale), report


def likelihood(args: argparse.Namespace, sources: list[mrc.Map], prior: Prior) -> Result:
    """--task likelihood: log p of the map's density, clipped and divided by its 99.999 percentile, flow.py (6)-(8).

    The map, padded with solvent, is taken for independent tiles of the prior's box. The map written holds each tile's
    nats per voxel, the lower, the less expected.
    """
    source, = sources
    if max(source.voxel_size) > 2 * prior.voxel_size:
        raise ValueError(f"voxels of {max(source.voxel_size):g} Å hold none of the detail that this prior gives a likelihood to; "
                         f"it is one of {prior.voxel_size:g} Å")
    work = mrc.resample_map(source, prior.voxel_size)
    x, _ = volume.normalise(work.density, prior.mean, prior.std)
    count = [math.ceil(n / prior.box) for n in x.shape]
    padded = torch.full([n * prior.box for n in count], -prior.mean / prior.std)
    padded[tuple(map(slice, x.shape))] = x
    corners = [tuple(prior.box * c for c in corner) for corner in itertools.product(*map(range, count))]
    tiles = volume.cut_tiles(padded, corners, prior.box)[:, None].to(args.device)
    say(args, f"{len(tiles)} tile(s) of {prior.box}^3 on {args.device}, {args.probes} probes")
    g, tick, results = Generator().manual_seed(args.seed), Progress(args, len(tiles)), []
    for tile in tiles:
        results.append(flow.log_likelihood(prior.net, tile[None], probes=args.probes, rtol=args.tolerance, atol=args.tolerance,
                                           std=prior.std, return_error=True, generator=g))
        tick()
    nats, error = (torch.cat(part).cpu() for part in zip(*results))
    voxels = prior.box ** 3
    out = torch.empty_like(padded)
    for (z, y, w), value in zip(corners, nats / voxels):
        out[z:z + prior.box, y:y + prior.box, w:w + prior.box] = value
    total, sd = float(nats.sum()), float(error.square().sum().sqrt())
    say(args, f"log p = {total:.0f} +- {sd:.0f} nats ({len(tiles)} x {voxels} voxels), {total / len(tiles) / voxels:.4f} per voxel")
    # Nearest neighbour back to the input's grid: a tile's value has no detail to keep.
    back = [(torch.arange(n) * (m / n)).long() for n, m in zip(source.density.shape, x.shape)]
    here = out[back[0][:, None, None], back[1][:, None], back[2]]
    report = dict(method="likelihood", nats=total, standard_error=sd, nats_per_voxel=total / len(tiles) / voxels,
                  tiles=nats.tolist(), corners=corners, box=list(padded.shape))
    return Result({"": here}, {}, {"input": source.density}, report)


def generate(args: argparse.Namespace, prior: Prior) -> None:
    """--task generate: --samples densities of --box voxels a side from noise alone; OUT, OUT_2, ... and a contact sheet."""
    box = args.box or prior.box
    out = output(args, Path("generate.mrc"))
    paths = [out.with_name(f"{mrc.stem(out)}{f'_{i + 1}' * (i > 0)}.mrc") for i in range(args.samples)]
    refuse_existing([*paths, *report_files(out)], (), args.overwrite)
    steps = args.steps or 50
    begin, tick, shown = time.perf_counter(), Progress(args, args.samples * steps), {}
    say_work(args, prior, (box,) * 3, args.samples, steps, args.solver)
    for first in range(0, args.samples, 8):              # eight at a time
        generators = [augment.item_generator(args.seed, i) for i in range(first, min(first + 8, args.samples))]

        def velocity(x, t):
            if box == prior.box:                         # a crop as in training: neither rolled nor turned
                with torch.no_grad(), flow.autocast(x.device):
                    return prior.net(x[:, None], t)[:, 0]
            return tiled_velocity(prior, x, float(t[0]), generators)

        def ticking(range_of_steps):
            for step in range_of_steps:
                yield step
                for _ in generators:
                    tick()
        noise = torch.stack([torch.randn(box, box, box, generator=g) for g in generators]).to(args.device)
        density = flow.sample(velocity, noise, steps, args.solver, progress=ticking).cpu() * prior.std + prior.mean
        for i, x in enumerate(density, first):           # 1 is the 99.999 percentile of a map
            mrc.write_map(paths[i], mrc.Map(x, prior.voxel_size), args.overwrite)
            shown[f"{args.seed}, {i + 1}"] = x
    write_report(args, out, shown, prior, begin, {"task": "generate", "steps": steps, "box": box, "solver": args.solver,
                                                  "output": list(map(str, paths))})


def ab_initio(args: argparse.Namespace, prior: Prior) -> None:
    """--task abinitio: a density from a stack of projections (abinitio.py), the classical one beside it."""
    path, begin = Path(args.maps[0]), time.perf_counter()
    out = output(args, path.with_name(f"{mrc.stem(path)}_abinitio.mrc"))
    refuse_existing([out, out.with_name(f"{mrc.stem(out)}_std.mrc"), *report_files(out)], [path], args.overwrite)
    stack = mrc.read_stack(path, args.voxel_size)
    (P, N, _), voxel_size = stack.density.shape, stack.voxel_size[2]
    n = max(24, round(N * voxel_size / prior.voxel_size))
    truth_path = Path(args.truth) if args.truth else path.with_name(f"{mrc.stem(path)}_truth.mrc")
    truth = mrc.resample_map(mrc.read_map(truth_path), N * voxel_size / n).density if args.truth or truth_path.exists() else None
    if truth is not None and truth.shape != (n,) * 3:
        raise ValueError(f"{truth_path}: not a cube of the images' side, {N * voxel_size:g} Å")
    images = fourier.resample(stack.density, (P, n, n))
    method = {"auto": "prior", "classical": "classical"}.get(args.method, args.method)
    say(args, f"{path}: {P} projections of {N} x {N} pixels of {voxel_size:g} Å, {method} on {n}^3 voxels on the CPU")
    settings = dict(max_shift=args.max_shift / (N * voxel_size / n), seed=args.seed, losses=args.losses)
    moments, shown = Moments(), {}
    velocity = lambda x, t, generators: tiled_velocity(prior, x.to(args.device), t, generators).to(x.device)
    found = abinitio.samples_of(velocity, prior, images, method, samples=args.samples, steps=args.steps,
                                progress=lambda total, what: Progress(args, total, what), **settings)
    for name, x in found:
        if name == "classical":
            shown["classical"] = x
        if name == method:
            moments.add(x)
    shown["restored"] = moments.mean
    maps = {"": moments.mean} | ({"_std": moments.std()} if moments.count > 1 else {})
    report, scores = dict(task="abinitio", method=method, projections=P, box=[n] * 3, voxel_size=stack.voxel_size), {}
    if truth is not None:
        aligned = {name: abinitio.align(x, truth) for name, x in shown.items()}
        shown = {name: a.density for name, a in aligned.items()}
        report["mirrored"] = {name: a.mirrored for name, a in aligned.items()}
        scores = score(shown, truth, None, N * voxel_size / n)
        say(args, f"aligned to {truth_path.name:18} FSC_AUC  FSC_0.5  hand")
        for name, v in scores.items():
            hand = "mirrored" if report["mirrored"][name] else "as it is"
            say(args, f"  {name:27} {v['auc']:8.3f} {v['fsc_05']:6.2f} Å  {hand}")
        shown["truth"] = truth
    else:
        say(args, "projections do not tell a density from its mirror image: if helices turn left, mirror the result")
    for end, x in maps.items():
        there = mrc.Map(fourier.resample(x, (N,) * 3), voxel_size)
        mrc.write_map(out.with_name(f"{mrc.stem(out)}{end}.mrc") if end else out, there, args.overwrite)
    write_report(args, out, shown, prior, begin, {**report, "output": str(out), "fsc": scores})


def choose(args: argparse.Namespace, source: mrc.Map, prior: Prior, classical: str) -> str:
    """The method, and a word where "auto" is not the prior: far coarser maps than it has seen hold nothing that it knows."""
    if args.method != "auto":
        return args.method
    if max(source.voxel_size) <= 2 * prior.voxel_size:
        return "prior"
    say(args, f"voxels of {max(source.voxel_size):g} Å hold no detail that this prior ({prior.voxel_size:g} Å) knows: "
              f"{classical.upper() if classical == 'pocs' else classical.title()} instead; --method prior to use it all the same")
    return classical


def power_on_grid(args: argparse.Namespace, power: Tensor, m: mrc.Map) -> Tensor:
    """Noise power per shell -> per coefficient (D, H, W) of a map; for --task anisotropic by direction."""
    shape = m.density.shape
    if args.task != "anisotropic":
        return degrade.expand_shells(power, shape)
    if args.orientations:
        return degrade.anisotropic_noise_power(power, degrade.orientation_alpha(degrade.euler_matrix(read_angles(args.orientations)), shape))
    return degrade.anisotropic_noise_power(power, 1 + (args.alpha - 1) * ~measured_by(m, args))


def measured_by(m: mrc.Map, args: argparse.Namespace) -> Tensor:
    """m of (1) on the grid of a map."""
    return fourier.hermitian_part(degrade.wedge_mask(m.density.shape, tuple(args.tilt_range), args.tilt_axis,
                                                     voxel_size=m.voxel_size))


TASKS = {"wedge": wedge, "denoise": denoise, "anisotropic": denoise, "abinitio": ab_initio, "likelihood": likelihood,
         "generate": generate, "sharpen": enhance, "superres": enhance}

CLASSICAL = {"wedge": "pocs", "denoise": "wiener", "anisotropic": "wiener", "abinitio": "classical"}   # --method without a network

FINE_TUNED = {"sharpen": "sharpen", "superres": "superres", "wedge": "wedge3d"}         # --task -> a scunet checkpoint's

HELP = """wedge: fill in what a limited tilt range left out; denoise: two half maps, or one map with --noise-from-fsc or --snr;
anisotropic: the same where the noise differs between directions (--alpha with --tilt-range, or --orientations); abinitio: a density from
a stack of projections of unknown pose; generate: densities from nothing; likelihood: log p of maps; sharpen: undo the falloff of
high frequencies; superres: detail finer than the map's resolution, on a grid that can hold it"""


def parse(argv=None) -> argparse.Namespace:
    cli = argparse.ArgumentParser(description="Restore maps with a trained prior. Writes IN_TASK.mrc, and beside it .json and .png.")
    cli.add_argument("maps", nargs="*", metavar="IN", help="maps (.mrc, .map, .ccp4, also .gz or .bz2), or folders of them")
    cli.add_argument("--task", choices=TASKS, default="wedge", help=HELP)
    cli.add_argument("--model", choices=("hdit", "scunet"), help="hdit: the flow prior (default); scunet: CryoLVM's fine-tuned network, for "
                                                                 "wedge (sharpen and superres know no other)")
    cli.add_argument("-o", "--out", metavar="OUT", help="the map to write, or a folder (default: IN_TASK.mrc beside IN)")
    cli.add_argument("--tilt-range", nargs=2, type=float, metavar=("MIN", "MAX"), help="degrees (default: -60 60)")
    cli.add_argument("--tilt-axis", choices="xyz", default="y", help="the beam is along z (for axis z: along x)")
    cli.add_argument("--method", choices=("auto", "prior", "paper", "pocs", "wiener", "classical"), default="auto",
                     help="prior: the best we know; paper: its algorithm as printed; pocs (wedge), wiener (denoise), classical (abinitio): no network; "
                          "auto: prior, or those where the voxels are too coarse for it")
    cli.add_argument("--steps", type=int, help="of the sampler (default: 20; with --method paper 200; generate: 50)")
    cli.add_argument("--samples", type=int, default=4, help="posterior samples; their mean is the result, their spread IN_TASK_std.mrc")
    cli.add_argument("--noise", type=float, help="wedge: standard deviation of the noise in IN, as a fraction of the map's maximum "
                                                 "(its 99.999 percentile; default: estimated)")
    cli.add_argument("--noise-from-fsc", metavar="FSC", help="denoise one map, the mean of two halves: their FSC, a .csv of fsc.py")
    cli.add_argument("--snr", type=float, help="denoise one map: signal power over noise power in every shell")
    cli.add_argument("--alpha", type=float, default=50, help="anisotropic: noise power outside of --tilt-range, relative to inside")
    cli.add_argument("--orientations", metavar="FILE", help="anisotropic: particle orientations, .star or lines of rot tilt psi")
    cli.add_argument("--mask", metavar="MAP", help="0 to 1: where to change the map; elsewhere the input is kept")
    cli.add_argument("--box", type=int, help="generate: voxels per side (default: the prior's)")
    cli.add_argument("--solver", choices=flow.SOLVERS, default="heun", help="generate")
    cli.add_argument("--max-shift", type=float, default=6, help="abinitio: how far, in Å, the particles may be off the images' centres")
    cli.add_argument("--losses", choices=abinitio.TABLE_6, default="10345", help="abinitio --method paper: a row of the paper's Table 6")
    cli.add_argument("--stride", type=int, default=12, help="scunet: voxels from tile to tile")
    cli.add_argument("--fusion", choices=WINDOWS, default="gaussian", help="scunet: weights of overlapping tiles")
    cli.add_argument("--percentile", type=float, default=99.999, help="scunet: densities are clipped to 0 and this one, and divided by it")
    cli.add_argument("--probes", type=int, default=4, help="likelihood: random vectors of Hutchinson's estimator")
    cli.add_argument("--tolerance", type=float, default=1e-3, help="likelihood: of the ODE, relative and absolute")
    cli.add_argument("--truth", metavar="MAP", help="compare with this map (default: IN's name and _truth, if there is one)")
    cli.add_argument("--voxel-size", type=float, metavar="Å", help="instead of the header's")
    cli.add_argument("--ckpt", help="the network (checkpoint.py; default: weights/hdit_tiny.pt, or scunet_tiny_TASK.pt)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    cli.add_argument("--overwrite", action="store_true", help="replace files that exist (never the input)")
    cli.add_argument("--quiet", action="store_true", help="print errors only")
    args = cli.parse_args(argv)
    enhancing = ("sharpen", "superres")
    args.model = args.model or ("scunet" if args.task in enhancing else "hdit")
    if args.task not in (FINE_TUNED if args.model == "scunet" else TASKS.keys() - enhancing):
        raise ValueError(f"--model {args.model} has not learnt --task {args.task}; leave --model out")
    if args.model == "scunet" and args.tilt_axis != "y":
        raise ValueError(f"--tilt-axis {args.tilt_axis}: scunet has learnt wedges about y alone; turn the map, or leave --model out")
    if args.ckpt is None:
        name = "hdit_tiny" if args.model == "hdit" else f"scunet_tiny_{FINE_TUNED[args.task]}"
        args.ckpt = str(Path(__file__).parent / "weights" / f"{name}.pt")
    if (args.steps is not None and args.steps < 1) or args.samples < 1:
        raise ValueError(f"--steps {args.steps} and --samples {args.samples} must be at least 1")
    if args.noise is not None and not 0 <= args.noise < 10:
        raise ValueError(f"--noise {args.noise}: a fraction of the map's maximum, 0 or more")
    if not 0 <= args.max_shift < math.inf:
        raise ValueError(f"--max-shift {args.max_shift:g}: 0 or more Å")
    if args.box is not None and args.box < 1:
        raise ValueError(f"--box {args.box}: at least one voxel")
    if args.mask and args.task in ("generate", "abinitio", "likelihood"):
        raise ValueError(f"--mask: --task {args.task} changes no map")
    if args.orientations and args.task != "anisotropic":
        raise ValueError(f"--orientations: of --task anisotropic, not of {args.task}")
    if args.snr and args.noise_from_fsc:
        raise ValueError("--snr and --noise-from-fsc: give one of them")
    if args.task == "anisotropic" and not (args.orientations or args.tilt_range):
        raise ValueError("--task anisotropic wants --tilt-range with --alpha, or --orientations")
    args.tilt_range = args.tilt_range or (-60, 60)
    for name in ("voxel_size", "snr", "alpha", "tolerance"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: want a positive number" + " of Å" * (name == "voxel_size"))
    if not 0 < args.percentile <= 100:
        raise ValueError(f"--percentile {args.percentile:g}: above 0, at most 100")
    if not 0 <= args.seed < 2 ** 32:
        raise ValueError(f"--seed {args.seed}: want 0 to 2^32 - 1")
    if args.method not in ("auto", "prior", CLASSICAL.get(args.task), "paper" if args.model == "hdit" else None):
        raise ValueError(f"--method {args.method} is no answer to --task {args.task}")
    count, halves = len(args.maps), args.task in ("denoise", "anisotropic")
    one = halves and (args.snr or args.noise_from_fsc)
    if count != (args.task == "abinitio") if args.task in ("generate", "abinitio") else count != (1 if one else 2) if halves else count == 0:
        wants = {"generate": "no input", "abinitio": "one stack", "denoise": "two half maps", "anisotropic": "two half maps"}.get(args.task, "a map or more")
        raise ValueError(f"--task {args.task} wants {wants}{', or one map with --noise-from-fsc or --snr' * halves}; {count} given")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:      # torch's words for a device it does not know, or has not
        raise ValueError(f"--device {args.device}: not to be had here ({str(error).splitlines()[0]})") from None
    degrade.wedge_mask((4, 4, 4), tuple(args.tilt_range), args.tilt_axis)              # says so now if the range is wrong
    return args


def output(args: argparse.Namespace, default: Path) -> Path:
    """-o, in which a folder stands for the default name in it."""
    return default if args.out is None else Path(args.out) / default.name if Path(args.out).is_dir() else Path(args.out)


def inputs(args: argparse.Namespace) -> list[tuple[list[Path], Path]]:
    """Every (maps of one run, output) of the command line. Raises ValueError if two runs would share one output."""
    groups = []
    if args.task in ("denoise", "anisotropic"):
        groups = [list(map(Path, args.maps))]
    else:
        ours = (*(f"_{args.task}{end}" for end in ("", "_mean", "_std", "_network")), "_truth")   # what a folder may hold beside inputs
        for path in map(Path, args.maps):
            inside = [path]
            if path.is_dir():
                inside = sorted(p for p in path.iterdir() if p.name.lower().endswith(mrc.MAP_SUFFIXES) and not mrc.stem(p).endswith(ours))
            if not inside:
                raise ValueError(f"{path}: no map ({', '.join(mrc.SUFFIXES)}) in this folder")
            groups += [[p] for p in inside]
    if args.out and len(groups) > 1 and not Path(args.out).is_dir():
        raise ValueError(f"-o {args.out}: for {len(groups)} inputs give an existing folder")
    pairs = [(g, output(args, g[0].with_name(f"{mrc.stem(g[0])}_{args.task}.mrc"))) for g in groups]
    if len({o for _, o in pairs}) < len(pairs):
        raise ValueError("two inputs have the same name and would overwrite one output; run them apart")
    return pairs


def restore(paths: list[Path], out: Path, prior: Prior, args: argparse.Namespace) -> None:
    """One run: read, restore, compare, write."""
    ends = ("_mean.mrc", "_std.mrc", "_network.mrc", "_half1.mrc", "_half2.mrc")
    side = {end: out.with_name(mrc.stem(out) + end) for end in ends}
    path, begin = paths[0], time.perf_counter()
    refuse_existing([out, *side.values(), *report_files(out)], paths, args.overwrite)
    sources = [mrc.read_map(p, args.voxel_size) for p in paths]
    given, shape = sources[0], sources[0].density.shape
    if args.task == "superres":                          # what the network finds may not fit the map's own, coarser voxels
        sources = [max(given, mrc.resample_map(given, prior.voxel_size), key=lambda m: m.density.numel())]
    source = sources[0]

    def read_beside(name):
        m = mrc.read_map(name, args.voxel_size).density
        if m.shape not in (shape, source.density.shape):
            raise ValueError(f"{name}: {tuple(m.shape)} voxels, but {path} has {tuple(shape)}")
        return m
    truth_path = Path(args.truth) if args.truth else path.with_name(f"{mrc.stem(path)}_truth.mrc")
    truth = read_beside(truth_path) if args.truth or truth_path.exists() else None
    mask = read_beside(args.mask) if args.mask else None
    if mask is not None and not 0 <= float(mask.min()) <= float(mask.max()) <= 1:
        raise ValueError(f"{args.mask}: a mask is 0 to 1, this map {float(mask.min()):g} to {float(mask.max()):g}")
    say(args, f"{' '.join(map(str, paths))}: {' x '.join(map(str, shape))} voxels of {given.voxel_size[2]:g} Å")

    try:
        maps, before, shown, report, region = TASKS[args.task](args, sources, prior)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if mask is not None:
        mask = fourier.resample(mask, source.density.shape).clamp(0, 1)
        maps = {end: mask * x + (1 - mask) * before[end] if end in before else mask * x for end, x in maps.items()}
        shown |= {"restored": maps[""]} | ({"posterior mean": maps["_mean"]} if "_mean" in maps else {})

    scores = {}
    if truth is not None:                                # compared on its own grid, the map's or the result's
        report["truth_voxel_size"] = (source if truth.shape == source.density.shape else given).voxel_size
        shown = {name: fourier.resample(x, truth.shape) for name, x in shown.items()}
        scores = score(shown, truth, region, report["truth_voxel_size"][2])
        missing = region is not None
        say(args, f"with {truth_path.name:24} FSC_AUC  FSC_0.5" + "  FSC_AUC in the missing wedge" * missing)
        for name, v in scores.items():
            say(args, f"  {name:27} {v['auc']:8.3f} {v['fsc_05']:6.2f} Å" + (f"{v['auc_missing']:8.3f}" if missing else ""))
        shown["truth"] = truth
    for end, density in maps.items():
        mrc.write_map(side[f"{end}.mrc"] if end else out, replace(source, density=density), args.overwrite)
    write_report(args, out, shown, prior, begin, {"input": [str(p) for p in paths], "output": str(out), **report,
                                                  "voxel_size": source.voxel_size, "fsc": scores})


def main(argv=None) -> int:
    args = parse(argv)
    prior = checkpoint.load(args.ckpt, kind=args.model, device=args.device)
    if args.model == "scunet" and prior.task != FINE_TUNED[args.task]:
        raise ValueError(f"{args.ckpt}: trained for {prior.task or 'no task'}, --task {args.task} needs {FINE_TUNED[args.task]}; "
                         "give another --ckpt")
    if args.task in ("generate", "abinitio"):
        TASKS[args.task](args, prior)
        return 0
    failed = 0
    pairs = inputs(args)
    for paths, out in pairs:
        try:
            restore(paths, out, prior, args)
        except (ValueError, OSError) as error:
            if len(pairs) == 1:
                raise
            failed += 1
            print(f"sampling.py: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"sampling.py: {error}")
