"""The policy in training, with or without a critic, and the frozen reference.

Layout of a batch, everywhere in this folder: rows are right-padded, prompt then response. The hidden state at a
position predicts the next token, so the first response token is predicted at the prompt's last position and the last
response token's own position predicts nothing that counts. "(tokens,)" counts the response tokens that the policy
sampled, not those that an environment gave, row after row: the order of `response_ids[response_mask]`.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainers.batching import TrainBatch
from trainers.config import LoraConfig
from trainers.logprobs import token_logprobs
from trainers.lora import add_adapters
from trainers.packing import pack_if_possible, packs, response_hidden_states


class PolicyOutput(NamedTuple):
    """What a forward pass gives for the sampled tokens of its rows; (tokens,) tensors, float32 or wider.

    Attributes:
        logprobs: of each response token, natural log, at the sampling temperature; None if not asked for.
        entropy: nats, of the distribution that the token was drawn from; None unless asked for.
        values: V(s_t), of the state before the token; None unless asked for.
    """

    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    values: torch.Tensor | None


class Policy(nn.Module):
    """A causal language model; with values, also a critic: a scalar head on the same hidden states or on its own trunk.

    One forward pass uses every parameter, through this module's own `forward`: DDP's hooks need that. Train with
    `values=True`, or DDP waits for the value head's gradient.

    The value head starts at zero. All values are then 0 before the first update, on all ranks alike, and the value
    loss does not move the trunk until the head has learned something. Its weights are float32, also under a bfloat16
    trunk: a return of 1 is learned in steps smaller than bfloat16 resolves.

    Args:
        language_model: any Hugging Face causal language model whose head is one matrix (see `require_plain_head`).
        with_values: True adds a value head.
        critic: the trunk of a model of its own, which the value head then reads; None reads the language model's.

    Attributes:
        language_model: the same; its `named_parameters()` are what the rollout engine takes over.
        critic: the same.
        value_head: Linear(hidden, 1), or None.
    """

    def __init__(
        self, language_model: PreTrainedModel, with_values: bool = False, critic: PreTrainedModel | None = None
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.critic = critic
        pack_if_possible(language_model)
        if critic is not None:
            pack_if_possible(critic)
        self.value_head: nn.Linear | None = None
        if with_values:
            trunk = critic or language_model
            width = trunk.config.get_text_config().hidden_size
            dtype = torch.promote_types(trunk.dtype, torch.float32)
            self.value_head = nn.Linear(width, 1, device=trunk.device, dtype=dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def packs(self) -> bool:
        """True if every pass goes without padding, and each prompt once; see `trainers.packing`."""
        return packs(self.language_model) and (self.critic is None or packs(self.critic))

    def critic_parameters(self) -> list[nn.Parameter]:
        """Of the value head and of its own trunk, if it has one; none without values."""
        modules = [module for module in (self.value_head, self.critic) if module is not None]
        return [parameter for module in modules for parameter in module.parameters()]

    def forward(
        self,
        rows: TrainBatch,
        temperature: float = 1.0,
        entropy: bool = False,
        logprobs: bool = True,
        values: bool = True,
    ) -> PolicyOutput:
        """Log-probs, entropies and values of the response tokens.

        Args:
            rows: of a micro-batch.
            temperature: of the sampling, divides the logits; 0 (greedy) counts as 1.
            entropy: True gives entropies; their gradient is exact.
            logprobs: False skips the head, the larger part of a small model; for passes without gradient.
            values: True gives values, where there is a value head.
        """
        wants_values = values and self.value_head is not None
        token_logprob = entropies = state_values = None
        if logprobs or (wants_values and self.critic is None):
            hidden = response_hidden_states(self.language_model, rows)
        if logprobs:
            head = self.language_model.get_output_embeddings().weight
            token_logprob, entropies = token_logprobs(hidden, head, rows.targets, temperature, entropy)
        if wants_values:
            if self.critic is not None:
                hidden = response_hidden_states(self.critic, rows)
            state_values = self._values(hidden)
        return PolicyOutput(token_logprob, entropies, state_values)

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.value_head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)


def load_policy(
    path: str,
    dtype: str | torch.dtype,
    gradient_checkpointing: bool = False,
    with_values: bool = False,
    critic_path: str | None = None,
    lora: LoraConfig | None = None,
) -> Policy:
    """A policy to train, on the CPU and in training mode, from a Hugging Face model.

    Args:
        path: local folder or hub name.
        dtype: of the weights, "float32" or "bfloat16" (or a torch dtype).
        gradient_checkpointing: True recomputes each layer in the backward pass: less memory, a forward pass more.
        with_values: True adds a value head,
        critic_path: and this a model of its own under it.
        lora: with a rank, adapters are trained in place of the language model's own parameters; not in the critic's.

    Raises:
        ValueError: if the model's logits are more than hidden states times one matrix, or adapters are wanted where
            no linear layer is.
    """
    language_model = _load_language_model(path, dtype)
    if lora is not None and lora.rank is not None:
        add_adapters(language_model, lora, path)
        language_model.eval()  # the dropout of the adapters too, until all is tried
    critic = _load(AutoModel, critic_path, dtype) if critic_path else None
    if gradient_checkpointing:
        for model in (language_model, critic):
            if model is not None:
                model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(language_model, with_values, critic).train()


def load_reference(path: str, dtype: str | torch.dtype) -> Policy:
    """The frozen reference of the KL penalty: no gradients, no value head, evaluation mode; arguments as `load_policy`.

    Raises:
        ValueError: if the model's logits are more than hidden states times one matrix.
    """
    return Policy(_load_language_model(path, dtype)).eval().requires_grad_(False)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Sets every dropout probability of a model's config to 0, in place.

    PPO compares log-probs of the same weights in two passes: with dropout the ratio of the first would not be 1, and
    the trainer's policy not the one that the engine sampled from.

    >>> from transformers import LlamaConfig
    >>> without_dropout(LlamaConfig(attention_dropout=0.1)).attention_dropout
    0.0
    """
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config


def require_plain_head(language_model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not its last hidden states times its head's weight.

    Heads with a bias, a scale or a soft cap (Phi, Cohere, Granite, Gemma 2) would train on wrong log-probs in silence.
    Four tokens through both ways tell, whatever the architecture calls its switches.

    Raises:
        ValueError: if the two ways disagree.
    """
    head = language_model.get_output_embeddings().weight
    input_ids = torch.arange(4, device=head.device)[None] % head.shape[0]
    with torch.no_grad():
        hidden = language_model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        ours = (hidden @ head.T).float()
        theirs = language_model(input_ids=input_ids, use_cache=False).logits.float()
    gap = (ours - theirs).abs().max().item()
    if not gap <= 1e-3 * theirs.abs().max().item():
        raise ValueError(
            f"the logits of {type(language_model).__name__} differ by up to {gap:.3g} from its hidden states times its "
            "head's weight: its head has a bias, a scale or a soft cap, which trainers/logprobs.py does not compute; "
            "give model.path a model whose head is one matrix (Llama, Qwen, Mistral, SmolLM)"
        )


def _load_language_model(path: str, dtype: str | torch.dtype) -> PreTrainedModel:
    model = _load(AutoModelForCausalLM, path, dtype)
    require_plain_head(model.eval())
    return model


def _load(kind: Any, path: str, dtype: str | torch.dtype) -> PreTrainedModel:
    # Said, not left to the default, which asks on the terminal whether the folder's own code may run.
    config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=False))
    return kind.from_pretrained(path, config=config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
