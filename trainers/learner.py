"""What is trained, and one step's updates of it: minibatches of all ranks, micro-batches of each."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from rollout import beat, span
from trainers.across_ranks import max_over_ranks, sum_over_ranks, undo_ddp_mean, whole
from trainers.batching import TrainBatch, stand_in
from trainers.config import Experiment
from trainers.losses import Stats
from trainers.objective import Minibatch
from trainers.packing import microbatches
from trainers.policy import Policy, PolicyOutput, load_reference
from trainers.sharding import gradients_stay, is_sharded, passes, shard

Loss = Callable[[TrainBatch, PolicyOutput, Any, Minibatch], tuple[torch.Tensor, Stats]]
"""Of a micro-batch, the policy's output for it, the experiment and the minibatch that it is a part of: a scalar with
gradient, and statistics; both this micro-batch's part of a mean over the minibatch of all ranks."""


@dataclass
class Learner:
    """What is trained, and what trains it.

    Attributes:
        policy: without DDP's wrapper: for the weight sync, and for passes without gradient.
        ddp: the same as the accelerator prepared it, or, if it is sharded, itself: for passes with gradient.
        reference: the frozen first policy, sharded if the policy is; or the policy itself, whose adapters can be
            switched off; None without a KL penalty.
    """

    accelerator: Accelerator
    policy: Policy
    ddp: torch.nn.Module
    optimizer: torch.optim.Optimizer
    reference: Policy | None


def make_learner(config: Experiment, policy: Policy, device: torch.device) -> Learner:
    """Policy, reference and optimizer, on this rank's device and under accelerate; as model.sharding says."""
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=config.model.autocast,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    sharded = config.model.sharding == "fsdp2"
    if sharded:
        shard(policy, device, config.model.autocast)
    optimizer = make_optimizer(config, policy)
    if sharded:
        ddp, optimizer = policy, accelerator.prepare(optimizer)
    else:
        ddp, optimizer = accelerator.prepare(policy, optimizer)
    return Learner(accelerator, policy, ddp, optimizer, make_reference(config, policy, device))


def make_reference(config: Experiment, policy: Policy, device: torch.device) -> Policy | None:
    """What the KL penalty compares with, as `Learner` has it."""
    if not config.algorithm.kl_coef:
        return None
    if config.lora.rank is not None:
        return policy
    reference = load_reference(config.model.path, config.model.dtype)
    if config.model.sharding == "fsdp2":
        shard(reference, device, config.model.autocast)
        return reference
    return reference.to(device=device)


