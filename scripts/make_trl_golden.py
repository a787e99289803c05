"""Golden values for tests/algo/test_trl.py, made by running the loss and advantage code of TRL 1.16.0 itself.

    pip install trl==1.16.0 torch==2.13.0
    python scripts/make_trl_golden.py tests/algo/trl_golden.npz

A trainer object is made without its constructor and given the attributes the constructor would copy from a real
GRPOConfig; its model looks log-probabilities and entropies up in a table, by the row number that each prompt starts
with. Then TRL's own methods run: `_generate_and_score_completions` (masks, sampler correction, rewards to advantages)
and `_compute_loss`. Nothing of grpo_jax is imported. float64 unless a case says float32: rewards are float32 inside
TRL whatever the default dtype, so all rewards here are exact in float32.

The file holds, next to arrays, one JSON text `meta`: versions, the options of every case, and where its arrays are.
"""

import asyncio
import json
import os
import sys
import warnings
from collections import defaultdict
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from transformers import TrainerState  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402
from trl.experimental.async_grpo import async_grpo_trainer, async_rollout_worker  # noqa: E402
from trl.experimental.async_grpo.packing import TreeRow  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402
from trl.rewards import get_soft_overlong_punishment  # noqa: E402
from trl.trainer.callbacks import SyncRefModelCallback  # noqa: E402
from trl.trainer.utils import split_tensor_dict  # noqa: E402
from trl_golden_cases import G, N, T, advantage_cases, batch, batches, loss_cases, reward_tables  # noqa: E402

