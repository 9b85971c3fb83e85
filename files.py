"""Files that appear whole or not at all, and never over something that exists.
"""
import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path):
    """A binary file to write to under a temporary name; on disk, it takes the place of `path`.

    A crash or kill -9 at any byte leaves what `path` was. The temporary name is always the same, so
    that the next write clears up what a killed one left. Raises OSError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # RuntimeError: what torch.save makes of a failed write
        raise OSError(f"{path}: not written, is the disk full? What was there is unharmed ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def list_files(path: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder with one of the suffixes, by name; a file is returned as it is.

    Raises FileNotFoundError if there is no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.name.lower().endswith(suffixes)]


def refuse_existing(outputs: list[Path], inputs: list[Path] = (), overwrite: bool = False) -> None:
    """Check the names of all files to be written, before any work is done.

    Raises FileNotFoundError if a folder is missing, ValueError if a file is one of the inputs, or exists without `overwrite`.
    """
    for path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
        if path.exists() and any(source.exists() and path.samefile(source) for source in inputs):
            raise ValueError(f"{path}: is the input, never overwritten; give another name with -o")
        if path.exists() and not overwrite:
            raise ValueError(f"{path}: exists; give another name with -o, or --overwrite")


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
