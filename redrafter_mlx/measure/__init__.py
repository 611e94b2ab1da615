"""What `redrafter bench`, `tune` and the benchmarks measure with.

Arms compared in turn (`compare`), a step taken apart (`profile`), what acceptance and costs imply (`predict`), and
the machine that every figure names (`machine`).
"""
