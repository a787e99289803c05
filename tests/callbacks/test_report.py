"""report.html as a browser shows it: what is on it, that nothing of the data is executed, that it stays quick."""

import base64
import gzip
import json
import re
import sys

import pytest

from grpo_jax import rundir
from grpo_jax.callbacks.report import SHARE, Report, write_report
from grpo_jax.callbacks.report import completions as completions_module
from grpo_jax.callbacks.report import page as page_module
from grpo_jax.callbacks.report.__main__ import main
from grpo_jax.callbacks.report.panels import MOST_POINTS, charts
from grpo_jax.metrics import JsonLines, TokenTexts, completion_rows, read_json_lines

from .browser import CHROMIUM, Browser
from .synthetic import NAMES, Words, evaluation_of, run_of, step_of, write_many_completions, write_run

HOSTILE = (
    "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
    "<!-- <script> ]]> &lt; \x00\x1b[2J \u2028 \ud800 ${window.owned = 1} `"
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


class HostileWords(Words):
    """Its token 7 is made to break the page."""

    def decode(self, ids, **options):
        return "".join(HOSTILE if i == 7 else super(HostileWords, self).decode([i]) for i in ids)


def write_hostile_run(directory):
    """A run in which everything that can hold text holds markup."""
    directory.mkdir()
    (directory / rundir.CONFIG).write_text(f"steps = 1\nnote = {json.dumps(HOSTILE.partition(chr(0xD800))[0])}\n")
    step = step_of(1, text=HOSTILE)
    step.scored.extra["<b>extra</b>"] = [HOSTILE] * 12
    step.prompts[0] = type(step.prompts[0])(0, (1,), [{"role": "<i>user</i>", "content": HOSTILE}], None)
    step.rollout.tokens[:, 4] = 7
    metrics, lines = JsonLines(directory / rundir.METRICS), JsonLines(directory / rundir.COMPLETIONS)
    metrics.write(dict(step.metrics) | {f"<img src=x onerror='window.owned=1'>/{HOSTILE}": 1.0})
    names = ("<b>right</b>", HOSTILE)
    for row in completion_rows(1, step.prompts, step.rollout, step.scored, names, 12, TokenTexts(HostileWords())):
        lines.write(row)
    JsonLines(directory / "warnings.jsonl").write({"step": 1, "text": HOSTILE})


def unpack(page: str, name: str):
    packed = re.search(rf'<script type="application/octet-stream" id="{name}">([A-Za-z0-9+/=]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a run's report in the browser, and sees to it that nothing went wrong in it."""
    browser.errors.clear()
    browser.requests.clear()

    def open_report(directory):
        browser.open(write_report(directory))
        return browser

    yield open_report
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)


@needs_chromium
def test_curves_are_drawn_in_light_and_dark(opened, tmp_path):
    browser = opened(write_run(tmp_path / "run"))
    browser.wait_for("document.querySelectorAll('.plot .trace').length > 5")
    titles = browser.run("[...document.querySelectorAll('.chart h2')].map((h) => h.firstChild.textContent)")
    assert titles[:6] == [
        "Held-out accuracy",
        "Reward by function",
        "Spread of rewards",
        "Entropy of the policy",
        "KL",
        "Completion length",
    ]
    assert "Seconds by phase" in titles
    drawn = browser.run("document.querySelectorAll('.plot')[1].data.map((t) => [t.name, t.y.length])")
    assert drawn == [["reward", 8], ["rewards/right/mean", 8], ["rewards/format/mean", 8]]
    back = [browser.run(f"setTheme('{t}'), getComputedStyle(document.body).backgroundColor") for t in ("dark", "light")]
    assert back[0] != back[1]
    browser.run("$('smooth').value = 0.9, $('smooth').oninput()")
    assert browser.run("document.querySelectorAll('.plot')[1].data.length") == 6
    figures = browser.run("$('figures').textContent")
    assert "8 of 8" in figures and "10.0% → 60.0%" in figures and "not finished" in figures


@needs_chromium
def test_a_group_is_shown_side_by_side_with_all_of_its_figures(opened, tmp_path):
    directory = write_run(tmp_path / "run", steps=3)
    browser = opened(directory)
    browser.run("openTab('completions')")
    browser.wait_for("document.querySelectorAll('.group').length == 8")
    row = next(r for r in read_json_lines(directory / rundir.COMPLETIONS) if r["step"] == 3)
    shown = browser.run("document.querySelector('.group').textContent")
    assert "Step 3, prompt 1" in shown and row["prompt"] in shown
    first = browser.run("document.querySelector('.sample').textContent")
    for part in (f"{row['reward']:.4g}", f"{row['advantage']:.3g}", f"{row['length']} tokens", "parsed: w0"):
        assert part in first
    assert f"right {row['rewards']['right']:.0f}" in first
    assert "".join(row["tokens"]) in first
    heat = browser.run(
        "[...document.querySelector('.sample .text').children].map((s) => s.style.getPropertyValue('--heat'))"
    )
    assert [h != "" for h in heat] == [logp < -0.05 for logp in row["logp"]]
    assert browser.run("document.querySelectorAll('.group .samples')[0].children.length") == 4
    assert "no answer" in browser.run("$('list').textContent")


@needs_chromium
@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_sorting_paging_filtering_and_search(browser, opened, tmp_path, count):
    directory = write_run(tmp_path / "run", steps=2)
    write_many_completions(directory / rundir.COMPLETIONS, count, tokens=10 if count > 1000 else 60)
    opened(directory)
    busy = browser.busy()
    assert browser.run("document.querySelectorAll('*').length") < 3000  # one page of them, however many there are
    shown, ready = (browser.run(f"document.documentElement.dataset.{name}") for name in ("shown", "ready"))
    size = (directory / "report.html").stat().st_size / 1e6
    print(f"{count:,} completions: {size:.1f} MB, shown in {shown} ms, with curves in {ready} ms, {busy:.2f} s busy")
    browser.run("openTab('completions')")
    groups = count // 8
    assert browser.run("$('count').textContent") == f"{groups:,} groups, {count:,} of {count:,} completions"
    titles = "[...document.querySelectorAll('.group h2')].map((h) => Number(h.firstChild.textContent.match(/\\d+/)[0]))"
    last = (count - 1) // 32 + 1
    assert browser.wait_for(titles)[0] == last
    browser.run("$('next').click()")
    browser.wait_for(f"$('page').value == '2' && {titles}[0] < {last}")
    browser.run("$('page').value = 1e9, $('page').onchange()")
    browser.wait_for(f"$('next').disabled && {titles}.at(-1) == 1")

    set_value = "((id, value) => { $(id).value = value; $(id).dispatchEvent(new Event('change')); })"
    browser.run(f"{set_value}('unit', 'completions'), {set_value}('sort', 'rewards/format')")
    rewards = "[...document.querySelectorAll('.chips')].map((c) => Number(c.children[1].textContent.split(' ')[1]))"
    browser.wait_for("document.querySelectorAll('.group').length == 24")
    highest = browser.run(rewards)
    assert highest == sorted(highest, reverse=True) and highest[0] > 0.98
    browser.run("$('direction').click()")
    browser.wait_for(f"{rewards}[0] < 0.1")
    lowest = browser.run(rewards)
    assert lowest == sorted(lowest)

    browser.run("$('query').value = 'QUESTION 7: ', search()")
    expected = len([n for n in range(count) if n // 8 % 700 == 7])
    assert browser.run("$('count').textContent") == f"{expected:,} of {count:,} completions"
    browser.wait_for("[...document.querySelectorAll('.prompt')].every((p) => p.textContent.startsWith('Question 7:'))")
    browser.run("$('query').value = 'no such thing', search()")
    assert browser.wait_for("$('list').textContent") == "Nothing matches."
    browser.run("$('query').value = '', search(), showStep(2)")
    assert browser.run("$('count').textContent") == f"32 of {count:,} completions"


@needs_chromium
def test_nothing_of_the_data_is_executed_and_all_of_it_is_shown(opened, tmp_path):
    write_hostile_run(tmp_path / "<b>run")
    browser = opened(tmp_path / "<b>run")
    browser.run("openTab('completions')")
    browser.wait_for("document.querySelectorAll('.group').length > 0")
    for where in (".text span", ".prompt", "#warnings", ".chips", "#list"):
        assert HOSTILE in browser.run(f"document.querySelector('{where}').textContent"), where
    assert "<b>right</b>" in browser.run("document.querySelector('.chips').textContent")
    assert browser.run("$('name').textContent") == "<b>run" == browser.run("document.title")
    browser.run("openTab('curves'), scrollTo(0, 1e6)")
    browser.wait_for("[...document.querySelectorAll('.plot')].at(-1).data?.length > 0")
    assert browser.run("document.querySelectorAll('img, b, i:not(.scale i)').length") == 0
    assert browser.run("window.owned") is None


@needs_chromium
def test_the_page_says_when_the_plotting_library_was_missing(opened, tmp_path, monkeypatch, capsys):
    page_module.plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    browser = opened(write_run(tmp_path / "run", steps=1))
    write_report(tmp_path / "run")
    page_module.plotly.cache_clear()
    assert capsys.readouterr().err.count("plotly is not installed") == 1
    assert browser.run("!$('no-curves').hidden") and "100%" not in browser.run("$('charts').textContent")
    browser.run("openTab('completions')")
    browser.wait_for("document.querySelectorAll('.group').length == 3")


def test_the_page_holds_nothing_of_the_data_but_base64(tmp_path):
    write_hostile_run(tmp_path / "run")
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "owned" not in page
    assert page.count("<script nonce=") == 1
    assert HOSTILE in unpack(page, "block-0")["rows"][0][1]
    assert unpack(page, "block-0")["prompts"][0] == f"<i>user</i>: {HOSTILE}"


def test_a_growing_run_gives_the_same_page_as_a_finished_one(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    write_run(directory, steps=0)
    monkeypatch.setattr("grpo_jax.callbacks.report.completions.BLOCK", 300)
    report, lines = Report(directory), JsonLines(directory / rundir.COMPLETIONS)
    report.on_start(run_of(directory))
    for number in range(1, 5):
        step = step_of(number)
        for row in completion_rows(number, step.prompts, step.rollout, step.scored, NAMES, 12):
            lines.write(row)
        report._due = 0.0
        report.on_step(step)
    grown = (directory / "report.html").read_text()
    whole = write_report(directory).read_text()
    blocks = [name for name in re.findall(r'id="(block-\d+)"', whole)]
    assert len(blocks) > 4 and blocks == re.findall(r'id="(block-\d+)"', grown)
    assert [unpack(grown, name) for name in blocks] == [unpack(whole, name) for name in blocks]
    assert unpack(grown, "run")["index"] == unpack(whole, "run")["index"]
    assert sum(len(unpack(whole, name)["rows"]) for name in blocks) == 48 == unpack(whole, "run")["index"]["count"]


def test_a_line_that_is_not_finished_is_read_when_it_is(tmp_path):
    directory = write_run(tmp_path / "run", steps=1)
    file = directory / rundir.COMPLETIONS
    text = file.read_text()
    file.write_text(text[:-30])
    report = Report(directory)
    report._completions.read()
    assert len(report._completions) == 11
    file.write_text(text)
    report._completions.read()
    assert len(report._completions) == 12


def test_a_run_pays_for_its_report_with_little_of_its_time(tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr("grpo_jax.callbacks.report.time.monotonic", lambda: now[0])

    def write(self):
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(Report, "_write", write)
    report = Report(tmp_path)
    report.on_start(run_of(tmp_path))
    for number in range(1, 2001):
        now[0] += 1.0
        report.on_step(step_of(number % 3 + 1, groups=1, samples=2))
    assert 2 * len(written) <= SHARE * now[0] + 2 and len(written) >= 9
    report.on_eval(evaluation_of(2000, 0.5))
    report.on_end({})
    report.close()
    assert written[-1] > written[-2] and len(written) <= 12


def test_warnings_are_kept_over_a_resume_and_a_stopped_run_says_so(tmp_path):
    directory = write_run(tmp_path / "run", steps=2)
    first = Report(directory)
    first.on_warning("before the start")
    first.on_start(run := run_of(directory))
    for number in (1, 2):
        run.course.step = number
        first.on_step(step_of(number))
        first.on_warning(f"in step {number}")
    first.close()
    assert ["State", "stopped"] in unpack((directory / "report.html").read_text(), "run")["figures"]
    second = Report(directory)
    second.on_start(run_of(directory, start=1))
    second.on_end({})
    second.close()
    run = unpack((directory / "report.html").read_text(), "run")
    assert [w["text"] for w in run["warnings"]] == ["before the start", "in step 1"]
    assert ["State", "finished"] in run["figures"]
    assert not (directory / "report.html.partial").exists()


def test_a_report_of_a_run_that_never_began_is_not_written(tmp_path):
    report = Report(tmp_path)
    report.on_warning("too early")
    report.close()
    assert list(tmp_path.iterdir()) == []


def test_long_curves_are_averaged_and_every_metric_is_drawn_once():
    rows = [{"step": n, "reward": float(n), "seconds/rollout": 1.0, "new/a": 1, "new/b": 2.0} for n in range(1, 4001)]
    drawn = charts([*rows, {"step": 5, "eval/accuracy": 0.5, "compiled": ["x"], "flag": True, "gone": None}])
    names = [trace["name"] for chart in drawn for trace in chart["traces"]]
    assert sorted(names) == ["eval/accuracy", "new/a", "new/b", "reward", "seconds/rollout"]
    reward = next(trace for chart in drawn for trace in chart["traces"] if trace["name"] == "reward")
    assert len(reward["x"]) == len(reward["y"]) <= MOST_POINTS
    assert reward["y"][0] == pytest.approx(2.0) and reward["x"] == reward["y"]
    assert next(chart for chart in drawn if chart["title"] == "new")["traces"][1]["name"] == "new/b"


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_the_command_says_what_is_no_run(tmp_path, capsys, place):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / place)]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and "Give a run's directory." in out.err and out.err.count("\n") == 1
    assert main([str(write_run(tmp_path / "run", steps=1))]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")


@needs_chromium
def test_a_page_that_cannot_be_shown_says_so(browser, tmp_path):
    page = write_report(write_run(tmp_path / "run", steps=1))
    page.write_text(re.sub(r'(id="index">)[^<]+', r"\1AAAA", page.read_text()))
    browser.call("Page.navigate", url=page.as_uri())
    said = browser.wait_for("document.getElementById('failed')?.textContent")
    assert "cannot be shown" in said and browser.run("!$('failed').hidden")
    assert len(browser.errors) == 1
    browser.errors.clear()


def test_of_a_long_run_the_page_holds_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(completions_module, "MOST", 20_000)
    monkeypatch.setattr(completions_module, "BLOCK", 4_000)
    directory = write_run(tmp_path / "run", steps=64)
    page, kept = write_report(directory).read_text(), completions_module.Completions(directory / rundir.COMPLETIONS)
    kept.read()
    assert kept.every in (2, 4, 8, 16) and kept._packed + kept._size <= 20_000
    assert sorted(set(kept.columns["step"])) == list(range(1, 65, kept.every))
    assert len(kept) == 12 * len(set(kept.columns["step"])) and len(kept.blocks()) == len(kept.starts) > 1
    assert unpack(page, "run")["index"] == {
        "count": len(kept),
        "columns": list(kept.columns),
        "functions": list(NAMES),
        "starts": kept.starts,
        "every": kept.every,
    }
    whole = kept.blocks(), kept.index()
    kept.read()
    assert (kept.blocks(), kept.index()) == whole


def test_a_warning_has_the_step_that_it_is_about(tmp_path):
    report, run = Report(tmp_path), run_of(tmp_path)
    report.on_start(run)
    run.course.step = 3
    report.on_warning("before the step is told of")
    assert read_json_lines(tmp_path / rundir.WARNINGS) == [{"step": 3, "text": "before the step is told of"}]
    assert run_of(tmp_path, start=5).course.step == 5
