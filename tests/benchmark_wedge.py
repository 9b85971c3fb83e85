"""The README's missing-wedge tables: `python tests/benchmark_wedge.py ../shared/data/models/val.npz`, and with a folder of
maps, `python tests/benchmark_wedge.py ../shared/data/maps`.

Each structure is simulated at 3 Å on 64^3 voxels of 1.5 Å, gets white noise (a fraction of its 99.999 percentile) and a tilt
range of +-60 degrees, and is restored: zeros in the wedge, POCS, one sample, the mean of 4 and of 8. Score: FSC_AUC with the
truth, over all coefficients and over the missing ones; FSC_0.5 in Å, over all; how many fail (FSC_0.5 beyond 30 Å).
"kept": the measured coefficients stay as they are.

Each map of a folder loses its wedge and is given to sampling.py, as a user would; score: FSC_AUC with the map itself.
"""
import argparse
import csv
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import atoms  # noqa: E402
import checkpoint  # noqa: E402
import degrade  # noqa: E402
import fourier  # noqa: E402
import mrc  # noqa: E402
import posterior  # noqa: E402
import sampling  # noqa: E402
import volume  # noqa: E402
from fsc import auc, fsc, resolution  # noqa: E402

BOX, VOXEL_SIZE, RESOLUTION = 64, 1.5, 3.0


def truth_of(structure: atoms.Structure) -> torch.Tensor:
    """The clip-normalised density of a structure, centred in the box."""
    density = atoms.molmap(torch.from_numpy(structure.xyz), structure.atomic_number, RESOLUTION, voxel_size=VOXEL_SIZE,
                             shape=(BOX,) * 3, origin=-VOXEL_SIZE * (BOX // 2))[0]
    return volume.normalise(density, 0.0, 1.0)[0]


def real_maps(folder: Path, args: argparse.Namespace) -> None:
    print(f"{'map':34}{'voxels':>14}{'Å':>7}{'method':>8}{'s':>6}   FSC_AUC in the missing wedge: POCS, restored")
    for path in sorted(p for p in folder.iterdir() if ".mrc" in p.name):
        truth = mrc.read_map(path)
        measured = degrade.wedge_mask(truth.density.shape, voxel_size=truth.voxel_size)
        with tempfile.TemporaryDirectory() as work:
            degraded, out = Path(work) / "degraded.mrc", Path(work) / "out.mrc"
            mrc.write_map(degraded, replace(truth, density=fourier.apply_fourier(truth.density, measured)))
            sampling.main([str(degraded), "-o", str(out), "--truth", str(path), "--ckpt", args.ckpt, "--quiet",
                           "--samples", str(args.samples)])
            report, after = json.loads(out.with_suffix(".json").read_text()), mrc.read_map(out)
            for name in ("voxel_size", "origin", "nstart"):
                assert getattr(after, name) == getattr(truth, name), f"{path}: {name} changed"
            error = (fourier.apply_fourier(after.density - truth.density, measured)).abs().max() / truth.density.abs().max()
            assert error < 1e-5, f"{path}: measured coefficients changed by {error:.1e} of the maximum"
        score = report["fsc"]
        print(f"{path.name.split('.')[0]:34}{'x'.join(map(str, truth.density.shape)):>14}{truth.voxel_size[2]:7.2f}"
              f"{report['method']:>8}{report['seconds']:6.0f}   {score['POCS']['auc_missing']:.3f}  "
              f"{score['restored']['auc_missing']:.3f}", flush=True)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("structures", help="archive (.npz), PDB file, or folder of maps")
    cli.add_argument("--ckpt", default=str(Path(__file__).parent.parent / "weights" / "hdit_tiny.pt"))
    cli.add_argument("--count", type=int, default=32, help="structures, from the first on")
    cli.add_argument("--first", type=int, default=0)
    cli.add_argument("--noise", type=float, nargs="+", default=[0, 0.03, 0.1])
    cli.add_argument("--method", default="prior", choices=posterior.METHODS)
    cli.add_argument("--steps", type=int)
    cli.add_argument("--samples", type=int, default=8)
    cli.add_argument("--write", metavar="FOLDER", help="only write the degraded maps and their truths, as sampling.py wants them")
    cli.add_argument("--csv", default="runs/wedge.csv", help="one row per structure and noise")
    args = cli.parse_args()
    if Path(args.structures).is_dir():
        return real_maps(Path(args.structures), args)
    prior = checkpoint.load(args.ckpt, kind="hdit")
    structures = atoms.read_structures(args.structures)[args.first:args.first + args.count]
    measured = fourier.hermitian_part(degrade.wedge_mask((BOX,) * 3))
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    table = {}
    with open(args.csv, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["structure", "noise", "result", "auc", "auc_missing", "fsc_05", "seconds"])
        for noise in args.noise:
            for i, structure in enumerate(structures, args.first):
                truth = truth_of(structure)
                g = torch.Generator().manual_seed(i)
                y = fourier.apply_fourier(truth + noise * torch.randn(truth.shape, generator=g), measured)
                if args.write:
                    for end, density in (("", y), ("_truth", truth)):
                        m = mrc.Map(density, VOXEL_SIZE, origin=-VOXEL_SIZE * (BOX // 2))
                        mrc.write_map(Path(args.write) / f"{structure.label}_noise{noise}{end}.mrc", m)
                    continue
                begin = time.perf_counter()
                results = {"zeros in the wedge": y, "POCS": posterior.pocs(y, measured)}
                total = torch.zeros_like(y)
                for k, sample in enumerate(posterior.wedge_samples(prior, y, measured, args.method, samples=args.samples, seed=0,
                                                                  steps=args.steps), 1):
                    total += sample
                    if k in (1, 4, 8):
                        results[f"mean of {k}, kept"] = fourier.put_back(total / k, y, measured)
                        results[f"mean of {k}"] = total / k
                seconds = time.perf_counter() - begin
                for name, x in results.items():
                    curve = fsc(x, truth)
                    scores = float(auc(curve)), float(auc(fsc(x, truth, ~measured))), float(resolution(curve, VOXEL_SIZE, 0.5))
                    table.setdefault((noise, name), []).append(scores)
                    rows.writerow([structure.label, noise, name, *(f"{v:.4f}" for v in scores), f"{seconds:.1f}"])
                file.flush()
    print(f"{len(structures)} structures, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {Path(args.ckpt).name} "
          f"{prior.sha256[:8]}\nmean (standard deviation)         FSC_AUC, whole   missing wedge   FSC_0.5, Å    failures")
    for (noise, name), scores in table.items():
        scores = torch.tensor(scores)
        columns = "   ".join(f"{mean:.3f} ({sd:.3f})" for mean, sd in zip(scores.mean(0).tolist(), scores.std(0).tolist()))
        print(f"noise {noise:<5} {name:22} {columns}   {int((scores[:, 2] > 30).sum())}")


if __name__ == "__main__":
    main()
