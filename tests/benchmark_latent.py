"""Latent against voxel space: CryoFM's Table 10 and Fig. 11 (appendix F.4), at the size of a CPU.

    python data_prepare.py structures structures/train.tsv        # and structures/val.tsv
    python train.py --model tiny-vae-4 --data structures/train.npz --out runs/vae-4
    python train.py --model tiny-lfm-4 --data structures/train.npz --init runs/vae-4/vae.pt \\
        --out runs/lfm-4
    python train.py --model tiny-vae-8 ...                        # and tiny-lfm-8
    python train.py --model tiny --crop 16 --steps 500 --batch 8 --warmup 20 \\
        --ema-decay 0.99 --data structures/train.npz --out runs/voxel
    python tests/benchmark_latent.py structures/val.npz \\
        --ckpt runs/vae-4/vae.pt runs/vae-8/vae.pt runs/voxel/prior.pt runs/lfm-4/lfm.pt ...

Of a VAE: AE-FSC (mean of the FSC over the shells 1 .. box//2) and AE-L1 (per voxel, densities on
0..1) of crops of structures that no network has seen, decoded from the mean code. Then the FSC in
four bands of shells: what a code can hold of each.

Of a flow: the power of its unconditional samples over that of the data, in the same bands. 1 is
right, above 1 there is noise, below 1 detail is missing. The kurtosis of the band-passed samples
tells noise from signal of the same power: it is between that of white noise and that of the data.

Bands are of crops times a Hann window, because a crop's faces would add power to every band.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_wedge import write_rows

import atoms
import augment
import checkpoint
import data
import flow
import fourier
import fsc

BANDS = 4
BATCH = 16


def data_crops(path: Path, prior: checkpoint.Prior, count: int) -> Tensor:
    """Crops of simulated maps (count, D, D, D), densities on 0..1, made as in training."""
    crops = 8
    source = data.SimulatedCrops(
        atoms.read_structures(path),
        crop=prior.box,
        crops=crops,
        box=2 * prior.box,
        mean=0.0,
        std=1.0,
        voxel_size=prior.voxel_size,
        seed=augment.HELD_OUT,
    )
    items = [source[i] for i in range(math.ceil(count / crops))]
    return torch.cat(items)[:count, 0]


@torch.no_grad()
def reconstructed(prior: checkpoint.Prior, x: Tensor) -> Tensor:
    """VAE(V) of crops (n, D, D, D) on 0..1."""
    scaled = (x[:, None] - prior.mean) / prior.std
    parts = [prior.net.decode(prior.net.encode(part)[0]) for part in scaled.split(BATCH)]
    return torch.cat(parts)[:, 0] * prior.std + prior.mean


@torch.no_grad()
def samples(prior: checkpoint.Prior, count: int, steps: int) -> Tensor:
    """Unconditional samples (count, D, D, D) on 0..1. All flows start from the same seed."""
    latent = prior.kind == "lfm"
    cells = prior.box // prior.net.config.factor if latent else prior.box
    channels = prior.net.config.channels if latent else 1
    generator = torch.Generator().manual_seed(0)
    x_1 = torch.randn(count, channels, *[cells] * 3, generator=generator)
    parts = []
    for part in x_1.split(BATCH):
        x = flow.sample(prior.net, part, steps)
        parts.append(prior.net.decode(x) if latent else x)
    return torch.cat(parts)[:, 0] * prior.std + prior.mean


def windowed(x: Tensor) -> Tensor:
    """Crops times a Hann window."""
    w = torch.hann_window(x.shape[-1], periodic=False)
    return x * w[:, None, None] * w[:, None] * w


def band_of(box: int) -> Tensor:
    """The band 0 .. BANDS-1 of each coefficient (D, D, D), BANDS if it is in none."""
    shell = fsc.shells((box,) * 3)
    width = box // 2 // BANDS
    band = (shell - 1) // width
    return torch.where((shell >= 1) & (band < BANDS), band, BANDS)


def band_powers(x: Tensor) -> Tensor:
    """Power of crops in each band, summed over crops: (BANDS,) float64."""
    power = fourier.fft3(windowed(x)).abs().square().sum(0)
    return fsc.shell_sum(power, band_of(x.shape[-1]), BANDS)


def band_kurtosis(x: Tensor) -> list[float]:
    """Kurtosis of the windowed crops in each band, the mean over crops."""
    band = band_of(x.shape[-1])
    found = []
    for b in range(BANDS):
        filtered = fourier.apply_fourier(windowed(x), (band == b).float()).flatten(1)
        centred = filtered - filtered.mean(1, keepdim=True)
        ratio = centred.pow(4).mean(1) / centred.square().mean(1).square()
        found.append(float(ratio.nanmean()))
    return found


def window_kurtosis(box: int, count: int = 64) -> list[float]:
    """What white noise under the same window has: more than 3, because a window is uneven."""
    noise = torch.randn(count, box, box, box, generator=torch.Generator().manual_seed(1))
    return band_kurtosis(noise)


def band_fsc(a: Tensor, b: Tensor) -> Tensor:
    """FSC of the windowed crops in each band, over all crops: (BANDS,)."""
    A, B = (fourier.fft3(windowed(x)) for x in (a, b))
    band = band_of(a.shape[-1])
    cross = fsc.shell_sum((A * B.conj()).real.sum(0), band, BANDS)
    return cross / (band_powers(a) * band_powers(b)).sqrt()


def say_row(name: str, values) -> None:
    print(f"{name:40}", *(f"{float(value):8.4f}" for value in values), flush=True)


def draw(path: str, columns: dict[str, Tensor]) -> None:
    """The middle slices of the first six maps of each column, as a picture."""
    try:
        from matplotlib.image import imsave
    except ImportError:
        print(f"{path}: not drawn; pip install matplotlib")
        return
    stripes = []
    for x in columns.values():
        middle = x[:6, x.shape[1] // 2]
        stripes.append(torch.cat(list(torch.nn.functional.pad(middle, (1, 1, 1, 1), value=1.0)), 1))
    enlarged = torch.cat(stripes).repeat_interleave(6, 0).repeat_interleave(6, 1)
    imsave(path, enlarged.clamp(0, 1).numpy(), vmin=0, vmax=1, cmap="gray")
    print(f"{path}: rows {', '.join(columns)}")


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("data", type=Path, help="archive of structures")
    add("--ckpt", nargs="+", required=True, help="VAEs and flows, all of one box and voxel size")
    add("--count", type=int, default=256, help="crops, and samples of each flow")
    add("--steps", type=int, default=50, help="of each sample")
    add("--csv", default="runs/latent.csv")
    args = cli.parse_args()
    priors = {path: checkpoint.load(path) for path in args.ckpt}
    first = next(iter(priors.values()))
    if {(p.box, p.voxel_size) for p in priors.values()} != {(first.box, first.voxel_size)}:
        sys.exit("--ckpt: networks of several boxes or voxel sizes cannot be compared")

    truth = data_crops(args.data, first, args.count)
    side = first.box * first.voxel_size
    width = first.box // 2 // BANDS
    edges = [side / (width * (b + 1)) for b in range(BANDS)]
    print(f"{args.count} crops of {first.box}^3 voxels of {first.voxel_size:g} Å")
    print("bands end at", ", ".join(f"{edge:.1f} Å" for edge in edges))

    # Table 10.
    rows = []
    columns = {"data": truth}
    for path, prior in priors.items():
        if prior.kind == "vae":
            x = reconstructed(prior, truth)
            curves = fsc.fsc(x, truth)
            scores = [float(fsc.auc(curves).nanmean()), float((x - truth).abs().mean())]
            say_row(f"{path}: AE-FSC, AE-L1, FSC", [*scores, *band_fsc(x, truth)])
            rows.append([path, "reconstruction", *scores, *band_fsc(x, truth).tolist()])
            columns[path] = x

    # Fig. 11.
    say_row("data: kurtosis", band_kurtosis(truth))
    say_row("white noise: kurtosis", window_kurtosis(first.box))
    for path, prior in priors.items():
        if prior.kind == "vae":
            found = columns[path]
        else:
            found = columns[path] = samples(prior, args.count, args.steps)
        ratio = band_powers(found) / band_powers(truth)
        kurtosis = band_kurtosis(found)
        say_row(f"{path}: power / data's", ratio)
        say_row(f"{path}: kurtosis", kurtosis)
        rows.append([path, "power", "", "", *ratio.tolist()])
        rows.append([path, "kurtosis", "", "", *kurtosis])
    write_rows(args.csv, [["file", "what", "ae_fsc", "ae_l1", *edges], *rows])
    draw(str(Path(args.csv).with_suffix(".png")), columns)


if __name__ == "__main__":
    main()
