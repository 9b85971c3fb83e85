"""The CryoLVM tables of RESULTS.md.

    python data_prepare.py structures structures/val.tsv       # writes structures/val.npz
    S=weights/scunet_tiny_sharpen.pt
    python tests/benchmark_scunet.py sharpen structures/val.npz --ckpt $S
    python tests/benchmark_scunet.py sharpen maps --ckpt $S

Simulated: the smaller structures of an archive, as `data_pairs.simulated_pair` makes them (sharpen
3 to 6 Å, superres 4 to 6 Å, on 1 Å voxels). For wedge3d 8 to 15 Å on 4 Å voxels, a tilt range of
±60° and white noise. Real: maps of a folder with a maps.tsv (columns file, model_file,
resolution_A), resampled to 1 Å. Scored are the input, the classical answer and each checkpoint:

    sharpen, superres    CC_box, CC_mask, CC_peaks, Q-score, map-model FSC 0.5 and 0.143
    wedge3d              FSC_AUC over all and over what the wedge misses, correlation with the truth

Classical: POCS; or a B-factor from a Guinier fit between 10 Å and the resolution (FSC taken as 1),
and the positive part of the input, which is all that a network sees. Simulated superres has its
limit, too: the wanted map up to the resolution of the input.
"""

import argparse
import csv
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_wedge import WEIGHTS, write_rows

import atoms
import augment
import checkpoint
import data_pairs
import fourier
import fsc
import fsc_half_maps
import fsc_model
import fsc_mtriage
import mrc
import volume
from mrc import Map
from report import silent
from sampling_networks import sharpen
from sampling_settings import NetworkSettings, NetworkWedgeSettings, WedgeSettings
from sampling_tasks import fill_wedge, restore_wedge

RESOLUTIONS = {"sharpen": (3, 6), "superres": (4, 6), "wedge3d": (8, 15)}
VOXEL_SIZE = {"sharpen": 1.0, "superres": 1.0, "wedge3d": 4.0}


class Case(NamedTuple):
    label: str
    observed: Map
    wanted: Tensor | None  # unknown for a deposited map
    model: dict[str, Tensor]  # xyz, atomic_number, b_iso
    resolution: float  # Å


