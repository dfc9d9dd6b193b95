"""Families of runs: planning them, running them, and what their metrics say together."""
