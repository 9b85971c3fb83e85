"""What the features know (CryoLVM, appendix G.8): a linear probe for secondary structure.

    python data_prepare.py structures structures/train.tsv     # and structures/val.tsv
    python train.py --model tiny-vit-jepa --steps 200 --batch 4 --data structures/train.npz \\
        --out runs/vit-jepa                                    # and tiny-mae
    python tests/benchmark_probe.py structures/train.npz structures/val.npz \\
        --ckpt weights/scunet_tiny_jepa.pt runs/mae/mae.pt runs/vit-jepa/jepa.pt

Voxels within 1.5 Å of an atom are helix, strand, other protein or nucleic acid. A multinomial
logistic regression learns their class from the frozen encoder's features there (interpolated
between cells), on crops of training structures, every class with the same weight. Scored on crops
of val: accuracy, recall of each class and their mean, and the confusion.

Comparators: "scratch", the same encoder with random weights, and "voxels", the density itself, one
channel per voxel of a cell. Chance has a mean recall of 1/4.

Classes come from positions and elements alone, because an archive of structures holds no names:
    protein         four atoms in a row that are N, CA, C, O by element and distance begin a residue
    helix, strand   Kabsch & Sander 1983 (DSSP): hydrogen bonds with an energy below -0.5 kcal/mol,
                    a 4-turn after a 4-turn, two bridges in a row
    nucleic acid    from a phosphorus to the next one, if that is 18 to 25 atoms further
Not told apart: proline, whose nitrogen has no hydrogen; the first residue of a nucleic acid, which
has no phosphorus. The paper states neither its rule nor its probe; its Fig. 17 is a projection.

If an archive also holds res_ss and res_natom, the share of atoms with the same class is printed.
G.7 (a model that is easier to build) is not measured, because ModelAngelo needs a GPU and weights
that are not part of this project.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_wedge import write_rows

import atoms
import augment
import checkpoint
import data_pairs
import volume

CLASSES = ("helix", "strand", "other", "nucleic")
HELIX, STRAND, OTHER, NUCLEIC = range(4)
BOX = 36  # voxels of 1 Å
POINTS = 4000  # voxels of a crop that are looked at
NEAR = 1.5  # Å


# ---- Classes of atoms ----


def backbone(xyz: Tensor, element: Tensor) -> Tensor:
    """Numbers of the N, CA, C and O of each residue: (R, 4)."""
    rows = torch.arange(len(xyz) - 3)[:, None] + torch.arange(4)
    kinds = (element[rows] == torch.tensor([7, 6, 6, 8])).all(1)
    rows = rows[kinds]
    bonds = (xyz[rows][:, 1:] - xyz[rows][:, :-1]).norm(dim=-1)  # N-CA, CA-C, C-O
    lengths = torch.tensor([1.46, 1.52, 1.23])
    return rows[((bonds - lengths).abs() < 0.12).all(1)]


def hydrogen_bonds(places: Tensor, linked: Tensor) -> Tensor:
    """B(i, j): whether C=O of residue i binds N-H of residue j, (R, R).

    places (R, 4, 3): N, CA, C, O; linked (R - 1,): whether a residue binds the next one.
    """
    n, _, c, o = places.unbind(1)
    # The hydrogen lies opposite to the oxygen of the residue before.
    direction = F.normalize(c - o, dim=1)
    h = n.clone()
    h[1:] += direction[:-1]
    inverse = 1 / torch.cdist(o, n) + 1 / torch.cdist(c, h)
    inverse -= 1 / torch.cdist(o, h) + 1 / torch.cdist(c, n)
    bonds = 27.9 * inverse < -0.5  # kcal/mol

    # No hydrogen without a residue before, and no bond to a neighbour.
    bonds[:, 0] = False
    bonds[:, 1:] &= linked
    number = torch.arange(len(n))
    return bonds & ((number[:, None] - number).abs() >= 2)


def secondary_structure(places: Tensor) -> Tensor:
    """Class of each residue: (R,)."""
    count = len(places)
    linked = (places[1:, 0] - places[:-1, 2]).norm(dim=1) < 2.0
    B = hydrogen_bonds(places, linked)
    wide = F.pad(B, (1, 1, 1, 1))

    def at(di: int, dj: int) -> Tensor:
        # B(i + di, j + dj), False beyond the ends.
        return wide[1 + di : 1 + di + count, 1 + dj : 1 + dj + count]

    # Bridges of i and j. A transpose exchanges them.
    parallel = (at(-1, 0) & at(0, 1).T) | (at(0, 1) & at(-1, 0).T)
    antiparallel = (B & B.T) | (at(-1, 1) & at(1, -1).T)
    number = torch.arange(count)
    apart = (number[:, None] - number).abs() > 2
    bridged = ((parallel | antiparallel) & apart).any(1)
    beside = F.pad(bridged, (1, 1))
    strand = bridged & (beside[:-2] | beside[2:])

    # A turn at i binds C=O of i to N-H of i + 4. Two in a row make i + 1 .. i + 4 a helix.
    turn = torch.zeros(count, dtype=torch.bool)
    turn[: max(count - 4, 0)] = B.diagonal(4)
    twice = turn[1:] & turn[:-1]
    helix = torch.zeros(count, dtype=torch.bool)
    for step in range(1, 5):
        helix[step:] |= twice[: count - step]

    found = torch.full((count,), OTHER)
    found[strand] = STRAND
    found[helix] = HELIX
    return found


def classes_of_atoms(xyz: Tensor, element: Tensor) -> Tensor:
    """The class of each atom (A,), -1 where it has none."""
    found = torch.full((len(xyz),), -1)

    # A residue reaches to the next one, or 14 atoms far, the size of a tryptophan.
    rows = backbone(xyz, element)
    if len(rows) > 4:
        kinds = secondary_structure(xyz[rows])
        first = rows[:, 0]
        last = torch.minimum(F.pad(first[1:], (0, 1), value=len(xyz)), first + 14)
        for start, stop, kind in zip(first, last, kinds):
            found[start:stop] = kind

    # Nucleotides.
    phosphorus = (element == 15).nonzero()[:, 0]
    for start, stop in zip(phosphorus, phosphorus[1:]):
        if 18 <= stop - start <= 25:
            found[start:stop] = NUCLEIC
    return found


def say_agreement(path: Path, structures: list, kinds: list[Tensor]) -> None:
    """How many atoms have the class that the archive says, if it says one."""
    archive = np.load(path)
    if not {"res_ss", "res_natom", "label"} <= set(archive.files):
        return
    of_atom = np.repeat(archive["res_ss"], archive["res_natom"])
    codes = {ord("H"): HELIX, ord("E"): STRAND, ord("C"): OTHER, ord("N"): NUCLEIC}
    starts = dict(zip(archive["label"].tolist(), archive["atom_start"].tolist()))
    table = torch.zeros(4, 4)
    for structure, kind in zip(structures, kinds):
        start = starts[structure.label]
        for code, wanted in codes.items():
            is_code = torch.from_numpy(of_atom[start : start + len(kind)] == code)
            for k in range(4):
                table[wanted, k] += (is_code & (kind == k)).sum()
    print(f"{path}: of atoms with a class, {table.trace() / table.sum():.3f} have the archive's")


# ---- Crops and features ----


class Crop(NamedTuple):
    """An observed map (BOX, BOX, BOX) on 0..1, and voxels (V,) of it with their classes (V,)."""

    density: Tensor
    voxels: Tensor
    kinds: Tensor


def crop_of(structure, kinds: Tensor, seed: int) -> Crop:
    """A crop of a simulated deposited map, as pre-training sees it, around an atom."""
    generator = augment.item_generator(seed, 0)
    xyz = torch.from_numpy(structure.xyz)
    rare = kinds == NUCLEIC
    choice = (rare if rare.any() else kinds >= 0).nonzero()[:, 0]
    middle = xyz[choice[augment.randint(len(choice), generator)]]
    xyz = (xyz - middle) @ augment.random_rotation(generator).T
    b_factor = torch.from_numpy(structure.b_factor)
    density, _ = data_pairs.simulated_pair(
        "sharpen",
        xyz,
        structure.atomic_number,
        (b_factor - b_factor.quantile(0.05)).clamp(min=0),
        augment.uniform(2.5, 4, generator),
        generator,
        voxel_size=1.0,
        shape=(BOX,) * 3,
        origin=-BOX // 2,
    )
    density, _ = volume.normalise(density, 0, 1)

    # The nearest atom of random voxels.
    voxels = torch.randperm(BOX**3, generator=generator)[:POINTS]
    grid = torch.cartesian_prod(*[torch.arange(BOX)] * 3)[voxels]
    place = (grid - BOX // 2).float().flip(1)  # (z, y, x) -> (x, y, z)
    inside = (xyz.abs() < BOX / 2 + NEAR).all(1)
    distance, nearest = torch.cdist(place, xyz[inside]).min(1)
    kinds = kinds[inside][nearest]
    near = (distance < NEAR) & (kinds >= 0)
    return Crop(density, voxels[near], kinds[near])


def cells_as_channels(x: Tensor, side: int = 4) -> Tensor:
    """Comparator "voxels": (1, 1, D, D, D) -> (1, side^3, d, d, d)."""
    for axis in (2, 3, 4):
        x = x.unfold(axis, side, side)
    return x[0].flatten(4).movedim(-1, 1)


@torch.no_grad()
def features(encoder, crops: list[Crop]) -> Tensor:
    """The features of an encoder at the voxels of crops: (all V, C)."""
    found = []
    for crop in crops:
        f = encoder(crop.density[None, None]).float()
        f = F.interpolate(f, size=(BOX,) * 3, mode="trilinear")
        found.append(f[0].flatten(1)[:, crop.voxels].T)
    return torch.cat(found)


# ---- Probe ----


def fit(x: Tensor, kinds: Tensor) -> torch.nn.Linear:
    """Multinomial logistic regression, every class with the same weight; x standardised."""
    probe = torch.nn.Linear(x.shape[1], len(CLASSES))
    weight = 1 / kinds.bincount(minlength=len(CLASSES)).clamp(min=1).float()
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        decay = 1e-4 * probe.weight.square().sum()
        value = F.cross_entropy(probe(x), kinds, weight=weight) + decay
        value.backward()
        return value

    optimizer.step(loss)
    return probe


def confusion_of(said: Tensor, kinds: Tensor) -> Tensor:
    """Voxels of each class (rows) by what was said of them (columns): (4, 4)."""
    n = len(CLASSES)
    return (n * kinds + said).bincount(minlength=n * n).view(n, n)


def draw(path: Path, x: Tensor, kinds: Tensor) -> None:
    """The two directions of largest variance of features x (V, C), coloured by class."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path}: not drawn; pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:4000]
    x, kinds = x[some], kinds[some]
    _, _, directions = torch.pca_lowrank(x, q=2)
    plane = (x - x.mean(0)) @ directions
    figure, axes = pyplot.subplots(figsize=(6, 5))
    for k, name in enumerate(CLASSES):
        axes.scatter(*plane[kinds == k].T, s=3, alpha=0.5, label=name)
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second")
    axes.legend(markerscale=4)
    figure.savefig(path, dpi=120)
    print(path)


