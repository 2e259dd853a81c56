# make demo       personalise the bundled subject; ends with the path of its gallery
# make test       every test but the slow ones
# make test-all   every test
# make lint       style and types
# make format     put it right
# make clean      remove the environment and caches; runs are kept

PYTHON ?= python3

.DELETE_ON_ERROR:
.PHONY: demo test test-all lint format clean

demo: .venv/installed
	.venv/bin/python -m personalize_jax.personalize --config=configs/world.py \
		--images=personalize_jax/assets/world/subject --workdir=runs/demo

test: .venv/test-installed
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: .venv/test-installed
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/test-installed
	.venv/bin/python -m ruff check --no-cache .
	.venv/bin/python -m ruff format --no-cache --check .
	.venv/bin/python -m mypy

format: .venv/test-installed
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

# Scripts are run as modules throughout: their own first lines break in folders with spaces, or once moved.
.venv/installed: requirements.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "No $(PYTHON) found: install Python 3.11 or newer, or name it, as in: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d, and 3.11 or newer \
	is needed: install it, or name it, as in: make PYTHON=python3.12" % sys.version_info[:2])'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)"; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@echo "Installing the requirements into .venv; this takes a few minutes."
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test-installed: .venv/installed tests/requirements.txt launch/requirements.txt
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -r tests/requirements.txt
	@touch $@
