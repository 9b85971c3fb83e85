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
import itertools
import math

import numpy as np
import torch.utils.checkpoint
from torch import Generator, Tensor

import augment
import degrade
import flow
import fourier
import fsc
import volume
from checkpoint import Prior
from fourier import put_back


def pocs(y: Tensor, measured: Tensor, iterations: int = 100, support: Tensor | None = None) -> Tensor:
    """(7): projections onto convex sets, from y itself. support: boolean (D, H, W), density is 0 outside of it."""
    u = y = put_back(torch.zeros_like(y), y, measured)
    for _ in range(iterations):
        u = u.clamp(min=0)
        u = put_back(u if support is None else u * support, y, measured)
    return u


def wiener(y: Tensor, power: Tensor, signal: Tensor) -> Tensor:
    """(8) on a map (D, H, W); power and signal (D, H, W) or one number per shell, in |F y|^2."""
    grid = lambda p: p if p.ndim == 3 else degrade.expand_shells(p, y.shape)
    S, P = grid(signal), grid(power)
    return fourier.apply_fourier(y, torch.where(S > 0, S / (S + P), 0))


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
        order, signs = volume.ROTATIONS_24[int(torch.randint(24, (), generator=generator))]
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
    return degrade.expand_shells(torch.where(beyond > noise, beyond, 0).to(y.dtype), y.shape)


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
        estimate = fourier.apply_fourier(x - t * v, measured)
        if operator_noise:                               # P = N sigma^2 in units of the network
            estimate = degrade.add_spectral_noise(estimate, sigma ** 2 * y.numel(), noise=noise())
        residual = torch.fft.fftn(estimate - y, dim=fourier.XYZ)
        loss = torch.where(measured, residual.abs() ** 2 / (2 * y.numel() * sigma ** 2), 0).mean(fourier.XYZ)
        g, = torch.autograd.grad(loss.sum(), x)          # each sample's own: no sample's loss knows another
        x = flow.guided_step(x, v, g, t, steps, lambda_max, per_time).detach()                                     # (9)
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
    scale = volume.normalise(first, prior.mean, prior.std)[1]
    device = next(prior.net.parameters()).device
    network = lambda u: ((u / scale.maximum - prior.mean) / prior.std).to(device)
    sigma = torch.as_tensor(sigma / scale.maximum / prior.std, dtype=torch.float32, device=device)
    for i in range(0, samples, samples_per_call):
        generators = [augment.item_generator(seed, j) for j in range(i, min(i + samples_per_call, samples))]
        each = lambda: [tick() for _ in generators]      # a step of every sample
        common = dict(sigma=sigma, tick=each, **settings)
        if "t_start" in settings:
            x = sample_posterior(prior, network(y), measured.to(device), network(first), generators, **common)
        else:
            x = algorithm_1(prior, network(y), measured.to(device), generators, **common)
        yield from volume.denormalise(x.cpu(), scale)


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


def estimate_noise(y: Tensor, measured: Tensor) -> float:
    """Standard deviation of white noise in y, from its measured coefficients beyond Nyquist, in the corners of the cube.

    Noise is everywhere, density is not: of the local powers (blocks of 8^3 voxels), the 5th percentile counts.
    """
    kz, ky, kx = fourier.freq_grid(y.shape)
    corner = measured & ((kz ** 2 + ky ** 2 + kx ** 2).sqrt() > 0.5)
    high = fourier.apply_fourier(y, corner)
    power = torch.nn.functional.avg_pool3d(high.square()[None, None], min(8, *y.shape)).flatten()
    return float((power.quantile(0.05) / corner.float().mean()).sqrt())


def on_grid_of(y: Tensor, mean: Tensor, classical: Tensor) -> Tensor:
    """The mean of samples on y's grid: the prior changes what its own grid can hold, finer detail is the classical answer's."""
    return classical + fourier.resample(mean - fourier.resample(classical, mean.shape), y.shape)
