"""The engine against contracts 2, 3, 4 and 8: what it samples, says of it, and never does again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.mesh import make_mesh
from grpo_jax.metrics import CompileLog
from grpo_jax.rollout import ContinuousEngine, Sampling, generate
from grpo_jax.rollout.sampling import row_keys, split_ids, uniforms
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt, Rollout

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [3, 3], [20, 21, 22, 23, 24]]
SAMPLES, LIMIT = 4, 24
"""Of most calls: what is compiled for one kind of call serves them all."""


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def completions(rollout: Rollout) -> list[list[int]]:
    return [rollout.completion_ids(n) for n in range(len(rollout.tokens))]


def learner_logp(model, params, rollout: Rollout, temperature: float) -> np.ndarray:
    logits = np.asarray(model.logits(params, rollout.tokens), np.float64) / (temperature or 1.0)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    taken = np.take_along_axis(logp[:, :-1], rollout.tokens[:, 1:, None], -1)[..., 0]
    return np.pad(taken, ((0, 0), (1, 0)))


@pytest.mark.parametrize(
    ("model_type", "temperature", "options"),
    [
        ("qwen2", 1.0, {}),
        ("qwen2", 0.7, {"top_k": 5, "top_p": 0.9}),
        ("qwen2", 1.6, {}),
        ("qwen2", 0.0, {}),
        pytest.param("llama", 1.0, {}, marks=pytest.mark.slow),
        pytest.param("llama", 0.7, {"top_p": 0.8}, marks=pytest.mark.slow),
    ],
)
def test_contract_3_sampler_logp_is_the_learners(model_type, temperature, options):
    model, params = tiny_model(model_type=model_type)
    rollout = generate(model, params, PROMPTS, SAMPLES, LIMIT, temperature, stop_ids=[1], **options)
    gap = np.abs(learner_logp(model, params, rollout, temperature) - rollout.sampler_logp)[rollout.completion_mask]
    assert gap.size > 100 and gap.mean() <= 1e-5 and gap.max() <= 1e-4
    assert (rollout.sampler_logp[~rollout.completion_mask] == 0).all()


def boundary_distance(model, params, rollout: Rollout, row: int, place: int, uniform: float, temperature=1.0) -> float:
    """How far the uniform of a token lies from the nearest boundary of its cumulative distribution."""
    column = int(rollout.prompt_len[row]) + place
    logits = np.asarray(model.logits(params, rollout.tokens[row : row + 1]), np.float64)[0, column - 1] / temperature
    p = np.exp(logits - logits.max())
    return float(np.abs(np.cumsum(p / p.sum()) - uniform).min())


def assert_same_but_for_boundaries(model, params, one, other, ids, samples, temperature=1.0):
    """Contract 4: where two rollouts of the same rows differ first, float noise moved a boundary over the uniform."""
    keys = row_keys(0, jnp.uint32(0), jnp.asarray(split_ids(ids)), samples)
    for row, (a, b) in enumerate(zip(completions(one), completions(other), strict=True)):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if first is None:
            assert a == b
            continue
        u = float(uniforms(keys[row : row + 1], jnp.asarray([first]))[0])
        assert boundary_distance(model, params, one, row, first, u, temperature) <= 1e-5


def test_contract_4_tokens_do_not_depend_on_the_company(tiny):
    model, params = tiny
    whole = generate(model, params, PROMPTS, SAMPLES, LIMIT, stop_ids=[1], request_ids=[3, 1, 4, 15, 9])
    order = [4, 2, 0, 3, 1]
    shuffled = generate(
        model,
        params,
        [PROMPTS[i] for i in order],
        SAMPLES,
        LIMIT,
        stop_ids=[1],
        request_ids=[[3, 1, 4, 15, 9][i] for i in order],
    )
    back = [order.index(q) * 4 + g for q in range(5) for g in range(4)]
    ordered = shuffled.take(back)
    assert_same_but_for_boundaries(model, params, whole, ordered, [3, 1, 4, 15, 9], 4)
    for q, request in enumerate([3, 1, 4, 15, 9]):
        alone = generate(model, params, [PROMPTS[q]], SAMPLES, LIMIT, stop_ids=[1], request_ids=[request])
        group = whole.take(slice(4 * q, 4 * q + 4))
        assert_same_but_for_boundaries(model, params, group, alone, [request], 4)


def test_contract_4_batches_of_an_engine_and_fewer_samples(tiny):
    model, params = tiny
    asked = [Prompt(i, tuple(p)) for i, p in enumerate(PROMPTS)]
    sampling = Sampling(max_new_tokens=LIMIT, stop_ids=(1,))
    call = {"num_samples": SAMPLES, "sampling": sampling, "seed": 0, "step": 0}
    whole = ContinuousEngine(model, 16).generate(params, asked, **call)
    cut = ContinuousEngine(model, 16, slots=8).generate(params, asked, **call)
    wide = ContinuousEngine(model, 32).generate(params, asked, **call)
    assert_same_but_for_boundaries(model, params, whole, cut, range(5), 4)
    assert_same_but_for_boundaries(model, params, whole, wide, range(5), 4)


MESHES = [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (2, 4, 1), (1, 1, 2)))]


@pytest.mark.parametrize("sizes", MESHES)
def test_contract_4_eight_devices_sample_what_one_does(tiny, sizes):
    model, params = tiny
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    spread, spread_params = tiny_model(mesh)
    kernel = max(jax.tree.leaves(spread_params), key=lambda x: x.size)
    assert len(kernel.addressable_shards) == np.prod(sizes)
    if sizes[1] * sizes[2] > 1:
        assert kernel.addressable_shards[0].data.size < kernel.size
    one = generate(model, params, PROMPTS, SAMPLES, LIMIT, stop_ids=[1])
    many = generate(spread, spread_params, PROMPTS, SAMPLES, LIMIT, stop_ids=[1])
    assert_same_but_for_boundaries(model, params, one, many, range(5), 4)
    gap = np.abs(learner_logp(model, params, many, 1.0) - many.sampler_logp)[many.completion_mask]
    assert gap.max() <= 1e-4


def test_contract_4_the_same_call_is_bitwise_the_same(tiny):
    model, params = tiny
    one, two = (generate(model, params, PROMPTS, SAMPLES, LIMIT, stop_ids=[1]) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.sampler_logp, two.sampler_logp)
    other = generate(model, params, PROMPTS, SAMPLES, LIMIT, stop_ids=[1], seed=1)
    assert completions(other) != completions(one)


def test_contract_2_the_stop_token_belongs_to_the_completion(tiny):
    model, params = tiny
    rollout = generate(model, params, PROMPTS, SAMPLES, LIMIT, stop_ids=[1, 2, 30])
    assert set(rollout.finish) == {"stop", "length"}
    for n, ids in enumerate(completions(rollout)):
        inside = [t in (1, 2, 30) for t in ids]
        assert not any(inside[:-1]) and inside[-1] == (rollout.finish[n] == "stop")
        assert len(ids) == LIMIT or rollout.finish[n] == "stop"
        row = rollout.tokens[n]
        assert row[: rollout.prompt_len[n]].tolist() == PROMPTS[n // SAMPLES]
        assert (row[rollout.prompt_len[n] + len(ids) :] == 0).all()


def test_contract_2_a_stop_token_at_the_limit_is_a_stop(tiny):
    model, params = tiny
    everything = list(range(model.spec.vocab))
    one = generate(model, params, PROMPTS[:3], 1, 1, stop_ids=everything)
    assert (one.completion_len == 1).all() and (one.finish == "stop").all()
    never = generate(model, params, PROMPTS[:3], 1, 5, stop_ids=[])
    assert (never.completion_len == 5).all() and (never.finish == "length").all()


def test_stop_ids_come_from_the_checkpoint_when_not_given(tiny):
    model, params = tiny
    own, given = (generate(model, params, PROMPTS, SAMPLES, LIMIT, stop_ids=ids) for ids in (None, [1]))
    assert completions(own) == completions(given) and "stop" in own.finish


def test_greedy_is_the_argmax_of_the_full_forward(tiny):
    model, params = tiny
    rollout = grpo_jax.generate(model, params, PROMPTS, 1, 12, temperature=0.0, stop_ids=[])
    logits = np.asarray(model.logits(params, rollout.tokens))
    expected = np.pad(logits.argmax(-1)[:, :-1], ((0, 0), (1, 0)))
    np.testing.assert_array_equal(rollout.tokens[rollout.completion_mask], expected[rollout.completion_mask])


def test_contract_8_lengths_and_contents_compile_nothing_new(tiny):
    model, params = tiny
    engine = ContinuousEngine(model, 16, slots=12)
    rng = np.random.default_rng(0)

    def call(step: int) -> None:
        prompts = [Prompt(int(rng.integers(2**40)), tuple(rng.integers(2, 61, rng.integers(1, 17)))) for _ in range(6)]
        engine.generate(params, prompts, num_samples=4, sampling=Sampling(max_new_tokens=9), seed=step, step=step)

    call(0)
    with CompileLog() as compiles:
        for step in range(1, 12):
            call(step)
    assert compiles.count == 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "got none"), ([[]], "got no token"), ([[61]], "the model knows 0 to 60"), ([[-1]], "the model knows")],
)
def test_refuses_prompts_that_cannot_be_completed(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompts)


def test_refuses_a_prompt_longer_than_the_engine_and_missing_ids(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="9 tokens"):
        ContinuousEngine(model, 8).generate(
            params, [Prompt(0, (2,) * 9)], num_samples=1, sampling=Sampling(), seed=0, step=0
        )
    with pytest.raises(ValueError, match="request_ids"):
        generate(model, params, PROMPTS, request_ids=[1])
    with pytest.raises(ValueError, match="num_samples"):
        generate(model, params, PROMPTS, num_samples=0)
