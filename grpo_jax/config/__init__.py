"""The configuration of a run: pydantic models, TOML files, no jax.

Every field's docstring is its help on the command line. TOML has no null, so an optional field is switched off by
the string "none", in files and on the command line.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from grpo_jax.algo.spec import LossConfig
from grpo_jax.config.fields import WHOLE, explain
from grpo_jax.config.learning import AlgorithmConfig, Count, CriticConfig, Natural, OptimConfig, Section, Whole
from grpo_jax.config.refusals import refusals
from grpo_jax.functions import load_function

Dtype = Literal["float32", "bfloat16"]


class LoraConfig(Section):
    """Low-rank adapters, which alone are trained: W + alpha / rank * B A on some linear maps of each layer."""

    rank: Count | None = None
    """Inner width of an adapter; none trains all parameters."""
    alpha: PositiveFloat = 32.0
    """Their product is scaled by alpha / rank."""
    targets: tuple[Literal["q", "k", "v", "out", "gate", "up", "down"], ...] = (
        "q",
        "k",
        "v",
        "out",
        "gate",
        "up",
        "down",
    )
    """Linear maps that have adapters; a mixture of experts takes those of attention: q, k, v, out."""


class ModelConfig(Section):
    """The model and its arithmetic."""

    path: str = "quickstart"
    """Directory of a Hugging Face checkpoint, or a hub id "owner/name"; "quickstart" is the model the package ships."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; none: its main branch."""
    dtype: Dtype = "float32"
    """Type of the computation."""
    param_dtype: Dtype = "float32"
    """Type of the parameters that the optimizer updates, and of its moments; bfloat16 is rounded at random, so that
    small updates add up."""
    matmul_precision: Literal["default", "high", "highest"] | None = None
    """Precision of every matrix product; none: highest for float32, default for bfloat16."""
    remat: Literal["full", "attention"] | None = None
    """What the backward pass computes again instead of storing; none stores everything."""
    router_coef: NonNegativeFloat = 0.0
    """Factor of the load-balance loss of a mixture of experts, over the trained tokens; other models have none."""
    lora: LoraConfig = LoraConfig()


class DataConfig(Section):
    """Prompts to train on and to be judged by."""

    train: str | dict[str, PositiveFloat] = "quickstart"
    """Training prompts: a .jsonl, .json, .csv or .parquet file, a directory that datasets' save_to_disk wrote, or a hub
    dataset "owner/name", "owner/name:split" or "owner/name/config:split"; "quickstart" is the file the package ships. A
    table of several, each with its weight, is a mixture: each draw takes a source with a chance in proportion to it."""
    eval: str | dict[str, str] | None = "quickstart"
    """Held-out prompts, named like data.train, or a table of several, each by a name of its own; none switches
    evaluation off."""
    prompt_column: str = "prompt"
    """Column that holds the prompt: a string, or a list of chat messages. A nested one has a dotted name."""
    prompt_template: str | None = None
    """Text that makes the prompt of a row, {column} standing for the row's value; none: the prompt column is it."""
    columns: tuple[str, ...] | None = None
    """Columns that the reward functions get, nested ones by dotted names; none: all but the prompt."""
    rename_columns: dict[str, str] = {}
    """Columns to rename where they are there, old name to new: solution to answer for a reward that reads "answer"."""
    as_messages: bool = False
    """Make a prompt that is a string a message of the user, for the chat template; false leaves it raw."""
    system_prompt: str | None = None
    """System message put before the messages of every prompt."""
    chat_template: str | None = None
    """File with a Jinja chat template; none: the tokenizer's own."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Arguments of the chat template, such as enable_thinking."""
    max_prompt_len: Count = 512
    """Longest prompt in tokens, as the model gets it; longer ones are never cut."""
    long_prompts: Literal["filter", "error"] = "filter"
    """What becomes of longer prompts: filter leaves them out and says how many, error ends the run before it begins."""
    shuffle: bool = True
    """Draw the rows of each epoch in an order of its own, fixed by the seed."""


