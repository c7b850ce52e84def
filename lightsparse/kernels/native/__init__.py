"""The compiled attention kernel for CPU: its C++ source, its build, its call."""
