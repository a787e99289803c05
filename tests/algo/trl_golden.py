"""What TRL 1.16 computed (trl_golden.npz, made by scripts/make_trl_golden.py), and its options said in ours."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import algo

from .cases import x64

_FILE = np.load(Path(__file__).with_name("trl_golden.npz"))
ARRAYS = {name: _FILE[name] for name in _FILE.files}
META = json.loads(str(ARRAYS.pop("meta")))
MAX_COMPLETION_LEN = 11

AGGREGATION = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "sapo": "seq_mean_token_mean",
    "luspo": "seq_mean_token_sum",
    "vespo": "token_mean",
    "gmpo": "seq_mean_token_mean",
}
CORRECTION = {
    "token_truncate": "tis",
    "token_mask": "icepop",
    "sequence_truncate": "seq_tis",
    "sequence_mask": "seq_mask",
}
ESTIMATOR = {"group": "grpo", "batch": "lite_ppo", "none": "dr_grpo"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of TRL's loss: what it was given and what it returned, [N, T] but for loss, which is per microbatch."""

    name: str
    options: dict
    dtype: str
    metrics: dict
    logp: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray
    entropy: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray
    advantages: np.ndarray
    loss: np.ndarray
    grad: np.ndarray
    grad_entropy: np.ndarray

    @property
    def kind(self):
        """TRL's loss_type; gmpo and rloo are trainers of their own there."""
        return self.name.split("/")[0]

    @property
    def corrected(self):
        return self.options.get("use_vllm", False) and self.options.get("vllm_importance_sampling_correction", True)

    @property
    def beta(self):
        return self.options.get("beta", 0.0)

    @property
    def counts(self):
        """Trained tokens per row, at least 1: [N, 1]."""
        return np.maximum(self.mask.sum(1, keepdims=True), 1)

    @property
    def parts(self):
        """The rows of each microbatch."""
        return np.split(np.arange(len(self.mask)), int(np.isfinite(self.loss).sum()))

    @property
    def total(self):
        """The sum of TRL's microbatch losses: its loss of the step when they are accumulated into one."""
        return np.nansum(self.loss)

    @property
    def weights(self):
        """What the aggregation multiplies each per-token loss with, [N, T], written from MATH.md section 5."""
        m = self.mask.astype(float)
        return {
            "token_mean": m / max(m.sum(), 1),
            "seq_mean_token_mean": m / self.counts / len(m),
            "seq_mean_token_sum": m / len(m),
            "constant": m / (len(m) * MAX_COMPLETION_LEN),
        }[AGGREGATION[self.kind]]


def load_case(name):
    record = META["loss"][name]
    source = "main" if record["batch"] == "onpolicy" else record["batch"]
    batch = {k: ARRAYS[f"batch/{source}/{k}"] for k in ("logp", "old", "ref", "sampler", "entropy", "rewards")}
    options = record["options"]
    if (options.get("num_iterations") == 1 and not options.get("use_vllm")) or record["batch"] == "onpolicy":
        batch["old"] = batch["logp"]
    out = {k: ARRAYS[f"loss/{k}"][record["index"]] for k in ("mask", "advantages", "loss", "grad", "grad_entropy")}
    return Case(name, options, record["dtype"], record["metrics"], **batch, **out)


CASES = {name: load_case(name) for name in META["loss"]}


def clip_fields(case):
    options = case.options
    low = options.get("epsilon", 0.4 if case.kind == "gmpo" else 0.2)
    high = options.get("epsilon_high")
    if case.kind == "cispo":  # TRL bounds the ratio by epsilon_high itself, from above only; ours by 1 + clip_high
        return {"clip_low": None, "clip_high": high - 1.0}
    return {"clip_low": low, "clip_high": low if high is None else high, "delta": options.get("delta")}


def correction_fields(case):
    if not case.corrected:
        return {}
    low, high = (case.options[f"vllm_importance_sampling_clip_{end}"] for end in ("min", "max"))
    # None is no bound in TRL; in LossConfig it is the correction's own default.
    return {
        "correction": CORRECTION[case.options["vllm_importance_sampling_mode"]],
        "correction_low": 0.0 if low is None else low,
        "correction_high": math.inf if high is None else high,
    }


