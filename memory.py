"""Memory that a step will take, checked before the work: a refusal with numbers, not a crash.

Estimates count the large tensors alone. They catch grids that are a hundred times too large, not
the last gigabyte.
"""

import math
from collections.abc import Sequence
from pathlib import Path

GIB = 2**30
LARGEST_GRID = 1024**3  # voxels
BYTES_TO_RESAMPLE = 16  # per voxel of the new grid: the map, half a spectrum, and a copy


def free_memory() -> float:
    """Bytes that this process may still take: what the system and its container leave free.

    Infinite where the system does not say.
    """
    free = math.inf
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("MemAvailable:")]
        free = 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass  # not Linux
    try:
        # A container's limit; the word "max" means none.
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free


def check_memory(needed: float, what: str, change: str) -> None:
    """Raises ValueError if `needed` bytes are not free. what, change: words for the message."""
    free = free_memory()
    if needed > free:
        raise ValueError(
            f"{what} takes about {needed / GIB:.3g} GiB of memory, and {free / GIB:.3g} GiB are "
            f"free; {change}"
        )


def check_grid(shape: Sequence[int], old_shape: Sequence[int], old_voxel_size) -> None:
    """Raises ValueError if a map cannot be resampled to `shape`: over 1024^3 voxels, or memory."""
    grid = " x ".join(str(n) for n in shape)
    old = " x ".join(str(n) for n in old_shape)
    sides = " x ".join(f"{v:g}" for v in old_voxel_size)
    what = f"resampling {old} voxels of {sides} Å to {grid}"
    change = "if the voxel size is wrong, give --voxel-size; otherwise crop the map"
    if math.prod(shape) > LARGEST_GRID:
        raise ValueError(f"{what}: more than 1024^3 voxels; {change}")
    check_memory(BYTES_TO_RESAMPLE * math.prod(shape), what, change)
