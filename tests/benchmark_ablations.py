"""The ablations of both papers with tiny networks, on simulated maps: one row per run.

    python tests/benchmark_ablations.py                       # all, two seeds each
    python tests/benchmark_ablations.py augmentation patches  # some

    augmentation   CryoFM Fig. 14, F.1     center, random, rot24, so3
    normalisation  Fig. 9                  off: mean 0 and std 1; on is the run "so3"
    patches        Figs. 8, 15, Table 7    loss against FLOP; p4-d1 is the run "so3"
    pretraining    CryoLVM Tables 10, 11   scratch, JEPA (mask: input or embedding), MAE, and the
                                           shipped JEPA (500 steps of 16); sharpening
    loss           Table 9                 composite: alpha = 0.5; 1: the run "JEPA, mask at input"
    fusion         Table 12                Gaussian or mean, every half box; the shipped networks

Flow priors are scored by four numbers:
    train_loss     of training maps, cut and turned as in training
    unseen_loss    of other maps, cut and turned as in training: above train_loss, it overfits
    so3_loss       of other maps in any orientation, the same crops for every variant
    wedge_auc      FSC_AUC in the missing wedge of other maps
Restorations: squared error and histogram divergence (times 1e-3), correlation with the wanted map.
Training structures are those of structures/train.npz that train.py trains on, scores are of
structures/val.npz.

Each run is appended to the csv when it is done, and a run that is in the csv is not done again. Of
the networks only the pre-trained ones are kept, beside the csv.
"""

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from benchmark_scunet import against_truth, simulated
from benchmark_wedge import WEIGHTS, truth_of

import atoms
import checkpoint
import data
import data_pairs
import flow
import fourier
import fsc_model
import train_objectives
from checkpoint import Prior
from fsc import auc, fsc
from model_hdit import HDiTConfig
from mrc import Map
from report import silent
from sampling_networks import ask_network
from sampling_settings import NetworkSettings, WedgeSettings
from sampling_tasks import restore_wedge
from train import held_out_batch, noise_generator
from train_config import TrainConfig
from train_dry_run import multiply_adds
from train_optim import set_rates, update_average
from train_presets import PRESETS
from train_ranks import Ranks
from train_resume import begin, network_for_use
from volume import center_crop

# Of the csv. A run has those scores that its ablation asks for.
SCORES = ("tflop", "train_loss", "unseen_loss", "so3_loss", "wedge_auc", "mse", "js", "cc")
COLUMNS = ("ablation", "variant", "seed", "steps", "seconds", *SCORES)
SEEDS = (0, 1)
FLOW_STEPS = 500
PRE_STEPS = 150
FINE_STEPS = 150
CPU = torch.device("cpu")

# Small structures, so that a box of 32 voxels of 1.5 Å shows most of one.
EXTENT = 60  # Å
WEDGES = 8  # maps that get a missing wedge
TRAINED_ON = 24  # pre-training sees all small ones, as the paper's sees more than fine-tuning

FLOW = replace(
    PRESETS["tiny"],
    net=HDiTConfig(depths=(1, 2), widths=(64, 128)),
    steps=FLOW_STEPS,
    batch=4,
    micro_batch=4,
    crop=16,
    crops_per_map=2,
    ema_decay=0.99,
    held_out_crops=64,
)

# Table 7 in small: a twelfth of the widths (p4-d2 outside: a sixth, for heads of 64 channels).
PATCHES = {
    "p8-d1": HDiTConfig(patch_size=8, depths=(1, 2), widths=(64, 128)),
    "p4-d2": HDiTConfig(depths=(1, 1, 2), widths=(64, 64, 128)),
    "p4-d0": HDiTConfig(depths=(3,), widths=(128,)),
    "p2-d1": HDiTConfig(patch_size=2, depths=(1, 2), widths=(64, 128)),
}

