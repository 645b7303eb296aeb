"""Hosts with a network of their own on this machine: namespaces of Linux, joined by a cable. It takes root.

A host here is a network namespace with one address, whose only way out is a veth pair to the other host: nothing can
reach anything else. What runs on it has a host name, process numbers and shared memory of its own, and dies at once
when it is killed, as where the power fails.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "198.18.0"  # of RFC 2544: for measurements between two machines, routed nowhere
# In a new set of namespaces: name the host, give it shared memory of its own, and run the rest.
BEGIN = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && exec "$@"'
GRACE_S = 15.0


class NoHosts(RuntimeError):
    """This machine does not let us make hosts; says why."""


class Host:
    """One of `two_hosts`.

    Attributes:
        name: of the host, and of its network namespace.
        address: of its end of the cable.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._running: list[subprocess.Popen] = []

    def start(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Run a command on the host, from the repository's root.

        Args:
            log: gets its output, appended.
            env: environment variables beside this process's, over them.
        """
        unshare = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = ["bash", "-c", BEGIN, self.name, *map(str, command)]
        with log.open("a") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *unshare, *inside],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def kill(self) -> None:
        """End all that runs on the host, at once, and let nobody clean up: the first process goes, the kernel ends the
        rest.
        """
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait(GRACE_S)
        self._running.clear()

    def cut(self) -> None:
        """Pull the cable out: packets are lost, and neither side is told."""
        _ip("-n", self.name, "link", "set", "cable", "down")

    def mend(self) -> None:
        """Put it in again."""
        _ip("-n", self.name, "link", "set", "cable", "up")

    @property
    def sent_bytes(self) -> int:
        """Into the cable since the host was made."""
        said = _ip("-n", self.name, "-s", "-j", "link", "show", "dev", "cable")
        return json.loads(said)[0]["stats64"]["tx"]["bytes"]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts and the cable between them; all of it is gone at the end, and what still runs there is killed.

    Raises:
        NoHosts: where namespaces or a cable cannot be made.
    """
    first, second = hosts = tuple(Host(f"host{number}-{os.getpid()}", f"{NETWORK}.{number}") for number in (1, 2))
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NoHosts("network namespaces take Linux, and root")
    try:
        try:
            for host in hosts:
                _ip("netns", "add", host.name)
            cable = ["type", "veth", "peer", "name", "cable", "netns", second.name]
            _ip("link", "add", "cable", "netns", first.name, *cable)
            for host in hosts:
                _ip("-n", host.name, "address", "add", f"{host.address}/30", "dev", "cable")
                host.mend()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or ""
            raise NoHosts(f"network namespaces cannot be made here: {error} {said}".strip()) from error
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "delete", host.name)


def wait_for(file: Path, rows: int, timeout_s: float, processes: Sequence[subprocess.Popen]) -> None:
    """Until a file has so many lines.

    Raises:
        TimeoutError: if it has not in time.
        RuntimeError: if all processes have ended before.
    """
    deadline = time.monotonic() + timeout_s
    while not file.exists() or file.read_bytes().count(b"\n") < rows:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file} has not had {rows} lines within {timeout_s:g} s")
        if all(process.poll() is not None for process in processes):
            raise RuntimeError(f"the job ended before {file} had {rows} lines")
        time.sleep(0.05)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout
