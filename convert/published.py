"""Drafters that others publish, but for recurrent ones: which kind a source is, and what is known of it.

A reader is a pair: whether a source is of its kind, and what it found there, a `Source`. A new kind is a module with
such a pair, and a line in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from redrafter_mlx.drafters.heads import HeadsDrafter
from redrafter_mlx.drafters.hydra import HydraConfig
from redrafter_mlx.drafters.medusa import MedusaConfig
from redrafter_mlx.drafters.speculator import Speculator, SpeculatorConfig
from redrafter_mlx.target import Target

from .hydra import is_hydra, read_hydra
from .medusa import is_medusa, read_medusa
from .source import Tensor
from .speculator import is_speculator, read_speculator

Drafter = Speculator | HeadsDrafter


class Source(Protocol):
    """A drafter found in somebody's checkpoint."""

    @property
    def where(self) -> str: ...

    @property
    def container(self) -> str: ...

    @property
    def kind(self) -> str:
        """In words."""

    @property
    def values(self) -> Mapping[str, Any]:
        """What is known of its config, under our names."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about it."""

    def build(self, target: Target | None) -> Any:
        """The drafter with its weights. `target` is the model it drafts for, where it is named.

        Raises:
            ValueError: something is missing, superfluous, misshapen, or not supported.
        """


READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Source]], ...] = (
    (is_speculator, read_speculator),
    (is_medusa, read_medusa),
    (is_hydra, read_hydra),
)


def read_published(path: Path) -> Source | None:
    """What the first reader whose kind it is finds at `path`; None where it is of none.

    Raises:
        FileNotFoundError, ValueError: see the readers.
    """
    return next((read(path) for matches, read in READERS if matches(path)), None)


CONFIGS: Mapping[str, Any] = {each.model_type: each for each in (SpeculatorConfig, MedusaConfig, HydraConfig)}
"""`model_type` -> config class of the kinds that are converted by these readers."""


def described(values: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text for the values of a config, all of them or those that a source's tensors say."""
    stages = values.get("n_predict") or values.get("num_heads")
    lines = {
        "hidden size": values["hidden_size"],
        "inner size": values.get("inner_size"),
        "vocabulary": values.get("vocab_size", "the target's"),
        "drafted vocabulary": values.get("draft_vocab_size"),
        "method": values.get("method"),
        "drafts": f"up to {stages} tokens: beam length {stages + 1}, the root counted" if stages else None,
        "layers of a head": values.get("num_layers"),
        "stages share weights": _yes(values.get("tie_weights")),
        "normalizes its input": _yes(values.get("scale_input")),
        "reads drafted tokens": _yes(values.get("grounded")),
        "prefix layer": _yes(values.get("prefix") is not None) if "grounded" in values else None,
        "output matrix": values.get("output"),
        "made for": (values.get("target") or {}).get("name", "not recorded"),
    }
    return {label: str(text) for label, text in lines.items() if text is not None}


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"
