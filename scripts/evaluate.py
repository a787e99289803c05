"""Judge a model on a dataset: greedy accuracy, avg@k, pass@k and maj@k, each with its 95 % bootstrap interval.

    python scripts/evaluate.py MODEL DATA [--reward exact_match] [--samples 8] [--prompts 200] [--max-new-tokens 256]

MODEL is a Hugging Face directory, a hub id, or "quickstart"; DATA what data.eval takes. A completion is right when the
reward function gives more than --correct-above. maj@k counts the answers that the reward function reads. A prompt with
a completion that the reward did not score is left out and said; where a tenth of them is, the command fails.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from grpo_jax.cli import in_a_line
from grpo_jax.config import TrainConfig

OPTIONS = {
    "rollout.prompts_per_step": "--slots",
    "rollout.slots": "--slots",
    "rollout.max_new_tokens": "--max-new-tokens",
    "rollout.temperature": "--temperature",
    "rollout.top_p": "--top-p",
    "eval.prompts": "--prompts",
    "eval.correct_above": "--correct-above",
    "data.prompt_column": "--prompt-column",
    "reward.timeout_seconds": "--timeout-seconds",
    "reward.workers": "--workers",
    "seed": "--seed",
}
"""Fields of a run's config -> the options that are put there."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--reward", help="default: exact_match, or quickstart for that model")
    parser.add_argument("--timeout-seconds", type=float, default=30.0, help="for 16 completions in the reward")
    parser.add_argument("--workers", type=int, default=1, help="processes of the reward, each asked about 16 at a time")
    parser.add_argument("--environment", nargs="*", default=[], metavar="NAME", help="secrets that the reward gets")
    parser.add_argument("--samples", type=int, default=8, help="k; 0 judges greedily only")
    parser.add_argument("--prompts", type=int, help="the first so many")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--as-messages", action="store_true", help="a prompt that is a string is a user's message")
    parser.add_argument("--max-new-tokens", type=int, help="default: 256, or what the model has positions for")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples; --samples 0 judges greedily")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--correct-above", type=float, default=0.5)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return in_a_line(partial(evaluate, parser.parse_args()))


def evaluate(asked: argparse.Namespace) -> None:
    for name, value, low, high in figures(asked):
        print(f"{name:10} {value:6.1%}   95 % interval {low:.1%} to {high:.1%}", flush=True)


def config_of(asked: argparse.Namespace) -> TrainConfig:
    if asked.samples < 0:
        raise ValueError(f"--samples: got {asked.samples}. Use 0 to judge greedily only, or more.")
    from grpo_jax.rollout import USUAL_ROOM

    rollout = {
        "max_new_tokens": USUAL_ROOM if asked.max_new_tokens is None else asked.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
    }
    tables = {
        "seed": asked.seed,
        "model": {"path": asked.model, "dtype": asked.dtype, "param_dtype": asked.dtype},
        "data": {"eval": asked.data, "prompt_column": asked.prompt_column, "as_messages": asked.as_messages},
        "rollout": rollout | {"prompts_per_step": asked.slots, "num_samples": 2, "slots": asked.slots},
        "reward": {
            "functions": [asked.reward],
            "timeout_seconds": asked.timeout_seconds,
            "workers": asked.workers,
            "environment": asked.environment,
        },
        "eval": {"prompts": asked.prompts, "correct_above": asked.correct_above},
    }
    try:
        return TrainConfig.from_tables(tables)
    except ValueError as error:
        lines = [line.partition(": ") for line in str(error).splitlines()]
        raise ValueError(
            "\n".join(dict.fromkeys(f"{OPTIONS.get(path, path)}: {why}" for path, _, why in lines))
        ) from None


def figures(asked: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    """(name, mean over prompts, ends of its interval) of each figure, when it is there."""
    # What takes seconds to import comes where Ctrl-C ends in a line.
    import numpy as np

    from grpo_jax.data import held_out_prompts, load_tokenizer, resolve_model, stop_ids
    from grpo_jax.evaluation import bootstrap_interval, meaningless, verdicts
    from grpo_jax.metrics import keep_compiled
    from grpo_jax.models import load_model
    from grpo_jax.rewards import RewardPool
    from grpo_jax.rollout import engine_from, room_for, sampling_from
    from grpo_jax.scoring import Scorer

    keep_compiled(TrainConfig().compilation_cache)
    asked.reward = asked.reward or ("quickstart" if asked.model == "quickstart" else "exact_match")
    config = config_of(asked)
    source = resolve_model(config.model.path)
    tokenizer = load_tokenizer(source)
    stops = stop_ids(source, tokenizer)
    held_out = held_out_prompts(config, tokenizer)["eval"]
    reward, problems = config.reward, list[str]()
    limits = {"workers": reward.workers, "environment": reward.environment}
    with RewardPool([asked.reward], reward.timeout_seconds, reward.memory_limit_mb, **limits) as pool:
        pool.check_columns(held_out.columns)
        longest = held_out.longest + config.rollout.max_new_tokens
        model, params = load_model(source, config.model.dtype, param_dtype=config.model.param_dtype, longest=longest)
        asked.max_new_tokens = room_for(model, held_out.longest, asked.max_new_tokens)
        config = config_of(asked)
        engine = replace(engine_from(config.rollout, model, held_out.longest, tokenizer), ahead=False)
        view = engine.view(params)
        del params  # one copy of the model is enough
        sampling = sampling_from(config.rollout, stops)
        scorer = Scorer(pool, tokenizer, stops, config)
        for k, options in ((1, replace(sampling, temperature=0.0, top_p=None)), (asked.samples, sampling)):
            if not k:
                continue
            how = "samples each" if options is sampling else "greedy completion each"
            print(f"{len(held_out.prompts)} prompts, {k} {how} ...", file=sys.stderr, flush=True)
            rollout = engine.generate(view, held_out.prompts, num_samples=k, sampling=options, seed=config.seed, step=0)
            answers = scorer.rewards(held_out.prompts, rollout)
            for warning in answers.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            judged, right = verdicts(answers.by_function[0].reshape(-1, k), asked.correct_above)
            problems += filter(None, [meaningless(judged, pool.names[0])])
            texts = [text for n, text in enumerate(answers.completions) if judged[n // k]]
            if len(texts) < len(judged) * k:
                print(f"{(~judged).sum()} of {len(judged)} prompts are not scored and left out", file=sys.stderr)
            greedy = [("greedy", right[:, 0].astype(float))]
            for name, values in of_samples(right, texts, asked.reward) if texts and options is sampling else greedy:
                if texts:
                    yield name, float(np.mean(values)), *bootstrap_interval(values)
    if problems:
        raise ValueError(problems[0])


def of_samples(right: Any, texts: list[str], reward: str) -> list[tuple[str, Any]]:
    """[P, k] bool, the P * k texts and the reward that judged them -> the figures by prompt, each [P]."""
    from grpo_jax.evaluation import avg_at_k, maj_at_k, pass_at_k
    from grpo_jax.rewards.votes import vote_of

    k = right.shape[1]
    said = list(map(vote_of(reward), texts))
    votes = [said[start : start + k] for start in range(0, len(said), k)]
    counts = right.sum(1)
    return [
        (f"avg@{k}", avg_at_k(k, counts)),
        (f"pass@{k}", pass_at_k(k, counts, k)),
        (f"maj@{k}", maj_at_k(votes, right)),
    ]


if __name__ == "__main__":
    sys.exit(main())
