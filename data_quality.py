"""Which pairs of a deposited map and its model CryoLVM learns from, and for how many steps.

    python data_prepare.py pairs FOLDER/candidates.csv --held-out IDS    # writes FOLDER/pairs.csv

A candidate becomes a pair if it breaks none of these rules of CryoLVM's appendix D.1:

    1  the model holds more than its backbone
    2  it has no unknown residues
    4  the axes of the map are orthogonal
    5  the resolution is given by the FSC at 0.143 (a column resolution_method says so)

Departure 1: rule 3, no missing chain, is not checked, because files do not tell. Rule 6, no chain
with more than 30 % sequence identity to one of the test set, needs a program such as MMseqs2. Give
the entries that it finds by --held-out.

Table 4 trains for 500 epochs. An epoch shows every window of 48^3 voxels of 1 Å, one every 24
voxels (appendix E). train.py counts steps, so `pairs` says how many steps that would be.
"""

import csv
import io
import math
import re
from pathlib import Path

import volume
from atoms_records import Atom, read_atoms
from files import atomic_write, entry_of
from mrc import Map, read_map, resample_map

# What data_pairs.py reads.
PAIRS = "pairs.csv"
COLUMNS = ("map", "model", "resolution")

# How CryoLVM is fine-tuned.
EPOCHS = 500  # Table 4
BATCH = 32  # appendix E; Table 4 has 35 per process
WINDOW = 48  # Å, Table 4
STRIDE = 24  # Å, Table 4

# Names of atoms and of residues in PDB and mmCIF files.
BACKBONE = {"N", "CA", "C", "O", "OXT"}
UNKNOWN = {"UNK", "N", "DN"}  # an amino acid, a nucleotide of RNA, of DNA


def read_ids(path: str | Path) -> set[str]:
    """The EMDB entries that a text file names, as emd_1234.

    They are written EMD-1234 or emd_1234 anywhere, or as a number alone on its line.
    Raises OSError without the file, ValueError if it names none.
    """
    # A list may be plain text, or a table with other columns.
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    numbers = re.findall(r"emd[-_](\d+)", text, re.IGNORECASE)
    numbers += re.findall(r"^\s*(\d+)\s*$", text, re.MULTILINE)
    if not numbers:
        raise ValueError(f"{path}: names no entry of the EMDB, such as EMD-1234")
    return {f"emd_{number}" for number in numbers}


def model_problem(atoms: list[Atom]) -> str:
    """Which of rules 1 and 2 a model breaks; "" for none."""
    # Rule 1. Glycine has no side chain. Nucleotides have no atom CA.
    protein = {atom.residue for atom in atoms if atom.polymer and atom.name == "CA"}
    names = {
        atom.name for atom in atoms if atom.residue in protein and atom.element not in ("H", "D")
    }
    if protein and names <= BACKBONE:
        return "rule 1: backbone atoms only"

    # Rule 2.
    unknown = {atom.residue for atom in atoms if atom.polymer and atom.residue_name in UNKNOWN}
    return f"rule 2: {len(unknown)} unknown residues" if unknown else ""


def windows(shape, voxel_size) -> int:
    """How many windows of Table 4 a map has. voxel_size: Å, as (z, y, x)."""
    # The map at 1 Å per voxel, padded to one window at least.
    sides = [max(round(n * v), WINDOW) for n, v in zip(shape, voxel_size)]
    return len(volume.tile_starts(sides, WINDOW, STRIDE))


def steps_of_epochs(count: int, batch: int = BATCH, epochs: int = EPOCHS) -> int:
    """Optimiser steps that show `count` windows `epochs` times, `batch` at a time."""
    return epochs * math.ceil(count / batch)


def on_training_grid(map: Map, voxel_size: float) -> Map:
    """The map at the voxel size (Å) of a data set.

    Raises ValueError if its own voxels are over twice as large: a network would learn the blur.
    """
    coarsest = max(map.voxel_size)
    if coarsest > 2.01 * voxel_size:
        raise ValueError(
            f"voxels of {coarsest:.4g} Å hold none of the detail of {voxel_size:g} Å per voxel; "
            "leave it out, or give a larger --voxel-size"
        )
    return resample_map(map, voxel_size)  # a low-pass, too


def candidate_problem(row: dict, folder: Path, held_out: set[str]) -> tuple[str, int]:
    """(why a row of the candidates makes no pair, 0), or ("", its number of windows)."""
    # What the lists say. emd_1234_box.mrc is still EMD-1234.
    entry = re.match(r"emd_\d+", entry_of(Path(row["map"])))
    if entry and entry[0] in held_out:
        return "held out by --held-out", 0
    if "0.143" not in row.get("resolution_method", "0.143"):
        return "rule 5: resolution not by the FSC at 0.143", 0

    # The files themselves. Rule 4 is one of `read_map`.
    try:
        map = read_map(folder / row["map"])
        problem = model_problem(read_atoms(folder / row["model"], []))
    except (ValueError, OSError) as error:
        return f"unreadable or rule 4: {error}", 0
    return problem, 0 if problem else windows(map.density.shape, map.voxel_size)


def choose_pairs(candidates: str | Path, held_out: str | Path | None, say=print) -> Path:
    """Write the candidates that break no rule to pairs.csv beside them; the path of it.

    candidates: a CSV with the columns map, model and resolution (Å), and perhaps
    resolution_method. held_out: a file for `read_ids`. say: gets a line per candidate left out.
    Raises OSError if pairs.csv exists, OSError or ValueError for a list that cannot be read.
    """
    # Look at the lists before the maps.
    candidates = Path(candidates)
    out = candidates.with_name(PAIRS)
    if out.exists():
        raise FileExistsError(f"{out}: exists; move it, or name the candidates otherwise")
    excluded = read_ids(held_out) if held_out else set()
    with open(candidates, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, restval="")
        columns = table.fieldnames or []
        rows = list(table)
    missing = set(COLUMNS) - set(columns)
    if missing:
        raise ValueError(f"{candidates}: no column {', '.join(sorted(missing))}")
    if "resolution_method" not in columns:
        say(f"{candidates}: no column resolution_method, so rule 5 goes unchecked")
    say("rules 3 (missing chains) and 6 (sequence identity) go unchecked")

    # Judge one candidate after the other.
    chosen = []
    count = 0
    for row in rows:
        problem, found = candidate_problem(row, candidates.parent, excluded)
        if problem:
            say(f"{row['map']}: {problem}")
        else:
            chosen.append(row)
            count += found
    if not chosen:
        raise ValueError(f"{candidates}: no candidate is left")

    # Write those that are left.
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    table.writeheader()
    table.writerows(chosen)
    with atomic_write(out) as file:
        file.write(text.getvalue().encode())

    # Say how long CryoLVM would train on them.
    say(f"{out}: {len(chosen)} of {len(rows)} pairs, {count} windows of {WINDOW}^3 voxels of 1 Å")
    steps = steps_of_epochs(count)
    say(f"{EPOCHS} epochs with a batch of {BATCH} (CryoLVM, Table 4) are --steps {steps}")
    return out
