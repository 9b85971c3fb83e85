"""Damaged maps, checkpoints, text files and flags: no traceback, nothing half written or changed.

A seed makes a case: a command of one of the programs, and one file or flag of it damaged. CI runs a
sample. `CORPUS=1000 pytest tests/test_damaged_inputs.py` runs the first thousand.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from made_maps import degraded, molecule, wedge, write_mrc
from made_maps import random as noise
from mrcfile.dtypes import HEADER_DTYPE
from torch import nn

import checkpoint
import data_prepare
import fsc_score
import mrc
import sampling
import train
from model_hdit import HDiT, HDiTConfig

SHAPE = (16, 16, 16)
COUNT = int(os.environ.get("CORPUS", 60))
SECONDS = 60  # a case that takes longer hangs
BYTES = 6 * 2**30  # more memory than a case may use

PROGRAMS = {
    "sampling": sampling.main,
    "fsc": fsc_score.main,
    "train": train.main,
    "prepare": data_prepare.main,
}

# Commands, and the files of each that may be damaged.
SMALL = "--ckpt net.pt --steps 1 --samples 1 -o out.mrc"
COMMANDS = [
    ("sampling", f"--task wedge in.mrc --mask mask.mrc {SMALL}", "in.mrc mask.mrc net.pt"),
    ("sampling", f"--task wedge in.mrc --truth truth.mrc --method pocs {SMALL}",
     "in.mrc truth.mrc"),
    ("sampling", f"--task denoise half_1.mrc half_2.mrc {SMALL}", "half_1.mrc half_2.mrc net.pt"),
    ("sampling", f"--task denoise in.mrc --noise-from-fsc fsc.csv {SMALL}", "in.mrc fsc.csv"),
    ("sampling", f"--task anisotropic half_1.mrc half_2.mrc --orientations p.star {SMALL}",
     "half_1.mrc p.star"),
    ("sampling", f"--task abinitio stack.mrcs --method classical {SMALL}", "stack.mrcs"),
    ("sampling", f"--task generate {SMALL}", "net.pt"),
    ("fsc", "half_1.mrc half_2.mrc --mask mask.mrc --sharpen sharp.mrc --b-factor -20 -o out",
     "half_1.mrc half_2.mrc mask.mrc"),
    ("fsc", "half_1.mrc half_2.mrc --local-resolution local.mrc --star -o out", "half_1.mrc"),
    ("fsc", "in.mrc --truth truth.mrc --directional -o out", "in.mrc truth.mrc"),
    ("fsc", "truth.mrc --model model.pdb --resolution 3 -o out", "truth.mrc model.pdb"),
    ("train", "--model tiny --dry-run --crop 16 --batch 2 --micro-batch 2 --crops-per-map 1", ""),
    ("prepare", "maps emdb out --workers 1 --metadata emdb.csv",
     "emdb/emd_1234.mrc emdb.csv"),
    ("prepare", "urls emdb.csv", "emdb.csv"),
]  # fmt: skip

ODD_NUMBERS = ["nan", "inf", "-1", "0", "1e30", "1e-30", "99999999", "x", ""]
ODD_FIELDS = (*mrc.SIZES, *mrc.AXES, *mrc.SAMPLINGS, "nxstart", "mode", "cella", "cellb", "ispg")
ODD_FIELDS += ("nsymbt", "origin", "machst")
FLAGS = {
    "sampling": ["--steps", "--samples", "--seed", "--voxel-size", "--noise", "--snr", "--device"],
    "fsc": ["--voxel-size", "--resolution", "--seed", "--b-factor"],
    "train": ["--lr", "--steps", "--batch", "--crop", "--warmup", "--seed", "--workers", "--decay"],
    "prepare": ["--voxel-size", "--max-side", "--max-resolution", "--workers"],
}


class Hangs(BaseException):
    """Not an Exception, so that no program takes it for an error of its own."""


# ---- What a case begins with


@pytest.fixture(scope="module", autouse=True)
def without_matplotlib():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with one good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    truth = molecule(SHAPE)
    mask = torch.zeros(SHAPE)
    mask[3:13, 3:13, 3:13] = 1
    maps = {"truth": truth, "mask": mask, "in": degraded(truth, wedge(SHAPE))}
    maps |= {f"half_{i}": truth + 0.1 * noise(SHAPE, i) for i in (1, 2)}
    for name, density in maps.items():
        write_mrc(folder / f"{name}.mrc", density)
    (folder / "emdb").mkdir()
    shutil.copy(folder / "truth.mrc", folder / "emdb" / "emd_1234.mrc")

    # Images of a larger molecule.
    with mrcfile.new(folder / "stack.mrcs") as file:
        density = molecule((24, 24, 24))
        images = [density.sum(axis) for axis in (0, 1, 2)]
        file.set_data((torch.stack(images) + 0.1 * noise((3, 24, 24))).numpy())
        file.set_image_stack()
        file.voxel_size = 1.5

    # A network, and text files.
    torch.manual_seed(0)
    net = HDiT(HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, patch_size=4))
    for weight in net.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
    checkpoint.save(folder / "net.pt", net, voxel_size=1.5, box=16, mean=0.04, std=0.09)
    (folder / "fsc.csv").write_text("".join(f"{0.9 - 0.1 * k}\n" for k in range(8)))
    labels = "\n".join(f"_rlnAngle{name}" for name in ("Rot", "Tilt", "Psi"))
    rows = "\n".join(f"{40 * i} {20 * i} {10 * i}" for i in range(8))
    (folder / "p.star").write_text(f"data_particles\n\nloop_\n{labels}\n{rows}\n")
    atom = "ATOM  {0:5d}  CA  ALA A{0:4d}    {1:8.3f}{2:8.3f}{3:8.3f}  1.00 20.00           C\n"
    atoms = [atom.format(i, 16.0 + i, -8.0 + i, 50.0 - i) for i in range(1, 9)]
    (folder / "model.pdb").write_text("".join(atoms))
    row = "EMD-1234,apoferritin,singleParticle,2.1,half.map.gz\n"
    (folder / "emdb.csv").write_text(f"{data_prepare.METADATA}\n{row}")
    return folder


# ---- Damage. Each function changes a file, or the words of a command, by a random generator.


def flip_bytes(path, rng, end=None):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 8))):
        content[rng.randrange(min(end or len(content), len(content)))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def odd_header(path, rng):
    """One field of the header with a value that nobody expects."""
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content[:1024], HEADER_DTYPE).copy()
    name = rng.choice(ODD_FIELDS)
    field = header[name]
    if name in ("cella", "cellb", "origin"):
        value = rng.choice((0, -1, 1e-30, 1e30, float("nan"), float("inf")))
        field[rng.choice("xyz" if name != "cellb" else ("alpha", "beta", "gamma"))] = value
    elif name == "machst":
        field[...] = [rng.randrange(256) for _ in range(4)]
    else:
        field[...] = rng.choice((0, -1, 1, 2, 7, 12, 401, 2**16, 2**31 - 1))
    path.write_bytes(header.tobytes() + content[1024:])


def odd_values(path, rng):
    """Densities of the wrong size, constant, not finite, or of another mode."""
    content = bytearray(path.read_bytes())
    x = np.frombuffer(content[1024:], "<f4").copy()
    change = rng.choice(("times", "plus", "constant", "one", "negative", "slab"))
    with np.errstate(over="ignore", under="ignore"):
        if change == "times":
            x *= np.float32(rng.choice((1e38, 1e30, 1e-30, 1e-38, 1e-44, -1)))
        elif change == "plus":
            x += np.float32(rng.choice((1e6, 1e30, -1e6)))
        elif change == "constant":
            x[:] = rng.choice((0, 1, 1e38))
        elif change == "one":
            x[rng.randrange(len(x))] = rng.choice((np.nan, np.inf, 1e38, -1e38))
        elif change == "negative":
            x = -np.abs(x)
        else:
            x[len(x) // 2 :] = 0
    path.write_bytes(content[:1024] + x.tobytes())


def odd_checkpoint(path, rng):
    """A field, or a weight, of the wrong type, shape or value."""
    content = torch.load(path, weights_only=True)
    values = (None, "x", float("nan"), float("inf"), -1, 0, 1e-30, 10**6, [1], {}, torch.ones(2))
    where = rng.choice(("field", "config", "weights"))
    if where == "field":
        content[rng.choice(sorted(content))] = rng.choice(values)
    elif where == "config":
        content["config"][rng.choice(sorted(content["config"]))] = rng.choice(values)
    else:
        name = rng.choice(sorted(content["weights"]))
        weight = content["weights"][name]
        odd = (*values, weight * float("nan"), weight[None], weight.int(), weight.to(torch.cfloat))
        content["weights"][name] = rng.choice(odd)
    torch.save(content, path)


def odd_text(path, rng):
    """A word, a character or a line that does not belong there."""
    text = path.read_bytes()
    change = rng.choice(("word", "byte", "line", "empty"))
    if change == "word":
        words = text.split(b" ")
        odd = (*ODD_NUMBERS, "'a b'", "1e999", "_loop", "data_", ",,,")
        words[rng.randrange(len(words))] = rng.choice(odd).encode()
        text = b" ".join(words)
    elif change == "byte":
        place = rng.randrange(len(text))
        text = text[:place] + bytes([rng.randrange(256)]) + text[place + rng.randrange(3) :]
    elif change == "line":
        lines = text.splitlines(keepends=True)
        del lines[rng.randrange(len(lines))]
        text = b"".join(lines)
    else:
        text = b""
    path.write_bytes(text)


def damage(path, rng):
    """Damage a file in one of the ways that its kind has."""
    if path.suffix in (".mrc", ".mrcs"):
        ways = [odd_header, odd_header, odd_values, odd_values, cut, flip_header]
    elif path.suffix == ".pt":
        ways = [odd_checkpoint, odd_checkpoint, odd_checkpoint, flip_bytes, cut]
    else:
        ways = [odd_text, odd_text, cut, flip_bytes]
    way = rng.choice(ways)
    way(path, rng)
    return f"{path.name}: {way.__name__}"


def flip_header(path, rng):
    flip_bytes(path, rng, 224)


def make_case(seed, folder):
    """(program, words of the command, what was damaged) in a folder of good files."""
    rng = random.Random(seed)
    program, command, files = rng.choice(COMMANDS)
    words = command.split()
    if not files or rng.random() < 0.2:
        flag = rng.choice(FLAGS[program])
        value = rng.choice(ODD_NUMBERS)
        return program, [*words, f"{flag}={value}"], f"{flag}={value}"
    what = damage(folder / rng.choice(files.split()), rng)
    return program, words, what


# ---- The claims


@pytest.fixture
def limits():
    """Too much memory is an error, too much time raises `Hangs`."""

    def hangs(*_):
        raise Hangs

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    old_handler = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old_handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_constant(word):
    raise AssertionError(f"{word} in a .json")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by Linux's means")
@pytest.mark.parametrize("seed", range(COUNT))
def test_a_damaged_input_ends_in_one_line_and_in_no_half_file(seed, good, tmp_path, limits):
    folder = tmp_path / "case"
    shutil.copytree(good, folder)
    program, words, what = make_case(seed, folder)
    case = f"{program} {' '.join(words)} [{what}]"
    before = content_of(folder)

    # Only these errors become one line.
    failed = None
    with contextlib.chdir(folder):
        try:
            PROGRAMS[program](words)
        except (ValueError, OSError, SystemExit) as error:
            failed = error
        except Hangs:
            pytest.fail(f"{case}: hangs")
        except Exception as error:
            pytest.fail(f"{case}: {type(error).__name__}: {error}")

    # No input changed, no temporary file stayed, nothing was written after an error.
    after = content_of(folder)
    for path, content in before.items():
        assert after.get(path) == content, f"{case}: {path.name} changed"
    new = sorted(after.keys() - before.keys())
    assert not [path for path in new if path.suffix in (".tmp", ".lock")], case
    if failed and getattr(failed, "code", 1) and program in ("sampling", "fsc"):
        assert not new, f"{case}: {failed}, but wrote {new}"

    # A map that was written can be read: it is finite and not constant.
    for path in new:
        if path.suffix == ".mrc" and path.name != "local.mrc":
            mrc.read_map(path)
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=refuse_constant)