class RolloutConfig(Section):
    """How completions are sampled."""

    prompts_per_step: Count = 32
    """Prompts of one step (Q)."""
    num_samples: Count = 8
    """Completions of each prompt (G); group-relative advantages need at least 2."""
    max_new_tokens: Count = 256
    """Longest completion in tokens, its stop token included."""
    temperature: float = Field(default=1.0, ge=0.01, allow_inf_nan=False)
    """Divides the logits, in the sampler and in the learner alike; near 0 only rounding would be left."""
    top_k: Count | None = None
    """Sample among the k most likely tokens only."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample among the fewest tokens that hold this probability together."""
    min_p: float | None = Field(default=None, gt=0, le=1)
    """Sample among the tokens at least this share as likely as the likeliest."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the positive and multiplies the negative logits of tokens in the text so far; 1 is none."""
    presence_penalty: FiniteFloat = 0.0
    """Taken from the logits of tokens in the completion so far; 0 is none."""
    min_tokens: Natural = 0
    """No stop token or stop string ends a completion before it has so many tokens."""
    stop_token_ids: tuple[Whole, ...] | None = None
    """Tokens that end a completion; none: those of the tokenizer, of config.json and of generation_config.json."""
    stop_strings: tuple[str, ...] = Field(default=(), json_schema_extra=WHOLE)
    """Texts that end a completion, with the token that completes them."""
    banned_token_ids: tuple[Whole, ...] = ()
    """Tokens that are never sampled."""
    slots: Count | None = None
    """Completions that decode at once, others wait in a queue; none: a step's all, or those that fit in memory."""
    kv_memory_mb: Count | None = None
    """MiB for keys and values on all devices; bounds the slots. none: what a GPU or TPU has left, no bound on CPUs."""
    layout: str = "train"
    """How the devices share sampling. train: as training, weights whole over fsdp. replicated: each has all weights and
    rows of its own. tensor=K: K devices share the weights and heads of the same rows."""
    schedule: Literal["auto", "cohort", "refill"] = "auto"
    """cohort: a step's completions start together. refill: freed slots are given on. auto: cohort where all fit."""
    kv_dtype: Literal["auto", "bfloat16", "int8"] = "auto"
    """Type in which decoding keeps keys and values; auto: model.dtype. Any other rounds what the sampler reads and the
    learner does not, so that algorithm.loss.correction is "tis" unless it is given."""
    attention: Literal["auto", "dense", "ragged", "buffered", "pallas"] = "auto"
    """How decoding reads keys and values. dense: all columns of the cache. ragged: those blocks of columns that some
    completion has come to. buffered: dense, the columns of the last steps kept apart. pallas: a kernel for GPUs, not
    yet run on one. auto: ragged on the CPU, buffered on a TPU, dense elsewhere."""


class RewardConfig(Section):
    """What a completion is paid for."""

    functions: tuple[str, ...] = ("quickstart",)
    """Built-in names, "module:function" or "path/file.py:function"; each runs in processes of its own. A run with its
    own model and data must name some."""
    options: dict[str, dict[str, Any]] = {}
    """Parameters of a function, by its name and theirs, such as regex.pattern; a function named twice is regex_2."""
    weights: tuple[FiniteFloat, ...] | None = None
    """One weight a function; none weighs each 1."""
    stream: tuple[str, ...] = ()
    """Functions, by name, to call on each group as soon as it is sampled, not once on all; built-ins always are."""
    timeout_seconds: PositiveFloat = 30.0
    """Longest time that 16 completions may take in a function before its process is killed; a call on more has it for
    every 16."""
    memory_limit_mb: Count | None = 2048
    """Memory of a function's process and all it starts, in MiB; none is no limit."""
    workers: Count = 1
    """Processes a function. With several, each that is given by name is called on at most 16 completions at a time."""
    environment: tuple[str, ...] = ()
    """Environment variables that a function's process gets although they look like tokens, keys or passwords, such as
    OPENAI_API_KEY for a judge."""


class BatchConfig(Section):
    """How completions are laid out in rows for training."""

    rows: Literal["padded", "packed", "group"] = "group"
    """group: a prompt once, then its samples. padded: one completion a row. packed: several, one behind the other."""
    row_len: Count | None = None
    """Most tokens in a group or packed row; none: the longest prompt and four completions, or twice the longest of both
    together."""


class StopConfig(Section):
    """When a run ends before its last step, by an evaluation in which more is better; off unless a limit is given."""

    metric: str = "eval/accuracy"
    """Figure of an evaluation, as metrics.jsonl names it."""
    patience: Count | None = None
    """End after so many evaluations in a row that were no better than the best before; none: never."""
    min_delta: NonNegativeFloat = 0.0
    """Gain over the best so far that counts as better."""
    at_least: FiniteFloat | None = None
    """End once the figure is at least this; none: never."""


class EvalConfig(Section):
    """Evaluation on held-out prompts."""

    every: Count | None = 10
    """Steps between evaluations; the first comes before step 0, the last after the final step. none: those two only."""
    prompts: Count | None = None
    """Evaluate on the first so many prompts; none on all."""
    samples: Natural = 0
    """Samples a prompt for avg@k and pass@k, drawn at rollout.temperature; 0 switches both off."""
    correct_above: float = 0.5
    """A completion is correct when the first reward function gives more than this."""
    stop: StopConfig = StopConfig()


class CheckpointConfig(Section):
    """What a run can be resumed from."""

    every: Count | None = 20
    """Steps between checkpoints; one is always written at the end. none: that one only."""
    keep: Count = 2
    """Checkpoints kept."""


class MeshConfig(Section):
    """How devices are arranged; -1 takes those that remain."""

    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Kind of device the run must have, lest one meant for a GPU crawls on the CPU; none: what jax finds."""

    data: Whole = -1
    """Devices over which rows are split and parameters repeated."""
    fsdp: Whole = 1
    """Devices over which rows and parameters are split."""
    tensor: Whole = 1
    """Devices over which heads, hidden units and the vocabulary are split."""
    expert: Whole = 1
    """Devices over which a mixture's experts are split."""
    distributed: bool = False
    """Join the processes of several hosts first; start the same command on each. Needs output_dir, on a shared disk."""
    coordinator: str | None = None
    """host:port of the first process; none: found from Slurm, Open MPI, GKE or Cloud TPU."""
    process_count: Count | None = None
    """How many processes join; none: found likewise."""
    process_id: Natural | None = None
    """Which of them this one is; none: found likewise."""


