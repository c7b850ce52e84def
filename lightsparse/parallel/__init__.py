"""Across ranks: one sequence over many, exchanged by what its attention reads; Lightning strategies; gradient hooks."""
