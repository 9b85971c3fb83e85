"""How many training crops of S a second one process makes from prepared maps, and how many a GPU needs.

python tests/benchmark_train.py                # about a minute, one thread, 30 maps of 256^3 in a temporary folder
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
import train
import train_config
import train_dry_run


def main(maps=30, box=256, seconds=5.0):
    torch.set_num_threads(1)
    cfg = train_config.PRESETS["s"]
    with tempfile.TemporaryDirectory() as folder:
        x = torch.nn.functional.interpolate(
            torch.rand(1, 1, 16, 16, 16), size=(box,) * 3, mode="trilinear"
        )[0, 0]
        x = (x * 2 - 1.2).clamp(0, 1).half().numpy()  # blobs, most of it solvent
        for i in range(maps):
            np.save(Path(folder) / f"emd_{i}.npy", x)
        (Path(folder) / data_prepare.SETTINGS).write_text(json.dumps(dict(voxel_size=1.5)))
        (Path(folder) / data_prepare.INDEX).write_text(
            "entry,skipped,file\n" + "".join(f"emd_{i},,x\n" for i in range(maps))
        )
        volumes, _ = data.read_volumes(folder, 1.5)
        for name, settings in (
            ("cut out, for the GPU to turn", dict(finished=False)),
            ("turned trilinearly", dict(cubic=False)),
            ("turned by cubic splines", dict(cubic=True)),
        ):
            crops = data.MapCrops(
                volumes,
                crop=cfg.crop,
                crops=cfg.crops_per_map,
                mean=cfg.mean,
                std=cfg.std,
                **settings,
            )
            crops[0]
            since, n = (
                time.process_time(),
                0,
            )  # of this process alone, on a machine that others share
            while time.process_time() - since < seconds:
                n += 1
                crops[n]
            print(
                f"{name:30} {n * cfg.crops_per_map / (time.process_time() - since):7.1f} crops per second of one core"
            )
    flop = 6 * train_dry_run.multiply_adds(cfg.net, cfg.crop)
    for name, (peak, _) in train.GPUS.items():
        need = train.UTILISATION * peak / flop
        print(
            f"one {name} at {train.UTILISATION:.0%} of its bf16 peak needs {need:5.0f} crops/s (arithmetic)"
        )


if __name__ == "__main__":
    main()
