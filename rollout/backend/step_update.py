"""What one step brought, as arrays: made from a model runner's output, or from vLLM's outputs for its clients."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput


@dataclass
class StepUpdate:
    """What one step brought.

    Attributes:
        request_ids: the sequences that got a token, in the scheduler's order; the same list object as in the last step
            while they are the same.
        token_ids: (k,) int32, their tokens.
        logprobs: (k,) float32, natural log, of those tokens; NaN where none was asked for.
        finished: (index into request_ids, int of vLLM's FinishReason) of the sequences that ended. One that ended
            without a token (an error in vLLM) is in `request_ids` too, with token -1 and log-prob NaN.
    """

    request_ids: list[str]
    token_ids: np.ndarray
    logprobs: np.ndarray
    finished: list[tuple[int, int]]


def brings_tokens_only(output: ModelRunnerOutput) -> bool:
    """True if the runner brought tokens and log-probs, one a row, and nothing else."""
    return (
        len(output.sampled_token_ids) == len(output.req_ids)
        and not output.prompt_logprobs_dict
        and not output.prompt_token_id_logprobs_dict
        and not output.pooler_output
        and not output.num_nans_in_logits
        and output.kv_connector_output is None
        and output.ec_connector_output is None
    )


def logprobs_of(logprobs: LogprobsLists | None, columns: np.ndarray) -> np.ndarray:
    """(k,) float32, of the sampled tokens of the runner's rows `columns`; NaN if there are none."""
    if logprobs is None:
        return np.full(len(columns), np.nan, np.float32)
    if logprobs.cu_num_generated_tokens is not None:
        columns = np.asarray(logprobs.cu_num_generated_tokens)[columns]
    return logprobs.logprobs[columns, 0].astype(np.float32)


def to_update(outputs: Iterable[EngineCoreOutputs]) -> StepUpdate:
    """vLLM's outputs as a StepUpdate: a walk over the sequences, for the steps that are not steady."""
    step = [output for each in outputs for output in each.outputs]
    token_ids = np.full(len(step), -1, np.int32)
    logprobs = np.full(len(step), np.nan, np.float32)
    finished = []
    for index, output in enumerate(step):
        assert len(output.new_token_ids) <= 1, "one token a step"
        if output.new_token_ids:
            token_ids[index] = output.new_token_ids[0]
            if output.new_logprobs is not None:
                logprobs[index] = output.new_logprobs.logprobs[0, 0]
        if output.finish_reason is not None:
            finished.append((index, int(output.finish_reason)))
    return StepUpdate([output.request_id for output in step], token_ids, logprobs, finished)
