"""The loop that every algorithm shares: sync, generate, score, evaluate, update.

Trainer and rollout engine live in the same ranks: `torchrun --nproc_per_node=2 scripts/grpo.py configs/x.yaml`. To the
trainer the ranks are data-parallel; to the engine they are tensor-parallel.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rollout import RolloutBatch, RolloutEngine, Watch, World, init_world, merge_groups, watched
from trainers.across_ranks import sum_over_ranks
from trainers.batching import TrainBatch, make_batch
from trainers.checkpoint import About, save
from trainers.config import Experiment
from trainers.dashboard import Dashboard, memory_metrics
from trainers.data import Example, PromptStream, load_prompts
from trainers.evaluate import evaluate
from trainers.export import export_policy
from trainers.learner import Learner, Loss, make_learner, optimize
from trainers.plots import plot_run
from trainers.policy import Policy
from trainers.resume import Start, agreed_start, restore, taken
from trainers.rewards import check_answers, score

SAMPLES_FILE = "samples.jsonl"
SAMPLES_A_STEP = 4


@dataclass(frozen=True)
class Algorithm:
    """In what algorithms differ; each function takes its own experiment's config.

    Attributes:
        load: the policy to train, with or without a critic, on the CPU.
        targets: the evaluated batch of this rank with its advantages and returns; may be a collective.
        loss: of a micro-batch.
    """

    load: Callable[[Any], Policy]
    targets: Callable[[TrainBatch, Any], TrainBatch]
    loss: Loss


def train(config: Experiment, algorithm: Algorithm) -> Path:
    """Run the experiment; called by every rank.

    Returns:
        The run's folder: config, environment, metrics, samples, plots, checkpoints and the trained policy.

    Raises:
        ConfigError: if the data or a setting is at fault, or the checkpoint is of another run; found before the model
            is loaded. (Only a damaged checkpoint is found out later.)
    """
    disable_progress_bar()
    world = init_world()
    set_seed(config.run.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False)
    stream = prompt_stream(config, tokenizer, world)
    start = agreed_start(config, stream.examples, world)
    with taken(start, config, world), watched(start.folder, config.rollout.stall_timeout_s) as watch:
        learn(config, algorithm, world, stream, tokenizer, start, watch)
    # DDP and the engine are gone by now: a process group that loses its last user only later can hang its threads.
    dist.barrier()
    dist.destroy_process_group()
    return start.folder


def learn(
    config: Experiment,
    algorithm: Algorithm,
    world: World,
    stream: PromptStream,
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    watch: Watch,
) -> None:
    """All steps of the run that are left: generate, score, evaluate, update."""
    folder, steps = start.folder, config.algorithm.steps
    if world.is_main and config.run.progress:
        compiling = "" if config.rollout.enforce_eager else "; compiling takes a minute or two where no cache has it"
        print(f"{folder}: starting the engine{compiling}", file=sys.stderr, flush=True)
    with (
        RolloutEngine(config.model.path, config.rollout) as engine,
        Dashboard(folder, config.wandb, config.run, steps, world.is_main, start.wandb_id) as dashboard,
    ):

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with dashboard.phase(name), watch.busy(f"in phase {name}"):
                yield

        learner = make_learner(config, algorithm.load(config), world.device)
        restore(start, learner, stream, config.run.seed)
        for step in range(start.step, steps):
            with timed_step(dashboard, step) as metrics:
                examples = next(stream)
                with engine.awake():
                    with phase("sync"):
                        metrics |= engine.sync_weights(learner.policy.language_model, version=step).metrics()
                    with phase("generate"):
                        prompts = [example.prompt_ids for example in examples]
                        rollouts = engine.generate(prompts, config.sampling, seed=step)
                        metrics |= rollout_metrics(engine)
                with phase("reward"):
                    scores = score(rollouts, [example.answer for example in examples], tokenizer, config.reward)
                with phase("evaluate"):
                    batch = make_batch(rollouts, scores, world.device)
                    metrics |= reward_metrics(batch)
                    batch = algorithm.targets(evaluated(batch, learner, config), config)
                with phase("optimize"):
                    metrics |= optimize(batch, learner, algorithm.loss, config, seed=step)
            if world.is_main:
                write_samples(folder, step, examples, rollouts, scores.tolist(), tokenizer)
            if config.checkpoint.is_due(step, last=step + 1 == steps):  # after all that is recorded of the step
                with phase("checkpoint"):
                    about = about_now(config, start, step + 1, stream, world, dashboard)
                    save(folder, about, learner, config.checkpoint.keep, config.run.private)
        if world.is_main:
            save_policy(folder, learner.policy, tokenizer, config)
            plot_run(folder)


def prompt_stream(config: Experiment, tokenizer: PreTrainedTokenizerBase, world: World) -> PromptStream:
    """This rank's share of the prompts, every one of them checked against the engine's limits and the reward's."""
    examples = load_prompts(config.data, tokenizer, config.max_prompt_tokens)
    check_answers([example.answer for example in examples], config.reward)
    per_rank = config.algorithm.prompts_per_step // world.size
    return PromptStream(examples, per_rank, world.rank, world.size, config.data.seed, config.data.shuffle)