PROMPT_LEN, EOS, PAD, TOKEN = 2, 3, 0, 5
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "gmpo": (GMPOTrainer, GMPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
# What the constructors copy from the config under the same name.
COPIED = """max_completion_length num_generations pad_to_multiple_of use_vllm vllm_importance_sampling_correction
 vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min loss_type
 multi_objective_aggregation scale_rewards importance_sampling_level off_policy_mask_threshold
 mask_truncated_completions top_entropy_quantile entropy_coef use_adaptive_entropy num_iterations beta
 normalize_advantages reward_clip_range""".split()
METRICS = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio", "vespo/phi_seq_mean")


class Table(torch.nn.Module):
    """A model whose outputs are looked up; the row number is the first token of the prompt."""

    is_gradient_checkpointing = False

    def __init__(self, logp, entropy):
        super().__init__()
        self.logp = torch.nn.Parameter(torch.tensor(logp, dtype=torch.get_default_dtype()))
        self.entropy = torch.nn.Parameter(torch.tensor(entropy, dtype=torch.get_default_dtype()))

    def forward(self, input_ids, attention_mask, labels, fused_lm_head):
        rows, scored = input_ids[:, 0], labels != -100
        pad = torch.zeros(len(rows), PROMPT_LEN)
        logp = torch.cat([pad, self.logp[rows]], dim=1)
        entropy = torch.cat([pad, self.entropy[rows]], dim=1)
        # As TRL's fused head does: 0 where nothing is scored.
        return SimpleNamespace(log_probs=logp.where(scored, 0.0), entropy=entropy.where(scored, 0.0))


def make_trainer(kind, options, data):
    """A trainer without its constructor, its config made by TRL's own class."""
    trainer_class, config_class = TRAINERS[kind]
    if kind != "rloo":
        options = {"num_iterations": 2, "max_completion_length": 11, **options}
    steps = options.get("steps_per_generation", options.get("gradient_accumulation_steps", 1))
    rows, generations = len(data["lengths"]), options.get("num_generations", G)
    args = config_class(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=rows // steps,
        **{"num_generations": generations, **options},
    )
    t = trainer_class.__new__(trainer_class)
    for name in COPIED:
        if hasattr(args, name):
            setattr(t, name, getattr(args, name))
    # After the config: making one resets the process-wide state an accelerator reads.
    t.args, t.accelerator, t.state = args, Accelerator(cpu=True), TrainerState()
    t.epsilon_low = args.epsilon
    t.epsilon_high = args.epsilon_high if args.epsilon_high is not None else args.epsilon
    t.num_generations_eval = data.get("generations", generations)
    t._entropy_bonus_enabled = bool(options.get("entropy_coef")) or bool(options.get("use_adaptive_entropy"))
    t._last_world_entropy, t._entropy_window_stats = float("inf"), None
    t.aux_loss_enabled, t._is_vlm, t.log_multimodal = False, False, False
    t.tools = t.environments = t.environment_factories = None
    t.eos_token_ids, t._tokenizer = [EOS], SimpleNamespace(pad_token_id=PAD)
    t.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    t._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    t._logs = {"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": [], "extra": {}}
    t._pending_extra_logs, t._pending_metrics = defaultdict(list), defaultdict(list)
    return t


def add_rewards(t, rewards, weights):
    """Reward functions that return the given numbers, None for NaN."""
    columns = [[None if np.isnan(r) else float(r) for r in column] for column in rewards]
    t.reward_funcs = [lambda column=column, **_: column for column in columns]
    t.reward_func_names = [f"reward_{i}" for i in range(len(columns))]
    t.reward_processing_classes = [None] * len(columns)
    t.reward_weights = torch.ones(len(columns)) if weights is None else torch.tensor(weights, dtype=torch.float32)


def rollout(kind, data, use_vllm):
    """What `_generate` would return: token ids, tool mask, completions, sampler log-probabilities."""
    lengths = data["lengths"]
    prompts = [[i, TOKEN] for i in range(len(lengths))]
    ids = [[TOKEN] * (n - 1) + [EOS if done else TOKEN] for n, done in zip(lengths, data["finished"], strict=True)]
    texts = ["text"] * len(lengths)
    if kind == "rloo":
        return prompts, ids, texts
    tools = [row[:n].tolist() for row, n in zip(data["tool_mask"], lengths, strict=True)]
    tools = None if all(min(row) == 1 for row in tools) else tools
    nan_to_none = [[None if np.isnan(x) else x for x in row[:n]] for row, n in zip(data["sampler"], lengths)]  # noqa: B905
    return prompts, ids, tools, texts, nan_to_none if use_vllm else None, {}, None, None


def prepare(kind, options, data, weights=None, training=True):
    """Runs TRL from a rollout to the tensors its loss takes."""
    t = make_trainer(kind, options, data)
    add_rewards(t, data["rewards"], weights)
    t._generate = lambda prompts: rollout(kind, data, getattr(t, "use_vllm", False))
    t.ref_model = Table(data["ref"], data["entropy"])
    t.model = Table(data["old"], data["entropy"]).train(training)
    return t, t._generate_and_score_completions([{"prompt": "p"} for _ in data["lengths"]])


def run_loss(kind, options, data):
    """Loss of every microbatch, gradient of their sum, and what the loss was given."""
    t, inputs = prepare(kind, options, data)
    if "advantages" in data:
        inputs["advantages"] = torch.tensor(data["advantages"])
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    advantages = inputs["advantages"].numpy()
    model = t.model = Table(data["logp"], data["entropy"]).train()
    chunks = split_tensor_dict(inputs, getattr(t.args, "steps_per_generation", 1) or 1)
    losses = [t._compute_loss(model, chunk) for chunk in chunks]
    sum(losses).backward()
    metrics = {k: t._metrics["train"][k][0] for k in METRICS if t._metrics["train"].get(k) and len(chunks) == 1}
    grads = [np.zeros((N, T)) if p.grad is None else p.grad.numpy() for p in (model.logp, model.entropy)]
    advantages = np.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], (N, T))
    loss = np.full(2, np.nan)  # of each microbatch, at most two
    loss[: len(losses)] = torch.stack(losses).detach().numpy()
    out = {"loss": loss, "grad": grads[0], "grad_entropy": grads[1], "advantages": advantages}
    return out | {"mask": mask.numpy().astype(bool)}, metrics


