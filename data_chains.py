"""Protein-like chains built by rule, so that training needs no download.

A chain is built in three steps, each a function of a random generator:

1. `layout` puts ideal helices and strands side by side in layers that fill a cube.
2. `fold` joins them by loops into one chain of CA atoms, and says where each peptide's O points.
3. `backbone` hangs planar peptides between the CA atoms, `side_chains` adds random residues.

A protein is a chain of amino acids (residues). Each has the backbone atoms N, CA, C, O, and a side
chain on CA that starts with CB. The peptide between two CA holds C and O of the first residue and N
of the second, in one plane. Neighbouring CA are always 3.8 Å apart here (trans peptides):

    |b - a| = 3.8 sin((n + 1) h) / sin h                        a loop of n CA from a to b  (1)
    D = C + 1.5 (-cos 111° z + sin 111° (cos d x + sin d y))    a new atom D bonded to C    (2)

In (1), one CA-CA spans the angle 2 h. In (2), z points from B to C, x lies in the plane of A, B and
C, and d is the dihedral angle A-B-C-D (NeRF, Parsons et al. 2005, J. Comput. Chem. 26:1063).
Coordinates are (x, y, z) in Å. R is the number of residues, n that of a part.
Not from the papers, which train on maps and models of the EMDB and PDB.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator

from atoms import Structure

CA_CA = 3.8  # Å

# The trans peptide in its plane. The first CA is at (0, 0), the next one at (3.8, 0), and O lies on
# the side of +y. Bonds: CA-C 1.525, C-N 1.329, N-CA 1.458, C-O 1.231 Å.
# Angles: CA-C-N 117.2, C-N-CA 121.7, CA-C-O 120.1 degrees.
PEPTIDE_C = (1.434, 0.518)
PEPTIDE_O = (1.653, 1.730)
PEPTIDE_N = (2.407, -0.387)

# Helices "H" and strands "E": Å per residue along the axis, and Å between neighbours of one layer.
RISE = {"H": 1.5, "E": 3.3}
SPACING = {"H": 10.0, "E": 4.8}

# The amino acids: letter, share of proteins in %, and the atoms of the side chain.
# An atom has a slot in its residue: N, CA, C and O have slots 0 to 3, CB has slot 4, and so on.
# "S4" is a sulphur that is bonded to slot 4. Aromatic rings stay open.
RESIDUES = """
    A 8.3 C1
    R 5.5 C1 C4 C5 N6 C7 N8 N8
    N 4.1 C1 C4 O5 N5
    D 5.5 C1 C4 O5 O5
    C 1.4 C1 S4
    Q 3.9 C1 C4 C5 O6 N6
    E 6.7 C1 C4 C5 O6 O6
    G 7.1
    H 2.3 C1 C4 N5 C5 C6 N7
    I 5.9 C1 C4 C4 C5
    L 9.7 C1 C4 C5 C5
    K 5.8 C1 C4 C5 C6 N7
    M 2.4 C1 C4 S5 C6
    F 3.9 C1 C4 C5 C5 C6 C7 C8
    P 4.7 C1 C4 C5
    S 6.6 C1 O4
    T 5.3 C1 O4 C4
    W 1.1 C1 C4 C5 C5 N6 C7 C7 C9 C10 C11
    Y 2.9 C1 C4 C5 C5 C6 C7 C8 O10
    V 6.9 C1 C4 C4
"""

SLOTS = 14  # of the largest residue, W

CHAIN_ATOMIC_NUMBER = {"C": 6, "N": 7, "O": 8, "S": 16}


class Element(NamedTuple):
    """A helix "H" or strand "E" of n residues: CA (n, 3), and where each O points (n - 1, 3)."""

    kind: str
    ca: ndarray
    towards_o: ndarray


def unit(x: ndarray) -> ndarray:
    """x (..., 3) scaled to length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def distances(a: ndarray, b: ndarray) -> ndarray:
    """Distances between the points a (n, 3) and b (m, 3): (n, m)."""
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def axis_rotation(axis: int, degrees: float) -> ndarray:
    """Right-handed rotation (3, 3) of (x, y, z) columns about axis 0, 1 or 2."""
    i = (axis + 1) % 3
    j = (axis + 2) % 3
    angle = math.radians(degrees)
    R = np.eye(3)
    R[i, i] = R[j, j] = math.cos(angle)
    R[j, i] = math.sin(angle)
    R[i, j] = -R[j, i]
    return R


# ---- Step 1: helices and strands --------------------------------------------------------------


