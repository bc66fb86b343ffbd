"""The files of examples/cluster, by the tool that reads them where it is installed: bash, Ray's schema of `ray up`. For KubeRay the fields that its
types have (its own check needs a Kubernetes cluster)."""

import re
import subprocess

import pytest
import yaml

from cluster import config
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples/cluster"

# KubeRay's RayClusterSpec, HeadGroupSpec, WorkerGroupSpec and RayJobSpec (ray.io/v1): fields an example may use.
CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions", "headServiceAnnotations", "suspend"}
HEAD = {"serviceType", "headService", "enableIngress", "rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "scaleStrategy", "rayStartParams", "template"}
JOB = {
    "entrypoint", "runtimeEnvYAML", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "submissionMode", "rayClusterSpec", "clusterSelector",
    "metadata", "jobId", "suspend", "submitterPodTemplate", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources",
}


def test_every_example_is_looked_at_here():
    assert {f.name for f in EXAMPLES.iterdir()} == {"node.sh", "slurm.sh", "ray-up.yaml", "kuberay.yaml", "kuberay-job.yaml", "grafana.json"}


@pytest.mark.parametrize("name", ["node.sh", "slurm.sh"])
def test_scripts_are_bash(name):
    """`node.sh` is also what tests/cluster/test_submit.py and tests/long/test_three_nodes.py start real clusters with."""
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)


def test_slurm_reads_its_options_before_the_first_command():
    lines = (EXAMPLES / "slurm.sh").read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert options and max(options) < first
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[i]) for i in options)


def test_ray_up_accepts_its_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((EXAMPLES / "ray-up.yaml").read_text())
    prepared = prepare_config(given)
    validate_config(prepared)
    assert prepared["provider"]["worker_ips"] == ["10.0.0.11", "10.0.0.12"] and prepared["head_start_ray_commands"] == given["head_start_ray_commands"]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in given["head_start_ray_commands"][1] and "$RAY_HEAD_IP" in given["worker_start_ray_commands"][1]


@pytest.mark.parametrize("name", ["node.sh", "ray-up.yaml"])
def test_the_options_of_ray_start_exist(name):
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    text = re.sub(r"#.*|ray get-auth-token .*", "", (EXAMPLES / name).read_text())
    used = set(re.findall(r"(?<![\w-])--[a-z-]+", text))
    assert len(used) > 8 and used <= known


def kuberay(name):
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def test_the_manifests_of_kuberay_use_fields_that_it_has():
    claim, cluster = kuberay("kuberay.yaml")
    (job,) = kuberay("kuberay-job.yaml")
    assert (claim["apiVersion"], claim["kind"], claim["spec"]["accessModes"]) == ("v1", "PersistentVolumeClaim", ["ReadWriteMany"])
    assert [(m["apiVersion"], m["kind"]) for m in (cluster, job)] == [("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob")]
    assert set(job["spec"]) <= JOB and set(cluster["spec"]) <= CLUSTER and cluster["spec"]["authOptions"] == {"mode": "token"}
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert set(head) <= HEAD and all(set(w) <= WORKERS for w in workers)
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert {m["name"] for m in container["volumeMounts"]} == set(volumes) and volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all(re.fullmatch(r"\d+(m|[KMGT]i)?", value) for value in container["resources"]["limits"].values())


def test_the_command_of_the_job_is_one_of_ours(tmp_path):
    """As bash reads it: its settings are known, and it resumes a run that is there."""
    (job,) = kuberay("kuberay-job.yaml")
    fake = tmp_path / "videoseg"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    said = lambda entrypoint: subprocess.run(["sh", "-c", entrypoint], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True).stdout.split()
    command, recipe, *overrides = said(job["spec"]["entrypoint"])
    assert command == "train" and config.load(recipe, overrides).run.name == "7b"
    (tmp_path / "runs/7b").mkdir(parents=True)
    (tmp_path / "runs/7b/config.yaml").touch()
    assert said(job["spec"]["entrypoint"].replace("/shared/runs", f"{tmp_path}/runs")) == ["resume", f"{tmp_path}/runs/7b"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "630"}
