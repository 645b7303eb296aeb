"""GSM8K and MATH-500 from the shared folder, two overrides each; skipped where the folder is missing."""

from pathlib import Path

import pytest

from tests.launch import ROOT, launch

DATA = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize(
    ("config", "overrides", "rows"),
    [
        ("configs/ppo_gsm8k.yaml", ["data.source=gsm8k_train.jsonl"], 7473),
        ("configs/ppo_math.yaml", ["data.source=math500.jsonl", "data.prompt_column=problem"], 497),
    ],
)
def test_prompts_load(config: str, overrides: list[str], rows: int, model_path: Path) -> None:
    file = DATA / overrides[0].removeprefix("data.source=")
    if not file.exists():
        pytest.skip(f"{file.name} is not in {DATA.name}; users get it through datasets")
    given = [f"data.source={file}", *overrides[1:], f"model.path={model_path}", "--dry-run"]
    done = launch(["scripts/ppo.py", config, *given], nproc=None, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert f"{rows} prompts" in done.stderr
