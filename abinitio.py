"""Ab initio modelling: a density from projections of unknown pose, with and without a prior (`sampling.py --task abinitio`).

    psi_cor(p, y) = - p . y / (|p| |y|)                                                                        (a1)
    psi_sg(p, y)  = - p . y / sg(|p| |y|)          sg: no gradient through it                                  (a2)
    psi_bg(p, y)  = sum of p_i^2 over the pixels i where y is below its q-quantile                             (a3)
    pose_k = argmin psi_cor(P(pose, x_0'), y_k),  l = 1/K sum_k L(P(pose_k, x_0'), y_k)                        (a4)
    x_s = x_t - (t - s) v - lambda_t g / |g|,  g = dl/dx_t,  lambda_t = min(lambda_max, t / (1 - t))           (a5)
    V <- max(0, V - c dL/dV), accelerated,  L = 1/2 sum_j w_j |S_j V - y_j|^2                                  (a6)
    w_jk ~ exp(- psi_cor(S_j V, y_k) / T)          every grid pose j, image k, T falling                       (a7)

(a1)-(a5): CryoFM (arXiv:2410.08631) appendix E.2, Algorithm 3, Table 6. (a6): FISTA (Beck & Teboulle 2009) over central
slices S_j; (a7): expectation maximisation over poses (Scheres 2012), annealed (Ueda & Nakano 1998) from random poses.
Erratum: Algorithm 3 prints x_t - v and + lambda g, which climbs the loss; (a5) descends it, and has the 1/N.
Not stated: the weight of (a3) beside (a1); ours divides it by sg(|p|^2), so that both terms lie within [-1, 1].
Departure: the pose search leaves the mean of images out of (a1): it is the same in every projection, and says nothing.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import augment
import degrade
import fourier
from checkpoint import Prior
from degrade import euler_matrix
from flow import guided_step
from volume import Scale, denormalise, normalise, rotate


def healpix(nside: int) -> tuple[Tensor, Tensor]:
    """Directions of equal area, ring by ring (Gorski et al. 2005, eq. 4-9): theta, phi in radians, (12 nside^2,)."""
    theta, phi = [], []
    for i in range(1, 4 * nside):
        cap = min(i, 4 * nside - i)                             # rings around a pole hold 4, 8, 12, ...
        n = 4 * min(cap, nside)
        z = 1 - cap ** 2 / (3 * nside ** 2) if cap < nside else abs(4 / 3 - 2 * i / (3 * nside))
        half = 0.5 if cap < nside or (i - nside) % 2 == 0 else 0.0
        theta += [math.acos(z) if i <= 2 * nside else math.pi - math.acos(z)] * n
        phi += [2 * math.pi / n * (j + half) for j in range(n)]
    return torch.tensor(theta, dtype=torch.float64), torch.tensor(phi, dtype=torch.float64)


def so3_grid(order: int) -> Tensor:
    """Rotations spread evenly: HEALPix directions times in-plane angles (Yershova et al. 2010), (72 * 8^order, 3, 3).

    Neighbours are 60, 30, 15, 7.5 degrees apart for order 0, 1, 2, 3; RELION's grid of that order.
    """
    nside = 2 ** order
    theta, phi = (torch.rad2deg(angle) for angle in healpix(nside))
    psi = torch.arange(6 * nside, dtype=torch.float64) * (60 / nside)
    i, j = torch.meshgrid(torch.arange(len(theta)), torch.arange(len(psi)), indexing="ij")
    return euler_matrix(torch.stack([phi[i], theta[i], psi[j]], -1).reshape(-1, 3))


def frequencies(radius: float, dims: int = 2, device=None) -> Tensor:
    """Half of the whole frequencies 0 < |k| <= radius, one of k and -k: (K, 3) float32 x, y, z; z = 0 if dims is 2."""
    r = torch.arange(-int(radius), int(radius) + 1)
    k = torch.cartesian_prod(r if dims == 3 else r[r == 0], r, r)               # z, y, x
    first = (k * torch.tensor([10 ** 8, 10 ** 4, 1])).sum(1) > 0                # the later half in reading order
    return k[first & (k.square().sum(1) <= radius ** 2)].flip(1).float().to(device)


def coefficients(x: Tensor, k: Tensor) -> Tensor:
    """Fourier coefficients at k (K, 3) of images (P, N, N) or volumes (P, N, N, N) about voxel N//2: (P, K) complex.

    Scaled so that Re sum(conj(a) b) is the dot product of two maps without mean, low-passed to these frequencies.
    """
    N, dims = x.shape[-1], x.ndim - 1
    X = torch.fft.fftn(x, dim=tuple(range(-dims, 0)), norm="ortho")
    index = k[:, :dims].long().flip(1).unbind(1)                                # y, x or z, y, x
    return X[(slice(None), *(i % N for i in index))] * phase(k, k.new_full((1, 3), -(N // 2)), N) * math.sqrt(2)


def phase(k: Tensor, shifts: Tensor, N: int) -> Tensor:
    """What a displacement by `shifts` (..., 3) x, y, z in voxels multiplies coefficients at k (K, 3) by: (..., K)."""
    angle = shifts @ k.T * (-2 * math.pi / N)
    return torch.complex(angle.cos(), angle.sin())


def slices(volume: Tensor, rotations: Tensor, k: Tensor) -> Tensor:
    """coefficients(project(volume, rotations), k), by the central slice theorem: (P, K) complex.

    volume: (N, N, N); rotations: (..., P, 3, 3); k: `frequencies`. With those of dims = 3: the
    coefficients of the turned volume V(R r). Linear in volume and differentiable in volume and rotations.
    Trilinear on a grid of frequencies twice as fine, voxels weighted against what this does to them; what is
    left at d voxels from the middle is of the order of (d / (2N - d))^2: 2 % at N/4, 11 % at the box's edge.
    """
    N, dims = volume.shape[-1], 2 + int(k[:, 2].any())
    last = 2 * (int(k.norm(dim=1).max()) + 1) + 1
    r = torch.arange(N, device=volume.device) - N // 2
    fine = torch.arange(-last, last + 1, device=volume.device)
    angle = fine[:, None] * r * (-math.pi / N)                                  # frequency fine / 2N
    E = torch.complex(angle.cos(), angle.sin()) / torch.sinc(r / (2 * N)) ** 2
    X = volume.to(E.dtype)
    for _ in range(3):
        X = (X @ E.T).permute(2, 0, 1)                                          # one axis at a time
    grid = torch.view_as_real(X).permute(3, 0, 1, 2)[None]
    point = (k @ rotations.to(k).mT) * (2 / last)                               # x, y, z; -1 .. 1
    found = F.grid_sample(grid, point.reshape(1, 1, -1, len(k), 3), align_corners=True)[0, :, 0]
    return torch.complex(*found).reshape(*rotations.shape[:-2], len(k)) * math.sqrt(2 / N ** dims)


Velocity = Callable[[Tensor, float, list[Generator]], Tensor]   # v(x, t, generators) of maps (K, N, N, N): sampling.tiled_velocity

STARTS = 3                                                # random beginnings of `reconstruct`

SHELLS = 8, 10, 12, 16, 20, 26, None                      # how far `reconstruct` looks, round by round; None: to the last

# CryoFM Table 6: what was chosen for each data set "by examining the human preference for the reconstruction".
TABLE_6 = {"10345": dict(stop_gradient=False, q=0.7),    # synthetic, 2 projections (section 5.4)
           "10028": dict(stop_gradient=True, q=0.0),     # class averages
           "10827": dict(stop_gradient=False, q=0.7)}    # class averages


def psi_cor(p: Tensor, y: Tensor) -> Tensor:
    """(a1) of images (..., N, N) -> (...)."""
    return -(p * y).sum((-2, -1)) / (p.norm(dim=(-2, -1)) * y.norm(dim=(-2, -1)))


def psi_sg(p: Tensor, y: Tensor) -> Tensor:
    """(a2): the value of (a1), but its gradient does not hold the norm of p where it is."""
    return -(p * y).sum((-2, -1)) / (p.norm(dim=(-2, -1)) * y.norm(dim=(-2, -1))).detach()


def psi_bg(p: Tensor, y: Tensor, q: float) -> Tensor:
    """(a3): power of p where y has background, q the share of pixels that counts as such; 0 for q = 0."""
    level = torch.quantile(y.flatten(-2), q, dim=-1)[..., None, None]
    return (p.square() * (y < level)).sum((-2, -1))


def projection_loss(p: Tensor, y: Tensor, *, stop_gradient: bool, q: float) -> Tensor:
    """L of Algorithm 3 with the settings of one row of Table 6, one value per image."""
    return (psi_sg if stop_gradient else psi_cor)(p, y) + psi_bg(p, y, q) / p.square().sum((-2, -1)).detach()


def shift_grid(limit: float, step: float, dims: int = 2) -> Tensor:
    """Shifts (S, 3) x, y, z in voxels, multiples of step, at most `limit` long; 0 among them."""
    n = int(limit / step + 1e-9)
    r = torch.arange(-n, n + 1.0) * step
    s = torch.cartesian_prod(r, r, r if dims == 3 else torch.zeros(1))
    return s[s.norm(dim=1) <= limit + 1e-9]


def turn_by(v: Tensor) -> Tensor:
    """Rotation vectors (..., 3) in degrees -> matrices (..., 3, 3)."""
    x, y, z = torch.deg2rad(v).unbind(-1)
    o = torch.zeros_like(x)
    return torch.matrix_exp(torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3)))


def correlations(volume: Tensor, y: Tensor, k: Tensor, rotations: Tensor, shifts: Tensor) -> Tensor:
    """-psi_cor of every grid pose with observations y (P, K): (P, S, R). One matrix product: all are dot products."""
    p, N = slices(volume, rotations, k), volume.shape[-1]
    p = torch.view_as_real(p / p.norm(dim=1, keepdim=True).clamp(min=1e-12)).flatten(1)
    moved = y[:, None] * phase(k, -shifts, N)                                  # back by the shift
    y_norm = y.norm(dim=1).clamp(min=1e-12)[:, None, None]
    return (torch.view_as_real(moved).flatten(2) / y_norm) @ p.T


def search(volume: Tensor, y: Tensor, k: Tensor, rotations: Tensor, shifts: Tensor, keep: int = 1):
    """The `keep` best rotations of the grid for each y (P, K): rotations (P, keep, 3, 3), shifts (P, keep, 3), correlations."""
    found = []
    for part in y.split(max(1, 2 ** 26 // (len(rotations) * len(shifts)))):
        best, which = correlations(volume, part, k, rotations, shifts).max(1)
        value, r = best.topk(keep, dim=1)
        found.append((rotations[r], shifts[which.gather(1, r)], value))
    return tuple(torch.cat(x) for x in zip(*found))


def refine(volume: Tensor, y: Tensor, k: Tensor, R: Tensor, shift: Tensor, angle: float, step: float):
    """One round around candidate poses: R (P, C, 3, 3), shift (P, C, 3); 27 turns by -+ angle (degrees), then shifts -+ step."""
    dims, N = 2 + int(k[:, 2].any()), volume.shape[-1]
    turns = turn_by(torch.cartesian_prod(*[torch.tensor([0.0, -angle, angle])] * 3).to(k))
    near = shift_grid(step * 1.8, step, dims).to(k) if step else k.new_zeros(1, 3)
    (P, C), out = R.shape[:2], []
    for i in range(0, P, 64):
        Ri = R[i:i + 64, :, None] @ turns                                       # (P, C, 27, 3, 3)
        p = slices(volume, Ri.flatten(0, 2), k).unflatten(0, Ri.shape[:3])
        si = shift[i:i + 64, :, None] + near                                    # (P, C, S, 3)
        moved = y[i:i + 64, None, None] * phase(k, -si, N)
        cor = torch.einsum("pcnk,pcsk->pcns", p.conj(), moved).real
        cor = cor / (p.norm(dim=-1)[..., None] * moved.norm(dim=-1)[:, :, None]).clamp(min=1e-12)
        best, at = cor.flatten(2).max(-1)
        n, s = at // len(near), at % len(near)
        i_, c_ = torch.arange(len(Ri))[:, None], torch.arange(C)
        out.append((Ri[i_, c_, n], si[i_, c_, s], best))
    return tuple(torch.cat(x) for x in zip(*out))


def find_poses(volume: Tensor, images: Tensor, *, max_shift: float, radius: float, order: int = 2, keep: int = 8,
               start: tuple[Tensor, Tensor] | None = None):
    """argmin of (a4), coarse to fine: rotations (P, 3, 3), shifts (P, 3) in voxels, correlations (P,).

    A grid of `so3_grid(order)` with every shift at low resolution, then the best `keep` of each image refined while the
    angle halves and the resolution rises to `radius` (Fourier shells). start: poses to refine instead of the grid.
    """
    N, angle = images.shape[-1], 60 / 2 ** order
    r = min(radius, 90 / angle)                          # 15 degrees: shells to 6, a neighbour is 1.6 coefficients away
    k = frequencies(r, device=images.device)
    if start is None:
        R, shift, cor = search(volume, coefficients(images, k), k, so3_grid(order).to(volume),
                               shift_grid(max_shift, N / (4 * r)).to(volume), keep)
    else:
        R, shift = (x[:, None] for x in start)
        angle, r = angle / 4, min(radius, 4 * r)
    step = N / (4 * r) if max_shift else 0
    while True:
        angle, step, r = angle / 2, step / 2, min(radius, r * 1.5)
        k = frequencies(r, device=images.device)
        R, shift, cor = refine(volume, coefficients(images, k), k, R, shift, angle, step)
        if keep > 1 and R.shape[1] > 1 and angle < 5:
            best = cor.argmax(1)
            R, shift, cor = (x[torch.arange(len(x)), best][:, None] for x in (R, shift, cor))
        if angle < 28 / radius and r >= radius:          # half a coefficient at the last shell
            return R[:, 0], shift[:, 0], cor[:, 0]


def ball(N: int, device=None) -> Tensor:
    """The inside of the sphere that every projection sees whole: boolean (N, N, N)."""
    r2 = (torch.arange(N, device=device) - N // 2).square()
    return r2[:, None, None] + r2[:, None] + r2 < (N / 2 - 1) ** 2


def fit(volume: Tensor, R: Tensor, y: Tensor, k: Tensor, *, weight: Tensor | None = None, iterations: int = 20) -> Tensor:
    """(a6): `iterations` accelerated steps from `volume` (N, N, N) towards the density whose slices at R are y (P, K).

    weight: (P,), default 1. Low frequencies come first: few steps leave the fine detail of `volume` much as it was.
    """
    N = volume.shape[-1]
    w = torch.ones(len(R), device=volume.device) if weight is None else weight

    def gradient(v, y, k=k):
        v = v.detach().requires_grad_()
        loss = 0.5 * (w[:, None] * (slices(v, R, k) - y).abs() ** 2).sum()
        return float(loss.detach()), torch.autograd.grad(loss, v)[0]

    # The longest step that is safe is 1 / the largest eigenvalue. All slices cross at low frequency, where the first shells
    # tell it; a few power iterations.
    inside, low = ball(N, volume.device), k[k.norm(dim=1) <= 3]
    smooth = inside.float()
    for _ in range(4):
        smooth = gradient(smooth / smooth.norm(), 0, low)[1] * inside
    step = 0.9 / float(smooth.norm())
    x, ahead, least, i = volume, volume, math.inf, 0
    for _ in range(iterations):
        loss, g = gradient(ahead, y)
        if loss > least:                                 # too long a step: half of it, from the last good place, without momentum
            step, ahead, i, least = step / 2, x, 0, math.inf
            continue
        least = loss
        new = ((ahead - step * g) * inside).clamp(min=0)
        ahead, x, i = new + i / (i + 3) * (new - x), new, i + 1
    return x


def anneal(images: Tensor, generator: Generator, *, max_shift: float, iterations: int = 60, radius: float = 6.0,
           width: tuple[float, float] = (0.4, 0.05), n: int = 24) -> tuple[Tensor, float]:
    """(a7) from random poses, 24^3 voxels over the same box: a low-resolution density and its mean best correlation.

    All 576 poses of `so3_grid(1)` and every shift count for every image, by a softmax of their correlations: its width, in
    standard deviations over the poses, falls from width[0] to width[1]. Takes seconds; which hand comes out is chance.
    """
    scale, k, grid = n / images.shape[-1], frequencies(radius, device=images.device), so3_grid(1).to(images)
    y = coefficients(images, k) * scale ** 2             # voxels of the coarse grid, and fewer of them along the beam
    shifts = shift_grid(max_shift * scale, n / (4 * radius)).to(images)
    random = torch.stack([augment.random_rotation(generator) for _ in y]).to(images)
    x = fit(images.new_zeros(n, n, n), random, y, k, iterations=5)
    for i in range(iterations):
        cor = correlations(x, y, k, grid, shifts)        # (P, S, R)
        T = width[0] * (width[1] / width[0]) ** (i / (iterations - 1)) * cor.flatten(1).std(1)
        w = torch.softmax(cor.flatten(1) / T[:, None], 1).view_as(cor)
        mean = torch.einsum("psr,psk->rk", w.to(y.dtype), y[:, None] * phase(k, -shifts, n))
        used = w.sum((0, 1)) > 1e-3
        total = w.sum((0, 1))[used]
        x = fit(x, grid[used], mean[used] / total[:, None], k, weight=total, iterations=3)
    return x, float(cor.flatten(1).max(1).values.mean())


def reconstruct(images: Tensor, generator: Generator, *, max_shift: float, radius: float, starts: int = STARTS, tick=lambda: None):
    """The classical answer: the best of a few `anneal`ed starts, then poses and density in turn while the resolution rises.

    images (P, N, N) -> density (N, N, N), rotations (P, 3, 3), shifts (P, 3), correlations (P,).
    """
    N, tries = images.shape[-1], []
    for _ in range(starts):
        tries.append(anneal(images, generator, max_shift=max_shift))
        tick()
    coarse = max(tries, key=lambda found: found[1])[0]
    x, poses = fourier.resample(coarse, (N, N, N)).clamp(min=0), None
    for i, r in enumerate(SHELLS):
        r = min(r or radius, radius)
        # The grid is searched anew until the density can tell poses well apart; then each pose follows it.
        R, shift, cor = find_poses(x, images, max_shift=max_shift, radius=r, start=poses if i > 3 else None)
        poses, k = (R, shift), frequencies(r, device=images.device)
        x = fit(x, R, coefficients(images, k) * phase(k, -shift, N), k, iterations=20)
        tick()
    return x, R, shift, cor


def restore_projections(velocity: Velocity, prior: Prior, images: Tensor, start: Tensor, R: Tensor, shift: Tensor, scale: Scale,
                        generators: list[Generator], *, radius: float, steps: int = 20, t_start: float = 0.4, iterations: int = 3,
                        tick=lambda: None) -> Tensor:
    """Samples (K, N, N, N), one per generator, from the classical density noised to t_start on: (a6) draws the prior's x_0' to
    the projections.

    start (N, N, N) in the images' units; R, shift: its poses, which each sample refines for itself.
    """
    noise = lambda: torch.stack([torch.randn(start.shape, generator=g) for g in generators]).to(start.device)
    network = lambda V: (V / scale.maximum - prior.mean) / prior.std
    k, N = frequencies(radius, device=images.device), images.shape[-1]
    observed, poses = coefficients(images, k), [(R, shift)] * len(generators)
    times = torch.linspace(t_start, 0, steps + 1).tolist()
    x = (1 - t_start) * network(start) + t_start * noise()
    for i, (t, s) in enumerate(zip(times, times[1:])):
        V = denormalise(x - t * velocity(x, t, generators), scale).clamp(min=0)
        if i % 5 == 4:
            poses = [find_poses(v, images, max_shift=1, radius=radius, start=pose)[:2] for v, pose in zip(V, poses)]
        V = torch.stack([fit(v, R, observed * phase(k, -shift, N), k, iterations=iterations) for v, (R, shift) in zip(V, poses)])
        x = (1 - s) * network(V) + s * noise()
        tick()
    return V


def algorithm_3(velocity: Velocity, prior: Prior, images: Tensor, generators: list[Generator], *, max_shift: float, radius: float,
                steps: int = 200, lambda_max: float = 5.0, stop_gradient: bool = False, q: float = 0.7, per_time: bool = False,
                tick=lambda: None) -> Tensor:
    """Samples (K, N, N, N) by (a5), Algorithm 3 from noise: poses searched anew in every step, projections in real space.

    images (P, N, N); each density comes on the scale that fits them best. stop_gradient, q: a row of TABLE_6.
    per_time: lambda times 200/N, as in `sampling.algorithm_1`.
    """
    N = images.shape[-1]

    def slope(V):                                        # dl/dx_0' of one sample
        R, shift, _ = find_poses(V, images, max_shift=max_shift, radius=radius)                    # (a4)
        total, V = 0, V.clone().requires_grad_()
        for r, s, y in zip(R.split(8), shift.split(8), images.split(8)):                           # memory for 8
            loss = projection_loss(degrade.project(V, r, s[:, :2]), y, stop_gradient=stop_gradient, q=q)
            total = total + torch.autograd.grad(loss.sum() / len(images), V)[0]
        return total
    x = torch.stack([torch.randn(N, N, N, generator=g) for g in generators]).to(images.device)
    for i in range(steps):
        t = 1 - i / steps
        x.requires_grad_()
        v = velocity(x, t, generators)
        V = (x - t * v) * prior.std + prior.mean         # x_0' as a density
        g, = torch.autograd.grad(V, x, torch.stack([slope(V_k) for V_k in V.detach()]))
        x = guided_step(x, v, g, t, steps, lambda_max, per_time).detach()                                          # (a5)
        tick()
    fitted, k = [], frequencies(radius, device=x.device)
    for V in x * prior.std + prior.mean:
        R, shift, _ = find_poses(V, images, max_shift=max_shift, radius=radius)
        p, y = slices(V, R, k), coefficients(images, k) * phase(k, -shift, N)
        fitted.append(V * ((p.conj() * y).real.sum() / (p.abs() ** 2).sum()))
    return torch.stack(fitted)


class Aligned(NamedTuple):
    density: Tensor
    mirrored: bool                                       # whether the other hand fits better
    correlation: float                                   # of both, low-passed to 12 Fourier shells


def align(a: Tensor, b: Tensor) -> Aligned:
    """a turned and moved onto b, both (N, N, N) on one grid; mirrored first if that fits better.

    Projections do not tell a density from its mirror image. The same search as for images, with a half ball of frequencies.
    """
    N, found = a.shape[-1], []
    for hand in (a, a.flip(0)):
        r, angle = min(5, N // 2 - 1), 15.0
        k, step = frequencies(r, 3, a.device), N / 4 / r
        y = coefficients(b[None], k)
        R, s, _ = search(hand, y, k, so3_grid(2).to(a), shift_grid(N / 8, step, 3).to(a), keep=8)
        for r in (6, 7, 8, 10, 14, 18, 18):
            if r == 10:                                  # one is left: it is followed to a fine angle
                R, s = (x[:, cor[0].argmax()][:, None] for x in (R, s))
            k, angle, step = frequencies(min(r, N // 2 - 1), 3, a.device), angle / 2, step / 2
            R, s, cor = refine(hand, coefficients(b[None], k), k, R, s, angle, step)
        i = cor[0].argmax()
        found.append((float(cor[0, i]), hand, R[0, i], s[0, i]))
    cor, hand, R, s = max(found, key=lambda x: x[0])
    # data.rotate turns about the middle, (2N - 1) / 2 of a grid twice as fine; ours is voxel N//2 of the coarse one.
    fine = rotate(fourier.resample(hand, (2 * N,) * 3), R)[::2, ::2, ::2]
    delta = (N // 2 - (2 * N - 1) / 4) * torch.ones(3, device=a.device)
    kz, ky, kx = fourier.freq_grid((N,) * 3, device=a.device)
    k = torch.stack(torch.broadcast_tensors(kx, ky, kz), -1).float() * N
    moved = torch.fft.ifftn(torch.fft.fftn(fine) * phase(k.view(-1, 3), s + delta - R.T @ delta, N).view(fine.shape)).real
    return Aligned(moved, cor == found[1][0], cor)


METHODS = {"prior": dict(steps=20, t_start=0.4, iterations=3), "paper": dict(steps=200)}


def samples_of(velocity: Velocity, prior: Prior, images: Tensor, method: str, *, samples: int, seed: int, max_shift: float,
               steps: int | None = None, losses: str = "10345", samples_per_call: int = 8, progress=lambda total, what: lambda: None):
    """Yields (method, density (N, N, N)) from images (P, N, N) at the prior's voxel size, all in one frame and hand.

    method: "prior", before whose samples comes ("classical", density); "classical", that alone; "paper", with the `losses` of a
    row of TABLE_6. Sample i depends on (seed, i) alone; `samples_per_call` of them are drawn at a time.
    progress(total, what): makes the function to call after every round of the search, and that after every step of a sample.
    """
    radius = images.shape[-1] // 2 - 1
    if method != "paper":
        tick = progress(STARTS + len(SHELLS), "search")
        start, R, shift, _ = reconstruct(images, Generator().manual_seed(seed), max_shift=max_shift, radius=radius, tick=tick)
        yield "classical", start
        if method == "classical":
            return
        scale = normalise(start, prior.mean, prior.std)[1]
    settings, frame = METHODS[method] | ({"steps": steps} if steps else {}), None
    tick = progress(samples * settings["steps"], "step")
    for i in range(0, samples, samples_per_call):
        generators = [augment.item_generator(seed, j) for j in range(i, min(i + samples_per_call, samples))]
        common = dict(radius=radius, tick=lambda: [tick() for _ in generators], **settings)         # a step of every sample
        if method == "prior":
            drawn = restore_projections(velocity, prior, images, start, R, shift, scale, generators, **common)
        else:
            drawn = algorithm_3(velocity, prior, images, generators, max_shift=max_shift, **common, **TABLE_6[losses])
        for x in drawn:
            if method == "paper":                        # each sample has found a frame of its own
                x = x if frame is None else align(x, frame).density
                frame = x if frame is None else frame
            yield method, x
