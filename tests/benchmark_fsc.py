"""The README's times of fsc.py: `OMP_NUM_THREADS=1 python tests/benchmark_fsc.py`.

Each job is done by fsc.py, by numpy as its definition is written (full transform, one window or atom after the other), and, where
it is installed (pip install torch-fourier-shell-correlation), by that package. They take turns in one process; the first turn,
which warms up, is not counted. Printed: the median in seconds of CPU (a busy machine changes it little), the ratio to fsc.py,
the largest difference from fsc.py. The package shares each coefficient between two shells: another estimator, so it differs.
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
from atoms import molmap  # noqa: E402
from data_chains import ProceduralChains  # noqa: E402
from fsc import fsc, resolution  # noqa: E402
from fsc_half_maps import correct_for_mask, local_resolution, masked_fsc, randomise_phases  # noqa: E402
from fsc_model import q_score  # noqa: E402

JOBS = ("fsc", "masked", "local", "q")
try:
    from torch_fourier_shell_correlation import fourier_shell_correlation
except ImportError:
    fourier_shell_correlation = None


def numpy_fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(1) over the full transform of a cube, shells by rounding."""
    n = len(a)
    A, B = np.fft.fftn(a), np.fft.fftn(b)
    k = np.fft.fftfreq(n, 1 / n)
    shell = (
        np.floor(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2) + 0.5).astype(int).ravel()
    )
    cross, power_a, power_b = (
        np.bincount(shell, x.ravel(), n)[: n // 2 + 1]
        for x in ((A * B.conj()).real, np.abs(A) ** 2, np.abs(B) ** 2)
    )
    return cross / np.sqrt(power_a * power_b)


def numpy_masked_fsc(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(2). The random phases are fsc.py's, at its cost: on others the curves could not agree."""
    unmasked, masked = numpy_fsc(a, b), numpy_fsc(a * mask, b * mask)
    start = int(np.argmax(unmasked[1:] < 0.8)) + 1
    randomised = numpy_fsc(
        *(
            randomise_phases(torch.from_numpy(x), start, i).numpy() * mask
            for i, x in enumerate((a, b))
        )
    )
    return correct_for_mask(torch.from_numpy(masked), torch.from_numpy(randomised), start).numpy()


def numpy_local_resolution(
    a: np.ndarray, b: np.ndarray, voxel_size: float, window: int, step: int
) -> np.ndarray:
    """Resolution in the window about every voxel of the coarse grid, one after the other."""
    n, h = len(a), window // 2
    axis = np.arange(window) - h
    distance = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) / (window / 2)
    soft = (0.5 + 0.5 * np.cos(np.pi * distance.clip(max=1))).astype(np.float32)
    a, b = (np.pad(x, (h, window - 1 - h)) for x in (a, b))
    centres = np.round(np.linspace(0, n - 1, math.ceil((n - 1) / step) + 1)).astype(int)
    values = []
    for i, j, k in np.ndindex(*(len(centres),) * 3):
        at = tuple(slice(centres[m], centres[m] + window) for m in (i, j, k))
        curve = torch.from_numpy(numpy_fsc(a[at] * soft, b[at] * soft))
        values.append(float(resolution(curve, voxel_size, 0.5, box=window)))
    return np.reshape(values, (len(centres),) * 3).clip(max=window * voxel_size)


def numpy_q_score(
    density: np.ndarray, xyz: np.ndarray, voxel_size: float, origin: float
) -> np.ndarray:
    """(8), atom after atom, shell after shell, as MapQ does it."""

    def spiral(n):
        h = np.linspace(-1, 1, n)
        theta = np.concatenate([[0], np.cumsum(3.6 / np.sqrt(n * (1 - h[1:-1] ** 2))), [0]])
        flat = np.sqrt(1 - h**2)
        return np.stack([flat * np.cos(theta), flat * np.sin(theta), h], 1)

    def values(points):  # trilinear
        at = (points[:, ::-1] - origin) / voxel_size
        low = np.floor(at).astype(int)
        f, total = at - low, 0
        for corner in np.ndindex(2, 2, 2):
            total = total + density[tuple((low + corner).T)] * np.prod(
                np.where(corner, f, 1 - f), 1
            )
        return total

    spheres, scores = {n: spiral(n) for n in range(8, 108, 2)}, []
    for atom in xyz:
        near = xyz[np.abs(xyz - atom).max(1) < 3.9]
        v, r = [values(atom[None]).repeat(8)], [np.ones(8)]
        for R in np.arange(1, 21) * 0.1:
            for u in spheres.values():
                points = atom + R * u
                points = points[((points[:, None] - near) ** 2).sum(-1).min(1) >= (0.9 * R) ** 2]
                if len(points) >= 8:
                    v.append(values(points))
                    r.append(np.full(len(points), np.exp(-(R**2) / (2 * 0.6**2))))
                    break
        scores.append(np.corrcoef(np.concatenate(v), np.concatenate(r))[0, 1])
    return np.array(scores)


def compare(job: str, rounds: int, ways: dict) -> None:
    """ways: name -> function of nothing; the first is fsc.py."""
    seconds, results = {name: [] for name in ways}, {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = time.process_time()
            results[name] = torch.as_tensor(way()).double()
            if turn:
                seconds[name].append(time.process_time() - begin)
    ours = next(iter(ways))
    for name in ways:
        t = statistics.median(seconds[name])
        difference = (results[name] - results[ours]).nan_to_num().abs().max()
        ratio = t / statistics.median(seconds[ours])
        print(
            f"{job if name == ours else '':46}{name:34}{t:9.3f} s{ratio:8.1f}x{difference:10.0e}",
            flush=True,
        )


def halves(n: int) -> list[torch.Tensor]:
    """One signal with a falling spectrum, and white noise of each half's own."""
    g = torch.Generator().manual_seed(0)
    k = torch.fft.fftfreq(n) ** 2, torch.fft.rfftfreq(n) ** 2
    fall = torch.exp(-100 * (k[0][:, None, None] + k[0][:, None] + k[1]))
    signal = torch.fft.irfftn(
        torch.fft.rfftn(torch.randn(n, n, n, generator=g)) * fall, s=(n, n, n)
    )
    return [signal / signal.std() + torch.randn(n, n, n, generator=g) for _ in range(2)]


def main() -> None:
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    cli.add_argument(
        "--box",
        type=int,
        default=256,
        help="of the pair of maps; local resolution: half of it less one",
    )
    cli.add_argument("--rounds", type=int, default=5, help="of FSC; the slower jobs take fewer")
    args = cli.parse_args()
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} thread(s)\n"
        f"{'':80}{'median':>11}{'to ours':>9}{'differs':>10}"
    )

    n, few = args.box, max(1, args.rounds // 2)
    if {"fsc", "masked"} & set(args.jobs):
        a, b = halves(n)
        axis = (torch.arange(n) - n // 2) ** 2
        mask = ((n / 3 - (axis[:, None, None] + axis[:, None] + axis).sqrt()) / 8).clamp(0, 1)
        x, y, m = a.numpy(), b.numpy(), mask.numpy()
    if "fsc" in args.jobs:
        ways = {"fsc.py": lambda: fsc(a, b), "numpy": lambda: numpy_fsc(x, y)}
        if fourier_shell_correlation:
            ways["torch-fourier-shell-correlation"] = lambda: fourier_shell_correlation(a, b)
        compare(f"FSC, {n}^3", args.rounds, ways)
    if "masked" in args.jobs:
        compare(
            f"masked and corrected, {n}^3",
            few,
            {
                "fsc.py": lambda: masked_fsc(a, b, mask).corrected,
                "numpy": lambda: numpy_masked_fsc(x, y, m),
            },
        )
    if "local" in args.jobs:
        n, window, step = n // 2 - 1, 28, 9  # 127: windows 9 voxels apart end where the map ends
        a, b = halves(n)
        compare(
            f"local resolution, {n}^3, {((n - 1) // step + 1) ** 3} windows of {window}^3",
            few,
            {
                "fsc.py": lambda: local_resolution(a, b, 1.0, window=window, step=step)[
                    ::step, ::step, ::step
                ],
                "numpy": lambda: numpy_local_resolution(a.numpy(), b.numpy(), 1.0, window, step),
            },
        )
    if "q" in args.jobs:
        xyz = next(
            torch.from_numpy(s.xyz).double() for s in ProceduralChains() if 2900 < len(s.xyz) < 3300
        )
        side = 2 * math.ceil(float(xyz.abs().max()) + 5)
        density = molmap(
            xyz,
            torch.full((len(xyz),), 7.0),
            2.5,
            voxel_size=1.0,
            shape=(side,) * 3,
            origin=-side / 2,
        )[0]
        compare(
            f"Q-score, {len(xyz)} atoms",
            few,
            {
                "fsc.py": lambda: q_score(density, xyz, 1.0, -side / 2),
                "numpy": lambda: numpy_q_score(
                    density.double().numpy(), xyz.numpy(), 1.0, -side / 2
                ),
            },
        )


if __name__ == "__main__":
    main()
