# make run: the main job on an embedded data set; make test: the fast tests.
# Both build .venv from requirements.txt first; nothing else has to be installed.

PYTHON ?= python3
WORKDIR ?= runs/digits
BIN := .venv/bin

.PHONY: run test test-all lint clean

run: .venv/installed
	$(BIN)/python main.py --config=configs/xdensenet.py:22-8-2,digits --workdir=$(WORKDIR)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The file stands for a finished installation, so that an interrupted one is repeated.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
