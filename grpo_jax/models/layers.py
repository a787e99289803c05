"""Flax NNX modules without attention: linear maps, norms, embedding, MLP; and how a parameter is declared.

A parameter is declared once, as a ``Weight``: its shape, logical axes and start value. Initialisation, sharding, the
checkpoint's target and the loader's checks all derive from it. Modules are split once, at build time; their forward
passes see weights already cast to the compute dtype.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from grpo_jax.mesh import RULES, spec_for
from grpo_jax.models.spec import LayerSpec, LoraSpec


@dataclass(frozen=True)
class Weight:
    """Declaration of a parameter: shape, a logical axis name (or None) per axis, start value.

    ``into`` counts the last axes of a linear map's kernel, those of what goes in; 0 where it is none.

    "normal" has deviation 0.02. An adapter is "fan_in", uniform up to the root of the axes after the rank's, or "off",
    zeros; these three are matrices.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    start: Literal["normal", "zeros", "ones", "fan_in", "off"] = "normal"
    into: int = 0


@dataclass(frozen=True)
class Compute:
    """How arrays are computed: the dtype, the matmul precision of every product, and the mesh.

    Attributes:
        dtype: "float32" or "bfloat16".
        precision: "highest", "high" or "default", given to each matmul on each backend.
        mesh: of every sharding constraint.
        input_first: whether kernels of linear maps are [*in, *out], as decoding has them.
    """

    dtype: str
    precision: str
    mesh: Mesh
    input_first: bool = False

    def dot(self, x: jax.Array, y: jax.Array, contract: Any, batch: Any = ((), ()), out: Any = None) -> jax.Array:
        """``lax.dot_general`` at this precision, accumulated and returned in ``out`` (default: the dtype)."""
        return jax.lax.dot_general(
            x, y, (contract, batch), precision=self.precision, preferred_element_type=out or self.dtype
        )

    def einsum(self, pattern: str, x: jax.Array, y: jax.Array, out: Any = None) -> jax.Array:
        """``jnp.einsum`` of two arrays at this precision, in ``out`` (default: the dtype)."""
        return jnp.einsum(pattern, x, y, precision=self.precision, preferred_element_type=out or self.dtype)

    def shard(self, x: jax.Array, *axes: str | None, rules: Mapping[str, tuple[str, ...]] = RULES) -> jax.Array:
        """``x`` laid out by its logical axes; axes that do not divide are replicated."""
        sharding = NamedSharding(self.mesh, spec_for(axes, x.shape, self.mesh, rules))
        return jax.lax.with_sharding_constraint(x, sharding)


