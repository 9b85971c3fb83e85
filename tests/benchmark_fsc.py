"""The times of fsc.py in RESULTS.md: `OMP_NUM_THREADS=1 python tests/benchmark_fsc.py`.

Each job is done by our code, by numpy as its definition is written (full transform, one window or
one atom after the other), and by torch-fourier-shell-correlation where that package is installed.
They take turns in one process. The first turn warms up and is not counted. Printed: the median in
seconds of CPU (which a busy machine changes little), the ratio to ours, and the largest difference
from ours. The package shares each coefficient between two shells, so its estimate differs.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from atoms import molmap
from data_chains import ProceduralChains
from fsc import fsc, resolution
from fsc_half_maps import correct_for_mask, local_resolution, masked_fsc, randomise_phases
from fsc_model import q_score

try:
    from torch_fourier_shell_correlation import fourier_shell_correlation
except ImportError:
    fourier_shell_correlation = None


# ---- The definitions, in numpy


def numpy_fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """FSC over the full transform of a cube, shells by rounding."""
    # The shell of every coefficient.
    n = len(a)
    A, B = np.fft.fftn(a), np.fft.fftn(b)
    k = np.fft.fftfreq(n, 1 / n)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    shell = np.floor(radius + 0.5).astype(int).ravel()

    def shell_sum(x):
        return np.bincount(shell, x.ravel(), n)[: n // 2 + 1]

    cross = shell_sum((A * B.conj()).real)
    return cross / np.sqrt(shell_sum(np.abs(A) ** 2) * shell_sum(np.abs(B) ** 2))


def numpy_masked_fsc(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The corrected FSC. The random phases are ours, because on others the curves would differ."""
    unmasked, masked = numpy_fsc(a, b), numpy_fsc(a * mask, b * mask)
    start = int(np.argmax(unmasked[1:] < 0.8)) + 1
    random_a = randomise_phases(torch.from_numpy(a), start, 0).numpy()
    random_b = randomise_phases(torch.from_numpy(b), start, 1).numpy()
    randomised = numpy_fsc(random_a * mask, random_b * mask)
    corrected = correct_for_mask(torch.from_numpy(masked), torch.from_numpy(randomised), start)
    return corrected.numpy()


def numpy_local_resolution(
    a: np.ndarray, b: np.ndarray, voxel_size: float, window: int, step: int
) -> np.ndarray:
    """Resolution in the window around every voxel of the coarse grid, one after the other."""
    n, half = len(a), window // 2
    axis = np.arange(window) - half
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    distance = (radius / (window / 2)).clip(max=1)
    soft = (0.5 + 0.5 * np.cos(np.pi * distance)).astype(np.float32)
    a, b = (np.pad(x, (half, window - 1 - half)) for x in (a, b))
    count = math.ceil((n - 1) / step) + 1
    centres = np.round(np.linspace(0, n - 1, count)).astype(int)

    # One window after the other.
    values = []
    for corner in np.stack(np.meshgrid(centres, centres, centres, indexing="ij"), -1).reshape(
        -1, 3
    ):
        box = tuple(slice(first, first + window) for first in corner)
        curve = torch.from_numpy(numpy_fsc(a[box] * soft, b[box] * soft))
        values.append(float(resolution(curve, voxel_size, 0.5, box=window)))
    return np.reshape(values, (count,) * 3).clip(max=window * voxel_size)


def spiral(n: int) -> np.ndarray:
    height = np.linspace(-1, 1, n)
    turns = np.cumsum(3.6 / np.sqrt(n * (1 - height[1:-1] ** 2)))
    theta = np.concatenate([[0], turns, [0]])
    flat = np.sqrt(1 - height**2)
    return np.stack([flat * np.cos(theta), flat * np.sin(theta), height], 1)


def numpy_q_score(
    density: np.ndarray, xyz: np.ndarray, voxel_size: float, origin: float
) -> np.ndarray:
    """The Q-score, atom after atom, shell after shell, as MapQ computes it."""

    def trilinear(points):
        position = (points[:, ::-1] - origin) / voxel_size
        low = np.floor(position).astype(int)
        part, total = position - low, 0
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, part, 1 - part), 1)
            total = total + density[tuple((low + corner).T)] * weight
        return total

    spheres = [spiral(n) for n in range(8, 108, 2)]
    # All values around one atom, and the reference there. The centre counts 8 times.
    scores = []
    for atom in xyz:
        near = xyz[np.abs(xyz - atom).max(1) < 3.9]
        values, reference = [trilinear(atom[None]).repeat(8)], [np.ones(8)]
        for radius in np.arange(1, 21) * 0.1:
            for directions in spheres:
                # Points that no other atom is closer to.
                points = atom + radius * directions
                distance2 = ((points[:, None] - near) ** 2).sum(-1).min(1)
                points = points[distance2 >= (0.9 * radius) ** 2]
                if len(points) >= 8:
                    values.append(trilinear(points))
                    reference.append(np.full(len(points), np.exp(-(radius**2) / (2 * 0.6**2))))
                    break
        scores.append(np.corrcoef(np.concatenate(values), np.concatenate(reference))[0, 1])
    return np.array(scores)


