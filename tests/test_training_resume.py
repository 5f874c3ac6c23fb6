"""What is killed on the way goes on where it was, on whatever number of workers: the curve is the undisturbed one.

Trainings that are killed run in a process of their own (`python test_training_resume.py KIND ROOT`), with a Ray of their own.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from several_nodes import machines
from training_parts import assert_same, corpus, curve, run, settings

from mulcot_ray.recipe import load_runtime
from mulcot_ray.storage import Store

EPOCHS = 6  # of four steps
WAIT_S = 240


def train():
    """The student whole: its optimizer has the most to remember."""
    return settings(epochs=EPOCHS, schedule="plateau", method="full", lora=None, lr=5e-4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return corpus(Store(str(tmp_path_factory.mktemp("resume"))))


@pytest.fixture(scope="module")
def undisturbed(store, runtime, ray_session):
    """The curve of one worker from beginning to end."""
    return run(store, "undisturbed", runtime, workers=1, train=train())[0]


def committed(store, name):
    """The step of the last checkpoint that Ray Train has recorded."""
    from mulcot_ray.training.feed import committed_step

    return max(
        (committed_step(store, f"training/{w}") for w in {k.partition("/")[0] for k in store.files("training")} if w.startswith(name)), default=0
    )


@contextmanager
def driver(kind, store, environment=None):
    """A training in a process of its own. At the end nothing of it is left."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen([sys.executable, __file__, kind, store.root], stdout=log, stderr=log, env=environment, start_new_session=True)
        all_of_them = {}

        def family():
            if process.poll() is None:
                all_of_them.update({p.pid: p for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]})
            return list(all_of_them.values())

        try:
            yield process, family
        except BaseException:
            print(Path(log.name).read_text()[-4000:])
            raise
        finally:
            mine = family()
            for p in mine:
                try:
                    p.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(mine, timeout=10)


def until(condition, process):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, f"the training ended with {process.returncode}"
        assert time.monotonic() < deadline, "it did not come that far"
        time.sleep(0.02)


@pytest.mark.ray
def test_a_killed_worker_a_killed_driver_and_other_workers_change_nothing(store, runtime, undisturbed):
    """Two workers, checkpoints every third step beside the epochs'; SIGKILL of one, then of the driver; three workers finish."""
    with driver("killed", store) as (process, family):
        until(lambda: committed(store, "killed") >= 3, process)
        worker = next(p for p in family() if "RayTrainWorker" in p.name() or "RayTrainWorker" in " ".join(p.cmdline()))
        worker.send_signal(signal.SIGKILL)
        at, killed_at = committed(store, "killed"), time.time()
        until(lambda: committed(store, "killed") >= at + 6, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        driver_killed_at = time.time()
    before = committed(store, "killed")
    assert 9 <= before < 4 * EPOCHS, "it was killed on the way"
    kept = {k.split("/")[1] for k in store.files("training") if k.startswith("killed") and "/step-" in k}
    assert len(kept) <= 3, f"the best, the last, and one on its way: {kept}"
    resumed, history, manifest = run(store, "killed", runtime, workers=3, micro=4, train=train(), checkpoint_steps=3)
    assert_same(undisturbed, resumed)
    times = [s["time"] for s in history["steps"]]
    assert times == sorted(times) and times[0] < killed_at < times[before - 1] < driver_killed_at < times[before], "each part by whom we think"
    assert [v["epoch"] for v in history["validation"]] == list(range(1, EPOCHS + 1))
    assert not store.files("training") and manifest.stats["step"] in range(4, 4 * EPOCHS + 1, 4), "the best is an epoch's end"


@pytest.mark.ray
def test_a_range_of_workers_grows_and_shrinks_with_the_cluster(s3_bucket, undisturbed):
    """One worker, two when a second machine comes, one again when that is lost; the global batches stay what they are. Everything is on S3."""
    store = corpus(Store(f"s3://{s3_bucket}/elastic"))

    def go_on_to(step):
        store.write("gate", str(step).encode())

    def sizes():
        return [int(n) for n in (store.read("sizes") or b"").split()]

    go_on_to(6)
    # A worker takes two CPUs of a machine, and leaves one to read the data.
    with machines(3) as cluster:
        cluster.want(1)
        with driver("elastic", store, cluster.head.environment | {"RAY_ADDRESS": cluster.head.gcs}) as (process, _):
            until(lambda: committed(store, "elastic") == 6, process)
            cluster.want(2)
            until(lambda: sizes() == [1, 2], process)
            go_on_to(14)
            until(lambda: committed(store, "elastic") == 14, process)
            cluster.lose(cluster.alive[-1].name)
            until(lambda: sizes() == [1, 2, 1], process)
            go_on_to(1000)
            assert process.wait(WAIT_S) == 0
    history = json.loads(store.read("models/elastic/history.json"))
    assert_same(undisturbed, curve(history))
    assert [s["workers"] for s in history["steps"]] == [1] * 6 + [2] * 8 + [1] * (4 * EPOCHS - 14)


# --- the trainings ---------------------------------------------------------------------------------------------------


def killed(store):
    run(store, "killed", load_runtime("laptop"), workers=2, micro=6, train=train(), checkpoint_steps=3)


def elastic(store):
    from mulcot_ray.training import fit

    fit.RESIZE_SECONDS = 2.0
    fit.worker = partial(gated, store)
    run(store, "elastic", load_runtime("laptop"), workers=(1, 2), micro=8, train=train(), checkpoint_steps=1, train_cpus=2)


def gated(store, job):
    """A worker that writes down how many there are, and goes no further than it is told."""
    import ray.train

    from mulcot_ray.training import loop

    plain, world = loop.Trainer.step, ray.train.get_context().get_world_size()

    def step(self, piece):
        while piece.step >= int(store.read("gate")):
            time.sleep(0.05)
        return plain(self, piece)

    loop.Trainer.step = step
    if ray.train.get_context().get_world_rank() == 0:
        store.write("sizes", (store.read("sizes") or b"") + b" %d" % world)
    loop.worker(job)


if __name__ == "__main__":
    {"killed": killed, "elastic": elastic}[sys.argv[1]](Store(sys.argv[2]))
