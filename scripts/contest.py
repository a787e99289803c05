"""What bench_rollout.py and bench_step.py share: the works, the least they can cost, and contestants in processes."""

import json
import math
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import Model
from grpo_jax.models.spec import ModelSpec
from grpo_jax.rollout.setup import token_bytes

SCRIPTS = Path(__file__).parent
PACKAGES = {
    "transformers": ["torch==2.13.0", "transformers>=5.17"],
    "trl": ["torch==2.13.0", "trl==1.16.0", "datasets"],
    "tunix": ["google-tunix==0.1.7"],
}
"""What each peer's virtual environment holds."""
SLOW_SECONDS = 20.0
"""A peer whose first turn takes longer has no second one."""


@dataclass(frozen=True)
class Work:
    """A rollout, or a step, of a random model of Qwen2's form.

    Attributes:
        vocab, layers, width, heads, kv_heads, head_dim, ffn: the model's shape.
        prompts, samples: Q and G.
        prompt_len: tokens of each prompt.
        cap: most tokens of a completion.
        mean: of their lengths.
        spread: deviation of the lengths' logarithm; 0 is the cap for all.
        dtype: of parameters, activations, keys and values.
        tied: the head is the embedding.
    """

    vocab: int
    prompts: int
    samples: int
    prompt_len: int
    cap: int
    mean: int
    spread: float = 0.0
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 768
    dtype: str = "float32"
    tied: bool = True

    def __str__(self) -> str:
        """As the tables name it."""
        lengths = f"{self.cap} fixed" if not self.spread else f"lognormal {self.mean}, cap {self.cap}"
        return f"{self.prompts} x {self.samples}, {self.prompt_len} + {lengths}, vocabulary {self.vocab}"

    def limits(self) -> np.ndarray:
        """[N], the tokens at which each completion ends."""
        rows = self.prompts * self.samples
        if not self.spread:
            return np.full(rows, self.cap)
        drawn = np.random.default_rng(0).lognormal(math.log(self.mean) - self.spread**2 / 2, self.spread, rows)
        return np.clip(np.rint(drawn), 1, self.cap).astype(int)

    def model(self) -> Model:
        """The model, without parameters."""
        config = {
            "model_type": "qwen2",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "tie_word_embeddings": self.tied,
            "eos_token_id": 1,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "hidden_act": "silu",
        }
        return Model(ModelSpec.from_hf(config), dtype=self.dtype, param_dtype=self.dtype)


def cpu_devices() -> int:
    """As how many devices the CPU counts; 1 where another kind of device is used."""
    return jax.device_count() if jax.default_backend() == "cpu" else 1


@dataclass(frozen=True)
class Machine:
    """FLOP/s of a large product, and bytes/s of reading a large array, best of several tries."""

    flops: float
    bandwidth: float

    @staticmethod
    def measured(dtype: str = "float32") -> "Machine":
        """On the default device, products in ``dtype``."""
        accelerator = jax.default_backend() != "cpu"
        size, long = (8192, 2**28) if accelerator else (1024, 2**25)
        x, y = jnp.ones((size, size), dtype), jnp.ones(long, jnp.float32)
        precision = "highest" if dtype == "float32" else None
        product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
        # Decoding reads. A copy would count the fresh pages of its result, which cost a CPU more than the traffic does.
        total = jax.jit(jnp.sum)
        return Machine(2 * size**3 / best(lambda: product(x)), y.nbytes / best(lambda: total(y)))

    def __str__(self) -> str:
        """Both, in units that suit."""
        return f"{self.flops / 1e9:.0f} GFLOP/s, {self.bandwidth / 1e9:.1f} GB/s"


def best(function: Callable[[], jax.Array], tries: int = 8) -> float:
    """Seconds of the fastest of several calls, after one that compiles."""
    function().block_until_ready()
    seconds = []
    for _ in range(tries):
        begun = time.perf_counter()
        function().block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


