"""``torch_compile`` as the trainer takes it: decoder layers, one by one and in place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from deliberation.last_layer import LAYERS
from deliberation.types import InputError


def compile_layers(backbones: Sequence[nn.Module], args: Any, accelerator: Accelerator) -> None:
    """Compile the layers of ``backbones`` in place where ``args.torch_compile`` asks for it, but the last.

    Layers are alike, so that one compiled layer serves them all, for every length (dynamic shapes); the last changes at
    every call (``deliberation.last_layer``). In place, so that new, old and reference log-probabilities still come from
    one code path; accelerate would compile the whole model for the optimiser steps alone, and is told not to.

    Raises:
        InputError: field ``torch_compile``, on layers of another kind than ``deliberation.last_layer.LAYERS``.
    """
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    if not args.torch_compile:
        return
    for backbone in backbones:
        layers = getattr(backbone, "layers", [backbone])
        if type(layers[-1]).__name__ not in LAYERS:
            mend = f"must be false: layers of this kind are not supported ({', '.join(sorted(LAYERS))} are)"
            raise InputError("torch_compile", type(layers[-1]).__name__, mend)
        for layer in layers[:-1]:
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)


def sampled_eagerly(compiled: bool) -> AbstractContextManager:
    """Context in which compiled layers run as they were written: sampling's caches would make them compile anew."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
