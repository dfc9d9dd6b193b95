"""Bugs of one line, planted or drawn by chance, and whether the tests see them (``tools/mutate.py``).

mutmut and cosmic-ray run one test command in one process for all of the code. Here a bug must also reach the ranks that
torchrun starts, each has the tests that should see it, and half of the bugs are written by hand.
"""
