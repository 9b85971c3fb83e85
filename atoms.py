"""Atomic models: PDB and mmCIF files, archives of structures, and the density of a model.

    rho(r) = sum_a Z_a (2 pi s_a^2)^(-3/2) exp(-|r - r_a|^2 / (2 s_a^2))              (1)
    s_a^2 = (resolution / (pi sqrt 2))^2 + B_a / (8 pi^2)                              (2)

Atom a has atomic number Z_a, position r_a and B-factor B_a. (1): ChimeraX `molmap`. The second
term of (2) adds the B-factors, which ChimeraX leaves out.
Positions of atoms are (x, y, z) in Å. Triples of a grid (shape, voxel_size, origin) are (z, y, x).
"""

import gzip
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from augment import random_rotation, uniform
from files import list_files
from fourier import triple

SYMBOLS = """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br
    Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho
    Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu
"""

ATOMIC_NUMBER = {symbol.upper(): z for z, symbol in enumerate(SYMBOLS.split(), 1)}
ATOMIC_NUMBER["D"] = 1  # deuterium

CIF_SUFFIXES = (".cif", ".cif.gz", ".mmcif", ".mmcif.gz")
MODEL_SUFFIXES = (".pdb", ".pdb.gz", ".ent", ".ent.gz", *CIF_SUFFIXES)


class Model(NamedTuple):
    """The N atoms of one file, in the file's frame: what a map is compared with.

    xyz (N, 3) Å, float64; atomic_number (N,); b_iso (N,) Å²; occupancy (N,); residue (N,), numbers
    0 .. R-1; labels: R strings "chain/number/name".
    """

    xyz: Tensor
    atomic_number: Tensor
    b_iso: Tensor
    occupancy: Tensor
    residue: Tensor
    labels: list[str]


@dataclass(frozen=True)
class Structure:
    """A atoms, centred, as small arrays that data workers share: what training maps are made of.

    xyz (A, 3) Å; atomic_number (A,); b_factor (A,) Å².
    """

    label: str
    xyz: np.ndarray
    atomic_number: np.ndarray
    b_factor: np.ndarray


# ---- Files


def read_model(path: str | Path) -> Model:
    """The first model of a PDB or mmCIF file, with all its atoms and all alternatives.

    path ends in .pdb, .ent, .cif or .mmcif, plain or followed by .gz. This file reads PDB itself
    and leaves mmCIF to gemmi. Raises OSError if there is no such file, and ValueError if it cannot
    be read, holds no atoms or unknown elements, or is mmCIF and gemmi is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read_atoms = _cif_atoms if path.name.endswith(CIF_SUFFIXES) else _pdb_atoms
    try:
        rows = list(read_atoms(path))
    except (ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no atoms; give a PDB or mmCIF file")

    # One tuple per column, and a message that names all elements that are unknown.
    residues, elements, xyz, occupancy, b_iso = zip(*rows)
    unknown = {element for element in elements if element.upper() not in ATOMIC_NUMBER}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{path}: no such element as {names}; correct columns 77-78")

    # Number the residues in the order of the file.
    labels = list(dict.fromkeys(residues))
    number = {label: i for i, label in enumerate(labels)}
    return Model(
        xyz=torch.tensor(xyz, dtype=torch.float64),
        atomic_number=torch.tensor([ATOMIC_NUMBER[element.upper()] for element in elements]),
        b_iso=torch.tensor(b_iso, dtype=torch.float64),
        occupancy=torch.tensor(occupancy, dtype=torch.float64),
        residue=torch.tensor([number[label] for label in residues]),
        labels=labels,
    )


def _pdb_atoms(path: Path) -> Iterator[tuple]:
    """(residue, element, xyz, occupancy, B) of each atom, by the columns of PDB format 3.3."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", errors="replace") as lines:
        for line in lines:
            # Only the first model counts.
            if line.startswith("ENDMDL"):
                return
            if not line.startswith(("ATOM  ", "HETATM")):
                continue
            # Columns 13-14 name the element where older files leave 77-78 empty. Names such as
            # "HG11" fill all four columns, and they are hydrogens.
            name = line[12:16]
            element = line[76:78].strip()
            if not element and name[0] == "H" and name[3] != " ":
                element = "H"
            elif not element:
                element = name[:2].strip(" 0123456789")

            # Occupancy and B-factor may be blank: 1 and 0.
            residue = "/".join(part.strip() for part in (line[21], line[22:27], line[17:20]))
            xyz = [float(line[30:38]), float(line[38:46]), float(line[46:54])]
            occupancy = float(line[54:60].strip() or 1)
            b_iso = float(line[60:66].strip() or 0)
            yield residue, element, xyz, occupancy, b_iso


def _cif_atoms(path: Path) -> Iterator[tuple]:
    """The same as `_pdb_atoms`, of a mmCIF file."""
    try:
        import gemmi
    except ImportError:
        message = "reading mmCIF needs gemmi; pip install gemmi, or give a PDB file"
        raise ValueError(message) from None
    # [0] is the first model of the file.
    for site in gemmi.read_structure(str(path))[0].all():
        residue = f"{site.chain.name}/{site.residue.seqid}/{site.residue.name}"
        atom = site.atom
        yield residue, atom.element.name, atom.pos.tolist(), atom.occ, atom.b_iso


