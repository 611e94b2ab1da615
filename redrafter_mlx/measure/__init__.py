"""What `redrafter bench`, `tune` and the benchmarks measure with.

Arms compared in turn (`compare`), a step taken apart (`profile`), what acceptance and costs imply (`predict`), where
two texts differ and whether rounding explains it (`divergence`), and the machine that every figure names (`machine`).
"""
