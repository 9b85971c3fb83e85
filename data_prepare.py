"""EMDB maps and PDB structures -> what training reads: `python data_prepare.py maps`.

(Equations and departures of the file that this one came from; keep what belongs here.)
Density maps: files, grids, grey scale, crops, rotations, tiles, batches; `python data.py prepare` for EMDB's.

    r_i = origin + (nstart + i) v                      position of voxel i, v the voxel size      (1)
    n' = round(n v / v_wanted),  v' = n v / n'         a new grid over the same box               (2)
    f'_k = f_k for |k| < min(n, n') / 2, else 0        f_k = 1/n sum_i x_i exp(-2 pi i k i / n)   (3)
    x = (clip(density, 0, p) / p - mean) / std         p the 99.999 percentile: network scale     (4)
    rotated(r) = density(R r)                          r = (x, y, z) from the centre of the box   (5)
    M = sum_k w y_k / sum_k w                          tiles y_k blended under the window w       (6)

Volumes are float32 (D, H, W) = (z, y, x), lengths Å; voxel_size, origin and nstart are triples in
that same order (z, y, x). (1): MRC2014, Cheng et al. 2015, J. Struct. Biol. 192:146. (2), (3):
band-limited interpolation, voxel 0 stays in place and values keep their scale. (4): CryoFM
(arXiv:2410.08631) §4.2, clipping as in its release; crops and rotations: its appendix F.1.
(6): CryoLVM, appendix D.2, Algorithm 1.
Departure 1: how F.1 dilates the mask of random crops is not stated; we use a 3^3 cube, three times.
Departure 2: the release turns a whole map, applies (4) again and crops it. We apply (4) once, choose the
middle of the crop first and turn no more than the crop shows: a crop of 64^3 from a map of 384^3 costs
4 MB of reading instead of 113 MB, and 216 times fewer interpolated voxels.
Departure 3: D.2 gives no sigma for the blending window; we use a quarter of the tile.
Departure 4: 4.1 removes helices and "problematic cases" by eye; `RULES` goes by method and title.
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
import sys
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

from files import atomic_write
from mrc import read_map, resample_map
from volume import cube

INDEX, SETTINGS = "index.csv", "settings.json"          # in the folder, beside emd_1234.npy, ...

COLUMNS = ("entry", "skipped", "split", "box", "voxel_size", "maximum", "mean", "std", "filled", "file")

# What of CryoFM section 4.1 a program can apply to an entry: column of the metadata, the entry stays
# if; or why not. Columns are those of EMDB's search (README); 4.1's last rule needs the map itself.
RULES = (
    ("resolution", lambda text, limit: re.fullmatch(r"\d+\.?\d*", text) and 0 < float(text) < limit,
     "resolution not stated, or not better than asked"),
    ("structure_determination_method",
     lambda text, _: re.sub("[^a-z]", "", text.lower()) == "singleparticle", "not single particle"),
    ("half_map_filename", lambda text, _: text, "no half maps"),
    ("title", lambda text, _: not re.search("helical|filament|fibril|microtubule", text, re.I),
     "helical, by its title"),
)


def held_out(label: str) -> bool:
    """Whether a map is never trained on: one in twenty, by the hash of its name."""
    return zlib.crc32(label.encode()) % 20 == 0


def read_metadata(path: str | Path) -> dict[str, dict]:
    """emd_1234 -> its row of a CSV that EMDB's search has exported: `emdb_id` and the columns of RULES.

    Raises OSError without the file, ValueError if a column is missing or an id is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text; wanted is a CSV of EMDB's search") from None
    table = csv.DictReader(io.StringIO(text, newline=""))
    wanted = ["emdb_id", *(column for column, _, _ in RULES)]
    if missing := set(wanted) - set(table.fieldnames or ()):
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; export {','.join(wanted)}")
    rows = {(row["emdb_id"] or "").strip().lower().replace("-", "_"): row for row in table}
    for label in rows:
        if not re.fullmatch(r"emd_\d+", label):
            raise ValueError(f"{path}: emdb_id {label!r} is none; they look like EMD-1234")
    return rows


