"""A step of dynamic sampling whose groups all come from one rank's prompts: `[torchrun] ... OUTPUT_FOLDER`.

The scores are given; sharing out, advantages and updates are the real ones. One round has been
generated; how many groups have signal is the case's.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from rollout import init_world
from tests.distributed.data_parallel_gradient_worker import MAX_TOKENS, SCORES, TEMPERATURE, rollouts, tiny_llama
from trainers import grpo
from trainers.balance import join, share_evenly
from trainers.batching import make_batch, no_rows
from trainers.config import GRPOConfig, OptimizerConfig, SamplingConfig
from trainers.dynamic_sampling import Round, kept_groups
from trainers.hyperparameters import GRPOHyperparameters
from trainers.learner import Learner, optimize
from trainers.no_grad_pass import no_grad_pass
from trainers.policy import Policy
from trainers.scoring import Scores

CASES = {"one group": 1, "three groups": 3, "none": 0}
WANTED = 2


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    found = {case: step(groups, accelerator) for case, groups in CASES.items()}
    torch.save(found, folder / f"rank{accelerator.process_index}of{accelerator.num_processes}.pt")
    accelerator.free_memory()
    dist.barrier()
    dist.destroy_process_group()


def step(with_signal: int, accelerator: Accelerator) -> dict:
    sampling = SamplingConfig(n=2, max_tokens=MAX_TOKENS, temperature=TEMPERATURE)
    hyper = GRPOHyperparameters(filter_groups=True, minibatches=3, epochs=2, kl_coef=0.1, prompts_per_step=WANTED)
    config = GRPOConfig(sampling=sampling, grpo=hyper, optimizer=OptimizerConfig(max_grad_norm=1e9))
    kept, metrics = kept_groups(rounds(with_signal), WANTED)
    groups, _ = share_evenly(kept)
    batch = make_batch(*join(groups), "cpu") if groups else no_rows("cpu")
    policy = Policy(tiny_llama(seed=0))
    batch = no_grad_pass(batch, policy, Policy(tiny_llama(seed=1)), TEMPERATURE, 64, hyper.needs_old_logprobs)
    batch = grpo.targets(batch, config)
    ddp, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.01))
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.01
    learner = Learner(accelerator, policy, ddp, optimizer, reference=None)
    if metrics["rollout/trained_groups"]:
        metrics |= optimize(batch, learner, grpo.loss, config, step=0)
    weights = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    return {"metrics": metrics, "weights": weights, "groups": len(groups), "rows": len(batch)}


def rounds(with_signal: int) -> list[Round]:
    """Four prompts of two responses, the first `with_signal` of them with signal; all of them the first rank's."""
    world = init_world()
    of_rows = rollouts(slice(None))
    batch = replace(of_rows, prompt_index=(torch.arange(len(SCORES)) // 2).int().numpy())
    totals = torch.tensor([[0.0, 1.0 + p] if p < with_signal else [1.0, 1.0] for p in range(4)]).flatten().numpy()
    if world.rank:
        totals = totals * 0
    return [Round([None] * 4, batch, Scores(totals, {}, totals > 9))]  # type: ignore[list-item]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
