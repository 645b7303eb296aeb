"""Proximal policy optimisation of a language model on its own rollouts (Schulman et al. 2017, arXiv:1707.06347).

Trainer and rollout engine live in the same ranks: `torchrun --nproc_per_node=2 scripts/ppo.py configs/x.yaml`. To the
trainer the ranks are data-parallel; to the engine they are tensor-parallel.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rollout import RolloutBatch, RolloutEngine, Watch, World, beat, init_world, merge_groups, watched
from trainers.across_ranks import count_over_ranks, max_over_ranks, sum_over_ranks, undo_ddp_mean
from trainers.advantages import gae, token_rewards, whiten
from trainers.batching import TrainBatch, make_batch, unpack
from trainers.cli import dump
from trainers.config import PPOConfig
from trainers.dashboard import Dashboard, memory_metrics
from trainers.data import Example, PromptStream, load_prompts
from trainers.evaluate import evaluate
from trainers.losses import entropy_bonus, ppo_policy_loss, value_loss
from trainers.plots import plot_run
from trainers.policy import PolicyWithValue, load_policy, load_reference
from trainers.rewards import check_answers, score
from trainers.run_folder import create_run_folder

SAMPLES_FILE = "samples.jsonl"
SAMPLES_A_STEP = 4


@dataclass
class Learner:
    """What is trained, and what trains it.

    Attributes:
        policy: without DDP's wrapper: for the weight sync, and for passes without gradient.
        ddp: the same as the accelerator prepared it: for passes with gradient.
        reference: the frozen first policy; None without a KL penalty.
    """

    accelerator: Accelerator
    policy: PolicyWithValue
    ddp: torch.nn.Module
    optimizer: torch.optim.Optimizer
    reference: PreTrainedModel | None


def train(config: PPOConfig) -> Path:
    """Run the experiment; called by every rank.

    Returns:
        The run's folder: config, environment, metrics, samples, plots and the trained policy.

    Raises:
        ConfigError: if the data or a setting is at fault; found before the model is loaded.
    """
    disable_progress_bar()
    world = init_world()
    set_seed(config.run.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False)
    stream = prompt_stream(config, tokenizer, world)
    folder = agreed_run_folder(config, world)
    with watched(folder, config.rollout.stall_timeout_s) as watch:
        learn(config, world, stream, tokenizer, folder, watch)
    # DDP and the engine are gone by now: a process group that loses its last user only later can hang its threads.
    dist.barrier()
    dist.destroy_process_group()
    return folder


def learn(
    config: PPOConfig,
    world: World,
    stream: PromptStream,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    watch: Watch,
) -> None:
    """All steps of the run: generate, score, evaluate, update."""
    if world.is_main and config.run.progress:
        compiling = "" if config.rollout.enforce_eager else "; compiling takes a minute or two where no cache has it"
        print(f"{folder}: starting the engine{compiling}", file=sys.stderr, flush=True)
    with (
        RolloutEngine(config.model.path, config.rollout) as engine,
        Dashboard(folder, config.wandb, config.run, config.ppo.steps, world.is_main) as dashboard,
    ):

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with dashboard.phase(name), watch.busy(f"in phase {name}"):
                yield

        learner = make_learner(config, world)
        for step in range(config.ppo.steps):
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
                    batch = with_targets(make_batch(rollouts, scores, world.device), learner, config)
                    metrics |= reward_metrics(batch) | logprob_gap(batch)
                with phase("optimize"):
                    metrics |= optimize(batch, learner, config, seed=step)
            if world.is_main:
                write_samples(folder, step, examples, rollouts, scores.tolist(), tokenizer)
        if world.is_main:
            save_policy(folder, learner.policy, tokenizer, config)
            plot_run(folder)


def prompt_stream(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> PromptStream:
    """This rank's share of the prompts, every one of them checked against the engine's limits and the reward's."""
    examples = load_prompts(config.data, tokenizer, config.max_prompt_tokens)
    check_answers([example.answer for example in examples], config.reward)
    per_rank = config.ppo.prompts_per_step // world.size
    return PromptStream(examples, per_rank, world.rank, world.size, config.data.seed, config.data.shuffle)