def evaluated(batch: TrainBatch, learner: Learner, config: Experiment) -> TrainBatch:
    """The batch with what policy, critic and reference say of it before the first update, as far as it is wanted."""
    hyper = config.algorithm
    budget = 2 * hyper.micro_batch_tokens  # no activations are kept
    with learner.accelerator.autocast():
        return evaluate(
            batch, learner.policy, learner.reference, config.sampling.temperature, budget, hyper.needs_old_logprobs
        )


def reward_metrics(batch: TrainBatch) -> dict[str, float]:
    """Mean and standard deviation of the responses' scores, all ranks."""
    scores = batch.scores.double()
    count, total, squares = sum_over_ranks(
        torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()])
    ).tolist()
    mean = total / count
    return {"reward/mean": mean, "reward/std": max(squares / count - mean**2, 0.0) ** 0.5}


def rollout_metrics(engine: RolloutEngine) -> dict[str, float]:
    """The rollout/* metrics of the whole job: each tensor-parallel group counted once."""
    everyones: list = [None] * engine.world.size
    dist.all_gather_object(everyones, engine.metrics)
    return merge_groups(everyones[:: engine.tensor_parallel_size])


def about_now(
    config: Experiment, start: Start, step: int, stream: PromptStream, world: World, dashboard: Dashboard
) -> About:
    """What a checkpoint after `step` steps says of itself."""
    settings, name = dataclasses.asdict(config), config.algorithm.section
    return About(step, stream.position, world.size, name, settings, start.origin, dashboard.wandb_id)


@contextmanager
def timed_step(dashboard: Dashboard, step: int) -> Iterator[dict[str, float]]:
    """Collect a step's metrics and log them at its end, with the rates of the whole step."""
    metrics: dict[str, float] = {}
    start = time.perf_counter()
    yield metrics
    seconds = time.perf_counter() - start
    metrics["step/seconds"] = seconds
    metrics["step/generated_tokens_per_s"] = metrics["rollout/generated_tokens"] / seconds
    dashboard.log(step, metrics | memory_metrics())


def write_samples(
    folder: Path,
    step: int,
    examples: Sequence[Example],
    rollouts: RolloutBatch,
    scores: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Append a few of this rank's responses, one JSON object a line, special tokens shown."""
    with (folder / SAMPLES_FILE).open("a") as file:
        for rollout, reward in list(zip(rollouts, scores, strict=True))[:SAMPLES_A_STEP]:
            example = examples[rollout.prompt_index]
            sample = {
                "step": step,
                "prompt": example.text,
                "response": tokenizer.decode(rollout.response_ids),
                "answer": example.answer,
                "reward": reward,
                "finish_reason": rollout.finish_reason,
                "version": rollout.version,
            }
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def save_policy(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, config: Experiment) -> None:
    """Write the trained language model, in the engine's dtype, as a folder that transformers and vLLM load."""
    export_policy(folder / "policy", policy.language_model, tokenizer, config.rollout.dtype)
