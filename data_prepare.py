"""The command that makes training data out of public archives.

    python data_prepare.py urls emdb.csv                           # which EMDB maps to download
    python data_prepare.py maps EMDB maps --metadata emdb.csv      # they -> a folder for train.py
    python data_prepare.py pairs FOLDER/candidates.csv             # CryoLVM's rules -> pairs.csv
    python data_prepare.py structures structures/val.tsv           # PDB entries -> val.npz
    python data_prepare.py emdb EMD-6374 EMD-3488 maps             # a few EMDB maps

`maps` curates as CryoFM (arXiv:2410.08631), section 4.1, says. A map that stays is resampled to one
voxel size, scaled to 0..1 (volume.normalise), padded to a cube and stored as float16, emd_1234.npy.
index.csv has a row per entry: its statistics, or why it was skipped. settings.json says how it was
made. `structures` and `emdb` are in data_download.py, `pairs` in data_quality.py. Lengths in Å.

CryoLVM's corpus (its section 4.1) is --voxel-size 1 --max-resolution 4 --no-half-maps.
The 32 test maps of section 4.1 are a list by the authors (Zenodo 18013604): --held-out LIST.

Departure 1: section 4.1 removes helical assemblies and "problematic cases" by eye. We go by the
method and the title of an entry.
"""

import argparse
import csv
import io
import json
import math
import multiprocessing
import os
import re
import signal
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from data_download import build_archive, fetch_maps, map_url
from data_quality import choose_pairs, on_training_grid, read_ids
from files import atomic_write, entry_of, refuse_existing, write_json
from mrc import read_map
from terminal import one_line_for_memory, run_program, say
from volume import CLIP, LITERAL, cube

# In a prepared folder, beside emd_1234.npy, ...
INDEX = "index.csv"
SETTINGS = "settings.json"

COLUMNS = "entry,skipped,split,box,voxel_size,maximum,mean,std,filled,background,sign,file"

# The columns of the table that EMDB's search exports. `rejected` looks at them.
METADATA = "emdb_id,title,structure_determination_method,resolution,half_map_filename"


def held_out(label: str) -> bool:
    """Whether a map is never trained on: one in twenty, by the hash of its name."""
    return zlib.crc32(label.encode()) % 20 == 0


# ---- Which entries to take ----------------------------------------------------------------------


def read_metadata(path: str | Path) -> dict[str, dict]:
    """emd_1234 -> its row of a CSV with the columns METADATA that EMDB's search has exported.

    Raises OSError without the file, ValueError if a column is missing or an id is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text; wanted is a CSV of EMDB's search") from None
    table = csv.DictReader(io.StringIO(text, newline=""), restval="")
    missing = set(METADATA.split(",")) - set(table.fieldnames or ())
    if missing:
        missing = ", ".join(sorted(missing))
        raise ValueError(f"{path}: no column {missing}; export {METADATA}")
    # EMD-1234 -> emd_1234, as the files are named.
    rows = {}
    for row in table:
        label = row["emdb_id"].strip().lower().replace("-", "_")
        if not re.fullmatch(r"emd_\d+", label):
            raise ValueError(f"{path}: emdb_id {label!r} is none; they look like EMD-1234")
        rows[label] = row
    return rows


def rejected(row: dict | None, max_resolution: float, half_maps: bool = True) -> str:
    """Why section 4.1 leaves an entry out, from its row of the metadata; "" if it stays.

    half_maps: want them, as CryoFM does.
    """
    if row is None:
        return "not in the metadata"

    # Better than max_resolution (Å), and stated at all.
    resolution = row["resolution"].strip()
    if not re.fullmatch(r"\d+\.?\d*", resolution) or not 0 < float(resolution) < max_resolution:
        return "resolution not stated, or not better than asked"

    # By single particles. EMDB has written "singleParticle" and "Single particle".
    method = re.sub("[^a-z]", "", row["structure_determination_method"].lower())
    if method != "singleparticle":
        return "not single particle"

    # With half maps.
    if half_maps and not row["half_map_filename"].strip():
        return "no half maps"

    # Departure 1: no helical assembly, as far as the title says.
    if re.search("helical|filament|fibril|microtubule", row["title"], re.IGNORECASE):
        return "helical, by its title"
    return ""


def find_maps(folder: Path) -> dict[str, Path]:
    """emd_1234 -> its map at any depth below a folder; no half maps, no masks.

    Raises OSError without the folder, ValueError if it holds none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    name = re.compile(r"(emd_\d+)\.(map|mrc|ccp4)(\.gz|\.bz2)?", re.IGNORECASE)
    files = {}
    for file in sorted(folder.rglob("*")):
        if match := name.fullmatch(file.name):
            files[match[1].lower()] = file
    if not files:
        raise ValueError(f"{folder}: no map of an EMDB entry (emd_1234.map.gz, ...) here or below")
    return files


