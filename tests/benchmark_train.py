"""How many training crops of CryoFM-S a second one core makes from prepared maps.

    python tests/benchmark_train.py

It takes about a minute, in one thread, with 30 maps of 256^3 in a temporary folder.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import data_prepare
import train_dry_run
import train_presets

WAYS = {
    "cut out, for the GPU to turn": dict(rotate_later=True),
    "turned trilinearly": dict(cubic=False),
    "turned by cubic splines": dict(cubic=True),
}


def write_maps(folder: Path, count: int, box: int) -> None:
    """A prepared folder: one map of blobs, most of it solvent, many times."""
    noise = torch.rand(1, 1, 16, 16, 16)
    x = torch.nn.functional.interpolate(noise, size=(box,) * 3, mode="trilinear")[0, 0]
    x = (x * 2 - 1.2).clamp(0, 1).half().numpy()
    rows = ["entry,skipped,file"]
    for i in range(count):
        np.save(folder / f"emd_{i}.npy", x)
        rows.append(f"emd_{i},,x")
    (folder / data_prepare.INDEX).write_text("\n".join(rows) + "\n")
    (folder / data_prepare.SETTINGS).write_text(json.dumps(dict(voxel_size=1.5)))


def crops_per_second(crops: data.MapCrops, seconds: float) -> float:
    """Of processor time, because other programs may share the machine."""
    crops[0]
    count = 0
    since = time.process_time()
    while time.process_time() - since < seconds:
        count += 1
        crops[count]
    return count * crops.crops / (time.process_time() - since)


def main(maps=30, box=256, seconds=5.0):
    torch.set_num_threads(1)
    cfg = train_presets.PRESETS["s"]
    with tempfile.TemporaryDirectory() as folder:
        write_maps(Path(folder), maps, box)
        volumes, _ = data.read_volumes(folder, 1.5)
        common = dict(crop=cfg.crop, crops=cfg.crops_per_map, mean=cfg.mean, std=cfg.std)
        for name, settings in WAYS.items():
            rate = crops_per_second(data.MapCrops(volumes, **common, **settings), seconds)
            print(f"{name:30} {rate:7.1f} crops per second of one core")
    flop = 6 * train_dry_run.multiply_adds(cfg.net, cfg.crop)
    print(f"training on one crop: {flop / 1e12:.2f} TFLOP, so a GPU at F TFLOP/s needs F / that")


if __name__ == "__main__":
    main()
