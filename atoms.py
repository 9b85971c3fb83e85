"""Atomic models: what a PDB or mmCIF file or an archive holds, and the density of a model.

    rho(r) = sum_a Z_a (2 pi s_a^2)^(-3/2) exp(-|r - r_a|^2 / (2 s_a^2))              (1)
    s_a^2 = (resolution / (pi sqrt 2))^2 + B_a / (8 pi^2)                              (2)

Atom a has atomic number Z_a, position r_a and B-factor B_a. (1): ChimeraX `molmap`. The second
term of (2) adds the B-factors, which ChimeraX leaves out.
Positions of atoms are (x, y, z) in Å. Triples of a grid (shape, voxel_size, origin) are (z, y, x).
"""

import io
import lzma
import math
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from atoms_records import ATOMIC_NUMBER, MODEL_SUFFIXES, Atom, one_location, read_atoms
from augment import random_rotation, uniform
from files import bare_name, list_files, stop_if_many_refused
from fourier import triple


class Model(NamedTuple):
    """The N atoms of one file, in the file's frame: what a map is compared with.

    xyz (N, 3) Å, float64; atomic_number (N,); b_iso (N,) Å²; occupancy (N,); residue (N,), numbers
    0 .. R-1; labels: R strings "chain/number/name". notes: what was assumed when reading it.
    """

    xyz: Tensor
    atomic_number: Tensor
    b_iso: Tensor
    occupancy: Tensor
    residue: Tensor
    labels: list[str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """A atoms, centred, as small arrays that data workers share: what training maps are made of.

    xyz (A, 3) Å; atomic_number (A,), of partly occupied atoms times the occupancy; b_factor (A,)
    Å². Of alternate locations only one is here.
    """

    label: str
    xyz: np.ndarray
    atomic_number: np.ndarray
    b_factor: np.ndarray


# ---- Files


def read_model(path: str | Path) -> Model:
    """The first model of a PDB or mmCIF file, with all its atoms and all alternatives.

    path ends in .pdb, .ent, .cif or .mmcif, plain or followed by .gz. Atoms of unknown elements are
    left out, which a note says. Raises OSError if there is no such file, and ValueError if it
    cannot be read, holds no atoms of known elements, or none whose occupancy is above 0.
    """
    notes = []
    atoms = known_atoms(Path(path), notes)
    return to_model(atoms, notes)


def known_atoms(path: Path, notes: list[str]) -> list[Atom]:
    """The atoms of `read_atoms` whose element is known. Arguments and errors: `read_model`."""
    atoms = read_atoms(path, notes)
    known = [atom for atom in atoms if atom.element in ATOMIC_NUMBER]
    unknown = Counter(atom.element for atom in atoms if atom.element not in ATOMIC_NUMBER)
    if unknown:
        names = ", ".join(f"{count} {element or '(blank)'}" for element, count in unknown.items())
        notes.append(f"atoms of unknown elements are left out: {names}")
    if not known:
        raise ValueError(f"{path}: no atoms of known elements; correct columns 77-78 ({names})")

    # Occupancies weight the atoms.
    if all(atom.occupancy <= 0 for atom in known):
        raise ValueError(f"{path}: all {len(known)} atoms have occupancy 0; set it to 1")
    odd = sum(not 0 <= atom.occupancy <= 1 for atom in known)
    if odd:
        notes.append(f"{odd} atoms have an occupancy outside 0 to 1")
    return known


def to_model(atoms: list[Atom], notes: list[str]) -> Model:
    """The model of these atoms, its residues numbered in the order of the file."""
    residues = ["/".join((*atom.residue, atom.residue_name)) for atom in atoms]
    labels = list(dict.fromkeys(residues))
    number = {label: i for i, label in enumerate(labels)}
    real = {"dtype": torch.float64}
    return Model(
        xyz=torch.tensor([atom.xyz for atom in atoms], **real),
        atomic_number=torch.tensor([ATOMIC_NUMBER[atom.element] for atom in atoms]),
        b_iso=torch.tensor([atom.b_factor for atom in atoms], **real),
        occupancy=torch.tensor([atom.occupancy for atom in atoms], **real),
        residue=torch.tensor([number[label] for label in residues]),
        labels=labels,
        notes=tuple(notes),
    )


def read_structure(path: Path, notes: list[str]) -> Structure:
    """The structure of one PDB or mmCIF file. notes and errors: `known_atoms`."""
    atoms = known_atoms(path, notes)
    kept = one_location(atoms)
    if len(kept) < len(atoms):
        notes.append(f"{len(atoms) - len(kept)} alternate locations are left out")

    # An atom that is half there has half of its electrons.
    model = to_model(kept, notes)
    electrons = model.atomic_number * model.occupancy.clamp(0, 1)
    arrays = (model.xyz - model.xyz.mean(0), electrons, model.b_iso)
    return Structure(bare_name(path), *(x.numpy().astype(np.float32) for x in arrays))


def read_archive(path: Path) -> list[Structure]:
    """Many structures in one .npz: flat arrays over all atoms, structure i from atom_start[i] on.

    xyz (A, 3) in 0.01 Å, element (A,), bfactor (A,) in Å²; label (n,), atom_start (n + 1,).
    Raises ValueError if the file is damaged or lacks an array.
    """
    # Unpack each array as a whole, which compares its checksum, before numpy reads its header.
    wanted = ("label", "atom_start", "xyz", "element", "bfactor")
    damage = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError)
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            present = set(archive.namelist())
            members = [name for name in wanted if f"{name}.npy" in present]
            arrays = {name: from_npy(archive.read(f"{name}.npy")) for name in members}
    except (*damage, ValueError) as error:
        raise ValueError(
            f"{path}: not an .npz archive, or a truncated or damaged one; copy it again ({error})"
        ) from None
    missing = sorted(set(wanted) - set(arrays))
    if missing:
        raise ValueError(f"{path}: no archive of structures, {', '.join(missing)} missing")

    # The arrays must fit together.
    label, start, *numbers = (arrays[name] for name in wanted)
    if any(array.dtype.kind not in "iuf" for array in (start, *numbers)):
        raise ValueError(f"{path}: no archive of structures, it holds other than real numbers")
    xyz, element, b_factor = (array.astype(np.float32) for array in numbers)
    count = len(xyz)
    fits = xyz.shape == (count, 3) and element.shape == b_factor.shape == (count,)
    fits = fits and label.ndim == 1 and start.shape == (len(label) + 1,)
    if not fits or start[0] != 0 or start[-1] != count or (np.diff(start) <= 0).any():
        raise ValueError(f"{path}: no archive of structures, its arrays do not fit together")
    return [
        Structure(str(name), xyz[first:end] / 100, element[first:end], b_factor[first:end])
        for name, first, end in zip(label, start, start[1:])
    ]


def from_npy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def read_structures(path: str | Path, say=print) -> list[Structure]:
    """The structures of an archive (.npz), of one PDB or mmCIF file, or of a folder of these files.

    In a folder a file that cannot be read is skipped. say: gets a line for each of these, and for
    what was assumed about a file. Raises OSError if there is no such file or folder, ValueError
    (one line) if more than 1 % of a folder's files cannot be read.
    """
    files = list_files(path, (".npz", *MODEL_SUFFIXES))
    structures = []
    refused = []
    for file in files:
        # One bad file of a folder must not stop the others.
        notes = []
        archive = file.name.lower().endswith(".npz")
        try:
            structures += read_archive(file) if archive else [read_structure(file, notes)]
        except (ValueError, OSError) as error:
            if not Path(path).is_dir():
                raise
            refused.append(str(error))
            say(f"skipped {error}")
        for note in notes:
            say(f"{file}: {note}")
    if refused:
        stop_if_many_refused(path, "models", refused, len(files))
        say(f"{path}: {len(refused)} of {len(files)} models skipped")
    return structures


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
