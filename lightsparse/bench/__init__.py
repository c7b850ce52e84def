"""Measurements: `lightsparse bench kernels | memory | train | table`. Verified first, then timed."""
