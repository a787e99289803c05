"""What is learned and how, as tables of the configuration: the algorithm, the optimizers, the critic."""

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    create_model,
    field_validator,
    model_validator,
)

from grpo_jax.algo.spec import PRESETS, Advantage, Estimator, LossConfig, Preset, Surrogate, Weight
from grpo_jax.config.fields import shown

Schedule = Literal["constant", "linear", "cosine"]

LARGEST = 2**31 - 1
"""Of a whole number: what an array's axis can have, and a count of steps on a device."""
Count = Annotated[int, Field(gt=0, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Whole = Annotated[int, Field(le=LARGEST)]


class Section(BaseModel):
    """A frozen table of the configuration that refuses fields it does not know, and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _name_or_function(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, str) and (value in names or ":" in value):
        return value
    raise ValueError(
        f"got {shown(value)}, which is none of its values. It takes {', '.join(names)}, or a function of your own as "
        "module:function or path/file.py:function."
    )


class LossTable(Section):
    """What the fields of LossConfig cannot check of themselves; in its bounds infinity is none."""

    model_config = ConfigDict(allow_inf_nan=True)

    @field_validator("surrogate", check_fields=False)
    @classmethod
    def _known_surrogate(cls, value: Any) -> Any:
        return _name_or_function(value, get_args(Surrogate))


def _loss_section() -> type[LossTable]:
    """LossConfig's fields as a table, documented from its metadata; the run itself knows the completion length."""
    types = get_type_hints(LossConfig) | {"surrogate": Surrogate | str}
    fields = [f for f in dataclasses.fields(LossConfig) if f.name != "max_completion_len"]
    declared: Any = {f.name: (types[f.name], Field(f.default, description=f.metadata["doc"])) for f in fields}
    return create_model("LossSection", __base__=LossTable, __doc__="The loss, field by field.", **declared)


LossSection = _loss_section()


class AdaptiveKLConfig(Section):
    """A KL coefficient that holds the KL at a target; algorithm.loss.kl_coef is where it starts (1909.08593)."""

    target: PositiveFloat | None = None
    """KL to hold, nat per sequence; none: the coefficient stays."""
    horizon: PositiveFloat = 10_000.0
    """Completions over which the coefficient may change by a factor of about e at full error."""


class AdaptiveEntropyConfig(Section):
    """An entropy bonus that is on while the entropy is low; algorithm.loss.entropy_coef is where it starts."""

    target: PositiveFloat | None = None
    """Entropy to hold, nat per token; none: the coefficient stays (Skywork-OR1, 2505.22312: 0.2)."""
    delta: PositiveFloat = 0.005
    """Change of the coefficient per step."""
    low: NonNegativeFloat = 0.0
    """Least coefficient."""
    high: NonNegativeFloat = 1.0
    """Largest coefficient."""


class ReferenceFollowConfig(Section):
    """A reference model that follows the policy (2404.09656)."""

    every: Count | None = None
    """Optimizer updates between two moves; none: the reference stays what the run started from (TRL: 512)."""
    alpha: float = Field(default=0.6, gt=0, le=1)
    """Weight of the policy in a move; the old reference keeps the rest."""


class AlgorithmConfig(Section):
    """The algorithm: a preset, and what is to differ from it."""

    preset: Preset = "grpo"
    """Named recipe; it fills every field of this table and of algorithm.loss that is not given."""
    advantage: Advantage | str = "grpo"
    """How rewards [Q, G] become advantages; docs/MATH.md, section 1. gae trains a critic (table critic). Or a function
    of your own, f(rewards, scored, algo.Options) -> advantages, all [Q, G], pure and traceable, as module:function or
    path/file.py:function."""
    ddof: Literal[0, 1] = 1
    """Degrees of freedom taken from the count in a group's standard deviation."""
    eps: NonNegativeFloat = 1e-4
    """Added to a group's standard deviation, in units of reward."""
    weight: Weight = "samples"
    """What has one weight where reinforce_pp whitens: samples, or tokens (verl, NeMo), by completion length."""
    pass_k: Count | None = None
    """The k of pass_at_k, at most rollout.num_samples (2508.10751)."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token of gae (1506.02438)."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of gae, the weight of longer returns (1506.02438)."""
    whiten: bool = False
    """Whiten the advantages of gae over all trained tokens of a rollout."""
    reward_clip: PositiveFloat | None = None
    """Clip weighted rewards to plus and minus this, before shaping; none: off."""
    advantage_clip: PositiveFloat | None = None
    """Clip advantages, after normalisation, to plus and minus this; none: off."""
    overlong_filter: bool = False
    """Leave completions that were cut at the limit out of the loss."""
    soft_overlong: bool = False
    """Add DAPO's penalty, 0 to -1, to the reward of completions near rollout.max_new_tokens."""
    overlong_buffer_len: Count | None = None
    """Length of the soft overlong ramp in tokens; none: a fifth of rollout.max_new_tokens."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards do not differ and sample on until the batch is full (DAPO)."""
    max_rounds: Count = 4
    """Rounds of sampling a step may take under dynamic_sampling; then it trains on what there is."""
    spread_of: str | None = None
    """Reward function whose answers must differ under dynamic_sampling; none: the weighted sum of all."""
    loss: LossSection = LossSection()  # type: ignore[valid-type]
    adaptive_kl: AdaptiveKLConfig = AdaptiveKLConfig()
    adaptive_entropy: AdaptiveEntropyConfig = AdaptiveEntropyConfig()
    reference_follow: ReferenceFollowConfig = ReferenceFollowConfig()

    @field_validator("advantage")
    @classmethod
    def _known_advantage(cls, value: Any) -> Any:
        return _name_or_function(value, (*get_args(Estimator), "gae"))

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset", "grpo") if isinstance(values, dict) else None
        recipe = PRESETS.get(preset) if isinstance(preset, str) else None  # type: ignore[call-overload]
        if recipe is None:
            return values  # the field's own check names the legal presets
        own = {name: getattr(recipe, name) for name in cls.model_fields if hasattr(recipe, name) and name != "loss"}
        loss = {name: getattr(recipe.loss, name) for name in LossSection.model_fields}
        given = values.get("loss", {})
        if isinstance(given, dict) and given.get("kl_coef") == 0:
            loss["kl_in_reward"] = False  # who switches the KL off does not mean to be asked where it is
        return own | values | {"loss": loss | given if isinstance(given, dict) else given}

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained besides."""
        return self.advantage == "gae"

    @property
    def waits_for_learner(self) -> bool:
        """Whether advantages are made of what the learner computes: a critic's values, or the KL in the reward."""
        return self.has_critic or self.loss.kl_in_reward  # type: ignore[attr-defined]


class AdamWConfig(Section):
    """AdamW behind a global-norm clip."""

    learning_rate: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0 with the last update."""
    warmup_steps: Natural = 0
    """Updates over which the learning rate rises linearly from 0."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Global norm to which the gradient is clipped."""


class OptimConfig(AdamWConfig):
    """The policy's optimizer, and how a rollout is cut into updates."""

    epochs: Count = 1
    """Passes over each rollout (mu)."""
    minibatches: Count = 1
    """Optimizer updates in each pass; each takes an equal share of the prompts."""
    microbatch_rows: Count | None = None
    """Completions whose activations are alive at once, none: all; in rows that hold several, the rows of so many at
    full length. Changes memory, never the gradient."""


class CriticConfig(AdamWConfig):
    """The critic of algorithm.advantage = "gae" and its optimizer: updated as often as the policy, on the same rows."""

    learning_rate: NonNegativeFloat = 1e-5
    """Peak learning rate; on a shared trunk that of the value head alone."""
    shared_trunk: bool = False
    """Put the value head on the policy's own hidden states instead of on a copy of the transformer."""
    value_coef: NonNegativeFloat = 0.1
    """Factor on the value loss's gradient into a shared trunk (TRL: 0.1); 0: the head alone learns."""
    value_clip: PositiveFloat | None = 0.2
    """Half-width of the band around the old values outside which a value no longer learns; none: off (1707.06347)."""
