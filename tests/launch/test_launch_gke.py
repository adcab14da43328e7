"""`launch/gke.py`: manifests against the schemas of Kubernetes, TPU names against those of XPK."""

import copy
import json
import shlex
import shutil
import stat
import subprocess
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml
from launchers import LAUNCH, TRAIN, dry_run, flags, launch, refused

sys.path.insert(0, str(LAUNCH))
import gke

KUBERNETES = "1.31"
IMAGE = "--image=us-docker.pkg.dev/my-project/vilam3/trainer:1"
RUN = ["train", "--name=m3", IMAGE]
# The part of the JobSet API in use. Source: api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset,
# whose `template` is a JobTemplateSpec of batch/v1 (checked as a Job).
RULE_NAME = "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
REASONS = {"type": "array", "items": {"enum": ["PodFailurePolicy"]}}
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "action"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string", "pattern": RULE_NAME},
                                    "action": {"enum": ACTIONS},
                                    "onJobFailureReasons": REASONS,
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {
                                "type": "object",
                                "required": ["spec"],
                                "additionalProperties": False,
                                "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
                            },
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip

# The part of the RayJob API in use. Source: ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go of kuberay,
# whose pod templates are those of core/v1 (checked as Pods). Values of rayStartParams are strings.
START = {"type": "object", "additionalProperties": {"type": "string"}}
TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
}
COUNT = {"type": "integer", "minimum": 0}
RAYJOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "backoffLimit": COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"mode": {"enum": ["disabled", "token"]}},
                        },
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["template"],
                            "additionalProperties": False,
                            "properties": {"rayStartParams": START, "template": TEMPLATE},
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                                "additionalProperties": False,
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": COUNT,
                                    "rayStartParams": START,
                                    "template": TEMPLATE,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip
ANNOTATE = ["--expert=CXR", "--data=gs://bucket/films", "--out=gs://bucket/annotations"]
RUN_RAY = ["annotate", "--name=films", IMAGE, "--workers=4"]


def manifest(*arguments, after=TRAIN):
    done = launch("gke.py", *arguments, "--dry-run", "--", *after)
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert (first, last) == ("kubectl create -f - <<'MANIFEST'", "MANIFEST")
    return yaml.safe_load("\n".join(lines))


