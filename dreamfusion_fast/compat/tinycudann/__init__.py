"""tiny-cuda-nn's torch bindings on the kernels of dreamfusion_fast, on CUDA and on the CPU.

    import dreamfusion_fast.compat.tinycudann as tcnn  # in place of: import tinycudann as tcnn

The same names, JSON configs, parameters (`params`: layout, order, padding, initial values) and
results as tiny-cuda-nn 2.0. What is not supported is refused by name. docs/tinycudann.md is the
user's page: what is supported and what differs.
"""

from .modules import (
    Encoding,
    Network,
    NetworkWithInputEncoding,
    free_temporary_memory,
    supports_jit_fusion,
)

__all__ = [
    "Encoding",
    "Network",
    "NetworkWithInputEncoding",
    "free_temporary_memory",
    "supports_jit_fusion",
]
