"""A night from dump to labels, on a real Ray with the scripted engine: counts, ledger, revisions, cascade, deadline, gates, pointer."""

import shutil
import sys
from collections import Counter

import nights
import pytest
from nights import dump, posts, quiet, scripted, spoilt, version

from mulcot_ray.engines.pace import Pace
from mulcot_ray.errors import Busy, Held, InputError
from mulcot_ray.labeling.gates import Gates
from mulcot_ray.labeling.night import night, night_rows
from mulcot_ray.labeling.nightly import nightly, pending, release
from mulcot_ray.labeling.publishing import current, rollback
from mulcot_ray.labeling.reading import dataset
from mulcot_ray.labeling.version import NightSettings
from mulcot_ray.records import Labelled, from_row
from mulcot_ray.storage import Store

pytestmark = pytest.mark.ray
PLAIN = NightSettings(name="t", gates=Gates(reject_rate_max=0.5))


@pytest.fixture(scope="module", autouse=True)
def _scripts_travel_by_value(ray_session):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cloudpickle.register_pickle_by_value(nights)


def label(store, path, runtime, date="2026-11-22", settings=PLAIN, v=None, **options):
    return night(store, date, str(path), version=v or version(store, settings), settings=settings, runtime=runtime, steps=quiet, **options)


def rows_of(store, manifest, kind="labels"):
    return list(night_rows(store, manifest, kind))


def test_every_row_is_accounted_for(tmp_path, runtime):
    rows, there = spoilt(posts(400, 1), 1, 0.01, 0.05)
    clash = rows[0] if isinstance(rows[0], dict) else rows[1]
    path = dump(tmp_path / "dump", "2026-11-22", [*rows, clash | {"text": "the same id says something else"}])
    store = Store(str(tmp_path / "root"))
    m, fresh = label(store, path, runtime)
    s = m.stats
    assert fresh and m.rows_in == there["rows"] + 1 == m.rows + m.rejects + s["repeated"] + s["deferred"]
    assert m.rejects == there["rejected"] + 1 and m.rejects_by_reason["duplicate_id"] == 1 and s["repeated"] == there["repeated"]
    assert s["fates"] == {"scored": 400, "carried": 0, "copied": there["copied"], "repeated": there["repeated"], "deferred": 0, "rejected": m.rejects}
    labels = [from_row(Labelled, r) for r in rows_of(store, m)]
    assert len({(x.post_id, x.aspect) for x in labels}) == len(labels) == m.rows
    assert all(x.negative + x.neutral + x.positive == pytest.approx(1) and x.answered_by == "student" for x in labels)
    by_content = {x.content: x.label for x in labels if x.copied_of is None}
    assert all(by_content[x.content] is x.label for x in labels if x.copied_of) and sum(s["labels"].values()) == m.rows
    assert Counter(str(x.label) for x in labels) == {k: n for k, n in s["labels"].items() if n}
    assert not store.files(f"nights/{m.name}/work")
    again, fresh = label(store, path, runtime)
    assert not fresh and again == m


def test_the_next_night_asks_only_what_is_new(tmp_path, runtime):
    first = posts(300, 2)
    one = dump(tmp_path / "dump", "2026-11-21", first)
    edited = {**first[7], "text": "edited since"}
    two = dump(tmp_path / "dump", "2026-11-22", [*first[:7], edited, *first[8:], *posts(3, 3)])
    store, v = Store(str(tmp_path / "root")), None
    a, _ = label(store, one, runtime, "2026-11-21")
    b, _ = label(store, two, runtime)
    assert a.stats["fates"]["scored"] == 300 and b.stats["fates"]["scored"] == 4 and b.stats["fates"]["carried"] == 299
    before = {r["post_id"]: (r["label"], r["positive"], r["scored_on"]) for r in rows_of(store, a)}
    after = {r["post_id"]: (r["label"], r["positive"], r["scored_on"]) for r in rows_of(store, b)}
    assert all(after[i] == before[i] for i in before if i != edited["id"]) and after[edited["id"]][2] == "2026-11-22"
    v = version(store, engines={"student": scripted("another")})
    c, _ = label(store, two, runtime, v=v)
    assert c.stats["fates"]["scored"] == 303 and c.stats["version"] != b.stats["version"]


