"""ModelSpec: what a Hugging Face config.json says about the forward pass, checked. Standard library only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.models.families import FAMILIES, Family

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding of one layer.

    Attributes:
        kind: "default", or "llama3" (frequencies slowed by ``factor`` below a wavelength, smoothly in between).
        theta: base.
        factor, low_freq_factor, high_freq_factor, original_len: the numbers of "llama3"; 1, 1, 1, 0 otherwise.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_len: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """Every static fact that one decoder layer's constructor reads."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rotary: RotarySpec


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
        logit_scale, softcap: logits are ``softcap * tanh(logit_scale * h W / softcap)``, without the cap if None.
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
    logit_scale: float = 1.0
    softcap: float | None = None
    stop_ids: tuple[int, ...] = field(default=(), compare=False)
    dtype: str | None = field(default=None, compare=False)
    hf_config: str = field(default="{}", compare=False, repr=False)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Reads a config.json, older (rope_theta, rope_scaling, torch_dtype) or newer (rope_parameters, dtype).

        Fields that the family's forward pass in transformers does not read are kept and ignored. Dropout rates are
        ignored too: nothing random happens in the training pass.

        Raises:
            ValueError: an unsupported model_type, or a field that changes the numbers and is not supported.
        """
        config = dict(config)
        model_type = config.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ValueError(
                f"config.json: got model_type {model_type!r}; there is no record for it; "
                f"use a checkpoint of one of: {', '.join(sorted(FAMILIES))}"
            )
        _refuse(config, family)
        layer = _layer_spec(config, family)
        return cls(
            family=str(model_type),
            vocab=_size(config, "vocab_size"),
            width=layer.width,
            layers=(layer,) * _size(config, "num_hidden_layers"),
            tied=_flag(config, "tie_word_embeddings"),
            norm_eps=layer.norm_eps,
            max_len=_size(config, "max_position_embeddings"),
            stop_ids=read_stop_ids(config),
            dtype=_dtype(config),
            hf_config=json.dumps(config),
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """``layers`` cut into runs."""
        return cut_runs(self.layers)

    def __hash__(self) -> int:
        """From a few fields: a spec is a static argument of every jitted call, and equality decides anyway."""
        return hash((self.family, self.vocab, self.width, len(self.layers), self.layers[0], self.tied))


def read_stop_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
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


def _error(name: str, got: Any, why: str, do: str) -> ValueError:
    return ValueError(f"config.json: {name}: got {got!r}; {why}; {do}")


def _refuse(config: Mapping[str, Any], family: Family) -> None:
    unsupported = "it changes the numbers and is not supported"
    for name, only in family.only.items():
        if config.get(name, only) != only:
            raise _error(name, config[name], unsupported, f"use a checkpoint with {only!r}")
    if config.get("quantization_config"):
        raise _error(
            "quantization_config", config["quantization_config"], unsupported, "use the checkpoint before quantisation"
        )
    layer_count = _size(config, "num_hidden_layers")
    windows = family.windows(config)
    if len(windows) != layer_count:
        raise _error(
            "layer_types", len(windows), f"there are {layer_count} layers", "give one entry for each of the layers"
        )
    if any(window is not None for window in windows):
        why = "a sliding window is in use, which is not supported"
        raise _error("sliding_window", config.get("sliding_window"), why, "use a checkpoint with full attention")


def _layer_spec(config: Mapping[str, Any], family: Family) -> LayerSpec:
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    head_dim = _size(config, "head_dim", default=width // heads if width % heads == 0 else None)
    if heads % kv_heads:
        raise _error("num_key_value_heads", kv_heads, f"it does not divide the {heads} heads", "check the config")
    if head_dim % 2:
        raise _error("head_dim", head_dim, "the rotary embedding turns pairs of features", "use an even head_dim")
    return LayerSpec(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_size(config, "intermediate_size"),
        norm_eps=_number(config, "rms_norm_eps", family.rms_norm_eps),
        qkv_bias=_fact(config, family.qkv_bias),
        out_bias=_fact(config, family.out_bias),
        mlp_bias=_fact(config, family.mlp_bias),
        rotary=_rotary(config, family),
    )


def _rotary(config: Mapping[str, Any], family: Family) -> RotarySpec:
    """Same precedence as transformers: rope_scaling, else rope_parameters; a theta inside it, else rope_theta."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise _error(name, rope, "settings for each layer type are not supported", "use a checkpoint with one rotary")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROTARY_READERS:
        why = "this kind of rotary scaling is not supported"
        raise _error(f"{name}.rope_type", kind, why, f"use one of: {', '.join(ROTARY_READERS)}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        why = "a rotary on part of the features is not supported"
        raise _error("partial_rotary_factor", partial, why, "use a checkpoint without it")
    theta = _number({"rope_theta": family.rope_theta} | _given(config) | _given(rope), "rope_theta", None)
    return ROTARY_READERS[kind](theta, dict(rope), config, name)


def _read_default(theta: float, rope: dict[str, Any], config: Mapping[str, Any], name: str) -> RotarySpec:
    return RotarySpec("default", theta)


def _read_llama3(theta: float, rope: dict[str, Any], config: Mapping[str, Any], name: str) -> RotarySpec:
    top = "original_max_position_embeddings"
    rope[top] = config.get(top) or rope.get(top) or config.get("max_position_embeddings")
    numbers = [_number(rope, key, None, name) for key in ("factor", "low_freq_factor", "high_freq_factor", top)]
    if numbers[1] == numbers[2]:
        raise _error(f"{name}.high_freq_factor", numbers[2], "it must differ from low_freq_factor", "check the config")
    return RotarySpec("llama3", theta, numbers[0], numbers[1], numbers[2], int(numbers[3]))


ROTARY_READERS = {"default": _read_default, "llama3": _read_llama3}


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}


def _fact(config: Mapping[str, Any], fact: bool | str) -> bool:
    return _flag(config, fact) if isinstance(fact, str) else fact


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _error(name, value, "true or false is needed", "check the config")


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _error(name, value, "a whole number of at least 1 is needed", "check that the config is whole")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None, inside: str = "") -> float:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        where = f"{inside}.{name}" if inside else name
        raise _error(where, value, "a number above 0 is needed", "check that the config is whole")
    return float(value)


def _dtype(config: Mapping[str, Any]) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and name not in DTYPES:
        raise _error("dtype", value, f"tensors are read in {', '.join(DTYPES)}", "convert the checkpoint")
    return name
