"""PPO over two hosts of a network of their own: the numbers of one host; what a cut cable and a dead host may cost.

`scripts/two_hosts.py` makes the hosts and the runs.
"""

import errno
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.hosts import NoHosts, two_hosts, wait_for
from scripts.two_hosts import CUT_S, STALL_S, STEPS, differing, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ALL_STEPS = list(range(STEPS))
FLOAT32_WEIGHTS = 4 * 3.3e6  # bytes of the tiny model
UPDATES = 2 * STEPS


@pytest.fixture(scope="module")
def result(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("hosts")

    def of(name: str) -> dict[str, Any]:
        try:
            return run(name, tiny_model_path, folder)
        except NoHosts as error:
            pytest.skip(str(error))

    return of


PROBE = """
import os, socket
for address in ("198.18.0.2", "192.0.2.1"):
    try:
        socket.create_connection((address, 9), timeout=5)
    except OSError as error:
        print(type(error).__name__, error.errno, flush=True)
print(socket.gethostname(), os.listdir("/dev/shm"), flush=True)
"""


def test_hosts_reach_each_other_and_nothing_else(tmp_path: Path) -> None:
    try:
        with two_hosts() as (first, second):
            assert first.start([sys.executable, "-c", PROBE], tmp_path / "probe").wait(30) == 0
            sleeper = second.start(["bash", "-c", "sleep 600 & echo begun; wait"], tmp_path / "sleeper")
            wait_for(tmp_path / "sleeper", 1, 30.0, [sleeper])
            second.kill()
            assert sleeper.returncode == -signal.SIGKILL
            namespaces = [Path("/run/netns", host.name) for host in (first, second)]
            assert all(namespace.exists() for namespace in namespaces)
    except NoHosts as error:
        pytest.skip(str(error))
    refused, unreachable, last = (tmp_path / "probe").read_text().splitlines()
    assert refused.startswith("ConnectionRefusedError") and unreachable == f"OSError {errno.ENETUNREACH}"
    assert last == f"{first.name} []"
    assert not any(namespace.exists() for namespace in namespaces)


def test_two_hosts_compute_what_one_does(result) -> None:
    one, both = result("one_host"), result("two_hosts")
    assert one["exit"] == [0] and both["exit"] == [0, 0]
    assert [row["step"] for row in both["rows"]] == ALL_STEPS
    assert {"reward/mean", "train/loss", "train/grad_norm", "rollout/generated_tokens"} <= both["rows"][0].keys()
    assert differing(both["rows"], one["rows"]) == {}, "to the last digit"
    for sent in both["sent_bytes"]:
        # A ring of four sends three quarters of the gradient twice past each cut; nothing else comes near that.
        assert UPDATES * FLOAT32_WEIGHTS < sent < 2 * UPDATES * FLOAT32_WEIGHTS


def test_a_cut_cable_is_waited_for(result) -> None:
    cut = result("cut")
    assert cut["exit"] == [0, 0]
    assert differing(cut["rows"], result("one_host")["rows"]) == {}
    assert cut["steps_while_cut"] <= 1, "what was done but for its last row"
    assert cut["next_step_after_s"] < 60.0 + CUT_S


def test_a_dead_host_costs_the_steps_since_the_last_checkpoint(result) -> None:
    killed = result("killed")
    assert killed["exit"] == [0, 0]
    assert [row["step"] for row in killed["rows"]] == ALL_STEPS
    assert [row["sync/version"] for row in killed["rows"]] == ALL_STEPS
    apart = differing(killed["rows"], result("one_host")["rows"])
    assert max(apart.values(), default=0.0) < 1e-3, "four ranks: not to the last digit (docs/design-training.md)"
    assert killed["next_step_after_s"] < STALL_S + 120.0


def test_without_the_rendezvous_the_rest_ends_and_is_started_again(result) -> None:
    killed = result("first_killed")
    assert killed["left_exit"] == 1 and killed["left_ended_after_s"] < STALL_S + 60.0
    assert killed["exit"] == [0, 0]
    apart = differing(killed["rows"], result("one_host")["rows"])
    assert max(apart.values(), default=0.0) < 1e-3


def test_fewer_hosts_go_on_where_that_is_allowed(result) -> None:
    shrunk = result("shrunk")
    assert shrunk["exit"] == [0] and [row["step"] for row in shrunk["rows"]] == ALL_STEPS
    assert all(row["rollout/sequences"] == 8 for row in shrunk["rows"]), "as many prompts by fewer ranks"
    assert differing(shrunk["rows"][:1], result("one_host")["rows"][:1]) == {}


def test_what_cannot_run_on_two_hosts_is_refused_at_the_start(result) -> None:
    across, unshared = result("refused")["across"], result("refused")["unshared"]
    assert across["exit"] == unshared["exit"] == [1, 1]
    assert "rollout.tensor_parallel_size is 4, and ranks 0 to 3" in across["said"]
    assert "--nnodes=2 --nproc_per_node=4), or set rollout.tensor_parallel_size=2" in across["said"]
    assert "rank 2 on host2" in unshared["said"] and "set run.directory to a folder that all nodes" in unshared["said"]