def helix(n: int, phase: float):
    """An alpha helix along z: CA (n, 3), and where the O of each peptide points (n - 1, 3).

    O points along the axis and a tenth outwards: then phi is -57 and psi -47 degrees.
    """
    k = np.arange(n)
    angle = np.radians(100) * k + phase
    z = RISE["H"] * (k - k.mean())

    # The radius that makes CA-CA 3.8 Å is 2.28 Å.
    radius = math.sqrt(CA_CA**2 - RISE["H"] ** 2) / (2 * math.sin(np.radians(50)))
    ca = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1)

    # A peptide stands half-way between its two CA.
    middle = angle[:-1] + np.radians(50)
    towards_o = np.stack([0.1 * np.cos(middle), 0.1 * np.sin(middle), np.ones(n - 1)], 1)
    return ca, towards_o


def strand(n: int):
    """A pleated beta strand along z, as `helix`. phi is -119, psi 117 degrees.

    The O point to the neighbours on both sides (-x, +x) in turn.
    """
    k = np.arange(n)
    sign = (-1.0) ** k
    z = RISE["E"] * (k - k.mean())
    pleat = math.sqrt(CA_CA**2 - RISE["E"] ** 2) / 2
    ca = np.stack([np.zeros(n), pleat * sign, z], 1)
    towards_o = np.outer(sign[:-1], (-1, 0, 0))
    return ca, towards_o


def layout(rng: Generator) -> list[Element]:
    """Helices and strands in layers that fill a cube, in the order of the chain.

    The cube has room for 85 to 375 residues of 150 Å^3. Layers are 10 Å apart along y, and each
    holds one kind. Elements run along z, up and down in turn.
    """
    side = (150 * rng.uniform(85, 375)) ** (1 / 3)
    layers = max(2, round(side / 10))
    elements = []
    for layer in range(layers):
        # What all elements of this layer have in common.
        kind = "HE"[rng.integers(2)]
        length = round(0.75 * side / RISE[kind])
        count = max(2, round(side / SPACING[kind]))
        tilt = axis_rotation(1, rng.normal(0, 8))
        y = 10 * (layer - (layers - 1) / 2)

        # The chain crosses one layer from left to right, the next one from right to left.
        for column in range(count)[:: (-1) ** layer]:
            phase = rng.uniform(0, 2 * math.pi)
            ca, towards_o = helix(length, phase) if kind == "H" else strand(length)

            # Every second element runs down. The O of a helix then point down, too.
            if len(elements) % 2:
                ca = ca[::-1]
                towards_o = towards_o[::-1] * (1, 1, -1)

            # Neighbours twist by -5 degrees per 4.8 Å. (In proteins -20, but our layers are flat.)
            x = (column - (count - 1) / 2) * SPACING[kind]
            twist = axis_rotation(0, -5 * x / 4.8)
            turn = (tilt @ twist).T
            middle = tilt @ (x, 0, 0) + (0, y, 0)
            elements.append(Element(kind, ca @ turn + middle, towards_o @ turn))
    return elements


# ---- Step 2: loops ----------------------------------------------------------------------------


def arc(a: ndarray, b: ndarray, n: int, outward: ndarray) -> ndarray:
    """A loop: n CA on an arc of a circle between the CA a and b (3,), all CA-CA 3.8 Å: (n, 3).

    outward (3,): the side to which the arc bulges.
    """
    # Solve (1) for h by a table, because it has no closed inverse. np.interp wants rising values,
    # but the span falls as h grows, so both spans get a minus.
    table = np.linspace(1e-3, math.pi / (n + 1), 1000)
    span = CA_CA * np.sin((n + 1) * table) / np.sin(table)
    h = np.interp(-np.linalg.norm(b - a), -span, table)

    # The plane of the arc: u from a to b, w outwards.
    u = unit(b - a)
    w = unit(outward - (outward @ u) * u)

    # Place the CA on the circle, measured from the middle of a and b.
    radius = CA_CA / 2 / np.sin(h)
    steps_from_middle = 2 * np.arange(1, n + 1) - (n + 1)
    angle = steps_from_middle[:, None] * h
    height = np.cos(angle) - np.cos((n + 1) * h)
    return (a + b) / 2 + radius * (np.sin(angle) * u + height * w)


