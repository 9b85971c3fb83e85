"""train_log.py: speed is that of the steps, and log.csv of an older version can be continued."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from small_runs import SMALL, log_rows, maps, run, small_presets

import train_dry_run
import train_log
from model_hdit import HDiT


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_evaluations_and_samples_do_not_count_into_the_speed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train_log, "time", clock)
    tally = train_log.Tally("cpu")
    tally.norms = [1.0] * 10
    clock.now += 2
    with tally.paused():
        clock.now += 100  # an evaluation
    clock.now += 3
    assert tally.steps_per_s() == 10 / 5


def test_the_log_holds_seconds_waiting_utilisation_and_precision(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(train_log, "time", clock)
    speed = train_dry_run.Speed("bf16", flop=3e12, peak=1e15)
    cfg = replace(SMALL, steps=100, batch=64)
    said = []
    log = train_log.Log(tmp_path, cfg, 0, speed, said.append)
    tally = train_log.Tally("cpu")
    for _ in range(10):  # steps of 0.4 s, of which data take 0.1 s
        with tally.waiting():
            clock.now += 0.1
        clock.now += 0.3
        tally.count(torch.ones(64), torch.zeros(64, dtype=torch.long))
        tally.count_step(torch.ones(()))
    log.write(10, tally, 1e-3, [])
    header, row = log_rows(tmp_path)
    assert header[-4:] == ["seconds", "data_wait", "mfu", "precision"]
    # 160 crops a second of 3 TFLOP are 0.48 PFLOP/s.
    assert row[-4:] == ["0.4", "0.1", "0.48", "bf16"]
    assert said[0].endswith("waits for data 0.10 s a step  MFU 48%")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", math.nan),
    ],
)
def test_the_peak_is_that_of_the_gpu_and_unknown_of_any_other(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    got = train_dry_run.peak_flops(torch.device("cuda", 0))
    assert got == peak or (math.isnan(got) and math.isnan(peak))


def test_utilisation_counts_forward_and_backward_of_all_crops(monkeypatch):
    monkeypatch.setattr(train_dry_run, "peak_flops", lambda _: 1e12)
    monkeypatch.setenv("CRYO_BF16", "1")
    cfg = replace(SMALL, bf16=True)
    net = HDiT(cfg.net)
    speed = train_dry_run.speed_of(net, net, cfg, torch.device("cpu"), world=8)
    flop = 6 * train_dry_run.multiply_adds(cfg.net, cfg.crop)
    assert speed == ("bf16", flop, 8e12)
    assert speed.mfu(4e12 / flop) == pytest.approx(0.5)
    # In float32 the peak is another one.
    speed = train_dry_run.speed_of(net, net, SMALL, torch.device("cpu"), world=8)
    assert speed.precision == "fp32" and math.isnan(speed.mfu(100.0))


def test_wandb_gets_what_log_csv_holds_as_one_run_or_says_what_to_install(
    tmp_path, maps, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install wandb"):
        run(tmp_path / "none", "--wandb", data=maps, steps=1)
    begun, logged = [], []
    stub = types.ModuleType("wandb")
    stub.init = lambda **settings: begun.append(settings)
    stub.log = lambda values, step: logged.append((step, values["loss"]))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    run(tmp_path / "a", "--wandb", data=maps, steps=2)
    run(tmp_path / "a", "--wandb", "--resume", data=maps, steps=4)
    rows = log_rows(tmp_path / "a")[1:]
    assert logged == [(int(row[0]), pytest.approx(float(row[1]), rel=1e-4)) for row in rows]
    first, second = begun
    assert first["id"] == second["id"] and first["config"]["lr"] == SMALL.lr
    assert (second["resume"], second["dir"]) == ("allow", str(tmp_path / "a"))


def test_the_first_step_is_shown_at_once(tmp_path, maps, capsys):
    settings = dict(data=maps, log_every=50, eval_every=50)
    run(tmp_path / "a", steps=3, **settings)
    assert [row[0] for row in log_rows(tmp_path / "a")] == ["step", "1", "3"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step      1  loss ") for line in lines) == 1

    # Of a resumed run too.
    run(tmp_path / "a", "--resume", steps=6, **settings)
    assert [row[0] for row in log_rows(tmp_path / "a")] == ["step", "1", "3", "4", "6"]


def test_a_resumed_run_gives_an_old_log_the_new_header_and_keeps_its_rows(tmp_path, maps):
    run(tmp_path / "a", data=maps, steps=2)
    path = tmp_path / "a/log.csv"
    assert path.read_text().startswith("step,loss,grad_norm,lr,crops_per_s,held_out_t0.05")
    before = log_rows(tmp_path / "a")
    path.write_text(path.read_text().replace("crops_per_s", "maps_per_s"))
    run(tmp_path / "a", "--resume", data=maps, steps=3)
    rows = log_rows(tmp_path / "a")
    assert rows[:3] == before and len(rows) == 4
