"""Measure the rollout engine: against transformers' generate (which TRL calls), Tunix, a static batch, and its floor.

    python scripts/bench_rollout.py [--quick] [--peers transformers tunix] [--environments DIR]

Prints a table for docs/BENCHMARKS.md. Each peer lives in a virtual environment of its own, made below DIR when it is
not there (torch's is about 1 GB, Tunix's about 3). Contestants take turns, so that what else the machine does hits all;
the ratio of a row is the median of the ratios of its turns. With imposed stop lengths a static batch runs to the
longest row, and so does a peer's; tokens count up to each row's stop only.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import Model
from grpo_jax.models.spec import ModelSpec
from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.rollout.setup import token_bytes
from grpo_jax.types import Prompt

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "transformers": ["torch==2.13.0", "transformers>=5.17"],
    "tunix": ["google-tunix==0.1.7"],
}
SHAPE = {"layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 768}
SLOW_PEER_SECONDS = 60.0
"""A peer whose first rollout takes longer is measured once."""


@dataclass(frozen=True)
class Work:
    """A rollout to measure; ``spread`` None is fixed lengths, else the deviation of the lengths' logarithm."""

    name: str
    vocab: int
    prompts: int
    samples: int
    prompt_len: int
    cap: int
    mean: float
    spread: float | None

    def limits(self) -> np.ndarray:
        rows = self.prompts * self.samples
        if self.spread is None:
            return np.full(rows, self.cap)
        middle = math.log(self.mean) - self.spread**2 / 2
        drawn = np.random.default_rng(0).lognormal(middle, self.spread, rows)
        return np.clip(np.rint(drawn), 1, self.cap).astype(int)


WORKS = [
    Work("8 x 8, 32 + 64 fixed", 2048, 8, 8, 32, 64, 64, None),
    Work("8 x 16, 256 + lognormal 60, cap 256", 2048, 8, 16, 256, 256, 60, 0.8),
    Work("the same, vocabulary 152k", 151_936, 8, 16, 256, 256, 60, 0.8),
]


def model_for(vocab: int) -> Model:
    spec = ModelSpec.from_hf(
        {
            "model_type": "qwen2",
            "vocab_size": vocab,
            "hidden_size": SHAPE["width"],
            "num_hidden_layers": SHAPE["layers"],
            "num_attention_heads": SHAPE["heads"],
            "num_key_value_heads": SHAPE["kv_heads"],
            "head_dim": SHAPE["head_dim"],
            "intermediate_size": SHAPE["ffn"],
            "tie_word_embeddings": True,
            "eos_token_id": 1,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "hidden_act": "silu",
        }
    )
    return Model(spec)


class Ours:
    """The engine, and the static batch it is compared with: every prompt repeated, all rows up to the longest."""

    def __init__(self, work: Work):
        self.work, self.model = work, model_for(work.vocab)
        self.params = self.model.init(0)
        rng = np.random.default_rng(0)
        self.prompts = [
            Prompt(i, tuple(rng.integers(2, work.vocab, work.prompt_len).tolist())) for i in range(work.prompts)
        ]
        self.engine = ContinuousEngine(self.model, work.prompt_len)
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

    def floor_seconds(self, flops: float, bandwidth: float) -> float:
        """PERFORMANCE.md's floor: prompts once, then each step's work or traffic, whichever takes longer."""
        work, spec = self.work, self.model.spec
        head = spec.vocab * spec.width
        body = self.model.param_count - head
        pair = sum(4 * layer.heads * layer.head_dim for layer in spec.layers)
        token, bytes_each = token_bytes(self.model), np.dtype(self.model.dtype).itemsize
        prefill = work.prompts * (work.prompt_len * 2 * body + pair * work.prompt_len**2 / 2) / flops
        decode = 0.0
        for step in range(int(self.limits.max())):
            live = int((self.limits > step).sum())
            prompts = np.unique(np.flatnonzero(self.limits > step) // work.samples).size
            traffic = bytes_each * (body + head) + token * (prompts * work.prompt_len + live * step)
            arithmetic = live * (2 * (body + head) + pair * (work.prompt_len + step))
            decode += max(traffic / bandwidth, arithmetic / flops)
        return prefill + decode


class Peer:
    """A peer's process; it waits while others take their turn."""

    def __init__(self, name: str, python: Path, work: Work):
        shape = SHAPE | {
            "vocab": work.vocab,
            "prompts": work.prompts,
            "samples": work.samples,
            "prompt_len": work.prompt_len,
            "length": int(work.limits().max()),
        }
        command = [str(python), str(ROOT / "scripts" / "peer_generate.py"), name, json.dumps(shape)]
        begun = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := self._line()) != "ready":
            print(f"  {name}: {line}", file=sys.stderr)
        self.start_seconds = time.perf_counter() - begun

    def seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with status {self._process.wait()}; its errors are above")
        return line.strip()


