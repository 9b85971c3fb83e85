"""The command that restores maps: `python sampling.py --task wedge in.mrc` writes in_wedge.mrc.

Beside the map it writes IN_wedge.json (settings, versions, scores) and a picture. What the tasks
do is in sampling_tasks.py, their flags are the fields of sampling_settings.py. A map that lies
beside IN as IN_truth.mrc is compared with the result.

Which files a command reads and writes is in sampling_runs.py. A folder stands for all maps, or all
pairs of half maps, in it. A run reads the maps, checks all that can be checked, calls the task,
scores its Result and writes everything at the end, so that no run leaves half of its files.
"""

import os

# Threads that spin while they wait slow everything down on a busy machine: a step of the sampler
# took 53 s instead of 6 s. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import abinitio
import degrade
import fourier
import fsc
import mrc
import report
import volume
from checkpoint import Prior
from files import owned, refuse_existing
from fsc_half_maps import read_fsc
from mrc import Map
from report import Result
from sampling_choice import Networks
from sampling_half_maps import restore_half_maps
from sampling_networks import finer_grid, sharpen, super_resolve
from sampling_prior import generate, log_likelihood
from sampling_runs import Run, label_of, names_of_maps, plan_runs, truth_beside
from sampling_settings import (
    AbInitioSettings,
    AnisotropicSettings,
    DenoiseSettings,
    GenerateSettings,
    LikelihoodSettings,
    NetworkSettings,
    NetworkWedgeSettings,
    Settings,
    WedgeSettings,
    flag_of,
)
from sampling_tasks import ab_initio, box_of_stack, fill_wedge, restore_wedge
from star import read_angles
from terminal import STOPPED, one_line_for_memory, run_program, say


class Inputs(NamedTuple):
    """How many inputs a task takes, and the words for an error message."""

    least: int
    most: float
    words: str


MAPS = Inputs(1, math.inf, "one map or more")
HALF_MAPS = Inputs(
    1, 2, "two half maps, a folder with pairs of them, or one map with --noise-from-fsc or --snr"
)


class Task(NamedTuple):
    """A row of the table of tasks. The fields of `settings` are its flags."""

    function: Callable[..., Result]
    settings: type[Settings]
    inputs: Inputs
    what: str
    example: str
    trained_for: str = ""  # the task of a scunet checkpoint; "": the flow prior
    reads: tuple[str, ...] = ("truth", "voxel_size")


# A key is what stands behind --task in an example. What one takes is read off its settings.
TASKS = {
    "wedge": Task(
        restore_wedge, WedgeSettings, MAPS, "fill in what a limited tilt range left out",
        "in.mrc --tilt-range -50 60",
    ),
    "wedge --model scunet": Task(
        fill_wedge, NetworkWedgeSettings, MAPS, "the same with CryoLVM's network",
        "in.mrc --tilt-range -50 60", "wedge3d",
    ),
    "denoise": Task(
        restore_half_maps, DenoiseSettings, HALF_MAPS, "take the noise out of half maps",
        "half_1.mrc half_2.mrc",
    ),
    "anisotropic": Task(
        restore_half_maps, AnisotropicSettings, HALF_MAPS,
        "the same where noise differs between directions",
        "half_1.mrc half_2.mrc --orientations particles.star",
    ),
    "sharpen": Task(
        sharpen, NetworkSettings, MAPS, "undo the falloff of high frequencies", "in.mrc", "sharpen"
    ),
    "superres": Task(
        super_resolve, NetworkSettings, MAPS, "find detail finer than the map's resolution",
        "in.mrc", "superres",
    ),
    "abinitio": Task(
        ab_initio, AbInitioSettings, Inputs(1, 1, "one stack"),
        "a density from projections of unknown pose", "stack.mrcs",
    ),
    "generate": Task(
        generate, GenerateSettings, Inputs(0, 0, "no input"), "densities from noise alone",
        "--samples 3", reads=(),
    ),
    "likelihood": Task(
        log_likelihood, LikelihoodSettings, MAPS, "log p of maps", "in.mrc", reads=("voxel_size",)
    ),
}  # fmt: skip

# Flags that every task takes.
PROGRAM_FLAGS = {
    "maps", "task", "model", "out", "ckpt", "time_phase", "device", "overwrite", "skip_existing",
    "quiet",
}  # fmt: skip

# Flags that name files.
FILE_FLAGS = ("truth", "mask", "orientations", "noise_from_fsc", "ckpt")

# What takes less memory.
SMALLER = {"generate": "give a smaller --box or fewer --samples", "abinitio": "give fewer images"}

# ---- The command line


