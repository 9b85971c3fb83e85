"""Maps, masks and files that several tests make."""

from pathlib import Path

import mrcfile
import numpy as np
import torch

import atoms
import data_chains
import degrade
import fourier
import mrc
from checkpoint import Prior

ORACLES = Path(__file__).parent / "oracles"


def oracle(name):
    return {key: torch.from_numpy(value) for key, value in np.load(ORACLES / name).items()}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random(shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def fft(x):
    return torch.fft.fftn(x.double(), dim=fourier.XYZ)


def filtered(x, weights):
    return torch.fft.ifftn(torch.fft.fftn(x) * weights).real


def wedge(shape, tilt_range=(-60, 60), tilt_axis="y", voxel_size=1.0):
    mask = degrade.wedge_mask(shape, tilt_range, tilt_axis, voxel_size=voxel_size)
    return fourier.hermitian_part(mask)


def close(a, b, tolerance=1e-5):
    """Within float32 rounding of values and of sums (FFTs), relative to the largest."""
    return float((a - b).abs().max()) < tolerance * float(b.abs().max())


def molecule(shape, voxel_size=(1.5, 1.5, 1.5), resolution=3.0, atom_count=80):
    """Random atoms in a ball, simulated, maximum 1: (D, H, W)."""
    side = min(n * v for n, v in zip(shape, voxel_size))
    direction = torch.nn.functional.normalize(random((atom_count, 3)), dim=1)
    xyz = direction * torch.rand(atom_count, 1, generator=rng()) ** (1 / 3) * 0.3 * side
    number = torch.full((atom_count,), 7.0)
    density = atoms.molmap(xyz, number, resolution, voxel_size=voxel_size, shape=shape)[0]
    return density / density.max()


# A grid of 48 Å, and a model that fits.
GRID = dict(voxel_size=1.0, shape=(48,) * 3, origin=-24.0)


def small_chain():
    """A rule-built chain, cut to what fits GRID."""
    s = data_chains.ProceduralChains(0)[0]
    near = np.abs(s.xyz - s.xyz[0]).max(1) < 18
    return atoms.Structure(
        "a", s.xyz[near] - s.xyz[near].mean(0), s.atomic_number[near], s.b_factor[near]
    )


def bright_solvent(shape):
    """A smooth ball, maximum 1. A map less a part of it is negative around the protein."""
    side = torch.linspace(-1, 1, shape[0])
    return torch.exp(-3 * (side[:, None, None] ** 2 + side[:, None] ** 2 + side**2))


def degraded(truth, measured, noise=0.05):
    return filtered(truth + noise * random(truth.shape, 9), measured)


def write_mrc(path, density, voxel_size=(1.5, 1.5, 1.5), axes=(1, 2, 3)):
    """A map (z, y, x) in a file whose columns, rows and sections run along `axes` (1 = x)."""
    order = [3 - axis for axis in axes[::-1]]
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(density.numpy().transpose(order)))
        h = file.header
        h["mz"], h["my"], h["mx"] = density.shape
        h["cella"] = tuple(n * v for n, v in zip(density.shape, voxel_size))[::-1]
        h["mapc"], h["mapr"], h["maps"] = axes
        h["nxstart"], h["nystart"], h["nzstart"] = 5, -6, 7
        h["origin"] = (10.5, -20.0, 30.25)
        file.add_label("made by a test")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def values(path):
    return mrc.read_map(path).density


def prior_of(net, box, kind="hdit", voxel_size=1.5, mean=0.04, std=0.09, task=""):
    """A function as a network."""
    return Prior(net, kind, voxel_size, box, mean, std, sha256="", task=task)


class Function(torch.nn.Module):
    """A network without weights."""

    def __init__(self, function):
        super().__init__()
        self.forward = function
