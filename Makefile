# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The standard engine is tested on the newest Python that is found, in an environment of its own, and so is Ray.
NEWEST := $(firstword $(foreach p,python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python3.13),$(shell $(p) -c 'import sys; print(sys.executable)' 2>/dev/null)))
STANDARD := .venv-standard
OLDEST := .venv-oldest
DEMO := digits_mobile shapes_detector

# Tests run on all cores.
PARALLEL := -n logical --dist worksteal

.PHONY: setup environments demo test test-training test-standard test-oldest sample slow lint docs models clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[training,test]"
	touch $@

# All environments at once, for CI.
environments: setup $(STANDARD)/installed $(OLDEST)/installed $(VENV)/docs-installed

demo: setup
	mkdir -p build
	for name in $(DEMO); do \
		$(BIN)/eptq-onnx quantize models/$$name.onnx --data models/$${name%%_*}_calib.npz -o build/$${name}_int8.onnx || exit; \
		$(BIN)/python models/score.py $$name models/$$name.onnx build/$${name}_int8.onnx || exit; \
	done

test: lint test-training test-standard test-oldest

test-training: setup
	$(BIN)/python -m pytest $(PARALLEL)

# Behind the other: it compares with the gradients that the training build leaves in build/. Python 3.12 and later
# count the covered lines nearly for free (sys.monitoring).
test-standard: $(STANDARD)/installed test-training
	$(if $(NEWEST),,@echo "SKIPPED: Python 3.13, which is not found; the standard engine is tested on the Python that $(PYTHON) is.")
	$(STANDARD)/bin/python -m pip list --disable-pip-version-check | grep -i "^onnx"
	COVERAGE_CORE=$(if $(NEWEST),sysmon) COVERAGE_FILE=build/coverage $(STANDARD)/bin/python -m pytest $(PARALLEL) \
		-m "not slow and not once" --cov=eptq_onnx --cov-report=term:skip-covered

$(STANDARD)/installed: pyproject.toml
	$(or $(NEWEST),$(PYTHON)) -m venv $(STANDARD)
	$(STANDARD)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[standard,ray,test]"
	touch $@

# The gradients with the oldest onnxruntime that the extra allows.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(PARALLEL) tests/engines tests/test_ops.py

$(OLDEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[standard,test]" "onnxruntime==1.18.*" "numpy<2"
	touch $@

# DRAWS: networks that draw or choose, with a batch that is none, each compared with its nearest rounding.
DRAWS ?= 500

# What CI takes of the slow tests; a large model has all cores, and few layers.
sample: setup
	EPTQ_DRAWS=8 $(BIN)/python -m pytest $(PARALLEL) -m slow tests/e2e/test_wild.py
	EPTQ_BLOCKS=8 $(BIN)/python -m pytest -m slow tests/e2e/test_large_models.py
	EPTQ_KILLS=1 $(BIN)/python -m pytest -m slow tests/e2e/test_kills.py

slow: setup
	EPTQ_DRAWS=$(DRAWS) $(BIN)/python -m pytest $(PARALLEL) -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Links that lead nowhere are errors.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/docs

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

models: setup
	cd models && ../$(BIN)/python train.py

clean:
	rm -rf build $(VENV) $(STANDARD) $(OLDEST)
