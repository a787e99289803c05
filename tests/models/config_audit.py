"""Every field of a family's config class, set to other values: the numbers of transformers, or a refusal.

A field that is read by transformers and not here would be wrong logits without a word. The list of fields is not
written down: it is that of the config class, so that one a later transformers adds is met here first.
"""

import json
from typing import Any

import numpy as np
import pytest
from hf_cases import CASES, LENGTH, SHAPE, draw, draw_tokens
from model_cases import relative

from grpo_jax.models import ModelSpec, load_model
from grpo_jax.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HALVES = sorted(FAMILIES)[0::2], sorted(FAMILIES)[1::2]
"""Of the families, one for each of two test files: a file is one process's, and all of them take it two minutes."""

BEYOND = ("is_causal", "sliding_window", "head_dim", "attention_chunk_size", "partial_rotary_factor")
"""What code that all families share reads, though no config class may have the field."""

OF_ANOTHER_KIND = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version")
"""What says which class and which type of numbers, not what it computes: held by other tests."""

TOLERANCE = 1e-4
"""Relative to the largest logit: above what float32 costs any of these shapes, far below what a field left out does."""

SLIDING, FULL = "sliding_attention", "full_attention"
LISTS: dict[str, list[Any]] = {
    "layer_types": [
        [FULL] * 3,
        [SLIDING] * 3,
        [FULL, SLIDING, FULL],
        [SLIDING, SLIDING, FULL],
        ["chunked_attention"] * 3,
    ],
    "no_rope_layers": [[1, 0, 1], [0, 0, 0]],
    "mlp_only_layers": [[1], [0, 2], [7]],
}
"""Fields that the config classes make of others where they are not given, and values for them."""
ROTARIES = [
    {"rope_type": "default", "rope_theta": 97.0},
    {"rope_type": "linear", "rope_theta": 97.0, "factor": 2.0},
    {"rope_theta": 97.0, "partial_rotary_factor": 0.5},
    {FULL: {"rope_type": "default", "rope_theta": 97.0}, SLIDING: {"rope_type": "default", "rope_theta": 31.0}},
]


def _base(name: str) -> dict[str, Any]:
    """A config.json with windows, experts and the like in it, so that what governs them shows."""
    kind = transformers.CONFIG_MAPPING[name]
    first = next(fields for cls, fields in CASES.values() if cls == kind.__name__)
    config = json.loads(kind(**SHAPE | {"head_dim": 8} | first | {"num_hidden_layers": 3}).to_json_string(False))
    if "use_sliding_window" in config:
        config |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    return {field: value for field, value in config.items() if field not in LISTS} | {"model_type": name}


def _others(name: str, value: Any) -> list[Any]:
    """Values that a field might have instead."""
    if name in LISTS:
        return [None, *LISTS[name]]
    if name in ("rope_parameters", "rope_scaling"):
        return [None, *ROTARIES]
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [None, 0, value * 2, *([value + 1] if value < 8 else [])]
    if isinstance(value, float):
        return [None, value / 2 + 0.25, 3.0]
    if isinstance(value, str):
        return [None, "gelu", "relu", "tanh"]
    return [True, False, 2, 0.5, [0], {}]


def _theirs(config: dict[str, Any], directory) -> tuple[Any, np.ndarray] | None:
    """The model of transformers and its logits; None where it cannot be made or run."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    try:
        read = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(read, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
            logits = model.eval()(torch.tensor(draw_tokens(), dtype=torch.long)).logits.numpy()
    except Exception:
        return None
    return (model, logits) if np.isfinite(logits).all() else None


def _difference(model: Any, logits: np.ndarray, config: dict[str, Any], directory) -> float:
    """Of the logits of what is loaded here from the same tensors and config.json; 0 where loading refuses them."""
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    try:
        ours, params = load_model(directory, longest=LENGTH)
    except ValueError:
        return 0.0
    return float(relative(ours.logits(params, draw_tokens()), logits))


def audit(family: str, tmp_path) -> None:
    """No field is ignored that transformers reads."""
    base = _base(family)
    spec = ModelSpec.from_hf(base, longest=LENGTH)
    first = _theirs(base, tmp_path / "base")
    assert first is not None and _difference(*first, base, tmp_path / "base") < TOLERANCE
    wrong, same, compared = [], 0, 0
    for field in sorted({*base, *LISTS, *BEYOND} - {*OF_ANOTHER_KIND}):
        for i, value in enumerate(_others(field, base.get(field))):
            changed, directory = base | {field: value}, tmp_path / f"{field}-{i}"
            try:
                read = ModelSpec.from_hf(changed, longest=LENGTH)
            except ValueError:
                continue
            theirs = _theirs(changed, directory)
            if theirs is None:
                continue
            if read == spec and np.array_equal(theirs[1], first[1]):
                same += 1
                continue
            compared += 1
            difference = np.inf if read == spec else _difference(*theirs, changed, directory)
            if not difference < TOLERANCE:
                wrong.append((field, value, difference))
    assert not wrong
    assert same > 20 and compared > 10  # what is not compared holds nothing
