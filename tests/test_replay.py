"""An old and a new version over a past night, and from a label back to what made it; on a real Ray with the scripted engine."""

import json
import sys
from collections import Counter

import nights
import pytest
from nights import dump, posts, quiet, scripted, version

from mulcot_ray.errors import InputError
from mulcot_ray.labeling.gates import Gates
from mulcot_ray.labeling.night import night, night_rows
from mulcot_ray.labeling.publishing import publish
from mulcot_ray.labeling.version import NightSettings
from mulcot_ray.lineage import lineage, show
from mulcot_ray.replay import replay
from mulcot_ray.storage import Store

pytestmark = pytest.mark.ray
SETTINGS = NightSettings(name="t", gates=Gates())


@pytest.fixture(scope="module", autouse=True)
def _scripts_travel_by_value(ray_session):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cloudpickle.register_pickle_by_value(nights)


def other(messages, sampling):
    """As the old one, but that every post about the night is neutral."""
    text = messages[-1]["content"][-1]["text"]
    return nights.FULL.format("neutral") if sum(map(ord, text)) % 7 == 0 else nights.script(messages, sampling)


def test_replay(tmp_path, runtime):
    rows = posts(200, 21)
    path, store = dump(tmp_path / "dump", "2026-11-22", rows), Store(str(tmp_path / "root"))
    old, new = version(store), version(store, engines={"student": scripted("new", other)})
    first, _ = night(store, "2026-11-22", str(path), version=old, settings=SETTINGS, runtime=runtime, steps=quiet)
    manifest, fresh = replay(store, "2026-11-22", str(path), old, new, settings=SETTINGS, runtime=runtime, steps=quiet)
    report = json.loads(store.read(f"evaluations/{manifest.name}/report.json"))
    a = {r["post_id"]: r["label"] for r in night_rows(store, first)}
    second = next(n for n in store.names("nights") if n != first.name)
    from mulcot_ray.artifacts import need

    b = {r["post_id"]: r["label"] for r in night_rows(store, need(store, "nights", second))}
    moved = Counter((a[i], b[i]) for i in a)
    assert fresh and report["posts"] == 200 and report["matrix"] == {x: {y: moved[x, y] for y in report["matrix"]} for x in report["matrix"]}
    assert report["disagree"] == sum(n for (x, y), n in moved.items() if x != y) > 5 and report["only"] == {"old": 0, "new": 0}
    low, high = report["rate"]["interval"]
    assert low < report["rate"]["value"] == report["disagree"] / 200 < high
    texts = {r["id"]: r["text"] for r in rows}
    assert report["examples"] and all(e["text"] == texts[e["post_id"]] and e["new"] == "neutral" != e["old"] for e in report["examples"])
    page = store.read(f"evaluations/{manifest.name}/report.html").decode()
    assert f"mulcot publish 2026-11-22 --night {second}" in page and "There is no gold here" in page
    again, fresh = replay(store, "2026-11-22", str(path), old, new, settings=SETTINGS, runtime=runtime, steps=quiet)
    assert not fresh and again == manifest


def test_lineage(tmp_path, runtime, sample_store):
    rows = posts(30, 22)
    path, store = dump(tmp_path / "dump", "2026-11-22", [*rows, b"{"]), Store(str(tmp_path / "root"))
    m, _ = night(store, "2026-11-22", str(path), version=version(store), settings=SETTINGS, runtime=runtime, steps=quiet)
    with pytest.raises(InputError, match="none is published"):
        lineage(store, rows[3]["id"])
    publish(store, m.name, verdicts=[])
    found = lineage(store, rows[3]["id"]).as_dict()
    label = next(r for r in night_rows(store, m) if r["post_id"] == rows[3]["id"])
    assert found["label"] == label["label"] and found["content"] == label["content"] and found["answered_by"] == "student"
    parts = {n["what"].split(" ")[0].rstrip(":"): n for n in found["made_of"]}
    assert parts["night"]["state"] == "published" and "is not under this root" in parts["student"]["what"] and parts["contract"]["label_words"]
    (reject,) = night_rows(store, m, "rejects")
    assert lineage(store, reject["post_id"], date="2026-11-22").as_dict()["rejected_because"] == "bad_line"
    with pytest.raises(InputError, match=r"no label of post 'nope'.*looked in 2026-11-22"):
        lineage(store, "nope")
    assert rows[3]["id"] in str(show(lineage(store, rows[3]["id"])).label)


def test_lineage_goes_back_to_the_teacher(tmp_path):
    """From manifests alone: student ← rationales ← teacher, student ← assistant ← rationales."""
    from mulcot_ray.artifacts import begin
    from mulcot_ray.lineage import _model

    store = Store(str(tmp_path))

    def made(kind, name, **identity):
        run = begin(store, kind, name, identity)
        with run:
            return run.commit(0)

    p = made("posts", "train", format="jsonl")
    taught = made("rationales", "taught", stage="teach", model="the-teacher", posts=p.fingerprint, contract="c")
    common = {"stage": "train", "posts": p.fingerprint, "base": "b", "tasks": ["reasoning"], "train": {}, "seed": 1, "distill": None}
    assistant = made("models", "assistant", rationales=[taught.fingerprint], assistant=None, **common)
    own = made("rationales", "own", stage="augment", model=assistant.fingerprint, posts=p.fingerprint, contract="c")
    student = made("models", "student", rationales=[taught.fingerprint, own.fingerprint], assistant=assistant.fingerprint, **common)
    node = _model(store, student.fingerprint, "student", 6)
    whats = []

    def walk(n, depth):
        whats.append((depth, n.what))
        for x in n.made_of:
            walk(x, depth + 1)

    walk(node, 0)
    assert (1, "rationales/taught") in whats and (1, "rationales/own") in whats and (2, "assistant: models/assistant") in whats
    assert sum("the-teacher" in w for _, w in whats) >= 3 and (1, "soft labels from the assistant: models/assistant") in whats
