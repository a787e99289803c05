"""The fields of a configuration by dotted path: what each takes, and what is wrong with a value, in one line.

Made from pydantic's models alone, so that a new field has its command line, its help and its errors at once.
"""

import difflib
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue, ValidationError

WORDS = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
KINDS = {
    "int": "a whole number",
    "float": "a finite number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list, such as [1, 2]",
    "model": "a table of fields",
    "dict": "a table",
}
"""What a value must be, by the first word of pydantic's error type."""
ELSEWHERE = {
    "lr": "optim.learning_rate",
    "remove_unused_columns": "data.columns",
    "beta": "algorithm.loss.kl_coef",
    "epsilon": "algorithm.loss.clip_low",
    "epsilon_high": "algorithm.loss.clip_high",
    "loss_type": "algorithm.preset",
    "scale_rewards": "algorithm.advantage",
    "multi_objective_aggregation": "algorithm.advantage",
    "mask_truncated_completions": "algorithm.overlong_filter",
    "importance_sampling_level": "algorithm.loss.ratio_level",
    "vllm_importance_sampling_correction": "algorithm.loss.correction",
    "vllm_importance_sampling_mode": "algorithm.loss.correction",
    "vllm_importance_sampling_clip_max": "algorithm.loss.correction_high",
    "vllm_importance_sampling_cap": "algorithm.loss.correction_high",
    "vllm_importance_sampling_clip_min": "algorithm.loss.correction_low",
    "off_policy_mask_threshold": "algorithm.loss.off_policy_threshold",
    "use_bias_correction_kl": "algorithm.loss.kl_estimator",
    "top_entropy_quantile": "algorithm.loss.entropy_top",
    "sapo_temperature_neg": "algorithm.loss.sapo_tau_neg",
    "sapo_temperature_pos": "algorithm.loss.sapo_tau_pos",
    "use_adaptive_entropy": "algorithm.adaptive_entropy.target",
    "entropy_target": "algorithm.adaptive_entropy.target",
    "entropy_coef_min": "algorithm.adaptive_entropy.low",
    "entropy_coef_max": "algorithm.adaptive_entropy.high",
    "entropy_coef_delta": "algorithm.adaptive_entropy.delta",
    "sync_ref_model": "algorithm.reference_follow.every",
    "ref_model_sync_steps": "algorithm.reference_follow.every",
    "ref_model_mixup_alpha": "algorithm.reference_follow.alpha",
    "num_generations": "rollout.num_samples",
    "generation_batch_size": "rollout.prompts_per_step",
    "batch_size": "rollout.prompts_per_step",
    "max_completion_length": "rollout.max_new_tokens",
    "max_completion_len": "rollout.max_new_tokens",
    "max_tokens": "rollout.max_new_tokens",
    "generation_kwargs": "rollout.stop_strings",
    "num_generations_eval": "eval.samples",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "num_iterations": "optim.epochs",
    "steps_per_generation": "optim.minibatches",
    "per_device_train_batch_size": "optim.microbatch_rows",
    "gradient_accumulation_steps": "optim.microbatch_rows",
    "pad_to_multiple_of": "batch.row_len",
    "lr_scheduler_type": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "router_aux_loss_coef": "model.router_coef",
    "reward_weights": "reward.weights",
    "reward_funcs": "reward.functions",
    "model_name_or_path": "model.path",
    "model_init_kwargs": "model.dtype",
    "processing_class": "model.path",
    "peft_config": "model.lora.rank",
    "bf16": "model.dtype",
    "tf32": "model.matmul_precision",
    "gradient_checkpointing": "model.remat",
    "gradient_checkpointing_kwargs": "model.remat",
    "activation_checkpointing": "model.remat",
    "activation_checkpointing_kwargs": "model.remat",
    "dataset_name": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "max_prompt_length": "data.max_prompt_len",
    "shuffle_dataset": "data.shuffle",
    "train_sampling_strategy": "data.shuffle",
    "data_seed": "seed",
    "use_cpu": "mesh.platform",
    "fsdp_config": "mesh.fsdp",
    "deepspeed": "mesh.fsdp",
    "parallelism_config": "mesh.fsdp",
    "accelerator_config": "mesh.fsdp",
    "local_rank": "mesh.process_id",
    "full_determinism": "deterministic",
    "do_eval": "eval.every",
    "eval_on_start": "eval.every",
    "eval_steps": "eval.every",
    "eval_strategy": "eval.every",
    "metric_for_best_model": "eval.stop.metric",
    "greater_is_better": "eval.stop.metric",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "output_dir",
    "log_completions": "log.completions",
    "num_completions_to_print": "log.completions",
    "report_to": "log.tensorboard",
    "run_name": "log.wandb",
    "project": "log.wandb",
    "disable_tqdm": "log.quiet",
    "log_level": "log.quiet",
    "log_level_replica": "log.quiet",
    "optimizers": "optim.learning_rate",
}
"""What other trainers call a field, for the advice to one who types it: all that docs/FROM_TRL.md gives a field for."""


