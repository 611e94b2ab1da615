"""Only what a CPU needs: a fast BLAS, tiled weights, cheap exponentials, a table of rotations.

The rest of the package enters through `redrafter_mlx.kernels` alone, and without this folder (or with
`REDRAFTER_CPU=off`) computes the same with MLX's own operations, slower.
"""