def chosen(structures: list, count: int) -> list:
    """Up to `count` structures of at most 20,000 atoms, a third of them with nucleic acid."""
    small = [s for s in structures if len(s.xyz) <= 20_000]
    order = np.random.default_rng(0).permutation(len(small))
    small = [small[i] for i in order]
    rich = [s for s in small if (s.atomic_number == 15).sum() > 15]
    taken = rich[: count // 3]
    names = {s.label for s in taken}
    return taken + [s for s in small if s.label not in names][: count - len(taken)]


def crops_of(path: Path, count: int, seed: int) -> list[Crop]:
    """One crop of each of `count` structures of an archive, where atoms with a class are."""
    structures = chosen(atoms.read_structures(path), count)
    kinds = []
    for s in structures:
        element = torch.from_numpy(s.atomic_number).round().long()
        kinds.append(classes_of_atoms(torch.from_numpy(s.xyz), element))
    say_agreement(path, structures, kinds)
    usable = [(s, k) for s, k in zip(structures, kinds) if (k >= 0).any()]
    return [crop_of(s, k, seed + i) for i, (s, k) in enumerate(usable)]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("train", type=Path, help="archive of structures that the probe learns from")
    add("val", type=Path, help="archive of structures that it is scored on")
    add("--ckpt", nargs="+", required=True, help="SCUNets and ViTs")
    add("--count", type=int, default=90, help="training structures")
    add("--csv", default="runs/probe.csv")
    args = cli.parse_args()
    train = crops_of(args.train, args.count, seed=1)
    val = crops_of(args.val, 10**6, seed=2)
    train_kinds = torch.cat([crop.kinds for crop in train])
    kinds = torch.cat([crop.kinds for crop in val])
    for name, crops, k in (("train", train, train_kinds), ("val", val, kinds)):
        print(f"{name}: {len(crops)} crops, voxels", dict(zip(CLASSES, k.bincount().tolist())))

    # The encoders, and what they are compared with.
    encoders = {path: checkpoint.load(path).net.encoder for path in args.ckpt}
    first = checkpoint.load(args.ckpt[0])
    torch.manual_seed(0)
    network, _ = checkpoint.NETWORKS[first.kind]
    encoders["scratch"] = network(first.net.config).encoder.eval()
    encoders["voxels"] = cells_as_channels

    rows = []
    for name, encoder in encoders.items():
        x = features(encoder, train)
        mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
        probe = fit((x - mean) / std, train_kinds)
        z = (features(encoder, val) - mean) / std
        with torch.no_grad():
            table = confusion_of(probe(z).argmax(1), kinds)

        # Shares of each class.
        recall = table.diagonal() / table.sum(1)
        accuracy = float(table.trace() / table.sum())
        print(f"{name}: accuracy {accuracy:.3f}, mean recall {recall.nanmean():.3f}", flush=True)
        for kind, row in zip(CLASSES, table / table.sum(1, keepdim=True)):
            print(f"    {kind:8}", *(f"{share:6.3f}" for share in row.tolist()))
        rows.append([name, accuracy, float(recall.nanmean()), *table.flatten().tolist()])
        if name == args.ckpt[0]:
            Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
            draw(Path(args.csv).with_suffix(".png"), z, kinds)
    cells = [f"{a} as {b}" for a in CLASSES for b in CLASSES]
    write_rows(args.csv, [["encoder", "accuracy", "mean_recall", *cells], *rows])


if __name__ == "__main__":
    main()
