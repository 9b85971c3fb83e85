"""Atomic models: PDB and mmCIF files, archives of structures, and the density of a model.

(Equations and departures of the file that this one came from; keep what belongs here.)
Fourier shell correlation, and every other number that says how good a map is.

    FSC(k) = Re sum_k A conj(B) / sqrt(sum_k |A|^2 sum_k |B|^2)         sums over shell k                     (1)
    FSC_true = (FSC_masked - FSC_random) / (1 - FSC_random)             the mask's own correlation taken out  (2)
    C = sqrt(2 FSC / (1 + FSC))                                         weight of the mean of two half maps   (3)
    ln <|F|>(s) = ln F_0 - B s^2 / 4                                    Guinier plot, s in 1/Å                (4)
    sphericity = pi^(1/3) (6 V)^(2/3) / A                               V, A of the surface |s| = s_0.143     (5)
    F(s) = sum_j n_j f_j(s) exp(-B_j s^2 / 4) exp(-2 pi i s . x_j)      an atomic model's structure factors   (6)
    f(s) = sum_i a_i exp(-b_i s^2 / 4)                                  electron scattering by one atom       (7)
    Q = corr(density on shells of radius R about an atom, exp(-R^2 / (2 sigma^2)))                            (8)

Shell k holds the frequencies that round to k / box cycles per voxel, box the shortest side, each coefficient of the
full transform counted once. A radial filter multiplies A on a shell by one number: it cannot change (1), so no
B-factor or Wiener step moves an FSC. Voxel sizes and origins are those of data.Map, one number or (z, y, x);
positions of atoms are (x, y, z).
(1): Harauz & van Heel 1986, Optik 73:146. (2): Chen et al. 2013, Ultramicroscopy 135:24. (3), (4): Rosenthal &
Henderson 2003, J. Mol. Biol. 333:721. (5): Tan et al. 2017, Nat. Methods 14:793. (6), map-model correlations and
d_model: Afonine et al. 2018, Acta Cryst. D74:814. (7): Int. Tables C, table 4.3.2.2. (8): Pintilie et al. 2020,
Nat. Methods 17:328. CryoFM's FSC_AUC and FSC_0.5: its appendix C.1.
Departure 1: CryoFM's release bins by ceil(radius) and leaves out the zero frequency; we round. Binning alone moves
FSC_AUC by up to 0.05, so `fsc` and what calls it take convention="ours", "relion" or "cryofm".
Departures 2 and 3, from exactness and from cctbx: `structure_factors`, `_crossing`.
"""
import gzip
import math
import zipfile
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
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr
    Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir
    Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu
