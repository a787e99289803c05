"""Whole GRPO steps, one a line: what bench_step.py runs in a process of its own, never by hand.

    python peer_step.py ours|trl|tunix '{"layers": 4, ...}'

Trains a random model of the shape it is given, one update a rollout and no KL, on completions of imposed length: ours
end where the work has it, a peer's at the longest of them. After a step or two that warm up it says "ready"; then each
line on standard input lets one step go, whose seconds it prints.
"""

import json
import os
import random
import string
import sys
import tempfile
import time
from functools import partialmethod
from typing import Any

STEPS = 10_000
"""More than are ever asked for."""
ALPHABET = string.ascii_lowercase


class Gate:
    """Called between steps: waits for a line, and times what comes until the next call."""

    def __init__(self, warm_up: int):
        self._left, self._begun = warm_up, 0.0

    def __call__(self) -> None:
        now = time.perf_counter()
        self._left -= 1
        if self._left >= 0:
            if self._left:
                return
            print("ready", flush=True)
        else:
            print(f"seconds {now - self._begun}", flush=True)
        if not sys.stdin.readline():
            sys.stdout.flush()
            os._exit(0)  # in the middle of somebody's loop
        self._begun = time.perf_counter()


def letters(vocab: int) -> Any:
    """A tokenizer of single letters, read the same whatever class a library takes it for; other tokens only decode."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<eos>", *ALPHABET]
    known = {piece: i for i, piece in enumerate(pieces)} | {f"w{i}": i for i in range(len(pieces), vocab)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def prompts(work: dict[str, Any]) -> list[str]:
    """Random ones, as many letters as there are to be tokens."""
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=work["prompt_len"])) for _ in range(50 * work["prompts"])]


def by_parity(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that differs within every group and costs nothing."""
    return [float(ids[0] % 2) + 0.01 * (sum(ids) % 7) for ids in completion_ids]


def ours(work: dict[str, Any]) -> None:
    """grpo_jax's own Trainer, logging as it does, without evaluation or report."""
    from contest import Work, cpu_devices

    from grpo_jax import TrainConfig, Trainer
    from grpo_jax.callbacks import Callback, Step
    from grpo_jax.models import save_hf
    from grpo_jax.rollout import ContinuousEngine

    gate = Gate(2)
    shape = Work(**{name: value for name, value in work.items() if name != "length"})
    limits = shape.limits()

    class Turns(Callback):
        def on_step(self, step: Step) -> bool:
            assert (step.rollout.completion_len == limits).all()
            gate()
            return False

    ContinuousEngine.stream = partialmethod(ContinuousEngine.stream, limits=limits)  # the same lengths at every step
    large = shape.width >= 512
    with tempfile.TemporaryDirectory() as directory:
        model = shape.model()
        save_hf(model, model.init(0), f"{directory}/model")
        letters(shape.vocab).save_pretrained(f"{directory}/model")
        tables = {
            "steps": STEPS,
            "output_dir": f"{directory}/run",
            "model": {"dtype": shape.dtype, "param_dtype": shape.dtype, "remat": "full" if large else None},
            "data": {"max_prompt_len": shape.prompt_len},
            "rollout": {
                "prompts_per_step": shape.prompts,
                "num_samples": shape.samples,
                "max_new_tokens": shape.cap,
                "banned_token_ids": [1],
                "layout": f"tensor={cpu_devices()}" if cpu_devices() > 1 else "train",
            },
            "algorithm": {"preset": "grpo", "loss": {"kl_coef": 0.0}},
            # On a CPU, an update of 8 x 8 completions of 32 + 64 tokens: 0.49 s so, 0.61 in one piece, and in padded
            # rows 0.63 and 0.74.
            "optim": {"learning_rate": 1e-5, "microbatch_rows": 16},
            "checkpoint": {"every": None},
            "log": {"quiet": True, "report": False},
        }
        rows = [{"prompt": text} for text in prompts(work)]
        config = TrainConfig.from_tables(tables)
        Trainer(f"{directory}/model", by_parity, rows, config=config, callbacks=[Turns()]).train()


def trl(work: dict[str, Any]) -> None:
    """TRL's GRPOTrainer, on the CPU where there is no GPU; sampling by transformers' generate."""
    import torch
    from datasets import Dataset
    from peer_generate import qwen2
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    gate = Gate(1)

    class Turns(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            gate()

    with tempfile.TemporaryDirectory() as directory:
        arguments = GRPOConfig(
            output_dir=directory,
            per_device_train_batch_size=work["prompts"] * work["samples"],
            num_generations=work["samples"],
            max_completion_length=work["length"],
            generation_kwargs={"suppress_tokens": [1]},
            learning_rate=1e-5,
            beta=0.0,
            max_steps=STEPS,
            use_cpu=not torch.cuda.is_available(),
            bf16=work["dtype"] == "bfloat16",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=qwen2(work),
            reward_funcs=by_parity,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": prompts(work)}),
            processing_class=letters(work["vocab"]),
            callbacks=[Turns()],
        ).train()


def tunix(work: dict[str, Any]) -> None:
    """Tunix's GRPOLearner with its vanilla rollout."""
    import jax
    import numpy as np
    from flax import nnx
    from peer_generate import tunix_cluster
    from tunix.rl.grpo import grpo_learner

    gate, cluster = Gate(1), tunix_cluster(work, STEPS, work["prompts"])

    def by_first(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        ids = [[int(word) for word in text.split()] for text in completions]
        assert [len(row) for row in ids] == [work["length"]] * work["prompts"] * work["samples"]
        return by_parity(ids)

    settings = grpo_learner.GRPOConfig(num_generations=work["samples"], num_iterations=1, beta=0.0, epsilon=0.2)
    learner = grpo_learner.GRPOLearner(cluster, algo_config=settings, reward_fns=[by_first])
    step = learner._run_global_step

    def gated(*arguments: Any, **options: Any) -> Any:
        out = step(*arguments, **options)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.Param))
        gate()
        return out

    learner._run_global_step = gated
    shape = (50, work["prompts"], work["prompt_len"] - 1)  # it puts a beginning of text before each
    ids = np.random.default_rng(0).integers(3, work["vocab"], shape)
    texts = [np.array([" ".join(map(str, each)) for each in group]) for group in ids]
    learner.train({"prompts": texts[i % len(texts)]} for i in range(STEPS))


CONTESTANTS = {"ours": ours, "trl": trl, "tunix": tunix}

if __name__ == "__main__":
    CONTESTANTS[sys.argv[1]](json.loads(sys.argv[2]))
