"""Protein-like chains built by rule: something to train on with nothing downloaded.
"""
import math

import numpy as np
import torch

from atoms import Structure

# The trans peptide between CA (0, 0) and the next CA (3.80, 0), O on the side of +y: CA-C 1.525,
# C-N 1.329, N-CA 1.458, C-O 1.231 Å; angles CA-C-N 117.2, C-N-CA 121.7, CA-C-O 120.1 degrees.
PEPTIDE = {"N": (2.407, -0.387), "C": (1.434, 0.518), "O": (1.653, 1.730)}

# Slots 0..3 of a residue are N, CA, C, O. "S4" is a sulphur bonded to slot 4, and so on from slot 4
# (CB) on. Aromatic rings stay open.
RESIDUES = """A 8.3 C1|R 5.5 C1 C4 C5 N6 C7 N8 N8|N 4.1 C1 C4 O5 N5|D 5.5 C1 C4 O5 O5|C 1.4 C1 S4|
    Q 3.9 C1 C4 C5 O6 N6|E 6.7 C1 C4 C5 O6 O6|G 7.1|H 2.3 C1 C4 N5 C5 C6 N7|I 5.9 C1 C4 C4 C5|
    L 9.7 C1 C4 C5 C5|K 5.8 C1 C4 C5 C6 N7|M 2.4 C1 C4 S5 C6|F 3.9 C1 C4 C5 C5 C6 C7 C8|
    P 4.7 C1 C4 C5|S 6.6 C1 O4|T 5.3 C1 O4 C4|W 1.1 C1 C4 C5 C5 N6 C7 C7 C9 C10 C11|
    Y 2.9 C1 C4 C5 C5 C6 C7 C8 O10|V 6.9 C1 C4 C4"""

CHAIN_ATOMIC_NUMBER = {"C": 6, "N": 7, "O": 8, "S": 16}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def axis_rotation(axis: int, degrees: float) -> np.ndarray:
    """Right-handed rotation (3, 3) of (x, y, z) columns about axis 0, 1 or 2."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    R = np.eye(3)
    R[i, i] = R[j, j] = math.cos(math.radians(degrees))
    R[j, i] = math.sin(math.radians(degrees))
    R[i, j] = -R[j, i]
    return R


def element(kind: str, n: int, phase: float) -> tuple[np.ndarray, np.ndarray]:
    """A helix "H" or strand "E" along z: CA (n, 3), and where each peptide's O points (n - 1, 3)."""
    k = np.arange(n)
    if kind == "H":                                     # 1.5 Å and 100 degrees per residue
        turn = np.radians(100) * k + phase
        radius = math.sqrt(3.8 ** 2 - 1.5 ** 2) / (2 * math.sin(np.radians(50)))      # 2.28 Å
        ca = np.stack([radius * np.cos(turn), radius * np.sin(turn), 1.5 * (k - k.mean())], 1)
        # Along the axis and a tenth outwards: phi -57, psi -47.
        middle = (turn + np.radians(50))[:-1]
        return ca, np.stack([0.1 * np.cos(middle), 0.1 * np.sin(middle), np.ones(n - 1)], 1)
    sign = (-1.0) ** k                                  # 3.3 Å per residue: phi -119, psi 117
    pleat = math.sqrt(3.8 ** 2 - 3.3 ** 2) / 2
    ca = np.stack([0 * sign, pleat * sign, 3.3 * (k - k.mean())], 1)
    return ca, np.outer(-sign[:-1], (1, 0, 0))          # to one neighbour, to the other


def arc(a: np.ndarray, b: np.ndarray, n: int, outward: np.ndarray) -> np.ndarray:
    """A loop: n CA between those at a and b on an arc of a circle, all CA-CA 3.8 Å: (n, 3)."""
    half = np.linspace(1e-3, math.pi / (n + 1), 1000)   # half the angle that one CA-CA spans
    chord = 3.8 * np.sin((n + 1) * half) / np.sin(half)
    half = np.interp(-np.linalg.norm(b - a), -chord, half)
    u = unit(b - a)
    w = unit(outward - (outward @ u) * u)
    angle = (2 * np.arange(1, n + 1) - (n + 1))[:, None] * half
    radius, rim = 1.9 / np.sin(half), np.cos((n + 1) * half)
    return (a + b) / 2 + radius * (np.sin(angle) * u + (np.cos(angle) - rim) * w)


