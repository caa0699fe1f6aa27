"""pqk: a bench for compressing feed-forward 3D transformers (pruning, distillation, quantization)."""

__version__ = "0.1.0"