def make_parser() -> argparse.ArgumentParser:
    """All flags, each in the group of the first task that uses it."""
    cli = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Flags of the command itself.
    add = cli.add_argument
    add("maps", nargs="*", metavar="IN", help="maps (.mrc, .map, .ccp4; .gz, .bz2), or folders")
    add("--task", required=True, choices=[name for name in TASKS if " " not in name])
    add("--model", choices=("hdit", "scunet"), help="wedge: scunet is CryoLVM's network")
    add(
        "-o",
        "--out",
        help="the map to write, or a folder (default: IN_TASK.mrc beside IN; of half_1.mrc and "
        "half_2.mrc half_mean_TASK.mrc)",
    )
    add("--ckpt", help="the network (default: one of weights/, sampling_choice.py says which)")
    add(
        "--time-phase",
        choices=("float32", "float16", "bfloat16"),
        help="precision in which the authors' .safetensors were trained (default: as the "
        "config.yaml beside them says)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--overwrite", action="store_true", help="replace files that exist (never the input)")
    add("--skip-existing", action="store_true", help="leave out maps whose result exists")
    add("--quiet", action="store_true", help="print errors only")

    # Flags of the tasks. One that was not typed leaves no trace in the result, so that a flag that
    # its task does not use can be refused.
    hidden = {"default": argparse.SUPPRESS}
    add("--truth", metavar="MAP", help="compare with this map (default: IN_truth.mrc)", **hidden)
    add("--voxel-size", type=float, metavar="Å", help="instead of the header's", **hidden)
    explained = set()
    for name, task in TASKS.items():
        flags = {setting.name: setting.metadata["flag"] for setting in fields(task.settings)}
        text = f"{task.what}\n  python sampling.py --task {name} {task.example}"

        # What an earlier group has explained is only named.
        old = [flag_of(name) for name in flags if name in explained]
        if old:
            text += f"\n  also: {' '.join(old)}"
        group = cli.add_argument_group(f"--task {name}", text)
        for setting, flag in flags.items():
            if setting not in explained:
                group.add_argument(flag_of(setting), **flag, **hidden)
        explained |= flags.keys()
    return cli


def parse(argv=None) -> tuple[Namespace, Task, Settings]:
    """The command line, its task and the settings. Raises ValueError for what cannot work."""
    # Find the task, and the kind of network that it takes.
    args = make_parser().parse_args(argv)
    with_scunet = args.model == "scunet" and args.task == "wedge"
    known_as = "wedge --model scunet" if with_scunet else args.task
    task = TASKS[known_as]
    kind = "scunet" if task.trained_for else "hdit"
    if args.model not in (None, kind):
        raise ValueError(f"--model {args.model} does not know --task {args.task}; drop --model")
    args.model = kind

    # Refuse flags that the task does not use.
    known = {setting.name: setting.default for setting in fields(task.settings)}
    for name in vars(args).keys() - PROGRAM_FLAGS - known.keys() - set(task.reads):
        raise ValueError(f"{flag_of(name)}: --task {known_as} does not use it; drop it")

    # Fill in the defaults. The .json of the result holds all of these values.
    vars(args).update({"truth": None, "voxel_size": None} | known | vars(args))
    if args.overwrite and args.skip_existing:
        raise ValueError("--overwrite and --skip-existing: give one of them")

    if args.voxel_size is not None and not 0.1 <= args.voxel_size <= 100:
        raise ValueError(f"--voxel-size {args.voxel_size:g}: give 0.1 to 100 Å")

    # Shells expand ~ at the start of a word only, not in --out=~/x.
    for name in {"out", *FILE_FLAGS} & vars(args).keys():
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    args.maps = [os.path.expanduser(name) for name in args.maps]
    settings = task.settings(**{name: getattr(args, name) for name in known})

    # Check the number of inputs, the network and the device.
    # Denoising one map instead of two half maps wants more: noise_of_half_maps.
    least, most, words = task.inputs
    if not least <= len(args.maps) <= most:
        raise ValueError(f"--task {args.task} wants {words}; {len(args.maps)} given")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    # torch alone knows which devices it has, and a number must come back (not so from "meta").
    try:
        float(torch.zeros(1, device=args.device))
    except (RuntimeError, AssertionError, ImportError) as error:
        words = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device}: no such device here (torch: {words})") from None
    return args, task, settings


def check_names(args: Namespace, task: Task, runs: list[Run], suffixes) -> None:
    """Raises ValueError or OSError if a run would write a file that any run reads, or in vain."""
    # All files that any run reads.
    read = [Path(getattr(args, name)) for name in FILE_FLAGS if getattr(args, name, None)]
    for inputs, _ in runs:
        read += inputs
        if inputs and "truth" in task.reads:
            read.append(truth_beside(inputs[0]))

    # Results of an earlier run are looked for when it is their turn.
    for _, out in runs:
        written = [*names_of_maps(out, suffixes).values(), *report.report_files(out)]
        refuse_existing(written, read, overwrite=True)


