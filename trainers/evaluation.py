"""Evaluation of the weights that the engine holds, on prompts that are not trained on: accuracy, avg@k, pass@k.

All ranks share the prompts and hold the same figures in the end. Nothing of the training is touched: no generator is
drawn from, and the engine's random streams are others than those of any training step.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from rollout import RolloutBatch, RolloutEngine, SamplingConfig
from trainers.config import EvaluationConfig
from trainers.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainers.dashboard import Dashboard
    from trainers.scoring import Scorer

EVAL_SAMPLES_FILE = "eval_samples.jsonl"
TABLE_ROWS = 64  # of an evaluation, in wandb; the file has all
EVALUATION_SEED = 2**62
"""Of the engine's streams; training takes the step's number. The same in each evaluation, so that two of them differ by
the weights alone."""

Score = Callable[[RolloutBatch, Sequence[Example]], np.ndarray]
"""Rewards of this rank's responses, (batch,) float, to this rank's prompts."""
Generate = Callable[[RolloutEngine, Sequence[Example], SamplingConfig, int], tuple[RolloutBatch, dict[str, float]]]
"""As `trainers.environment.Environment.generate`."""


@dataclass(frozen=True)
class Outcome:
    """What came of one prompt.

    Attributes:
        number: of the prompt in the list that all ranks were given.
        prompt: the user's message.
        answer: the right one.
        response: the greedy one, special tokens shown.
        score: the greedy response's reward.
        tokens: of the greedy response, the stop token included; those that the policy sampled.
        finished: False where a limit cut the greedy response.
        sampled_scores: rewards of the sampled responses, (n,); empty without samples.
    """

    number: int
    prompt: str
    answer: str
    response: str
    score: float
    tokens: int
    finished: bool
    sampled_scores: list[float] = field(default_factory=list)


def is_due(step: int, every: int | None, steps: int) -> bool:
    """Whether to evaluate after `step` updates: before the first step, every `every` of them, and after the last.

    >>> [step for step in range(8) if is_due(step, every=3, steps=7)]
    [0, 3, 6, 7]
    """
    return every is not None and (step % every == 0 or step == steps)


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    score: Score,
    tokenizer: "PreTrainedTokenizerBase",
    sampling: SamplingConfig,
    config: EvaluationConfig,
    generate: Generate | None = None,
) -> tuple[dict[str, float], list[Outcome]]:
    """Answer the prompts with the engine's weights; called by every rank.

    Args:
        examples: at least one; the same list on all ranks, of any length: rank r answers every world_size-th.
        score: of this rank's responses.
        sampling: limits and stop tokens of all responses; top_p and the like of the sampled ones. Its temperature and
            n are not used.
        generate: the engine's responses to examples, as `Environment.generate`; None: to their prompts, in one turn.

    Returns:
        The eval/* metrics (docs/metrics.md) and the outcome of each prompt, in order; the same on all ranks.
    """
    start = time.perf_counter()
    world = engine.world
    numbers = range(world.rank, len(examples), world.size)
    # A rank without a prompt answers the first one, unheard: a group of ranks without any would have nothing to run.
    mine = [examples[number] for number in numbers] or [examples[0]]

    def responses(sampling: SamplingConfig) -> RolloutBatch:
        if generate is None:
            return engine.generate([example.prompt_ids for example in mine], sampling, seed=EVALUATION_SEED)
        return generate(engine, mine, sampling, EVALUATION_SEED)[0]

    greedy_sampling = replace(sampling, temperature=0.0, n=1, top_p=1.0, top_k=0, min_p=0.0)
    greedy = responses(greedy_sampling)
    scores, sampled_scores = score(greedy, mine), np.zeros((len(mine), 0))
    if config.temperature:
        sampled_sampling = replace(sampling, temperature=config.temperature, n=config.n)
        sampled = responses(sampled_sampling)
        sampled_scores = score(sampled, mine).reshape(len(mine), config.n)
    texts = tokenizer.batch_decode([rollout.response_ids.tolist() for rollout in greedy])
    ours = [
        Outcome(
            number=number,
            prompt=example.text,
            answer=example.answer,
            response=texts[row],
            score=float(scores[row]),
            tokens=int(greedy.generated_lengths[row]),
            finished=bool(greedy.finished[row]),
            sampled_scores=sampled_scores[row].tolist(),
        )
        for row, (number, example) in enumerate(zip(numbers, mine, strict=False))
    ]
    everyones: list[Any] = [None] * world.size
    dist.all_gather_object(everyones, ours)
    outcomes = sorted((each for of_rank in everyones for each in of_rank), key=lambda each: each.number)
    return eval_metrics(outcomes, config) | {"eval/seconds": time.perf_counter() - start}, outcomes


def eval_metrics(outcomes: Sequence[Outcome], config: EvaluationConfig) -> dict[str, float]:
    """The eval/* metrics of all prompts; avg_at_k and pass_at_k only where there are samples.

    >>> one = Outcome(0, "?", "7", "7", score=1.0, tokens=2, finished=True, sampled_scores=[1.0, 0.0])
    >>> eval_metrics([one], EvaluationConfig(n=2, k=1))["eval/pass_at_k"]
    0.5
    """
    metrics = {
        "eval/accuracy": fmean(outcome.score >= config.right_at for outcome in outcomes),
        "eval/prompts": len(outcomes),
        "eval/response_tokens_mean": fmean(outcome.tokens for outcome in outcomes),
        "eval/truncated_fraction": fmean(not outcome.finished for outcome in outcomes),
    }
    if config.temperature:
        right = [sum(score >= config.right_at for score in outcome.sampled_scores) for outcome in outcomes]
        metrics["eval/avg_at_k"] = fmean(count / config.n for count in right)
        metrics["eval/pass_at_k"] = fmean(pass_at_k(config.n, count, config.k or config.n) for count in right)
    return metrics


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k responses is right, from n samples of which `right` are: unbiased.

        1 - C(n - right, k) / C(n, k)

    Chen et al. 2021, arXiv:2107.03374, eq. 1. The share of all sets of k of the n that hold a right one.

    >>> pass_at_k(4, 1, 2)  # of the 6 pairs, 3 hold it
    0.5
    """
    assert 0 <= right <= n and 1 <= k <= n
    return 1.0 - comb(n - right, k) / comb(n, k)


def write_outcomes(folder: Path, step: int, outcomes: Sequence[Outcome]) -> None:
    """Append all of an evaluation to RUN/eval_samples.jsonl, one JSON object a prompt; call it on rank 0 alone."""
    with (folder / EVAL_SAMPLES_FILE).open("a") as file:
        for outcome in outcomes:
            file.write(json.dumps({"step": step} | asdict(outcome), ensure_ascii=False) + "\n")


def evaluate_and_show(
    engine: RolloutEngine,
    examples: Sequence[Example],
    scorer: "Scorer",
    tokenizer: "PreTrainedTokenizerBase",
    sampling: SamplingConfig,
    config: EvaluationConfig,
    step: int,
    dashboard: "Dashboard",
    generate: Generate | None = None,
) -> dict[str, float]:
    """The eval/* metrics of the engine's weights, all ranks; rank 0 writes down what was said."""

    def total(rollouts: RolloutBatch, of: Sequence[Example]) -> np.ndarray:
        return scorer.score(rollouts, of).total

    metrics, outcomes = evaluate(engine, examples, total, tokenizer, sampling, config, generate)
    if engine.world.is_main:
        write_outcomes(dashboard.folder, step, outcomes)
        dashboard.log_table(step, "eval/samples", [asdict(outcome) for outcome in outcomes[:TABLE_ROWS]])
    return metrics
