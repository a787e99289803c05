"""Measure the rollout engine: against its floor, a static batch, transformers' generate (which TRL calls) and Tunix.

    python scripts/bench_rollout.py [--only short long vocabulary start step-short ...] [--peers [PEER ...]]
    python scripts/bench_rollout.py --only 0.5b 1.5b 7b --peers     # on an accelerator
    python scripts/bench_rollout.py --only 0.5b --set layers=2 prompts=2 ...    # the same, small

Prints lines of a table for docs/BENCHMARKS.md. Each peer lives in a virtual environment of its own below
--environments, made when it is not there (torch's is about 1 GB, Tunix's about 3). Contestants take turns, so that what
else the machine does hits all; a ratio is the median of the ratios of turns. With imposed stop lengths a static batch
runs to the longest row, and so does a peer's; tokens count up to each row's stop only. A peer whose turn takes long has
one. `step-*` are whole GRPO steps (bench_step.py); `start` is the time to the first token in a new process, on a cold
and a warm cache. With JAX_NUM_CPU_DEVICES=2 before it the CPU counts as two devices, and ours cuts heads over them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import bench_step
import jax
import numpy as np
from contest import HEADING, SCRIPTS, Floor, Machine, Work, against, changed, cpu_devices, python_of, row, turns_of

from grpo_jax.mesh import make_mesh
from grpo_jax.models import Model
from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.types import Prompt

LONG = Work(vocab=2048, prompts=8, samples=16, prompt_len=256, cap=256, mean=60, spread=0.8)
CARD = Work(
    vocab=151_936, prompts=64, samples=16, prompt_len=190, cap=2048, mean=570, spread=0.8, dtype="bfloat16",
    layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864,
)  # fmt: skip
WORKS = {
    "short": Work(vocab=2048, prompts=8, samples=8, prompt_len=32, cap=64, mean=64),
    "long": LONG,
    "vocabulary": replace(LONG, vocab=151_936),
    "0.5b": CARD,
    "1.5b": replace(CARD, layers=28, width=1536, heads=12, kv_heads=2, head_dim=128, ffn=8960),
    "7b": replace(
        CARD, vocab=152_064, layers=28, width=3584, heads=28, kv_heads=4, head_dim=128, ffn=18_944, tied=False
    ),
}
"""Those of the last three have the shapes of Qwen2.5."""
ON_CPU = ("short", "long", "vocabulary", "start", *bench_step.WORKS)
PEERS = ("transformers", "tunix")


def split_over_cpu(model: Model) -> Model:
    """The model with its heads over all devices, where those are parts of one CPU."""
    count = cpu_devices()
    return model if count == 1 else replace(model, mesh=make_mesh(data=1, tensor=count))


class Ours:
    """The engine, and the static batch it is compared with: every prompt repeated, all rows up to the longest."""

    def __init__(self, work: Work):
        self.work, self.model = work, split_over_cpu(work.model())
        self.params = self.model.init(0)
        rng = np.random.default_rng(0)
        self.prompts = [
            Prompt(i, tuple(rng.integers(2, work.vocab, work.prompt_len).tolist())) for i in range(work.prompts)
        ]
        # An accelerator's host has cores to compile on; what a work does not need would only delay it here.
        self.engine = ContinuousEngine(self.model, work.prompt_len, ahead=jax.default_backend() != "cpu")
        self.sampling, self.limits = Sampling(max_new_tokens=work.cap), work.limits()

    def engine_seconds(self) -> float:
        begun = time.perf_counter()
        call = self.engine.stream(
            self.params, self.prompts, num_samples=self.work.samples, sampling=self.sampling, seed=0, step=0,
            limits=self.limits,
        )  # fmt: skip
        for _ in call:
            pass
        seconds = time.perf_counter() - begun
        assert (call.sampled.length == self.limits).all()
        self.counts = call.counts
        return seconds

    def static_seconds(self) -> float:
        repeated = [
            Prompt(i * self.work.samples + j, prompt.tokens)
            for i, prompt in enumerate(self.prompts)
            for j in range(self.work.samples)
        ]
        begun = time.perf_counter()
        self.engine.generate(
            self.params, repeated, num_samples=1, sampling=self.sampling, seed=0, step=0,
            limits=np.full(len(repeated), self.limits.max()),
        )  # fmt: skip
        return time.perf_counter() - begun


def measure(work: Work, peers: list[str], options: argparse.Namespace) -> None:
    """Lines of one work."""
    ours = Ours(work)
    begun = time.perf_counter()
    ours.engine_seconds()
    first = time.perf_counter() - begun
    taken = []
    if options.static and work.vocab < 10_000:
        ours.static_seconds()
        theirs, own = turns_of(ours.static_seconds, ours.engine_seconds, options.turns)
        taken += own
        print(row(work, "own static batch, prompts repeated", theirs, own), flush=True)
    for name in peers:  # one peer in memory at a time
        python = options.python or python_of(name, options.environments)
        theirs, own = against(name, "peer_generate.py", work, python, ours.engine_seconds, options.turns)
        taken += own
        if own:
            print(row(work, name, theirs, own), flush=True)
    while len(taken) < options.turns:
        taken.append(ours.engine_seconds())
    floor = Floor.of(work, Machine.measured(work.dtype))
    least, took = floor.prefill() + floor.decode(), statistics.median(taken)
    print(
        f"{work}: {took:.2f} s, {ours.limits.sum() / took:.0f} tokens/s; floor {least:.2f} s, of it prefill "
        f"{floor.prefill():.2f} ({floor.machine}): {least / took:.2f} of it reached; slot-steps with a live row "
        f"{ours.counts.occupancy:.2f}; {ours.counts.moves} moves; first call {first:.1f} s\n",
        flush=True,
    )


def start_seconds(cache: Path) -> float:
    """From the start of a process that samples from the shipped model to its first token."""
    command = [sys.executable, str(SCRIPTS / "sample.py"), "quickstart", "--prompt", "12+34=", "--max-new-tokens", "16"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begun
        process.stdout.read()
    if process.returncode or not first:
        raise RuntimeError(f"sample.py ended with status {process.returncode}; its errors are above")
    return seconds


def start() -> None:
    """The line of it."""
    with tempfile.TemporaryDirectory() as cache:
        cold, *warm = [start_seconds(Path(cache)) for _ in range(3)]
    print(
        f"start of a process to its first token: {cold:.1f} s on an empty cache, then {min(warm):.1f} s\n", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=[*WORKS, "start", *bench_step.WORKS], help="default: all for a CPU"
    )
    parser.add_argument("--peers", nargs="*", choices=[*PEERS, "trl"], help="default: all that suit; none: no peer")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave out our own static batch")
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"))
    parser.add_argument("--python", type=Path, help="an interpreter that has the peer, instead of an environment")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change fields of every work")
    options = parser.parse_args()
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    print(f"{count} x {kind}, {os.cpu_count()} cores, jax {jax.__version__}\n\n{HEADING}", flush=True)
    for name in options.only or ON_CPU:
        if name == "start":
            start()
        elif name in bench_step.WORKS:
            peers = [peer for peer in bench_step.PEERS if options.peers is None or peer in options.peers]
            bench_step.measure(changed(bench_step.WORKS[name], options.set), peers, options)
        else:
            peers = [peer for peer in PEERS if options.peers is None or peer in options.peers]
            measure(changed(WORKS[name], options.set), peers, options)


if __name__ == "__main__":
    main()
