"""Judge a model on a dataset: greedy accuracy, avg@k, pass@k and maj@k, each with its 95 % bootstrap interval.

    python scripts/evaluate.py MODEL DATA [--reward exact_match] [--samples 8] [--prompts 200] [--max-new-tokens 256]
    python scripts/evaluate.py runs/NAME [DATA] [--data.max_prompt_len 1024] [--rollout.stop_token_ids 2 7]

MODEL is a Hugging Face directory, a hub id, "quickstart", or the directory of a run, whose trained model is judged;
DATA what data.eval takes. A completion is right when the reward function gives more than --correct-above. maj@k counts
the answers that the reward function reads. A prompt with a completion that the reward did not score is left out and
said; where a tenth of them is, the command fails.

Every field of a run's config can be given as --dotted.field value (train.py --help shows them). What is not given is
as in the config of the run that MODEL is of, or lies in as hf/, or that --config names: the prompts, how they are made
and cut, chat template and system prompt, the reward and its options, what is sampled from and where it stops. DATA is
then by default the run's data.eval.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grpo_jax import rundir
from grpo_jax.cli import in_a_line
from grpo_jax.config import TrainConfig, read_toml
from grpo_jax.config.arguments import merge, take_fields
from grpo_jax.rewards.lookup import unique_names

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


OF_THE_RUN = {
    "model": ("revision", "dtype"),
    "data": tuple(name for name in TrainConfig().data.model_dump() if name != "train"),
    "rollout": (
        "max_new_tokens",
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("min_tokens", "stop_token_ids", "stop_strings", "banned_token_ids", "kv_dtype", "attention"),
    ),
    "reward": tuple(name for name in TrainConfig().reward.model_dump() if name not in ("weights", "stream")),
    "eval": ("prompts", "correct_above"),
}
"""Fields of a run's config that hold for its evaluation."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="?", help="default: the run's data.eval")
    parser.add_argument("--config", help="directory or config.toml of a run; none: what is not given has its default")
    parser.add_argument("--reward", help="default: the run's first; else exact_match, or quickstart for that model")
    parser.add_argument("--timeout-seconds", type=float, help="for 16 completions in the reward, default: 30")
    parser.add_argument(
        "--workers", type=int, help="processes of the reward, 16 completions at a time each; default: 1"
    )
    parser.add_argument("--environment", nargs="*", metavar="NAME", help="secrets that the reward gets")
    parser.add_argument("--samples", type=int, default=8, help="k; 0 judges greedily only")
    parser.add_argument("--prompts", type=int, help="the first so many")
    parser.add_argument("--prompt-column", help="default: prompt")
    parser.add_argument(
        "--as-messages", action="store_true", default=None, help="a prompt that is a string is a user's message"
    )
    parser.add_argument("--max-new-tokens", type=int, help="default: 256, or what the model has positions for")
    parser.add_argument("--temperature", type=float, help="of the samples, default: 1; --samples 0 judges greedily")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--correct-above", type=float, help="default: 0.5")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32")
    return in_a_line(partial(_read, parser, sys.argv[1:]))


def _read(parser: argparse.ArgumentParser, words: list[str]) -> None:
    fields, others = take_fields(words, TrainConfig)
    evaluate(parser.parse_args(others, argparse.Namespace(fields=fields)))


def evaluate(asked: argparse.Namespace) -> None:
    for name, value, low, high in figures(asked):
        print(f"{name:10} {value:6.1%}   95 % interval {low:.1%} to {high:.1%}", flush=True)


def run_of(asked: argparse.Namespace) -> Path | None:
    """The config of the run that the model is of; the model is then the one that it trained."""
    place = Path(asked.model).expanduser()
    if (place / rundir.CONFIG).is_file():
        if not (place / "hf").is_dir():
            raise ValueError(
                f"MODEL: the run {place} has not ended, so it holds no trained model yet. Start it again, or write the "
                f"model of its newest checkpoint with scripts/export_hf.py {place}, and give its directory."
            )
        asked.model = str(place / "hf")
    elif place.name == "hf" or place.name.startswith("hf-"):  # as export_hf.py names them
        place = place.parent
    if asked.config is not None:
        place = Path(asked.config).expanduser()
        if asked.config != "none" and not place.exists():
            raise ValueError(f"--config: {asked.config!r} does not exist. Give the directory of a run, or its config.")
    file = place if place.is_file() else place / rundir.CONFIG
    return file if file.is_file() and asked.config != "none" else None


