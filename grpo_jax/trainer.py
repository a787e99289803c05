"""The loop: collect a batch, learn from it; after that log, evaluate and save."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax import inputs, rundir
from grpo_jax.batching import Layout
from grpo_jax.beginning import begin, open_lines
from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.callbacks.watchers import Watchers
from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.collect import Collected, Collector
from grpo_jax.config import TrainConfig
from grpo_jax.data import (
    PromptSet,
    PromptStream,
    describe,
    held_out_prompts,
    load_tokenizer,
    read_template,
    resolve_model,
    stop_ids,
    training_prompts,
)
from grpo_jax.evaluator import Evaluator
from grpo_jax.interrupt import Interrupt
from grpo_jax.learner.learning import Learning, adapted, layout_of
from grpo_jax.mesh import anywhere, from_first, initialize_distributed, is_first, make_mesh, wait_for_all
from grpo_jax.metrics import (
    CompileLog,
    Phases,
    TokenTexts,
    completion_rows,
    keep_compiled,
    peak_memory,
    reward_metrics,
    rollout_metrics,
)
from grpo_jax.models import Model, View, load_model, save_hf
from grpo_jax.peers import Peers
from grpo_jax.preflight import (
    be_deterministic,
    check_model,
    check_prompts,
    report,
    require_devices,
    room_for_cache,
    versions,
)
from grpo_jax.rewards import RewardPool
from grpo_jax.rollout import engine_from, sampling_from
from grpo_jax.rollout.setup import slots_for
from grpo_jax.scoring import Scorer, pool_from
from grpo_jax.types import Params

PROMPT_MULTIPLE = 8
"""Prompts are padded to the longest of the run, rounded up to this many tokens: one shape a run."""

RewardFunction = Callable[..., Any]
Source = Any
"""A path, the id of a data set on the hub, a `datasets.Dataset`, or a sequence of rows; or a mapping of several."""


class Trainer:
    """A whole training run.

    `Trainer(model=..., reward_funcs=..., train_dataset=...).train()` is all the code; what is not given comes from
    the config, whose defaults are the quickstart.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        train_dataset: Source = None,
        eval_dataset: Source = None,
        config: TrainConfig | None = None,
        callbacks: Sequence[Callback] = (),
        name: str = "run",
    ):
        """Describe the run; nothing is loaded yet.

        Args:
            model: directory of a Hugging Face checkpoint with its tokenizer, or its id on the hub.
            reward_funcs: names (run in worker processes) or functions (run here),
                ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.
            train_dataset: a file, a data set of the hub, a `datasets.Dataset` or rows with a prompt column; or a
                mapping of several names to their weights.
            eval_dataset: the same, held out, or a mapping of names to them; given training rows and no evaluation
                rows, here or in the config, nothing is evaluated.
            config: everything else.
            callbacks: what looks on, behind those the config names; any of them may end the run.
            name: what the run's directory is called after when the config names none.
        """
        _check_arguments(model, reward_funcs, train_dataset, config, callbacks)
        config = config or TrainConfig()
        _check_reward(model, reward_funcs, train_dataset, config)
        rewards = config.reward.functions if reward_funcs is None else reward_funcs
        self._rewards = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
        self._train = config.data.train if train_dataset is None else train_dataset
        self._eval = eval_dataset
        if eval_dataset is None and (train_dataset is None or config.data.eval != TrainConfig().data.eval):
            self._eval = config.data.eval
        self._name, self._callbacks = name, tuple(callbacks)
        tables = config.model_dump()
        tables["model"]["path"] = str(model or config.model.path)
        tables["data"] |= {"train": describe(self._train), "eval": describe(self._eval)}
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
        mesh = self.config.mesh
        if self.config.deterministic:
            be_deterministic()
        if mesh.distributed:
            initialize_distributed(mesh.coordinator, mesh.process_count, mesh.process_id)
        with Peers(Path(self.config.output_dir or "")) as peers, ExitStack() as parts:
            require_devices(mesh.platform)
            keep_compiled(self.config.compilation_cache)
            opened = rundir.open_run(self.config, self._name) if is_first() else None
            if opened is not None:
                parts.callback(opened.lock.close)
            wait_for_all("run directory")
            directory = opened.directory if opened else Path(self.config.output_dir or "")
            compiles = parts.enter_context(CompileLog())
            pool = parts.enter_context(pool_from(self.config, self._rewards)) if is_first() else None
            watchers = parts.enter_context(Watchers(self.config, directory, self._callbacks))
            run = _Run(self.config, directory, pool, self._train, self._eval, watchers, compiles, begun, opened)
            parts.callback(run.close)
            peers.before_leaving(run.store.settle)
            return run.loop()


