"""scripts/sample.py and scripts/evaluate.py on a tiny checkpoint."""

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import generate, load_model
from grpo_jax.config import TrainConfig
from grpo_jax.data import load_tokenizer
from grpo_jax.data.chat import decode
from grpo_jax.rollout import ContinuousEngine, room_for
from grpo_jax.testing import tiny_checkpoint

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return script(name).main()


def texts_of(checkpoint: Path, count: int) -> list[str]:
    """What generate, in three lines, gives for the same prompt."""
    model, params = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    rollout = generate(model, params, [tokenizer("3+4=")["input_ids"]], count, 40)
    return [decode(tokenizer, rollout.completion_ids(n), model.spec.stop_ids) for n in range(count)]


@pytest.mark.parametrize("count", [1, 3])
def test_sample_writes_what_generate_gives(checkpoint, monkeypatch, capsys, count):
    arguments = [checkpoint, "--prompt", "3+4=", "-n", count, "--max-new-tokens", 40]
    assert run("sample", monkeypatch, *arguments) == 0
    said, expected = capsys.readouterr().out, texts_of(checkpoint, count)
    if count == 1:
        assert said == expected[0] + "\n"
    else:
        parts = re.split(r"--- (\d) \(\d+ tokens\)\n", said)[1:]
        assert {int(n): text.removesuffix("\n") for n, text in zip(parts[::2], parts[1::2], strict=True)} == {
            n + 1: text for n, text in enumerate(expected)
        }


def test_sample_writes_while_the_completion_grows(checkpoint, monkeypatch, capsys):
    """Half a character waits for its other half; what is written stays."""
    module, shown = script("sample"), []
    halves = {1: "a", 2: "a\N{REPLACEMENT CHARACTER}", 3: "a\N{SNOWMAN}b"}
    writer = module.Writer(lambda ids: halves[len(ids)], 1)
    for count in halves:
        writer(0, np.zeros(count, int), count == 3)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "\N{SNOWMAN}b\n"]
    seen = []
    monkeypatch.setattr(module.Writer, "__call__", lambda self, row, tokens, done: seen.append((len(tokens), done)))
    monkeypatch.setattr(sys, "argv", ["sample", str(checkpoint), "--prompt", "3+4=", "--max-new-tokens", "40"])
    assert module.main() == 0
    assert [done for _, done in seen] == [False] * (len(seen) - 1) + [True] and len(seen) > 1
    assert max(np.diff([0, *(count for count, _ in seen)])) <= 4


def test_sample_reads_its_prompt_from_standard_input(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+4=\n"))
    assert run("sample", monkeypatch, checkpoint, "--max-new-tokens", 40) == 0
    assert capsys.readouterr().out == texts_of(checkpoint, 1)[0] + "\n"


@pytest.mark.slow
def test_sample_ends_quietly_where_nobody_reads_on(checkpoint):
    command = [
        sys.executable,
        SCRIPTS / "sample.py",
        checkpoint,
        "--prompt",
        "3+4=",
        "-n",
        "3",
        "--max-new-tokens",
        "4",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_sample_refuses_in_one_line(checkpoint, monkeypatch, capsys):
    assert run("sample", monkeypatch, checkpoint, "--prompt", "", "--max-new-tokens", 4) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-new-tokens", 10_000], "max_new_tokens: got 10000, with prompts of up to 4 tokens more than the 256"),
        (["--max-new-tokens", 0], "max_new_tokens: got 0"),
        (["-n", 0], "num_samples: got 0"),
        (["--chat"], "--chat: the tokenizer has no chat template"),
        (["--system", "be kind"], "--system: got one without --chat"),
        (["--seed", -1], "seed: got -1; a seed is from 0"),
        (["--prompt", "3" * 300], "prompts: got one of 300 tokens, and the 256 positions"),
    ],
)
def test_sample_says_what_cannot_be(checkpoint, monkeypatch, capsys, arguments, says):
    assert run("sample", monkeypatch, checkpoint, "--prompt", "3+4=", *arguments) == 2
    assert says in capsys.readouterr().err


