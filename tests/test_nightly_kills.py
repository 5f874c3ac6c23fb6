"""A night is killed at eight places, and begun twice at once: it ends as the undisturbed one. benchmarks/nightly_kills.py has a hundred places."""

import pytest
from night_site import BLOCK, Point, hunted, rows_of, same, site, two_at_once

pytestmark = pytest.mark.ray
POSTS, SEED = 200, 3
CHAIN = [
    Point("intake posts", "server", "after", 2), Point("intake commit", "driver", "before"), Point("todo", "writer", "before"),
    Point("answers", "engine", "before"), Point("answers", "writer", "after"), Point("answers", "driver", "after"), Point("manifest", "driver", "before"),
    Point("pointer", "server", "after"),
]  # fmt: skip


@pytest.fixture(scope="module")
def at():
    with site(POSTS, SEED) as at:
        yield at


@pytest.fixture(scope="module")
def calm(at):
    root = f"s3://{at.server.bucket}/calm"
    assert hunted(at, root, []).twice == 0
    manifest = same(root, root, rows_of(POSTS, SEED))
    assert manifest.rows_in > POSTS and manifest.rejects and manifest.stats["repeated"]
    return root


def test_eight_kills_change_nothing(at, calm):
    night = hunted(at, f"s3://{at.server.bucket}/hunted", CHAIN)
    assert sorted(map(str, night.met)) == sorted(map(str, CHAIN)) and night.runs == 4
    same(calm, night.root, rows_of(POSTS, SEED))
    assert night.twice <= night.allowed == 3 * BLOCK


def test_of_two_at_once_one_does_it_and_the_other_says_who(at, calm):
    root = f"s3://{at.server.bucket}/both"
    assert "is being written by process" in two_at_once(at, root)
    same(calm, root, rows_of(POSTS, SEED))
