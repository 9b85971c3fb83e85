"""Where a run starts and what it leaves: fresh weights, --init, --resume, checkpoints."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import checkpoint
from train_config import PRETRAINING, TrainConfig, flag, used_by
from train_objectives import build, new_network
from train_optim import averaged, optimizers

# Of a checkpoint whose archive is whole but whose content is not.
DAMAGED = "its training state is damaged; resume from a copy, or --init another run with it"


@dataclass
class State:
    """Everything that a training step changes."""

    net: torch.nn.Module
    ema: torch.nn.Module  # averaged weights; of "jepa" the target encoder
    optimizers: list[torch.optim.Optimizer]
    plateau: ReduceLROnPlateau | None


def network_file(cfg: TrainConfig) -> str:
    """The name of the file for use, in half precision."""
    return "prior.pt" if cfg.objective == "flow" else f"{cfg.objective}.pt"


def read_training(path: Path, cfg: TrainConfig, micro: int, say=print) -> dict | None:
    """The checkpoint to go on from, None without --resume.

    micro: crops of a micro-batch. Raises OSError if the checkpoint is missing, or if there is one
    and no --resume; ValueError if it is damaged or does not fit this run.
    """
    if not cfg.resume:
        refuse_existing_run(path, cfg)
        return None
    # --resume: read the state, and refuse what is none.
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
    if not is_training(training):
        raise ValueError(f"{path}: {DAMAGED}")

    # The network cannot change, other settings may. Older checkpoints lack newer flags.
    flags = training["flags"]
    settings = asdict(cfg)
    for name in ("net", "objective", "optimizer"):
        if flags.get(name, "flow") != settings[name]:
            raise ValueError(
                f"{path}: another network, objective or optimiser; "
                "give the --model and --optimizer it began with"
            )
    refuse_saved_settings(path, flags, cfg)

    # Say what goes on, and what is other than before.
    say(f"resuming {path} after step {training['step']}")
    if cfg.init:
        say(f"  --init {cfg.init} is not read again")
    for option in fields(cfg):
        name = option.name
        same_place = name in ("out", "resume", "init")
        if used_by(option, cfg.objective) and not same_place:
            print_change(name, flags.get(name, settings[name]), settings[name], say)
    # Micro-batches also change with the number of ranks, which is no flag.
    before = training.get("micro", micro)  # older checkpoints lack it
    if before != micro:
        say(
            f"  changed: micro-batches of {before} crops -> {micro}; so noise, times and masks "
            "are others than in an unbroken run"
        )
    return saved


def refuse_existing_run(path: Path, cfg: TrainConfig) -> None:
    """Raise OSError if a new run would replace a network, be it the one that --init names."""
    if path.exists():
        raise FileExistsError(f"{path}: a run is there; --resume it, or give another --out")
    network = path.with_name(network_file(cfg))
    if network.exists():
        raise FileExistsError(f"{network}: exists and would be replaced; give another --out")


def is_training(training: dict) -> bool:
    """Whether a checkpoint's training state has the parts that `save` writes."""
    # Every part with its type.
    parts = {"net": dict, "optimizers": list, "step": int, "flags": dict}
    if not all(isinstance(training.get(name), kind) for name, kind in parts.items()):
        return False
    # The plateau scheduler is one of fine-tuning only, None otherwise.
    return training["step"] >= 0 and isinstance(training.get("plateau"), dict | None)


def refuse_saved_settings(path: Path, flags: dict, cfg: TrainConfig) -> None:
    """Raise ValueError if a setting has changed that goes on as the optimisers' state has it."""
    # Pre-training sets its weight decay anew in every step.
    names = ["beta2", "patience"]
    if cfg.objective not in PRETRAINING:
        names.append("weight_decay")
    # The plateau scheduler lowers the rate that it finds.
    if cfg.patience:
        names.append("lr")

    # Older checkpoints lack newer flags.
    for name in names:
        now = getattr(cfg, name)
        before = flags.get(name, now)
        if before != now:
            raise ValueError(
                f"{path}: {flag(name)} {now:g} comes too late, the saved optimiser state has "
                f"{before}; give {flag(name)} {before}, or start a new run with --init"
            )


def print_change(name: str, before, now, say) -> None:
    if before != now:
        say(f"  changed: {flag(name)} {before} -> {now}")


def begin(cfg: TrainConfig, saved: dict | None, device: torch.device, say=print) -> State:
    """The state before the first step: as saved, or from --init, or random."""
    # The same random weights on every rank.
    torch.manual_seed(cfg.seed)
    net = build(cfg).to(device)
    if cfg.init and not saved:
        start_from(net, cfg, say)
    elif cfg.objective == "lfm" and not saved:
        raise ValueError(
            "this model learns the codes of a trained VAE; give its file: --init runs/vae/vae.pt"
        )

    # Optimisers without a step, and the average of one network.
    state = State(net, averaged(net, cfg), optimizers(net, cfg), None)
    if cfg.patience:
        state.plateau = ReduceLROnPlateau(state.optimizers[0], factor=0.9, patience=cfg.patience)
    if saved:
        try:
            restore(state, saved)
        except checkpoint.UNFIT as error:
            raise ValueError(
                f"{Path(cfg.out) / 'checkpoint.pt'}: {DAMAGED} ({type(error).__name__})"
            ) from error
    return state


