"""Damaged files and flags of every kind: no traceback, nothing half written or changed.

A seed makes a case: a command of one of the programs, and one of its files damaged, or one or two
flags with odd values. CI runs a sample. `CORPUS=1200 pytest tests/test_damaged_inputs.py` runs the
first 1,200. Good files and ways to damage them are in made_damage.py.
"""

import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from made_damage import ODD_NUMBERS, TRAIN, damage, write_good_files
from small_runs import SCUNETS, SMALL

import abinitio
import atoms
import bench
import checkpoint
import data_prepare
import fsc_score
import mrc
import sampling
import train
import train_config
import train_presets
import train_ranks

COUNT = int(os.environ.get("CORPUS", 84))
FIRST = int(os.environ.get("CORPUS_FROM", 0))
SECONDS = 60  # of computing: a case that takes longer hangs. On a busy machine it may wait longer
BYTES = 6 * 2**30  # more memory than a case may use

PROGRAMS = {
    "sampling": sampling.main,
    "fsc": fsc_score.main,
    "train": train.main,
    "prepare": data_prepare.main,
    "bench": bench.main,
}

# Commands, and the files of each that may be damaged.
SMALL_RUN = "--ckpt net.pt --steps 1 --samples 1 -o out.mrc"
NEW = f"train --model small --out new {TRAIN}"
COMMANDS = [line.split("|") for line in f"""
sampling --task wedge in.mrc --mask mask.mrc {SMALL_RUN} | in.mrc mask.mrc net.pt
sampling --task wedge packed.map.gz --truth truth.mrc --method pocs {SMALL_RUN} | packed.map.gz
sampling --task wedge in.mrc --method paper --ckpt public.safetensors --steps 1 --samples 1 -o out.mrc | public.safetensors
sampling --task wedge in.mrc --model scunet --ckpt wedge3d.pt -o out.mrc | in.mrc wedge3d.pt
sampling --task denoise half_1.mrc half_2.mrc {SMALL_RUN} | half_1.mrc half_2.mrc net.pt
sampling --task denoise in.mrc --noise-from-fsc fsc.csv {SMALL_RUN} | in.mrc fsc.csv
sampling --task denoise in.mrc --noise-from-fsc table.csv --method wiener {SMALL_RUN} | table.csv
sampling --task denoise in.mrc --snr 2 --mask mask.mrc --truth truth.mrc {SMALL_RUN} | mask.mrc truth.mrc
sampling --task anisotropic half_1.mrc half_2.mrc --orientations p.star {SMALL_RUN} | half_1.mrc p.star
sampling --task anisotropic half_1.mrc half_2.mrc --orientations tomo.star {SMALL_RUN} | tomo.star
sampling --task anisotropic half_1.mrc half_2.mrc --orientations angles.txt {SMALL_RUN} | angles.txt
sampling --task anisotropic half_1.mrc half_2.mrc --tilt-range -50 60 {SMALL_RUN} | half_2.mrc
sampling --task sharpen in.mrc --ckpt sharpen.pt --mask mask.mrc -o out.mrc | in.mrc mask.mrc sharpen.pt
sampling --task superres in.mrc --ckpt superres.pt --truth truth.mrc -o out.mrc | in.mrc truth.mrc superres.pt
sampling --task abinitio stack.mrcs --method classical {SMALL_RUN} | stack.mrcs
sampling --task abinitio stack.mrcs {SMALL_RUN} | stack.mrcs net.pt
sampling --task generate {SMALL_RUN} | net.pt
sampling --task likelihood in.mrc --probes 2 --tolerance 0.1 --ckpt net.pt -o out.mrc | in.mrc net.pt
sampling --task wedge emdb --discard-measured --ckpt net.pt --steps 1 --samples 1 | emdb/emd_1235.mrc
fsc half_1.mrc half_2.mrc --mask mask.mrc --sharpen sharp.mrc --b-factor -20 -o out | half_1.mrc half_2.mrc mask.mrc
fsc half_1.mrc half_2.mrc --local-resolution local.mrc --star -o out | half_1.mrc
fsc in.mrc --truth truth.mrc --directional -o out | in.mrc truth.mrc
fsc in.mrc --truth truth.mrc --mask mask.mrc --convention relion -o out | mask.mrc
fsc truth.mrc --model model.pdb --resolution 3 -o out | truth.mrc model.pdb
fsc truth.mrc --model model.cif --resolution 3 -o out | model.cif
train --model small --dry-run --crop 16 --batch 2 --micro-batch 2 |
train --model small --dry-run --crop 16 --data atoms.npz | atoms.npz
{NEW} --data atoms.npz | atoms.npz
{NEW} --data model.pdb | model.pdb
{NEW} --data model.cif | model.cif
{NEW} --data emdb | emdb/emd_1235.mrc
{NEW} --data prepared | prepared/settings.json prepared/index.csv prepared/emd_1234.npy prepared/emd_1235.npy
{NEW} --data emdb --init net.pt | net.pt
train --model small-sharpen --data pairs --out new {TRAIN} | pairs/pairs.csv pairs/a.mrc pairs/a.pdb
train --model small-jepa --data prepared --out new {TRAIN} | prepared/settings.json prepared/emd_1236.npy
train --model small --data emdb --out run {TRAIN} --resume --steps 2 | run/checkpoint.pt
train --model small --data emdb --out run {TRAIN} --resume --steps 2 | run/checkpoint.pt run/log.csv
prepare maps emdb out --workers 1 --metadata emdb.csv | emdb/emd_1234.mrc emdb.csv
prepare maps emdb prepared --workers 1 | prepared/settings.json prepared/index.csv prepared/emd_1234.npy
prepare urls emdb.csv | emdb.csv
prepare structures entries.tsv --from entries -o new.npz | entries.tsv entries/1abc.pdb
bench --quick --only sampling --seconds 0.1 |
""".strip().splitlines()]  # noqa: E501  # fmt: skip