def rejected(row: dict, max_resolution: float) -> str:
    """Why an entry of the metadata is left out; "" if it is not."""
    return next((why for column, keep, why in RULES
                 if not keep((row[column] or "").strip(), max_resolution)), "")


def read_index(folder: Path) -> list[dict]:
    """The rows of a prepared folder: one for each entry, with its statistics or why it was skipped."""
    if not (folder / INDEX).exists():
        return []
    with open(folder / INDEX, newline="") as file:      # a run that was killed may have left half a row
        return [row for row in csv.DictReader(file) if row["file"] is not None]


def prepare_one(file: Path, out: Path, voxel_size: float, max_side: float) -> dict:
    """One map -> out/emd_1234.npy, float16 (n, n, n) on 0..1; returns its row of the index."""
    label = file.name.split(".")[0].lower()
    row = dict(entry=label, file=file, split="test" if held_out(label) else "train")
    try:
        map = read_map(file)
        side = max(n * v for n, v in zip(map.density.shape, map.voxel_size))
        if side > max_side:
            return dict(row, skipped=f"side longer than {max_side:g} Å")
        map = resample_map(map, voxel_size)                 # a low-pass too: see (3)
        x, statistics = cube(map.density)
    except (ValueError, OSError) as error:
        return dict(row, skipped=f"unreadable: {error}")
    with atomic_write(out / f"{label}.npy") as target:
        np.save(target, x.numpy())
    statistics = {name: f"{value:.5g}" for name, value in statistics.items()}
    return dict(row, skipped="", box=len(x), voxel_size=" ".join(f"{v:.5f}" for v in map.voxel_size), **statistics)


