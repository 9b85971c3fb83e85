"""The tables of RESULTS.md on real maps: classical answers beside the networks', a row per map.

    python tests/benchmark_real_maps.py --part choose          # to choose settings on
    python tests/benchmark_real_maps.py --part report          # to report

The folder `maps` holds maps with maps.tsv and maps2.tsv, which name the resolution and the atomic
model of each. Only the middle of a map is used, at the network's voxel size where the map is finer,
so that a row takes less than a minute. A restored map is scored by its FSC_AUC with the map itself,
up to Nyquist of that grid. Noise and mask edges of the map count as signal.

    wedge           tilts beyond +-60 degrees are taken out: POCS, the prior; scored in the missing
                    region and over all coefficients ("mean": measured coefficients change, too;
                    "zeros": nothing in the wedge)
    denoise         two half maps, each the map with white noise of the map's own standard
                    deviation: their average, Wiener filtered and clamped at 0, the prior
    sharpen         against the model: the map, a B-factor (Guinier, told the resolution), the
                    map's positive part, which is all that a network sees, the fine-tuned network
    wedge-scunet    as wedge, by the fine-tuned network

The `auto` column is the method that the program takes when it is not told, and "written" is the
score of what it writes then. A row is written as soon as it is known. Rows that exist are left out,
unless the network or a setting is another one. They know nothing of changes of the code: give
another --out for these.
"""

import argparse
import csv
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_scunet import sharpened

import atoms
import checkpoint
import fourier
import fsc_model
import mrc
from checkpoint import Prior
from fsc import auc, fsc
from mrc import Map
from report import Result, silent
from sampling_grey_scale import to_work_scale
from sampling_half_maps import restore_half_maps
from sampling_networks import sharpen
from sampling_settings import (
    DenoiseSettings,
    GreySettings,
    NetworkSettings,
    NetworkWedgeSettings,
    WedgeSettings,
)
from sampling_tasks import fill_wedge, restore_wedge

# The two halves share no protein. Each begins with its maps of 4.5 Å or better.
CHOOSE = (
    "emd_1461_vp6_crop",
    "emd_20026_apoferritin_zone",
    "emd_3240_gsecretase_zone",
    "emd_5830_asc_zone",
    "emd_6272_vp6_chain_1A",
    "emd_6272_vp6_cube_52",
    "emd_6374_cpv_zone",
    "vp6_gorgon_96",
    "emd_3186_full",
    "emd_5168_factin",
    "emd_5168_factin_monomer",
    "emd_5170_filament",
)
REPORT = (
    "emd_0093_hcn4_zone4A",
    "emd_30342_integrin_zone",
    "emd_3488_haemoglobin",
    "emd_4413_tmv_box",
    "emd_5137_mmcpn_zone",
    "groel_segment_80",
    "emd_1997_groel_atp",
    "emd_32143_lowres",
    "emd_6187_kinesin_zone",
    "emd_6187_tubulin_zone",
)
# Voxels that are too coarse for the shipped prior. In neither half.
COARSE = (
    "betagal_eman_100",
    "emd_1832",
    "emd_3197_sta_membrane",
    "ribosome70s_clean_65",
    "sta_80s_10064_bin2",
    "sta_ribosome_bin8",
)
PARTS = {
    "choose": CHOOSE,
    "report": REPORT,
    "coarse": COARSE,
    "all": (*CHOOSE, *REPORT, *COARSE),
}
WEIGHTS = Path(__file__).parent.parent / "weights"
CLASSICAL = ("pocs", "wiener")  # methods


class Case(NamedTuple):
    """A map, and what maps.tsv says about it."""

    name: str
    map: Map
    resolution: float | None  # Å
    model: Path | None


# ---- Maps


