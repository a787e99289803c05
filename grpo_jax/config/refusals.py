"""What no single field of a configuration can show to be wrong: got, why, do, by dotted path."""

from __future__ import annotations

import re
from math import isqrt
from typing import TYPE_CHECKING

from grpo_jax.config.learning import AlgorithmConfig, CriticConfig

if TYPE_CHECKING:
    from grpo_jax.config import TrainConfig

Refusal = tuple[str, bool, str]
"""(dotted path, is it wrong, got / why / do)"""

ALONE = ("raw", "batch_mean", "reinforce_pp", "remax", "gae")
"""Estimators that make an advantage of a group of one sample."""
PER_SEQUENCE = ("gmpo", "vespo")
"""Surrogates whose advantage must be the same for all tokens of a completion."""

OF_SURROGATE = {
    "sapo": ("sapo_tau_pos", "sapo_tau_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    "clip_cov": ("clip_cov_share", "clip_cov_low", "clip_cov_high"),
    "kl_cov": ("kl_cov_share", "kl_cov_coef"),
}
"""Fields of algorithm.loss that one surrogate alone reads."""


def refusals(config: TrainConfig) -> list[Refusal]:
    """Every combination that cannot run or means nothing, and whether this config has it."""
    return [
        *_shape(config),
        *_rewards(config),
        *_shaping(config),
        *_advantages(config),
        *_critic(config),
        *_adapters(config),
        *_moving(config),
        *_idle(config),
    ]


def _shape(config: TrainConfig) -> list[Refusal]:
    rollout, optim = config.rollout, config.optim
    return [
        (
            "optim.minibatches",
            rollout.prompts_per_step % optim.minibatches != 0,
            f"got {optim.minibatches}, which does not divide rollout.prompts_per_step = {rollout.prompts_per_step}; "
            "every update must take the same share. "
            f"Choose {_nearest_that_divide(optim.minibatches, rollout.prompts_per_step)}.",
        ),
        (
            "rollout.num_samples",
            rollout.prompts_per_step * rollout.num_samples * rollout.max_new_tokens >= 2**31,
            f"got {rollout.num_samples}, which with rollout.prompts_per_step = {rollout.prompts_per_step} and "
            f"rollout.max_new_tokens = {rollout.max_new_tokens} is 2**31 tokens a step or more, beyond what an array's "
            "places are counted in. Lower one of them.",
        ),
        (
            "rollout.layout",
            re.fullmatch(r"train|replicated|tensor=[1-9][0-9]*", rollout.layout) is None,
            f"got {rollout.layout!r}, which is none of its values; use train, replicated, or such as tensor=2.",
        ),
        (
            "batch.row_len",
            config.batch.row_len is not None and config.batch.rows == "padded",
            "is for packed and group rows; padded rows need no length of their own. Leave it out.",
        ),
        (
            "eval.stop",
            (config.eval.stop.patience, config.eval.stop.at_least) != (None, None)
            and (config.data.eval is None or config.eval.every is None),
            "ends the run by its evaluations, and there are none between its first and last step. Set data.eval and "
            "eval.every, or leave it out.",
        ),
        (
            "output_dir",
            config.mesh.distributed and config.output_dir is None,
            "got none, and processes that each choose a directory would not meet. Name one on a disk all hosts share.",
        ),
        (
            "rollout.top_k",
            rollout.top_k is not None and rollout.top_k < 2,
            "got 1, which leaves nothing to choose. Use rollout.temperature or a larger k.",
        ),
    ]


def _rewards(config: TrainConfig) -> list[Refusal]:
    algorithm, reward = config.algorithm, config.reward
    return [
        (
            "reward.weights",
            # Functions that Trainer is handed are not known until it makes the run's config.
            reward.weights is not None
            and "functions" in reward.model_fields_set
            and len(reward.weights) != len(reward.functions),
            f"got {len(reward.weights or ())} weights for {len(reward.functions)} functions. Give one a function.",
        ),
        (
            "reward.functions",
            not reward.functions,
            "got none; without a reward there is nothing to learn. Name at least one.",
        ),
        (
            "algorithm.spread_of",
            algorithm.spread_of is not None and algorithm.spread_of not in reward.functions,
            f"got {algorithm.spread_of!r}, which is none of reward.functions = {list(reward.functions)}. "
            "Name one of them, or leave it out.",
        ),
        (
            "algorithm.dynamic_sampling",
            algorithm.dynamic_sampling and config.rollout.num_samples < 2,
            "drops groups whose rewards do not differ, and those of rollout.num_samples = 1 never do. Sample more, or "
            "switch it off.",
        ),
    ]


def _shaping(config: TrainConfig) -> list[Refusal]:
    algorithm, rollout = config.algorithm, config.rollout
    return [
        (
            "algorithm.overlong_buffer_len",
            algorithm.overlong_buffer_len is not None
            and (not algorithm.soft_overlong or algorithm.overlong_buffer_len > rollout.max_new_tokens),
            f"got {algorithm.overlong_buffer_len} with soft_overlong = {algorithm.soft_overlong} and completions of up "
            f"to {rollout.max_new_tokens} tokens; it is the length of soft_overlong's ramp before that limit. Switch "
            "soft_overlong on and choose at most the limit, or set it to none.",
        ),
        (
            "algorithm.soft_overlong",
            algorithm.soft_overlong and "soft_overlong" in config.reward.functions,
            "is on, and so is the reward function of that name, so that a long completion would pay twice. Keep one: "
            "set it false, or take soft_overlong out of reward.functions.",
        ),
        (
            "algorithm.soft_overlong",
            algorithm.soft_overlong and algorithm.advantage == "gdpo",
            "is added to the weighted sum of rewards, and gdpo looks at each function apart. Add the reward function "
            '"soft_overlong" instead.',
        ),
        (
            "algorithm.reward_clip",
            algorithm.reward_clip is not None and algorithm.advantage == "gdpo",
            "clips the weighted sum of rewards, and gdpo looks at each function apart. Clip inside the functions.",
        ),
    ]


def _advantages(config: TrainConfig) -> list[Refusal]:
    algorithm, rollout, k = config.algorithm, config.rollout, config.algorithm.pass_k
    grouped = ":" not in algorithm.advantage and algorithm.advantage not in ALONE
    return [
        (
            "rollout.num_samples",
            grouped and rollout.num_samples < 2,
            f"got 1, and the advantage {algorithm.advantage!r} compares the samples of a prompt with each other. "
            f"Sample at least 2, or use one of {', '.join(ALONE)}.",
        ),
        (
            "algorithm.pass_k",
            (algorithm.advantage == "pass_at_k") != (k is not None),
            f"got {'none' if k is None else k} with the advantage {algorithm.advantage!r}; it is the k of pass_at_k, "
            "which needs it, and of nothing else. Give it with pass_at_k only.",
        ),
        (
            "algorithm.pass_k",
            k is not None and k > rollout.num_samples,
            f"got {k} with rollout.num_samples = {rollout.num_samples}; a smaller group has no subset of k samples. "
            "Lower it or sample more.",
        ),
        (
            "algorithm.weight",
            algorithm.weight == "tokens" and algorithm.advantage not in ("reinforce_pp", "reinforce_pp_baseline"),
            f"got 'tokens' with the advantage {algorithm.advantage!r}; it says how reinforce_pp and "
            "reinforce_pp_baseline whiten. Leave it out.",
        ),
        (
            "algorithm.whiten",
            algorithm.whiten and not algorithm.has_critic,
            f"whitens gae's advantages, and the advantage is {algorithm.advantage!r}. Set it false.",
        ),
        (
            "algorithm.gamma",
            (algorithm.gamma, algorithm.lam) != (1.0, 0.95) and not algorithm.has_critic,
            f"gamma and lam are gae's, and the advantage is {algorithm.advantage!r}. Leave them out.",
        ),
    ]


def _critic(config: TrainConfig) -> list[Refusal]:
    algorithm, critic, loss = config.algorithm, config.critic, config.loss
    return [
        (
            "critic",
            not algorithm.has_critic and critic != CriticConfig(),
            f"is the table of gae's critic, and the advantage is {algorithm.advantage!r}. Leave the table out, or set "
            "algorithm.advantage to gae.",
        ),
        (
            "critic.value_coef",
            not critic.shared_trunk and critic.value_coef != CriticConfig().value_coef,
            "scales the value loss on a shared trunk; a critic with a transformer of its own has learning_rate for "
            "that. Leave it out, or set critic.shared_trunk.",
        ),
        (
            "algorithm.loss",
            algorithm.has_critic and (loss.ratio_level != "token" or loss.surrogate in PER_SEQUENCE),
            f"surrogate {loss.surrogate!r} at ratio_level {loss.ratio_level!r} has one weight for a whole completion, "
            "and gae gives each token an advantage of its own. Use a token ratio, such as ppo_clip's.",
        ),
    ]


def _adapters(config: TrainConfig) -> list[Refusal]:
    adapted = config.model.lora.rank is not None
    return [
        (
            "model.lora.rank",
            adapted and config.algorithm.has_critic,
            "trains adapters alone, and gae's critic trains a transformer. Set it none, or use an advantage without "
            "critic.",
        ),
        (
            "model.lora.rank",
            adapted and config.algorithm.reference_follow.every is not None,
            "has the frozen base as its reference, and algorithm.reference_follow moves the reference. Leave one out.",
        ),
    ]


def _moving(config: TrainConfig) -> list[Refusal]:
    """The KL in the reward, and what moves from step to step."""
    algorithm, loss = config.algorithm, config.loss
    without = "and algorithm.loss.kl_coef is 0, so that there is no reference model. Give kl_coef a value"
    entropy = algorithm.adaptive_entropy
    completions = config.rollout.prompts_per_step * config.rollout.num_samples
    return [
        (
            "algorithm.loss.kl_in_reward",
            loss.kl_in_reward and loss.kl_coef == 0,
            f"is set, {without}, or set it false.",
        ),
        (
            "algorithm.loss.kl_in_reward",
            loss.kl_in_reward and algorithm.advantage == "gdpo",
            "takes the KL from the weighted sum of rewards, and gdpo looks at each function apart. Set it false: the "
            "KL is then in the loss.",
        ),
        (
            "algorithm.adaptive_kl.target",
            algorithm.adaptive_kl.target is not None and loss.kl_coef == 0,
            f"is the KL that kl_coef is steered by, {without} to start from.",
        ),
        (
            "algorithm.adaptive_kl.horizon",
            algorithm.adaptive_kl.target is not None and algorithm.adaptive_kl.horizon <= completions / 5,
            f"got {algorithm.adaptive_kl.horizon:g} with {completions} completions a step, so that one step could take "
            f"more than all of the coefficient away. Choose more than {completions / 5:g}.",
        ),
        (
            "algorithm.adaptive_entropy",
            entropy.target is not None and not entropy.low <= loss.entropy_coef <= entropy.high,
            f"keeps the coefficient from {entropy.low} to {entropy.high}, and algorithm.loss.entropy_coef starts it "
            f"at {loss.entropy_coef}. Start within the bounds.",
        ),
        (
            "algorithm.reference_follow.every",
            algorithm.reference_follow.every is not None and loss.kl_coef == 0,
            f"moves the reference model, {without}.",
        ),
    ]


def _idle(config: TrainConfig) -> list[Refusal]:
    """Fields that were changed and that nothing reads as the others stand: a run would ignore them in silence."""
    algorithm, loss, stop = config.algorithm, config.loss, config.eval.stop
    rows = [
        ("algorithm", ("max_rounds", "spread_of"), algorithm.dynamic_sampling, "algorithm.dynamic_sampling is off"),
        ("algorithm.loss", ("correction_low", "correction_high"), loss.correction, "algorithm.loss.correction is none"),
        ("algorithm.adaptive_kl", ("horizon",), algorithm.adaptive_kl.target, "its target is none"),
        (
            "algorithm.adaptive_entropy",
            ("delta", "low", "high"),
            algorithm.adaptive_entropy.target,
            "its target is none",
        ),
        ("algorithm.reference_follow", ("alpha",), algorithm.reference_follow.every, "its every is none"),
        ("model.lora", ("alpha", "targets"), config.model.lora.rank, "model.lora.rank is none: there are no adapters"),
        ("mesh", ("coordinator", "process_count", "process_id"), config.mesh.distributed, "mesh.distributed is off"),
        ("eval.stop", ("metric",), stop.patience or stop.at_least is not None, "its patience and at_least are none"),
        ("eval.stop", ("min_delta",), stop.patience, "its patience is none"),
    ]
    if isinstance(loss.surrogate, str):  # one of the user's own may read any of them
        why = f"algorithm.loss.surrogate is {loss.surrogate!r}"
        rows += [("algorithm.loss", own, loss.surrogate == name, why) for name, own in OF_SURROGATE.items()]
    return [
        (
            f"{table}.{name}",
            not read and _changed(config, table, name),
            f"would change nothing, as {why}. Leave it out.",
        )
        for table, names, read, why in rows
        for name in names
    ]


def _changed(config: TrainConfig, table: str, name: str) -> bool:
    """Whether a field has another value than its table's default, or its preset's."""
    first, *rest = table.split(".")
    ours, usual = getattr(config, first), type(getattr(config, first))
    default = AlgorithmConfig(preset=config.algorithm.preset) if usual is AlgorithmConfig else usual()
    for part in (*rest, name):
        ours, default = getattr(ours, part), getattr(default, part)
    return ours != default


def _nearest_that_divide(parts: int, whole: int) -> str:
    """The divisors nearest to ``parts``, or the nearest wholes that it divides."""
    below_root = [n for n in range(1, isqrt(whole) + 1) if whole % n == 0]
    divisors = sorted({*below_root, *(whole // n for n in below_root)})
    near = [max((n for n in divisors if n < parts), default=1), *[n for n in divisors if n > parts][:1]]
    wholes = [n for n in (whole // parts * parts, (whole // parts + 1) * parts) if n]
    return f"{' or '.join(map(str, near))}, or {' or '.join(map(str, wholes))} prompts"
