"""Tests import the project's files by name, from wherever `pytest` is typed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
