# make test: lint and all tests.  make demo: train and sample on the embedded images.  make soak: kill a run 50 times and compare
# its end (three quarters of an hour).  All set up .venv themselves.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo soak clean

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

demo: .venv/installed
	$(BIN)/python scripts/demo.py

soak: .venv/installed
	$(BIN)/python scripts/checks/soak.py --json results/soak.json

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: needs Python 3.11 or newer, this is $$($(PYTHON) --version): set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf out .pytest_cache .ruff_cache
