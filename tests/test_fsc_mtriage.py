"""The promise of fsc_mtriage.py: the curve and the resolutions of phenix.mtriage."""

from pathlib import Path

import numpy as np
import pytest
import torch

from atoms import ATOMIC_NUMBER
from fsc_mtriage import map_model_resolution

ORACLES = Path(__file__).parent / "oracles"


def test_map_model_resolutions_are_mtriages():
    oracle = np.load(ORACLES / "map_model.npz")
    xyz, b_iso = torch.from_numpy(oracle["coords_xyz"]), torch.from_numpy(oracle["b_iso"])
    number = torch.tensor([ATOMIC_NUMBER[element] for element in oracle["elements"]])
    density = torch.from_numpy(oracle["map_zyx"])
    ours = map_model_resolution(density, xyz, number, b_iso, float(oracle["voxel"]))
    curve = ours.pop("curve")
    np.testing.assert_allclose(curve, oracle["fsc_model_d_dinv_fsc"][:, 1:], atol=5e-5)
    assert len(ours) == 6
    for name, value in ours.items():
        expected = float(oracle[f"mtriage_{name}"])
        assert value == pytest.approx(expected, abs=2e-4, nan_ok=True), name
