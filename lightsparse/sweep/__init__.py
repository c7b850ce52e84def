"""Sweeps: `train.py -m` with every trial as a program of its own."""
