"""data_chains.py: chains built by rule have the geometry, packing and composition of proteins."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import atoms
import data_chains

ROOT = Path(__file__).parent.parent


def dihedral(a, b, c, d):
    """IUPAC torsion angles in degrees; positive: seen along b-c, d lies clockwise of a."""
    n_1, n_2 = np.cross(b - a, c - b), np.cross(c - b, d - c)
    y = np.sum(np.cross(n_1, n_2) * (c - b), -1) / np.linalg.norm(c - b, axis=-1)
    return np.degrees(np.arctan2(y, np.sum(n_1 * n_2, -1)))


def angle(a, b, c):
    cosine = (
        np.sum((a - b) * (c - b), -1)
        / np.linalg.norm(a - b, axis=-1)
        / np.linalg.norm(c - b, axis=-1)
    )
    return np.degrees(np.arccos(cosine))


def length(a, b):
    return np.linalg.norm(a - b, axis=-1)


def chains(count=12):
    """(N, CA, C, O), each (R, 3), and "HHHCCEE..." of some chains."""
    for i in range(count):
        ca, towards_o, kinds = data_chains.fold(np.random.default_rng(i))
        assert len(kinds) == len(ca) == len(towards_o) + 1
        yield data_chains.backbone(ca, towards_o).transpose(1, 0, 2), kinds[1:-1]


def inside(kinds, kind, width=4):
    """Where `width` residues of one kind begin that are not at the end of an element."""
    return [
        i for i in range(1, len(kinds) - width - 1) if set(kinds[i - 1 : i + width + 1]) == {kind}
    ]


def test_bond_lengths_and_planar_trans_peptides_are_those_of_proteins():
    for (n, ca, c, o), kinds in chains():  # Å; Engh & Huber 1991
        np.testing.assert_allclose(length(n, ca), 1.458, atol=0.02)
        np.testing.assert_allclose(length(ca, c), 1.525, atol=0.002)
        np.testing.assert_allclose(length(c[:-1], n[1:]), 1.329, atol=0.002)
        np.testing.assert_allclose(length(c, o), 1.231, atol=0.002)
        np.testing.assert_allclose(length(ca[:-1], ca[1:]), 3.80, atol=0.002)
        np.testing.assert_allclose(
            np.abs(dihedral(ca[:-1], c[:-1], n[1:], ca[1:])), 180, atol=0.5
        )  # trans
        tau = angle(n, ca, c)
        regular = np.array(inside(kinds, "H") + inside(kinds, "E"))
        np.testing.assert_allclose(tau[regular], 111, atol=3)
        assert tau.min() > 80 and np.percentile(tau, 90) < 140 and tau.max() < 175


def test_helices_are_right_handed_with_the_rise_turn_and_hydrogen_bonds_of_alpha_helices():
    seen = 0
    for (n, ca, c, o), kinds in chains():
        i = np.array(inside(kinds, "H", 5), dtype=int)
        seen += len(i)
        np.testing.assert_allclose(length(ca[i], ca[i + 2]), 5.4, atol=0.1)
        np.testing.assert_allclose(length(ca[i], ca[i + 3]), 5.0, atol=0.1)
        np.testing.assert_allclose(length(ca[i], ca[i + 4]), 6.2, atol=0.1)
        np.testing.assert_allclose(
            dihedral(ca[i], ca[i + 1], ca[i + 2], ca[i + 3]), 50, atol=2
        )  # right-handed
        np.testing.assert_allclose(
            dihedral(c[i], n[i + 1], ca[i + 1], c[i + 1]), -57, atol=1
        )  # phi
        np.testing.assert_allclose(dihedral(n[i], ca[i], c[i], n[i + 1]), -47, atol=1)  # psi
        np.testing.assert_allclose(length(o[i], n[i + 4]), 2.9, atol=0.25)  # O...H-N
        # 1.5 Å of rise per residue: along the axis, the cross product of two second differences.
        second = ca[i] - 2 * ca[i + 1] + ca[i + 2], ca[i + 1] - 2 * ca[i + 2] + ca[i + 3]
        axis = data_chains.unit(np.cross(*second))
        np.testing.assert_allclose(np.sum((ca[i + 2] - ca[i + 1]) * axis, -1), 1.5, atol=0.01)
    assert seen > 200


def test_strands_lie_4_8_angstrom_apart_and_form_hydrogen_bonds():
    seen, spacings, bonds = 0, [], []
    for (n, ca, c, o), kinds in chains():
        i = np.array(inside(kinds, "E"), dtype=int)
        seen += len(i)
        if not len(i):
            continue
        np.testing.assert_allclose(length(ca[i], ca[i + 2]), 6.6, atol=0.05)  # 3.3 Å each
        np.testing.assert_allclose(
            dihedral(c[i], n[i + 1], ca[i + 1], c[i + 1]), -119, atol=1
        )  # phi
        np.testing.assert_allclose(dihedral(n[i], ca[i], c[i], n[i + 1]), 117, atol=1)  # psi
        j = np.array([k for k in range(len(kinds) - 1) if kinds[k : k + 2] == "EE"])
        middle, separate = (ca[:-1] + ca[1:]) / 2, np.abs(i[:, None] - j) > 5  # of the pleat
        spacings += list(np.where(separate, length(middle[i][:, None], middle[j]), 99).min(1))
        bonds += list(np.where(separate, length(o[i][:, None], n[j]), 99).min(1))
    assert seen > 100
    assert np.median(spacings) == pytest.approx(4.8, abs=0.15)
    bonded = [b for b in bonds if b < 3.5]  # the edges of a sheet have none outwards
    assert len(bonded) > 0.6 * len(bonds) and np.median(bonded) == pytest.approx(2.9, abs=0.3)


def test_side_chains_make_l_amino_acids_without_overlaps():
    left = right = residues = 0
    for (n, ca, c, o), _ in chains(6):
        xyz, number = data_chains.side_chains(np.stack([n, ca, c, o], 1), np.random.default_rng(0))
        d = data_chains.distances(xyz, xyz) + 9 * np.eye(len(xyz))
        assert d.min() > 1.1  # the shortest bond, C=O, has 1.23 Å
        assert np.sort(d, 1)[:, 0].max() < 1.7  # and every atom has a bond
        # CB of an L amino acid from N, CA, C by ideal tetrahedral geometry:
        # Dunbrack & Karplus 1993.
        b_, c_ = ca - n, c - ca
        a_ = np.cross(b_, c_)
        for sign in (1, -1):
            cb = -0.58273431 * sign * a_ + 0.56802827 * b_ - 0.54067466 * c_ + ca
            found = (data_chains.distances(cb, xyz).min(1) < 0.5).sum()
            left, right = left + found * (sign > 0), right + found * (sign < 0)
        residues += len(ca)
    assert left > 0.85 * residues  # 7 % are glycines
    assert right < 0.1 * residues


def packing(xyz):
    """Atoms per Å^3 within 8 Å of the atoms of the core, and the radius of gyration in Å."""
    xyz = torch.as_tensor(xyz).double()
    r = (xyz - xyz.mean(0)).norm(dim=1)
    gyration = r.square().mean().sqrt()
    within = (torch.cdist(xyz, xyz[r < 0.6 * gyration]) < 8).double().sum(0)
    return float(within.mean() / (4 / 3 * math.pi * 8**3)), float(gyration)


def test_chains_are_as_big_dense_and_compact_as_proteins():
    models = [data_chains.ProceduralChains()[i] for i in range(24)]
    residues = [len(data_chains.fold(np.random.default_rng((0, i)))[2]) - 2 for i in range(24)]
    density, gyration = np.array([packing(m.xyz) for m in models]).T
    assert min(residues) >= 60 and max(residues) <= 400 and max(residues) > 2 * min(residues)
    np.testing.assert_allclose([len(m.xyz) / n for m, n in zip(models, residues)], 7.6, atol=0.6)
    assert (
        0.043 < density.mean() < 0.050 and density.min() > 0.036
    )  # 120 experimental ones: 0.046, 0.040 - 0.050
    ratio = gyration / (2.2 * np.array(residues) ** 0.38)  # Å, Skolnick et al. 1997
    assert 0.9 < ratio.mean() < 1.05 and ratio.max() < 1.25
    z = np.concatenate([m.atomic_number for m in models])
    for number, share in ((6, 0.632), (7, 0.168), (8, 0.189), (16, 0.005)):  # experimental ones
        assert (z == number).mean() == pytest.approx(share, abs=0.01)
    for m in models:
        np.testing.assert_allclose(m.xyz.mean(0), 0, atol=1e-3)
        assert m.b_factor.min() >= 0 and m.b_factor.argmax() == np.square(m.xyz).sum(1).argmax()


def test_chains_are_as_dense_as_experimental_structures():
    archive = ROOT / "structures" / "val.npz"
    if not archive.exists():
        pytest.skip(f"no {archive}; make it: python data_prepare.py structures structures/val.tsv")
    models = [m for m in atoms.read_structures(archive) if 600 < len(m.xyz) < 3000]
    experimental = np.mean([packing(m.xyz)[0] for m in models])
    ours = np.mean([packing(data_chains.ProceduralChains()[i].xyz)[0] for i in range(12)])
    assert ours == pytest.approx(experimental, rel=0.1)


def test_a_chain_depends_on_seed_and_index_alone():
    a, again, other, next_one = (
        data_chains.ProceduralChains(seed)[i] for seed, i in ((0, 3), (0, 3), (1, 3), (0, 4))
    )
    np.testing.assert_array_equal(a.xyz, again.xyz)
    np.testing.assert_array_equal(a.atomic_number, again.atomic_number)
    for b in (other, next_one):
        assert a.xyz.shape != b.xyz.shape or not np.allclose(a.xyz, b.xyz)
