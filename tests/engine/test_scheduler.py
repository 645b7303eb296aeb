"""The fast scheduler against vLLM's own: the same steps, tokens, ends, blocks and requests, in less time."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.scheduler_pair import (
    VOCABULARY,
    FakeRunner,
    Setup,
    Side,
    Spec,
    allocator_of,
    base_config,
    fields_of,
    is_decode_step,
    make_request,
    make_scheduler,
    queues_of,
    requests_of,
    token_at,
)

NUM_EXAMPLES = 400  # about 20 s
MAX_STEPS = 400


@pytest.fixture(scope="module")
def config(small_vocabulary_model_path: Path) -> Any:
    return base_config(small_vocabulary_model_path)


@dataclass
class Tally:
    """What the random workloads really did."""

    decode_steps: int = 0
    steady_schedules: int = 0
    steady_updates: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    def see(self, what: str, times: int = 1) -> None:
        self.seen[what] = self.seen.get(what, 0) + times


class Pair:
    """vLLM's scheduler and ours on the same requests; every method compares what the two did."""

    def __init__(self, config: Any, setup: Setup, arrays: bool = True, grouped: bool = False) -> None:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        from rollout.backend.groups import GroupAdmission
        from rollout.backend.scheduler import SteadyAsyncScheduler, SteadyScheduler

        self.setup = setup
        self.families: dict[str, int] = {}
        stock, ours = (AsyncScheduler, SteadyAsyncScheduler) if setup.asynchronous else (Scheduler, SteadyScheduler)
        self.stock = Side(make_scheduler(stock, config, setup), FakeRunner(self.families, arrays=False))
        self.ours = Side(make_scheduler(ours, config, setup), FakeRunner(self.families, arrays))
        self.sides = (self.stock, self.ours)
        # As the engine has them: a prompt's samples wait for the first of them and share its blocks.
        self.groups = [GroupAdmission(side.scheduler) for side in self.sides] if grouped else []

    def add(self, *specs: Spec) -> None:
        self.families.update((spec.request_id, spec.family) for spec in specs)
        for side in self.sides if not self.groups else ():
            for spec in specs:
                side.scheduler.add_request(make_request(spec, self.setup))
        for group in self.groups:
            group.admit([make_request(spec, self.setup) for spec in specs], [len(specs)])

    def schedule(self, shuffle_seed: int | None = None, throttle_prefills: bool = False) -> Any:
        expected, actual = (side.schedule(shuffle_seed, throttle_prefills) for side in self.sides)
        assert fields_of(actual) == fields_of(expected)
        self.compare()
        for group in self.groups:
            group.after_schedule()
        return expected

    def take(self, through_vllm: bool = False) -> tuple[list[tuple[str, int, float]], list[tuple[str, int]]]:
        expected, actual = (side.take(through_vllm) for side in self.sides)
        assert repr(actual) == repr(expected)  # as text, since NaN is not equal to itself
        self.compare()
        return expected

    def abort(self, request_ids: list[str]) -> None:
        from vllm.v1.request import RequestStatus

        for side in self.sides:
            side.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)
        self.compare()

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        expected, actual = (side.scheduler.reset_prefix_cache(reset_running_requests) for side in self.sides)
        assert actual == expected
        self.compare()

    def pause(self, name: str) -> None:
        from vllm.v1.core.sched.interface import PauseState

        for side in self.sides:
            side.scheduler.set_pause_state(PauseState[name])

    def compare(self) -> None:
        stock, ours = (side.scheduler for side in self.sides)
        assert queues_of(ours) == queues_of(stock)
        assert allocator_of(ours) == allocator_of(stock)

    def compare_requests(self) -> None:
        self.ours.scheduler.settle()
        assert requests_of(self.ours.scheduler) == requests_of(self.stock.scheduler)


