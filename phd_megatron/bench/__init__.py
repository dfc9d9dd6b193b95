"""Benches: one way to time, choose devices and write results."""
