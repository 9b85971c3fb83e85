"""Agreement of a map with an atomic model: correlations as in Phenix, and the Q-score.

    F(s) = sum_j n_j f_j(s) exp(-B_j s^2 / 4) exp(-2 pi i s . x_j)      structure factors     (1)
    f(s) = sum_i a_i exp(-b_i s^2 / 4)                          electron scattering, one atom (2)
    Q = corr(density on shells of radius R around an atom, exp(-R^2 / (2 sigma^2)))           (3)

s is the spatial frequency in 1/Å; atom j has occupancy n_j, B-factor B_j in Å² and position x_j.
Maps are (D, H, W) = (z, y, x). voxel_size and origin, the centre of voxel (0, 0, 0), are in Å, one
number or (z, y, x). Positions of atoms are (x, y, z) in Å.
(1) and the four correlations: Afonine et al. 2018, Acta Cryst. D74:814 (phenix.map_model_cc).
(2): International Tables C, table 4.3.2.2. (3): Pintilie et al. 2020, Nat. Methods 17:328 (MapQ).
The map-model FSC and d_model, of phenix.mtriage, are in `fsc_mtriage.py`.

Departure 1: to equal Phenix, `structure_factors` takes cctbx's grid, cctbx's extra B-factor and
its cut through the tail of an atom. Effect: F is wrong by up to 1 % of the largest F, correlations
by up to 0.0004, the FSC by up to 0.0003.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from atoms_records import ATOMIC_NUMBER, SYMBOLS
from fourier import freq_grid, triple

# Symbol, van der Waals radius in Å (cctbx, for the molecular mask), a_1 .. a_5, b_1 .. b_5 of (2).
TABLE = """
    H 1.2 .0349 .1201 .197 .0573 .1195 .5347 3.5867 12.3471 18.9525 38.6269
    C 1.775 .0893 .2563 .757 1.0487 .3575 .2465 1.71 6.4094 18.6113 50.2523
    N 1.5 .1022 .3219 .7982 .8197 .1715 .2451 1.7481 6.1925 17.3894 48.1431
    O 1.45 .0974 .2921 .691 .699 .2039 .2067 1.3815 4.6943 12.7105 32.4726
    F 1.47 .1083 .3175 .6487 .5846 .1421 .2057 1.3439 4.2788 11.3932 28.7881
    Na 2.27 .2142 .6853 .7692 1.6589 1.4482 .3334 2.3446 10.083 48.3037 138.27
    Mg 1.73 .2314 .6866 .9677 2.1882 1.1339 .3278 2.272 10.9241 39.2898 101.9748
    P 1.9 .2548 .6106 1.4541 2.3204 .8477 .2908 1.874 8.5176 24.3434 63.2996
    S 1.8 .2497 .5628 1.3899 2.1865 .7715 .2681 1.6711 7.0267 19.5377 50.3888
    Cl 1.75 .2443 .5397 1.3919 2.0197 .6621 .2468 1.5242 6.1537 16.6687 42.3086
    K 2.75 .4115 1.4031 2.2784 2.6742 2.2162 .3703 3.3874 13.1029 68.9592 194.4329
    Ca 1.95 .4054 1.388 2.1602 3.7532 2.2063 .3499 3.0991 11.9608 53.9353 142.3892
    V 1.06 .3876 1.275 1.9109 2.8314 1.8979 .2967 2.378 8.7981 35.9528 101.7201
    Cr 1.13 .4046 1.3696 1.8941 2.08 1.2196 .2986 2.3958 9.1406 37.4701 113.7121
    Mn 1.19 .3796 1.2094 1.7815 2.542 1.5937 .2699 2.0455 7.4726 31.0604 91.5622
    Fe 1.26 .3946 1.2725 1.7031 2.314 1.4795 .2717 2.0443 7.6007 29.9714 86.2265
    Co 1.13 .4118 1.3161 1.6493 2.193 1.283 .2742 2.0372 7.7205 29.968 84.9383
    Ni 1.63 .386 1.1765 1.5451 2.073 1.3814 .2478 1.766 6.3107 25.2204 74.3146
    Cu 1.4 .4314 1.3208 1.5236 1.4671 .8562 .2694 1.9223 7.3474 28.9892 90.6246
    Zn 1.39 .4288 1.2646 1.4472 1.8294 1.0934 .2593 1.7998 6.75 25.586 73.5284
    Se 1.9 .4477 1.1678 1.5843 2.8087 1.1956 .2405 1.5442 6.3231 19.461 52.0233
    Br 1.85 .4798 1.1948 1.8695 2.6953 .8203 .2504 1.5963 6.9653 19.8492 50.3233
    Sr 2.02 .6703 1.4926 3.3368 4.46 3.1501 .319 2.2287 10.3504 52.3291 151.2216
    Mo 1.75 .6773 1.4798 3.1788 3.0824 1.8384 .292 2.0606 8.1129 30.5336 100.0658
    Cd 1.58 .6364 1.4247 2.7802 2.5973 1.7886 .2407 1.6823 5.6588 20.7219 69.1109
    I 1.98 .7047 1.9484 2.594 4.1526 1.5057 .2455 1.8638 6.7639 21.8007 56.4395
    W 1.26 .9853 2.1167 3.357 3.7981 2.2798 .2569 1.6745 7.0098 26.9234 81.391
    Ir 1.22 1.0194 2.0645 3.4425 3.4914 1.6976 .2554 1.6475 6.5966 23.2269 70.0272
    Pt 1.72 .9148 1.8096 3.2134 3.2953 1.5754 .2263 1.3813 5.3243 17.5987 60.0171
    Au 1.66 .9674 1.8916 3.3993 3.0524 1.2607 .2358 1.4712 5.6758 18.7119 61.5286
    Hg 1.55 1.0033 1.9469 3.4396 3.1548 1.418 .2413 1.5298 5.8009 19.452 60.5753
