"""What the benchmarks of rollouts and steps count, and how they take turns; the measuring itself is not run here."""

import importlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def module(name):
    return importlib.import_module(name)


def small(**fields):
    shape = {"layers": 2, "width": 4, "heads": 2, "kv_heads": 1, "head_dim": 2, "ffn": 8}
    work = {"vocab": 16, "prompts": 2, "samples": 2, "prompt_len": 3, "cap": 5, "mean": 5}
    return module("contest").Work(**{**work, **shape, **fields})


def test_lengths_are_those_stated():
    for work in (*module("bench_rollout").WORKS.values(), *module("bench_step").WORKS.values()):
        limits = work.limits()
        assert limits.shape == (work.prompts * work.samples,) and 1 <= limits.min() <= limits.max() <= work.cap
        assert abs(limits.mean() - work.mean) < 0.15 * work.mean
    assert module("bench_rollout").WORKS["short"].limits().tolist() == [64] * 64


@pytest.mark.parametrize(("name", "billions"), [("0.5b", 0.494), ("1.5b", 1.544), ("7b", 7.616)])
def test_the_cards_models_have_the_sizes_of_qwen(name, billions):
    assert module("bench_rollout").WORKS[name].model().param_count / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_floor_counts_what_must_be_read_and_computed():
    contest = module("contest")
    work = small()
    floor = contest.Floor(work, contest.Machine(1e3, 1e3), body=50, head=64, pair=32, token=16, number=4)
    of = contest.Floor.of(work, floor.machine)
    assert (of.head, of.pair, of.token, of.number) == (64, 32, 2 * 2 * 2 * 4, 4)
    assert of.body + of.head == work.model().param_count
    assert floor.prefill() == pytest.approx(2 * (3 * 100 + 32 * 4.5 + 128) / 1e3)
    reads = [4 * 114 + 16 * (6 + 4 * step) for step in range(5)]
    assert floor.decode() == pytest.approx(sum(max(read, 4 * 2 * 114) for read in reads) / 1e3)
    tokens, pairs = 6 + 20, 2 * 4.5 + 4 * (15 + 12.5)
    forward = (tokens * 100 + pairs * 32 + 20 * 128) / 1e3
    assert floor.step() == pytest.approx(floor.prefill() + floor.decode() + 3 * forward + 30 * 114 / 1e3)


def test_a_floor_reads_only_what_is_alive():
    contest = module("contest")
    work = small(cap=40, mean=8, spread=0.8, samples=8)
    limits = work.limits()
    floor = contest.Floor(work, contest.Machine(1e30, 1.0), body=1, head=0, pair=0, token=1, number=1)
    own = sum(limit * (limit - 1) / 2 for limit in limits)
    prompts = 3 * sum(limits.reshape(2, 8).max(1))
    assert len(set(limits)) > 3 and floor.decode() == pytest.approx(limits.max() + own + prompts)


def test_contestants_alternate_and_a_slow_one_has_one_turn():
    contest, order = module("contest"), []

    def clock(name, seconds):
        return lambda: order.append(name) or seconds

    assert contest.turns_of(clock("peer", 3.0), clock("ours", 1.0), 3) == ([3.0] * 3, [1.0] * 3)
    assert order == ["peer", "ours"] * 3
    assert contest.turns_of(clock("peer", 1e3), clock("ours", 1.0), 3) == ([1e3], [1.0])


def test_a_ratio_is_that_of_turns_and_says_how_many_there_were():
    line = module("contest").row(small(), "peer", [2.0, 8.0, 9.0], [1.0, 2.0, 9.0])
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["peer", "8.00", "2.00", "2.0", "2", "3 turns"]
    assert module("contest").row(small(), "peer", [2.0], [1.0]).endswith("| once |")


def test_a_work_is_changed_by_name_or_refused():
    contest = module("contest")
    assert contest.changed(small(), ["layers=7", "dtype=bfloat16", "spread=0.5"]) == small(
        layers=7, dtype="bfloat16", spread=0.5
    )
    with pytest.raises(ValueError, match="--set: got 'depth=3'. Use NAME=VALUE with a name among vocab"):
        contest.changed(small(), ["depth=3"])


def test_a_contestant_in_its_process_waits_for_its_turn_and_a_broken_one_is_said(capsys):
    contest = module("contest")
    code = "print('hello'); print('ready', flush=True)\nfor _ in open(0): print('seconds 2.5', flush=True)"
    peer = contest.Contestant("peer", [sys.executable, "-c", code])
    assert [peer.seconds(), peer.seconds()] == [2.5, 2.5]
    peer.close()
    assert "peer: hello" in capsys.readouterr().err
    nothing = contest.against("no such", "peer_generate.py", small(), Path(sys.executable), lambda: 1.0, 3)
    assert nothing == ([], []) and "no such was not measured: a contestant ended" in capsys.readouterr().out


def test_the_gate_is_silent_while_warming_up_then_times_each_step(monkeypatch, capsys):
    peer_step = module("peer_step")
    clock = iter([0.0, 1.0, 2.0, 5.0, 6.5, 9.5])
    monkeypatch.setattr(peer_step.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
    gate = peer_step.Gate(2)
    gate()
    assert capsys.readouterr().out == ""
    gate()
    gate()
    assert capsys.readouterr().out.split() == ["ready", "seconds", "3.0"]


def test_prompts_of_letters_have_the_length_in_tokens_that_is_asked():
    peer_step = module("peer_step")
    texts = peer_step.prompts({"prompts": 2, "prompt_len": 9})
    tokenizer = peer_step.letters(61)
    lengths = {len(ids) for ids in tokenizer(texts)["input_ids"]}
    assert lengths == {9} and len(set(texts)) == len(texts) == 100
    ids = np.array(tokenizer(texts)["input_ids"])
    assert ids.min() >= 2 and ids.max() < 28


def test_a_profile_adds_up_the_decode_steps_by_their_source():
    profile = module("profile_rollout")
    text = (
        '  %fusion.2 = f32[4]{0} fusion(x), metadata={op_name="jit(segment)/while/body/head" stack=1}\n'
        '  ROOT %add.1 = f32[4]{0} add(y), metadata={op_name="jit(segment)/add"}\n'
    )
    source = profile.sources([text])
    assert source == {"fusion.2": "head", "add.1": "add"}

    def event(name, duration, hlo_module="jit_segment", **more):
        return {"ph": "X", "name": name, "dur": duration, "args": {"hlo_module": hlo_module, "hlo_op": name}, **more}

    events = [event("fusion.2", 2000), event("fusion.2", 1000), event("copy.7", 500), event("while", 9e6)]
    events += [event("fusion.2", 9e6, "jit_prefill"), event("add.1", 9e6, ph="M"), {"ph": "X", "name": "x", "dur": 9e6}]
    assert profile.totals(events, source) == [("head", 3.0, 2), ("copy", 0.5, 1)]
