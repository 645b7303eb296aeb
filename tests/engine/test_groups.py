"""One prefill a group, without a model: what is computed, what is shared, and that every block comes back."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.scheduler_pair import (
    FakeRunner,
    Setup,
    Side,
    Spec,
    allocator_of,
    base_config,
    make_request,
    make_scheduler,
    token_at,
)

STEPS = 200  # more than any of these workloads takes


@pytest.fixture(scope="module")
def config(tiny_model_path: Path) -> Any:
    return base_config(tiny_model_path)


class Job:
    """A scheduler of ours with group admission, driven as `rollout.driver.drive` drives it."""

    def __init__(self, config: Any, setup: Setup) -> None:
        from rollout.backend.groups import GroupAdmission
        from rollout.backend.scheduler import SteadyAsyncScheduler, SteadyScheduler

        cls = SteadyAsyncScheduler if setup.asynchronous else SteadyScheduler
        self.setup = setup
        self.side = Side(make_scheduler(cls, config, setup), FakeRunner({}, arrays=True))
        self.groups = GroupAdmission(self.side.scheduler)
        self.prompt_tokens_computed = 0

    def run(self, groups: list[list[Spec]]) -> dict[str, list[int]]:
        """Run groups of equal size to their ends; the tokens of every request."""
        specs = [spec for group in groups for spec in group]
        self.side.runner.families.update((spec.request_id, spec.family) for spec in specs)
        tokens: dict[str, list[int]] = {spec.request_id: [] for spec in specs}
        ended: set[str] = set()
        prompts = {spec.request_id: len(spec.prompt) for spec in specs}
        self.groups.admit([make_request(spec, self.setup) for spec in specs], [len(group) for group in groups])
        depth = 2 if self.setup.asynchronous else 1
        for _ in range(STEPS):
            scheduler = self.side.scheduler
            if scheduler.has_requests():
                scheduled = self.side.schedule(shuffle_seed=None)
                self.groups.after_schedule()
                self.prompt_tokens_computed += prompt_tokens_of(scheduled, prompts)
                if len(self.side.in_flight) < depth:
                    continue
            if not self.side.in_flight:
                break
            brought, finished = self.side.take()
            for request_id, token, _ in brought:
                tokens[request_id].append(token)
            ended |= {request_id for request_id, _ in finished}
        assert ended == set(tokens), f"not ended after {STEPS} steps: {sorted(set(tokens) - ended)}"
        return tokens


def prompt_tokens_of(scheduled: Any, prompts: dict[str, int]) -> int:
    """How many of the step's tokens are of prompts."""
    cached = scheduled.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    return sum(
        max(0, min(prompts[each], computed[each] + count) - computed[each])
        for each, count in scheduled.num_scheduled_tokens.items()
    )


def group(number: int, n: int, prompt_tokens: int, max_tokens: int, of_leader: int | None = None) -> list[Spec]:
    """n samples of one prompt; the leader, the first, may have a limit of its own."""
    prompt = tuple(range(10 + number, 10 + number + prompt_tokens))
    limits = [max_tokens if of_leader is None else of_leader, *[max_tokens] * (n - 1)]
    return [
        Spec(f"{number}-{sample}", prompt, family=1 + number * n + sample, max_tokens=limit, eos=False)
        for sample, limit in enumerate(limits)
    ]


def expected(groups: list[list[Spec]]) -> dict[str, list[int]]:
    return {
        spec.request_id: [token_at(spec.family, len(spec.prompt) + i) for i in range(spec.max_tokens)]
        for group in groups
        for spec in group
    }


def assert_everything_is_free(job: Job) -> None:
    state = allocator_of(job.side.scheduler)
    assert len(state["free"]) == job.setup.num_blocks - 1  # vLLM keeps one
    assert not any(state["references"][block] for block in state["free"])
    assert not state["blocks"] and not job.groups._following and not job.groups._leading


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("of_leader", [None, 1], ids=["leader runs on", "leader ends at its first token"])
@pytest.mark.parametrize("prompt_tokens", [2, 4, 5, 8, 11])
def test_a_prompt_is_computed_once_and_every_block_comes_back(
    config: Any, prompt_tokens: int, of_leader: int | None, asynchronous: bool
) -> None:
    job = Job(config, Setup(asynchronous=asynchronous))
    groups = [group(number, 4, prompt_tokens, 9, of_leader) for number in range(3)]
    assert job.run(groups) == expected(groups)
    assert job.prompt_tokens_computed == 3 * (prompt_tokens + 3)  # each sibling computes the last one
    assert_everything_is_free(job)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_held_blocks_that_keep_everybody_out_are_let_go(config: Any, asynchronous: bool) -> None:
    # Two blocks for all: the prompt fills them, and the leader has ended. A sibling shares one of them and needs a
    # copy of the other, for which there is no room until the group lets go.
    job = Job(config, Setup(asynchronous=asynchronous, num_blocks=3))
    groups = [group(0, 3, 8, 1)]
    assert job.run(groups) == expected(groups)
    assert_everything_is_free(job)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_groups_that_do_not_fit_at_once_all_end(config: Any, asynchronous: bool) -> None:
    job = Job(config, Setup(asynchronous=asynchronous, num_blocks=12, max_num_seqs=3))
    groups = [group(number, 4, 6 + number % 5, 12) for number in range(6)]
    assert job.run(groups) == expected(groups)
    assert_everything_is_free(job)


def test_a_second_phase_finds_everything_as_the_first(config: Any) -> None:
    job = Job(config, Setup())
    for phase in range(2):
        groups = [group(10 * phase + number, 3, 7, 5) for number in range(2)]
        assert job.run(groups) == expected(groups)
        assert_everything_is_free(job)
