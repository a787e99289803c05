"""Make what grpo_jax/quickstart holds, from nothing: the two data files, the tokenizer and the pretrained model.

python scripts/make_quickstart_model.py [--directory DIR] [--seed N] [--steps N] [--data-only]

The model is pretrained by maximum likelihood on sound and careless workings (grpo_jax/quickstart/task.py), with this
package's own model, learner and optimizer: the gradient of the likelihood is REINFORCE's with every advantage 1.
The same seed on the same machine and versions gives the same files.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import grpo_jax
from grpo_jax.algo.spec import LossConfig
from grpo_jax.config import OptimConfig
from grpo_jax.learner.optimizer import learning_rate, make_optimizer
from grpo_jax.learner.step import Learner
from grpo_jax.models import Model, ModelSpec, save_hf
from grpo_jax.quickstart import task
from grpo_jax.types import Params, TrainBatch

SHIPPED = Path(grpo_jax.__file__).parent / "quickstart"

MIXTURE = task.Mixture()
STEPS, ROWS = 900, 192
OPTIM = OptimConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50, beta2=0.99, weight_decay=0.01)

TRAIN_ROWS, TRAIN_SEED = 2048, 1
EVAL_ROWS, EVAL_SEED = 512, 2

VOCABULARY = 32
"""Rounded up with unused tokens, so that the vocabulary can be cut over the devices of a mesh."""
UNKNOWN = "<unk>"
PROMPT_TOKENS = 2 * task.COLUMN_COUNT + 2
ROW_TOKENS = PROMPT_TOKENS + task.MAX_COMPLETION_TOKENS


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of `task.PIECES`; decoding what was encoded gives it back, letter by letter.

    transformers takes the vocabulary of a Qwen2 directory but not its pre-tokenizer, so single characters are a byte
    BPE without merges and longer pieces are added tokens: both read the same under Qwen2's own pre-tokenizer.
    Characters outside the vocabulary have no token and are left out.
    """
    tokens = [task.PAD, task.EOS, UNKNOWN, *task.PIECES]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in task.PIECES if len(piece) > 1])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=task.PAD,
        eos_token=task.EOS,
        unk_token=UNKNOWN,
        model_max_length=ROW_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """The config.json of a small Qwen2."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }


def write_data(directory: Path) -> None:
    """train.jsonl and eval.jsonl: problems that are neither in each other nor in the pretraining stream."""
    directory.mkdir(parents=True, exist_ok=True)
    files = (("train", TRAIN_ROWS, TRAIN_SEED), ("eval", EVAL_ROWS, EVAL_SEED))
    for split, count, seed in files:
        rows = task.dataset(split, count, seed)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def pretraining_batches(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int) -> Iterator[TrainBatch]:
    """An endless stream of batches: `rows` prompts with their completions, end token included, which are trained."""
    texts = task.pretraining_texts(MIXTURE, seed)
    while True:
        chosen = list(itertools.islice(texts, rows))
        ids = tokenizer([prompt + completion + task.EOS for prompt, completion in chosen])["input_ids"]
        lengths = np.array([len(row) for row in ids])
        tokens = np.full((rows, ROW_TOKENS), tokenizer.pad_token_id, np.int32)
        for row, numbers in zip(tokens, ids, strict=True):
            row[: len(numbers)] = numbers
        column = np.broadcast_to(np.arange(ROW_TOKENS, dtype=np.int32), tokens.shape)
        valid = column < lengths[:, None]
        yield TrainBatch(
            tokens=tokens,
            positions=column,
            segment_ids=valid.astype(np.int32),
            context_ids=None,
            source=np.maximum(column - 1, 0),
            mask=valid & (column >= PROMPT_TOKENS),
            advantages=np.ones(tokens.shape, np.float32),
            sampler_logp=np.zeros(tokens.shape, np.float32),
        )


def pretrain(model: Model, params: Params, batches: Iterable[TrainBatch], steps: int) -> Params:
    """Maximum likelihood over the trained tokens of `steps` batches; the parameters after it."""
    loss = LossConfig.preset("reinforce", aggregation="token_mean")
    optimizer = make_optimizer(OPTIM, steps, model.decay_mask)
    schedule = learning_rate(OPTIM, steps)
    learner = Learner(model, loss, optimizer, schedule, scored_len=task.MAX_COMPLETION_TOKENS)
    state = learner.init(params)
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        batch = jax.tree.map(jax.numpy.asarray, batch)
        state, sums, _ = learner.update(state, batch, jax.numpy.asarray(batch.tokens.shape[0], jax.numpy.int32))
        if step % 50 == 0 or step == steps:
            entropy = float(sums["entropy"][0] / sums["entropy"][1])
            print(f"step {step}/{steps}  entropy {entropy:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return state.params


def start_figures(model: Model, params: Params, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Where reinforcement learning starts, on the held-out prompts: shares of completions and of prompts."""
    rows = task.dataset("eval", EVAL_ROWS, EVAL_SEED)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]

    def sample(num_samples: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        rollout = grpo_jax.generate(
            model, params, prompts, num_samples, max_new_tokens=task.MAX_COMPLETION_TOKENS, temperature=temperature
        )
        ids = [rollout.completion_ids(row) for row in range(len(rollout.finish))]
        stated = [task.parse(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
        answers = [row["answer"] for row in rows for _ in range(num_samples)]
        correct = np.array([said == answer for said, answer in zip(stated, answers, strict=True)])
        parsed = np.array([said is not None for said in stated]) & (rollout.finish == "stop")
        return correct.reshape(len(rows), num_samples), parsed

    greedy, _ = sample(1, 0.0)
    drawn, parsed = sample(8, 1.0)
    return {
        "greedy accuracy": float(greedy.mean()),
        "avg@8": float(drawn.mean()),
        "pass@8": float(drawn.any(1).mean()),
        "stops and parses": float(parsed.mean()),
    }


def main() -> None:
    """Write the data, then the tokenizer and the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=SHIPPED, help="where it is written (default: the package)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the pretraining stream")
    parser.add_argument("--steps", type=int, default=STEPS, help="pretraining updates")
    parser.add_argument("--data-only", action="store_true", help="write the two data files and the tokenizer only")
    arguments = parser.parse_args()
    write_data(arguments.directory)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(arguments.directory / "model")
    if arguments.data_only:
        return
    model = Model(ModelSpec.from_hf(model_config(tokenizer)))
    print(f"{model.param_count} parameters")
    batches = pretraining_batches(tokenizer, arguments.seed, ROWS)
    params = pretrain(model, model.init(arguments.seed), batches, arguments.steps)
    save_hf(model, params, arguments.directory / "model")
    for name, value in start_figures(model, params, tokenizer).items():
        print(f"{name} {value:.3f}")


if __name__ == "__main__":
    main()