def test_late_files_make_a_revision_and_changed_ones_do_not_mix(tmp_path, runtime):
    path, store = dump(tmp_path / "dump", "2026-11-22", posts(60, 4)), Store(str(tmp_path / "root"))
    a, _ = label(store, path, runtime)
    dump(tmp_path / "dump", "2026-11-22", posts(5, 5), files=1, name="late")
    b, fresh = label(store, path, runtime)
    assert fresh and b.stats["revision"] == 2 and b.rows == 65 and b.stats["fates"]["scored"] == 5
    assert a.rows == 60 and len(rows_of(store, a)) == 60, "the first revision stays"


def test_a_night_that_another_run_holds_is_refused(tmp_path, runtime):
    from mulcot_ray.labeling.night import _begin
    from mulcot_ray.posts.dumps import list_units

    path, store = dump(tmp_path / "dump", "2026-11-22", posts(20, 6)), Store(str(tmp_path / "root"))
    run = _begin(store, "2026-11-22", version(store, PLAIN), list_units(str(path)), None, runtime, None)
    with run, pytest.raises(Busy, match="is being written by process"):
        label(store, path, runtime)
    m, _ = label(store, path, runtime)
    assert m.rows == 20


def sure(messages, sampling):
    return nights.FULL.format("positive")


def test_the_least_sure_are_asked_again_of_a_larger_model(tmp_path, runtime):
    """The scripted engine is sure to 0.8: with `below` over that all would be asked, but for the share."""
    steps = [{"role": "assistant", "model": "x", "below": 0.9, "share": 1.0}]
    settings = NightSettings.model_validate({"name": "t", "cascade": steps, "gates": PLAIN.gates.model_dump()})
    path, store = dump(tmp_path / "dump", "2026-11-22", posts(50, 7)), Store(str(tmp_path / "root"))
    v = version(store, settings, {"assistant": scripted("assistant", sure)})
    m, _ = label(store, path, runtime, settings=settings, v=v)
    assert m.stats["answered_by"] == {"assistant": 50} and {r["label"] for r in rows_of(store, m)} == {"positive"}
    none = NightSettings.model_validate({"name": "t", "cascade": [steps[0] | {"below": 0.7}]})
    m, _ = label(store, path, runtime, settings=none, v=version(store, none))
    assert m.stats["answered_by"] == {"student": 50}


def test_cut_takes_the_least_sure_up_to_the_share():
    from mulcot_ray.labeling.scoring import cut_at

    histogram = Counter({"confidence/80": 5, "confidence/100": 10, "confidence/150": 85})
    assert cut_at(histogram, 1.0, 100) == 1.0 and cut_at(histogram, 0.6, 100) == pytest.approx(0.6)
    assert 0.505 <= cut_at(histogram, 1.0, 15) <= 0.75 and 0.405 <= cut_at(histogram, 1.0, 14) <= 0.5
    assert cut_at(histogram, 1.0, 4) <= 0.4


def test_at_the_deadline_the_rest_is_deferred_and_done_by_a_revision(tmp_path, runtime):
    path, store = dump(tmp_path / "dump", "2026-11-22", posts(80, 8)), Store(str(tmp_path / "root"))
    m, _ = label(store, path, runtime, pace=Pace(deadline=0.0))
    assert m.rows == 0 and m.stats["deferred"] == 80 and len(rows_of(store, m, "deferred")) == 80 and "deadline" in m.stats["pace"]["said"][0]
    m, fresh = label(store, path, runtime)
    assert fresh and m.stats["revision"] == 2 and m.rows == 80 and m.stats["deferred"] == 0


def test_pace():
    now = 0.0
    pace = Pace(deadline=100.0, late="label_only", clock=lambda: now)
    assert pace.begin(scripted(), 0, 1000) is None
    now = 5.0
    assert pace.look(100, 1000, 1) is None, "45 s for the rest"
    now = 20.0
    assert pace.look(150, 1000, 1) == b"plain" and "no rationales" in pace.said[0]
    now = 30.0
    assert pace.look(300, 1000, 1) is None
    now = 100.0
    assert pace.look(900, 1000, 1) == b"defer" and pace.look(900, 1000, 1) is None
    dear = Pace(budget=0.1, clock=lambda: now)
    assert dear.begin(scripted(accelerator="H100"), 0, 10) is None
    now += 3600
    assert dear.look(1, 10, 2) == b"defer" and dear.spent > 0.1


