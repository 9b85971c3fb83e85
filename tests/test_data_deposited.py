"""data_deposited.py: maps as they might be deposited, simulated from atomic models."""

import numpy as np
import pytest
import torch
from made_maps import GRID, small_chain

import atoms
import augment
import data_deposited
import degrade
import fsc


@pytest.fixture(scope="module")
def structure():
    return small_chain()


def deposits(structure, resolution, count=12, **options):
    xyz, b = torch.from_numpy(structure.xyz), torch.zeros(len(structure.xyz))
    return [
        data_deposited.deposited(
            xyz,
            structure.atomic_number,
            resolution,
            b_factor=b,
            generator=augment.item_generator(0, i),
            **GRID,
            **options,
        )
        for i in range(count)
    ]


def test_a_deposited_map_agrees_with_its_model_up_to_its_resolution(structure):
    xyz = torch.from_numpy(structure.xyz)
    clean = atoms.molmap(xyz, structure.atomic_number, 1.8, **GRID)[0]
    curves = torch.stack([fsc.fsc(x, clean) for x in deposits(structure, 4.0)])
    shell = round(48 / 4.0)
    # With noise as strong as the signal, the FSC to the truth is 0.71. The smooth B-factors lower
    # that a little.
    assert 0.5 < float(curves[:, shell].mean()) < 0.75
    assert float(curves[:, shell // 2].mean()) > 0.9
    assert float(curves[:, shell // 2].mean()) > float(curves[:, shell].mean())


def test_a_deposited_map_has_power_beyond_its_resolution_only_if_it_is_masked(structure):
    beyond = fsc.radius((48,) * 3) > 48 / 4.0 + 2
    shares = []
    for x in deposits(structure, 4.0):
        power = torch.fft.fftn(x.double()).abs() ** 2
        shares.append(float(power[beyond].sum() / power.sum()))
    # 4 of these 12 are cut out by a mask. It spreads the coefficients at the edge of the low-pass,
    # and most in a sharpened map.
    assert sum(share < 1e-9 for share in shares) == 8 and max(shares) < 2e-3


def test_amplitudes_fall_by_a_factor_between_e_and_e_cubed_at_the_resolution(
    structure, monkeypatch
):
    # Leave out noise, solvent and sharpening (the draw from 0 to 8).
    draw = augment.uniform

    def without_sharpening(low, high, generator):
        return draw(low, 0 if high == 8 else high, generator)

    monkeypatch.setattr(data_deposited, "add_spectral_noise", lambda x, power, generator: x)
    monkeypatch.setattr(data_deposited, "uniform", without_sharpening)

    # molmap at 1.8 Å has a decay of its own, so compare with it, relative to shell 1.
    xyz = torch.from_numpy(structure.xyz)
    clean = degrade.radial_power(atoms.molmap(xyz, structure.atomic_number, 1.8, **GRID)[0])
    shell = 11  # just below 1 / 4 Å
    for x in deposits(structure, 4.0):
        ratio = degrade.radial_power(x) / clean
        fall = float((ratio[shell] / ratio[1]).sqrt())
        assert np.exp(-3.2) < fall < np.exp(-0.8)


def test_sharpening_multiplies_each_coefficient_by_the_b_factor_exponential(structure, monkeypatch):
    def deposit(b):
        # The draws from 0 to 1: noise exponent, no preferred views, sharpened, not masked.
        draws = iter([0.5, 0.9, 0.1, 0.9])

        def fixed(low, high, generator):
            if high == 1:
                return next(draws)
            return b if high == 8 else high

        monkeypatch.setattr(data_deposited, "uniform", fixed)
        return torch.fft.fftn(deposits(structure, 4.0, 1)[0].double())

    shell = fsc.radius((48,) * 3)
    inside = shell < 48 / 4.0 - 1.5  # before the low-pass begins to fall
    want = torch.exp(6 * 4.0**2 / 4 * (shell / 48) ** 2)
    flat = deposit(0)
    raised = deposit(6)
    assert float((raised - want * flat)[inside].abs().max() / raised[inside].abs().max()) < 1e-5


def test_a_deposited_map_depends_on_its_generator_alone(structure):
    a, b = deposits(structure, 4.0, 1), deposits(structure, 4.0, 1)
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], deposits(structure, 4.0, 2)[1])


def test_without_noise_a_deposited_map_is_its_blurred_model_up_to_its_resolution(structure):
    xyz = torch.from_numpy(structure.xyz)
    clean = atoms.molmap(xyz, structure.atomic_number, 1.8, **GRID)[0]
    curves = torch.stack([fsc.fsc(x, clean) for x in deposits(structure, 4.0, noisy=False)])
    # Solvent, B-factors that vary and masks stay. With noise these shells have 0.79 and 0.64.
    assert float(curves[:, round(48 / 4.0) - 1].mean()) > 0.88
    assert float(curves[:, round(48 / 4.0)].mean()) > 0.77


def fixed_draws(monkeypatch, coins, **values):
    """Let data_deposited.uniform return coins for the draws from 0 to 1, and fixed values.

    values: by the upper end of the interval, high_8=0 for the draw from 0 to 8. Others: the middle.
    """
    coins = iter(coins)

    def fixed(low, high, generator):
        if (low, high) == (0, 1):
            return next(coins)
        return values.get(f"high_{high:g}", (low + high) / 2)

    monkeypatch.setattr(data_deposited, "uniform", fixed)


def test_a_mask_leaves_the_molecule_and_nothing_far_away(structure, monkeypatch):
    # Not sharpened; masked, or not. The widest edge is a Gaussian of 6 Å.
    maps = []
    for coin in (0.1, 0.9):
        fixed_draws(monkeypatch, [0.9, coin], high_6=6.0)
        maps += deposits(structure, 4.0, 1, noisy=False)
    masked, whole = maps

    distance = distance_to_atoms(structure)
    far = distance > 20
    assert float(masked[far].abs().max()) < 0.05 * float(whole[far].abs().max())
    # Thin ends of the chain are dimmed, because m is below 1/4 there.
    near = distance < 2
    pair = torch.stack([masked[near], whole[near]])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.99


def distance_to_atoms(structure):
    """The distance in Å of each voxel of GRID from the nearest atom."""
    grid = torch.arange(48) * GRID["voxel_size"] + GRID["origin"]
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    points = torch.stack([x, y, z], -1).flatten(0, 2).float()
    return torch.cdist(points, torch.from_numpy(structure.xyz).float()).amin(1).view(48, 48, 48)


def test_three_standard_deviations_of_solvent_are_the_drawn_share_of_the_maximum(
    structure, monkeypatch
):
    # Neither sharpened nor masked. With more solvent the map differs by solvent alone.
    maps = []
    for strength in (0.0, 0.08):
        fixed_draws(monkeypatch, [0.9, 0.9], **{"high_0.08": strength})
        maps += deposits(structure, 4.0, 1, noisy=False)
    none, most = maps
    solvent = (most - none)[distance_to_atoms(structure) > 15]

    # The maximum that counts is that of the blurred model before the low-pass at 4 Å.
    assert 3 * float(solvent.std()) == pytest.approx(0.08 * float(none.max()), rel=0.2)


def test_noise_is_as_strong_as_the_signal_at_the_resolution_and_falls_as_drawn(monkeypatch):
    rho = torch.randn(48, 48, 48, generator=torch.Generator().manual_seed(0))
    flat, steep = (
        noise_spectrum_with(exponent, rho, monkeypatch) / degrade.radial_power(rho)[12]
        for exponent in (0.0, 1.0)
    )
    torch.testing.assert_close(flat, torch.ones(24))
    # At a quarter of the frequency, four times as strong.
    assert float(steep[12]) == pytest.approx(1, rel=1e-5)
    assert float(steep[3]) == pytest.approx(4, rel=1e-5)


def noise_spectrum_with(exponent, rho, monkeypatch):
    """Noise for a resolution of 4 voxels: shell 12 of 24."""
    monkeypatch.setattr(data_deposited, "uniform", lambda low, high, generator: exponent)
    return data_deposited.noise_spectrum(rho, 4.0, 1.0, torch.Generator())


def test_noise_is_strongest_along_the_axis_that_views_crowd_about():
    # The projection along a direction says nothing of coefficients in that direction.
    along_z = torch.tensor([0.0, 0.0, 1.0])  # x, y, z
    alpha = data_deposited.preferred_views(along_z, (24,) * 3, augment.item_generator(0, 0))
    assert float(alpha[8, 0, 0]) > 2 * float(alpha[0, 8, 0].maximum(alpha[0, 0, 8]))
