"""Settings of the tasks of sampling.py: each number with its default, its limits and its help.

A field of a class is an argument of the task in a notebook, and a flag of the command:
`WedgeSettings(tilt_range=(-50, 60))` is `--task wedge --tilt-range -50 60`. Fields that hold
tensors (mask, noise_from_fsc, orientations) are names of files there, which the command reads.
Lengths are in Å, angles in degrees.
"""

import argparse
import math
import sys
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from torch import Tensor

import abinitio
import degrade
import flow
import fourier
from mrc import Map
from sliding_windows import WINDOWS

# Scripts compare methods with one number of samples and steps. So where a method draws no samples,
# these are not refused, but a line says that they are not used.
SAMPLING = ("samples", "steps", "seed")


def flag_of(name: str) -> str:
    """The flag of a field: error messages name it so."""
    return "--" + name.replace("_", "-")


class Limits(NamedTuple):
    """The smallest and the largest value of a number, and the words for an error message."""

    low: float
    high: float
    words: str


# ulp(0) is the smallest number above 0; the largest float keeps infinity out.
POSITIVE = Limits(math.ulp(0.0), sys.float_info.max, "a positive number")
NOT_NEGATIVE = Limits(0, sys.float_info.max, "0 or more")
ONE_OR_MORE = Limits(1, sys.float_info.max, "1 or more")
# Each probe is a backward pass in every evaluation of the ODE.
PROBES = Limits(2, 10_000, "2 to 10,000")


def opt(default, help: str, limits: Limits | None = None, choices=(), **flag):
    """A field with its default, help and limits; flag: more arguments of `add_argument`."""
    # argparse converts what was typed to the type of the default.
    if isinstance(default, bool):
        flag["action"] = "store_true"
    elif default is not None:
        flag.setdefault("type", type(default))
        help = f"{help} (default: {default})"
    # The command and the checks below read these from the field.
    flag["help"] = help
    return field(default=default, metadata={"limits": limits, "choices": choices, "flag": flag})


@dataclass(frozen=True)
class Settings:
    """Settings of a task. Raises ValueError for a value beyond its limits or choices."""

    suffixes = ("",)  # of the maps that the task may return
    unread = {}  # fields that a method does not read, by the method's name

    def __post_init__(self):
        # None means: not given. Comparisons with nan are false, so that nan is refused, too.
        for setting in fields(self):
            value = getattr(self, setting.name)
            limits = setting.metadata["limits"]
            choices = setting.metadata["choices"]
            flag = flag_of(setting.name)
            if choices and value not in choices:
                raise ValueError(f"{flag} is {value}; give {', '.join(choices)}")
            if limits and value is not None and not limits.low <= value <= limits.high:
                raise ValueError(f"{flag} is {value:g}; give {limits.words}")

        # A method that was asked for must read what was given with it.
        method = getattr(self, "method", None)
        wrong = [name for name in self.set_in_vain(method) if name not in SAMPLING]
        if wrong:
            flags = ", ".join(flag_of(name) for name in wrong)
            raise ValueError(f"--method {method} does not use {flags}; leave it out")

    def set_in_vain(self, method: str | None) -> list[str]:
        """The fields that are set, other than by default, and that a method does not read."""
        names = self.unread.get(method, ())
        defaults = {setting.name: setting.default for setting in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]


@dataclass(frozen=True)
class SeedSettings(Settings):
    seed: int = opt(0, "of all random numbers", Limits(0, 2**32 - 1, "0 to 2^32 - 1"))


@dataclass(frozen=True)
class SampleSettings(SeedSettings):
    samples: int = opt(
        4,
        "samples; their mean is the result, and _std.mrc its standard deviation",
        Limits(1, 1000, "1 to 1000"),
    )
    # The default depends on the method, posterior.py.
    steps: int | None = opt(
        None,
        "of the sampler (default: 20; method paper 1000, abinitio's 200; generate 50)",
        Limits(1, 10_000, "1 to 10000"),
        type=int,
    )


