"""The README's CryoLVM tables: `python tests/benchmark_scunet.py sharpen ../shared/data/models/val.npz --ckpt weights/scunet_tiny_sharpen.pt`.

Simulated: the smaller structures of an archive (up to --extent Å across), each as `data.simulated_pair` makes it (sharpen 3 to 6 Å,
superres 4 to 6 Å, on 1 Å voxels), or, for wedge3d, 8 to 15 Å on 4 Å voxels, tilt range ±60°, white noise of --noise of the maximum.
Real: the maps of a folder whose maps.tsv names a model (../shared/data/maps), resampled to 1 Å. Printed for what was given, the classical answer and each checkpoint:

    sharpen, superres    CC_box, CC_mask, CC_peaks, Q-score, map-model FSC 0.5 and 0.143 (fsc.py)
    wedge3d              FSC_AUC over all and over what the wedge misses, correlation with the truth

Classical: sharpening by a B-factor from a Guinier fit between 10 Å and the resolution, cut off there (FSC taken as 1); POCS.
"""
import argparse
import csv
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import atoms  # noqa: E402
import augment  # noqa: E402
import checkpoint  # noqa: E402
import data_pairs  # noqa: E402
import degrade  # noqa: E402
import fourier  # noqa: E402
import fsc  # noqa: E402
import fsc_half_maps  # noqa: E402
import fsc_model  # noqa: E402
import fsc_mtriage  # noqa: E402
import mrc  # noqa: E402
import posterior  # noqa: E402
import sliding_windows  # noqa: E402
import volume  # noqa: E402

RESOLUTIONS = {"sharpen": (3, 6), "superres": (4, 6), "wedge3d": (8, 15)}
VOXEL_SIZE = {"sharpen": 1.0, "superres": 1.0, "wedge3d": 4.0}


def region(shape, voxel_size=4.0):
    return fourier.hermitian_part(degrade.wedge_mask(shape, voxel_size=voxel_size))