def simulated(task: str, structures: list, extent: float, count: int, noise: float):
    """Yield cases from the first `count` structures that are small enough."""
    small = [s for s in structures if (s.xyz.max(0) - s.xyz.min(0)).max() <= extent]
    voxel_size = VOXEL_SIZE[task]
    for i, s in enumerate(small[:count]):
        # A random orientation, in the middle of a box with a margin.
        generator = augment.item_generator(1, i)
        xyz = torch.from_numpy(s.xyz) @ augment.random_rotation(generator).T
        high, low = xyz.amax(0), xyz.amin(0)
        xyz = xyz - (high + low) / 2

        # The grid.
        box = 12 * math.ceil((float((high - low).max()) + 30) / voxel_size / 12)
        origin = -voxel_size * (box // 2)
        grid = {"voxel_size": voxel_size, "shape": (box,) * 3, "origin": origin}
        resolution = augment.uniform(*RESOLUTIONS[task], generator)
        b_factor = torch.from_numpy(s.b_factor)

        # What is observed, and what is wanted.
        if task == "wedge3d":
            wanted = atoms.molmap(xyz, s.atomic_number, resolution, **grid)[0]
            white = torch.randn(wanted.shape, generator=generator)
            measured = WedgeSettings().measured(Map(wanted, voxel_size))
            noisy = wanted + noise * wanted.max() * white
            observed = fourier.apply_fourier(noisy, measured)
        else:
            sharp = (b_factor - b_factor.quantile(0.05)).clamp(min=0)
            observed, wanted = data_pairs.simulated_pair(
                task, xyz, s.atomic_number, sharp, resolution, generator, **grid
            )
        number = torch.from_numpy(s.atomic_number)
        model = {"xyz": xyz, "atomic_number": number, "b_iso": b_factor}
        observed = Map(observed, voxel_size, (origin,) * 3)
        yield Case(s.label, observed, wanted, model, resolution)


def real(folder: Path):
    """Yield cases from the maps of a folder that have a model, at 1 Å per voxel."""
    with open(folder / "maps.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        if not row["model_file"].strip(" -"):
            continue
        path = next(path for path in sorted(folder.iterdir()) if path.name.startswith(row["file"]))
        m = mrc.resample_map(mrc.read_map(path), 1.0)
        model = atoms.read_model(folder / row["model_file"])
        # Heavy atoms inside the map.
        inside = atoms.atoms_inside(model.xyz, m.density.shape, m.voxel_size, m.corner)
        inside &= model.atomic_number > 1
        found = {name: getattr(model, name)[inside] for name in ("xyz", "atomic_number", "b_iso")}
        yield Case(path.name.split(".")[0], m, None, found, float(row["resolution_A"]))


def sharpened(map: Map, resolution: float) -> Tensor:
    """The classical answer: a B-factor from a Guinier fit."""
    x, voxel_size = map.density, map.voxel_size[2]
    ones = torch.ones(min(x.shape) // 2 + 1, dtype=torch.float64)
    b_factor = fsc_half_maps.guinier_b_factor(x, ones, voxel_size, resolution)
    return fsc_half_maps.sharpen(x, ones, voxel_size, b_factor, resolution)


def answers(task: str, case: Case, networks: dict, prior, args) -> dict[str, Tensor]:
    """All answers to a case by name, made by the tasks of sampling.py."""
    observed = case.observed
    found = {"input": observed.density}
    if task != "wedge3d":
        found["B-factor"] = sharpened(observed, case.resolution)
        found["positive part"] = observed.density.clamp(min=0)
    # The limit of superres: all of the wanted map that the input's resolution lets know.
    if task == "superres" and case.wanted is not None:
        found["truth up to the input's resolution"] = fourier.lowpass(
            case.wanted, case.resolution, observed.voxel_size
        )
    for path, network in networks.items():
        for fusion in args.fusion:
            numbers = {"stride": args.stride, "fusion": fusion}
            name = f"{path} {fusion}"
            if task == "wedge3d":
                settings = NetworkWedgeSettings(method="network", **numbers)
                result = fill_wedge(observed, network, settings, silent)
                found["POCS"] = result.shown["POCS"]
                found[name] = result.densities["_network"]
                found[f"{name}, kept"] = result.densities[""]
            else:
                result = sharpen(observed, network, NetworkSettings(**numbers), silent)
                found[name] = result.densities[""]
    if prior:
        # As sampling.py does it without --model scunet.
        # The settings count noise in percentiles, the simulation in maxima.
        percentile = volume.positive_maximum(observed.density)
        noise = args.noise * float(observed.density.max()) / percentile
        settings = WedgeSettings(method="prior", samples=1, noise=noise)
        result = restore_wedge(observed, prior, settings, silent)
        found["flow prior, one sample"] = result.densities["_mean"]
        found["flow prior, kept"] = result.densities[""]
    return found


def against_model(x: Tensor, case: Case) -> dict[str, float]:
    place = {"voxel_size": case.observed.voxel_size, "origin": case.observed.corner}
    cc = fsc_model.map_model_cc(x, **case.model, resolution=case.resolution, **place)
    curve = fsc_mtriage.map_model_resolution(x, **case.model, **place)
    q = fsc_model.q_score(x, case.model["xyz"], **place)
    return {
        "cc_box": cc["cc_box"],
        "cc_mask": cc["cc_mask"],
        "cc_peaks": cc["cc_peaks"],
        "q_score": float(q.nanmean()),  # nan: no density about an atom
        "fsc_05": curve["d_fsc_model_05"],
        "fsc_0143": curve["d_fsc_model_0143"],
    }


def against_truth(x: Tensor, case: Case) -> dict[str, float]:
    missing = ~WedgeSettings().measured(case.observed)
    return {
        "auc": float(fsc.auc(fsc.fsc(x, case.wanted))),
        "auc_missing": float(fsc.auc(fsc.fsc(x, case.wanted, missing))),
        "cc": fsc_model.correlation(x, case.wanted),
    }


def say_means(rows: list[dict]) -> None:
    for name in dict.fromkeys(row["answer"] for row in rows):
        line = f"{name:60}"
        for key in list(rows[0])[3:]:
            values = [row[key] for row in rows if row["answer"] == name]
            line += f" {key} {torch.tensor(values, dtype=torch.float64).nanmean():.3f}"
        print(line)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("task", choices=RESOLUTIONS)
    add("data", type=Path, help="archive of structures, or folder of maps with a maps.tsv")
    add("--ckpt", nargs="+", required=True, help="networks")
    add("--count", type=int, default=12, help="structures")
    add("--extent", type=float, default=70, help="Å: the largest structure")
    add("--stride", type=int, default=12)
    add("--fusion", nargs="+", default=["gaussian"])
    add("--noise", type=float, default=0.03, help="wedge3d: of the maximum")
    add("--prior", action="store_true", help="wedge3d: the shipped flow prior too")
    add("--csv", default="runs/scunet.csv")
    args = cli.parse_args()
    # What restores, and what is restored.
    networks = {path: checkpoint.load(path, kind="scunet") for path in args.ckpt}
    prior = checkpoint.load(WEIGHTS, kind="hdit") if args.prior else None
    if args.data.is_dir():
        cases = real(args.data)
    else:
        structures = atoms.read_structures(args.data)
        cases = simulated(args.task, structures, args.extent, args.count, args.noise)

    # Restore and score case by case.
    score = against_truth if args.task == "wedge3d" else against_model
    rows = []
    for case in cases:
        begin = time.perf_counter()
        found = answers(args.task, case, networks, prior, args)
        print(f"{case.label}: {time.perf_counter() - begin:.0f} s", flush=True)
        for name, x in found.items():
            row = {"map": case.label, "resolution": case.resolution, "answer": name}
            rows.append(row | score(x, case))
    if not rows:
        sys.exit(
            f"{args.data}: no structure up to {args.extent:g} Å across, or no map with a model"
        )
    print(f"means, torch {torch.__version__}")
    say_means(rows)
    write_rows(args.csv, [list(rows[0]), *[list(row.values()) for row in rows]])


if __name__ == "__main__":
    main()