class _Run:
    """The parts of a run that is going on."""

    def __init__(
        self,
        config: TrainConfig,
        directory: Path,
        pool: RewardPool | None,
        train: Source,
        held_out: Source,
        watchers: Watchers,
        compiles: CompileLog,
        begun: float,
        opened: rundir.Opened | None,
    ):
        self.config, self.directory, self.watchers = config, directory, watchers
        self.compiles, self.begun, self.phases = compiles, begun, Phases()
        self.source = resolve_model(config.model.path, config.model.revision)
        self.tokenizer = load_tokenizer(self.source)
        self.token_texts = TokenTexts(self.tokenizer)
        now = _time_of_start(directory)
        self.template = read_template(config.data)  # as it is now: its file may change while the run goes on
        prompts = training_prompts(config, self.tokenizer, train, now)
        sets = held_out_prompts(config, self.tokenizer, held_out, now)
        self.model, params = _load(config, self.source)
        every: list[PromptStream | PromptSet] = [prompts, *sets.values()]
        check_prompts(every, self.model, pool)
        longest = max(each.longest for each in every)
        prompt_len = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        check_model(config, self.model, longest, prompt_len)
        self.most_new = self.model.spec.max_len - prompt_len
        stops = frozenset(config.rollout.stop_token_ids or stop_ids(self.source, self.tokenizer))
        sampling = sampling_from(config.rollout, stops)
        layout = layout_of(config, self.model, prompt_len)
        slots = self._slots(layout, prompt_len)
        self.engine = engine = engine_from(config.rollout, self.model, prompt_len, self.tokenizer, slots)
        self.view: View | None = None
        scorer = Scorer(pool, self.tokenizer, stops, config)
        self.names = tuple(pool.names) if pool else config.reward.functions
        self.collector = Collector(prompts, engine, scorer, sampling, config, self.phases)
        self.evaluator = Evaluator(sets, engine, scorer, sampling, config, watchers.warn)
        self.facts = [*(opened.facts if opened else ()), report(self.model, config, layout, prompt_len)]
        self.warnings = list(opened.warnings if opened else ())
        if len(prompts) < config.rollout.prompts_per_step:
            self.facts.append(
                f"rollout.prompts_per_step: got {config.rollout.prompts_per_step} with {len(prompts)} prompts to draw "
                "from, so a step holds some of them several times"
            )
        self.facts += dict.fromkeys(said for each in every for said in each.reports)
        self.learning = Learning(config, self.model, params, layout, self.phases)
        self._start(inputs.digests(config, self.source, prompts, sets, stops))

    def _slots(self, layout: Layout, prompt_len: int) -> int:
        """Rows that decode at once: decided from the device's memory once in a run."""
        room = room_for_cache(self.model, self.config, layout, prompt_len)
        found = {"rollout.slots": slots_for(self.config.rollout, self.model, prompt_len, room)}
        if is_first():
            found = rundir.decided(self.directory, found)
        return int(from_first(np.asarray(found["rollout.slots"])))

    def _start(self, given: dict[str, str]) -> None:
        """From the newest sound checkpoint, or from the model; ``given`` are digests of the inputs."""
        self.store = CheckpointStore(self.directory, self.config.checkpoint.keep)
        beginning = begin(self.store, self.learning, self.collector, given)
        self.record = beginning.record
        self.record.setdefault("unscored", {"training": dict.fromkeys(self.names, 0), "held_out": 0})
        start = self.record["step"]
        self.phases.total.update(self.record["phases"])
        if beginning.resumed:
            self.facts.append(f"going on from step {start} in {self.directory}")
        self.metrics, self.completions, history = open_lines(self.directory, beginning)
        states, facts = self.record.get("callbacks", {}), tuple(self.facts)
        run = Run(self.config, self.directory, self.tokenizer, self.names, start, facts, history, states, self.most_new)
        self.ended = self.watchers.start(run)
        for text in [*self.warnings, *beginning.warnings]:
            self.watchers.warn(text)

    def loop(self) -> dict[str, Any]:
        """All steps that remain, then the summary."""
        start, config = self.record["step"], self.config
        with Interrupt() as interrupt:
            ended = self.ended or (start == 0 and self.evaluate(0))
            for step in range(start, config.steps):
                if ended:
                    break
                if anywhere(interrupt.requested):
                    self.save(step)
                    raise interrupt.ended(step, self.directory)
                self.watchers.begin(step + 1)
                begun = time.perf_counter()
                batch = self.collector.next(self.weights(), step)
                self.view = None  # what decodes is a second copy of the model: none while training
                batch, figures = self.learning.train(batch)
                if step == start:
                    self.engine.wait()  # from here on nothing compiles
                ended = self.after(step + 1, batch, figures, time.perf_counter() - begun)
        return self.finish()

    def weights(self) -> View:
        """What decodes, made of the newest parameters once for all that samples until the next update."""
        if self.view is None:
            with self.phases("rollout"):
                self.view = self.engine.view(self.learning.params)
        return self.view

    def after(self, step: int, batch: Collected, figures: dict[str, float], seconds: float) -> bool:
        """Log what the step gave; evaluate and save when it is time; whether the run ends here. Host only."""
        row: dict[str, Any] = {"step": step, **reward_metrics(self.names, batch.scored)}
        row |= {**rollout_metrics(batch.rollout), **figures, **batch.metrics}
        row |= {f"seconds/{name}": spent for name, spent in self.phases.take_step().items()}
        row |= {"seconds": seconds, "seconds/elapsed": self.elapsed()}
        row |= {"tokens_per_second": int(batch.rollout.completion_len.sum()) / seconds} | self.compiles.take_step()
        row |= {f"logged/{name}" if name in row else name: value for name, value in batch.scored.metrics.items()}
        self.metrics.write(row)
        for name in self.names:
            self.record["unscored"]["training"][name] += row[f"rewards/{name}/unscored"]
        lines = completion_rows(
            step,
            batch.prompts,
            batch.rollout,
            batch.scored,
            self.names,
            self.config.log.completions,
            self.token_texts,
        )
        for line in lines:
            self.completions.write(line)
        for warning in batch.warnings:
            self.watchers.warn(warning)
        ended = self.watchers.step(Step(step, row, batch.prompts, batch.rollout, batch.scored))
        last = ended or step == self.config.steps
        if last or _is_time(step, self.config.eval.every):
            ended = self.evaluate(step) or ended
        if ended or last or _is_time(step, self.config.checkpoint.every):
            self.save(step)
        return ended

    def evaluate(self, step: int) -> bool:
        """Figures on every held-out set; whether the run ends here."""
        if not self.evaluator.held_out:
            return False
        view = self.weights()
        with self.phases("evaluate"):
            figures = self.evaluator.evaluate(view, self.collector.progress(step))
        row: dict[str, Any] = {"step": step, **figures}
        accuracy = row["eval/accuracy"]
        self.record["accuracy"].append(accuracy if np.isfinite(accuracy) else None)
        self.record["unscored"]["held_out"] = row["eval/unscored"]
        row["seconds/elapsed"] = self.elapsed()
        self.metrics.write(row)
        return self.watchers.evaluation(Evaluation(step, row))

    def save(self, step: int) -> None:
        """Write the one record from which the run goes on, unless it is there already."""
        if step == self.record["step"]:
            return
        with self.phases("checkpoint"):
            self.record |= {"step": step, "collector": self.collector.state(), "phases": dict(self.phases.total)}
            self.record["callbacks"] = self.watchers.state()
            self.learning.save(self.store, step, self.record | {"seconds": self.elapsed()})

    def finish(self) -> dict[str, Any]:
        """Export and sum up."""
        self.view = None
        with self.phases("export"):
            self.store.wait()
            hf = self.directory / "hf"
            save_hf(self.model, self.learning.params, hf, source=self.source, chat_template=self.template)
        if not is_first():
            return {}
        accuracy = self.record["accuracy"]
        summary = {
            "accuracy_first": accuracy[0] if accuracy else None,
            "accuracy_best": max((figure for figure in accuracy if figure is not None), default=None),
            "accuracy_last": accuracy[-1] if accuracy else None,
            "unscored": self.record["unscored"],
            "steps": self.record["step"],
            "seconds": self.elapsed(),
            "seconds_by_phase": dict(self.phases.total),
            "compile_seconds": self.compiles.seconds,
            "peak_memory_bytes": peak_memory(),
            "versions": versions(),
        }
        rundir.write_json(self.directory / rundir.SUMMARY, summary)
        self.watchers.end(summary)
        return summary

    def close(self) -> None:
        """Wait for what is being written and close the files."""
        self.store.close()
        self.metrics.close()
        self.completions.close()

    def elapsed(self) -> float:
        """Seconds since the run began, those before a resume included."""
        return self.record["seconds"] + time.perf_counter() - self.begun


