"""Where a job's groups listen: decided by the address that the launcher gave."""

import os

import pytest

from rollout.world import GLOO_INTERFACE, closed_to_the_network


@pytest.mark.parametrize(
    ("address", "chosen", "inside"),
    [
        ("127.0.0.1", None, "loopback"),
        ("localhost", None, "loopback"),
        ("::1", None, "loopback"),
        (None, None, "loopback"),  # one plain process
        ("192.0.2.1", None, None),  # other machines may be in the job: gloo's own choice
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