@cache
def table_of(folder: Path) -> dict[str, dict]:
    """The rows of maps.tsv and maps2.tsv, by the name of the map."""
    rows = {}
    for path in sorted(folder.glob("maps*.tsv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                rows[row["file"].split(".")[0]] = row
    return rows


def read_case(folder: Path, name: str) -> Case:
    """A map with background 0 and bright protein. Raises ValueError if the tables lack it."""
    row = table_of(folder).get(name)
    if row is None:
        raise ValueError(f"{name}: not in maps.tsv or maps2.tsv of {folder}")
    map, _ = to_work_scale(mrc.read_map(folder / row["file"]), GreySettings(), silent)
    model = folder / row["model_file"] if row["model_file"] else None
    resolution = float(row["resolution_A"]) if row["resolution_A"] else None
    return Case(name, map, resolution, model)


def middle_of(map: Map, side: int) -> Map:
    """The middle of a map, at most `side` voxels along each axis; it keeps its place in space."""
    first = [n // 2 - min(n, side) // 2 for n in map.density.shape]
    region = tuple(slice(start, start + side) for start in first)
    corner = [c + start * v for c, start, v in zip(map.corner, first, map.voxel_size)]
    return replace(map, density=map.density[region], origin=tuple(corner), nstart=(0, 0, 0))


def on_grid_of(network: Prior, map: Map, side: int) -> Map:
    """The middle of a map, at the network's voxel size where the map is finer."""
    coarser = [max(v, network.voxel_size) for v in map.voxel_size]
    return middle_of(mrc.resample_map(map, tuple(coarser)), side)


# ---- Tasks: each returns the scores of a case by the name of their column


def wedge_scores(case: Case, prior: Prior, args: argparse.Namespace) -> dict:
    """FSC_AUC of POCS, of the prior, and of what the program writes."""
    settings = WedgeSettings(samples=args.samples, steps=args.steps, discard_measured=True)
    names = {"POCS": "POCS", "prior": "restored", "mean": "posterior mean"}
    return scores_without_wedge(case, restore_wedge, prior, settings, args.side, names)


def scunet_wedge_scores(case: Case, network: Prior, args: argparse.Namespace) -> dict:
    """FSC_AUC of POCS and of the fine-tuned network."""
    settings = NetworkWedgeSettings(discard_measured=True)
    names = {"POCS": "POCS", "network": "restored"}
    return scores_without_wedge(case, fill_wedge, network, settings, args.side, names)


def scores_without_wedge(case: Case, task, network: Prior, settings, side: int, names) -> dict:
    """FSC_AUC of the answers to a map without its wedge. names: what is shown, by its column."""
    truth = on_grid_of(network, case.map, side)
    measured = settings.measured(truth)
    y = replace(truth, density=fourier.apply_fourier(truth.density, measured))
    result, auto = by_network(task, [y], network, settings)
    scores = {"auto": auto.report["method"]}
    for part, region in (("missing", ~measured), ("all", None)):
        for name, shown in names.items():
            scores[f"{part} {name}"] = agreement(result, shown, truth, region)
        curve = fsc(auto.shown["restored"], truth.density, region, voxel_size=truth.voxel_size)
        scores[f"{part} written"] = float(auc(curve))
    scores["all zeros"] = float(auc(fsc(y.density, truth.density, voxel_size=truth.voxel_size)))
    return scores


def denoise_scores(case: Case, prior: Prior, args: argparse.Namespace) -> dict:
    """FSC_AUC of the average of two noisy copies, of its Wiener filter, and of the prior."""
    truth = on_grid_of(prior, case.map, args.side)
    generator = torch.Generator().manual_seed(0)
    halves = []
    for _ in range(2):
        white = torch.randn(truth.density.shape, generator=generator)
        noisy = truth.density + truth.density.std() * white
        halves.append(replace(truth, density=noisy))
    settings = DenoiseSettings(samples=args.samples, steps=args.steps)
    result, auto = by_network(restore_half_maps, halves, prior, settings)
    names = {"average": "average", "Wiener, positive": "Wiener, positive", "prior": "restored"}
    scores = {name: agreement(result, names[name], truth) for name in names}
    curve = fsc(auto.shown["restored"], truth.density, voxel_size=truth.voxel_size)
    return {"auto": auto.report["method"]} | scores | {"written": float(auc(curve))}


def by_network(task, maps: list[Map], network: Prior, settings) -> tuple[Result, Result]:
    """What a network makes of maps, and what the program chooses by itself.

    Where voxels are too coarse for the network, both are the classical one.
    """
    result = auto = task(*maps, network, settings, silent)
    if auto.report["method"] in CLASSICAL and max(maps[0].voxel_size) <= 2 * network.voxel_size:
        method = "network" if task is fill_wedge else "prior"
        result = task(*maps, network, replace(settings, method=method), silent)
    return result, auto


def agreement(result: Result, name: str, truth: Map, region: Tensor | None = None) -> float | None:
    """FSC_AUC of what a result shows with the truth; None for a network that was not used."""
    from_network = name in ("restored", "posterior mean")
    if from_network and result.report["method"] in CLASSICAL:
        return None
    curve = fsc(result.shown[name], truth.density, region, voxel_size=truth.voxel_size)
    return float(auc(curve))


def sharpen_scores(case: Case, network: Prior, args: argparse.Namespace) -> dict | None:
    """CCs and Q-score with the model: of the map, of classical answers, of the network."""
    if case.model is None:
        return None
    map = mrc.resample_map(case.map, network.voxel_size)
    map = middle_of(map, args.side)
    found = {
        "map": map.density,
        "B-factor": sharpened(map, case.resolution),
        "positive part": map.density.clamp(min=0),
        "network": sharpen(map, network, NetworkSettings(), silent).densities[""],
    }
    return model_scores(found, map, case)


def model_scores(found: dict[str, Tensor], map: Map, case: Case) -> dict:
    """CCs and Q-score of densities on the grid of a map with the heavy atoms inside it."""
    model = atoms.read_model(case.model)
    inside = atoms.atoms_inside(model.xyz, map.density.shape, map.voxel_size, map.corner)
    inside &= model.atomic_number > 1
    xyz, number, b_iso = (
        getattr(model, name)[inside] for name in ("xyz", "atomic_number", "b_iso")
    )
    place = {"voxel_size": map.voxel_size, "origin": map.corner}
    scores = {}
    for name, x in found.items():
        cc = fsc_model.map_model_cc(x, xyz, number, b_iso, resolution=case.resolution, **place)
        scores |= {f"{key} {name}": cc[key] for key in ("cc_box", "cc_mask", "cc_peaks")}
        scores[f"q {name}"] = float(fsc_model.q_score(x, xyz, **place).nanmean())
    return scores


# The scores of each task, and its network: the flag, the kind and the default.
TASKS = {
    "wedge": (wedge_scores, "hdit", "hdit_tiny.pt"),
    "denoise": (denoise_scores, "hdit", "hdit_tiny.pt"),
    "sharpen": (sharpen_scores, "scunet", "scunet_tiny_sharpen.pt"),
    "wedge-scunet": (scunet_wedge_scores, "scunet", "scunet_tiny_wedge3d.pt"),
}


# ---- Rows


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, row: dict) -> None:
    """Add a row to a table on disk at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def say_means(rows: list[dict], key: list[str]) -> None:
    """Print the means over the maps that have all scores."""
    skipped = {*key, "auto", "seconds"}
    names = [name for name in rows[0] if name not in skipped] if rows else []
    complete = [row for row in rows if all(row[name] for name in names)]
    for name in names:
        if complete:
            mean = sum(float(row[name]) for row in complete) / len(complete)
            print(f"  mean of {len(complete)} maps: {name} {mean:.3f}", flush=True)


def run_task(task: str, names: tuple[str, ...], args: argparse.Namespace) -> None:
    """Print a table, from the rows on disk and from those that are missing there."""
    scores_of, kind, default = TASKS[task]
    path = getattr(args, f"ckpt_{kind}") or str(WEIGHTS / default)
    network = checkpoint.load(path, kind=kind)
    print(f"{task}: {Path(path).name} {network.sha256[:8]}, torch {torch.__version__}")

    # What a row depends on, as the table has it.
    settings = {
        "network": network.sha256[:8],
        "samples": str(args.samples),
        "steps": str(args.steps or "default"),
        "side": str(args.side),
    }
    key = ["map", *settings]
    table = Path(f"{args.out}_{task}.csv")
    known = {tuple(row[name] for name in key): row for row in read_rows(table)}

    rows = []
    for name in names:
        row = known.get((name, *settings.values()))
        if row is None:
            begin = time.perf_counter()
            scores = scores_of(read_case(args.folder, name), network, args)
            if scores is None:
                continue
            row = {"map": name} | settings
            for column, value in scores.items():
                row[column] = f"{value:.4f}" if isinstance(value, float) else value or ""
            row["seconds"] = f"{time.perf_counter() - begin:.0f}"
            add_row(table, row)

        # Say it, whether it was known or not.
        rows.append(row)
        columns = [column for column in row if column not in key]
        if len(rows) == 1:
            print(f"{'map':28}  {', '.join(columns)}")
        print(f"{name:28}  {'  '.join(row[column] or '-' for column in columns)}", flush=True)
    say_means(rows, key)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("folder", type=Path, nargs="?", default=Path("maps"))
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--part", default="all", choices=PARTS)
    add("--maps", nargs="+", help="names, instead of a part")
    add("--samples", type=int, default=2, help="of the prior")
    add("--steps", type=int, help="of the prior (default: its own)")
    add("--side", type=int, default=64, help="voxels per side at most: the middle of each map")
    add("--ckpt-hdit", metavar="CKPT", help="the prior")
    add("--ckpt-scunet", metavar="CKPT", help="the fine-tuned network; give one task with it")
    add("--out", default="runs/real_maps", help="writes OUT_TASK.csv")
    args = cli.parse_args()
    scunets = [task for task in args.tasks if TASKS[task][1] == "scunet"]
    if args.ckpt_scunet and len(scunets) != 1:
        cli.error("--ckpt-scunet is of one task; give it with --tasks sharpen or wedge-scunet")
    for task in args.tasks:
        run_task(task, tuple(args.maps or PARTS[args.part]), args)


if __name__ == "__main__":
    main()