# ---- The measurement


def compare(job: str, rounds: int, ways: dict) -> None:
    """ways: name -> function without arguments; the first one is ours."""
    seconds, results = {name: [] for name in ways}, {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = time.process_time()
            results[name] = torch.as_tensor(way()).double()
            if turn > 0:
                seconds[name].append(time.process_time() - begin)

    # A table, one row per way.
    ours = next(iter(ways))
    for name in ways:
        median = statistics.median(seconds[name])
        ratio = median / statistics.median(seconds[ours])
        difference = (results[name] - results[ours]).nan_to_num().abs().max()
        title = job if name == ours else ""
        print(f"{title:46}{name:34}{median:9.3f} s{ratio:8.1f}x{difference:10.0e}", flush=True)


def half_maps(n: int) -> list[torch.Tensor]:
    """One signal with a falling spectrum, and white noise of its own in each half map."""
    generator = torch.Generator().manual_seed(0)
    k, kx = torch.fft.fftfreq(n), torch.fft.rfftfreq(n)
    fall = torch.exp(-100 * (k[:, None, None] ** 2 + k[:, None] ** 2 + kx**2))
    noise = [torch.randn(n, n, n, generator=generator) for _ in range(3)]
    signal = torch.fft.irfftn(torch.fft.rfftn(noise[0]) * fall, s=(n, n, n))
    return [signal / signal.std() + x for x in noise[1:]]


def benchmark_fsc(n: int, rounds: int) -> None:
    a, b = half_maps(n)
    x, y = a.numpy(), b.numpy()
    ways = {"ours": lambda: fsc(a, b), "numpy": lambda: numpy_fsc(x, y)}
    if fourier_shell_correlation:
        ways["torch-fourier-shell-correlation"] = lambda: fourier_shell_correlation(a, b)
    compare(f"FSC, {n}^3", rounds, ways)


def benchmark_masked(n: int, rounds: int) -> None:
    a, b = half_maps(n)
    axis = (torch.arange(n) - n // 2) ** 2
    radius = (axis[:, None, None] + axis[:, None] + axis).sqrt()
    mask = ((n / 3 - radius) / 8).clamp(0, 1)
    ways = {
        "ours": lambda: masked_fsc(a, b, mask).corrected,
        "numpy": lambda: numpy_masked_fsc(a.numpy(), b.numpy(), mask.numpy()),
    }
    compare(f"masked and corrected, {n}^3", rounds, ways)


def benchmark_local(n: int, rounds: int) -> None:
    # About half of the box (127 for 256), such that windows 9 voxels apart end where the map ends.
    window, step = 28, 9
    n = step * ((n // 2 - 1) // step) + 1
    a, b = half_maps(n)
    coarse = (slice(None, None, step),) * 3
    ways = {
        "ours": lambda: local_resolution(a, b, 1.0, window=window, step=step)[coarse],
        "numpy": lambda: numpy_local_resolution(a.numpy(), b.numpy(), 1.0, window, step),
    }
    count = ((n - 1) // step + 1) ** 3
    compare(f"local resolution, {n}^3, {count} windows of {window}^3", rounds, ways)


def benchmark_q(_, rounds: int) -> None:
    # A chain of about 3000 atoms, in a box with a margin of 5 Å.
    xyz = next(s.xyz for s in ProceduralChains() if 2900 < len(s.xyz) < 3300)
    xyz = torch.from_numpy(xyz).double()
    side = 2 * math.ceil(float(xyz.abs().max()) + 5)
    number = torch.full((len(xyz),), 7.0)
    grid = {"voxel_size": 1.0, "shape": (side,) * 3, "origin": -side / 2}
    density = molmap(xyz, number, 2.5, **grid)[0]
    double = density.double().numpy()
    ways = {
        "ours": lambda: q_score(density, xyz, 1.0, -side / 2),
        "numpy": lambda: numpy_q_score(double, xyz.numpy(), 1.0, -side / 2),
    }
    compare(f"Q-score, {len(xyz)} atoms", rounds, ways)


JOBS = {
    "fsc": benchmark_fsc,
    "masked": benchmark_masked,
    "local": benchmark_local,
    "q": benchmark_q,
}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    cli.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    cli.add_argument("--box", type=int, default=256, help="about half of it in job local")
    cli.add_argument("--rounds", type=int, default=5, help="of fsc; the slower jobs take half")
    args = cli.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, numpy {np.__version__}, {threads} thread(s)")
    print(f"{'':80}{'median':>11}{'to ours':>9}{'differs':>10}")
    for job in args.jobs:
        rounds = args.rounds if job == "fsc" else max(1, args.rounds // 2)
        JOBS[job](args.box, rounds)


if __name__ == "__main__":
    main()
