"""Adapters as a directory that the peft library loads onto the base model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from grpo_jax.mesh import fetch, is_first, wait_for_all
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.hf import PARTIAL
from grpo_jax.models.model import Model
from grpo_jax.models.spec import LORA_TARGETS
from grpo_jax.models.transformer import layer_places
from grpo_jax.types import Params

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_peft(model: Model, trained: Params, directory: str | Path, base: str) -> None:
    """Writes adapters, float32, in the format of the peft library.

    Args:
        model: with ``lora``.
        trained: its adapters, see ``Model.trained``.
        directory: made if it is not there.
        base: the model they belong to, a path or hub id, as peft is to find it.

    Raises:
        ValueError: a model without adapters, or of a family that holds several linear maps in one tensor.
    """
    if model.lora is None:
        raise ValueError("got a model without adapters; there is nothing to write; use save_hf")
    keys, named, modules = FAMILIES[model.spec.family].layer, {}, set()
    gathered = fetch(trained)
    for number, (stack, place) in enumerate(layer_places(model.spec.runs)):
        for target in model.lora.targets:
            group = LORA_TARGETS[target]
            key = keys[f"{group}.{target}.kernel"]
            if key.name in {other.name for path, other in keys.items() if path != f"{group}.{target}.kernel"}:
                raise ValueError(
                    f"got adapters of {target}, which {model.spec.family} holds in one tensor with others; peft has "
                    "no place for them; merge the adapters and use save_hf"
                )
            leaf: Any = gathered["layers"][stack][group][target]
            name = key.name.format(i=number).removesuffix(".weight")
            modules.add(name.rpartition(".")[2])
            a, b = (np.asarray(leaf[part][place], np.float32) for part in ("lora_a", "lora_b"))
            named[f"base_model.model.{name}.lora_A.weight"] = a.reshape(a.shape[0], -1)
            named[f"base_model.model.{name}.lora_B.weight"] = b.reshape(-1, b.shape[-1])
    if is_first():
        _write(Path(directory), named, _config(model, sorted(modules), base))
    wait_for_all("save_peft")


def _config(model: Model, modules: list[str], base: str) -> dict[str, Any]:
    assert model.lora is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }


def _write(directory: Path, named: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / (ADAPTER + PARTIAL)
    save_file({name: np.ascontiguousarray(value) for name, value in named.items()}, partial, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.chmod((directory / ADAPTER_CONFIG).stat().st_mode)
    partial.replace(directory / ADAPTER)
