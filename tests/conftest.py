"""Tests import the project's files by name, from wherever `pytest` is typed."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# `nohup pytest` ignores SIGHUP, and programs that tests start would ignore it, too.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
