# Two commands: `make scan` runs the main job on the embedded model, `make test` runs the tests. Both set up what they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/embedded
WORKERS ?= 2

.PHONY: scan test test-slow check format docs bench clean

# pip is told torch's exact version in the same command: left to choose, it would take the newest and largest build.
$(VENV)/.scan: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.scan
	$(BIN)/python tools/requirements.py pyproject.toml dev > $(VENV)/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --requirement $(VENV)/dev.txt
	touch $@

scan: $(VENV)/.scan
	$(BIN)/tomoscope scan --out $(OUT)

# One thread a worker: as many workers as cores already use them all, and more threads only get in each other's way.
test test-slow check: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) -m "not slow" -q

test-slow: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) -m slow -q

check: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks docs examples training tools
	$(BIN)/ruff check src tests benchmarks docs examples training tools
	$(BIN)/ty check --python $(VENV) src
	$(BIN)/pytest -n $(WORKERS) -m "not slow" -q

format: $(VENV)/.dev
	$(BIN)/ruff format src tests benchmarks docs examples training tools
	$(BIN)/ruff check --fix src tests benchmarks docs examples training tools

docs: $(VENV)/.dev
	$(BIN)/python docs/build.py

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache runs
