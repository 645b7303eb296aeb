"""The examples for clusters: what a scheduler reads is well-formed, and the commands in them are ones we take."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from trainers.checks import check_world
from trainers.cli import parse
from trainers.config import GRPOConfig

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs" / "cluster"
SLURM, POD = CLUSTER / "slurm.sh", CLUSTER / "pytorchjob.yaml"


def checked(words: list[str], ranks: int) -> GRPOConfig:
    """The config that a command comes to, on so many ranks."""
    script = words.index("scripts/grpo.py")
    config, _ = parse(
        GRPOConfig, [str(ROOT / word) if word.startswith("configs/") else word for word in words[script + 1 :]]
    )
    check_world(config, ranks)
    assert config.checkpoint.every is not None and config.checkpoint.resume == "auto"
    assert config.rollout.balance and config.rollout.tensor_parallel_size == 1
    return config


def test_the_slurm_script() -> None:
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    text = SLURM.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert "requeue" in options
    (command,) = re.findall(r"^srun ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    words = shlex.split(
        command.replace("\\\n", "").replace("$SLURM_JOB_ID", "17").replace("$SLURM_JOB_NUM_NODES", options["nodes"])
    )
    assert "--nproc_per_node=" + options["gpus-per-node"] in words and "--rdzv-id=17" in words
    config = checked(words, int(options["nodes"]) * int(options["gpus-per-node"]))
    assert config.run.name == "grpo-gsm8k-17", "a requeued job has the same number"


def test_the_kubernetes_job() -> None:
    job = yaml.safe_load(POD.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker, elastic = job["spec"]["pytorchReplicaSpecs"]["Worker"], job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"] and elastic["rdzvBackend"] == "c10d"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    config = checked(container["command"], worker["replicas"] * int(job["spec"]["nprocPerNode"]))
    assert config.run.directory in mounts and "/dev/shm" in mounts


@pytest.mark.parametrize("file", [SLURM, POD])
def test_a_dead_node_can_be_replaced(file: Path) -> None:
    """Without it torchrun's nodes look for each other at the store of a round that is over (docs/multi-node.md)."""
    assert re.search(r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE(=1|\s+value: \"1\")", file.read_text())
