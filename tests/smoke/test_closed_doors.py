"""What a run lets in and out: who can connect to it, what its files can do, and who reads what it leaves."""

import io
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.launch import Completed, launch
from tests.smoke.closed_doors import HOST_ADDRESS, Doors, watched_doors
from trainers.cli import parse
from trainers.config import PPOConfig
from trainers.errors import ConfigError
from trainers.policy import load_policy, load_reference

WORKER = Path(__file__).with_name("closed_doors_worker.py")
SECRETS = {
    "WANDB_API_KEY": "5ec2e7a0b1c3d4e5f60718293a4b5c6d7e8f9012",
    "HF_TOKEN": "hf_ThisTokenIsTheTestsAlone",
    "AWS_SECRET_ACCESS_KEY": "aws/Secret+OfTheTest/0123456789",
    "MY_PASSWORD": "correct-horse-battery-staple",
}


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


@dataclass
class Run:
    """One run of scripts/ppo.py: what it printed, its folder, its home folder, and where it listened."""

    done: Completed
    folder: Path
    home: Path
    doors: Doors


def ppo(out: Path, model: Path, nproc: int | None) -> Run:
    """A run with secrets in its environment, a umask that takes nothing away, and every message of vLLM's."""
    home = out / "home"
    home.mkdir()
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # compiled kernels and fonts, as ever
    settings = {"HOME": str(home), "XDG_CACHE_HOME": cache, "VLLM_LOGGING_LEVEL": "DEBUG"}
    words = [f"model.path={model}", f"run.directory={out}", "run.name=run", "ppo.steps=1", "wandb.mode=offline"]
    umask = os.umask(0)
    try:
        with watched_doors(out) as doors:
            environment = SECRETS | settings | doors.environment
            command = ["scripts/ppo.py", "configs/smoke.yaml", *words]
            done = launch(command, nproc=nproc, timeout_s=240, env=environment)
    finally:
        os.umask(umask)
    return Run(done, out / "run", home, doors)


@pytest.fixture(scope="module")
def finished(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks, from end to end."""
    run = ppo(tmp_path_factory.mktemp("finished"), tiny_model_path, nproc=2)
    assert run.done.returncode == 0, run.done.stderr[-4000:]
    return run


@pytest.fixture(scope="module")
def trapped_model(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose only weights are a pickle that runs code, and the folder that appears if it does."""
    folder = tmp_path_factory.mktemp("trapped")
    model, sprung = folder / "model", folder / "sprung"
    shutil.copytree(tiny_model_path, model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model.embed_tokens.weight": Trap(sprung)}, model / "pytorch_model.bin")
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert sprung.is_dir(), "the trap does not work"
    sprung.rmdir()
    return model, sprung


@pytest.fixture(scope="module")
def failed(trapped_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One plain process, whose engine finds no weights that it would load."""
    run = ppo(tmp_path_factory.mktemp("failed"), trapped_model[0], nproc=None)
    assert run.done.returncode == 1
    return run


def test_ranks_listen_on_the_given_interface_alone_and_for_gloo_alone(finished: Run) -> None:
    assert finished.doors.listening.keys() == {"torchrun", "rank"}, "and nothing else: not wandb's service either"
    assert finished.doors.ports["torchrun"] == 2, "its rendezvous, and the ranks' store"
    assert finished.doors.listening["rank"] == {"127.0.0.1"}, f"not {HOST_ADDRESS}, which the host's name leads to"


def test_a_plain_process_cannot_be_reached_from_the_network(failed: Run) -> None:
    assert failed.doors.listening == {"rank": {"127.0.0.1"}}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, small_vocabulary_model_path: Path, code_trap: tuple) -> dict:
    """What closed_doors_worker.py found."""
    out = tmp_path_factory.mktemp("worker") / "found.json"
    done = launch([WORKER, small_vocabulary_model_path, code_trap[0], out], nproc=None, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def test_every_socket_of_an_engine_is_a_process_groups(worker: dict) -> None:
    assert worker["listening"] == ["127.0.0.1"] * worker["gloo_groups"]
    assert worker["interface_in_environment"] is None, "put back"
    assert worker["interface_of_the_user"] == "not-there", "which gloo was asked for, in vain"


def test_weights_that_run_code_are_refused_by_the_engine(failed: Run, trapped_model: tuple[Path, Path]) -> None:
    failure = json.loads((failed.folder / "failure.json").read_text())
    assert "Weights only load failed" in failure["error"]
    assert "vllm/model_executor/model_loader" in failure["traceback"]
    assert not trapped_model[1].exists()


@pytest.mark.parametrize("load", [load_policy, load_reference])
def test_weights_that_run_code_are_refused_by_the_policy(load, trapped_model: tuple[Path, Path]) -> None:
    model, sprung = trapped_model
    with pytest.raises(Exception, match="Weights only load failed"):
        load(str(model), "float32")
    assert not sprung.exists()


@pytest.fixture(scope="module")
def code_trap(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that brings its own code, and the folder that appears if that is imported."""
    folder = tmp_path_factory.mktemp("code")
    model, sprung = folder / "model", folder / "sprung"
    shutil.copytree(tiny_model_path, model)
    (model / "trap.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    config = json.loads((model / "config.json").read_text())
    autos = {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.TrapForCausalLM"}
    config |= {"model_type": "trap", "architectures": ["TrapForCausalLM"], "auto_map": autos}
    (model / "config.json").write_text(json.dumps(config))
    return model, sprung


@pytest.mark.parametrize("load", [load_policy, load_reference])
def test_a_models_own_code_is_not_run_by_the_policy(
    load, code_trap: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, sprung = code_trap
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))  # somebody who says yes to whatever is asked
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(model), "float32")
    assert not sprung.exists()


def test_a_models_own_code_is_not_run_by_the_engine(worker: dict, code_trap: tuple[Path, Path]) -> None:
    assert "trust_remote_code" in worker["refused"] or "trust-remote-code" in worker["refused"]
    assert not code_trap[1].exists()


@pytest.mark.parametrize("value", ['!!python/object/apply:os.mkdir ["{}"]', '!!python/object/new:os.mkdir ["{}"]'])
@pytest.mark.parametrize("key", ["run.name", "ppo.steps", "sampling.stop_token_ids"])
def test_yaml_runs_nothing(key: str, value: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    value = value.format(sprung)
    section, name = key.split(".")
    file = tmp_path / "config.yaml"
    file.write_text(f"{section}:\n  {name}: {value}\n")
    for argument in (str(file), f"{key}={value}"):
        with pytest.raises(ConfigError):
            parse(PPOConfig, [argument])
    assert not sprung.exists()


@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_no_secret_is_printed_or_written(outcome: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(outcome)
    texts = {"stdout": run.done.stdout.encode(), "stderr": run.done.stderr.encode()}
    for folder in (run.folder, run.home):
        texts |= {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    if outcome == "finished":
        (record,) = (content for name, content in texts.items() if name.endswith(".wandb"))
        assert b"reward/mean" in record, "wandb's record is not compressed"
        assert "DEBUG" in run.done.stderr, "vLLM's messages are there"
    else:
        assert str(run.folder / "failure.json") in texts
    found = [(name, secret) for secret, value in SECRETS.items() for name in texts if value.encode() in texts[name]]
    assert found == []


@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_the_run_folder_is_its_owners_alone_whatever_the_umask(outcome: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(outcome)
    assert stat.S_IMODE(run.folder.stat().st_mode) == 0o700
    assert run.home.parent == run.folder.parent, "and nothing of the run lies beside it"
    assert {path.name for path in run.folder.parent.iterdir()} == {"home", "hostname.so", "run"}
