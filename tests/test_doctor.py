"""Each thing that can be wrong is made wrong, and the check that is there for it says so; the others go on."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from mulcot_ray import machines
from mulcot_ray.artifacts import Run, begin
from mulcot_ray.doctor import doctor, failed, line, show
from mulcot_ray.engines import parity
from mulcot_ray.engines.base import spec
from mulcot_ray.errors import ConfigError, EngineError
from mulcot_ray.machines import Unchecked
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.prices import load_prices
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Endpoint, load_recipe, load_runtime, model_folder
from mulcot_ray.records import Split
from mulcot_ray.storage import Store

TINY, PAPER = load_recipe("tiny"), load_recipe("paper")
LAPTOP, CLUSTER = load_runtime("laptop"), load_runtime("cluster")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """A session that another test has open must not be looked at."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "root"))


@pytest.fixture
def student(tmp_path):
    """A copy of the shipped student, to break."""
    return Path(shutil.copytree(model_folder("builtin:student"), tmp_path / "student"))


def with_role(runtime, role, **changes):
    return runtime.model_copy(update={role: getattr(runtime, role).model_copy(update=changes)})


def with_models(recipe, **models):
    return recipe.model_copy(update={"models": recipe.models.model_copy(update={k: str(v) for k, v in models.items()})})


def look(store, recipe=TINY, runtime=LAPTOP, **options):
    return {c.name: c for c in doctor(store, recipe, runtime, **{"parity": 0, **options})}


def edit(file, **changes):
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **changes}))


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_fresh_installation_is_well(store):
    told = []
    checks = doctor(store, TINY, LAPTOP, parity=0, say=told.append)
    assert told == checks and not failed(checks) and [c.name for c in checks][:4] == ["packages", "storage", "device", "Ray cluster"]
    for role in ("teacher", "assistant", "student"):
        for name in ("model", "family", "weights", "memory", "tokenizer", "label words", "picture", "length"):
            assert next(c for c in checks if c.name == f"{role}: {name}").outcome == "ok", f"{role}: {name}"
    assert next(c for c in checks if c.name == "vocabularies").outcome == "ok"
    assert all(c.detail.startswith("because ") for c in checks if c.outcome == "not checked")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(show(checks))
    text = console.export_text()
    assert "✓ storage" in text and f"{sum(c.outcome == 'ok' for c in checks)} ok, " in text and "failed" not in text.splitlines()[-1]
    assert "not checked, because the runtime starts Ray on this machine" in text
    assert not list(Path(store.base).rglob("*")), "nothing is left behind"


def test_real_sizes_without_weights(store):
    """What needs no weights is checked, the rest says which folder is not here."""
    runtime = with_role(with_role(CLUSTER, "student", accelerator="cpu"), "assistant", accelerator="A10G")
    runtime = runtime.model_copy(update={"address": None})
    found = look(store, PAPER, runtime)
    if machines._version("vllm") is None:
        assert "vLLM for GPUs is not installed, 0.29.* goes with ray 2.60" in found["packages"].detail
    assert found["teacher: memory"].outcome == "ok" and "344 rows of 4,096" in found["teacher: memory"].detail
    assert found["assistant: memory"].outcome == "ok" and "12 rows of 4,096" in found["assistant: memory"].detail
    assert found["student: memory"] == replace(
        found["student: memory"], outcome="not checked", detail="because the runtime names no accelerator for the student"
    )
    assert found["teacher: length"].outcome == "ok" and "estimated" in found["teacher: length"].detail
    assert found["training workers"].outcome == "ok"
    for name in ("model", "family", "weights", "tokenizer", "label words", "picture", "contract"):
        assert found[f"student: {name}"].detail == "because the folder ./Qwen2.5-VL-3B-Instruct is not here"
    assert found["vocabularies"].detail == "because the tokenizer of the assistant and of the student is not here"
    assert found["transformers and vLLM agree"].outcome == "not checked"
    small = look(store, PAPER, with_role(runtime, "teacher", accelerator="L40S", tensor_parallel=2), roles=("teacher",))["teacher: memory"]
    assert small.outcome == "failed" and "68.4 GiB of weights on each of 2 devices" in small.detail


def test_one_failure_does_not_hide_the_next(store, monkeypatch):
    def broken(store):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(machines, "storage", broken)
    found = look(store, roles=("student",))
    assert found["storage"].outcome == "failed" and found["storage"].detail == "RuntimeError: disk on fire"
    assert found["student: weights"].outcome == "ok" and failed(list(found.values()))
    assert "✗ storage  RuntimeError: disk on fire" in line(found["storage"]).plain


