"""One record per model family: what its config.json means, and where its tensors go. Standard library only.

A family is data until it needs a layer that is not here yet. Defaults are those of the family's Hugging Face config
class, where the field may be absent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.models.fields import Config, config_error, read_flag, read_size
from grpo_jax.models.keys import ATTENTION, HEAD_NORMS, MLP, OUTER, PRE_NORMS, ROTARY_BUFFERS, Keys
from grpo_jax.models.rotary_spec import RotaryRules, RotarySpec, read_rotary

Windows = tuple[int | None, ...]
"""The attention window of each layer, None for full attention."""

QKNorm = Literal["none", "head", "all"]
"""Whether queries and keys are normed, each head by itself or all heads together."""


def full_attention(config: Config) -> Windows:
    """No layer has a window."""
    return (None,) * read_size(config, "num_hidden_layers")


def same_rotary(config: Config, head_dim: int, rules: RotaryRules) -> tuple[RotarySpec | None, ...]:
    """All layers have the same."""
    return (read_rotary(config, head_dim, rules),) * read_size(config, "num_hidden_layers")


@dataclass(frozen=True)
class Family:
    """What sets a family apart.

    Attributes:
        architecture: the name of the class in transformers, for the config.json of a model made here.
        layer: path in a layer's parameters -> tensor.
        outer: path in the parameters outside the layers -> tensor.
        harmless: regular expressions of tensors that may be there and are not read.
        qkv_bias, out_bias, mlp_bias: a fixed fact, or the name of the bool field of config.json that says it.
        qk_norm: see ``QKNorm``.
        pre_norm, post_norm: whether attention and MLP are normed before and after.
        norm_offset: what is added to the scale of each norm.
        activation: the field that names it, and renames: what a name means in this family.
        windows: config -> the window of each layer.
        rotaries: config, head_dim and ``rotary`` -> the rotary of each layer, None for a layer without.
        rotary: the rules of its reading.
        query_scale: config and head_dim -> factor of the queries.
        embed_scale: config -> factor of the embedded tokens.
        residual_scale, logit_divisor: the field that says it, or None for 1.
        attention_cap, logit_cap: the field that says it, or None.
        only: field -> the values that are supported; the first is also the default where the field is absent.
        defaults: field -> its value where it is absent.
    """

    architecture: str
    layer: Keys = field(default_factory=lambda: {**PRE_NORMS, **ATTENTION, **MLP})
    outer: Keys = field(default_factory=lambda: OUTER)
    harmless: tuple[str, ...] = ROTARY_BUFFERS
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: QKNorm = "none"
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    activation: str = "hidden_act"
    renames: Mapping[str, str] = field(default_factory=dict)
    windows: Callable[[Config], Windows] = full_attention
    rotaries: Callable[[Config, int, RotaryRules], tuple[RotarySpec | None, ...]] = same_rotary
    rotary: RotaryRules = field(default_factory=RotaryRules)
    query_scale: Callable[[Config, int], float] = lambda config, head_dim: head_dim**-0.5
    embed_scale: Callable[[Config], float] = lambda config: 1.0
    residual_scale: str | None = None
    logit_divisor: str | None = None
    attention_cap: str | None = None
    logit_cap: str | None = None
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def windows_by_type(config: Config, types: list[str]) -> Windows:
    """``layer_types`` where it is given, else ``types``; ``sliding_window`` is the window of the sliding layers."""
    given = config.get("layer_types")
    types = types if given is None else given
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise config_error("layer_types", kind, "this kind of attention is not supported", "use full or sliding")
    window = read_size(config, "sliding_window") if "sliding_attention" in types else None
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def qwen_windows(config: Config) -> Windows:
    """Without ``layer_types``: layers from ``max_window_layers`` on, if ``use_sliding_window``."""
    count, first = read_size(config, "num_hidden_layers"), config.get("max_window_layers", 28)
    used = read_flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    windows = windows_by_type(config, [_kind(used and i >= first) for i in range(count)])
    if not used and any(windows):
        why = "layer_types asks for windows and use_sliding_window is not set"
        raise config_error("use_sliding_window", config.get("use_sliding_window"), why, "check the config")
    return windows


def _kind(sliding: bool) -> str:
    return "sliding_attention" if sliding else "full_attention"


QWEN = {"sliding_window": 4096, "num_key_value_heads": 32, "rms_norm_eps": 1e-6}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        windows=qwen_windows,
        defaults=QWEN,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        layer={**PRE_NORMS, **ATTENTION, **HEAD_NORMS, **MLP},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        windows=qwen_windows,
        defaults=QWEN | {"head_dim": 128},
    ),
}
"""model_type -> record."""
