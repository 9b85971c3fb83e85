"""The command behind `python fsc.py`: how well two maps, or a map and an atomic model, agree.

    compare_half_maps     FSC of two half maps, corrected for a mask
    compare_with_truth    FSC of a map with what it should be
    compare_with_model    FSC, correlations and Q-scores of a map with an atomic model

Each takes tensors and returns an `Agreement`. `run` reads the files, adds what was asked for
(directional FSC, sharpening, local resolution) and writes PREFIX.json, .csv, .xml and .png. All
files appear together at the end.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from atoms import Model, atoms_inside, read_model
from atoms_records import SYMBOLS
from files import AtomicOutputs, owned, refuse_existing, without_nan
from fsc import CONVENTIONS, auc, fsc, resolution, shell_side
from fsc_half_maps import (
    directional_fsc,
    guinier_b_factor,
    local_resolution,
    masked_fsc,
    match_half_maps,
    place_notes,
    sharpen,
    sphericity,
)
from fsc_model import correlation, has_factors, map_model_cc, q_score, structure_factors
from fsc_mtriage import map_model_resolution
from fsc_picture import draw_fsc
from fsc_tables import csv_table, emdb_xml, postprocess_star
from mrc import MAP_SUFFIXES, Map, read_map, stem, write_map
from terminal import one_line_for_memory, run_program, say
from volume import find_grey_scale, soft_mask

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


@dataclass
class Agreement:
    """What a comparison found.

    numbers: in the order to print, lengths in Å. "box" and "voxel_size" are those of the side that
    makes the shells. curves: FSC (box//2 + 1,) by name, the best one first. residues: (label,
    number of atoms, mean Q-score) each. threshold: of the FSC, the usual one for such maps.
    maps: to write, by the name of the file, each with the label for its header.
    """

    numbers: dict[str, float]
    curves: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    residues: list[tuple] = field(default_factory=list)
    threshold: float = 0.5
    maps: dict[str, tuple[Map, str]] = field(default_factory=dict)


# ---- The three comparisons. Maps and masks are (D, H, W); a mask goes from 0 to 1; lengths in Å.


def compare_half_maps(half_map_1, half_map_2, voxel_size, mask=None, convention="ours", seed=0):
    """`Agreement` of two half maps: FSC, corrected for the mask if there is one.

    seed: of the random phases. Raises ValueError if the maps are equal or the mask does not fit.
    """
    if torch.equal(half_map_1, half_map_2):
        raise ValueError("both files hold the same map; give two independent half maps")
    # An FSC does not see a factor, but it has to be said.
    _, notes = match_half_maps(half_map_1, half_map_2)
    how = {"convention": convention, "voxel_size": voxel_size}
    box, voxel = shell_side(half_map_1.shape, voxel_size, convention)
    found = Agreement({"box": box, "voxel_size": voxel}, {}, notes, threshold=0.143)
    if mask is None:
        found.curves["unmasked"] = fsc(half_map_1, half_map_2, **how)
        return found

    # Four curves, and the shell from which on phases were random.
    *curves, first_random = masked_fsc(half_map_1, half_map_2, mask, seed=seed, **how)
    found.curves |= zip(("corrected", "unmasked", "masked", "randomised"), curves)
    found.numbers["phases_randomised_from"] = box * voxel / first_random

    # A tight mask correlates by itself, more than the correction can take out.
    corrected, _, masked, randomised = curves
    found.notes += mask_notes(corrected, randomised, voxel, box, convention)
    lost = corrected.isnan() & ~masked.isnan()
    if lost.any():
        found.notes.append(
            f"corrected: nan in {int(lost.sum())} shells where the mask alone correlates too much "
            "to be corrected, so no resolution and no FSC_AUC; use a softer or wider mask"
        )
    return found


def mask_notes(curve, randomised, voxel_size, box, convention) -> list[str]:
    """A note if the mask alone correlates over 0.1 at the resolution of the curve (n,)."""
    end = box * voxel_size / resolution(curve, voxel_size, box=box, convention=convention)
    at_end = float(randomised[(torch.arange(len(randomised)) - end).abs().argmin()])
    if not at_end > 0.1:
        return []
    correlates = f"the mask alone correlates {at_end:.2f} at the resolution"
    return [f"{correlates}: use a softer or wider mask"]


def compare_with_truth(density, truth, voxel_size, mask=None, convention="ours"):
    """`Agreement` of a map with what it should be: FSC and correlation.

    The two are not independent, so the FSC is not corrected for the mask.
    """
    how = {"convention": convention, "voxel_size": voxel_size}
    box, voxel = shell_side(density.shape, voxel_size, convention)
    numbers = {"box": box, "voxel_size": voxel, "correlation": correlation(density, truth)}
    if mask is None:
        return Agreement(numbers, {"unmasked": fsc(density, truth, **how)})
    # Only the two curves that no correction has changed.
    curves = masked_fsc(density, truth, mask, **how)
    notes = mask_notes(curves.masked, curves.randomised, voxel, box, convention)
    return Agreement(numbers, {"masked": curves.masked, "unmasked": curves.unmasked}, notes)


def compare_with_model(density, model: Model, voxel_size, corner, d_min=None, convention="ours"):
    """`Agreement` of a map with an atomic model: FSC, resolutions, correlations and Q-scores.

    corner: the centre of voxel (0, 0, 0) in the frame of the model; d_min: the resolution of the
    correlations, default d_model. Atoms without scattering factors are left out, which a note says.
    Raises ValueError if no atom lies in the map.
    """
    # The atoms in the map.
    inside = atoms_inside(model.xyz, density.shape, voxel_size, corner)
    if not inside.any():
        raise ValueError("no atom lies in the map; bring the model into the frame of the map")
    known = has_factors(model.atomic_number)
    used = inside & known
    if not (model.occupancy[used] > 0).any():
        raise ValueError(
            f"none of the {int(inside.sum())} atoms in the map has scattering factors and an "
            "occupancy above 0; correct the model"
        )
    notes = left_out(model, inside, known)

    # Leave out the others, and give the rest to each measure.
    model = Model(*(x[used] for x in model[:5]), model.labels)
    grid = {"voxel_size": voxel_size, "origin": corner}
    atoms = {name: getattr(model, name) for name in model._fields[:4]} | grid
    residue, labels = model.residue, model.labels

    # The resolution, and the correlations there.
    box, voxel = shell_side(density.shape, voxel_size, convention)
    numbers = {"box": box, "voxel_size": voxel, "atoms": len(residue)}
    numbers |= map_model_resolution(density, **atoms)
    del numbers["curve"]
    numbers["resolution"] = d_min or numbers["d_model"]
    numbers |= map_model_cc(density, resolution=numbers["resolution"], **atoms)

    # Q-scores of all atoms but hydrogens, and their mean in each residue.
    q = torch.full_like(model.b_iso, math.nan)
    heavy = model.atomic_number > 1
    q[heavy] = q_score(density, model.xyz[heavy], **grid)
    numbers["q_score_mean"] = float(q.nanmean())
    residues = []
    for i in residue.unique().tolist():
        scores = q[residue == i]
        residues.append((labels[i], len(scores), float(scores.nanmean())))

    # The plain map-model FSC: the model's map to Nyquist, our shells, no smoothing.
    full = torch.fft.irfftn(structure_factors(density.shape, **atoms), s=density.shape)
    curve = fsc(density, full, convention=convention, voxel_size=voxel_size)
    found = Agreement(numbers, {"map_model": curve}, notes, residues)
    if d_min is None:
        d_model = f"{numbers['d_model']:g} Å, the map's d_model"
        found.notes.append(f"no --resolution given: correlations at {d_model}")
    return found


def left_out(model: Model, inside: Tensor, known: Tensor) -> list[str]:
    """Notes of a model: on how it was read, and on atoms outside the map or without factors."""
    notes = list(model.notes)
    outside = int((~inside).sum())
    if outside:
        notes.append(f"{outside} of {len(inside)} atoms lie outside the map and are left out")
    numbers, counts = model.atomic_number[inside & ~known].unique(return_counts=True)
    if len(numbers):
        symbols = [SYMBOLS.split()[number - 1] for number in numbers.tolist()]
        names = ", ".join(f"{count} {name}" for count, name in zip(counts.tolist(), symbols))
        notes.append(f"atoms without scattering factors are left out: {names}")
    return notes


# ---- More about two maps


def directional_numbers(a, b, voxel_size) -> dict[str, float]:
    """Sphericity, and the resolutions of the best and the worst direction."""
    box, voxel = shell_side(a.shape, voxel_size)
    # The FSC in cones around many directions, and the resolution in each.
    curves = directional_fsc(a, b, voxel_size=voxel_size)
    curves[..., 1:5] = math.nan  # fewer than 20 coefficients in a cone: chance
    each = resolution(curves, voxel, box=box)
    best, worst = float(each.min()), float(each.max())
    return {"sphericity": sphericity(each), "best_direction": best, "worst_direction": worst}


def sharpened_mean(half_map_1, half_map_2, curve, voxel_size, b_factor=None):
    """(The mean of two half maps, weighted by their FSC and sharpened; the B-factor in Å²).

    Without a B-factor, it is fitted.
    """
    # End the map where RELION would: at a whole shell.
    half_map_2, _ = match_half_maps(half_map_1, half_map_2)
    mean = (half_map_1 + half_map_2) / 2
    end = float(resolution(curve, voxel_size, box=min(mean.shape), convention="relion"))
    if b_factor is None:
        b_factor = guinier_b_factor(mean, curve, voxel_size, end)
    return sharpen(mean, curve, voxel_size, b_factor, end), b_factor


def score_curves(found: Agreement, convention: str) -> dict[str, dict]:
    """Resolutions in Å and FSC_AUC of each curve. Adds a note for a curve that never falls."""
    box, voxel = found.numbers["box"], found.numbers["voxel_size"]
    scores = {}
    for name, curve in found.curves.items():
        if name == "randomised":
            continue
        # Where the curve falls below each threshold.
        at = {}
        for t in (0.143, 0.5):
            at[t] = float(resolution(curve, voxel, t, box=box, convention=convention))
        scores[name] = {"resolution_0143": at[0.143], "resolution_05": at[0.5]}
        scores[name]["auc"] = float(auc(curve))

        # A correction that failed in some shells says nothing about the whole curve.
        masked = found.curves.get("masked", curve)
        if name == "corrected" and (curve.isnan() & ~masked.isnan()).any():
            scores[name] = dict.fromkeys(scores[name], math.nan)
            continue

        # `resolution` then returns the last shell.
        if not (curve[1:] < found.threshold).any():
            limit = f"{at[found.threshold]:.2f} Å is the grid's limit, not the map's"
            found.notes.append(f"{name}: never below {found.threshold:g}; {limit}")
    return scores


# ---- Tables and pictures


def table(scores: dict[str, dict], numbers: dict[str, float]) -> str:
    """What the program prints."""
    # One row per curve, then one per number.
    lines = [f"{'':14}{'FSC 0.143':>12}{'FSC 0.5':>12}{'FSC_AUC':>10}"]
    for name, score in scores.items():
        columns = f"{score['resolution_0143']:10.2f} Å{score['resolution_05']:10.2f} Å"
        lines.append(f"{name:14}{columns}{score['auc']:10.4f}")
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
            label += f", {scores[name][key]:.2f} Å"
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


def without_background(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Two maps with background 0, and a note for each whose background was not."""
    densities, notes = [], []
    for i, x in enumerate((a, b), 1):
        # An inverted map stays inverted: its FSC with another one says so.
        grey = find_grey_scale(x)
        background = grey.background
        if background != 0:
            notes.append(f"map {i}: background {background:.5g} found and subtracted")
            x = x - background
        densities.append(x)
    return *densities, notes


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
        notes += place_notes(*maps[:2])
    found.notes += notes

    # What else was asked for.
    numbers = found.numbers
    if args.directional:
        numbers |= directional_numbers(a, b, voxel_size)
    if args.sharpen:
        # The filter has our shells, so it needs a curve on them.
        curve = fsc(a, b) if args.convention == "cryofm" else next(iter(found.curves.values()))
        sharp, b_factor = sharpened_mean(a, b, curve, voxel_size, args.b_factor)
        if sharp.std() <= 1e-6 * sharp.abs().max():
            raise ValueError("--sharpen: the half maps agree in no shell, so that nothing is left")
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
        found.notes += [f"{map.path}: {note}" for map in maps for note in map.notes]
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