SETUPS = st.builds(
    Setup,
    asynchronous=st.booleans(),
    v2_runner=st.booleans(),
    block_size=st.sampled_from([1, 2, 3, 4, 8, 16]),
    num_blocks=st.sampled_from([12, 20, 40, 200]),
    prefix_caching=st.booleans(),
    max_num_seqs=st.sampled_from([1, 3, 6, 12]),
    max_num_batched_tokens=st.sampled_from([4, 12, 16, 64]),
    max_model_len=st.sampled_from([24, 40, 64]),
).filter(lambda setup: setup.num_blocks > setup.max_model_len // setup.block_size + 1)


# Few blocks for many places: requests wait for blocks all the time, most of them samples of a few prompts.
CROWDED = st.builds(
    Setup,
    asynchronous=st.booleans(),
    v2_runner=st.booleans(),
    block_size=st.sampled_from([1, 2, 4, 8, 16]),
    num_blocks=st.sampled_from([8, 14, 20, 30, 50, 90]),
    prefix_caching=st.sampled_from([True, True, False]),
    max_num_seqs=st.sampled_from([8, 16, 32]),
    max_num_batched_tokens=st.sampled_from([32, 64, 200]),
    max_model_len=st.sampled_from([24, 40, 64]),
    watermark=st.sampled_from([0.0, 0.0, 0.05, 0.2]),
    whole_prompt_must_fit=st.sampled_from([True, True, True, False]),
).filter(lambda setup: setup.num_blocks > setup.max_model_len // setup.block_size + 1)


def prompt_of(family: int, length: int) -> tuple[int, ...]:
    return tuple(token_at(family, position) for position in range(length))


def group_of(random: Random, number: int, setup: Setup) -> list[Spec]:
    """Samples of one prompt: with one family all the same, or each with a response of its own."""
    size = random.choice([2, 4, 8])
    prompt = prompt_of(family := random.randrange(4), min(random.choice([3, 8, 9, 20]), setup.max_model_len - 2))
    families = [family if random.random() < 0.3 else 100 * number + sample for sample in range(size)]
    long = (setup.max_model_len - len(prompt), 20, 9)
    return [
        Spec(f"{number}.{sample}", prompt, each, max_tokens=random.choice(long), eos=random.random() < 0.2)
        for sample, each in enumerate(families)
    ]


def random_spec(random: Random, number: int, setup: Setup) -> Spec:
    family = random.randrange(4)
    length = min(random.choice([1, 2, 3, 5, 8, 13, 20]), setup.max_model_len - 2)
    return Spec(
        request_id=str(number),
        prompt=prompt_of(family, length),
        family=family,
        max_tokens=random.choice([1, 2, 7, 30, 60]),
        stop_token_ids=tuple(random.sample(range(VOCABULARY), random.choice([0, 0, 1, 2]))),
        eos=random.random() < 0.5,
        min_tokens=random.choice([0, 0, 1]),
        logprobs=random.random() < 0.8,
        repetition_detection=random.random() < 0.05,
    )


def run_workload(pair: Pair, random: Random, tally: Tally, waiting: list[list[Spec]]) -> None:
    """Random arrivals, aborts, resets, pauses and looks; mostly the driver's queue of two, or one step at a time.

    Args:
        waiting: the samples of each prompt.
    """
    setup = pair.setup
    at_once = random.random() < 0.5
    depth = random.choice([1, 2, 2, 2]) if setup.asynchronous else 1
    pause = None
    scheduler = pair.stock.scheduler
    for _ in range(MAX_STEPS):
        while waiting and (at_once or random.random() < 0.3):
            pair.add(*waiting.pop())
        pause = disturb(pair, random, tally, pause)
        if not (waiting or pair.stock.in_flight or scheduler.has_requests()):
            break
        if scheduler.has_requests():
            seed = random.randrange(1000) if random.random() < 0.2 else None
            step_of(pair, tally, seed, throttle_prefills=random.random() < 0.03)
            if len(pair.stock.in_flight) < depth:
                continue
        pause = disturb(pair, random, tally, pause)  # with every step of the queue in flight
        num_taken = depth if random.random() < 0.05 else 1
        for _ in range(min(num_taken, len(pair.stock.in_flight))):
            _, finished = pair.take(through_vllm=random.random() < 0.03)
            tally.see("ends", len(finished))
    pair.compare_requests()
    tally.steady_schedules += pair.ours.scheduler.num_steady_schedules
    tally.steady_updates += pair.ours.scheduler.num_steady_updates


def step_of(pair: Pair, tally: Tally, shuffle_seed: int | None, throttle_prefills: bool) -> None:
    before = pair.ours.scheduler.num_steady_schedules
    scheduled = pair.schedule(shuffle_seed, throttle_prefills)
    tally.decode_steps += is_decode_step(scheduled)
    if is_decode_step(scheduled) and waits_for_blocks(pair.stock.scheduler):
        tally.see("decode steps with a request that waits for blocks")
        tally.see("steady ones of them", pair.ours.scheduler.num_steady_schedules - before)
    tally.see("preemptions", len(scheduled.preempted_req_ids or ()))
    tally.see("new blocks", sum(ids is not None for ids in scheduled.scheduled_cached_reqs.new_block_ids))


def waits_for_blocks(scheduler: Any) -> bool:
    """True if a request waits while a place is free."""
    return bool(scheduler.waiting) and len(scheduler.running) < scheduler.max_num_running_reqs


def disturb(pair: Pair, random: Random, tally: Tally, pause: str | None) -> str | None:
    """Now and then, what a caller may do between two steps; returns the pause that is on."""
    if random.random() < 0.02 and pair.stock.scheduler.requests:
        pair.abort(random.sample(list(pair.stock.scheduler.requests), 1))
        tally.see("aborts")
    if random.random() < 0.01:
        # Blocks that are held for a prompt's samples forbid the other kind of reset.
        pair.reset_prefix_cache(reset_running_requests=not pair.groups and random.random() < 0.5)
    if random.random() < 0.05:
        pair.compare_requests()
    if pause is not None and random.random() < 0.5:
        pair.pause("UNPAUSED")
        return None
    if pause is None and random.random() < 0.01:
        pair.pause(name := random.choice(["PAUSED_NEW", "PAUSED_ALL"]))
        return name
    return pause


def test_every_step_is_what_vllm_would_have_done(config: Any) -> None:
    tally = Tally()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(setup=SETUPS, arrays=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def workloads(setup: Setup, arrays: bool, seed: int) -> None:
        random = Random(seed)
        specs = [[random_spec(random, number, setup)] for number in range(random.choice([1, 4, 10, 20]))]
        run_workload(Pair(config, setup, arrays), random, tally, specs)

    workloads()
    # Or the test would pass with a fast path that is never taken, on workloads where nothing happens.
    assert tally.steady_schedules > 0.7 * tally.decode_steps
    assert tally.steady_updates > 0.6 * tally.decode_steps
    assert tally.decode_steps > 10 * NUM_EXAMPLES
    assert min(tally.seen[what] for what in ("ends", "aborts", "preemptions", "new blocks")) > NUM_EXAMPLES // 3


def test_requests_that_wait_for_blocks_are_admitted_when_vllm_would_admit_them(config: Any) -> None:
    tally = Tally()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(setup=CROWDED, grouped=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def workloads(setup: Setup, grouped: bool, seed: int) -> None:
        random = Random(seed)
        prompts = [group_of(random, number, setup) for number in range(random.choice([3, 6, 10]))]
        run_workload(Pair(config, setup, grouped=grouped), random, tally, prompts)

    workloads()
    crowded = tally.seen["decode steps with a request that waits for blocks"]
    assert crowded > 10 * NUM_EXAMPLES
    assert tally.seen["steady ones of them"] > 0.5 * crowded
    assert min(tally.seen[what] for what in ("ends", "aborts", "preemptions", "new blocks")) > NUM_EXAMPLES // 3


def test_a_block_that_becomes_full_may_be_one_that_a_waiting_request_needs(config: Any) -> None:
    # Three blocks of four tokens. The running request goes through the same tokens as the prompt that waits for two of
    # them, with one free; when its second one is full, one is enough.
    pair = Pair(config, Setup(asynchronous=False, block_size=4, num_blocks=4))
    pair.add(Spec("running", prompt_of(1, 5), family=1, max_tokens=7, eos=False))
    pair.schedule()
    pair.take()
    pair.add(Spec("waiting", prompt_of(1, 9), family=1, max_tokens=2, eos=False))
    for num_tokens in (6, 7, 8):
        admitted = pair.schedule().scheduled_new_reqs
        assert [each.req_id for each in admitted] == (["waiting"] if num_tokens == 8 else [])
        pair.take()
    assert pair.ours.scheduler.num_steady_schedules == 2


def test_a_request_whose_old_tokens_are_still_to_come_lets_the_next_one_pass(config: Any) -> None:
    # Two requests fill the cache of six blocks. When the first needs a fourth one, the second is preempted, with two
    # steps in flight; for the two blocks that are free then it is too long, and the one behind it is not.
    pair = Pair(config, Setup(block_size=4, num_blocks=7))
    for number in (1, 2):
        pair.add(Spec(str(number), prompt_of(number, 3), family=number, max_tokens=40, eos=False))
    for _ in range(2):
        pair.schedule()
    while pair.stock.scheduler.kv_cache_manager.block_pool.get_num_free_blocks():
        pair.schedule()
        pair.take()
    pair.add(Spec("3", prompt_of(3, 2), family=3, max_tokens=5, eos=False))
    while not pair.schedule().preempted_req_ids:
        pair.take()
    pair.take()
    assert pair.stock.scheduler.requests["2"].num_stale_output_tokens == 1
    assert [each.req_id for each in pair.schedule().scheduled_new_reqs] == ["3"]


def decoding_pair(config: Any, setup: Setup, max_tokens: int = 1000, num_requests: int | None = None) -> Pair:
    """`max_num_seqs` equal requests that stop at nothing, their prompts done; asynchronous: one step in flight."""
    pair = Pair(config, setup)
    prompt = tuple(range(3))
    for number in range(num_requests or setup.max_num_seqs):
        pair.add(Spec(str(number), prompt, family=number, max_tokens=max_tokens, eos=False))
    pair.schedule()
    if setup.asynchronous:
        pair.schedule()
    pair.take()
    return pair


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tokens_outgrow_the_buffer_between_two_blocks(config: Any, asynchronous: bool) -> None:
    # Rows settle when they cross a block, here after 512 tokens, or when the buffer is full, after 256.
    setup = Setup(asynchronous, block_size=512, num_blocks=12, max_num_seqs=3, max_model_len=1000)
    pair = decoding_pair(config, setup)
    for _ in range(600):
        pair.schedule()
        pair.take()
    pair.compare_requests()
    assert pair.ours.scheduler.num_steady_updates >= 599


def test_the_list_of_ids_is_the_same_object_while_the_sequences_are_the_same(config: Any) -> None:
    pair = decoding_pair(config, Setup(max_num_seqs=3))
    updates = []
    for seed in (None, None, 1, None, 2, None, None, None):  # new orders of the runner's rows: no other sequences
        for side in pair.sides:
            side.schedule(seed)
        updates.append(pair.ours.scheduler.take_output(*pair.ours.in_flight.popleft()))
        pair.stock.take()
    # The first of them was scheduled by vLLM, beside the prompts' output.
    assert all(update.request_ids is updates[1].request_ids for update in updates[1:])
    assert updates[1].request_ids == ["0", "1", "2"]
    pair.abort(["1"])
    for _ in range(3):
        before = updates[-1].request_ids
        for side in pair.sides:
            side.schedule(None)
        updates.append(pair.ours.scheduler.take_output(*pair.ours.in_flight.popleft()))
        pair.stock.take()
    assert before == updates[-1].request_ids == ["0", "2"]
    assert updates[7].request_ids == ["0", "1", "2"], "what was handed out does not change"


def test_an_end_without_a_token_is_passed_on(config: Any) -> None:
    from vllm.v1.engine import FinishReason

    pair = decoding_pair(config, Setup(max_num_seqs=3))
    pair.schedule()
    pair.ours.scheduler.grammar_compile_error_reqs.add("1")  # the simplest of the errors that vLLM ends a request with
    update = pair.ours.scheduler.take_output(*pair.ours.in_flight.popleft())
    assert update.finished == [(3, int(FinishReason.ERROR))]
    assert update.request_ids == ["0", "1", "2", "1"]
    assert update.token_ids[3] == -1 and math.isnan(update.logprobs[3])


def test_a_row_without_a_token_goes_to_vllm(config: Any) -> None:
    from rollout.backend.outputs import SampledTokens

    pair = decoding_pair(config, Setup(max_num_seqs=3))
    pair.schedule()
    for side in pair.sides:
        _, output = side.in_flight[0]
        valid = np.array([True, False, True])
        tokens = np.array([each[0] for each in output.sampled_token_ids], np.int32)
        arrays = side is pair.ours
        output.sampled_token_ids = SampledTokens(tokens, valid) if arrays else [[int(tokens[0])], [], [int(tokens[2])]]
    taken, _ = pair.take()
    assert [request_id for request_id, _, _ in taken] == ["0", "2"]
    pair.compare_requests()


@pytest.mark.parametrize("v2_runner", [False, True])
def test_tokens_of_before_a_reset_are_not_taken_for_new_ones(config: Any, v2_runner: bool) -> None:
    # Two steps are in flight when all requests are preempted and start anew; their tokens are void, and the second of
    # them still comes when the requests are decoding again.
    pair = decoding_pair(config, Setup(max_num_seqs=3, v2_runner=v2_runner))
    pair.schedule()
    pair.take()
    pair.schedule()
    pair.reset_prefix_cache(reset_running_requests=True)
    for _ in range(2):
        pair.schedule()
        assert pair.take() == ([], [])
    for _ in range(5):
        pair.take()
        pair.schedule()
        pair.compare_requests()


def test_what_a_random_workload_seldom_does(config: Any) -> None:
    # One step at a time, and scheduled again before its tokens are there.
    pair = decoding_pair(config, Setup(asynchronous=False, max_num_seqs=3))
    for count in (3, 0):
        assert pair.schedule().total_num_scheduled_tokens == count
    for _ in range(2):
        pair.take()
    # A pause while all decode.
    pair = decoding_pair(config, Setup(max_num_seqs=3))
    for pause, count in (("PAUSED_ALL", 0), ("PAUSED_NEW", 3), ("UNPAUSED", 3)):
        pair.pause(pause)
        assert pair.schedule().total_num_scheduled_tokens == count
        pair.take()
    # A request waits behind a full batch when prompts are to be throttled.
    pair.add(Spec("9", (1, 2, 3), family=1, max_tokens=5))
    pair.schedule(throttle_prefills=True)
    pair.take()
    # The budget shrinks below the batch.
    for side in pair.sides:
        side.scheduler.max_num_scheduled_tokens = 2
    assert pair.schedule().total_num_scheduled_tokens == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connector", object()),
        ("ec_connector", object()),
        ("aux_output_connector", object()),
        ("lora_config", object()),
        ("kv_metrics_collector", object()),
        ("finished_req_ids_dict", {}),
        ("num_spec_tokens", 1),
        ("num_lookahead_tokens", 1),
        ("num_sampled_tokens_per_step", 0),
        ("dcp_world_size", 2),
        ("decode_stagger", 2),
        ("use_pp", True),
        ("is_encoder_decoder", True),
        ("is_mm_encoder_only", True),
        ("enable_kv_cache_events", True),
        ("return_sampling_mask", True),
        ("log_stats", True),
    ],
)
def test_other_engines_are_left_to_vllm(config: Any, name: str, value: Any) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from rollout.backend.scheduler import _can_be_steady

    scheduler = make_scheduler(AsyncScheduler, config, Setup())
    assert _can_be_steady(scheduler)
    assert hasattr(scheduler, name)
    setattr(scheduler, name, value)
    assert not _can_be_steady(scheduler)


def test_an_engine_with_statistics_goes_through_vllm_and_still_works(config: Any) -> None:
    pair = decoding_pair(config, Setup(max_num_seqs=3, log_stats=True), max_tokens=9)
    while pair.stock.in_flight:
        if pair.stock.scheduler.has_requests():
            for side in pair.sides:
                side.schedule(None)
        pair.take()
    assert not pair.ours.scheduler.has_requests()
    assert pair.ours.scheduler.num_steady_schedules == pair.ours.scheduler.num_steady_updates == 0


@pytest.mark.parametrize("num_waiting", [0, 200])
def test_a_steady_step_takes_a_fraction_of_vllms_time(config: Any, num_waiting: int) -> None:
    # 512 sequences, 128 tokens a block: vLLM about 8 ms a step on a 2-core machine, ours 0.3 ms. Interleaved, medians.
    # One block is left, and each of those that wait needs two.
    setup = Setup(block_size=128, num_blocks=514, max_num_seqs=800, max_num_batched_tokens=4096, max_model_len=400)
    pair = decoding_pair(config, setup, num_requests=512)
    for number in range(num_waiting):
        pair.add(Spec(f"waiting {number}", prompt_of(number, 200), family=number, max_tokens=100))
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(40):
        for name, side in (("stock", pair.stock), ("ours", pair.ours)):
            start = perf_counter()
            scheduled = side.scheduler.schedule()
            between = perf_counter()
            side.in_flight.append((scheduled, side.runner.run(scheduled, None)))
            scheduled, output = side.in_flight.popleft()
            resumed = perf_counter()
            if side is pair.ours:
                side.scheduler.take_output(scheduled, output)
            else:
                side.scheduler.update_from_output(scheduled, output)
            seconds[name].append(perf_counter() - resumed + between - start)
    pair.compare()
    assert np.median(seconds["ours"]) < np.median(seconds["stock"]) / 3, {k: np.median(v) for k, v in seconds.items()}
    assert pair.ours.scheduler.num_steady_schedules >= 40
    assert len(pair.ours.scheduler.waiting) == num_waiting
