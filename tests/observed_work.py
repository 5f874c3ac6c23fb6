"""Work that is watched by tests/test_dashboard.py, in a process of its own: labels with rejects, answers found kept, a night with a cascade.

python observed_work.py ROOT      on the cluster of RAY_ADDRESS; prints what the manifests say
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import nights

from mulcot_ray.cluster import session
from mulcot_ray.console import log_to
from mulcot_ray.labeling.gates import Gates
from mulcot_ray.labeling.label import label
from mulcot_ray.labeling.night import night
from mulcot_ray.labeling.version import Escalation, NightSettings
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.recipe import load_runtime
from mulcot_ray.storage import Store

PAUSE_S = 0.02  # of an answer: the work is to last for several scrapes
RUN, STEPS = "models/watched", 6


def script(messages: Any, sampling: Any) -> str:
    """A label from the words of the post; for some posts something that is no answer."""
    import time as clock

    clock.sleep(PAUSE_S)
    text = messages[-1]["content"][-1]["text"]
    number = sum(map(ord, text))
    return "I would rather not say." if "no_night" not in text and sampling.max_tokens > 1 and number % 9 == 0 else nights.script(messages, sampling)


def train() -> None:
    """What a training worker tells, step by step: the numbers are made up, the metrics are real."""
    from mulcot_ray.observing import trained

    for step in range(1, STEPS + 1):
        row = {"loss": 2.0 / step, "ce_cls": 1.0 / step, "ce_rea": 3.0 / step, "kl_cls": 0.1, "kl_rea": 0.2, "tokens_s": 1000.0 + step}
        trained(RUN, step, STEPS, row)
        time.sleep(1)
    trained(RUN, STEPS, STEPS, {"accuracy": 0.8, "macro_f1": 0.75})
    time.sleep(3)


def main(root: str) -> None:
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(nights)
    log_to(Path(root) / "logs", "watched")
    store = Store(root)
    import_sample(store, "sample", train=200, validation=10, test=10, seed=1)
    runtime = load_runtime("laptop").model_copy(update={"rows_per_chunk": 32, "answer_cache": True, "address": "auto"})
    with session(runtime):
        training = ray.remote(num_cpus=0)(train).remote()
        first, again = (
            label(store, name, posts="sample", model="fake", recipe=nights.RECIPE, runtime=runtime, mode="generate", engine=nights.scripted(script=script), progress=lambda *_: None)[0]
            for name in ("first", "again")
        )  # fmt: skip
        settings = NightSettings(
            name="t", cascade=(Escalation(role="assistant", model="larger", below=0.9, share=1.0),), gates=Gates(reject_rate_max=0.5)
        )
        engines = {"student": nights.scripted("student", script), "assistant": nights.scripted("assistant", script)}
        path = nights.dump(Path(root) / "dump", "2026-11-22", nights.posts(120, 3))
        version = nights.version(store, settings, engines)
        made, _ = night(store, "2026-11-22", str(path), version=version, settings=settings, runtime=runtime, steps=nights.quiet)
        ray.get(training)
        time.sleep(3)  # the last report of the driver
    print("RESULT " + json.dumps({"label": [m.model_dump(mode="json") for m in (first, again)], "night": made.model_dump(mode="json")}))


if __name__ == "__main__":
    main(sys.argv[1])
