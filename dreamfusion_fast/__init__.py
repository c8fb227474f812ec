"""DreamFusion: text-to-3D with score distillation, fast on CPU and CUDA."""

__version__ = "0.1.0"
