"""Every preset in the run: a step changes the policy, however it is cut and on whatever mesh, and resumes exactly."""

import jax
import numpy as np
import pytest
from learning_cases import assert_same_update, collected_for, config_for, copied, learning_for, moved

from grpo_jax.algo.spec import PRESETS
from grpo_jax.learner import learning as learning_module

CUTS = {"whole": (1, None), "cut": (8, 8)}
"""Devices and rows of a microbatch: all 16 rows on one device, two microbatches on eight."""


@pytest.fixture(scope="module", autouse=True)
def shared_compiles():
    """Presets with the same loss share a learner: compiling is all that these tests cost."""
    learners, make = {}, learning_module.make_learner

    def shared(config, model, layout, critic):
        key = (config.loss, config.optim, config.batch, model, critic)
        return learners.setdefault(key, make(config, model, layout, critic))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_module, "make_learner", shared)
        yield


SPAN = ("grpo", "dr_grpo", "gspo", "ppo", "reinforce_pp")
"""A preset for each mechanism: reference, constant length, ratio of sequences, critic, KL in the reward."""


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[] if name in SPAN else pytest.mark.slow) for name in PRESETS]
)
def test_a_step_is_the_same_on_eight_devices_in_microbatches_and_resumes_exactly(preset):
    updates, figures = [], []
    for devices, rows in CUTS.values():
        config = config_for(preset, optim={"microbatch_rows": rows})
        learning = learning_for(config, devices)
        before = copied(learning.state)
        figures.append(learning.train(collected_for(config, 0))[1])
        updates.append(moved(before, learning.state))
    assert_same_update(*updates)
    assert [f["skipped_update_count"] for f in figures] == [0, 0]
    for name in ("loss", "entropy", "grad_norm"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-4, abs=1e-6)

    saved, controllers = copied(learning.state), learning.controllers.state()
    learning.train(collected_for(config, 1))
    whole = jax.tree.map(np.asarray, copied(learning.state))
    learning.state = saved
    learning.controllers.restore(controllers)
    learning.train(collected_for(config, 1))
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(np.asarray, learning.state))
    assert int(whole.step) == 2
