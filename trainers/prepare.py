"""What is read before any weight: the tokenizer, the model's config and the prompts; mistakes in a config end here."""

from dataclasses import dataclass

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from trainers.checks import check_sizes
from trainers.config import EvaluateConfig, Experiment
from trainers.data import Example
from trainers.errors import ConfigError
from trainers.held_out import load_data, load_evaluation_prompts
from trainers.lora import check_target_modules
from trainers.rewards import check_answers


@dataclass(frozen=True)
class Prepared:
    """What was read.

    Attributes:
        training: all prompts to train on, in the order of the data; none for an evaluation by itself.
        evaluation: all prompts to evaluate on.
    """

    tokenizer: PreTrainedTokenizerBase
    training: list[Example]
    evaluation: list[Example]


def prepare(config: Experiment, world_size: int) -> Prepared:
    """Read tokenizer and prompts, and hold the config against them and against the model's own config.

    Args:
        world_size: ranks of the job, which a rollout.tensor_parallel_size of None means.

    Raises:
        ConfigError: if the model cannot be found or split, LoRA's layers are not there, or the data is at fault.
    """
    path = config.model.path
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such name, no network, a broken file
        raise ConfigError(
            f"model.path is {path!r}; its config or its tokenizer cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    check_sizes(config, model.to_dict(), world_size)
    check_target_modules(path, config.lora)
    alone = isinstance(config, EvaluateConfig)
    training, evaluation = ([], load_evaluation_prompts(config, tokenizer)) if alone else load_data(config, tokenizer)
    check_answers([example.answer for example in [*training, *evaluation]], config.reward)
    return Prepared(tokenizer, training, evaluation)
