"""The executor class handed to vLLM's own LLM, in a plain process and under torchrun."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("drop_in_worker.py")


def results(model: Path, nproc: int | None, further: str = "{}") -> list[dict]:
    done = launch([WORKER, model, further], nproc=nproc, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return [json.loads(line.split("RESULT ")[1]) for line in done.stdout.splitlines() if "RESULT " in line]


def test_in_a_plain_process_and_under_torchrun(small_vocabulary_model_path: Path) -> None:
    (single,) = results(small_vocabulary_model_path, nproc=None)
    ranks = results(small_vocabulary_model_path, nproc=2)
    assert len(ranks) == 2
    for result in (single, *ranks):
        assert (result["scheduler"], result["queue"]) == ("AsyncScheduler", 2)
        assert result["executor"] == "TorchrunExecutor"
        assert result["distinct"] == 8  # requests without a seed get one each
        assert result["named_on"] == ["MainThread"]  # whose CUDA device is this rank's
    assert ranks[0]["tokens"] == ranks[1]["tokens"]
    # Two ranks add up in another order than one, so a token in a thousand may differ; the first ones do not.
    assert [tokens[0] for tokens in single["tokens"]] == [tokens[0] for tokens in ranks[0]["tokens"]]


def test_replicas_draw_from_streams_of_their_own(small_vocabulary_model_path: Path) -> None:
    first, second = results(small_vocabulary_model_path, nproc=2, further='{"tensor_parallel_size": 1}')
    assert first["distinct"] == second["distinct"] == 8
    assert first["tokens"] != second["tokens"], "the same prompts, and other random numbers"


@pytest.mark.slow
def test_two_jobs_side_by_side(small_vocabulary_model_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda _: results(small_vocabulary_model_path, nproc=2), range(2)))
    assert len({json.dumps(rank["tokens"]) for ranks in jobs for rank in ranks}) == 1
    assert not list(Path("/dev/shm").glob("*rollout-*"))


@pytest.mark.slow
def test_multiprocessing_is_refused(small_vocabulary_model_path: Path) -> None:
    done = launch([WORKER, small_vocabulary_model_path], nproc=None, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert done.returncode != 0
    assert "set it to 0" in done.stdout + done.stderr


@pytest.mark.parametrize("given", [pytest.param("RANK", marks=pytest.mark.slow), "WORLD_SIZE"])
def test_half_of_torchruns_variables_is_refused(small_vocabulary_model_path: Path, given: str) -> None:
    done = launch([WORKER, small_vocabulary_model_path], nproc=None, env={given: "1"})
    assert done.returncode != 0
    assert f"the environment has {given} but not" in done.stderr


TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ({"kv_transfer_config": TRANSFER}, "kv_transfer_config cannot be used in the ranks of a torchrun job"),
        pytest.param(
            {"scheduling_policy": "priority"},
            "scheduling_policy='priority' cannot be used in the ranks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_each_rank_would_decide_alone_is_refused(
    small_vocabulary_model_path: Path, further: dict, words: str
) -> None:
    done = launch([WORKER, small_vocabulary_model_path, json.dumps(further)], nproc=None)
    assert done.returncode != 0
    assert words in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"kv_transfer_config": "a transfer"}, "kv_transfer_config"),
        ({"ec_transfer_config": "a transfer"}, "ec_transfer_config"),
        ({"policy": "priority"}, "scheduling_policy='priority'"),
        ({"data_parallel_size": 2}, "data_parallel_size=2"),
        ({"pipeline_parallel_size": 3}, "pipeline_parallel_size=3"),
        ({}, None),
    ],
)
def test_each_refusal_names_its_setting(setting: dict, words: str | None) -> None:
    from rollout.backend.refusals import refuse_what_ranks_decide_alone

    usual = {"kv_transfer_config": None, "ec_transfer_config": None, "policy": "fcfs"}
    values = SimpleNamespace(**{**usual, "data_parallel_size": 1, "pipeline_parallel_size": 1, **setting})
    values.parallel_config = values.scheduler_config = values  # as far as the refusals read a VllmConfig
    with pytest.raises(ValueError, match=f"^{words} cannot be used") if words else nullcontext():
        refuse_what_ranks_decide_alone(values)


def test_ranks_with_other_settings_are_refused(small_vocabulary_model_path: Path) -> None:
    done = launch([WORKER, small_vocabulary_model_path, '{"seed": "RANK"}'], nproc=2)
    assert done.returncode != 0 and done.left_running == []
    assert done.stderr.count("ValueError: seed is 1 on rank 1 and 0 on rank 0") == 2, done.stderr[-2000:]
