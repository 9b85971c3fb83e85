"""One good file of every kind that a program reads, and the ways to damage a file of each kind.

write_good_files(folder)    maps, stacks, networks, archives, models, tables, prepared folders
damage(path, rng)           changes a file in one of the ways that KINDS has for its name
"""

import gzip
import json
import re
import shutil

import mrcfile
import numpy as np
import pytest
import torch
from made_maps import degraded, molecule, wedge, write_mrc
from made_maps import random as noise
from mrcfile.dtypes import HEADER_DTYPE
from small_runs import SCUNETS, TINY
from torch import nn

import atoms
import checkpoint
import data_download
import data_pairs
import data_prepare
import mrc
import train
from model_hdit import HDiT
from model_scunet import SCUNet

SHAPE = (16, 16, 16)

# Commands that train for one step on 16^3 voxels.
TRAIN = "--steps 1 --batch 2 --micro-batch 2 --held-out-crops 2 --workers 0"

CIF_COLUMNS = (
    "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_seq_id "
    "Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_asym_id"
)


# ---- Good files


def write_good_files(folder):
    """All of them. The names say what they are, see the commands of test_damaged_inputs.py."""
    write_maps(folder)
    write_networks(folder)
    write_models(folder)
    write_tables(folder)

    # What earlier commands have made.
    settings = {"voxel_size": 1.5, "workers": 1, "say": silent}
    data_prepare.prepare(folder / "emdb", folder / "prepared", **settings)
    common = f"--model small --data {folder}/emdb --out {folder}/run {TRAIN}"
    train.main(common.split())


def silent(*_):
    pass


def write_maps(folder):
    truth = molecule(SHAPE)
    mask = torch.zeros(SHAPE)
    mask[3:13, 3:13, 3:13] = 1
    maps = {"truth": truth, "mask": mask, "in": degraded(truth, wedge(SHAPE))}
    maps |= {f"half_{i}": truth + 0.1 * noise(SHAPE, i) for i in (1, 2)}
    for name, density in maps.items():
        write_mrc(folder / f"{name}.mrc", density)
    packed = gzip.compress((folder / "in.mrc").read_bytes())
    (folder / "packed.map.gz").write_bytes(packed)

    # A folder of maps from EMDB, and one of maps with their models.
    (folder / "emdb").mkdir()
    for number in (1234, 1235, 1236):
        shutil.copy(folder / "truth.mrc", folder / "emdb" / f"emd_{number}.mrc")
    (folder / "pairs").mkdir()
    shutil.copy(folder / "truth.mrc", folder / "pairs" / "a.mrc")

    # Images of a larger molecule.
    with mrcfile.new(folder / "stack.mrcs") as file:
        density = molecule((24, 24, 24))
        images = [density.sum(axis) for axis in (0, 1, 2)]
        file.set_data((torch.stack(images) + 0.1 * noise((3, 24, 24))).numpy())
        file.set_image_stack()
        file.voxel_size = 1.5


def write_networks(folder):
    torch.manual_seed(0)
    net = HDiT(TINY)
    for weight in net.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
    checkpoint.save(folder / "net.pt", net, voxel_size=1.5, box=16, mean=0.04, std=0.09)

    # The same weights as the authors' files have them.
    try:
        from safetensors.torch import save_file
    except ImportError:
        pass
    else:
        save_file(net.state_dict(), folder / "public.safetensors")
    scunet = SCUNet(SCUNETS["small-sharpen"].net)
    for task in ("sharpen", "superres", "wedge3d"):
        file = folder / f"{task}.pt"
        checkpoint.save(file, scunet, voxel_size=1.5, box=12, mean=0.0, std=1.0, task=task)


def write_models(folder):
    """Eight atoms that lie in truth.mrc, in four kinds of file."""
    line = "ATOM  {0:5d}  CA  ALA A{0:4d}    {1:8.3f}{2:8.3f}{3:8.3f}  1.00 20.00           C\n"
    places = [(16.0 + i, -8.0 + i, 50.0 - i) for i in range(1, 9)]
    pdb = "".join(line.format(i, *place) for i, place in enumerate(places, 1))
    row = "ATOM {0} C CA . ALA A {0} {1} {2} {3} 1.0 20.0 {0} A\n"
    rows = "".join(row.format(i, *place) for i, place in enumerate(places, 1))
    columns = "".join(f"_atom_site.{name}\n" for name in CIF_COLUMNS.split())
    (folder / "entries").mkdir()
    for name in ("model.pdb", "pairs/a.pdb", "entries/1abc.pdb"):
        (folder / name).write_text(pdb)
    (folder / "model.cif").write_text(f"data_1ABC\n#\nloop_\n{columns}{rows}#\n")

    xyz = torch.randn(600, 3, generator=torch.Generator().manual_seed(0)).numpy() * 5
    structures = []
    for label, part in zip("abc", np.split(xyz, 3)):
        structures.append(atoms.Structure(label, part, np.full(200, 6), np.full(200, 20)))
    data_download.write_archive(folder / "atoms.npz", structures)


