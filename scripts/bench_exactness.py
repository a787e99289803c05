"""Measure contract 4 at a large vocabulary: tokens that other company, shapes or devices change; what bfloat16 costs.

    python scripts/bench_exactness.py [--rounds 4] [--vocab 151936] [--temperature 0.15 ...]
    python scripts/bench_exactness.py --kept grpo_jax/quickstart/model

A row's uniforms are addressed, so another batch, schedule, cache or mesh gives it the same tokens unless a difference
of rounding moves a boundary of the distribution over a uniform. Each row is compared with the same address in a batch
of all rows up to its first difference; behind that the texts are others. Prints, for float32 and bfloat16, such flips
per 1,000 tokens compared with their 95 % interval (Wilson), and the gap between the sampler's log-probabilities and
the learner's. On CPU devices unless JAX_PLATFORMS names others. Weights are random, so that at temperature 1 the
distributions are almost flat, the worst case; about 0.15 makes them as sharp as a trained model's. With --kept: that
gap alone, of a checkpoint, by what its keys and values are kept in while it samples.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import algo
from grpo_jax.mesh import make_mesh
from grpo_jax.models import Model, load_model
from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.testing import tiny_model
from grpo_jax.types import Params, Prompt, Rollout

WIDTH = 32
"""Tokens of a prompt."""
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}

Sampler = Callable[[int], list[list[int]]]
"""A round -> the completions it gives, in the order of the rows that are compared."""


def build(arguments: argparse.Namespace, dtype: str, data: int = 1, tensor: int = 1) -> tuple[Model, Params]:
    mesh = make_mesh(data, 1, tensor, devices=jax.devices()[: data * tensor])
    return tiny_model(mesh, scale=arguments.scale, dtype=dtype, vocab_size=arguments.vocab, **SHAPE)


def prompts_of(arguments: argparse.Namespace, round_: int) -> list[Prompt]:
    rng = np.random.default_rng(round_)
    tokens = rng.integers(2, arguments.vocab, (arguments.prompts, WIDTH)).tolist()
    return [Prompt(round_ * arguments.prompts + i, tuple(some)) for i, some in enumerate(tokens)]


def rollout_of(
    arguments: argparse.Namespace, model: Model, params: Params, round_: int, prompts: Sequence[Prompt], **engine: int
) -> Rollout:
    longer, samples = engine.pop("longer", 0), engine.pop("samples", arguments.samples)
    sampling = Sampling(arguments.temperature, max_new_tokens=arguments.tokens + longer)
    limits = np.full(len(prompts) * samples, arguments.tokens)
    made = ContinuousEngine(model, engine.pop("prompt_len", WIDTH), **engine)
    call = {"num_samples": samples, "sampling": sampling, "seed": 0, "step": round_, "limits": limits}
    return made.generate(params, prompts, **call)


def contestants(arguments: argparse.Namespace, dtype: str) -> dict[str, tuple[Sampler, int]]:
    """Name -> what samples, and of each prompt's rows how many it samples."""
    model, params = build(arguments, dtype)
    several = min(8, len(jax.devices()))
    spread, spread_params = build(arguments, dtype, data=several)
    cut, cut_params = build(arguments, dtype, data=several // 2, tensor=2) if several > 1 else (spread, spread_params)
    everything = arguments.samples

    def whole(model: Model, params: Params, **engine: int) -> Sampler:
        def sample(round_: int) -> list[list[int]]:
            rollout = rollout_of(arguments, model, params, round_, prompts_of(arguments, round_), **engine)
            return [rollout.completion_ids(n) for n in range(len(rollout.tokens))]

        return sample

    def alone(round_: int) -> list[list[int]]:
        some = prompts_of(arguments, round_)
        return [rollout_of(arguments, model, params, round_, [p], samples=1).completion_ids(0) for p in some]

    return {
        "a batch of 1": (alone, 1),
        "16 slots, refilled": (whole(model, params, slots=16), everything),
        "other lengths of prompt and cache": (whole(model, params, prompt_len=3 * WIDTH, longer=600), everything),
        f"{several} devices, rows cut": (whole(spread, spread_params), everything),
        f"{several} devices, heads cut over 2": (whole(cut, cut_params), everything),
    }


def interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, count / total
    middle, spread = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return max(0.0, (middle - spread) / (1 + z * z / total)), (middle + spread) / (1 + z * z / total)


def flips(one: Sequence[list[int]], other: Sequence[list[int]]) -> tuple[int, int]:
    """Rows that differ, and tokens compared: up to the first difference of each row, it included."""
    count = total = 0
    for a, b in zip(one, other, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        count, total = count + (first is not None), total + (len(a) if first is None else first + 1)
    return count, total


@partial(jax.jit, static_argnums=(0, 3))
def learner_logp(model: Model, params: Params, tokens: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Log-probability of tokens[:, 1:] and entropies, as the learner computes them."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(params, tokens, positions, jnp.ones_like(tokens))[:, :-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    head, targets = model.unembedding(params), tokens[:, 1:].reshape(-1)
    options = {"temperature": temperature, "transposed": True, "precision": model.precision}
    logp, entropy = algo.logprobs_and_entropy(flat, head, targets, **options)
    assert entropy is not None
    return logp.reshape(tokens.shape[0], -1), entropy.reshape(tokens.shape[0], -1)


def gap(model: Model, params: Params, rollout: Rollout, temperature: float) -> tuple[np.ndarray, float]:
    """|sampler - learner| of each token, and the mean entropy."""
    logp, entropy = jax.device_get(learner_logp(model, params, rollout.tokens, temperature))
    mask = rollout.completion_mask[:, 1:]
    return np.abs(logp - rollout.sampler_logp[:, 1:])[mask], float(entropy[mask].mean())


def measure(arguments: argparse.Namespace, dtype: str) -> None:
    model, params = build(arguments, dtype)
    base = [rollout_of(arguments, model, params, r, prompts_of(arguments, r)) for r in range(arguments.rounds)]
    rows = [[rollout.completion_ids(n) for n in range(len(rollout.tokens))] for rollout in base]
    gaps, entropies = zip(*(gap(model, params, rollout, arguments.temperature) for rollout in base), strict=True)
    all_gaps = np.concatenate(gaps)
    print(f"| {dtype} | log-probs, sampler and learner | mean {all_gaps.mean():.2e}, max {all_gaps.max():.2e} | "
          f"{all_gaps.size} tokens, mean entropy {np.mean(entropies):.1f} nats |", flush=True)  # fmt: skip
    for name, (sampler, samples) in contestants(arguments, dtype).items():
        count = total = 0
        for round_ in range(arguments.rounds):
            wanted = [x for i, x in enumerate(rows[round_]) if i % arguments.samples < samples]
            more = flips(wanted, sampler(round_))
            count, total = count + more[0], total + more[1]
        low, high = interval(count, total)
        said = f"{1000 * count / total:.2f} ({1000 * low:.2f} to {1000 * high:.2f})"
        print(f"| {dtype} | flips per 1,000 tokens: {name} | {said} | {count} of {total} |", flush=True)


def measure_kept(arguments: argparse.Namespace, dtype: str) -> None:
    loaded, params = load_model(arguments.kept)
    model = replace(loaded, dtype=dtype, precision=None)
    for kept in ("auto", "bfloat16", "int8"):
        arguments.vocab = model.spec.vocab
        rollout = rollout_of(arguments, replace(model, kv_dtype=kept), params, 0, prompts_of(arguments, 0))
        gaps, entropy = gap(model, params, rollout, arguments.temperature)
        said = f"mean {gaps.mean():.2e}, max {gaps.max():.2e}"
        print(
            f"| {dtype} | kept in {kept} | {said} | {gaps.size} tokens, mean entropy {entropy:.1f} nats |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt; the batch has prompts * samples rows")
    parser.add_argument("--tokens", type=int, default=32, help="of each completion")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scale", type=float, default=2.0, help="of the matrices, times a fresh model's")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--kept", type=Path, help="directory of a checkpoint")
    arguments = parser.parse_args()
    if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":  # read when jax first looks for devices
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    print("| dtype | what | measured | of |\n|---|---|---|---|")
    for dtype in arguments.dtypes:
        (measure if arguments.kept is None else measure_kept)(arguments, dtype)


if __name__ == "__main__":
    main()
