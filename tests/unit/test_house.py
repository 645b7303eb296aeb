"""Imports run one way: scripts -> trainers -> rollout -> rollout.backend -> vllm, and configuration loads fast.

And nothing that is read may bring code along.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folder: what nothing in it may import. rollout/'s leaves (config, world, isolation, ...) serve rollout/backend too.
FORBIDDEN = {
    "rollout": ("trainers", "scripts", "tests", "accelerate", "wandb", "peft"),
    "trainers": ("scripts", "tests", "vllm", "rollout.backend"),
    "scripts": ("tests", "vllm"),
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_runs_back(folder: str) -> None:
    for file in sorted((ROOT / folder).rglob("*.py")):
        for module in imports(file):
            for forbidden in FORBIDDEN[folder]:
                assert not f"{module}.".startswith(f"{forbidden}."), f"{file.relative_to(ROOT)} imports {module}"


def test_only_the_backend_imports_vllm() -> None:
    files = [file for folder in FORBIDDEN for file in (ROOT / folder).rglob("*.py")]
    importing = {file.parent.name for file in files if any(f"{m}.".startswith("vllm.") for m in imports(file))}
    assert importing == {"backend"}


def test_trainers_use_public_names_of_rollout_alone() -> None:
    for file in (ROOT / "trainers").glob("*.py"):
        used = {module for module in imports(file) if module.startswith("rollout")}
        assert used <= {"rollout"}, f"{file.name} imports {used}"


def test_a_config_is_checked_before_anything_heavy_is_imported() -> None:
    code = "import sys, trainers.cli; sys.exit(any(m in sys.modules for m in ('torch', 'vllm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# By function: the argument that keeps it from running what it reads; None where nothing does.
LOADERS = {
    "from_pretrained": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
    "pickle.load": None,
    "pickle.loads": None,
    "yaml.load": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
}


def test_nothing_is_loaded_that_could_run_code() -> None:
    calls = 0
    for file in [file for folder in FORBIDDEN for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name = ast.unparse(node.func)
            name = node.func.attr if node.func.attr in LOADERS else name
            if name in LOADERS:
                calls += 1
                given = {(word.arg, ast.unparse(word.value)) for word in node.keywords}
                needed = LOADERS[name]
                where = f"{file.relative_to(ROOT)}, line {node.lineno}: {name}"
                assert needed is not None, where
                assert (needed[0], str(needed[1])) in given, f"{where} without {needed[0]}={needed[1]}"
    assert calls > 5
