"""SCUNet against ViT as the network that restores: CryoLVM's appendix G.1, at the size of a CPU.

    python data_prepare.py structures structures/train.tsv       # and structures/val.tsv
    python train.py --model tiny-sharpen --steps 150 --batch 4 --crops-per-map 4 --crop 24 \\
        --data structures/train.npz --out runs/sharpen
    python train.py --model tiny-vit-sharpen ...                 # the same flags
    python tests/benchmark_backbones.py structures/val.npz \\
        --ckpt runs/sharpen/sharpen.pt runs/vit-sharpen/sharpen.pt

Both networks see the same crops in the same order. Crops of structures that neither has seen are
restored and compared with the wanted density: squared error on densities of 0..1, correlation
(CC_box of a crop) and FSC_AUC; means over crops, with the standard error. "before" is the crop as
observed. The paper scores whole deposited maps with Phenix and MapQ instead, after 500 epochs.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_wedge import write_rows

import atoms
import augment
import checkpoint
import data_pairs
import fsc
import fsc_model

CROPS_PER_MAP = 4
BATCH = 8


def pairs(path: Path, prior: checkpoint.Prior, resolution: tuple, count: int) -> Tensor:
    """Observed and wanted crops (count, 2, D, D, D), made as in training."""
    source = data_pairs.SimulatedPairs(
        atoms.read_structures(path),
        task=prior.task,
        crop=prior.box,
        crops=CROPS_PER_MAP,
        box=2 * prior.box,
        voxel_size=prior.voxel_size,
        resolution=resolution,
        seed=augment.HELD_OUT,
    )
    items = [source[i] for i in range(math.ceil(count / CROPS_PER_MAP))]
    crops = torch.cat(items)[:count]
    # A crop of solvent has no correlation with anything.
    return crops[crops[:, 1].amax((1, 2, 3)) > 0.1]


def scores(x: Tensor, wanted: Tensor) -> Tensor:
    """Squared error, correlation and FSC_AUC of each crop: (n, 3)."""
    error = (x - wanted).square().mean((1, 2, 3))
    correlation = [fsc_model.correlation(a, b) for a, b in zip(x, wanted)]
    return torch.stack([error, torch.tensor(correlation), fsc.auc(fsc.fsc(x, wanted))], 1)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("data", type=Path, help="archive of structures")
    add("--ckpt", nargs="+", required=True, help="fine-tuned networks of one task and box")
    add("--resolution", nargs=2, type=float, default=(2.5, 6), help="Å, of the simulated maps")
    add("--count", type=int, default=128, help="crops")
    add("--csv", default="runs/backbones.csv")
    args = cli.parse_args()
    priors = {path: checkpoint.load(path) for path in args.ckpt}
    first = priors[args.ckpt[0]]
    alike = {(p.task, p.box, p.voxel_size) for p in priors.values()}
    if len(alike) != 1:
        sys.exit(f"--ckpt: networks of one task, box and voxel size, not of {alike}")

    # Restore.
    crops = pairs(args.data, first, tuple(args.resolution), args.count)
    observed, wanted = crops.unbind(1)
    found = {"before": observed}
    for path, prior in priors.items():
        with torch.no_grad():
            parts = [prior.net(part[:, None])[:, 0] for part in observed.split(BATCH)]
        found[path] = torch.cat(parts)

    # Score.
    print(f"{len(crops)} crops of {first.box}^3; mean +- standard error of MSE, CC, FSC_AUC")
    rows = []
    for name, x in found.items():
        table = scores(x, wanted)
        mean = table.mean(0).tolist()
        error = (table.std(0) / len(table) ** 0.5).tolist()
        print(f"{name:40}", *(f"{m:.4f} +- {e:.4f}" for m, e in zip(mean, error)))
        rows.append([name, *mean, *error])
    columns = ["mse", "cc", "fsc_auc"]
    write_rows(args.csv, [["network", *columns, *[f"{c}_error" for c in columns]], *rows])


if __name__ == "__main__":
    main()
