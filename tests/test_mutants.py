"""Planted mistakes, scripts/mutate.py: each can be planted and names a test; what a verdict is, and whose turn."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "mutate.py"


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_can_be_planted_and_names_a_test(mutate):
    mutants = mutate.read_table()
    assert mutate.problems(mutants) == []
    inside = [mutant for mutant in mutants if mutant.file.startswith("algo/")]
    assert len(inside) >= 104 and len(mutants) - len(inside) >= 40
    wrong = mutants[0]._replace(old="not there", test="tests/test_mutants.py::test_nothing[1]")
    assert len(mutate.problems([wrong, wrong])) == 6  # for each: the text, the name, the test


@pytest.mark.parametrize(
    ("ends", "caught", "said"),
    [
        ([("failed", "assert 1 == 2")], True, "`tests/x.py::test_0`"),
        ([("failed", "jax.errors.X: no")], True, "`tests/x.py::test_0`"),
        ([("passed", "")], False, "**survived**"),
        ([("skipped", "no torch")], False, "**survived**"),
        ([("failed", "ImportError: cannot import name 'x'")], False, "**no verdict**"),
        ([("failed", "NameError: name 'x' is not defined")], False, "**no verdict**"),
        ([("error", "failed on setup")], False, "**no verdict**"),
    ],
)
def test_a_test_that_ran_and_failed_is_a_verdict(mutate, monkeypatch, tmp_path, ends, caught, said):
    path = tmp_path / "grpo_jax" / "x.py"
    path.parent.mkdir()
    path.write_text("a = 1\n")
    seen = []

    def pytest_(work, tests, *options):
        seen.append(path.read_text())
        return [mutate.Case(f"tests/x.py::test_{n}", *end, 0.0) for n, end in enumerate(ends)]

    monkeypatch.setattr(mutate, "pytest", pytest_)
    mutant = mutate.Mutant("x", "x.py", "1", "2", "tests/x.py::test_0")
    got = mutate.verdict(mutant, tmp_path, None)
    assert got[0] is caught and got[1].startswith(said)
    assert seen == ["a = 2\n"] and path.read_text() == "a = 1\n"


def test_named_tests_pass_and_run_without_a_mistake(mutate, monkeypatch, tmp_path):
    cases = [("tests/x.py::test_a[1]", "passed"), ("tests/x.py::test_a[2]", "passed"), ("tests/x.py::test_b", "passed")]
    monkeypatch.setattr(mutate, "pytest", lambda *_: [mutate.Case(test, end, "", 0.0) for test, end in cases])
    mutate.check_sound(tmp_path, ["tests/x.py::test_a", "tests/x.py::test_b"], 1)
    with pytest.raises(RuntimeError, match=r"test_a\[3\]: did not run; is it marked slow"):
        mutate.check_sound(tmp_path, ["tests/x.py::test_a[3]"], 1)
    cases[2] = ("tests/x.py::test_b", "skipped")
    with pytest.raises(RuntimeError, match="test_b: skipped"):
        mutate.check_sound(tmp_path, ["tests/x.py::test_b"], 1)


def test_every_mutant_has_its_day(mutate):
    mutants = [mutate.Mutant(str(n), "x.py", "a", "b") for n in range(23)]
    days = [mutate.of_the_day(mutants, 5, day) for day in range(5)]
    assert all(len(set(day)) == 5 for day in days) and {m for day in days for m in day} == set(mutants)
    assert days[0] == mutate.of_the_day(mutants[::-1], 5, 0) != days[1]
    others = mutate.of_the_day(mutants, 5, 0, but=days[0])
    assert len(others) == 5 and not set(others) & set(days[0])


def test_changed_are_those_whose_file_test_or_row_is_another(mutate, monkeypatch):
    mutants = [mutate.Mutant(name, f"{name}.py", "1", "2", f"tests/test_{name}.py::test_x[1]") for name in "abcd"]
    table = "".join(
        f"[[mutant]]\nname = '{m.name}'\nfile = '{m.file}'\nold = '1'\nnew = '{3 if m.name == 'c' else 2}'\n"
        f"test = '{m.test}'\n"
        for m in mutants
    )
    answers = {"diff": "grpo_jax/a.py\ndocs/x.md", "ls-files": "tests/test_b.py", "show": table}
    monkeypatch.setattr(mutate, "git", lambda word, *_: answers[word])
    assert [m.name for m in mutate.changed(mutants, "HEAD")] == ["a", "b", "c"]