@dataclass(frozen=True)
class Floor:
    """Least seconds that a work can take on a machine when each prompt is computed once a group.

    Attributes:
        work: whose shapes count.
        machine: what it runs on.
        body, head: parameters of the layers and of the output matrix.
        pair: FLOP per query and key, over all layers.
        token: bytes of one token's keys and values.
        number: bytes of a parameter.
    """

    work: Work
    machine: Machine
    body: int
    head: int
    pair: int
    token: int
    number: int

    @staticmethod
    def of(work: Work, machine: Machine) -> "Floor":
        """Counted from the model."""
        model = work.model()
        head = work.vocab * work.width
        body = model.param_count - head * (1 if work.tied else 2)
        pair = 4 * work.layers * work.heads * work.head_dim
        return Floor(work, machine, body, head, pair, token_bytes(model), np.dtype(model.dtype).itemsize)

    def prefill(self) -> float:
        """Every prompt once."""
        work = self.work
        each = work.prompt_len * 2 * self.body + self.pair * work.prompt_len**2 / 2 + 2 * self.head
        return work.prompts * each / self.machine.flops

    def decode(self) -> float:
        """Each step's traffic (parameters, and keys and values of live rows, a group's prompt once) or arithmetic."""
        work, limits, seconds = self.work, self.work.limits(), 0.0
        for step in range(int(limits.max())):
            live = np.flatnonzero(limits > step)
            context = np.unique(live // work.samples).size * work.prompt_len + live.size * step
            traffic = self.number * (self.body + self.head) + self.token * context
            seconds += max(
                traffic / self.machine.bandwidth, 2 * live.size * (self.body + self.head) / self.machine.flops
            )
        return seconds

    def forward(self) -> float:
        """One pass over prompts, once each, and completions; the head over the completions."""
        work, limits = self.work, self.work.limits()
        tokens = work.prompts * work.prompt_len + limits.sum()
        pairs = work.prompts * work.prompt_len**2 / 2 + (limits * work.prompt_len + limits**2 / 2).sum()
        return (tokens * 2 * self.body + pairs * self.pair + limits.sum() * 2 * self.head) / self.machine.flops

    def step(self) -> float:
        """Rollout, forward, backward and the optimizer's 30 bytes a parameter; no pass of old or reference model."""
        update = 30 * (self.body + self.head * (1 if self.work.tied else 2)) / self.machine.bandwidth
        return self.prefill() + self.decode() + 3 * self.forward() + update


class Contestant:
    """A process that waits while others take their turn."""

    def __init__(self, name: str, command: Sequence[str]):
        """Start it and wait until it has warmed up."""
        begun = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := self._line()) != "ready":
            print(f"  {name}: {line}", file=sys.stderr)
        self.start_seconds = time.perf_counter() - begun

    def seconds(self) -> float:
        """Of its next turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        while not (line := self._line()).startswith("seconds "):
            print(f"  {line}", file=sys.stderr)
        return float(line.split()[1])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended with status {self._process.wait()}; its errors are above")
        return line.strip()


def command_of(script: str, name: str, work: Work, python: Path) -> list[str]:
    """What starts a peer on a work."""
    shape = {field.name: getattr(work, field.name) for field in fields(work)} | {"length": int(work.limits().max())}
    return [str(python), str(SCRIPTS / script), name, json.dumps(shape)]


def python_of(name: str, directory: Path) -> Path:
    """The interpreter of a peer's environment, made when it is not there."""
    place = directory / name
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", *PACKAGES[name]]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        (place / "ready").touch()
    return place / "bin" / "python"


def turns_of(peer: Callable[[], float], ours: Callable[[], float], turns: int) -> tuple[list[float], list[float]]:
    """Seconds of both in alternation; a peer whose first turn is slow has one."""
    theirs, own = [peer()], [ours()]
    while len(own) < turns and theirs[0] <= SLOW_SECONDS:
        theirs.append(peer())
        own.append(ours())
    return theirs, own


def against(
    peer: str, script: str, work: Work, python: Path, ours: Callable[[], float], turns: int
) -> tuple[list[float], list[float]]:
    """As `turns_of`, with a peer in a process of its own; two empty lists where that fails, which is said."""
    contestant = None
    try:
        contestant = Contestant(peer, command_of(script, peer, work, python))
        return turns_of(contestant.seconds, ours, turns)
    except RuntimeError as error:
        print(f"{work}: {peer} was not measured: {error}", flush=True)
        return [], []
    finally:
        if contestant is not None:
            contestant.close()


def row(work: Work, name: str, theirs: Sequence[float], ours: Sequence[float]) -> str:
    """A line of the table: medians, and the median of the ratios of turns."""
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    times = f"{len(theirs)} turns" if len(theirs) > 1 else "once"
    took, own = statistics.median(theirs), statistics.median(ours)
    return f"| {work} | {name} | {took:.2f} | {own:.2f} | {ratio:.1f} | {work.limits().sum() / took:.0f} | {times} |"


HEADING = """| work | against | its s | our s | ratio | its tokens/s up to the stops | measured |
|---|---|---|---|---|---|---|"""


def changed(work: Work, changes: Sequence[str]) -> Work:
    """``["layers=2", "cap=16"]`` -> the work so changed.

    Raises:
        ValueError: no such field, or no number.
    """
    known = {field.name: type(getattr(work, field.name)) for field in fields(work)}
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in known:
            raise ValueError(f"--set: got {change!r}. Use NAME=VALUE with a name among {', '.join(known)}.")
        values[name] = known[name](value)
    return replace(work, **values)
