"""One record per model family: what its config.json means, and where its tensors go. Standard library only.

A family is data until it needs a layer that is not here yet. Defaults are those of the family's Hugging Face config
class, where the field may be absent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.models.fields import Config, config_error, read_flag, read_number, read_size, read_table
from grpo_jax.models.keys import (
    ATTENTION,
    BOTH_NORMS,
    HEAD_NORMS,
    JOINED,
    MIXTRAL_MOE,
    MLP,
    OUTER,
    POST_NORMS,
    PRE_NORMS,
    PROJECTION_NORMS,
    QWEN_MOE,
    ROTARY_BUFFERS,
    Keys,
)
from grpo_jax.models.rotary_spec import RotaryRules, RotarySpec, read_rotary, read_settings

Windows = tuple[int | None, ...]
"""The attention window of each layer, None for full attention."""

QKNorm = Literal["none", "head", "all"]
"""Whether queries and keys are normed, each head by itself or all heads together."""


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts: how many, how many a token goes to, their inner width, and whether weights sum to 1."""

    experts: int
    top: int
    ffn: int
    normalise: bool


def no_mixture(config: Config) -> tuple[MoESpec | None, ...]:
    """Every layer has an MLP."""
    return (None,) * read_size(config, "num_hidden_layers")


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
        mixtures: config -> the mixture of experts of each layer, None for an MLP.
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
    mixtures: Callable[[Config], tuple[MoESpec | None, ...]] = no_mixture
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def windows_by_type(config: Config, types: list[str]) -> Windows:
    """``layer_types`` where it is given, else ``types``; ``sliding_window`` is the window of the sliding layers."""
    given = config.get("layer_types")
    types = types if given is None else given
    if not isinstance(types, list):
        raise config_error("layer_types", types, "a list with the kind of each layer is needed", "check the config")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise config_error("layer_types", kind, "this kind of attention is not supported", "use full or sliding")
    window = read_size(config, "sliding_window") if "sliding_attention" in types else None
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def qwen_windows(config: Config) -> Windows:
    """Without ``layer_types``: layers from ``max_window_layers`` on, if ``use_sliding_window``."""
    count = read_size(config, "num_hidden_layers")
    used = read_flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    first = read_size({"max_window_layers": 28, **config}, "max_window_layers", least=0) if used else count
    windows = windows_by_type(config, [_kind(used and i >= first) for i in range(count)])
    if not used and any(windows):
        why = "layer_types asks for windows and use_sliding_window is not set"
        raise config_error("use_sliding_window", config.get("use_sliding_window"), why, "check the config")
    return windows


def _kind(sliding: bool) -> str:
    return "sliding_attention" if sliding else "full_attention"


def one_window(config: Config) -> Windows:
    """``sliding_window`` is that of every layer; null is none."""
    window = None if config.get("sliding_window") is None else read_size(config, "sliding_window")
    return (window,) * read_size(config, "num_hidden_layers")


def mistral_windows(config: Config) -> Windows:
    """The same; with ``layer_types`` by layer, as transformers then takes it for another model, ministral."""
    same = one_window(config)
    return windows_by_type(config, [_kind(window is not None) for window in same])


def qwen3_moe_windows(config: Config) -> Windows:
    """One for all layers, but only if ``use_sliding_window``."""
    return one_window(config) if read_flag(config, "use_sliding_window") else full_attention(config)


def gemma2_windows(config: Config) -> Windows:
    """Without ``layer_types`` every other layer, from the first on."""
    return windows_by_type(config, [_kind(i % 2 == 0) for i in range(read_size(config, "num_hidden_layers"))])


def gemma3_windows(config: Config) -> Windows:
    """Without ``layer_types`` all but every sixth, or what ``sliding_window_pattern`` says."""
    period = read_size(config, "sliding_window_pattern", 6)
    return windows_by_type(config, [_kind((i + 1) % period > 0) for i in range(read_size(config, "num_hidden_layers"))])


def gemma3_rotaries(config: Config, head_dim: int, rules: RotaryRules) -> tuple[RotarySpec | None, ...]:
    """One for layers with a window and one for those without; older configs have ``rope_local_base_freq``."""
    given = config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or not set(given) <= {"full_attention", "sliding_attention"}:
        why = "one rotary for full_attention and one for sliding_attention is needed"
        raise config_error("rope_parameters", given, why, "check the config")
    full = {"rope_theta": config.get("rope_theta")} | read_table(given, "full_attention")
    full |= read_table(config, "rope_scaling")
    sliding = {"rope_theta": config.get("rope_local_base_freq") or 10_000.0} | read_table(given, "sliding_attention")
    both = [read_settings(config, rope, head_dim, rules, "rope_parameters") for rope in (full, sliding)]
    return tuple(both[window is not None] for window in gemma3_windows(config))


def smollm3_rotaries(config: Config, head_dim: int, rules: RotaryRules) -> tuple[RotarySpec | None, ...]:
    """Layers whose entry of ``no_rope_layers`` is 0 have none: every fourth, or what the interval says."""
    return tuple(
        rotary if turned else None
        for rotary, turned in zip(same_rotary(config, head_dim, rules), _turned(config), strict=True)
    )


def smollm3_windows(config: Config) -> Windows:
    """Without ``layer_types`` the layers without rotary, if ``use_sliding_window``."""
    used = read_flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    return windows_by_type(config, [_kind(used and not turned) for turned in _turned(config)])


