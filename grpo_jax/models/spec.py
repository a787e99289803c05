"""ModelSpec: what a Hugging Face config.json says about the forward pass, checked. Standard library only."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_jax.models.families import FAMILIES, Family, MoESpec, QKNorm
from grpo_jax.models.fields import Config, config_error, read_cap, read_flag, read_number, read_size
from grpo_jax.models.rotary_spec import RotarySpec

DTYPES = ("float32", "bfloat16", "float16")

MOST = 1_000
"""Layers of a model, and experts of a layer."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
"""Of the MLP, by Hugging Face's names."""


EVERYWHERE: dict[str, tuple[Any, ...]] = {"is_causal": (True,)}
"""Field of every family -> the values that are supported; what makes the masks in transformers reads it in all."""

LORA_TARGETS = {
    **{name: "attention" for name in ("q", "k", "v", "out")},
    **{name: "mlp" for name in ("gate", "up", "down")},
}
"""Linear maps that can have adapters, and the part of the layer they are in."""


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters: ``W + alpha / rank * B A`` on the linear maps ``targets``.

    Raises:
        ValueError: a rank below 1, an alpha not above 0, no target, or one that is not in ``LORA_TARGETS``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(LORA_TARGETS)

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.rank < 1:
            raise ValueError(f"model.lora.rank: got {self.rank}; it is a size; use 1 or more")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"model.lora.alpha: got {self.alpha}; it is a factor; use a number above 0")
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        if unknown or not self.targets:
            legal = ", ".join(LORA_TARGETS)
            raise ValueError(f"model.lora.targets: got {list(self.targets)}; adapters go on: {legal}; name some")

    @property
    def scale(self) -> float:
        """Factor of ``B A``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LayerSpec:
    """Every static fact that one decoder layer's constructor reads.

    Attributes:
        width, heads, kv_heads, head_dim, ffn: D, H, K, d, F.
        norm_eps: of every norm.
        qkv_bias, out_bias, mlp_bias: where the linear maps have biases.
        rotary: None is none.
        query_scale: factor of the queries.
        window: a token sees the last so many, itself included; None is all.
        softcap: scores are ``softcap * tanh(scores / softcap)``, without the cap if None.
        qk_norm: queries and keys are normed, each head by itself, or all heads together.
        pre_norm, post_norm: attention and MLP are normed before and after.
        norm_offset: what is added to the scale of each norm.
        residual_scale: factor of what is added to the stream.
        activation: of the MLP, one of ``ACTIVATIONS``.
        moe: a mixture of experts in place of the MLP, or None.
        lora: adapters, which no config.json knows of, or None.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rotary: RotarySpec | None
    query_scale: float
    window: int | None = None
    softcap: float | None = None
    qk_norm: QKNorm = "none"
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    residual_scale: float = 1.0
    activation: str = "silu"
    moe: MoESpec | None = None
    lora: LoraSpec | None = None

    def adapter(self, name: str) -> LoraSpec | None:
        """The adapters of the linear map ``name``."""
        return self.lora if self.lora is not None and name in self.lora.targets else None


