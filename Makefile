# make demo · make test · make bench · make lint: each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MEMBERS := core protos custodian coordinator client gpu_worker deploy/local
STAMP := $(VENV)/.installed

.PHONY: setup demo test bench lint fmt protos lock clean

$(STAMP): requirements.lock $(MEMBERS:%=%/pyproject.toml)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(MEMBERS:%=-e %)
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/keyquorum demo

test: $(STAMP)
	scripts/system_packages.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(STAMP)
	$(BIN)/python -m benchmarks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(MEMBERS) examples benchmarks tests scripts
	$(BIN)/lint-imports
	$(BIN)/python scripts/gen_protos.py --check

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(STAMP)
	$(BIN)/python scripts/gen_protos.py

lock: $(STAMP)
	scripts/lock.sh

clean:
	rm -rf $(VENV) build bench-results
