"""The loop: sample, score, pack, annotate, update; after that log, evaluate and save."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax import rundir
from grpo_jax.batching import Layout, minibatches, pack, take
from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet, PromptStream, load_rows, load_tokenizer, resolve_asset, stop_ids
from grpo_jax.evaluation import avg_at_k, pass_at_k
from grpo_jax.mesh import batch_sharding, initialize_distributed, is_first, make_mesh, wait_for_all
from grpo_jax.metrics import (
    CompileLog,
    JsonLines,
    Phases,
    completion_rows,
    draw_curves,
    means,
    peak_memory,
    read_json_lines,
    reward_metrics,
    rollout_metrics,
    step_line,
)
from grpo_jax.models import Model, load_model, save_hf
from grpo_jax.preflight import report, versions
from grpo_jax.rewards import RewardPool
from grpo_jax.rollout import Sampling, StaticEngine
from grpo_jax.scoring import Scored, Scorer
from grpo_jax.step import Learner, learning_rate, make_optimizer
from grpo_jax.types import Params, Prompt, Rollout, TrainBatch

PROMPT_MULTIPLE = 8
"""Prompts are padded to the longest of the run, rounded up to this many tokens: one shape a run."""
EVAL_ROUND = 2**32 - 1
"""The round that addresses the uniforms of every evaluation, so that two of them differ by the parameters only."""
MOST_SKIPPED = 10
"""Updates in a row that may be skipped for a gradient that is not finite before the run gives up."""

RewardFunction = Callable[..., Any]
Rows = Sequence[dict[str, Any]]


class Trainer:
    """A whole training run.

    `Trainer(model=..., reward_funcs=..., train_dataset=...).train()` is all the code; what is not given comes from
    the config, whose defaults are the quickstart.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        train_dataset: str | Path | Rows | None = None,
        eval_dataset: str | Path | Rows | None = None,
        config: TrainConfig | None = None,
        name: str = "run",
    ):
        """Describe the run; nothing is loaded yet.

        Args:
            model: directory of a Hugging Face checkpoint with its tokenizer.
            reward_funcs: names (run in worker processes) or functions (run here),
                ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.
            train_dataset: JSONL file, or rows with a prompt column.
            eval_dataset: the same, held out; given training rows and no evaluation rows, nothing is evaluated.
            config: everything else.
            name: what the run's directory is called after when the config names none.
        """
        config = config or TrainConfig()
        rewards = config.reward.functions if reward_funcs is None else reward_funcs
        self._rewards = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
        self._train = config.data.train if train_dataset is None else train_dataset
        self._eval = eval_dataset
        if eval_dataset is None and train_dataset is None:
            self._eval = config.data.eval
        self._name = name
        tables = config.model_dump()
        tables["model"]["path"] = str(model or config.model.path)
        tables["data"] |= {"train": _describe(self._train), "eval": _describe(self._eval)}
        tables["reward"]["functions"] = [f if isinstance(f, str) else _qualified(f) for f in self._rewards]
        self.config = TrainConfig.from_tables(tables)

    def train(self) -> dict[str, Any]:
        """Run to the end, from the newest checkpoint of ``output_dir`` if it holds one.

        Returns:
            The summary that summary.json holds; on several hosts an empty one but for the first process.

        Raises:
            ValueError: whatever a user can mend, before the first compile where it can be known by then.
        """
        begun = time.perf_counter()
        _configure_jax(self.config)
        directory = Path(self.config.output_dir or "")
        if is_first():
            directory = rundir.open_run(self.config, self._name)
        wait_for_all("run directory")
        rewards = _reward_pool(self.config, self._rewards) if is_first() else nullcontext()
        with CompileLog() as compiles, rewards as pool:
            run = _Run(self.config, directory, pool, self._train, self._eval, compiles, begun)
            try:
                return run.loop()
            finally:
                run.close()


