# Thin aliases; the scripts do the work.
PYTHON ?= python

.PHONY: test lint format quickstart figures clean

test:        ## environment, lint, all tests
	bash tests/run.sh

lint:        ## ruff and mypy in the active environment
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:      ## rewrite the sources in the house style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quickstart:  ## the whole path on real text, on the CPU
	bash launch_scripts/quickstart.sh

figures:     ## docs/img from the code's own definitions
	$(PYTHON) tools/draw_figures.py
	$(PYTHON) tools/draw_kernels.py
	$(PYTHON) tools/draw_house.py

clean:       ## caches and build products; not .venv, not runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
