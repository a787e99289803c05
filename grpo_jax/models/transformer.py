"""The decoder: a block, its stacks, and the three ways through it (training rows, prefill, one decoding step).

Declarations (``Layout``) are built once from a spec. From there on parameters are a plain nested dict:
``{"outer": {...}, "layers": {"<run>.<place in pattern>": {...}}}``, each leaf under "layers" stacked over the run's
repeats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from grpo_jax.mesh import GATHERED_RULES
from grpo_jax.models.attention import Attention, fuse_attention, row_reader
from grpo_jax.models.decode_attention import Growing, Keeper, KeyValue, Own, columns, seen_columns
from grpo_jax.models.layers import MLP, Compute, Embedding, Linear, RMSNorm, Weight, as_decoded, fuse_mlp
from grpo_jax.models.lora import merge
from grpo_jax.models.moe import MoE, Routing, expert_load
from grpo_jax.models.rotary import Rotation, rotation
from grpo_jax.models.rotary_spec import RotarySpec
from grpo_jax.models.seats import Seats
from grpo_jax.models.spec import LayerSpec, ModelSpec, Run
from grpo_jax.types import Shared

Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(q, k, v) -> what the queries read, and anything to carry out of the block."""

Turns = Mapping[LayerSpec, Rotation | None]
"""Layer -> the rotation of its queries and keys; None is none."""

REMAT: Mapping[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}
"""What a layer keeps for the backward pass: every product (only elementwise work is done twice, which takes no time and
half the memory), nothing but its input, or the attention's output and projection."""


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each normed before or after or both, added to the stream."""

    def __init__(self, compute: Compute, layer: LayerSpec, fused: bool):
        """``fused``: q, k and v in one weight, gate and up in one."""
        self.residual_scale = layer.residual_scale
        norm = lambda wanted: _norm(compute, layer) if wanted else None  # noqa: E731
        self.input_norm, self.attention_post_norm = norm(layer.pre_norm), norm(layer.post_norm)
        self.attention = Attention(compute, layer, fused)
        self.mlp_norm, self.mlp_post_norm = norm(layer.pre_norm), norm(layer.post_norm)
        self.mlp = MLP(compute, layer, fused) if layer.moe is None else MoE(compute, layer, layer.moe)

    def __call__(self, x: jax.Array, turn: Rotation | None, mix: Mix) -> tuple[jax.Array, Any, Routing | None]:
        """[..., D] -> [..., D], what ``mix`` carries out, and where a mixture of experts sent the tokens."""
        mixed, carried = mix(*self.attention.project(_normed(self.input_norm, x), turn))
        merged = checkpoint_name(self.attention.merge(checkpoint_name(mixed, "attention")), "attention")
        x = self._add(x, _normed(self.attention_post_norm, merged))
        new, routing = self.mlp(_normed(self.mlp_norm, x))
        return self._add(x, _normed(self.mlp_post_norm, new)), carried, routing

    def _add(self, x: jax.Array, new: jax.Array) -> jax.Array:
        return x + (new if self.residual_scale == 1.0 else new * jnp.asarray(self.residual_scale, new.dtype))


def _norm(compute: Compute, layer: LayerSpec) -> RMSNorm:
    return RMSNorm(compute, (layer.width,), layer.norm_eps, layer.norm_offset)


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Outer(nnx.Module):
    """What is outside the layers: embedding, final norm, and the head where it is not the embedding."""

    def __init__(self, compute: Compute, spec: ModelSpec):
        """The head's weight is [V, D], like the embedding's."""
        self.embed = Embedding(compute, spec.vocab, spec.width, spec.embed_scale)
        self.norm = RMSNorm(compute, (spec.width,), spec.norm_eps, spec.norm_offset)
        self.head = None if spec.tied else Linear(compute, {"vocab": spec.vocab}, {"embed": spec.width})

    def unembedding(self) -> jax.Array:
        """[V, D]."""
        return (self.embed if self.head is None else self.head).kernel[...]


@dataclass(frozen=True)
class Layout:
    """Static graphs and declarations of a model.

    Attributes:
        compute: dtype, precision, mesh.
        runs: of layers.
        longest: of the run's texts, see ``ModelSpec``.
        outer: graph of ``Outer``.
        blocks: graph and declarations of ``Block`` for each distinct layer.
        fused: the same with joined weights, and adapters merged into them.
        decoded: the same with kernels that begin with what goes in.
        weights: nested dict of ``Weight``: the parameters.
    """

    compute: Compute
    runs: tuple[Run, ...]
    longest: int
    outer: nnx.GraphDef
    blocks: dict[LayerSpec, tuple[nnx.GraphDef, dict[str, Any]]]
    fused: dict[LayerSpec, tuple[nnx.GraphDef, dict[str, Any]]]
    decoded: dict[LayerSpec, tuple[nnx.GraphDef, dict[str, Any]]]
    weights: dict[str, Any]

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order."""
        return tuple(layer for run in self.runs for _ in range(run.repeats) for layer in run.pattern)

    @property
    def rotaries(self) -> tuple[tuple[RotarySpec, int], ...]:
        """The distinct rotaries and their head_dim, in the same order on every host."""
        return tuple(dict.fromkeys((x.rotary, x.head_dim) for x in self.layers if x.rotary is not None))

    def turns(self, positions: jax.Array, longest: int) -> Turns:
        """For each layer [...] int32 -> its rotation. ``longest`` bounds the texts' lengths by the arrays' shapes.

        Raises:
            ValueError: nothing was said of the texts' lengths, and they may be longer than the frequencies are for.
        """
        for rotary, _ in self.rotaries:
            if rotary.by_length and not self.longest and longest > rotary.original_len:
                raise ValueError(
                    f"got rows of {longest} tokens; the {rotary.kind} rotary has other frequencies for texts longer "
                    f"than {rotary.original_len}; give the longest text's length as `longest` to load_model"
                )
        made = {key: rotation(*key, positions, self.longest) for key in self.rotaries}
        return {x: None if x.rotary is None else made[x.rotary, x.head_dim] for x in self.layers}


