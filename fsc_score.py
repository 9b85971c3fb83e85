"""The command behind `python fsc.py`: how well two maps, or a map and an atomic model, agree.

`run` reads the files, compares them (fsc_agreement.py), adds what was asked for (directional FSC,
sharpening, local resolution) and writes PREFIX.json, .csv, .xml and .png. All files appear together
at the end.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from atoms import read_model
from files import AtomicOutputs, owned, refuse_existing, without_nan
from fsc import CONVENTIONS, fsc, resolution_words
from fsc_agreement import (
    Agreement,
    compare_half_maps,
    compare_with_model,
    compare_with_truth,
    directional_numbers,
    score_curves,
    sharpened_mean,
    without_background,
)
from fsc_half_maps import local_resolution, place_notes, shift_notes
from fsc_picture import draw_fsc
from fsc_tables import csv_table, emdb_xml, postprocess_star
from mrc import MAP_SUFFIXES, Map, read_map, stem, write_map
from terminal import one_line_for_memory, run_program, say
from volume import soft_mask

USAGE = """
  fsc.py half_1.mrc half_2.mrc [--mask mask.mrc]     two half maps
  fsc.py map.mrc --truth truth.mrc                   a map and what it should be
  fsc.py map.mrc --model model.pdb [--resolution 3]  a map and an atomic model (.pdb, .cif)"""

# Label and colour of each curve in the picture.
CURVES = {
    "corrected": ("corrected", "black"),
    "unmasked": ("unmasked", "green"),
    "masked": ("masked", "blue"),
    "randomised": ("phase-randomised", "red"),
    "map_model": ("map-model", "black"),
}


# ---- Tables and pictures


def table(scores: dict[str, dict], numbers: dict[str, float]) -> str:
    """What the program prints."""
    # One row per curve, then one per number.
    lines = [f"{'':14}{'FSC 0.143':>12}{'FSC 0.5':>12}{'FSC_AUC':>10}"]
    side = numbers["box"] * numbers["voxel_size"]
    for name, score in scores.items():
        at = [resolution_words(score[f"resolution_{t}"], side) for t in ("0143", "05")]
        lines.append(f"{name:14}{at[0]:>12}{at[1]:>12}{score['auc']:10.4f}")
    for name, number in numbers.items():
        unit = " Å²" if name.startswith("b_") else " Å"
        if name.startswith(("box", "atoms", "correlation", "sphericity", "cc_", "q_")):
            unit = ""
        lines.append(f"{name:24}{number:12.5g}{unit}")
    return "\n".join(lines)


def picture(frequency: list[float], found: Agreement, scores: dict):
    """A matplotlib figure of all curves. The legend gives their resolutions at the threshold."""
    from matplotlib.figure import Figure

    # Label and style of each curve.
    key = "resolution_0143" if found.threshold == 0.143 else "resolution_05"
    labelled, styles = {}, {}
    for name, curve in found.curves.items():
        label, color = CURVES[name]
        if name in scores:
            side = found.numbers["box"] * found.numbers["voxel_size"]
            label += f", {resolution_words(scores[name][key], side)}"
        labelled[label] = curve
        styles[label] = {"color": color, "lw": 2 if color == "black" else 1}

    # One panel.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    title = f"resolution at FSC = {found.threshold:g}"
    draw_fsc(figure.subplots(), frequency, labelled, styles, title)
    return figure


# ---- The command


def parse(argv=None) -> argparse.Namespace:
    about = "Prints a table; writes PREFIX.json, .csv, .xml (for EMDB) and .png."
    cli = argparse.ArgumentParser(usage=USAGE, description=about)
    add = cli.add_argument
    # What to compare.
    add("maps", nargs="+", metavar="MAP", help="one map, or two half maps")
    add("--truth", metavar="MAP", help="the map to compare with")
    add("--model", metavar="PDB", help="the atomic model to compare with")
    add("--mask", metavar="MAP", help="soft mask, 0 to 1; corrects the FSC of half maps")
    # How.
    add("--voxel-size", type=float, metavar="Å", help="instead of the headers'")
    add("--resolution", type=float, metavar="Å", help="for --model (default: its d_model)")
    add("--convention", choices=CONVENTIONS, default="ours", help="of shells and crossings")
    add("--seed", type=int, default=0, help="of the random phases")
    # What else to measure and write.
    add("--directional", action="store_true", help="FSC in cones of 20 degrees, and sphericity")
    add("--local-resolution", metavar="OUT", help="write the local resolution (Å, FSC 0.5)")
    add("--sharpen", metavar="OUT", help="write the mean half map, FSC-weighted and sharpened")
    add("--b-factor", type=float, metavar="Å²", help="for --sharpen, negative; default: fitted")
    # The files written.
    add("-o", "--out", metavar="PREFIX", help="of the files written (default: MAP_fsc)")
    add("--star", action="store_true", help="write RELION's postprocess table too")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--quiet", action="store_true", help="print nothing but errors")
    args = cli.parse_args(argv)

    # Shells expand ~ at the start of a word only, not in --out=~/x.
    args.maps = [os.path.expanduser(name) for name in args.maps]
    for name in ("truth", "model", "mask", "out", "sharpen", "local_resolution"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))

    if args.voxel_size is not None and not 0.1 <= args.voxel_size <= 100:
        raise ValueError(f"--voxel-size {args.voxel_size:g}: give 0.1 to 100 Å")

    # Refuse what would be ignored or makes no sense.
    halves = len(args.maps) == 2
    if len(args.maps) > 2 or halves + bool(args.truth) + bool(args.model) != 1:
        raise ValueError("give two half maps, or one map and --truth, or one map and --model")
    if not halves and (args.sharpen or args.local_resolution or args.star):
        raise ValueError("--sharpen, --local-resolution and --star want two half maps")
    if args.model and (args.mask or args.directional):
        raise ValueError("--mask and --directional want two maps")
    if args.resolution is not None and not (args.model and 0 < args.resolution < math.inf):
        raise ValueError("--resolution (Å, positive) goes with --model")
    if args.b_factor is not None and not args.sharpen:
        raise ValueError("--b-factor goes with --sharpen")
    return args


def output_paths(args: argparse.Namespace) -> dict[str, Path]:
    """All files to be written, by their ending, or for maps by their name."""
    # The tables and the picture begin with one prefix.
    first = Path(args.maps[0])
    prefix = args.out or first.parent / f"{stem(first)}_fsc"
    endings = [".json", ".csv", ".xml", ".png"]
    if args.model:
        endings.append("_residues.csv")
    if args.star:
        endings.append(".star")
    outputs = {ending: Path(f"{prefix}{ending}") for ending in endings}

    # The maps have names of their own.
    for name in filter(None, (args.sharpen, args.local_resolution)):
        if not name.lower().endswith(MAP_SUFFIXES):
            raise ValueError(f"{name}: no name of a map; give one that ends in .mrc")
        outputs[name] = Path(name)
    if args.sharpen and args.sharpen == args.local_resolution:
        raise ValueError("--sharpen and --local-resolution name one file; give two")
    return outputs


def read_maps(paths: list[str], voxel_size: float | None) -> list[Map]:
    """Maps, which must share one grid. voxel_size in Å replaces the headers'."""
    # All must have the shape of the first map, and its voxels to 1 %.
    maps = [read_map(path, voxel_size) for path in paths]
    shape, voxels = maps[0].density.shape, maps[0].voxel_size
    for path, m in zip(paths, maps):
        same_voxels = all(abs(v / w - 1) <= 0.01 for v, w in zip(m.voxel_size, voxels))
        if m.density.shape != shape or not same_voxels:
            raise ValueError(
                f"{path}: {tuple(m.density.shape)} voxels of {m.voxel_size} Å, but {paths[0]} has "
                f"{tuple(shape)} of {voxels}; bring them onto one grid (or give --voxel-size)"
            )
    return maps