def config_of(case, **over):
    """The LossConfig that says what TRL's options say."""
    options, kind = case.options, case.kind
    fields = {"aggregation": AGGREGATION[kind], "kl_coef": case.beta}
    fields["surrogate"] = kind if kind in ("cispo", "sapo", "vespo", "gmpo") else "ppo_clip"
    fields["ratio_level"] = options.get("importance_sampling_level", "token")
    unbiased = options.get("use_bias_correction_kl", True) and kind != "gmpo"  # TRL's GMPO trainer has k3 alone
    fields["kl_estimator"] = "k3_unbiased" if unbiased else "k3"
    fields["off_policy_threshold"] = options.get("off_policy_mask_threshold")
    fields["entropy_top"] = options.get("top_entropy_quantile", 1.0)
    fields["entropy_coef"] = options.get("entropy_coef", 0.0)
    if kind not in ("sapo", "vespo"):
        fields |= clip_fields(case)
    if fields["aggregation"] == "constant":
        fields["max_completion_len"] = MAX_COMPLETION_LEN
    for sign in ("pos", "neg"):
        if f"sapo_temperature_{sign}" in options:
            fields[f"sapo_tau_{sign}"] = options[f"sapo_temperature_{sign}"]
        fields |= {k: options[k] for k in (f"vespo_k_{sign}", f"vespo_lambda_{sign}") if k in options}
    return algo.LossConfig(**(fields | correction_fields(case) | over))


def ours(case, config=None, rows=None, step=None, **over):
    """(loss, gradient in logp, gradient in entropy) of policy_loss.

    `rows` is a microbatch: the other rows are masked, which costs no other shape to compile. Denominators are counted
    over the rows `step`, by default those of the microbatch.
    """
    config = config_of(case) if config is None else config
    with x64():
        given = {name: jnp.asarray(over.get(name, getattr(case, name)), case.dtype) for name in _FLOATS}
        mask, denominators = jnp.asarray(case.mask), None
        if rows is not None:
            denominators = algo.denominators(config, mask[rows if step is None else step])
            mask = mask & jnp.isin(jnp.arange(len(mask)), rows)[:, None]

        def loss(logp, entropy):
            return algo.policy_loss(
                logp,
                given["old"],
                given["advantages"],
                mask,
                config=config,
                ref_logp=given["ref"] if config.kl_coef else None,
                sampler_logp=given["sampler"] if case.options.get("use_vllm") else None,
                entropy=entropy if config.entropy_coef or config.entropy_top < 1 else None,
                denominators=denominators,
            )

        (value, _), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(given["logp"], given["entropy"])
        return float(value), *(np.asarray(g, np.float64) for g in grads)


def our_metrics(case):
    """{name: sum / count} of policy_loss on a whole step."""
    with x64():
        given = [jnp.asarray(x) for x in (case.logp, case.old, case.advantages, case.mask)]
        more = {"ref_logp": jnp.asarray(case.ref), "entropy": jnp.asarray(case.entropy)}
        _, metrics = algo.policy_loss(*given, config_of(case), **more)
        return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


_FLOATS = ("logp", "old", "ref", "sampler", "entropy", "advantages")


def ours_by_part(case, config=None, step=None):
    """The same in the microbatches TRL took: losses one by one, gradients summed."""
    found = [ours(case, config, rows, step) for rows in case.parts]
    return np.array([f[0] for f in found]), *(sum(f[i] for f in found) for i in (1, 2))


def ours_accumulated(case, config=None):
    """The microbatches accumulated into one step: denominators counted over all rows, losses summed."""
    losses, *grads = ours_by_part(case, config, step=slice(None))
    return losses.sum(), *grads


def same(got, want, dtype="float64"):
    """float64: equal to 1e-11 relative, 1e-13 absolute. float32: to 2e-6 of the largest value."""
    want = np.asarray(want)
    if dtype == "float64":
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)
    else:
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(np.abs(want).max(), 1e-30))


def combine(rewards, weights):
    """[F, Q, G] with NaN for no answer -> (weighted sum over what answered [Q, G], whether any did)."""
    weights = np.ones(len(rewards)) if weights is None else np.asarray(weights)
    return np.nansum(rewards * weights[:, None, None], axis=0), ~np.isnan(rewards).all(axis=0)


@functools.cache
def _jitted():
    return jax.jit(algo.group_advantages, static_argnames=("estimator", "ddof", "eps"))


def group_advantages(rewards, dtype="float64", **options):
    """algo.group_advantages under jit, whose few compilations are quicker than op by op."""
    with x64():
        options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        return np.asarray(_jitted()(jnp.asarray(rewards, dtype), **options), np.float64)
