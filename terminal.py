"""How the programs meet the terminal: what they print, and how they end.

say(words)                            `print`, which goes on where nothing can be printed any more
run_program(name, main)               main() with one line for every error; ends the process
one_line_for_memory(hint)             running out of memory becomes a ValueError that gives the hint

A closed pipe (`sampling.py ... | head -1`), a closed terminal and a full disk do not stop the work.
A terminal that knows ASCII only shows "?" for "Å". Ctrl-C, SIGTERM and SIGHUP end a program in one
line and leave no file behind.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

STOPPED = 130  # exit code after Ctrl-C, as in a shell


def say(*words, file=None) -> None:
    """Print a line now. If that fails, this line and all later ones are dropped."""
    stream = file or sys.stdout
    with working_on(stream):
        print(*words, file=stream, flush=True)


@contextlib.contextmanager
def working_on(stream) -> Iterator[None]:
    """Go on if the block cannot print to the stream: nobody reads, or its disk is full."""
    try:
        yield
    except OSError as error:
        drop_output(stream)
        # Whoever closed a pipe knows.
        if not isinstance(error, BrokenPipeError):
            say(f"cannot print any more ({error.strerror}); the work goes on", file=sys.stderr)


def drop_output(stream) -> None:
    """Send what is printed from now on, and what is still in the buffer, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def one_line_for_memory(hint: str) -> Iterator[None]:
    """Turn running out of memory into a ValueError of one line. hint: what needs less memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has a class for GPUs. On the CPU it raises RuntimeError with one of these words.
        text = str(error)
        known = ("not enough memory", "can't allocate memory", "out of memory", "[enforce fail")
        words = text.lower()
        too_large = "storage size calculation overflowed" in words or "invalid buffer size" in words
        if isinstance(error, MemoryError) or too_large or any(part in words for part in known):
            reason = text.strip().splitlines()[0] if text.strip() else "no more can be had"
            raise ValueError(f"out of memory; {hint} ({reason})") from None
        raise


def run_program(name: str, main: Callable, stopped: str = "stopped, nothing written") -> None:
    """Call main(); if it returns a number, end the process with this exit code.

    ValueError and OSError, which name what is wrong, become one line and exit code 1. Ctrl-C and
    the signals that ask a program to end give the line `stopped` and exit code 130.
    """
    # A character that the terminal does not know is replaced, and stops nothing.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # closed, or no text stream
            stream.reconfigure(errors="replace")

    # Other signals that ask to end do what Ctrl-C does, so that temporary files are removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP, and it stays so
            signal.signal(number, interrupt)
    try:
        code = main()
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        say(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    finally:
        # What `print` left in the buffer meets a closed pipe here, and not at exit.
        with working_on(sys.stdout):
            sys.stdout.flush()
    if code:
        sys.exit(code)


def interrupt(*_) -> None:
    raise KeyboardInterrupt