@dataclass(frozen=True)
class GreySettings(Settings):
    # Both are found in the map, volume.py.
    background: float | None = opt(
        None,
        "value of solvent in the map (default: found)",
        Limits(-sys.float_info.max, sys.float_info.max, "a finite number"),
        type=float,
    )
    invert: bool | None = opt(
        None,
        "protein is darker than solvent, or --no-invert: brighter (default: found)",
        action=argparse.BooleanOptionalAction,
    )
    grey_scale: tuple[float, ...] | None = opt(
        None,
        "how far the brightest protein of the sharp density would be from solvent, in the map's "
        "units, and the value of solvent (default: estimated by wedge, denoise and anisotropic; "
        "for the others the map's own percentile)",
        type=float,
        nargs="+",
        metavar=("MAX", "BACKGROUND"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.grey_scale is None:
            return
        given = " ".join(f"{value:g}" for value in self.grey_scale)
        finite = all(math.isfinite(value) for value in self.grey_scale)
        if len(self.grey_scale) not in (1, 2) or not finite or not self.grey_scale[0] > 0:
            raise ValueError(
                f"--grey-scale is {given}; give MAX, a positive number, or MAX BACKGROUND"
            )
        if len(self.grey_scale) == 2 and self.background is not None:
            raise ValueError("--background and --grey-scale MAX BACKGROUND: give one of them")

    @property
    def maximum(self) -> float | None:
        """MAX of --grey-scale; None: to be estimated."""
        return self.grey_scale[0] if self.grey_scale else None

    @property
    def solvent(self) -> float | None:
        """The background that was given; None: to be found."""
        if self.grey_scale and len(self.grey_scale) == 2:
            return self.grey_scale[1]
        return self.background


@dataclass(frozen=True)
class MaskSettings(GreySettings):
    mask: Tensor | None = opt(
        None,
        "0 to 1: where to change the map; elsewhere the input is kept, and _std and _snr are 0",
        metavar="MAP",
    )

    def inside_mask(self, x: Tensor, before: Tensor | float) -> Tensor:
        """x (D, H, W) where the mask is 1, `before` where it is 0."""
        # The mask may lie on another grid than the result, which superres refines.
        if self.mask is None:
            return x
        mask = fourier.resample(self.mask, x.shape).clamp(0, 1)
        return mask * x + (1 - mask) * before


@dataclass(frozen=True)
class TiltSettings(MaskSettings):
    tilt_axis = "y"
    tilt_range: tuple[float, float] | None = opt(
        (-60, 60), "degrees", type=float, nargs=2, metavar=("MIN", "MAX")
    )

    def __post_init__(self):
        super().__post_init__()
        # Raises ValueError for a wrong range now, not after the maps were read.
        if self.tilt_range is not None:
            degrade.wedge_mask((4, 4, 4), self.tilt_range, self.tilt_axis)

    def measured(self, map: Map) -> Tensor:
        """m of posterior.py (1) on the grid of a map: boolean (D, H, W), `fftfreq` layout."""
        # Only what has a mirror image counts, so that the operator is a projection.
        shape, voxel_size = map.density.shape, map.voxel_size
        mask = degrade.wedge_mask(shape, self.tilt_range, self.tilt_axis, voxel_size=voxel_size)
        return fourier.hermitian_part(mask)


# Flags that several tasks share word by word.
AXIS = opt("y", "of tilting; the beam is along z (for axis z: along x)", choices=("x", "y", "z"))
METHOD = (
    "prior: the best we know; paper: its algorithm as printed; pocs (wedge), wiener (denoise), "
    "classical (abinitio): no network; auto: prior, or no network where voxels are too coarse, "
    "much density is negative, or a test on the data shows it to be better"
)


DISCARD = opt(
    False, "go on although the map has power where the tilt range says that nothing was measured"
)


@dataclass(frozen=True)
class WedgeSettings(SampleSettings, TiltSettings):
    suffixes = ("", "_mean", "_std", "_snr")
    # In fine voxels POCS works in the prior's spectrum, which the noise helps to find.
    unread = {"pocs": (*SAMPLING, "grey_scale"), "pocs on coarse voxels": ("noise",)}
    tilt_axis: str = AXIS
    discard_measured: bool = DISCARD
    method: str = opt("auto", METHOD, choices=("auto", "prior", "paper", "pocs"))
    # Of the map as it is given, on its own grid.
    noise: float | None = opt(
        None,
        "standard deviation of the noise as a fraction of the map's 99.999 percentile "
        "(default: estimated)",
        Limits(0, 10, "0 to 10, as a fraction of the map's maximum"),
        type=float,
    )


@dataclass(frozen=True)
class DenoiseSettings(SampleSettings, MaskSettings):
    suffixes = ("", "_half1", "_half2", "_std", "_snr")
    unread = {"wiener": (*SAMPLING, "grey_scale")}
    method: str = opt("auto", METHOD, choices=("auto", "prior", "paper", "wiener"))
    # The noise of two half maps is estimated from them. That of one map must be given.
    noise_from_fsc: Tensor | None = opt(
        None, "FSC of the halves of one map, a .csv of fsc.py", metavar="FSC"
    )
    snr: float | None = opt(
        None,
        "of one map: signal over noise power in every shell",
        Limits(0.053, sys.float_info.max, "0.053 or more; less has no signal, an FSC below 0.05"),
        type=float,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.snr is not None and self.noise_from_fsc is not None:
            raise ValueError("--snr and --noise-from-fsc: give one of them")

    @property
    def describes_one_map(self) -> bool:
        return self.snr is not None or self.noise_from_fsc is not None

    def noise_on_grid(self, power: Tensor, map: Map) -> Tensor:
        """Noise power per shell -> per coefficient (D, H, W) of a map."""
        return degrade.expand_shells(power, map.density.shape, map.voxel_size)


@dataclass(frozen=True)
class AnisotropicSettings(DenoiseSettings, TiltSettings):
    tilt_range: tuple[float, float] | None = opt(None, "", type=float, nargs=2)
    tilt_axis: str = AXIS
    # Section 5.2 uses 50.
    alpha: float = opt(
        50.0,
        "noise power outside of the tilt range over inside; with --orientations at most, over the "
        "mean",
        POSITIVE,
    )
    orientations: Tensor | None = opt(
        None,
        "of the particles: a .star file, or lines of rot tilt psi; subtomograms with --tilt-range",
        metavar="FILE",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.tilt_range is None and self.orientations is None:
            raise ValueError(
                "the directions of the noise are missing: give --tilt-range MIN MAX (with --alpha) "
                "or --orientations FILE"
            )
        if self.tilt_range is None and self.tilt_axis != "y":
            raise ValueError("--tilt-axis goes with --tilt-range; leave it out")

    def noise_on_grid(self, power: Tensor, map: Map) -> Tensor:
        """Noise power per shell -> per coefficient (D, H, W) of a map, by direction."""
        # alpha is the relative noise power of each coefficient, degrade.py (4).
        shape, voxel_size = map.density.shape, map.voxel_size
        if self.orientations is not None:
            alpha = degrade.orientation_alpha(
                self.orientations,
                shape,
                tilt_range=self.tilt_range,
                tilt_axis=self.tilt_axis,
                limit=self.alpha,
                voxel_size=voxel_size,
            )
        else:
            alpha = 1 + (self.alpha - 1) * ~self.measured(map)
        return degrade.anisotropic_noise_power(power, alpha, voxel_size)


@dataclass(frozen=True)
class NetworkSettings(MaskSettings):
    # Appendix G.4 compares strides and fusions; D.1 gives the percentile.
    stride: int = opt(12, "voxels from tile to tile", ONE_OR_MORE)
    fusion: str = opt("gaussian", "weights of overlapping tiles", choices=tuple(WINDOWS))
    percentile: float | None = opt(
        None,
        "densities are clipped to it, and it becomes 1 (default: as in the network's training)",
        Limits(math.ulp(0.0), 100, "a number above 0, at most 100"),
        type=float,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.maximum is not None and self.percentile is not None:
            raise ValueError("--percentile and --grey-scale MAX: give one of them")


@dataclass(frozen=True)
class NetworkWedgeSettings(NetworkSettings, TiltSettings):
    suffixes = ("", "_network")
    unread = {"pocs": ("stride", "fusion", "percentile", "grey_scale")}
    # The networks learnt wedges about y alone, so that there is no tilt_axis to set.
    discard_measured: bool = DISCARD
    method: str = opt("auto", METHOD, choices=("auto", "network", "pocs"))


@dataclass(frozen=True)
class GenerateSettings(SampleSettings):
    box: int | None = opt(None, "voxels per side (default: the prior's)", ONE_OR_MORE, type=int)
    # Steps of different order: flow.SOLVERS.
    solver: str = opt("heun", "of the flow's ODE", choices=tuple(flow.SOLVERS))

    @property
    def suffixes(self) -> list[str]:
        # OUT.mrc, OUT_2.mrc, OUT_3.mrc, ...
        return ["", *(f"_{i + 1}" for i in range(1, self.samples))]


@dataclass(frozen=True)
class AbInitioSettings(SampleSettings):
    suffixes = ("", "_std")
    unread = {"prior": ("losses",), "classical": ("samples", "steps", "losses")}
    method: str = opt("prior", METHOD, choices=("prior", "paper", "classical"))
    # In Å, whatever the size of the pixels.
    max_shift: float = opt(6.0, "Å that particles may be off the images' centres", NOT_NEGATIVE)
    # Rows differ in the terms of the loss, for synthetic and real images.
    losses: str = opt(
        "10345", "of method paper: a row of the paper's Table 6", choices=tuple(abinitio.TABLE_6)
    )


@dataclass(frozen=True)
class LikelihoodSettings(SeedSettings, GreySettings):
    # More probes give a smaller standard error. The tolerance is per voxel.
    probes: int = opt(4, "random vectors of Hutchinson's estimator", PROBES)
    tolerance: float = opt(1e-3, "of the ODE, relative and absolute", POSITIVE)