def measure(args: argparse.Namespace, maps: list[Map]) -> Agreement:
    """Compare as the flags ask. What was asked for besides is in `numbers` and `maps`."""
    # The shells of voxels that are cubes are the same for every axis.
    densities = [m.density for m in maps]
    voxel_size = maps[0].voxel_size
    if max(voxel_size) < 1.001 * min(voxel_size):
        voxel_size = voxel_size[0]  # one number for cubes
    elif args.sharpen or args.local_resolution:
        raise ValueError(
            f"{args.maps[0]}: voxels of {voxel_size} Å; --sharpen and --local-resolution want cubes"
        )

    # The comparison.
    how = {"voxel_size": voxel_size, "convention": args.convention}
    if args.model:
        model, corner = read_model(args.model), maps[0].corner
        return compare_with_model(*densities, model, corner=corner, d_min=args.resolution, **how)
    a, b, *mask = densities
    # Masks and windows would take a background for density that both maps share.
    a, b, notes = without_background(a, b)
    if mask:
        how["mask"], mask_notes = soft_mask(mask[0], args.mask)
        notes += mask_notes
    if args.truth:
        found = compare_with_truth(a, b, **how)
    else:
        found = compare_half_maps(a, b, seed=args.seed, **how)
        notes += place_notes(*maps[:2]) + shift_notes(a, b)
    found.notes += notes

    # What else was asked for.
    numbers = found.numbers
    if args.directional:
        numbers |= directional_numbers(a, b, voxel_size)
    if args.sharpen:
        # The filter has our shells, so it needs a curve on them.
        curve = fsc(a, b) if args.convention == "cryofm" else next(iter(found.curves.values()))
        # The map ends at its resolution, so that one must be known.
        if (curve.isnan() & ~found.curves.get("masked", curve).isnan()).any():
            raise ValueError(
                f"--sharpen: the FSC under {args.mask} cannot be corrected, so that no resolution "
                "is known; give a softer or wider mask"
            )
        if not (curve[1:].nan_to_num() >= 0.143).any():
            raise ValueError("--sharpen: the half maps agree in no shell, so that nothing is left")
        sharp, b_factor = sharpened_mean(a, b, curve, voxel_size, args.b_factor)
        if sharp.std() <= 1e-6 * sharp.abs().max():
            raise ValueError("--sharpen: nothing is left of the map; give another --b-factor")
        numbers["b_factor"] = b_factor
        label = f"cryofm fsc.py --sharpen, B-factor {b_factor:.1f}"
        found.maps[args.sharpen] = replace(maps[0], density=sharp), label
    if args.local_resolution:
        local = local_resolution(a, b, voxel_size)
        numbers["local_resolution_median"] = float(local.median())
        label = "cryofm fsc.py --local-resolution, in angstrom"
        found.maps[args.local_resolution] = replace(maps[0], density=local), label
    return found


