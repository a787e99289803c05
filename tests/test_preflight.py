"""What a run is said to hold: the most of what is there at one time; and what XLA is asked for before it starts."""

import os

import jax
import pytest

from grpo_jax import preflight
from grpo_jax.config import TrainConfig
from grpo_jax.learner.learning import layout_of
from grpo_jax.testing import tiny_model

PARTS = {"parameters": 4, "optimizer": 8, "reference": 4, "critic": 0, "gradient": 4, "batch": 1}
PARTS |= {"decode view": 2, "KV cache": 50, "copy to save": 12}


@pytest.mark.parametrize(
    ("changed", "phase", "size"),
    [({}, "sampling", 68), ({"KV cache": 0}, "saving", 30), ({"KV cache": 0, "gradient": 40}, "training", 57)],
)
def test_the_largest_phase_counts_and_not_the_sum_of_what_is_never_there_together(changed, phase, size):
    assert preflight.peak(PARTS | changed) == (phase, size)


@pytest.fixture(scope="module")
def run():
    config = TrainConfig.from_tables({"rollout": {"prompts_per_step": 4, "max_new_tokens": 8}})
    model, params = tiny_model()
    return model, config, layout_of(config, model, 16), 16, sum(x.nbytes for x in jax.tree.leaves(params))


def test_what_a_save_copies_is_counted_where_it_copies(run, monkeypatch):
    *asked, parameters = run
    assert preflight.memory(*asked)["copy to save"] == 3 * parameters
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert preflight.memory(*asked)["copy to save"] == 0


def test_what_fits_is_not_refused_and_what_does_not_says_when(run, monkeypatch):
    *asked, _ = run
    parts = preflight.memory(*asked)
    _, most = preflight.peak(parts)
    assert most < sum(parts.values())

    class Device:
        memory_stats = staticmethod(lambda: {"bytes_limit": Device.limit})

    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    Device.limit = int(most / preflight.CACHE_SHARE) + 1
    assert "at most" in preflight.report(*asked)
    Device.limit = sum(parts[name] for name in preflight.ALWAYS)
    with pytest.raises(ValueError, match="on each device while (sampling|training|saving), before activations"):
        preflight.report(*asked)


def test_deterministic_is_asked_for_before_jax_starts_or_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    monkeypatch.setattr(preflight.xla_bridge, "backends_are_initialized", lambda: True)
    preflight.be_deterministic()  # on a CPU operations are deterministic already
    assert os.environ["XLA_FLAGS"] == "--a=1"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="deterministic: got true, and jax has already started"):
        preflight.be_deterministic()
    monkeypatch.setattr(preflight.xla_bridge, "backends_are_initialized", lambda: False)
    preflight.be_deterministic()
    preflight.be_deterministic()
    assert os.environ["XLA_FLAGS"] == f"--a=1 {preflight.DETERMINISTIC}"
