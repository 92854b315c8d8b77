# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := digits_mobile shapes_detector

.PHONY: setup demo test slow lint models clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[training,test]"
	touch $@

demo: setup
	mkdir -p build
	for name in $(DEMO); do \
		$(BIN)/eptq-onnx quantize models/$$name.onnx --data models/$${name%%_*}_calib.npz -o build/$${name}_int8.onnx || exit; \
		$(BIN)/python models/score.py $$name models/$$name.onnx build/$${name}_int8.onnx || exit; \
	done

test: lint
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

models: setup
	cd models && ../$(BIN)/python train.py

clean:
	rm -rf build $(VENV)
