"""Faster operations on a CPU: a fast BLAS, tiled weights, cheap exponentials, a table of rotations.

The rest of the package reaches them through `redrafter_mlx.kernels` alone. Without this folder, or with
`REDRAFTER_CPU=off`, it computes the same with MLX's own operations, more slowly.
"""
