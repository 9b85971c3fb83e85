"""Restore maps with a trained prior: `python sampling.py --task wedge in.mrc` writes in_wedge.mrc.

--task sharpen, superres and, with --model scunet, wedge ask CryoLVM's fine-tuned network f instead, (10) below.

The prior is a velocity field v(x_t, t) that turns noise (t = 1) into density (t = 0); it was trained without knowing any
task (flow.py, train.py). Here it meets what was observed,

    y = A x + n,   (F A x)_k = m_k (F x)_k,   E |(F n)_k|^2 = P_k   for coefficient k of N                    (1)

    --task wedge        m = 1 where a tilt series measured, else 0; n white
    --task denoise      m = 1; P one number per shell, from two half maps or an FSC (degrade.py (5))
    --task anisotropic  m = 1; P differs between directions, too (degrade.py (6))

by sampling densities that agree with it:

    x_0' = x_t - t v(x_t, t)              what the prior makes of x_t: an estimate of E[x_0 | x_t]             (2)
    x_0'' = x_0' + F^-1[w F(y - x_0')]    the observed coefficients put back; w = m: Algorithm 2, line 3       (3)
    x_s = (s/t) x_t + (1 - s/t) x_0''     from t to s < t: Algorithm 2, line 4                                 (4)
    x_s = (1 - s) x_0'' + s z             the same with fresh noise, z ~ N(0, I)                               (5)
    w_k = m_k V_k / (V_k + P_k / N)                             trust in a coefficient, by its noise           (6)
    V_k = r^2 / rho, r = t/(1-t), rho = 1                       how wrong x_0' is; denoise: or more

What the prior must beat, the classical answers:

    u <- A y + (1 - A) max(u, 0)          POCS: density is not negative                                        (7)
    u = F^-1[S / (S + P) F y]             Wiener, S the signal's power per shell; then max(u, 0)               (8)

And Algorithm 1, by the gradient through the network of what y says of x_0':

    l = mean_k |F(A x_0' - y)|_k^2 / (2 P_k),   x_s = x_t - (t - s) v - lambda g / |g|,   g = dl/dx_t          (9)

CryoLVM has no prior and no y = A x: its network f (model_scunet.py) was trained on pairs and is asked once, by cubes x_k of its
box every --stride voxels, whose answers are fused under a window w, its Algorithm 1:

    M = sum_k w f(x_k) / sum_k w                                data.py (6)                                     (10)

CryoFM (arXiv:2410.08631): Algorithm 1, appendix D, E.1. (5): DDNM (Wang et al. 2023, arXiv:2212.00490); (6): the proximal step of
DiffPIR (Zhu et al. 2023, arXiv:2305.08995), in closed form since A is diagonal in Fourier space; (7): Youla & Webb 1982.
(10): CryoLVM sections 4.2-4.4, appendix D.1 (what the network is shown), D.2 (fusion), G.4 (stride 24 and --fusion mean).
The result is the mean of several samples: FSC rewards the mean of the posterior, and their spread says where not to trust it.

Erratum: Algorithm 1 leaves out the 1/N before v and prints + lambda g, which climbs the loss; (9) as in the release.
Departure 1: `--method prior` starts from (7) or (8) at t < 1 instead of noise at t = 1, takes (5) instead of (4), trusts y
only as far as (6) says (denoise, anisotropic: `least_rho`, `missed`), and keeps density non-negative; what each is worth: README, "What helped". `--method paper` is
Algorithm 2 (wedge) or 1 as printed, but for the erratum.
Departure 2: the paper's maps are 64^3. Ours are of any size: (3) always acts on the whole volume, only v goes by tiles.
Departure 3: D.2 normalises the fused map, by what is not stated; we undo D.1, so that it has the input's grey scale. For
--task wedge we put the measured coefficients back, (3), which the paper does not; IN_wedge_network.mrc is without.
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
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Generator, Tensor

import abinitio
import checkpoint
import data
import degrade
import flow
import fsc
from checkpoint import Prior


# ---- What was observed, and the classical answers ------------------------------------------------------------------------

def put_back(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """(3) on maps x (..., D, H, W), y (D, H, W); weights (D, H, W) in `fftfreq` layout, even in k. Float32, outside autocast."""
    X, Y = torch.fft.rfftn(x, dim=degrade.XYZ), torch.fft.rfftn(y)
    return torch.fft.irfftn(X + weights[..., :x.shape[-1] // 2 + 1] * (Y - X), s=y.shape, dim=degrade.XYZ)


def pocs(y: Tensor, measured: Tensor, iterations: int = 100, support: Tensor | None = None) -> Tensor:
    """(7): projections onto convex sets, from y itself. support: boolean (D, H, W), density is 0 outside of it."""
    u = y = put_back(torch.zeros_like(y), y, measured)
    for _ in range(iterations):
        u = u.clamp(min=0)
        u = put_back(u if support is None else u * support, y, measured)
    return u


def wiener(y: Tensor, power: Tensor, signal: Tensor) -> Tensor:
    """(8) on a map (D, H, W); power and signal (D, H, W) or one number per shell, in |F y|^2."""
    grid = lambda p: p if p.ndim == 3 else degrade.on_grid(p, y.shape)
    S, P = grid(signal), grid(power)
    return degrade.apply_fourier(y, torch.where(S > 0, S / (S + P), 0))


# ---- The prior, on a map of any size -----------------------------------------------------------------------------------

def tiled_velocity(prior: Prior, x: Tensor, t: float, generators: list[Generator], tiles_per_call: int = 8) -> Tensor:
    """v(x, t) for maps x (K, D, H, W) of any size in network scale, by tiles of the prior's box; one generator for each map.

    The tiles cover the (periodic) map with as little overlap as fits, from a random corner on and in one of the 24
    orientations along the axes, both drawn anew at every call: no seam stays in one place, so none can form.
    """
    box, tiles = prior.box, []                           # of every tile: voxels (k, z, y, x), order of axes, flips
    for k, generator in enumerate(generators):
        axes = []
        for n in x.shape[1:]:
            count, first = math.ceil(n / box), int(torch.randint(n, (), generator=generator))
            axes.append([(first + i * n // count + torch.arange(box)) % n for i in range(count)])
        order, signs = data.ROTATIONS_24[int(torch.randint(24, (), generator=generator))]
        flips = [axis - 3 for axis in range(3) if signs[axis] < 0]
        tiles += [((torch.tensor(k), z[:, None, None], y[None, :, None], w[None, None, :]), order, flips)
                  for z, y, w in itertools.product(*axes)]
    total, weight = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(0, len(tiles), tiles_per_call):
        batch = torch.stack([x[tile].permute(order).flip(flips) for tile, order, flips in tiles[i:i + tiles_per_call]])[:, None]
        times = torch.full((len(batch),), t, device=x.device)
        with flow.autocast(x.device):                    # the backward pass of (9) computes each batch again: memory for one
            v = (torch.utils.checkpoint.checkpoint(prior.net, batch, times, use_reentrant=False) if x.requires_grad
                 else prior.net(batch, times))[:, 0]
        for (tile, order, flips), part in zip(tiles[i:i + tiles_per_call], v):
            part = part.flip(flips).permute(tuple(np.argsort(order)))
            total.index_put_(tile, part, accumulate=True)
            weight.index_put_(tile, torch.ones_like(part), accumulate=True)
    return total / weight


WINDOWS = {"gaussian": data.gaussian_window, "mean": lambda box: torch.ones(box, box, box)}


@torch.no_grad()
def sliding_windows(net, x: Tensor, box: int, stride: int, fusion: str = "gaussian", *, tiles_per_call: int = 4,
                    progress=iter) -> Tensor:
    """(10) for one map (D, H, W) of any size in network scale: what `net`, (B, 1, box, box, box) -> the same, makes of it.

    fusion: a key of WINDOWS. progress: takes the list of calls and yields them. Sides shorter than the box are padded with
    solvent, 0, for the time being. Tiles of nothing but solvent are not left out: the network's biases answer them, too.
    Cubes are cut, evaluated and fused call by call: memory is that of five maps and of one call.
    Raises ValueError if the stride leaves gaps.
    """
    padded = data.pad(x, box)
    corners = data.tile_starts(padded.shape, box, stride)
    # Calls of equal size: a last one of a single tile would take torch's slow 3-D convolution on a CPU.
    count = math.ceil(len(corners) / tiles_per_call)
    calls = [corners[i * len(corners) // count:(i + 1) * len(corners) // count] for i in range(count)]

    def answers():
        for call in progress(calls):
            with flow.autocast(x.device):
                batch = net(data.cut(padded, call, box)[:, None])[:, 0]
            yield from batch.float()
    fused = data.blend(answers(), corners, padded.shape, WINDOWS[fusion](box))
    first = [m // 2 - n // 2 for n, m in zip(x.shape, padded.shape)]                    # where data.pad put x
    return fused[tuple(slice(f, f + n) for f, n in zip(first, x.shape))]


def least_rho(sigma: Tensor, measured: Tensor, r: Tensor, leak: float) -> float:
    """rho of (6): 1 or the least, 0.001 at the lowest, with mean_k (w_k sigma_k / r)^2 <= leak * rho at all r (T,).

    The mean, over all coefficients, is the noise of y that (6) lets into x_0'' for what the network expects there; the most that
    one coefficient gets is 1 / (4 rho) of it. It is their product that is bounded: where noise keeps to few coefficients, more of
    y is used. Beyond 1, the lowest frequencies would be left to the network. Ours; leak: README, "What helped".
    """
    sigma, count = sigma.expand(measured.shape)[measured].unique(return_counts=True)   # shells share theirs
    share = (count / measured.numel()).to(sigma)
    r = r[:, None].to(sigma)
    low, high = 1e-3, 1.0
    while high / low > 1.001:
        rho = math.sqrt(low * high)
        noise = (sigma * r / (r ** 2 + rho * sigma ** 2)).square() @ share
        low, high = (rho, high) if noise.max() > leak * rho else (low, rho)
    return high


def missed(x: Tensor, y: Tensor, measured: Tensor, sigma: Tensor) -> Tensor:
    """A V_k for (6): the mean square error of maps x (K, D, H, W) that y betrays in each shell, (K, D, H, W) in `fftfreq` layout.

    |F(y - x)|^2 / N less the noise sigma^2, over the measured coefficients of a shell; 0 unless that is more than the noise
    itself (Morozov's discrepancy principle, by twice the noise): the network has lost there what y knows well. Ours.
    """
    mean = lambda p: degrade.shell_mean(p * measured) / degrade.shell_mean(measured.double()).clamp(min=1e-12)
    noise = mean((sigma ** 2).expand(y.shape))
    beyond = torch.stack([mean(torch.fft.fftn(u - y).abs().square() / y.numel()) for u in x]) - noise
    return degrade.on_grid(torch.where(beyond > noise, beyond, 0).to(y.dtype), y.shape)


def sample_posterior(prior: Prior, y: Tensor, measured: Tensor, start: Tensor, generators: list[Generator], *, steps: int,
                     t_start: float, sigma: float | Tensor = 0.0, fresh_noise: bool = True, inner: int = 0,
                     leak: float | None = None, tick=lambda: None) -> Tensor:
    """Samples (K, D, H, W) of the posterior, one per generator: Algorithm 2 from t_start on, maps (D, H, W) in network scale.

    start: where to begin, noised to t_start (irrelevant at t_start = 1); sigma: root of P/N in (6), the standard deviation
    of the noise in y, one number or (D, H, W) in `fftfreq` layout; fresh_noise: (5) instead of (4); inner: non-negativity
    projections in every step; leak: of `least_rho`, for noise that differs between shells; None: rho = 1, without `missed`.
    """
    noise = lambda: torch.stack([torch.randn(y.shape, generator=g) for g in generators]).to(y.device)
    zero = -prior.mean / prior.std                       # no density, in network scale
    times = torch.linspace(t_start, 0, steps + 1).tolist()
    r = torch.tensor([t / max(1 - t, 1e-3) for t in times[:-1]], dtype=torch.float64)
    rho = 1.0 if leak is None else least_rho(sigma, measured, r, leak)
    x = (1 - t_start) * start + t_start * noise()
    for t, s, V in zip(times, times[1:], (r ** 2 / rho).tolist()):
        estimate = x - t * tiled_velocity(prior, x, t, generators)                     # (2)
        if leak is not None:
            V = missed(estimate, y, measured, sigma).clamp(min=V)
        w = measured * (V / (V + sigma ** 2))                                          # (6)
        for _ in range(inner):
            estimate = put_back(estimate, y, w).clamp(min=zero)
        estimate = put_back(estimate, y, w)                                            # (3)
        x = (1 - s) * estimate + s * noise() if fresh_noise else s / t * x + (1 - s / t) * estimate   # (5) or (4)
        tick()
    return x


def algorithm_1(prior: Prior, y: Tensor, measured: Tensor, generators: list[Generator], *, steps: int, sigma: Tensor,
                lambda_max: float = 5.0, operator_noise: bool = False, per_time: bool = False, tick=lambda: None) -> Tensor:
    """Samples (K, D, H, W) by (9), Algorithm 1: maps as in `sample_posterior`, sigma > 0.

    operator_noise: A adds fresh noise to x_0', as the release's does. per_time: lambda times 200/N, so that the sum of all
    lambda, and with it the weight of y, does not depend on the number of steps N.
    """
    noise = lambda: torch.stack([torch.randn(y.shape, generator=g) for g in generators]).to(y.device)
    x = noise()
    for i in range(steps):
        t = 1 - i / steps
        x.requires_grad_()
        v = tiled_velocity(prior, x, t, generators)
        estimate = degrade.apply_fourier(x - t * v, measured)
        if operator_noise:                               # P = N sigma^2 in units of the network
            estimate = degrade.add_spectral_noise(estimate, sigma ** 2 * y.numel(), noise=noise())
        residual = torch.fft.fftn(estimate - y, dim=degrade.XYZ)
        loss = torch.where(measured, residual.abs() ** 2 / (2 * y.numel() * sigma ** 2), 0).mean(degrade.XYZ)
        g, = torch.autograd.grad(loss.sum(), x)          # each sample's own: no sample's loss knows another
        size = min(lambda_max, t / max(1 - t, 1e-6)) * (200 / steps if per_time else 1)
        x = (x - v / steps - size * g / torch.linalg.vector_norm(g, dim=degrade.XYZ, keepdim=True)).detach()      # (9)
        tick()
    return x


# The best we know for each task (README, "What helped"), and Algorithms 2 and 1 as printed.
METHODS = {"prior": dict(steps=20, t_start=0.4, fresh_noise=True, inner=2),
           "paper": dict(steps=200, t_start=1.0, fresh_noise=False, inner=0)}
DENOISE = {"prior": dict(steps=20, t_start=0.5, fresh_noise=True, inner=2, leak=1 / 8),
           "paper": dict(steps=200)}


def draw_samples(prior: Prior, y: Tensor, measured: Tensor, first: Tensor, sigma: float | Tensor, settings: dict, *,
                 samples: int, seed: int, tick=lambda: None, samples_per_call: int = 8):
    """Yields samples of the posterior for the map y (D, H, W) at the prior's voxel size, in y's own units.

    first: the classical answer, whose percentile is nearer the truth's than that of y; sigma: root of P/N in y's units.
    Sample i depends on (seed, i) alone; `samples_per_call` of them are drawn at a time.
    """
    scale = data.normalise(first, prior.mean, prior.std)[1]
    device = next(prior.net.parameters()).device
    network = lambda u: ((u / scale.maximum - prior.mean) / prior.std).to(device)
    sigma = torch.as_tensor(sigma / scale.maximum / prior.std, dtype=torch.float32, device=device)
    for i in range(0, samples, samples_per_call):
        generators = [data.item_generator(seed, j) for j in range(i, min(i + samples_per_call, samples))]
        each = lambda: [tick() for _ in generators]      # a step of every sample
        common = dict(sigma=sigma, tick=each, **settings)
        if "t_start" in settings:
            x = sample_posterior(prior, network(y), measured.to(device), network(first), generators, **common)
        else:
            x = algorithm_1(prior, network(y), measured.to(device), generators, **common)
        yield from data.denormalise(x.cpu(), scale)


def wedge_samples(prior: Prior, y: Tensor, measured: Tensor, method: str, *, samples: int, seed: int, noise: float | None = None,
                  steps: int | None = None, tick=lambda: None):
    """`draw_samples` for --task wedge. noise: standard deviation of the noise in y, in its units; None: estimated."""
    settings = METHODS[method] | ({"steps": steps} if steps else {})
    noise = estimate_noise(y, measured) if noise is None else noise
    return draw_samples(prior, y, measured, pocs(y, measured), noise if method == "prior" else 0.0, settings,
                        samples=samples, seed=seed, tick=tick)


class Moments:
    """Mean and standard deviation of samples that come one by one (Welford 1962)."""
    def __init__(self):
        self.count, self.mean, self.square = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        self.count += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.count
        self.square = self.square + delta * (x - self.mean)

    def std(self) -> Tensor:
        return (self.square / (self.count - 1)).sqrt()


# ---- The tasks ---------------------------------------------------------------------------------------------------------

class Result(NamedTuple):
    """What a task hands over; all maps (D, H, W) have the grid and the grey scale of its input."""
    maps: dict[str, Tensor]                  # to write, by the suffix of their names; "" is the result
    inputs: dict[str, Tensor]                # what each of them was before, for --mask
    shown: dict[str, Tensor]                 # to score and draw, by name: the input, classical answers
    report: dict
    region: Tensor | None = None             # coefficients to score apart: those that the wedge misses


def wedge(args: argparse.Namespace, sources: list[data.Map], prior: Prior) -> Result:
    """--task wedge: "" keeps every measured coefficient as it is; "_mean" is the posterior mean, where the measured ones
    lose their noise too; "_std" is the spread of the samples. With --model scunet "_network" is what it made of the map."""
    source, = sources
    y, report, measured_here = source.density, {}, measured_by(source, args)
    top = data.normalise(y, 0, 1)[1].maximum             # raises for dark protein
    method = choose(args, source, prior, "pocs")
    classical = pocs(y, measured_here)
    shown = {"input": y, "POCS": classical}
    if method == "pocs":
        return Result({"": classical}, {"": y}, shown | {"restored": classical}, {"method": method}, ~measured_here)

    # The samples live on the prior's grid.
    work = data.resample(source, prior.voxel_size)
    shape = work.density.shape
    measured = measured_by(work, args) & below_nyquist(shape, y.shape)
    if prior.kind == "scunet":                           # trained on maps without what the wedge misses
        seen = put_back(torch.zeros_like(work.density), work.density, measured)
        answer, report = ask_network(args, prior, seen)
        maps = {"": put_back(on_grid_of(y, answer, classical), y, measured_here), "_network": data.fourier_resample(answer, y.shape)}
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
        maps["_std"] = data.fourier_resample(moments.std(), y.shape).clamp(min=0)
    return Result(maps, {"": y, "_mean": y}, shown | {"restored": maps[""], "posterior mean": mean}, report, ~measured_here)


def denoise(args: argparse.Namespace, sources: list[data.Map], prior: Prior) -> Result:
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
        snr = args.snr or 2 / (1 / read_fsc(args.noise_from_fsc, sources[0]) - 1)
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

    works = [data.resample(m, prior.voxel_size) for m in sources]
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
        maps["_std"] = data.fourier_resample(pooled.std(), here).clamp(min=0)
    return Result(maps, inputs, shown | {"restored": maps[""]}, report)


def noise_and_signal(maps: list[Tensor], curve: Tensor | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
    """In shells 1 .. W//2: the noise power of each map (D, H, W), the power S of the signal in them, (8), both in |F|^2, and the
    FSC. Of two half maps; or of one and its curve, signal over signal and noise. Raises ValueError if there is no signal."""
    if curve is None:
        a, b = maps
        curve = fsc.fsc(a, b, convention="cryofm")[1:]
        powers = [degrade.noise_power(a, b), degrade.noise_power(b, a)]
    else:
        powers = [degrade.noise_power_from_fsc(x, curve) for x in maps]
    # No signal from the first shell on that the halves do not share: P_y - P would be noise. RELION: 0.0001; at 15 Å 0.05 is better.
    shared = (curve >= 0.05).long().cumprod(0)
    signal = torch.stack([degrade.radial_power(x) - P for x, P in zip(maps, powers)]).mean(0).clamp(min=0) * shared
    if not signal.any():
        raise ValueError("no signal: the FSC is below 0.05 in the first shell already")
    return powers, signal, curve


def enhance(args: argparse.Namespace, sources: list[data.Map], prior: Prior) -> Result:
    """--task sharpen (CryoLVM 4.2), superres (4.3): one pass of the network fine-tuned for it."""
    source, = sources
    answer, report = ask_network(args, prior, data.resample(source, prior.voxel_size).density)
    maps = {"": data.fourier_resample(answer, source.density.shape)}
    return Result(maps, {"": source.density}, {"input": source.density, "restored": maps[""]}, report)


def ask_network(args: argparse.Namespace, prior: Prior, density: Tensor) -> tuple[Tensor, dict]:
    """(10) for a map (D, H, W) at the network's voxel size and in its own units: the answer in the same, and facts to report."""
    x, scale = data.normalise(density, prior.mean, prior.std, args.percentile)          # D.1

    def progress(calls):
        say(args, f"{sum(map(len, calls))} tile(s) of {prior.box}^3 on {args.device}, {len(calls)} call(s) of the network")
        tick = Progress(args, len(calls))
        for call in calls:
            yield call
            tick()
    answer = sliding_windows(prior.net, x.to(args.device), prior.box, args.stride, args.fusion, progress=progress)
    report = dict(method="network", stride=args.stride, fusion=args.fusion, percentile=args.percentile, box=list(density.shape))
    return data.denormalise(answer.cpu(), scale), report


def likelihood(args: argparse.Namespace, sources: list[data.Map], prior: Prior) -> Result:
    """--task likelihood: log p of the map's density, clipped and divided by its 99.999 percentile, flow.py (6)-(8).

    The map, padded with solvent, is taken for independent tiles of the prior's box. The map written holds each tile's
    nats per voxel, the lower, the less expected.
    """
    source, = sources
    if max(source.voxel_size) > 2 * prior.voxel_size:
        raise ValueError(f"voxels of {max(source.voxel_size):g} Å hold none of the detail that this prior gives a likelihood to; "
                         f"it is one of {prior.voxel_size:g} Å")
    work = data.resample(source, prior.voxel_size)
    x, _ = data.normalise(work.density, prior.mean, prior.std)
    count = [math.ceil(n / prior.box) for n in x.shape]
    padded = torch.full([n * prior.box for n in count], -prior.mean / prior.std)
    padded[tuple(map(slice, x.shape))] = x
    corners = [tuple(prior.box * c for c in corner) for corner in itertools.product(*map(range, count))]
    tiles = data.cut(padded, corners, prior.box)[:, None].to(args.device)
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
    paths = [out.with_name(f"{stem(out)}{f'_{i + 1}' * (i > 0)}.mrc") for i in range(args.samples)]
    refuse_existing(args, paths)
    steps = args.steps or 50
    begin, tick, shown = time.perf_counter(), Progress(args, args.samples * steps), {}
    say_work(args, prior, (box,) * 3, args.samples, steps, args.solver)
    for first in range(0, args.samples, 8):              # eight at a time
        generators = [data.item_generator(args.seed, i) for i in range(first, min(first + 8, args.samples))]

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
            data.write_map(paths[i], data.Map(x, prior.voxel_size), args.overwrite)
            shown[f"{args.seed}, {i + 1}"] = x
    write_report(args, out, shown, prior, begin, {"task": "generate", "steps": steps, "box": box, "solver": args.solver,
                                                  "output": list(map(str, paths))})


def ab_initio(args: argparse.Namespace, prior: Prior) -> None:
    """--task abinitio: a density from a stack of projections (abinitio.py), the classical one beside it."""
    path, begin = Path(args.maps[0]), time.perf_counter()
    out = output(args, path.with_name(f"{stem(path)}_abinitio.mrc"))
    refuse_existing(args, [out, out.with_name(f"{stem(out)}_std.mrc")], [path])
    stack = abinitio.read_stack(path, args.voxel_size)
    (P, N, _), voxel_size = stack.density.shape, stack.voxel_size[2]
    n = max(24, round(N * voxel_size / prior.voxel_size))
    truth_path = Path(args.truth) if args.truth else path.with_name(f"{stem(path)}_truth.mrc")
    truth = data.resample(data.read_map(truth_path), N * voxel_size / n).density if args.truth or truth_path.exists() else None
    if truth is not None and truth.shape != (n,) * 3:
        raise ValueError(f"{truth_path}: not a cube of the images' side, {N * voxel_size:g} Å")
    images = data.fourier_resample(stack.density, (P, n, n))
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
        there = data.Map(data.fourier_resample(x, (N,) * 3), voxel_size)
        data.write_map(out.with_name(f"{stem(out)}{end}.mrc") if end else out, there, args.overwrite)
    write_report(args, out, shown, prior, begin, {**report, "output": str(out), "fsc": scores})


def choose(args: argparse.Namespace, source: data.Map, prior: Prior, classical: str) -> str:
    """The method, and a word where "auto" is not the prior: far coarser maps than it has seen hold nothing that it knows."""
    if args.method != "auto":
        return args.method
    if max(source.voxel_size) <= 2 * prior.voxel_size:
        return "prior"
    say(args, f"voxels of {max(source.voxel_size):g} Å hold no detail that this prior ({prior.voxel_size:g} Å) knows: "
              f"{classical.upper() if classical == 'pocs' else classical.title()} instead; --method prior to use it all the same")
    return classical


def on_grid_of(y: Tensor, mean: Tensor, classical: Tensor) -> Tensor:
    """The mean of samples on y's grid: the prior changes what its own grid can hold, finer detail is the classical answer's."""
    return classical + data.fourier_resample(mean - data.fourier_resample(classical, mean.shape), y.shape)


def power_on_grid(args: argparse.Namespace, power: Tensor, m: data.Map) -> Tensor:
    """Noise power per shell -> per coefficient (D, H, W) of a map; for --task anisotropic by direction."""
    shape = m.density.shape
    if args.task != "anisotropic":
        return degrade.on_grid(power, shape)
    if args.orientations:
        return degrade.anisotropic_noise_power(power, degrade.orientation_alpha(read_orientations(args.orientations), shape))
    return degrade.anisotropic_noise_power(power, 1 + (args.alpha - 1) * ~measured_by(m, args))


def read_fsc(path: str, m: data.Map) -> Tensor:
    """FSC of half maps in shells 1 .. W//2 of a map's noise power, inside of 0..1: of a .csv of fsc.py the curve without a mask, at
    each shell's middle; or one number per line from shell 1 on."""
    n = m.density.shape[-1] // 2
    try:
        lines = [line.split(",") for line in Path(path).read_text().splitlines() if line.strip()]
        if table := lines[0][0] == "shell":
            column = lines[0].index("unmasked") if "unmasked" in lines[0] else 3
            s, curve = np.array([(float(line[1]), float(line[column])) for line in lines[1:]]).T
            curve = np.interp((np.arange(n) + 0.5) / (2 * n * m.voxel_size[2]), s, curve)
        else:
            curve = np.array([float(line) for line, in lines])
    except (ValueError, IndexError):
        raise ValueError(f"{path}: neither a .csv of fsc.py nor one FSC value per line") from None
    if len(curve) != n or not np.isfinite(curve).all():
        raise ValueError(f"{path}: {len(curve)} shells; a box of {m.density.shape[-1]} needs shells 1 to {n}")
    return torch.from_numpy(curve).clamp(1e-6, 1 - 1e-6)


def read_orientations(path: str) -> Tensor:
    """Particle rotations (P, 3, 3) from a RELION star file, or from lines of rot, tilt, psi in degrees."""
    wanted, header, rows = ["_rlnAngleRot", "_rlnAngleTilt", "_rlnAnglePsi"], [], []
    try:
        lines = Path(path).read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text, but {' '.join(wanted)} are wanted") from None
    for line in lines:
        words = line.split()
        if words and words[0].startswith(("data_", "loop_")):
            if rows and set(wanted) <= set(header):
                break                                    # the table after the one with the angles
            header, rows = [], []
        elif words and words[0].startswith("_"):
            header.append(words[0])
        elif words and not words[0].startswith("#"):
            rows.append(words)
    try:
        columns = [header.index(name) for name in wanted] if header else range(3)
        angles = torch.tensor([[float(row[c]) for c in columns] for row in rows]).double()
    except (ValueError, IndexError):
        raise ValueError(f"{path}: neither a RELION star file with {', '.join(wanted)} nor lines of rot, tilt, psi") from None
    if not len(angles) or not angles.isfinite().all():
        raise ValueError(f"{path}: no orientations in it, or angles that are no numbers")
    return degrade.euler_matrix(angles)


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


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ---- The program -------------------------------------------------------------------------------------------------------

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


READABLE = tuple(end + packing for end in data.SUFFIXES for packing in ("", ".gz", ".bz2"))


def output(args: argparse.Namespace, default: Path) -> Path:
    """-o, in which a folder stands for the default name in it."""
    return default if args.out is None else Path(args.out) / default.name if Path(args.out).is_dir() else Path(args.out)


def stem(path: Path) -> str:
    name = path.name
    for end in (".gz", ".bz2", ".mrcs", *data.SUFFIXES):
        name = name[:-len(end)] if name.lower().endswith(end) else name
    return name


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
                inside = sorted(p for p in path.iterdir() if p.name.lower().endswith(READABLE) and not stem(p).endswith(ours))
            if not inside:
                raise ValueError(f"{path}: no map ({', '.join(data.SUFFIXES)}) in this folder")
            groups += [[p] for p in inside]
    if args.out and len(groups) > 1 and not Path(args.out).is_dir():
        raise ValueError(f"-o {args.out}: for {len(groups)} inputs give an existing folder")
    pairs = [(g, output(args, g[0].with_name(f"{stem(g[0])}_{args.task}.mrc"))) for g in groups]
    if len({o for _, o in pairs}) < len(pairs):
        raise ValueError("two inputs have the same name and would overwrite one output; run them apart")
    return pairs


def refuse_existing(args: argparse.Namespace, outputs: list[Path], sources: list[Path] = ()) -> None:
    """outputs: the maps; what `write_report` puts beside the first is looked for, too."""
    if not outputs[0].parent.is_dir():
        raise FileNotFoundError(f"{outputs[0].parent}: no such folder; make it first")
    if not outputs[0].name.lower().endswith(READABLE):
        raise ValueError(f"{outputs[0]}: maps are written as {', '.join(data.SUFFIXES)}, plain or with .gz, .bz2")
    for p in [*outputs, *(outputs[0].with_name(stem(outputs[0]) + end) for end in (".json", ".png"))]:
        if p.exists() and any(path.exists() and p.samefile(path) for path in sources):
            raise ValueError(f"{p}: is the input, never overwritten; give another name with -o")
        if p.exists() and not args.overwrite:
            raise ValueError(f"{p}: exists; give another name with -o, or --overwrite")


def restore(paths: list[Path], out: Path, prior: Prior, args: argparse.Namespace) -> None:
    """One run: read, restore, compare, write."""
    ends = ("_mean.mrc", "_std.mrc", "_network.mrc", "_half1.mrc", "_half2.mrc")
    side = {end: out.with_name(stem(out) + end) for end in ends}
    path, begin = paths[0], time.perf_counter()
    refuse_existing(args, [out, *side.values()], paths)
    sources = [data.read_map(p, args.voxel_size) for p in paths]
    given, shape = sources[0], sources[0].density.shape
    if args.task == "superres":                          # what the network finds may not fit the map's own, coarser voxels
        sources = [max(given, data.resample(given, prior.voxel_size), key=lambda m: m.density.numel())]
    source = sources[0]

    def read_beside(name):
        m = data.read_map(name, args.voxel_size).density
        if m.shape not in (shape, source.density.shape):
            raise ValueError(f"{name}: {tuple(m.shape)} voxels, but {path} has {tuple(shape)}")
        return m
    truth_path = Path(args.truth) if args.truth else path.with_name(f"{stem(path)}_truth.mrc")
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
        mask = data.fourier_resample(mask, source.density.shape).clamp(0, 1)
        maps = {end: mask * x + (1 - mask) * before[end] if end in before else mask * x for end, x in maps.items()}
        shown |= {"restored": maps[""]} | ({"posterior mean": maps["_mean"]} if "_mean" in maps else {})

    scores = {}
    if truth is not None:                                # compared on its own grid, the map's or the result's
        report["truth_voxel_size"] = (source if truth.shape == source.density.shape else given).voxel_size
        shown = {name: data.fourier_resample(x, truth.shape) for name, x in shown.items()}
        scores = score(shown, truth, region, report["truth_voxel_size"][2])
        missing = region is not None
        say(args, f"with {truth_path.name:24} FSC_AUC  FSC_0.5" + "  FSC_AUC in the missing wedge" * missing)
        for name, v in scores.items():
            say(args, f"  {name:27} {v['auc']:8.3f} {v['fsc_05']:6.2f} Å" + (f"{v['auc_missing']:8.3f}" if missing else ""))
        shown["truth"] = truth
    for end, density in maps.items():
        data.write_map(side[f"{end}.mrc"] if end else out, replace(source, density=density), args.overwrite)
    write_report(args, out, shown, prior, begin, {"input": [str(p) for p in paths], "output": str(out), **report,
                                                  "voxel_size": source.voxel_size, "fsc": scores})


def write_report(args: argparse.Namespace, out: Path, shown: dict[str, Tensor], prior: Prior, begin: float, report: dict) -> None:
    """The .json and the picture beside `out`."""
    settings = {"command": sys.argv, "settings": vars(args), "checkpoint_sha256": prior.sha256, "torch": torch.__version__,
                "python": platform.python_version(), "seconds": time.perf_counter() - begin}
    finite = lambda v: ({k: finite(x) for k, x in v.items()} if isinstance(v, dict) else [finite(x) for x in v]
                        if isinstance(v, (list, tuple)) else None if isinstance(v, float) and v != v else v)
    json_path, picture = (out.with_name(stem(out) + end) for end in (".json", ".png"))
    write_text(json_path, json.dumps(finite(settings | report), indent=1) + "\n")
    voxel_size = min(report.get("truth_voxel_size") or report.get("voxel_size", (prior.voxel_size,)))
    try:
        draw(picture, shown, report.get("fsc", {}), voxel_size, "zyx".index(args.tilt_axis))
        written = [out.name, json_path.name, picture.name]
    except ImportError:
        written = [out.name, json_path.name, "no picture (pip install matplotlib)"]
    say(args, f"wrote {out.parent}/: {', '.join(written)}  ({time.perf_counter() - begin:.0f} s)")


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
