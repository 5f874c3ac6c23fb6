"""One winner, on a folder and on a real S3 server; and what a server or a wire on a bad day does to it: nothing, or a clear error within a bound."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from s3_proxy import Rule, s3_proxy
from seaweed import environment

from mulcot_ray import artifacts, storage
from mulcot_ray.artifacts import begin, find, parquet_bytes
from mulcot_ray.errors import ArtifactError, Busy, ConfigError
from mulcot_ray.storage import Store


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        return Store(str(tmp_path / "root"))
    return Store(f"s3://{request.getfixturevalue('s3_bucket')}/{tmp_path.name}")


@pytest.fixture(scope="module")
def proxy(s3_server):
    with s3_proxy(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def far(proxy, s3_server, tmp_path):
    """A store behind the proxy, whose rules and log are fresh."""
    proxy.rules.clear()
    proxy.log.clear()
    with environment(s3_server.env(proxy.url)):
        yield Store(f"s3://{s3_server.bucket}/{tmp_path.name}")
    proxy.rules.clear()


@pytest.fixture
def fresh():
    """Clients are made anew: of other settings or credentials."""
    for made in (storage._made, storage._filesystem):
        made.cache_clear()
    yield
    for made in (storage._made, storage._filesystem):
        made.cache_clear()


@pytest.fixture
def hurried(monkeypatch, fresh):
    """A bound that a test can wait for."""
    monkeypatch.setattr(storage, "PATIENCE", 3)
    monkeypatch.setattr(storage, "READ_RETRIES", 4)


# ------------------------------------------------------------------ one winner


def test_a_swap_needs_what_was_read(store):
    assert store.tagged("a/k") is None and not store.swap("a/k", b"1", "0" * 64) and store.read("a/k") is None
    assert store.swap("a/k", b"1", None) and not store.swap("a/k", b"2", None)
    data, tag = store.tagged("a/k")
    assert data == b"1" and store.swap("a/k", b"2", tag) and not store.swap("a/k", b"3", tag) and store.read("a/k") == b"2"
    store.write("a/k", b"1")
    assert store.tagged("a/k") == (b"1", tag)  # equal objects, equal tags
    store.delete("a/k")
    assert not store.swap("a/k", b"4", tag) and store.files("a") == {} and not store.exists("a/k")


def test_of_sixteen_one_wins(store):
    turns = 3 if store.is_s3 else 50  # SeaweedFS lets a loser wait for whole seconds where many are at once
    with ThreadPoolExecutor(16) as pool:
        for turn in range(turns):
            won = list(pool.map(lambda i, k=f"create/{turn}": store.create(k, b"%d" % i), range(16)))
            assert sum(won) == 1 and store.read(f"create/{turn}") == b"%d" % won.index(True)
        for turn in range(turns):
            tag = (store.tagged("swap") or (b"", None))[1]
            won = list(pool.map(lambda i, turn=turn, tag=tag: store.swap("swap", b"%d/%d" % (turn, i), tag), range(16)))
            assert sum(won) == 1 and store.read("swap") == b"%d/%d" % (turn, won.index(True))


def count_up(store, times):
    for _ in range(times):
        while True:
            found = store.tagged("n")
            n = int(found[0]) if found else 0
            if store.swap("n", b"%d" % (n + 1), found and found[1]):
                break


def test_a_counter_loses_no_step(store):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: count_up(store, 4), range(16)))
    assert store.read("n") == b"64"


def test_a_counter_in_a_folder_loses_no_step_among_processes(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r}); from test_storage import *; count_up(Store({str(tmp_path)!r}), 25)"
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [w.wait() for w in workers] == [0] * 4
    assert Store(str(tmp_path)).read("n") == b"100"


def test_what_is_there(store):
    for key in (
        "posts/b/part-0.parquet",
        "posts/b/manifest.json",
        "posts/a/manifest.json",
        "posts/c/part-0.parquet",
        "posts/c/.hidden",
        "postscript/x",
    ):
        store.write(key, b"12")
    assert store.files("posts") == {"a/manifest.json": 2, "b/manifest.json": 2, "b/part-0.parquet": 2, "c/part-0.parquet": 2}
    assert store.folders("posts") == ["a", "b", "c"] and store.names("posts") == ["a", "b"]
    assert store.files("nothing") == {} and store.folders("nothing") == [] and store.names("nothing") == []
    assert store.exists("posts/a/manifest.json") and not store.exists("posts/a")


def test_a_listing_of_several_pages(far, proxy):
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda i: far.write(f"many/part-{i:05d}", b"x" * (i % 7)), range(1200)))
    proxy.rules[:] = [Rule("GET", query=".*list-type=2.*", do="answer", status=503, nth=2, times=2)]  # the second page, twice
    assert far.files("many") == {f"part-{i:05d}": i % 7 for i in range(1200)}


# ------------------------------------------------------------------ the lease


def lease(**changes):
    return json.dumps({"owner": "other", "host": "elsewhere", "pid": 1, "time": artifacts._utc(time.time() - 61), **changes}).encode()


def test_a_stale_lease_is_taken_over_by_one(store):
    for turn in range(5):
        store.write(f"predictions/x{turn}/lease.json", lease())
        runs = [begin(store, "predictions", f"x{turn}", {}) for _ in range(8)]
        gate = threading.Barrier(8)

        def work(run, gate=gate):
            gate.wait()
            try:
                with run:
                    gate.wait()  # until all have tried
                    run.check()
                    return None
            except Busy as e:
                gate.wait()
                return str(e)

        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(work, runs))
        assert said.count(None) == 1 and all(re.search("took over at this moment|is being written by process", s) for s in said if s)
        assert "lease.json" not in store.files(f"predictions/x{turn}")


def test_a_run_whose_lease_was_taken_notices_and_leaves_the_other_alone(store):
    with begin(store, "predictions", "x", {}) as run:
        run.check()
        theirs = lease(time=artifacts._utc(time.time()), pid=77)
        store.write("predictions/x/lease.json", theirs)
        with pytest.raises(Busy, match="process 77 on elsewhere took it over"):
            run.check()
        with pytest.raises(Busy, match="process 77"):
            run.commit(0)
    assert find(store, "predictions", "x") is None and store.read("predictions/x/lease.json") == theirs
    store.delete("predictions/x/lease.json")
    with begin(store, "predictions", "x", {}) as run:
        store.delete("predictions/x/lease.json")  # taken over, and finished or given up
        with pytest.raises(Busy, match="another run, which has ended"):
            run.seal(0, 0, 0, {}, {}, {})
    assert find(store, "predictions", "x") is None


def test_the_lease_is_kept_alive_through_an_outage(far, proxy, hurried, monkeypatch):
    monkeypatch.setattr(artifacts, "LEASE_SECONDS", 1.2)
    with begin(far, "predictions", "x", {}) as run:
        first = far.read("predictions/x/lease.json")
        proxy.rules[:] = [Rule("GET|PUT", ".*lease.json", "answer", times=6)]
        time.sleep(2.5)
        proxy.rules.clear()
        run.check()
        assert json.loads(far.read("predictions/x/lease.json"))["owner"] == run.owner and far.read("predictions/x/lease.json") != first
        proxy.rules[:] = [Rule("DELETE", ".*lease.json", "answer", times=1000)]
    assert far.exists("predictions/x/lease.json")  # could not be given back, which is no failure of the run


# ------------------------------------------------------------------ a bad day

FAULTS = {
    "500": dict(do="answer", status=500), "503": dict(do="answer", status=503), "429": dict(do="answer", status=429), "409": dict(do="answer", status=409),
    "cut": dict(do="cut"), "lost": dict(do="lost"), "half": dict(do="half"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_outlasts_two_faults_in_a_row(far, proxy, fault):
    def bad(method, **kw):
        proxy.rules[:] = [Rule(method, ".*", times=2, **FAULTS[fault], **kw)]

    table = pa.table({"a": list(range(5000))})
    bad("PUT")
    assert far.create("d/k", b"1") and not far.create("d/k", b"2")
    bad("GET")
    data, tag = far.tagged("d/k")
    assert data == b"1"
    bad("PUT")
    assert far.swap("d/k", b"3", tag) and far.read("d/k") == b"3"
    bad("PUT")
    far.write("d/t.parquet", parquet_bytes(table))
    bad("HEAD")
    assert far.exists("d/k") and not far.exists("nothing")
    if fault not in ("409", "429"):  # S3 answers reads with neither
        bad("GET")
        with far.parquet("d/t.parquet") as f:
            assert f.read().equals(table)
        bad("GET", query=".*list-type.*")
        assert set(far.files("d")) == {"k", "t.parquet"}
    bad("DELETE")
    far.delete("d/k")
    assert far.read("d/k") is None


def test_a_lost_answer_is_told_from_a_lost_race(far, proxy):
    proxy.rules[:] = [Rule("PUT", ".*/k", "lost")]
    assert far.create("k", b"mine") and proxy.count("PUT", ".*/k") == 2 and [r.status for r in proxy.log] == [None, 412, 200]
    tag = far.tagged("k")[1]
    proxy.rules[:] = [Rule("PUT", ".*/k", "lost")]
    assert far.swap("k", b"mine again", tag) and far.read("k") == b"mine again"

    # Another wrote the very same bytes while our request was cut before it arrived: that is a race, and ours is lost.
    other = Store(far.root)
    proxy.rules[:] = [Rule("PUT", ".*/l", "cut", before=lambda _: other.create("l", b"same") and None)]
    assert far.create("l", b"same") is False and far.read("l") == b"same"
    proxy.rules[:] = [Rule("PUT", ".*/k", "cut", before=lambda _: other.swap("k", b"theirs", other.tagged("k")[1]) and None)]
    assert far.swap("k", b"ours", far.tagged("k")[1]) is False and far.read("k") == b"theirs"


def test_a_race_in_bad_weather_has_one_winner(far, proxy):
    """Every second PUT is refused, cut or loses its answer, by turns."""
    for do in ("answer", "cut", "lost"):
        with ThreadPoolExecutor(16) as pool:
            for turn in range(3):
                proxy.rules[:] = [Rule("PUT", do=do, nth=n, times=1) for n in range(1, 24, 2)]
                won = list(pool.map(lambda i, k=f"{do}/{turn}": far.create(k, b"%d" % i), range(16)))
                assert sum(won) == 1 and far.read(f"{do}/{turn}") == b"%d" % won.index(True)


CALLS = {
    "read": lambda s: s.read("a/k"), "tagged": lambda s: s.tagged("a/k"), "create": lambda s: s.create("a/k", b"1"), "write": lambda s: s.write("a/k", b"1"),
    "swap": lambda s: s.swap("a/k", b"1", "x"), "delete": lambda s: s.delete("a/k"), "exists": lambda s: s.exists("a/k"), "files": lambda s: s.files("a/k"),
    "folders": lambda s: s.folders("a/k"), "parquet": lambda s: s.parquet("a/k").__enter__(), "begin": lambda s: begin(s, "posts", "x", {}),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("do", ["answer", "cut"])
def test_what_stays_bad_ends_within_the_bound_and_names_the_object(far, proxy, hurried, call, do):
    proxy.rules[:] = [Rule(do=do, times=10**6)]
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=rf"s3://mulcot/{far.base.partition('/')[2]}/(a/k|posts/x)") as e:
        CALLS[call](far)
    assert time.monotonic() - started < 12 and len(proxy.log) > 1
    assert re.search("503[ )]|SLOW_DOWN|Connection|curlCode", str(e.value))


def test_silence_is_bounded(far, proxy, monkeypatch, fresh):
    monkeypatch.setattr(storage, "SILENCE", 1)
    monkeypatch.setattr(storage, "PATIENCE", 3)
    proxy.rules[:] = [Rule("PUT", do="stall", seconds=4)]
    assert far.create("k", b"1")  # the first is given up after a second; whether it arrives later, it cannot replace anything
    proxy.rules[:] = [Rule("GET", do="stall", seconds=30, times=100)]
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="s3://mulcot/.*/k: read failed . times in . s, last with ReadTimeoutError"):
        far.read("k")
    assert time.monotonic() - started < 10
    proxy.rules.clear()
    time.sleep(1)  # now the stalled PUT has arrived
    assert far.read("k") == b"1" and proxy.count("PUT", ".*/k") == 2


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key_is_said_at_once_and_not_shown(far, proxy, monkeypatch, fresh, wrong, call):
    monkeypatch.setenv(wrong, "WRONGKEYOFOURS")
    with pytest.raises(ArtifactError, match=r"refuses to \w+.* with the credentials from the environment \(AWS_ACCESS_KEY_ID") as e:
        CALLS[call](far)
    assert len(proxy.log) == 1 and proxy.log[0].status == 403  # tried once
    assert not any(os.environ[k] in str(e.value) for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))


def test_no_such_bucket(far, proxy):
    with pytest.raises(ArtifactError, match=r"s3://nobodys/x/a/k: there is no bucket 'nobodys' at http://127.*--root"):
        Store("s3://nobodys/x").read("a/k")
    proxy.rules[:] = [Rule(do="answer", status=404, code="NoSuchBucket", times=1000)]  # SeaweedFS makes a bucket that is written to
    for call in ("create", "write", "swap", "begin"):
        with pytest.raises(ArtifactError, match="there is no bucket 'mulcot' at http://127"):
            CALLS[call](far)


def test_no_credentials(s3_bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ArtifactError, match="Unable to locate credentials. Looked at: the environment"):
        Store("s3://mulcot/x").read("k")


def test_an_endpoint_that_is_none(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL '127.0.0.1:9'"):
        Store("s3://mulcot/x").read("k")


def test_the_server_is_killed_and_comes_back(s3_server, tmp_path, monkeypatch):
    """Eight threads create, swap and read through a SIGKILL of the server: what was said to be written is there, once and whole."""
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 1.0)
    store = Store(f"s3://{s3_server.bucket}/{tmp_path.name}")  # past the proxy: while the server is down, nobody listens
    killed = threading.Event()

    def work(thread):
        wins = []
        for i in range(12):
            key = f"part-{i:03d}"  # every thread wants every part
            if store.create(key, b"%d by %d" % (i, thread)):
                wins.append(key)
            if i == 6 and not killed.is_set():
                killed.set()
                threading.Thread(target=restart).start()
        count_up(store, 3)
        return wins

    def restart():
        s3_server.kill()
        time.sleep(1)
        s3_server.start()
        back.set()

    back = threading.Event()
    store.write("t.parquet", parquet_bytes(pa.table({"a": list(range(5000))})))
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(work, range(8)))
    assert back.wait(60) and sorted(sum(wins, [])) == [f"part-{i:03d}" for i in range(12)]
    for thread, keys in enumerate(wins):
        assert all(store.read(k) == b"%d by %d" % (int(k[-3:]), thread) for k in keys)
    assert store.read("n") == b"24"
    with store.parquet("t.parquet") as f:
        assert f.metadata.num_rows == 5000


def test_bad_roots():
    with pytest.raises(ConfigError, match="s3://"):
        Store("https://bucket/x")
