"""Files that hold a network: weights, config, what is needed to use it, and the state of training.

A checkpoint is one dict that `torch.load(weights_only=True)` reads, so that opening a file from a
stranger runs no code:

    kind         which network, a key of NETWORKS
    config       fields of its config
    weights      its state dict: averaged (EMA) weights, the ones to use
    voxel_size   Å, the sampling the network was trained at
    box          voxels per side of its training crops: the tile that sampling.py evaluates
    mean, std    network value = (density / 99.999 percentile - mean) / std; 0 and 1 for "scunet"
    percentiles  of a map that become 0 and 1 before mean and std: volume.CLIP, or LITERAL
    task         "" for "hdit": the objective, such as "jepa", "mae", "sharpen", "vae"
    fill         "wedge3d" only: what the wedge held in training, "zeros" or "pocs" (data_wedges.py)
    references   "hdit" only: densities it was trained on, uint8 (n, box, box, box), 255 for the
                 99.999 percentile of the map each was cut from; grey_scale.py compares with them
    training     None, or in train.py's own files: raw weights, optimiser states, step, flags

The authors' public CryoFM weights (`model.safetensors`) load by path too. Their sizes follow from
the shapes. What shapes cannot tell, the precision of training, is in the `config.yaml` beside them.
"""

import hashlib
import pickle
import re
import reprlib
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from files import atomic_write
from model_baselines import VAE, LatentFlow, LatentFlowConfig, VAEConfig, ViT, ViTConfig
from model_hdit import HDiT, HDiTConfig
from model_scunet import SCUNet, SCUNetConfig
from terminal import say
from volume import CLIP

# kind -> the class of the network and of its config.
NETWORKS = {
    "hdit": (HDiT, HDiTConfig),
    "scunet": (SCUNet, SCUNetConfig),
    "vit": (ViT, ViTConfig),
    "vae": (VAE, VAEConfig),
    "lfm": (LatentFlow, LatentFlowConfig),
}
# What every checkpoint has. Older files lack "percentiles", "task", "training" or "references".
KEYS = {"kind", "config", "weights", "voxel_size", "box", "mean", "std"}

# What zipfile and torch.load raise for a file of another kind, cut short or with a bit flipped.
DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    UnicodeDecodeError,
    OSError,
)

# What building a network raises for a config of wrong fields, types or values, and for weights that
# are missing, left over or of another shape.
UNFIT = (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, LookupError)

# No network of this project comes near these. Beyond, a damaged number would fill all memory.
MOST_BLOCKS = 1000
MOST_BOX = 1024

# `precision` in the release's config.yaml, and the dtype that autocast then has.
AUTOCAST = {
    "16": "float16",
    "16-mixed": "float16",  # CryoFM-S
    "bf16": "bfloat16",  # CryoFM-L
    "bf16-mixed": "bfloat16",
    "32": "float32",
    "32-true": "float32",
}


@dataclass(frozen=True)
class Prior:
    """A network with what is needed to use it; fields as in the module's docstring."""

    net: nn.Module
    kind: str
    voxel_size: float
    box: int
    mean: float
    std: float
    sha256: str  # of the file
    percentiles: tuple[float, float] = CLIP
    task: str = ""
    fill: str = "zeros"
    training: dict | None = None
    references: Tensor | None = None


def kind_of(config) -> str:
    """The key of NETWORKS whose config this is."""
    return next(kind for kind, (_, sizes) in NETWORKS.items() if type(config) is sizes)


def save(
    path,
    net: nn.Module,
    *,
    voxel_size: float,
    box: int,
    mean: float,
    std: float,
    percentiles: tuple[float, float] = CLIP,
    task: str = "",
    fill: str = "zeros",
    training: dict | None = None,
    references: Tensor | None = None,
    half: bool = False,
) -> None:
    """Write a checkpoint; a crash or kill -9 at any byte leaves the previous file as it was.

    half: store the weights as float16 (half the size, loaded back as float32), for files that ship.
    Raises OSError if it cannot be written: no such folder, a full disk.
    """
    # On the CPU, so that the file opens on a machine without a GPU.
    weights = {key: value.detach().cpu() for key, value in net.state_dict().items()}
    if half:
        weights = {key: value.half() for key, value in weights.items()}

    # Plain numbers, strings, dicts and tensors: what weights_only=True accepts.
    content = dict(
        kind=kind_of(net.config),
        config=asdict(net.config),
        weights=weights,
        voxel_size=float(voxel_size),
        box=int(box),
        mean=float(mean),
        std=float(std),
        percentiles=tuple(percentiles),
        task=task,
        fill=fill,
        training=training,
        references=references,
    )

    # The file appears when it is complete.
    with atomic_write(Path(path)) as file:
        torch.save(content, file)


