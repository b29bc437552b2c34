"""Dropout off for good, wherever a model keeps its rates. It imports no torch: a model is what it is given."""

from __future__ import annotations

from typing import Any


def disable_dropout(model: Any) -> None:
    """Set every rate of ``model`` to 0, so that two forward passes agree in training mode too.

    Rates are in dropout modules, in layers as numbers (OPT, Bloom, Llama's attention), or are read from the config at
    each pass (Falcon), which is saved with the model and then says 0.

    Args:
        model: a ``torch.nn.Module``, wrapped or not.
    """
    for module in model.modules():
        if any(kind.__name__ == "Dropout" for kind in type(module).__mro__):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            rates = [name for name, value in getattr(holder, "__dict__", {}).items() if isinstance(value, float)]
            for name in rates:
                if "dropout" in name:
                    setattr(holder, name, 0.0)
