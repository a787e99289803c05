"""algo/ held to values that TRL 1.16's own loss and advantage code gave; neither torch nor trl is needed here.

Where the two differ on purpose the case is not left out: a test of its own says the difference in words and asserts
both values, each against its formula. docs/TRL_DIFFERENCES.md is the list.
"""

import numpy as np
import pytest

from grpo_jax import algo

from .trl_golden import CASES, META, config_of, our_metrics, ours, ours_accumulated, ours_by_part, same


def differs(name):
    """The test below that a case belongs to, or None where TRL and ours are equal."""
    kind, rest = name.split("/")
    by_name = {
        "delta_below_clip_token": "refused_delta",
        "cispo_below_one_token": "refused_cispo_bound",
        "entropy_top_none": "refused_entropy_top",
        "parameters_token": "refused_lambda",
        "tis_below_one_token": "vespo_padding",
        "icepop_above_one_token": "vespo_padding",
        "far_reference_token": "kl_cap",
        "near_reference_token": "expm1",
        "entropy_bonus_top": "entropy_bonus",
        "accumulated_top_token": "step_quantile",
    }
    if kind == "rloo":
        return "rloo"
    if kind == "gmpo":
        return None if rest in ("plain", "onpolicy", "high") else "gmpo"
    if rest.startswith("sequence_") and kind in ("sapo", "vespo"):
        return f"refused_{kind}_level"
    if rest.startswith("missing_sampler"):
        return "missing_sampler"
    if rest == "far":
        return None if kind == "vespo" else "clamp"
    if rest == "sequence_kl_k3_unbiased":
        return "token_ratio_in_kl"
    if name in (
        "bnpo/accumulated",
        "bnpo/sequence_accumulated",
        "cispo/two_steps",
        "dapo/two_steps",
        "vespo/two_steps",
    ):
        return "step_tokens"
    return "entropy_mean" if name == "grpo/accumulated_entropy_token" else by_name.get(rest)


EQUAL = [name for name in CASES if differs(name) is None]


def different(*reasons):
    """Parametrise over the cases of these differences."""
    names = [name for name in CASES if differs(name) in reasons]
    return pytest.mark.parametrize("name", names)


@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradient_equal_trl(name):
    case = CASES[name]
    accumulated = "gradient_accumulation_steps" in case.options
    if len(case.parts) == 2 and not accumulated:  # two optimizer steps on one generation: two losses of ours
        losses, grad, grad_entropy = ours_by_part(case)
        same(losses, case.loss)
        value = losses.sum()
    else:
        value, grad, grad_entropy = ours_accumulated(case) if accumulated else ours(case)
    same(value, case.total, case.dtype)
    same(grad, case.grad, case.dtype)
    same(grad_entropy, case.grad_entropy, case.dtype)
    assert (grad[~case.mask] == 0).all() and (grad_entropy[~case.mask] == 0).all()