def _check_arguments(model: Any, reward_funcs: Any, train_dataset: Any, config: Any, callbacks: Sequence[Any]) -> None:
    """Refuse objects that Trainer cannot take, such as other trainers take."""
    if config is not None and not isinstance(config, TrainConfig):
        raise ValueError(
            f"config: got a {type(config).__name__}, which is no TrainConfig; give TrainConfig.from_tables(nested "
            "dictionaries) or TrainConfig.from_toml(path)"
        )
    if model is not None and not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"model: got a {type(model).__name__}, but a run loads its model itself; give the directory of a Hugging "
            'Face checkpoint, or a hub id "owner/name"'
        )
    several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
    for function in reward_funcs if several else [] if reward_funcs is None else [reward_funcs]:
        if not isinstance(function, str) and not callable(function):
            raise ValueError(
                f"reward_funcs: got {function!r}, which cannot be called; give functions, or names as reward.functions "
                "takes them"
            )
    if isinstance(train_dataset, Mapping) and not all(isinstance(part, int | float) for part in train_dataset.values()):
        raise ValueError(
            f"train_dataset: got several datasets, {list(train_dataset)}, where one is needed, or a mapping of names "
            "to weights; give one of them"
        )
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks: got {callback!r}, which is no grpo_jax.callbacks.Callback; derive its class from that, "
                "and give an object of it"
            )


