"""Training pairs for CryoLVM's wedge network (4.4): a map that lost its wedge, and the whole map.

    y        = F^-1[m F(x + n)]      x: the wanted map; n: white noise; m: what was measured   (1)
    observed = y, or POCS of y                                     classical.py (1)             (2)

The wanted map is simulated from an atomic model (`SimulatedWedges`), or a crop of a deposited map
(`WedgedMaps`), as in the paper.

Departure 1: the paper's network sees y, zeros in the wedge (fill="zeros"). Ours sees POCS of it
    (fill="pocs") and has to mend the rest. The held-out squared error was .0033 after 700 steps
    with zeros. It is .0041 for POCS alone, and was .0010 after 500 steps and .0006 after 4,000 with
    POCS as the input (RESULTS.md, section 9). A checkpoint says which of them its network has
    learnt, and sampling.py does the same.
Departure 2: the paper masks at one angle and adds no noise. We draw the angle from 50 to 70
    degrees, and add noise of up to a tenth of the maximum.
Departure 3: the paper turns its crops by 90 degrees, too. We flip them alone, because a rotation
    would turn the wedge.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from atoms import Structure
from augment import RandomItems, flip, uniform
from classical import fill_in
from data_deposited import random_density
from data_pairs import pair_crops, scale_pair
from degrade import cone_mask, wedge_mask
from volume import CLIP


def lose_wedge(x: Tensor, generator: Generator, missing: str, fill: str) -> Tensor:
    """A map x (D, H, W) as a tilt series of ±50 to ±70 degrees would measure it.

    missing: "wedge", or "cone", the formula that the paper prints. fill: what the missing
    coefficients become, "zeros" or "pocs".
    """
    # The measured region of a random tilt range.
    angle = uniform(50, 70, generator)
    if missing == "wedge":
        measured = wedge_mask(x.shape, (-angle, angle))
    else:
        measured = cone_mask(x.shape, angle)

    # White noise with a standard deviation of up to a tenth of the maximum.
    white = torch.randn(x.shape, generator=generator)
    noise = white * (uniform(0, 0.1, generator) * x.max())
    return fill_in(x + noise, measured, fill)  # (1), (2)


@dataclass(eq=False, kw_only=True)
class WedgeCrops(RandomItems):
    """The base of both kinds of wedge pairs: item i is (crops, 2, D, D, D), scaled to 0..1.

    missing, fill: as in `lose_wedge`.
    """

    crop: int
    crops: int
    missing: str = "wedge"
    fill: str = "zeros"
    percentiles: tuple[float, float] = CLIP

    def crops_of(self, wanted: Tensor, generator: Generator) -> Tensor:
        """Crops (crops, 2, D, D, D) of a larger map, observed and wanted."""
        # A tilt series sees the whole map, so the wedge is lost before the crops are cut.
        observed = lose_wedge(wanted, generator, self.missing, self.fill)
        maps = scale_pair(observed, wanted, self.percentiles)

        # A wedge has an orientation, which flips keep (Departure 3). All crops show the molecule,
        # because the wedge of empty solvent is empty.
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

    maps: a `MapCrops` of data.py that cuts one crop per item, larger than `crop`, in a random
    orientation, with values on 0..1 (mean 0, std 1).
    """

    maps: RandomItems

    def draw(self, volume, generator: Generator) -> Tensor:
        wanted = self.maps.draw(volume, generator)[0, 0]
        return self.crops_of(wanted, generator)