# --- storage and machines --------------------------------------------------------------------------------------------


def test_storage_that_lets_two_writers_win_is_refused(store):
    class Careless(Store):
        def create(self, key, data):
            self.write(key, data)
            return True

    with pytest.raises(Exception, match="of eight writers that may not replace a file 8 did"):
        machines.storage(Careless(store.base))

    class Forgetful(Store):
        def files(self, key):
            return {}

    with pytest.raises(Exception, match="are not listed"):
        machines.storage(Forgetful(store.base))
    assert not list(Path(store.base).rglob("*"))


def test_a_root_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").touch()
    found = look(Store(str(tmp_path / "file" / "root")), roles=())
    assert found["storage"].outcome == "failed" and found["training workers"].outcome == "ok"


def test_s3(s3_bucket):
    """On S3 the conditional write is S3's own; a model there is looked at without its weights."""
    store = Store(f"s3://{s3_bucket}/doctor-test")
    source = model_folder("builtin:student")
    run = begin(store, "models", "mine", {"stage": "test"})
    assert isinstance(run, Run)
    with run:
        for f in source.iterdir():
            store.write(f"models/mine/{f.name}", f.read_bytes())
        store.write("models/mine/contract.json", TINY.contract.model_dump_json().encode())
        run.commit(1)
    found = look(store, with_models(TINY, student="mine"), roles=("student",), parity=2)
    assert found["storage"].outcome == "ok" and not store.files("doctor")
    assert found["student: contract"].outcome == "ok" and found["student: tokenizer"].outcome == "ok" and found["student: memory"].outcome == "ok"
    for name in ("student: weights", "transformers and vLLM agree"):
        assert found[name].outcome == "not checked" and "are not fetched for this" in found[name].detail
    assert look(store, with_models(TINY, student="theirs"), roles=("student",))["student: model"].detail.startswith("no models 'theirs'")


def test_what_the_machine_does_not_have(store):
    found = look(store, runtime=with_role(LAPTOP.model_copy(update={"train_workers": 3, "local_cpus": 2}), "teacher", cpus=9), roles=())
    assert "teacher asks for 9 CPUs and training asks for 3 CPUs, and Ray has 2 here" in found["device"].detail
    assert found["training workers"].detail == "global_batch 16 of the assistant does not divide by train_workers 3"
    if not machines.visible()[0]:
        found = look(store, PAPER, CLUSTER.model_copy(update={"address": None}), roles=("teacher",))
        assert "wants device cuda, and torch sees no GPU here" in found["device"].detail
        assert found["teacher: GPUs of a replica"].detail == "a replica takes 8 GPUs of one machine, and 0 are here"


def test_gpus_of_a_replica_must_be_on_one_node(store):
    def gpus(nodes, types):
        return machines.gpus(PAPER, CLUSTER, "teacher", "auto", {"nodes": nodes, "types": types})

    assert gpus([{"GPU": 1}, {"GPU": 8}], []) == "8, on a node that is up"
    assert gpus([{"CPU": 4}], [{"GPU": 1}, {"GPU": 8}]) == "8, on a node that the cluster can start"
    with pytest.raises(ConfigError, match="takes 8 GPUs of one node, and no node type"):
        gpus([{"GPU": 4}, {"GPU": 4}], [{"GPU": 4}])
    with pytest.raises(Unchecked, match="does not tell which nodes"):
        gpus([{"GPU": 4}], [])


@pytest.mark.ray
def test_a_cluster_is_reached_from_a_process_of_its_own(ray_session):
    import ray

    nodes: dict = {}
    said = machines.cluster(ray.get_runtime_context().gcs_address, nodes)
    assert "1 nodes up with 4 CPUs and 0 GPUs" in said and nodes["nodes"][0]["CPU"] == 4 and nodes["types"] == []


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setattr(machines, "CLUSTER_S", 10.0)
    with pytest.raises(ConfigError, match="no Ray cluster at address '127.0.0.1:9': probe took more than 10 s"):
        machines.cluster("127.0.0.1:9", {})


# --- a model's folder ------------------------------------------------------------------------------------------------


def broken_weights(f):
    with (f / "model.safetensors").open("r+b") as w:
        w.truncate(1_000_000)


