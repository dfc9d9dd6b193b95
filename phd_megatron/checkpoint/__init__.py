"""Checkpoints: their files, what they hold, whose directory it is; saving and loading, whatever layout saved."""
