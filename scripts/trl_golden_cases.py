"""The cases of make_trl_golden.py: batches of log-probabilities, tables of rewards, and the options of TRL run on them.

NumPy only. Every reward and every entropy is exact in float32, because TRL casts them to it whatever the dtype.
"""

import numpy as np

Q, G, T = 2, 4, 7
N = Q * G
LENGTHS = (7, 5, 1, 3, 7, 6, 2, 4)


def f32(x):
    return np.asarray(x, np.float32).astype(np.float64)


def batch(seed, spread=0.35, sampler_spread=0.3, ref_spread=0.5):
    """Log-probabilities of the four kinds, entropies and rewards of Q groups of G completions."""
    rng = np.random.default_rng(seed)
    logp = -0.05 - 1.5 * np.abs(rng.standard_normal((N, T)))
    old = logp - spread * rng.standard_normal((N, T)) - 0.5 * spread * rng.standard_normal((N, 1))
    return {
        "logp": logp,
        "old": old,
        "ref": logp + ref_spread * rng.standard_normal((N, T)),
        "sampler": old + sampler_spread * rng.standard_normal((N, T)),
        "entropy": f32(rng.gamma(1.5, 0.7, (N, T))),
        "lengths": np.array(LENGTHS),
        "finished": np.ones(N, bool),
        "tool_mask": np.ones((N, T), np.int64),
        "rewards": f32(rng.standard_normal((1, N))),
    }


def batches():
    """The named batches that cases refer to."""
    out = {"main": batch(0), "wide": batch(1, 1.2, 0.9)}
    ties = batch(2)
    ties["entropy"] = f32(np.random.default_rng(2).choice([0.1, 0.7, 1.3], (N, T), p=[0.3, 0.5, 0.2]))
    out["ties"] = ties
    holes = batch(3)
    holes["tool_mask"] = (np.random.default_rng(3).random((N, T)) < 0.7).astype(np.int64)
    holes["tool_mask"][2] = 0
    out["holes"] = holes
    cut = batch(4)
    cut["finished"][[0, 3, 5]] = False
    out["cut"] = cut
    out["all_cut"] = batch(5) | {"finished": np.zeros(N, bool)}
    missing = batch(6)
    missing["sampler"][0, 2] = missing["sampler"][4, 1] = missing["sampler"][5, 5] = np.nan
    out["missing"] = missing
    far = batch(7)
    far["old"] = far["logp"] - np.random.default_rng(7).choice([-25.0, -21.0, 0.1, 21.0, 25.0], (N, T))
    out["far"] = far
    far_ref = batch(8)
    far_ref["ref"] = far_ref["logp"] + np.random.default_rng(8).choice([-40.0, 0.1, 21.0, 25.0], (N, T))
    out["far_ref"] = far_ref
    near_ref = batch(9)
    near_ref["logp"] = f32(near_ref["logp"])
    near_ref["ref"] = f32(near_ref["logp"] + np.random.default_rng(9).choice([-3e-4, -1e-4, 1e-4, 3e-4], (N, T)))
    near_ref["rewards"] = np.zeros((1, N))  # no policy term: the loss is the KL alone
    out["near_ref"] = near_ref
    per_token = batch(10)
    per_token["advantages"] = np.random.default_rng(10).standard_normal((N, T))
    out["per_token"] = per_token
    uneven = batch(11)
    uneven["lengths"] = np.array([7, 7, 6, 7, 1, 2, 1, 3])
    uneven["entropy"][:4] *= 0.5  # so that the quantiles of the halves are apart
    out["uneven"] = uneven
    even = batch(12)
    even["lengths"] = np.array([7, 5, 1, 6, 7, 6, 2, 4])  # both halves hold 19 tokens
    out["even"] = even
    return out


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
VLLM = {"use_vllm": True}


