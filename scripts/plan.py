"""What an experiment will take, before it is started: memory a rank, sequences in the KV cache, seconds by phase.

    python scripts/plan.py configs/ppo_arithmetic.yaml --gpus 2
    python scripts/plan.py configs/grpo_gsm8k_gpu.yaml --gpus 8 --device h100 --prompt-tokens 120
    python scripts/plan.py configs/grpo_arithmetic.yaml --gpus 2 --check          # run three steps and compare
    python scripts/plan.py --measure mine.yaml --gpus 2                           # measure this machine

Nothing is loaded but the model's config, and the tokenizer and the data for the lengths of the prompts. Every response
is taken to be as long as it may be. --gpus is the number of ranks, on the CPU too. Formulas and their sources:
trainers/memory_plan.py, activations.py, step_time.py; constants: configs/devices/. Exit code 1: it will not fit.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts/ is no installed package

from trainers.checks import check_model, check_world  # noqa: E402
from trainers.cli import parse  # noqa: E402
from trainers.config import Experiment, GRPOConfig, PPOConfig  # noqa: E402
from trainers.devices import device_names, load_device  # noqa: E402
from trainers.errors import ConfigError  # noqa: E402

ALGORITHMS: dict[str, type[Experiment]] = {"ppo": PPOConfig, "grpo": GRPOConfig}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="as scripts/ppo.py and grpo.py take them")
    add("--gpus", type=int, required=True, metavar="N", help="ranks of the job, one a GPU; on the CPU one a core")
    add("--device", help=f"{', '.join(device_names())}, or a file of --measure; left out: cpu, on a GPU h100")
    add("--algorithm", choices=sorted(ALGORITHMS), help="left out: the section that the config has")
    add("--prompt-tokens", type=int, metavar="P", help="of every prompt; left out: as the data has them")
    add("--response-tokens", type=int, metavar="R", help="of every response; left out: sampling.max_tokens")
    add(
        "--observation-tokens",
        type=int,
        metavar="O",
        help="that environment.function adds to a response; left out: all that fit",
    )
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--check", action="store_true", help="run three steps here as well, and put what they took beside the plan")
    add("--measure", type=Path, metavar="FILE.yaml", help="measure this machine and write its device file; no config")
    args = parser.parse_intermixed_args(words)
    for flag, value in (("--gpus", args.gpus), ("--prompt-tokens", args.prompt_tokens),
                        ("--response-tokens", args.response_tokens),
                        ("--observation-tokens", args.observation_tokens)):  # fmt: skip
        if value is not None and value < 1:
            parser.error(f"{flag} is {value}; it must be at least 1")
    if args.measure and args.words:
        parser.error(f"--measure takes no config; leave {args.words[0]} out")
    for flag, file in (("--json", args.json), ("--measure", args.measure)):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{flag} is {file}, in a folder that does not exist: make {file.absolute().parent} first")
    return args


def config_of(args: argparse.Namespace) -> Experiment:
    """The experiment, checked as its script would check it.

    Raises:
        ConfigError: as trainers.cli.parse, trainers.checks.
    """
    config, _ = parse(ALGORITHMS[args.algorithm or _algorithm(args.words)], args.words)
    check_world(config, args.gpus)
    check_model(config, args.gpus)
    limit = config.sampling.max_tokens
    if args.response_tokens and args.response_tokens > limit:
        raise ConfigError(f"--response-tokens is {args.response_tokens}, above sampling.max_tokens={limit}")
    if args.observation_tokens and config.environment.function is None:
        raise ConfigError(
            f"--observation-tokens is {args.observation_tokens}, but environment.function is null: nothing is added to "
            "a response; leave it out"
        )
    if args.prompt_tokens and args.prompt_tokens > config.max_prompt_tokens:
        raise ConfigError(
            f"--prompt-tokens is {args.prompt_tokens}, but rollout.max_model_len less sampling.max_tokens leaves "
            f"{config.max_prompt_tokens}; raise rollout.max_model_len"
        )
    return config


def _algorithm(words: Sequence[str]) -> str:
    """Whose section the file or the overrides have."""
    given = {word.removeprefix("--").partition(".")[0] for word in words if "=" in word}
    for file in (word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, TypeError):  # `parse` says what is wrong with it
            given |= set(yaml.safe_load(Path(file).read_text(encoding="utf-8")) or ())
    found = sorted(given & set(ALGORITHMS))
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"the config has {'the sections ' + ' and '.join(found) if found else 'no section ppo or grpo'}; say which it "
        "is with --algorithm ppo or --algorithm grpo"
    )


def prompt_lengths(config: Experiment, given: int | None) -> list[int]:
    """Tokens of the prompts of a step.

    Raises:
        ConfigError: if tokenizer or data cannot be read.
    """
    count = config.algorithm.prompts_per_step
    if given is not None:
        return [given] * count
    from transformers import AutoTokenizer

    from trainers.held_out import load_data

    remedy = "give --prompt-tokens N to plan without them"
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such name, no network, a broken file
        raise ConfigError(
            f"model.path is {config.model.path!r}; its tokenizer cannot be loaded: {error}; {remedy}"
        ) from error
    try:
        examples, _ = load_data(config, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from error
    lengths = [len(example.prompt_ids) for example in examples]
    return [lengths[index % len(lengths)] for index in range(count)]


def default_device() -> str:
    import torch

    return "h100" if torch.cuda.is_available() else "cpu"


def main() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = arguments()
    if args.measure:
        from scripts.planning.measure import measure

        measure(args.measure, args.gpus)
        return
    try:
        config = config_of(args)
        device, sources = load_device(args.device or default_device())
        from scripts.planning.planner import make_plan
        from scripts.planning.tables import json_of, text_of

        prompts = prompt_lengths(config, args.prompt_tokens)
        plan = make_plan(config, args.gpus, device, prompts, args.response_tokens, args.observation_tokens)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(text_of(plan))
    whole: dict[str, Any] = json_of(plan, sources)
    if args.check:
        from scripts.planning.check import check, comparison

        whole["measured"] = check(config, args.words, plan)
        print(f"\n{comparison(plan, whole['measured'])}")
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    if plan.remedies is not None:
        sys.exit(f"error: {plan.advice()}")


if __name__ == "__main__":
    main()