class LogConfig(Section):
    """What is written while the run goes on."""

    completions: Natural = 32
    """Completions of each step written to completions.jsonl, rounded up to whole groups."""
    quiet: bool = False
    """Print only warnings and the result."""
    report: bool = True
    """Write report.html while the run goes on: curves, and a browser of completions."""
    tensorboard: bool = False
    """Write every figure for TensorBoard, in tensorboard/ of the run's directory; needs the extra tensorboard."""
    wandb: str | None = None
    """Weights & Biases project that gets every figure; needs the extra wandb, obeys WANDB_MODE. none: not used."""


class TrainConfig(Section):
    """A whole run. Defaults suit a pretrained model of ordinary size; model, data and reward are the quickstart's."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the data order, the sampling and everything else that is drawn."""
    steps: Count = 200
    """Rollouts to train on."""
    output_dir: str | None = None
    """Directory of the run; one that holds this config's checkpoint is resumed. none: runs/<config>-<time>."""
    compilation_cache: str | None = "~/.cache/grpo_jax"
    """Directory where compiled programs are kept between runs; none keeps none."""
    deterministic: bool = False
    """Ask XLA for deterministic operations on GPU; elsewhere they already are."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: RewardConfig = RewardConfig()
    optim: OptimConfig = OptimConfig()
    critic: CriticConfig = CriticConfig()
    batch: BatchConfig = BatchConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()

    def __init__(self, **tables: Any) -> None:
        """Build from fields and nested tables; ValueError has a line for each that is unknown or illegal."""
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise ValueError("\n".join(explain(error, type(self)))) from error

    @model_validator(mode="before")
    @classmethod
    def _correct_for_rounding(cls, values: Any) -> Any:
        """Sampler and learner that round otherwise differ: truncated importance sampling, unless said otherwise."""
        tables = values if isinstance(values, dict) else {}
        given = (tables.get(name, {}) for name in ("model", "rollout", "algorithm"))
        model, rollout, algorithm = (
            table.model_dump(exclude_unset=True) if isinstance(table, Section) else table for table in given
        )
        if not all(isinstance(table, dict) for table in (model, rollout, algorithm)):
            return values
        if model.get("dtype") != "bfloat16" and rollout.get("kv_dtype", "auto") == "auto":
            return values
        loss = algorithm.get("loss", {})
        if not isinstance(loss, dict) or "correction" in loss:
            return values
        return tables | {"algorithm": algorithm | {"loss": loss | {"correction": "tis"}}}

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if ":" in self.algorithm.advantage:
            _at("algorithm.advantage", lambda: load_function(self.algorithm.advantage))
        _at("algorithm.loss", lambda: self.loss.check_updates(self.updates_per_step))
        for field, wrong, why in refusals(self):
            if wrong:
                raise ValueError(f"{field}: {why}")
        return self

    @property
    def loss(self) -> LossConfig:
        """What the learner minimises: its completion length that of the rollout, a surrogate of the user's loaded."""
        table: dict[str, Any] = self.algorithm.model_dump()["loss"]
        length = self.rollout.max_new_tokens if table["aggregation"] == "constant" else None
        if ":" in table["surrogate"]:
            table["surrogate"] = load_function(table["surrogate"])
        return LossConfig(**table, max_completion_len=length)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates on each rollout."""
        return self.optim.epochs * self.optim.minibatches

    @classmethod
    def from_toml(cls, path: str | Path, **top: Any) -> Self:
        """Read a TOML file; "none" is None.

        Raises:
            ValueError: no such file, not TOML, or a field that is unknown or illegal, by its dotted path.
        """
        return cls.from_tables(read_toml(path) | top)

    @classmethod
    def from_tables(cls, tables: dict[str, Any]) -> Self:
        """Build from nested plain values, as `read_toml` gives them.

        Raises:
            ValueError: a line for each field that is unknown or illegal, by its dotted path.
        """
        return cls(**tables)

    def to_toml(self) -> str:
        """The whole config as TOML; `from_toml` of it equals this config."""
        return tomli_w.dumps(_none_to_string(self.model_dump(mode="json")))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file with "none" read as None; ValueError says what is wrong with the file."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no config file at {file}. Give the path of a TOML file; configs/ holds some to start from.")
    try:
        return _string_to_none(tomllib.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # a number too long for Python, or tables too deep, among them
        raise ValueError(f"{file} is not TOML: {error}. Configs are TOML: `key = value` under [tables].") from error


def _at(path: str, check: Callable[[], Any]) -> None:
    try:
        check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _string_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _string_to_none(item) for key, item in value.items()}
    return None if value == "none" else value


def _none_to_string(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _none_to_string(item) for key, item in value.items()}
    return "none" if value is None else value
