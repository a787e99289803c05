"""The refusals of spec.py: what a LossConfig or a Recipe can't be, each with got, why and do. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from grpo_jax.algo.spec import LossConfig

RATIO_LEVELS: dict[str, tuple[str, ...]] = {
    "reinforce": ("token",),
    "ppo_clip": ("token", "sequence", "sequence_token"),
    "cispo": ("token", "sequence"),
    "sapo": ("token",),
    "gmpo": ("token",),
    "vespo": ("token",),
    "clip_cov": ("token",),
    "kl_cov": ("token",),
    "dppo": ("token",),
}
"""The ratio levels a surrogate is defined for (MATH.md section 3)."""

CORRECTION_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "tis": (None, 2.0),
    "icepop": (0.5, 5.0),
    "seq_tis": (None, 3.0),
    "seq_mask": (None, 3.0),
    "geo_tis": (None, None),
    "geo_mask": (None, None),
    "geo_gate": (0.999, 1.002),
}
"""Default (low, high) of a correction's weight, None for no bound (MATH.md section 2)."""

_LEVEL_REASONS: dict[str, str] = {
    "reinforce": "it holds no ratio",
    "cispo": "its weight is already a constant beside log pi, so sequence_token would be sequence again",
    "sapo": "its soft gate is defined on the token ratio",
    "gmpo": "it takes the sequence mean of token log-ratios itself, after clipping them",
    "vespo": "it takes the sequence sum of log-ratios itself",
    "clip_cov": "it picks tokens by their own covariance and ratio",
    "kl_cov": "it picks tokens by their own covariance and penalises their own log-ratio",
    "dppo": "it compares token probabilities, not ratios",
}


def refuse(got: str, why: str, do: str) -> ValueError:
    """Return the error for a value that can't work: what was got, why it can't work, what to do."""
    return ValueError(f"got {got}: {why}. {do}.")


