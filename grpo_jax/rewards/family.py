"""A reward's process and all that it starts: how much memory they have together, and that they end together.

On Linux the process forks as soon as it is there. The child runs the reward; the parent, its keeper, looks after the
child and whatever that starts. Elsewhere there is no keeper, and the memory limit is one of address space.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NoReturn

KEPT = sys.platform == "linux"
"""There are keepers here: SIGTERM ends one, and all that it keeps first."""

OUT_OF_MEMORY = 86
"""Exit status of a family that had too much memory."""

_LOOK_SECONDS = 0.05
_END_SECONDS = 5.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def keep(parent: int, memory_limit_mb: int | None) -> None:
    """Return in the process that is to run the reward.

    Args:
        parent: the process that started this one; all ends when its thread that did so ends, however busy it is.
        memory_limit_mb: of all processes together; None for no limit.
    """
    _no_core_file()
    if sys.platform != "linux":
        _limit_address_space(memory_limit_mb)
        return None if os.getppid() == parent else os._exit(0)
    watched = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    _end_with(parent, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what loses its own parent becomes a child of this process
    seen = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    keeper, child = os.getpid(), os.fork()
    if child:
        _watch(child, memory_limit_mb if seen else None)
    _end_with(keeper, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    if not seen:
        _limit_address_space(memory_limit_mb)
    return None


def _watch(child: int, memory_limit_mb: int | None) -> NoReturn:
    for pipe in (0, 1):
        os.close(pipe)
    status = None
    while status is None:
        got = None
        if sys.platform == "linux":
            got = signal.sigtimedwait({signal.SIGTERM, signal.SIGCHLD}, _LOOK_SECONDS)
        status = _reaped(child)
        if status is None and got is not None and got.si_signo == signal.SIGTERM:
            status = 0
        if status is None and memory_limit_mb is not None and _holds_more(memory_limit_mb * 2**20):
            status = OUT_OF_MEMORY
    _end_family()
    if status < 0:  # end as the child did
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
    os._exit(abs(status))


def _reaped(child: int) -> int | None:
    """Take note of processes that ended; exit status of ``child``, negative for a signal, once it is among them."""
    status = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                status = os.waitstatus_to_exitcode(ended[1])
    return status


def _end_family() -> None:
    until = time.monotonic() + _END_SECONDS
    while time.monotonic() < until:
        for pid in _descendants():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            return
        time.sleep(0.002)


def _descendants() -> Iterator[int]:
    left = [os.getpid()]
    while left:
        pid = left.pop()
        with suppress(OSError):  # it has ended since
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    children = [int(word) for word in file.read().split()]
                left += children
                yield from children


def _holds_more(most: int) -> bool:
    """Whether the family holds more bytes of memory; pages that several share count once."""
    pids, page = list(_descendants()), os.sysconf("SC_PAGE_SIZE")
    if sum(page * _field(f"/proc/{pid}/statm", 1) for pid in pids) <= most:
        return False
    return sum(_proportional(pid) for pid in pids) > most  # dearer to read, and exact


def _proportional(pid: int) -> int:
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return 0


def _field(path: str, place: int) -> int:
    with suppress(OSError, IndexError), open(path) as file:
        return int(file.read().split()[place])
    return 0


def _end_with(parent: int, number: int) -> None:
    """Linux sends this process a signal when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(0)


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _no_core_file() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _limit_address_space(megabytes: int | None) -> None:
    import resource

    if megabytes is None:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = megabytes * 2**20 if hard == resource.RLIM_INFINITY else min(megabytes * 2**20, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError) as error:
        print(f"reward worker: this system sets no memory limit ({error}); it runs without", file=sys.stderr)
