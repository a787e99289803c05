"""What a user can get wrong: name -> (the command, the line it prints); in braces what depends on the machine.

The files are those that test_errors.py makes.
"""

from grpo_jax.algo.spec import PRESETS
from grpo_jax.models.families import FAMILIES
from grpo_jax.rewards import REWARDS as BUILTIN

PRESET_NAMES = ", ".join(PRESETS)
FORMS = (
    "a .jsonl, .json, .csv or .parquet file, a directory that datasets' save_to_disk wrote, or a hub dataset "
    '"owner/name:split" or "owner/name/config:split"'
)
REQUESTS = {
    "no config file": (
        "missing.toml",
        "no config file at missing.toml. Give the path of a TOML file; configs/ holds some to start from.",
    ),
    "not TOML": (
        "broken.toml",
        "broken.toml is not TOML: Invalid value (at line 1, column 9). Configs are TOML: `key = value` under [tables].",
    ),
    "misspelt field, command": (
        "--optim.lerning_rate 1",
        "optim.lerning_rate: there is no such field; did you mean optim.learning_rate?",
    ),
    "misspelt field, file": (
        "field.toml",
        "optim.lerning_rate: there is no such field; did you mean optim.learning_rate?",
    ),
    "field of another trainer": (
        "--num_generations 8",
        "num_generations: there is no such field; did you mean rollout.num_samples?",
    ),
    "misspelt preset, command": (
        "--algorithm.preset grppo",
        f"algorithm.preset: got 'grppo', which is none of its values; did you mean grpo? It takes {PRESET_NAMES}",
    ),
    "misspelt preset, file": (
        "preset.toml",
        f"algorithm.preset: got 'dappo', which is none of its values; did you mean dapo? It takes {PRESET_NAMES}",
    ),
    "no such value": (
        "config.toml --optim.schedule step",
        "optim.schedule: got 'step', which is none of its values; use one of constant, linear, cosine",
    ),
    "not a number": (
        "config.toml --steps ten",
        "steps: got 'ten', but it must be a whole number (Rollouts to train on)",
    ),
    "out of range": (
        "config.toml --rollout.top_p 2",
        "rollout.top_p: got '2', but it must be at most 1 (Sample among the fewest tokens that hold this probability "
        "together)",
    ),
    "G = 1": (
        "config.toml --rollout.num_samples 1",
        "rollout.num_samples: got 1, and the advantage 'grpo' compares the samples of a prompt with each other. Sample "
        "at least 2, or use one of raw, batch_mean, reinforce_pp, remax, gae.",
    ),
    "a batch that does not divide": (
        "config.toml --rollout.prompts_per_step 32 --optim.minibatches 5",
        "optim.minibatches: got 5, which does not divide rollout.prompts_per_step = 32; every update must take the "
        "same share. Choose 4 or 8, or 30 or 35 prompts.",
    ),
    "weights": (
        "config.toml --reward.weights 1 2",
        "reward.weights: got 2 weights for 1 functions. Give one a function.",
    ),
    "no such model": (
        "config.toml --model.path nowhere",
        "model.path: directory 'nowhere' does not exist (looked from {here}); give the directory of a Hugging Face "
        'checkpoint, or a hub id "owner/name"',
    ),
    "a file for a model": (
        "config.toml --model.path prompts.jsonl",
        "model.path: 'prompts.jsonl' is a file; give the directory of a Hugging Face checkpoint",
    ),
    "no checkpoint": (
        "config.toml --model.path empty",
        "model.path: 'empty' is no checkpoint: it holds nothing; give the directory that holds config.json, the "
        ".safetensors files and the tokenizer's",
    ),
    "unsupported model": (
        "config.toml --model.path bert",
        "bert: config.json: got model_type 'bert'; there is no record for it; use a checkpoint of one of: "
        + ", ".join(sorted(FAMILIES)),
    ),
    "a pickle": (
        "config.toml --model.path pickled",
        "pickled: got neither model.safetensors nor model.safetensors.index.json; only safetensors is read (a pickle "
        "can run code); convert the checkpoint with transformers' save_pretrained",
    ),
    "no tokenizer": (
        "config.toml --model.path mute",
        "model directory 'mute': no tokenizer can be loaded from ['config.json', 'model.safetensors', "
        "'tokenizer_config.json'] (its vocabulary is empty); copy tokenizer.json and tokenizer_config.json into it",
    ),
    "no data": (
        "config.toml --data.train nowhere.jsonl",
        f"data.train: data file 'nowhere.jsonl' does not exist (looked from {{here}}); give {FORMS}",
    ),
    "an empty file": (
        "config.toml --data.train none.jsonl",
        "data.train: data file 'none.jsonl' is empty; it needs one JSON object a line",
    ),
    "no prompt column": (
        "config.toml --data.train question.jsonl",
        "data.train: question.jsonl, line 1: no column 'prompt', it has ['answer', 'question']; rename one or set "
        "data.prompt_column",
    ),
    "a row unlike the first": (
        "config.toml --data.eval unlike.jsonl",
        "data.eval: unlike.jsonl, line 2: columns unlike the first row's: missing ['answer'], extra ['result'], but a "
        "reward function gets whole columns; give every row the same ones (null where there is no value)",
    ),
    "a line cut short": (
        "config.toml --data.train cut.jsonl",
        "data.train: cut.jsonl, line 2: not JSON (Expecting value: line 1 column 12 (char 11)); write one JSON object, "
        'such as {{"prompt": "..."}}',
    ),
    "no chat template": (
        "config.toml --data.train chat.jsonl",
        "data.train: row 0: prompt of chat messages: the tokenizer has no chat template to write them with; use an "
        "instruct model's tokenizer, data.chat_template, or prompts that are strings",
    ),
    "prompts too long": (
        "config.toml --data.max_prompt_len 1",
        "data.max_prompt_len: got 1, but all 4 prompts are longer, the shortest 4 tokens, the longest 4; raise it",
    ),
    "completions too long": (
        "config.toml --rollout.max_new_tokens 1000",
        "rollout.max_new_tokens: got 1000, with prompts of up to 4 tokens more than the 256 positions the model was "
        "made for. Lower it, or data.max_prompt_len.",
    ),
    "rows too short": (
        "config.toml --batch.row_len 8",
        "batch.row_len: got 8, and a prompt with its completion has up to 8 + 4 tokens; raise it to 12, or lower "
        "data.max_prompt_len or rollout.max_new_tokens.",
    ),
    "a stop token of another model": (
        "config.toml --rollout.stop_token_ids 2 151645",
        "rollout.stop_token_ids: got 151645, and the model's tokens are 0 to 60. Use the ids of its own tokenizer.",
    ),
    "a banned token of another model": (
        "config.toml --rollout.banned_token_ids 151645",
        "rollout.banned_token_ids: got 151645, and the model's tokens are 0 to 60. Use the ids of its own tokenizer.",
    ),
    "a load-balance loss without experts": (
        "config.toml --model.router_coef 0.1",
        "model.router_coef: got 0.1, and the model is no mixture of experts, so that there is no load to balance. "
        "Leave it out.",
    ),
    "a field that nothing reads": (
        "config.toml --algorithm.max_rounds 8",
        "algorithm.max_rounds: would change nothing, as algorithm.dynamic_sampling is off. Leave it out.",
    ),
    "an adapter where there is none": (
        "config.toml --model.lora.targets x",
        "model.lora.targets[0]: got 'x', which is none of its values; use one of q, k, v, out, gate, up, down",
    ),
    "no such reward": (
        "config.toml --reward.functions exact_mach",
        "reward 'exact_mach': no built-in of that name (did you mean 'exact_match'?); use one of "
        f"{', '.join(sorted(BUILTIN))}, or module:function, or path/file.py:function",
    ),
    "no reward file": (
        "config.toml --reward.functions absent.py:f",
        "reward 'absent.py:f': no file 'absent.py' under {here}; give the path from there, or all of it",
    ),
    "no such function": (
        "config.toml --reward.functions rewards.py:f",
        "reward 'rewards.py:f': rewards.py has no function 'f'; use one of those it has: Path, infinite, length, "
        "moody, raising, short, stopping, word, words",
    ),
    "files that are no run": (
        "config.toml --output_dir foreign",
        "output_dir: foreign holds files and no config.toml, so it is no run, and nothing was changed; name an empty "
        "or new directory",
    ),
    "a file for a directory": (
        "config.toml --output_dir prompts.jsonl",
        "output_dir: prompts.jsonl is a file, but a run needs a directory; name another place",
    ),
    "a run of another version": (
        "config.toml --output_dir other",
        "output_dir: other/config.toml cannot be read (batch_size: there is no such field; did you mean "
        "rollout.prompts_per_step?), so nobody knows whether its run may go on, and nothing was changed; name another "
        "output_dir, or use the version that wrote it",
    ),
    "a directory that cannot be made": (
        "config.toml --output_dir prompts.jsonl/run",
        "output_dir: prompts.jsonl/run cannot be written to (Not a directory: prompts.jsonl/run); name another place",
    ),
    "no such device": (
        "config.toml --mesh.platform tpu",
        "mesh.platform: got tpu, and jax finds {platform} only ({device}); install grpo_jax[cuda] or grpo_jax[tpu] "
        "where the hardware is there, or set mesh.platform none",
    ),
    "a mesh that does not fit": (
        "config.toml --mesh.fsdp 97",
        "mesh: got data=-1, fsdp=97, tensor=1, expert=1 for {count} device(s); the product must be the number of "
        "devices, or divide it where one size is -1; choose sizes that divide {count}",
    ),
    "a reward of the wrong length": (
        "config.toml --reward.functions rewards.py:short",
        "reward 'short': returned 7 rewards for 8 completions; return a list of 8 floats (None where it has no "
        "answer), one per completion",
    ),
    "a reward that is a string": (
        "config.toml --reward.functions rewards.py:word",
        "reward 'word': returned 'good', a str, which has no rows; return a list of 8 floats (None where it has no "
        "answer), one per completion",
    ),
    "rewards that are strings": (
        "config.toml --reward.functions rewards.py:words",
        "reward 'words', row 0: returned 'good', a str, which is no number; return a float",
    ),
    "an infinite reward": (
        "config.toml --reward.functions rewards.py:infinite",
        "reward 'infinite', row 1: returned inf, which no advantage can be computed from (float32 ends at 3.4e38); "
        "return a finite float, or None for no answer",
    ),
}
