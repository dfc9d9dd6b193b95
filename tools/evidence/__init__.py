"""How the trained models of ``docs/results/trained`` come about: text, queue, runs on a GPU in pieces, report.

``PYTHONPATH=tools python -m evidence --help``; the whole path is in ``docs/results/trained/how.md``.
"""
