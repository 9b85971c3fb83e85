"""The command behind `python fsc.py`: tables, curves and pictures of agreement.
"""
import argparse
import io
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from atoms import read_model
from fsc import CONVENTIONS, auc, fsc, resolution, shell_side
from fsc_half_maps import directional_fsc, guinier_b_factor, local_resolution, masked_fsc, sharpen, sphericity
from fsc_model import (
    atom_radius,
    cc_per_residue,
    correlation,
    map_model_cc,
    map_model_resolution,
    model_map,
    q_score,
    structure_factors,
)
from mrc import SUFFIXES, read_map, write_map

USAGE = """
  fsc.py half_1.mrc half_2.mrc [--mask mask.mrc]     two half maps
  fsc.py map.mrc --truth truth.mrc                   a map and what it should be
  fsc.py map.mrc --model model.pdb [--resolution 3]  a map and an atomic model (.pdb, .cif)"""

# As RELION names and draws them.
STAR = {"corrected": "_rlnFourierShellCorrelationCorrected", "unmasked": "_rlnFourierShellCorrelationUnmaskedMaps",
        "masked": "_rlnFourierShellCorrelationMaskedMaps",
        "randomised": "_rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"}

COLOUR = {"corrected": "black", "unmasked": "green", "masked": "blue", "randomised": "red", "map_model": "black"}


def parse(argv=None) -> argparse.Namespace:
    cli = argparse.ArgumentParser(usage=USAGE, description="Prints a table; writes PREFIX.json, .csv and .png.")
    cli.add_argument("maps", nargs="+", metavar="MAP", help="one map, or two half maps")
    cli.add_argument("--truth", metavar="MAP", help="the map to compare with")
    cli.add_argument("--model", metavar="PDB", help="the atomic model to compare with")
    cli.add_argument("--mask", metavar="MAP", help="soft mask, 0 to 1; for half maps the FSC is corrected for it")
    cli.add_argument("--voxel-size", type=float, metavar="Å", help="instead of the headers'")
    cli.add_argument("--resolution", type=float, metavar="Å", help="of the map, for --model (default: its d_model)")
    cli.add_argument("--convention", choices=CONVENTIONS, default="ours", help="of shells and crossings")
    cli.add_argument("--directional", action="store_true", help="FSC in cones of 20 degrees, and the sphericity")
    cli.add_argument("--local-resolution", metavar="OUT", help="write the local resolution (Å, FSC 0.5) as a map")
    cli.add_argument("--sharpen", metavar="OUT", help="write the mean of the half maps, FSC-weighted and sharpened")
    cli.add_argument("--b-factor", type=float, metavar="Å²", help="for --sharpen, negative; default: fitted")
    cli.add_argument("--seed", type=int, default=0, help="of the random phases")
    cli.add_argument("-o", "--out", metavar="PREFIX", help="of the files written (default: MAP's name and _fsc)")
    cli.add_argument("--star", action="store_true", help="write RELION's postprocess table too")
    cli.add_argument("--overwrite", action="store_true", help="replace files that exist")
    cli.add_argument("--quiet", action="store_true", help="print nothing but errors")
    args = cli.parse_args(argv)
    halves, d = len(args.maps) == 2, args.resolution
    if halves + bool(args.truth) + bool(args.model) != 1 or len(args.maps) > 2:
        raise ValueError("give two half maps, or one map and --truth, or one map and --model")
    if not halves and (args.sharpen or args.local_resolution or args.star):
        raise ValueError("--sharpen, --local-resolution and --star want two half maps")
    if args.model and (args.mask or args.directional):
        raise ValueError("--mask and --directional want two maps")
    if d is not None and not (args.model and 0 < d < math.inf) or args.b_factor is not None and not args.sharpen:
        raise ValueError("--resolution (Å, positive) goes with --model, --b-factor with --sharpen")
    return args


