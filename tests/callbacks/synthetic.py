"""Runs made up on the spot: what the callbacks would be told, and what the trainer would have written, without jax."""

import random
from pathlib import Path

import numpy as np

from grpo_jax import rundir
from grpo_jax.callbacks import Evaluation, Run, Step
from grpo_jax.config import TrainConfig
from grpo_jax.metrics import JsonLines, TokenTexts, completion_rows, reward_metrics, rollout_metrics
from grpo_jax.scoring import Scored
from grpo_jax.types import Prompt, Rollout

NAMES = ("right", "format")


class Words:
    """A tokenizer of whole words: the token 3 is " w3", 0 ends a text."""

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        return "".join("<end>" if i == 0 else f" w{i}" for i in ids)


def config_for(directory, **log) -> TrainConfig:
    rollout = {"prompts_per_step": 3, "num_samples": 4, "max_new_tokens": 12}
    return TrainConfig.from_tables({"steps": 8, "output_dir": str(directory), "rollout": rollout, "log": log})


def step_of(number: int, groups: int = 3, samples: int = 4, text: str | None = None, longest: int = 12) -> Step:
    """A step whose rewards rise with its number; ``text`` replaces the first completion."""
    rng = np.random.default_rng(number)
    rows, prompt_len = groups * samples, 4
    length = rng.integers(1, longest + 1, rows).astype(np.int32)
    tokens = rng.integers(1, 50, (rows, prompt_len + longest)).astype(np.int32)
    finish = np.where(length == longest, "length", "stop")
    tokens[np.arange(rows), prompt_len + length - 1] = np.where(finish == "stop", 0, 7)
    logp = np.where(rng.random(tokens.shape) < 0.7, -0.01, -2.5).astype(np.float32)
    rollout = Rollout(tokens, np.full(rows, prompt_len, np.int32), length, logp, finish)
    completions = [Words().decode([i for i in rollout.completion_ids(n) if i]) for n in range(rows)]
    completions[0] = completions[0] if text is None else text
    right = (rng.random(rows) < min(0.9, 0.1 + number / 10)).astype(np.float32)
    form = rng.random(rows).astype(np.float32)
    form[rows // 2] = np.nan
    reward = (right + np.nan_to_num(form)).reshape(groups, samples)
    advantages = (reward - reward.mean(1, keepdims=True)).reshape(-1).astype(np.float32)
    scored = Scored(
        completions=completions,
        by_function=np.stack([right, form]),
        reward=reward,
        scored=np.ones((groups, samples), bool),
        spread=reward.max(1) > reward.min(1),
        advantages=advantages,
        mask=rollout.completion_mask,
        counted=np.ones(groups, bool),
        extra={"parsed": [f"w{i}" for i in range(rows)], "depth": list(range(rows))},
    )
    prompts = [Prompt(q, (1, 2, 3, 4), f"What is {q} + {number}?") for q in range(groups)]
    row = {"step": number, **reward_metrics(NAMES, scored), **rollout_metrics(rollout)}
    row |= {"entropy": 2.0 / number, "kl": 0.01 * number, "grad_norm": 0.3, "learning_rate": 1e-5, "seconds": 1.5}
    row |= {"clip_ratio/low": 0.0, "clip_ratio/high": 0.01, "clip_ratio/region": 0.01, "tokens_per_second": 900.0}
    row |= {"seconds/rollout": 0.9, "seconds/update": 0.5, "seconds/reward": 0.1, "seconds/elapsed": 1.5 * number}
    row |= {"compile_count": 3, "compiled": ["jit(update)"] if number == 1 else []}
    return Step(number, row, prompts, rollout, scored)


def evaluation_of(step: int, accuracy: float) -> Evaluation:
    return Evaluation(step, {"step": step, "eval/accuracy": accuracy, "eval/avg_at_k": accuracy - 0.1})


def run_of(directory: Path, config: TrainConfig | None = None, **fields) -> Run:
    return Run(config or config_for(directory), directory, Words(), NAMES, **fields)


def write_run(directory: Path, steps: int = 8, completions: int = 32, text: str | None = None, **shape) -> Path:
    """A run's files, as the trainer writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / rundir.CONFIG).write_text(config_for(directory).to_toml())
    metrics, lines = JsonLines(directory / rundir.METRICS), JsonLines(directory / rundir.COMPLETIONS)
    metrics.write(evaluation_of(0, 0.1).metrics)
    for number in range(1, steps + 1):
        step = step_of(number, text=text, **shape)
        metrics.write(step.metrics)
        for row in completion_rows(
            number, step.prompts, step.rollout, step.scored, NAMES, completions, TokenTexts(Words())
        ):
            lines.write(row)
    metrics.write(evaluation_of(steps, 0.6).metrics)
    metrics.close()
    lines.close()
    return directory


def write_many_completions(path: Path, count: int, tokens: int = 60, samples: int = 8) -> None:
    """``count`` lines of completions.jsonl of ordinary text, quickly."""
    rng = random.Random(0)
    words = [f" {''.join(rng.choices('etaoinshrdlu', k=rng.randint(1, 8)))}" for _ in range(5000)]
    file = JsonLines(path)
    for n in range(count):
        step, within = divmod(n, 32)
        pieces = rng.choices(words, k=rng.randint(tokens // 2, tokens * 3 // 2))
        right = float(rng.random() < 0.5)
        file.write(
            {
                "step": step + 1,
                "group": within // samples,
                "sample": within % samples,
                "prompt": f"Question {n // samples % 700}: " + "".join(rng.choices(words, k=20)),
                "completion": "".join(pieces),
                "rewards": {"right": right, "format": rng.random()},
                "reward": right,
                "advantage": right - 0.5,
                "finish": "stop",
                "length": len(pieces),
                "tokens": pieces,
                "logp": [round(-rng.expovariate(1.5), 2) for _ in pieces],
            }
        )
    file.close()
