"""Ab initio modelling: a density from projections of unknown pose, with and without a prior.

    psi_cor(p, y) = - p . y / (|p| |y|)                                                         (1)
    psi_sg(p, y)  = - p . y / sg(|p| |y|)          sg: no gradient through it                   (2)
    psi_bg(p, y)  = sum of p_i^2 over the pixels i where y is below its q-quantile              (3)
    pose_k = argmin psi_cor(P(pose, x_0'), y_k),  l = 1/K sum_k L(P(pose_k, x_0'), y_k)         (4)
    x_s = x_t - (t - s) v - lambda_t g / |g|,  g = dl/dx_t,  lambda_t = min(5, t / (1 - t))    (5)
    V <- max(0, V - c dL/dV), accelerated,  L = 1/2 sum_j w_j |S_j V - y_j|^2                   (6)
    w_jk ~ exp(- psi_cor(S_j V, y_k) / T)          every grid pose j, image k, T falling        (7)

(1)-(5): CryoFM (arXiv:2410.08631) appendix E.2, Algorithm 3, Table 6. (6): FISTA (Beck & Teboulle
2009) over central slices S_j (abinitio_poses.py). (7): expectation maximisation over poses (Scheres
2012), annealed (Ueda & Nakano 1998) from random poses.
Erratum: Algorithm 3 prints x_t - v and + lambda g. Without the length t - s of the step the first
goes too far, and the second climbs the loss. (5) is what the release does.
Not stated: the weight of (3) beside (1). Ours divides it by sg(|p|^2), so that both terms lie
within [-1, 1].
Departure: the pose search leaves the mean of images out of (1), because it is the same in every
projection.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

import augment
import degrade
import fourier
from abinitio_poses import (
    Poses,
    align,
    coefficients,
    correlations,
    find_poses,
    frequencies,
    phase,
    shift_grid,
    slices,
    so3_grid,
)
from checkpoint import Prior
from flow import draw_noise, guided_step, posterior_mean
from volume import Scale, denormalise, normalise, to_network_scale

# v(x, t, generators) of maps (K, N, N, N) in network scale, one generator for each map.
Velocity = Callable[[Tensor, float, list[Generator]], Tensor]

# CryoFM Table 6: chosen for each data set "by examining the human preference for the
# reconstruction".
TABLE_6 = {
    "10345": dict(stop_gradient=False, q=0.7),  # synthetic, 2 projections (section 5.4)
    "10028": dict(stop_gradient=True, q=0.0),  # class averages
    "10827": dict(stop_gradient=False, q=0.7),  # class averages
}

METHODS = {
    "prior": dict(steps=20, t_start=0.4, iterations=3),
    "paper": dict(steps=200),
}

STARTS = 3  # random starts of `reconstruct`

# Fourier shells that `reconstruct` uses, round by round. None: all.
SHELLS = 8, 10, 12, 16, 20, 26, None


def ignore(*_) -> None:
    """A tick of progress that nobody watches."""


# ---- Losses of Algorithm 3, for images p and y (..., N, N) -> (...)


def psi_cor(p: Tensor, y: Tensor) -> Tensor:
    """(1)"""
    return -(p * y).sum((-2, -1)) / norms(p, y)


def psi_sg(p: Tensor, y: Tensor) -> Tensor:
    """(2): the value of (1), but its gradient does not keep the norm of p."""
    return -(p * y).sum((-2, -1)) / norms(p, y).detach()


def norms(p: Tensor, y: Tensor) -> Tensor:
    return p.norm(dim=(-2, -1)) * y.norm(dim=(-2, -1))


def psi_bg(p: Tensor, y: Tensor, q: float) -> Tensor:
    """(3): power of p in the background of y, the share q of its pixels; 0 for q = 0."""
    # The pixels below this level count as background.
    level = torch.quantile(y.flatten(-2), q, dim=-1)[..., None, None]
    return (p.square() * (y < level)).sum((-2, -1))


def projection_loss(p: Tensor, y: Tensor, *, stop_gradient: bool, q: float) -> Tensor:
    """L of Algorithm 3 with the settings of one row of Table 6."""
    psi = psi_sg if stop_gradient else psi_cor
    power = p.square().sum((-2, -1)).detach()
    return psi(p, y) + psi_bg(p, y, q) / power  # not stated: / power


# ---- Without a prior


def ball(N: int, device=None) -> Tensor:
    """The inside of the sphere that every projection sees completely: boolean (N, N, N)."""
    # One voxel less than half the box, because projections interpolate.
    r2 = (torch.arange(N, device=device) - N // 2).square()
    return r2[:, None, None] + r2[:, None] + r2 < (N / 2 - 1) ** 2


def fit(
    volume: Tensor,
    R: Tensor,
    y: Tensor,
    k: Tensor,
    *,
    weight: Tensor | None = None,
    iterations: int = 20,
) -> Tensor:
    """(6): steps from `volume` (N, N, N) towards the density whose slices at R are y (P, K).

    weight: (P,), default 1. Low frequencies converge first, so that few iterations leave the fine
    detail of `volume` much as it was.
    """
    inside = ball(volume.shape[-1], volume.device)
    w = torch.ones(len(R), device=volume.device) if weight is None else weight

    def loss_and_gradient(V, y, k):
        V = V.detach().requires_grad_()
        residual = (slices(V, R, k) - y).abs()
        loss = 0.5 * (w[:, None] * residual**2).sum()
        (gradient,) = torch.autograd.grad(loss, V)
        return float(loss.detach()), gradient

    # The longest safe step c is 1 / the largest eigenvalue of d gradient / dV. Slices cross at low
    # frequencies, so the first shells determine that eigenvalue. A few power iterations find it.
    low = k[k.norm(dim=1) <= 3]
    smooth = inside.float()
    for _ in range(4):
        smooth = loss_and_gradient(smooth / smooth.norm(), 0, low)[1] * inside
    c = 0.9 / float(smooth.norm())

    x = volume
    ahead = volume  # x moved on by its momentum
    least = math.inf
    i = 0  # steps since the momentum was zero
    for _ in range(iterations):
        loss, gradient = loss_and_gradient(ahead, y, k)
        if loss > least:
            # The step was too long. Go on from x, with half the step and no momentum.
            c /= 2
            ahead = x
            i = 0
            least = math.inf
            continue

        # A step down the gradient from the point ahead, then on by the momentum.
        least = loss
        new = ((ahead - c * gradient) * inside).clamp(min=0)  # (6)
        ahead = new + i / (i + 3) * (new - x)
        x = new
        i += 1
    return x


def anneal(
    images: Tensor, generator: Generator, *, max_shift: float, iterations: int = 60
) -> tuple[Tensor, float]:
    """(7) from random poses: a density of 24^3 voxels over the same box, and its correlation.

    Every image counts for all 576 rotations of `so3_grid(1)` and every shift, by a softmax of their
    correlations, whose temperature falls. The correlation returned is that of an image's best pose,
    averaged over images. Takes seconds. The hand is chance: the density may be mirrored.
    """
    # Coefficients up to shell 6 on a coarse grid, which has fewer voxels along the beam.
    n = 24
    radius = 6.0
    scale = n / images.shape[-1]
    k = frequencies(radius, device=images.device)
    y = coefficients(images, k) * scale**2
    grid = so3_grid(1).to(images)
    shifts = shift_grid(max_shift * scale, n / (4 * radius)).to(images)
    moved = y[:, None] * phase(k, -shifts, n)  # (P, S, K)

    # Random poses give a first density.
    R = torch.stack([augment.random_rotation(generator) for _ in y]).to(images)
    x = fit(images.new_zeros(n, n, n), R, y, k, iterations=5)
    for i in range(iterations):
        # T falls from 0.4 to 0.05 standard deviations of the correlation over poses.
        cor = correlations(x, y, k, grid, shifts)  # (P, S, R)
        width = 0.4 * (0.05 / 0.4) ** (i / (iterations - 1))
        T = width * cor.flatten(1).std(1)
        w = torch.softmax(cor.flatten(1) / T[:, None], 1).view_as(cor)  # (7)

        # Average the observations at each grid rotation, and take a few steps of (6) towards them.
        total = w.sum((0, 1))  # (R,)
        used = total > 1e-3
        total = total[used]
        mean = torch.einsum("psr,psk->rk", w.to(y.dtype), moved)[used] / total[:, None]
        x = fit(x, grid[used], mean, k, weight=total, iterations=3)
    best = cor.flatten(1).max(1).values
    return x, float(best.mean())


def reconstruct(
    images: Tensor,
    generator: Generator,
    *,
    max_shift: float,
    radius: float,
    starts: int = STARTS,
    tick: Callable = ignore,
) -> tuple[Tensor, Poses]:
    """The classical answer to images (P, N, N): a density (N, N, N) and their poses.

    Takes the best of a few annealed starts. Then finds poses and density in turn, while the
    resolution rises to `radius` (Fourier shells). max_shift: in voxels.
    """
    # Several low-resolution densities, of which the best correlates most with the images.
    N = images.shape[-1]
    tries = []
    for _ in range(starts):
        tries.append(anneal(images, generator, max_shift=max_shift))
        tick()
    coarse, _ = max(tries, key=lambda found: found[1])
    x = fourier.resample(coarse, (N, N, N)).clamp(min=0)

    # Sharpen it, round by round.
    poses = None
    for i, shells in enumerate(SHELLS):
        shells = min(shells or radius, radius)
        # Search the whole grid until the density tells poses well apart, then follow each pose.
        start = poses if i > 3 else None
        poses = find_poses(x, images, max_shift=max_shift, radius=shells, start=start)

        # Undo the shifts, and fit the density to the images at these poses.
        k = frequencies(shells, device=images.device)
        centred = coefficients(images, k) * phase(k, -poses.shifts, N)
        x = fit(x, poses.rotations, centred, k)
        tick()
    return x, poses


# ---- With a prior


def restore_projections(
    velocity: Velocity,
    images: Tensor,
    start: Tensor,
    poses: Poses,
    scale: Scale,
    generators: list[Generator],
    *,
    radius: float,
    steps: int,
    t_start: float,
    iterations: int,
    max_shift: float,
    tick: Callable = ignore,
) -> Tensor:
    """Samples (K, N, N, N), one per generator, that start from the classical density.

    The density is noised to t_start. In every step the prior estimates x_0', and (6) moves that
    towards the projections. start (N, N, N): in the units of the images. poses: those of the images
    to begin with, which each sample refines for itself. max_shift: as in `find_poses`.
    """
    # All samples begin with the poses of the classical density.
    k = frequencies(radius, device=images.device)
    observed = coefficients(images, k)
    poses_of = [poses] * len(generators)

    def noise():
        return draw_noise(generators, start.shape, start.device)

    # Noise the classical density to t_start.
    times = torch.linspace(t_start, 0, steps + 1).tolist()
    x = (1 - t_start) * to_network_scale(start, scale) + t_start * noise()
    for i, (t, s) in enumerate(zip(times, times[1:])):
        # Ask the prior what the density looks like.
        estimate = posterior_mean(x, velocity(x, t, generators), t)
        V = denormalise(estimate, scale).clamp(min=0)

        # Move each sample towards the projections, whose poses follow it now and then.
        fitted = []
        for j, V_j in enumerate(V):
            if i % 5 == 4:
                poses_of[j] = find_poses(
                    V_j, images, max_shift=max_shift, radius=radius, start=poses_of[j]
                )
            centred = observed * phase(k, -poses_of[j].shifts, images.shape[-1])
            fitted.append(fit(V_j, poses_of[j].rotations, centred, k, iterations=iterations))
            tick()
        V = torch.stack(fitted)

        # Go to the next, less noisy time.
        x = (1 - s) * to_network_scale(V, scale) + s * noise()
    return V


def algorithm_3(
    velocity: Velocity,
    prior: Prior,
    images: Tensor,
    generators: list[Generator],
    *,
    max_shift: float,
    radius: float,
    steps: int = 200,
    lambda_max: float = 5.0,
    stop_gradient: bool = False,
    q: float = 0.7,
    tick: Callable = ignore,
) -> Tensor:
    """Samples (K, N, N, N) by (5), Algorithm 3 from noise, each on the scale that fits best.

    images (P, N, N). Poses are searched anew in every step, projections made in real space.
    stop_gradient, q: a row of TABLE_6.
    """
    N = images.shape[-1]

    def gradient(V):
        # dl/dx_0' of one sample, at the poses that fit it best.
        poses = find_poses(V, images, max_shift=max_shift, radius=radius)  # (4), Departure
        # Few images at a time, because the graph of a projection takes memory.
        total = 0
        V = V.clone().requires_grad_()
        parts = [x.split(8) for x in (poses.rotations, poses.shifts, images)]
        for R, shift, y in zip(*parts):
            p = degrade.project(V, R, shift[:, :2])
            loss = projection_loss(p, y, stop_gradient=stop_gradient, q=q)
            total = total + torch.autograd.grad(loss.sum() / len(images), V)[0]
        return total

    x = draw_noise(generators, (N, N, N), images.device)
    for i in range(steps):
        # Ask the prior what the density looks like.
        t = 1 - i / steps
        x.requires_grad_()
        v = velocity(x, t, generators)
        V = posterior_mean(x, v, t) * prior.std + prior.mean  # x_0' as a density

        # The gradient of the losses, back through the network.
        by_V = torch.stack([gradient(V_k) for V_k in V.detach()])
        (g,) = torch.autograd.grad(V, x, by_V)
        x = guided_step(x, v, g, t, steps, lambda_max).detach()  # (5), Erratum
        for _ in generators:
            tick()

    # (1) ignores the scale of a density. Find the factor by least squares.
    k = frequencies(radius, device=x.device)
    fitted = []
    for V in x * prior.std + prior.mean:
        poses = find_poses(V, images, max_shift=max_shift, radius=radius)
        p = slices(V, poses.rotations, k)
        y = coefficients(images, k) * phase(k, -poses.shifts, N)
        factor = (p.conj() * y).real.sum() / (p.abs() ** 2).sum()
        fitted.append(V * factor)
    return torch.stack(fitted)


def samples_of(
    velocity: Velocity,
    prior: Prior,
    images: Tensor,
    method: str,
    *,
    samples: int,
    seed: int,
    max_shift: float,
    steps: int | None = None,
    losses: str = "10345",
    samples_per_call: int = 8,
    progress: Callable = lambda total, what: ignore,
):
    """Yields (method, density (N, N, N)) from images (P, N, N) at the prior's voxel size.

    method: "classical", which yields one density without a prior; "prior", which yields that one
    and then samples; "paper", with the `losses` of a row of TABLE_6. All have one frame and hand.
    Sample i depends on (seed, i) alone; `samples_per_call` of them are drawn at a time.
    progress(total, what): returns the function to call after every round of the search, and the
    one to call after every step of a sample.
    """
    # The classical answer, which "prior" starts from.
    radius = images.shape[-1] // 2 - 1
    if method != "paper":
        start, poses = reconstruct(
            images,
            Generator().manual_seed(seed),
            max_shift=max_shift,
            radius=radius,
            tick=progress(STARTS + len(SHELLS), "search"),
        )
        yield "classical", start
        if method == "classical":
            return
        _, scale = normalise(start, prior.mean, prior.std)

    # Samples, a few at a time. Each has its own generator.
    settings = dict(METHODS[method], radius=radius, max_shift=max_shift)
    if steps:
        settings["steps"] = steps
    settings["tick"] = progress(samples * settings["steps"], "step")
    frame = None
    for first in range(0, samples, samples_per_call):
        last = min(first + samples_per_call, samples)
        generators = [augment.item_generator(seed, i) for i in range(first, last)]
        if method == "prior":
            drawn = restore_projections(
                velocity, images, start, poses, scale, generators, **settings
            )
        else:
            settings |= TABLE_6[losses]
            drawn = algorithm_3(velocity, prior, images, generators, **settings)
        for x in drawn:
            # Each sample of Algorithm 3 finds a frame of its own. Take that of the first one.
            if method == "paper" and frame is not None:
                x = align(x, frame).density
            elif frame is None:
                frame = x
            yield method, x
