"""Which network a task gets: that of --ckpt, or the shipped one that knows maps of this kind.

A prior knows the voxels and the resolutions that it was trained on. Those that are shipped:

    hdit_tiny.pt      1.5 Å per voxel, 2.5 to 6 Å      on the grid of CryoFM-S
    hdit_tiny_l.pt    3 Å per voxel, 6 to 20 Å         on the grid of CryoFM-L

The second one takes maps whose largest voxel side is above COARSE_VOXELS, and half maps whose FSC
falls below 0.143 before COARSE_RESOLUTION. On finer voxels the first one was better up to 8.5 Å,
on held-out training structures (RESULTS.md, "The coarse prior"). Of one map alone the resolution is
not known, so that its voxels decide. Not from the papers, which choose by hand.
"""

from pathlib import Path

import checkpoint
import fsc
from checkpoint import Prior
from mrc import Map

WEIGHTS = Path(__file__).parent / "weights"
COARSE_VOXELS = 2.12  # Å, the geometric mean of 1.5 and 3
COARSEST_VOXELS = 6.0  # Å, twice those of hdit_tiny_l.pt
COARSE_RESOLUTION = 12.0  # Å


def shipped_prior(maps: list[Map], say=print) -> Path:
    """The weights for no map, for a map or a stack, or for two half maps.

    Says why, if they are those of 3 Å per voxel.
    """
    voxels = max(maps[0].voxel_size) if maps else 0.0
    # The resolution costs two transforms, so it is measured only where voxels do not decide.
    agree = 0.0
    if len(maps) == 2 and voxels <= COARSE_VOXELS:
        agree = half_map_resolution(*maps)

    if voxels > COARSE_VOXELS:
        why = f"voxels of {voxels:.3g} Å"
    elif agree > COARSE_RESOLUTION:
        why = f"half maps that agree to {agree:.3g} Å"
    else:
        return WEIGHTS / "hdit_tiny.pt"
    # Coarser voxels than that get the classical answer, which the task says.
    if voxels <= COARSEST_VOXELS:
        say(f"{why}: the prior of 3 Å per voxel, hdit_tiny_l.pt; --ckpt names another")
    return WEIGHTS / "hdit_tiny_l.pt"


def half_map_resolution(half_map_1: Map, half_map_2: Map) -> float:
    """Where the FSC falls below 0.143, in Å; 0 for boxes that differ, which a task refuses."""
    shape = half_map_1.density.shape
    if half_map_2.density.shape != shape:
        return 0.0
    curve = fsc.fsc(half_map_1.density, half_map_2.density, voxel_size=half_map_1.voxel_size)
    box, voxel_size = fsc.shell_side(shape, half_map_1.voxel_size)
    return float(fsc.resolution(curve, voxel_size, box=box))


class Networks:
    """Reads networks, each of them once.

    ckpt: the file that was named, None for the shipped one. trained_for: what a fine-tuned network
    must have learned, "" for the prior. options: those of `checkpoint.load`.
    """

    def __init__(self, ckpt: str | None, trained_for: str, say=print, **options):
        self.ckpt = ckpt
        self.trained_for = trained_for
        self.say = say
        self.options = options
        self.read = {}

    def for_maps(self, maps: list[Map]) -> tuple[Path, Prior]:
        """The file and the network for the maps of one run.

        Raises ValueError or OSError for a file that cannot be used.
        """
        if self.ckpt:
            path = Path(self.ckpt)
        elif self.trained_for:
            path = WEIGHTS / f"scunet_tiny_{self.trained_for}.pt"
        else:
            path = shipped_prior(maps, self.say)

        if path not in self.read:
            network = checkpoint.load(path, say=self.say, **self.options)
            # One for another task would give a wrong map without a word.
            if self.trained_for and network.task != self.trained_for:
                learned = network.task or "no task"
                raise ValueError(
                    f"{path}: trained for {learned}, the task needs {self.trained_for}; give "
                    "another --ckpt"
                )
            self.read[path] = network
        return path, self.read[path]
