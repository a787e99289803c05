"""One rollout a line: what bench_rollout.py runs in a peer's own virtual environment, never by hand.

    python peer_generate.py transformers|tunix '{"layers": 4, ...}'

Builds a random model of the shape it is given, says "ready", and for each line on standard input samples one rollout of
fixed length (no stop token is ever drawn) and prints its seconds.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def qwen2(work: dict[str, Any]) -> Any:
    """A random Qwen2 of the work's shape, in torch."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=work["vocab"],
        hidden_size=work["width"],
        num_hidden_layers=work["layers"],
        num_attention_heads=work["heads"],
        num_key_value_heads=work["kv_heads"],
        intermediate_size=work["ffn"],
        tie_word_embeddings=work["tied"],
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def transformers_rollout(work: dict[str, Any]) -> Callable[[], None]:
    """As TRL 1.16 samples without another engine: transformers' generate on the prompts, each repeated."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = qwen2(work).to(device, getattr(torch, work["dtype"])).eval()
    prompts = torch.randint(2, work["vocab"], (work["prompts"], work["prompt_len"]), device=device)
    ids = prompts.repeat_interleave(work["samples"], dim=0)
    length = work["length"]

    def rollout() -> None:
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                temperature=1.0,
                max_new_tokens=length,
                suppress_tokens=[1],
            )
        assert out.cpu().shape == (ids.shape[0], ids.shape[1] + length)

    return rollout


def tunix_cluster(work: dict[str, Any], steps: int, batch: int) -> Any:
    """Tunix's actor with its vanilla rollout; prompts and completions are numbers in words, nothing ends one early."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster
    from tunix.rl.rollout import base_rollout

    class Numbers:
        """Token ids written as numbers; the end of text is an id that nothing samples."""

        def encode(self, text: str, **_: object) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int], **_: object) -> str:
            return " ".join(str(int(i)) for i in ids)

        def pad_id(self) -> int:
            return 0

        def bos_id(self) -> int:
            return 1

        def eos_id(self) -> int:
            return work["vocab"] + 7

    config = qwen3.ModelConfig(
        num_layers=work["layers"],
        vocab_size=work["vocab"],
        embed_dim=work["width"],
        hidden_dim=work["ffn"],
        num_heads=work["heads"],
        head_dim=work["head_dim"],
        num_kv_heads=work["kv_heads"],
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    role = rl_cluster.Role
    mesh = jax.sharding.Mesh(np.empty((), dtype=object), ())
    return rl_cluster.RLCluster(
        actor=qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
        reference=None,
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-5),
                eval_every_n_steps=10**9,
                max_steps=steps,
                rollout_micro_batch_size=batch,
                compute_logps_micro_batch_size=batch,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work["length"],
                max_prompt_length=work["prompt_len"],
                kv_cache_size=work["prompt_len"] + work["length"],
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )


def tunix_rollout(work: dict[str, Any]) -> Callable[[], None]:
    """Tunix's own sampler, as its vanilla rollout calls it."""
    import jax
    import numpy as np

    cluster = tunix_cluster(work, 1, work["prompts"] * work["samples"])
    ids = np.random.default_rng(0).integers(3, work["vocab"], (work["prompts"], work["prompt_len"] - 1))
    texts = [" ".join(map(str, row)) for row in ids for _ in range(work["samples"])]

    def rollout() -> None:
        out = cluster.generate(texts)
        jax.block_until_ready(out.left_padded_prompt_tokens)
        assert all(len(row) == work["length"] for row in out.tokens)

    return rollout


PEERS = {"transformers": transformers_rollout, "tunix": tunix_rollout}


def main() -> None:
    rollout = PEERS[sys.argv[1]](json.loads(sys.argv[2]))
    rollout()  # compiles, warms up
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        rollout()
        print(f"seconds {time.perf_counter() - begun}", flush=True)


if __name__ == "__main__":
    main()