def test_generate_refuses_more_tokens_than_positions(checkpoint):
    model, params = load_model(checkpoint)
    assert room_for(model, 6) == 250 and room_for(model, 6, 9) == 9
    with pytest.raises(ValueError, match="max_new_tokens: got 254, with prompts of up to 3 tokens"):
        generate(model, params, [[5, 6], [5, 6, 7]], 2, 254)


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (["3+4="], {}, "prompts: got the text '3.4=', and token ids are needed"),
        ("3+4=", {}, "prompts: got the text '3', and token ids are needed"),
        ([5, 6], {}, "prompts: got 5 where a list of token ids is needed"),
        ([[5.5]], {}, "prompts: got .5.5. where a list"),
        ([[5]], {"num_samples": 1.5}, "num_samples: got 1.5; use a whole number"),
        ([[5]], {"seed": 1.5}, "seed: got 1.5"),
        ([[5]], {"stop_strings": ["7"]}, "stop_strings: got .* without a tokenizer"),
        ([[5]], {"seeds": [1, 2]}, "seeds: got .1, 2. for 1 prompts"),
    ],
)
def test_generate_says_what_is_wrong_with_what_it_was_given(checkpoint, prompts, options, says):
    model, params = load_model(checkpoint)
    with pytest.raises(ValueError, match=says):
        generate(model, params, prompts, max_new_tokens=4, **options)


def test_generate_refuses_a_model_without_numbers(checkpoint):
    model, params = load_model(checkpoint)
    with pytest.raises(ValueError, match="log-probabilities are not finite"):
        generate(model, jax.tree.map(lambda x: x * np.nan, params), [[5, 6]], 2, 4)


@pytest.mark.parametrize(
    ("row", "arguments", "says"),
    [
        ({"prompt": "3+4="}, [], "reward 'exact_match': needs a column 'answer'"),
        ({"question": "3+4=", "answer": "7"}, [], "no column 'prompt'"),
        ({"prompt": "3+4=", "answer": "7"}, ["--rollout.stop_token_ids", 99], "rollout.stop_token_ids: got 99"),
        ({"prompt": "3+4=", "answer": "7"}, ["--data.max_promt_len", 9], "data.max_promt_len: there is no such field"),
        ({"prompt": "3+4=", "answer": "7"}, ["--samples", -1], "--samples: got -1"),
        ({"prompt": "3+4=", "answer": "7"}, ["--max-new-tokens", 0], "--max-new-tokens: got 0"),
        ({"prompt": "3+4=", "answer": "7"}, ["--max-new-tokens", 253], "max_new_tokens: got 253"),
    ],
)
def test_evaluate_says_what_cannot_be_before_anything_is_sampled(
    checkpoint, monkeypatch, capsys, tmp_path, row, arguments, says
):
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(ContinuousEngine, "generate", None)
    assert run("evaluate", monkeypatch, checkpoint, tmp_path / "data.jsonl", *arguments) == 2
    assert says in capsys.readouterr().err