def run_advantages(kind, table, options, weights):
    """Advantages [Q, G] and, where KL is in the reward, the log-probabilities and mask it was made from."""
    _, questions, group = table.shape
    rows = questions * group
    rng = np.random.default_rng(30)
    old = -np.abs(rng.standard_normal((rows, T)))
    data = {
        "old": old,
        "ref": old + 0.3 * rng.standard_normal((rows, T)),
        "entropy": np.zeros((rows, T)),
        "lengths": rng.integers(1, T + 1, rows),
        "finished": np.ones(rows, bool),
        "sampler": old,
        "tool_mask": np.ones((rows, T), np.int64),
        "rewards": table.reshape(len(table), rows),
        "generations": group,
    }
    data["lengths"][0] = T
    # A group of one exists only in TRL's evaluation.
    options = {"num_generations": group} | options if group > 1 else {"num_generations": rows} | options
    _, inputs = prepare(kind, options, data, weights, training=group > 1)
    out = {"advantages": inputs["advantages"].numpy().reshape(questions, group)}
    if options.get("beta"):
        out |= {"old": old, "ref": data["ref"], "mask": inputs["completion_mask"].numpy().astype(bool)}
    return out


def run_entropy_control():
    """The adaptive entropy coefficient over ten steps: entropies in, coefficient and loss of each step out."""
    options = {
        "loss_type": "dapo",
        "use_adaptive_entropy": True,
        "entropy_coef": 0.004,
        "entropy_coef_delta": 0.005,
        "entropy_coef_max": 0.012,
        "entropy_target": 0.5,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
    }
    data = batch(12)
    t, inputs = prepare("grpo", options, data)
    out = {"scale": np.array([1.0, 0.3, 0.3, 0.3, 0.3, 1.0, 1.0, 0.3, 1.0, 1.0]), "loss": [], "coef": []}
    for scale in out["scale"]:
        t.model = Table(data["logp"], data["entropy"] * scale).train()
        out["loss"].append(t._compute_loss(t.model, inputs).item())
        out["coef"].append(t.entropy_coef)
    out |= {k: data[k] for k in ("logp", "old", "entropy")} | {"advantages": inputs["advantages"].numpy()}
    return options, {k: np.asarray(v) for k, v in out.items()} | {"mask": inputs["completion_mask"].numpy() != 0}


def run_async_advantages(table):
    """Advantages of the asynchronous trainer's worker, group by group: [Q, G]."""
    loop = object.__new__(async_rollout_worker._AsyncRolloutLoop)
    loop._env_reward_types, loop._provides_rollout_reward = [], False
    rows = []
    for group in range(table.shape[1]):
        columns = [[None if np.isnan(r) else float(r) for r in column[group]] for column in table]
        loop.reward_funcs = [lambda column=column, **_: column for column in columns]
        loop.reward_func_names = [str(i) for i in range(len(columns))]
        n = table.shape[2]
        row = SimpleNamespace(input_ids=[1], completion_mask=[1], old_log_probs=[0.0])
        fields = dict(
            completions=["c"] * n,
            prompts=["p"] * n,
            completions_ids=[[1]] * n,
            reward_kwargs={},
            tool_call_counts=[0] * n,
            tool_failure_counts=[0] * n,
            completions_sequences=[[row]] * n,
            model_version=0,
            group_id=0,
        )
        rows.append([s.advantage for s in asyncio.run(loop._score_group(SimpleNamespace(**fields)))])
    return np.array(rows)