"""

ATOMIC_NUMBER = {symbol.upper(): z for z, symbol in enumerate(SYMBOLS.split(), 1)} | {"D": 1}

MODEL_SUFFIXES = tuple(s + packing for s in (".pdb", ".ent", ".cif", ".mmcif")
                       for packing in ("", ".gz"))


class Model(NamedTuple):
    """N atoms: xyz (N, 3) Å as (x, y, z), float64; atomic_number (N,); b_iso (N,) Å²; occupancy (N,); residue (N,)
    numbers 0 .. R-1; labels, R strings "chain/number/name"."""
    xyz: Tensor
    atomic_number: Tensor
    b_iso: Tensor
    occupancy: Tensor
    residue: Tensor
    labels: list[str]


def read_model(path) -> Model:
    """The first model of a PDB or mmCIF file (.pdb, .ent, .cif, .mmcif, plain or .gz): all atoms, all alternatives.

    PDB is read here, mmCIF by gemmi. Raises OSError without the file; ValueError if it cannot be read, holds no atoms
    or no known element, and for mmCIF without gemmi.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        rows = list((_cif_atoms if {".cif", ".mmcif"} & set(path.suffixes) else _pdb_atoms)(path))
    except (ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no atoms; want a PDB or mmCIF file")
    keys, elements, xyz, occupancy, b_iso = zip(*rows)
    unknown = {e for e in elements if e.upper() not in ATOMIC_NUMBER}
    if unknown:
        raise ValueError(f"{path}: no such element as {', '.join(sorted(unknown))}; mend columns 77-78")
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    real = lambda x: torch.tensor(x, dtype=torch.float64)
    return Model(real(xyz), torch.tensor([ATOMIC_NUMBER[e.upper()] for e in elements]), real(b_iso), real(occupancy),
                 torch.tensor([number[key] for key in keys]), ["/".join(key) for key in number])


def _pdb_atoms(path: Path):
    """(residue, element, xyz, occupancy, B) of each atom, by the columns of the PDB format, version 3.3."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", errors="replace") as lines:
        for line in lines:
            if line.startswith("ENDMDL"):
                return
            if line.startswith(("ATOM  ", "HETATM")):
                name, element = line[12:16], line[76:78].strip()
                if not element:                         # older files; columns 13-14 tell, but for "HG11" and the like
                    element = "H" if name[0] == "H" and name[3] != " " else name[:2].strip(" 0123456789")
                yield ((line[21].strip(), line[22:27].strip(), line[17:20].strip()), element,
                       [float(line[i : i + 8]) for i in (30, 38, 46)],
                       float(line[54:60].strip() or 1), float(line[60:66].strip() or 0))


def _cif_atoms(path: Path):
    try:
        import gemmi
    except ImportError:
        raise ValueError("reading mmCIF needs gemmi; pip install gemmi, or give a PDB file") from None
    for site in gemmi.read_structure(str(path))[0].all():
        yield ((site.chain.name, str(site.residue.seqid), site.residue.name), site.atom.element.name,
               site.atom.pos.tolist(), site.atom.occ, site.atom.b_iso)


@dataclass(frozen=True)
class Structure:
    """Atoms of one model: xyz (A, 3) = (x, y, z) in Å, centred; atomic_number; b_factor in Å^2."""
    label: str
    xyz: np.ndarray
    atomic_number: np.ndarray
    b_factor: np.ndarray


def read_archive(path: Path) -> list[Structure]:
    """Many structures in one .npz: flat arrays over all atoms, structure i from atom_start[i] on.

    xyz (A, 3) in 0.01 Å, element (A,), bfactor (A,) in Å^2; label (n,), atom_start (n + 1,).
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz archive, or a truncated one; copy it again")
    with np.load(path) as archive:
        wanted = ("label", "atom_start", "xyz", "element", "bfactor")
        if missing := set(wanted) - set(archive):
            raise ValueError(f"{path}: no archive of structures, {', '.join(sorted(missing))} missing")
        label, start, *arrays = (archive[name] for name in wanted)
    xyz, element, b_factor = (array.astype(np.float32) for array in arrays)
    return [Structure(str(name), xyz[a:b] / 100, element[a:b], b_factor[a:b])
            for name, a, b in zip(label, start, start[1:])]


def read_structures(path: str | Path) -> list[Structure]:
    """The structures of an archive (.npz), of one PDB or mmCIF file, or of a folder of these.

    Raises OSError without the file, ValueError (one line) if one cannot be read.
    """
    files = list_files(path, (".npz", *MODEL_SUFFIXES))
    if [file.suffix for file in files] == [".npz"]:
        return read_archive(files[0])
    models = [(file, read_model(file)) for file in files if file.suffix != ".npz"]
    return [Structure(file.name.split(".")[0], (m.xyz - m.xyz.mean(0)).numpy().astype(np.float32),
                      *(x.numpy().astype(np.float32) for x in (m.atomic_number, m.b_iso)))
            for file, m in models]


def placed(structure: Structure, generator: Generator) -> tuple[Tensor, Tensor]:
    """(xyz, b_factor) of a model turned at random and placed off-centre.

    Half of the models have B = 0, the others the deposited B-factors above their 5th percentile, times a uniform number.
    """
    xyz = torch.from_numpy(structure.xyz)
    # A small molecule stays whole; of one larger than the box any part can be in the middle.
    anchor = xyz[torch.randint(len(xyz), (1,), generator=generator)] * uniform(0, 1, generator)
    xyz = (xyz - anchor) @ random_rotation(generator).T
    b = torch.zeros(len(xyz))
    if uniform(0, 1, generator) < 0.5:
        b = torch.from_numpy(structure.b_factor)
        b = (b - b.quantile(0.05)).clamp(min=0) * uniform(0, 1, generator)
    return xyz, b


def molmap(xyz, atomic_number, resolution: float, *, voxel_size=None, shape=None, origin=None,
           b_factor=None, cutoff: float = 5.0) -> tuple[Tensor, tuple, tuple]:
    """Density of an atomic model at a resolution, each atom one Gaussian (1): ChimeraX `molmap`.

    xyz: (A, 3) positions (x, y, z) in Å; atomic_number: (A,) weights, usually Z; resolution in Å;
    b_factor: (A,) or one number in Å^2, default 0. Atom a is added where |dx|, |dy| and |dz| are
    all <= cutoff * s_a: a box; math.inf adds it everywhere.
    The grid: voxel_size in Å (one number or z, y, x; default resolution / 3), shape (D, H, W)
    (default: the model's extent and 3 * resolution on each side), origin = centre of voxel
    (0, 0, 0) in Å as z, y, x (default: the centres of grid and model coincide).

    Returns (density (D, H, W) float32 in Z per Å^3, voxel_size, origin), so that
    `Map(*molmap(...))` is a map. Differentiable in xyz, atomic_number and b_factor.
    Raises ValueError where the model is empty, its arrays differ in length or hold nan, a B-factor
    is negative, resolution or voxel_size is not positive, or an origin comes without a shape.
    """
    xyz = torch.as_tensor(xyz)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or len(xyz) == 0 or not xyz.isfinite().all():
        raise ValueError(f"molmap: xyz has shape {tuple(xyz.shape)}; give finite (atoms, 3), atoms > 0")
    A, device = len(xyz), xyz.device
    zyx = xyz.double().flip(1)
    weight = torch.as_tensor(atomic_number, dtype=torch.float32, device=device)
    B = torch.as_tensor(0.0 if b_factor is None else b_factor, dtype=torch.float32, device=device)
    if weight.shape != (A,) or B.shape not in ((), (A,)):
        raise ValueError(f"molmap: {A} atoms, but atomic_number has shape {tuple(weight.shape)} "
                         f"and b_factor {tuple(B.shape)}; give one value per atom")
    if not (weight.isfinite().all() and (B >= 0).all()):
        raise ValueError("molmap: atomic_number must be finite and b_factor at least 0 Å^2")
    step = triple(resolution / 3 if voxel_size is None else voxel_size)
    if not (resolution > 0 and min(step) > 0):
        raise ValueError(f"molmap: resolution {resolution} Å and voxel_size {step} Å must be positive")
    if origin is not None and shape is None:
        raise ValueError("molmap: an origin without a shape; give both or neither")

    low, high = zyx.detach().amin(0).tolist(), zyx.detach().amax(0).tolist()
    if shape is None:
        shape = [math.ceil((b - a + 6 * resolution) / h) for a, b, h in zip(low, high, step)]
    if origin is None:
        origin = [(a + b) / 2 - (n - 1) / 2 * h for a, b, n, h in zip(low, high, shape, step)]
    origin = triple(origin)

    sigma = ((resolution / (math.pi * math.sqrt(2))) ** 2 + B / (8 * math.pi ** 2)).sqrt().expand(A)
    index = (zyx - zyx.new_tensor(origin)) / zyx.new_tensor(step)       # (A, 3) float64, in voxels
    reach = cutoff * sigma[:, None] / zyx.new_tensor(step)
    near = ((index >= -reach) & (index <= zyx.new_tensor(shape) - 1 + reach)).all(1)
    index, reach, sigma, weight = index[near], reach[near], sigma[near], weight[near]

    def gaussian(axis: int) -> Tensor:                          # (A, n): one of the three factors of (1)
        n, h = shape[axis], step[axis]
        K = min(n, 2 * reach[:, axis].max().item() + 2) if len(reach) else 1
        window = torch.arange(int(K), device=device)            # only these voxels can be within reach
        first = (index[:, axis] - reach[:, axis]).ceil().clamp(0, n - len(window)).detach()
        d = ((first - index[:, axis]) * h).float()[:, None] + window * h    # Å, float64 until here
        q = (d / sigma[:, None]) ** 2
        value = torch.where(q <= cutoff ** 2, (-q / 2).exp(), 0)
        return value.new_zeros(len(d), n).scatter(1, first.long()[:, None] + window, value)

    # Each atom is a product of three 1-D factors, so the sum over atoms is a matrix product. Columns of
    # 8 x 8 voxels along x, each with the atoms that reach it, keep the product small.
    gz, gy, gx = gaussian(0), gaussian(1), gaussian(2)
    gx = gx * (weight * (2 * math.pi * sigma ** 2) ** -1.5)[:, None]
    density = gx.new_zeros(tuple(shape))
    for z in range(0, shape[0], 8):
        in_z = gz[:, z:z + 8].any(1).nonzero()[:, 0]
        gz_z, gy_z, gx_z = gz[in_z, z:z + 8], gy[in_z], gx[in_z]
        for y in range(0, shape[1], 8):
            in_y = gy_z[:, y:y + 8].any(1).nonzero()[:, 0]
            plane = gz_z[in_y, :, None] * gy_z[in_y, None, y:y + 8]     # (A', 8, 8)
            density[z:z + 8, y:y + 8] = torch.einsum("azy,ax->zyx", plane, gx_z[in_y])
    return density, step, origin
