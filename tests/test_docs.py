"""Every code block of the README and of docs/ runs, every command is one, and every link leads somewhere."""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

import grpo_jax
from grpo_jax import cli
from grpo_jax.config import TrainConfig
from grpo_jax.testing import tiny_checkpoint

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def small(config: TrainConfig | None) -> TrainConfig:
    """The same run in seconds: what the page shows is what runs, only shorter."""
    tables = (config or TrainConfig()).model_dump(exclude_unset=True)
    tables |= {"steps": 1, "compilation_cache": None}
    shorter = {
        "rollout": {"prompts_per_step": 2, "num_samples": 2, "max_new_tokens": 4},
        "optim": {"minibatches": 1, "microbatch_rows": None},
        "eval": {"prompts": 2, "samples": 0},
    }
    for name, table in shorter.items():
        tables[name] = tables.get(name, {}) | table
    return TrainConfig.from_tables(tables)


class SmallTrainer(grpo_jax.Trainer):
    def __init__(self, *args, config=None, **more):
        super().__init__(*args, config=small(config), **more)


@pytest.fixture
def place(tmp_path, monkeypatch, one_device):
    """A directory that holds what the pages speak of: a model in DIR, a second one, prompts.jsonl."""
    tiny_checkpoint(tmp_path / "DIR", num_hidden_layers=1)
    rows = [f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in range(2, 6) for b in range(2, 6)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    (tmp_path / "held_out.jsonl").write_text("".join(rows[:4]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo_jax, "Trainer", SmallTrainer)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=named)
def test_python_blocks_run_one_after_the_other(page, place):
    namespace = {"__name__": "__main__"}
    for number, text in enumerate(blocks(page, "python"), 1):
        exec(compile(text, f"{page.name}, python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "toml")], ids=named)
def test_toml_blocks_are_configs(page):
    for text in blocks(page, "toml"):
        TrainConfig.from_tables(tomllib.loads(text))


def commands() -> list[str]:
    found = [line for page in PAGES for text in blocks(page, "sh") for line in text.splitlines()]
    return sorted({part.strip() for line in found for part in line.partition("#")[0].split("&&")} - {""})


@pytest.mark.parametrize("command", [c for c in commands() if "scripts/train.py" in c])
def test_training_commands_parse(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "configs", tmp_path / "configs")
    program, script, *arguments = shlex.split(command)
    assert program == "python" and (ROOT / script).is_file()
    if "--help" in arguments:
        assert cli.main(arguments) == 0
    else:
        assert isinstance(cli.parse(arguments)[0], TrainConfig)


@functools.cache
def help_of(script: Path) -> str:
    """What its --help prints; run in this process, where all that it imports is there already."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [str(script), "--help"])
        patch.setattr(os, "environ", os.environ.copy())  # some set in it what jax reads
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    return out.getvalue()


@pytest.mark.parametrize("command", [c for c in commands() if "scripts/train.py" not in c])
def test_other_commands_are_there(command):
    """Scripts say how they are used; extras exist. `.ci/run` runs the README's own pip commands."""
    words = shlex.split(command)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if words[:2] == ["pip", "install"]:
        assert set(re.findall(r"\[([\w,]+)\]", command)) <= {*extras, ",".join(extras)}
    elif words[0] == "python":
        help_text = help_of(ROOT / words[1])
        assert help_text.strip()
        options = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert options <= set(re.findall(r"--[\w.-]+", help_text))
    else:
        assert words[0] in ("pytest", "tensorboard", "mkdocs")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://", "#")):
            file = (page.parent / target.partition("#")[0]).resolve()
            assert file.exists(), f"{page.name} links to {target}"
