"""Other people's checkpoints -> ours, and back: `redrafter-convert` (docs/converting.md)."""
