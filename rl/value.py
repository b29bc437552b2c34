"""One module holding the policy and its value model, with ONE function from token ids to log-probabilities and values.

Old, reference and new log-probabilities all come from :func:`completion_logprobs`, so that before the first step of
an update the ratio is exactly 1 and the KL exactly 0. Logits are made for the action tokens only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from deliberation.last_layer import last_feed_forward_at
from deliberation.types import InputError
from rl.inputs import ModelInputs, collate, collate_shared

VALUE_FOLDER = "value_model"
HEAD_FILE = "value_head.safetensors"
MAX_LOGITS = 2**26
"""Logits made at once: 256 MiB of fp32, and as much again for their log-softmax."""


class TokenOutputs(NamedTuple):
    """Per action token, fp32 ``[N]``: log-probability, state value, and entropy in nats (detached; None: not asked)."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor | None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (whose adapter layers stay injected), or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def backbone_of(model: nn.Module) -> nn.Module:
    """What makes hidden states: the model without its head, adapter layers inside."""
    return _unwrapped(model).base_model


def hidden_states(model: nn.Module, inputs: ModelInputs) -> Tensor:
    """The backbone's last hidden states ``[N, H]`` at the positions that predict the action tokens."""
    backbone, mask, extra = backbone_of(model), inputs.attention_mask, {}
    if mask is not None:
        mask = mask.to(backbone.dtype) if mask.is_floating_point() else mask
        extra = dict(attention_mask=mask, position_ids=inputs.position_ids)
    with last_feed_forward_at(backbone, inputs.source, inputs.input_ids.shape):
        states = backbone(input_ids=inputs.input_ids, use_cache=False, **extra).last_hidden_state
    return states.flatten(0, 1)[inputs.source]