# Flags with odd values. Of the others of sampling.py and train.py, those that the command uses.
FLAGS = {
    "sampling": "--voxel-size --device --truth --ckpt --out --model --overwrite --skip-existing",
    "fsc": "--voxel-size --resolution --seed --b-factor --convention --truth --model --mask "
    "--sharpen --local-resolution --out --directional --star --overwrite --quiet",
    "prepare": "--voxel-size --max-side --max-resolution --workers --metadata --from --out",
    "bench": "--seconds --dtype --only --model --gpu",
}
ODD_WORDS = [*ODD_NUMBERS, "in.mrc", "net.pt", "missing/a.mrc", ".", "é.mrc", "~"]

# What takes long when it is large, as it should.
SLOW = {"steps"}


class Hangs(BaseException):
    """Not an Exception, so that no program takes it for an error of its own."""


# ---- What a case begins with


@pytest.fixture(scope="module", autouse=True)
def small_and_plain():
    """Small presets, no pictures; afterwards the signal handlers are what they were."""
    before = {name: signal.getsignal(name) for name in train_ranks.STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setitem(sys.modules, "matplotlib", None)
        for name, cfg in {"small": SMALL, **SCUNETS}.items():
            patch.setitem(train_presets.PRESETS, name, cfg)
        # The search of ab initio takes seconds, whatever its images.
        patch.setattr(abinitio, "anneal", functools.partial(abinitio.anneal, iterations=2))
        yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_good_files(folder)
    return folder


def flags_of(program, words):
    """Names of flags that a command of a program takes."""
    if program == "train":
        model = train_presets.PRESETS[words[words.index("--model") + 1]]
        options = [o for o in fields(model) if train_config.used_by(o, model.objective)]
        slow = () if "--dry-run" in words else SLOW
        return [train_config.flag(o.name) for o in options if o.name not in slow]
    flags = FLAGS[program].split()
    if program == "sampling":
        name = words[words.index("--task") + 1]
        settings = fields(sampling.TASKS[name].settings)
        flags += [sampling.flag_of(setting.name) for setting in settings]
    return flags


def make_case(seed, folder):
    """(program, words of the command, what was damaged) in a folder of good files."""
    rng = random.Random(seed)
    command, files = COMMANDS[seed % len(COMMANDS)]
    program, *words = command.split()
    if files and rng.random() < 0.65:
        return program, words, damage(folder / rng.choice(files.split()), rng)

    # One flag or two. A flag may lack its value, and some take two.
    added = []
    for _ in range(rng.choice((1, 1, 2))):
        flag = rng.choice(flags_of(program, words))
        value = rng.choice(ODD_WORDS)
        odd = rng.choice(([f"{flag}={value}"], [f"{flag}={value}"], [flag, "50", value], [flag]))
        added += [f"{flag}={value}"] if flag != "--tilt-range" else odd
        if flag in ("--overwrite", "--skip-existing", "--directional", "--star", "--quiet"):
            added[-1] = flag
    return program, [*words, *added], " ".join(added)


# ---- The claims


@pytest.fixture
def limits():
    """Too much memory is an error, too much time raises `Hangs`."""

    def hangs(*_):
        raise Hangs

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    handlers = {name: signal.signal(name, hangs) for name in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(10 * SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    for name, handler in handlers.items():
        signal.signal(name, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_constant(word):
    raise AssertionError(f"{word} in a .json")


def check_output(path):
    """A file that was written can be read, and it holds finite values that are not constant."""
    if path.name == "local.mrc":
        assert np.isfinite(mrcfile.read(path)).all()
    elif path.suffix == ".mrc":
        mrc.read_map(path)
    elif path.suffix == ".json":
        json.loads(path.read_text(), parse_constant=refuse_constant)
    elif path.suffix == ".npz":
        atoms.read_archive(path)
    elif path.suffix == ".npy":
        assert np.isfinite(np.load(path)).all()
    elif path.suffix == ".pt":
        weights = checkpoint.read(path)["weights"]
        assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by Linux's means")
@pytest.mark.parametrize("seed", range(FIRST, COUNT))
def test_a_damaged_input_ends_in_one_line_and_in_no_half_file(
    seed, good, tmp_path, monkeypatch, limits
):
    folder = tmp_path / "case"
    shutil.copytree(good, folder)
    program, words, what = make_case(seed, folder)
    case = f"{program} {' '.join(words)} [{what}]"
    before = content_of(folder)

    # Only these errors become one line.
    failed = None
    monkeypatch.setenv("HOME", str(folder))
    with contextlib.chdir(folder):
        try:
            PROGRAMS[program](words)
        except (ValueError, OSError, SystemExit) as error:
            failed = error if getattr(error, "code", 1) else None
        except Hangs:
            pytest.fail(f"{case}: hangs")
        except Exception as error:
            pytest.fail(f"{case}: {type(error).__name__}: {error}")
    message = str(failed or "")
    assert not failed or message.strip(), f"{case}: no message"

    # No input changed but what a run goes on with, no temporary file stayed, and nothing was
    # written after an error.
    after = content_of(folder)
    goes_on = {"train": "run", "prepare": "prepared"}.get(program)
    for path, content in before.items():
        # The log of a run has the steps that it took before it failed.
        logged = program == "train" and path.name == "log.csv"
        if (failed and not logged) or folder / str(goes_on) not in path.parents:
            assert after.get(path) == content, f"{case}: {path.name} changed ({message})"
    new = sorted(after.keys() - before.keys())
    assert not [path for path in new if path.suffix in (".tmp", ".lock")], case
    # A training run logs, and keeps the state before its failure.
    if failed and program in ("sampling", "fsc"):
        assert not new, f"{case}: {message}, but wrote {new}"

    changed = [path for path in after if after[path] != before.get(path)]
    for path in changed:
        # One tile has one likelihood, so that its map is constant.
        if "likelihood" in words and path.suffix == ".mrc":
            continue
        try:
            check_output(path)
        except (ValueError, OSError, AssertionError) as error:
            pytest.fail(f"{case}: wrote {path.name}: {error} ({message})")