def read_archive(path: Path) -> list[Structure]:
    """Many structures in one .npz: flat arrays over all atoms, structure i from atom_start[i] on.

    xyz (A, 3) in 0.01 Å, element (A,), bfactor (A,) in Å²; label (n,), atom_start (n + 1,).
    Raises ValueError if the file is damaged or lacks an array.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz archive, or a truncated one; copy it again")
    # Read the five flat arrays, of all structures together.
    with np.load(path) as archive:
        wanted = ("label", "atom_start", "xyz", "element", "bfactor")
        missing = sorted(set(wanted) - set(archive))
        if missing:
            raise ValueError(f"{path}: no archive of structures, {', '.join(missing)} missing")
        label, start, *arrays = (archive[name] for name in wanted)

    # Cut them into structures.
    xyz, element, b_factor = (array.astype(np.float32) for array in arrays)
    return [
        Structure(str(name), xyz[first:end] / 100, element[first:end], b_factor[first:end])
        for name, first, end in zip(label, start, start[1:])
    ]


def read_structures(path: str | Path) -> list[Structure]:
    """The structures of an archive (.npz), of one PDB or mmCIF file, or of a folder of these files.

    Raises OSError if there is no such file or folder, ValueError (one line) if a file is damaged.
    """
    files = list_files(path, (".npz", *MODEL_SUFFIXES))
    if [file.suffix for file in files] == [".npz"]:
        return read_archive(files[0])
    return [_centred(file, read_model(file)) for file in files if file.suffix != ".npz"]


def _centred(file: Path, model: Model) -> Structure:
    arrays = (model.xyz - model.xyz.mean(0), model.atomic_number, model.b_iso)
    label = file.name.split(".")[0]
    return Structure(label, *(x.numpy().astype(np.float32) for x in arrays))


# ---- Atoms on a grid


def atoms_inside(xyz: Tensor, shape, voxel_size, corner) -> Tensor:
    """Which atoms lie between the voxels of a map: boolean (N,).

    xyz (N, 3) Å; shape (D, H, W); voxel_size and corner, the centre of voxel (0, 0, 0), in Å.
    """
    corner, voxel_size = xyz.new_tensor(triple(corner)), xyz.new_tensor(triple(voxel_size))
    # Positions in voxels: inside from the first voxel's centre to the last one's.
    index = (xyz.flip(1) - corner) / voxel_size
    last = xyz.new_tensor(shape) - 1
    return ((index >= 0) & (index <= last)).all(1)


def placed(structure: Structure, generator: Generator) -> tuple[Tensor, Tensor]:
    """(xyz, b_factor) of a structure, rotated at random and placed off-centre.

    Half of the structures get B = 0, the others their deposited B-factors above the 5th percentile,
    times a uniform number.
    """
    # The anchor moves to the centre of the box: an atom, scaled so that small molecules stay whole
    # and any part of a large one can be in the middle.
    xyz = torch.from_numpy(structure.xyz)
    anchor = xyz[torch.randint(len(xyz), (1,), generator=generator)] * uniform(0, 1, generator)
    xyz = (xyz - anchor) @ random_rotation(generator).T

    # Every second structure is blurred.
    b_factor = torch.zeros(len(xyz))
    if uniform(0, 1, generator) < 0.5:
        b_factor = torch.from_numpy(structure.b_factor)
        above = (b_factor - b_factor.quantile(0.05)).clamp(min=0)
        b_factor = above * uniform(0, 1, generator)
    return xyz, b_factor


def molmap(
    xyz,
    atomic_number,
    resolution: float,
    *,
    voxel_size=None,
    shape=None,
    origin=None,
    b_factor=None,
    cutoff: float = 5.0,
) -> tuple[Tensor, tuple, tuple]:
    """Density of an atomic model at a resolution (1): ChimeraX `molmap`.

    xyz (A, 3) Å; atomic_number (A,): weights; resolution in Å; b_factor in Å², (A,) or one number,
    default 0. voxel_size in Å: default resolution / 3; shape: default the model and 3 * resolution
    on each side; origin, the centre of voxel (0, 0, 0) in Å: default such that the centres of grid
    and model coincide. An atom fills the box of half side cutoff * s_a; math.inf: the whole grid.

    Returns (density (D, H, W) float32 in Z per Å^3, voxel_size, origin), so `Map(*molmap(...))` is
    a map. Differentiable in xyz, atomic_number and b_factor. Raises ValueError for bad arguments.
    """
    xyz = torch.as_tensor(xyz)
    number = {"dtype": torch.float32, "device": xyz.device}
    weight = torch.as_tensor(atomic_number, **number)
    b_factor = torch.as_tensor(0.0 if b_factor is None else b_factor, **number)
    voxel_size = triple(resolution / 3 if voxel_size is None else voxel_size)
    _check_atoms(xyz, weight, b_factor)
    if not (resolution > 0 and min(voxel_size) > 0):
        given = f"resolution {resolution} Å and voxel_size {voxel_size} Å"
        raise ValueError(f"molmap: {given} must be positive")
    if origin is not None and shape is None:
        raise ValueError("molmap: an origin without a shape; give both or neither")

    # Float64 until distances are small: coordinates may be far from the origin.
    position = xyz.double().flip(1)  # (A, 3) as z, y, x
    lowest = position.detach().amin(0).tolist()
    highest = position.detach().amax(0).tolist()

    # The default grid: around all atoms, its centre at theirs.
    if shape is None:
        sides = [high - low + 6 * resolution for low, high in zip(lowest, highest)]
        shape = [math.ceil(side / voxel) for side, voxel in zip(sides, voxel_size)]
    if origin is None:
        axes = zip(lowest, highest, shape, voxel_size)
        origin = [(low + high) / 2 - (n - 1) / 2 * voxel for low, high, n, voxel in axes]
    origin = triple(origin)

    # The width of each atom's Gaussian, its position and its reach in voxels.
    variance = (resolution / (math.pi * math.sqrt(2))) ** 2 + b_factor / (8 * math.pi**2)  # (2)
    sigma = variance.sqrt().expand(len(xyz))
    voxel = position.new_tensor(voxel_size)
    index = (position - position.new_tensor(origin)) / voxel
    reach = cutoff * sigma[:, None] / voxel

    # Leave out atoms that reach no voxel.
    last = position.new_tensor(shape) - 1
    near = ((index >= -reach) & (index <= last + reach)).all(1)
    index, reach, sigma, weight = index[near], reach[near], sigma[near], weight[near]

    # Each atom is a product of three 1-D Gaussians.                          (1)
    along_z, along_y, along_x = (
        _gaussians(index[:, axis], reach[:, axis], sigma, shape[axis], voxel_size[axis], cutoff)
        for axis in range(3)
    )
    height = weight * (2 * math.pi * sigma**2) ** -1.5
    density = _sum_of_products(along_z, along_y, along_x * height[:, None])
    return density, voxel_size, origin


def _check_atoms(xyz: Tensor, weight: Tensor, b_factor: Tensor) -> None:
    count, shape = len(xyz), tuple(xyz.shape)
    if shape != (count, 3) or count == 0 or not xyz.isfinite().all():
        raise ValueError(f"molmap: xyz has shape {shape}; give finite (atoms, 3), atoms > 0")
    if weight.shape != (count,) or b_factor.shape not in ((), (count,)):
        raise ValueError(
            f"molmap: {count} atoms, but atomic_number has shape {tuple(weight.shape)} "
            f"and b_factor {tuple(b_factor.shape)}; give one value per atom"
        )
    if not (weight.isfinite().all() and (b_factor >= 0).all()):
        raise ValueError("molmap: atomic_number must be finite and b_factor at least 0 Å^2")


def _gaussians(
    index: Tensor, reach: Tensor, sigma: Tensor, side: int, voxel_size: float, cutoff: float
) -> Tensor:
    """exp(-d^2 / (2 sigma^2)) of each atom at each voxel of one axis: (A, side), 0 beyond reach.

    index, reach (A,): position and reach in voxels; sigma (A,) and voxel_size in Å.
    """
    # A window of this many voxels holds all that one atom reaches.
    longest = 2 * reach.max().item() + 2 if len(reach) else 1
    window = torch.arange(int(min(side, longest)), device=index.device)
    first = (index - reach).ceil().clamp(0, side - len(window)).detach()

    # Distances in Å: float64 up to the first voxel, float32 from there.
    start = ((first - index) * voxel_size).float()
    distance = start[:, None] + window * voxel_size
    square = (distance / sigma[:, None]) ** 2
    value = torch.where(square <= cutoff**2, (-square / 2).exp(), 0)

    # Put each window in its place on the axis.
    voxels = first.long()[:, None] + window
    return value.new_zeros(len(value), side).scatter(1, voxels, value)


def _sum_of_products(along_z: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """Sum over atoms of the products of their three profiles: (A, D), (A, H), (A, W) -> (D, H, W).

    Columns of 8 x 8 voxels along x, each with only the atoms that reach it, keep this fast.
    """
    # The atoms that reach a column reach its 8 planes along z and its 8 rows along y.
    parts_y = along_y.split(8, dim=1)
    reached_y = [part.any(1) for part in parts_y]
    layers = []
    for part_z in along_z.split(8, dim=1):
        reached_z = part_z.any(1)
        columns = []
        for part_y, reached in zip(parts_y, reached_y):
            # Multiply z by y here, and by x in the sum over atoms.
            atoms = (reached_z & reached).nonzero()[:, 0]
            plane = part_z[atoms, :, None] * part_y[atoms, None]  # (atoms, 8, 8)
            columns.append(torch.einsum("azy,ax->zyx", plane, along_x[atoms]))
        layers.append(torch.cat(columns, 1))
    return torch.cat(layers)