"""


# Atomic number -> (radius, a, b).
ELEMENTS = {}
for line in TABLE.strip().splitlines():
    symbol, *words = line.split()
    radius, *terms = map(float, words)
    ELEMENTS[ATOMIC_NUMBER[symbol.upper()]] = (radius, terms[:5], terms[5:])


def _element(atomic_number: int) -> tuple[float, list[float], list[float]]:
    if atomic_number not in ELEMENTS:
        symbol = SYMBOLS.split()[atomic_number - 1]
        raise ValueError(
            f"no scattering factors for {symbol}; remove these atoms from the model, "
            "or add a line to TABLE in fsc_model.py"
        )
    return ELEMENTS[atomic_number]


def has_factors(atomic_number: Tensor) -> Tensor:
    """Which atoms have scattering factors in TABLE: boolean (N,)."""
    known = torch.tensor(list(ELEMENTS), device=atomic_number.device)
    return torch.isin(atomic_number, known)


# ---- The map of a model


def structure_factors(
    shape,
    xyz: Tensor,
    atomic_number: Tensor,
    b_iso: Tensor,
    voxel_size,
    origin=0.0,
    *,
    occupancy: Tensor | None = None,
    d_min: float = 0.0,
    wing_cutoff: float = 1e-3,
) -> Tensor:
    """(1) on the half transform of a periodic box: complex64 (D, H, W//2 + 1), 0 beyond 1 / d_min.

    xyz (N, 3) Å; atomic_number, b_iso (Å²), occupancy (N,). An atom ends where it falls below
    wing_cutoff of the mean peak. The Nyquist planes of even sides stay 0, because they cannot tell
    k from -k. Raises ValueError if the box has no frequency up to d_min, or for an element that is
    not in TABLE. Method: Ten Eyck 1977, Acta Cryst. A33:486.
    """
    # s^2 = 1 / d^2 of every frequency, and which ones are wanted.
    voxel_size = triple(voxel_size)
    frequencies = freq_grid(shape, half=True, device=xyz.device)
    s2 = sum((k / v) ** 2 for k, v in zip(frequencies, voxel_size))
    index = [(k * n).round().long() for k, n in zip(frequencies, shape)]
    wanted = s2 * d_min**2 <= 1 + 1e-9
    for i, n in zip(index, shape):
        wanted = wanted & (2 * i.abs() < n)
    finest = float(s2[wanted].max().rsqrt())  # Å
    if math.isinf(finest):  # only the zero frequency
        raise ValueError(
            f"the box holds no frequency up to {d_min} Å; give a resolution finer than its sides"
        )

    # One term a exp(-b s^2 / 4) of (2) is height * exp(-pi r^2 / width) in real space. An extra B
    # blurs all atoms, so that sampling them on a grid does not alias.
    sides = [n * v for n, v in zip(shape, voxel_size)]  # Å
    grid, extra_b = _sampling(finest, sides)
    extra_b -= float(b_iso.min())
    _, a, b = zip(*(_element(z) for z in atomic_number.tolist()))
    position = xyz.double()
    a, b = position.new_tensor(a), position.new_tensor(b)  # (N, 5)
    width = (b + b_iso.double()[:, None] + extra_b) / (4 * torch.pi)
    height = a * width**-1.5
    if occupancy is not None:
        height = height * occupancy.double()[:, None]

    # Sample and transform; then pick the frequencies of the box and undo the extra B.        (1)
    wing_cutoff *= 1 if finest < 5 else 0.1
    step = [side / n for side, n in zip(sides, grid)]
    sampled = _sample_atoms(grid, position, height, width, wing_cutoff, step, origin)
    transform = torch.fft.rfftn(sampled) * (math.prod(sides) / math.prod(grid))
    z, y, x = index
    picked = transform[z % grid[0], y % grid[1], x.clamp(max=grid[2] // 2)]
    return torch.where(wanted, picked * torch.exp(extra_b / 4 * s2).float(), 0)


def _sampling(finest: float, sides: list[float]) -> tuple[list[int], float]:
    """cctbx's grid for sides in Å, and the B-factor in Å² that keeps it from aliasing.

    finest: the finest resolution in Å. Source: International Tables B, 1.3.4.4.5.
    """
    # The wanted spacing in Å, and the wanted accuracy in decimal digits.
    if finest < 5:
        step, digits = finest / 3, 2
    else:
        step, digits = 2.0 if finest < 10 else 3.0, 3

    # The next larger number of samples with no prime factors but 2, 3 and 5.
    grid = []
    for side in sides:
        n = 2 * int(side / (2 * step)) + 1
        while 30**30 % n:
            n += 1
        grid.append(n)

    # The extra blur falls to that accuracy where the grid aliases.
    oversampling = finest / (2 * step)
    return grid, digits * finest**2 / (oversampling * (oversampling - 1))


def _sample_atoms(
    grid, xyz: Tensor, height: Tensor, width: Tensor, cutoff: float, step, origin
) -> Tensor:
    """Sum over atoms of sum_i height_i exp(-pi r^2 / width_i) on a periodic grid, float32.

    height, width: (N, 5). An atom ends where it falls below `cutoff` of the mean peak.
    """
    # Find that radius by bisection.
    inner = torch.zeros_like(width[:, 0])
    outer = 3 * width.amax(1).sqrt()
    lowest = cutoff * height.sum(1).mean()
    for _ in range(50):
        radius = (inner + outer) / 2
        above = (height * torch.exp(-torch.pi * radius[:, None] ** 2 / width)).sum(1) > lowest
        inner = torch.where(above, radius, inner)
        outer = torch.where(above, outer, radius)

    # Departure 1: cctbx ends an atom at the farthest grid line along an axis within the radius.
    spacing = xyz.new_tensor(step)
    before = (xyz.flip(-1) - xyz.new_tensor(triple(origin))).remainder(spacing)
    lines = torch.stack([before, spacing - before], 1)  # (N, 2, 3): to the next ones on both sides
    radius = inner[:, None, None]
    end = (radius - (radius - lines).remainder(spacing)).amax((1, 2))

    # Add the atoms, as many at a time as fit into memory.
    reach = float(inner.max())
    density = torch.zeros(math.prod(grid), device=xyz.device)
    chunk = max(1, int(2**21 / math.prod(2 * reach / v + 2 for v in step)))
    for i in torch.arange(len(xyz), device=xyz.device).split(chunk):
        # Pairs of an atom and a voxel within its end.
        index, r = voxels_near(grid, xyz[i], reach, step, origin)
        atom, near = (r <= end[i, None] + 1e-9).nonzero(as_tuple=True)
        r2 = r[atom, near].square().float()

        # The five Gaussians of each atom there.
        heights = height[i].float()
        rates = (-torch.pi / width[i]).float()
        value = sum(heights[atom, j] * torch.exp(rates[atom, j] * r2) for j in range(5))
        density.index_add_(0, index[atom, near], value)
    return density.view(grid)


def model_map(
    shape,
    xyz: Tensor,
    atomic_number: Tensor,
    b_iso: Tensor,
    resolution: float,
    voxel_size,
    origin=0.0,
    *,
    occupancy: Tensor | None = None,
) -> Tensor:
    """Electrostatic potential of a model, (1) up to 1 / resolution: float32 (D, H, W)."""
    atoms = (xyz, atomic_number, b_iso, voxel_size, origin)
    transform = structure_factors(shape, *atoms, occupancy=occupancy, d_min=resolution)
    return torch.fft.irfftn(transform, s=tuple(shape)) / math.prod(triple(voxel_size))


def voxels_near(shape, xyz: Tensor, reach: float, voxel_size, origin=0.0) -> tuple[Tensor, Tensor]:
    """All voxels within `reach` Å of each atom, and some more: flat index and distance, (N, K)."""
    position = xyz.double().flip(-1)
    voxel = position.new_tensor(triple(voxel_size))
    centre = (position - position.new_tensor(triple(origin))) / voxel

    # A block of voxels around the nearest one, its index, and how far each voxel is.
    half_sides = (reach / voxel + 0.5).long().tolist()
    axes = [torch.arange(-n, n + 1, device=xyz.device) for n in half_sides]
    index = centre.round().long()[:, None] + torch.cartesian_prod(*axes)  # (N, K, 3)
    distance = ((index - centre[:, None]) * voxel).norm(dim=-1)

    # The box is periodic.
    z, y, x = (index % torch.tensor(shape, device=xyz.device)).unbind(-1)
    return (z * shape[1] + y) * shape[2] + x, distance


def molecular_mask(
    shape,
    xyz: Tensor,
    atomic_number: Tensor,
    voxel_size,
    origin=0.0,
    *,
    probe: float = 1.1,
    shrink: float = 0.9,
) -> Tensor:
    """Voxels inside a model without its hydrogens: boolean (D, H, W).

    Solvent is where a sphere of `probe` Å finds room, grown by `shrink` Å (less than the probe).
    Jiang & Brünger 1994, J. Mol. Biol. 243:100.
    """
    # The centre of the probe keeps its own radius away from all atoms. The rest is inside.
    inside = torch.zeros(math.prod(shape), dtype=torch.bool, device=xyz.device)
    for number in atomic_number[atomic_number > 1].unique().tolist():
        reach = _element(number)[0] + probe
        for part in xyz[atomic_number == number].split(2048):
            index, distance = voxels_near(shape, part, reach, voxel_size, origin)
            inside[index[distance < reach]] = True

    # Grow the solvent by a ball.
    solvent = grown = ~inside.view(*shape)
    voxel = torch.tensor(triple(voxel_size))
    half_sides = (shrink / voxel).long().tolist()
    for offset in torch.cartesian_prod(*(torch.arange(-n, n + 1) for n in half_sides)):
        if (offset * voxel).norm() < shrink:
            grown = grown | solvent.roll(offset.tolist(), (0, 1, 2))
    return ~grown


# ---- Correlations


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two arrays of one size."""
    a = a.double() - a.double().mean()
    b = b.double() - b.double().mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def map_model_cc(
    density: Tensor,
    xyz: Tensor,
    atomic_number: Tensor,
    b_iso: Tensor,
    resolution: float,
    voxel_size,
    origin=0.0,
    *,
    occupancy: Tensor | None = None,
) -> dict[str, float]:
    """Correlation of a map with the map of a model: cc_box, cc_mask, cc_volume, cc_peaks.

    density (D, H, W); xyz (N, 3) Å, atomic_number, b_iso (Å²), occupancy (N,); resolution in Å.
    cc_box counts all voxels, cc_mask the n voxels inside the molecular mask, cc_volume the n
    highest of the model's map, cc_peaks the n highest of either map. Raises ValueError if the mask
    is empty or the whole box. Source: phenix.map_model_cc.
    """
    # The model's map, and the voxels that the model covers.
    shape = density.shape
    atoms = (xyz, atomic_number, b_iso, resolution, voxel_size, origin)
    calculated = model_map(shape, *atoms, occupancy=occupancy)
    inside = molecular_mask(shape, xyz, atomic_number, voxel_size, origin)
    count = int(inside.sum())
    if not 0 < count < inside.numel():
        raise ValueError(
            f"the model covers {count} of {inside.numel()} voxels; move it to the frame of the map"
        )

    # Compare in four regions.
    high_in_model = _highest(calculated, count)
    regions = {
        "cc_box": torch.ones_like(inside),
        "cc_mask": inside,
        "cc_volume": high_in_model,
        "cc_peaks": high_in_model | _highest(density, count),
    }
    return {
        name: correlation(density[region], calculated[region]) for name, region in regions.items()
    }


def _highest(x: Tensor, count: int) -> Tensor:
    """Where x is at least its element `count`, from 0, in falling order: boolean, as x."""
    return x >= x.flatten().kthvalue(x.numel() - count).values


# ---- Q-score


def _spiral(n: int) -> Tensor:
    """n points on the unit sphere along a spiral (Saff & Kuijlaars 1997): (n, 3)."""
    height = torch.linspace(-1, 1, n, dtype=torch.float64)
    flat = (1 - height**2).sqrt()
    theta = F.pad((3.6 / (n**0.5 * flat[1:-1])).cumsum(0), (1, 1))
    return torch.stack([flat * theta.cos(), flat * theta.sin(), height], -1)


def trilinear(density: Tensor, xyz: Tensor, voxel_size, origin=0.0) -> Tensor:
    """Values of density (D, H, W) at positions xyz (..., 3) in Å; 0 outside. float64 (...)."""
    density, xyz = density.double(), xyz.double()
    voxel, corner = (xyz.new_tensor(triple(x)[::-1]) for x in (voxel_size, origin))
    last = torch.tensor(density.shape[::-1], device=density.device) - 1
    grid = 2 * (xyz - corner) / voxel / last - 1  # from -1 to 1, as grid_sample wants
    values = F.grid_sample(density[None, None], grid.view(1, 1, 1, -1, 3), align_corners=True)
    return values.view(xyz.shape[:-1])


def q_score(
    density: Tensor,
    xyz: Tensor,
    voxel_size,
    origin=0.0,
    *,
    sigma: float = 0.6,
    chunk: int = 512,
) -> Tensor:
    """Q-score (3) of every atom: (N,), nan where the density around an atom is flat.

    density (D, H, W); xyz (N, 3) Å, without hydrogens; sigma in Å; chunk: atoms at a time.
    Source: MapQ. (MapQ scales the reference to the map's range, which no correlation notices.)
    """
    density, xyz = density.double(), xyz.double()
    scores = []
    for atoms in xyz.split(chunk):
        # All other atoms that can come within 0.9 R of a shell, relative to each atom.
        distance = torch.cdist(atoms, xyz)
        most = int((distance < 1.9 * 2).sum(1).max())
        nearest = distance.topk(most, largest=False).indices
        neighbours = xyz[nearest] - atoms[:, None]  # (A, most, 3)

        # Collect sums over points. The centre counts 8 times.
        value = trilinear(density, atoms, voxel_size, origin)
        sums = 8 * _sums(torch.ones_like(value), value, value**2, 1)
        for radius in torch.arange(1, 21).mul(0.1).tolist():
            reference = math.exp(-(radius**2) / (2 * sigma**2))
            # Atoms i find enough free points with these directions.
            for i, free, directions in _free_points(neighbours, radius):
                points = atoms[i, None] + radius * directions
                v = trilinear(density, points, voxel_size, origin)
                count, total, squares = free.sum(1), (free * v).sum(1), (free * v * v).sum(1)
                sums[i] += _sums(count, total, squares, reference)

        # The correlation of the values v with the reference g.                                (3)
        n, v, vv, g, gg, vg = sums.unbind(-1)
        scores.append((vg - v * g / n) / ((vv - v * v / n) * (gg - g * g / n)).sqrt())
    return torch.cat(scores)


def _sums(count: Tensor, total: Tensor, squares: Tensor, g: float) -> Tensor:
    """The sums of 1, v, v^2, g, g^2 and v g over points where g is the same: (A, 6)."""
    return torch.stack([count, total, squares, g * count, g * g * count, g * total], -1)


def _free_points(neighbours: Tensor, radius: float):
    """Yields (atoms, free, directions): points on the shell of `radius` that no neighbour blocks.

    On each shell, 8, 10, 12 .. 106 points on a spiral are tried until at least 8 of them have no
    atom closer than 0.9 radius. A shell that never has 8 is left out. atoms (I,) are indices into
    neighbours (A, K, 3); free (I, n) is 1 for points that count; directions (n, 3).
    """
    # |R u - d|^2 < (0.9 R)^2 is u . d > (0.19 R^2 + d^2) / (2 R).
    blocked_at = (0.19 * radius * radius + neighbours.square().sum(-1)) / (2 * radius)
    pending = torch.arange(len(neighbours), device=neighbours.device)
    for n in range(8, 108, 2):
        # Try n points for the atoms that have no 8 free points yet.
        directions = _spiral(n).to(neighbours.device)
        free = (neighbours[pending] @ directions.T <= blocked_at[pending, :, None]).all(1)
        done = free.sum(1) >= 8
        yield pending[done], free[done].double(), directions
        pending = pending[~done]
        if len(pending) == 0:
            return
