"""The `triton` backend: CUDA kernels of our own for tiles and for rows of single queries. call.py is its entry."""