def write_tables(folder):
    # FSC curves: one number a line, and as fsc.py writes them.
    values = [0.9 - 0.1 * k for k in range(8)]
    (folder / "fsc.csv").write_text("".join(f"{value}\n" for value in values))
    table = ["shell,per_angstrom,angstrom,unmasked"]
    table += [f"{k},{k / 24},{24 / k if k else 'inf'},{0.95 - 0.1 * k}" for k in range(9)]
    (folder / "table.csv").write_text("\n".join(table) + "\n")

    # Angles: a star file, one of subtomograms, and plain numbers.
    rows = [f"{40 * i} {20 * i} {10 * i}" for i in range(8)]
    (folder / "angles.txt").write_text("\n".join(rows) + "\n")
    names = [f"rlnAngle{axis}" for axis in ("Rot", "Tilt", "Psi")]
    (folder / "p.star").write_text(star(names, rows))
    names += [f"rlnTomoSubtomogram{axis}" for axis in ("Rot", "Tilt", "Psi")]
    (folder / "tomo.star").write_text(star(names, [f"{row} {row}" for row in rows]))

    # Lists of entries and of pairs.
    row = "EMD-1234,apoferritin,singleParticle,2.1,half.map.gz\n"
    (folder / "emdb.csv").write_text(f"{data_prepare.METADATA}\n{row}")
    (folder / "entries.tsv").write_text("label\tpdb_id\tchains\tatoms\n1ABC\t1abc\tA\t8\n")
    (folder / "pairs" / data_pairs.PAIRS).write_text("map,model,resolution\na.mrc,a.pdb,3.0\n")


def star(names, rows):
    labels = "".join(f"_{name}\n" for name in names)
    return f"data_particles\n\nloop_\n{labels}" + "\n".join(rows) + "\n"


# ---- Damage. Each function changes a file by a random generator.

ODD_NUMBERS = ["nan", "inf", "-1", "0", "1e30", "1e-30", "99999999", "x", ""]
ODD_VALUES = (None, "x", "", float("nan"), float("inf"), -1, 0, 1e-30, 10**6, [1], {}, True)
ODD_FIELDS = (*mrc.SIZES, *mrc.AXES, *mrc.SAMPLINGS, "nxstart", "mode", "cella", "cellb", "ispg")
ODD_FIELDS += ("nsymbt", "origin", "machst")


