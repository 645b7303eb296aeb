"""Seen from outside: where the processes of a launch listen, and on a host whose name leads elsewhere."""

import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "TORCHRUN_ROLLOUT_CLOSED_DOORS"
LOOK_S = 0.2
# Stands for a host whose name resolves to an outer address: no job is told to use this one, so nothing may listen on
# it. It is a loopback address all the same, as in Debian's /etc/hosts, so that the test itself opens no door.
HOST_ADDRESS = "127.0.1.1"
SHIM = """
#include <cstring>
extern "C" int gethostname(char *name, std::size_t size) { std::strncpy(name, "%s", size); return 0; }
"""


@dataclass
class Doors:
    """What was found open at any time.

    Attributes:
        environment: that a launch must have to be looked at.
        listening: addresses, by what listens there: "torchrun", "rank", or else the program's own name.
        ports: the most that one process had open at once, by the same.
    """

    environment: dict[str, str]
    listening: dict[str, set[str]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self.environment[MARK]:
                    self._note(_program(process), _open_to_others(process))

    def _note(self, program: str, addresses: list[str]) -> None:
        if addresses:
            self.listening.setdefault(program, set()).update(addresses)
            self.ports[program] = max(len(addresses), self.ports.get(program, 0))


@contextmanager
def watched_doors(folder: Path) -> Iterator[Doors]:
    """Look at every process of a launch, five times a second."""
    shim = folder / "hostname.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-o", str(shim), "-"]
    subprocess.run(command, input=SHIM % HOST_ADDRESS, text=True, check=True)
    doors, done = Doors({MARK: uuid.uuid4().hex, "LD_PRELOAD": str(shim)}), threading.Event()

    def loop() -> None:
        while not done.wait(LOOK_S):
            doors.look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield doors
    finally:
        done.set()
        thread.join()


def _program(process: psutil.Process) -> str:
    words = process.cmdline()
    if "torch.distributed.run" in words:
        return "torchrun"
    return "rank" if "scripts/ppo.py" in words else process.name()


def _open_to_others(process: psutil.Process) -> list[str]:
    """The address of each socket on which this process takes TCP connections, or UDP packets from anybody."""
    return [
        connection.laddr.ip
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        or (connection.type == socket.SOCK_DGRAM and connection.laddr and not connection.raddr)
    ]
