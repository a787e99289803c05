"""docs/FROM_TRL.md names every field of TRL's GRPOConfig and every argument of GRPOTrainer, and only fields of ours."""

import re
from pathlib import Path

import pytest

from grpo_jax.config import Section, TrainConfig
from grpo_jax.config.fields import unknown

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "FROM_TRL.md").read_text()
CODE = re.compile(r"`([^`]+)`")


def rows():
    """(section, cells) of every row of the tables below the one of defaults."""
    section = ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `") and not section.startswith("Defaults"):
            yield section, [cell.strip() for cell in line.strip("|").split("|")]


def fields(section=TrainConfig, prefix=""):
    for name, field in section.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, Section):
            yield from fields(part, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_name_of_trl_has_one_row():
    listed = [line.split() for line in (ROOT / "tests" / "trl_fields.txt").read_text().splitlines()[1:]]
    for kind in ("config", "trainer"):
        wanted = sorted(name for of, name in listed if of == kind)
        named = [
            name
            for section, cells in rows()
            if (section == "Arguments of GRPOTrainer") == (kind == "trainer")
            for name in CODE.findall(cells[0])
        ]
        assert sorted(named) == wanted


@pytest.mark.parametrize(("section", "cells"), list(rows()))
def test_a_row_names_fields_of_ours_or_says_why_not(section, cells):
    assert len(cells) == 3, cells
    ours, how = CODE.findall(cells[1]), cells[2]
    assert set(ours) <= set(fields()), ours
    assert ours or how, "without a field of ours it has to say why"
    dotted = [
        name for name in CODE.findall(how) if re.fullmatch(r"(data|model|rollout|algorithm|optim|mesh)\.[\w.]+", name)
    ]
    assert set(dotted) <= set(fields())


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (name, CODE.findall(cells[1])[0])
        for section, cells in rows()
        if cells[1]
        for name in CODE.findall(cells[0])
        if name not in TrainConfig.model_fields
    ],
)
def test_who_types_a_name_of_trl_is_told_ours(name, ours):
    assert ours in unknown(TrainConfig, name)
