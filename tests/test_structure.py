"""The layout docs/DESIGN.md draws, read from the code: imports point one way, flax stays in models/, no utils."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

PACKAGE = Path(__file__).parent.parent / "grpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

RANKS = [
    {"algo.spec", "algo.refusals", "config.fields", "quickstart.task"}
    | {"models.families", "models.fields", "models.keys", "models.rotary_spec", "models.spec"},
    {"types", "config", "functions", "evaluation", "lock", "manifest", "coordinator"},
    {"algo", "mesh"},
    {"models"},
    {"rollout", "rewards", "data", "batching"},
    {"learner", "scoring", "checkpoint", "metrics", "preflight", "rundir", "interrupt", "testing", "quickstart"}
    | {"peers"},
    {"callbacks", "collect", "evaluator"},
    {"learner.learning", "inputs"},
    {"beginning"},
    {"trainer"},
    {"cli"},
]
"""Lowest first; a part may import its own rank and what lies below. The longest matching name counts."""
HOST_ONLY = (
    "config",
    "functions",
    "rewards",
    "evaluation",
    "rundir",
    "interrupt",
    "lock",
    "manifest",
    "cli",
    "quickstart",
    "algo.spec",
    "algo.refusals",
)
"""Parts that never import jax themselves."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def rank(name: str) -> int:
    candidates = [
        (len(part), i) for i, parts in enumerate(RANKS) for part in parts if f"{name}.".startswith(f"{part}.")
    ]
    assert candidates, f"grpo_jax.{name} has no place in RANKS; docs/DESIGN.md says where parts lie"
    return max(candidates)[1]


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if _is_module(node.module, alias.name)}
    return found


def _is_module(package: str, name: str) -> bool:
    if not package.startswith("grpo_jax"):
        return False
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    return (folder / f"{name}.py").exists() or (folder / name).is_dir()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    name = name_of(path)
    if not name:
        return  # the package itself is lazy
    below = {m.removeprefix("grpo_jax.") for m in imported(path) if m.startswith("grpo_jax.")}
    wrong = {other for other in below if rank(other) > rank(name)}
    assert not wrong, f"grpo_jax.{name} imports {wrong}, which lie above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_flax_stays_in_models_and_jax_out_of_the_host_parts(path):
    name, modules = name_of(path), {m.split(".")[0] for m in imported(path)}
    assert "torch" not in modules
    assert "flax" not in modules or name.startswith("models")
    if name.startswith(HOST_ONLY):
        assert "jax" not in modules
    if name.startswith("algo"):
        assert not modules & {"flax", "optax", "transformers", "pydantic"}


def test_no_utils_and_no_file_over_450_lines():
    assert not [p for p in FILES if p.stem in ("utils", "helpers", "common", "misc")]
    assert not {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 450}


@pytest.mark.parametrize(
    "module", ["grpo_jax", "grpo_jax.config", "grpo_jax.cli", "grpo_jax.rewards", "grpo_jax.algo.spec"]
)
def test_importing_loads_no_jax(module):
    code = f"import sys, {module}; print(sorted({{'jax', 'flax', 'torch', 'transformers'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_tables_hold_the_names_of_the_specification():
    from grpo_jax import algo
    from grpo_jax.algo import spec

    for table, literal in [
        (algo.ADVANTAGES, spec.Estimator),
        (algo.SURROGATES, spec.Surrogate),
        (algo.KL_ESTIMATORS, spec.KLEstimator),
        (algo.AGGREGATIONS, spec.Aggregation),
        (algo.CORRECTIONS, spec.Correction),
        (algo.PRESETS, spec.Preset),
    ]:
        names = {name for part in get_args(literal) for name in (get_args(part) or (part,))}
        assert set(table) == names


def test_public_names_are_there():
    import grpo_jax

    for name in grpo_jax.__all__:
        assert getattr(grpo_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = grpo_jax.nothing


def test_contract_14_nothing_of_a_checkpoint_or_a_dataset_is_executed():
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        keywords = {keyword.arg for node in nodes if isinstance(node, ast.Call) for keyword in node.keywords}
        modules = {m.split(".")[0] for m in imported(path)}
        assert not modules & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
        assert not called & {"eval", "exec"}, path
        assert not keywords & {"trust_remote_code", "allow_pickle"}, path
