"""Low-rank adapters (Hu et al. 2021): ``W + alpha / rank * B A`` on linear maps of a frozen model.

An adapted model's parameters are the base's and, beside each adapted kernel, ``lora_a`` [rank, in] and ``lora_b``
[out, rank]. Trees of that structure, arrays as well as shardings and masks, can be cut in two and joined again.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.spec import LoraSpec

ADAPTERS = ("lora_a", "lora_b")


def cut(tree: Any, adapters: bool) -> dict[str, Any]:
    """The adapters of a tree, or all but them."""
    kept: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            part = cut(node, adapters)
            kept |= {name: part} if part else {}
        elif (name in ADAPTERS) == adapters:
            kept[name] = node
    return kept


def join(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``cut``."""
    both = {name: join(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def merge(tree: Any, lora: LoraSpec | None, stacked: bool) -> Any:
    """Parameters with adapters -> parameters without, the adapters in the kernels; summed in float32.

    Args:
        tree: the parameters of a layer, or of a stack of layers.
        lora: None leaves them as they are.
        stacked: whether each leaf has a leading axis of layers.
    """
    if lora is None or not isinstance(tree, Mapping):
        return tree
    if "lora_a" not in tree:
        return {name: merge(node, lora, stacked) for name, node in tree.items()}

    def product(b: jax.Array, a: jax.Array) -> jax.Array:  # [*out, r] and [r, *in] -> [*out, *in]
        return jnp.tensordot(b.astype(jnp.float32), a.astype(jnp.float32), 1, precision="highest")

    kernel, change = tree["kernel"], (jax.vmap(product) if stacked else product)(tree["lora_b"], tree["lora_a"])
    merged = (kernel.astype(jnp.float32) + lora.scale * change).astype(kernel.dtype)
    return {name: leaf for name, leaf in tree.items() if name not in ADAPTERS} | {"kernel": merged}