def make_learner(config: PPOConfig, world: World) -> Learner:
    """Policy, reference and optimizer, on this rank's device and under accelerate."""
    accelerator = Accelerator(
        cpu=world.device.type == "cpu",
        mixed_precision=config.model.autocast,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    policy = load_policy(config.model.path, config.model.dtype, config.model.gradient_checkpointing)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.language_model.parameters()), "lr": config.optimizer.learning_rate},
            {
                "params": list(policy.value_head.parameters()),
                "lr": config.optimizer.value_learning_rate or config.optimizer.learning_rate,
            },
        ],
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        fused=True,  # one pass over the memory; on the CPU too
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    ddp, optimizer = accelerator.prepare(policy, optimizer)
    reference = None
    if config.ppo.kl_coef:
        reference = load_reference(config.model.path, config.model.dtype)
        reference.to(device=world.device)  # type: ignore[call-arg]
    return Learner(accelerator, policy, ddp, optimizer, reference)


def with_targets(batch: TrainBatch, learner: Learner, config: PPOConfig) -> TrainBatch:
    """The batch with what the policy says of it now, and what it shall learn from it."""
    with learner.accelerator.autocast():
        batch = evaluate(
            batch, learner.policy, learner.reference, config.sampling.temperature, 2 * config.ppo.micro_batch_tokens
        )
    assert batch.logprobs is not None and batch.values is not None
    rewards = token_rewards(batch.scores, batch.logprobs, batch.ref_logprobs, batch.response_mask, config.ppo.kl_coef)
    advantages, returns = gae(rewards, batch.values, batch.response_mask, config.ppo.gamma, config.ppo.lam)
    if config.ppo.whiten_advantages:
        advantages = whiten(advantages, batch.response_mask)
    return batch.with_targets(advantages, returns)