def restore(state: State, saved: dict) -> None:
    """Put a checkpoint into the state. Raises one of checkpoint.UNFIT if they do not fit."""
    # The weights, raw and averaged.
    training = saved["training"]
    state.net.load_state_dict(training["net"])
    # Of "jepa" the checkpoint's own weights are a whole network, the target encoder is apart.
    state.ema.load_state_dict(training.get("target", saved["weights"]))
    # Moments, learning rates and the plateau scheduler.
    for optimizer, content in zip(state.optimizers, training["optimizers"], strict=True):
        optimizer.load_state_dict(content)
        check_moments(optimizer)
    if state.plateau and training["plateau"]:
        state.plateau.load_state_dict(training["plateau"])


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if moments are missing or do not fit, which torch does not look at."""
    for group in optimizer.param_groups:
        # What a step multiplies with.
        for name in ("lr", "weight_decay"):
            if not isinstance(group[name], float | int):
                raise ValueError(f"{name} is {group[name]}")

        # Every weight has moments of its own shape, and all have the same ones.
        states = [optimizer.state[p] for p in group["params"]]
        for p, state in zip(group["params"], states):
            if not state or state.keys() != states[0].keys():
                raise ValueError("moments are missing")
            moments = [m for m in state.values() if not torch.is_tensor(m) or m.ndim]
            if not all(torch.is_tensor(m) and m.shape == p.shape for m in moments):
                raise ValueError("moments of another shape")


def start_from(net: torch.nn.Module, cfg: TrainConfig, say=print) -> None:
    """Load the averaged weights of --init; from another objective's pre-training only the encoder.

    Raises OSError without the file, ValueError if its network is another, or was fine-tuned for
    another task.
    """
    # A latent flow starts from a VAE, or from a latent flow.
    kind = checkpoint.kind_of(cfg.net)
    if kind == "lfm":
        prior = checkpoint.load(cfg.init)
        if prior.kind == "vae":
            start_from_vae(net, prior, cfg, say)
            return

    # Must be the same kind of network, of the same sizes.
    prior = checkpoint.load(cfg.init, kind=kind)
    if prior.net.config != cfg.net:
        raise ValueError(
            f"{cfg.init}: another network, {prior.net.config}; give the --model it was trained as"
        )

    # All weights if the objective is the same, or the encoder of pre-training.
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

    print_new_scales(prior, cfg, say)


def start_from_vae(net, prior: checkpoint.Prior, cfg: TrainConfig, say=print) -> None:
    """Put the VAE of --init into a latent flow; ValueError if it has other sizes."""
    sizes = asdict(prior.net.config)
    wanted = {name: value for name, value in asdict(cfg.net).items() if name in sizes}
    if sizes != wanted:
        raise ValueError(f"{cfg.init}: another VAE, {prior.net.config}; give one of {wanted}")
    say(f"learning the codes of {cfg.init}")
    net.vae.load_state_dict(prior.net.state_dict())
    print_new_scales(prior, cfg, say)


def print_new_scales(prior: checkpoint.Prior, cfg: TrainConfig, say=print) -> None:
    # The grey scale and the sampling may change, but not unseen.
    print_change("voxel_size", prior.voxel_size, cfg.voxel_size, say)
    print_change("crop", prior.box, cfg.crop, say)
    print_change("mean", prior.mean, cfg.mean, say)
    print_change("std", prior.std, cfg.std, say)


def network_for_use(ema: torch.nn.Module, cfg: TrainConfig) -> torch.nn.Module:
    """The network that a checkpoint is for: `ema`, or around jepa's target encoder a whole SCUNet.

    Nothing has taught the decoder of the latter yet. It shares its weights with `ema`.
    """
    if cfg.objective != "jepa":
        return ema
    # A fresh decoder around the encoder, so that the file opens like any other SCUNet or ViT.
    network = new_network(cfg)
    network.encoder = ema.encoder
    return network


def save(
    state: State, network: torch.nn.Module, cfg: TrainConfig, out: Path, micro: int, step: int
) -> None:
    """Write checkpoint.pt for --resume, and prior.pt, jepa.pt, ... for use, in half precision.

    network: from `network_for_use`; micro: crops of a micro-batch; step: how many steps the state
    has taken. Raises ValueError if the weights are not finite; then nothing is written.
    """
    refuse_lost_weights(state, out, step)
    # What --resume needs beside the averaged weights.
    training = dict(
        net=state.net.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in state.optimizers],
        step=step,
        plateau=state.plateau and state.plateau.state_dict(),
        flags=asdict(cfg),
        micro=micro,
    )
    if cfg.objective == "jepa":
        training["target"] = state.ema.state_dict()

    # Both files open as networks. CryoLVM's say which task they are for.
    shared = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
    if cfg.objective != "flow":
        shared["task"] = cfg.objective
    checkpoint.save(out / "checkpoint.pt", network, **shared, training=training)
    checkpoint.save(out / network_file(cfg), network, **shared, half=True)


def refuse_lost_weights(state: State, out: Path, step: int) -> None:
    """Raise ValueError if a weight is nan, or larger than half precision holds."""
    # One number per tensor is enough: its largest.
    largest = torch.finfo(torch.float16).max
    for p in (*state.net.parameters(), *state.ema.parameters()):
        if not p.abs().max() <= largest:  # true for nan, too
            kept = "nothing is saved"
            if (out / "checkpoint.pt").exists():
                kept = f"{out / 'checkpoint.pt'} is still the one of an earlier step"
            raise ValueError(
                f"after step {step} the weights are not finite, or beyond {largest:g}; {kept}. "
                "Train again with a lower --lr"
            )
