# What CI runs, a person can run: `make setup check test docker e2e cluster`.
# The tools of .venv come first; without one, those of the active environment are used.

PYTHON ?= python3
WORKERS ?= 2

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Each test worker gets its share of the cores; more threads than cores make every test slower.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup fmt check test e2e cluster docker lock faults gpu golden clean

help:  ## Say what the verbs do
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/installed  ## Make .venv and install the project with its tools
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("python 3.11 or newer is wanted: make setup PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --progress-bar off --editable '.[dev]'
	touch $@

fmt:  ## Format, and mend what can be mended by itself
	ruff check --fix --exit-zero
	ruff format

check:  ## Style, types, layers, dependencies, spelling
	ruff check
	ruff format --check
	mypy
	lint-imports --no-logo
	deptry .
	typos
	shellcheck .ci/run slurm/*.sh docker/*.sh benchmarks/gpu/*.sh
	hadolint --failure-threshold style docker/Dockerfile docker/Dockerfile.cpu

test:  ## Unit tests, contracts, parity, and kernels in their interpreter, in about 6 minutes
	python -m pytest -n $(WORKERS) tests/unit tests/contracts tests/parity
	TRITON_INTERPRET=1 python -m pytest -n $(WORKERS) tests/kernels

e2e:  ## Real processes that train, in about 27 minutes
	python -m pytest -n $(WORKERS) --dist loadfile tests/e2e

cluster:  ## A real Slurm of two nodes on this machine (root; installs Debian's Slurm)
	OMP_NUM_THREADS=1 python -m pytest tests/cluster

docker:  ## The install steps of the CPU image, in a fresh virtual environment
	rm -rf build/image build/image-runs
	bash docker/install.sh build/image docker/requirements.txt
	build/image/bin/convnext train quickstart schedule.length=4st schedule.warmup=1st \
		--device cpu --runs-dir build/image-runs
	rm -rf build/image build/image-runs

LOCK = uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command 'make lock'
lock:  ## Write the pinned requirements of the images anew
	echo hatchling setuptools wheel | tr ' ' '\n' | $(LOCK) - --output-file docker/build.txt
	$(LOCK) pyproject.toml --extra s3 --extra gcs --output-file docker/requirements.txt
	$(LOCK) pyproject.toml --extra s3 --extra gcs --extra decode --extra deepspeed \
		--excludes docker/in-base-image.txt --output-file docker/requirements-cuda.txt

faults:  ## Every fault, and a run that is killed 100 times; tests/faults/README.md is the report
	OMP_NUM_THREADS=1 python -m pytest tests/e2e/test_faults.py tests/e2e/test_torn_saves.py
	OMP_NUM_THREADS=1 python tests/faults/soak.py --kills 100 --out tests/faults/soak.json

gpu:  ## Tests that need a GPU
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 python -m pytest -n auto --timeout 900 tests/gpu \
		--ignore tests/gpu/test_step_on_gpu.py
	OMP_NUM_THREADS=8 python -m pytest tests/gpu/test_step_on_gpu.py

golden:  ## Write the golden files anew; read their diff before you commit
	CONVNEXT_GOLDEN=1 python -m pytest -q tests/contracts
	git --no-pager diff --stat -- tests/golden recipes/README.md

clean:  ## Remove what tools left behind, and nothing else
	rm -rf build dist htmlcov .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find convnext_cli tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