def run_async_loss():
    """The asynchronous trainer's loss of one packed row, packed by its own collator."""
    rng = np.random.default_rng(40)
    row, token = TreeRow(), 1
    for i, (length, prompt) in enumerate(((7, 2), (4, 1), (6, 3))):
        mask = np.r_[np.zeros(prompt), np.ones(length - prompt)].astype(np.int64)
        sample = {
            "input_ids": np.arange(token, token + length),
            "completion_mask": mask,
            "metrics": {},
            "old_log_probs": -rng.random(length),
            "advantage": float(rng.standard_normal()),
            "group_id": i,
        }
        row.add(sample)
        token += length
    inputs = async_grpo_trainer.DataCollatorForRollout(pad_token_id=0).torch_call([[row]])
    logp = torch.nn.Parameter(torch.tensor(-rng.random(inputs["input_ids"].shape), dtype=torch.float32))
    t = async_grpo_trainer.AsyncGRPOTrainer.__new__(async_grpo_trainer.AsyncGRPOTrainer)
    t.accelerator, t.aux_loss_enabled, t.epsilon_low, t.epsilon_high = Accelerator(cpu=True), False, 0.2, 0.28
    t.current_gradient_accumulation_steps, t._metrics = 1, {"train": defaultdict(list)}
    t._step_forward_tokens = t._step_trained_tokens = t._step_samples = t._step_seq_len_weighted = 0.0
    t._step_forward_s = 0.0
    loss = t.compute_loss(lambda **_: SimpleNamespace(log_probs=logp, entropy=torch.zeros_like(logp)), inputs)
    loss.backward()
    names = {"token_index": "index", "old_log_probs": "old", "advantages": "advantages", "segment_id": "segments"}
    out = {new: inputs[name][0].numpy() for name, new in names.items()}
    out |= {"logp": logp.detach().numpy(), "loss": np.array([loss.item()]), "grad": logp.grad.numpy()}
    return {"epsilon": 0.2, "epsilon_high": 0.28}, out


def run_small():
    """Soft overlong punishment by length, and one step of the reference towards the policy."""
    reward = get_soft_overlong_punishment(max_completion_len=40, soft_punish_cache=13)
    lengths = np.arange(0, 46)
    out = {"overlong/lengths": lengths, "overlong/rewards": np.array(reward([[1] * n for n in lengths]))}
    policy, reference = (torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))
    out |= {
        "sync/policy": policy.weight.detach().numpy().copy(),
        "sync/before": reference.weight.detach().numpy().copy(),
    }
    SyncRefModelCallback._sync_target_model(policy, reference, 0.6)
    return out | {"sync/after": reference.weight.detach().numpy().copy()}


def main(path):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    data = batches()
    data["onpolicy"] = data["main"] | {"old": data["main"]["logp"]}
    tables = reward_tables()
    arrays = {f"batch/{b}/{k}": v for b, fields in data.items() for k, v in fields.items() if b != "onpolicy"}
    arrays |= {f"rewards/{k}": v for k, v in tables.items()} | run_small()
    meta = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    meta |= {"loss": {}, "advantages": {}, "soft_overlong": {"max_completion_len": 40, "soft_punish_cache": 13}}
    stacked = defaultdict(list)
    for name, kind, b, options in loss_cases():
        dtype = options.get("dtype", "float64")
        torch.set_default_dtype(getattr(torch, dtype))
        out, metrics = run_loss(kind, {k: v for k, v in options.items() if k != "dtype"}, data[b])
        meta["loss"][name] = {
            "trainer": kind,
            "batch": b,
            "options": options,
            "metrics": metrics,
            "dtype": dtype,
            "index": len(stacked["loss"]),
        }
        for key, value in out.items():
            stacked[key].append(value)
    arrays |= {f"loss/{key}": np.stack(values) for key, values in stacked.items()}
    for name, kind, table, options, weights in advantage_cases():
        dtype = options.get("dtype", "float64")
        torch.set_default_dtype(getattr(torch, dtype))
        plain = {k: v for k, v in options.items() if k != "dtype"}
        arrays |= {f"advantages/{name}/{k}": v for k, v in run_advantages(kind, tables[table], plain, weights).items()}
        meta["advantages"][name] = {"trainer": kind, "table": table, "options": options, "weights": weights}
    torch.set_default_dtype(torch.float64)
    for name in ("plain", "absent", "flat", "binary"):
        arrays[f"async_advantages/{name}"] = run_async_advantages(tables[name])
    meta["entropy_control"], control = run_entropy_control()
    torch.set_default_dtype(torch.float32)  # the asynchronous trainer's metrics allow no other
    meta["async_loss"], packed = run_async_loss()
    arrays |= {f"entropy_control/{k}": v for k, v in control.items()} | {f"async/{k}": v for k, v in packed.items()}
    np.savez_compressed(path, meta=np.array(json.dumps(meta)), **arrays)
    print(f"{path}: {len(meta['loss'])} losses, {len(meta['advantages'])} advantages, {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tests/algo/trl_golden.npz")