# CryoLVM's networks, on smaller crops than the presets have.
SMALL = dict(crop=24, batch=4, micro_batch=4, crops_per_map=2, held_out_crops=64, workers=0)
JEPA = replace(PRESETS["tiny-jepa"], steps=PRE_STEPS, **SMALL)
MAE = replace(PRESETS["tiny-mae"], steps=PRE_STEPS, **SMALL)
PRETRAINED = {
    "JEPA, mask at input": JEPA,
    "JEPA, mask at embedding": replace(JEPA, mask_at="embedding"),
    "MAE": MAE,
}
SHIPPED = WEIGHTS.with_name("scunet_tiny_jepa.pt")
SHARPEN = replace(PRESETS["tiny-sharpen"], steps=FINE_STEPS, **SMALL)


# ---- Data


def extent(structure: atoms.Structure) -> float:
    """The longest side of a structure, Å."""
    return float((structure.xyz.max(0) - structure.xyz.min(0)).max())


def structures_for(train: Path, val: Path) -> tuple[list, list]:
    """(training, unseen) structures that are small enough."""
    # train.py never trains on one in twenty.
    trained, _ = train_objectives.split(atoms.read_structures(train, silent))
    unseen = atoms.read_structures(val, silent)
    return tuple([s for s in entries if extent(s) <= EXTENT] for entries in (trained, unseen))


def maps_of(structures: list) -> list[data.Volume]:
    """Maps at 3 Å, always in the structures' own orientations, from 0 to 1."""
    return [data.Volume(s.label, truth_of(s)) for s in structures]


def crops_of(volumes: list, cfg: TrainConfig, seed: int, augmentation="so3") -> data.MapCrops:
    scale = dict(mean=cfg.mean, std=cfg.std)
    shape = dict(crop=cfg.crop, crops=cfg.crops_per_map)
    return data.MapCrops(volumes, augmentation=augmentation, seed=seed, **shape, **scale)


def pairs_of(structures: list, cfg: TrainConfig, seed: int) -> data_pairs.SimulatedPairs:
    return train_objectives.simulated(structures, seed, cfg)


# ---- Training


def train(cfg: TrainConfig, items) -> torch.nn.Module:
    """train.py's loop without its files: the averaged network after cfg.steps steps."""
    ranks = Ranks()
    ranks.device = CPU
    state = begin(cfg, None, ranks)
    per_batch = cfg.batch // cfg.crops_per_map
    for step in range(cfg.steps):
        # The items and the random numbers of this step.
        set_rates(state.optimizers, step, cfg)
        numbers = range(step * per_batch, (step + 1) * per_batch)
        x = torch.cat([items[i] for i in numbers])
        generator = noise_generator(cfg, step, CPU)

        # Forward and backward, then update.
        with flow.autocast(CPU, cfg.bf16):
            loss, _ = train_objectives.losses(state.net, state.ema, x, cfg, generator)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(state.net.parameters(), cfg.clip)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(state.ema, state.net, step + 1, cfg)
    return network_for_use(state.ema, cfg)


def prior_of(net: torch.nn.Module, cfg: TrainConfig) -> Prior:
    """What the tasks of sampling.py take."""
    numbers = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
    return Prior(net.eval().requires_grad_(False), "hdit", sha256="", **numbers)


# ---- Scores


def mean_loss(net: torch.nn.Module, items, cfg: TrainConfig) -> float:
    """The flow-matching loss of fixed crops, mean over five times."""
    losses = train_objectives.held_out_losses(net, net, held_out_batch(items, cfg), cfg)
    return sum(losses) / len(losses)


def wedge_auc(net: torch.nn.Module, volumes: list, cfg: TrainConfig) -> float:
    """FSC_AUC in the missing wedge of the middle 32^3 voxels, one sample each, no noise."""
    scores = []
    for volume in volumes[:WEDGES]:
        truth = center_crop(volume.density, 32)
        measured = WedgeSettings().measured(Map(truth, cfg.voxel_size))
        y = Map(fourier.apply_fourier(truth, measured), cfg.voxel_size)
        settings = WedgeSettings(method="prior", samples=1, noise=0.0, background=0.0, invert=False)
        result = restore_wedge(y, prior_of(net, cfg), settings, silent)
        scores.append(float(auc(fsc(result.densities[""], truth, ~measured))))
    return sum(scores) / len(scores)


