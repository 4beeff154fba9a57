"""The hook by which transformers leaves places for packed layers while it loads a model; see checkpoint.py."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "fettle_places"
PLACES: ContextVar[Callable[[nn.Module], None]] = ContextVar(METHOD)


@register_quantization_config(METHOD)
class Places(QuantizationConfigMixin):
    """Stands in a configuration while its model is loaded."""

    def __init__(self, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]


@register_quantizer(METHOD)
class _PlaceMaker(HfQuantizer):
    """Calls PLACES on the model before its weights are loaded, and leaves no trace."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        PLACES.get()(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.remove_quantization_config(model)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):
                del config._is_quantized
        return model

    def is_serializable(self) -> bool:
        """Nothing of it is left to be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """What stands in the places is frozen; edits around it train."""
        return True