# ---- One run


def run(
    args: Namespace,
    task: Task,
    settings: Settings,
    networks: Networks,
    paths: list[Path],
    out: Path,
) -> None:
    """Read, check, restore, compare, write."""
    # Look at the names of all files before any work is done.
    begin = time.perf_counter()
    warnings = []

    def tell(line: str) -> None:
        """Print a line, and keep it for the .json if it is a warning."""
        if line.startswith("warning: "):
            warnings.append(line.removeprefix("warning: "))
        if not args.quiet:
            say(line)

    names = names_of_maps(out, settings.suffixes)
    written = [*names.values(), *report.report_files(out)]
    with owned(written, tell):
        refuse_existing(written, paths, args.overwrite)

        # Read the maps and all that goes with them.
        read = mrc.read_stack if args.task == "abinitio" else mrc.read_map
        maps = [read(path, args.voxel_size) for path in paths]
        truth = None
        if maps:
            say_inputs(paths, maps, tell)
        ckpt, prior = networks.for_maps(maps)
        if maps:
            try:
                grids = grids_of(args.task, maps[0], prior)
            except ValueError as error:
                raise ValueError(f"{paths[0]}: {error}") from None
            truth = read_truth(args, task, paths[0], grids)
            if truth is not None and truth.path not in paths:
                say_notes(truth, tell)
            settings = read_files(settings, maps[0], grids, tell)

        # Do the task. Errors name the file, if they do not yet.
        if isinstance(settings, DenoiseSettings) and len(maps) == 1:
            maps.append(None)
        try:
            result = task.function(*maps, prior, settings, tell)
        except ValueError as error:
            source = str(paths[0] if paths else args.task)
            prefix = "" if str(error).startswith(source) else f"{source}: "
            raise ValueError(f"{prefix}{error}") from None

        # Score and write.
        if truth is not None:
            result = compare(result, truth, args.task == "abinitio", tell)
        else:
            result = report.compare_without_truth(result, tell)
        label = label_of(args.task, result.report.get("method"), ckpt, prior.sha256)
        used = vars(args) | {"ckpt": str(ckpt)}
        inputs = {"settings": used, "task": args.task, "input": [str(path) for path in paths]}
        inputs["warnings"] = warnings
        report.write_report(result, names, inputs, prior, begin, args.overwrite, tell, label)


def grids_of(task: str, map: Map, prior: Prior) -> dict[tuple[int, ...], tuple[float, ...]]:
    """Shapes that a truth or a mask may have, and their voxel sizes: the map's, the result's."""
    # Ab initio: the prior's grid over the images.
    if task == "abinitio":
        n = box_of_stack(map, prior)
        voxel_size = map.density.shape[1] * map.voxel_size[2] / n
        return {(n, n, n): (voxel_size,) * 3}
    # Super-resolution: the map's own grid, or the finer one of the result.
    grids = {tuple(map.density.shape): map.voxel_size}
    if task == "superres":
        finer = finer_grid(map, prior)
        grids[tuple(finer.density.shape)] = finer.voxel_size
    return grids


def read_truth(args: Namespace, task: Task, source: Path, grids: dict) -> Map | None:
    """The map to compare with: --truth, or the one that lies beside the input."""
    # A truth that was not asked for may be absent.
    path = truth_beside(source)
    if args.truth:
        path = Path(args.truth)
    elif "truth" not in task.reads or not path.exists():
        return None

    # Ab initio compares on the prior's grid, every other task on the truth's own.
    truth = mrc.read_map(path, args.voxel_size)
    if args.task == "abinitio":
        (voxel_size,) = grids.values()
        truth = mrc.resample_map(truth, voxel_size)
    return on_grid(truth, grids)


def on_grid(map: Map, grids: dict) -> Map:
    """The map with the voxel size of the grid that has its shape; ValueError if none has."""
    shape = tuple(map.density.shape)
    if shape not in grids:
        wanted = " or ".join(str(other) for other in grids)
        raise ValueError(f"{map.path}: {shape} voxels; give a map of {wanted}, like the input")
    return replace(map, voxel_size=grids[shape])


