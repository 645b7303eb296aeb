"""The loop that every algorithm shares: sync, generate, score, look back, update.

Trainer and rollout engine live in the same ranks: `torchrun --nproc_per_node=2 scripts/grpo.py configs/x.yaml`. To the
trainer the ranks are data-parallel; to the engine they are tensor-parallel.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rollout import RolloutEngine, Watch, World, beat, init_world, span, watched
from trainers.batching import TrainBatch
from trainers.checkpoint import About, save
from trainers.collection import Collector, batch_of, samples_of, write_samples
from trainers.config import Experiment
from trainers.dashboard import Dashboard, memory_metrics
from trainers.data import Example, PromptStream
from trainers.dynamic_sampling import Round
from trainers.environment import Environment
from trainers.evaluation import evaluate_and_show, is_due
from trainers.export import export_policy
from trainers.learner import Learner, Loss, make_learner, optimize
from trainers.no_grad_pass import no_grad_pass
from trainers.nodes import COLLECTIVE_SLACK_S, check_groups
from trainers.partial import Unfinished
from trainers.plots import plot_run
from trainers.policy import Policy
from trainers.prepare import prepare
from trainers.resume import Start, agreed_start, restore, restore_carried, taken
from trainers.scoring import Scorer
from trainers.timeline import timed_by_thread


@dataclass(frozen=True)
class Algorithm:
    """In what algorithms differ; each function takes its own experiment's config.

    Attributes:
        load: the policy to train, with or without a critic, on the CPU.
        targets: this rank's batch, after `no_grad_pass`, with its advantages and returns; may be a collective.
        loss: of a micro-batch.
    """

    load: Callable[[Any], Policy]
    targets: Callable[[TrainBatch, Any], TrainBatch]
    loss: Loss


@dataclass(frozen=True)
class Job:
    """What a run is made of, but for engine and policy.

    Attributes:
        stream: this rank's prompts to train on.
        held_out: all prompts to evaluate on.
    """

    config: Experiment
    algorithm: Algorithm
    world: World
    tokenizer: PreTrainedTokenizerBase
    stream: PromptStream
    held_out: Sequence[Example]
    environment: Environment
    scorer: Scorer


def train(config: Experiment, algorithm: Algorithm) -> Path:
    """Run the experiment; called by every rank.

    Returns:
        The run's folder: config, environment, metrics, samples, plots, checkpoints and the trained policy.

    Raises:
        ConfigError: if the data or a setting is at fault, or the checkpoint is of another run; found before the model
            is loaded. (Only a damaged checkpoint is found out later.)
    """
    disable_progress_bar()
    world = init_world(COLLECTIVE_SLACK_S + config.rollout.stall_timeout_s)
    check_groups(config)
    set_seed(config.run.seed)
    found = prepare(config, world.size)
    tokenizer = found.tokenizer
    with (  # their workers start before there are threads and devices
        Environment(config.environment, tokenizer, beat) as environment,
        Scorer(config.reward, tokenizer, beat, environment.dialogue) as scorer,
    ):
        stream = prompt_stream(found.training, config, world)
        job = Job(config, algorithm, world, tokenizer, stream, found.evaluation, environment, scorer)
        start = agreed_start(config, stream.examples, world)
        with taken(start, config, world), watched(start.folder, config.rollout.stall_timeout_s) as watch:
            learn(job, start, watch)
    # DDP and the engine are gone by now: a process group that loses its last user only later can hang its threads.
    dist.barrier()
    dist.destroy_process_group()
    return start.folder


def learn(job: Job, start: Start, watch: Watch) -> None:
    """All steps of the run that are left: generate, score, update; and the evaluations between them."""
    config, world, folder, steps = job.config, job.world, start.folder, job.config.algorithm.steps
    announce(job, folder)
    with (
        RolloutEngine(config.model.path, config.rollout) as engine,
        Dashboard(folder, config.wandb, config.run, steps, world.is_main, start.wandb_id, start.step) as dashboard,
    ):

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with dashboard.phase(name), watch.busy(f"in phase {name}"), span(name):
                yield

        learner = make_learner(config, job.algorithm.load(config), world.device)
        unfinished = Unfinished(config.partial, job.stream.examples)
        collector = Collector(engine, job.stream, job.environment, job.scorer, unfinished, config, phase)
        restore(start, learner, job.stream, config.run.seed)
        restore_carried(start, unfinished, world)
        evaluation = partial(evaluate_if_due, job, engine, learner, dashboard, watch)
        for step in range(start.step, steps):
            evaluated = evaluation(step)
            timeline = timed_by_thread(step, config.run.timeline_steps, folder, world)
            with timeline, timed_step(dashboard, step, evaluated) as metrics:
                with phase("sync"):
                    metrics |= engine.sync_weights(learner.policy.language_model, version=step).metrics()
                rounds, found = collector.collect(step)
                metrics |= found
                metrics |= update_policy(job, learner, rounds, step, phase)
            if world.is_main:
                samples = samples_of(step, rounds[0], job.tokenizer, job.environment.dialogue)
                write_samples(folder, samples)
                dashboard.log_samples(step, samples)
            if config.checkpoint.is_due(step, last=step + 1 == steps):  # after all that is recorded of the step
                with phase("checkpoint"):
                    about = about_now(job, start, step + 1, dashboard)
                    save(folder, about, learner, config.checkpoint.keep, config.run.private, unfinished.to_bytes())
        if evaluated := evaluation(steps):
            dashboard.log(steps, evaluated)
        export_policy(folder / "policy", learner.policy.language_model, job.tokenizer, config.rollout.dtype)
        if world.is_main:
            plot_run(folder)


def evaluate_if_due(
    job: Job, engine: RolloutEngine, learner: Learner, dashboard: Dashboard, watch: Watch, step: int
) -> dict[str, float]:
    """The eval/* metrics of the policy after `step` updates; none where no evaluation is due. A collective."""
    config = job.config
    if not is_due(step, config.evaluation.every, config.algorithm.steps):
        return {}
    with watch.busy("evaluating"), engine.awake():
        engine.sync_weights(learner.policy.language_model, version=step)
        return evaluate_and_show(
            engine, job.held_out, job.scorer, job.tokenizer, config.sampling, config.evaluation, step,
            dashboard, job.environment.generate,
        )  # fmt: skip


def update_policy(
    job: Job, learner: Learner, rounds: Sequence[Round], step: int, phase: Callable[[str], AbstractContextManager[None]]
) -> dict[str, float]:
    """What the step learns from its responses; a collective.

    Returns:
        The train/* metrics; nothing of an update where no prompt is there to be trained on.
    """
    with phase("no_grad"):
        batch, metrics = batch_of(rounds, job.config, job.world)
        if metrics.get("rollout/trained_groups") == 0:  # the same on all ranks
            return metrics
        batch = job.algorithm.targets(with_old_figures(batch, learner, job.config), job.config)
    with phase("optimize"):
        return metrics | optimize(batch, learner, job.algorithm.loss, job.config, step)


def announce(job: Job, folder: Path) -> None:
    """Say on rank 0 where the run lies, and that it may take a while to begin."""
    if job.world.is_main and job.config.run.progress:
        slow = "" if job.config.rollout.enforce_eager else "; compiling takes a minute or two where no cache has it"
        print(f"{folder}: starting the engine{slow}", file=sys.stderr, flush=True)


def prompt_stream(examples: Sequence[Example], config: Experiment, world: World) -> PromptStream:
    """This rank's share of the prompts to train on, step by step."""
    per_rank = config.algorithm.prompts_per_step // world.size
    return PromptStream(examples, per_rank, world.rank, world.size, config.data.seed, config.data.shuffle)


def with_old_figures(batch: TrainBatch, learner: Learner, config: Experiment) -> TrainBatch:
    """The batch with what policy, critic and reference say of it before the first update, as far as it is wanted."""
    budget = 2 * config.algorithm.micro_batch_tokens  # no activations are kept
    with learner.accelerator.autocast():
        return no_grad_pass(
            batch, learner.policy, learner.reference, config.sampling.temperature, budget, config.needs_old_logprobs
        )


def about_now(job: Job, start: Start, step: int, dashboard: Dashboard) -> About:
    """What a checkpoint after `step` steps says of itself."""
    settings, name = dataclasses.asdict(job.config), job.config.algorithm.section
    return About(step, job.stream.position, job.world.size, name, settings, start.origin, dashboard.wandb_id)


@contextmanager
def timed_step(dashboard: Dashboard, step: int, evaluated: dict[str, float]) -> Iterator[dict[str, float]]:
    """Collect a step's metrics and log them at its end, with the rates of the whole step.

    Args:
        evaluated: what an evaluation before the step has found.
    """
    metrics = dict(evaluated)
    start = time.perf_counter()
    yield metrics
    seconds = time.perf_counter() - start
    metrics["step/seconds"] = seconds
    metrics["step/generated_tokens_per_s"] = metrics["rollout/generated_tokens"] / seconds
    dashboard.log(step, metrics | memory_metrics())
