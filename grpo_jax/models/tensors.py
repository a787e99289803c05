"""Which Hugging Face tensors a model's parameters are, whole, in parts, by layer and by expert."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from grpo_jax.models import transformer
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.model import Model
from grpo_jax.types import Params


@dataclass(frozen=True)
class Entry:
    """A Hugging Face tensor, or rows of one, and where they lie in a parameter.

    Attributes:
        name: of the tensor.
        shape: of these rows.
        index: into the parameter: (), or a layer's place in its stack, or that and an expert's number.
        part: their place among the entries of this name, which lie one below the other.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    part: int


def tensor_entries(model: Model) -> Params:
    """For each parameter the list of its entries: one, or one for each layer of its stack, or for each expert too."""
    family, weights = FAMILIES[model.spec.family], model.layout.weights
    numbers: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(transformer.layer_places(model.spec.runs)):
        numbers.setdefault(name, []).append(number)

    def outer(path: Any, weight: Any) -> list[Entry]:
        tensor = family.outer[_dotted(path)]
        return [Entry(tensor.name, _joined(weight.shape, tensor.joins), (), tensor.part)]

    def stacked(layers: list[int], path: Any, weight: Any) -> list[Entry]:
        tensor = family.layer[_dotted(path)]
        experts = range(weight.shape[1]) if "{e}" in tensor.name else [None]
        shape = _joined(weight.shape[1 if experts == [None] else 2 :], tensor.joins)
        return [
            Entry(tensor.name.format(i=layer, e=e), shape, (place,) if e is None else (place, e), tensor.part)
            for place, layer in enumerate(layers)
            for e in experts
        ]

    stacks = {
        name: jax.tree_util.tree_map_with_path(partial(stacked, numbers[name]), tree)
        for name, tree in weights["layers"].items()
    }
    return {"outer": jax.tree_util.tree_map_with_path(outer, weights["outer"]), "layers": stacks}


@dataclass(frozen=True)
class Tensor:
    """A Hugging Face tensor and its parts: for each the number of the parameter among the leaves, and the entry."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[int, Entry], ...]


def list_tensors(model: Model) -> list[Tensor]:
    """Every tensor of the model's checkpoint, in the order of its parameters."""
    parts: dict[str, list[tuple[int, Entry]]] = {}
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    for leaf, entries in enumerate(jax.tree.leaves(tensor_entries(model), is_leaf=is_list)):
        for entry in entries:
            parts.setdefault(entry.name, []).append((leaf, entry))
    tensors = []
    for name, found in parts.items():
        found.sort(key=lambda pair: pair[1].part)
        shape = found[0][1].shape
        tensors.append(Tensor(name, (sum(e.shape[0] for _, e in found), *shape[1:]), tuple(found)))
    return tensors


def _joined(shape: tuple[int, ...], joins: tuple[int, ...]) -> tuple[int, ...]:
    """The tensor's shape: (2, 1) of (H, d, D) is (H * d, D)."""
    ends = [sum(joins[: i + 1]) for i in range(len(joins))]
    return tuple(math.prod(shape[end - count : end]) for end, count in zip(ends, joins, strict=True))


def _dotted(path: Any) -> str:
    return ".".join(key.key for key in path)
