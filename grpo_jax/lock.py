"""One process a run directory: two that write the same files ruin the record of both."""

import fcntl
import os
import socket
from pathlib import Path

LOCK = ".lock"
"""File that the process holds while it runs; the system lets go of it when the process ends, however it ends."""


class Lock:
    """Holds the run directory from before anything in it is written until its files are closed."""

    def __init__(self, directory: Path):
        """Take hold.

        Raises:
            ValueError: another process has it.
        """
        self._file = (directory / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"output_dir: {directory} is in use by {holder}, and two runs would ruin each other's files; wait for "
                "it, end it, or name another place"
            ) from error
        except OSError:
            return  # a file system without locks
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Let go."""
        self._file.close()
