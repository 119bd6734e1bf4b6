# make demo      set up, then five photos -> adapter -> pictures (runs/demo/)
# make app       set up, then the page in the browser, on the embedded model
# make space     the committed files as a Hugging Face Space, in build/space/
# make test      set up, then lint, types and the default tests
# make test-all  the slow tests too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready
APP := $(VENV)/.ready-app
DEV := $(VENV)/.ready-dev

.PHONY: demo app space test test-all lint setup clean

setup: $(DEV)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $(READY)

$(DEV): $(READY)
	$(PIP) -e '.[app,dev]'
	touch $(DEV)

$(APP): $(READY)
	$(PIP) -e '.[app]'
	touch $(APP)

app: $(APP)
	$(BIN)/lora-diffusion app --open

space:
	rm -rf build/space
	mkdir -p build/space
	git archive HEAD | tar -x -C build/space
	cp docs/space/README.md build/space/README.md
	@echo 'build/space is ready; now: hf upload YOU/YOUR-SPACE build/space . --repo-type space'

demo: $(READY)
	$(BIN)/lora-diffusion demo

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m ''

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
