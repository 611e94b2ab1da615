"""GGUF files: a checked reader, and what is read as a model of mlx-lm with its tokenizer."""

from .model import load_gguf
from .reader import GGUFHeader, read_header

__all__ = ["GGUFHeader", "load_gguf", "read_header"]
