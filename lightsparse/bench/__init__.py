"""Measurements: `python -m lightsparse.bench kernels | memory | train | table`. Verified first, then timed."""
