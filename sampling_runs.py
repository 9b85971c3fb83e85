"""Which files a command of sampling.py reads and writes. All is known before any work is done.

    wedge IN.mrc                     IN_wedge.mrc
    denoise half_1.mrc half_2.mrc    half_mean_denoise.mrc, because it is neither half 1 nor half 2
    generate                         generate.mrc
    wedge FOLDER                     a run for every map in it
    denoise FOLDER                   a run for every pair of half maps in it

Results of an earlier run and truths that lie in a folder are no inputs.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import mrc
from files import list_files


class Run(NamedTuple):
    """The maps that one run of a task reads, and the map that it writes first."""

    inputs: list[Path]
    out: Path


# The names of half maps: half1, half_2, half_map_1, half-A.
HALF = re.compile(r"(half[ _.-]?(?:map)?[ _.-]?)([12ab])(?![0-9a-z])", re.IGNORECASE)


def plan_runs(task: str, paths: list[Path], out: str | None, suffixes, halves: bool, say=print):
    """The runs of a command: a list of `Run`.

    suffixes: of the maps that a run writes. halves: whether a run takes half maps.
    Raises ValueError for a folder without maps, and if two runs would share one output.
    """
    # Half maps that were named belong to one run, every other map has its own.
    groups = []
    if not paths or (halves and not any(path.is_dir() for path in paths)):
        groups = [paths]
    elif halves:
        if len(paths) > 1:
            raise ValueError("give two half maps, or one folder with pairs of them")
        groups = find_pairs(maps_of_folder(paths[0], task, suffixes), paths[0], say)
    else:
        for path in paths:
            found = maps_of_folder(path, task, suffixes) if path.is_dir() else [path]
            groups += [[file] for file in found]

    # Without -o the result lies beside its first input. A folder stands for that name in it.
    folder = Path(out) if out and Path(out).is_dir() else None
    if out and folder is None:
        if out.endswith("/"):
            raise ValueError(f"-o {out}: no such folder; make it first")
        if len(groups) > 1:
            raise ValueError(f"-o {out}: for {len(groups)} inputs give an existing folder")
    runs = []
    for group in groups:
        default = default_output(task, group)
        if out is None:
            runs.append(Run(group, default))
        else:
            runs.append(Run(group, folder / default.name if folder else Path(out)))
    if len({run.out for run in runs}) < len(runs):
        raise ValueError("two inputs have the same name and share one output; run them apart")
    return runs


def maps_of_folder(folder: Path, task: str, suffixes: Iterable[str]) -> list[Path]:
    """The maps of a folder without truths and results of an earlier run."""
    ours = ("_truth", *(f"_{task}{end}" for end in suffixes))
    found = list_files(folder, mrc.MAP_SUFFIXES)
    found = [file for file in found if not mrc.stem(file).endswith(ours)]
    if not found:
        raise ValueError(f"{folder}: no map ({', '.join(mrc.SUFFIXES)}) in this folder")
    return found


def find_pairs(files: list[Path], folder: Path, say=print) -> list[list[Path]]:
    """The pairs of half maps among files, by their names; says which files are left out."""
    # Two halves have one name but for the number or letter of the half.
    pairs: dict[str, list[Path]] = {}
    for file in files:
        if match := HALF.search(file.name):
            kind = "number" if match[2].isdigit() else "letter"
            key = f"{file.name[: match.start(2)]}{kind}{file.name[match.end(2) :]}"
            pairs.setdefault(key, []).append(file)
    complete = [pair for pair in pairs.values() if len(pair) == 2]
    if not complete:
        raise ValueError(f"{folder}: no pair of half maps (names with half_1 and half_2)")

    taken = {file for pair in complete for file in pair}
    for file in files:
        if file not in taken:
            say(f"{file}: no half of a pair, left out")
    return complete


def default_output(task: str, inputs: list[Path]) -> Path:
    """The name of a result that was not given one."""
    if not inputs:
        return Path(f"{task}.mrc")
    stems = [mrc.stem(path) for path in inputs]
    if len(stems) == 1:
        return inputs[0].with_name(f"{stems[0]}_{task}.mrc")

    # The mean of two maps: what both names share, and "mean" where they differ.
    start = os.path.commonprefix(stems)
    rests = [stem[len(start) :] for stem in stems]
    end = os.path.commonprefix([rest[::-1] for rest in rests])[::-1]
    # A number is not cut apart: half_11 and half_12 are not half_1.
    start = re.sub(r"[ _.-]*\d*$", "", start)
    end = re.sub(r"^\d*[ _.-]*", "", end)
    words = [word for word in (start, "mean", end, task) if word]
    return inputs[0].with_name("_".join(words) + ".mrc")


def names_of_maps(out: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """The file of each suffix: beside out, with its ending (.mrc, .map.gz)."""
    stem = mrc.stem(out)
    ending = out.name[len(stem) :]
    return {suffix: out.with_name(f"{stem}{suffix}{ending}") for suffix in suffixes}


def truth_beside(source: Path) -> Path:
    return source.with_name(f"{mrc.stem(source)}_truth.mrc")


def label_of(task: str, method: str | None, ckpt: Path, sha256: str) -> str:
    """What the header of a result says about its origin: at most 80 characters."""
    if method in ("pocs", "wiener", "classical"):
        return f"cryofm sampling.py {task} {method}"
    return f"cryofm sampling.py {task} {ckpt.stem[:36]} {sha256[:8]}"
