"""Where a run starts and what it leaves: fresh weights, --init, --resume, checkpoints."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import checkpoint
from model_scunet import SCUNet
from train_config import PRETRAINING, TrainConfig, flag, used_by
from train_objectives import build
from train_optim import averaged, optimizers


@dataclass
class State:
    """Everything that a training step changes."""

    net: nn.Module
    ema: nn.Module  # averaged weights; of "jepa" the target encoder
    optimizers: list[torch.optim.Optimizer]
    plateau: ReduceLROnPlateau | None


def read_training(path: Path, cfg: TrainConfig, say=print) -> dict | None:
    """The checkpoint to go on from, None without --resume.

    Raises OSError if it is missing, or if there is one and no --resume; ValueError if it does not
    fit this run.
    """
    if not cfg.resume:
        if path.exists():
            raise FileExistsError(f"{path}: a run is there; --resume it, or give another --out")
        return None
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no checkpoint to resume from; leave out --resume to start a run"
        )
    saved = checkpoint.read(path)
    training = saved.get("training")
    if not training:
        raise ValueError(
            f"{path}: holds no training state; --resume wants the checkpoint.pt of a run"
        )

    # The network cannot change, other settings may. Older checkpoints lack newer flags.
    flags = training["flags"]
    settings = asdict(cfg)
    for name in ("net", "objective", "optimizer"):
        if flags.get(name, "flow") != settings[name]:
            raise ValueError(
                f"{path}: another network, objective or optimiser; "
                "give the --model and --optimizer it began with"
            )
    say(f"resuming {path} after step {training['step']}")
    for option in fields(cfg):
        name = option.name
        same_place = name in ("out", "resume", "init")
        if used_by(option, cfg.objective) and not same_place:
            print_change(name, flags.get(name, settings[name]), settings[name], say)
    return saved


def print_change(name: str, before, now, say) -> None:
    if before != now:
        say(f"  changed: {flag(name)} {before} -> {now}")


def begin(cfg: TrainConfig, saved: dict | None, device: torch.device, say=print) -> State:
    """The state before the first step: as saved, or from --init, or random."""
    torch.manual_seed(cfg.seed)
    net = build(cfg).to(device)
    if cfg.init and not saved:
        start_from(net, cfg, say)
    # Optimisers start anew, even from --init; restore fills them where a run goes on.
    state = State(net, averaged(net, cfg), optimizers(net, cfg), None)
    # The learning rate falls by a tenth after `patience` evaluations without progress.
    if cfg.patience:
        state.plateau = ReduceLROnPlateau(state.optimizers[0], factor=0.9, patience=cfg.patience)
    if saved:
        restore(state, saved)
    return state


def restore(state: State, saved: dict) -> None:
    """Put a checkpoint into the state. Raises RuntimeError or ValueError if they do not fit."""
    training = saved["training"]
    state.net.load_state_dict(training["net"])
    # Of "jepa" the checkpoint's own weights are a whole network, the target encoder is apart.
    state.ema.load_state_dict(training.get("target", saved["weights"]))
    for optimizer, content in zip(state.optimizers, training["optimizers"], strict=True):
        optimizer.load_state_dict(content)
    if state.plateau and training["plateau"]:
        state.plateau.load_state_dict(training["plateau"])


def start_from(net: nn.Module, cfg: TrainConfig, say=print) -> None:
    """Load the averaged weights of --init; from another objective's pre-training only the encoder.

    Raises OSError without the file, ValueError if its network is another, or was fine-tuned for
    another task.
    """
    prior = checkpoint.load(cfg.init, kind="hdit" if cfg.objective == "flow" else "scunet")
    if prior.net.config != cfg.net:
        raise ValueError(
            f"{cfg.init}: another network, {prior.net.config}; give the --model it was trained as"
        )
    # The same objective: all weights. After pre-training: the encoder.
    if cfg.objective == "flow" or prior.task == cfg.objective != "jepa":
        say(f"starting from {cfg.init}")
        net.load_state_dict(prior.net.state_dict())
    elif prior.task in PRETRAINING:
        say(f"starting from the encoder of {cfg.init}")
        encoder = net.context.encoder if cfg.objective == "jepa" else net.encoder
        encoder.load_state_dict(prior.net.encoder.state_dict())
    else:
        raise ValueError(
            f"{cfg.init}: fine-tuned for {prior.task}, not for {cfg.objective}; "
            "give a pre-trained network"
        )
    # The weights may be used at other settings than they were trained at, but not silently.
    print_change("voxel_size", prior.voxel_size, cfg.voxel_size, say)
    print_change("crop", prior.box, cfg.crop, say)
    print_change("mean", prior.mean, cfg.mean, say)
    print_change("std", prior.std, cfg.std, say)


def network_for_use(ema: nn.Module, cfg: TrainConfig) -> nn.Module:
    """The network that a checkpoint is for: `ema`, or around jepa's target encoder a whole SCUNet.

    Nothing has taught the decoder of the latter yet. It shares its weights with `ema`.
    """
    if cfg.objective != "jepa":
        return ema
    network = SCUNet(cfg.net)
    network.encoder = ema.encoder
    return network


def save(state: State, network: nn.Module, cfg: TrainConfig, out: Path, step: int) -> None:
    """Write checkpoint.pt for --resume, and prior.pt, jepa.pt, ... for use, in half precision.

    network: from `network_for_use`; step: how many steps the state has taken.
    """
    # What only a resumed run needs.
    training = dict(
        net=state.net.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in state.optimizers],
        step=step,
        plateau=state.plateau and state.plateau.state_dict(),
        flags=asdict(cfg),
    )
    if cfg.objective == "jepa":
        training["target"] = state.ema.state_dict()
    # What a user of the network must know, and which file is for users.
    shared = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
    name = "prior.pt"
    if cfg.objective != "flow":
        name = f"{cfg.objective}.pt"
        shared["task"] = cfg.objective
    checkpoint.save(out / "checkpoint.pt", network, **shared, training=training)
    checkpoint.save(out / name, network, **shared, half=True)