def roomiest_arc(a, b, outward, placed: ndarray, rng: Generator) -> ndarray:
    """Of five random arcs from a to b the one that is least crowded by the CA `placed`: (n, 3)."""
    likely = math.ceil(0.4 * np.linalg.norm(b - a))  # CA of a loop that is not stretched
    arcs = []
    for _ in range(5):
        n = max(2, likely + rng.integers(-1, 2))
        arcs.append(arc(a, b, n, outward + 0.5 * rng.normal(size=3)))
    return min(arcs, key=lambda loop: (distances(loop, placed) ** -6).sum())


def fold(rng: Generator) -> tuple[ndarray, ndarray, str]:
    """A random chain: CA (R, 3); where each O points (R - 1, 3), nan in loops; "HHHCCEE..."."""
    elements = layout(rng)
    ca = [elements[0].ca]
    towards_o = [elements[0].towards_o]
    kinds = elements[0].kind * len(ca[0])
    placed = np.concatenate([element.ca for element in elements])

    # Join each element to the next one by a loop, above and below the layers in turn.
    for i, element in enumerate(elements[1:]):
        outward = (0, 0, (-1) ** i)
        loop = roomiest_arc(ca[-1][-1], element.ca[0], outward, placed, rng)
        placed = np.concatenate([placed, loop])
        ca += [loop, element.ca]
        unknown = np.full((len(loop) + 1, 3), math.nan)
        towards_o += [unknown, element.towards_o]
        kinds += "C" * len(loop) + element.kind * len(element.ca)
    return np.concatenate(ca), np.concatenate(towards_o), kinds


# ---- Step 3: peptides and side chains ---------------------------------------------------------


def in_peptide(place, x: ndarray, y: ndarray, first_ca=0) -> ndarray:
    """Where an atom at `place` of a peptide is (..., 3). x, y: the peptide's axes (..., 3)."""
    return first_ca + place[0] * x + place[1] * y


def bond_directions(x: ndarray, y: ndarray):
    """Unit vectors CA(i) -> C(i) and CA(i + 1) -> N(i + 1) of peptide i with the axes x, y."""
    n_from_second_ca = (PEPTIDE_N[0] - CA_CA, PEPTIDE_N[1])
    to_c = in_peptide(PEPTIDE_C, x, y)
    to_n = in_peptide(n_from_second_ca, x, y)
    return unit(to_c), unit(to_n)


def turn_loop_peptides(x: ndarray, y: ndarray) -> None:
    """Choose the missing y axes (nan) of the peptides of loops, in place; x, y (R - 1, 3).

    One peptide after the other, three times over, is turned about its CA-CA axis x until the angles
    N-CA-C on both sides of it come nearest to 111 degrees.
    """
    # Begin with y at right angles to this axis and the one before, on alternating sides.
    loops = np.flatnonzero(np.isnan(y[:, 0]))
    y[loops] = unit(np.cross(x[loops - 1], x[loops])) * (-1.0) ** loops[:, None]

    wanted = math.cos(math.radians(111))
    angle = np.arange(12)[:, None] * math.pi / 6
    cosine = np.cos(angle)
    sine = np.sin(angle)
    for i in np.tile(loops, 3):
        # Twelve orientations of peptide i, 30 degrees apart.
        turned = cosine * y[i] + sine * np.cross(x[i], y[i])
        to_c, to_n = bond_directions(x[i], turned)  # (12, 3) each

        # The bonds on the other side of its two CA belong to the peptides before and after.
        _, n_before = bond_directions(x[i - 1], y[i - 1])
        c_after, _ = bond_directions(x[i + 1], y[i + 1])
        first_error = to_c @ n_before - wanted
        second_error = to_n @ c_after - wanted
        best = np.argmin(first_error**2 + second_error**2)
        y[i] = turned[best]


def backbone(ca: ndarray, towards_o: ndarray) -> ndarray:
    """N, CA, C, O of all residues but the first and last: (R - 2, 4, 3). Arguments from `fold`."""
    # The axes of each peptide: x from CA to CA, y at right angles to it, on the side of O.
    x = unit(np.diff(ca, axis=0))
    y = unit(towards_o - (towards_o * x).sum(1, keepdims=True) * x)
    turn_loop_peptides(x, y)

    # Peptide i holds C and O of residue i and N of residue i + 1.
    n = in_peptide(PEPTIDE_N, x, y, ca[:-1])
    c = in_peptide(PEPTIDE_C, x, y, ca[:-1])
    o = in_peptide(PEPTIDE_O, x, y, ca[:-1])
    return np.stack([n[:-1], ca[1:-1], c[1:], o[1:]], 1)


