"""Several processes end together, and each says what happened where. No model: the loop only waits for the others."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax import coordinator
from grpo_jax.peers import SILENT, _Life

ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, signal, sys, time
import numpy as np
from pathlib import Path
from grpo_jax import mesh, peers

port, me, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
peers.SILENT = 4
who, how = int(what[-1]), what[:-2]
mesh.initialize_distributed(f"127.0.0.1:{port}", 2, me)
with peers.Peers(Path("nowhere")):
    assert mesh.texts_of_all("greeting", f"I am {me}") == (None if me else ["I am 0", "I am 1"])
    assert mesh.text_of_first("answer", "" if me else "well") == "well"
    mesh.same_everywhere("the table", {"a": "1"})
    if how == "differ":
        mesh.same_everywhere("the table", {"a": str(me)})
    for step in range(3):
        if step == 2 and me == who and how == "raise":
            raise ValueError("reward 'judge': its server is gone")
        if step == 2 and me == who and how == "kill":
            print("now", flush=True)
            time.sleep(600)
        mesh.anywhere(False)
print("ended", flush=True)
"""


def start(what: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(port), str(me), what],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, last line of the output and of the errors, of each."""
    said = [process.communicate(timeout=240) for process in processes]
    return [
        (process.returncode, out.strip().rpartition("\n")[2], err.strip())
        for process, (out, err) in zip(processes, said, strict=True)
    ]


@pytest.mark.slow
def test_an_error_or_a_death_of_one_process_ends_all_with_a_line_of_what_happened_where():
    names = ["well 0", "raise 0", "raise 1", "kill 0", "kill 1", "differ 0"]
    pairs = {name: start(name) for name in names}
    for name in ("kill 0", "kill 1"):
        victim = pairs[name][int(name[-1])]
        assert "now\n" in iter(victim.stdout.readline, "")
        victim.send_signal(signal.SIGKILL)
    said = {name: ended(pair) for name, pair in pairs.items()}
    assert [(status, out) for status, out, _ in said["well 0"]] == [(0, "ended"), (0, "ended")], said
    host = socket.gethostname()
    for who, other in ((0, 1), (1, 0)):
        status, _, err = said[f"raise {who}"][who]
        assert status == 2 and err.endswith("ValueError: reward 'judge': its server is gone"), err
        status, _, err = said[f"raise {who}"][other]
        assert (status, err) == (1, f"error: process {who} on {host}: reward 'judge': its server is gone")
        assert said[f"kill {who}"][who][0] == -signal.SIGKILL
        status, _, err = said[f"kill {who}"][other]
        assert status == 1 and err.splitlines()[-1] == f"error: process {who} died: no sign of life for 4 s", err
    for status, _, err in said["differ 0"]:
        assert status in (1, 2) and "the table must be the same for all processes, and a of process 1 is not" in err


def test_a_process_is_dead_after_so_many_looks_without_a_new_sign_however_long_they_take():
    life = _Life(me=0)
    assert [life.missed({0: "x", 1: str(n), 2: "done"}) for n in range(SILENT)] == [None] * SILENT
    assert life.missed({0: "x", 1: "new", 2: "done"}) == 2, "itself it never misses"


def test_an_address_that_is_taken_is_said_in_a_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^mesh.coordinator: the service .* at 127.0.0.1:{port} \(.*another port$"
        ):
            coordinator.Service(f"127.0.0.1:{port}", 1, heartbeat_timeout=10, shutdown_timeout=10)