def correction(mode, low, high, **more):
    return VLLM | more | {
        "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }  # fmt: skip


# name -> (batch, options), run for every loss type at token level
VARIANTS = {
    "plain": ("main", {}),
    "onpolicy": ("main", {"num_iterations": 1}),
    "holes": ("holes", {}),
    "kl_k3": ("main", {"beta": 0.1, "use_bias_correction_kl": False}),
    "kl_k3_unbiased": ("holes", {"beta": 0.1}),
    "kl_onpolicy_unbiased": ("main", {"beta": 0.1, "num_iterations": 1}),
    "entropy_top": ("main", {"top_entropy_quantile": 0.4, "beta": 0.05, "use_bias_correction_kl": False}),
    "entropy_top_none": ("holes", {"top_entropy_quantile": 0.0}),
    "entropy_top_ties": ("ties", {"top_entropy_quantile": 0.5}),
    "entropy_bonus": ("holes", {"entropy_coef": 0.03}),
    "entropy_bonus_top": ("main", {"entropy_coef": 0.03, "top_entropy_quantile": 0.4}),
    "off_policy_old": ("wide", {"off_policy_mask_threshold": 0.002}),
    "off_policy_sampler": ("wide", VLLM | {"off_policy_mask_threshold": 0.75,
                                           "vllm_importance_sampling_correction": False}),
    "truncated": ("cut", {"mask_truncated_completions": True, "beta": 0.05, "use_bias_correction_kl": False}),
    "all_truncated": ("all_cut", {"mask_truncated_completions": True, "beta": 0.05}),
    "tis": ("wide", correction("token_truncate", None, 1.5)),
    "icepop": ("wide", correction("token_mask", 0.5, 2.0)),
    "seq_tis": ("main", correction("sequence_truncate", None, 1.5)),
    "seq_mask": ("main", correction("sequence_mask", None, 3.0)),
    "accumulated": ("uneven", {"gradient_accumulation_steps": 2, "beta": 0.05, "use_bias_correction_kl": False}),
    "two_steps": ("uneven", {"steps_per_generation": 2}),
    "two_steps_even": ("even", {"steps_per_generation": 2}),
    "all_at_once": ("wide", correction("token_truncate", 0.4, 2.0, beta=0.1, off_policy_mask_threshold=0.75,
                                       use_bias_correction_kl=False, top_entropy_quantile=0.6)),
    "float32": ("main", {"beta": 0.1, "use_bias_correction_kl": False, "dtype": "float32"}),
}  # fmt: skip
SEQUENCE_VARIANTS = """plain onpolicy holes kl_k3 kl_k3_unbiased truncated tis seq_mask entropy_top off_policy_old
 accumulated""".split()
# What needs only one loss type, or a few: (name, trainer, batch, options)
SINGLES = [
    ("delta", "dapo", "wide", {"delta": 1.6}),
    ("delta", "grpo", "wide", {"delta": 1.6, "importance_sampling_level": "sequence", "epsilon": 0.05}),
    ("delta_below_clip", "dapo", "wide", {"delta": 1.1}),
    ("tie_at_bound", "dapo", "main", {"epsilon": 0.0, "epsilon_high": 0.0, "num_iterations": 1}),
    ("per_token_advantages", "dapo", "per_token", {}),
    ("per_token_advantages", "sapo", "per_token", {"off_policy_mask_threshold": 0.0}),
    ("per_token_advantages", "cispo", "per_token", {}),
    ("cispo_below_one", "cispo", "main", {"epsilon_high": 0.9}),
    ("temperatures", "sapo", "wide", {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0}),
    ("parameters", "vespo", "wide", {"vespo_k_pos": 1.5, "vespo_lambda_pos": 1.0, "vespo_k_neg": 2.5,
                                     "vespo_lambda_neg": 0.0}),
    ("tis_below_one", "vespo", "main", correction("token_truncate", None, 0.8)),
    ("icepop_above_one", "vespo", "holes", correction("token_mask", 1.05, None)),
    # With the default k a sequence that holds a rejected token weighs nothing; here it weighs about 1e-4.
    ("icepop_small_k", "vespo", "wide", correction("token_mask", 0.5, 2.0, vespo_k_pos=0.5, vespo_k_neg=0.5)),
    ("missing_sampler", "dapo", "missing", correction("token_truncate", None, 3.0)),
    ("missing_sampler", "grpo", "missing", correction("sequence_mask", None, 3.0)),
    ("missing_sampler_off_policy", "dapo", "missing", VLLM | {"off_policy_mask_threshold": 0.05,
                                                              "vllm_importance_sampling_correction": False}),
    ("correction_off", "dapo", "wide", VLLM | {"vllm_importance_sampling_correction": False}),
    ("far_reference", "dapo", "far_ref", {"beta": 0.1, "use_bias_correction_kl": False, "num_iterations": 1}),
    ("near_reference", "dapo", "near_ref", {"beta": 1.0, "use_bias_correction_kl": False, "num_iterations": 1,
                                            "dtype": "float32"}),
    ("accumulated_entropy", "grpo", "uneven", {"gradient_accumulation_steps": 2, "entropy_coef": 0.03}),
    ("accumulated_entropy", "dapo", "even", {"gradient_accumulation_steps": 2, "entropy_coef": 0.03}),
    ("accumulated_top", "dapo", "uneven", {"gradient_accumulation_steps": 2, "top_entropy_quantile": 0.4}),
    ("default_high", "bnpo", "main", {"scale_rewards": "none", "epsilon_high": None}),
]  # fmt: skip
GMPO = {
    "plain": ("wide", {}),
    "onpolicy": ("main", {"num_iterations": 1}),
    "high": ("wide", {"epsilon": 0.2, "epsilon_high": 0.6}),
    "kl_k3": ("holes", {"beta": 0.1}),
    "truncated": ("cut", {"mask_truncated_completions": True}),
    "entropy_top": ("main", {"top_entropy_quantile": 0.4}),
    "ignored_options": ("wide", correction("token_truncate", None, 1.5, off_policy_mask_threshold=0.05)),
}


def clip_options(loss, level):
    token = {"epsilon": 0.2, "epsilon_high": 1.3 if loss == "cispo" else 0.28}
    sequence = {"epsilon": 0.05, "epsilon_high": 1.05 if loss == "cispo" else 0.08}
    return {"loss_type": loss} | (token if level == "token" else sequence)


def loss_cases():
    """Yields (case name, trainer, batch, options)."""
    for loss in LOSSES:
        for name, (data, options) in VARIANTS.items():
            if not (loss == "vespo" and name.startswith("seq_")):
                yield f"{loss}/{name}", "grpo", data, clip_options(loss, "token") | options
        for name in SEQUENCE_VARIANTS:
            data, options = VARIANTS[name]
            options = clip_options(loss, "sequence") | options | {"importance_sampling_level": "sequence"}
            if not (loss == "vespo" and name.startswith("seq_")):
                yield f"{loss}/sequence_{name}", "grpo", data, options
        yield f"{loss}/far", "grpo", "far", clip_options(loss, "token")
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        for low, high in ((None, 1.5), (0.6, None), (0.6, 1.5)):
            name = f"dapo/{mode}_{low}_{high}"
            yield name, "grpo", "wide", clip_options("dapo", "token") | correction(mode, low, high)
    for name, loss, data, options in SINGLES:
        level = options.get("importance_sampling_level", "token")
        yield f"{loss}/{name}_{level}", "grpo", data, clip_options(loss, level) | options
    for name, (data, options) in GMPO.items():
        yield f"gmpo/{name}", "gmpo", data, options
    for data in ("main", "wide", "cut"):
        yield f"rloo/{data}", "rloo", data, {"beta": 0.0, "mask_truncated_completions": data == "cut"}
    yield "rloo/onpolicy", "rloo", "onpolicy", {"beta": 0.0}


def reward_tables():
    """name -> rewards [F, Q, G], NaN for no answer."""
    rng = np.random.default_rng(20)
    plain, pair = rng.standard_normal((1, 4, 5)), rng.standard_normal((2, 4, 5))
    absent = pair.copy()
    absent[0, 0, 1] = absent[1, 0, 3] = np.nan
    absent[:, 1, 2] = np.nan
    absent[:, 2, 1:] = np.nan
    absent[:, 3] = np.nan
    flat = rng.standard_normal((2, 4, 5))
    flat[:, 1] = 0.25
    flat[0, 2] = 1.0
    tenths = np.full((1, 3, 10), 0.1)
    tenths[0, 2] = np.where(np.arange(10) % 3 == 0, 0.7, 0.1)
    huge = np.array([[[1e30, -1e30, 3e29, 0.0, 1e29], [1, 2, 3, 4, 5], [0.5, 0, 0, 1, 0], [-1, 1, 2, -2, 3]]])
    binary = (rng.random((1, 4, 5)) < 0.5).astype(float)
    return {k: f32(v) for k, v in dict(plain=plain, pair=pair, absent=absent, flat=flat, tenths=tenths, huge=huge,
                                       binary=binary, single=rng.standard_normal((1, 4, 1))).items()}  # fmt: skip


def advantage_cases():
    """Yields (case name, trainer, table, options, weights)."""
    grpo = {"group": {}, "batch": {"scale_rewards": "batch"}, "none": {"scale_rewards": "none"},
            "gdpo": {"multi_objective_aggregation": "normalize_then_sum"}}  # fmt: skip
    for name, options in grpo.items():
        for table in ("plain", "pair", "absent", "flat", "binary", "single"):
            yield f"{name}/{table}", "grpo", table, options, [1.0, 0.5] if table in ("absent", "flat") else None
        for table in ("tenths", "huge"):
            yield f"{name}/{table}32", "grpo", table, options | {"dtype": "float32"}, None
    clipped, normalized = {"reward_clip_range": (-0.5, 0.75)}, {"normalize_advantages": True}
    no_kl, kl = {"beta": 0.0}, {"beta": 0.1}  # the default of RLOOConfig is 0.05
    rloo = {"plain": no_kl, "normalized": no_kl | normalized, "clipped": no_kl | clipped, "kl": kl,
            "clipped_kl": kl | clipped}  # fmt: skip
    for name, options in rloo.items():
        for table in ("plain", "absent", "flat", "binary"):
            yield f"rloo_{name}/{table}", "rloo", table, options, [1.0, 0.5] if table in ("absent", "flat") else None
