"""Where a job's groups listen, decided by the address that the launcher gave; and which ranks share a machine."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from rollout import world
from rollout.world import (
    ELSEWHERE,
    GLOO_INTERFACE,
    Machine,
    check_machines,
    closed_to_the_network,
    machines_of_ranks,
    this_machine,
)

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["203.0.113.5", "fe80::1%eth0"],
    "ib0": ["198.51.100.5", "2001:db8::5"],
}
# Where packets to an address would leave; None: no way there.
ROUTES = {
    "192.0.2.1": "203.0.113.5",
    "198.51.100.9": "198.51.100.5",
    "2001:db8::9": "2001:db8::5",
    "127.0.1.1": "127.0.0.1",
}
NAMES = {"localhost": ["127.0.0.1"], "debian": ["127.0.1.1"], "far": ["198.51.100.9"], "six": ["2001:db8::9"]}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with two outer interfaces, whose own name, as Debian has it, is a loopback address."""

    def resolved(host: str, _: None) -> list:
        if not (found := NAMES.get(host, [host] if host[0].isdigit() or ":" in host else [])):
            raise socket.gaierror(f"unknown: {host}")
        return [(None, None, None, "", (address, 0)) for address in found]

    addresses = {
        name: [SimpleNamespace(family=None, address=address) for address in of_one]
        for name, of_one in INTERFACES.items()
    }
    monkeypatch.setattr(world.socket, "getaddrinfo", resolved)
    monkeypatch.setattr(world.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(world, "_source_address", ROUTES.get)


@pytest.mark.parametrize(
    ("address", "agents", "inside"),
    [
        ("127.0.0.1", 1, "lo"),
        ("127.0.0.1", 2, "lo"),  # two of them on one host, told so by an address that no other host can reach
        ("localhost", 2, "lo"),
        ("debian", 1, "lo"),
        ("debian", 2, "eth0"),  # the master's own name: the others know it under another address
        ("far", 2, "ib0"),  # not the interface of the default route: the one that leads to the master
        ("198.51.100.9", 1, "ib0"),
        ("six", 2, "ib0"),
        ("nowhere", 2, "eth0"),
        (None, 1, "lo"),
    ],
)
def test_the_interface_leads_to_the_master(
    network: None, address: str | None, agents: int, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ROUTES[ELSEWHERE] == INTERFACES["eth0"][0]
    for name, value in (("MASTER_ADDR", address), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", str(4 // agents))):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    with closed_to_the_network():
        assert os.environ.get(GLOO_INTERFACE) == inside
    assert GLOO_INTERFACE not in os.environ


def test_without_a_way_out_the_choice_is_gloos(network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_source_address", lambda target: None)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    with closed_to_the_network():
        assert GLOO_INTERFACE not in os.environ


def test_a_way_that_is_really_there() -> None:
    assert world._source_address("127.0.0.1") == "127.0.0.1"
    assert world._interface_of("127.0.0.1") in ("lo", "lo0")
    assert world._source_address("no address") is None


A, B = Machine("a", "boot-1/22/1"), Machine("b", "boot-2/22/1")


@pytest.mark.parametrize(
    ("size", "machines", "words"),
    [
        (1, [A, B], None),
        (2, [A, A, B, B], None),
        (None, [A, A], None),
        (2, [A, A, A, A, B, B], None),
        (None, [A, A, B, B], "is null, which means all, and ranks 0 to 3"),
        (None, [A, A, B, B], "--nnodes=2 --nproc_per_node=4), or set rollout.tensor_parallel_size=2"),
        (2, [A, B], "--nnodes=2 --nproc_per_node=2), or set rollout.tensor_parallel_size=1"),
        (2, [A, B, A, B], "rank 0 on a, rank 1 on b"),  # ranks that were dealt out by turns
        (2, [A, Machine("a", "boot-1/23/1")], "on 2 machines"),  # two containers of one host share no memory
        (4, [A, A, B, B, B, B, B, B], "ranks 0 to 3"),
    ],
)
def test_a_copy_of_the_engine_is_on_one_machine(size: int | None, machines: list[Machine], words: str | None) -> None:
    if words is None:
        check_machines(size, machines)
    else:
        with pytest.raises(ValueError) as refused:
            check_machines(size, machines)
        assert words in str(refused.value)


def test_machines_are_asked_for_once_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(world, "this_machine", lambda: asked.append(1) or A)
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        before = len(asked)
        assert machines_of_ranks() == (A,) == machines_of_ranks()
        assert len(asked) == before + 1
        dist.destroy_process_group()


def test_this_machine_is_known_by_its_memory() -> None:
    machine = this_machine()
    assert machine == this_machine() and machine.name == socket.gethostname()
    assert machine.key.endswith(f"/{os.stat('/dev/shm').st_dev}/{os.stat('/dev/shm').st_ino}")


@pytest.mark.parametrize(
    ("address", "chosen", "inside"),
    [
        ("127.0.0.1", None, "loopback"),
        ("localhost", None, "loopback"),
        ("::1", None, "loopback"),
        (None, None, "loopback"),  # one plain process
        ("127.0.0.1", "eth7", "eth7"),  # the user's
        ("192.0.2.1", "eth7", "eth7"),
    ],
)
def test_the_loopback_interface_for_jobs_on_this_machine(
    address: str | None, chosen: str | None, inside: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MASTER_ADDR", address), (GLOO_INTERFACE, chosen)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with closed_to_the_network():
        found = os.environ.get(GLOO_INTERFACE)
    assert found in (("lo", "lo0") if inside == "loopback" else (inside,))
    assert os.environ.get(GLOO_INTERFACE) == chosen, "put back"
