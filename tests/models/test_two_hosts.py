"""Two processes of four devices each: one loads and saves what the other does, and the first alone writes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
from model_cases import by_hf_name, config, random_model, random_tokens, write_checkpoint
from safetensors.numpy import load_file

WORKER = """
import sys
import numpy as np
from grpo_jax.mesh import initialize_distributed, make_mesh
address, index, source, target = sys.argv[1:]
initialize_distributed(address, 2, int(index))
import jax
from jax.experimental import multihost_utils
import grpo_jax.models.hf as hf
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
written = []
save_file = hf.save_file
hf.save_file = lambda *args, **kwargs: (written.append(args[1]), save_file(*args, **kwargs))
model, params = hf.load_model(source, mesh=make_mesh(2, 2, 2))
kernel = params["outer"]["embed"]["kernel"]
assert not kernel.is_fully_addressable and {s.data.shape for s in kernel.addressable_shards} == {(32, 16)}
hf.save_hf(model, params, target, source=source, shard_bytes=9_000)
assert bool(written) == (index == "0"), written
tokens = np.load(source + "/tokens.npy")
logits = multihost_utils.process_allgather(model.logits(params, tokens), tiled=True)
np.save(f"{target}/logits{index}.npy", logits)
print("done", index)
"""


def _free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_two_processes_load_and_save(tmp_path):
    fields = {"vocab_size": 64, "num_hidden_layers": 2}
    model, params = random_model(**fields)
    tensors, tokens = by_hf_name(model, params), random_tokens((4, 6), 64)
    source, target = write_checkpoint(tmp_path / "in", config(**fields), tensors), tmp_path / "out"
    np.save(source / "tokens.npy", tokens)
    address = f"localhost:{_free_port()}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", WORKER, address]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(source), str(target)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0 and f"done {index}" in output, output[-3000:]
    listed = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(listed) == set(tensors)
    for name, file in listed.items():
        assert load_file(target / file)[name].tobytes() == tensors[name].tobytes(), name
    want = np.asarray(model.logits(params, tokens))
    for index in range(2):
        np.testing.assert_allclose(np.load(target / f"logits{index}.npy"), want, atol=1e-5 * np.abs(want).max())
