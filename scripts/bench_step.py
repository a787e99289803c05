"""Whole GRPO steps, ours, TRL's and Tunix's, each in a process of its own, and the least such a step can take.

Run by bench_rollout.py (``--only step-short``), which says how.
"""

import argparse
import statistics
import sys
from pathlib import Path

from contest import Contestant, Floor, Machine, Work, against, command_of, python_of, row

SHORT = Work(vocab=2048, prompts=8, samples=8, prompt_len=32, cap=64, mean=64)
WORKS = {
    "step-short": SHORT,
    "step-long": Work(vocab=2048, prompts=8, samples=16, prompt_len=256, cap=256, mean=256),
    "step-lognormal": Work(vocab=2048, prompts=8, samples=16, prompt_len=256, cap=256, mean=60, spread=0.8),
    "step-0.5b": Work(
        vocab=151_936, prompts=16, samples=8, prompt_len=190, cap=570, mean=570, dtype="bfloat16",
        layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864,
    ),
}  # fmt: skip
"""One update a rollout, no KL; the last is for an accelerator. Where lengths differ ours stops at each; a peer's batch
runs to the longest, and trains on all of it."""
PEERS = ("trl", "tunix")


def measure(work: Work, peers: list[str], options: argparse.Namespace) -> None:
    """Lines of one work."""
    ours = Contestant("ours", command_of("peer_step.py", "ours", work, Path(sys.executable)))
    taken: list[float] = []
    for name in peers:  # one peer in memory at a time
        python = options.python or python_of(name, options.environments)
        theirs, own = against(name, "peer_step.py", work, python, ours.seconds, options.turns)
        taken += own
        if own:
            print(row(work, f"{name}, whole step", theirs, own), flush=True)
    while len(taken) < options.turns:
        taken.append(ours.seconds())
    ours.close()
    floor, took = Floor.of(work, Machine.measured(work.dtype)), statistics.median(taken)
    print(
        f"{work}, whole step: {took:.2f} s; floor {floor.step():.2f} s, of it rollout "
        f"{floor.prefill() + floor.decode():.2f} ({floor.machine}): {floor.step() / took:.2f} of it reached; "
        f"start to the second step {ours.start_seconds:.0f} s\n",
        flush=True,
    )
