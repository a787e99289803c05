"""The service through which the processes of several hosts find each other, as a process of its own.

In jax it is a part of the first process. When that one is killed, every other aborts at once, under pages of C++, and
nobody can say what happened. Here it outlives the first process for long enough that the others see who is gone.
"""

import os
import signal
import subprocess
import sys
import time

LINGER = 60.0
"""Seconds that it lives on after its parent was killed."""
READY, END = b"ready\n", b"end\n"


class Service:
    """What jax holds in place of the service: it may be shut down."""

    def __init__(self, address: str, count: int, **timeouts: int):
        """Start it; the arguments are those of jaxlib's function.

        Raises:
            ValueError: it cannot be started, with what it said.
        """
        words = [address, str(count), str(timeouts["heartbeat_timeout"]), str(timeouts["shutdown_timeout"])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *words],  # -P: what lies beside this file hides no module of Python's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if said != READY:
            raise ValueError(
                f"mesh.coordinator: the service of the processes does not start at {address} "
                f"({said.decode(errors='replace').strip() or 'it ended at once'}); name another port"
            )

    def shutdown(self) -> None:
        """End it; all processes have left."""
        self._process.communicate(END)


def main(address: str, count: str, heartbeat: str, shutdown: str) -> None:
    """Serve until the parent says that it is over, or is no more."""
    from jaxlib import _jax

    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which ends this one in its turn
        signal.signal(number, signal.SIG_IGN)
    try:
        service = _jax.get_distributed_runtime_service(
            address, int(count), heartbeat_timeout=int(heartbeat), shutdown_timeout=int(shutdown)
        )
    except Exception as error:
        print(" ".join(str(error).split()), flush=True)
        return
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
    if sys.stdin.buffer.readline() == END:
        service.shutdown()
    else:
        time.sleep(LINGER)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
