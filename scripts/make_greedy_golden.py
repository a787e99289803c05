"""Writes tests/models/greedy_golden.npz: what transformers' own greedy search says for some of the golden checkpoints.

    python scripts/make_greedy_golden.py

Needs torch and transformers; nothing of grpo_jax is imported. The checkpoints are those of scripts/make_hf_golden.py,
whose file holds their configs and shapes. For each case: [PROMPTS, NEW] int32, -1 behind a stop token, and the least
gap between the two largest logits on the way, float32: how far a rounding is from another token.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).resolve().parent.parent / "tests" / "models"
sys.path.insert(0, str(TESTS))

from greedy_cases import CASES, NEW, PROMPTS, STOP  # noqa: E402
from hf_cases import draw  # noqa: E402


def golden(case: str, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes = json.loads(str(known[f"{case}/shapes"]))
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(str(known[f"{case}/config"]))
        tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
        save_file(tensors, Path(directory, "model.safetensors"), metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokens, gap = np.full((len(PROMPTS), NEW), -1, np.int32), np.inf
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=STOP,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(prompt) :].tolist()
        tokens[row, : len(new)] = new
        two = torch.stack(out.logits).topk(2).values
        gap = min(gap, float((two[..., 0] - two[..., 1]).min()))
    return {f"{case}/tokens": tokens, f"{case}/gap": np.float32(gap)}


def main() -> None:
    with np.load(TESTS / "golden.npz") as file:
        known = dict(file)
    arrays = {name: value for case in CASES for name, value in golden(case, known).items()}
    path = TESTS / "greedy_golden.npz"
    np.savez_compressed(path, **arrays)
    print(path, path.stat().st_size, "bytes")
    for case in CASES:
        lengths = (arrays[f"{case}/tokens"] >= 0).sum(1).tolist()
        print(case, "lengths", lengths, "distinct", len(np.unique(arrays[f"{case}/tokens"])), arrays[f"{case}/gap"])


if __name__ == "__main__":
    main()