def missing_shard(f):
    (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors")
    where = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def missing_tensor(f):
    (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors", "x": "model.safetensors"}}))


def small_processor(f):
    config = json.loads((f / "processor_config.json").read_text())
    config["image_processor"]["size"]["longest_edge"] = 3136
    (f / "processor_config.json").write_text(json.dumps(config))


def few_positions(f):
    text = json.loads((f / "config.json").read_text())["text_config"]
    edit(f / "config.json", text_config={**text, "max_position_embeddings": 512})


def two_pictures(f):
    template = (f / "chat_template.jinja").read_text()
    (f / "chat_template.jinja").write_text(template.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"))


def trained_otherwise(f):
    other = TINY.contract.model_copy(update={"name": "other"})
    (f / "contract.json").write_text(other.model_dump_json())


@pytest.mark.parametrize(
    ("damage", "check", "message"),
    [
        (broken_weights, "weights", "model.safetensors has 1,000,000 bytes, and its header says 2,556,600: the copy is not whole"),
        (missing_shard, "weights", "1 of 2 shards of the index are missing, model-00002-of-00002.safetensors"),
        (missing_tensor, "weights", "model.safetensors lacks 1 tensors of the index, x for one"),
        (lambda f: (f / "model.safetensors").unlink(), "weights", "has no safetensors files"),
        (lambda f: edit(f / "config.json", model_type="qwen2_vl"), "family", "config.json says 'qwen2_vl', and contract 'tiny' is for 'qwen2_5_vl'"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer", ""),
        (lambda f: (f / "chat_template.jinja").unlink(), "tokenizer", "no chat template"),
        (two_pictures, "tokenizer", "gives a picture 2 places"),
        (lambda f: edit(f / "config.json", image_token_id=99), "picture", "<|image_pad|> is token 6, and config.json says image_token_id 99"),
        (small_processor, "picture", "takes 3,136 to 3,136 pixels: it would resize the contract's 84 × 84 = 7,056"),
        (lambda f: (f / "processor_config.json").unlink(), "picture", "has neither processor_config.json nor"),
        (few_positions, "length", "max_model_len is 1,024, and the model has 512 positions"),
        (trained_otherwise, "contract", "it was trained with contract 'other'"),
    ],
)  # fmt: skip
def test_a_broken_folder(store, student, damage, check, message):
    damage(student)
    found = look(store, with_models(TINY, student=student), roles=("student",))
    bad = {n: c.detail for n, c in found.items() if c.outcome == "failed"}
    assert f"student: {check}" in bad and message in bad[f"student: {check}"], found
    assert found["student: model"].outcome == "ok" and len(bad) <= 2


def test_words_and_lengths_of_a_recipe_that_does_not_fit(store):
    words = TINY.contract.model_dump() | {"label_words": {"negative": "negative", "neutral": "neutral", "positive": "neutral again"}}
    found = look(store, TINY.model_copy(update={"contract": Contract.model_validate(words)}), roles=("student",))
    assert found["student: label words"].detail.endswith("start with the same token")
    found = look(store, TINY.model_copy(update={"max_model_len": 240}), roles=("teacher", "student"))
    assert found["teacher: length"].outcome == "failed" and "answers of up to 160: more than max_model_len 240" in found["teacher: length"].detail
    tight = look(store, TINY.model_copy(update={"max_model_len": 100}), roles=("teacher",))["teacher: length"]
    assert tight.outcome == "failed" and "the model takes 100 with the answer" in tight.detail


def test_real_posts_are_measured_where_they_are_named(sample_store):
    found = look(sample_store, posts="sample", roles=("student",))
    assert found["posts"].detail == "posts/sample: 168 rows, 0 rejected by the import"
    assert found["student: length"].outcome == "ok"
    assert look(sample_store, posts="nope", roles=("student",))["posts"].outcome == "failed"


def test_vocabularies_must_agree(store, student):
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[500:502]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = look(store, with_models(TINY, student=student), roles=("assistant", "student"))
    assert found["vocabularies"].outcome == "failed" and "the vocabularies differ in 2 ids" in found["vocabularies"].detail


# --- endpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """An OpenAI-like server with one model, which remembers what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            good = self.headers.get("Authorization") == "Bearer a-secret"
            self.answer(200 if good else 401, {"data": [{"id": "big"}]} if good else {"error": "who are you?"})

        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.answer(200, {"usage": {"prompt_tokens": 7, "completion_tokens": 1}})

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
        http.shutdown()
        thread.join()


def test_an_endpoint_is_asked_for_a_token_only_where_that_is_allowed(store, server, monkeypatch):
    url, asked = server
    recipe, runtime = with_models(TINY, teacher="endpoint:big"), with_role(LAPTOP, "teacher", endpoint=Endpoint(url=url, key_env="DOCTOR_KEY"))
    monkeypatch.setenv("DOCTOR_KEY", "a-secret")
    found = look(store, recipe, runtime, roles=("teacher",))
    assert found["teacher: key"].detail == "DOCTOR_KEY is set" and found["teacher: endpoint"].outcome == "ok"
    assert found["teacher: one token"].detail == "because it may cost: allow it with --ask" and asked == [("/v1/models", "Bearer a-secret")]
    found = look(store, recipe, runtime, roles=("teacher",), ask=True)
    assert found["teacher: one token"].detail == "answers; 7 tokens in, 1 out"
    assert asked[-1][0] == "/v1/chat/completions" and asked[-1][1]["max_tokens"] == 1 and asked[-1][1]["model"] == "big"
    assert not any("a-secret" in c.detail for c in found.values())
    other = look(store, with_models(TINY, teacher="endpoint:small"), runtime, roles=("teacher",))["teacher: endpoint"]
    assert other.outcome == "failed" and "does not list 'small'; it has big" in other.detail


def test_an_endpoint_without_key_section_or_server(store, server, monkeypatch):
    url, _ = server
    monkeypatch.delenv("DOCTOR_KEY", raising=False)
    recipe = with_models(TINY, teacher="endpoint:big")
    found = look(store, recipe, with_role(LAPTOP, "teacher", endpoint=Endpoint(url=url, key_env="DOCTOR_KEY")), roles=("teacher",))
    assert found["teacher: key"].detail == "the environment variable DOCTOR_KEY is not set"
    assert "answers 401" in found["teacher: endpoint"].detail and "who are you?" in found["teacher: endpoint"].detail
    found = look(store, recipe, roles=("teacher",))
    assert "no `endpoint:` section under 'teacher'" in found["teacher: key"].detail
    found = look(store, recipe, with_role(LAPTOP, "teacher", endpoint=Endpoint(url="http://127.0.0.1:9/v1", key_env=None)), roles=("teacher",))
    assert found["teacher: key"].detail == "none is sent" and "does not answer: ConnectError" in found["teacher: endpoint"].detail


# --- parity, and calls in a process of their own ---------------------------------------------------------------------


def two_sides(monkeypatch, ours, theirs):
    monkeypatch.setattr(parity, "apart", lambda f, s, posts: {parity.by_transformers: ours, parity.by_vllm: theirs}[f])


def test_a_difference_between_the_two_is_reported(monkeypatch):
    s = spec(TINY, LAPTOP, "student", "-")
    posts = list(sample_posts(2, Split.TEST, 1))
    two_sides(monkeypatch, [(0.2, 0.3, 0.5), (0.4, 0.3, 0.3)], [(0.2, 0.3, 0.5), (0.4, 0.3002, 0.2998)])
    assert "differ by 0.0002 at most" in parity.compare(s, posts)
    two_sides(monkeypatch, [(0.2, 0.3, 0.5), (0.4, 0.3, 0.3)], [(0.2, 0.3, 0.5), (0.3, 0.4, 0.3)])
    with pytest.raises(EngineError, match=f"differ by 0.1 at most .post {posts[1].post_id}., 0.001 in float32 is allowed; 1 labels differ"):
        parity.compare(s, posts)
    # In bfloat16 two labels that are as good as equal may change places.
    two_sides(monkeypatch, [(0.41, 0.40, 0.19)] * 2, [(0.40, 0.41, 0.19)] * 2)
    assert "0.05 in bfloat16" in parity.compare(replace(s, dtype="bfloat16"), posts)
    with pytest.raises(EngineError, match="2 labels differ"):
        parity.compare(s, posts)


def test_a_call_apart(tmp_path):
    assert parity.apart(load_prices) == load_prices()
    with pytest.raises(ConfigError, match="absent.yaml' cannot be read"):
        parity.apart(load_prices, str(tmp_path / "absent.yaml"))
    with pytest.raises(EngineError, match="loads ended with status 1: json.decoder.JSONDecodeError"):
        parity.apart(json.loads, "{")
    with pytest.raises(EngineError, match="_exit ended with status 7: it said nothing"):
        parity.apart(os._exit, 7)
    started = time.time()
    with pytest.raises(EngineError, match="sleep took more than 3 s"):
        parity.apart(time.sleep, 600, timeout_s=3)
    assert time.time() - started < 60


@pytest.mark.engine
def test_transformers_and_vllm_agree_on_the_student(store, student):
    """Both for real, each in a process of its own."""
    found = look(store, with_models(TINY, student=student), roles=("student",), parity=3)
    agree = found["transformers and vLLM agree"]
    assert agree.outcome == "ok" and agree.detail.startswith("probabilities of 3 posts differ by "), agree
