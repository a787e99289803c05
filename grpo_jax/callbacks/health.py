"""Health in words: what makes a run learn nothing is said once each, with the field to change.

A check is a function of the last steps and a row of `CHECKS`. It looks at several steps, so that one odd step says
nothing, and it is silent where another check has already named the cause.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.callbacks import Callback, Run, Step
from grpo_jax.config import TrainConfig
from grpo_jax.config.refusals import ALONE

ALIKE = 0.95
"""Share of groups without spread from which a run is told of it: of twenty prompts not more than one then teaches
anything. Over the quickstart it goes from 0.5 down to 0.2 and, as the task is learned, up to 0.6."""
CUT = 0.5
"""Share of completions cut at the limit: above a half, the typical completion is judged without its end."""
ENDING = 0.95
"""Share of completions that the suggested length would let end."""
FEWEST = 64
"""Completions before "never" means anything: were one in twenty to stop, 64 without one have a chance of 4 %."""
COLLAPSED = 0.1
"""Entropy over that of the first steps: the quickstart ends, most of its task learned, at 0.3 of what it began with."""
SOLVED = 0.9
"""Share of right completions from which little entropy is the right answer and no collapse."""
DISAGREEMENT = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1}
"""Mean |log-probability of the learner - of the sampler| a token, in nat, by the type computed in, or that keys and
values are kept in: ten times what contract 3 holds float32 to; for bfloat16 what its 8 bits cost a logit of 16 to 32
at most, and of int8 measured ten times less, too."""
BROKEN = 0.5
"""Share of steps with a gradient that is not finite, or exactly 0: one is shrugged off, half of them is no training."""


@dataclass(frozen=True)
class Facts:
    """What the checks keep of a step.

    Attributes:
        metrics: its row of metrics.jsonl.
        spread: [Q] bool, the group's rewards differ.
        right: [N] bool, the first function answered more than eval.correct_above.
        by_function: [F, N] float32, NaN where a function gave no answer.
        lengths: [N] tokens sampled.
        stopped: [N] bool, a stop token ended it.
        special: special tokens in the completions and how often; none of them is a stop token where nothing stopped.
    """

    metrics: Mapping[str, Any]
    spread: np.ndarray
    right: np.ndarray
    by_function: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    special: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Window:
    """The last steps, as a check sees them.

    Attributes:
        run: that is going on.
        facts: of as many steps as the check asks for, the newest last.
        start: mean entropy of the run's first steps, None before there are so many.
        varied: names of the reward functions that ever gave two different answers in a step.
    """

    run: Run
    facts: Sequence[Facts]
    start: float | None
    varied: frozenset[str]

    @property
    def config(self) -> TrainConfig:
        """Of the run."""
        return self.run.config

    @property
    def over(self) -> str:
        """How many steps, in words."""
        return f"the last {len(self.facts)} steps"

    def joined(self, name: str) -> np.ndarray:
        """An array of every step, one behind the other."""
        return np.concatenate([getattr(facts, name) for facts in self.facts], axis=-1)

    def figures(self, name: str) -> list[float]:
        """A metric of every step that has it."""
        return [float(f.metrics[name]) for f in self.facts if f.metrics.get(name) is not None]


def no_spread(window: Window) -> str | None:
    """Nearly all groups have rewards that do not differ, so that their advantages are 0."""
    algorithm = window.config.algorithm
    if algorithm.advantage in ALONE or ":" in algorithm.advantage:
        return None  # it compares a sample with the batch or a critic, or with what only its author knows
    spread, right = window.joined("spread"), window.joined("right").reshape(len(window.joined("spread")), -1)
    share = 1.0 - spread.mean()
    if share < ALIKE:
        return None
    easy = float((right.mean(1) > 0.5)[~spread].mean())
    rewards = window.joined("by_function")
    answers = rewards[np.isfinite(rewards)]
    same = f"every reward was {answers[0]:g}, " if answers.size and (answers == answers[0]).all() else ""
    advice = (
        "use easier prompts or a stronger model, see in completions.jsonl whether right answers are paid at all"
        if easy < 0.5
        else "use harder prompts"
    )
    again = "" if algorithm.dynamic_sampling else " or set algorithm.dynamic_sampling"
    return (
        f"{share:.0%} of the groups of {window.over} have rewards that do not differ, and such a group teaches "
        f"nothing: {same}{1 - easy:.0%} of them are too hard (all wrong), {easy:.0%} too easy (all right). Raise "
        f"rollout.num_samples{again}; else {advice}."
    )


def no_answer(window: Window) -> str | None:
    """A reward function says None to everything."""
    rewards = window.joined("by_function")
    silent = [name for name, row in zip(window.run.reward_names, rewards, strict=True) if not np.isfinite(row).any()]
    if not silent:
        return None
    return (
        f"the reward {' and '.join(map(repr, silent))} gave no answer (None) to any of the {rewards.shape[1]} "
        f"completions of {window.over}, so it has no say. See that it reads the right columns (data.rename_columns "
        "gives them other names), or take it out of reward.functions."
    )


def never_varies(window: Window) -> str | None:
    """A reward function has said the same to everything since the run began."""
    rewards = window.joined("by_function")
    same = [
        f"{name!r} gave {row[np.isfinite(row)][0]:g}"
        for name, row in zip(window.run.reward_names, rewards, strict=True)
        if np.isfinite(row).any() and name not in window.varied and np.nanmin(row) == np.nanmax(row)
    ]
    if not same:
        return None
    return (
        f"the reward {' and '.join(same)} to all {rewards.shape[1]} completions of {window.over}: what never differs "
        "teaches nothing. See in completions.jsonl what it was given, mend it, or take it out of reward.functions."
    )


def never_stops(window: Window) -> str | None:
    """No completion ends by a stop token."""
    stopped = window.joined("stopped")
    if stopped.any() or len(stopped) < FEWEST:
        return None
    special = sum((facts.special for facts in window.facts), Counter[int]())
    seen = f"they do hold {_tokens(window.run.tokenizer, special)}: should that end them, " if special else ""
    return (
        f"none of the {len(stopped)} completions of {window.over} ended with a stop token: {seen}set "
        "rollout.stop_token_ids to what the chat template ends a turn with; else the prompts lack the template this "
        "model was trained with (data.as_messages, data.chat_template), or rollout.max_new_tokens = "
        f"{window.config.rollout.max_new_tokens} is too short."
    )


def cut(window: Window) -> str | None:
    """Most completions are cut at the limit."""
    stopped, lengths = window.joined("stopped"), window.joined("lengths")
    share = 1.0 - stopped.mean()
    if share <= CUT or not stopped.any():
        return None
    # Ends that come at a constant rate, tokens sampled over ends seen, is what can be said of those not seen to end.
    enough = math.log(1 / (1 - ENDING)) * lengths.sum() / stopped.sum()
    room = window.config.rollout.max_new_tokens
    advice = max(64 * math.ceil(enough / 64), room + 64)
    most, ending = window.run.most_new_tokens, ENDING
    if most is not None and advice > most:
        advice, ending = most, 1 - math.exp(-most * stopped.sum() / lengths.sum())
    more = (
        f"At the rate at which the others end, {advice} tokens would let {ending:.0%} end; or set"
        if advice > room
        else "The model has no positions for more; shorten the prompts (data.max_prompt_len), or set"
    )
    return (
        f"{share:.0%} of the completions of {window.over} were cut at rollout.max_new_tokens = {room}, so that most "
        f"are judged without their end. {more} algorithm.soft_overlong or algorithm.overlong_filter."
    )


def entropy(window: Window) -> str | None:
    """The policy says one thing only, and that is not the answer."""
    figures = window.figures("entropy")
    if window.start is None or not figures or window.joined("right").mean() > SOLVED:
        return None
    now = float(np.mean(figures))
    if not now < COLLAPSED * window.start:
        return None
    return (
        f"the entropy has collapsed from {window.start:.3g} to {now:.3g} nat a token, with "
        f"{window.joined('right').mean():.0%} of the completions right: samples of a prompt hardly differ any more. "
        "Lower optim.learning_rate, raise algorithm.loss.clip_high (dapo: 0.28), or set algorithm.loss.entropy_coef "
        "or kl_coef; an earlier checkpoint may be the better start."
    )


def disagree(window: Window) -> str | None:
    """Sampler and learner give the same tokens different probabilities."""
    figures, kept = window.figures("sampler_logp_difference/mean"), window.config.rollout.kv_dtype
    field, dtype = ("model.dtype", window.config.model.dtype) if kept == "auto" else ("rollout.kv_dtype", kept)
    worst = max(window.figures("sampler_logp_difference/max"), default=math.nan)
    if not figures or not np.mean(figures) > DISAGREEMENT[dtype]:
        return None
    advice = (
        f'Set algorithm.loss.correction = "tis", or {field} = "{"float32" if kept == "auto" else "auto"}".'
        if dtype != "float32"
        else "In float32 that is a bug of the program or the device: please report it; algorithm.loss.correction = "
        '"tis" makes up for it meanwhile.'
    )
    return (
        f"sampler and learner disagree by {np.mean(figures):.2g} nat a token in the mean of {window.over}, at most "
        f"{worst:.2g} (usual in {dtype}: below {DISAGREEMENT[dtype]:g}), so that the gradient is that of another "
        f"policy. {advice}"
    )


def gradient(window: Window) -> str | None:
    """Updates are skipped, or change nothing."""
    norms = np.asarray(window.figures("grad_norm"))
    broken, zero = (~np.isfinite(norms)).mean() if norms.size else 0.0, (norms == 0).mean() if norms.size else 0.0
    if broken >= BROKEN:
        return (
            f"the gradient was not finite in {broken:.0%} of {window.over}, and such an update is skipped. Lower "
            'optim.learning_rate, set optim.max_grad_norm, or compute in float32 (model.dtype = "float32").'
        )
    if zero >= BROKEN:
        return (
            f"the gradient was exactly 0 in {zero:.0%} of {window.over}: no token is trained. See "
            "frac_reward_zero_std and completions/clipped_ratio in metrics.jsonl: rewards that never differ, or "
            "algorithm.overlong_filter with completions that are all cut, leave nothing."
        )
    return None


@dataclass(frozen=True)
class Check:
    """A row of `CHECKS`: the function, over how many steps, and which other names the same cause better."""

    function: Callable[[Window], str | None]
    steps: int
    unless: tuple[str, ...] = ()


CHECKS: Mapping[str, Check] = {
    "no_answer": Check(no_answer, 3),
    "no_spread": Check(no_spread, 3, ("no_answer",)),
    "never_varies": Check(never_varies, 10, ("no_spread",)),
    "never_stops": Check(never_stops, 3),
    "cut": Check(cut, 5, ("never_stops",)),
    "entropy": Check(entropy, 5, ("no_spread",)),
    "disagree": Check(disagree, 3),
    "gradient": Check(gradient, 5, ("no_spread", "no_answer")),
}
"""Three steps where every completion must look the same for the warning, five for a mean, ten where a reward may only
not have been earned yet."""
FIRST = 5
"""Steps whose mean entropy is where a run started."""


class Health(Callback):
    """Warns of a sick run, once for each check."""

    def __init__(self, config: TrainConfig, warn: Callable[[str], None]):
        """``warn`` is told what is wrong, in a line."""
        self._config, self._warn = config, warn
        self._facts: deque[Facts] = deque(maxlen=max(check.steps for check in CHECKS.values()))
        self._entropies: list[float] = []
        self._varied: set[str] = set()
        self._warned: set[str] = set()

    def on_start(self, run: Run) -> None:
        """Take up what an earlier part of the run has shown."""
        self._run = run
        self._warned |= set(run.states.get(type(self).__name__, ()))
        for row in run.history:
            self._remember(row)

    def state(self) -> list[str]:
        """Checks that have warned, and will not again."""
        return sorted(self._warned)

    def on_step(self, step: Step) -> None:
        """Make every check that has enough steps and was silent so far."""
        self._facts.append(_facts(step, self._run.tokenizer, self._config.eval.correct_above))
        self._remember(step.metrics)
        start = float(np.mean(self._entropies)) if len(self._entropies) == FIRST else None
        for name, check in CHECKS.items():
            if len(self._facts) < check.steps or self._warned & {name, *check.unless}:
                continue
            window = Window(self._run, list(self._facts)[-check.steps :], start, frozenset(self._varied))
            text = check.function(window)
            if text is not None:
                self._warned.add(name)
                self._warn(f"health ({name}): {text}")

    def _remember(self, row: Mapping[str, Any]) -> None:
        if row.get("entropy") is not None and len(self._entropies) < FIRST:
            self._entropies.append(float(row["entropy"]))
        self._varied |= {name for name in self._run.reward_names if (row.get(f"rewards/{name}/std") or 0.0) > 0}


def _facts(step: Step, tokenizer: Any, correct_above: float) -> Facts:
    rollout, scored = step.rollout, step.scored
    stopped = rollout.finish == "stop"
    added = tokenizer.added_tokens_decoder.items()
    known = {*tokenizer.all_special_ids, *(token for token, text in added if text.special)} - {tokenizer.unk_token_id}
    sampled = rollout.tokens[rollout.completion_mask] if not stopped.any() else np.zeros(0, int)
    special = sampled[np.isin(sampled, list(known))]
    return Facts(
        step.metrics,
        scored.spread,
        np.nan_to_num(scored.by_function[0], nan=-np.inf) > correct_above,
        scored.by_function,
        rollout.completion_len,
        stopped,
        Counter(special.tolist()),
    )


def _tokens(tokenizer: Any, counts: Mapping[int, int]) -> str:
    """The most frequent tokens with their ids."""
    most: Iterable[int] = sorted(counts, key=lambda token: -counts[token])[:3]
    return ", ".join(f"{tokenizer.decode([token])!r} (token {token})" for token in most)