def as_job(document):
    template = document["spec"]["replicatedJobs"][0]["template"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": template["spec"]}


def check(document):
    if document["kind"] == "RayJob":
        jsonschema.validate(document, RAYJOB)
        cluster = document["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        return
    if document["kind"] == "JobSet":
        jsonschema.validate(document, JOBSET)
        document = as_job(document)
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("extra", [[], ["--slices=4", "--spot", "--queue=team", "--env=A=b"]])
@pytest.mark.parametrize("accelerator", ["v5litepod-256", "v5p-128", "v6e:16x16", "tpu7x:4x4x4", "v5p-8"])
def test_jobset_fits_the_schemas(accelerator, extra):
    if accelerator == "v5p-8":
        extra = extra[1:]
    check(manifest(*RUN, f"--accelerator={accelerator}", *extra))


def test_job_fits_the_schema():
    check(manifest("job", "--name=annotate", IMAGE, "--gpu=nvidia-l4", after=["vilam3-experts", "list"]))
    check(
        manifest("job", "--name=import", IMAGE, "--env=A=b", "--spot", after=["vilam3", "convert", "import"])
    )


@pytest.mark.parametrize("extra", [[], ["--gpu=nvidia-l4", "--spot", "--queue=team", "--env=A=b"]])
def test_rayjob_fits_the_schemas(extra):
    check(manifest(*RUN_RAY, *extra, after=ANNOTATE))


def test_what_the_rayjob_asks_for():
    document = manifest(*RUN_RAY, "--gpu=nvidia-l4", "--env=B=c $(d)", after=[*ANNOTATE, "--args=it's $x"])
    spec = document["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words == [
        "vilam3-experts", "annotate", *ANNOTATE, "--args=it's $x", "--engine=ray", "--address=auto"
    ]  # fmt: skip
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] == 3
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    pins = (LAUNCH.parent / "constraints/py311.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in pins
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    pod = group["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "B", "value": "c $$(d)"} in container["env"]
    assert "command" not in container and "args" not in container  # KubeRay's own


@pytest.mark.parametrize(
    "after, told",
    [
        ([], "--expert=NAME"),
        (ANNOTATE[:2], "--out="),
        ([ANNOTATE[0], "--data=/x", ANNOTATE[2]], "--data=/x"),
        ([*ANNOTATE, "--weights", "weights"], "--weights=weights"),
        ([*ANNOTATE, "--engine=local"], "omit it after --; the launcher sets it"),
        ([*ANNOTATE, "--address=auto"], "omit it after --; the launcher sets it"),
    ],
)
def test_bad_arguments_of_annotate(after, told):
    assert told in refused("gke.py", *RUN_RAY, "--dry-run", "--", *after)


@pytest.mark.parametrize(
    "fault", ["unknown field", "wrong type", "missing name", "jobset field", "jobset rule"]
)
def test_schemas_see_a_fault(fault):
    document = copy.deepcopy(manifest(*RUN, "--accelerator=v5p-128"))
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    if fault == "unknown field":
        pod["nodeSelectors"] = pod.pop("nodeSelector")
    if fault == "wrong type":
        pod["containers"][0]["args"] = "vilam3 train"
    if fault == "missing name":
        del pod["containers"][0]["name"]
    if fault == "jobset field":
        document["spec"]["failurePolicy"]["maxRestart"] = 3
    if fault == "jobset rule":
        document["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_what_the_jobset_asks_for():
    document = manifest(
        *RUN,
        "--accelerator=v5p-128",
        "--slices=2",
        "--max-restarts=7",
        "--stop-seconds=600",
        "--env=B=c $(d)",
    )
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert document["metadata"]["annotations"] == {annotation: "cloud.google.com/gke-nodepool"}
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 7
    (replicated,) = document["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert "command" not in container  # the image's run.sh
    assert container["args"] == ["vilam3", "train", *TRAIN]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {"name": "B", "value": "c $$(d)"} in container["env"]
    assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://bucket/stage4/compile_cache"} in container[
        "env"
    ]
    (volume,) = pod["volumes"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
    # A user error (2) ends the JobSet; other codes (143: interrupted) restart all Jobs.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert document["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_spot_and_queue():
    document = manifest(*RUN, "--accelerator=v6e-16", "--spot", "--queue=team")
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert (
        "kueue.x-k8s.io/queue-name" not in pod["metadata"]["labels"]
    )  # otherwise Kueue would queue every pod
    assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["spec"]["tolerations"][0]["key"] == "cloud.google.com/gke-spot"


def test_awkward_words_arrive():
    words = ['--config.name=it\'s "x": $name ${name}', "--config.other=$(NAME)\n- y"]
    document = manifest(*RUN, "--accelerator=v6e-16", after=[*TRAIN, *words])
    args = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
        "args"
    ]
    assert args[-2:] == [words[0], words[1].replace("$(", "$$(")]  # the escape of $( in Kubernetes


# Names and shapes from XPK's table of systems (src/xpk/core/system_characteristics.py).
@pytest.mark.parametrize(
    "rented, shape, label, hosts",
    [
        ("v5litepod-16", "4x4", "tpu-v5-lite-podslice", 4),
        ("v5litepod-256", "16x16", "tpu-v5-lite-podslice", 64),
        ("v6e-8", "2x4", "tpu-v6e-slice", 2),
        ("v6e-128", "8x16", "tpu-v6e-slice", 32),
        ("v5p-8", "2x2x1", "tpu-v5p-slice", 1),
        ("v5p-16", "2x2x2", "tpu-v5p-slice", 2),
        ("v5p-64", "2x4x4", "tpu-v5p-slice", 8),
        ("v5p-128", "4x4x4", "tpu-v5p-slice", 16),
        ("v5p-256", "4x4x8", "tpu-v5p-slice", 32),
        ("v5p-384", "4x4x12", "tpu-v5p-slice", 48),
        ("v5p-512", "4x8x8", "tpu-v5p-slice", 64),
        ("v5p-1024", "8x8x8", "tpu-v5p-slice", 128),
        ("v5p-2048", "8x8x16", "tpu-v5p-slice", 256),
        ("v5p-12288", "16x16x24", "tpu-v5p-slice", 1536),
        ("v4-32", "2x2x4", "tpu-v4-podslice", 4),
        ("tpu7x-128", "4x4x4", "tpu7x", 16),
    ],
)
def test_names_of_slices(rented, shape, label, hosts):
    chosen = gke.parse_slice(rented)
    assert (chosen.topology, gke.FAMILIES[chosen.family].label, chosen.hosts) == (shape, label, hosts)
    assert gke.parse_slice(f"{chosen.family}:{shape}") == chosen
    assert chosen.xpk_type == rented


@pytest.mark.parametrize(
    "text",
    [
        "v5p",
        "v5p-96",
        "v5p-7",
        "v6e-48",
        "v6e:4x4x4",
        "v5p:4x4",
        "v5p:4x4x6",
        "v5p:0x0x0",
        "h100-8",
        "v5e:8x4",
    ],
)
def test_no_such_slice(text):
    assert f"--accelerator={text}" in refused(
        "gke.py", *RUN, f"--accelerator={text}", "--dry-run", "--", *TRAIN
    )


def test_xpk():
    where = [
        "--cluster=c",
        "--project=my-project",
        "--zone=us-east5-a",
        "--accelerator=v5litepod-256",
        "--slices=2",
    ]
    (command,) = dry_run("gke.py", "xpk", "--name=m3", IMAGE, *where, "--env=A=b c", train=TRAIN)
    assert command[:4] == ["xpk", "workload", "create", "--workload"]
    given = flags(command)
    assert given["workload"] == "m3"
    assert given["tpu-type"] == "v5litepod-256"
    assert given["num-slices"] == "2"
    assert given["docker-image"] == IMAGE.removeprefix("--image=")
    assert given["restart-on-exit-codes"] == "1"  # beside XPK's own, 42 and 127 to 255
    assert command[command.index("A=b c") - 1] == "--env"
    assert shlex.split(command[command.index("--command") + 1]) == [
        "/vilam3/run.sh",
        "vilam3",
        "train",
        *TRAIN,
    ]
    # The flags of `xpk workload create` (src/xpk/parser/workload.py).
    assert set(given) - {"config"} <= {
        "workload", "cluster", "project", "zone", "tpu-type", "num-slices", "docker-image", "max-restarts",
        "restart-on-exit-codes", "termination-grace-period-seconds", "env", "command",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, told",
    [
        (["--name=M3"], "argument --name"),
        (["--image=trainer"], "its tag or digest"),
        (["--slices=0"], "argument --slices"),
        (["--shm-size=32g"], "like 32Gi"),
        (["--env=A"], "KEY=VALUE"),
        (["--compile-cache=/tmp"], "gs://"),
        (["--accelerator=v5p-8", "--slices=2"], "each slice must have several hosts"),
        (["--colour=red"], "--colour=red"),
    ],
)
def test_bad_arguments(change, told):
    assert told in refused("gke.py", *RUN, "--accelerator=v5p-128", *change, "--dry-run", "--", *TRAIN)


@pytest.mark.parametrize(
    "train, told",
    [
        ([], "--config=FILE"),
        (["--config=a"], "must be gs://"),
        (["--config=a", "--workdir=/x"], "must be gs://"),
        ([*TRAIN, "--config.data.annotations=/x"], "--config.data.annotations=/x"),
        ([*TRAIN, "--config.data.path", "/x"], "--config.data.path=/x"),
        ([*TRAIN, "--config.model.tokenizer=/x"], "--config.model.tokenizer=/x"),
        ([*TRAIN, "--config.init.llm=/x"], "--config.init.llm=/x"),
    ],
)
def test_bad_arguments_of_the_trainer(train, told):
    assert told in refused("gke.py", *RUN, "--accelerator=v5p-128", "--dry-run", "--", *train)


def test_other_commands():
    assert dry_run("gke.py", "delete", "--name=m3") == [
        ["kubectl", "delete", "jobset", "m3", "--namespace", "default"]
    ]
    assert len(dry_run("gke.py", "status", "--name=m3", "--job")) == 2
    found, pods = dry_run("gke.py", "status", "--name=m3", "--ray")
    labels = manifest("annotate", "--name=m3", IMAGE, "--workers=1", after=ANNOTATE)["spec"]["rayClusterSpec"]
    key, value = flags(pods)["selector"].split("=")
    assert labels["headGroupSpec"]["template"]["metadata"]["labels"][key] == value and "rayjob" in found
    (logs,) = dry_run("gke.py", "logs", "--name=m3", "--ray")
    assert flags(logs)["selector"] == "batch.kubernetes.io/job-name=m3"
    (logs,) = dry_run("gke.py", "logs", "--name=m3", "--namespace=team")
    assert "jobset.sigs.k8s.io/jobset-name=m3" in flags(logs)["selector"]
    assert "no command after --" in refused("gke.py", "job", "--name=x", IMAGE)
    assert "kubectl is not installed" in refused("gke.py", "delete", "--name=m3")
    assert "takes no arguments after --" in refused("gke.py", "delete", "--name=m3", "--", "x")


def test_kubectl_gets_the_manifest(tmp_path):
    (tmp_path / "kubectl").write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/args\ncat > {tmp_path}/manifest\nexit 5\n'
    )
    (tmp_path / "kubectl").chmod(stat.S_IRWXU)
    done = subprocess.run(
        [sys.executable, LAUNCH / "gke.py", *RUN, "--accelerator=v6e-16", "--", *TRAIN],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 5
    assert (tmp_path / "args").read_text() == "create -f -\n"
    assert json.dumps(yaml.safe_load((tmp_path / "manifest").read_text())) == json.dumps(
        manifest(*RUN, "--accelerator=v6e-16")
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
def test_kubectl_knows_the_flags():
    for verb, arguments in {"delete": ["delete", "--name=m3"], "logs": ["logs", "--name=m3"]}.items():
        text = subprocess.run(["kubectl", verb, "--help"], capture_output=True, text=True, check=True).stdout
        (command,) = dry_run("gke.py", *arguments)
        assert all(f"--{name}" in text for name in set(flags(command)) - {"namespace"}), command