def completion_logprobs(
    model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, most: int = 0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """fp32 log-probabilities ``[N]`` of ``targets`` under logits / temperature, and entropies where asked for.

    At most ``MAX_LOGITS`` logits are there at once: where the vocabulary is large, tokens go through in parts, and the
    backward pass makes the logits of each part again.

    Args:
        most: make as many parts as so many tokens need, some of them empty, if there are fewer.
    """
    head = _unwrapped(model).get_output_embeddings()
    rows = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    count = math.ceil(max(len(targets), most) / rows)
    if count <= 1:
        return _token_logprobs(head, hidden, targets, temperature, entropy)
    parts = [
        checkpoint(_token_logprobs, head, h, t, temperature, entropy, use_reentrant=False)
        for h, t in zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _token_logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logprobs = (head(hidden).float() / temperature).log_softmax(dim=-1)
    found = None
    if entropy:  # as large as the logits, so not for nothing
        with torch.no_grad():
            found = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), found


def check_logits(model: nn.Module) -> None:
    """Refuse a policy whose logits are not simply its output embeddings applied to its last hidden states.

    Raises:
        InputError: for instance for architectures that soft-cap or scale their logits.
    """
    base, training = _unwrapped(model), model.training
    ids = torch.arange(4, device=next(base.parameters()).device)[None] % base.config.vocab_size
    model.eval()  # dropout would make two forwards differ
    with torch.no_grad():
        direct = base.get_output_embeddings()(base.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        full = base(input_ids=ids, use_cache=False).logits
    model.train(training)
    if not torch.allclose(direct.float(), full.float(), rtol=1e-4, atol=1e-4):
        raise InputError(
            "model",
            base.config.model_type,
            "transforms its logits after the output embeddings, which "
            "PPOTrainer does not support; use a Llama, Qwen2.5 or Qwen3 model",
        )


@torch.no_grad()
def check_masks(model: nn.Module) -> None:
    """Refuse a model that reads something else in a row shared with others, through a mask, than in one of its own.

    Sampling and ``share_prefix`` rest on it.

    Raises:
        InputError: for layers that are not full attention, or positions that go by place and not by ``position_ids``.
    """
    base, training, attention = _unwrapped(model), model.training, model.config._attn_implementation
    mend = "is not full attention in every layer, with positions as given; use e.g. Qwen3, Qwen2.5 or Llama"
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "layer_types", None) is None
    local = any("local" in kind for kinds, _ in getattr(text, "attention_types", []) for kind in kinds)  # GPT-Neo
    if kinds != {"full_attention"} or sliding or local or base._is_stateful:
        raise InputError("model_name_or_path", base.config.name_or_path or text.model_type, mend)
    # A window shows in the config alone; the rest in what the model makes of a row
    device, vocabulary = next(base.parameters()).device, text.vocab_size
    prompt, completions = [1, 2, 3], [[k % vocabulary for k in range(4, 16)], [k % vocabulary for k in range(16, 21)]]
    model.eval()
    if attention not in ("sdpa", "eager"):  # flash kernels take no such mask, and sampling does without them too
        model.set_attn_implementation("sdpa")
    try:
        alone = hidden_states(model, collate([prompt] * 2, completions, 0, device=device))
        shared = hidden_states(model, collate_shared([prompt] * 2, completions, 0, device=device))
    except (TypeError, ValueError, RuntimeError) as error:  # whatever a model says that takes no such mask
        raise InputError("model_name_or_path", text.model_type, f"{mend} ({error})") from error
    finally:
        model.train(training)
        if attention not in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
    most = 1e-3 if alone.dtype == torch.float32 else 0.1
    known = bool(alone.isfinite().all())  # weights that are no numbers are another fault, told elsewhere
    if known and not (alone - shared).abs().max() <= most * alone.abs().max():
        raise InputError("model_name_or_path", text.model_type, mend)


class PolicyAndValue(nn.Module):
    """The policy with a value head on its own backbone, or with a separate value model.

    Args:
        policy: causal language model, plain or wrapped by PEFT.
        value_model: None for a head on the policy's backbone (weights 0, so that its first values are its bias), or
            a one-label sequence classifier that reads the policy's token ids; its ``score`` layer starts the head.

    Attributes:
        most_tokens: see ``most`` of :func:`completion_logprobs`. Under ZeRO-3 the action tokens a batch can have, as
            every process must call a layer equally often; else 0.
    """

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel | None = None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.most_tokens = 0
        if value_model is not None and not isinstance(getattr(value_model, "score", None), nn.Linear):
            mend = "has no layer `score`; use a causal sequence classifier with one label"
            raise InputError("value_model", type(value_model).__name__, mend)
        read_by = _unwrapped(policy).get_output_embeddings() if value_model is None else value_model.score
        self.value_head = nn.Linear(read_by.in_features, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if value_model is not None:
            with torch.no_grad():
                self.value_head.weight.copy_(value_model.score.weight)
            value_model.score.requires_grad_(False)  # the head has its weights; see save_value

    @property
    def config(self):
        return self.policy.config

    @property
    def generation_config(self):
        return self.policy.generation_config

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def activation_checkpointing_enable(self, **kwargs) -> None:
        for model in (self.policy, self.value_model):
            if model is not None:
                model.activation_checkpointing_enable(**kwargs)

    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters of the value model alone (not of a shared backbone)."""
        own = [] if self.value_model is None else list(self.value_model.parameters())
        return [p for p in [*own, *self.value_head.parameters()] if p.requires_grad]

    def forward(
        self, inputs: ModelInputs, temperature: float, value_only: bool = False, entropy: bool = False
    ) -> TokenOutputs:
        """Log-probabilities and values of the action tokens, and entropies where asked for; the temperature never
        touches the values.

        ``value_only`` cuts the gradient between the head and a shared backbone, and all of the policy's (critic
        warm-up: the actor must not move).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not value_only):
            hidden = hidden_states(self.policy, inputs)
            logprobs, entropies = completion_logprobs(
                self.policy, hidden, inputs.targets, temperature, self.most_tokens, entropy
            )
        critic = hidden if self.value_model is None else hidden_states(self.value_model, inputs)
        with torch.autocast(critic.device.type, enabled=False):  # bfloat16 knows steps of 0.03 at a value of 5
            values = self.value_head(critic.to(self.value_head.weight.dtype)).float().squeeze(-1)
        return TokenOutputs(logprobs, values, entropies)

    def save_value(self, folder: str | Path) -> None:
        """Write ``folder/value_model/``: the head; a separate model in its usual layout too, with the head as score."""
        target = Path(folder) / VALUE_FOLDER
        target.mkdir(parents=True, exist_ok=True)
        if self.value_model is not None:
            with torch.no_grad():
                self.value_model.score.weight.copy_(self.value_head.weight)
            self.value_model.save_pretrained(target)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.value_head.state_dict().items()}, target / HEAD_FILE
        )

    def load_value(self, folder: str | Path) -> None:
        """Read what :meth:`save_value` wrote.

        Raises:
            InputError: if the folder holds no value head.
        """
        target = Path(folder) / VALUE_FOLDER
        if not (target / HEAD_FILE).is_file():
            raise InputError("resume_from_checkpoint", str(folder), f"holds no {VALUE_FOLDER}/{HEAD_FILE}")
        self.value_head.load_state_dict(load_file(target / HEAD_FILE))
        if self.value_model is not None:
            loaded = type(self.value_model).from_pretrained(target, dtype=torch.float32, use_safetensors=True)
            self.value_model.load_state_dict(loaded.state_dict())
