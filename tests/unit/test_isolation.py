"""What vLLM changes in the process is put back, and what it left alone is not touched."""

import os

import pytest

from rollout.isolation import preserved_trainer_state


def test_the_environment_is_as_it_was_and_the_rest_of_it_was_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("REMOVED", "before")
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.delenv("ADDED", raising=False)
    before = dict(os.environ)
    touched: list[bytes] = []
    putenv, unsetenv = os.putenv, os.unsetenv
    with preserved_trainer_state():
        os.environ["CHANGED"] = os.environ["ADDED"] = "inside"
        del os.environ["REMOVED"]
        monkeypatch.setattr(os, "putenv", lambda name, value: (touched.append(name), putenv(name, value)))
        monkeypatch.setattr(os, "unsetenv", lambda name: (touched.append(name), unsetenv(name)))
    assert dict(os.environ) == before
    assert sorted(touched) == [b"ADDED", b"CHANGED", b"REMOVED"]