def build_layout(spec: ModelSpec, compute: Compute) -> Layout:
    """Builds every module once and splits it."""
    outer, weights = _split(Outer(compute, spec))
    blocks = {layer: _split(Block(compute, layer, False)) for layer in dict.fromkeys(spec.layers)}
    fused, decoded = (
        {layer: _split(Block(each, replace(layer, lora=None), True)) for layer in blocks}
        for each in (compute, replace(compute, input_first=True))
    )
    stacks = {
        name: jax.tree.map(lambda w, n=run.repeats: replace(w, shape=(n, *w.shape), axes=("layers", *w.axes)), tree)
        for run_index, run in enumerate(spec.runs)
        for name, tree in [(stack_name(run_index, i), blocks[layer][1]) for i, layer in enumerate(run.pattern)]
    }
    parts = {"outer": weights, "layers": stacks}
    return Layout(compute, spec.runs, spec.longest, outer, blocks, fused, decoded, parts)


def stack_name(run: int, place: int) -> str:
    """Key of a stack under "layers"."""
    return f"{run}.{place}"


def layer_places(runs: tuple[Run, ...]) -> list[tuple[str, int]]:
    """For each layer in order, its stack's name and its index in the stack."""
    return [
        (stack_name(run_index, place), repeat)
        for run_index, run in enumerate(runs)
        for repeat in range(run.repeats)
        for place in range(len(run.pattern))
    ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """Parameters for decoding, see ``decode_view``.

    Attributes:
        outer: of ``Outer``.
        layers: of the fused block with kernels [*in, *out], one entry a layer.
    """

    outer: dict[str, Any]
    layers: tuple[dict[str, Any], ...]


class Routed(NamedTuple):
    """What the mixtures of experts did with training rows.

    Attributes:
        probs: [N, T, E] float32, the router's probabilities, their mean over the layers that are mixtures.
        load: [layers that are mixtures, E] float32, how many of the tokens that count went to each expert.
    """

    probs: jax.Array
    load: jax.Array


def hidden_states(
    layout: Layout,
    params: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    context_ids: jax.Array | None,
    shared: Shared | None,
    remat: str,
    counted: jax.Array | None = None,
) -> tuple[jax.Array, Routed | None]:
    """Training rows: [N, T] -> [N, T, D] after the final norm, and what the mixtures of experts did.

    ``counted`` [N, T] bool are the tokens whose experts are counted; None asks for nothing of it.
    """
    compute = layout.compute
    weights = layout.weights["outer"]
    # The table is not cast: its gradient is summed over tokens, and a sum in bfloat16 stops growing.
    table = use(layout, params["outer"]["embed"], weights["embed"], cast=False)
    outer = nnx.merge(layout.outer, use(layout, params["outer"], weights) | {"embed": table})
    turns = layout.turns(positions, tokens.shape[1] if shared is None else shared.prompt_len + shared.block_len)
    windows = [layer.window for layer in layout.layers]
    read = row_reader(compute, windows, positions, segment_ids, context_ids, shared)
    x = compute.shard(outer.embed(tokens, trained=True), "batch", None, None)
    mixtures = [layer.moe for layer in layout.layers if layer.moe is not None]
    probs = jnp.zeros((*tokens.shape, mixtures[0].experts), jnp.float32) if counted is not None else None
    loads = []

    def mix_in(layer: LayerSpec) -> Mix:
        return lambda q, k, v: (read(q, k, v, layer.window, layer.softcap), None)

    for index, run in enumerate(layout.runs):

        def body(carry: Any, stacked: list[Any], run: Run = run) -> tuple[Any, list[jax.Array]]:
            (x, probs), loads = carry, []
            for layer, weights in zip(run.pattern, stacked, strict=True):
                x, _, routing = _training_block(layout, layer, weights)(x, turns[layer], mix_in(layer))
                x = compute.shard(x, "batch", None, None)
                if routing is not None and probs is not None and counted is not None:
                    probs = probs + routing.probs / len(mixtures)
                    loads.append(expert_load(routing, counted))
            return (x, probs), loads

        stacks = [params["layers"][stack_name(index, place)] for place in range(len(run.pattern))]
        kept = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
        (x, probs), load = jax.lax.scan(kept, (x, probs), stacks)
        loads += [jnp.stack(load, axis=1).reshape(-1, load[0].shape[-1])] if load else []
    x = compute.shard(outer.norm(x), "batch", None, None)
    return x, None if probs is None else Routed(probs, jnp.concatenate(loads))


def _training_block(layout: Layout, layer: LayerSpec, params: dict[str, Any]) -> Block:
    """The block of one layer. Its joined weights are fused where that moves nothing between devices: fewer matmuls."""
    graph, declared = layout.blocks[layer]
    params = use(layout, params, declared)
    if layout.compute.mesh.shape["tensor"] > 1 or layer.lora is not None:
        return nnx.merge(graph, params)
    return nnx.merge(layout.fused[layer][0], fuse(layout.compute, params))


def fuse(compute: Compute, params: dict[str, Any]) -> dict[str, Any]:
    """A layer's parameters -> those of the fused block: q, k and v as one weight, gate and up as one."""
    attention, mlp = fuse_attention(compute, params["attention"]), fuse_mlp(compute, params["mlp"])
    return params | {"attention": attention, "mlp": mlp}


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same on every host, in its sharding. On a CPU it may be used as it is: never change it."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]).block_until_ready()


def use(layout: Layout, params: Any, weights: Any, cast: bool = True) -> Any:
    """Parameters where they are used: in the compute dtype, gathered over ``fsdp``, cut over ``tensor``."""
    compute = layout.compute

    def one(weight: Weight, x: jax.Array) -> jax.Array:
        return compute.shard(x.astype(compute.dtype) if cast else x, *weight.axes, rules=GATHERED_RULES)

    return jax.tree.map(one, weights, params)


def decode_view(layout: Layout, params: dict[str, Any], recut: bool) -> View:
    """Parameters for decoding: cast, gathered over ``fsdp``, fused, turned, and one entry a layer.

    ``recut``: they come from another mesh, and are gathered whole on the way, one after the other.
    """
    compute = layout.compute

    def lay(params: Any, weights: Any) -> Any:
        if recut:
            params = jax.tree.map(lambda x: compute.shard(x.astype(compute.dtype), *[None] * x.ndim), params)
        return use(layout, params, weights)

    layers = []
    for layer, (name, index) in zip(layout.layers, layer_places(layout.runs), strict=True):
        one = jax.tree.map(lambda x, i=index: x[i], params["layers"][name])
        fused = fuse(compute, merge(one, layer.lora, stacked=False))
        layers.append(lay(jax.tree.map(as_decoded, layout.fused[layer][1], fused), layout.decoded[layer][1]))
    return View(lay(params["outer"], layout.weights["outer"]), tuple(layers))


def decode(
    layout: Layout,
    keeper: Keeper,
    view: View,
    prompt_cache: tuple[KeyValue, ...],
    prompt_len: jax.Array,
    cache: tuple[Own, ...],
    cache_len: jax.Array,
    tokens: jax.Array,
    seats: Seats,
    step: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Own, ...]]:
    """One token a row: [B] -> its hidden state [B, D], and the cache with its keys and values at ``cache_len``.

    ``step`` counts from where caches began to grow.
    """
    compute = layout.compute
    seen = {layer.window: seen_columns(seats, prompt_len, cache_len, layer.window) for layer in layout.layers}

    def mix_in(index: int) -> Mix:
        layer = layout.layers[index]
        prompt_seen, own_seen = seen[layer.window]

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Own]:
            own, parts = keeper.add(cache[index], k, v, cache_len, step, own_seen)
            return keeper.attend(q, seats, prompt_cache[index], prompt_seen, parts, layer.softcap), own

        return mix

    outer = nnx.merge(layout.outer, view.outer)
    x = compute.shard(outer.embed(tokens), "batch", None)
    positions = seats.spread(prompt_len, tokens.shape[0]) + cache_len
    own = cache[0]
    longest = columns(prompt_cache[0]) + columns(own.old if isinstance(own, Growing) else own)
    # Looked up: sines and cosines of the positions would be fused into what they turn, and so computed by every layer.
    table = layout.turns(jnp.arange(longest, dtype=jnp.int32), longest)
    look_up = partial(jnp.take, indices=positions, axis=0, mode="clip")
    turns = {layer: jax.tree.map(look_up, turn) for layer, turn in table.items()}
    x, cache = unrolled(layout, view, x, turns, mix_in)
    return outer.norm(x), cache


def unrolled(
    layout: Layout, view: View, x: jax.Array, turns: Turns, mix_in: Callable[[int], Mix]
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Through all layers: what comes out, and what the mix of each carried."""
    cache = []
    for index, (layer, weights) in enumerate(zip(layout.layers, view.layers, strict=True)):
        block = nnx.merge(layout.decoded[layer][0], weights)
        x, carried, _ = block(x, turns[layer], mix_in(index))
        cache.append(carried)
    return x, tuple(cache)


def _split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)
