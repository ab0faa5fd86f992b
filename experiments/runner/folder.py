"""The folder of results: what a run may write to, one run at a time, and what it replaces."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

OWN = ("results.json", "report.html", "explorer.html", "timings.json", "explorer", "figures", "per_image", "examples")
OWN = (*OWN, "progress")
LOCK = ".lock"


def present(out: Path) -> list[str]:
    """What is in it, apart from hidden files.

    Raises:
      ValueError: it is no folder, or holds what no run wrote.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    found = sorted(path.name for path in out.iterdir() if path.name[0] != ".") if out.is_dir() else []
    if foreign := [name for name in found if name not in OWN]:
        raise ValueError(f"{out} holds files of another origin, such as {foreign[0]}: choose another --out")
    return found


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """The folder, made if it is not there, for one process.

    Raises:
      ValueError: another process writes to it, or it holds what no run wrote.
    """
    present(out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {out}: wait for it, or choose another --out") from None
        except (ImportError, OSError):  # no locks, on this system or file system
            pass
        yield


def empty(out: Path) -> None:
    """Removes the results of earlier runs; to be called under `alone`."""
    for name in present(out):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
