"""The preference model: a sequence classifier that reads one opinion and one statement, and its calibration.

On disk it is what transformers writes (``AutoModelForSequenceClassification``, one label, safetensors), so TRL and
vLLM load it without this code; beside it ``calibration.json`` turns the scalar score into P(rating = k), k = 1..7, and
the folder ``bi_encoder``, where there is one, holds what is added to that score.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deliberation.kernels import share_heads
from deliberation.prompts import preference_prefix, preference_suffix
from deliberation.tokens import plain_ids
from deliberation.types import InputError
from reward import bi_encoder
from reward.bi_encoder import BiEncoder
from reward.calibration import Calibration
from reward.heads import head_of, is_encoder, read_heads, room_of, write_heads
from reward.probe import check_reading
from reward.uncertainty import Uncertainty

CALIBRATION_FILE = "calibration.json"
CONFIG_FILE = "config.json"
ENSEMBLE_FILE = "ensemble.safetensors"
WEIGHTS = "*.safetensors"

PAIR, PREFIX = "pair", "prefix"
"""What an encoder's prefix attends to: the whole text pair, or itself alone."""


@dataclass
class PreferenceModel:
    """A sequence classifier with one label, its tokenizer, its calibration, and what is known about it.

    Attributes:
        model: gives the score, read at the last real token of prefix + suffix.
        tokenizer: its tokenizer; prefix and suffix are tokenised apart, in training and in scoring alike.
        calibration: score -> distribution of the rating.
        metadata: JSON-able facts (data, measures, seed ...).
        ensemble: linear heads [heads, hidden] whose mean is the model's own head; None: a single model.
        uncertainty: the ensemble's scores -> standard deviation of a utility.
        attention: of an encoder: ``pair`` (the tokenizer's text pair, nothing shared), or ``prefix`` (the prefix does
            not see the statement and is shared; see ``reward.prefixes``). Causal models share in either case.
        bi_encoder: its score is added to the model's; None: the model's is all.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    metadata: dict[str, Any] = field(default_factory=dict)
    ensemble: nn.Linear | None = None
    uncertainty: Uncertainty | None = None
    attention: str = PAIR
    bi_encoder: BiEncoder | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    """Held while rows are scored: neither an encoder's hook nor a prefix cache is made for two threads."""

    def __post_init__(self) -> None:
        share_heads(torch.cuda.is_available())

    @property
    def version(self) -> str:
        """Print of the weights and numbers that make a score, a utility and its standard deviation."""
        beside = self.bi_encoder
        parts = {"model": self.model, "ensemble": self.ensemble}
        parts |= {} if beside is None else {"encoder": beside.encoder, "networks": beside.networks}
        print_of = {
            "weights": fingerprint(nn.ModuleDict({name: part for name, part in parts.items() if part is not None})),
            "calibration": self.calibration.to_dict(),
            "shares_prefixes": self.shares_prefixes,
            "uncertainty": None if self.uncertainty is None or self.ensemble is None else asdict(self.uncertainty),
        }
        return _short_print(hashlib.sha256(json.dumps(print_of, sort_keys=True).encode()))

    @property
    def shares_prefixes(self) -> bool:
        """Whether a member's prefix runs once for all statements."""
        return not is_encoder(self.model) or self.attention == PREFIX

    @property
    def room(self) -> int:
        """Tokens the model reads at most, prefix and suffix together."""
        return room_of(self.model, self.tokenizer)

    @property
    def reads_types(self) -> bool:
        """Whether the model tells prefix and suffix apart by token types (BERT)."""
        return is_encoder(self.model) and "token_type_ids" in self.tokenizer.model_input_names

    def prefix_ids(self, question: str, opinion: str) -> list[int]:
        """Token ids of what a member's candidates share; carries the tokenizer's special tokens."""
        return plain_ids(self.tokenizer, preference_prefix(question, opinion))

    def suffix_ids(self, statement: str) -> list[int]:
        """Token ids of one candidate; at least one. An encoder's prefix and suffix are the tokenizer's text pair."""
        text = preference_suffix(statement)
        if not is_encoder(self.model):
            return plain_ids(self.tokenizer, text, add_special_tokens=False)
        return plain_ids(self.tokenizer, "", text)[len(plain_ids(self.tokenizer, "")) :]

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PreferenceModel:
        """Load a folder that ``save`` wrote: float32 on CPU, the saved precision elsewhere. No code is trusted.

        Raises:
            InputError: field ``preference_model``; see ``check_folder`` and ``check_reading``.
        """
        calibration, metadata = check_folder(path)
        folder = Path(path)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32 if torch.device(device).type == "cpu" else "auto",
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded = cls(model.to(device).eval(), tokenizer, calibration, metadata)
        document = json.loads((folder / CALIBRATION_FILE).read_text())
        loaded.attention = attention_of(folder)
        check_reading(loaded.model, loaded.shares_prefixes, loaded.reads_types, "preference_model")
        if (folder / ENSEMBLE_FILE).is_file():
            loaded.ensemble = read_heads(folder / ENSEMBLE_FILE, head_of(model))
            uncertainty = document.get("uncertainty")
            loaded.uncertainty = None if uncertainty is None else Uncertainty(**uncertainty)
        if (folder / bi_encoder.FOLDER).is_dir():
            loaded.bi_encoder = BiEncoder.load(folder / bi_encoder.FOLDER, device)
        return loaded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder so that it is either the old model, the new one, or refused by ``load``; never a mixture.

        Everything is written to a temporary folder beside it first. A new folder then appears by one rename; in an
        existing one the model's files are replaced, and ``calibration.json``, without which nothing loads, comes last.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.model.config.pad_token_id is None:  # TRL and vLLM refuse to batch without it
            pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
            self.model.config.pad_token_id = end if pad is None else pad
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            folder = Path(temporary) / "model"
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            document = {**self.calibration.to_dict(), "attention": self.attention, "metadata": self.metadata}
            if self.ensemble is not None:
                write_heads(folder / ENSEMBLE_FILE, self.ensemble)
            if self.uncertainty is not None:
                document["uncertainty"] = asdict(self.uncertainty)
            if self.bi_encoder is not None:
                self.bi_encoder.save(folder / bi_encoder.FOLDER)
            (folder / CALIBRATION_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
            _move(folder, target)


def _move(folder: Path, target: Path) -> None:
    """Put the finished ``folder`` at ``target``; other files already there (logs, checkpoints) stay."""
    if not target.exists():
        folder.rename(target)
        return
    (target / CALIBRATION_FILE).unlink(missing_ok=True)
    for old in (*target.glob(WEIGHTS), *target.glob(WEIGHTS + ".index.json")):  # the ensemble's heads are among them
        old.unlink()
    shutil.rmtree(target / bi_encoder.FOLDER, ignore_errors=True)
    for new in sorted(folder.iterdir(), key=lambda file: file.name == CALIBRATION_FILE):
        new.replace(target / new.name)


def check_folder(path: str | os.PathLike[str]) -> tuple[Calibration, dict[str, Any]]:
    """Refuse a folder that ``PreferenceModel.load`` cannot load, without reading its weights.

    Returns:
        The calibration and the metadata beside the model.

    Raises:
        InputError: field ``preference_model``: no folder, no calibration, no config, no safetensors, or not one label.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError("preference_model", str(folder), "is not a folder; give one that `consensus preference` wrote")
    for name in (CALIBRATION_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise InputError("preference_model", str(folder), f"has no {name}; fit with `consensus preference`")
    if not any(folder.glob(WEIGHTS)):
        raise InputError("preference_model", str(folder), "has no safetensors weights; save it with safetensors")
    labels = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels
    if labels != 1:
        raise InputError("preference_model", str(folder), f"has {labels} labels; needs exactly 1")
    document = json.loads((folder / CALIBRATION_FILE).read_text())
    return Calibration.from_dict(document), document.get("metadata", {})


def without_weights(path: str | os.PathLike[str]) -> PreferenceModel:
    """What ``PreferenceModel.load`` loads, without weights: to count tokens, not to score.

    Raises:
        InputError: field ``preference_model``; see ``check_folder``.
    """
    calibration, metadata = check_folder(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    found = PreferenceModel(model, tokenizer, calibration, metadata, attention=attention_of(path))
    if (Path(path) / bi_encoder.FOLDER).is_dir():
        found.bi_encoder = bi_encoder.without_weights(Path(path) / bi_encoder.FOLDER)
    return found


def attention_of(path: str | os.PathLike[str]) -> str:
    """What an encoder was fitted with, ``PAIR`` or ``PREFIX``; ``PAIR`` for what is no preference model's folder."""
    file = Path(path) / CALIBRATION_FILE
    return json.loads(file.read_text()).get("attention", PAIR) if file.is_file() else PAIR


def check_ensemble(path: str | os.PathLike[str]) -> None:
    """Refuse a folder whose model cannot say how sure it is of a utility.

    Raises:
        InputError: field ``preference_model``.
    """
    known = "uncertainty" in json.loads((Path(path) / CALIBRATION_FILE).read_text())
    if not known or not (Path(path) / ENSEMBLE_FILE).is_file():
        mend = "has no ensemble, which uncertainty_penalty needs; fit one with heads: 4, or set the penalty to 0"
        raise InputError("preference_model", str(path), mend)


def fingerprint(model: torch.nn.Module) -> str:
    """Short SHA-256 (16 hex digits) over names, types, shapes and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return _short_print(digest)


def _short_print(digest: Any) -> str:
    return f"sha256:{digest.hexdigest()[:16]}"