def load(
    path, *, kind: str | None = None, device="cpu", time_phase: str | None = None, say=say
) -> Prior:
    """Read a checkpoint, or the authors' `model.safetensors`.

    The network comes in eval mode, float32, without gradients. kind: the network that the caller
    can use ("hdit", "scunet"). time_phase: see `read_public_hdit`; only for the authors' weights.
    say: gets a line on what was taken for these.
    Raises OSError if the file cannot be read, and ValueError if it is no checkpoint, a damaged one,
    or one of another kind.
    """
    # Both kinds of file give the same dict.
    path = Path(path)
    public = path.suffix == ".safetensors"
    if time_phase and not public:
        raise ValueError(f"{path}: a checkpoint has its own time phase; drop --time-phase")
    content = read_public_hdit(path, time_phase, say) if public else read(path)
    if kind is not None and content["kind"] != kind:
        raise ValueError(
            f"{path}: holds a {content['kind']} network, wanted is {kind}; give another file"
        )
    net = build(path, content)
    fields = {name: content[name] for name in ("kind", "voxel_size", "box", "mean", "std")}
    return Prior(
        net=net.to(device).eval().requires_grad_(False),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        percentiles=tuple(content.get("percentiles", CLIP)),
        task=content.get("task", ""),
        fill=content.get("fill", "zeros"),
        training=content.get("training"),
        references=content.get("references"),
        **fields,
    )


def build(path, content: dict) -> nn.Module:
    """The network of a checkpoint's dict, with its weights; ValueError if they do not fit."""
    network, config_class = NETWORKS[content["kind"]]
    # Files that ship hold float16.
    weights = {key: value.float() for key, value in content["weights"].items()}
    try:
        config = config_class(**content["config"])
        # Each block costs time to build, also on the meta device.
        layers = getattr(config, "layers", 0)  # "lfm" only
        if sum(config.depths) + len(config.depths) + layers > MOST_BLOCKS:
            raise ValueError(f"more than {MOST_BLOCKS} blocks and levels")
        # Try on the meta device first, which takes no memory however wide a damaged config is.
        with torch.device("meta"):
            network(config).load_state_dict(weights, assign=True)

        # Now for real: the sizes are those of the file.
        net = network(config)
        net.load_state_dict(weights)
    except UNFIT as error:
        # torch names every tensor that does not fit. The first ones say enough.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: its weights do not fit this version's {network.__name__}: {reason[:300]}"
        ) from error
    return net


def read(path) -> dict:
    """The dict of a checkpoint, checked. Errors: see `load`."""
    # torch.load alone does not notice a damaged weight. The CRC-32 of the archive does.
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("wrong CRC-32")
            # weights_only: a pickle could run code otherwise.
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            raise ValueError(
                f"{path}: not a checkpoint of this project, or a damaged one "
                f"({type(error).__name__}); copy it again or give another"
            ) from error

    # A file of another program?
    is_ours = isinstance(content, dict) and content.keys() >= KEYS
    if not is_ours or content["kind"] not in list(NETWORKS):
        raise ValueError(
            f"{path}: a PyTorch file, but not a checkpoint of this project ({', '.join(NETWORKS)})"
        )
    check_fields(path, content)
    return content


def check_fields(path, content: dict) -> None:
    """Raise ValueError if a field has a type or value that no training run writes."""

    def is_number(value, low, high):
        return type(value) in (int, float) and low < value < high  # false for nan

    def is_references(value):
        if value is None:
            return True
        if not torch.is_tensor(value) or value.dtype != torch.uint8 or value.ndim != 4:
            return False
        # Two cubes at least, with density and with solvent.
        count, *sides = value.shape
        cubes = count >= 2 and min(sides) == max(sides) >= 2
        return cubes and bool(value.max() > value.min())

    def is_range(value):
        numbers = isinstance(value, list | tuple) and len(value) == 2
        return numbers and is_number(value[1], 0, 101) and is_number(value[0], -1, value[1])

    # The config is checked in `build`, which knows its network.
    weights = content["weights"]
    is_right = {
        "weights": isinstance(weights, dict)
        and all(torch.is_tensor(w) and w.is_floating_point() for w in weights.values()),
        "config": isinstance(content["config"], dict),
        "voxel_size": is_number(content["voxel_size"], 0, 1e6),
        "box": type(content["box"]) is int and 0 < content["box"] <= MOST_BOX,
        "mean": is_number(content["mean"], -1e6, 1e6),
        "std": is_number(content["std"], 0, 1e6),
        "percentiles": is_range(content.get("percentiles", CLIP)),
        "task": isinstance(content.get("task", ""), str),
        "fill": content.get("fill", "zeros") in ("zeros", "pocs"),
        "training": isinstance(content.get("training"), dict | None),
        "references": is_references(content.get("references")),
    }

    # Name the first field that is wrong, with its value cut short.
    for name, right in is_right.items():
        if not right:
            value = " ".join(reprlib.repr(content[name]).split())
            raise ValueError(
                f"{path}: damaged, its {name} cannot be {value}; copy it again or give another"
            )


