"""Stop strings on the host: where a completion ends, whatever pieces of it are looked at together."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grpo_jax.rollout.stops import StopStrings


def read(ids: list[int]) -> str:
    """Bytes of UTF-8, half a character as a replacement."""
    return bytes(ids).decode(errors="replace")


def end_of(text: bytes, looks: list[int], stops: StopStrings) -> int:
    """Where a row ends that is looked at after so many tokens each time; 0 for never."""
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)[None]
    old = 0
    for length in looks:
        cut = int(stops.cut(np.array([0]), np.array([old]), np.array([length]), tokens)[0])
        if cut:
            return cut
        old = length
    return 0


@given(
    st.text("ab\N{SNOWMAN}", max_size=60),
    st.sampled_from([("ab",), ("ba", "aab"), ("\N{SNOWMAN}",), ("b\N{SNOWMAN}a", "bbbb")]),
    st.integers(0, 20),
    st.lists(st.integers(1, 180), max_size=6),
)
@example("aa\N{SNOWMAN}", ("\N{SNOWMAN}",), 0, [4])
def test_the_end_is_that_of_the_text_whenever_it_is_looked_at(text, strings, least, looks):
    """The first token behind the ``least`` first with which a string ends that was not there before."""
    data = text.encode()
    ends = {len(text[: i + len(s)].encode()) for s in strings for i in range(len(text)) if text.startswith(s, i)}
    expected = min((end for end in ends if end > least), default=0)
    places = sorted({min(look, len(data)) for look in looks} | {len(data)})
    assert end_of(data, places, StopStrings(strings, read, least)) == expected


def test_slots_without_a_row_are_not_read():
    tokens = np.frombuffer(b"abab", np.uint8).astype(np.int32).reshape(2, 2)
    cut = StopStrings(("ab",), read).cut(np.array([-1, 4]), np.array([0]), np.array([2, 2]), tokens)
    np.testing.assert_array_equal(cut, [0, 2])


def test_a_long_completion_is_not_read_from_its_beginning():
    seen = []
    stops = StopStrings(("end",), lambda ids: seen.append(len(ids)) or read(ids))
    tokens = np.full((1, 5000), ord("x"), np.int32)
    assert stops.cut(np.array([0]), np.array([4990]), np.array([5000]), tokens)[0] == 0
    assert max(seen) < 40


def test_texts_need_something_to_read_with():
    with pytest.raises(ValueError, match="stop_strings: got .* without a tokenizer"):
        StopStrings(("a",), None)
