"""Fine-tuning recipes for Llama-shaped language models."""

__version__ = "0.1.0"