def read_files(settings: Settings, map: Map, grids: dict, say=print) -> Settings:
    """The settings with the content of the files that they name."""
    # Only the fields that this task has.
    content = {}
    names = {setting.name: getattr(settings, setting.name) for setting in fields(settings)}
    if names.get("orientations"):
        tilt_series = names["tilt_range"] is not None
        angles = read_angles(names["orientations"], tilt_series)
        content["orientations"] = degrade.euler_matrix(angles)
    if names.get("noise_from_fsc"):
        content["noise_from_fsc"] = read_fsc(
            names["noise_from_fsc"], map.density.shape[-1], map.voxel_size[2]
        )
    if names.get("mask"):
        mask_map = on_grid(mrc.read_map(names["mask"], map.voxel_size), grids)
        say_notes(mask_map, say)
        content["mask"], notes = volume.soft_mask(mask_map.density, names["mask"])
        for note in notes:
            say(note)
    return replace(settings, **content)


def say_inputs(paths: list[Path], maps: list[Map], say) -> None:
    """One line on the inputs, and what was assumed when reading them."""
    names = " ".join(str(path) for path in paths)
    shape = " x ".join(str(n) for n in maps[0].density.shape)
    # All sides of a voxel where they differ, z first as in the shape.
    sides = [f"{v:g}" for v in maps[0].voxel_size]
    voxel = sides[0] if len(set(sides)) == 1 else " x ".join(sides)
    say(f"{names}: {shape} voxels of {voxel} Å")
    for map in maps:
        say_notes(map, say)


def say_notes(map: Map, say) -> None:
    """What was assumed when a map was read."""
    for note in map.notes:
        say(f"{map.path}: {note}")


def plain_truth(truth: Map, sign: int | list[int], say) -> Tensor:
    """The truth with background 0 and bright protein, as what a Result shows.

    sign: of the input, or of its half maps. It is the truth's, too, where that is not clear.
    """
    grey = volume.find_grey_scale(truth.density)
    if grey.unclear:
        dark = min(sign if isinstance(sign, list) else [sign]) < 0
        grey = volume.find_grey_scale(truth.density, invert=dark)
    for note in grey.notes:
        say(f"{truth.path.name}: {note}, to compare")
    return grey.to_work(truth.density)


def compare(result: Result, truth: Map, align: bool, say) -> Result:
    """The result with scores of all that it shows, and with the truth to show beside it.

    align: turn and shift the maps onto the truth first, in the hand that fits better.
    """
    # Ab initio finds a density in any pose, and in either hand.
    shown = result.shown
    facts = {"truth_voxel_size": truth.voxel_size}
    if not align:
        density = plain_truth(truth, result.report.get("sign", 1), say)
        truth = replace(truth, density=density)
    title, hands = f"with {truth.path.name}", None
    if align:
        aligned = {name: abinitio.align(x, truth.density) for name, x in shown.items()}
        shown = {name: found.density for name, found in aligned.items()}
        hands = {name: found.mirrored for name, found in aligned.items()}
        title = f"aligned to {truth.path.name}"
        facts["mirrored"] = hands

    # Score on the grid of the truth.
    shown = {name: fourier.resample(x, truth.density.shape) for name, x in shown.items()}
    scores = report.score(shown, truth.density, result.region, truth.voxel_size)
    box, voxel_size = fsc.shell_side(truth.density.shape, truth.voxel_size)
    report.say_scores(title, scores, say, hands, box * voxel_size)
    facts["fsc"] = scores
    shown["truth"] = truth.density
    return replace(result, shown=shown, report=result.report | facts)


def main(argv=None) -> int:
    # Check all that can be checked before the network is read.
    args, task, settings = parse(argv)
    tell = report.silent if args.quiet else say
    paths = [Path(name) for name in args.maps]
    halves = isinstance(settings, DenoiseSettings)
    runs = plan_runs(args.task, paths, args.out, settings.suffixes, halves, tell)
    check_names(args, task, runs, settings.suffixes)
    networks = Networks(
        args.ckpt,
        task.trained_for,
        tell,
        kind=args.model,
        device=args.device,
        time_phase=args.time_phase,
    )
    if args.ckpt or task.trained_for:
        networks.for_maps([])

    # One bad file does not stop the others.
    failed = 0
    hint = SMALLER.get(args.task, "crop the map to its mask, or bin it")
    for number, (paths, out) in enumerate(runs, 1):
        if len(runs) > 1:
            tell(f"{number} of {len(runs)}")
        if args.skip_existing and out.exists():
            tell(f"{out}: exists, skipped")
            continue
        try:
            with one_line_for_memory(hint):
                run(args, task, settings, networks, paths, out)
        except (ValueError, OSError) as error:
            if len(runs) == 1:
                raise
            failed += 1
            say(f"sampling.py: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if len(runs) == 1:
                raise
            done = f"{number - 1} of {len(runs)} done; --skip-existing goes on"
            say(f"sampling.py: stopped, nothing written for {paths[0]}; {done}", file=sys.stderr)
            return STOPPED
    if failed:
        tell(f"{failed} of {len(runs)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    run_program("sampling.py", main)