def test_evaluate_takes_what_is_not_given_from_the_run(tmp_path, monkeypatch):
    module = script("evaluate")
    recorded = {
        "steps": 7,
        "data": {"eval": "held.jsonl", "as_messages": True, "system_prompt": "be", "max_prompt_len": 99},
        "reward": {"functions": ["regex", "exact_match"], "options": {"regex": {"pattern": "x"}, "exact_match": {}}},
        "rollout": {"temperature": 0.7, "stop_token_ids": [2, 7], "prompts_per_step": 3, "max_new_tokens": 9},
    }
    run_config = TrainConfig.from_tables(recorded)
    (tmp_path / "hf").mkdir()
    (tmp_path / "config.toml").write_text(run_config.to_toml())

    def of(*words):
        seen = []
        module.evaluate = seen.append
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        assert module.main() == 0
        return module.config_of(seen[0], module.run_of(seen[0]))

    for place in (tmp_path, tmp_path / "hf"):
        found = of(place)
        assert found.model.path == str(tmp_path / "hf")
        assert found.data == run_config.data.model_copy(update={"train": "quickstart"})
        assert found.reward.functions == ("regex",) and found.reward.options == {"regex": {"pattern": "x"}}
        assert found.rollout.stop_token_ids == (2, 7) and found.rollout.temperature == 0.7
    given = of(tmp_path, "own.jsonl", "--temperature", "1", "--data.max_prompt_len", "600", "--reward", "exact_match")
    assert (given.data.eval, given.data.max_prompt_len, given.rollout.temperature) == ("own.jsonl", 600, 1.0)
    assert given.reward.functions == ("exact_match",) and given.data.system_prompt == "be"
    plain = of(tmp_path / "hf", "own.jsonl", "--config", "none")
    assert not plain.data.as_messages and plain.reward.functions == ("exact_match",)
    with pytest.raises(ValueError, match="^DATA: not given, and there is no run"):
        of(tmp_path / "hf", "--config", "none")
    (tmp_path / "hf").rmdir()
    with pytest.raises(ValueError, match="^MODEL: the run .* holds no trained model yet. .*export_hf.py"):
        of(tmp_path)


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_ctrl_c_ends_in_one_line(checkpoint, monkeypatch, capsys, name):
    module = script(name)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sample" if name == "sample" else "figures", interrupted)
    monkeypatch.setattr(sys, "argv", [name, str(checkpoint), *(["--prompt", "3"] if name == "sample" else ["data"])])
    assert module.main() == 130 and "Traceback" not in capsys.readouterr().err


def test_evaluate_prints_every_figure_with_its_interval(checkpoint, monkeypatch, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+2=", "answer": str(a + 2)}) + "\n" for a in range(5)))
    arguments = [checkpoint, data, "--samples", 3, "--max-new-tokens", 6, "--prompts", 4, "--data.max_prompt_len", 4]
    data.write_text(data.read_text().replace("1+2=", "1111+2="))
    assert run("evaluate", monkeypatch, *arguments) == 0
    out, err = capsys.readouterr()
    assert (
        "warning: " in err and "1 of 4 prompts are longer than data.max_prompt_len = 4 tokens and are left out" in err
    )
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["greedy", "avg@3", "pass@3", "maj@3"]
    assert all(re.search(r"\d\.\d% +95 % interval \d+\.\d% to \d+\.\d%", line) for line in lines)


def test_evaluate_says_what_was_not_scored_and_fails_where_it_is_much(checkpoint, monkeypatch, capsys, tmp_path):
    data, own = tmp_path / "data.jsonl", tmp_path / "own.py"
    data.write_text("".join(json.dumps({"prompt": f"{a}+2=", "answer": str(a + 2)}) + "\n" for a in range(4)))
    own.write_text("def f(completions, answer, **columns): return [None if right == '2' else 1.0 for right in answer]")
    arguments = [checkpoint, data, "--samples", 0, "--max-new-tokens", 6, "--reward", f"{own}:f"]
    assert run("evaluate", monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out.split()[:2] == ["greedy", "100.0%"]  # of those that were scored
    assert "1 of 4 prompts are not scored and left out" in said.err
    assert "error: the reward 'f' did not score all samples of 1 of 4 prompts" in said.err


def test_figures_of_samples(monkeypatch):
    evaluate = script("evaluate")
    right = np.array([[True, False, True], [False, False, False]])
    texts = ["=4", "=5", "= 4", "=1", "nothing", "=2"]
    made = {name: values.tolist() for name, values in evaluate.of_samples(right, texts, "exact_match")}
    assert made == {"avg@3": [2 / 3, 0.0], "pass@3": [1.0, 0.0], "maj@3": [1.0, 0.0]}
    boxes = [r"\boxed{4} = 5", r"\boxed{6} = 7", r"\boxed{4.0} = 7", "1", "1", r"\boxed{2}"]  # read as boxed reads
    right[1] = [False, False, True]
    assert dict(evaluate.of_samples(right, boxes, "boxed"))["maj@3"].tolist() == [1.0, 1.0]