def layout(rng: np.random.Generator) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Layers of helices or of strands, each element as (kind, CA, towards O), in chain order."""
    side = (150 * rng.uniform(85, 375)) ** (1 / 3)      # Å, of a cube with 150 Å^3 per residue
    layers = max(2, round(side / 10))                   # 10 Å apart
    elements = []
    for layer in range(layers):
        kind = "HE"[rng.integers(2)]
        rise, spacing = (1.5, 10.0) if kind == "H" else (3.3, 4.8)                     # Å
        length, count = round(0.75 * side / rise), max(2, round(side / spacing))
        tilt = axis_rotation(1, rng.normal(0, 8))
        for j in range(count)[::(-1) ** layer]:         # there and back
            ca, towards_o = element(kind, length, rng.uniform(0, 2 * math.pi))
            if len(elements) % 2:                       # up and down in turn
                along = -1 if kind == "H" else 1        # a helix's O point down then, a strand's not
                ca, towards_o = ca[::-1], towards_o[::-1] * (1, 1, along)
            # Neighbours twist by -5 degrees per 4.8 Å; in proteins -20, but our layers are flat.
            x = (j - (count - 1) / 2) * spacing
            turn = tilt @ axis_rotation(0, -5 * x / 4.8)
            middle = tilt @ (x, 0, 0) + (0, 10 * (layer - (layers - 1) / 2), 0)
            elements.append((kind, ca @ turn.T + middle, towards_o @ turn.T))
    return elements


def fold(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
    """A chain: CA (R, 3); where each peptide's O points (R - 1, 3), nan in loops; "HHHCCEE..."."""
    (kinds, *chain), *rest = layout(rng)
    kinds, chain = kinds * len(chain[0]), [chain]
    placed = np.concatenate([chain[0][0], *(ca for _, ca, _ in rest)])
    for i, (kind, ca, towards_o) in enumerate(rest):
        a, b, choices = chain[-1][0][-1], ca[0], []
        for _ in range(5):                              # of five arcs the one with most room
            n = max(2, math.ceil(0.4 * np.linalg.norm(b - a)) + rng.integers(-1, 2))
            choices.append(arc(a, b, n, (0, 0, (-1) ** i) + 0.5 * rng.normal(size=3)))
        loop = min(choices, key=lambda points: (distances(points, placed) ** -6).sum())
        placed = np.concatenate([placed, loop])
        chain += [(loop, np.full((len(loop) + 1, 3), math.nan)), (ca, towards_o)]
        kinds += "C" * len(loop) + kind * len(ca)
    return *(np.concatenate(parts) for parts in zip(*chain)), kinds


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def backbone(ca: np.ndarray, towards_o: np.ndarray) -> np.ndarray:
    """N, CA, C, O of all residues but the first and last: (R - 2, 4, 3)."""
    x = unit(np.diff(ca, axis=0))
    y = unit(towards_o - (towards_o * x).sum(1, keepdims=True) * x)

    def to_c(i, y):                                     # unit vector CA(i) -> C(i) for peptide i
        return unit(PEPTIDE["C"][0] * x[i] + PEPTIDE["C"][1] * y)

    def to_n(i, y):                                     # CA(i + 1) -> N(i + 1)
        return unit((PEPTIDE["N"][0] - 3.8) * x[i] + PEPTIDE["N"][1] * y)

    # In loops peptides turn about CA-CA, one after another and three times over, until N-CA-C is
    # nearest to 111 degrees on both sides.
    angle, wanted = np.arange(12)[:, None] * math.pi / 6, math.cos(math.radians(111))
    loops = np.flatnonzero(np.isnan(y[:, 0]))
    y[loops] = unit(np.cross(x[loops - 1], x[loops])) * (-1.0) ** loops[:, None]
    for i in [*loops] * 3:
        turned = np.cos(angle) * y[i] + np.sin(angle) * np.cross(x[i], y[i])
        miss = ((to_c(i, turned) @ to_n(i - 1, y[i - 1]) - wanted) ** 2
                + (to_n(i, turned) @ to_c(i + 1, y[i + 1]) - wanted) ** 2)
        y[i] = turned[miss.argmin()]
    at = {name: ca[:-1] + a * x + b * y for name, (a, b) in PEPTIDE.items()}
    return np.stack([at["N"][:-1], ca[1:-1], at["C"][1:], at["O"][1:]], 1)


