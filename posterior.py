"""The inverse problem: densities that agree with what was observed and with the prior.

The prior is a velocity v(x_t, t) that turns noise (t = 1) into density (t = 0), see flow.py. It
was trained on clean densities, for no task. Here it is combined with an observation y of N voxels,

    y = A x + n,   (F A x)_k = m_k (F x)_k,   E |(F n)_k|^2 = P_k   for Fourier coefficient k    (1)

    missing wedge   m_k = 1 where a tilt series measured, else 0; the noise is white
    half maps       m_k = 1; P depends on the shell, or on the direction too: degrade.py (3), (4)

in steps from a time t to s < t:

    x_0'  = x_t - t v(x_t, t)             E[x_0 | x_t], what the prior makes of x_t              (2)
    x_0'' = x_0' + F^-1[w F(y - x_0')]    observation put back; w = m in Algorithm 2, line 3     (3)
    x_s   = (s/t) x_t + (1 - s/t) x_0''   Algorithm 2, line 4                                    (4)
    x_s   = (1 - s) x_0'' + s z           the same with fresh noise z ~ N(0, I)                  (5)
    w_k   = m_k V_k / (V_k + P_k / N)     trust in a coefficient                                 (6)
    x_s   = x_t - (t - s) v - lambda g / |g|,   g = dl/dx_t   Algorithm 1                        (7)
    l     = 1/N sum_k m_k |F(A x_0' - y)|_k^2 / (2 P_k)                                          (8)

V_k is the mean square error |F e|_k^2 / N of x_0': r^2 / rho with r = t / (1 - t), see `least_rho`,
or what `Missed` finds if that is more. lambda = min(lambda_max, t / (1 - t)).

(1)-(4), (7): CryoFM (arXiv:2410.08631) Algorithms 1 and 2, appendices D and E.1. (5): DDNM (Wang et
al. 2023, arXiv:2212.00490). (6): the proximal step of DiffPIR (Zhu et al. 2023, arXiv:2305.08995),
exact because A is diagonal in Fourier space. Maps are (D, H, W), samples (K, D, H, W), masks and
noise per coefficient are (D, H, W) in `fftfreq` layout.

Erratum: Algorithm 1 leaves out the length t - s of the step before v and adds lambda g, which
climbs the loss. (7) is what the release does.
Departure 1: the method "prior" starts from a classical answer (classical.py) at t < 1, takes (5)
instead of (4), weighs by (6) and keeps density non-negative. RESULTS.md, "Choices of the sampler",
says what each gains. The method "paper" is as printed.
Departure 2: the paper's maps are 64^3. Ours have any size: only v is evaluated by tiles
(posterior_tiles.py). Maps are rolled and turned at every step, but not by "paper" where the map
fits into one tile.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

import augment
import degrade
import flow
import fourier
import fsc
import grey_scale
import volume
from checkpoint import Prior
from fourier import put_back
from grey_scale import Match
from posterior_tiles import tiled_velocity
from volume import Scale

# Settings of the samplers, by task and method. Those without t_start are for Algorithm 1.
# "prior" is Departure 1. "paper" has the numbers of 5.5. The release's scripts take 200 steps.
PRIOR = dict(steps=20, t_start=0.5, fresh_noise=True, inner=2)
WEDGE = {
    "prior": PRIOR,
    "paper": dict(
        steps=1000, t_start=1.0, fresh_noise=False, inner=0, noise_aware=False, turned=False
    ),
}
DENOISE = {
    "prior": PRIOR,
    "paper": dict(steps=1000, lambda_max=5.0, turned=False),
}
# Bounds the noise that (3) copies from y, see `least_rho`.
LEAK = 1 / 8


# ---- The observation


@dataclass(frozen=True)
class Observation:
    """y of (1) on the prior's grid, in the grey scale and spectrum that the prior knows.

    `to_map` is the way back to those of the map.
    """

    y: Tensor  # (D, H, W)
    measured: Tensor  # m of (1), boolean (D, H, W)
    sigma: Tensor | float  # sigma_k^2 = P_k / N in (6): one number, or (D, H, W)
    start: Tensor  # the classical answer (D, H, W), where sampling begins
    scale: Scale = Scale(1.0, 0.0, 1.0)
    classical: Callable | None = None  # made start; see `observe`
    spectrum: Tensor | None = None  # g of grey_scale.py (2), by which y was multiplied; None: 1
    maximum_error: float | None = None  # of scale.maximum, one standard deviation; None: not known
    blur: Tensor | None = None  # h of grey_scale.py (5), of densities that look like y; None: 1
    nearest: list[int] | None = None  # the prior's references that look most like y

    def to_map(self, x: Tensor) -> Tensor:
        """Samples (..., D, H, W) in network scale, in the grey scale and spectrum of the map."""
        density = volume.denormalise(x.cpu(), self.scale)
        if self.spectrum is None:
            return density
        gain = grey_scale.expand(self.spectrum, density.shape[-3:])
        return fourier.apply_fourier(density, 1 / gain)


def observe(
    prior: Prior,
    y: Tensor,
    measured: Tensor,
    sigma: Tensor | float,
    classical: Callable[[Tensor, Tensor, Tensor | float], Tensor],
    maximum: float | None = None,
    voxel_size=1.0,
) -> Observation:
    """An Observation from a map y (D, H, W) and sigma, both in the units of the map.

    classical: makes `start` of (y, measured, sigma), as `pocs` and `positive_wiener` do; it is
    called with y and sigma in the prior's spectrum. maximum: 99.999 percentile of the sharp
    density, in the units of the map (default: estimated, grey_scale.py). voxel_size: that of y, as
    in `grey_scale.signal_power`.
    """
    found = Match()
    if prior.references is not None:
        found = grey_scale.match(y, measured, sigma, prior.references, prior.voxel_size, voxel_size)
    if found.spectrum is not None:
        gain = grey_scale.expand(found.spectrum, y.shape)
        y = fourier.apply_fourier(y, gain)
        sigma = sigma * gain
    start = classical(y, measured, sigma)
    if maximum is not None:
        found = found._replace(maximum=maximum, error=0.0)
    elif found.maximum is None:
        # Nothing to compare with, so take the maximum of the classical answer.
        found = found._replace(maximum=volume.positive_maximum(start))

    scale = Scale(found.maximum, prior.mean, prior.std)
    device = device_of(prior)
    sigma = sigma / scale.maximum / prior.std
    return Observation(
        y=volume.to_network_scale(y, scale).to(device),
        measured=measured.to(device),
        sigma=torch.as_tensor(sigma, dtype=torch.float32, device=device),
        start=volume.to_network_scale(start, scale).to(device),
        scale=scale,
        classical=classical,
        spectrum=found.spectrum,
        maximum_error=found.error,
        blur=found.blur,
        nearest=found.nearest,
    )


def device_of(prior: Prior) -> torch.device:
    """The device of a network; the CPU if it has no weights."""
    return next(prior.net.parameters(), torch.empty(0)).device


def estimate_noise(y: Tensor, measured: Tensor) -> float:
    """The standard deviation of white noise in y (D, H, W), in its units.

    It is measured in the corners of the Fourier cube, beyond Nyquist, where density has little
    power. Noise fills the whole map and density does not, so we take the 5th percentile of the
    local power. Raises ValueError if no coefficient beyond Nyquist was measured.
    """
    corner = measured & (fourier.wavenumber(y.shape) > 0.5)
    if not corner.any():
        raise ValueError("nothing was measured beyond Nyquist, where noise shows; give --noise")
    # The local power of these coefficients, in blocks of 8^3 voxels.
    squares = fourier.apply_fourier(y, corner).square()
    local_power = torch.nn.functional.avg_pool3d(squares[None, None], min(8, *y.shape)).flatten()
    return math.sqrt(local_power.quantile(0.05) / corner.float().mean())


def noise_and_signal(
    maps: list[Tensor], curve: Tensor | None = None, voxel_size=1.0
) -> tuple[list[Tensor], Tensor]:
    """The noise power of each map and the signal's power S, all (W//2,), means of |F|^2.

    Entry j is shell j of degrade.py, j/W <= |k| < (j+1)/W, which is shell j + 1 of the FSC with the
    convention "cryofm".
    maps: two half maps (D, H, W). Or one map, and curve: signal / (signal + noise) of its power in
    each shell. Raises ValueError if there is no signal.
    """
    if curve is None:
        half_map_1, half_map_2 = maps
        curve = fsc.fsc(half_map_1, half_map_2, convention="cryofm", voxel_size=voxel_size)[1:]
        powers = [
            degrade.noise_power(half_map_1, half_map_2, voxel_size),
            degrade.noise_power(half_map_2, half_map_1, voxel_size),
        ]
    else:
        powers = [degrade.noise_power_from_fsc(x, curve, voxel_size=voxel_size) for x in maps]

    # The signal ends at the first shell whose FSC is below 0.05. Beyond it the difference between
    # power and noise is chance. RELION's limit is 0.0001; at 15 Å 0.05 does better.
    shared = (curve >= 0.05).long().cumprod(0)
    totals = [degrade.radial_power(x, voxel_size) for x in maps]
    excess = [total - power for total, power in zip(totals, powers)]
    signal = torch.stack(excess).mean(0).clamp(min=0) * shared
    if not signal.any():
        raise ValueError("no signal: the FSC is below 0.05 in the first shell already")
    return powers, signal


# ---- Algorithm 2


def no_tick(samples: int) -> None:
    """Takes the place of a Progress, which counts the steps of all samples."""


def sample_posterior(
    prior: Prior,
    observation: Observation,
    generators: list[Generator],
    *,
    steps: int,
    t_start: float,
    fresh_noise: bool = True,
    inner: int = 0,
    noise_aware: bool = True,
    turned: bool = True,
    tick=no_tick,
) -> Tensor:
    """Samples (K, D, H, W) in network scale, one per generator: Algorithm 2 from t_start on.

    It begins with `observation.start`, noised to t_start. fresh_noise: (5) instead of (4). inner:
    number of non-negativity projections in every step. noise_aware: False takes w = m in (6),
    because Algorithm 2 as printed knows no noise. turned: of `tiled_velocity`. tick is called with
    the number of samples after every step.
    """
    y, measured = observation.y, observation.measured
    sigma = torch.as_tensor(observation.sigma, dtype=y.dtype, device=y.device)
    if not noise_aware:
        sigma = torch.zeros_like(sigma)

    no_density = -prior.mean / prior.std

    def draw_noise() -> Tensor:
        return flow.draw_noise(generators, y.shape, y.device)

    # The times, and V_k of (6) at each: how wrong the network's estimate is expected to be.
    times = torch.linspace(t_start, 0, steps + 1).tolist()
    ratios = [t / max(1 - t, 1e-3) for t in times[:-1]]
    r = torch.tensor(ratios, dtype=torch.float64)
    variances = (r**2 / least_rho(sigma, measured, r)).tolist()
    # Keep m and sigma^2 on the half of the grid that `rfft3` stores, as `put_back` wants.
    seen = fourier.stored_half(measured)
    noise_power = fourier.stored_half((sigma**2).expand(y.shape))
    missed = Missed(y, seen, noise_power)

    x = (1 - t_start) * observation.start + t_start * draw_noise()
    for t, s, variance in zip(times, times[1:], variances):
        # Ask the prior what the clean map looks like.
        velocity = tiled_velocity(prior, x, t, generators, turned=turned)
        estimate = flow.posterior_mean(x, velocity, t)  # (2)

        # Large maps need the memory. Only (4) goes on from x.
        del velocity
        if fresh_noise:
            del x

        # Trust each coefficient of y as far as its noise and the error of the estimate say.
        trust = missed(estimate).clamp_(min=variance)
        trust.div_(trust + noise_power).mul_(seen)  # (6)

        # Put the observation back, and keep density non-negative.
        for _ in range(inner):
            estimate = put_back(estimate, y, trust).clamp(min=no_density)
        estimate = put_back(estimate, y, trust)  # (3)

        # Go to the next, less noisy time.
        if fresh_noise:
            x = estimate.mul_(1 - s).add_(draw_noise(), alpha=s)  # (5)
        else:
            x = s / t * x + (1 - s / t) * estimate  # (4)
        tick(len(generators))
    return x


def least_rho(sigma: Tensor, measured: Tensor, r: Tensor, leak: float = LEAK) -> float:
    """The smallest rho in 0.001 .. 1 with mean_k (w_k sigma_k / r)^2 <= leak * rho at all r (T,).

    1 if none has it. Equation (3) copies part of the noise of y into x_0''. The mean is the power
    of that part, relative to the noise that the network expects at that time. For one coefficient
    it is 1 / (4 rho) at most. With rho > 1 the lowest frequencies would be left to the network. Not
    from the papers; what it gains: RESULTS.md, "Choices of the sampler".
    """
    # Coefficients of one shell have equal noise, so we list the different values and count each.
    sigma, count = sigma.expand(measured.shape)[measured].unique(return_counts=True)
    # The share of all coefficients, measured or not.
    share = (count / measured.numel()).to(sigma)
    r = r[:, None].to(sigma)

    # Bisect on a logarithmic scale.
    low, high = 1e-3, 1.0
    while high / low > 1.001:
        rho = math.sqrt(low * high)
        copied = (sigma * r / (r**2 + rho * sigma**2)).square() @ share
        if copied.max() > leak * rho:
            low = rho
        else:
            high = rho
    return high


class Missed:
    """V_k for (6): the mean square error of the network's estimates in each shell, as y shows it.

    The mean of |F(y - x)|^2 / N - sigma^2 over the measured coefficients of a shell, 0 unless it
    exceeds the noise, as in Morozov's discrepancy principle. Where it does, the network has lost
    what y shows well, and (6) trusts y more. Not from the papers.

    seen, noise_power: m and sigma^2 on the half of the grid that `rfft3` stores.
    """

    def __init__(self, y: Tensor, seen: Tensor, noise_power: Tensor):
        # What is the same in every step. The half that `rfft3` stores determines a real map.
        self.y, self.shells = y, y.shape[-1] // 2
        shell = fsc.shells(y.shape, half=True, rounding="down", device=y.device)
        self.shell = shell.clamp_(max=self.shells).int()
        self.weight = fsc.half_weight(y.shape, device=y.device) * seen
        self.count = self.shell_sum(torch.ones_like(self.weight)).clamp(min=1e-12)
        self.noise = self.shell_sum(noise_power) / self.count

    def shell_sum(self, power: Tensor) -> Tensor:
        return fsc.shell_sum(power * self.weight, self.shell, self.shells)

    def __call__(self, x: Tensor) -> Tensor:
        """V (K, D, H, W//2 + 1) of maps x (K, D, H, W)."""
        errors = []
        for u in x:
            residual = fourier.rfft3(self.y - u)
            power = fsc.real_dot(residual, residual) / u.numel()
            errors.append(self.shell_sum(power) / self.count)

        # Compare the misfit in each shell with the noise alone.
        excess = torch.stack(errors) - self.noise
        variance = torch.where(excess > self.noise, excess, 0).to(x.dtype)
        # Corners have the last shell's error.
        variance = torch.cat([variance, variance[:, -1:]], 1)
        return variance.index_select(1, self.shell.flatten()).unflatten(1, self.shell.shape)


# ---- Algorithm 1


def algorithm_1(
    prior: Prior,
    observation: Observation,
    generators: list[Generator],
    *,
    steps: int,
    lambda_max: float = 5.0,
    operator_noise: bool = False,
    per_time: bool = False,
    turned: bool = True,
    tick=no_tick,
) -> Tensor:
    """Samples (K, D, H, W) in network scale by (7), Algorithm 1, from noise.

    Raises ValueError if a coefficient has no noise: (8) divides by its power.
    y and sigma may hold one map for each sample, (K, D, H, W). operator_noise: A adds fresh noise
    to x_0', as in the release. per_time: multiply lambda by 200 / steps, so that the weight of y
    does not depend on the number of steps. turned: of `tiled_velocity`.
    """
    y, measured = observation.y, observation.measured
    sigma = torch.as_tensor(observation.sigma, dtype=y.dtype, device=y.device)
    if not (sigma > 0).all():
        raise ValueError("the paper's algorithm divides by the noise, which is 0 in some shells")
    shape = torch.broadcast_shapes(sigma.shape, measured.shape)
    power = (sigma**2 * measured.numel()).expand(shape)  # P_k

    x = flow.draw_noise(generators, measured.shape, y.device)
    for i in range(steps):
        # Ask the prior what the clean map looks like, and apply the operator A to it.
        t = 1 - i / steps
        x.requires_grad_()
        velocity = tiled_velocity(prior, x, t, generators, turned=turned)
        estimate = fourier.apply_fourier(flow.posterior_mean(x, velocity, t), measured)  # (2)
        if operator_noise:
            noise = flow.draw_noise(generators, measured.shape, y.device)
            estimate = degrade.add_spectral_noise(estimate, power, noise=noise)

        # The misfit (8) and its gradient. The sum keeps the samples independent.
        residual = torch.fft.fftn(estimate - y, dim=fourier.XYZ)
        misfit = residual.abs() ** 2 / (2 * power)
        loss = torch.where(measured, misfit, 0).mean(fourier.XYZ)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        x = flow.guided_step(x, velocity, gradient, t, steps, lambda_max, per_time).detach()  # (7)
        tick(len(generators))
    return x


# ---- Samples, their moments, and the way back


def draw_samples(
    prior: Prior,
    observation: Observation,
    settings: dict,
    *,
    samples: int,
    seed: int,
    tick=no_tick,
    samples_per_call: int = 8,
) -> Iterator[Tensor]:
    """Yield samples (D, H, W) on the prior's grid, in the grey scale that the observation had.

    settings: an entry of WEDGE or DENOISE. Sample i depends on (seed, i) alone; `samples_per_call`
    samples are drawn at a time.
    """
    algorithm = sample_posterior if "t_start" in settings else algorithm_1
    for first in range(0, samples, samples_per_call):
        numbers = range(first, min(first + samples_per_call, samples))
        # Sample i has its own generator.
        generators = [augment.item_generator(seed, i) for i in numbers]
        x = algorithm(prior, observation, generators, tick=tick, **settings)
        yield from observation.to_map(x)


class Moments:
    """Mean and standard deviation of samples that come one by one (Welford 1962)."""

    def __init__(self):
        self.count = 0
        self.mean = 0.0
        self.square = 0.0  # sum of squared deviations from the mean

    def add(self, x: Tensor) -> None:
        self.count += 1
        if self.count == 1:
            self.mean = x.clone()
            return
        # In place where it can be, because maps may be large.
        delta = x - self.mean
        self.mean.add_(delta, alpha=1 / self.count)
        self.square = delta.mul_(x - self.mean).add_(self.square)

    def std(self) -> Tensor:
        """The standard deviation of the samples. Raises ValueError if there are fewer than two."""
        if self.count < 2:
            raise ValueError(f"{self.count} sample(s) have no standard deviation; draw two or more")
        return (self.square / (self.count - 1)).sqrt()


def add_samples(
    prior: Prior, observation: Observation, settings: dict, *moments: Moments, **numbers
) -> None:
    """Add samples of the posterior to all moments. numbers: arguments of `draw_samples`."""
    for x in draw_samples(prior, observation, settings, **numbers):
        for moment in moments:
            moment.add(x)


def with_fine_detail(mean: Tensor, classical: Tensor) -> Tensor:
    """The mean of samples on the grid of the classical answer, both (D, H, W) in one grey scale.

    The prior's grid may be coarser. Detail that it cannot hold comes from the classical answer.
    """
    if mean.shape == classical.shape:
        return mean
    # Only the change is interpolated, so that no detail of the classical answer is lost.
    change = mean - fourier.resample(classical, mean.shape)
    return classical + fourier.resample(change, classical.shape)