def read_public_hdit(path: Path, time_phase: str | None, say) -> dict:
    """The authors' `model.safetensors`, as a checkpoint: config from the shapes, the rest by paper.

    CryoFM-S is 64^3 at 1.5 Å, CryoFM-L (three levels) 128^3 at 3 Å (section 4.1). The values are
    (x - 0.04) / 0.09 (section 4.2).
    time_phase: dtype of the time phases and of the innermost rotary angles ("float32", "float16",
    "bfloat16"). None takes those of training from the `config.yaml` beside the file, and float32
    without one. say: gets a line on it.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(
            f"{path}: reading .safetensors needs one more package: pip install safetensors"
        ) from None
    phases = time_phase, time_phase
    source = "as asked"
    if time_phase is None:
        phases, source = phases_of_training(path.with_name("config.yaml"))
    try:
        weights = load_file(path)
        config = infer_config(weights, *phases)
    except (SafetensorError, *UNFIT) as error:
        raise ValueError(
            f"{path}: not the weights of an HDiT, or a damaged file ({error})"
        ) from error
    say(
        f"{path}: time phases in {config.time_phase}, rotary angles in {config.rotary_phase} "
        f"({source}); times are rounded to whole thousandths"
    )

    # The file has nothing else, so the rest is what the paper says.
    large = len(config.widths) == 3
    return dict(
        kind="hdit",
        config=asdict(config),
        weights=weights,
        voxel_size=3.0 if large else 1.5,
        box=128 if large else 64,
        mean=0.04,
        std=0.09,
    )


def phases_of_training(config: Path) -> tuple[tuple[str, str], str]:
    """((dtype of time phases, of rotary angles), where they are from), by the release's config.

    Under autocast both are in half precision, unless `use_fp32_time_emb` is set. (The release
    ignores `use_fp32_rope`.) Raises ValueError if the file does not say one precision.
    """
    if not config.exists():
        return ("float32", "float32"), "no config.yaml beside it; --time-phase takes another"

    # Two lines of it matter, so no YAML reader is needed.
    text = config.read_text(errors="replace")
    found = set(re.findall(r"^\s*precision:\s*['\"]?([\w-]+)", text, re.MULTILINE))
    precision = found.pop() if len(found) == 1 else None
    if precision not in AUTOCAST:
        raise ValueError(
            f"{config}: says no precision of {', '.join(AUTOCAST)}, or several; give --time-phase"
        )
    exact = re.search(r"^\s*use_fp32_time_emb:\s*true", text, re.MULTILINE | re.IGNORECASE)
    half = AUTOCAST[precision]
    return ("float32" if exact else half, half), f"config.yaml: precision {precision}"


def infer_config(weights: dict, time_phase: str, rotary_phase: str) -> HDiTConfig:
    """HDiTConfig from the shapes of a state dict; the kernel size, which no shape shows, is 7.

    The release draws whole thousandths of t, for S and for L.
    """

    def count(prefix):
        # How many numbers follow the prefix in the names: levels of a network, blocks of a level.
        position = prefix.count(".")
        return len({key.split(".")[position] for key in weights if key.startswith(prefix)})

    # Levels above the middle one are listed twice, down and up. Count those on the way down.
    levels = count("down_levels.")
    depths = [count(f"down_levels.{i}.") for i in range(levels)]

    # Each layer that merges patches tells the width of the next level.
    width, voxels = weights["patch_in.proj.weight"].shape
    widths = [width] + [len(weights[f"merges.{i}.proj.weight"]) for i in range(levels)]

    # The feed-forward layers of the middle level, which every network has, tell ff_mult.
    heads = len(weights["mid_level.0.self_attn.scale"])
    hidden = weights["mid_level.0.ff.down_proj.weight"].shape[1]
    return HDiTConfig(
        patch_size=round(voxels ** (1 / 3)),
        widths=tuple(widths),
        depths=(*depths, count("mid_level.")),
        d_head=widths[-1] // heads,
        mapping_width=weights["time_in_proj.weight"].shape[1],
        ff_mult=hidden // widths[-1],
        time_phase=time_phase,
        rotary_phase=rotary_phase,
        whole_thousandths=True,
    )