class Linear(nnx.Module):
    """``y[..., *out] = x[..., *in] W[*out, *in] + b[*out]``, the row order of Hugging Face's tensors.

    Decoding holds W as [*in, *out] instead: a product of few rows is then up to twice as fast on a CPU.
    """

    def __init__(
        self,
        compute: Compute,
        out: dict[str, int],
        into: dict[str, int],
        bias: bool = False,
        lora: LoraSpec | None = None,
    ):
        """``out`` and ``into`` give logical axis -> size; names after a ``:`` only tell axes apart and are dropped."""
        axes, shape, in_axes, in_shape = _names(out), tuple(out.values()), _names(into), tuple(into.values())
        self.compute = compute
        self.in_ndim = len(into)
        kernel = Weight(shape + in_shape, axes + in_axes, into=len(into))
        self.kernel = nnx.Param(input_first(kernel) if compute.input_first else kernel)
        self.bias = nnx.Param(Weight(shape, axes, "zeros")) if bias else None
        self.lora_scale = 0.0 if lora is None else lora.scale
        self.lora_a = None if lora is None else nnx.Param(Weight((lora.rank, *in_shape), (None, *in_axes), "fan_in"))
        self.lora_b = None if lora is None else nnx.Param(Weight((*shape, lora.rank), (*axes, None), "off"))

    def __call__(self, x: jax.Array, out: Any = None) -> jax.Array:
        """[..., *in] -> [..., *out] in ``out`` (default: the compute dtype)."""
        y = self._product(x, self.kernel[...], self.in_ndim, out, self.compute.input_first)
        if self.lora_a is not None and self.lora_b is not None:
            low = self._product(x, self.lora_a[...], self.in_ndim, None)
            y = y + (self.lora_scale * self._product(low, self.lora_b[...], 1, jnp.float32)).astype(y.dtype)
        if self.bias is None:
            return y
        # In float32, so that the bias's gradient, a sum over tokens, is too.
        return (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(y.dtype)

    def _product(self, x: jax.Array, kernel: jax.Array, ndim: int, out: Any, first: bool = False) -> jax.Array:
        rows, shape = x.shape[: x.ndim - ndim], kernel.shape[ndim:] if first else kernel.shape[: kernel.ndim - ndim]
        if kernel.ndim > 2 and self.compute.mesh.shape["tensor"] == 1:
            # As matrices: for a kernel of more axes XLA's CPU backend copies the whole weight into another order first,
            # at every decode step. Cut over ``tensor``, merging axes would move it between devices instead.
            size = math.prod(x.shape[len(rows) :])
            x, kernel, ndim = x.reshape(*rows, size), kernel.reshape((size, -1) if first else (-1, size)), 1
        axes = range(ndim) if first else range(kernel.ndim - ndim, kernel.ndim)
        return self.compute.dot(x, kernel, (tuple(range(len(rows), x.ndim)), tuple(axes)), out=out).reshape(
            *rows, *shape
        )


def input_first(kernel: Weight) -> Weight:
    """The declaration of a kernel [*out, *in] as [*in, *out]."""
    order = _input_first(kernel)
    return replace(kernel, shape=tuple(kernel.shape[i] for i in order), axes=tuple(kernel.axes[i] for i in order))


def as_decoded(weight: Weight, x: jax.Array) -> jax.Array:
    """A parameter as decoding has it: a linear map's kernel [*out, *in] as [*in, *out], others as they are."""
    return jnp.transpose(x, _input_first(weight)) if weight.into else x


def _input_first(kernel: Weight) -> tuple[int, ...]:
    count = len(kernel.shape)
    return (*range(count - kernel.into, count), *range(count - kernel.into))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axes, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, compute: Compute, shape: tuple[int, ...], eps: float, offset: float = 0.0):
        """Over the last axes, of ``shape``; ``eps`` is added to the mean square, ``offset`` to the scale."""
        self.compute, self.eps, self.offset = compute, eps, offset
        self.axes = tuple(range(-len(shape), 0))
        self.scale = nnx.Param(Weight(shape, (None,) * len(shape), "zeros" if offset else "ones"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *shape] -> the same in the compute dtype."""
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=self.axes, keepdims=True) + self.eps)
        return (x * inverse * (self.offset + self.scale[...].astype(jnp.float32))).astype(self.compute.dtype)


class Embedding(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, compute: Compute, vocab: int, width: int, scale: float):
        """One row a token id; ``scale`` is the factor of what is looked up."""
        self.compute, self.scale = compute, scale
        self.kernel = nnx.Param(Weight((vocab, width), ("vocab", "embed")))

    def __call__(self, tokens: jax.Array, trained: bool = False) -> jax.Array:
        """[...] int32 -> [..., D]; ids outside the vocabulary are clipped.

        Where it is ``trained`` its gradient is summed in float32, for which the table may be copied in float32.
        """
        table = self.kernel[...].astype(jnp.float32) if trained else self.kernel[...]
        rows = jnp.take(table, tokens, axis=0, mode="clip").astype(self.compute.dtype)
        # The factor is rounded to the dtype first, as Gemma's was in training.
        return rows if self.scale == 1.0 else rows * jnp.asarray(self.scale, rows.dtype)


ACTIVATION_FUNCTIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""Hugging Face's name -> function."""


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))`` (Shazeer 2020). ``fused`` holds gate and up as one weight.

    That one has p parts, as ``parts_of`` the inner width: each is a matrix of its own rows of gate, then those of up.
    A weight with an axis of two in its middle is turned in every segment on a TPU, whose tiles are the last two axes.
    """

    def __init__(self, compute: Compute, layer: LayerSpec, fused: bool):
        """Weights are [F, D] twice and [D, F]; fused [p, 2 F / p, D] and [D, F]."""
        self.compute, self.fused, self.activation = compute, fused, layer.activation
        into, inner, bias = {"embed": layer.width}, {"ffn": layer.ffn}, layer.mlp_bias
        if fused:
            parts = parts_of(compute, layer.ffn)
            self.gate_up = Linear(compute, {"ffn": parts, ":gate_up": 2 * layer.ffn // parts}, into, bias)
        else:
            self.gate = Linear(compute, inner, into, bias, layer.adapter("gate"))
            self.up = Linear(compute, inner, into, bias, layer.adapter("up"))
        self.down = Linear(compute, into, inner, bias, layer.adapter("down"))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """[..., D] -> [..., D], and that nothing was routed."""
        if self.fused:
            gate, up = (half.reshape(*x.shape[:-1], -1) for half in jnp.split(self.gate_up(x), 2, axis=-1))
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(ACTIVATION_FUNCTIONS[self.activation](gate) * up), None


def parts_of(compute: Compute, size: int) -> int:
    """Parts in which an axis of ``size`` is cut over ``tensor``; 1 where it does not divide."""
    parts = compute.mesh.shape["tensor"]
    return 1 if size % parts else parts


def fuse_mlp(compute: Compute, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of an ``MLP`` -> those of the same ``MLP`` with ``fused``; others stay as they are."""
    if "gate" not in params:
        return params

    def join(*halves: jax.Array) -> jax.Array:
        parts = parts_of(compute, halves[0].shape[0])
        return jnp.concatenate([half.reshape(parts, -1, *half.shape[1:]) for half in halves], axis=1)

    both = {name: join(params["gate"][name], params["up"][name]) for name in params["gate"]}
    return {"gate_up": both, "down": params["down"]}


def _names(sizes: dict[str, int]) -> tuple[str | None, ...]:
    return tuple(None if name.startswith(":") else name for name in sizes)
