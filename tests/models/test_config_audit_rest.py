"""Fields of config classes, audited by config_audit.py: the other half of the families."""

import pytest
from config_audit import HALVES, audit


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("family", HALVES[1])
def test_no_field_is_ignored_that_transformers_reads(family, tmp_path):
    audit(family, tmp_path)
