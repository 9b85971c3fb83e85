"""The ab initio table of RESULTS.md: densities from few noisy projections.

    python data_prepare.py structures structures/val.tsv       # writes structures/val.npz
    python tests/benchmark_abinitio.py structures/val.npz

The first structures of an archive that fit are simulated at 8 Å, on the grid of the coarse prior.
Projections have random poses, shifts of up to a pixel and white noise, whose variance is --noise
times that of the clean images. Both answers go through the task of sampling.py and are aligned to
the truth, in the hand that fits better. Scored by FSC_AUC up to Nyquist, mean and standard
deviation over the structures. "true poses" is the classical density from the true poses: the
upper limit of a better search.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import abinitio
import abinitio_poses
import atoms
import augment
import checkpoint
import degrade
import volume
from checkpoint import Prior
from fsc import auc, fsc
from mrc import Map
from report import silent
from sampling_settings import AbInitioSettings
from sampling_tasks import ab_initio

WEIGHTS = Path(__file__).parent.parent / "weights" / "hdit_tiny_l.pt"


def radius(structure: atoms.Structure) -> float:
    """Å from the middle of a structure, as `truth_of` has it, to its outermost atom."""
    middle = (structure.xyz.max(0) + structure.xyz.min(0)) / 2
    return float(np.linalg.norm(structure.xyz - middle, axis=1).max())


def truth_of(structure: atoms.Structure, box: int, voxel_size: float, resolution: float) -> Tensor:
    """The density of a structure in the middle of its box, from 0 to 1."""
    xyz = torch.from_numpy(structure.xyz)
    xyz = xyz - (xyz.amax(0) + xyz.amin(0)) / 2
    grid = {"voxel_size": voxel_size, "shape": (box,) * 3, "origin": -voxel_size * (box // 2)}
    density = atoms.molmap(xyz, structure.atomic_number, resolution, **grid)[0]
    return volume.normalise(density, 0.0, 1.0)[0]


def observe(truth: Tensor, count: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` noisy projections of a density, their rotations and their shifts in voxels.

    noise: its variance over that of the clean images.
    """
    generator = augment.item_generator(1, seed)
    rotations = torch.stack([augment.random_rotation(generator) for _ in range(count)])
    shifts = torch.rand(count, 2, generator=generator) * 2 - 1
    images = degrade.project(truth, rotations, shifts)
    white = torch.randn(images.shape, generator=generator)
    images = images + white * images.std() * noise**0.5
    return images, rotations, shifts


def fit_known(images: Tensor, rotations: Tensor, shifts: Tensor) -> Tensor:
    """The classical density of images whose poses are known."""
    N = images.shape[-1]
    k = abinitio_poses.frequencies(N // 2 - 1)
    back = F.pad(-shifts, (0, 1))  # x, y, z
    centred = abinitio_poses.coefficients(images, k) * abinitio_poses.phase(k, back, N)
    return abinitio.fit(torch.zeros(N, N, N), rotations, centred, k)


def score(x: Tensor, truth: Tensor) -> float:
    """FSC_AUC after alignment."""
    return float(auc(fsc(abinitio_poses.align(x, truth).density, truth)))


def scores_of(
    structure: atoms.Structure, count: int, number: int, prior: Prior, args: argparse.Namespace
) -> dict[str, float]:
    """FSC_AUC of each answer to `count` projections of a structure."""
    truth = truth_of(structure, args.box, prior.voxel_size, args.resolution)
    images, rotations, shifts = observe(truth, count, args.noise, number)
    # The search allows twice the shifts that there are.
    settings = AbInitioSettings(samples=args.samples, max_shift=2 * prior.voxel_size)
    stack = Map(images, prior.voxel_size)
    found = ab_initio(stack, prior, settings, silent).shown
    # Known poses need no alignment.
    known = fit_known(images, rotations, shifts)
    return {
        "classical": score(found["classical"], truth),
        "prior": score(found["restored"], truth),
        "true poses": float(auc(fsc(known, truth))),
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("data", type=Path, help="archive of structures")
    add("--ckpt", default=str(WEIGHTS), help="the prior; the grid has its voxel size")
    add("--projections", type=int, nargs="+", default=[8, 20, 40], help="numbers of them")
    add("--count", type=int, default=5, help="structures")
    add("--box", type=int, default=32, help="voxels per side")
    add("--resolution", type=float, default=8.0, help="Å")
    add("--noise", type=float, default=1.0, help="its variance over that of the clean images")
    add("--samples", type=int, default=4)
    args = cli.parse_args()

    # A particle must stay in its images at every angle, so it must fit into their sphere.
    prior = checkpoint.load(args.ckpt, kind="hdit")
    sphere = args.box * prior.voxel_size / 2
    fitting = [s for s in atoms.read_structures(args.data) if radius(s) < sphere]
    if len(fitting) < args.count:
        sys.exit(f"{args.data}: {len(fitting)} structures fit, --count is {args.count}")

    for count in args.projections:
        rows = []
        for number, structure in enumerate(fitting[: args.count]):
            begin = time.perf_counter()
            row = scores_of(structure, count, number, prior, args)
            rows.append(row)
            line = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
            seconds = time.perf_counter() - begin
            print(f"{structure.label}  {count} projections  {line}  {seconds:.0f} s", flush=True)
        for name in rows[0]:
            values = torch.tensor([row[name] for row in rows])
            print(
                f"  mean: {name} {values.mean():.3f} +- {values.std(correction=0):.3f}", flush=True
            )


if __name__ == "__main__":
    main()
