"""How many processes check a dataset where nobody says."""

from __future__ import annotations

import multiprocessing
import re
import sys
from pathlib import Path
from typing import Final

from logitstore.errors import InvalidInputError
from logitstore.processes import cores

SMALL_BYTES: Final = 64 * 2**20
"""Less than this is checked sooner than processes have started, which takes each about half a second."""

_GUARD: Final = re.compile(rb"""__name__\s*==\s*['"]__main__['"]""")


def workers_for(size: int, workers: int | None) -> int:
    """The number of processes for `logitstore.processes.each`; 0: this one.

    Args:
        size: bytes to be checked.
        workers: as it was asked for. None: as many as there are cores; 0 where less than 64 MiB are checked, there is
            one core, or processes cannot be started here: in a worker of something else, and in a script without
            `if __name__ == "__main__":`, which each of them would run again.

    Raises:
        InvalidInputError: a negative number.
    """
    if workers is None:
        several = cores() > 1 and size >= SMALL_BYTES and not multiprocessing.current_process().daemon
        return cores() if several and _runs_once() else 0
    if workers < 0:
        raise InvalidInputError(f"workers is {workers}; give the number of processes, 0 for none but this one")
    return workers


def _runs_once() -> bool:
    """Whether a process that is spawned leaves alone what the main module does."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    path = getattr(main, "__file__", None)
    if path is None or name.rpartition(".")[2] == "__main__":  # not imported by those that are spawned
        return True
    try:
        return _GUARD.search(Path(path).read_bytes()) is not None
    except OSError:
        return False
