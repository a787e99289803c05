"""Meshes, logical axes and their errors."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from grpo_jax.mesh import GATHERED_RULES, RULES, batch_sharding, make_mesh, spec_for


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": -1, "data": 1}, (1, 8, 1, 1)),
        ({"tensor": 4}, (2, 1, 4, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 2, 1)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 8, 1)),
        ({"tensor": 2, "expert": 2}, (2, 1, 2, 2)),
    ],
)
def test_minus_one_takes_the_rest(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor", "expert"), shape, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_a_mesh_of_some_devices():
    some = jax.devices()[2:6]
    assert set(make_mesh(fsdp=2, devices=some).devices.flat) == set(some)


@pytest.mark.parametrize(
    "sizes", [{"tensor": 3}, {"data": 4}, {"data": 4, "fsdp": 4}, {"fsdp": 0}, {"fsdp": -1}, {"data": -2}]
)
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError) as caught:
        make_mesh(**sizes)
    message = str(caught.value)
    assert "8 device(s)" in message
    assert all(f"{name}={size}" in message for name, size in sizes.items())


@pytest.mark.parametrize(
    ("axes", "shape", "want"),
    [
        (("vocab", "embed"), (64, 32), PartitionSpec("tensor", "fsdp")),
        (("layers", "heads", "head_dim", "embed"), (3, 8, 16, 32), PartitionSpec(None, "tensor", None, "fsdp")),
        (("kv_heads", "embed"), (1, 32), PartitionSpec(None, "fsdp")),
        (("vocab", "embed"), (61, 33), PartitionSpec(None, None)),
        (("batch", None, None), (8, 5, 32), PartitionSpec(("data", "fsdp"), None, None)),
        (("batch", None), (6, 5), PartitionSpec("data", None)),
        (("batch", None), (5, 5), PartitionSpec(None, None)),
        ((None,), (8,), PartitionSpec(None)),
        ((), (), PartitionSpec()),
        (("heads", "ffn"), (8, 8), PartitionSpec("tensor", None)),
    ],
)
def test_spec_for(axes, shape, want):
    assert spec_for(axes, shape, make_mesh(2, 2, 2)) == want


def test_gathered_rules_leave_fsdp_out():
    mesh = make_mesh(1, 4, 2)
    assert spec_for(("vocab", "embed"), (64, 32), mesh, GATHERED_RULES) == PartitionSpec("tensor", None)
    assert spec_for(("vocab", "embed"), (64, 32), mesh, RULES) == PartitionSpec("tensor", "fsdp")


def test_axes_and_shape_must_agree():
    with pytest.raises(ValueError, match="one name"):
        spec_for(("vocab",), (64, 32), make_mesh())


def test_batch_sharding_cuts_rows_over_data_and_fsdp():
    rows = jax.device_put(np.arange(24.0).reshape(8, 3), batch_sharding(make_mesh(2, 2, 2)))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
