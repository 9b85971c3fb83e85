"""data_wedges.py: what a tilt series leaves of a simulated or a deposited map."""

import pytest
import torch

import data
import data_deposited
import data_wedges
import degrade
import fourier
from classical import pocs
from data_chains import ProceduralChains

SHAPE = (24,) * 3


def blob(n=24):
    """A ball of density off the centre, with hard edges that ring where a wedge is missing."""
    r = torch.arange(n) - n / 2
    z, y, x = torch.meshgrid(r, r, r, indexing="ij")
    return ((z - 3).square() + y.square() + (x + 2).square() < 30).float()


@pytest.fixture
def smallest_draws(monkeypatch):
    """A tilt range of ±50 degrees, no noise."""
    monkeypatch.setattr(data_wedges, "uniform", lambda low, high, generator: low)


def test_observed_maps_have_noise_of_the_drawn_strength_and_the_drawn_tilts(monkeypatch):
    # The largest draws: tilts of ±70 degrees, a tenth of the maximum.
    drawn = []

    def largest(low, high, generator):
        drawn.append((low, high))
        return high

    monkeypatch.setattr(data_wedges, "uniform", largest)
    wanted = 3 * blob()
    y = data_wedges.lose_wedge(wanted, torch.Generator().manual_seed(0), "wedge", "zeros")
    region = degrade.wedge_mask(SHAPE, (-70, 70))
    noise = y - fourier.apply_fourier(wanted, region)
    measured = float(fourier.hermitian_part(region).float().mean())
    # White noise keeps the share of its power that was measured. 13,824 voxels: within 3 %.
    assert float(noise.std()) == pytest.approx(0.3 * measured**0.5, rel=0.03)
    assert drawn == [(50, 70), (0, 0.1)]


@pytest.mark.parametrize("missing", ["wedge", "cone"])
def test_zeros_leave_exactly_what_was_measured(smallest_draws, missing):
    wanted = blob()
    observed = data_wedges.lose_wedge(wanted, torch.Generator(), missing, "zeros")
    region = {"wedge": degrade.wedge_mask(SHAPE, (-50, 50)), "cone": degrade.cone_mask(SHAPE, 50)}
    torch.testing.assert_close(observed, fourier.apply_fourier(wanted, region[missing]))


def test_pocs_fills_the_wedge_and_halves_the_error_at_least(smallest_draws):
    wanted, region = blob(), degrade.wedge_mask(SHAPE, (-50, 50))
    zeros, filled = (
        data_wedges.lose_wedge(wanted, torch.Generator(), "wedge", fill)
        for fill in ("zeros", "pocs")
    )
    torch.testing.assert_close(filled, pocs(zeros, region))
    torch.testing.assert_close(fourier.apply_fourier(filled, region), zeros, atol=1e-5, rtol=0)
    assert float((filled - wanted).norm()) < 0.5 * float((zeros - wanted).norm())


def test_crops_are_flipped_and_never_turned(monkeypatch):
    ramp = torch.arange(1.0, 33.0)[:, None, None].expand(32, 32, 32)  # along z
    monkeypatch.setattr(data_wedges, "lose_wedge", lambda x, *_: x)
    pairs = data_wedges.WedgeCrops([ramp], crop=16, crops=16)
    crops = pairs.crops_of(ramp, torch.Generator().manual_seed(0))  # (16, 2, 16, 16, 16)
    slopes = crops.diff(dim=2).sum((1, 2, 3, 4)).sign().tolist()
    # Up or down along z, but never flat, as a crop that was turned by 90 degrees.
    assert set(slopes) == {1, -1}


def test_every_crop_shows_the_molecule(monkeypatch):
    monkeypatch.setattr(data_wedges, "lose_wedge", lambda x, *_: x)
    wanted = torch.zeros(64, 64, 64)
    wanted[48:54, 8:14, 30:36] = 1
    pairs = data_wedges.WedgeCrops([wanted], crop=16, crops=16)
    crops = pairs.crops_of(wanted, torch.Generator().manual_seed(0))
    assert float(crops[:, 1].amax((1, 2, 3)).min()) == 1


def test_a_simulated_item_is_crops_of_a_pair_on_0_to_1_and_depends_on_its_number_alone():
    pairs = data_wedges.SimulatedWedges(
        ProceduralChains(0), crop=16, crops=3, box=32, voxel_size=4.0, resolution=(8, 9)
    )
    x = pairs[0]
    assert x.shape == (3, 2, 16, 16, 16)
    assert float(x.min()) >= 0 and float(x.max()) <= 1
    assert all(float(crop.max()) > 0.1 for crop in x[:, 1])
    assert torch.equal(x, pairs[0]) and not torch.equal(x, pairs[1])


def test_wanted_maps_look_deposited_as_often_as_asked(monkeypatch):
    # A map as deposited is white here, so that no clean map can be taken for it.
    white = torch.ones(32, 32, 32)
    monkeypatch.setattr(data_deposited, "deposited", lambda *model, **settings: white)

    def share(wanted):
        pairs = data_wedges.SimulatedWedges(
            ProceduralChains(0),
            crop=16,
            crops=1,
            box=32,
            voxel_size=4.0,
            resolution=(8, 9),
            as_deposited=wanted,
        )
        return sum(float(pairs[i][0, 1].min()) == 1 for i in range(12)) / 12

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0 < share(0.5) < 1


def test_a_deposited_map_is_turned_before_it_loses_its_wedge():
    # A wanted crop is the map itself, without a wedge: its missing region holds density.
    volume = data.Volume("a", blob(40))
    maps = data.MapCrops([volume], crop=32, crops=1, mean=0.0, std=1.0)
    pairs = data_wedges.WedgedMaps([volume], maps=maps, crop=32, crops=1)
    missing = ~degrade.wedge_mask((32,) * 3, (-50, 50))
    for i in range(3):
        observed, wanted = pairs[i][0]
        share = [float(fourier.apply_fourier(x, missing).norm()) for x in (observed, wanted)]
        assert share[0] < 0.7 * share[1]
    assert not torch.equal(pairs[0][0, 1], pairs[1][0, 1])
