"""What a run holds on its devices: one copy of the model that decodes, and none while it trains."""

import jax
import pytest

import grpo_jax
from grpo_jax.config import TrainConfig
from grpo_jax.learner.step import Learner
from grpo_jax.rollout import ContinuousEngine
from grpo_jax.rollout.decoding import Decoding
from grpo_jax.testing import tiny_checkpoint

ROWS = [{"prompt": f"{a}+{b}="} for a in range(3, 9) for b in range(2, 6)]
STEPS, EVERY = 4, 2
CUTS = {"as it trains": ({}, "train", 1, 1), "cut anew": ({"data": 1, "fsdp": 8}, "tensor=2", 8, 2)}
"""The mesh, the layout that decodes, and into how many parts the parameters and the view are cut."""
HELD = 4
"""Copies of the parameters in float32 that a run holds: theirs, the reference's, AdamW's two moments."""
BEYOND = 0.1
"""Share of a copy that everything but these and the view may take: caches, batches, and what is too small to cut."""


def live_bytes() -> int:
    """Bytes on the first device; a buffer that several arrays share counts once."""
    first, held = jax.devices()[0], {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.device == first and not shard.data.is_deleted():
                held[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(held.values())


def digits_are_rare(prompts, completions, completion_ids, **columns):
    return [float(any(c.isdigit() for c in text)) for text in completions]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(cut, marks=pytest.mark.slow if name == "cut anew" else [], id=name) for name, cut in CUTS.items()
    ],
)
def seen(request, tmp_path_factory):
    """Live bytes above those before the run, at each view made, each segment of decoding and each update."""
    directory = tmp_path_factory.mktemp("memory")
    mesh, layout, parts, view_parts = request.param
    config = TrainConfig.from_tables(
        {
            "steps": STEPS,
            "output_dir": str(directory / "run"),
            "compilation_cache": None,
            "model": {"dtype": "bfloat16"},
            "rollout": {"prompts_per_step": 2, "num_samples": 2, "max_new_tokens": 6, "layout": layout},
            "mesh": mesh,
            "algorithm": {"dynamic_sampling": True, "max_rounds": 3},
            "eval": {"every": EVERY, "prompts": 4, "samples": 2},
            "log": {"quiet": True},
        }
    )
    checkpoint = tiny_checkpoint(directory / "model", hidden_size=128, intermediate_size=512, head_dim=32)
    marks: dict[str, list[int]] = {"view": [], "segment": [], "update": []}
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: type, method: str, mark: str) -> None:
            real = getattr(owner, method)

            def watched(*args, **kwargs):
                marks[mark].append(live_bytes() - before)
                out = real(*args, **kwargs)
                marks.setdefault(f"{mark} after", []).append(live_bytes() - before)
                return out

            patch.setattr(owner, method, watched)

        watch(ContinuousEngine, "view", "view")
        watch(Decoding, "_run", "segment")
        watch(Learner, "update", "update")
        before = live_bytes()
        trainer = grpo_jax.Trainer(checkpoint, digits_are_rare, ROWS[:16], ROWS[16:], config)
        trainer.train()
    parameters = sum(x.nbytes for x in jax.tree.leaves(grpo_jax.load_model(checkpoint)[1]))
    return marks, parameters // parts, parameters // view_parts // 2  # bfloat16


def test_the_parameters_are_made_to_decode_once_for_each_update_there_was(seen):
    marks, _, _ = seen
    assert len(marks["update"]) == STEPS
    assert len(marks["view"]) == STEPS + 1  # the last for the last evaluation
    assert len(marks["segment"]) > 2 * len(marks["view"])  # rounds and evaluations share one


def test_one_view_at_most_is_alive_and_in_the_dtype_that_computes(seen):
    marks, parameters, view = seen
    for at, after in zip(marks["view"], marks["view after"], strict=True):
        assert abs(at - HELD * parameters) < BEYOND * parameters
        assert abs(after - at - view) < BEYOND * 2 * view
    for at in marks["segment"] + marks["segment after"]:
        assert abs(at - HELD * parameters - view) < BEYOND * 2 * view


def test_nothing_of_a_view_is_alive_while_training(seen):
    marks, parameters, _ = seen
    for at in marks["update"] + marks["update after"]:
        assert abs(at - HELD * parameters) < BEYOND * parameters
