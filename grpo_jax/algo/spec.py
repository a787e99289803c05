"""Every legal name, the loss's configuration, the recipes and the presets. Standard library only: no jax here.

The names are Literals; the tables of algo/ have exactly these keys (a test holds them equal). A `LossConfig` says all
that `policy_loss` may do; a `Recipe` adds what happens before it: the advantage, the sampling, the reward shaping.
Each field carries its documentation in `metadata["doc"]`, from which the command line's help is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from grpo_jax.algo.refusals import (
    CORRECTION_BOUNDS,
    check_clips,
    check_correction,
    check_levels,
    check_name,
    check_number,
    check_ranges,
    check_rest,
    refuse,
)

Surrogate = Literal["reinforce", "ppo_clip", "cispo", "sapo", "gmpo", "vespo", "clip_cov", "kl_cov", "dppo"]
RatioLevel = Literal["token", "sequence", "sequence_token"]
KLEstimator = Literal["k1", "k2", "k3", "abs", "k1_plus", "k3_plus", "k1_unbiased", "k3_unbiased"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]
Correction = Literal["tis", "icepop", "seq_tis", "seq_mask", "geo_tis", "geo_mask", "geo_gate"]
Estimator = Literal[
    "raw",
    "batch_mean",
    "grpo",
    "dr_grpo",
    "lite_ppo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "opo",
    "gpg",
    "maxrl",
    "pass_at_k",
    "gdpo",
]
Advantage = Literal[Estimator, "gae"]
Weight = Literal["samples", "tokens"]
Preset = Literal[
    "reinforce",
    "reinforce_baseline",
    "ppo",
    "grpo",
    "dr_grpo",
    "bnpo",
    "dapo",
    "gspo",
    "gspo_token",
    "luspo",
    "cispo",
    "sapo",
    "gmpo",
    "vespo",
    "rloo",
    "reinforce_pp",
    "remax",
    "opo",
    "lite_ppo",
    "gpg",
    "gdpo",
]


def _field(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What `policy_loss` computes: frozen, hashable (a static argument of jit), printable, each field documented.

    Raises:
      ValueError: for a name that does not exist, a number out of range, or a combination that means nothing.
    """

    surrogate: Surrogate | Callable[..., Any] = _field(
        "ppo_clip",
        "Per-token surrogate of the policy term; MATH.md section 3 gives the formulas. Or a function of your own, "
        "f(algo.Inputs, LossConfig) -> loss [N, T] to minimise, pure and traceable.",
    )
    ratio_level: RatioLevel = _field(
        "token",
        "What the ratio is of: token; sequence, exp of the mean log-ratio (GSPO, 2507.18071); "
        "sequence_token, its value with per-token gradients.",
    )
    clip_low: float | None = _field(
        0.2,
        "Lower clip width, at least 0; none: no bound. Ratio 1 - clip_low; gmpo: log-ratio -clip_low; "
        "dppo: fall in probability. Unused by reinforce, sapo, vespo, kl_cov.",
    )
    clip_high: float | None = _field(
        0.2,
        "Upper clip width, at least 0; none: no bound. Ratio 1 + clip_high; gmpo: log-ratio; dppo: rise in "
        "probability. DAPO's clip-higher is 0.28 (2503.14476). Unused by reinforce, sapo, vespo, kl_cov.",
    )
    delta: float | None = _field(
        None,
        "Cap on the ratio in the unclipped branch of ppo_clip, at least 1 + clip_high; none: no cap "
        "(INTELLECT-2, 2505.07291).",
    )
    dual_clip: float | None = _field(
        None,
        "Dual clip c > 1 of ppo_clip: for A < 0 the term is at most -c A; usual value 3; none: off (1912.09729).",
    )
    sapo_tau_pos: float = _field(1.0, "Temperature of sapo's gate for A > 0, above 0 (2511.20347).")
    sapo_tau_neg: float = _field(1.05, "Temperature of sapo's gate for A <= 0, above 0 (2511.20347).")
    vespo_k_pos: float = _field(2.0, "Power k of vespo's weight for A >= 0, at least 0 (2602.10693).")
    vespo_lambda_pos: float = _field(3.0, "Decay lambda of vespo's weight for A >= 0, at least 1e-4 (2602.10693).")
    vespo_k_neg: float = _field(3.0, "Power k of vespo's weight for A < 0, at least 0 (2602.10693).")
    vespo_lambda_neg: float = _field(2.0, "Decay lambda of vespo's weight for A < 0, at least 1e-4 (2602.10693).")
    clip_cov_share: float = _field(
        2e-4, "Share of the step's trained tokens that clip_cov leaves out, in (0, 1] (2505.22617)."
    )
    clip_cov_low: float = _field(
        1.0, "clip_cov draws among tokens of covariance above this, reward times nat (2505.22617)."
    )
    clip_cov_high: float = _field(
        5.0, "clip_cov draws among tokens of covariance below this, reward times nat (2505.22617)."
    )
    kl_cov_share: float = _field(
        2e-4, "Share of the step's trained tokens that kl_cov penalises, in (0, 1] (2505.22617)."
    )
    kl_cov_coef: float = _field(1.0, "Coefficient of |log-ratio| on the tokens kl_cov picks, at least 0 (2505.22617).")
    kl_coef: float = _field(
        0.0, "Coefficient beta of the KL to the reference model, per nat, at least 0; 0: no reference model is kept."
    )
    kl_estimator: KLEstimator = _field(
        "k3",
        "Estimator of the KL in the loss; MATH.md section 4 says what the gradient of each estimates. "
        "With kl_in_reward it is k1 always.",
    )
    kl_in_reward: bool = _field(
        False, "Take kl_coef times the summed k1 from the reward instead of adding the KL to the loss; never both."
    )
    aggregation: Aggregation = _field(
        "token_mean", "How per-token losses become one number; denominators are those of the whole optimizer step."
    )
    max_completion_len: int | None = _field(
        None, "Completion length, tokens, that the constant aggregation divides by; needed by it alone (2503.20783)."
    )
    correction: Correction | None = _field(
        None,
        "Importance weight pi_old / pi_sampler on the policy term, truncated (tis, seq_tis, geo_tis) or rejecting "
        "(icepop, seq_mask, geo_mask, geo_gate); none: off.",
    )
    correction_low: float | None = _field(
        None, "Lower bound of the correction's weight, at least 0; none: that correction's own default."
    )
    correction_high: float | None = _field(
        None, "Upper bound of the correction's weight, above 0; none: that correction's own default."
    )
    veto: float | None = _field(
        None,
        "Give weight 0 to a sequence with any trained token of pi_old / pi_sampler below this; none: off; "
        "verl uses 1e-4.",
    )
    off_policy_threshold: float | None = _field(
        None,
        "Drop the policy term of sequences with A < 0 whose mean log(pi_sampler / pi), nat per token, exceeds this; "
        "none: off (DeepSeek-V3.2, 2512.02556).",
    )
    entropy_top: float = _field(
        1.0,
        "Share of the step's trained tokens, highest entropy first, that keep the policy term, in (0, 1] (2506.01939).",
    )
    entropy_coef: float = _field(
        0.0, "Coefficient of the entropy bonus, per nat; the bonus is a mean over trained tokens."
    )

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not callable(self.surrogate):
            check_name("surrogate", self.surrogate, Surrogate)
        check_name("ratio_level", self.ratio_level, RatioLevel)
        check_name("kl_estimator", self.kl_estimator, KLEstimator)
        check_name("aggregation", self.aggregation, Aggregation)
        if self.correction is not None:
            check_name("correction", self.correction, Correction)
        for check in (check_levels, check_ranges, check_clips, check_correction, check_rest):
            check(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LossConfig:
        """Return the loss part of `PRESETS[name]` with some fields replaced.

        Raises:
          ValueError: no such preset, no such field, or a combination that means nothing.
        """
        check_name("preset", name, Preset)
        known = [f.name for f in dataclasses.fields(cls)]
        for field in overrides:
            if field not in known:
                raise refuse(
                    f"{field}={overrides[field]!r}", "LossConfig has no such field", f"Use one of {', '.join(known)}"
                )
        return dataclasses.replace(PRESETS[name].loss, **overrides)

    @property
    def has_ratio(self) -> bool:
        """Whether the surrogate looks at old_logp; without, a rollout gives one update only."""
        return self.surrogate != "reinforce"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss holds a KL term, so that `policy_loss` needs ref_logp."""
        return self.kl_coef != 0 and not self.kl_in_reward

    @property
    def chooses(self) -> bool:
        """Whether some tokens are picked by a statistic of the whole optimizer step (contract 5)."""
        return self.surrogate in ("clip_cov", "kl_cov") or self.entropy_top < 1

    @property
    def correction_bounds(self) -> tuple[float | None, float | None]:
        """The bounds (low, high) that the correction uses, its defaults filled in; None is no bound."""
        low, high = CORRECTION_BOUNDS.get(self.correction or "", (None, None))
        return (
            low if self.correction_low is None else self.correction_low,
            high if self.correction_high is None else self.correction_high,
        )

    def check_updates(self, updates_per_rollout: int) -> None:
        """Raise ValueError if this loss can't take that many optimizer steps on one rollout."""
        if updates_per_rollout > 1 and not self.has_ratio:
            raise refuse(
                f"surrogate={self.surrogate!r} with {updates_per_rollout} updates per rollout",
                "it holds no ratio, so from the second update on its gradient is not that of the policy that sampled",
                "Use one update per rollout or surrogate='ppo_clip'",
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole algorithm: advantage, loss, sampling, reward shaping. Frozen, hashable, printable, each field documented.

    Raises:
      ValueError: for a name that does not exist, a number out of range, or a combination that means nothing.
    """

    name: str = _field("custom", "The recipe's name, for logs and tables.")
    advantage: Advantage = _field(
        "grpo", "Estimator of the advantage; MATH.md section 1 gives the formulas. gae needs a critic."
    )
    loss: LossConfig = _field(LossConfig(), "The loss part: everything `policy_loss` is told.")
    ddof: int = _field(1, "Degrees of freedom taken from the count in standard deviations: 1 (TRL, verl) or 0.")
    eps: float = _field(1e-4, "Added to the group's standard deviation, in units of reward, at least 0 (TRL).")
    weight: Weight = _field(
        "samples",
        "What one weight goes to when reinforce_pp whitens: samples, or tokens (verl, NeMo), by completion length.",
    )
    whiten: bool = _field(False, "gae: whiten the advantages over all trained tokens of the rollout.")
    gamma: float = _field(1.0, "gae: discount per token, in [0, 1] (1506.02438).")
    lam: float = _field(0.95, "gae: lambda, the weight of longer returns, in [0, 1] (1506.02438).")
    pass_k: int | None = _field(None, "pass_at_k: k, at least 1 and at most the samples per prompt (2508.10751).")
    dynamic_sampling: bool = _field(
        False, "Sample on until every kept group has rewards that differ (DAPO, 2503.14476)."
    )
    soft_overlong: bool = _field(
        False, "Add DAPO's penalty, 0 to -1, for completions near the length limit (2503.14476)."
    )
    overlong_filter: bool = _field(False, "Leave completions cut by the length limit out of the loss (2503.14476).")
    reward_clip: float | None = _field(None, "Clip rewards after weighting to plus and minus this; none: off.")
    advantage_clip: float | None = _field(
        None, "Clip advantages after normalisation to plus and minus this; none: off."
    )
    source: str = _field("", "Where the recipe was published, and which of its numbers are ours.")

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_name("advantage", self.advantage, Advantage)
        check_name("weight", self.weight, Weight)
        if self.ddof not in (0, 1):
            raise refuse(f"ddof={self.ddof!r}", "a standard deviation takes 0 or 1 from the count", "Use 1 or 0")
        check_number(self, "eps", low=0.0)
        check_number(self, "gamma", low=0.0, high=1.0)
        check_number(self, "lam", low=0.0, high=1.0)
        check_number(self, "reward_clip", low=0.0, open_low=True)
        check_number(self, "advantage_clip", low=0.0, open_low=True)
        if self.advantage == "pass_at_k" and self.pass_k is None:
            raise refuse("advantage='pass_at_k' without pass_k", "the estimator is about the best of k", "Give pass_k")
        if self.pass_k is not None and self.pass_k < 1:
            raise refuse(
                f"pass_k={self.pass_k!r}", "the best of fewer than one sample does not exist", "Use at least 1"
            )

    @property
    def critic(self) -> bool:
        """Whether the recipe needs a value head."""
        return self.advantage == "gae"

    @property
    def greedy_baseline(self) -> bool:
        """Whether the recipe needs one greedy completion per prompt."""
        return self.advantage == "remax"

    def check_run(self, *, group_size: int, updates_per_rollout: int = 1, has_critic: bool = False) -> None:
        """Raise ValueError for what this recipe can't do in a run of this shape.

        Args:
          group_size: G, samples per prompt.
          updates_per_rollout: optimizer steps taken on one rollout.
          has_critic: whether the model has a value head.
        """
        self.loss.check_updates(updates_per_rollout)
        if self.critic and not has_critic:
            raise refuse(
                "advantage='gae' without a critic",
                "it is made of the values a critic gives",
                "Give the model a value head or choose an advantage over groups, such as 'grpo'",
            )
        if self.advantage == "pass_at_k" and self.pass_k is not None and self.pass_k > group_size:
            raise refuse(
                f"pass_k={self.pass_k} with {group_size} samples per prompt",
                "there is no subset of k samples in a smaller group",
                "Lower pass_k or sample more per prompt",
            )


_RECIPES = (
    Recipe(
        name="reinforce",
        advantage="raw",
        loss=LossConfig(surrogate="reinforce", aggregation="seq_mean_token_sum"),
        source="Williams 1992",
    ),
    Recipe(
        name="reinforce_baseline",
        advantage="batch_mean",
        loss=LossConfig(surrogate="reinforce", aggregation="seq_mean_token_sum"),
        source="Williams 1992; baseline: the batch's mean reward",
    ),
    Recipe(
        name="ppo",
        advantage="gae",
        loss=LossConfig(clip_low=0.2, clip_high=0.2),
        whiten=True,
        source="1707.06347, 1506.02438; lambda 0.95 and whitening as in common RLHF code",
    ),
    Recipe(
        name="grpo",
        advantage="grpo",
        loss=LossConfig(kl_coef=0.04, kl_estimator="k3", aggregation="seq_mean_token_mean"),
        source="2402.03300; the clip width is ours",
    ),
    Recipe(
        name="dr_grpo",
        advantage="dr_grpo",
        loss=LossConfig(aggregation="constant", max_completion_len=3000),
        source="2503.20783, with its length limit of 3000 tokens: replace max_completion_len by the run's own",
    ),
    Recipe(
        name="bnpo",
        advantage="grpo",
        loss=LossConfig(),
        source="TRL's loss of that name, its mean over a microbatch made the step's",
    ),
    Recipe(
        name="dapo",
        advantage="grpo",
        loss=LossConfig(clip_low=0.2, clip_high=0.28),
        dynamic_sampling=True,
        soft_overlong=True,
        source="2503.14476; overlong filtering is off, as soft overlong replaces it",
    ),
    Recipe(
        name="gspo",
        advantage="grpo",
        loss=LossConfig(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="seq_mean_token_mean"),
        source="2507.18071",
    ),
    Recipe(
        name="gspo_token",
        advantage="grpo",
        loss=LossConfig(ratio_level="sequence_token", clip_low=3e-4, clip_high=4e-4, aggregation="seq_mean_token_mean"),
        source="2507.18071",
    ),
    Recipe(
        name="luspo",
        advantage="grpo",
        loss=LossConfig(ratio_level="sequence", clip_low=2e-3, clip_high=2.5e-3, aggregation="seq_mean_token_sum"),
        source="2602.05261",
    ),
    Recipe(
        name="cispo",
        advantage="grpo",
        loss=LossConfig(surrogate="cispo", clip_low=None, clip_high=4.0),
        source="2506.13585; it states no upper bound, 4.0 (a ratio of 5) is TRL's",
    ),
    Recipe(
        name="sapo",
        advantage="grpo",
        loss=LossConfig(surrogate="sapo", aggregation="seq_mean_token_mean"),
        source="2511.20347",
    ),
    Recipe(
        name="gmpo",
        advantage="grpo",
        loss=LossConfig(surrogate="gmpo", clip_low=0.4, clip_high=0.4, aggregation="seq_mean_token_mean"),
        source="2507.20673",
    ),
    Recipe(name="vespo", advantage="grpo", loss=LossConfig(surrogate="vespo"), source="2602.10693"),
    Recipe(
        name="rloo",
        advantage="rloo",
        loss=LossConfig(
            surrogate="reinforce",
            kl_coef=0.05,
            kl_estimator="k1",
            kl_in_reward=True,
            aggregation="seq_mean_token_sum",
        ),
        source="2402.14740; the KL coefficient is TRL's",
    ),
    Recipe(
        name="reinforce_pp",
        advantage="reinforce_pp",
        loss=LossConfig(kl_coef=0.01, kl_estimator="k1", kl_in_reward=True),
        source="2501.03262",
    ),
    Recipe(
        name="remax",
        advantage="remax",
        loss=LossConfig(surrogate="reinforce", aggregation="seq_mean_token_sum"),
        source="2310.10505; one greedy completion per prompt is sampled besides",
    ),
    Recipe(name="opo", advantage="opo", loss=LossConfig(surrogate="reinforce"), source="2505.23585"),
    Recipe(name="lite_ppo", advantage="lite_ppo", loss=LossConfig(), source="2508.08221"),
    Recipe(name="gpg", advantage="gpg", loss=LossConfig(surrogate="reinforce"), source="2504.02546"),
    Recipe(
        name="gdpo",
        advantage="gdpo",
        loss=LossConfig(aggregation="seq_mean_token_mean"),
        source="2601.05242; the clip width is ours",
    ),
)

PRESETS: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
"""Every preset of MATH.md section 7 by name; printing one shows all there is to it."""
