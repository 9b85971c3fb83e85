"""What the microscope does to a density map: blur, missing wedge, spectral noise, projection at any orientation.

    rho(r) = sum_a Z_a (2 pi s_a^2)^-3/2 exp(-|r - r_a|^2 / 2 s_a^2)                         (1)
             s_a^2 = (resolution / (pi sqrt 2))^2 + B_a / (8 pi^2)
    wedge: measured where  min <= atan2(sign(kx) kz, |kx|) <= max,  and on the tilt axis     (2)
    cone:  measured where  |kz| <= sqrt(kx^2 + ky^2) tan(angle)                              (3)
    A x = F^-1[w F x],  w real, w(-k) = w(k):  A = A^T, and A A = A where w is a mask        (4)
    y = V + noise,  E|F noise|^2 = P(|k|),  P = P_y / (1 + SNR),  SNR = FSC / (1 - FSC)      (5)
    P(k) = alpha(k) P(|k|) / mean of alpha over the shell                                    (6)
    image(x, y) = integral dz V(R (x, y, z)^T)                                               (7)
    (F image)(kx, ky) = (F V)(R (kx, ky, 0)^T),  R = Rz(rot) Ry(tilt) Rz(psi)                (8)
    deposited = lowpass(e^(B |k|^2 / 4) (rho + solvent + n)),  E|F n|^2 = alpha(k) S(1/R) (R |k|)^-u     (9)

(1): ChimeraX `molmap`, with B-factors. (2): Dynamo, IMOD, IsoNet2, RELION 5. (3): CryoLVM, the
formula as printed. (4): CryoFM (arXiv:2410.08631) appendix E.1, Algorithm 2's A. (5): CryoFM eq. 3
and appendix D.1. (6): CryoFM 5.2 and D.2. (7): CryoFM 5.4 and E.2. (8): the central
slice theorem (DeRosier & Klug 1968); RELION's Euler angles. (9): ours, what CryoLVM learns from where no
pairs of a deposited map and its model are given; S is the power of rho per shell, R the resolution.
F is the unnormalised FFT in `fftfreq` layout (zero frequency first), float32 or wider; powers are
|F|^2. Volumes are (D, H, W) = (z, y, x); triples of a grid (shape, voxel_size, origin) are in that
order too, positions of atoms and directions are x, y, z.

Departure 1: (3) is a missing cone (91 % measured at 60 degrees); the CryoLVM paper calls it a wedge.
Departure 2: an even box has no +Nyquist plane, so (2) with an asymmetric range is not mirror
symmetric there; operators use the part that is (`hermitian_part`), or A A = A would not hold.
Departure 3: eq. 3 adds real numbers to a complex transform, which leaves no real map; noise is added
to the real Hartley transform, as in the release, and E|F noise|^2 is P all the same.
Departure 4: 5.2 prints alpha times the noise, D.2 alpha times its power; we follow D.2 and the release.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fsc import freq_grid, fsc, radius, triple

XYZ = (-3, -2, -1)                                              # the spatial axes of (..., D, H, W)


# ---- Atomic models ---------------------------------------------------------------------------------

def molmap(xyz, atomic_number, resolution: float, *, voxel_size=None, shape=None, origin=None,
           b_factor=None, cutoff: float = 5.0) -> tuple[Tensor, tuple, tuple]:
    """Density of an atomic model at a resolution, each atom one Gaussian (1): ChimeraX `molmap`.

    xyz: (A, 3) positions (x, y, z) in Å; atomic_number: (A,) weights, usually Z; resolution in Å;
    b_factor: (A,) or one number in Å^2, default 0. Atom a is added where |dx|, |dy| and |dz| are
    all <= cutoff * s_a: a box; math.inf adds it everywhere.
    The grid: voxel_size in Å (one number or z, y, x; default resolution / 3), shape (D, H, W)
    (default: the model's extent and 3 * resolution on each side), origin = centre of voxel
    (0, 0, 0) in Å as z, y, x (default: the centres of grid and model coincide).

    Returns (density (D, H, W) float32 in Z per Å^3, voxel_size, origin), so that
    `Map(*molmap(...))` is a map. Differentiable in xyz, atomic_number and b_factor.
    Raises ValueError where the model is empty, its arrays differ in length or hold nan, a B-factor
    is negative, resolution or voxel_size is not positive, or an origin comes without a shape.
    """
    xyz = torch.as_tensor(xyz)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or len(xyz) == 0 or not xyz.isfinite().all():
        raise ValueError(f"molmap: xyz has shape {tuple(xyz.shape)}; give finite (atoms, 3), atoms > 0")
    A, device = len(xyz), xyz.device
    zyx = xyz.double().flip(1)
    weight = torch.as_tensor(atomic_number, dtype=torch.float32, device=device)
    B = torch.as_tensor(0.0 if b_factor is None else b_factor, dtype=torch.float32, device=device)
    if weight.shape != (A,) or B.shape not in ((), (A,)):
        raise ValueError(f"molmap: {A} atoms, but atomic_number has shape {tuple(weight.shape)} "
                         f"and b_factor {tuple(B.shape)}; give one value per atom")
    if not (weight.isfinite().all() and (B >= 0).all()):
        raise ValueError("molmap: atomic_number must be finite and b_factor at least 0 Å^2")
    step = triple(resolution / 3 if voxel_size is None else voxel_size)
    if not (resolution > 0 and min(step) > 0):
        raise ValueError(f"molmap: resolution {resolution} Å and voxel_size {step} Å must be positive")
    if origin is not None and shape is None:
        raise ValueError("molmap: an origin without a shape; give both or neither")

    low, high = zyx.detach().amin(0).tolist(), zyx.detach().amax(0).tolist()
    if shape is None:
        shape = [math.ceil((b - a + 6 * resolution) / h) for a, b, h in zip(low, high, step)]
    if origin is None:
        origin = [(a + b) / 2 - (n - 1) / 2 * h for a, b, n, h in zip(low, high, shape, step)]
    origin = triple(origin)

    sigma = ((resolution / (math.pi * math.sqrt(2))) ** 2 + B / (8 * math.pi ** 2)).sqrt().expand(A)
    index = (zyx - zyx.new_tensor(origin)) / zyx.new_tensor(step)       # (A, 3) float64, in voxels
    reach = cutoff * sigma[:, None] / zyx.new_tensor(step)
    near = ((index >= -reach) & (index <= zyx.new_tensor(shape) - 1 + reach)).all(1)
    index, reach, sigma, weight = index[near], reach[near], sigma[near], weight[near]

    def gaussian(axis: int) -> Tensor:                          # (A, n): one of the three factors of (1)
        n, h = shape[axis], step[axis]
        K = min(n, 2 * reach[:, axis].max().item() + 2) if len(reach) else 1
        window = torch.arange(int(K), device=device)            # only these voxels can be within reach
        first = (index[:, axis] - reach[:, axis]).ceil().clamp(0, n - len(window)).detach()
        d = ((first - index[:, axis]) * h).float()[:, None] + window * h    # Å, float64 until here
        q = (d / sigma[:, None]) ** 2
        value = torch.where(q <= cutoff ** 2, (-q / 2).exp(), 0)
        return value.new_zeros(len(d), n).scatter(1, first.long()[:, None] + window, value)

    # Each atom is a product of three 1-D factors, so the sum over atoms is a matrix product. Columns of
    # 8 x 8 voxels along x, each with the atoms that reach it, keep the product small.
    gz, gy, gx = gaussian(0), gaussian(1), gaussian(2)
    gx = gx * (weight * (2 * math.pi * sigma ** 2) ** -1.5)[:, None]
    density = gx.new_zeros(tuple(shape))
    for z in range(0, shape[0], 8):
        in_z = gz[:, z:z + 8].any(1).nonzero()[:, 0]
        gz_z, gy_z, gx_z = gz[in_z, z:z + 8], gy[in_z], gx[in_z]
        for y in range(0, shape[1], 8):
            in_y = gy_z[:, y:y + 8].any(1).nonzero()[:, 0]
            plane = gz_z[in_y, :, None] * gy_z[in_y, None, y:y + 8]     # (A', 8, 8)
            density[z:z + 8, y:y + 8] = torch.einsum("azy,ax->zyx", plane, gx_z[in_y])
    return density, step, origin


# ---- Operators that are diagonal in Fourier space ----------------------------------------------------

def wedge_mask(shape, tilt_range=(-60, 60), tilt_axis: str = "y", *,
               voxel_size=1.0, device=None) -> Tensor:
    """Where a tilt series measures (2): boolean (D, H, W) in `fftfreq` layout, True = measured.

    tilt_range: smallest and largest tilt in degrees. A specimen turned right-handedly by a about the
    tilt axis and projected along the beam measures one plane: axis "y", beam z: kz = kx tan a;
    axis "x", beam z: kz = -ky tan a; axis "z", beam x: kx = ky tan a (the CryoFM release's choice).
    voxel_size, one number or (z, y, x), matters only where voxels are no cubes: angles are physical ones.
    Raises ValueError for another axis, or unless -90 < min < max < 90.
    """
    low, high = tilt_range
    if not -90 < low < high < 90:
        raise ValueError(f"tilt range {low} {high}: give smallest and largest tilt, inside (-90, 90) degrees")
    kz, ky, kx = (k / v for k, v in zip(freq_grid(shape, device=device), triple(voxel_size)))
    if tilt_axis not in ("x", "y", "z"):
        raise ValueError(f"tilt axis {tilt_axis!r}: give x, y or z")
    along_beam, across = {"y": (kz, kx), "x": (kz, -ky), "z": (kx, ky)}[tilt_axis]
    angle = torch.rad2deg(torch.atan2(torch.where(across < 0, -along_beam, along_beam), across.abs()))
    # 1e-9 degrees: a coefficient exactly at the last tilt counts, however atan2 rounds.
    measured = (angle >= low - 1e-9) & (angle <= high + 1e-9) | ((along_beam == 0) & (across == 0))
    return measured.expand(tuple(shape)).clone()


def cone_mask(shape, angle: float = 60, *, device=None) -> Tensor:
    """CryoLVM's region (3), a missing cone about kz: boolean (D, H, W) in `fftfreq` layout, True = measured.

    angle in degrees. Raises ValueError unless 0 < angle < 90.
    """
    if not 0 < angle < 90:
        raise ValueError(f"cone angle {angle}: give one inside (0, 90) degrees")
    kz, ky, kx = freq_grid(shape, device=device)
    return kz.abs() <= (kx ** 2 + ky ** 2).sqrt() * math.tan(math.radians(angle))     # Departure 1


def hermitian_part(mask: Tensor) -> Tensor:
    """The coefficients of a boolean mask (..., D, H, W) whose mirror image -k is in it too (Departure 2)."""
    return mask & mirror(mask)


def mirror(weights: Tensor) -> Tensor:
    """w(k) -> w(-k) on a grid in `fftfreq` layout, (..., D, H, W)."""
    return weights.flip(XYZ).roll((1, 1, 1), XYZ)


def apply_fourier(x: Tensor, weights: Tensor) -> Tensor:
    """F^-1[weights F x], (4). x: (..., D, H, W) real; weights: (D, H, W) or as x, in `fftfreq` layout.

    weights are a boolean mask, of which the Hermitian part is used, or real with w(-k) = w(k).
    Runs in float32 (float64 for float64 x), whatever autocast says. Raises ValueError if the boxes differ.
    """
    shape = x.shape[-3:]
    if weights.shape[-3:] != shape:
        raise ValueError(f"weights for a box {tuple(weights.shape[-3:])}, but the map is {tuple(shape)}")
    if weights.dtype == torch.bool:
        weights = hermitian_part(weights)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    half = weights[..., :shape[-1] // 2 + 1].to(x.dtype)
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=XYZ) * half, s=shape, dim=XYZ)


class FourierOperator:
    """The A of (4) with its adjoint: A(x), A.adjoint(y). `FourierOperator(wedge_mask(shape))` is the wedge.

    weights as in `apply_fourier`. Real even weights make A its own adjoint; a mask makes it a
    projection, A A = A, and so its own pseudo-inverse as well.
    """

    def __init__(self, weights: Tensor):
        self.weights = hermitian_part(weights) if weights.dtype == torch.bool else weights

    def __call__(self, x: Tensor) -> Tensor:
        return apply_fourier(x, self.weights)

    adjoint = __call__


def lowpass(density: Tensor, resolution: float, voxel_size, *, edge: float = 2.0) -> Tensor:
    """Low-pass filter: 1 below 1/resolution, 0 above, a raised cosine `edge` shells wide between.

    density: (..., D, H, W); resolution in Å; voxel_size in Å, one number or (z, y, x). A shell is
    1 / (longest side of the box in Å) wide; edge = 0 cuts sharply and keeps 1/resolution itself.
    RELION's filter (`lowPassFilterMap`, edge 2), but the cutoff is not rounded to a whole shell.
    Raises ValueError unless resolution and voxel_size are positive and edge is not negative.
    """
    voxel = triple(voxel_size)
    if not (resolution > 0 and min(voxel) > 0 and edge >= 0):
        raise ValueError(f"lowpass: resolution {resolution} Å and voxel size {voxel} Å must be positive, "
                         f"edge {edge} at least 0")
    shape = density.shape[-3:]
    kz, ky, kx = (k / v for k, v in zip(freq_grid(shape, device=density.device), voxel))
    s = (kz ** 2 + ky ** 2 + kx ** 2).sqrt()                            # 1/Å
    shell = 1 / max(n * v for n, v in zip(shape, voxel))
    beyond = (s - 1 / resolution) / shell                               # in shells
    ramp = (beyond / edge + 0.5).clamp(0, 1) if edge else (beyond > 1e-9).double()
    return apply_fourier(density, 0.5 + 0.5 * torch.cos(math.pi * ramp))


# ---- Spectral noise ----------------------------------------------------------------------------------
# Shell i = 0 .. W//2 - 1 of a power holds floor(W |k|) = i, as in the CryoFM release; the FSC beside it
# (convention "cryofm") has ceil shells 1 .. W//2, so power shell i is paired with FSC shell i + 1.

def noise_shells(shape, device=None) -> Tensor:
    """The power shell of every coefficient: (D, H, W) int64; corners beyond Nyquist hold W//2 and more."""
    kz, ky, kx = freq_grid(shape, device=device)
    return (shape[-1] * (kz ** 2 + ky ** 2 + kx ** 2).sqrt() + 1e-9).long()     # 1e-9: whole radii


def shell_mean(values: Tensor) -> Tensor:
    """Mean over each power shell, (..., D, H, W) in `fftfreq` layout -> (..., W//2), float64."""
    shell, n = noise_shells(values.shape[-3:], values.device), values.shape[-1] // 2
    inside = shell < n
    total = values.new_zeros(*values.shape[:-3], n, dtype=torch.float64)
    return total.index_add(-1, shell[inside], values[..., inside].double()) / shell[inside].bincount(minlength=n)


def radial_power(x: Tensor) -> Tensor:
    """Mean |F x|^2 of each shell: (..., D, H, W) -> (..., W//2), float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return shell_mean(torch.fft.fftn(x, dim=XYZ).abs() ** 2)


def on_grid(power: Tensor, shape) -> Tensor:
    """Power per shell (..., n) on the grid (..., D, H, W); beyond Nyquist the last value is kept."""
    return power[..., noise_shells(shape, power.device).clamp(max=power.shape[-1] - 1)]


def noise_power(half_1: Tensor, half_2: Tensor) -> Tensor:
    """Noise power of half_1 per shell from two half maps (5): (..., D, H, W) each -> (..., W//2), float64.

    Raises ValueError if the halves differ in shape or are the same map.
    """
    if half_1.shape == half_2.shape and torch.equal(half_1, half_2):
        raise ValueError("noise_power: both half maps are the same map; give two independent ones")
    return noise_power_from_fsc(half_1, fsc(half_1, half_2, convention="cryofm")[..., 1:])


def noise_power_from_fsc(x: Tensor, curve: Tensor, *, clean: bool = False) -> Tensor:
    """Noise power per shell (5) from an FSC between half maps, shells 1 .. W//2: (..., W//2), float64.

    x: (..., D, H, W), the noisy map, P = P_x / (1 + SNR); or, with `clean`, the map before the noise
    that is to be added, P = P_x / SNR. A shell with FSC <= 0 counts as 1e-9, as in the release.
    Raises ValueError if the curve has another number of shells.
    """
    if curve.shape[-1] != x.shape[-1] // 2:
        raise ValueError(f"the FSC has {curve.shape[-1]} shells; a box of {x.shape[-1]} needs shells "
                         f"1 .. {x.shape[-1] // 2}")
    curve = curve.double().clamp(1e-9, 1)
    return radial_power(x) * (1 - curve) / (curve if clean else 1)      # 1 / (1 + SNR) = 1 - FSC


def anisotropic_noise_power(power: Tensor, alpha: Tensor) -> Tensor:
    """Direction-dependent noise power (6) that keeps every shell's mean: (..., D, H, W), float64.

    power: (..., W//2) per shell; alpha: (D, H, W) relative noise power (Departure 4) in `fftfreq`
    layout, even. CryoFM 5.2: `1 + 49 * ~hermitian_part(wedge_mask(shape))`; from particle
    orientations: `orientation_alpha`.
    """
    return alpha * on_grid(power / shell_mean(alpha), alpha.shape)


def orientation_alpha(rotations: Tensor, shape, *, half_width: float = 5.0, limit: float = 50.0) -> Tensor:
    """Relative noise power by direction from particle orientations (CryoFM D.2): (D, H, W) float64.

    rotations: (P, 3, 3) as in (7); a particle seen along d measures the central slice k . d = 0, here
    every k within half_width degrees of it. alpha = 1 / (share of the particles that measure k,
    relative to the mean over directions), at most `limit`, where next to none do.
    Raises ValueError unless rotations are (P, 3, 3), P > 0.
    """
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3) or len(rotations) == 0:
        raise ValueError(f"orientation_alpha: rotations {tuple(rotations.shape)}; give (P, 3, 3), P > 0")
    d = rotations[:, :, 2].double()                             # the beam in the volume's frame
    centre = [(torch.arange(n, dtype=d.dtype, device=d.device) + 0.5) * math.pi / 90 for n in (45, 180)]
    theta, phi = torch.meshgrid(centre, indexing="ij")          # 2-degree cells; -k is measured with k
    k = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)
    band = math.sin(math.radians(half_width))
    seen = sum(((k @ part.T).abs() <= band).double().sum(-1) for part in d.split(512))
    mean = (seen * theta.sin()).sum() / theta.sin().sum()
    kz, ky, kx = freq_grid(shape, device=d.device)
    flip = torch.where(kz < 0, -1.0, 1.0)
    theta = torch.atan2((kx ** 2 + ky ** 2).sqrt(), kz.abs())
    phi = torch.atan2(flip * ky, flip * kx) % (2 * math.pi)
    cell = [(angle * 90 / math.pi).long().clamp(max=n - 1) for angle, n in ((theta, 45), (phi, 180))]
    alpha = mean / seen[cell[0], cell[1]].clamp(min=mean / limit)
    return (alpha + mirror(alpha)) / 2                          # cells straddle kz = 0; noise is even


def hartley(x: Tensor) -> Tensor:
    """Hartley transform Re F - Im F, (..., D, H, W) -> the same: real, and its own inverse times D H W."""
    X = torch.fft.fftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=XYZ)
    return X.real - X.imag


def add_spectral_noise(x: Tensor, power: Tensor, *, noise: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
    """x plus Gaussian noise of a given power spectrum (5): (..., D, H, W) -> the same.

    power: E|F noise|^2 per shell (..., W//2) or per coefficient (..., D, H, W), even. noise: standard
    normal, one per Hartley coefficient (Departure 3), x's shape; drawn with `generator` if not given.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device) if noise is None else noise
    power = power if power.shape[-3:] == x.shape[-3:] else on_grid(power, x.shape[-3:])
    return x + hartley(power.sqrt().to(noise.dtype) * noise) / math.prod(x.shape[-3:])


# ---- Deposited maps, simulated -------------------------------------------------------------------------

def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def deposited(xyz: Tensor, atomic_number, resolution: float, *, voxel_size: float, shape, origin, b_factor: Tensor,
              generator: torch.Generator) -> Tensor:
    """A map as it might be deposited (9): (D, H, W) float32 in Z/Å^3, zero mean where there is nothing.

    rho is the model at 1.8 Å with B-factors that vary smoothly from place to place, 4 to 12 R^2: amplitudes at 1/R fall to
    e^-1 .. e^-3, local resolution varies. solvent: smooth density outside the molecule, 2 to 8 % of the maximum. n: at 1/R
    as strong as the signal, so that FSC is 0.5 there; u in 0..1; in every second map stronger in directions that too few
    particles were seen from. Every second map is sharpened, as depositors do, signal and noise alike: B from 0 to the mean
    8 R^2 by which the signal fell. Every second map is cut out softly 4 to 8 Å around the model, as segments are.

    xyz (A, 3), atomic_number (A,), b_factor (A,) in Å^2 and the grid as in `molmap`; resolution R in Å.
    """
    draw = lambda low, high: uniform(low, high, generator)
    # B = R^2 (4 + 8 Phi(f)), f of five plane waves 30 to 80 Å long: about normal, so B is about uniform.
    direction = torch.randn(5, 3, generator=generator)
    wave = direction / direction.norm(dim=1, keepdim=True) / torch.empty(5).uniform_(30, 80, generator=generator)[:, None]
    f = (2 * math.pi * (xyz.float() @ wave.T + torch.rand(5, generator=generator))).cos().sum(1) * (2 / 5) ** 0.5
    b = b_factor + resolution ** 2 * (4 + 8 * torch.special.ndtr(f))
    grid = dict(voxel_size=voxel_size, shape=shape, origin=origin)
    rho = molmap(xyz, atomic_number, 1.8, b_factor=b, cutoff=4, **grid)[0]

    near = lowpass((rho > 0.05 * rho.max()).float(), draw(8, 16), voxel_size).clamp(0, 1)  # 1 inside, 0 some Å away
    solvent = lowpass(torch.randn(rho.shape, generator=generator), draw(8, 16), voxel_size)
    x = rho + (1 - near) * solvent * (draw(0.02, 0.08) * rho.max() / solvent.std() / 3)

    n, shell = shape[-1] // 2, shape[-1] * voxel_size / resolution              # the shell of 1/R
    power = radial_power(rho)[min(int(shell), n - 1)] * (torch.arange(n).clamp(min=1) / shell) ** -draw(0, 1)
    if draw(0, 1) < 0.5:                                                         # views crowd about one direction
        views = torch.randn(64, 3, generator=generator) * draw(0.1, 0.6) + direction[0] / direction[0].norm()
        z = views / views.norm(dim=1, keepdim=True)
        rotations = torch.zeros(64, 3, 3)
        rotations[:, :, 2] = z                                                  # only the beam matters
        power = anisotropic_noise_power(power, orientation_alpha(rotations, shape, limit=draw(2, 10)))
    x = add_spectral_noise(x, power, generator=generator)
    if draw(0, 1) < 0.5:
        k2 = (radius(shape, voxel_size) / (min(shape) * voxel_size)) ** 2
        x = apply_fourier(x, torch.exp(draw(0, 8) * resolution ** 2 / 4 * k2.clamp(max=1 / resolution ** 2)))
    x = lowpass(x, resolution, voxel_size)
    if draw(0, 1) < 0.5:
        x = x * (near * 4).clamp(max=1)
    return x


# ---- Projection --------------------------------------------------------------------------------------

def project(volume: Tensor, rotations: Tensor, shifts: Tensor | None = None) -> Tensor:
    """Projections of a volume along its rotated z axis (7), in real space and differentiable in everything.

    volume: (..., N, N, N), the object inside the ball of radius N/2 about voxel N//2; rotations:
    (P, 3, 3), image-frame column vectors (x, y, z) to volume-frame ones; shifts: (P, 2) voxels
    (x, y) by which the object is displaced in the image. Returns (..., P, N, N), sums over voxels.
    Trilinear on a grid twice as fine (exact Fourier interpolation): 0.9 % of the maximum off where the
    given grid would be 3.5 % off (Gaussians of 1.7 voxels). Takes about 40 P N^3 bytes.
    Raises ValueError if the volume is not a cube or the rotations are not (P, 3, 3).
    """
    N = volume.shape[-1]
    if volume.shape[-3:] != (N, N, N) or rotations.ndim != 3 or rotations.shape[1:] != (3, 3):
        raise ValueError(f"project: volume {tuple(volume.shape)} and rotations {tuple(rotations.shape)}; "
                         "give (..., N, N, N) and (P, 3, 3)")
    P, dtype = len(rotations), torch.promote_types(volume.dtype, torch.float32)
    spectrum = torch.fft.fftshift(torch.fft.fftn(volume.to(dtype), dim=XYZ), dim=XYZ)
    M, before = 2 * N, N - N // 2                               # zero frequency: N//2 -> M//2
    spectrum = F.pad(spectrum, (before, N - before) * 3)
    fine = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=XYZ), dim=XYZ).real * 8

    r = torch.arange(N, device=volume.device, dtype=dtype) - N // 2
    z, y, x = torch.meshgrid(r, r, r, indexing="ij")
    if shifts is not None:
        x, y = (w - s[:, None, None, None].to(dtype) for w, s in zip((x, y), shifts.T))
    R = rotations.to(dtype)[..., None, None, None]              # products by hand: autocast leaves them alone
    point = torch.stack([R[:, i, 0] * x + R[:, i, 1] * y + R[:, i, 2] * z for i in range(3)], -1)
    point = 2 * (2 * (point + N // 2)) / (M - 1) - 1            # fine voxel 0 .. M-1 -> -1 .. 1
    # The P volumes of sample points lie one behind the other along z, so that no copy of the map is made.
    maps = fine.reshape(1, -1, M, M, M)
    samples = F.grid_sample(maps, point.reshape(1, P * N, N, N, 3), align_corners=True)
    return samples.reshape(*volume.shape[:-3], P, N, N, N).sum(-3)


# ---- Orientations and central slices -----------------------------------------------------------------
# The transform of a projection is a central slice of the transform of the volume, (8), so that images can be
# compared with very many projections at low resolution: K coefficients each instead of N^3 voxels.

def euler_matrix(angles: Tensor) -> Tensor:
    """R = Rz(rot) Ry(tilt) Rz(psi) of intrinsic ZYZ Euler angles in degrees, (..., 3) -> (..., 3, 3)."""
    (a, b, c), (p, q, r) = (f(torch.deg2rad(angles)).unbind(-1) for f in (torch.cos, torch.sin))
    rows = [a * b * c - p * r, -a * b * r - p * c, a * q,
            p * b * c + a * r, -p * b * r + a * c, p * q,
            -q * c, q * r, b]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def rotation_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees of the rotation that takes a to b; (..., 3, 3) each, broadcast."""
    d = (a - b).double().flatten(-2).norm(dim=-1)               # |a - b| = 2 sqrt 2 sin(angle / 2)
    return torch.rad2deg(2 * torch.asin((d / math.sqrt(8)).clamp(max=1)))


def healpix(nside: int) -> tuple[Tensor, Tensor]:
    """Directions of equal area, ring by ring (Gorski et al. 2005, eq. 4-9): theta, phi in radians, (12 nside^2,)."""
    theta, phi = [], []
    for i in range(1, 4 * nside):
        cap = min(i, 4 * nside - i)                             # rings around a pole hold 4, 8, 12, ...
        n = 4 * min(cap, nside)
        z = 1 - cap ** 2 / (3 * nside ** 2) if cap < nside else abs(4 / 3 - 2 * i / (3 * nside))
        half = 0.5 if cap < nside or (i - nside) % 2 == 0 else 0.0
        theta += [math.acos(z) if i <= 2 * nside else math.pi - math.acos(z)] * n
        phi += [2 * math.pi / n * (j + half) for j in range(n)]
    return torch.tensor(theta, dtype=torch.float64), torch.tensor(phi, dtype=torch.float64)


def so3_grid(order: int) -> Tensor:
    """Rotations spread evenly: HEALPix directions times in-plane angles (Yershova et al. 2010), (72 * 8^order, 3, 3).

    Neighbours are 60, 30, 15, 7.5 degrees apart for order 0, 1, 2, 3; RELION's grid of that order.
    """
    nside = 2 ** order
    theta, phi = (torch.rad2deg(angle) for angle in healpix(nside))
    psi = torch.arange(6 * nside, dtype=torch.float64) * (60 / nside)
    i, j = torch.meshgrid(torch.arange(len(theta)), torch.arange(len(psi)), indexing="ij")
    return euler_matrix(torch.stack([phi[i], theta[i], psi[j]], -1).reshape(-1, 3))


def frequencies(radius: float, dims: int = 2, device=None) -> Tensor:
    """Half of the whole frequencies 0 < |k| <= radius, one of k and -k: (K, 3) float32 x, y, z; z = 0 if dims is 2."""
    r = torch.arange(-int(radius), int(radius) + 1)
    k = torch.cartesian_prod(r if dims == 3 else r[r == 0], r, r)               # z, y, x
    first = (k * torch.tensor([10 ** 8, 10 ** 4, 1])).sum(1) > 0                # the later half in reading order
    return k[first & (k.square().sum(1) <= radius ** 2)].flip(1).float().to(device)


def coefficients(x: Tensor, k: Tensor) -> Tensor:
    """Fourier coefficients at k (K, 3) of images (P, N, N) or volumes (P, N, N, N) about voxel N//2: (P, K) complex.

    Scaled so that Re sum(conj(a) b) is the dot product of two maps without mean, low-passed to these frequencies.
    """
    N, dims = x.shape[-1], x.ndim - 1
    X = torch.fft.fftn(x, dim=tuple(range(-dims, 0)), norm="ortho")
    index = k[:, :dims].long().flip(1).unbind(1)                                # y, x or z, y, x
    return X[(slice(None), *(i % N for i in index))] * phase(k, k.new_full((1, 3), -(N // 2)), N) * math.sqrt(2)


def phase(k: Tensor, shifts: Tensor, N: int) -> Tensor:
    """What a displacement by `shifts` (..., 3) x, y, z in voxels multiplies coefficients at k (K, 3) by: (..., K)."""
    angle = shifts @ k.T * (-2 * math.pi / N)
    return torch.complex(angle.cos(), angle.sin())


def slices(volume: Tensor, rotations: Tensor, k: Tensor) -> Tensor:
    """coefficients(project(volume, rotations), k), by the central slice theorem: (P, K) complex.

    volume: (N, N, N); rotations: (..., P, 3, 3); k: `frequencies`. With those of dims = 3: the
    coefficients of the turned volume V(R r). Linear in volume and differentiable in volume and rotations.
    Trilinear on a grid of frequencies twice as fine, voxels weighted against what this does to them; what is
    left at d voxels from the middle is of the order of (d / (2N - d))^2: 2 % at N/4, 11 % at the box's edge.
    """
    N, dims = volume.shape[-1], 2 + int(k[:, 2].any())
    last = 2 * (int(k.norm(dim=1).max()) + 1) + 1
    r = torch.arange(N, device=volume.device) - N // 2
    fine = torch.arange(-last, last + 1, device=volume.device)
    angle = fine[:, None] * r * (-math.pi / N)                                  # frequency fine / 2N
    E = torch.complex(angle.cos(), angle.sin()) / torch.sinc(r / (2 * N)) ** 2
    X = volume.to(E.dtype)
    for _ in range(3):
        X = (X @ E.T).permute(2, 0, 1)                                          # one axis at a time
    grid = torch.view_as_real(X).permute(3, 0, 1, 2)[None]
    point = (k @ rotations.to(k).mT) * (2 / last)                               # x, y, z; -1 .. 1
    found = F.grid_sample(grid, point.reshape(1, 1, -1, len(k), 3), align_corners=True)[0, :, 0]
    return torch.complex(*found).reshape(*rotations.shape[:-2], len(k)) * math.sqrt(2 / N ** dims)
