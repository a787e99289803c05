"""The facade: a static ``Model`` beside an opaque ``Params`` pytree.

``Model`` is frozen and hashable: close over it, or pass it as a static argument. Its methods are plain functions of
arrays, for use inside ``jax.jit``; those that say so are jitted themselves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from grpo_jax.mesh import single_device_mesh, spec_for
from grpo_jax.models import prefill, transformer
from grpo_jax.models.decode_attention import (
    KV_DTYPES,
    LEAST_COLUMNS,
    LEAST_PROMPT_COLUMNS,
    READERS,
    Keeper,
    KeyValue,
    Own,
)
from grpo_jax.models.layers import Compute
from grpo_jax.models.lora import cut, join, merge
from grpo_jax.models.seats import Seats
from grpo_jax.models.spec import LoraSpec, ModelSpec
from grpo_jax.models.transformer import Layout, Routed, View
from grpo_jax.types import Params, Shared

PromptCache = tuple[KeyValue, ...]
"""For each layer keys and values in blocks of columns, P together: of Q prompts, each kept once for its group."""

Cache = tuple[KeyValue, ...]
"""For each layer keys and values in blocks of columns, C together: of the tokens that B rows sampled. Rows may be
gathered in every leaf; for another C there is ``Model.resize_cache``."""

START: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: np.float32(0.02) * rng.standard_normal(shape, np.float32),
    "zeros": lambda rng, shape: np.zeros(shape, np.float32),
    "ones": lambda rng, shape: np.ones(shape, np.float32),
    "fan_in": lambda rng, shape: rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[2:])),  # [layers, rank, *in]
    "off": lambda rng, shape: np.zeros(shape, np.float32),
}
"""Start of a ``Weight`` -> its values."""

PRECISIONS = ("default", "high", "highest")
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Model:
    """A decoder-only language model.

    Attributes:
        spec: its facts.
        dtype: "float32" or "bfloat16", what is computed in. Norms, rotary, softmax and logits are float32 always.
        param_dtype: "float32" or "bfloat16", what is stored. float32 by default: at the learning rates of
            reinforcement learning an update is less than half a bfloat16 step, kept only by rounding at random.
        precision: of every matmul on every backend; by default "highest" in float32 and "default" in bfloat16.
        mesh: by default the first device alone.
        remat: what a layer keeps for the backward pass: "none" recomputes no product, "attention" keeps the
            attention's output and projection, "full" keeps the layer's input alone.
        lora: adapters, float32, on a base that is not trained; None trains all parameters.
        attention: how decoding reads keys and values, "auto" or a variant of ``decode_attention.READERS``.
        kv_dtype: what decoding keeps keys and values in: "auto" is ``dtype``, or "bfloat16", or "int8" with one scale
            for each token of each head.
    """

    spec: ModelSpec
    dtype: str = "float32"
    param_dtype: str = "float32"
    precision: str | None = None
    mesh: Mesh | None = None
    remat: str = "none"
    lora: LoraSpec | None = None
    attention: str = "auto"
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Fills the defaults in and checks the names."""
        if self.precision is None:
            object.__setattr__(self, "precision", "highest" if self.dtype == "float32" else "default")
        if self.mesh is None:
            object.__setattr__(self, "mesh", single_device_mesh())
        _legal("dtype", self.dtype, COMPUTE_DTYPES)
        _legal("param_dtype", self.param_dtype, COMPUTE_DTYPES)
        _legal("precision", self.precision, PRECISIONS)
        _legal("remat", self.remat, tuple(transformer.REMAT))
        _legal("attention", self.attention, ("auto", *READERS))
        _legal("kv_dtype", self.kv_dtype, KV_DTYPES)
        if self.lora is not None and self.spec.experts and set(self.lora.targets) - {"q", "k", "v", "out"}:
            raise ValueError(
                f"model.lora.targets: got {list(self.lora.targets)} for a model with experts; they have no adapters; "
                "use q, k, v and out"
            )

    # The tables below are functions of the fields; a cached_property writes beside the frozen fields.

    @cached_property
    def compute(self) -> Compute:
        """dtype, precision and mesh, as the modules take them."""
        assert self.precision is not None and self.mesh is not None
        return Compute(self.dtype, self.precision, self.mesh)

    @cached_property
    def keeper(self) -> Keeper:
        """How decoding keeps keys and values, and reads them."""
        return Keeper(self.compute, self.attention, self.kv_dtype)

    @cached_property
    def layout(self) -> Layout:
        """Static graphs and parameter declarations, built once."""
        layers = tuple(replace(layer, lora=self.lora) for layer in self.spec.layers)
        return transformer.build_layout(replace(self.spec, layers=layers), self.compute)

    @cached_property
    def param_specs(self) -> Params:
        """A PartitionSpec for each parameter."""
        return jax.tree.map(lambda w: spec_for(w.axes, w.shape, self.compute.mesh), self.layout.weights)

    @cached_property
    def param_shardings(self) -> Params:
        """A NamedSharding for each parameter."""
        place = partial(NamedSharding, self.compute.mesh)
        return jax.tree.map(lambda w: place(spec_for(w.axes, w.shape, self.compute.mesh)), self.layout.weights)

    @cached_property
    def abstract_params(self) -> Params:
        """A sharded ShapeDtypeStruct for each parameter: the target of a checkpoint."""
        dtype = lambda w: jnp.dtype("float32" if w.start in ("fan_in", "off") else self.param_dtype)  # noqa: E731
        make = lambda w, s: jax.ShapeDtypeStruct(w.shape, dtype(w), sharding=s)  # noqa: E731
        return jax.tree.map(make, self.layout.weights, self.param_shardings)

    @cached_property
    def param_count(self) -> int:
        """How many numbers the parameters hold; a tied head counts once."""
        return sum(int(np.prod(weight.shape)) for weight in jax.tree.leaves(self.layout.weights))

    @cached_property
    def decay_mask(self) -> Params:
        """A bool for each parameter: True for matrices, False for biases and norm scales."""
        return jax.tree.map(lambda w: w.start in ("normal", "fan_in", "off"), self.layout.weights)

    @cached_property
    def base(self) -> "Model":
        """The model without adapters: of the frozen parameters, and of merged ones."""
        return replace(self, lora=None)

    def trained(self, tree: Any) -> Any:
        """What is trained of parameters, or of shardings or masks like them: all, or the adapters."""
        return tree if self.lora is None else cut(tree, adapters=True)

    def frozen(self, tree: Any) -> Any:
        """The rest: None, or the base's parameters."""
        return None if self.lora is None else cut(tree, adapters=False)

    def joined(self, trained: Any, frozen: Any) -> Any:
        """Undoes ``trained`` and ``frozen``."""
        return trained if self.lora is None else join(trained, frozen)

    def merged(self, params: Params) -> Params:
        """The adapters in the kernels: parameters of ``base``. Jitted."""
        return params if self.lora is None else _merged(self, params)

    def init_adapters(self, seed: int) -> Params:
        """Adapters that change nothing yet, see ``trained``; seeded like ``init``."""
        return self._draw(self.trained(self.layout.weights), self.trained(self.abstract_params), seed)

    def scale_matrices(self, params: Params, scale: float) -> Params:
        """``params`` with every matrix times ``scale``: a fresh model is close to uniform, a scaled one is not."""
        return jax.tree.map(lambda x, matrix: x * scale if matrix else x, params, self.decay_mask)

    @property
    def softcap(self) -> float | None:
        """Cap of the logits, or None."""
        return self.spec.softcap

    @property
    def logit_scale(self) -> float:
        """Factor of the logits, before the cap."""
        return self.spec.logit_scale

    def init(self, seed: int) -> Params:
        """New parameters in their sharding: normal with deviation 0.02, biases 0, norm scales 1.

        Drawn on the host, one parameter at a time, so they are the same on every mesh and nothing is compiled.
        """
        return self._draw(self.layout.weights, self.abstract_params, seed)

    def _draw(self, weights: Any, targets: Any, seed: int) -> Params:
        leaves, tree = jax.tree.flatten(weights)
        made = []
        for index, (weight, target) in enumerate(zip(leaves, jax.tree.leaves(targets), strict=True)):
            rng = np.random.default_rng([seed, index])
            value = START[weight.start](rng, weight.shape).astype(target.dtype)
            made.append(transformer.place(value, target.sharding))
        return jax.tree.unflatten(tree, made)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        context_ids: jax.Array | None = None,
        shared: Shared | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [N, T, D] in ``dtype``; arguments are [N, T] int32.

        A token attends to the columns not after its own whose segment id is not 0 and equals its own segment id or
        its context id, and with a window lie less than it back by position. Positions drive the rotary and the windows
        alone. Columns of segment 0 are padding: their output is finite and
        means nothing, and nothing reads them. With ``shared`` no column but those it lets it see is read.
        """
        rows = (tokens, positions, segment_ids, context_ids, shared)
        return transformer.hidden_states(self.layout, params, *rows, self.remat)[0]

    def hidden_routed(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        context_ids: jax.Array | None,
        shared: Shared | None,
        counted: jax.Array,
    ) -> tuple[jax.Array, Routed]:
        """``hidden``, and what the mixtures of experts did: for the load-balance loss and the router's metrics.

        Args:
            params, tokens, positions, segment_ids, context_ids, shared: as of ``hidden``.
            counted: [N, T] bool, the tokens whose experts are counted.

        Raises:
            ValueError: no layer is a mixture of experts.
        """
        if not self.spec.experts:
            raise ValueError(f"got a {self.spec.family} model without experts; nothing is routed; use `hidden`")
        rows = (tokens, positions, segment_ids, context_ids, shared)
        hidden, routed = transformer.hidden_states(self.layout, params, *rows, self.remat, counted)
        assert routed is not None
        return hidden, routed

    def unembedding(self, params: Params) -> jax.Array:
        """The head [V, D] in ``dtype``, gathered over ``fsdp``, cut over ``tensor``; logits are ``hidden @ it.T``.

        The natural layout of Hugging Face's tensor: nothing is transposed, and a tied embedding is not copied where
        ``dtype`` is ``param_dtype``. ``logit_scale`` and ``softcap`` are applied by whoever forms the logits.
        """
        name = "embed" if self.spec.tied else "head"
        weight = {"kernel": self.layout.weights["outer"][name]["kernel"]}
        return transformer.use(self.layout, {"kernel": params["outer"][name]["kernel"]}, weight)["kernel"]

    def logits(self, params: Params, tokens: jax.Array) -> jax.Array:
        """[N, T] int32, no padding -> [N, T, V] float32. Jitted; for users and tests, not for the loop."""
        return _logits(self, params, jnp.asarray(tokens, jnp.int32))

    def decode_view(self, params: Params) -> View:
        """Parameters for decoding, made once per update: one cast to ``dtype``, gathered over ``fsdp``, one entry a
        layer, q, k and v as one weight and gate and up as one. A second copy of the model; free it before training.
        The parameters may lie on another mesh of the same devices in the same order. Jitted.
        """  # noqa: D205
        first = jax.tree.leaves(params)[0]
        known = isinstance(first, jax.Array) and not isinstance(first, jax.core.Tracer)
        recut = known and isinstance(first.sharding, NamedSharding) and first.sharding.mesh != self.compute.mesh
        return _decode_view(self, params, recut)

    def prefill(self, view: View, tokens: jax.Array, prompt_len: jax.Array) -> tuple[jax.Array, PromptCache]:
        """Prompts [Q, P] int32 of lengths [Q], at least 1 -> hidden [Q, D] at each one's last token, and its cache."""
        hidden, cache = prefill.prefill(self.layout, view, tokens, prompt_len)
        return hidden, tuple(self.keeper.keep(*both, LEAST_PROMPT_COLUMNS) for both in cache)

    def init_cache(self, rows: int, length: int) -> Cache:
        """Zeros for B rows of C columns in ``kv_dtype``, rows over data and fsdp, key heads over tensor."""
        return self._empty(rows, length, LEAST_COLUMNS)

    def init_prompt_cache(self, prompts: int, length: int) -> PromptCache:
        """Zeros for Q prompts of P columns, in the blocks that ``prefill`` makes."""
        return self._empty(prompts, length, LEAST_PROMPT_COLUMNS)

    def _empty(self, rows: int, length: int, least: int) -> Cache:
        heads = [(layer.kv_heads, layer.head_dim) for layer in self.spec.layers]
        return tuple(self.keeper.empty(rows, count, length, size, least) for count, size in heads)

    def grow(self, cache: Cache, steps: int) -> tuple[Own, ...]:
        """The cache for at most so many calls of ``decode``, which are told their number; ``grown`` ends it.

        Some variants keep the new columns apart for so long.
        """
        return tuple(self.keeper.grow(kept, steps) for kept in cache)

    def grown(self, cache: tuple[Own, ...], start: jax.Array, steps: jax.Array) -> Cache:
        """The cache after so many steps of rows that had ``start`` tokens, [B]."""
        return tuple(self.keeper.grown(kept, start, steps) for kept in cache)

    def resize_cache(self, layer: KeyValue, length: int) -> KeyValue:
        """One layer's cache with ``length`` columns: longer by zeros, or cut."""
        return self.keeper.resize(layer, length)

    def decode(
        self,
        view: View,
        prompt_cache: PromptCache,
        prompt_len: jax.Array,
        cache: tuple[Own, ...],
        cache_len: jax.Array,
        tokens: jax.Array,
        seats: Seats | None = None,
        step: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Own, ...]]:
        """One new token in each row.

        Args:
            view: from ``decode_view``.
            prompt_cache: from ``prefill``.
            prompt_len: [Q] int32.
            cache: from ``init_cache``, ``grow`` or the step before; donate it.
            cache_len: [B] int32, tokens the row has in ``cache``; the new one goes to that column, and at C or more
                nowhere (a row that is done may go on being called).
            tokens: [B] int32.
            seats: which row goes on from which prompt; None: row ``q * G + g`` from prompt q, B = Q * G.
            step: scalar int32, decode steps since ``grow``; None where there was none.

        Returns:
            hidden [B, D] of the new tokens, after the final norm, and the cache.
        """
        if seats is None and tokens.shape[0] % prompt_len.shape[0]:
            raise ValueError(
                f"got {tokens.shape[0]} rows for {prompt_len.shape[0]} prompts; every prompt has the same number of "
                "rows; pad the rows to a multiple of the prompts"
            )
        seats = seats or Seats(prompt_len.shape[0])
        rows = (prompt_cache, prompt_len, cache, cache_len, tokens, seats, step)
        return transformer.decode(self.layout, self.keeper, view, *rows)

    def head(self, view: View, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] float32, scaled and capped."""
        return self._unembed(view.outer["embed" if self.spec.tied else "head"]["kernel"], hidden)

    def _unembed(self, weight: jax.Array, hidden: jax.Array) -> jax.Array:
        contract = ((hidden.ndim - 1,), (1,))
        logits = self.compute.dot(hidden, weight, contract, out=jnp.float32)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


@partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model.hidden(params, tokens, positions, jnp.ones_like(tokens))
    return model._unembed(model.unembedding(params), hidden)


@partial(jax.jit, static_argnums=(0, 2))
def _decode_view(model: Model, params: Params, recut: bool) -> View:
    return transformer.decode_view(model.layout, params, recut)


@partial(jax.jit, static_argnums=0)
def _merged(model: Model, params: Params) -> Params:
    return params | {"layers": merge(params["layers"], model.lora, stacked=True)}


def _legal(name: str, value: str | None, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name}: got {value!r}; it is not one of the legal values; use one of: {', '.join(legal)}")
