"""The missing-wedge tables of RESULTS.md.

    python data_prepare.py structures structures/val.tsv       # writes structures/val.npz
    python tests/benchmark_wedge.py structures/val.npz
    python tests/benchmark_wedge.py maps                       # a folder of maps

Each structure is simulated at 3 Å on 64^3 voxels of 1.5 Å, gets white noise (a fraction of its
99.999 percentile) and a tilt range of +-60 degrees, or other --resolution, --voxel-size, --tilt.
Scored: zeros in the wedge, POCS, one sample, the mean of 4 and of 8. "kept": the measured
coefficients stay as they are. Columns: FSC_AUC with the truth over all coefficients and over the
missing ones, FSC_0.5 in Å, and how many fail (FSC_0.5 beyond 30 Å). A map of a folder loses its
wedge and goes through the program; its truth is itself.
--mtriage adds phenix.mtriage's d_min as in CryoLVM's Table 3, where the FSC with the atomic model
falls below 0.5 and 0.143, on the mean of the structures whose FSC falls so far ("-": none).
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import atoms
import checkpoint
import degrade
import files
import fourier
import mrc
import posterior
import sampling
import train_objectives
import volume
from checkpoint import Prior
from classical import pocs
from fsc import auc, fsc, resolution
from fsc_mtriage import map_model_resolution
from sampling_settings import WedgeSettings
from sampling_tasks import observe_wedge

BOX, VOXEL_SIZE, RESOLUTION = 64, 1.5, 3.0
WEIGHTS = Path(__file__).parent.parent / "weights" / "hdit_tiny.pt"


def corner(voxel_size: float) -> float:
    """Where the box begins along each axis, in Å: its middle is at 0."""
    return -voxel_size * (BOX // 2)


def truth_of(
    structure: atoms.Structure, voxel_size: float = VOXEL_SIZE, resolution: float = RESOLUTION
) -> Tensor:
    """The density of a structure, from 0 to 1, centred in the box. Lengths in Å."""
    xyz = torch.from_numpy(structure.xyz)
    grid = {"voxel_size": voxel_size, "shape": (BOX,) * 3, "origin": corner(voxel_size)}
    density = atoms.molmap(xyz, structure.atomic_number, resolution, **grid)[0]
    return volume.normalise(density, 0.0, 1.0)[0]


def answers(map: mrc.Map, measured: Tensor, prior: Prior, settings: WedgeSettings) -> dict:
    """Every answer to a degraded map, by name."""
    # The classical answers.
    y = map.density
    found = {"zeros in the wedge": y, "POCS": pocs(y, measured)}
    observation, _ = observe_wedge(map, prior, settings)
    sampler = posterior.WEDGE[settings.method]
    if settings.steps:
        sampler = sampler | {"steps": settings.steps}
    samples = posterior.draw_samples(
        prior, observation, sampler, samples=settings.samples, seed=settings.seed
    )

    # Running means of the samples.
    total = torch.zeros_like(y)
    for k, sample in enumerate(samples, 1):
        total += sample
        if k in (1, 4, 8):
            found[f"mean of {k}, kept"] = fourier.put_back(total / k, y, measured)
            found[f"mean of {k}"] = total / k
    return found


def d_min(x: Tensor, structure: atoms.Structure, voxel_size: float) -> list[float]:
    """Where the FSC of a map with its model falls below 0.5 and 0.143, in Å (nan: nowhere)."""
    fields = (structure.xyz, structure.atomic_number, structure.b_factor)
    model = [torch.from_numpy(field) for field in fields]
    numbers = map_model_resolution(x, *model, voxel_size, corner(voxel_size))
    return [numbers["d_fsc_model_05"], numbers["d_fsc_model_0143"]]


def simulated_maps(args: argparse.Namespace) -> None:
    """Degrade, restore and score the structures of an archive."""
    prior = checkpoint.load(args.ckpt, kind="hdit")
    structures = atoms.read_structures(args.data)[args.first : args.first + args.count]
    settings = WedgeSettings(
        method=args.method,
        steps=args.steps,
        samples=args.samples,
        tilt_range=(-args.tilt, args.tilt),
    )
    measured = settings.measured(mrc.Map(torch.empty(BOX, BOX, BOX), args.voxel_size))
    table = defaultdict(list)
    rows = []
    for noise in args.noise:
        for i, structure in enumerate(structures, args.first):
            # Degrade.
            truth = truth_of(structure, args.voxel_size, args.resolution)
            white = torch.randn(truth.shape, generator=torch.Generator().manual_seed(i))
            y = fourier.apply_fourier(truth + noise * white, measured)
            if args.write:
                path = Path(args.write) / f"{structure.label}_noise{noise}"
                write_pair(path, y, truth, args.voxel_size)
                continue

            # Restore.
            begin = time.perf_counter()
            found = answers(mrc.Map(y, args.voxel_size), measured, prior, settings)
            seconds = time.perf_counter() - begin

            # Score.
            for name, x in found.items():
                curve = fsc(x, truth)
                scores = [
                    float(auc(curve)),
                    float(auc(fsc(x, truth, ~measured))),
                    float(resolution(curve, args.voxel_size, 0.5)),
                ]
                if args.mtriage:
                    scores += d_min(x, structure, args.voxel_size)
                table[noise, name].append(scores)
                numbers = [f"{score:.4f}" for score in scores]
                rows.append([structure.label, noise, name, f"{seconds:.1f}", *numbers])
    if not args.write:
        columns = ["structure", "noise", "result", "seconds", "auc", "auc_missing", "fsc_05"]
        if args.mtriage:
            columns += ["d_05", "d_0143"]
        write_rows(args.csv, [columns, *rows])
        say_machine(len(structures), args.ckpt, prior)
        say_table(table)


def write_pair(path: Path, y: Tensor, truth: Tensor, voxel_size: float) -> None:
    """A degraded map and its truth, with names that sampling.py finds."""
    for end, density in (("", y), ("_truth", truth)):
        out = path.with_name(f"{path.name}{end}.mrc")
        mrc.write_map(out, mrc.Map(density, voxel_size, origin=corner(voxel_size)))


def write_rows(path: str, rows: list) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def read_inputs(
    ckpt: str, archive: str, held_out: bool, first: int = 0, count: int | None = None
) -> tuple[Prior, list[atoms.Structure]]:
    """The prior, and `count` structures of an archive; says what they are and on what machine.

    held_out: of a training archive, those that train.py holds out.
    """
    prior = checkpoint.load(ckpt, kind="hdit")
    structures = atoms.read_structures(archive)
    if held_out:
        structures = train_objectives.split(structures)[1]
    structures = structures[first:][:count]
    say_machine(len(structures), ckpt, prior)
    return prior, structures


def say_machine(count: int, ckpt: str, prior: Prior) -> None:
    threads = torch.get_num_threads()
    print(f"{count} structures, torch {torch.__version__}, {threads} thread(s)", end=", ")
    print(Path(ckpt).name, prior.sha256[:8], flush=True)


def say_table(table: dict) -> None:
    print(
        "mean (standard deviation)         FSC_AUC, whole   missing wedge   FSC_0.5, Å    "
        "failures   d_min at 0.5, 0.143"
    )
    for (noise, name), scores in table.items():
        scores = torch.tensor(scores)
        mean = scores.mean(0).tolist()
        std = scores.std(0, correction=len(scores) > 1).tolist()
        columns = "   ".join(f"{m:.3f} ({s:.3f})" for m, s in zip(mean[:3], std))
        failures = int((scores[:, 2] > 30).sum())
        limits = "   ".join(f"{d:.2f}" for d in scores[:, 3:].nanmean(0).tolist())
        print(f"noise {noise:<5} {name:22} {columns}   {failures}   {limits.replace('nan', '-')}")


def real_maps(args: argparse.Namespace) -> None:
    """Take the wedge out of each map of a folder, restore it by the program, and score it."""
    print("map, voxels, Å, method, seconds, FSC_AUC in the missing wedge: POCS, restored")
    for path in files.list_files(args.data, mrc.MAP_SUFFIXES):
        # The wedge is taken out of a copy.
        truth = mrc.read_map(path)
        measured = degrade.wedge_mask(truth.density.shape, voxel_size=truth.voxel_size)
        with tempfile.TemporaryDirectory() as folder:
            y, out = Path(folder) / "degraded.mrc", Path(folder) / "out.mrc"
            density = fourier.apply_fourier(truth.density, measured)
            mrc.write_map(y, replace(truth, density=density))
            command = f"--task wedge {y} -o {out} --truth {path} --ckpt {args.ckpt} --quiet"
            sampling.main([*command.split(), "--samples", str(args.samples)])
            report = json.loads(out.with_suffix(".json").read_text())
            after = mrc.read_map(out)

        # The program may change nothing but what the wedge left out.
        for name in ("voxel_size", "origin", "nstart"):
            assert getattr(after, name) == getattr(truth, name), f"{path}: {name} changed"
        change = fourier.apply_fourier(after.density - truth.density, measured).abs().max()
        assert change < 1e-5 * truth.density.abs().max(), f"{path}: measured coefficients changed"
        shape = "x".join(str(n) for n in truth.density.shape)
        print(
            f"{path.name.split('.')[0]:34}{shape:>14}{truth.voxel_size[2]:7.2f}"
            f"{report['method']:>8}{report['seconds']:6.0f}"
            f"   {report['fsc']['POCS']['auc_missing']:.3f}"
            f"  {report['fsc']['restored']['auc_missing']:.3f}",
            flush=True,
        )


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("data", help="archive (.npz), PDB file, or folder of maps")
    cli.add_argument("--ckpt", default=str(WEIGHTS))
    cli.add_argument("--count", type=int, default=32, help="structures, from the first on")
    cli.add_argument("--first", type=int, default=0)
    cli.add_argument("--noise", type=float, nargs="+", default=[0, 0.03, 0.1])
    cli.add_argument("--voxel-size", type=float, default=VOXEL_SIZE, help="Å")
    cli.add_argument("--resolution", type=float, default=RESOLUTION, help="Å")
    cli.add_argument("--tilt", type=float, default=60, help="degrees")
    cli.add_argument("--method", default="prior", choices=posterior.WEDGE)
    cli.add_argument("--steps", type=int)
    cli.add_argument("--samples", type=int, default=8)
    cli.add_argument("--mtriage", action="store_true", help="also d_min (1 to 9 s per result)")
    cli.add_argument("--write", metavar="FOLDER", help="only write degraded maps and truths")
    cli.add_argument("--csv", default="runs/wedge.csv", help="one row per structure and noise")
    args = cli.parse_args()
    if Path(args.data).is_dir():
        if args.mtriage:
            cli.error("--mtriage needs the atoms of an archive of structures, not a folder of maps")
        real_maps(args)
    else:
        simulated_maps(args)


if __name__ == "__main__":
    main()
