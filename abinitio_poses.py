"""Poses of projections: central slices of a volume, grids of rotations, and the search on them.

    y_k = sqrt(2 / N^d) sum_r y_r exp(-2 pi i k (r - N//2) / N)     coefficients of a map       (1)
    S(R)_k = sqrt(2 / N^d) sum_r V_r exp(-2 pi i (R k) (r - N//2) / N)      slice of a volume   (2)
    y_k exp(-2 pi i k s / N)                           coefficients of y displaced by s         (3)
    cor(p, y) = Re sum_k conj(p_k) y_k / (|p| |y|)                                              (4)

d = 2 for images and 3 for volumes, N voxels per side. (2) is the central slice theorem: the slice
through k_z = 0 holds the coefficients (1) of the projection along the beam. The sums of (4) run
over half of the frequencies, one of k and -k. They leave out k = 0, the mean, which is the same in
every projection.
A pose is a rotation R (`degrade.project` has the convention) and a shift (x, y, z) in voxels.

Shape letters: P images, C candidate poses of each, R rotations, S shifts, K frequencies.
Grid of rotations: HEALPix (Gorski et al. 2005) times in-plane angles (Yershova et al. 2010).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fourier
from degrade import euler_matrix
from volume import rotate

# ---- Grids of rotations and shifts


def healpix(nside: int) -> tuple[Tensor, Tensor]:
    """Directions of equal area, ring by ring: theta, phi in radians, (12 nside^2,) float64.

    Gorski et al. 2005, eq. 4-9.
    """
    theta = []
    phi = []
    for ring in range(1, 4 * nside):
        # Rings around a pole hold 4, 8, 12, ... points. Those of the belt between hold 4 nside.
        from_pole = min(ring, 4 * nside - ring)
        points = 4 * min(from_pole, nside)
        if from_pole < nside:
            z = 1 - from_pole**2 / (3 * nside**2)
            offset = 0.5
        else:
            z = abs(4 / 3 - 2 * ring / (3 * nside))
            offset = 0.0 if (ring - nside) % 2 else 0.5

        # z is that of the northern ring. The southern one mirrors it.
        north = math.acos(z)
        theta += [north if ring <= 2 * nside else math.pi - north] * points
        phi += [2 * math.pi / points * (j + offset) for j in range(points)]
    return torch.tensor([theta, phi], dtype=torch.float64).unbind()


def so3_grid(order: int) -> Tensor:
    """Rotations spread evenly, (72 * 8^order, 3, 3): HEALPix directions times in-plane angles.

    Neighbours are 60, 30, 15, 7.5 degrees apart for order 0, 1, 2, 3, as in RELION.
    """
    nside = 2**order
    theta, phi = map(torch.rad2deg, healpix(nside))
    psi = torch.arange(6 * nside, dtype=torch.float64) * (60 / nside)

    # Every direction with every in-plane angle.
    angles = torch.stack(
        [
            phi.repeat_interleave(len(psi)),
            theta.repeat_interleave(len(psi)),
            psi.repeat(len(theta)),
        ],
        -1,
    )
    return euler_matrix(angles)


def shift_grid(limit: float, step: float, dims: int = 2) -> Tensor:
    """Shifts (S, 3) x, y, z in voxels: multiples of step, at most `limit` long; z = 0 in 2-D."""
    n = int(limit / step + 1e-9)
    r = torch.arange(-n, n + 1.0) * step
    z = r if dims == 3 else torch.zeros(1)
    shifts = torch.cartesian_prod(r, r, z)
    return shifts[shifts.norm(dim=1) <= limit + 1e-9]


def turn_by(v: Tensor) -> Tensor:
    """Rotation vectors (..., 3) in degrees -> matrices (..., 3, 3)."""
    x, y, z = torch.deg2rad(v).unbind(-1)
    # The matrix exponential of the cross product with a vector is the rotation about it.
    zero = torch.zeros_like(x)
    cross_product = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
    return torch.matrix_exp(cross_product.unflatten(-1, (3, 3)))


# ---- Central slices


def frequencies(radius: float, dims: int = 2, device=None) -> Tensor:
    """Half of the integer frequencies 0 < |k| <= radius, one of k and -k: (K, 3) float32 x, y, z.

    k_z = 0 if dims is 2.
    """
    r = torch.arange(-int(radius), int(radius) + 1)
    z = r if dims == 3 else r[r == 0]
    k = torch.cartesian_prod(z, r, r)  # z, y, x
    # The rows are symmetric about the one in the middle, k = 0. Take those after it.
    k = k[len(k) // 2 + 1 :]
    inside = k.square().sum(1) <= radius**2
    return k[inside].flip(1).float().to(device)


def coefficients(x: Tensor, k: Tensor) -> Tensor:
    """(1) at k (K, 3) of images (P, N, N) or volumes (P, N, N, N): (P, K) complex.

    Re sum(conj(a) b) is the dot product of two maps without mean, low-passed to these frequencies.
    """
    N = x.shape[-1]
    dims = x.ndim - 1
    axes = tuple(range(-dims, 0))
    X = torch.fft.fftn(x, dim=axes, norm="ortho")
    index = k[:, :dims].long().flip(1) % N  # y, x or z, y, x
    # The transform starts at voxel 0. Move the origin to voxel N//2.
    origin = k.new_full((1, 3), -(N // 2))
    return X[:, *index.T] * phase(k, origin, N) * math.sqrt(2)  # (1)


def phase(k: Tensor, shifts: Tensor, N: int) -> Tensor:
    """The factor of (3) for shifts (..., 3) x, y, z in voxels, at k (K, 3): (..., K) complex."""
    angle = shifts @ k.T * (-2 * math.pi / N)
    return torch.complex(angle.cos(), angle.sin())  # (3)


def slices(volume: Tensor, rotations: Tensor, k: Tensor) -> Tensor:
    """(2), which is coefficients(project(volume, rotations), k): (..., K) complex.

    volume: (N, N, N); rotations: (..., 3, 3); k: `frequencies`. With those of dims = 3 it gives the
    coefficients of the turned volume V(R r). Linear in volume, differentiable in both.
    Trilinear interpolation on a grid of frequencies twice as fine. It darkens voxels far from the
    middle, so these are brightened in advance. The error that is left d voxels from the middle is
    about (d / (2N - d))^2: 2 % at N/4, 11 % at the edge of the box.
    """
    N = volume.shape[-1]
    dims = 2 + int(k[:, 2].any())

    # Transform the volume at half-integer frequencies up to `last`, one axis at a time.
    last = 2 * (int(k.norm(dim=1).max()) + 1) + 1
    r = torch.arange(N, device=volume.device) - N // 2
    fine = torch.arange(-last, last + 1, device=volume.device)
    angle = fine[:, None] * r * (-math.pi / N)  # frequency fine / 2N
    # Linear interpolation multiplies voxels by sinc^2. Divide by it in advance.
    E = torch.complex(angle.cos(), angle.sin()) / torch.sinc(r / (2 * N)) ** 2
    X = volume.to(E.dtype)
    for _ in range(3):
        X = (X @ E.T).permute(2, 0, 1)

    # Look up the turned frequencies between the points of that grid.
    grid = torch.view_as_real(X).permute(3, 0, 1, 2)[None]  # (1, 2, z, y, x)
    point = (k @ rotations.to(k).mT) * (2 / last)  # x, y, z in -1 .. 1
    point = point.reshape(1, 1, -1, len(k), 3)
    real, imaginary = F.grid_sample(grid, point, align_corners=True)[0, :, 0]
    found = torch.complex(real, imaginary).reshape(*rotations.shape[:-2], len(k))
    return found * math.sqrt(2 / N**dims)  # (2)


# ---- Search


class Poses(NamedTuple):
    """One pose of each of P images, or C candidates of each, (P, C, ...)."""

    rotations: Tensor  # (P, 3, 3)
    shifts: Tensor  # (P, 3), voxels x, y, z
    correlations: Tensor | None = None  # (P,), (4)


def correlations(volume: Tensor, y: Tensor, k: Tensor, rotations: Tensor, shifts: Tensor) -> Tensor:
    """(4) of every grid pose with observations y (P, K): (P, S, R)."""
    p = slices(volume, rotations, k)
    p = p / p.norm(dim=1, keepdim=True).clamp(min=1e-12)
    y_norm = y.norm(dim=1).clamp(min=1e-12)
    # Moving y back by a shift equals moving p by it.
    moved = y[:, None] * phase(k, -shifts, volume.shape[-1])  # (P, S, K)

    # The real part is a dot product of 2K real numbers, so one matrix product gives all.
    p = torch.view_as_real(p).flatten(1)
    moved = torch.view_as_real(moved).flatten(2)
    return (moved / y_norm[:, None, None]) @ p.T  # (4)


def search(
    volume: Tensor, images: Tensor, radius: float, rotations: Tensor, shifts: Tensor, keep: int = 1
) -> Poses:
    """The `keep` best rotations of the grid for each image, each with its best shift.

    images (P, N, N), or volumes (P, N, N, N), are compared up to Fourier shell `radius`.
    """
    k = frequencies(radius, images.ndim - 1, images.device)
    y = coefficients(images, k)
    rotations = rotations.to(volume)
    shifts = shifts.to(volume)
    found = []
    memory = 2**26  # correlations held at once
    for part in y.split(max(1, memory // (len(rotations) * len(shifts)))):
        # Find the best shift of each rotation, then the best rotations.
        best, shift = correlations(volume, part, k, rotations, shifts).max(1)  # (P, R)
        cor, rotation = best.topk(keep, dim=1)  # (P, keep)
        shift = shift.gather(1, rotation)
        found.append((rotations[rotation], shifts[shift], cor))
    return Poses(*map(torch.cat, zip(*found)))


def refine(
    volume: Tensor,
    images: Tensor,
    radius: float,
    poses: Poses,
    angle: float,
    step: float,
    max_shift: float = math.inf,
) -> Poses:
    """The best pose around each candidate (P, C) of images (P, N, N), or volumes (P, N, N, N).

    Tries turns by 0 or -+ angle (degrees) about each axis, with shifts by 0 or -+ step (voxels)
    along each, none longer than max_shift. Compares up to Fourier shell `radius`.
    """
    N = volume.shape[-1]
    dims = images.ndim - 1
    k = frequencies(radius, dims, images.device)
    y = coefficients(images, k)
    choices = torch.tensor([0.0, -angle, angle])
    turns = turn_by(torch.cartesian_prod(choices, choices, choices).to(k))
    # 1.8 steps: also the diagonals. In 2-D these are 9 shifts, in 3-D 27.
    moves = k.new_zeros(1, 3)
    if step:
        moves = shift_grid(step * 1.8, step, dims).to(k)

    found = []
    memory = 64  # images at once
    parts = [x.split(memory) for x in (y, poses.rotations, poses.shifts)]
    for y_part, R, shift in zip(*parts):
        # Cut a slice for each of the 27 turns.
        R_near = R[:, :, None] @ turns  # (P, C, 27, 3, 3)
        p = slices(volume, R_near, k)  # (P, C, 27, K)

        # Move the observation back by each of the shifts.
        shift_near = shift[:, :, None] + moves  # (P, C, S, 3)
        length = shift_near.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        shift_near = shift_near * (max_shift / length).clamp(max=1)
        moved = y_part[:, None, None] * phase(k, -shift_near, N)  # (P, C, S, K)

        # Correlate each slice with each moved observation.                          (4)
        cor = torch.einsum("pcnk,pcsk->pcns", p.conj(), moved).real
        p_norm = p.norm(dim=-1)
        moved_norm = moved.norm(dim=-1)
        norm = p_norm[..., None] * moved_norm[:, :, None]
        cor = cor / norm.clamp(min=1e-12)

        # Keep the best turn and shift of each candidate.
        best, index = cor.flatten(2).max(-1)  # (P, C)
        turn = index // len(moves)
        move = index % len(moves)
        image = torch.arange(len(R))[:, None]
        candidate = torch.arange(R.shape[1])
        R_best = R_near[image, candidate, turn]
        shift_best = shift_near[image, candidate, move]
        found.append((R_best, shift_best, best))
    return Poses(*map(torch.cat, zip(*found)))


def keep_best(poses: Poses) -> Poses:
    """The candidate of the largest correlation alone: (P, C, ...) -> (P, 1, ...)."""
    image = torch.arange(len(poses.correlations))
    best = poses.correlations.argmax(1)
    return Poses(*(x[image, best][:, None] for x in poses))


def find_poses(
    volume: Tensor,
    images: Tensor,
    *,
    max_shift: float,
    radius: float,
    start: Poses | None = None,
) -> Poses:
    """The pose of each image (P, N, N) whose slice of the volume correlates best with it.

    Searches a grid of rotations 15 degrees apart and every shift up to max_shift (voxels) at low
    resolution. Then refines the 8 best rotations of each image, while the angle halves and the
    resolution rises to `radius` (Fourier shells). start: poses to refine instead of the grid.
    """
    N = images.shape[-1]
    if start is None:
        # 6 shells: neighbours on the grid differ by 1.6 coefficients in the last one.
        angle = 15.0
        shells = min(radius, 6.0)
        shifts = shift_grid(max_shift, N / (4 * shells))
        poses = search(volume, images, shells, so3_grid(2), shifts, keep=8)
    else:
        angle = 15.0 / 4
        shells = min(radius, 24.0)
        poses = Poses(start.rotations[:, None], start.shifts[:, None])

    step = N / (4 * shells) if max_shift else 0
    while True:
        angle /= 2
        step /= 2
        shells = min(radius, shells * 1.5)
        poses = refine(volume, images, shells, poses, angle, step, max_shift)
        if angle < 5:
            poses = keep_best(poses)
        # Stop when the angle moves the last shell by less than half a coefficient.
        if angle < 28 / radius and shells >= radius:
            return Poses(*(x[:, 0] for x in poses))


# ---- Two volumes


class Aligned(NamedTuple):
    density: Tensor
    mirrored: bool  # whether the other hand fits better
    correlation: float  # of both, low-passed to 18 Fourier shells


def align(a: Tensor, b: Tensor) -> Aligned:
    """a turned and moved onto b, both (N, N, N) on one grid; mirrored first if that fits better.

    Projections do not tell a density from its mirror image. The search is the one for images, with
    half a ball of frequencies instead of half a disc.
    """
    N = a.shape[-1]
    most = N // 2 - 1
    found = []
    for hand in (a, a.flip(0)):
        # A grid of rotations and shifts first, then finer angles at higher resolution.
        shells = min(5, most)
        angle = 15.0
        step = N / 4 / shells
        shifts = shift_grid(N / 8, step, 3)
        poses = search(hand, b[None], shells, so3_grid(2), shifts, keep=8)
        for shells in (6, 7, 8, 10, 14, 18, 18):
            if shells == 10:
                poses = keep_best(poses)
            angle /= 2
            step /= 2
            poses = refine(hand, b[None], min(shells, most), poses, angle, step)
        R, shift, cor = (x[0, 0] for x in poses)
        found.append((float(cor), hand, R, shift))
    original, mirror = found
    mirrored = mirror[0] > original[0]
    cor, hand, R, shift = mirror if mirrored else original
    return Aligned(turn_and_move(hand, R, shift), mirrored, cor)


def turn_and_move(x: Tensor, R: Tensor, shift: Tensor) -> Tensor:
    """x(R r) of x (N, N, N), r from voxel N//2, displaced by shift (3,) x, y, z in voxels."""
    N = x.shape[-1]
    # Turn on a grid twice as fine, where trilinear interpolation errs less. `rotate` turns about
    # the middle of the box. Voxel N//2 is `delta` (in voxels) away from it, and the turn moves it
    # to R^T delta.
    fine = rotate(fourier.resample(x, (2 * N,) * 3), R)
    turned = fine[::2, ::2, ::2]
    delta = (N // 2 - (2 * N - 1) / 4) * torch.ones(3, device=x.device)

    # Move it back, and by the shift, with a phase for each frequency.
    kz, ky, kx = fourier.freq_grid(turned.shape, device=x.device)
    k = torch.stack(torch.broadcast_tensors(kx, ky, kz), -1).float() * N
    factor = phase(k.view(-1, 3), shift + delta - R.T @ delta, N)
    spectrum = torch.fft.fftn(turned) * factor.view(turned.shape)
    return torch.fft.ifftn(spectrum).real