def test_golden_file_covers_what_trl_has():
    assert META["trl"] == "1.16.0"
    kinds = {case.kind for case in CASES.values()}
    assert kinds == {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gmpo", "rloo"}
    set_options = {option for case in CASES.values() for option in case.options}
    assert {"delta", "beta", "use_bias_correction_kl", "importance_sampling_level", "top_entropy_quantile",
            "entropy_coef", "off_policy_mask_threshold", "mask_truncated_completions", "use_vllm",
            "vllm_importance_sampling_mode", "gradient_accumulation_steps"} <= set_options  # fmt: skip
    assert any(np.any(CASES[name].grad) for name in EQUAL)
    assert len(EQUAL) > 200


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@pytest.mark.parametrize("kind", [*CLIPPED, "cispo"])
@pytest.mark.parametrize("variant", ["holes", "kl_k3"])
def test_metrics_equal_trl(kind, variant):
    """The means that TRL logs at token level, which it takes in float32.

    In cispo the bound acts for both signs of A, and ours counts both; TRL counts A > 0.
    """
    case = CASES[f"{kind}/{variant}"]
    got, want = our_metrics(case), dict(case.metrics)
    if kind == "cispo":
        above = case.mask & (np.exp(case.logp - case.old) > case.options["epsilon_high"])
        same(got["clip_ratio/high"], above.sum() / case.mask.sum())
        same(want.pop("cispo_clip_ratio"), (above & (case.advantages > 0)).sum() / case.mask.sum(), "float32")
    else:
        assert want["clip_ratio/low_mean"] + want["clip_ratio/high_mean"] > 0.1
    for name, value in want.items():
        same(got[name.removesuffix("_mean")], value, "float32")


SEQUENCE_LEVEL = [n for n in EQUAL if CASES[n].options.get("importance_sampling_level") == "sequence"]


@pytest.mark.parametrize("name", [n for n in SEQUENCE_LEVEL if CASES[n].kind != "cispo"])
def test_sequence_token_has_the_value_and_gradient_of_trl_sequence(name):
    """GSPO-token: its gradient is GSPO's where all tokens of a sequence weigh the same, its value always."""
    case = CASES[name]
    value, grad, _ = ours_accumulated(case, config_of(case, ratio_level="sequence_token"))
    same(value, case.total)
    if name.endswith(("_tis", "_entropy_top")):  # token weights: GSPO spreads them over the sequence
        assert np.abs(grad - case.grad).max() > 1e-4
    else:
        same(grad, case.grad)


# Bounds and clamps


def surrogate(case, d, moves):
    """Per-token terms of section 3 on log-ratios d and their derivative in logp; `moves`: d follows logp there."""
    rho, a, o = np.exp(d), case.advantages, case.options
    if case.kind == "cispo":
        weight = np.minimum(rho, o["epsilon_high"]) * a
        return -weight * case.logp, -weight
    if case.kind == "sapo":
        tau = np.where(a > 0, 1.0, 1.05)
        gate = 1 / (1 + np.exp(-tau * (rho - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * rho * a * moves
    clipped = np.clip(rho, 1 - o["epsilon"], 1 + o["epsilon_high"])
    return -np.minimum(rho * a, clipped * a), np.where(rho * a <= clipped * a, -a * rho, 0.0) * moves


def k3(x):
    return np.expm1(x) - x


@different("clamp")
def test_log_ratios_are_clamped_to_20(name):
    """TRL takes exp of any log-ratio; ours clamps it to +-20 first and has no gradient beyond."""
    case = CASES[name]
    d = case.logp - case.old
    for found, log_ratio, moves in (
        ((case.total, case.grad), d, np.ones_like(d)),
        (ours(case)[:2], np.clip(d, -20, 20), np.abs(d) <= 20),
    ):
        terms, slopes = surrogate(case, log_ratio, moves)
        same(found[0], (case.weights * terms).sum())
        same(found[1], case.weights * slopes)
    assert (np.abs(d) > 20).any()


@different("kl_cap")
def test_k3_is_capped_at_20(name):
    """TRL takes exp of any ref_logp - logp; ours caps it at 20, where the gradient is 0."""
    case = CASES[name]
    x = case.ref - case.logp
    for found, y, inside in (((case.total, case.grad), x, x == x), (ours(case)[:2], np.minimum(x, 20), x <= 20)):
        same(found[0], (case.weights * (-case.advantages + case.beta * k3(y))).sum())
        same(found[1], case.weights * (-case.advantages - case.beta * np.expm1(y) * inside))
    assert (x[case.mask] > 20).any() and (x[case.mask] < -20).any()


@different("expm1")
def test_k3_keeps_its_digits_near_zero(name):
    """float32, |x| of 1e-4: TRL's exp(x) - x - 1 errs by the rounding of 1, ours, expm1(x) - x, by that of x."""
    case = CASES[name]
    x = case.ref - case.logp
    value, slope = (case.weights * k3(x)).sum(), -case.weights * np.expm1(x)
    loss, grad, _ = ours(case)
    assert abs(loss - value) < np.finfo(np.float32).eps * (case.weights * np.abs(x)).sum() < 2e-3 * value
    np.testing.assert_allclose(grad, slope, rtol=1e-5)
    assert abs(case.total / value - 1) > 0.05
    assert np.abs(case.grad - slope).max() > 1e-4 * np.abs(slope).max()


def test_cispo_bound_is_one_plus_clip_high():
    """TRL's epsilon_high is the bound on the ratio itself; ours is 1 + clip_high as for every other surrogate."""
    case = CASES["cispo/plain"]
    rho = np.exp(case.logp - case.old)
    for clip_high, bound in ((0.3, 1.3), (1.3, 2.3)):
        value, grad, _ = ours(case, config_of(case, clip_high=clip_high))
        weight = np.minimum(rho, bound) * case.advantages
        same(value, -(case.weights * weight * case.logp).sum())
        same(grad, -case.weights * weight)
        assert (abs(value - case.total) < 1e-12) == (bound == case.options["epsilon_high"])


@different("refused_delta", "refused_cispo_bound", "refused_lambda", "refused_entropy_top")
def test_values_that_trl_takes_and_ours_refuses(name):
    """Bounds that hide the clip (delta below 1 + clip_high, cispo's below 1), a share of 0, a lambda below 1e-4."""
    case = CASES[name]
    with pytest.raises(ValueError, match="got"):
        config_of(case)
    reason = differs(name)
    if reason in ("refused_delta", "refused_cispo_bound"):
        rho, a, o = np.exp(case.logp - case.old), case.advantages, case.options
        capped = np.minimum(rho, o["delta"] if reason == "refused_delta" else o["epsilon_high"])
        clipped = np.clip(rho, 1 - o["epsilon"], 1 + o["epsilon_high"])
        terms = np.minimum(capped * a, clipped * a) if reason == "refused_delta" else capped * a * case.logp
        same(case.total, -(case.weights * terms).sum())
        return
    # TRL's own floor said openly: its lambda is at least 1e-4, its share 0 keeps the token of largest entropy.
    over = {"vespo_lambda_neg": 1e-4} if reason == "refused_lambda" else {"entropy_top": 1e-12}
    value, grad, _ = ours(case, config_of(case, **over))
    same(value, case.total)
    same(grad, case.grad)


# Ratio levels


@different("refused_sapo_level")
def test_sapo_at_sequence_level_is_refused(name):
    """TRL puts any ratio into sapo's gate; ours takes the token ratio alone, as the paper."""
    case = CASES[name]
    with pytest.raises(ValueError, match="sapo"):
        config_of(case)
    if name in ("sapo/sequence_plain", "sapo/sequence_onpolicy", "sapo/sequence_holes"):
        d = ((case.logp - case.old) * case.mask).sum(1, keepdims=True) / case.counts
        same(case.total, (case.weights * surrogate(case, d, True)[0]).sum())


@different("refused_vespo_level")
def test_vespo_at_sequence_level_is_refused(name):
    """TRL takes the level and ignores it (its KL weight apart): vespo sums log-ratios over the sequence itself."""
    case = CASES[name]
    with pytest.raises(ValueError, match="vespo"):
        config_of(case)
    if name != "vespo/sequence_kl_k3_unbiased":
        value, grad, _ = (ours_accumulated if "accumulated" in name else ours)(
            case, config_of(case, ratio_level="token")
        )
        same(value, case.total)
        same(grad, case.grad)


@different("token_ratio_in_kl")
def test_unbiased_k3_takes_the_token_ratio_at_every_level(name):
    """TRL multiplies k3 by whatever ratio the surrogate uses; ours always by the token's, or it is not unbiased."""
    case = CASES[name]
    d, x, w = case.logp - case.old, case.ref - case.logp, case.weights
    policy, policy_grad, _ = ours(case, config_of(case, kl_coef=0.0))
    mean_d = (d * case.mask).sum(1, keepdims=True) / case.counts
    through_mean = (w * k3(x)).sum(1, keepdims=True) * case.mask / case.counts
    for found, rho, through in (
        ((case.total, case.grad), np.exp(mean_d), through_mean),
        (ours(case)[:2], np.exp(d), w * k3(x)),
    ):
        same(found[0], policy + case.beta * (w * k3(x) * rho).sum())
        same(found[1], policy_grad + case.beta * rho * (through - w * np.expm1(x)))


# Denominators and statistics of the step


@different("step_tokens")
def test_tokens_are_counted_over_the_optimizer_step(name):
    """bnpo: TRL averages over each microbatch. dapo, cispo, vespo with several steps per generation: TRL divides by
    the generation's tokens over its steps, whatever each step holds. Ours divides by the tokens of the step."""
    case = CASES[name]
    tokens = np.array([case.mask[rows].sum() for rows in case.parts], float)
    if case.kind == "bnpo":
        trl_denominators, our_denominators = 2 * tokens, np.full(2, tokens.sum())
        value, grad, _ = ours_accumulated(case)
        same(value, (case.loss * trl_denominators / our_denominators).sum())
    else:
        trl_denominators, our_denominators = np.full(2, tokens.sum() / 2), tokens
        losses, grad, _ = ours_by_part(case)
        same(losses, case.loss * trl_denominators / our_denominators)
    assert tokens[0] != tokens[1]
    per_row = np.repeat(trl_denominators / our_denominators, len(case.mask) // 2)[:, None]
    if case.beta:  # the KL is divided like the rest
        assert config_of(case).kl_coef == case.beta
    same(grad, case.grad * per_row)


@different("entropy_mean")
def test_entropy_bonus_is_one_mean_over_the_step(name):
    """TRL: the mean of the microbatches' means. Ours: over the step's tokens."""
    case = CASES[name]
    coef, h, m = case.options["entropy_coef"], case.entropy, case.mask
    policy = ours_accumulated(case, config_of(case, entropy_coef=0.0))[0]
    value, grad, grad_entropy = ours_accumulated(case)
    same(grad, case.grad)
    same(case.total, policy - coef * np.mean([h[rows][m[rows]].mean() for rows in case.parts]))
    same(value, policy - coef * h[m].mean())
    same(grad_entropy, -coef * m / m.sum())
    same(case.grad_entropy, np.concatenate([-coef / 2 * m[rows] / m[rows].sum() for rows in case.parts]))


@different("entropy_bonus")
def test_entropy_bonus_is_not_narrowed_by_entropy_top(name):
    """TRL takes the bonus over the tokens that entropy_top keeps; ours over all trained ones."""
    case = CASES[name]
    coef, h = case.options["entropy_coef"], case.entropy
    policy = ours(case, config_of(case, entropy_coef=0.0))[0]
    value, grad, grad_entropy = ours(case)
    kept = case.mask & (h >= np.quantile(h[case.mask], 1 - case.options["top_entropy_quantile"]))
    assert kept.sum() < case.mask.sum()
    same(grad, case.grad)
    for found, found_grad, tokens in ((case.total, case.grad_entropy, kept), (value, grad_entropy, case.mask)):
        same(found, policy - coef * h[tokens].mean())
        same(found_grad, -coef * tokens / tokens.sum())


@different("step_quantile")
def test_entropy_quantile_is_that_of_the_step(name):
    """TRL takes the quantile within each microbatch; ours over the optimizer step."""
    case = CASES[name]
    h, share = case.entropy, case.options["top_entropy_quantile"]
    terms, slopes = surrogate(case, case.logp - case.old, True)
    of_step = case.mask & (h >= np.quantile(h[case.mask], 1 - share))
    of_part = np.concatenate([h[r] >= np.quantile(h[r][case.mask[r]], 1 - share) for r in case.parts]) & case.mask
    assert (of_step != of_part).any()
    for found, kept in ((ours(case)[:2], of_step), ((case.total, case.grad), of_part)):
        same(found[0], (case.weights * terms * kept).sum())
        same(found[1], case.weights * slopes * kept)


# The sampler's correction


@different("missing_sampler")
def test_a_missing_sampler_logp_is_filled_by_the_caller(name):
    """vLLM may leave a token without log-probability; TRL gives it weight 1 and distance 0. Our engine leaves none,
    and a caller says the same by filling in old_logp (logp for the off-policy mask)."""
    case = CASES[name]
    filled = np.where(np.isnan(case.sampler), case.old if case.corrected else case.logp, case.sampler)
    value, grad, _ = ours(case, sampler=filled)
    same(value, case.total)
    same(grad, case.grad)
    assert (np.isnan(case.sampler) & case.mask).any()


@different("vespo_padding")
def test_vespo_sums_the_correction_over_trained_tokens_alone(name):
    """TRL sums log w over padding too, where w is 1 before the bounds: bounds that exclude 1 count padding in."""
    case = CASES[name]
    low, high = (case.options[f"vllm_importance_sampling_clip_{end}"] for end in ("min", "max"))
    w = np.exp(np.where(case.mask, case.old - case.sampler, 0.0))
    w = np.minimum(w, high) if low is None else np.where(w < low, 0.0, w)
    log_w = np.log(np.maximum(w, 1e-8))
    value, grad, _ = ours(case)
    for found, counted in (((case.total, case.grad), log_w), ((value, grad), log_w * case.mask)):
        total = ((case.logp - case.old) * case.mask).sum(1, keepdims=True) + counted.sum(1, keepdims=True)
        total = np.clip(total, np.log(1e-8), 20)
        k, lam = (np.where(case.advantages >= 0, *pair) for pair in ((2.0, 3.0), (3.0, 2.0)))
        weight = np.exp(lam + k * total - lam * np.exp(total)) * case.advantages * case.weights
        same(found[0], -(weight * case.logp).sum())
        same(found[1], -weight)
    assert abs(value - case.total) > 1e-3


# Trainers of their own


def geometric(case, kept):
    """gmpo's ratio, the geometric mean of clipped token ratios over the tokens kept: [N, 1]."""
    d, high = case.logp - case.old, case.options.get("epsilon_high", 0.4)
    clipped = np.where(case.advantages > 0, np.minimum(d, high), np.maximum(d, -case.options.get("epsilon", 0.4)))
    return np.exp((clipped * kept).sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1))


@different("gmpo")
def test_gmpo_where_trl_differs(name):
    """An empty row adds -A in TRL (no gradient), 0 in ours. TRL's entropy mask shortens the mean, ours is refused.
    TRL's GMPO ignores the sampler correction and the off-policy mask; ours applies them as to every surrogate."""
    case = CASES[name]
    a = case.advantages[:, :1]
    if name in ("gmpo/truncated", "gmpo/kl_k3"):
        value, grad, _ = ours(case)
        empty = ~case.mask.any(1)
        assert empty.any()
        same(value, case.total + a[empty].sum() / len(a))
        same(grad, case.grad)
    elif name == "gmpo/entropy_top":
        with pytest.raises(ValueError, match="gmpo"):
            config_of(case)
        kept = case.mask & (case.entropy >= np.quantile(case.entropy[case.mask], 0.6))
        same(case.total, -(geometric(case, kept) * a).mean())
    else:
        plain = config_of(case, correction=None, correction_low=None, correction_high=None, off_policy_threshold=None)
        value, grad, _ = ours(case, plain)
        same(value, case.total)
        same(grad, case.grad)
        far = ((case.sampler - case.logp) * case.mask).sum(1, keepdims=True) / case.counts > 0.05
        w = np.minimum(np.exp(case.old - case.sampler), 1.5) * ~(far & (a < 0))
        same(ours(case)[0], -(case.weights * geometric(case, case.mask) * a * w).sum())


@different("rloo")
def test_rloo_loss(name):
    """TRL clips exp of a sequence's summed log-ratio; ours is REINFORCE. On-policy the gradients are equal."""
    case = CASES[name]
    a, m = case.advantages[:, :1], case.mask
    s = np.exp(((case.logp - case.old) * m).sum(1, keepdims=True))
    clipped = np.clip(s, 0.8, 1.2)
    same(case.total, -np.minimum(s * a, clipped * a).mean())
    same(case.grad, np.where(s * a <= clipped * a, -a * s, 0.0) * m / len(m))
    value, grad, _ = ours(case, algo.LossConfig.preset("rloo", kl_coef=0.0))
    same(value, -(a * case.logp * m).sum() / len(m))
    same(grad, -a * m / len(m))
    assert (name == "rloo/onpolicy") == np.allclose(grad, case.grad, rtol=1e-12, atol=0)
