"""The command `redrafter`: what a user runs. Everything that computes lives in redrafter_mlx."""
