"""What the planner knows of a device: rates and sizes, each with where the number comes from; a YAML file a device."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from trainers.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "devices"


@dataclass(frozen=True)
class Device:
    """One rank's share of a machine: a GPU, or on the CPU a core among as many busy ones as there are ranks.

    Args:
        kind: cpu or cuda.
        predicted: True if the numbers are a data sheet's with achieved fractions, and not this machine's.
        memory_gib: that a rank may use; null on the CPU takes the machine's memory over the ranks.
        baseline_gib: of a rank's process with trainer and engine on a model that weighs nothing; on CUDA of the
            device's memory (contexts, libraries, graphs).
        heap_share: of what the model and its activations take, memory that the allocator holds beside it.
        memory_gb_per_s: read or written by a kernel that does nothing else, in 10^9 bytes.
        cast_gb_per_s: bytes that a copy from float32 to bfloat16 writes.
        pack_gb_per_s: bytes of packed weights that the engine makes (CPU); null where nothing is packed.
        bf16_tflops: of a bfloat16 matrix product, 10^12 operations a second.
        f32_tflops: the same in float32.
        attention_tflops: of the trainer's attention, forward and backward.
        engine_bf16_tflops: of the engine's products.
        kv_gb_per_s: bytes of keys and values that the engine's attention reads while it decodes.
        all_reduce_gb_per_s: bytes of a large gradient over the seconds that its all-reduce takes.
        engine_all_reduce_us: of a small all-reduce of the engine's, by its latency.
        host_step_ms: of a decode step, host work that the device waits for,
        host_sequence_us: and more a sequence.
        reward_us: to score a response by the built-in exact_number.
    """

    name: str
    kind: str
    predicted: bool
    memory_gib: float | None
    baseline_gib: float
    heap_share: float
    memory_gb_per_s: float
    cast_gb_per_s: float
    pack_gb_per_s: float | None
    bf16_tflops: float
    f32_tflops: float
    attention_tflops: float
    engine_bf16_tflops: float
    kv_gb_per_s: float
    all_reduce_gb_per_s: float
    engine_all_reduce_us: float
    host_step_ms: float
    host_sequence_us: float
    reward_us: float

    @property
    def on_cpu(self) -> bool:
        """True if the ranks compute on the host's cores."""
        return self.kind == "cpu"


ABOUT = ("name", "kind", "predicted")
"""Fields that stand in a file by themselves; every other one is a `value` and a `source`."""
CONSTANTS = tuple(each.name for each in fields(Device) if each.name not in ABOUT)
OPTIONAL = ("memory_gib", "pack_gb_per_s")


def device_names() -> list[str]:
    """Of the files that come along."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_device(name: str) -> tuple[Device, dict[str, str]]:
    """By the name of a file that comes along, or a path; the device, and the source of each constant.

    Raises:
        ConfigError: if there is no such file, or it lacks a constant, or has one that nobody knows.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--device is {name}, which cannot be read: {error}; there are {', '.join(device_names())}, or give the "
            "file that `python scripts/plan.py --measure FILE.yaml` writes"
        ) from error
    return parse_device(read, str(file))


def parse_device(read: Any, where: str) -> tuple[Device, dict[str, str]]:
    """Of a file's content; `where` is the file.

    Raises:
        ConfigError: as `load_device`.
    """
    constants = read.get("constants") if isinstance(read, dict) else None
    if not isinstance(constants, dict):
        raise ConfigError(f"{where} is no device file: it has no `constants`; take configs/devices/cpu.yaml as a model")
    missing = [name for name in (*ABOUT, *CONSTANTS) if name not in (constants if name in CONSTANTS else read)]
    unknown = [name for name in constants if name not in CONSTANTS]
    if missing or unknown:
        told = [f"lacks {', '.join(missing)}"] if missing else []
        told += [f"has the unknown {', '.join(unknown)}"] if unknown else []
        raise ConfigError(
            f"{where} {' and '.join(told)}; measure again with `python scripts/plan.py --measure {where}`"
        )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, entry in constants.items():
        value = entry.get("value") if isinstance(entry, dict) else None
        if (
            isinstance(entry, dict)
            and entry.get("source")
            and (_is_rate(value) or (value is None and name in OPTIONAL))
        ):
            values[name], sources[name] = value, str(entry["source"])
            continue
        raise ConfigError(f"{where}: {name} is {entry!r}; it must be {{value: a number of at least 0, source: a text}}")
    if read["kind"] not in ("cpu", "cuda"):
        raise ConfigError(f"{where}: kind is {read['kind']!r}; it must be cpu or cuda")
    return Device(name=read["name"], kind=read["kind"], predicted=bool(read["predicted"]), **values), sources


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
