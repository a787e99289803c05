"""Where the time of each test goes: a pytest plugin, registered by conftest.py; scripts/show_durations.py shows it.

For each test: its wall time with its fixtures, the processor time of its process, and the seconds spent tracing and
lowering for XLA, compiling (or reading a program from the cache), waiting for processes it had started, and sleeping;
how many programs and processes; whether Hypothesis chose the inputs. The kinds are measured in all threads, so they may
add up to more than the wall time.
"""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

FILE = "tests.jsonl"
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}


class Durations:
    """The plugin of one process: a worker measures, the process that prints collects and writes."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seconds: Counter[str] = Counter()
        self.rows: dict[str, dict[str, Any]] = {}
        self._waiting = False
        self._listening = False
        self._cpu = 0.0

    def install(self) -> None:
        """Measure sleeps and waits for processes from here on, in this process."""
        sleep, popen = time.sleep, subprocess.Popen
        start, wait, communicate = popen.__init__, popen.wait, popen.communicate

        def slept(seconds: float) -> None:
            with self._measured("sleep"):
                sleep(seconds)

        def started(*args: Any, **options: Any) -> None:
            self.seconds["processes"] += 1
            start(*args, **options)

        def waited(method: Any) -> Any:
            def timed(*args: Any, **options: Any) -> Any:
                with self._measured("process"):
                    return method(*args, **options)

            return timed

        time.sleep, popen.__init__ = slept, started  # type: ignore[method-assign,assignment]
        popen.wait, popen.communicate = waited(wait), waited(communicate)  # type: ignore[method-assign]

    @contextmanager
    def _measured(self, kind: str) -> Iterator[None]:
        """Add the body's time to a kind; what it calls of the kinds itself is not counted twice."""
        if self._waiting:
            yield
            return
        self._waiting, begun = True, time.perf_counter()
        try:
            yield
        finally:
            self._waiting = False
            self.seconds[kind] += time.perf_counter() - begun

    def _on_event(self, name: str, seconds: float, **_: Any) -> None:
        kind = EVENTS.get(name)
        if kind:
            self.seconds[kind] += seconds
            self.seconds["programs"] += kind == "compile"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Count from zero for each test."""
        if not self._listening:  # here and not earlier: conftest.py sets what jax reads when it is imported
            import jax

            jax.monitoring.register_event_duration_secs_listener(self._on_event)
            self._listening = True
        self.seconds.clear()
        self._cpu = time.process_time()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
        """Hand what was measured to the process that prints, with the last of a test's three reports."""
        report = yield
        if report.when == "teardown":
            hypothesis = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
            measured = {**self.seconds, "cpu": time.process_time() - self._cpu, "hypothesis": int(hypothesis)}
            report.user_properties.append(("durations", measured))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect, in one process or from the workers, and write a test's row when its last report has come."""
        if hasattr(self.config, "workerinput") or not hasattr(self.config, "cache"):
            return
        row = self.rows.setdefault(report.nodeid, {"test": report.nodeid, "wall": 0.0, "outcome": "passed"})
        row["wall"] += report.duration
        if report.outcome != "passed":
            row["outcome"] = report.outcome
        if report.when == "teardown":
            row |= dict(report.user_properties).get("durations", {})
            with self.place.open("a") as file:
                print(json.dumps(self.rows.pop(report.nodeid)), file=file)

    @cached_property
    def place(self) -> Path:
        """The file of this session, empty."""
        place = self.config.cache.mkdir("durations") / FILE  # type: ignore[union-attr]
        place.write_text("")
        return place