def _check_reward(model: Any, reward_funcs: Any, train_dataset: Any, config: TrainConfig) -> None:
    """Refuse to judge a run with its own model and data by the shipped task's reward, unless somebody named that."""
    named = reward_funcs is not None or "functions" in config.reward.model_fields_set
    train = config.data.train if train_dataset is None else describe(train_dataset)
    if not named and train != "quickstart" and str(model or config.model.path) != "quickstart":
        raise ValueError(
            "reward.functions: got none for a model and data of your own, and the default, 'quickstart', is the reward "
            "of the task that the package ships. Name what judges your data, such as exact_match or "
            "my_rewards.py:function, or give Trainer reward_funcs; name quickstart where it is meant."
        )


def _time_of_start(directory: Path) -> datetime:
    """When the run began, whatever process asks and however often it went on: what chat templates are told."""
    seconds = rundir.time_of_start(directory) if is_first() else 0
    return rundir.moment(int(from_first(np.asarray(seconds, np.int32))))


def _load(config: TrainConfig, source: Path) -> tuple[Model, Params]:
    table, mesh = config.model, config.mesh
    model, params = load_model(
        source,
        dtype=table.dtype,
        mesh=make_mesh(mesh.data, mesh.fsdp, mesh.tensor, mesh.expert),
        param_dtype=table.param_dtype,
        precision=table.matmul_precision,
        remat=table.remat or "none",
        longest=config.data.max_prompt_len + config.rollout.max_new_tokens,
    )
    model = adapted(model, table.lora)
    return model, params if model.lora is None else model.joined(model.init_adapters(config.seed), params)


def _qualified(function: RewardFunction) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"


def _is_time(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
