"""examples/train.slurm: one process per task, resumed by itself, queued again when time is up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What stands for the cluster's programs and for Python. srun starts two tasks and hands them its
# signals. The "training" saves a checkpoint when SIGUSR1 comes.
SRUN = """#!/bin/bash
echo "$@" >> srun.txt
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    tasks="$tasks $!"
done
trap 'kill -USR1 $tasks' USR1
code=0
for task in $tasks; do
    wait $task
    while kill -0 $task 2> /dev/null; do wait $task; done
    wait $task || code=$?
done
exit $code
"""
PYTHON = """#!/bin/bash
echo "$RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE" >> ranks.txt
echo "$MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK $OMP_NUM_THREADS" >> world.txt
echo "$@" >> python.txt
trap 'touch runs/s/checkpoint.pt; exit 0' USR1
touch started.$RANK
[[ $FAILS ]] && exit 3
[[ -e runs/s/checkpoint.pt ]] && exit 0
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && printf 'node7\\nnode8\\n'
[[ $1 == requeue ]] && echo "$2" >> requeued.txt
"""
JOB = dict(
    SLURM_JOB_ID="41234",
    SLURM_JOB_NODELIST="node[7-8]",
    SLURM_CPUS_PER_TASK="4",
    SLURM_NTASKS="2",
    SLURM_NTASKS_PER_NODE="2",
)


@pytest.fixture
def cluster(tmp_path):
    """A folder with stubs of the cluster's programs; a function that starts the script there."""
    for name, text in dict(srun=SRUN, python=PYTHON, scontrol=SCONTROL).items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "runs/s").mkdir(parents=True)

    def start(**environment):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["bash", str(ROOT / "examples/train.slurm"), "--model", "s", "--out", "runs/s"]
        env = {**os.environ, **JOB, **environment, "PATH": path}
        return subprocess.Popen(command, cwd=tmp_path, env=env)

    return start


def test_a_job_whose_time_is_up_saves_is_queued_again_and_resumes(cluster, tmp_path):
    job = cluster()
    while not (tmp_path / "started.0").exists() or not (tmp_path / "started.1").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "runs/s/checkpoint.pt").exists()
    assert (tmp_path / "requeued.txt").read_text() == "41234\n"
    ranks = sorted((tmp_path / "ranks.txt").read_text().splitlines())
    assert ranks == ["0 of 2, 0 of 2", "1 of 2, 1 of 2"]
    assert set((tmp_path / "world.txt").read_text().splitlines()) == {"node7 21234 4 1"}
    typed = "-u train.py --workers 3 --model s --out runs/s"
    assert (tmp_path / "python.txt").read_text().splitlines() == [typed] * 2

    # The next part resumes, ends by itself, and is not queued again.
    assert cluster().wait(timeout=60) == 0
    lines = (tmp_path / "python.txt").read_text().splitlines()
    assert lines[2:] == [typed + " --resume"] * 2
    assert (tmp_path / "requeued.txt").read_text() == "41234\n"


def test_a_job_that_fails_is_not_queued_again(cluster, tmp_path):
    assert cluster(FAILS="yes").wait(timeout=60) == 3
    assert not (tmp_path / "requeued.txt").exists()