def extend(a: ndarray, b: ndarray, c: ndarray, dihedral: ndarray) -> ndarray:
    """New atoms (2) on c at k dihedral angles (n, k) in radians: (n, k, 3); a, b, c (n, 1, 3)."""
    z = unit(c - b)
    y = unit(np.cross(b - a, z))
    x = np.cross(y, z)
    dihedral = dihedral[..., None]  # (n, k, 1)
    sideways = np.cos(dihedral) * x + np.sin(dihedral) * y
    angle = math.radians(111)
    return c + 1.5 * (-math.cos(angle) * z + math.sin(angle) * sideways)  # (2)


def random_residues(R: int, rng: Generator):
    """R residues by their frequency: atomic number and bonded slot of each atom, (R, SLOTS) each.

    The number is 0 where a residue has no such atom. CA counts as bonded to N, and N to C, so that
    every atom of a side chain has three predecessors.
    """
    residues = [line.split() for line in RESIDUES.strip().splitlines()]
    frequency = np.array([float(residue[1]) for residue in residues])
    choices = rng.choice(len(residues), R, p=frequency / frequency.sum())

    number = np.zeros((R, SLOTS), dtype=int)
    parent = np.zeros((R, SLOTS), dtype=int)
    number[:, :4] = (7, 6, 6, 8)
    parent[:, 0] = 2
    for r, choice in enumerate(choices):
        for slot, atom in enumerate(residues[choice][2:], 4):
            number[r, slot] = CHAIN_ATOMIC_NUMBER[atom[0]]
            parent[r, slot] = int(atom[1:])
    return number, parent


def side_chains(backbone: ndarray, rng: Generator) -> tuple[ndarray, ndarray]:
    """All atoms (A, 3) of a chain with this backbone (R, 4, 3), and their atomic numbers (A,).

    All side chains grow at once, atom by atom. A new atom takes the roomiest of four random
    directions. A side chain ends where every direction lies within 2 Å of another atom.
    """
    R = len(backbone)
    number, parent = random_residues(R, rng)
    xyz = np.full((R, SLOTS, 3), math.nan)  # nan: not placed
    xyz[:, :4] = backbone

    for slot in range(4, SLOTS):
        # n residues have an atom of this slot, and the atom c that it is bonded to was placed.
        placed = ~np.isnan(xyz[..., 0])
        bonded = placed[np.arange(R), parent[:, slot]]
        r = np.flatnonzero(bonded & (number[:, slot] > 0))
        c = parent[r, slot]
        b = parent[r, c]
        a = parent[r, b]

        # CB stands where L amino acids have it, the others at any of four dihedral angles.
        n = len(r)
        dihedral = np.full((n, 1), -122.8) if slot == 4 else rng.uniform(0, 360, (n, 4))
        points = xyz[r, [a, b, c]][:, :, None]  # (3, n, 1, 3)
        candidates = extend(*points, np.radians(dihedral))

        # The room of a candidate is its distance to the nearest atom other than c.
        distance = distances(candidates.reshape(-1, 3), xyz[placed])
        distance = distance.reshape(*dihedral.shape, placed.sum())  # (n, 1 or 4, atoms placed)
        index = placed.cumsum().reshape(R, SLOTS) - 1  # of each atom among those placed
        distance[np.arange(n), :, index[r, c]] = math.inf
        room = distance.min(2)

        # Take the roomiest candidate of each residue, and drop those without room.
        new = candidates[np.arange(n), room.argmax(1)]
        enough = room.max(1) > 2
        r = r[enough]
        new = new[enough]

        # Of two new atoms within 2 Å of each other only the first is placed.
        clash = np.triu(distances(new, new) < 2, 1)
        free = ~clash.any(0)
        xyz[r[free], slot] = new[free]
    placed = ~np.isnan(xyz[..., 0])
    return xyz[placed], number[placed]


@dataclass(frozen=True)
class ProceduralChains:
    """A sequence of n structures of 60 to 400 residues, each a function of (seed, index)."""

    seed: int = 0
    n: int = 100_000

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Structure:
        rng = np.random.default_rng((self.seed, index))
        ca, towards_o, _ = fold(rng)
        xyz, number = side_chains(backbone(ca, towards_o), rng)
        xyz = (xyz - xyz.mean(0)).astype(np.float32)

        # B-factors of a body that rocks about its centre.
        square = (xyz**2).sum(1)
        b_factor = 60 * square / square.max()
        return Structure(f"chain{index}", xyz, number.astype(np.float32), b_factor)
