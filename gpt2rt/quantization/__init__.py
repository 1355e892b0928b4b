"""int8, int4, nf4 and fp4: how weights are quantised, and what the numbers of the result are."""

from .bitsandbytes import BitsAndBytesConfig, to_bitsandbytes
from .config import QuantizationConfig
from .resolve import StoredQuantization, from_checkpoint_config, resolve_quantization
from .rtn import quantize_rtn
from .weight import QuantizedWeight

__all__ = [
    "BitsAndBytesConfig",
    "QuantizationConfig",
    "QuantizedWeight",
    "StoredQuantization",
    "from_checkpoint_config",
    "quantize_rtn",
    "resolve_quantization",
    "to_bitsandbytes",
]
