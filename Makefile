# make test: lint and all tests.  make demo: train and sample on the embedded images.  make soak: kill a run 50 times and compare
# its end (three quarters of an hour).  make page: the page in the browser.  make study: a tiny study, two minutes.  All set
# up .venv themselves, with the versions of constraints.txt.
# make test-oldest: all tests with the oldest versions that requirements*.txt allow, on Python 3.12, in .venv-oldest.
# make lock: constraints.txt anew, from the newest versions; on Python 3.11, as newer ones can have what that one has.

PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin
OLDEST := .venv-oldest
LOCK := .venv-lock
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: test test-oldest demo page study soak lock clean

test: .venv/installed
test-oldest: $(OLDEST)/installed
test-oldest: BIN := $(OLDEST)/bin
test test-oldest:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

demo: .venv/installed
	$(BIN)/python scripts/demo.py

page: .venv/installed
	@$(BIN)/python -c 'import gradio' 2> /dev/null || $(BIN)/python $(INSTALL) 'gradio>=6'
	$(BIN)/python scripts/page.py

study: .venv/installed
	$(BIN)/python scripts/study.py studies/quick.toml

soak: .venv/installed
	$(BIN)/python scripts/checks/soak.py --json results/soak.json

# Without a network pip finds no version either, but says that the connection was broken: that is no reason to take others.
.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: needs Python 3.11 or newer, this is $$($(PYTHON) --version): set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "$(BIN)/python $(INSTALL) -r requirements-dev.txt -c constraints.txt"
	@$(BIN)/python $(INSTALL) --only-binary :all: -r requirements-dev.txt -c constraints.txt 2> .venv/errors || { \
		if grep -q "connection broken" .venv/errors || ! grep -q "ResolutionImpossible" .venv/errors; then \
			cat .venv/errors; exit 1; fi; \
		echo "make: some versions of constraints.txt cannot be had here (see .venv/errors): taking what the requirements allow"; \
		$(BIN)/python $(INSTALL) -r requirements-dev.txt; }
	@touch $@

$(OLDEST)/installed: requirements.txt requirements-dev.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null \
		|| { echo "make: needs Python 3.12: set PYTHON312=/path/to/python3.12"; exit 1; }
	$(PYTHON312) -m venv --clear $(OLDEST)
	sed '/^-r/d; s/>=/==/' requirements.txt requirements-dev.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python $(INSTALL) -r $(OLDEST)/requirements.txt
	@touch $@

lock:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null \
		|| { echo "make: a lock needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --clear $(LOCK)
	$(LOCK)/bin/python $(INSTALL) --only-binary :all: -r requirements-dev.txt
	echo "# The versions that were tested; written by make lock. What torch pins for its platform is left to torch." > constraints.txt
	$(LOCK)/bin/python -m pip freeze | sed 's/+.*//' | grep -vE '^(cuda-|nvidia-|triton)' >> constraints.txt
	rm -rf $(LOCK)

clean:
	rm -rf out .pytest_cache .ruff_cache