# ---- The prepared folder ------------------------------------------------------------------------


def read_settings(folder: Path) -> dict:
    """How a folder was prepared, `settings` of `prepare`. Raises ValueError if they are damaged."""
    file = folder / SETTINGS
    try:
        settings = json.loads(file.read_text())
        return settings | {"voxel_size": float(settings["voxel_size"])}
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"{file}: damaged; copy it again, or give another folder") from None


def read_index(folder: Path) -> list[dict]:
    """The rows of a prepared folder: one per entry, with its statistics or why it was skipped.

    Raises ValueError if the table is damaged.
    """
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        table = csv.DictReader(io.StringIO(path.read_text(), newline=""))
        rows = list(table)
    except (csv.Error, UnicodeDecodeError):
        rows = [{}]
    for number, row in enumerate(rows, 1):
        missing = None in (row.get("entry"), row.get("skipped"), row.get("file"))
        # A run that was killed may have left half a row at the end.
        if missing and "file" in row and number == len(rows):
            return rows[:-1]
        if missing or None in row:  # None: the key of what stands beyond the last column
            raise ValueError(f"{path}: damaged; delete it, and data_prepare.py writes it anew")
    return rows


def write_index(folder: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS.split(","))
    table.writeheader()
    table.writerows(rows)
    with atomic_write(folder / INDEX) as file:
        file.write(text.getvalue().encode())


