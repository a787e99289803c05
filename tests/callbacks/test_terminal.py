"""What is printed: live where it can be drawn over, plain elsewhere, always safe to print."""

import io
import re
import sys

import pytest
from rich.console import Console

from grpo_jax.callbacks import Evaluation, live
from grpo_jax.callbacks.live import COMPILING, KEYS, Screen, duration, sparkline
from grpo_jax.callbacks.terminal import Terminal, evaluation_line
from grpo_jax.functions import printable

from .synthetic import config_for, evaluation_of, run_of, step_of

SUMMARY = {"accuracy_first": 0.1, "accuracy_last": 0.5, "accuracy_best": 0.6, "steps": 3, "seconds": 138.0}


def play(directory, terminal: bool, text: str | None = None, warn: str | None = None, width: int = 110, **log) -> str:
    """What a run of three steps prints."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=45, _environ={"TERM": "xterm"})
    callback = Terminal(config_for(directory, **log), console)
    callback.on_start(run_of(directory, facts=("memory 3 GiB", "2 prompts are longer")))
    callback.on_eval(evaluation_of(0, 0.1))
    for number in range(1, 4):
        callback.on_step(step_of(number, text=text))
        if warn and number == 2:
            callback.on_warning(warn)
    callback.on_end(SUMMARY)
    callback.close()
    return out.getvalue()


def test_plain_lines_where_the_output_is_no_terminal(tmp_path):
    lines = play(tmp_path, terminal=False).splitlines()
    assert lines[0] == f"run directory: {tmp_path}"
    assert lines[1:4] == ["memory 3 GiB", "2 prompts are longer", COMPILING]
    assert lines[4] == "held-out after step 0: greedy 10.0%, avg@0 0.0%"
    assert [line.split("  ")[0] for line in lines[5:8]] == ["step 1/8", "step 2/8", "step 3/8"]
    assert re.fullmatch(r"step 1/8  reward \d.*same .*%  length .*  cut .*%  entropy 2.000  kl .* s", lines[5])
    end = "held-out accuracy 10.0% -> 50.0%, best 60.0%; 3 steps in 2:18; everything is in"
    assert lines[8] == f"{end} {tmp_path}" and len(lines) == 9
    assert "\x1b" not in "".join(lines)


def test_quiet_prints_the_result_and_warnings_alone(tmp_path, capsys):
    for terminal in (True, False):
        lines = play(tmp_path, terminal, quiet=True, warn="something").splitlines()
        assert len(lines) == 1 and lines[0].startswith("held-out accuracy 10.0% -> 50.0%")
        assert capsys.readouterr().err == "warning: something\n"


def test_the_display_shows_progress_figures_curves_phases_and_the_newest_completion(tmp_path):
    screen = Screen(
        config_for(tmp_path), run_of(tmp_path, history=({"step": 1, "reward": 0.2}, {"eval/accuracy": 0.3}))
    )
    console = Console(file=io.StringIO(), width=110, record=True)
    console.print(screen)
    before = console.export_text()
    assert "step 0/8" in before and "compiles" in before
    screen.step(step_of(2, text="the answer"))
    screen.evaluation(evaluation_of(2, 0.5))
    console.print(screen)
    shown = console.export_text()
    for part in (
        "step 2/8",
        "left",
        "rollout 0.90",
        "update 0.50",
        "the answer",
        "What is 0 + 2?",
        "right ",
        "format ",
    ):
        assert part in shown, part
    for title, _ in KEYS.values():
        assert title in shown
    assert "30.0% -> 50.0%" in shown and re.search(r"reward +▁█ +0.200 -> ", shown)


def test_a_warning_does_not_tear_the_display(tmp_path, capfd):
    shown = play(tmp_path, terminal=True, warn="bad\x1b[2J")
    assert "\x1b[?25l" in shown and shown.index("\x1b[?25h") > shown.rindex("step 3/8")  # the cursor comes back
    assert capfd.readouterr().err == "warning: bad\\x1b[2J\n"  # this standard error is no terminal


def test_what_others_print_comes_above_the_display(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=45, _environ={"TERM": "xterm"})
    callback = Terminal(config_for(tmp_path), console)
    callback.on_start(run_of(tmp_path))
    print("hello from a library")
    assert "hello from a library\n" in out.getvalue()
    callback.close()
    assert sys.stdout is not console and "╭" in out.getvalue().split("hello from a library")[1]


@pytest.mark.parametrize("text", ["[bold]x[/bold] [/]", "\x1b[2J\x07\x9b1m", "a\tb\r\nc", "漢字" * 200, "", "\ud800"])
@pytest.mark.parametrize("width", [20, 110])
def test_any_completion_is_safe_to_show(tmp_path, text, width):
    console = Console(file=io.StringIO(), width=width)
    screen = Screen(config_for(tmp_path), run_of(tmp_path))
    screen.step(step_of(1, text=text))
    console.print(screen)
    shown = console.file.getvalue()
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r", "\t", "\ud800"}
    if text.startswith("["):
        assert "[bold]" in shown


def test_the_time_left_leaves_the_compiling_step_out(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    screen = Screen(config_for(tmp_path), run_of(tmp_path))
    assert screen._seconds_left() is None
    for moment, number in [(100.0, 1), (102.0, 2), (104.0, 3)]:
        now[0] = moment
        screen.step(step_of(number))
    now[0] = 105.0
    assert screen._seconds_left() == pytest.approx((8 - 3) * 2 - 1)


def test_sparkline_durations_and_printable():
    assert sparkline([], 10) == "" and sparkline([1.0], 10) == "▁" and sparkline([2, 2, 2], 2) == "▁▁"
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█" and sparkline([0, 0, 4, 4], 2) == "▁█"
    assert len(sparkline(list(range(1000)), 48)) == 48
    assert sparkline([0.0, float("nan"), 1.0], 9) == "▁█"
    assert [duration(s) for s in (3, 125, 3607)] == ["3 s", "2:05", "1:00:07"]
    assert printable("é\n\x00\u2028") == "é\n\\x00\\u2028"


def test_an_evaluation_of_several_sets_names_each():
    row = {
        "step": 5,
        "eval/accuracy": 0.5,
        "eval/easy/accuracy": 0.5,
        "eval/easy/avg_at_k": 0.4,
        "eval/hard/accuracy": 0.1,
    }
    line = evaluation_line(Evaluation(5, row), 4)
    assert line == "held-out after step 5: easy greedy 50.0%, avg@4 40.0%; hard greedy 10.0%"


def test_what_was_not_scored_is_said(tmp_path):
    row = {"step": 5, "eval/accuracy": float("nan"), "eval/unscored": 8}
    assert evaluation_line(Evaluation(5, row), 0) == "held-out after step 5: greedy none scored; 8 not scored"
    out = io.StringIO()
    terminal = Terminal(config_for(tmp_path), Console(file=out))
    terminal.on_start(run_of(tmp_path))
    counts = {"training": {"judge": 3, "form": 0}, "held_out": 8}
    terminal.on_end(SUMMARY | {"accuracy_last": None, "unscored": counts})
    end = "held-out accuracy 10.0% -> none scored, best 60.0%; not scored: 3 by 'judge', 8 of the last evaluation; "
    assert end in out.getvalue()