def test_rationales_for_some(tmp_path, runtime):
    path, store = dump(tmp_path / "dump", "2026-11-22", posts(90, 9)), Store(str(tmp_path / "root"))
    settings = NightSettings.model_validate({"name": "t", "explain": {"labels": ["negative"]}})
    m, _ = label(store, path, runtime, settings=settings, v=version(store, settings))
    rows = rows_of(store, m)
    assert (
        all((r["text_analysis"] is not None) == (r["label"] == "negative") for r in rows)
        and m.stats["explained"] == m.stats["labels"]["negative"] > 0
    )
    share = NightSettings.model_validate({"name": "t", "explain": {"share": 0.3}})
    m, _ = label(store, path, runtime, settings=share, v=version(store, share))
    assert 10 < m.stats["explained"] < 50


def test_nightly_publishes_what_passes_and_holds_back_what_does_not(tmp_path, runtime, sample_store):
    store, folder = Store(str(tmp_path / "root")), tmp_path / "dump"
    good, bad = posts(50, 10), [*posts(50, 11), *(b"{" for _ in range(20))]
    dump(folder, "2026-11-20", good)
    dump(folder, "2026-11-21", bad)
    settings = NightSettings(name="t", gates=Gates(reject_rate_max=0.1))
    v, told = version(store, settings), []
    assert [line.split(": ")[1] for line in list(pending(store, str(folder), version=v))[::2]] == ["new", "new"]
    with pytest.raises(Held, match=r"2026-11-21.*reject"):
        nightly(store, str(folder), version=v, settings=settings, runtime=runtime, steps=quiet, told=told.append)
    assert [(o.manifest.stats["date"], o.state) for o in told] == [("2026-11-20", "published"), ("2026-11-21", "held")]
    assert list(current(store)) == ["2026-11-20"] and dataset(store).count_rows() == 50
    half, guess = posts(25, 14), f"as {told[0].manifest.name} went: about "
    dump(folder, "2026-11-22", half)
    *_, estimate = pending(store, str(folder), version=v, since="2026-11-22")
    assert guess in estimate and 20 <= int(estimate.split(guess)[1].split(" rows")[0]) <= 30 and "USD" in estimate
    shutil.rmtree(folder / "dt=2026-11-22")
    held = told[1].manifest.name
    assert store.read(f"nights/{held}/report.html") and b"mulcot_night" in store.read(f"nights/{held}/metrics.prom")
    with pytest.raises(Held):
        release(store, held, settings.gates, force=False)
    release(store, held, settings.gates, force=True)
    assert current(store)["2026-11-21"].forced and dataset(store, ["2026-11-21"]).count_rows() == 50
    dump(folder, "2026-11-20", posts(5, 12), files=1, name="late")
    told.clear()
    nightly(store, str(folder), version=v, settings=settings, runtime=runtime, steps=quiet, told=told.append)
    assert [o.state for o in told] == ["published", "unchanged"] and dataset(store, ["2026-11-20"]).count_rows() == 55
    assert rollback(store, "2026-11-20").rows == 50
    told.clear()
    nightly(store, str(folder), version=v, settings=settings, runtime=runtime, steps=quiet, told=told.append)
    assert [o.state for o in told] == ["rolled back before", "unchanged"] and current(store)["2026-11-20"].rows == 50
    with pytest.raises(InputError, match="no partition dt=2020-01-01"):
        nightly(store, str(folder), version=v, settings=settings, runtime=runtime, steps=quiet, dates=["2020-01-01"])


def test_a_canary_is_asked_along_and_is_no_part_of_the_night(tmp_path, runtime):
    from mulcot_ray.posts.importing import import_sample

    path, store = dump(tmp_path / "dump", "2026-11-22", posts(30, 13)), Store(str(tmp_path / "root"))
    import_sample(store, "canary", train=0, validation=0, test=30, seed=5)
    settings = NightSettings(name="t", canary="canary", gates=PLAIN.gates)
    m, _ = label(store, path, runtime, settings=settings)
    canary = m.stats["canary"]
    assert m.rows == 30 and canary["posts"] == 30 and 0 <= canary["accuracy"] <= 1 and sum(c["posts"] for c in canary["by_class"].values()) == 30
    right = sum(c["right"] for c in canary["by_class"].values())
    assert canary["accuracy"] == pytest.approx(right / 30)