def read_maps(args: argparse.Namespace) -> tuple[list, float | tuple[float, float, float]]:
    """All maps of the command line, which must share one grid, and their voxel size: one number where it is cubic."""
    paths = args.maps + [p for p in (args.truth, args.mask) if p]
    maps = [read_map(p, args.voxel_size) for p in paths]
    shape, voxel_size = maps[0].density.shape, maps[0].voxel_size
    for path, m in zip(paths, maps):
        if m.density.shape != shape or any(abs(v / w - 1) > 0.01 for v, w in zip(m.voxel_size, voxel_size)):
            raise ValueError(f"{path}: {tuple(m.density.shape)} voxels of {m.voxel_size} Å, but {paths[0]} has "
                             f"{tuple(shape)} of {voxel_size}; bring them onto one grid (or give --voxel-size)")
    return maps, voxel_size[0] if max(voxel_size) < 1.001 * min(voxel_size) else voxel_size


def compare(args: argparse.Namespace) -> tuple[dict, dict[str, Tensor], list[str], list[tuple]]:
    """Half maps, or a map and the truth: numbers, curves (the best first), notes; no residues."""
    maps, voxel_size = read_maps(args)
    a, b, *mask = (m.density for m in maps)
    if not args.truth and torch.equal(a, b):
        raise ValueError(f"{args.maps[0]} and {args.maps[1]} hold the same map; give two independent half maps")
    if (args.sharpen or args.local_resolution) and not isinstance(voxel_size, float):
        raise ValueError(f"{args.maps[0]}: voxels of {voxel_size} Å; --sharpen and --local-resolution want cubes")
    how = {"convention": args.convention, "voxel_size": voxel_size}
    box, voxel = shell_side(a.shape, voxel_size, args.convention)
    numbers, notes = {"box": box, "voxel_size": voxel}, []
    if mask:
        curves = masked_fsc(a, b, mask[0], seed=args.seed, **how)._asdict()
        start = curves.pop("randomised_from")
    else:
        curves = {"unmasked": fsc(a, b, **how)}
    if args.truth:                                      # not independent: the correction does not apply
        curves = {name: curves[name] for name in ("masked", "unmasked") if name in curves}
        numbers["correlation"] = correlation(a, b)
    elif mask:
        numbers["phases_randomised_from"] = box * voxel / start
        end = box * voxel / resolution(curves["corrected"], voxel, box=box, convention=args.convention)
        at_end = float(curves["randomised"][(torch.arange(box // 2 + 1) - end).abs().argmin()])
        if at_end > 0.1:
            notes.append(f"the mask alone correlates {at_end:.2f} at the resolution: use a softer or wider mask")
    if args.directional:
        side, size = shell_side(a.shape, voxel_size)
        each = directional_fsc(a, b, voxel_size=voxel_size)
        each[..., 1:5] = math.nan                       # fewer than 20 coefficients in a cone: chance
        each = resolution(each, size, box=side)
        numbers |= {"sphericity": sphericity(each), "best_direction": float(each.min()), "worst_direction": float(each.max())}
    if args.sharpen:
        mean, curve = (a + b) / 2, fsc(a, b) if args.convention == "cryofm" else next(iter(curves.values()))
        end = float(resolution(curve, voxel_size, box=min(a.shape), convention="relion"))
        factor = guinier_b_factor(mean, curve, voxel_size, end) if args.b_factor is None else args.b_factor
        numbers["b_factor"], sharp = factor, sharpen(mean, curve, voxel_size, factor, end)
        write_map(args.sharpen, replace(maps[0], density=sharp), args.overwrite)
    if args.local_resolution:
        local = local_resolution(a, b, voxel_size)
        numbers["local_resolution_median"] = float(local.median())
        write_map(args.local_resolution, replace(maps[0], density=local), args.overwrite)
    return numbers, curves, notes, []


def compare_model(args: argparse.Namespace) -> tuple[dict, dict[str, Tensor], list[str], list[tuple]]:
    """A map and an atomic model: numbers, curve, notes, and a row (label, atoms, CC, Q-score) per residue."""
    (m,), voxel_size = read_maps(args)
    density, model, notes = m.density, read_model(args.model), []
    first = torch.tensor(m.corner, dtype=torch.float64)
    at = (model.xyz.flip(1) - first) / torch.tensor(m.voxel_size, dtype=torch.float64)
    inside = ((at >= 0) & (at <= torch.tensor(density.shape) - 1)).all(1)
    if not inside.any():
        raise ValueError(f"{args.model}: no atom lies in {args.maps[0]}; bring the model into the frame of the map")
    if not inside.all():
        notes.append(f"{int((~inside).sum())} of {len(inside)} atoms lie outside the map and are left out")
    xyz, atomic_number, b_iso, occupancy, residue = (x[inside] for x in model[:5])
    grid = {"voxel_size": voxel_size, "origin": first.tolist()}
    atoms = {"xyz": xyz, "atomic_number": atomic_number, "b_iso": b_iso, "occupancy": occupancy, **grid}
    box, voxel = shell_side(density.shape, voxel_size, args.convention)
    numbers = {"box": box, "voxel_size": voxel, "atoms": len(xyz)} | map_model_resolution(density, **atoms)
    d, _ = args.resolution or numbers["d_model"], numbers.pop("curve")
    if args.resolution is None:
        notes.append(f"no --resolution given: correlations at {d:g} Å, the map's d_model")
    numbers |= {"resolution": d} | map_model_cc(density, resolution=d, **atoms)

    present, residue = residue.unique(return_inverse=True)
    calc = model_map(density.shape, resolution=d, **atoms)
    cc = cc_per_residue(density, calc, xyz, residue, atom_radius(d, float(b_iso.mean())), **grid)
    q, heavy = torch.full_like(b_iso, math.nan), atomic_number > 1
    q[heavy] = q_score(density, xyz[heavy], **grid)
    numbers |= {"cc_per_residue_mean": float(cc.nanmean()), "q_score_mean": float(q.nanmean())}
    rows = [(model.labels[i], int((residue == j).sum()), float(cc[j]), float(q[residue == j].nanmean()))
            for j, i in enumerate(present.tolist())]

    # The plain reading of the map-model FSC: the model's map to Nyquist, our shells, no smoothing.
    full = torch.fft.irfftn(structure_factors(density.shape, **atoms), s=density.shape)
    return numbers, {"map_model": fsc(density, full, convention=args.convention, voxel_size=voxel_size)}, notes, rows


def table(numbers: dict) -> str:
    unit = lambda name: ("" if name.startswith(("box", "atoms", "correlation", "sphericity", "cc_", "q_"))
                         else " Å²" if name.startswith("b_") else " Å")
    lines = [f"{'':14}{'FSC 0.143':>12}{'FSC 0.5':>12}{'FSC_AUC':>10}"]
    lines += [f"{name:14}{v['resolution_0143']:10.2f} Å{v['resolution_05']:10.2f} Å{v['auc']:10.4f}"
              for name, v in numbers.items() if isinstance(v, dict)]
    return "\n".join(lines + [f"{name:24}{v:12.5g}{unit(name)}" for name, v in numbers.items() if not isinstance(v, dict)])


def star(s: list[float], curves: dict[str, Tensor], numbers: dict) -> str:
    """RELION's postprocess.star: data_general and data_fsc. Without a mask the corrected curve is the unmasked one."""
    curves = {"corrected": curves["unmasked"]} | curves
    best = numbers.get("corrected", numbers["unmasked"])["resolution_0143"]
    names = ["_rlnSpectralIndex", "_rlnResolution", "_rlnAngstromResolution", *(STAR[name] for name in curves)]
    lines = ["data_general", "", f"_rlnFinalResolution {best:.6f}", "", "data_fsc", "", "loop_"]
    lines += [f"{name} #{i}" for i, name in enumerate(names, 1)]
    for k, values in enumerate(zip(s, (1 / f if f else 999.0 for f in s), *(c.tolist() for c in curves.values()))):
        lines.append(f"{k:6d} " + " ".join(f"{v:12.6f}" for v in values))
    return "\n".join(lines) + "\n"


def picture(s: list[float], curves: dict[str, Tensor], numbers: dict, threshold: float) -> bytes:
    """PNG of the curves over 1/Å, with Å above and lines at 0.143 and 0.5; the legend gives Å at the threshold."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        label = {"randomised": "phase-randomised"}.get(name, name.replace("_", "-"))
        if name in numbers:
            label += f", {numbers[name][f'resolution_{threshold:g}'.replace('.', '')]:.2f} Å"
        ax.plot(s, curve, color=COLOUR[name], lw=2 if COLOUR[name] == "black" else 1, label=label)
    for t in (0.143, 0.5):
        ax.axhline(t, color="0.5", lw=0.8, ls="--")
        ax.annotate(f"{t:g}", (s[-1], t), xytext=(-2, 2), textcoords="offset points", ha="right", color="0.4")
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    low = min(float(curve[1:].nan_to_num(0).min()) for curve in curves.values())
    ax.set(xlim=(0, s[-1]), ylim=(min(-0.1, low - 0.05), 1.02), xlabel="spatial frequency (1/Å)",
           ylabel="Fourier shell correlation")
    ax.legend(frameon=False, title=f"resolution at FSC = {threshold:g}")
    ticks = [t for t in ax.get_xticks() if 0 < t <= s[-1]]
    top = ax.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{1 / t:.3g}" for t in ticks])
    top.set_xlabel("resolution (Å)")
    figure.savefig(file := io.BytesIO(), dpi=150, format="png")
    return file.getvalue()


def run(args: argparse.Namespace) -> None:
    name = args.maps[0]
    for end in (".gz", ".bz2", *SUFFIXES):
        name = name.removesuffix(end)
    ends = (".json", ".csv", ".png") + (".star",) * args.star + ("_residues.csv",) * bool(args.model)
    paths = {end: Path(f"{args.out or f'{name}_fsc'}{end}") for end in ends}
    for path in (written := [*paths.values(), *(Path(p) for p in (args.sharpen, args.local_resolution) if p)]):
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path} exists; choose another name (-o) or give --overwrite")
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent}: no such folder; make it first")

    numbers, curves, notes, residues = compare_model(args) if args.model else compare(args)
    box, voxel_size, scores = numbers["box"], numbers["voxel_size"], {}
    threshold = 0.143 if len(args.maps) == 2 else 0.5
    for name in (name for name in curves if name != "randomised"):
        at = {t: float(resolution(curves[name], voxel_size, t, box=box, convention=args.convention)) for t in (0.143, 0.5)}
        scores[name] = {"resolution_0143": at[0.143], "resolution_05": at[0.5], "auc": float(auc(curves[name]))}
        if not (curves[name][1:] < threshold).any():
            notes.append(f"{name}: never below {threshold:g}; {at[threshold]:.2f} Å is the grid's limit, not the map's")
    numbers, s = scores | numbers, [k / (box * voxel_size) for k in range(box // 2 + 1)]

    line = lambda values: ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values) + "\n"
    shell_rows = zip(range(len(s)), s, (1 / f if f else math.inf for f in s), *(c.tolist() for c in curves.values()))
    files = {".csv": line(["shell", "per_angstrom", "angstrom", *curves]) + "".join(map(line, shell_rows)),
             "_residues.csv": line(["residue", "atoms", "cc", "q_score"]) + "".join(map(line, residues))}
    if args.star:
        files[".star"] = star(s, curves, numbers)
    try:
        files[".png"] = picture(s, curves, numbers, threshold)
    except ImportError:
        written.remove(paths.pop(".png"))
        notes.append("no picture: pip install matplotlib")
    everything = {"command": sys.argv, "torch": torch.__version__, "settings": vars(args), "notes": notes} | numbers
    everything = json.loads(json.dumps(everything), parse_constant=lambda _: None)          # JSON knows no nan
    files[".json"] = json.dumps(everything, indent=1) + "\n"
    for end, path in paths.items():                     # each appears whole or not at all
        content, temporary = files[end], path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content if end == ".png" else content.encode())
        os.replace(temporary, path)
    if not args.quiet:
        given = [f"--{k} {vars(args)[k]}" for k in ("truth", "model", "mask", "convention") if vars(args)[k]]
        print(*args.maps, *given)
        print(table(numbers), *("note: " + n for n in notes), f"wrote {' '.join(map(str, written))}", sep="\n")


def main(argv=None) -> None:
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"fsc.py: {error}")
