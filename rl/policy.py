"""The policy: load it, sample statements from it, and its log-probabilities."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deliberation.kernels import share_heads
from deliberation.types import InputError, is_hub_name
from embedded import resolve
from rl.sampling import Sample, sample
from rl.value import check_masks

__all__ = [
    "Sample",
    "check_model_keys",
    "check_policy",
    "load_from_keys",
    "load_policy",
    "resolve_attention",
    "sample",
    "sequence_logprobs",
]

logger = logging.getLogger(__name__)


def resolve_attention(attn: str | None, device: str | torch.device) -> str:
    """``attn`` as given, or flash_attention_2 where CUDA and the package are both there, else sdpa; logged."""
    if attn is None:
        on_cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
        has_flash = importlib.util.find_spec("flash_attn") is not None
        attn = "flash_attention_2" if on_cuda and has_flash else "sdpa"
    logger.info("attention: %s", attn)
    return attn


def _check_folder(path: str) -> None:
    """A local folder must exist and hold safetensors; names of hub models pass."""
    folder = Path(path)
    if not folder.is_dir():
        if not is_hub_name(path):
            raise InputError("model_name_or_path", path, "no such folder; give one, or a hub name owner/model")
        return
    if not any(folder.glob("*.safetensors")):
        mend = "holds no *.safetensors; save the model with save_pretrained (pickled weights are not read)"
        raise InputError("model_name_or_path", path, mend)


def load_policy(
    model_name_or_path: str,
    *,
    device: str | torch.device,
    attn: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a policy (full model or PEFT adapter, folder, hub name or ``embedded/...``), in eval mode.

    Args:
        attn: attention implementation; None chooses (see ``resolve_attention``).
        dtype: of the weights; None is float32 on CPU and the checkpoint's own elsewhere.
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: on a folder without safetensors, or a model that is not full attention.
    """
    share_heads(torch.cuda.is_available())
    path = resolve(model_name_or_path)
    _check_folder(path)
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    base = resolve(PeftConfig.from_pretrained(path).base_model_name_or_path) if is_adapter else path
    if is_adapter:
        _check_folder(base)
    if Path(base).is_dir():  # an adapter trained on it keeps this path, and must find it from any working directory
        base = str(Path(base).resolve())
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        attn_implementation=resolve_attention(attn, device),
        use_safetensors=True,
        trust_remote_code=False,
        revision=revision or "main",
    )
    check_masks(model)
    if is_adapter:
        model = PeftModel.from_pretrained(model, path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(
        path if (Path(path) / "tokenizer_config.json").is_file() else base, revision=revision or "main"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # only ever fills space: masks come from lengths
    return model.to(device).eval(), tokenizer


def check_policy(model_name_or_path: str | None) -> None:
    """Raise InputError unless it is a folder with safetensors, ``embedded/...`` or may be a hub name."""
    if not model_name_or_path:
        raise InputError("model_name_or_path", model_name_or_path, "give a folder, a hub name or embedded/writer")
    _check_folder(resolve(model_name_or_path))


def load_from_keys(config: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """The policy and tokenizer that the ``trl.ModelConfig`` keys of ``config`` name, on the trainer's device."""
    check_policy(config.model_name_or_path)
    return load_policy(
        config.model_name_or_path,
        device=config.device,
        attn=config.attn_implementation,
        dtype=config.dtype,
        revision=config.model_revision,
    )


def check_model_keys(config: Any, also_resumes: tuple[str, ...] = ()) -> None:
    """Refuse keys that cannot be carried out; one LoRA target module is a name, not a regex.

    Args:
        also_resumes: values of ``resume_from_checkpoint`` that are no folders.

    ``ModelConfig`` turns a list of one module into a string, which PEFT reads as a pattern for whole paths.

    Raises:
        InputError: naming the key.
    """
    for key in ("load_in_8bit", "load_in_4bit"):
        if getattr(config, key):
            raise InputError(key, True, "quantised weights are not supported; use LoRA (use_peft) on bfloat16 weights")
    if isinstance(config.lora_target_modules, str) and config.lora_target_modules.isidentifier():
        config.lora_target_modules = [config.lora_target_modules]
    checkpoint = config.resume_from_checkpoint
    if checkpoint not in (None, *also_resumes) and not Path(checkpoint).is_dir():
        raise InputError("resume_from_checkpoint", checkpoint, "no such folder; give one like runs/NAME/checkpoint-100")


def sequence_logprobs(
    model: PreTrainedModel | PeftModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    temperature: float = 1.0,
) -> list[Tensor]:
    """Log-probability of every completion token, in float32, with gradient where grad mode is on.

    Prompts are padded on the left and completions on the right, so that all completions start in one column and
    logits are made for completions only. Masks and positions come from the lengths, never from token ids.

    Args:
        prompt_ids, completion_ids: one list of token ids a row; no prompt is empty.
        temperature: divides the logits, as in sampling.

    Returns:
        One tensor [completion length] a row.
    """
    longest = max(len(p) for p in prompt_ids)
    width = max(len(c) for c in completion_ids)
    ids = torch.zeros(len(prompt_ids), longest + width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        first, end = longest - len(prompt), longest + len(completion)
        ids[row, first:end] = torch.tensor([*prompt, *completion], dtype=torch.long)
        mask[row, first:end] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    ids, mask, positions = (x.to(model.device) for x in (ids, mask, positions))
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=width + 1
    ).logits[:, :-1]
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = logprobs.gather(-1, ids[:, longest:, None]).squeeze(-1)
    return [chosen[row, : len(completion)] for row, completion in enumerate(completion_ids)]
