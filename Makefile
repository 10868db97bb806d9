# make demo, make test, make lint, make stress: each makes .venv, installs the pinned requirements, and runs.
# Another Python: make demo PYTHON=python3.12        Flags: make demo ARGS="--task=qa"
# make test leaves the slow tests out (compilers, kills, retrained numbers); with them, and with coverage, as CI has it:
# make test ALL=1 ARGS="--cov --cov-fail-under=90"
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test stress lint clean

demo: .venv/installed
	.venv/bin/python demo.py $(ARGS)

test: .venv/installed-dev
	.venv/bin/python -m pytest -n auto --dist worksteal $(if $(ALL),,-m "not slow") $(ARGS)

stress: .venv/installed-dev
	.venv/bin/python tests/stress.py $(ARGS)

lint: .venv/installed-dev
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