def flow_scores(net, cfg: TrainConfig, augmentation: str, sets: dict) -> dict[str, float]:
    """The scores of a flow prior. Of training maps the crops are others, but not of "center"."""
    trained = sets["train maps"]
    unseen = sets["val maps"]
    flop = 6 * multiply_adds(cfg.net, cfg.crop) * cfg.batch * cfg.steps  # Peebles & Xie 2023
    return {
        "tflop": flop / 1e12,
        "train_loss": mean_loss(net, crops_of(trained, cfg, 10, augmentation), cfg),
        "unseen_loss": mean_loss(net, crops_of(unseen, cfg, 11, augmentation), cfg),
        "so3_loss": mean_loss(net, crops_of(unseen, cfg, 11), cfg),
        "wedge_auc": wedge_auc(net, unseen, cfg),
    }


def restoration_scores(net, cfg: TrainConfig, unseen: list) -> dict[str, float]:
    """Squared error, histogram divergence, correlation with what is wanted."""
    # The same pairs for every network.
    x = held_out_batch(pairs_of(unseen, cfg, seed=11), cfg)
    _, mse, js = train_objectives.held_out_losses(net, net, x, cfg)
    with torch.no_grad():
        restored = torch.cat([net(part) for part in x[:, :1].split(4)])
    # Solvent has no correlation.
    pairs = zip(restored[:, 0], x[:, 1])
    cc = [fsc_model.correlation(a, b) for a, b in pairs if b.max() > 0.1]
    return {"mse": 1e3 * mse, "js": 1e3 * js, "cc": sum(cc) / len(cc)}


# ---- The ablations: variants and how a run of one is scored


def run_flow(cfg: TrainConfig, augmentation: str, sets: dict) -> dict[str, float]:
    net = train(cfg, crops_of(sets["train maps"], cfg, cfg.seed, augmentation))
    return flow_scores(net, cfg, augmentation, sets)


def run_normalisation(variant: str, seed: int, sets: dict) -> dict[str, float]:
    # Losses on another grey scale do not compare, restorations do.
    return run_flow(replace(FLOW, seed=seed, mean=0.0, std=1.0), "so3", sets)


def run_augmentation(variant: str, seed: int, sets: dict) -> dict[str, float]:
    return run_flow(replace(FLOW, seed=seed), variant, sets)


def run_patches(variant: str, seed: int, sets: dict) -> dict[str, float]:
    return run_flow(replace(FLOW, seed=seed, net=PATCHES[variant]), "so3", sets)


def pretrained(variant: str, seed: int, sets: dict) -> str:
    """The file of a pre-trained network, made if it is not there yet."""
    cfg = replace(PRETRAINED[variant], seed=seed)
    path = sets["folder"] / f"{variant.replace(', ', '_').replace(' ', '_')}_{seed}.pt"
    if not path.exists():
        net = train(cfg, pairs_of(sets["pretrain"], cfg, seed))
        numbers = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
        checkpoint.save(path, net, **numbers, task=cfg.objective)
    return str(path)


def run_sharpening(cfg: TrainConfig, sets: dict) -> dict[str, float]:
    net = train(cfg, pairs_of(sets["train"], cfg, cfg.seed))
    return restoration_scores(net, cfg, sets["val"])


def run_pretraining(variant: str, seed: int, sets: dict) -> dict[str, float]:
    starts = {"scratch": "", "JEPA, shipped": str(SHIPPED)}
    init = starts[variant] if variant in starts else pretrained(variant, seed, sets)
    return run_sharpening(replace(SHARPEN, seed=seed, init=init), sets)


def run_loss(variant: str, seed: int, sets: dict) -> dict[str, float]:
    init = pretrained("JEPA, mask at input", seed, sets)
    return run_sharpening(replace(SHARPEN, seed=seed, init=init, alpha=0.5), sets)