def prepare(folder: str | Path, out: str | Path, voxel_size: float, metadata: str | Path | None = None,
            max_resolution: float = 3.0, max_side: float = 576.0, workers: int = 1, say=print) -> list[dict]:
    """The entries' maps below `folder` (emd_1234.map.gz, ...) -> the folder `out`, which train.py reads.

    Each is curated (4.1: RULES where there is metadata, max_side in Å), brought to voxel_size (Å) by
    (2) and (3), clipped and normalised, (4) on 0..1, padded to a cube and stored as float16. The index
    has a row for each, with its statistics, or why it was skipped. A run that was stopped goes on
    where it was; maps that were skipped are looked at again. Returns the rows.
    Raises ValueError and OSError for folders, metadata and disks that will not do; one map never stops it.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    name = re.compile(r"emd_\d+\.(map|mrc|ccp4)(\.gz|\.bz2)?", re.I)          # no half maps, no masks
    files = {file.name.split(".")[0].lower(): file for file in sorted(folder.rglob("*")) if name.fullmatch(file.name)}
    if not files:
        raise ValueError(f"{folder}: no map of an EMDB entry, emd_1234.map.gz or the like, here or below")
    if not (0 < voxel_size < math.inf and workers >= 1):
        raise ValueError(f"--voxel-size {voxel_size:g}, --workers {workers}: want a positive number of Å and a worker or more")
    entries = None if metadata is None else read_metadata(metadata)
    settings = dict(voxel_size=voxel_size, max_resolution=max_resolution, max_side=max_side)
    out.mkdir(parents=True, exist_ok=True)
    if (out / SETTINGS).exists() and (before := json.loads((out / SETTINGS).read_text())) != settings:
        raise ValueError(f"{out}: begun with {before}; give these, or another folder")
    (out / SETTINGS).write_text(json.dumps(settings))

    rows, todo = [], []
    done = {row["entry"]: row for row in read_index(out) if not row["skipped"] and (out / f"{row['entry']}.npy").exists()}
    for label, file in files.items():
        why = ""
        if entries is not None:
            why = rejected(entries[label], max_resolution) if label in entries else "not in the metadata"
        if why:
            rows.append(dict(entry=label, file=file, skipped=why))
        elif label in done:
            rows.append(done[label])
        else:
            todo.append(file)
    say(f"{len(files)} maps: {len(rows)} done or ruled out, {len(todo)} to prepare"
        + ("" if metadata else "; no --metadata, so resolution, method and half maps go unchecked"))

    with open(out / (INDEX + ".new"), "w", newline="") as file:
        index = csv.DictWriter(file, COLUMNS)
        index.writeheader()
        index.writerows(rows)
        file.flush()
        os.replace(file.name, out / INDEX)              # and the rows to come are appended to it
        began = said = time.monotonic()
        for n, row in enumerate(_prepared(todo, workers, out, voxel_size, max_side), 1):
            rows.append(row)
            index.writerow(row)
            file.flush()
            now = time.monotonic()
            if now - said > 10 or n == len(todo):
                eta, said = timedelta(seconds=round((now - began) / n * (len(todo) - n))), now
                skipped = sum(bool(row["skipped"]) for row in rows)
                say(f"{n}/{len(todo)}  {n / (now - began):.2f} maps/s  ETA {eta}  {skipped} skipped")
    taken = [row for row in rows if not row["skipped"]]
    for why, count in Counter(row["skipped"].split(":")[0] for row in rows if row["skipped"]).most_common():
        say(f"{count:6d} skipped: {why}")
    say(f"{len(taken):6d} in {out}, {sum(row['split'] == 'test' for row in taken)} of them held out; reasons and "
        f"statistics: {out / INDEX}")
    return rows


def _prepared(files: list[Path], workers: int, *settings) -> Iterable[dict]:
    """The rows of prepare_one for each file, as they come from that many processes."""
    if workers == 1:
        yield from (prepare_one(file, *settings) for file in files)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        for future in as_completed([pool.submit(prepare_one, file, *settings) for file in files]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C: each finishes its map


def main(argv=None) -> None:
    """`prepare` and `urls`; see the README for EMDB's side of it."""
    cli = argparse.ArgumentParser(description="Training maps from EMDB's.")
    commands = cli.add_subparsers(required=True, dest="command")
    one = commands.add_parser("prepare", help="deposited maps -> a folder for train.py --data",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("folder", help="holds emd_1234.map.gz and so on, at any depth")
    one.add_argument("out", help="folder for emd_1234.npy and index.csv")
    one.add_argument("--voxel-size", type=float, default=1.5, help="Å; CryoFM-S 1.5, CryoFM-L 3, CryoLVM 1")
    one.add_argument("--metadata", help="CSV of EMDB's search; without it only the maps themselves are judged")
    one.add_argument("--max-side", type=float, default=576.0, help="Å")
    one.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; each holds three copies of a map")
    two = commands.add_parser("urls", help="where to download the maps that the metadata do not rule out")
    two.add_argument("metadata", help="CSV of EMDB's search")
    for command in (one, two):
        command.add_argument("--max-resolution", type=float, default=3.0, help="Å; CryoFM 3, CryoLVM 4")
    args = vars(cli.parse_args(argv))
    if args.pop("command") == "prepare":
        prepare(**args)
        return
    for label, row in read_metadata(args["metadata"]).items():
        if not rejected(row, args["max_resolution"]):
            print(f"https://ftp.ebi.ac.uk/pub/databases/emdb/structures/{label.upper().replace('_', '-')}/map/{label}.map.gz")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))       # its processes end as with Ctrl-C
    try:
        main()
    except BrokenProcessPool:
        sys.exit("data_prepare.py: a process was killed, out of memory perhaps; fewer --workers, and the same command goes on")
    except (ValueError, OSError) as error:
        sys.exit(f"data_prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data_prepare.py: stopped; the same command goes on")