def _turned(config: Config) -> list[bool]:
    count, given = read_size(config, "num_hidden_layers"), config.get("no_rope_layers")
    if given is None:
        interval = read_size(config, "no_rope_layer_interval", 4)
        return [(i + 1) % interval > 0 for i in range(count)]
    if not isinstance(given, list) or len(given) < count or any(turned not in (0, 1) for turned in given):
        raise config_error("no_rope_layers", given, f"0 or 1 for each of {count} layers is needed", "check it")
    return [bool(turned) for turned in given[:count]]


def mixtral_mixtures(config: Config) -> tuple[MoESpec | None, ...]:
    """Every layer; ``intermediate_size`` is an expert's."""
    moe = MoESpec(
        _experts(config, 8), read_size(config, "num_experts_per_tok"), read_size(config, "intermediate_size"), True
    )
    return (_checked(moe),) * read_size(config, "num_hidden_layers")


def qwen3_moe_mixtures(config: Config) -> tuple[MoESpec | None, ...]:
    """Every ``decoder_sparse_step``-th layer but those of ``mlp_only_layers``."""
    count, step = read_size(config, "num_hidden_layers"), read_size(config, "decoder_sparse_step")
    top, ffn = (read_size(config, name) for name in ("num_experts_per_tok", "moe_intermediate_size"))
    moe = _checked(MoESpec(_experts(config, 128), top, ffn, read_flag(config, "norm_topk_prob")))
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise config_error("mlp_only_layers", dense, "a list of layers is needed", "check the config")
    return tuple(None if i in dense or (i + 1) % step else moe for i in range(count))


def _experts(config: Config, default: int) -> int:
    """Two spellings of one field."""
    counts = {read_size(config, name, default) for name in ("num_experts", "num_local_experts") if name in config}
    if len(counts) > 1:
        raise config_error("num_local_experts", config["num_local_experts"], "num_experts says otherwise", "remove one")
    return counts.pop() if counts else default


def _checked(moe: MoESpec) -> MoESpec:
    if moe.top > moe.experts:
        raise config_error("num_experts_per_tok", moe.top, f"there are {moe.experts} experts", "check the config")
    return moe


def root_of_width(config: Config) -> float:
    """Gemma's factor of the embedding."""
    return read_size(config, "hidden_size") ** 0.5


def query_scalar(config: Config, head_dim: int) -> float:
    """Gemma's factor of the queries."""
    return read_number(config, "query_pre_attn_scalar") ** -0.5


QWEN: Mapping[str, Any] = {"sliding_window": 4096, "num_key_value_heads": 32}
GEMMA: Mapping[str, Any] = {"head_dim": 256, "tie_word_embeddings": True}
CAUSAL: Mapping[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}
TANH = "gelu_pytorch_tanh"

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
        defaults={**QWEN, "head_dim": 128},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        windows=mistral_windows,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        norm_offset=1.0,
        renames={"gelu": TANH},
        embed_scale=root_of_width,
        only=CAUSAL,
        defaults={**GEMMA, "hidden_act": TANH, "num_key_value_heads": 16},
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        layer={**BOTH_NORMS, **ATTENTION, **MLP},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        post_norm=True,
        norm_offset=1.0,
        activation="hidden_activation",
        windows=gemma2_windows,
        query_scale=query_scalar,
        embed_scale=root_of_width,
        attention_cap="attn_logit_softcapping",
        logit_cap="final_logit_softcapping",
        only=CAUSAL,
        defaults={
            **GEMMA,
            "hidden_activation": TANH,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        layer={**BOTH_NORMS, **ATTENTION, **HEAD_NORMS, **MLP},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        post_norm=True,
        norm_offset=1.0,
        activation="hidden_activation",
        windows=gemma3_windows,
        rotaries=gemma3_rotaries,
        rotary=RotaryRules(theta=1_000_000.0),
        query_scale=query_scalar,
        embed_scale=root_of_width,
        logit_cap="final_logit_softcapping",
        only=CAUSAL,
        defaults={
            **GEMMA,
            "hidden_activation": TANH,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        layer={**PRE_NORMS, **JOINED},
        windows=one_window,
        rotary=RotaryRules(partial=True, kinds=("default", "longrope"), renames={"su": "longrope", "yarn": "longrope"}),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        layer={**POST_NORMS, **ATTENTION, **PROJECTION_NORMS, **MLP},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="all",
        pre_norm=False,
        post_norm=True,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        query_scale=lambda config, head_dim: read_number(config, "attention_multiplier", 1.0),
        embed_scale=lambda config: read_number(config, "embedding_multiplier", 1.0),
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows=smollm3_windows,
        rotaries=smollm3_rotaries,
        rotary=RotaryRules(theta=2_000_000.0),
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        layer={**PRE_NORMS, **ATTENTION, **MIXTRAL_MOE},
        windows=one_window,
        rotary=RotaryRules(theta=1_000_000.0),
        mixtures=mixtral_mixtures,
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        layer={**PRE_NORMS, **ATTENTION, **HEAD_NORMS, **MLP, **QWEN_MOE},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm="head",
        windows=qwen3_moe_windows,
        mixtures=qwen3_moe_mixtures,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
        },
    ),
}
"""model_type -> record."""
