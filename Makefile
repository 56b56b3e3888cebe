# Everything below sets itself up on a fresh machine: Python 3.11 (3.10 and 3.12 work too) and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test browser lint lock bench fuzz clean

demo: $(READY)  ## train the built-in scene twice, compare everything, print the verdict
	$(BIN)/f3rm-verify run --seed 42 --iters 1000

test: $(READY) lint browser  ## all tests, on two cores
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

browser:  ## the browser that reports are tested in, where it is missing and can be had
	command -v chromium || { [ "$$(id -u)" != 0 ] || { apt-get update -qq && apt-get install -y -qq chromium; }; }

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## measure this tool against its peers, in one sitting
	$(BIN)/python benchmarks/help_time.py
	$(BIN)/python benchmarks/run_wall_time.py
	$(BIN)/python benchmarks/compare_renders.py
	$(BIN)/python benchmarks/hash_grid.py
	$(BIN)/python benchmarks/recorder_overhead.py
	$(BIN)/python benchmarks/recorder_races.py
	$(BIN)/f3rm-verify cost
	$(BIN)/python benchmarks/fault_scores.py
	$(BIN)/python benchmarks/clean_pairs.py

fuzz: $(READY)  ## a minute of coverage-guided fuzzing for each reader; a finding is left here as crash-*
	for reader in events trace checkpoint config png npy; do \
		$(BIN)/python tests/fuzz/fuzz_readers.py $$reader -max_total_time=60 -rss_limit_mb=3000 || exit 1; done

$(READY): requirements/uv.txt requirements/train.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 13) or sys.exit("f3rm-verify needs Python 3.10, 3.11 or 3.12, and $(PYTHON) is %d.%d: call make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/train.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

lock:  ## pin the newest versions that fit, with hashes and without the address of any index
	uv pip compile -q pyproject.toml --extra train --extra dev --universal --python-version 3.10 --generate-hashes --no-emit-index-url --no-header --no-annotate --upgrade -o requirements/train.txt
	uv pip compile -q pyproject.toml --universal --python-version 3.10 --generate-hashes --no-emit-index-url --no-header --no-annotate -c requirements/train.txt -o requirements/core.txt
	echo uv | uv pip compile -q - --universal --python-version 3.10 --generate-hashes --no-emit-index-url --no-header --no-annotate -o requirements/uv.txt

clean:
	rm -rf .venv build dist