@dataclass(frozen=True)
class Run:
    """Layers that are one stack and one scan: ``pattern`` repeated ``repeats`` times."""

    pattern: tuple[LayerSpec, ...]
    repeats: int


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a model; frozen and hashable.

    Attributes:
        family: key of ``FAMILIES``.
        vocab, width: V and D.
        layers: one entry a layer.
        tied: the unembedding is the embedding.
        norm_eps: of the final norm.
        max_len: ``max_position_embeddings``; beyond it the rotary is extrapolated, nothing else fails.
        norm_offset: what is added to the scale of the final norm.
        embed_scale: factor of the embedded tokens.
        logit_scale, softcap: logits are ``softcap * tanh(logit_scale * h W / softcap)``, without the cap if None.
        longest: of the run's texts, for rotaries whose frequencies depend on it ("dynamic", "longrope"); 0 says that no
            text is longer than the context the model was first trained for.
        stop_ids: tokens that end a text, ascending: ``eos_token_id`` of config.json, and what ``load_model`` adds.
        dtype: what config.json says the tensors are in, or None.
        hf_config: the config.json it was read from, as JSON text, for export. The last three are not compared.
    """

    family: str
    vocab: int
    width: int
    layers: tuple[LayerSpec, ...]
    tied: bool
    norm_eps: float
    max_len: int
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    longest: int = 0
    stop_ids: tuple[int, ...] = field(default=(), compare=False)
    dtype: str | None = field(default=None, compare=False)
    hf_config: str = field(default="{}", compare=False, repr=False)

    @classmethod
    def from_hf(cls, config: Config, longest: int = 0) -> "ModelSpec":
        """Reads a config.json, older (rope_theta, rope_scaling, torch_dtype) or newer (rope_parameters, dtype).

        Fields that the family's forward pass in transformers does not read are kept and ignored. Dropout rates are
        ignored too: nothing random happens in the training pass.

        Raises:
            ValueError: an unsupported model_type, or a field that changes the numbers and is not supported.
        """
        given = dict(config)
        model_type = given.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ValueError(
                f"config.json: got model_type {model_type!r}; there is no record for it; "
                f"use a checkpoint of one of: {', '.join(sorted(FAMILIES))}"
            )
        _refuse(given, family)
        _bounded(given)
        config = {**{name: legal[0] for name, legal in family.only.items()}, **family.defaults, **given}
        layers = _layers(config, family)
        divisor = 1.0 if family.logit_divisor is None else read_number(config, family.logit_divisor, 1.0)
        return cls(
            family=str(model_type),
            vocab=read_size(config, "vocab_size"),
            width=layers[0].width,
            layers=layers,
            tied=read_flag(config, "tie_word_embeddings"),
            norm_eps=layers[0].norm_eps,
            max_len=read_size(config, "max_position_embeddings"),
            norm_offset=family.norm_offset,
            embed_scale=family.embed_scale(config),
            logit_scale=1.0 / divisor,
            softcap=None if family.logit_cap is None else read_cap(config, family.logit_cap),
            longest=longest if any(x.rotary is not None and x.rotary.by_length for x in layers) else 0,
            stop_ids=read_stop_ids(given),
            dtype=_dtype(given),
            hf_config=json.dumps(given),
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """``layers`` cut into runs."""
        return cut_runs(self.layers)

    @property
    def experts(self) -> int:
        """How many experts a mixture has; 0 where no layer is one."""
        return max((layer.moe.experts for layer in self.layers if layer.moe is not None), default=0)

    def __hash__(self) -> int:
        """From a few fields: a spec is a static argument of every jitted call, and equality decides anyway."""
        return hash((self.family, self.vocab, self.width, len(self.layers), self.layers[0], self.tied))


def read_stop_ids(config: Config) -> tuple[int, ...]:
    """``eos_token_id`` of a config.json or generation_config.json: an id, a list of them, or nothing; ascending.

    Raises:
        ValueError: it is something else.
    """
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id: got {value!r}; a token id or a list of them is needed; check the config")
    return tuple(sorted(set(ids)))


def cut_runs(layers: tuple[LayerSpec, ...]) -> tuple[Run, ...]:
    """Cuts a layer list into (pattern, repeats), so that each run is one stack and one scan.

    Greedy from the left: at each place the (pattern, repeats) that covers most layers with at least two repeats,
    the shorter pattern on a tie; where nothing repeats, one layer alone.
    """
    runs: list[Run] = []
    start = 0
    while start < len(layers):
        best = Run(layers[start : start + 1], 1)
        for size in range(1, (len(layers) - start) // 2 + 1):
            pattern, repeats = layers[start : start + size], 1
            while layers[start + repeats * size : start + (repeats + 1) * size] == pattern:
                repeats += 1
            if repeats > 1 and repeats * size > len(best.pattern) * best.repeats:
                best = Run(pattern, repeats)
        runs.append(best)
        start += len(best.pattern) * best.repeats
    return tuple(runs)


def _refuse(config: Config, family: Family) -> None:
    unsupported = "it changes the numbers and is not supported"
    for name, legal in (EVERYWHERE | dict(family.only)).items():
        if config.get(name, legal[0]) not in legal:
            raise config_error(name, config[name], unsupported, f"use a checkpoint with {legal[0]!r}")
    quantised = config.get("quantization_config")
    if quantised:
        raise config_error("quantization_config", quantised, unsupported, "use the checkpoint before quantisation")


def _bounded(config: Config) -> None:
    """What is counted one by one: an absurd number must not fill the memory before any tensor is missed."""
    for name in ("num_hidden_layers", "num_experts", "num_local_experts"):
        if name in config and read_size(config, name) > MOST:
            raise config_error(name, config[name], f"at most {MOST} are supported", "check that the config is whole")


def _layers(config: Config, family: Family) -> tuple[LayerSpec, ...]:
    width, heads = read_size(config, "hidden_size"), read_size(config, "num_attention_heads")
    kv_heads = read_size(config, "num_key_value_heads", default=heads)
    head_dim = read_size(config, "head_dim", default=width // heads if width % heads == 0 else None)
    if heads % kv_heads:
        raise config_error("num_key_value_heads", kv_heads, f"it does not divide the {heads} heads", "check the config")
    layer = LayerSpec(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=read_size(config, "intermediate_size"),
        norm_eps=read_number(config, "rms_norm_eps", 1e-6),
        qkv_bias=_fact(config, family.qkv_bias),
        out_bias=_fact(config, family.out_bias),
        mlp_bias=_fact(config, family.mlp_bias),
        rotary=None,
        query_scale=family.query_scale(config, head_dim),
        softcap=None if family.attention_cap is None else read_cap(config, family.attention_cap),
        qk_norm=family.qk_norm,
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        norm_offset=family.norm_offset,
        residual_scale=1.0 if family.residual_scale is None else read_number(config, family.residual_scale, 1.0),
        activation=_activation(config, family),
    )
    rotaries, windows = family.rotaries(config, head_dim, family.rotary), family.windows(config)
    count = read_size(config, "num_hidden_layers")
    if len(windows) != count:
        raise config_error("layer_types", len(windows), f"there are {count} layers", "give one entry for each of them")
    facts = zip(rotaries, windows, family.mixtures(config), strict=True)
    return tuple(replace(layer, rotary=rotary, window=window, moe=moe) for rotary, window, moe in facts)


def _activation(config: Config, family: Family) -> str:
    given = config.get(family.activation, ACTIVATIONS[0])
    name = family.renames.get(given, given) if isinstance(given, str) else given
    if name not in ACTIVATIONS:
        why = "it changes the numbers and is not supported"
        raise config_error(family.activation, given, why, f"use one of: {', '.join(ACTIVATIONS)}")
    return name


def _fact(config: Config, fact: bool | str) -> bool:
    return read_flag(config, fact) if isinstance(fact, str) else fact


def _dtype(config: Config) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and name not in DTYPES:
        raise config_error("dtype", value, f"tensors are read in {', '.join(DTYPES)}", "convert the checkpoint")
    return name