def config_of(asked: argparse.Namespace, run: Path | None) -> TrainConfig:
    if asked.samples < 0:
        raise ValueError(f"--samples: got {asked.samples}. Use 0 to judge greedily only, or more.")
    recorded = {} if run is None else read_toml(run)
    recorded = {
        table: {name: value for name, value in recorded.get(table, {}).items() if name in names}
        for table, names in OF_THE_RUN.items()
    }
    named = {
        "model": {"dtype": asked.dtype},
        "data": {"eval": asked.data, "prompt_column": asked.prompt_column, "as_messages": asked.as_messages},
        "rollout": {"max_new_tokens": asked.max_new_tokens, "temperature": asked.temperature, "top_p": asked.top_p},
        "reward": {
            "functions": None if asked.reward is None else [asked.reward],
            "timeout_seconds": asked.timeout_seconds,
            "workers": asked.workers,
            "environment": asked.environment,
        },
        "eval": {"prompts": asked.prompts, "correct_above": asked.correct_above},
    }
    tables = merge(merge(recorded, asked.fields), {table: _given(fields) for table, fields in named.items()})
    model, rollout, reward = tables["model"], tables["rollout"], tables["reward"]
    model |= {"path": asked.model, "param_dtype": model.get("dtype", "float32")}
    rollout |= {"prompts_per_step": asked.slots, "num_samples": 2, "slots": asked.slots}
    usual = "quickstart" if asked.model == "quickstart" else "exact_match"
    reward["functions"] = list(reward.get("functions") or [usual])[:1]  # the first says what is right
    others = set(recorded["reward"].get("options", {})) - set(unique_names(reward["functions"]))
    reward["options"] = {name: given for name, given in reward.get("options", {}).items() if name not in others}
    tables["data"]["eval"] = _one_set(tables["data"].get("eval"))
    tables["seed"] = asked.seed
    try:
        return TrainConfig.from_tables(tables)
    except ValueError as error:
        lines = [line.partition(": ") for line in str(error).splitlines()]
        raise ValueError(
            "\n".join(dict.fromkeys(f"{OPTIONS.get(path, path)}: {why}" for path, _, why in lines))
        ) from None


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _one_set(known: Any) -> str:
    """What is judged on."""
    if isinstance(known, dict):
        raise ValueError(f"DATA: not given, and the run has several sets. Give one of {', '.join(known.values())}.")
    if known is None:
        raise ValueError("DATA: not given, and there is no run whose data.eval it could be. Give what data.eval takes.")
    return str(known)


def figures(asked: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    """(name, mean over prompts, ends of its interval) of each figure, when it is there."""
    # What takes seconds to import comes where Ctrl-C ends in a line.
    import numpy as np

    from grpo_jax.data import held_out_prompts, load_tokenizer, resolve_model, stop_ids
    from grpo_jax.evaluation import bootstrap_interval, meaningless, verdicts
    from grpo_jax.metrics import keep_compiled
    from grpo_jax.models import load_model
    from grpo_jax.preflight import check_model, check_prompts
    from grpo_jax.rollout import engine_from, room_for, sampling_from
    from grpo_jax.scoring import Scorer, pool_from

    keep_compiled(TrainConfig().compilation_cache)
    run = run_of(asked)
    config = config_of(asked, run)
    asked.correct_above, asked.reward = config.eval.correct_above, config.reward.functions[0]
    source = resolve_model(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(source)
    stops = frozenset(config.rollout.stop_token_ids or stop_ids(source, tokenizer))
    now = None if run is None else rundir.recorded_start(run.parent)
    held_out = held_out_prompts(config, tokenizer, now=now)["eval"]
    for said in held_out.reports:
        print(f"warning: {said}", file=sys.stderr)
    problems = list[str]()
    with pool_from(config, config.reward.functions) as pool:
        pool.check_columns(held_out.columns)
        room = config.rollout.max_new_tokens
        longest = held_out.longest + room
        model, params = load_model(source, config.model.dtype, param_dtype=config.model.param_dtype, longest=longest)
        check_prompts([held_out], model, pool)
        given = "max_new_tokens" in config.rollout.model_fields_set
        asked.max_new_tokens = room_for(model, held_out.longest, room if given else None)
        config = config_of(asked, run)
        check_model(config, model, held_out.longest, held_out.longest)
        engine = replace(engine_from(config.rollout, model, held_out.longest, tokenizer), ahead=False)
        view = engine.view(params)
        del params  # one copy of the model is enough
        sampling = sampling_from(config.rollout, stops)
        scorer = Scorer(pool, tokenizer, stops, config)
        for k, options in ((1, replace(sampling, temperature=0.0, top_k=None, top_p=None)), (asked.samples, sampling)):
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
