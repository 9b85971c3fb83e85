"""Pairs that CryoLVM's wedge network (4.4) is fine-tuned on: what a tilt series leaves of a map.

    y        = F^-1[m F(x + n)]      x: the wanted map; n: white noise; m: what was measured   (1)
    observed = y, or POCS of y                                     classical.py (1)             (2)

The wanted map is simulated from an atomic model (`SimulatedWedges`), or a crop of a deposited map
(`WedgedMaps`), as in the paper.

Departure 1: the paper's network sees y, zeros in the wedge (fill="zeros"). Ours sees POCS of it
(fill="pocs") and has to mend the rest. On held-out crops its squared error fell from .0033 to .0006
(RESULTS.md, section 9). A checkpoint says which of them its network has learnt, and sampling.py
does the same.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from atoms import Structure
from augment import RandomItems, flip, uniform
from classical import pocs
from data import random_density
from data_pairs import pair_crops
from degrade import cone_mask, wedge_mask
from fourier import apply_fourier
from volume import CLIP, normalise


def lose_wedge(x: Tensor, generator: Generator, missing: str, fill: str) -> Tensor:
    """The observed map of a wanted one, (D, H, W) each.

    What a tilt range of 50 to 70 degrees misses is lost: missing="wedge", or "cone", the formula
    that the paper prints. fill: what the wedge then holds, "zeros" or "pocs".
    """
    # The measured region of a random tilt range.
    angle = uniform(50, 70, generator)
    if missing == "wedge":
        measured = wedge_mask(x.shape, (-angle, angle))
    else:
        measured = cone_mask(x.shape, angle)

    # White noise of up to a tenth of the maximum.                                              (1)
    noise = torch.randn(x.shape, generator=generator)
    noise = noise * (uniform(0, 0.1, generator) * x.max())
    y = apply_fourier(x + noise, measured)
    return pocs(y, measured) if fill == "pocs" else y  # (2)


@dataclass(eq=False, kw_only=True)
class WedgeCrops(RandomItems):
    """What both kinds of wedge pairs share: item i is (crops, 2, D, D, D), scaled to 0..1."""

    crop: int
    crops: int
    missing: str = "wedge"
    fill: str = "zeros"
    percentiles: tuple[float, float] = CLIP

    def crops_of(self, wanted: Tensor, generator: Generator) -> Tensor:
        """Crops (crops, 2, D, D, D) of a larger map, observed and wanted."""
        # A tilt series sees the whole map, so the wedge is lost before the crops are cut.
        observed = lose_wedge(wanted, generator, self.missing, self.fill)
        low, high = self.percentiles
        maps = torch.stack([normalise(x, 0, 1, high, low=low)[0] for x in (observed, wanted)])

        # A wedge has an orientation, which flips keep and rotations do not. All crops show the
        # molecule.
        crops = pair_crops(maps, self.crop, self.crops, generator, anywhere=0)
        return torch.stack([flip(x, generator) for x in crops])


@dataclass(eq=False, kw_only=True)
class SimulatedWedges(WedgeCrops):
    """Wedge pairs from models, `Structure`s.

    All crops of an item come from one map of box^3 voxels, at a resolution uniform in `resolution`
    (Å).
    """

    box: int
    voxel_size: float  # Å
    resolution: tuple[float, float]  # Å
    as_deposited: float = 0.0  # share of maps, see `random_density`

    def draw(self, structure: Structure, generator: Generator) -> Tensor:
        wanted = random_density(
            structure,
            generator,
            box=self.box,
            voxel_size=self.voxel_size,
            resolution=self.resolution,
            as_deposited=self.as_deposited,
        )
        return self.crops_of(wanted, generator)


@dataclass(eq=False, kw_only=True)
class WedgedMaps(WedgeCrops):
    """Wedge pairs from deposited maps, the `Volume`s of data.py, as in the paper.

    maps: a `MapCrops` of data.py, which cuts one crop per item that is larger than `crop`, turned
    at will, on 0..1.
    """

    maps: RandomItems

    def draw(self, volume, generator: Generator) -> Tensor:
        wanted = self.maps.draw(volume, generator)[0, 0]
        return self.crops_of(wanted, generator)
