"""Restore maps with a trained prior: `python sampling.py --task wedge in.mrc` writes in_wedge.mrc.

The prior is a velocity field v(x_t, t) that turns noise (t = 1) into density (t = 0); it was trained without knowing any
task (flow.py, train.py). What a tilt series did not measure is found by sampling densities that agree with what it did:

    A y = F^-1[m F y]                     m = 1 where the tilt series measured, else 0 (degrade.py)            (1)
    x_0' = x_t - t v(x_t, t)              what the prior makes of x_t: an estimate of E[x_0 | x_t]             (2)
    x_0'' = x_0' + w A (y - x_0')         the measured coefficients put back; w = 1: Algorithm 2, line 3       (3)
    x_s = (s/t) x_t + (1 - s/t) x_0''     from t to s < t: Algorithm 2, line 4                                 (4)
    x_s = (1 - s) x_0'' + s z             the same with fresh noise, z ~ N(0, I)                               (5)
    u <- A y + (1 - A) max(u, 0)          POCS, the classical answer: density is not negative                  (6)
    w = r^2 / (r^2 + sigma^2), r = t/(1-t)   trust in y whose noise has standard deviation sigma               (7)

CryoFM (arXiv:2410.08631) appendix E.1, Algorithm 2. (5): DDNM (Wang et al. 2023, arXiv:2212.00490); (6): Youla & Webb 1982;
(7): the proximal step of DiffPIR (Zhu et al. 2023, arXiv:2305.08995), in closed form since A is diagonal in Fourier space.
The result is the mean of several samples: FSC rewards the mean of the posterior, and their spread says where not to trust it.

Departure 1: `--method prior` starts from POCS at t = 0.4 instead of noise at t = 1, takes (5) instead of (4), trusts noisy y
only as far as (7) says, and keeps density non-negative; what each is worth: README, "What helped". `--method paper` is
Algorithm 2 as printed.
Departure 2: the paper's maps are 64^3. Ours are of any size: (3) always acts on the whole volume, only v goes by tiles.
"""
import argparse
import itertools
import json
import math
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

import checkpoint
import data
import degrade
import flow
import fsc
from checkpoint import Prior


# ---- The data term -----------------------------------------------------------------------------------------------------