def flip_bytes(path, rng, end=None):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 8))):
        content[rng.randrange(min(end or len(content), len(content)))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_header(path, rng):
    flip_bytes(path, rng, 224)


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
    path.write_bytes(content[:1024] + changed_values(x, rng).tobytes())


def changed_values(x, rng):
    """A float array with values that no map has."""
    change = rng.choice(("times", "plus", "constant", "one", "negative", "slab"))
    with np.errstate(over="ignore", under="ignore"):
        if change == "times":
            x *= x.dtype.type(rng.choice((1e38, 1e30, 1e-30, 1e-38, 1e-44, -1)))
        elif change == "plus":
            x += x.dtype.type(rng.choice((1e6, 1e30, -1e6)))
        elif change == "constant":
            x[...] = rng.choice((0, 1, 1e38))
        elif change == "one":
            x.flat[rng.randrange(x.size)] = rng.choice((np.nan, np.inf, 1e38, -1e38))
        elif change == "negative":
            x = -np.abs(x)
        else:
            x[len(x) // 2 :] = 0
    return x


def odd_array(path, rng):
    """A prepared map of another type or shape, or with other values."""
    x = np.load(path)
    shapes = [x[0], x[None], x[:0], x[:3], x[:4, :4, :4]]
    types = [x.astype(kind) for kind in ("f8", "i2", "U", "c8")]
    values = changed_values(x.copy(), rng)
    np.save(path, rng.choice([*shapes, *types, *[values] * 9]))


def odd_archive(path, rng):
    """One array of an archive of structures that does not fit, or is missing."""
    arrays = dict(np.load(path))
    name = rng.choice(sorted(arrays))
    x = arrays[name]
    odd = [x[:-1], x[None], x[:0], x.astype("U"), x.astype("c8") if name != "label" else x[::-1]]
    if name != "label":
        wide = x.astype("f8")
        wide.flat[rng.randrange(x.size)] = rng.choice((np.nan, np.inf, -1, 1e30, 1e6))
        odd += [x[::-1], 0 * x, x - x.max(), wide, wide, wide]
    arrays[name] = odd[rng.randrange(len(odd))]
    if rng.random() < 0.1:
        del arrays[name]
    np.savez(path, **arrays)


def odd_leaf(tree, rng, values):
    """Change one value anywhere in nested dicts and lists; deep values are as likely as others."""
    keys = sorted(tree, key=str) if isinstance(tree, dict) else range(len(tree))
    key = rng.choice(list(keys))
    value = tree[key]
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        odd_leaf(value, rng, values)
    elif torch.is_tensor(value):
        odd = (value[None], value.int(), value.to(torch.cfloat), value * float("nan"), value + 1e30)
        tree[key] = rng.choice((*values, *odd, *odd))
    else:
        tree[key] = rng.choice(values)


def odd_checkpoint(path, rng):
    """A field, a weight or a number of the optimiser of the wrong type, shape or value."""
    content = torch.load(path, weights_only=True)
    odd_leaf(content, rng, (*ODD_VALUES, torch.ones(2)))
    torch.save(content, path)


def odd_public(path, rng):
    """One of the authors' weights missing, or of another type, shape or value."""
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(path)
    name = rng.choice(sorted(weights))
    weight = weights[name]
    odd = (weight[None].clone(), weight.int(), weight.half(), weight * float("nan"), weight[:0])
    weights[name] = rng.choice(odd)
    if rng.random() < 0.2:
        del weights[name]
    safetensors.save_file(weights, path)


def odd_settings(path, rng):
    """A value of another type, also in the place of all of them."""
    content = [json.loads(path.read_text())]
    odd_leaf(content, rng, ODD_VALUES)
    path.write_text(json.dumps(content[0]))


def odd_text(path, rng):
    """A word, a character or a line that does not belong there."""
    text = path.read_bytes()
    change = rng.choice(("word", "word", "byte", "line", "twice", "empty"))
    lines = text.splitlines(keepends=True)
    if change == "word":
        # What stands between blanks, commas and ends of lines.
        parts = re.split(rb"([ ,\t\n]+)", text)
        odd = (*ODD_NUMBERS, "'a b'", "1e999", "_loop", "data_", ",,,", "../in.mrc")
        parts[2 * rng.randrange(len(parts) // 2)] = rng.choice(odd).encode()
        text = b"".join(parts)
    elif change == "byte":
        place = rng.randrange(len(text))
        text = text[:place] + bytes([rng.randrange(256)]) + text[place + rng.randrange(3) :]
    elif change == "line":
        del lines[rng.randrange(len(lines))]
        text = b"".join(lines)
    elif change == "twice":
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
        text = b"".join(lines)
    else:
        text = b""
    path.write_bytes(text)


BYTES = (flip_bytes, cut)
VALUES = (odd_header, odd_header, odd_values, odd_values, cut, flip_header)
TEXT = (odd_text, odd_text, odd_text, *BYTES)

# The end of a file's name -> what can be wrong with such a file.
KINDS = {
    ".mrc": VALUES,
    ".mrcs": VALUES,
    ".gz": BYTES,
    ".pt": (odd_checkpoint,) * 4 + BYTES,
    ".safetensors": (odd_public,) * 4 + BYTES,
    ".npz": (odd_archive,) * 4 + BYTES,
    ".npy": (odd_array,) * 4 + BYTES,
    ".json": (odd_settings,) * 2 + TEXT,
    ".csv": TEXT,
    ".tsv": TEXT,
    ".star": TEXT,
    ".txt": TEXT,
    ".pdb": TEXT,
    ".cif": TEXT,
}


def damage(path, rng):
    """Damage a file in one of the ways that its kind has; returns which."""
    way = rng.choice(KINDS[path.suffix])
    way(path, rng)
    return f"{path.name}: {way.__name__}"
