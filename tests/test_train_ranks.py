"""train_ranks.py: several ranks take the steps that one takes, and stop together."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import atoms, log_rows, maps, run, small_presets, stop_after

import checkpoint
import train_ranks

ROOT = Path(__file__).parent.parent

# A rank of train.py. In step 3, which has two micro-batches, something happens to rank 1.
RANK = """
import os, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import small_runs, train
train.PRESETS.update(small=small_runs.SMALL, **small_runs.SCUNETS)
losses, calls = train.losses, []
def losses_of_rank(*args):
    calls.append(0)
    if len(calls) == 5 and os.environ["RANK"] == "1" and {signum}:
        os.kill(os.getpid(), {signum})
    loss, bucket = losses(*args)
    bad = {nan} and len(calls) == 6 and os.environ["RANK"] == "1"
    return loss * (torch.nan if bad else 1), bucket
train.losses = losses_of_rank
try:
    train.main({flags!r})
except ValueError as error:
    sys.exit(f"train.py: {{error}}")
"""


def two_ranks(out, data, signum=0, nan=False, model="small"):
    flags = ["--model", model, "--data", str(data), "--out", str(out), "--steps", "500"]
    flags += ["--batch", "8", "--micro-batch", "2", "--save-every", "2"]
    if model == "small":
        flags += ["--decay", "0"]
    script = out.with_suffix(".py")
    script.write_text(RANK.format(root=str(ROOT), signum=int(signum), nan=nan, flags=flags))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("WORLD_SIZE", "0", "RANK=0 and WORLD_SIZE=0 in the environment"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two in the environment"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK=-1 in the environment"),
        ("RANK", "3", "RANK=3 and WORLD_SIZE=1 in the environment"),
    ],
)
def test_ranks_that_cannot_be_are_refused(monkeypatch, name, value, says):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        train_ranks.Ranks()


def test_nohup_outlives_the_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train_ranks.StopSignals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path, maps):
    out = tmp_path / "a"
    flags = ["--model", "small", "--data", str(maps), "--out", str(out)]
    script = RANK.format(root=str(ROOT), signum=0, nan=False, flags=flags)
    command = [sys.executable, "-c", script]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env={**os.environ, "RANK": "0"}, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()  # as `head -1` does
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert errors == ""
    assert checkpoint.read(out / "checkpoint.pt")["training"]["step"] == 4


def test_two_ranks_take_the_steps_of_one_stop_together_and_are_resumed_by_one(tmp_path, maps):
    done = two_ranks(tmp_path / "two", maps, signal.SIGTERM)  # to one of them
    # gloo sometimes aborts at the exit of the interpreter: what counts is what was saved.
    assert (tmp_path / "two/checkpoint.pt").exists(), done.stdout + done.stderr
    two = checkpoint.read(tmp_path / "two/checkpoint.pt")
    assert "stopped by a signal after step 3" in done.stdout
    assert done.stdout.count("M parameters, cpu, 2 rank(s) x 2 x 2 crops") == 1
    settings = dict(data=maps, decay=0, batch=8, micro_batch=2)
    one = run(tmp_path / "one", steps=3, **settings)
    assert two["training"]["step"] == one["training"]["step"] == 3

    def assert_close(two, one):  # steps of 0.01; the order of a sum differs
        for key, value in one["training"]["net"].items():
            torch.testing.assert_close(two["training"]["net"][key], value, rtol=0, atol=1e-3)
        rows, want = log_rows(tmp_path / "two"), log_rows(tmp_path / "one")
        for row, other in zip(rows[1:], want[1:], strict=True):
            np.testing.assert_allclose(np.float64(row[1:3]), np.float64(other[1:3]), rtol=1e-3)

    assert_close(two, one)
    two = run(tmp_path / "two", "--resume", steps=5, **settings)
    one = run(tmp_path / "one", "--resume", steps=5, **settings)
    assert_close(two, one)


@pytest.mark.parametrize("model", ["small-jepa", "small-sharpen"])
def test_two_ranks_train_cryolvm_as_one_does(tmp_path, atoms, monkeypatch, model):
    done = two_ranks(tmp_path / "two", atoms, signal.SIGTERM, model=model)
    assert (tmp_path / "two/checkpoint.pt").exists(), done.stdout + done.stderr
    two = checkpoint.read(tmp_path / "two/checkpoint.pt")["training"]
    stop_after(3, monkeypatch)
    settings = dict(model=model, data=atoms, batch=8, micro_batch=2, steps=500)
    one = run(tmp_path / "one", **settings)["training"]
    assert two["step"] == one["step"] == 3
    # The order of a sum differs, and Adam's first steps are of size lr.
    if model == "small-sharpen":
        assert two["plateau"]["last_epoch"] == 3
        assert two["plateau"]["best"] == pytest.approx(one["plateau"]["best"], rel=2e-3)
    # A small gradient may change its sign.
    for part in ("net", "target") if model == "small-jepa" else ("net",):
        for key, value in one[part].items():
            close = (two[part][key] - value).abs() < 2e-3
            assert close.float().mean() > 0.95, key


def test_a_rank_that_is_killed_ends_the_others_and_leaves_the_last_checkpoint(tmp_path, maps):
    done = two_ranks(tmp_path / "dead", maps, signal.SIGKILL)
    assert done.returncode and "SIGKILL" in done.stderr.upper()
    saved = checkpoint.read(tmp_path / "dead/checkpoint.pt")
    assert saved["training"]["step"] == 2
    assert [row[0] for row in log_rows(tmp_path / "dead")] == ["step", "1", "2"]


def test_a_loss_that_is_not_finite_stops_all_ranks_after_saving_and_names_the_batch(tmp_path, maps):
    done = two_ranks(tmp_path / "nan", maps, nan=True)
    assert done.returncode
    # Step 3, the second of two micro-batches of rank 1 of 2: number (2 * 2 + 1) * 2 + 1 = 11,
    # with one map in each.
    line = (
        "train.py: step 3: the loss is not finite in micro-batch 11, items 11 to 11 of the data, "
        "on rank 1; saved as it was after step 2, --resume it with a lower --lr"
    )
    assert line in done.stderr and "Traceback" not in done.stderr.split(line)[0]
    saved = checkpoint.read(tmp_path / "nan/checkpoint.pt")["training"]
    assert saved["step"] == 2
    one = run(tmp_path / "one", data=maps, decay=0, batch=8, micro_batch=2, steps=2)
    for key, value in one["training"]["net"].items():
        torch.testing.assert_close(saved["net"][key], value, rtol=0, atol=1e-3)


# A run whose data worker fails at item 6.
WORKER = """
import os, runpy, signal, sys, torch
sys.path.insert(0, {root!r})
import data
def failing(self, i, get=data.MapCrops.__getitem__):
    if i == 6 and torch.utils.data.get_worker_info():
        {fails}
    return get(self, i)
data.MapCrops.__getitem__ = failing
sys.argv = ["train.py", *{flags!r}]
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "fails, says, lines",
    [
        ("open('/gone.npy')", "train.py: FileNotFoundError: [Errno 2] No such file or", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal: Killed", None),
    ],
)
def test_a_run_ends_when_a_data_worker_fails(tmp_path, maps, fails, says, lines):
    settings = dict(data=maps, out=tmp_path / "a", crop=16, batch=4, steps=50, workers=1)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags.append("--held-out-crops=4")
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(root=str(ROOT), fails=fails, flags=flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,  # it must not wait for its workers forever
    )
    assert done.returncode == 1 and says in done.stderr
    assert lines is None or done.stderr.count("\n") == lines, done.stderr
