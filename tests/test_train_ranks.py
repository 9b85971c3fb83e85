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
import train
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
        timeout=1200,
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
    # Rank 1 got it in step 3, and every rank learns of it in the next one.
    assert "stopped by a signal after step 4" in done.stdout
    assert done.stdout.count("M parameters, cpu, 2 rank(s) x 2 x 2 crops") == 1
    settings = dict(data=maps, decay=0, batch=8, micro_batch=2)
    one = run(tmp_path / "one", steps=4, **settings)
    assert two["training"]["step"] == one["training"]["step"] == 4

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
    stop_after(4, monkeypatch)
    settings = dict(model=model, data=atoms, batch=8, micro_batch=2, steps=500)
    one = run(tmp_path / "one", **settings)["training"]
    assert two["step"] == one["step"] == 4
    # Sums differ in their last digit with ranks and threads. Adam's first steps are of size lr, so
    # that 1e-7 in the first loss has become 1e-2 in the fourth.
    if model == "small-sharpen":
        assert two["plateau"]["last_epoch"] == 4
        held_out, want = (
            [float(row[5]) for row in log_rows(tmp_path / name)[1:]] for name in ("two", "one")
        )
        assert held_out[0] == pytest.approx(want[0], rel=1e-3)
        assert held_out == pytest.approx(want, rel=3e-2)
        assert two["plateau"]["best"] == pytest.approx(min(held_out), rel=1e-3)
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
        f"on rank 1; {tmp_path / 'nan/checkpoint.pt'} is still the one of an earlier step: --resume"
    )
    assert line in done.stderr and "Traceback" not in done.stderr.split(line)[0]
    saved = checkpoint.read(tmp_path / "nan/checkpoint.pt")["training"]
    assert saved["step"] == 2
    one = run(tmp_path / "one", data=maps, decay=0, batch=8, micro_batch=2, steps=2)
    for key, value in one["training"]["net"].items():
        torch.testing.assert_close(saved["net"][key], value, rtol=0, atol=1e-3)


# Several runs of train.py, one after the other, by the same two ranks.
RUNS = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import small_runs, train, train_ranks
import torch.distributed as dist
train.PRESETS.update(small_runs.PRESETS)
dist.init_process_group("gloo")
leave = train_ranks.Ranks.leave
train_ranks.Ranks.join = train_ranks.Ranks.leave = lambda ranks: None
for flags in {runs!r}:
    train.main(flags)
leave(train_ranks.Ranks())
"""


def two_ranks_run(folder, data, runs):
    """Runs, each a folder's name and its flags, on two ranks."""
    common = ["--batch", "8", "--micro-batch", "2"]
    runs = [
        [*common, "--data", str(data), "--out", str(folder / out), *rest] for out, *rest in runs
    ]
    script = folder / "runs.py"
    script.write_text(RUNS.format(root=str(ROOT), runs=runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sharded_run_has_the_losses_of_ddp_and_each_resumes_the_other(tmp_path, maps):
    flags = ["--model", "small", "--decay", "0", "--steps"]
    runs = [("ddp", *flags, "3"), ("sharded", *flags, "3", "--shard")]
    runs += [("ddp", *flags, "5", "--resume", "--shard"), ("sharded", *flags, "5", "--resume")]
    two_ranks_run(tmp_path, maps, runs)
    settings = dict(data=maps, decay=0, batch=8, micro_batch=2)
    one = run(tmp_path / "one", steps=5, **settings)["training"]
    want = log_rows(tmp_path / "one")
    for out in ("ddp", "sharded"):
        two = checkpoint.read(tmp_path / out / "checkpoint.pt")["training"]
        assert two["step"] == 5 and two["net"].keys() == one["net"].keys()
        for key, value in one["net"].items():  # steps of 0.01; the order of a sum differs
            torch.testing.assert_close(two["net"][key], value, rtol=0, atol=1e-3)
        for row, other in zip(log_rows(tmp_path / out)[1:], want[1:], strict=True):
            np.testing.assert_allclose(np.float64(row[1:3]), np.float64(other[1:3]), rtol=1e-3)


@pytest.mark.parametrize(
    "model, flags", [("small", ["--optimizer", "muon"]), ("small-jepa", ["--lr", "1e-3"])]
)
def test_muon_and_the_target_encoder_are_sharded_as_they_are_whole(tmp_path, atoms, model, flags):
    flags = ["--model", model, "--steps", "3", *flags]
    two_ranks_run(tmp_path, atoms, [("ddp", *flags), ("sharded", *flags, "--shard")])
    ddp, sharded = (
        checkpoint.read(tmp_path / out / "checkpoint.pt")["training"] for out in ("ddp", "sharded")
    )
    for part in ("net", "target") if model == "small-jepa" else ("net",):
        for key, value in ddp[part].items():
            close = (sharded[part][key] - value).abs() < 1e-3
            assert close.float().mean() > 0.95, key
    # Evaluations too: the losses on held-out crops.
    for row, other in zip(log_rows(tmp_path / "sharded"), log_rows(tmp_path / "ddp"), strict=True):
        if row[5].replace(".", "").isdigit():
            assert float(row[5]) == pytest.approx(float(other[5]), rel=1e-3)


def test_one_process_cannot_shard(tmp_path):
    with pytest.raises(ValueError, match="--shard: one process .* start it with torchrun"):
        train.main(["--model", "small", "--shard", "--out", str(tmp_path / "a")])


class Work:
    """A collective that another rank has not joined yet."""

    waited = False

    def wait(self):
        self.waited = True


def test_ranks_agree_one_step_late_and_wait_for_no_rank_in_the_step_itself(monkeypatch):
    ranks = train_ranks.Ranks()
    ranks.world = 2
    works = []

    def all_reduce(asked, operation, async_op):
        assert async_op and operation == torch.distributed.ReduceOp.MAX
        works.append(Work())
        asked[1] = 1  # the other rank wishes the second
        return works[-1]

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert ranks.agree(True, False) == [False, False]
    assert ranks.agree(False, False) == [True, True]
    assert ranks.agree(False, False) == [False, True]
    assert [work.waited for work in works] == [True, True, False]


def test_workers_make_as_many_batches_ahead_as_half_of_the_shared_memory_holds(
    monkeypatch, tmp_path
):
    free = 1000 * 2**20
    disk = os.statvfs_result((4096, 4096, free, free // 4096, free // 4096, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    monkeypatch.setattr(train_ranks, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    mib = 2**20
    # 250 MiB for each of two ranks.
    assert train_ranks.prefetched(10 * mib, workers=2) == 8
    assert train_ranks.prefetched(25 * mib, workers=2) == 5
    assert train_ranks.prefetched(125 * mib, workers=2) == 1
    with pytest.raises(ValueError, match="2 rank.s. x 2 worker.s. x one batch of 126 MiB"):
        train_ranks.prefetched(126 * mib, workers=2)
    # Where there is no /dev/shm, as on macOS, nothing limits it.
    monkeypatch.setattr(train_ranks, "SHARED_MEMORY", tmp_path / "none")
    assert train_ranks.prefetched(126 * mib, workers=2) == 8


def test_the_number_of_batches_made_ahead_is_printed(tmp_path, maps, capsys):
    run(tmp_path / "a", data=maps, steps=1, workers=1)
    out = capsys.readouterr().out
    # 4 crops of 16^3 numbers of 4 bytes.
    assert "data: 1 worker(s) per rank make up to 8 batches of 0.1 MiB ahead, 0.00 GiB of" in out


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