def write_results(outputs: dict[str, Path], found: Agreement, scores: dict, settings: dict) -> None:
    """Write maps, tables, picture and .json. Without matplotlib there is no picture."""
    numbers = found.numbers

    # The curves, shell by shell.
    shells = list(range(numbers["box"] // 2 + 1))
    frequency = [k / (numbers["box"] * numbers["voxel_size"]) for k in shells]
    angstrom = [1 / f if f else math.inf for f in frequency]
    columns = {"shell": shells, "per_angstrom": frequency, "angstrom": angstrom}
    columns |= {name: curve.tolist() for name, curve in found.curves.items()}
    texts = {".csv": csv_table(columns), ".xml": emdb_xml(columns, next(iter(found.curves)))}
    if ".star" in outputs:
        best = scores.get("corrected", scores["unmasked"])["resolution_0143"]
        texts[".star"] = postprocess_star(columns, best)
    if found.residues:
        labels = ("residue", "atoms", "q_score")
        texts["_residues.csv"] = csv_table(dict(zip(labels, zip(*found.residues))))

    # The picture.
    try:
        figure = picture(frequency, found, scores)
    except ImportError:
        figure = None
        del outputs[".png"]
        found.notes.append("no picture: pip install matplotlib")

    # Everything else.
    facts = {"command": sys.argv, "torch": torch.__version__, "settings": settings}
    facts |= {"notes": found.notes} | scores | numbers
    texts[".json"] = json.dumps(without_nan(facts), indent=1) + "\n"

    # The names appear together when the block ends.
    with AtomicOutputs() as files:
        for name, (map, label) in found.maps.items():
            write_map(name, map, settings["overwrite"], label, files.open)
        for ending, text in texts.items():
            with files.open(outputs[ending]) as file:
                file.write(text.encode())
        if figure:
            with files.open(outputs[".png"]) as file:
                figure.savefig(file, dpi=150, format="png")


def run(args: argparse.Namespace) -> None:
    # Check all names before the work.
    map_names = [name for name in (*args.maps, args.truth, args.mask) if name]
    model_names = [args.model] if args.model else []
    outputs = output_paths(args)
    inputs = [Path(name) for name in map_names + model_names]
    refuse_existing(list(outputs.values()), inputs, args.overwrite)

    # Compare and write.
    hint = "crop or bin the maps"
    with owned(outputs.values()), one_line_for_memory(hint):
        maps = read_maps(map_names, args.voxel_size)
        found = measure(args, maps)
        # Each note once, also where a map is compared with itself.
        found.notes += dict.fromkeys(f"{map.path}: {note}" for map in maps for note in map.notes)
        scores = score_curves(found, args.convention)
        settings = vars(args)
        write_results(outputs, found, scores, settings)
    if args.quiet:
        return

    # Print.
    flags = ("truth", "model", "mask", "convention")
    say(*args.maps, *(f"--{flag} {settings[flag]}" for flag in flags if settings[flag]))
    say(table(scores, found.numbers))
    for note in found.notes:
        say("note:", note)
    best = outputs.get(".png", outputs[".json"])
    names = ", ".join(str(path) for path in outputs.values())
    say(f"wrote {names}; open {best}")


def main(argv=None) -> None:
    run_program("fsc.py", lambda: run(parse(argv)))
