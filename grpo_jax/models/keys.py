"""Key tables: where each parameter lies among a family's Hugging Face tensors. Standard library only.

Paths are those of the parameter tree, dotted. A path that a config has no parameter for is not looked up.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """A Hugging Face tensor and how its axes are cut.

    Attributes:
        name: its name; ``{i}`` stands for the layer. With ``{e}`` the parameter's first axis counts experts, and each
            has a tensor of its own.
        joins: for each of its axes, how many axes of the parameter it joins: (2, 1) is [H * d, D] for [H, d, D].
        part: several parameters with the same name are parts of one tensor, one below the other in this order.
    """

    name: str
    joins: tuple[int, ...]
    part: int = 0


Keys = Mapping[str, Key]


def _in_layer(names: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Key]:
    return {path: Key(f"model.layers.{{i}}.{name}", joins) for path, (name, joins) in names.items()}


ATTENTION: Keys = _in_layer(
    {
        "attention.q.kernel": ("self_attn.q_proj.weight", (2, 1)),
        "attention.q.bias": ("self_attn.q_proj.bias", (2,)),
        "attention.k.kernel": ("self_attn.k_proj.weight", (2, 1)),
        "attention.k.bias": ("self_attn.k_proj.bias", (2,)),
        "attention.v.kernel": ("self_attn.v_proj.weight", (2, 1)),
        "attention.v.bias": ("self_attn.v_proj.bias", (2,)),
        "attention.out.kernel": ("self_attn.o_proj.weight", (1, 2)),
        "attention.out.bias": ("self_attn.o_proj.bias", (1,)),
    }
)

MLP: Keys = _in_layer(
    {
        "mlp.gate.kernel": ("mlp.gate_proj.weight", (1, 1)),
        "mlp.gate.bias": ("mlp.gate_proj.bias", (1,)),
        "mlp.up.kernel": ("mlp.up_proj.weight", (1, 1)),
        "mlp.up.bias": ("mlp.up_proj.bias", (1,)),
        "mlp.down.kernel": ("mlp.down_proj.weight", (1, 1)),
        "mlp.down.bias": ("mlp.down_proj.bias", (1,)),
    }
)

PRE_NORMS: Keys = _in_layer(
    {
        "input_norm.scale": ("input_layernorm.weight", (1,)),
        "mlp_norm.scale": ("post_attention_layernorm.weight", (1,)),
    }
)

POST_NORMS: Keys = _in_layer(
    {
        "attention_post_norm.scale": ("post_attention_layernorm.weight", (1,)),
        "mlp_post_norm.scale": ("post_feedforward_layernorm.weight", (1,)),
    }
)

BOTH_NORMS: Keys = _in_layer(
    {
        "input_norm.scale": ("input_layernorm.weight", (1,)),
        "attention_post_norm.scale": ("post_attention_layernorm.weight", (1,)),
        "mlp_norm.scale": ("pre_feedforward_layernorm.weight", (1,)),
        "mlp_post_norm.scale": ("post_feedforward_layernorm.weight", (1,)),
    }
)

HEAD_NORMS: Keys = _in_layer(
    {
        "attention.q_norm.scale": ("self_attn.q_norm.weight", (1,)),
        "attention.k_norm.scale": ("self_attn.k_norm.weight", (1,)),
    }
)

PROJECTION_NORMS: Keys = _in_layer(
    {
        "attention.q_norm.scale": ("self_attn.q_norm.weight", (3,)),
        "attention.k_norm.scale": ("self_attn.k_norm.weight", (2,)),
    }
)

JOINED: Keys = {
    "attention.q.kernel": Key("model.layers.{i}.self_attn.qkv_proj.weight", (2, 1), 0),
    "attention.k.kernel": Key("model.layers.{i}.self_attn.qkv_proj.weight", (2, 1), 1),
    "attention.v.kernel": Key("model.layers.{i}.self_attn.qkv_proj.weight", (2, 1), 2),
    "attention.out.kernel": ATTENTION["attention.out.kernel"],
    "mlp.gate.kernel": Key("model.layers.{i}.mlp.gate_up_proj.weight", (1, 1), 0),
    "mlp.up.kernel": Key("model.layers.{i}.mlp.gate_up_proj.weight", (1, 1), 1),
    "mlp.down.kernel": MLP["mlp.down.kernel"],
}

QWEN_MOE: Keys = _in_layer(
    {
        "mlp.router.kernel": ("mlp.gate.weight", (1, 1)),
        "mlp.experts.gate": ("mlp.experts.{e}.gate_proj.weight", (1, 1)),
        "mlp.experts.up": ("mlp.experts.{e}.up_proj.weight", (1, 1)),
        "mlp.experts.down": ("mlp.experts.{e}.down_proj.weight", (1, 1)),
    }
)

MIXTRAL_MOE: Keys = _in_layer(
    {
        "mlp.router.kernel": ("block_sparse_moe.gate.weight", (1, 1)),
        "mlp.experts.gate": ("block_sparse_moe.experts.{e}.w1.weight", (1, 1)),
        "mlp.experts.up": ("block_sparse_moe.experts.{e}.w3.weight", (1, 1)),
        "mlp.experts.down": ("block_sparse_moe.experts.{e}.w2.weight", (1, 1)),
    }
)

OUTER: Keys = {
    "embed.kernel": Key("model.embed_tokens.weight", (1, 1)),
    "norm.scale": Key("model.norm.weight", (1,)),
    "head.kernel": Key("lm_head.weight", (1, 1)),
}

ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
"""Regular expressions of tensors that older checkpoints have and that hold nothing that config.json does not say."""
