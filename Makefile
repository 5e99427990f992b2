# Every target sets up what it needs; a second call reuses it.
#
#   make test           the tests (within fifteen minutes on two cores)
#   make test-full      the slow ones too, and those with TRL and Liger-Kernel
#   make numerics       docs/numerics.md: how near each operation comes to what it may err
#   make demo           fine-tune a real model on real data with LoRA-SB
#   make demo-compare   the methods side by side on the demo's data
#   make lint           ruff, format check, and mypy on the public modules
#   make ext            build the CUDA extension in place, incrementally
#   make gpu            everything that needs a GPU, in nine minutes, the headline numbers in the
#                       first two; prints one table and names one file to send. PART=headline|…
#                       for one part, DRY=1 for the whole path on the CPU with tiny shapes, OUT=
#                       for the results, PY= for an interpreter that has torch already
#   make docs           docs/api.md, the picture of README.md and, into out/docs, the API
#                       reference from the docstrings
#   make wheel          wheels without and, with a CUDA toolkit, with the extension

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
WORKERS ?= 2

.DEFAULT_GOAL := test
.PHONY: test test-full numerics demo demo-compare lint ext gpu docs wheel clean

$(VENV)/base.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch setuptools wheel ninja
	touch $@

$(VENV)/demo.stamp: $(VENV)/base.stamp setup.py pyproject.toml
	LORASB_SKIP_CUDA=1 $(PIP) install -c constraints.txt --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	LORASB_SKIP_CUDA=1 $(PIP) install -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tools/ptxcheck

$(VENV)/full.stamp: $(VENV)/test.stamp
	LORASB_SKIP_CUDA=1 $(PIP) install -c constraints.txt --no-build-isolation -e ".[full]"
	touch $@

test-full: $(VENV)/full.stamp
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal tools/ptxcheck

numerics: $(VENV)/test.stamp
	$(PY) -m tests.trust.report

demo: $(VENV)/demo.stamp
	$(PY) -m lorasb_kernels.cli.main demo

demo-compare: $(VENV)/test.stamp
	$(PY) -m lorasb_kernels.cli.main demo-compare

lint: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

ext: $(VENV)/base.stamp
	LORASB_FORCE_CUDA=1 $(PY) setup.py build_ext --inplace

gpu: $(if $(filter $(VENV)/%,$(PY)),$(VENV)/test.stamp)
	$(if $(DRY),,$(PY) -m bench.extension)
	$(PY) -m bench.gpu $(addprefix --part ,$(PART)) $(if $(DRY),--dry) $(addprefix --out ,$(OUT))

docs: $(VENV)/test.stamp
	$(PY) docs/build.py
	$(PY) docs/adapter_path.py

wheel: $(VENV)/base.stamp
	LORASB_SKIP_CUDA=1 $(PIP) wheel --no-deps --no-build-isolation -w dist/pure .
	if command -v nvcc >/dev/null; then \
	    LORASB_FORCE_CUDA=1 $(PIP) wheel --no-deps --no-build-isolation -w dist/cuda .; fi

clean:
	rm -rf build dist *.egg-info
