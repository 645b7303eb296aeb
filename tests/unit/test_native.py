"""Kernels are compiled once a machine, whole or not at all, and rollouts go on without a compiler."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.backend import native

COMPILE = "from rollout.backend.native import load_library; assert load_library('attention') is not None"


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load_library.cache_clear()
    yield tmp_path
    native.load_library.cache_clear()


def test_a_library_is_compiled_once(cache_home: Path) -> None:
    assert native.load_library("attention") is not None
    (made,) = (cache_home / "torchrun-rollout").iterdir()
    before = made.stat()
    native.load_library.cache_clear()
    assert native.load_library("attention") is not None
    assert made.stat().st_mtime_ns == before.st_mtime_ns and made.stat().st_ino == before.st_ino
    assert (cache_home / "torchrun-rollout").stat().st_mode & 0o077 == 0, "nobody else may put code there"


def test_ranks_that_compile_at_the_same_time_both_get_it(cache_home: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", COMPILE]) for _ in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert len(list((cache_home / "torchrun-rollout").iterdir())) == 1, "and nothing else is left there"


def test_a_changed_source_is_compiled_anew(
    cache_home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.load_library("attention") is not None
    changed = tmp_path_factory.mktemp("kernels")
    for source in native.KERNELS.iterdir():
        (changed / source.name).write_text(source.read_text() + "\n// changed\n")
    monkeypatch.setattr(native, "KERNELS", changed)
    native.load_library.cache_clear()
    assert native.load_library("attention") is not None
    assert len(list((cache_home / "torchrun-rollout").iterdir())) == 2


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_without_a_compiler_there_is_a_warning_and_no_library(
    cache_home: Path, compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert native.load_library("attention") is None
        assert native.load_library("attention") is None
    (record,) = caplog.records
    assert compiler in record.message and "install g++ or set CXX" in record.message


def test_a_source_that_does_not_compile_leaves_nothing(
    cache_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tmp_path_factory.mktemp("kernels")
    (broken / "vectors.h").write_text("")
    (broken / "attention.cpp").write_text("this is not C++")
    monkeypatch.setattr(native, "KERNELS", broken)
    assert native.load_library("attention") is None
    assert "error" in caplog.records[0].message, "the compiler's own words"
    assert not list((cache_home / "torchrun-rollout").iterdir())
