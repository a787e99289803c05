"""The device mesh, the start of several hosts, and the rules from logical axes to mesh axes.

A mesh always has the axes ``data``, ``fsdp``, ``tensor`` and ``expert``; on one device each has size 1 and the same
code runs. Axis types are Auto: GSPMD partitions every jitted function from the constraints the models put down.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxlib import _jax

from grpo_jax import coordinator

MESH_AXES = ("data", "fsdp", "tensor", "expert")

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "experts": ("expert",),
}
"""Logical axis -> mesh axes it is cut over. A name that is not here, and None, is replicated."""

GATHERED_RULES: Mapping[str, tuple[str, ...]] = {name: axes for name, axes in RULES.items() if name != "embed"}
"""Weights where they are used: gathered over ``fsdp``, still cut over ``tensor`` and ``expert``."""

PATIENCE_MS = 3_600_000
"""How long a process waits for another's text while both live: reading a large checkpoint takes a while."""

_TALKS = Counter[str]()


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of ``devices`` (default: all of them) with the axes ``data``, ``fsdp``, ``tensor`` and ``expert``.

    One of the sizes may be -1 and takes the devices that the others leave.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor, expert]
    got = "data={}, fsdp={}, tensor={}, expert={} for {} device(s)".format(*sizes, len(devices))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh: got {got}; a size must be at least 1, and at most one may be -1; give the others a number"
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: got {got}; the product must be the number of devices, or divide it where one size is -1; "
            f"choose sizes that divide {len(devices)}"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def recut(mesh: Mesh, tensor: int, expert: int) -> Mesh:
    """The devices of ``mesh`` in its order, so that one program may hold arrays of both; all others along ``data``.

    Raises:
        ValueError: the sizes do not divide the number of devices.
    """
    if mesh.size % (tensor * expert):
        legal = [str(size) for size in range(1, mesh.size + 1) if mesh.size % (size * expert) == 0]
        beside = f" beside mesh.expert = {expert}" if expert > 1 else ""
        raise ValueError(f"got tensor={tensor}{beside} for {mesh.size} device(s); use a size among {', '.join(legal)}")
    sizes = mesh.size // (tensor * expert), 1, tensor, expert
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def spec_for(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES
) -> PartitionSpec:
    """Where an array of ``shape`` with logical ``axes`` lies on ``mesh``.

    An axis whose size the mesh axes do not divide drops them from the right until they do; with none left it is
    replicated. A mesh axis is used once, by the first logical axis that asks for it.
    """
    if len(axes) != len(shape):
        raise ValueError(f"got axes {axes} for shape {shape}; one name (or None) per axis is needed; name each axis")
    used: set[str] = set()
    spec: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        over = [axis for axis in rules.get(name or "", ()) if axis not in used]
        while over and size % math.prod(mesh.shape[axis] for axis in over):
            over.pop()
        used.update(over)
        spec.append(None if not over else over[0] if len(over) == 1 else tuple(over))
    return PartitionSpec(*spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [N, ...] over ``data`` and ``fsdp``; N must be a multiple of their product."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def initialize_distributed(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join this process to the others of a multi-host run; call it once, before any other use of jax.

    A thin cover over ``jax.distributed.initialize``, which finds Slurm, Open MPI, GKE and Cloud TPU by itself; the
    arguments (host:port of process 0, how many there are, which one this is) are for starts by hand.
    """
    # jax offers no other way to have the service outlive the first process.
    with mock.patch.object(_jax, "get_distributed_runtime_service", coordinator.Service):
        jax.distributed.initialize(coordinator_address, num_processes, process_id)


def fetch(tree: Any) -> Any:
    """Arrays, on whichever hosts their shards lie, as NumPy arrays on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def from_first(tree: Any) -> Any:
    """The first process's NumPy arrays on every host: what decides the control flow must be the same everywhere."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def anywhere(flag: bool) -> bool:
    """Whether it is so on any process."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def is_first() -> bool:
    """Whether this process is the one that writes files and asks reward functions."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Until every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def texts_of_all(name: str, text: str) -> list[str] | None:
    """The texts of all processes, in their order, on the first one; None on the others.

    No device takes part, so a thread may call it beside a step; of one ``name`` one call follows another.
    """
    if jax.process_count() == 1:
        return [text]
    client, place = _client(), _place_of(name)
    if not is_first():
        client.key_value_set(f"{place}/{jax.process_index()}", text)
        return None
    keys = [f"{place}/{number}" for number in range(1, jax.process_count())]
    texts = [client.blocking_key_value_get(key, PATIENCE_MS) for key in keys]
    for key in keys:
        client.key_value_delete(key)
    return [text, *texts]


def text_of_first(name: str, text: str = "") -> str:
    """The first process's text on every process; as `texts_of_all` in all else."""
    if jax.process_count() == 1:
        return text
    client, key = _client(), _place_of(name)
    if is_first():
        client.key_value_set(key, text)
        return text
    return client.blocking_key_value_get(key, PATIENCE_MS)


def same_everywhere(subject: str, table: Mapping[str, str]) -> None:
    """Compare a table of all processes with the first one's.

    Raises:
        ValueError: on every process, where they differ.
    """
    seen = [json.loads(text) for text in texts_of_all(subject, json.dumps(dict(table))) or ()]
    other = [(i, name) for i, theirs in enumerate(seen) for name in table if theirs.get(name) != table[name]]
    number, name = other[0] if other else (0, "")
    wrong = text_of_first(f"{subject}: verdict", f"{name} of process {number}" if other else "")
    if wrong:
        raise ValueError(
            f"{subject} must be the same for all processes, and {wrong} is not that of the first; give each the same"
        )


def _place_of(name: str) -> str:
    """Where texts are exchanged: one that no call had before, as every process counts alike."""
    _TALKS[name] += 1
    return f"grpo_jax/{name}/{_TALKS[name]}"


def _client() -> Any:
    """Of the service through which processes find each other."""
    return distributed.global_state.client


def single_device_mesh() -> Mesh:
    """The mesh a model gets when none was given: this process's first device."""
    return make_mesh(1, devices=jax.local_devices()[:1])