WHOLE: dict[str, JsonValue] = {"whole": True}
"""What marks a field that is a list of any text: a word of the command is never cut at its commas."""


@dataclass(frozen=True)
class Place:
    """Where a dotted path leads.

    Attributes:
        keys: of the nested tables; the last of a free table may hold dots, as file names do.
        kinds: types a value may have, None and the optional's own wrapping left out.
        optional: whether "none" is a value.
        free: the last key is the user's own, in a table without fixed fields.
        whole: one word is one text of a list, its commas and spaces too.
    """

    keys: tuple[str, ...]
    kinds: tuple[Any, ...]
    optional: bool
    free: bool = False
    whole: bool = False

    @property
    def several(self) -> bool:
        """Whether it is a list, which several words of a command make."""
        return any(get_origin(kind) is tuple for kind in self.kinds)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; constraints unwrapped, None among them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds_of(get_args(annotation)[0])
    if origin is Union or origin is types.UnionType:
        return tuple(kind for part in get_args(annotation) for kind in kinds_of(part))
    return (annotation,)


def table_of(annotation: Any) -> type[BaseModel] | None:
    """The model among the types of a field: it is a table with fields of its own."""
    found = [kind for kind in kinds_of(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no table, as (dotted path, pydantic's FieldInfo), in the order of declaration."""
    for name, field in model.model_fields.items():
        inner = table_of(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def find(model: type[BaseModel], path: str) -> Place:
    """Where ``path`` leads.

    Raises:
        ValueError: no such field, with the nearest one; or a table, which has no value of its own.
    """
    annotation: Any = model
    parts, free, whole = path.split("."), False, False
    for i, part in enumerate(parts):
        inner = table_of(annotation)
        if inner is not None:
            if part not in inner.model_fields:
                raise ValueError(unknown(model, path))
            annotation = inner.model_fields[part].annotation
            whole = inner.model_fields[part].json_schema_extra == WHOLE
            continue
        values = _values_of_free_table(annotation)
        if values is None:
            raise ValueError(unknown(model, path))
        annotation, free = values, True
        if _values_of_free_table(values) is None:  # the rest is one key: it may be the name of a file
            parts = [*parts[:i], ".".join(parts[i:])]
            break
    if table_of(annotation) is not None:
        first = next(iter(leaves(table_of(annotation) or model, f"{path}.")))[0]
        raise ValueError(f"{path}: is a table of fields and has no value itself; set a field of it, such as {first}")
    kinds = kinds_of(annotation)
    return Place(tuple(parts), tuple(k for k in kinds if k is not type(None)), type(None) in kinds, free, whole)


def unknown(model: type[BaseModel], path: str) -> str:
    """The line for a field that is not there, with the nearest that is."""
    known = [name for name, _ in leaves(model)]
    tables = {name.rpartition(".")[0] for name in known} - {""}
    table, _, last = path.rpartition(".")
    ends: dict[str, list[str]] = {}
    for name in known:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    beside = [end for end in ends if f"{table}.{end}".lstrip(".") in known]
    near = (
        [f"{table}.{end}".lstrip(".") for end in difflib.get_close_matches(last, beside, 1, 0.7)]
        or ends.get(last)
        or [ELSEWHERE[name] for name in (last,) if name in ELSEWHERE]
        or difflib.get_close_matches(path, [*known, *tables], 1, 0.8)
        or [name for end in difflib.get_close_matches(last, ends, 1, 0.75) for name in ends[end]]
    )
    advice = f"did you mean {' or '.join(near[:3])}?" if near else "--help shows all fields."
    return f"{path}: there is no such field; {advice}"


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """What is wrong, a line for each field: its dotted path, what was got, why it cannot be, what to do."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_path(model, item["loc"]), []).append(item)
    outer = {path for path in found if any(other.startswith(f"{path}.") for other in found)}
    return [_line(model, path, items) for path, items in found.items() if not path or path not in outer]


def type_words(annotation: Any) -> str:
    """What may be written for a field, for its help.

    >>> type_words(int | None), type_words(Literal["a", "b"]), type_words(tuple[str, ...])
    ('INTEGER|none', 'a|b', 'TEXT ...')
    """
    words = [_type_word(kind) for kind in kinds_of(annotation)]
    return "|".join(dict.fromkeys(words))


def _type_word(kind: Any) -> str:
    if kind is type(None):
        return "none"
    if get_origin(kind) is Literal:
        return "|".join(str(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{type_words(get_args(kind)[0])} ..."
    return "TABLE" if get_origin(kind) is dict else WORDS.get(kind, "VALUE")


def _values_of_free_table(annotation: Any) -> Any:
    found = [get_args(kind)[1] for kind in kinds_of(annotation) if get_origin(kind) is dict]
    return found[0] if found else None


def _path(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The dotted path of an error; pydantic adds the name of a union's member, which is no key."""
    keys: list[str] = []
    annotation: Any = model
    for part in loc:
        inner = table_of(annotation)
        if inner is not None:
            keys.append(str(part))
            if part not in inner.model_fields:
                break
            annotation = inner.model_fields[str(part)].annotation
        elif len(kinds_of(annotation)) > 2 or (
            len(kinds_of(annotation)) == 2 and type(None) not in kinds_of(annotation)
        ):
            annotation = _member(annotation, str(part))
        elif isinstance(part, int):
            keys[-1] += f"[{part}]"
            break
        elif (values := _values_of_free_table(annotation)) is not None:
            keys.append(part)
            annotation = values
    return ".".join(keys)


def _member(annotation: Any, label: str) -> Any:
    """The part of a union that pydantic's label ("str", "dict[str,constrained-float]") speaks of."""
    wanted = [kind for kind in kinds_of(annotation) if getattr(kind, "__name__", "") == label.partition("[")[0]]
    return wanted[0] if wanted else Any


def _line(model: type[BaseModel], path: str, items: Sequence[Mapping[str, Any]]) -> str:
    kind, context = items[0]["type"], items[0].get("ctx", {})
    got = f"got {shown(items[0]['input'])}"
    if kind == "extra_forbidden":
        return unknown(model, path)
    if kind == "value_error":
        own = items[0]["msg"].removeprefix("Value error, ")
        return f"{path}: {own}" if path else own
    if kind == "literal_error":
        return f"{path}: {got}, which is none of its values; {_choice(model, path, items[0]['input'])}"
    if kind == "missing":
        return f"{path}: is not given and has no default; give it"
    bound = [f"{word} {context[name]:g}" for name, word in BOUNDS.items() if name in context]
    needs = " and ".join(bound) or " or ".join(dict.fromkeys(_kind_needed(item) for item in items))
    return f"{path}: {got}, but it must be {needs}{_doc(model, path)}"


def _kind_needed(item: Mapping[str, Any]) -> str:
    first = item["type"].partition("_")[0]
    return KINDS.get(first) or f"otherwise ({item['msg']})"


def _choice(model: type[BaseModel], path: str, value: Any) -> str:
    kinds = [kind for each in find(model, path.partition("[")[0]).kinds for kind in _members(each)]
    legal = [str(name) for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    near = difflib.get_close_matches(shown(value).strip("'"), legal, 1, 0.6)
    return (f"did you mean {near[0]}? It takes " if near else "use one of ") + ", ".join(legal)


def _members(kind: Any) -> tuple[Any, ...]:
    """What the places of a list take; of any other type the type itself."""
    return kinds_of(get_args(kind)[0]) if get_origin(kind) is tuple else (kind,)


def _doc(model: type[BaseModel], path: str) -> str:
    """The first sentence of the field's own documentation, which says why."""
    doc = next((field.description for name, field in leaves(model) if name == path.partition("[")[0]), None)
    return f" ({' '.join((doc or '').split()).partition('. ')[0].rstrip('.')})" if doc else ""


def shown(value: Any) -> str:
    """As it would be written in the file or on the command line; what is long or deep only in part."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else _SHORT.repr(value)


class _Short(reprlib.Repr):
    """Of values that nobody bounds: of what is nested, long or a number of many digits, no more than a line shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 160, 160
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 16

    def repr_int(self, x: int, level: int) -> str:
        """A number itself, or how long it is."""
        return repr(x) if abs(x) < 10**40 else f"a number of {round(x.bit_length() * log10(2))} digits"


_SHORT = _Short()
