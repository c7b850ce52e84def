"""Backends in plain PyTorch: `blocked` for any layout and device, `per_query` for rows of single queries."""