def put_back(x: Tensor, y: Tensor, measured: Tensor, weight: float = 1.0) -> Tensor:
    """(3) on maps (D, H, W); `measured` (D, H, W) in `fftfreq` layout, Hermitian. Float32, outside autocast."""
    X, Y, half = torch.fft.rfftn(x), torch.fft.rfftn(y), measured[..., :x.shape[-1] // 2 + 1]
    return torch.fft.irfftn(X + weight * half * (Y - X), s=x.shape)


def pocs(y: Tensor, measured: Tensor, iterations: int = 100, support: Tensor | None = None) -> Tensor:
    """(6): projections onto convex sets, from y itself. support: boolean (D, H, W), density is 0 outside of it."""
    u = y = put_back(torch.zeros_like(y), y, measured)
    for _ in range(iterations):
        u = u.clamp(min=0)
        u = put_back(u if support is None else u * support, y, measured)
    return u


# ---- The prior, on a map of any size -----------------------------------------------------------------------------------

def tiled_velocity(prior: Prior, x: Tensor, t: float, generator: Generator, tiles_per_call: int = 8) -> Tensor:
    """v(x, t) for one map (D, H, W) of any size in network scale, by tiles of the prior's box.

    The tiles cover the (periodic) map with as little overlap as fits, from a random corner on and in one of the 24
    orientations along the axes, both drawn anew at every call: no seam stays in one place, so none can form.
    """
    box = prior.box
    axes = []
    for n in x.shape:
        count, first = math.ceil(n / box), int(torch.randint(n, (), generator=generator))
        axes.append([(first + i * n // count + torch.arange(box)) % n for i in range(count)])
    order, signs = data.ROTATIONS_24[int(torch.randint(24, (), generator=generator))]
    flips = [axis - 3 for axis in range(3) if signs[axis] < 0]
    total, weight = torch.zeros_like(x), torch.zeros_like(x)
    tiles = [(z[:, None, None], y[None, :, None], w[None, None, :]) for z, y, w in itertools.product(*axes)]
    for i in range(0, len(tiles), tiles_per_call):
        batch = torch.stack([x[tile].permute(order).flip(flips) for tile in tiles[i:i + tiles_per_call]])[:, None]
        with torch.no_grad(), flow.autocast(x.device):
            v = prior.net(batch, torch.full((len(batch),), t, device=x.device))[:, 0]
        for tile, part in zip(tiles[i:i + tiles_per_call], v):
            part = part.flip(flips).permute(tuple(np.argsort(order)))
            total.index_put_(tile, part, accumulate=True)
            weight.index_put_(tile, torch.ones_like(part), accumulate=True)
    return total / weight


def restore_wedge(prior: Prior, y: Tensor, measured: Tensor, start: Tensor, generator: Generator, *, steps: int, t_start: float,
                  sigma: float = 0.0, fresh_noise: bool = True, inner: int = 0, tick=lambda: None) -> Tensor:
    """One sample of the posterior: Algorithm 2 from t_start on, all maps (D, H, W) in network scale.

    start: where to begin, noised to t_start (irrelevant at t_start = 1); sigma: standard deviation of the noise in y;
    fresh_noise: (5) instead of (4); inner: non-negativity projections in every step.
    """
    noise = lambda: torch.randn(y.shape, generator=generator).to(y.device)
    zero = -prior.mean / prior.std                       # no density, in network scale
    times = torch.linspace(t_start, 0, steps + 1).tolist()
    x = (1 - t_start) * start + t_start * noise()
    for t, s in zip(times, times[1:]):
        estimate = x - t * tiled_velocity(prior, x, t, generator)                      # (2)
        r2 = (t / max(1 - t, 1e-3)) ** 2
        w = r2 / (r2 + sigma ** 2)                                                     # (7)
        for _ in range(inner):
            estimate = put_back(estimate, y, measured, w).clamp(min=zero)
        estimate = put_back(estimate, y, measured, w)                                  # (3)
        x = (1 - s) * estimate + s * noise() if fresh_noise else s / t * x + (1 - s / t) * estimate   # (5) or (4)
        tick()
    return x


METHODS = {"prior": dict(steps=20, t_start=0.4, fresh_noise=True, inner=2),            # the best we know: README, "What helped"
           "paper": dict(steps=200, t_start=1.0, fresh_noise=False, inner=0)}          # Algorithm 2 as printed


def wedge_samples(prior: Prior, y: Tensor, measured: Tensor, method: str, *, samples: int, seed: int, noise: float | None = None,
                  steps: int | None = None, tick=lambda: None):
    """Yields samples of the posterior for the map y (D, H, W), sampled at the prior's voxel size, in y's own units.

    noise: standard deviation of the noise in y, in its units; None: estimated. Sample i depends on (seed, i) alone.
    """
    settings = METHODS[method] | ({"steps": steps} if steps else {})
    first = pocs(y, measured)                            # its percentile is nearer the truth's than that of what a wedge leaves
    scale = data.normalise(first, prior.mean, prior.std)[1]
    noise = estimate_noise(y, measured) if noise is None else noise
    sigma = noise / scale.maximum / prior.std if method == "prior" else 0.0
    device = next(prior.net.parameters()).device
    network = lambda u: ((u / scale.maximum - prior.mean) / prior.std).to(device)
    for i in range(samples):
        x = restore_wedge(prior, network(y), measured.to(device), network(first), Generator().manual_seed(seed * 1_000_003 + i),
                          sigma=sigma, tick=tick, **settings)
        yield data.denormalise(x.cpu(), scale)


# ---- The tasks ---------------------------------------------------------------------------------------------------------

def wedge(args: argparse.Namespace, source: data.Map, prior: Prior) -> tuple[dict[str, Tensor], dict]:
    """--task wedge: the maps to write, by the suffix of their names, and what to report.

    "" keeps every measured coefficient as it is; "_mean" is the posterior mean, where the measured ones lose their noise
    too; "_std" is the spread of the samples. All have the grid and the grey scale of `source`.
    """
    y, report = source.density, {"method": args.method}
    top = data.normalise(y, 0, 1)[1].maximum             # raises for dark protein
    if args.method == "auto":
        # The prior has seen densities sampled at its own voxel size; far coarser maps hold nothing that it knows.
        coarse = max(source.voxel_size) > 2 * prior.voxel_size
        report["method"] = "pocs" if coarse else "prior"
        if coarse:
            say(args, f"voxels of {max(source.voxel_size):g} Å hold no detail that this prior ({prior.voxel_size:g} Å) knows: POCS "
                      "instead; --method prior to use it all the same")
    measured_here = measured_by(source, args)
    if report["method"] == "pocs":
        return {"": pocs(y, measured_here)}, report

    # The samples live on the prior's grid.
    work = data.resample(source, prior.voxel_size)
    shape = work.density.shape
    measured = measured_by(work, args) & below_nyquist(shape, y.shape)
    # White noise has one power per coefficient: its standard deviation goes with the root of how many coefficients there are.
    gain = math.sqrt(work.density.numel() / y.numel())
    if args.noise is not None:
        noise = args.noise
    elif gain <= 1:                                      # on the coarser grid: the finer one may have no corners beyond Nyquist
        noise = estimate_noise(work.density, measured) / gain / top
    else:
        noise = estimate_noise(y, measured_here) / top
    steps = args.steps or METHODS[report["method"]]["steps"]
    report.update(noise=noise, noise_estimated=args.noise is None, steps=steps, box=list(shape))
    say(args, f"{args.samples} sample(s) x {steps} steps x {math.prod(math.ceil(n / prior.box) for n in shape)} tile(s) of "
              f"{prior.box}^3 on {args.device}; noise {noise:.3f} of the map's maximum" + " (estimated)" * (args.noise is None))
    mean, square = torch.zeros(shape), torch.zeros(shape)
    samples = wedge_samples(prior, work.density, measured, report["method"], samples=args.samples, seed=args.seed,
                            noise=noise * top * gain, steps=steps, tick=Progress(args, args.samples * steps))
    for i, sample in enumerate(samples):
        delta = sample - mean                            # Welford's running mean and sum of squares
        mean += delta / (i + 1)
        square += delta * (sample - mean)
    # The prior changes what its own grid can hold; finer detail of the input is filled in by POCS.
    finer = pocs(y, measured_here)
    posterior_mean = finer + data.fourier_resample(mean - data.fourier_resample(finer, shape), y.shape)
    maps = {"": put_back(posterior_mean, y, measured_here), "_mean": posterior_mean}
    if args.samples > 1:
        maps["_std"] = data.fourier_resample((square / (args.samples - 1)).sqrt(), y.shape).clamp(min=0)
    return maps, report


def measured_by(m: data.Map, args: argparse.Namespace) -> Tensor:
    """m of (1) on the grid of a map."""
    return degrade.hermitian_part(degrade.wedge_mask(m.density.shape, tuple(args.tilt_range), args.tilt_axis,
                                                     voxel_size=m.voxel_size))


def below_nyquist(shape, old_shape) -> Tensor:
    """Coefficients of the grid `shape` that the grid `old_shape` over the same box also had: boolean, `fftfreq` layout."""
    kept = [(torch.fft.fftfreq(n) * n).abs() < m / 2 if m < n else torch.ones(n, dtype=torch.bool)
            for n, m in zip(shape, old_shape)]
    return kept[0][:, None, None] & kept[1][:, None] & kept[2]


def estimate_noise(y: Tensor, measured: Tensor) -> float:
    """Standard deviation of white noise in y, from its measured coefficients beyond Nyquist, in the corners of the cube.

    Noise is everywhere, density is not: of the local powers (blocks of 8^3 voxels), the 5th percentile counts.
    """
    kz, ky, kx = fsc.freq_grid(y.shape)
    corner = measured & ((kz ** 2 + ky ** 2 + kx ** 2).sqrt() > 0.5)
    high = degrade.apply_fourier(y, corner)
    power = torch.nn.functional.avg_pool3d(high.square()[None, None], min(8, *y.shape)).flatten()
    return float((power.quantile(0.05) / corner.float().mean()).sqrt())


# ---- Reports -----------------------------------------------------------------------------------------------------------

def say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, flush=True)


class Progress:
    """Called once a step: prints how far the run is and how long it will take, every few seconds."""
    def __init__(self, args: argparse.Namespace, total: int):
        self.args, self.total, self.done = args, total, 0
        self.begin = self.last = time.perf_counter()

    def __call__(self) -> None:
        self.done += 1
        now = time.perf_counter()
        if now - self.last > 5 or self.done == self.total:
            self.last = now
            left = (now - self.begin) / self.done * (self.total - self.done)
            say(self.args, f"  step {self.done}/{self.total}  {now - self.begin:.0f} s  ETA {left:.0f} s")


def score(maps: dict[str, Tensor], truth: Tensor, missing: Tensor) -> dict[str, dict]:
    """FSC of each map with the truth, and FSC_AUC, over all coefficients and over the missing ones alone."""
    curves = {name: {"whole": fsc.fsc(x, truth), "missing": fsc.fsc(x, truth, missing)} for name, x in maps.items()}
    return {name: {"auc": float(fsc.auc(c["whole"])), "auc_missing": float(fsc.auc(c["missing"])),
                   **{k: curve.tolist() for k, curve in c.items()}} for name, c in curves.items()}


def draw(path: Path, maps: dict[str, Tensor], scores: dict[str, dict], voxel_size: float, across: int) -> None:
    """Central slices (D, H, W), one grey scale, cut where the wedge shows: across the tilt axis; the FSC beside them."""
    from matplotlib.figure import Figure
    panels = len(maps) + bool(scores)
    rows = 1 if panels < 5 else 2
    columns = -(-panels // rows)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    high = float(torch.quantile(maps["restored"].flatten()[::7][:10 ** 7], 0.9995))
    for ax, (name, x) in zip(axes, maps.items()):
        ax.imshow(x.select(across, x.shape[across] // 2).numpy(), cmap="gray_r", vmin=-0.15 * high, vmax=high, origin="lower")
        ax.set_title(name)
        ax.set_axis_off()
    if scores:
        n = len(scores["restored"]["missing"])
        frequency = [k / (2 * (n - 1)) / voxel_size for k in range(n)]
        for i, (name, values) in enumerate(scores.items()):
            axes[-1].plot(frequency, values["missing"], color=f"C{i}", label=f"{name} {values['auc_missing']:.2f}")
            axes[-1].plot(frequency, values["whole"], color=f"C{i}", lw=0.8, ls="--")
        axes[-1].set(title="FSC: missing wedge (-), whole (--)", xlabel="1/Å", ylim=(-0.1, 1.02), xlim=(0, frequency[-1]))
        axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ---- The program -------------------------------------------------------------------------------------------------------

TASKS = {"wedge": wedge}


def parse(argv=None) -> argparse.Namespace:
    cli = argparse.ArgumentParser(description="Restore maps with a trained prior. Writes IN_TASK.mrc, and beside it .json and .png.")
    cli.add_argument("maps", nargs="+", metavar="IN", help="maps (.mrc, .map, .ccp4, also .gz or .bz2), or folders of them")
    cli.add_argument("--task", choices=TASKS, default="wedge", help="wedge: fill in what a limited tilt range left out")
    cli.add_argument("-o", "--out", metavar="OUT", help="the map to write, or a folder (default: IN_TASK.mrc beside IN)")
    cli.add_argument("--tilt-range", nargs=2, type=float, default=(-60, 60), metavar=("MIN", "MAX"), help="degrees (default: -60 60)")
    cli.add_argument("--tilt-axis", choices="xyz", default="y", help="the beam is along z (for axis z: along x)")
    cli.add_argument("--method", choices=("auto", "prior", "paper", "pocs"), default="auto",
                     help="prior: the best we know; paper: Algorithm 2 as printed; pocs: non-negativity, no network; auto: prior, or "
                          "pocs where the voxels are too coarse for it")
    cli.add_argument("--steps", type=int, help="of the sampler (default: 20; with --method paper 200)")
    cli.add_argument("--samples", type=int, default=4, help="posterior samples; their mean is the result, their spread IN_TASK_std.mrc")
    cli.add_argument("--noise", type=float, help="standard deviation of the noise in IN, as a fraction of the map's maximum "
                                                 "(its 99.999 percentile; default: estimated)")
    cli.add_argument("--truth", metavar="MAP", help="compare with this map (default: IN's name and _truth, if there is one)")
    cli.add_argument("--voxel-size", type=float, metavar="Å", help="instead of the header's")
    cli.add_argument("--ckpt", default=str(Path(__file__).parent / "weights" / "hdit_tiny.pt"), help="the prior (checkpoint.py)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    cli.add_argument("--overwrite", action="store_true", help="replace files that exist (never the input)")
    cli.add_argument("--quiet", action="store_true", help="print errors only")
    args = cli.parse_args(argv)
    if (args.steps is not None and args.steps < 1) or args.samples < 1:
        raise ValueError(f"--steps {args.steps} and --samples {args.samples} must be at least 1")
    if args.noise is not None and not 0 <= args.noise < 10:
        raise ValueError(f"--noise {args.noise}: a fraction of the map's maximum, 0 or more")
    if args.voxel_size is not None and not 0 < args.voxel_size < math.inf:
        raise ValueError(f"--voxel-size {args.voxel_size:g}: want a positive number of Å")
    if not 0 <= args.seed < 2 ** 32:
        raise ValueError(f"--seed {args.seed}: want 0 to 2^32 - 1")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:      # torch's words for a device it does not know, or has not
        raise ValueError(f"--device {args.device}: not to be had here ({str(error).splitlines()[0]})") from None
    degrade.wedge_mask((4, 4, 4), tuple(args.tilt_range), args.tilt_axis)              # says so now if the range is wrong
    return args


def stem(path: Path) -> str:
    name = path.name
    for end in (".gz", ".bz2", *data.SUFFIXES):
        name = name[:-len(end)] if name.lower().endswith(end) else name
    return name


def inputs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Every (input, output) of the command line. Raises ValueError if two inputs would share one output."""
    readable = tuple(end + packing for end in data.SUFFIXES for packing in ("", ".gz", ".bz2"))
    paths = []
    ours = (f"_{args.task}", f"_{args.task}_mean", f"_{args.task}_std", "_truth")     # what a folder may hold beside inputs
    for path in map(Path, args.maps):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.lower().endswith(readable) and not stem(p).endswith(ours))
        if not inside:
            raise ValueError(f"{path}: no map ({', '.join(data.SUFFIXES)}) in this folder")
        paths += inside
    out = Path(args.out) if args.out else None
    if out and len(paths) > 1 and not out.is_dir():
        raise ValueError(f"-o {out}: for {len(paths)} inputs give an existing folder")
    pairs = [(p, out if out and not out.is_dir() else (out or p.parent) / f"{stem(p)}_{args.task}.mrc") for p in paths]
    if len({o for _, o in pairs}) < len(pairs):
        raise ValueError("two inputs have the same name and would overwrite one output; run them apart")
    return pairs


def restore(path: Path, out: Path, prior: Prior, args: argparse.Namespace) -> None:
    """One input: read, restore, compare, write."""
    side = {end: out.with_name(stem(out) + end) for end in ("_mean.mrc", "_std.mrc", ".json", ".png")}
    for p in (out, *side.values()):
        if p.exists() and path.exists() and p.samefile(path):
            raise ValueError(f"{p}: is the input, never overwritten; give another name with -o")
        if p.exists() and not args.overwrite:
            raise ValueError(f"{p}: exists; give another name with -o, or --overwrite")
    begin = time.perf_counter()
    source = data.read_map(path, args.voxel_size)
    truth_path = Path(args.truth) if args.truth else path.with_name(f"{stem(path)}_truth.mrc")
    truth = data.read_map(truth_path, args.voxel_size) if args.truth or truth_path.exists() else None
    if truth is not None and truth.density.shape != source.density.shape:
        raise ValueError(f"{truth_path}: {tuple(truth.density.shape)} voxels, but {path} has {tuple(source.density.shape)}")
    say(args, f"{path}: {' x '.join(map(str, source.density.shape))} voxels of {source.voxel_size[2]:g} Å")

    try:
        maps, report = TASKS[args.task](args, source, prior)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    measured = measured_by(source, args)
    shown, scores = {"input": source.density, "POCS": pocs(source.density, measured), "restored": maps[""]}, {}
    if "_mean" in maps:
        shown["posterior mean"] = maps["_mean"]
    if truth is not None:
        scores = score(shown, truth.density, ~measured)
        say(args, f"FSC_AUC with {truth_path.name}     whole   missing wedge\n" + "\n".join(
            f"  {name:24} {v['auc']:8.3f} {v['auc_missing']:12.3f}" for name, v in scores.items()))
        shown["truth"] = truth.density
    for end, density in maps.items():
        data.write_map(side[f"{end}.mrc"] if end else out, replace(source, density=density), args.overwrite)
    report = {"command": sys.argv, "input": str(path), "output": str(out), "settings": vars(args), **report, "fsc": scores,
              "voxel_size": source.voxel_size, "checkpoint_sha256": prior.sha256, "seconds": time.perf_counter() - begin,
              "torch": torch.__version__, "python": platform.python_version()}
    finite = lambda v: ({k: finite(x) for k, x in v.items()} if isinstance(v, dict) else [finite(x) for x in v]
                        if isinstance(v, (list, tuple)) else None if isinstance(v, float) and v != v else v)
    write_text(side[".json"], json.dumps(finite(report), indent=1) + "\n")
    try:
        draw(side[".png"], shown, scores, min(source.voxel_size), "zyx".index(args.tilt_axis))
        written = [out.name, side[".json"].name, side[".png"].name]
    except ImportError:
        written = [out.name, side[".json"].name, "no picture (pip install matplotlib)"]
    say(args, f"wrote {out.parent}/: {', '.join(written)}  ({time.perf_counter() - begin:.0f} s)")


def main(argv=None) -> int:
    args = parse(argv)
    prior = checkpoint.load(args.ckpt, kind="hdit", device=args.device)
    failed = 0
    pairs = inputs(args)
    for path, out in pairs:
        try:
            restore(path, out, prior, args)
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