def side_chains(backbone: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All atoms of the chain (A, 3) and their atomic numbers (A,): residues at random, by frequency.

    Atom by atom, bonds 1.5 Å and angles 111 degrees, in the one of four random directions with most
    room; where all lie within 2 Å of another atom, that side chain ends.
    """
    residues = [line.split() for line in RESIDUES.split("|")]
    frequency, R = np.array([float(r[1]) for r in residues]), len(backbone)
    xyz, number = np.full((R, 14, 3), math.nan), np.zeros((R, 14), dtype=int)
    parent = np.zeros((R, 14), dtype=int)               # of each slot; of CA it is N, of N it is C
    xyz[:, :4], number[:, :4], parent[:, 0] = backbone, (7, 6, 6, 8), 2
    for r, choice in enumerate(rng.choice(len(residues), R, p=frequency / frequency.sum())):
        for slot, bond in enumerate(residues[choice][2:], 4):
            number[r, slot], parent[r, slot] = CHAIN_ATOMIC_NUMBER[bond[0]], int(bond[1:])
    for slot in range(4, 14):
        there = ~np.isnan(xyz[..., 0])
        r = np.flatnonzero((number[:, slot] > 0) & there[np.arange(R), parent[:, slot]])
        c = parent[r, slot]
        b = parent[r, c]
        a = parent[r, b]
        # CB stands where L amino acids have it; the others at any dihedral angle a-b-c-new.
        dihedral = np.full((len(r), 1), -122.8) if slot == 4 else rng.uniform(0, 360, (len(r), 4))
        new = extend(xyz[r, a], xyz[r, b], xyz[r, c], np.radians(dihedral))     # (n, 1 or 4, 3)
        room = distances(new.reshape(-1, 3), xyz[there]).reshape(*dihedral.shape, there.sum())
        room[np.arange(len(r)), :, there.ravel().cumsum()[14 * r + c] - 1] = math.inf  # but c
        room, best = room.min(2).max(1), room.min(2).argmax(1)
        r, new = r[room > 2], new[np.arange(len(r)), best][room > 2]
        free = ~np.triu(distances(new, new) < 2, 1).any(0)                  # of each other
        xyz[r[free], slot] = new[free]
    there = ~np.isnan(xyz[..., 0])
    return xyz[there], number[there]


def extend(a: np.ndarray, b: np.ndarray, c: np.ndarray, dihedral: np.ndarray) -> np.ndarray:
    """NeRF (Parsons et al. 2005): points (n, k, 3) 1.5 Å from c (n, 3), at b-c-new 111 degrees."""
    z = unit(c - b)
    y = unit(np.cross(b - a, z))
    x = np.cross(y, z)
    turned = np.cos(dihedral)[..., None] * x[:, None] + np.sin(dihedral)[..., None] * y[:, None]
    angle = math.radians(111)
    return c[:, None] + 1.5 * (-math.cos(angle) * z[:, None] + math.sin(angle) * turned)


class ProceduralChains:
    """A sequence of n structures of 60 to 400 residues, each a function of (seed, index)."""
    def __init__(self, seed: int = 0, n: int = 100_000):
        self.seed, self.n = seed, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Structure:
        rng = np.random.default_rng((self.seed, index))
        ca, towards_o, _ = fold(rng)
        xyz, number = side_chains(backbone(ca, towards_o), rng)
        xyz = (xyz - xyz.mean(0)).astype(np.float32)
        square = (xyz ** 2).sum(1)
        b_factor = 60 * square / square.max()           # of a body that rocks about its centre
        return Structure(f"chain{index}", xyz, number.astype(np.float32), b_factor)
