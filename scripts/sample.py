"""Complete prompts with a model, on the terminal.

    python scripts/sample.py MODEL --prompt "..." [-n 8] [--chat] [--temperature 0.7] [--top-p 0.9] [--stop TEXT ...]
    python scripts/sample.py MODEL < prompt.txt

MODEL is a Hugging Face directory, a hub id, or "quickstart". One completion is written as it grows, several each when
it is done. Without --prompt the prompt is what comes on standard input, its last line break left out. --chat makes it
a user's message and puts it through the chat template.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from grpo_jax.cli import in_a_line
from grpo_jax.config import TrainConfig


class Writer:
    """Writes completions to the terminal as they come."""

    def __init__(self, read: Callable[[list[int]], str], count: int):
        self._read, self._count = read, count
        self._written = ""
        self._done: set[int] = set()

    def __call__(self, row: int, tokens: Any, done: bool) -> None:
        text = self._read(tokens.tolist())
        if self._count == 1:
            # Half a character decodes to a replacement; what follows may change it.
            ready = text if done else text.rstrip("\N{REPLACEMENT CHARACTER}")
            print(ready[len(self._written) :], end="\n" if done else "", flush=True)
            self._written = ready
        elif done and row not in self._done:
            self._done.add(row)
            print(f"--- {row + 1} ({len(tokens)} tokens)\n{text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", help="one that begins with a dash: --prompt=-3+5")
    parser.add_argument("-n", "--num-samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, help="default: 256, or what the model has positions for")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", nargs="*", default=[], help="texts that end a completion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--system", help="system message, with --chat")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return in_a_line(partial(sample, parser.parse_args()))


def sample(asked: argparse.Namespace) -> None:
    # What takes seconds to import comes where Ctrl-C ends in a line.
    from grpo_jax.data import load_tokenizer, resolve_model, stop_ids
    from grpo_jax.data.chat import PromptFormat, decode
    from grpo_jax.metrics import keep_compiled
    from grpo_jax.models import load_model
    from grpo_jax.rollout import USUAL_ROOM, ContinuousEngine, Sampling, room_for
    from grpo_jax.types import Prompt

    keep_compiled(TrainConfig().compilation_cache)
    if asked.system is not None and not asked.chat:
        raise ValueError("--system: got one without --chat, and only messages have a system message. Add --chat.")
    source = resolve_model(asked.model)
    tokenizer = load_tokenizer(source)
    if asked.chat and tokenizer.chat_template is None:
        raise ValueError(
            f"--chat: the tokenizer has no chat template in {source}. Use an instruct model, or no --chat."
        )
    stops = stop_ids(source, tokenizer)
    form = PromptFormat(as_messages=asked.chat, system_prompt=asked.system)
    prompt = sys.stdin.read().removesuffix("\n") if asked.prompt is None else asked.prompt
    tokens = form.encode(tokenizer, form.prompt({"prompt": prompt}))
    longest = len(tokens) + (asked.max_new_tokens or USUAL_ROOM)
    model, params = load_model(source, asked.dtype, param_dtype=asked.dtype, longest=longest)
    sampling = Sampling(
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        max_new_tokens=room_for(model, len(tokens), asked.max_new_tokens),
        stop_ids=tuple(sorted(stops)),
        stop_strings=tuple(asked.stop),
    )
    engine = ContinuousEngine(model, decode=tokenizer.decode)
    call = engine.stream(
        params,
        [Prompt(0, tokens)],
        num_samples=asked.num_samples,
        sampling=sampling,
        seed=asked.seed,
        step=0,
        watch=Writer(lambda ids: decode(tokenizer, ids, stops), asked.num_samples),
    )
    for _ in call:
        pass
    call.sampled.check()


if __name__ == "__main__":
    sys.exit(main())
