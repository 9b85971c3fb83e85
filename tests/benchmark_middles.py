"""sampling.py, as it is typed, on the middle 48 Å of real maps: section 16 of RESULTS.md.

    python tests/benchmark_middles.py maps --tasks wedge denoise likelihood

The folder `maps` holds maps with maps.tsv and maps2.tsv, as for benchmark_real_maps.py. Each map is
its own truth, so that its noise counts as signal. Its middle is cut out (32 voxels a side where
they are coarser than 1.5 Å), and made into what the task asks for:

    wedge, wedge-scunet    tilts beyond +-60 degrees are taken out
    denoise                two half maps: the map and white noise of its own standard deviation
    anisotropic            the same, with 50 times the power beyond +-60 degrees
    sharpen, superres      nothing is changed; scored with the atomic model, beside a B-factor
    likelihood             nothing is changed

A row holds the scores that the program wrote, the method that it chose, its warnings, or the words
it refused the map with. Rows are added to OUT.jsonl at once. What is there is not run again, so
give another --out after a change of the code.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_real_maps import middle_of, model_scores, read_case, table_of
from benchmark_scunet import sharpened

import degrade
import fourier
import mrc
import sampling
from mrc import Map
from sampling_settings import AnisotropicSettings, WedgeSettings

SIDE = 48  # Å
TILTS = (-60, 60)  # degrees
TASKS = ("wedge", "wedge-scunet", "denoise", "anisotropic", "sharpen", "superres", "likelihood")


def middle(map: Map) -> Map:
    """The middle 48 Å, or 32 voxels if they are coarse."""
    voxel_size = map.voxel_size[2]
    return middle_of(map, 32 if voxel_size > 3 else round(SIDE / voxel_size))


def given_to(task: str, truth: Map, stem: Path) -> list:
    """Write what a task is given; returns the words of its command."""
    if task in ("sharpen", "superres", "likelihood"):
        return ["--task", task, write(truth, stem, "given")]

    truth_path = write(truth, stem, "truth")
    words = ["--truth", truth_path]
    if task.startswith("wedge"):
        measured = WedgeSettings(tilt_range=TILTS).measured(truth)
        x = fourier.apply_fourier(truth.density, measured)
        given = write(replace(truth, density=x), stem, "given")
        if task == "wedge-scunet":
            words += ["--model", "scunet"]
        return ["--task", "wedge", given, "--tilt-range", *TILTS, *words]

    # Two half maps. White noise has the same power in every shell.
    x = truth.density
    power = torch.full((x.shape[-1] // 2,), float(x.var()) * x.numel(), dtype=torch.float64)
    if task == "anisotropic":
        power = AnisotropicSettings(tilt_range=TILTS).noise_on_grid(power, truth)
        words += ["--tilt-range", *TILTS]
    halves = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        noisy = degrade.add_spectral_noise(x, power, generator=generator)
        halves.append(write(replace(truth, density=noisy), stem, f"half{seed}"))
    return ["--task", task, *halves, *words]


def write(map: Map, stem: Path, end: str) -> Path:
    path = stem.with_name(f"{stem.name}_{end}.mrc")
    mrc.write_map(path, map, overwrite=True)
    return path


def run(words: list) -> str:
    """Run sampling.py; returns the words it refuses with, or none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            sampling.main([str(word) for word in words])
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def row_of(task: str, name: str, args: argparse.Namespace) -> dict:
    """Run a task on a map; returns what it reported."""
    truth = middle(mrc.read_map(args.folder / table_of(args.folder)[name]["file"]))
    stem = args.work / name
    out = stem.with_name(f"{name}_{task}.mrc")
    words = given_to(task, truth, stem) + ["--overwrite", "-o", out]
    if task in ("wedge", "denoise", "anisotropic"):
        words += ["--samples", args.samples]
    begin = time.perf_counter()
    refused = run(words)
    row = {"task": task, "map": name, "voxel_size": truth.voxel_size[2], "refused": refused}
    row["seconds"] = round(time.perf_counter() - begin)
    if refused:
        return row

    report = json.loads(out.with_suffix(".json").read_text())
    for fact in ("method", "expected_auc", "nats_per_voxel", "standard_error", "warnings"):
        if fact in report:
            row[fact] = report[fact]
    for key in ("auc", "auc_missing"):
        if any(key in scores for scores in report["fsc"].values()):
            row[key] = {label: scores[key] for label, scores in report["fsc"].items()}
    if task in ("sharpen", "superres"):
        row["scores"] = scores_with_model(name, truth, mrc.read_map(out), args)
    return row


def scores_with_model(name: str, truth: Map, result: Map, args) -> dict:
    """CCs and Q-score of the map, of a B-factor and of the result, on the result's grid."""
    case = read_case(args.folder, name)
    if case.model is None:
        return {}
    fine = replace(result, density=fourier.resample(truth.density, result.density.shape))
    found = {
        "map": fine.density,
        "B-factor": sharpened(fine, case.resolution),
        "network": result.density,
    }
    return model_scores(found, fine, case)


def say(row: dict) -> None:
    """Print a row: its scores, or why there are none."""
    if row["refused"]:
        print(f"{row['map']:28} refused: {row['refused']}", flush=True)
        return
    scores = row.get("auc_missing") or row.get("auc") or row.get("scores") or {}
    if "nats_per_voxel" in row:
        scores = {"nats per voxel": row["nats_per_voxel"]}
    words = ", ".join(f"{label} {value:.3f}" for label, value in scores.items())
    print(f"{row['map']:28} {row['method']}: {words}; {row['seconds']} s", flush=True)
    for warning in row.get("warnings", []):
        print(f"    {warning}", flush=True)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("folder", type=Path, nargs="?", default=Path("maps"))
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--maps", nargs="+", help="names (default: all)")
    add("--samples", type=int, default=2, help="of the prior")
    add("--out", type=Path, default=Path("runs/middles.jsonl"))
    args = cli.parse_args()
    args.work = args.out.with_suffix("")
    args.work.mkdir(parents=True, exist_ok=True)

    rows = args.out.read_text().splitlines() if args.out.exists() else []
    known = {(row["task"], row["map"]): row for row in map(json.loads, rows)}
    for task in args.tasks:
        print(task, flush=True)
        for name in args.maps or table_of(args.folder):
            row = known.get((task, name))
            if row is None and "mask" not in name:
                row = row_of(task, name, args)
                with open(args.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
            if row:
                say(row)


if __name__ == "__main__":
    main()
