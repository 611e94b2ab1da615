"""GGUF files: a checked reader, and what is read as a model of mlx-lm with its tokenizer."""

from .files import find_gguf
from .model import load_gguf
from .reader import GGUFHeader, read_header

__all__ = ["GGUFHeader", "find_gguf", "load_gguf", "read_header"]