def run_fusion(variant: str, seed: int, sets: dict) -> dict[str, float]:
    """The shipped wedge network on eight structures of its own for each seed."""
    # The paper's stride of 24 is half of its box, too.
    network = checkpoint.load(WEIGHTS.with_name("scunet_tiny_wedge3d.pt"), kind="scunet")
    settings = NetworkSettings(stride=network.box // 2, fusion=variant)

    # A small structure fills one tile, and nothing is fused.
    large = [s for s in sets["val archive"] if extent(s) > 70]
    structures = large[seed::2]
    scores = defaultdict(list)
    for case in simulated("wedge3d", structures, 130, 8, 0.03):
        found, _ = ask_network(case.observed.density, network, settings, silent)
        for name, score in against_truth(found, case).items():
            scores[name].append(score)
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return {"wedge_auc": means["auc_missing"], "cc": means["cc"]}


ABLATIONS: dict[str, tuple[Callable, tuple[str, ...], int]] = {
    "augmentation": (run_augmentation, ("center", "random", "rot24", "so3"), FLOW_STEPS),
    "normalisation": (run_normalisation, ("off",), FLOW_STEPS),
    "patches": (run_patches, tuple(PATCHES), FLOW_STEPS),
    "pretraining": (run_pretraining, ("scratch", *PRETRAINED, "JEPA, shipped"), FINE_STEPS),
    "loss": (run_loss, ("composite",), FINE_STEPS),
    "fusion": (run_fusion, ("gaussian", "mean"), 0),
}


# ---- The command


def rows_of(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            table.writeheader()
        table.writerow(row)


def say_table(rows: list[dict]) -> None:
    """Means over seeds, and half of their difference."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["ablation"], row["variant"]].append(row)
    for (ablation, variant), group in groups.items():
        line = f"{ablation:14} {variant:24} {len(group)} seed(s)"
        for name in SCORES:
            values = [float(row[name]) for row in group if row[name]]
            if values:
                mean = sum(values) / len(values)
                line += f"  {name} {mean:.4g} ± {(max(values) - min(values)) / 2:.2g}"
        print(line)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("ablations", nargs="*", default=list(ABLATIONS), metavar="ABLATION")
    cli.add_argument("--train", type=Path, default=Path("structures/train.npz"))
    cli.add_argument("--val", type=Path, default=Path("structures/val.npz"))
    cli.add_argument("--csv", type=Path, default=Path("runs/ablations/ablations.csv"))
    args = cli.parse_args()
    unknown = set(args.ablations) - set(ABLATIONS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; choose {', '.join(ABLATIONS)}")

    # One thread, and data that all runs share.
    torch.set_num_threads(1)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    pretrained_on, unseen = structures_for(args.train, args.val)
    trained = pretrained_on[:TRAINED_ON]
    sets = {"pretrain": pretrained_on, "train": trained, "val": unseen, "folder": args.csv.parent}
    sets["train maps"] = maps_of(trained)
    sets["val maps"] = maps_of(unseen)
    sets["val archive"] = atoms.read_structures(args.val, silent)

    # The first seed of everything comes before the second.
    done = {(row["ablation"], row["variant"], row["seed"]) for row in rows_of(args.csv)}
    for seed in SEEDS:
        for name in args.ablations:
            run, variants, steps = ABLATIONS[name]
            for variant in variants:
                if (name, variant, str(seed)) in done:
                    continue
                # Of the processor, because other programs share the machine.
                begin_time = time.process_time()
                scores = run(variant, seed, sets)
                seconds = time.process_time() - begin_time
                row = dict(ablation=name, variant=variant, seed=seed, steps=steps)
                row["seconds"] = f"{seconds:.0f}"
                row |= {key: f"{value:.5g}" for key, value in scores.items()}
                append_row(args.csv, row)
                print(row, flush=True)
    say_table(rows_of(args.csv))


if __name__ == "__main__":
    main()
