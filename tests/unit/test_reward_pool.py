"""Workers: in time, in order, replaced when they hang or die, gone when their rank is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch  # noqa: F401 (a forked worker would have it, too)

from trainers.reward_functions import Failed, Sample, Task
from trainers.reward_pool import RewardPool

REPOSITORY = Path(__file__).parents[2]
FUNCTIONS = """
import os, re, sys, time

def act(response, answer, sample):
    what, _, value = response.partition(" ")
    if what == "sleep":
        time.sleep(float(value))
    if what == "die":
        os._exit(3)
    if what == "pid":
        return os.getpid()
    if what == "stuck":  # in C code that never gives the interpreter back
        re.match(r"(a+)+$", "a" * 40 + "b")
    if what == "modules":
        return float(any(name in sys.modules for name in ("torch", "vllm", "transformers")))
    return len(response)
"""


@pytest.fixture
def act(tmp_path) -> str:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return f"{tmp_path}/functions.py:act"


def task(text: str) -> Task:
    return Task(text, "", Sample("", True, 1))


def judge(pool: RewardPool, *texts: str) -> list:
    return pool.judge([task(text) for text in texts])


@pytest.fixture
def pool(act):
    pool = RewardPool([act], workers=2, timeout_s=1.0)
    yield pool
    pool.close()


def test_results_keep_the_tasks_order_whoever_is_done_first(pool):
    texts = [f"sleep {0.3 - 0.02 * number:.2f}" for number in range(10)] + ["x" * n for n in range(1, 50)]
    assert judge(pool, *texts) == [[float(len(text))] for text in texts]
    assert judge(pool) == []


def test_hung_and_dead_workers_are_bounded_and_replaced(pool):
    start = time.monotonic()
    one, hung, dead, stuck, last = judge(pool, "a", "sleep 1000", "die", "stuck", "abc")
    assert time.monotonic() - start < 20
    assert (one, last) == ([1.0], [3.0])
    assert isinstance(hung, Failed) and "took longer than 1.0 s" in hung.reason and "act" in hung.function
    assert isinstance(dead, Failed) and "ended with exit code 3" in dead.reason
    assert isinstance(stuck, Failed) and "took longer" in stuck.reason
    assert judge(pool, "abcd", "abcde") == [[4.0], [5.0]], "and the pool goes on"


def test_a_worker_that_ended_between_two_calls_is_replaced(pool):
    ((pid,),) = judge(pool, "pid")
    os.kill(int(pid), signal.SIGKILL)
    psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=5)
    verdicts = judge(pool, *["ab"] * 6)
    assert verdicts == [[2.0]] * 6


def test_workers_load_neither_torch_nor_vllm(pool):
    assert judge(pool, "modules") == [[0.0]]


def test_the_time_limit_of_math_verify_works_in_a_worker():
    pool = RewardPool(["math_verify"], workers=1, timeout_s=100.0)
    try:
        endless = Task(r"\boxed{9^{9^{9^{9}}}}", "72", Sample("", True, 1))
        right = Task(r"\boxed{\frac{1}{2}}", "0.5", Sample("", True, 1))
        start = time.monotonic()
        assert pool.judge([endless, right]) == [[0.0], [1.0]]
        assert time.monotonic() - start < 40
    finally:
        pool.close()


# A shell that puts the tests into the background has Ctrl-C ignored, and children inherit that.
RANK = """
import signal, sys, time
from tests.unit.test_reward_pool import task
from trainers.reward_pool import RewardPool
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = RewardPool([sys.argv[1]], workers=2, timeout_s=1000.0)
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    pool.judge([task("sleep 1000"), task("stuck")])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_rank_whatever_they_are_doing(act, tmp_path, how):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    rank = subprocess.Popen(
        [sys.executable, script, act], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(0.5)  # at work
        assert all(worker.is_running() for worker in workers)
        rank.send_signal(how)
        rank.communicate(timeout=10)
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert not alive
    finally:
        rank.kill()
        rank.wait()


def test_closing_ends_workers_and_a_second_time_does_nothing(pool):
    workers = [psutil.Process(worker.process.pid) for worker in pool._workers]
    pool.close()
    pool.close()
    assert not any(worker.is_running() for worker in workers)


def test_what_is_submitted_is_judged_while_this_process_does_something_else(pool):
    texts = ["sleep 0.2", "x", "sleep 0.1", "xx", "sleep 0.15"]
    for text in texts:
        pool.submit(task(text))
    began, found = time.monotonic(), []
    while not found or found[-1] < len(texts):
        found.append(pool.poll())
        time.sleep(0.01)
        assert time.monotonic() - began < 20
    assert found == sorted(found)
    before = time.monotonic()
    assert pool.collect() == [[float(len(text))] for text in texts]
    assert time.monotonic() - before < 0.1, "all of them were there"
    assert judge(pool, "abc") == [[3.0]], "numbered anew"


def test_a_tasks_time_counts_from_its_start_not_from_its_submission(pool):
    for text in ["sleep 0.7"] * 4:  # two workers, 1 s a task: the second two start at 0.7
        pool.submit(task(text))
    assert pool.collect() == [[9.0]] * 4


def test_a_hung_or_dead_worker_is_seen_and_replaced_while_polling(pool):
    for text in ("stuck", "die", "x", "xx"):
        pool.submit(task(text))
    deadline = time.monotonic() + 60
    while pool.poll() < 4:
        time.sleep(0.05)
        assert time.monotonic() < deadline
    hung, died, *others = pool.collect()
    assert isinstance(hung, Failed) and "took longer than 1.0 s" in hung.reason
    assert isinstance(died, Failed) and "ended with exit code 3" in died.reason
    assert others == [[1.0], [2.0]]