def python_of(name: str, directory: Path) -> Path:
    """The interpreter of a peer's environment, made when it is not there."""
    place = directory / name
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", *PACKAGES[name]]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        (place / "ready").touch()
    return place / "bin" / "python"


def machine() -> tuple[float, float]:
    """FLOP/s of a large float32 product and bytes/s of a copy, the best of a few tries."""
    x = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    y = jnp.ones(2**25, jnp.float32)
    double = jax.jit(lambda y: y * 2)
    return 2 * 1024**3 / best(lambda: product(x)), 2 * y.nbytes / best(lambda: double(y))


def best(function: Callable[[], jax.Array], tries: int = 8) -> float:
    function().block_until_ready()
    seconds = []
    for _ in range(tries):
        begun = time.perf_counter()
        function().block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def measure(work: Work, peers: list[str], directory: Path, turns: int) -> None:
    ours = Ours(work)
    begun = time.perf_counter()
    ours.engine_seconds()
    first = time.perf_counter() - begun
    contestants: dict[str, Callable[[], float]] = {"engine": ours.engine_seconds}
    if work.vocab < 10_000:
        ours.static_seconds()
        contestants["static batch"] = ours.static_seconds
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, run in contestants.items():
            seconds[name].append(run())
    for name in peers:  # one peer in memory at a time, each in turns with the engine
        peer = Peer(name, python_of(name, directory), work)
        seconds[name], beside = [], []
        for _ in range(1 if peer.start_seconds > SLOW_PEER_SECONDS else turns):
            beside.append(ours.engine_seconds())
            seconds[name].append(peer.seconds())
        peer.close()
        show(work, name, seconds[name], beside, ours)
    for name in contestants:
        show(work, name, seconds[name], seconds["engine"], ours)
    flops, bandwidth = machine()
    floor = ours.floor_seconds(flops, bandwidth)
    took = statistics.median(seconds["engine"])
    print(
        f"{work.name}: floor {floor:.2f} s ({flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s), the engine reaches "
        f"{floor / took:.2f} of it; occupancy {ours.counts.occupancy:.2f}, {ours.counts.moves} moves; first call "
        f"{first:.1f} s\n",
        flush=True,
    )


def show(work: Work, name: str, seconds: list[float], engine: list[float], ours: Ours) -> None:
    ratio = statistics.median(a / b for a, b in zip(seconds, engine, strict=True))
    took = statistics.median(seconds)
    rate = ours.limits.sum() / took
    print(f"| {work.name} | {name} | {took:.2f} | {rate:.0f} | {ratio:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two works, two turns, no peers unless named")
    parser.add_argument("--peers", nargs="*", choices=list(PACKAGES), default=None)
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"))
    options = parser.parse_args()
    peers = options.peers if options.peers is not None else [] if options.quick else list(PACKAGES)
    print("| work | who | s, median | tokens/s up to the stops | times the engine's |\n|---|---|---|---|---|")
    for work in WORKS[:2] if options.quick else WORKS:
        measure(work, peers, options.environments, 2 if options.quick else 3)


if __name__ == "__main__":
    main()
