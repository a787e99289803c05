"""How values of a dataset get to a reward's process."""

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import MappingProxyType
from uuid import UUID

import numpy as np
import pytest

from grpo_jax.rewards.attempts import encode
from grpo_jax.rewards.call import Batch
from grpo_jax.rewards.travel import why_it_stays


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (date(2024, 1, 2), "2024-01-02"),
        (datetime(2024, 1, 2, 3, 4, tzinfo=UTC), "2024-01-02T03:04:00+00:00"),
        (time(3, 4), "03:04:00"),
        (timedelta(minutes=1.5), 90.0),
        (Decimal("3.10"), "3.10"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (np.array([{"a": np.float32(1)}, None], object), [{"a": 1.0}, None]),
        (np.datetime64("2024-01-02"), "2024-01-02"),
        (np.array(["2024-01-02T03:04:05"], "datetime64[ns]"), ["2024-01-02T03:04:05.000000000"]),
        (np.timedelta64(1500, "ms"), 1.5),
        (np.bool_(True), True),
        (MappingProxyType({"a": (1, 2)}), {"a": [1, 2]}),
        ("\ud83d", "\ud83d"),
    ],
)
def test_a_column_travels_in_a_stated_form(value, arrives):
    assert why_it_stays(value) is None
    sent = json.loads(encode(Batch([""], [""], [[]], {"x": [value]})))
    assert sent["columns"] == {"x": [arrives]}


@pytest.mark.parametrize("value", [b"bytes", object(), {1, 2}, 1j, {(1, 2): 3}, [object()]], ids=type)
def test_what_has_no_form_stays(value):
    assert why_it_stays(value)
    with pytest.raises(ValueError, match="column 'x': cannot be sent to a reward's process"):
        encode(Batch([""], [""], [[]], {"x": [value]}))