def make_optimizer(config: Experiment, policy: Policy) -> torch.optim.Optimizer:
    """AdamW over what is trained of the policy, as it is by now, and over the critic at its own rate."""
    trained = [parameter for parameter in policy.language_model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": config.optimizer.learning_rate}]
    if of_critic := policy.critic_parameters():
        value_learning_rate = config.optimizer.value_learning_rate
        if value_learning_rate is None:
            value_learning_rate = config.optimizer.learning_rate
        groups.append({"params": of_critic, "lr": value_learning_rate})
    optimizer = torch.optim.AdamW(
        groups,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        fused=True,  # one pass over the memory; on the CPU too
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def optimize(batch: TrainBatch, learner: Learner, loss: Loss, config: Any, step: int) -> dict[str, float]:
    """All updates of one step; returns the train/* metrics, means over its minibatches, all ranks.

    Args:
        batch: this rank's, with targets.
        loss: of a micro-batch; see `Loss`.
        step: counted from 0: sets the learning rate, and seeds the order of the responses.
    """
    warm_up(learner.optimizer, step, config.optimizer.warmup_steps)
    hyper = config.algorithm
    start = time.perf_counter()
    num_tokens = int(sum_over_ranks(batch.lengths.sum()).item()) * hyper.epochs
    minibatches = batch.minibatches(hyper.minibatches, hyper.epochs, step)
    updates = []
    for minibatch in minibatches:
        with span("update", responses=len(minibatch)):
            if stats := update(minibatch, learner, loss, config):
                updates.append(stats)
    seconds = time.perf_counter() - start
    means = {f"train/{name}": sum(stats[name] for stats in updates) / len(updates) for name in updates[0]}
    before_any_update = {f"train/{name}": value for name, value in updates[0].items() if name.startswith("logprob_gap")}
    return means | before_any_update | {"train/tokens_per_s": num_tokens / seconds}


def update(minibatch: TrainBatch, learner: Learner, loss: Loss, config: Any) -> dict[str, float]:
    """One optimizer update on the minibatch of all ranks, in as many micro-batches as this rank needs.

    A rank without rows takes part in all collectives and adds nothing. Of a sharded policy every pass is one: a rank
    that is through makes the others' passes with them. Without rows on any rank nothing is done.

    Returns:
        The statistics of all ranks; none if nothing was done.

    Raises:
        FloatingPointError: if the gradient is not finite: the policy would be lost. (Half precision skips such updates
            by itself.)
    """
    num_tokens, num_sequences = sum_over_ranks(
        torch.stack([minibatch.response_mask.sum(), minibatch.response_lengths.new_tensor(len(minibatch))])
    ).tolist()
    if not num_tokens:
        return {}
    totals = Minibatch(num_tokens, num_sequences, config.sampling.max_tokens)
    stats: dict[str, torch.Tensor] = {}
    parts = microbatches(minibatch, config.algorithm.micro_batch_tokens, learner.policy.packs)
    device = minibatch.input_ids.device
    todo = passes(parts, learner.policy, device) or [None]  # without rows, one pass for the others' sake
    for number, rows in enumerate(todo, 1):
        part = stand_in(device) if rows is None else minibatch.select(rows)
        with gradients_travel(learner, config, is_last=number == len(todo)):
            with span("forward", responses=len(part)), learner.accelerator.autocast():
                output = learner.ddp(part, config.sampling.temperature, entropy=True)
            part_loss, part_stats = loss(part, output, config, totals)
            if rows is None:
                # Not the loss times 0: it may be infinite, since the row is nobody's.
                part_loss = 0.0 * sum(each.sum() for each in (output.logprobs, output.values) if each is not None)
                part_stats = {name: torch.zeros_like(value) for name, value in part_stats.items()}
            with span("backward"):
                learner.accelerator.backward(undo_ddp_mean(part_loss))
            beat()
        add_up(stats, part_stats | {"loss": part_loss.detach()})
    with span("clip"):
        stats |= clip_gradients(learner, config)
    with span("optimizer"):
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    with span("sum statistics"):
        return over_ranks(stats)


def gradients_travel(learner: Learner, config: Experiment, is_last: bool) -> AbstractContextManager[None]:
    """Inside, gradients are reduced over the ranks with the last pass alone, which takes those before it along; or, of
    a sharded policy and by default, with each pass, so that no rank has to hold all of them.
    """
    if is_last:
        return nullcontext()
    if not is_sharded(learner.policy):
        return learner.accelerator.no_sync(learner.ddp)
    return gradients_stay(learner.policy) if config.model.reduce_gradients == "update" else nullcontext()


def add_up(stats: Stats, part: Stats) -> None:
    """Take a micro-batch's statistics in: sums, and maxima of those whose name says so."""
    for name, value in part.items():
        if name not in stats:
            stats[name] = value
        else:
            stats[name] = torch.maximum(stats[name], value) if name.endswith("_max") else stats[name] + value


def over_ranks(stats: Stats) -> dict[str, float]:
    """The same over all ranks; norms are the same on each and stay."""
    found = {name: value.item() for name, value in stats.items() if name.endswith("_norm")}
    for ending, reduce in (("_max", max_over_ranks), ("", sum_over_ranks)):
        names = [name for name in stats if name not in found and name.endswith(ending)]
        if names:
            found |= dict(zip(names, reduce(torch.stack([stats[name] for name in names])).tolist(), strict=True))
    return found


def clip_gradients(learner: Learner, config: Experiment) -> Stats:
    """Scale the gradient down to optimizer.max_grad_norm, that of a critic with its own trunk by itself.

    Returns:
        grad_norm, and value_grad_norm of such a critic, before it.

    Raises:
        FloatingPointError: if one is not finite.
    """
    policy, limit = learner.policy, config.optimizer.max_grad_norm
    parameters = list(policy.parameters() if policy.critic is None else policy.language_model.parameters())
    norms = {"grad_norm": whole(learner.accelerator.clip_grad_norm_(parameters, limit))}
    if policy.critic is not None:  # unscaled already, with the policy's: they share an optimizer
        norms["value_grad_norm"] = whole(torch.nn.utils.clip_grad_norm_(policy.critic_parameters(), limit))
    for name, norm in norms.items():
        if not torch.isfinite(norm) and config.model.autocast != "fp16":
            raise FloatingPointError(
                f"train/{name} is {norm.item()}: the gradient is not finite; look at the last samples, and start again "
                "from a checkpoint with a lower optimizer.learning_rate"
            )
    return norms


def warm_up(optimizer: torch.optim.Optimizer, step: int, warmup_steps: int) -> None:
    """Set each group's learning rate: a linear rise over `warmup_steps` steps, then constant."""
    share = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
