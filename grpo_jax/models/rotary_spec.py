"""RotarySpec: what config.json says about the rotary position embedding, checked. Standard library only.

Older configs have ``rope_theta`` and ``rope_scaling``, newer ones ``rope_parameters``. The precedence is that of
transformers: rope_scaling, else rope_parameters; a theta inside it, else rope_theta, else the family's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import Any

from grpo_jax.models.fields import Config, config_error, read_flag, read_number, read_size


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding of one layer.

    Attributes:
        kind: key of ``ROTARY_READERS``.
        theta: base.
        factor: how far the context was stretched ("linear", "dynamic", "llama3", "yarn").
        low_freq_factor, high_freq_factor: the band of "llama3", in turns over ``original_len``.
        original_len: context length before it was stretched; 0 where the kind does not ask.
        partial: share of the features that are turned; the others pass.
        attention: factor of cosine and sine ("yarn", "longrope").
        beta_fast, beta_slow, truncate: the band of "yarn", in turns, and whether it is widened to whole features.
        short_factors, long_factors: divisors of the frequencies of "longrope", for texts up to ``original_len``
            and for longer ones.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_len: int = 0
    partial: float = 1.0
    attention: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def rotated(self, head_dim: int) -> int:
        """How many features of a head are turned."""
        return int(head_dim * self.partial)

    @property
    def by_length(self) -> bool:
        """Whether texts longer than ``original_len`` have other frequencies from their first token on."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class RotaryRules:
    """What a family makes of the rotary's fields.

    Attributes:
        theta: where the config says none.
        partial: whether ``partial_rotary_factor`` is read; otherwise only 1 is legal.
        kinds: the kinds that it takes.
        renames: older name -> kind.
    """

    theta: float = 10_000.0
    partial: bool = False
    kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    renames: Mapping[str, str] = field(default_factory=dict)


def read_rotary(config: Config, head_dim: int, rules: RotaryRules) -> RotarySpec:
    """The one rotary of a model.

    Raises:
        ValueError: a kind or a field that is not supported, or settings for each layer type.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        why = "settings for each layer type are not supported in this family"
        raise config_error(name, rope, why, "use a checkpoint with one rotary")
    outside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    return read_settings(config, {**outside, **rope}, head_dim, rules, name)


def read_settings(config: Config, rope: Mapping[str, Any], head_dim: int, rules: RotaryRules, name: str) -> RotarySpec:
    """One rotary from its settings ``rope``, which are the field ``name`` of the config."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = rules.renames.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in rules.kinds:
        why = "this kind of rotary scaling is not supported"
        raise config_error(f"{name}.rope_type", kind, why, f"use one of: {', '.join(rules.kinds)}")
    partial = 1.0 if rope.get("partial_rotary_factor") is None else read_number(rope, "partial_rotary_factor")
    if partial > 1 or (partial != 1 and not rules.partial):
        why = "a rotary on part of the features is not supported in this family"
        raise config_error("partial_rotary_factor", partial, why, "use a checkpoint without it")
    theta = read_number(rope, "rope_theta", rules.theta)
    spec = ROTARY_READERS[kind](RotarySpec(kind, theta, partial=partial), rope, config, name)
    rotated = spec.rotated(head_dim)
    if rotated < (4 if kind == "dynamic" else 2) or rotated % 2:
        why = f"the rotary embedding turns pairs of features, and of this many it would turn {rotated}"
        raise config_error("head_dim", head_dim, why, "use an even head_dim")
    for key, factors in (("short_factor", spec.short_factors), ("long_factor", spec.long_factors)):
        if kind == "longrope" and len(factors) != rotated // 2:
            why = f"{rotated // 2} numbers are needed, one for each pair of features"
            raise config_error(f"{name}.{key}", len(factors), why, "check the config")
    return spec


def _default(spec: RotarySpec, rope: Mapping[str, Any], config: Config, name: str) -> RotarySpec:
    return spec


def _linear(spec: RotarySpec, rope: Mapping[str, Any], config: Config, name: str) -> RotarySpec:
    return replace(spec, factor=read_number(rope, "factor", inside=name))


def _dynamic(spec: RotarySpec, rope: Mapping[str, Any], config: Config, name: str) -> RotarySpec:
    length = read_size(config, "max_position_embeddings")
    return replace(spec, factor=read_number(rope, "factor", inside=name), original_len=length)


def _llama3(spec: RotarySpec, rope: Mapping[str, Any], config: Config, name: str) -> RotarySpec:
    factor, low, high = (
        read_number(rope, key, inside=name) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if low == high:
        raise config_error(f"{name}.high_freq_factor", high, "it must differ from low_freq_factor", "check the config")
    length = _original_len(rope, config, name)
    return replace(spec, factor=factor, low_freq_factor=low, high_freq_factor=high, original_len=length)


def _yarn(spec: RotarySpec, rope: Mapping[str, Any], config: Config, name: str) -> RotarySpec:
    length = _original_len(rope, config, name)
    factor = read_number(rope, "factor", read_size(config, "max_position_embeddings") / length, name)
    scales = [read_number(rope, key, inside=name) if rope.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]

    def stretched(scale: float) -> float:  # Peng et al. 2023, section 3.4
        return 1.0 if factor <= 1 else 0.1 * scale * log(factor) + 1.0

    usual = stretched(scales[0]) / stretched(scales[1]) if all(scales) else stretched(1.0)
    return replace(
        spec,
        factor=factor,
        original_len=length,
        attention=read_number(rope, "attention_factor", usual, name),
        beta_fast=read_number(rope, "beta_fast", 32.0, name),
        beta_slow=read_number(rope, "beta_slow", 1.0, name),
        truncate=rope.get("truncate") is None or read_flag(rope, "truncate"),
    )


def _longrope(spec: RotarySpec, rope: Mapping[str, Any], config: Config, name: str) -> RotarySpec:
    length = _original_len(rope, config, name)
    factor = read_number(rope, "factor", read_size(config, "max_position_embeddings") / length, name)
    usual = sqrt(1 + log(factor) / log(length)) if factor > 1 else 1.0  # Ding et al. 2024
    return replace(
        spec,
        original_len=length,
        attention=read_number(rope, "attention_factor", usual, name),
        short_factors=_factors(rope, "short_factor", name),
        long_factors=_factors(rope, "long_factor", name),
    )


def _original_len(rope: Mapping[str, Any], config: Config, name: str) -> int:
    key = "original_max_position_embeddings"
    inside = rope.get(key) or config.get("max_position_embeddings")
    length = read_number({key: config.get(key) or inside}, key, inside=name)
    if length < 2:  # its logarithm divides
        raise config_error(f"{name}.{key}", length, "a length of at least 2 is needed", "check the config")
    return int(length)


def _factors(rope: Mapping[str, Any], key: str, name: str) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list):
        raise config_error(f"{name}.{key}", values, "a list of numbers is needed", "check the config")
    return tuple(read_number({key: value}, key, inside=name) for value in values)


ROTARY_READERS: Mapping[str, Callable[[RotarySpec, Mapping[str, Any], Config, str], RotarySpec]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""kind -> reader of its numbers."""