def optimize(batch: TrainBatch, learner: Learner, config: PPOConfig, seed: int) -> dict[str, float]:
    """All updates of one step; returns the train/* metrics, means over its minibatches, all ranks."""
    warm_up(learner.optimizer, seed, config.optimizer.warmup_steps)
    start = time.perf_counter()
    num_tokens = int(sum_over_ranks(batch.lengths.sum()).item()) * config.ppo.epochs
    updates = [
        ppo_update(minibatch, learner, config)
        for minibatch in batch.minibatches(config.ppo.minibatches, config.ppo.epochs, seed)
    ]
    seconds = time.perf_counter() - start
    means = {f"train/{name}": sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return means | {"train/tokens_per_s": num_tokens / seconds}


def ppo_update(minibatch: TrainBatch, learner: Learner, config: PPOConfig) -> dict[str, float]:
    """One optimizer update on the minibatch of all ranks, in as many micro-batches as this rank needs.

    Raises:
        FloatingPointError: if the gradient is not finite: the policy would be lost. (Half precision skips such updates
            by itself.)
    """
    num_tokens = count_over_ranks(minibatch.response_mask)
    stats: dict[str, torch.Tensor] = {}
    parts = minibatch.microbatches(config.ppo.micro_batch_tokens)
    for part in parts:
        # Gradients travel between ranks once, with the last part.
        with nullcontext() if part is parts[-1] else learner.accelerator.no_sync(learner.ddp):
            loss, part_stats = ppo_loss(part, learner.ddp, config, num_tokens)
            learner.accelerator.backward(undo_ddp_mean(loss))
            beat()
        stats = {name: stats.get(name, 0.0) + value for name, value in part_stats.items()}
    grad_norm = learner.accelerator.clip_grad_norm_(learner.ddp.parameters(), config.optimizer.max_grad_norm)
    if not torch.isfinite(grad_norm) and config.model.autocast != "fp16":
        raise FloatingPointError(
            f"the gradient's norm is {grad_norm.item()}; lower optimizer.learning_rate, or look at the last samples"
        )
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    totals = sum_over_ranks(torch.stack(list(stats.values())))
    return dict(zip(stats, totals.tolist(), strict=True)) | {"grad_norm": grad_norm.item()}


def ppo_loss(
    part: TrainBatch, ddp: torch.nn.Module, config: PPOConfig, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy, value and entropy loss of a micro-batch: its part of the mean over the minibatch's `num_tokens`."""
    mask, ppo = part.response_mask, config.ppo
    assert part.logprobs is not None and part.values is not None
    assert part.advantages is not None and part.returns is not None
    output = ddp(part.input_ids, part.predicts_response, part.targets, config.sampling.temperature, entropy=True)
    policy_loss, stats = ppo_policy_loss(
        unpack(output.logprobs, mask), part.logprobs, part.advantages, mask, ppo.clip_range, num_tokens
    )
    critic_loss, critic_stats = value_loss(
        unpack(output.values, mask), part.values, part.returns, mask, ppo.value_clip_range, num_tokens
    )
    entropy = output.entropy if ppo.entropy_coef else output.entropy.detach()  # no gradient for what is only logged
    bonus, entropy_stats = entropy_bonus(unpack(entropy, mask), mask, num_tokens)
    loss = policy_loss + ppo.value_coef * critic_loss - ppo.entropy_coef * bonus
    return loss, {"loss": loss.detach()} | stats | critic_stats | entropy_stats


def warm_up(optimizer: torch.optim.Optimizer, step: int, warmup_steps: int) -> None:
    """Set each group's learning rate: a linear rise over `warmup_steps` steps, then constant."""
    share = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def reward_metrics(batch: TrainBatch) -> dict[str, float]:
    """Mean and standard deviation of the responses' scores, all ranks."""
    scores = batch.scores.double()
    count, total, squares = sum_over_ranks(
        torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()])
    ).tolist()
    mean = total / count
    return {"reward/mean": mean, "reward/std": max(squares / count - mean**2, 0.0) ** 0.5}


def logprob_gap(batch: TrainBatch) -> dict[str, float]:
    """|engine's log-prob - trainer's| of the same tokens under the same weights: mean and maximum, all ranks."""
    assert batch.logprobs is not None
    gap = (batch.engine_logprobs - batch.logprobs).abs()[batch.response_mask].double()
    total, count = sum_over_ranks(torch.stack([gap.sum(), torch.ones_like(gap).sum()])).tolist()
    return {"train/logprob_gap_mean": total / count, "train/logprob_gap_max": max_over_ranks(gap.max()).item()}


def rollout_metrics(engine: RolloutEngine) -> dict[str, float]:
    """The rollout/* metrics of the whole job: each tensor-parallel group counted once."""
    everyones: list = [None] * engine.world.size
    dist.all_gather_object(everyones, engine.metrics)
    return merge_groups(everyones[:: engine.tensor_parallel_size])


def agreed_run_folder(config: PPOConfig, world: World) -> Path:
    """The run's folder, made by the main rank and known to all."""
    folder = [create_run_folder(config.run, "ppo", dump(config)) if world.is_main else None]
    dist.broadcast_object_list(folder, src=0)
    assert folder[0] is not None
    return folder[0]


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


def save_policy(folder: Path, policy: PolicyWithValue, tokenizer: PreTrainedTokenizerBase, config: PPOConfig) -> None:
    """Write the trained language model, in the engine's dtype, as a folder that transformers and vLLM load."""
    dtype = getattr(torch, config.rollout.dtype)
    state = {name: tensor.to(dtype) for name, tensor in policy.language_model.state_dict().items()}
    policy.language_model.save_pretrained(folder / "policy", state_dict=state)
    tokenizer.save_pretrained(folder / "policy")
