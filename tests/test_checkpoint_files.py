"""What is on the disk of a run: verified before it is used, and sound after a kill at any moment."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import checkpoint, manifest, rundir
from grpo_jax.checkpoint import CheckpointStore, Found
from grpo_jax.manifest import NoManifestError
from grpo_jax.metrics import JsonLines, read_json_lines
from grpo_jax.types import TrainState

FILES = {"state/d/x": bytes(range(256)) * 3, "state/meta": b"{}", "record/metadata": b'{"step": 4}', "empty": b""}


@pytest.fixture
def place(tmp_path):
    """A sealed directory, as step 4."""
    for name, data in FILES.items():
        (tmp_path / "4" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "4" / name).write_bytes(data)
    manifest.seal(tmp_path / "4", "4", manifest.digests(tmp_path / "4"))
    return tmp_path / "4"


def test_any_flipped_bit_is_found_and_its_file_named(place):
    assert manifest.fault(place, "4") is None
    for name in (*FILES, manifest.MANIFEST):
        path = place / name
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 1 + len(whole)):
            broken = bytearray(whole)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            said = manifest.fault(place, "4")
            assert said is not None and (name == manifest.MANIFEST or said.startswith(name)), (name, bit, said)
        path.write_bytes(whole)
    assert manifest.fault(place, "4") is None


def test_files_that_are_gone_cut_or_of_another_step_are_found(place):
    other = shutil.copytree(place, place.parent / "6")
    assert manifest.fault(other, "6") == "manifest.json is that of '4'"
    (other / "record" / "metadata").write_bytes(b'{"step": 6}')
    manifest.seal(other, "6", manifest.digests(other))
    shutil.copy(other / "record" / "metadata", place / "record" / "metadata")
    assert manifest.fault(place, "4") == "record/metadata has other bytes than were written"
    shutil.rmtree(other / "record")
    assert manifest.fault(other, "6") == "record/metadata is missing"
    for text, says in (('{"of": "6", "files": {}}', "names no file"), ("[" * 10**5, "cannot be read")):
        (other / manifest.MANIFEST).write_text(text)
        assert manifest.fault(other, "6").startswith(f"manifest.json {says}")
    (other / manifest.MANIFEST).unlink()
    with pytest.raises(NoManifestError):
        manifest.fault(other, "6")


def test_hosts_hash_shares_that_are_all_files_together(place):
    parts = [manifest.digests(place, share, 3) for share in range(3)]
    assert sum(map(len, parts)) == len(FILES) and {k: v for p in parts for k, v in p.items()} == manifest.digests(place)
    (place / "state" / "d" / "x").write_bytes(b"")
    assert sum(manifest.fault(place, "4", share, 3) is not None for share in range(3)) == 1


def saved(directory, *steps, keep=None):
    """A store with tiny checkpoints; the one of step k holds k."""
    store = CheckpointStore(directory, keep)
    for step in steps:
        store.save(step, state_of(step), {"step": step})
    store.wait()
    return store


def state_of(step):
    return TrainState({"x": jnp.full(3, float(step))}, {}, jnp.int32(step))


def flip(directory, step, name="state/manifest.ocdbt"):
    flip_in(directory / "checkpoints" / str(step) / name)


def flip_in(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def test_the_newest_sound_checkpoint_is_taken_and_the_damaged_one_named_and_saved_again(tmp_path):
    store = saved(tmp_path, 2, 4, 6)
    flip(tmp_path, 6)
    (tmp_path / "checkpoints" / "99").mkdir()
    found = store.newest_sound()
    assert found.step == 4 and found.lines() == [
        "the checkpoint of step 99 was not finished (has no manifest.json): that of step 4 is taken",
        "the checkpoint of step 6 is damaged (state/manifest.ocdbt has other bytes than were written): that of step 4 "
        "is taken",
    ]
    assert store.restore(4, state_of(0))[1] == {"step": 4}
    store.set_aside(found.passed_over)
    assert store.steps() == [2, 4]
    store.save(6, state_of(6), {"step": 6})
    store.wait()
    assert store.newest_sound() == Found(6) and (tmp_path / "checkpoints" / "6.damaged" / "record").is_dir()
    store.close()


def test_without_a_sound_checkpoint_nothing_is_used_or_thrown_away(tmp_path):
    store = saved(tmp_path, 2, 4)
    for step in (2, 4):
        flip(tmp_path, step, "record/metadata")
    with pytest.raises(
        ValueError, match=r"^output_dir: no checkpoint in .* is whole \(step 4: record/metadata has oth"
    ):
        store.newest_sound()
    assert store.steps() == [2, 4]
    store.close()


def test_a_checkpoint_of_an_older_version_is_unverified_and_says_so(tmp_path):
    store = saved(tmp_path, 2, 4)
    store.save_reference({"x": jnp.ones(2)})
    for name in ("checkpoints/2", "checkpoints/4", "reference"):
        (tmp_path / name / manifest.MANIFEST).unlink()
    found = store.newest_sound()
    assert (found.step, found.verified, dict(found.passed_over)) == (4, False, {})
    assert "step 4 has no manifest.json (an older version wrote it, " in found.lines()[0]
    assert "has no manifest.json, as older versions wrote none" in store.check_reference()[0]
    store.save(6, state_of(6), {})
    store.wait()
    assert store.newest_sound() == Found(6), "the next one is sealed"
    store.close()


@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_a_damaged_reference_is_refused_by_its_file(tmp_path, harm):
    store = CheckpointStore(tmp_path, None)
    store.save_reference({"x": jnp.ones(2)})
    if harm == "flip":
        flip_in(tmp_path / "reference" / "manifest.ocdbt")
        why = "manifest.ocdbt has other bytes"
    else:
        shutil.rmtree(tmp_path / "reference")
        why = "it is missing"
    with pytest.raises(ValueError, match=rf"the run started from, .*reference, are damaged \({why}"):
        store.check_reference()
    store.close()


class Killed(BaseException):
    """Ends the thread that writes where a kill would."""


def killed(*_, **__):
    raise Killed


POINTS = {
    "before the files are hashed": (manifest, "digests", 2),
    "before the manifest is written": (manifest, "seal", 2),
    "while the manifest is written": (manifest, "_to_disk", 2),
    "before an older one is deleted": (checkpoint, "_rename_free", 3),
    "while an older one is deleted": (checkpoint.shutil, "rmtree", 3),
}
"""What does not return any more when the third checkpoint is written -> the step that is found after that."""


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_save_leaves_a_sound_checkpoint(tmp_path, monkeypatch, point):
    module, name, newest = POINTS[point]
    store = saved(tmp_path, 1, 2, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        store.save(3, state_of(3), {"step": 3})
        with pytest.raises(Killed):
            store.wait()
    for name in ("checkpoints/4.orbax-checkpoint-tmp", "reference.deleted", "mine.deleted"):
        (tmp_path / name).mkdir()
    store = CheckpointStore(tmp_path, 2)
    store.tidy()
    assert {place.name for place in tmp_path.iterdir()} == {"checkpoints", "mine.deleted"}
    found = store.newest_sound()
    assert found.step == newest
    restored, record = store.restore(newest, state_of(0))
    assert record == {"step": newest}
    np.testing.assert_array_equal(restored.params["x"], newest)
    store.set_aside(found.passed_over)
    store.save(newest + 1, state_of(newest + 1), {})
    store.close()
    names = {place.name for place in (tmp_path / "checkpoints").iterdir()} - {"3.damaged"}
    assert names == {str(newest), str(newest + 1)}


def test_the_only_sound_checkpoint_outlives_a_kill_of_the_next_save(tmp_path, monkeypatch):
    store = saved(tmp_path, 1, keep=1)
    monkeypatch.setattr(manifest, "seal", killed)
    store.save(2, state_of(2), {})
    with pytest.raises(Killed):
        store.wait()
    assert store.newest_sound().step == 1
    store.close()


def test_the_record_is_that_of_the_moment(tmp_path):
    store = CheckpointStore(tmp_path, None)
    record = {"accuracy": [0.1]}
    store.save(1, state_of(1), record)
    record["accuracy"].append(0.2)
    store.wait()
    assert store.restore(1, state_of(0))[1] == {"accuracy": [0.1]}
    store.close()


LINES = [json.dumps({"step": step, "text": "é" * 20}, ensure_ascii=False).encode() + b"\n" for step in range(6)]


@pytest.mark.parametrize("size", [1, 15, 30, 31, len(LINES[5]) - 1])
def test_a_line_cut_anywhere_is_repaired(tmp_path, size):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES[:5]) + LINES[5][:size])
    whole = size == len(LINES[5]) - 1
    assert [row["step"] for row in read_json_lines(path)] == list(range(6 if whole else 5))
    lines = JsonLines(path, keep_below=6)
    lines.write({"step": 6})
    lines.close()
    assert [row["step"] for row in read_json_lines(path)] == [*range(6 if whole else 5), 6]
    assert lines.damaged == []


@pytest.mark.parametrize(
    "broken", [b'{"step": 2, "te\n', LINES[2][:-9] + b"\xc3\n", b'{"stfp": 2}\n', b'{"step": 92}\n']
)
def test_a_damaged_line_costs_none_of_those_behind_it(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*LINES[:2], broken, *LINES[3:]]))
    lines = JsonLines(path, keep_below=5)
    lines.close()
    assert [row["step"] for row in read_json_lines(path)] == [0, 1, 3, 4]
    if b"92" not in broken:
        assert lines.damaged == [3] and path.with_name("metrics.jsonl.damaged").read_bytes() == broken


def test_what_a_run_decided_and_ran_on_may_be_damaged(tmp_path):
    (tmp_path / rundir.METRICS).touch()
    for text in ("{", "[1]", '{"rollout.slots": "8"}', '{"rollout.slotr": 8}', '{"rollout.slots": -3}'):
        (tmp_path / rundir.DECIDED).write_text(text)
        with pytest.raises(ValueError, match=r"decided.json is damaged, .*; delete it, and that is decided again"):
            rundir.decided(tmp_path, {"rollout.slots": 8})
    (tmp_path / rundir.ENVIRONMENT).write_text('[{"from_step": 0, "jax": "1"')
    assert rundir.note_environment(tmp_path, 3, {"jax": "2"}) == ["environment.json cannot be read and is begun again"]
    assert rundir.note_environment(tmp_path, 4, {"jax": "2"}) == []