def simulated(task: str, structures: list, extent: float, count: int, noise: float):
    """Yields (label, observed, wanted, atoms, resolution, grid) of the first `count` structures that are small enough."""
    small = [s for s in structures if (s.xyz.max(0) - s.xyz.min(0)).max() <= extent][:count]
    v = VOXEL_SIZE[task]
    for i, s in enumerate(small):
        g = augment.item_generator(1, i)
        xyz = torch.from_numpy(s.xyz) @ augment.random_rotation(g).T
        xyz, side = xyz - (xyz.amax(0) + xyz.amin(0)) / 2, float((xyz.amax(0) - xyz.amin(0)).max())
        box = 12 * math.ceil((side + 30) / v / 12)
        R, b = augment.uniform(*RESOLUTIONS[task], g), torch.from_numpy(s.b_factor)
        grid = dict(voxel_size=v, shape=(box,) * 3, origin=-v * (box // 2))
        if task == "wedge3d":
            wanted = atoms.molmap(xyz, s.atomic_number, R, **grid)[0]
            noisy = wanted + noise * wanted.max() * torch.randn(wanted.shape, generator=g)
            observed = fourier.apply_fourier(noisy, region(wanted.shape))
        else:
            observed, wanted = data_pairs.simulated_pair(task, xyz, s.atomic_number, (b - b.quantile(0.05)).clamp(min=0), R, g, **grid)
        yield s.label, observed, wanted, dict(xyz=xyz, atomic_number=torch.from_numpy(s.atomic_number), b_iso=b), R, grid


def real(folder: Path):
    """The same of deposited maps at 1 Å per voxel; nothing is wanted but agreement with the model."""
    with open(folder / "maps.tsv", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["model_file"].strip(" -")]
    for row in rows:
        path = next(p for p in sorted(folder.iterdir()) if p.name == row["file"] or p.name.startswith(row["file"] + ".mrc"))
        m = mrc.resample_map(mrc.read_map(path), 1.0)
        model = atoms.read_model(folder / row["model_file"])
        inside = atoms.atoms_inside(model.xyz, m.density.shape, m.voxel_size, m.corner) & (model.atomic_number > 1)
        found = {name: getattr(model, name)[inside] for name in ("xyz", "atomic_number", "b_iso")}
        yield path.name.split(".")[0], m.density, None, found, float(row["resolution_A"]), \
            dict(voxel_size=m.voxel_size, shape=tuple(m.density.shape), origin=m.corner)


def b_factor_sharpened(x, resolution: float, voxel_size: float):
    ones = torch.ones(min(x.shape) // 2 + 1, dtype=torch.float64)
    return fsc_half_maps.sharpen(x, ones, voxel_size, fsc_half_maps.guinier_b_factor(x, ones, voxel_size, resolution), resolution)


def against_model(x, atoms: dict, R: float, grid: dict) -> dict[str, float]:
    place = dict(voxel_size=grid["voxel_size"], origin=grid["origin"])
    cc = fsc_model.map_model_cc(x, **atoms, resolution=R, **place)
    curve = fsc_mtriage.map_model_resolution(x, **atoms, **place)
    return {"cc_box": cc["cc_box"], "cc_mask": cc["cc_mask"], "cc_peaks": cc["cc_peaks"],
            "q_score": float(fsc_model.q_score(x, atoms["xyz"], **place).nanmean()),      # nan: no density about an atom
            "fsc_05": curve["d_fsc_model_05"], "fsc_0143": curve["d_fsc_model_0143"]}


def against_truth(x, wanted, missing) -> dict[str, float]:
    return {"auc": float(fsc.auc(fsc.fsc(x, wanted))), "auc_missing": float(fsc.auc(fsc.fsc(x, wanted, missing))),
            "cc": fsc_model.correlation(x, wanted)}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("task", choices=RESOLUTIONS)
    cli.add_argument("data", type=Path, help="archive of structures (.npz), or a folder of maps and models")
    cli.add_argument("--ckpt", nargs="+", required=True)
    cli.add_argument("--count", type=int, default=12)
    cli.add_argument("--extent", type=float, default=70, help="Å; larger structures are passed over")
    cli.add_argument("--stride", type=int, default=12)
    cli.add_argument("--fusion", nargs="+", choices=sliding_windows.WINDOWS, default=["gaussian"])
    cli.add_argument("--noise", type=float, default=0.03, help="wedge3d: standard deviation, of the maximum")
    cli.add_argument("--prior", action="store_true", help="wedge3d: the flow prior, too, on its own grid: slow")
    cli.add_argument("--csv", default="runs/scunet.csv")
    args = cli.parse_args()
    networks = {path: checkpoint.load(path, kind="scunet") for path in args.ckpt}
    prior = checkpoint.load(Path(__file__).parent.parent / "weights" / "hdit_tiny.pt", kind="hdit") if args.prior else None
    maps = (real(args.data) if args.data.is_dir() else
            simulated(args.task, atoms.read_structures(args.data), args.extent, args.count, args.noise))
    rows = []
    for label, observed, wanted, model, R, grid in maps:
        begin, answers = time.perf_counter(), {"input": observed}
        v = fourier.triple(grid["voxel_size"])[2]
        if args.task == "wedge3d":
            measured = region(observed.shape)
            answers["POCS"] = posterior.pocs(observed, measured)
        else:
            answers["B-factor"] = b_factor_sharpened(observed, R, v)
        x, scale = volume.normalise(observed, 0, 1)
        for path, network in networks.items():
            for fusion in args.fusion:
                answer = sliding_windows.sliding_windows(network.net, x, network.box, args.stride, fusion)
                answers[name := f"{path} {fusion}"] = volume.denormalise(answer, scale)
                if args.task == "wedge3d":
                    answers[f"{name}, kept"] = fourier.put_back(answers[name], observed, measured)
        if prior:                                        # as sampling.py does with --method prior
            work = mrc.resample_map(mrc.Map(observed, v), prior.voxel_size).density
            there = region(work.shape) & fourier.below_nyquist(work.shape, observed.shape)
            sample, = posterior.wedge_samples(prior, work, there, "prior", samples=1, seed=0, noise=args.noise * float(observed.max()))
            answers["flow prior, one sample"] = fourier.resample(sample, observed.shape)
            answers["flow prior, kept"] = fourier.put_back(answers["flow prior, one sample"], observed, measured)
        seconds = time.perf_counter() - begin
        for name, answer in answers.items():
            numbers = against_truth(answer, wanted, ~measured) if args.task == "wedge3d" else against_model(answer, model, R, grid)
            rows.append({"map": label, "resolution": R, "answer": name, **numbers})
            print(f"{label:28} {R:5.2f} Å  {name:60}" + "".join(f" {k} {n:.3f}" for k, n in numbers.items()), flush=True)
        print(f"  {seconds:.0f} s", flush=True)
    if not rows:
        sys.exit(f"{args.data}: no structure up to --extent {args.extent:g} Å across, or no map with a model")
    print(f"\nmean of {len({row['map'] for row in rows})} maps, torch {torch.__version__}")
    for name in dict.fromkeys(row["answer"] for row in rows):
        mine = [row for row in rows if row["answer"] == name]
        mean = lambda key: torch.tensor([row[key] for row in mine], dtype=torch.float64).nanmean()
        print(f"{name:60}" + "".join(f" {k} {mean(k):.3f}" for k in list(mine[0])[3:]))
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
