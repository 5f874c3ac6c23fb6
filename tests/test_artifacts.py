"""Done means manifest; nothing is replaced; two runs do not mix. On a folder and on a real S3 server."""

import json
import subprocess
import sys
import time

import pytest

from mulcot_ray import artifacts
from mulcot_ray.artifacts import Manifest, Run, begin, find, need, read_rows, resolve_model
from mulcot_ray.errors import ArtifactMissing, Busy, ConfigError, ConservationError, RecipeChanged
from mulcot_ray.records import Prediction, Reason, Reject, Sentiment, from_row, to_table
from mulcot_ray.storage import Store


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        return Store(str(tmp_path / "root"))
    bucket = request.getfixturevalue("s3_bucket")
    return Store(f"s3://{bucket}/{tmp_path.name}")


def predictions(*ids):
    return to_table(Prediction, [Prediction(i, Sentiment.NEUTRAL, "m", "c") for i in ids])


def test_life_of_a_result(store):
    run = begin(store, "predictions", "x", {"a": 1})
    assert isinstance(run, Run) and find(store, "predictions", "x") is None
    with run:
        assert run.write_table("part-0", predictions("1", "2"))
        assert not run.write_table("part-0", predictions("other"))  # created once, never replaced
        run.write_table("part-0", to_table(Reject, [Reject("3", "label", Reason.EMPTY_TEXT, "")]), rejects=True)
        made = run.commit(3, stats={"k": 1})
    assert (made.rows, made.rejects, made.rejects_by_reason) == (2, 1, {"empty_text": 1})
    again = begin(store, "predictions", "x", {"a": 1})
    assert isinstance(again, Manifest) and again == made == need(store, "predictions", "x")
    assert [from_row(Prediction, r).post_id for r in read_rows(store, made)] == ["1", "2"]
    assert [r["reason"] for r in read_rows(store, made, rejects=True)] == ["empty_text"]
    assert store.names("predictions") == ["x"] and "lease.json" not in store.files("predictions/x")


def test_another_recipe_under_the_same_name_is_named(store):
    begin(store, "predictions", "x", {"teach": {"seed": 1, "n": 2}})
    with pytest.raises(RecipeChanged, match="teach.seed: 1 → 7"):  # begun is enough
        begin(store, "predictions", "x", {"teach": {"seed": 7, "n": 2}})


def test_lost_rows_are_never_published(store):
    run = begin(store, "predictions", "x", {})
    with run, pytest.raises(ConservationError, match="3 rows in, 1 out and 0 rejected"):
        run.write_table("part-0", predictions("1"))
        run.commit(3)
    assert find(store, "predictions", "x") is None


def test_a_second_run_is_refused_and_a_dead_one_replaced(store):
    with begin(store, "predictions", "x", {}), pytest.raises(Busy, match="is being written by process"), begin(store, "predictions", "x", {}):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lease = {"owner": "other", "host": artifacts._host(), "pid": dead.pid, "time": artifacts._utc(time.time())}
    store.write("predictions/x/lease.json", json.dumps(lease).encode())
    with begin(store, "predictions", "x", {}):
        assert json.loads(store.read("predictions/x/lease.json"))["owner"] != "other"
    store.write("predictions/x/lease.json", json.dumps({**lease, "host": "elsewhere", "time": artifacts._utc(time.time() - 61)}).encode())
    with begin(store, "predictions", "x", {}):
        pass


def test_the_plan_of_the_first_attempt_stands(store):
    begin(store, "predictions", "x", {}, {"rows_per_chunk": 10})
    assert begin(store, "predictions", "x", {}, {"rows_per_chunk": 99}).plan == {"rows_per_chunk": 10}


def test_missing_results_say_what_there_is(store):
    with pytest.raises(ArtifactMissing, match="no posts 'nope'.*there: none.*mulcot import"):
        need(store, "posts", "nope")


def test_a_model_is_fetched_whole(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MULCOT_CACHE", str(tmp_path / "cache"))
    run = begin(store, "models", "m", {})
    with run:
        store.write("models/m/config.json", b"{}")
        store.write("models/m/adapter/a.safetensors", b"123")
        manifest = run.commit(0)
    folder, fingerprint = resolve_model(store, "m")
    assert (folder / "adapter" / "a.safetensors").read_bytes() == b"123" and fingerprint == manifest.fingerprint
    assert manifest.files["config.json"]["sha256"].startswith("44136fa3")


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "a b", "x" * 101])
def test_bad_names(tmp_path, name):
    with pytest.raises(ConfigError, match="name"):
        begin(Store(str(tmp_path)), "posts", name, {})


def test_secrets_stay_out(store, monkeypatch):
    monkeypatch.setenv("MULCOT_TOKENS", "very-secret")
    with begin(store, "predictions", "x", {}) as run:
        run.commit(0)
    assert not any(b"very-secret" in (store.read(f"predictions/x/{f}") or b"") for f in store.files("predictions/x"))
