# make demo · make test · make bench · make lint: each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MEMBERS := core protos custodian coordinator client gpu_worker deploy/local deploy/kubernetes
STAMP := $(VENV)/.installed

.PHONY: setup demo test bench lint fmt protos lock fuzz flips soak clean

$(STAMP): requirements.lock $(MEMBERS:%=%/pyproject.toml)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(MEMBERS:%=-e %)
	$(BIN)/python -m compileall -q $(MEMBERS)
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/keyquorum demo

test: $(STAMP)
	scripts/system_packages.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Coverage-guided, each parser for FUZZ_SECONDS; FUZZ_TARGETS picks some. Findings and corpus: build/fuzz.
FUZZ_SECONDS ?= 30
FUZZ_TARGETS ?=
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

# Every bit of genuine evidence, one at a time; `make test` takes 2 000 of each type.
flips: $(STAMP)
	KEYQUORUM_EVERY_BIT=1 $(BIN)/python -m pytest -n 2 tests/adversarial/test_bit_flips.py

# A death before and after every write of every ceremony, on every side, in 2 of 3 and 3 of 5; `make test` kills one custodian
# in each part of each kind. And a coordinator's death before and after every write and every fault of every drill.
soak: $(STAMP)
	KEYQUORUM_SOAK=1 $(BIN)/python -m pytest -n 2 tests/adversarial/test_ceremony_deaths.py \
		tests/adversarial/test_coordinator_ceremony_deaths.py tests/adversarial/test_drill_deaths.py

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
