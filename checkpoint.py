"""Files that hold a network: weights, config, voxel size, normalisation and, for `train.py --resume`, the training state.

A checkpoint is one dict that `torch.load(weights_only=True)` reads, so that opening a stranger's file runs no code:

    kind         which network, a key of NETWORKS
    config       fields of its config
    weights      its state dict: averaged (EMA) weights, the ones to use
    voxel_size   Å, the sampling the network was trained at
    box          voxels per side of its training crops: the tile that sampling.py evaluates
    mean, std    network value = (density / 99.999 percentile - mean) / std; 0 and 1 for "scunet"
    task         "scunet" only: what it was trained for, "jepa", "mae", "sharpen", "superres" or "wedge3d"
    training     None, or in train.py's own files: raw weights, optimiser states, step, flags

The authors' public CryoFM weights (`model.safetensors`) load by path too; all but the kernel size follows from the shapes.
"""
import hashlib
import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from files import atomic_write
from model_hdit import HDiT, HDiTConfig
from model_scunet import SCUNet, SCUNetConfig

NETWORKS = {"hdit": (HDiT, HDiTConfig), "scunet": (SCUNet, SCUNetConfig)}
KEYS = {"kind", "config", "weights", "voxel_size", "box", "mean", "std"}


@dataclass(frozen=True)
class Prior:
    """A network with what is needed to use it; fields as in the module's docstring."""
    net: nn.Module
    kind: str
    voxel_size: float
    box: int
    mean: float
    std: float
    sha256: str                      # of the file
    task: str = ""
    training: dict | None = None


def save(path, net: nn.Module, *, voxel_size: float, box: int, mean: float, std: float, task: str = "",
         training: dict | None = None, half: bool = False) -> None:
    """Write a checkpoint; a crash or kill -9 at any byte leaves the previous file whole.

    half: store floating-point weights as float16 (half the size; loaded back as float32), for files that ship.
    Raises OSError if it cannot be written: no such folder, a full disk.
    """
    kind = next(k for k, (cls, _) in NETWORKS.items() if isinstance(net, cls))
    weights = {k: v.detach().cpu() for k, v in net.state_dict().items()}
    if half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    content = dict(kind=kind, config=asdict(net.config), weights=weights, voxel_size=float(voxel_size), box=int(box),
                   mean=float(mean), std=float(std), task=task, training=training)
    with atomic_write(Path(path)) as file:
        torch.save(content, file)


def load(path, *, kind: str | None = None, device="cpu", time_phase: str = "float32") -> Prior:
    """Read a checkpoint, or the authors' `model.safetensors`; the network comes in eval mode, float32, without gradients.

    kind: the network the caller can use ("hdit", "scunet"). time_phase: only for the authors' weights (see model_hdit).
    Raises OSError if the file cannot be read and ValueError if it is no checkpoint, or one of another kind.
    """
    path = Path(path)
    content = read_public_hdit(path, time_phase) if path.suffix == ".safetensors" else read(path)
    if kind is not None and content["kind"] != kind:
        raise ValueError(f"{path}: holds a {content['kind']} network, this task needs {kind}; give another --ckpt")
    network, config = NETWORKS[content["kind"]]
    try:
        net = network(config(**content["config"]))
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in content["weights"].items()})
    except (TypeError, RuntimeError) as error:           # an unknown field; a tensor missing, left over or misshapen
        raise ValueError(f"{path}: its weights do not fit this version's {network.__name__}: "
                         f"{' '.join(str(error).split())}") from error
    meta = {k: content[k] for k in ("kind", "voxel_size", "box", "mean", "std")}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Prior(net.to(device).eval().requires_grad_(False), sha256=sha256, task=content.get("task", ""),
                 training=content.get("training"), **meta)


# What zipfile and torch.load raise for a file that is not theirs, is cut short or has a bit flipped, found by feeding them such.
DAMAGED = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, UnicodeDecodeError, OSError)


def read(path) -> dict:
    """The dict of a checkpoint, checked. torch.load alone would not notice a damaged weight; the archive's CRC-32 does."""
    with open(path, "rb") as file:                       # OSError: no such file, a folder, no permission
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("wrong CRC-32")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            raise ValueError(f"{path}: not a checkpoint of this project, or a damaged one ({type(error).__name__}); "
                             "copy it again or give another") from error
    if not isinstance(content, dict) or not KEYS <= content.keys() or content["kind"] not in NETWORKS:
        raise ValueError(f"{path}: a PyTorch file, but not a checkpoint of this project ({', '.join(NETWORKS)})")
    return content


def read_public_hdit(path, time_phase: str) -> dict:
    """The authors' `model.safetensors`, as a checkpoint: config from the shapes, the rest from the paper.

    CryoFM-S is 64^3 at 1.5 Å, CryoFM-L (three levels) 128^3 at 3 Å (section 4.1); values (x - 0.04) / 0.09 (section 4.2).
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: reading .safetensors needs one more package: pip install safetensors") from None
    try:
        weights = load_file(path)
        config = infer_config(weights, time_phase)
    except (SafetensorError, KeyError) as error:         # KeyError: a tensor that every HDiT has
        raise ValueError(f"{path}: not the weights of an HDiT, or a damaged file ({error})") from error
    large = len(config.widths) == 3
    return dict(kind="hdit", config=asdict(config), weights=weights, voxel_size=3.0 if large else 1.5,
                box=128 if large else 64, mean=0.04, std=0.09)


def infer_config(weights: dict, time_phase: str = "float32") -> HDiTConfig:
    """HDiTConfig from the shapes of a state dict; the kernel size, which no shape shows, is the paper's 7."""
    layers = lambda prefix: len({k.split(".")[prefix.count(".")] for k in weights if k.startswith(prefix)})
    levels = layers("down_levels.")
    width, voxels = weights["patch_in.proj.weight"].shape
    widths = [width] + [weights[f"merges.{i}.proj.weight"].shape[0] for i in range(levels)]
    heads = weights["mid_level.0.self_attn.scale"].shape[0]
    return HDiTConfig(patch_size=round(voxels ** (1 / 3)), widths=tuple(widths), d_head=widths[-1] // heads,
                      depths=tuple(layers(f"down_levels.{i}.") for i in range(levels)) + (layers("mid_level."),),
                      mapping_width=weights["time_in_proj.weight"].shape[1],
                      ff_mult=weights["mid_level.0.ff.down_proj.weight"].shape[1] // widths[-1], time_phase=time_phase)
