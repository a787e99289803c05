"""Measure the algorithm core: the policy loss against plain torch, the log-prob head against log_softmax and gather.

    python scripts/bench_algo.py loss            # needs torch
    python scripts/bench_algo.py head --vocab 152000 --tokens 512 --width 896

Each figure is a ratio within one run: the contestants take turns, and the fastest turn of each counts.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import algo


def take_turns(contestants: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the seconds of each contestant's fastest turn; the first turn is not counted."""
    best = dict.fromkeys(contestants, float("inf"))
    for turn in range(turns + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def loss_inputs(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Return logp, old_logp, advantages and mask of rows with ragged ends."""
    rng = np.random.default_rng(0)
    logp = -rng.exponential(1.0, (rows, columns)).astype(np.float32)
    old_logp = (logp + 0.1 * rng.normal(size=(rows, columns))).astype(np.float32)
    mask = np.arange(columns) < rng.integers(columns // 2, columns + 1, rows)[:, None]
    return logp, old_logp, rng.normal(size=rows).astype(np.float32), mask


def torch_step(logp, old_logp, advantages, mask, low: float, high: float) -> Callable[[], object]:
    """Return the forward and backward pass of DAPO's loss as one writes it in torch."""
    import torch

    x = torch.tensor(logp, requires_grad=True)
    old, adv, kept = torch.tensor(old_logp), torch.tensor(advantages)[:, None], torch.tensor(mask).float()

    def step():
        x.grad = None
        ratio = torch.exp(x - old)
        clipped = torch.clamp(ratio, 1 - low, 1 + high)
        per_token = -torch.min(ratio * adv, clipped * adv)
        loss = (per_token * kept).sum() / kept.sum().clamp(min=1)
        loss.backward()
        return loss.detach(), x.grad

    return step


def bench_loss(arguments: argparse.Namespace) -> None:
    config = algo.LossConfig.preset("dapo")
    host = loss_inputs(arguments.rows, arguments.columns)
    logp, old_logp, advantages, mask = (jnp.asarray(x) for x in host)

    def loss(x, *rest):
        return algo.policy_loss(x, *rest, config)

    with_metrics = jax.jit(jax.value_and_grad(loss, has_aux=True))
    alone = jax.jit(jax.value_and_grad(lambda *a: loss(*a)[0]))
    step = torch_step(*host, config.clip_low, config.clip_high)
    for ours, theirs in zip(alone(logp, old_logp, advantages, mask), step(), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-9)
    touched = logp.nbytes + old_logp.nbytes + mask.nbytes + logp.nbytes
    block = jnp.zeros(touched // 8, jnp.float32)
    copy = jax.jit(jnp.negative)
    wait = jax.block_until_ready
    seconds = take_turns(
        {
            "policy_loss": lambda: wait(alone(logp, old_logp, advantages, mask)),
            "policy_loss and metrics": lambda: wait(with_metrics(logp, old_logp, advantages, mask)),
            "torch": step,
            "copy of as many bytes": lambda: wait(copy(block)),
        },
        arguments.turns,
    )
    shape = f"[{arguments.rows}, {arguments.columns}] float32"
    print(f"dapo, forward and gradient, {shape}, {touched / 2**20:.2f} MiB touched")
    for name, took in seconds.items():
        speed = touched / took / 1e9
        print(f"{name:24} {took * 1e6:8.1f} us  {took / seconds['torch']:5.2f} of torch  {speed:6.1f} GB/s")
    share = seconds["copy of as many bytes"] / seconds["policy_loss"]
    print(f"policy_loss reaches {share:.0%} of the copy bandwidth")


def naive(hidden, unembed, targets):
    logps = jax.nn.log_softmax(hidden @ unembed)
    return jnp.take_along_axis(logps, targets[:, None], axis=-1)[:, 0]


def bench_head(arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    count, width, vocab = arguments.tokens, arguments.width, arguments.vocab
    hidden = jnp.asarray(rng.normal(size=(count, width)), jnp.float32)
    unembed = jnp.asarray(rng.normal(size=(width, vocab)) / width**0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, count))
    chunked = partial(algo.logprobs_and_entropy, token_chunk=arguments.token_chunk, vocab_chunk=arguments.vocab_chunk)
    heads = {
        "log_softmax and gather": naive,
        "chunked": lambda h, w, t: chunked(h, w, t, with_entropy=False)[0],
        "chunked with entropy": lambda h, w, t: sum(chunked(h, w, t)),
    }
    calls, memory = {}, {}
    for name, head in heads.items():
        lowered = jax.jit(jax.value_and_grad(lambda h, w, t, head=head: jnp.sum(head(h, w, t)), (0, 1)))
        compiled = lowered.lower(hidden, unembed, targets).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(hidden, unembed, targets))
    first, second = (calls[name]() for name in list(heads)[:2])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), second, first)
    seconds = take_turns(calls, arguments.turns)
    print(f"head, forward and gradient, {count} tokens, width {width}, vocabulary {vocab}, float32")
    base = next(iter(heads))
    for name in heads:
        size = memory[name] / 2**20
        print(f"{name:24} {seconds[name]:7.3f} s  {seconds[name] / seconds[base]:5.2f}  {size:8.1f} MiB of temporaries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    loss = parts.add_parser("loss")
    loss.set_defaults(run=bench_loss)
    loss.add_argument("--rows", type=int, default=64)
    loss.add_argument("--columns", type=int, default=1024)
    loss.add_argument("--turns", type=int, default=500)
    head = parts.add_parser("head")
    head.set_defaults(run=bench_head)
    head.add_argument("--tokens", type=int, default=512)
    head.add_argument("--width", type=int, default=896)
    head.add_argument("--vocab", type=int, default=152_000)
    head.add_argument("--token_chunk", type=int, default=None)
    head.add_argument("--vocab_chunk", type=int, default=None)
    head.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
