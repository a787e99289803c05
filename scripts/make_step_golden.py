"""Make tests/step_golden.npz: what one update computes on fixed tokens, by torch and transformers alone.

pip install torch==2.13.0 && python scripts/make_step_golden.py

The tokens are worked problems of the quickstart's task; the model is the shipped one. Loss (docs/MATH.md: ppo_clip at
token level, clip 0.2 / 0.28, k3 with coefficient 0.04, seq_mean_token_mean), its gradient's global norm, and the mean
log-probability of the trained tokens. grpo_jax is not imported.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
TEXTS = [
    "407+385=7+5=12, 0+8+1=9, 4+3=7: 792",
    "407+385=7+5=12, 0+8=8, 4+3=7: 782",
    "402-385=12-5=7, 10-1-8=1, 4-1-3=0: 17",
    "402-385=: 127",
    "999+999=9+9=18, 9+9=18, 9+9=18: 1888",
    "250-125=10-5=5, 5-1-2=2, 2-1=1: 125",
]
PROMPT, CLIP_LOW, CLIP_HIGH, KL = 8, 0.2, 0.28, 0.04


def main() -> None:
    """Compute in float64 and write."""
    directory = ROOT / "grpo_jax" / "quickstart" / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    width = max(map(len, ids))
    tokens = np.array([row + [0] * (width - len(row)) for row in ids])
    column = np.arange(width)
    mask = (column >= PROMPT) & (column < np.array([len(row) for row in ids])[:, None])
    advantages = np.array([1.0, -0.5, 1.5, -1.0, -0.25, 0.5])
    noise = np.random.default_rng(0).normal(scale=0.3, size=(2, *tokens.shape))

    logits = model(torch.tensor(tokens), attention_mask=torch.tensor((tokens != 0).astype(int))).logits[:, :-1]
    taken = torch.tensor(tokens[:, 1:, None])
    logp = torch.nn.functional.pad(torch.log_softmax(logits, -1).gather(-1, taken)[..., 0], (1, 0))
    trained = torch.tensor(mask)
    old, ref = (torch.where(trained, logp.detach() + torch.tensor(n), 0.0) for n in noise)
    ratio, adv = torch.exp(logp - old), torch.tensor(advantages)[:, None]
    term = torch.maximum(-ratio * adv, -ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * adv)
    x = ref - logp
    term = torch.where(trained, term + KL * (torch.exp(x) - x - 1), 0.0)
    loss = (term.sum(1) / trained.sum(1)).mean()
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    np.savez_compressed(
        ROOT / "tests" / "step_golden.npz",
        tokens=tokens.astype(np.int32),
        mask=mask,
        advantages=advantages,
        old_logp=old.numpy(),
        ref_logp=ref.numpy(),
        loss=loss.item(),
        grad_norm=norm.item(),
        mean_logp=(logp.detach()[trained]).mean().item(),
    )
    print(f"loss {loss.item():.6f}, gradient norm {norm.item():.6f}, {int(mask.sum())} trained tokens")


if __name__ == "__main__":
    main()
