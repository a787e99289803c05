"""One record per model family: what its config.json means, and where its tensors go. Standard library only.

A family is data until it needs a layer that is not here yet. Paths are those of the parameter tree, dotted; a
record's defaults are those of the family's Hugging Face config class.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Tensor:
    """A Hugging Face tensor and how its axes are cut.

    Attributes:
        name: its name; ``{i}`` stands for the layer.
        joins: for each of its axes, how many axes of the parameter it joins: (2, 1) is [H * d, D] for [H, d, D].
    """

    name: str
    joins: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """What sets a family apart.

    Attributes:
        architecture: the name of the class in transformers, for the config.json of a model made here.
        qkv_bias, out_bias, mlp_bias: a fixed fact, or the name of the bool field of config.json that says it.
        layer: path in a layer's parameters -> tensor. Paths that a config has no parameter for are not looked up.
        outer: path in the parameters outside the layers -> tensor.
        harmless: regular expressions of tensors that may be there and are not read.
        windows: config -> the attention window of each layer, None for full attention.
        only: field -> the one value that is supported, which is also the default where the field is absent.
        rope_theta, rms_norm_eps: defaults.
    """

    architecture: str
    qkv_bias: bool | str
    out_bias: bool | str
    mlp_bias: bool | str
    layer: Mapping[str, Tensor]
    outer: Mapping[str, Tensor]
    harmless: tuple[str, ...]
    windows: Callable[[Config], tuple[int | None, ...]]
    only: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6


LLAMA_LAYER: Mapping[str, Tensor] = {
    "input_norm.scale": Tensor("model.layers.{i}.input_layernorm.weight", (1,)),
    "attention.q.kernel": Tensor("model.layers.{i}.self_attn.q_proj.weight", (2, 1)),
    "attention.q.bias": Tensor("model.layers.{i}.self_attn.q_proj.bias", (2,)),
    "attention.k.kernel": Tensor("model.layers.{i}.self_attn.k_proj.weight", (2, 1)),
    "attention.k.bias": Tensor("model.layers.{i}.self_attn.k_proj.bias", (2,)),
    "attention.v.kernel": Tensor("model.layers.{i}.self_attn.v_proj.weight", (2, 1)),
    "attention.v.bias": Tensor("model.layers.{i}.self_attn.v_proj.bias", (2,)),
    "attention.out.kernel": Tensor("model.layers.{i}.self_attn.o_proj.weight", (1, 2)),
    "attention.out.bias": Tensor("model.layers.{i}.self_attn.o_proj.bias", (1,)),
    "mlp_norm.scale": Tensor("model.layers.{i}.post_attention_layernorm.weight", (1,)),
    "mlp.gate.kernel": Tensor("model.layers.{i}.mlp.gate_proj.weight", (1, 1)),
    "mlp.gate.bias": Tensor("model.layers.{i}.mlp.gate_proj.bias", (1,)),
    "mlp.up.kernel": Tensor("model.layers.{i}.mlp.up_proj.weight", (1, 1)),
    "mlp.up.bias": Tensor("model.layers.{i}.mlp.up_proj.bias", (1,)),
    "mlp.down.kernel": Tensor("model.layers.{i}.mlp.down_proj.weight", (1, 1)),
    "mlp.down.bias": Tensor("model.layers.{i}.mlp.down_proj.bias", (1,)),
}

LLAMA_OUTER: Mapping[str, Tensor] = {
    "embed.kernel": Tensor("model.embed_tokens.weight", (1, 1)),
    "norm.scale": Tensor("model.norm.weight", (1,)),
    "head.kernel": Tensor("lm_head.weight", (1, 1)),
}

ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


def full_attention(config: Config) -> tuple[int | None, ...]:
    """No layer has a window."""
    return (None,) * config["num_hidden_layers"]


def qwen2_windows(config: Config) -> tuple[int | None, ...]:
    """``layer_types`` where it is given; else layers from ``max_window_layers`` on, if ``use_sliding_window``."""
    count, window = config["num_hidden_layers"], config.get("sliding_window", 4096)
    if config.get("layer_types") is not None:
        return tuple(None if kind == "full_attention" else window for kind in config["layer_types"])
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window", False) else count
    return tuple(None if i < first else window for i in range(count))


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        layer=LLAMA_LAYER,
        outer=LLAMA_OUTER,
        harmless=ROTARY_BUFFERS,
        windows=full_attention,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        layer=LLAMA_LAYER,
        outer=LLAMA_OUTER,
        harmless=ROTARY_BUFFERS,
        windows=qwen2_windows,
    ),
}
"""model_type -> record."""
