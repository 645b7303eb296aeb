"""Real vLLM, two ranks: the same tokens whatever the schedule, and nothing of the trainer's changed."""

import json
from pathlib import Path

import pytest
import torch

from tests.engine.generate_worker import SAMPLINGS, prompts
from tests.launch import launch

WORKER = Path(__file__).with_name("generate_worker.py")
SCENARIOS = ("asynchronous", "synchronous", "asynchronous_small_cache", "synchronous_small_cache")


@pytest.fixture(scope="module")
def ranks(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two ranks wrote: by scenario, then by phase."""
    out = tmp_path_factory.mktemp("generate")
    done = launch([WORKER, small_vocabulary_model_path, out], nproc=2, timeout_s=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def single_process(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same in one plain process, tensor-parallel size 1, over the prompts of both ranks."""
    out = tmp_path_factory.mktemp("generate-single")
    done = launch([WORKER, small_vocabulary_model_path, out], nproc=None, timeout_s=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "rank0.json").read_text())


@pytest.mark.parametrize("phase", ["sampled", "greedy", "filtered", "groups"])
def test_asynchronous_and_synchronous_give_the_same_tokens_and_logprobs(ranks: list[dict], phase: str) -> None:
    digests = {rank[scenario]["phases"][phase]["group"] for rank in ranks for scenario in SCENARIOS[:2]}
    assert len(digests) == 1


def test_preempted_sequences_get_the_same_tokens(ranks: list[dict]) -> None:
    for scenario in SCENARIOS[2:]:
        phases = [rank[scenario]["phases"]["sampled"] for rank in ranks]
        assert phases[0]["metrics"]["rollout/preemptions"] > 0
        assert {phase["tokens_of_group"] for phase in phases} == {
            ranks[0]["synchronous"]["phases"]["sampled"]["tokens_of_group"]
        }


def test_each_rank_gets_its_own_share(ranks: list[dict]) -> None:
    phases = [rank["asynchronous"]["phases"]["sampled"] for rank in ranks]
    assert [phase["rows"] for phase in phases] == [256, 256]
    assert phases[0]["share"] != phases[1]["share"]
    # Counted once a tensor-parallel group: both ranks report the group's tokens, which are those of both shares.
    counted = {phase["metrics"]["rollout/generated_tokens"] for phase in phases}
    assert counted == {phases[0]["tokens"] + phases[1]["tokens"]}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_responses_are_told_as_they_end(ranks: list[dict], scenario: str) -> None:
    for name, phase in ranks[1][scenario]["phases"].items():
        told = phase["told"]
        assert told["each_once"] and told["as_in_the_batch"]
        assert told["calls"] >= SAMPLINGS[name].max_tokens
        if name == "sampled":  # some end by themselves, before the others
            assert told["calls_with_rows"] > 1


def test_samples_of_one_prompt_differ(ranks: list[dict]) -> None:
    assert ranks[0]["asynchronous"]["phases"]["groups"]["distinct_in_first_group"] == 4


def test_a_prompt_is_prefilled_once_for_all_its_samples(ranks: list[dict]) -> None:
    """Of 2 to 40 tokens, each shorter than a block of 128."""
    n, max_tokens = SAMPLINGS["groups"].n, SAMPLINGS["groups"].max_tokens
    everyones = [prompt for rank in range(2) for prompt in prompts(rank, 256 // n, n)]
    prefill = sum(len(prompt) + n - 1 for prompt in everyones)  # the others compute the last token alone
    decode = len(everyones) * n * (max_tokens - 1)
    for rank in ranks:
        for scenario in SCENARIOS[:2]:
            assert rank[scenario]["phases"]["groups"]["computed_tokens"] == prefill + decode


def test_scheduling_is_really_asynchronous(ranks: list[dict]) -> None:
    asynchronous, synchronous = ranks[0]["asynchronous"], ranks[0]["synchronous"]
    assert (asynchronous["describe"]["scheduler"], asynchronous["describe"]["queue_depth"]) == (
        "SteadyAsyncScheduler",
        2,
    )
    assert (synchronous["describe"]["scheduler"], synchronous["describe"]["queue_depth"]) == ("SteadyScheduler", 1)
    # The main thread's work falls into another step's run: nearly all of it, and in the synchronous run none.
    assert asynchronous["phases"]["sampled"]["overlap"] > 0.7
    assert synchronous["phases"]["sampled"]["overlap"] == 0.0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_trainers_state_is_the_trainers(ranks: list[dict], scenario: str) -> None:
    for rank in ranks:
        assert rank[scenario]["changed"] == []


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_closing_leaves_nothing(ranks: list[dict], scenario: str) -> None:
    for rank in ranks:
        assert rank[scenario]["threads_left"] == []
        assert rank[scenario]["shared_memory_left"] == []


def test_one_process_without_torchrun(single_process: dict) -> None:
    for phase in ("sampled", "greedy", "filtered", "groups"):
        digests = {single_process[scenario]["phases"][phase]["group"] for scenario in SCENARIOS[:2]}
        assert len(digests) == 1
    assert single_process["asynchronous"]["changed"] == []


def test_the_kernels_of_this_machine_run(ranks: list[dict]) -> None:
    # On processors with AMX vLLM lays its cache out for that, and its own attention stays.
    of_machine = {"attention": not torch.cpu._is_amx_tile_supported(), "head": torch.cpu._is_avx512_bf16_supported()}
    expected = ", ".join(name for name, runs in of_machine.items() if runs) or "none"
    assert {rank["asynchronous"]["describe"]["kernels"] for rank in ranks} == {expected}


@pytest.mark.slow
def test_rollouts_go_on_where_the_kernels_cannot_be_compiled(
    small_vocabulary_model_path: Path, single_process: dict, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"  # for torch.compile as ever
    compiler.write_text('#!/bin/sh\ncase "$*" in *rollout/backend/kernels*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o700)
    environment = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [WORKER, small_vocabulary_model_path, tmp_path, "asynchronous"]
    done = launch(words, nproc=None, timeout_s=200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "attention.cpp could not be compiled" in done.stderr and "head.cpp could not" in done.stderr
    found, other = json.loads((tmp_path / "rank0.json").read_text())["asynchronous"], single_process["asynchronous"]
    assert found["describe"]["kernels"] == "none"
    for phase, expected in other["phases"].items():
        assert found["phases"][phase]["rows"] == expected["rows"]