def begin_or_continue(folder: Path, settings: dict) -> dict[str, dict]:
    """entry -> row of the maps that an earlier run prepared in this folder with these settings.

    Raises ValueError if it had other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    before = read_settings(folder) if file.exists() else settings
    if before != settings:
        raise ValueError(f"{folder}: begun with {before}; give these, or another folder")
    write_json(file, settings)

    # A row counts only if its map is still in the folder.
    done = {}
    for row in read_index(folder):
        if not row["skipped"] and (folder / f"{row['entry']}.npy").exists():
            done[row["entry"]] = row
    return done


def prepare_map(
    file: Path, out: Path, voxel_size: float, max_side: float, percentiles=CLIP
) -> dict:
    """One map -> out/emd_1234.npy, float16 (n, n, n) scaled to 0..1. Returns its row of the index.

    voxel_size and max_side in Å; percentiles: as in volume.CLIP. A map that is too large
    or not usable is skipped.
    """
    label = entry_of(file)
    row = dict(entry=label, file=file, split="test" if held_out(label) else "train")

    # Read the map, bring it to the wanted grid and scale.
    try:
        map = read_map(file)
        for note in map.notes:
            say(f"{file}: {note}")
        side = max(n * v for n, v in zip(map.density.shape, map.voxel_size))
        if side > max_side:
            return dict(row, skipped=f"side longer than {max_side:g} Å")
        with one_line_for_memory(f"give a larger --voxel-size than {voxel_size:g}"):
            map = on_training_grid(map, voxel_size)
            x, statistics = cube(map.density, percentiles)
    except (ValueError, OSError) as error:
        return dict(row, skipped=f"not usable: {error}")

    # Write the map, then describe it.
    with atomic_write(out / f"{label}.npy") as target:
        np.save(target, x.numpy())
    row |= {name: f"{value:.5g}" for name, value in statistics.items()}
    row |= dict(skipped="", box=len(x))
    row["voxel_size"] = " ".join(f"{v:.5f}" for v in map.voxel_size)
    return row


def prepare_maps(files: list[Path], workers: int, *settings) -> Iterable[dict]:
    """The rows of `prepare_map` for all files, as they come from that many processes."""
    # One worker needs no process of its own.
    if workers == 1:
        for file in files:
            yield prepare_map(file, *settings)
        return

    # Whoever stops listening, after an error or Ctrl-C, cancels the maps that nobody has begun.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, start_worker)
    try:
        futures = [pool.submit(prepare_map, file, *settings) for file in files]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, each finishes its map


def prepare(
    folder: str | Path,
    out: str | Path,
    voxel_size: float,
    metadata: str | Path | None = None,
    max_resolution: float = 3.0,
    max_side: float = 576.0,
    workers: int = 1,
    half_maps: bool = True,
    excluded: str | Path | None = None,
    literal_percentiles: bool = False,
    say=say,
) -> list[dict]:
    """EMDB's maps below `folder` -> the folder `out`, which train.py reads; returns its index.

    voxel_size: of all prepared maps, Å; metadata: a CSV for `rejected`, without which nothing is
    known of an entry; max_resolution: Å; max_side: longest side of a map, Å; workers: processes;
    half_maps: leave out entries without; excluded: a file that names entries to leave out;
    literal_percentiles: clip as volume.LITERAL.
    A run that was stopped goes on where it was, and looks again at maps that were skipped.
    Raises ValueError and OSError for bad arguments, folders and disks; a bad map stops nothing.
    """
    # Check the arguments and the folders before any work.
    out = Path(out)
    files = find_maps(Path(folder))
    settings = dict(voxel_size=voxel_size, max_resolution=max_resolution, max_side=max_side)
    for name, value in settings.items():
        if not 0 < value < math.inf:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value:g}: give a positive number of Å")
    if not 1 <= workers <= 512:
        raise ValueError(f"--workers {workers}: give 1 to 512")

    # Read what is known of the entries, and what an earlier run did.
    entries = read_metadata(metadata) if metadata else None
    test_set = read_ids(excluded) if excluded else set()
    percentiles = LITERAL if literal_percentiles else CLIP
    # Folders from before these flags go on, too.
    if literal_percentiles:
        settings["percentiles"] = list(LITERAL)
    if not half_maps:
        settings["half_maps"] = False
    if test_set:
        settings["held_out"] = sorted(test_set)
    done = begin_or_continue(out, settings)

    # Sort the entries: ruled out by the metadata, prepared earlier, to prepare.
    rows = []
    todo = []
    for label, file in files.items():
        why = rejected(entries.get(label), max_resolution, half_maps) if metadata else ""
        if label in test_set:
            why = "held out by --held-out"
        if why:
            rows.append(dict(entry=label, file=file, skipped=why))
        elif label in done:
            rows.append(done[label])
        else:
            todo.append(file)
    say(f"{len(files)} maps: {len(rows)} done or ruled out, {len(todo)} to prepare")
    if not metadata:
        say("no --metadata, so resolution, method and half maps go unchecked")

    # Prepare the rest. Each row is on disk before the next map, so that a stopped run can go on.
    write_index(out, rows)
    how = (out, voxel_size, max_side, percentiles)
    began = said = time.monotonic()
    with open(out / INDEX, "a", newline="") as file:
        index = csv.DictWriter(file, COLUMNS.split(","))
        for n, row in enumerate(prepare_maps(todo, workers, *how), 1):
            rows.append(row)
            index.writerow(row)
            file.flush()

            # Say every ten seconds how far it is.
            now = time.monotonic()
            if now - said > 10 or n == len(todo):
                said = now
                seconds = (now - began) / n
                eta = timedelta(seconds=round(seconds * (len(todo) - n)))
                say(f"{n}/{len(todo)}  {1 / seconds:.2f} maps/s  ETA {eta}")

    say_summary(rows, out, say)
    return rows


def say_summary(rows: list[dict], out: Path, say) -> None:
    """Say how many entries were skipped for each reason, and how many were prepared."""
    # "not usable: why" counts as "not usable".
    reasons = Counter(row["skipped"].split(":")[0] for row in rows)
    taken = reasons.pop("", 0)
    for why, count in reasons.most_common():
        say(f"{count:6d} skipped: {why}")
    moved = sum(float(row.get("background") or 0) != 0 for row in rows)
    dark = sum(row.get("sign") == "-1" for row in rows)
    if moved or dark:
        say(f"{moved:6d} with a background that was subtracted, {dark} dark ones inverted")
    held = sum(row.get("split") == "test" for row in rows if not row["skipped"])
    say(f"{taken:6d} in {out}, {held} of them held out; reasons and statistics: {out / INDEX}")


# ---- The command --------------------------------------------------------------------------------


def parse(argv) -> argparse.Namespace:
    cli = argparse.ArgumentParser(description="Training data from EMDB and the PDB.")
    commands = cli.add_subparsers(required=True, dest="command")

    # maps
    one = commands.add_parser("maps", help="EMDB's maps -> a folder for train.py --data")
    one.add_argument("folder", help="holds emd_1234.map.gz and so on, at any depth")
    one.add_argument("out", help="folder for emd_1234.npy and index.csv")
    one.add_argument(
        "--voxel-size",
        type=float,
        default=1.5,
        help="Å (default: 1.5, as CryoFM-S; CryoFM-L 3, CryoLVM 1)",
    )
    one.add_argument("--metadata", help="CSV of EMDB's search; without it only maps are judged")
    one.add_argument("--max-side", type=float, default=576.0, help="Å (default: 576)")
    one.add_argument(
        "--literal-percentiles",
        action="store_true",
        help="clip to the 1st and 99th percentile, as CryoLVM's D.1 says literally",
    )
    one.add_argument(
        "--held-out",
        dest="excluded",
        metavar="LIST",
        help="text that names EMDB entries never to train on, such as a test set",
    )
    one.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes, each with three copies of a map in memory (default: one per core)",
    )

    # urls
    two = commands.add_parser("urls", help="where to download the maps that the metadata allow")
    two.add_argument("metadata", help="CSV of EMDB's search")
    for command in (one, two):
        command.add_argument(
            "--max-resolution",
            type=float,
            default=3.0,
            help="Å (default: 3, as CryoFM; CryoLVM 4)",
        )
        command.add_argument(
            "--half-maps",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="leave out entries without half maps, as CryoFM; CryoLVM: --no-half-maps",
        )

    # structures
    three = commands.add_parser("structures", help="PDB entries -> an archive of structures")
    three.add_argument("list", help="a table such as structures/val.tsv")
    three.add_argument("--from", dest="folder", help="take the files of this folder, no download")
    three.add_argument("-o", "--out", help="default: the list's name with .npz")
    three.add_argument("--overwrite", action="store_true", help="replace an archive that exists")

    # pairs
    pairs = commands.add_parser("pairs", help="maps and models -> those that CryoLVM learns from")
    pairs.add_argument("candidates", help="CSV: map, model, resolution, resolution_method")
    pairs.add_argument("--held-out", dest="excluded", metavar="LIST", help="as for maps")

    # emdb
    four = commands.add_parser("emdb", help="download maps of EMDB entries")
    four.add_argument("entries", nargs="+", help="EMD-1234 ..., or a .tsv with a column emdb")
    four.add_argument("folder", help="folder for emd_1234.map.gz")
    return cli.parse_args(argv)


def run() -> None:
    """`main`, which also explains a process that was killed."""
    try:
        main()
    except BrokenProcessPool:
        raise ValueError(
            "a process was killed, perhaps because memory ran out; "
            "give fewer --workers, and the same command goes on"
        ) from None


def main(argv=None) -> None:
    args = parse(argv)
    if args.command == "maps":
        settings = vars(args)
        del settings["command"]
        prepare(**settings)
    elif args.command == "structures":
        out = Path(args.out or Path(args.list).with_suffix(".npz"))
        folder = Path(args.folder) if args.folder else None
        read = [Path(args.list), *(folder.iterdir() if folder else ())]
        refuse_existing([out], read, args.overwrite)
        build_archive(args.list, out, folder)
    elif args.command == "emdb":
        fetch_maps(args.entries, args.folder)
    elif args.command == "pairs":
        choose_pairs(args.candidates, args.excluded, say)
    else:
        for label, row in read_metadata(args.metadata).items():
            if not rejected(row, args.max_resolution, args.half_maps):
                print(map_url(label.upper().replace("_", "-")))


if __name__ == "__main__":
    run_program("data_prepare.py", run, "stopped; the same command goes on")
