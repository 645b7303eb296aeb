"""The README's lines run as they stand there."""

import re
from pathlib import Path

import pytest

from tests.launch import ROOT, launch

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("nproc", "responses"), [(2, 8), pytest.param(None, 4, marks=pytest.mark.slow)])
def test_the_library_example(model_path: Path, tmp_path: Path, nproc: int | None, responses: int) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "hello.py"
    script.write_text(example)
    done = launch([script], nproc=nproc, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(re.findall(r"-[0-9.]+ 0$", done.stdout, re.MULTILINE)) == responses
