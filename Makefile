# make run: the main job on an embedded data set; make test: the fast tests.
# Both build .venv first: run from requirements.txt, test from requirements-dev.txt.

PYTHON ?= python3
WORKDIR ?= runs/digits
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.PHONY: run test test-all lint clean

run: .venv/installed
	$(BIN)/python main.py --config=configs/xdensenet.py:22-8-2,digits --workdir=$(WORKDIR)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A stamp is written after its installation, so an interrupted one is repeated.
# Only pip 25.1 and later shows its progress while it unpacks packages. pip compiles their
# Python files on one core, compileall on all. It fails on templates, hence `|| true`.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and "error: Python 3.11, 3.12 or 3.13 required, got %d.%d; choose one with make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(PIP) "pip>=25.1"
	$(PIP) --no-compile -r requirements.txt
	@echo "compiling the packages' Python files (up to half a minute)"
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