class _Run:
    """The parts of a run that is going on."""

    def __init__(
        self,
        config: TrainConfig,
        directory: Path,
        pool: RewardPool | None,
        train: str | Path | Rows,
        held_out: str | Path | Rows | None,
        compiles: CompileLog,
        begun: float,
    ):
        self.config, self.directory, self.compiles, self.begun = config, directory, compiles, begun
        self.source = resolve_asset(config.model.path, "model")
        tokenizer = load_tokenizer(self.source)
        self.prompts = PromptStream(
            _rows(train, "train", config),
            tokenizer,
            seed=config.seed,
            prompts_per_step=config.rollout.prompts_per_step,
            max_prompt_len=config.data.max_prompt_len,
            prompt_column=config.data.prompt_column,
            shuffle=config.data.shuffle,
        )
        self.held_out = None
        if held_out is not None:
            rows = _rows(held_out, "eval", config)[: config.eval.prompts]
            self.held_out = PromptSet(rows, tokenizer, config.data.max_prompt_len, config.data.prompt_column)
        stops = frozenset(config.rollout.stop_token_ids or stop_ids(self.source, tokenizer))
        self.sampling = Sampling(
            config.rollout.temperature,
            config.rollout.top_k,
            config.rollout.top_p,
            config.rollout.max_new_tokens,
            tuple(sorted(stops)),
        )
        self.scorer = Scorer(pool, tokenizer, stops, config)
        self.model, params = _load(config, self.source)
        self._build_learner()
        left_out = self.prompts.filtered_count + (self.held_out.filtered_count if self.held_out else 0)
        if left_out:
            self.say(f"{left_out} prompts are longer than data.max_prompt_len and are left out")
        self.say(report(self.model, config, self.layout, self.engine.prompt_len or 0))
        self._start(params)

    def _build_learner(self) -> None:
        config = self.config
        rows = config.rollout.prompts_per_step * config.rollout.num_samples
        longest = max(self.prompts.longest, self.held_out.longest if self.held_out else 0)
        prompt_len = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        self.engine = StaticEngine(self.model, prompt_len, rows)
        width = prompt_len + config.rollout.max_new_tokens
        if width > self.model.spec.max_len:
            raise ValueError(
                f"rollout.max_new_tokens: got {config.rollout.max_new_tokens}, with prompts of up to {longest} tokens "
                f"more than the {self.model.spec.max_len} positions the model was made for. Lower it, or "
                "data.max_prompt_len."
            )
        kind = config.batch.rows
        row_len = width if kind == "padded" else config.batch.row_len or 2 * width
        shards = self.model.compute.mesh.shape["data"] * self.model.compute.mesh.shape["fsdp"]
        micro = config.optim.microbatch_rows
        micro = None if micro is None else -(-micro // shards) * shards
        self.layout = Layout(kind, row_len, rows // config.optim.minibatches, micro or shards)
        updates = config.steps * config.updates_per_step
        self.learner = Learner(
            model=self.model,
            loss=config.loss,
            optimizer=make_optimizer(config.optim, updates, self.model.decay_mask),
            schedule=learning_rate(config.optim, updates),
            scored_len=config.rollout.max_new_tokens if kind == "padded" else row_len,
            temperature=config.rollout.temperature,
            microbatch_rows=micro,
            segmented=kind != "padded",
        )

    def _start(self, params: Params) -> None:
        """From the newest checkpoint, or from the model; the reference is where the run started from."""
        self.store = CheckpointStore(self.directory, self.config.checkpoint.keep)
        self.reference = None
        self.record: dict[str, Any] = {"step": 0, "cursor": 0, "seconds": 0.0, "phases": {}, "accuracy": []}
        if self.config.loss.kl_in_loss:
            self.store.save_reference(params)
        self.state = self.learner.init(params)
        newest = self.store.latest()
        if newest is not None:
            self.state, self.record = self.store.restore(newest, self.state)
            self.prompts.restore(self.record["cursor"])
            self.say(f"going on from step {newest} in {self.directory}")
        if self.config.loss.kl_in_loss:
            self.reference = params if newest is None else self.store.restore_reference(params)
        self.skipped = 0
        self.phases = Phases(self.record["phases"])
        below = None if newest is None else newest + 1
        nowhere = None if is_first() else Path(os.devnull)
        self.metrics = JsonLines(nowhere or self.directory / rundir.METRICS, below)
        self.completions = JsonLines(nowhere or self.directory / rundir.COMPLETIONS, below)

    def loop(self) -> dict[str, Any]:
        """All steps that remain, then the summary."""
        config, phase = self.config, self.phases
        start = self.record["step"]
        if start == 0:
            self.evaluate(0)
        for step in range(start, config.steps):
            begun = time.perf_counter()
            with phase("data"):
                prompts = self.prompts.next()
            with phase("rollout"):
                rollout = self.engine.generate(
                    self.state.params,
                    prompts,
                    num_samples=config.rollout.num_samples,
                    sampling=self.sampling,
                    seed=config.seed,
                    step=step,
                )
            if not np.isfinite(rollout.sampler_logp).all():
                raise ValueError(
                    f"after step {step} the model's log-probabilities are not finite, so what it samples means "
                    "nothing. Lower optim.learning_rate; an earlier checkpoint may still be sound."
                )
            with phase("reward"):
                scored = self.scorer.score(prompts, rollout)
            with phase("pack"):
                parts = self.pack(rollout, scored)
            with phase("annotate"):
                parts = [self.annotate(part) for part in parts]
            with phase("update"):
                figures = self.update(parts)
            self.after(step + 1, prompts, rollout, scored, figures, time.perf_counter() - begun)
        return self.finish()

    def pack(self, rollout: Rollout, scored: Scored) -> list[TrainBatch]:
        """Rows of each update of one epoch, on the devices."""
        parts = []
        for rows in minibatches(rollout, self.config.optim.minibatches):
            part = pack(take(rollout, rows), scored.advantages[rows], scored.mask[rows], self.layout)
            parts.append(jax.device_put(part, batch_sharding(self.model.compute.mesh)))
        return parts

    def annotate(self, batch: TrainBatch) -> TrainBatch:
        """Add old_logp when the rollout is trained on more than once, ref_logp when there is a KL."""
        if self.config.updates_per_step > 1:
            batch = replace(batch, old_logp=self.learner.logprobs(self.state.params, batch))
        if self.reference is not None:
            batch = replace(batch, ref_logp=self.learner.logprobs(self.reference, batch))
        return batch

    def update(self, parts: list[TrainBatch]) -> dict[str, float]:
        """Every update on one rollout; its figures, averaged over tokens or updates."""
        sequences = np.int32(self.layout.sample_count)
        sums, maxima = [], []
        for _ in range(self.config.optim.epochs):
            for part in parts:
                self.state, *figures = self.learner.update(self.state, part, sequences)
                sums.append(figures[0])
                maxima.append(figures[1])
        sums, maxima = jax.device_get((sums, maxima))
        out = means(sums) | {name: float(np.max([m[name] for m in maxima])) for name in maxima[0]}
        out["batch/row_count"] = sum(part.tokens.shape[0] for part in parts)
        self.skipped = self.skipped + 1 if out["skipped_update_count"] == len(sums) else 0
        if self.skipped > MOST_SKIPPED and not np.isfinite(out["grad_norm"]):
            raise ValueError(
                f"the gradient was not finite in {self.skipped} steps in a row, so nothing is learned any more. "
                "Lower optim.learning_rate, or compute in float32 (model.dtype)."
            )
        return out

    def after(
        self,
        step: int,
        prompts: list[Prompt],
        rollout: Rollout,
        scored: Scored,
        figures: dict[str, float],
        seconds: float,
    ) -> None:
        """Log what the step gave; evaluate and save when it is time. Host only."""
        tokens = int(rollout.completion_len.sum())
        names = self.scorer.pool.names if self.scorer.pool else self.config.reward.functions
        row: dict[str, Any] = {"step": step, **reward_metrics(names, scored), **rollout_metrics(rollout), **figures}
        row |= {f"seconds/{name}": spent for name, spent in self.phases.take_step().items()}
        row |= {"seconds": seconds, "seconds/elapsed": self.elapsed()}
        row |= {"tokens_per_second": tokens / seconds} | self.compiles.take_step()
        self.metrics.write(row)
        for line in completion_rows(step, prompts, rollout, scored, names, self.config.log.completions):
            self.completions.write(line)
        for warning in scored.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        self.say(step_line(self.config.steps, row))
        last = step == self.config.steps
        if last or _is_time(step, self.config.eval.every):
            self.evaluate(step)
        if last or _is_time(step, self.config.checkpoint.every):
            self.save(step)

    def evaluate(self, step: int) -> None:
        """Greedy accuracy, and avg@k and pass@k over samples, on the held-out prompts."""
        if self.held_out is None:
            return
        with self.phases("evaluate"):
            prompts = self.held_out.prompts
            greedy = self._correct(prompts, 1, replace(self.sampling, temperature=0.0, top_k=None, top_p=None))
            row = {"step": step, "eval/accuracy": float(greedy.mean())}
            k = self.config.eval.samples
            if k:
                correct = self._correct(prompts, k, self.sampling).sum(1)
                row |= {
                    "eval/avg_at_k": float(np.mean([avg_at_k(k, int(c)) for c in correct])),
                    "eval/pass_at_k": float(np.mean([pass_at_k(k, int(c), k) for c in correct])),
                }
        self.record["accuracy"].append(row["eval/accuracy"])
        row["seconds/elapsed"] = self.elapsed()
        self.metrics.write(row)
        names = {"eval/accuracy": "greedy", "eval/avg_at_k": f"avg@{k}", "eval/pass_at_k": f"pass@{k}"}
        self.say(f"held-out after step {step}: " + ", ".join(f"{n} {row[f]:.1%}" for f, n in names.items() if f in row))

    def _correct(self, prompts: list[Prompt], samples: int, sampling: Sampling) -> np.ndarray:
        """[prompts, samples] bool: the first reward function is above the threshold."""
        rollout = self.engine.generate(
            self.state.params,
            prompts,
            num_samples=samples,
            sampling=sampling,
            seed=self.config.seed,
            step=EVAL_ROUND,
        )
        _, by_function, warnings = self.scorer.rewards(prompts, rollout)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return (np.nan_to_num(by_function[0]) > self.config.eval.correct_above).reshape(len(prompts), samples)

    def save(self, step: int) -> None:
        """Write the one record from which the run goes on."""
        with self.phases("checkpoint"):
            self.record |= {"step": step, "cursor": self.prompts.state(), "phases": dict(self.phases.total)}
            self.store.save(step, self.state, self.record | {"seconds": self.elapsed()})

    def finish(self) -> dict[str, Any]:
        """Export, draw and sum up."""
        with self.phases("export"):
            self.store.wait()
            save_hf(self.model, self.state.params, self.directory / "hf", source=self.source)
            if not is_first():
                return {}
            draw_curves(read_json_lines(self.directory / rundir.METRICS), self.directory / "curves.png")
        accuracy = self.record["accuracy"]
        summary = {
            "accuracy_first": accuracy[0] if accuracy else None,
            "accuracy_best": max(accuracy) if accuracy else None,
            "accuracy_last": accuracy[-1] if accuracy else None,
            "steps": self.config.steps,
            "seconds": self.elapsed(),
            "seconds_by_phase": dict(self.phases.total),
            "compile_seconds": self.compiles.seconds,
            "peak_memory_bytes": peak_memory(),
            "versions": versions(),
        }
        rundir.write_json(self.directory / rundir.SUMMARY, summary)
        if accuracy:
            gain = f"held-out accuracy {accuracy[0]:.1%} -> {accuracy[-1]:.1%}, best {max(accuracy):.1%}"
            print(f"{gain}; {self.config.steps} steps in {summary['seconds']:.0f} s; everything is in {self.directory}")
        return summary

    def close(self) -> None:
        """Wait for what is being written and close the files."""
        self.store.close()
        self.metrics.close()
        self.completions.close()

    def elapsed(self) -> float:
        """Seconds since the run began, those before a resume included."""
        return self.record["seconds"] + time.perf_counter() - self.begun

    def say(self, line: str) -> None:
        """Print a line, unless the run is quiet."""
        if not self.config.log.quiet and is_first():
            print(line, flush=True)


def _configure_jax(config: TrainConfig) -> None:
    if config.mesh.distributed:
        initialize_distributed(config.mesh.coordinator, config.mesh.process_count, config.mesh.process_id)
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _reward_pool(config: TrainConfig, functions: Sequence[str | RewardFunction]) -> RewardPool:
    overlong = {"max_completion_len": config.rollout.max_new_tokens}
    return RewardPool(
        functions,
        config.reward.timeout_seconds,
        config.reward.memory_limit_mb,
        {"soft_overlong": overlong} if "soft_overlong" in functions else None,
    )


def _load(config: TrainConfig, source: Path) -> tuple[Model, Params]:
    table = config.model
    return load_model(
        source,
        dtype=table.dtype,
        mesh=make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor),
        param_dtype=table.param_dtype,
        precision=table.matmul_precision,
        remat=table.remat or "none",
    )


def _rows(source: str | Path | Rows, kind: str, config: TrainConfig) -> list[dict[str, Any]]:
    if isinstance(source, (str, Path)):
        return load_rows(resolve_asset(str(source), kind), config.data.prompt_column)
    return list(source)


def _describe(source: str | Path | Rows | None) -> str | None:
    """What the record says of a data set: its path, or how many rows were handed in."""
    return str(source) if isinstance(source, (str, Path)) else None if source is None else f"<{len(source)} rows>"


def _qualified(function: RewardFunction) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"


def _is_time(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
