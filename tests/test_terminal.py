"""What terminal.py promises: the work goes on without a reader, and every end is one line."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import terminal

HERE = Path(__file__).parent.parent

# A program that prints, works, and writes a file.
PROGRAM = """
import sys, time
from terminal import run_program, say
def main():
    say("3 Å")
    {work}
    open("done", "w").close()
run_program("p.py", main)
"""


def start(tmp_path, work="pass", **settings):
    code = PROGRAM.format(work=work)
    environment = {"PYTHONPATH": str(HERE), "PATH": "/usr/bin:/bin"} | settings.pop("env", {})
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, **settings)


def test_a_closed_pipe_does_not_stop_the_work(tmp_path):
    program = start(tmp_path, "time.sleep(0.5); say('more'); print('and more')")
    program.stdout.readline()
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait() == 0
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_under_the_output_does_not_stop_the_work_and_is_told(tmp_path):
    with open("/dev/full", "w") as full:
        program = start(tmp_path, "say('more'); print('and more')", stdout=full)
        _, errors = program.communicate()
    assert errors == b"cannot print any more (No space left on device); the work goes on\n"
    assert program.returncode == 0
    assert (tmp_path / "done").exists()


def test_a_terminal_that_knows_ascii_only_shows_a_question_mark(tmp_path):
    program = start(tmp_path, env={"PYTHONIOENCODING": "ascii"})
    out, errors = program.communicate()
    assert out == b"3 ?\n" and errors == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_program_in_one_line(tmp_path, number):
    program = start(tmp_path, "time.sleep(60)")
    program.stdout.readline()
    program.send_signal(number)
    _, errors = program.communicate()
    assert errors == b"p.py: stopped, nothing written\n"
    assert program.returncode == 130
    assert not (tmp_path / "done").exists()


def test_an_error_is_one_line_and_a_bug_is_a_traceback(tmp_path):
    program = start(tmp_path, "raise ValueError('in.mrc: is no map')")
    assert program.communicate()[1] == b"p.py: in.mrc: is no map\n"
    assert program.returncode == 1
    program = start(tmp_path, "raise KeyError('bug')")
    assert b"Traceback" in program.communicate()[1]


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.zeros(10**15),
        lambda: torch.zeros(10**18, 10**18),
        lambda: np.zeros(10**15),
        lambda: bytearray(10**15),
    ],
)
def test_running_out_of_memory_is_one_line_with_a_hint(allocate):
    with (
        pytest.raises(ValueError, match="^out of memory; crop it") as caught,
        terminal.one_line_for_memory("crop it"),
    ):
        allocate()
    assert "\n" not in str(caught.value)


def test_another_runtime_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="size of tensor"), terminal.one_line_for_memory("crop"):
        torch.zeros(2) + torch.zeros(3)


PROGRAMS = ["sampling.py", "fsc.py", "train.py", "bench.py", "data_prepare.py"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_of_every_program_prints_on_an_ascii_terminal(name):
    found = subprocess.run(
        [sys.executable, HERE / name, "--help"],
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and found.stderr == ""
    assert "usage:" in found.stdout