def check_name(field: str, value: object, literal: Any) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal."""
    names = get_args(literal)
    if value not in names:
        raise refuse(f"{field}={value!r}", "there is no such name", f"Use one of {', '.join(names)}")


def check_number(
    record: object, field: str, *, low: float = -math.inf, open_low: bool = False, high: float = math.inf
) -> None:
    """Refuse a field that is neither None nor a number in [low, high], or (low, high] where `open_low`."""
    value = getattr(record, field)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise refuse(f"{field}={value!r}", "it must be a number", f"Give {field} a float")
    if value < low or value > high or (open_low and value == low):
        left = "above" if open_low else "at least"
        right = "" if math.isinf(high) else f" and at most {high:g}"
        raise refuse(f"{field}={value!r}", f"it must be {left} {low:g}{right}", f"Choose {field} in that range")


def check_levels(config: LossConfig) -> None:
    """Refuse a ratio level the surrogate has no meaning for, and a KL in both places."""
    if isinstance(config.surrogate, str) and config.ratio_level not in RATIO_LEVELS[config.surrogate]:
        raise refuse(
            f"surrogate={config.surrogate!r} with ratio_level={config.ratio_level!r}",
            _LEVEL_REASONS[config.surrogate],
            f"Use ratio_level {' or '.join(map(repr, RATIO_LEVELS[config.surrogate]))}",
        )
    if not isinstance(config.kl_in_reward, bool):
        raise refuse(
            f"kl_in_reward={config.kl_in_reward!r}",
            "it is a switch and kl_coef the one coefficient: the KL is in the loss or in the reward, not in both",
            "Set kl_coef to the coefficient and kl_in_reward to True or False",
        )


def check_ranges(config: LossConfig) -> None:
    """Refuse numbers out of range."""
    for field in ("clip_low", "clip_high", "correction_low", "kl_coef", "kl_cov_coef", "vespo_k_pos", "vespo_k_neg"):
        check_number(config, field, low=0.0)
    for field in ("sapo_tau_pos", "sapo_tau_neg", "correction_high", "veto"):
        check_number(config, field, low=0.0, open_low=True)
    for field in ("clip_cov_share", "kl_cov_share", "entropy_top"):
        check_number(config, field, low=0.0, open_low=True, high=1.0)
    for field in ("vespo_lambda_pos", "vespo_lambda_neg"):
        check_number(config, field, low=1e-4)
    for field in ("delta", "dual_clip", "clip_cov_low", "clip_cov_high", "off_policy_threshold", "entropy_coef"):
        check_number(config, field)
    optional = {"clip_low", "clip_high", "delta", "dual_clip", "max_completion_len", "correction", "correction_low"}
    optional |= {"correction_high", "veto", "off_policy_threshold"}
    for spec in dataclasses.fields(config):
        if getattr(config, spec.name) is None and spec.name not in optional:
            raise refuse(
                f"{spec.name}=None", "it has no off state", f"Leave {spec.name} at its default {spec.default!r}"
            )


def check_clips(config: LossConfig) -> None:
    """Refuse clip bounds that contradict each other."""
    for field in ("delta", "dual_clip"):
        if getattr(config, field) is not None and config.surrogate != "ppo_clip":
            raise refuse(
                f"{field}={getattr(config, field)!r} with surrogate={config.surrogate!r}",
                "it bounds the unclipped branch that only ppo_clip has",
                f"Set {field} to None or surrogate to 'ppo_clip'",
            )
    if config.delta is not None and config.dual_clip is not None:
        raise refuse(
            f"delta={config.delta!r} with dual_clip={config.dual_clip!r}",
            "both bound the ratio from above where A < 0, and equal values give equal losses",
            "Keep one of them",
        )
    if config.delta is not None and config.delta < 1 + (math.inf if config.clip_high is None else config.clip_high):
        raise refuse(
            f"delta={config.delta!r} with clip_high={config.clip_high!r}",
            "below 1 + clip_high the cap would act inside the clip range and hide the clip",
            "Choose delta >= 1 + clip_high, with a clip_high",
        )
    if config.dual_clip is not None and config.dual_clip <= 1:
        raise refuse(
            f"dual_clip={config.dual_clip!r}",
            "at 1 or below it would cut the gradient of negative advantages at the old policy itself",
            "Choose a value above 1; 3 is usual",
        )
    if config.clip_cov_low >= config.clip_cov_high:
        raise refuse(
            f"clip_cov_low={config.clip_cov_low!r} with clip_cov_high={config.clip_cov_high!r}",
            "no covariance lies between them",
            "Choose clip_cov_low < clip_cov_high",
        )


def check_correction(config: LossConfig) -> None:
    """Refuse a sampler correction that lacks bounds or does not fit the surrogate."""
    low, high = config.correction_bounds
    if config.correction == "geo_tis" and high is None:
        raise refuse(
            "correction='geo_tis' without correction_high",
            "it has no default bound",
            "Give correction_high, such as 2.0",
        )
    if config.correction == "geo_mask" and low is None and high is None:
        raise refuse(
            "correction='geo_mask' without bounds",
            "it has no default bounds",
            "Give correction_low and correction_high",
        )
    if low is not None and high is not None and low > high:
        raise refuse(
            f"correction_low={low!r} with correction_high={high!r}", "no weight lies between them", "Choose low <= high"
        )
    if config.surrogate == "vespo" and config.correction not in (None, "tis", "icepop"):
        raise refuse(
            f"surrogate='vespo' with correction={config.correction!r}",
            "vespo sums token weights into its own sequence weight, so a sequence weight would enter once per token",
            "Use correction None, 'tis' or 'icepop'",
        )


def check_rest(config: LossConfig) -> None:
    """Refuse an aggregation without its constant, and an entropy cut that means nothing."""
    length = config.max_completion_len
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise refuse(f"max_completion_len={length!r}", "it is a count of tokens", "Give a whole number of at least 1")
    if config.aggregation == "constant" and length is None:
        raise refuse(
            "aggregation='constant' without max_completion_len",
            "the constant that it divides by is that length",
            "Give max_completion_len, the limit the completions are sampled with",
        )
    if config.entropy_top < 1 and config.surrogate == "gmpo":
        raise refuse(
            f"entropy_top={config.entropy_top!r} with surrogate='gmpo'",
            "gmpo's term is one number per sequence, so dropping some of its tokens rescales the sequence instead",
            "Set entropy_top to 1.0 or choose another surrogate",
        )
