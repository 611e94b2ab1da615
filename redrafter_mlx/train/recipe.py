"""How the text of a run is generated. Kept beside its shards, because text of two recipes must not be mixed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from redrafter_mlx.files import new_file, read_json

RECIPE = "recipe.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the text is generated. Kept beside the shards; a run with another recipe is refused."""

    target: str
    """Name of the target."""
    context_layers: tuple[int, ...] = ()
    rows: int = 96
    """Answers generated at the same time, and in a shard."""
    max_tokens: int = 160
    """Maximum tokens per answer."""
    greedy: float = 0.6
    """Share of answers at temperature 0; the temperature of the others is drawn from `temperatures`."""
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0)
    seed: int = 0
    prompts: str = "self"
    """"self", or a fingerprint of the prompts or the text given."""

    def __post_init__(self) -> None:
        for name in ("rows", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.greedy <= 1:
            raise ValueError(f"greedy must be between 0 and 1, not {self.greedy}")
        if not all(t > 0 for t in self.temperatures):
            raise ValueError(f"temperatures must be positive, not {self.temperatures}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"the seed must be between 0 and 2^64 - 1, not {self.seed}")

    def claim(self, folder: Path) -> None:
        """Make `folder`, which is empty or new, one of text of this recipe, or see that it is.

        Raises:
            ValueError: it holds text of another one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECIPE
        mine = json.loads(json.dumps(asdict(self)))
        if path.is_file():
            theirs = read_json(path)
            differing = [k for k in mine if mine[k] != theirs.get(k)]
            if differing:
                listed = ", ".join(f"{k} {theirs.get(k)!r} there, {mine[k]!r} now" for k in differing)
                raise ValueError(
                    f"{folder} holds data of another recipe: {listed}; use another folder, or delete {folder} "
                    "to write the text anew"
                )
            return
        with new_file(path) as part:
            part.write_text(json.dumps(mine, indent=2) + "\n")
