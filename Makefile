# make demo   the whole way on the sample corpus, without a GPU
# make test   all tests, two files at a time: they wait more than they work
# make check  linter, formatter, type checker
PYTHON ?= python3
PY := .venv/bin/python
# Reports and caches of the tools stay out of the way; nothing is asked of a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test check clean models

setup: .venv/ready

# Idempotent: runs again only when what is asked for has changed.
.venv/ready: pyproject.toml constraints.txt tools/cpu_wheels.py
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Python 3.11 or 3.12 is needed; set PYTHON=…")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e '.[cpu,dev]'
	$(PY) tools/cpu_wheels.py
	touch $@

demo: setup
	.venv/bin/mulcot demo --root runs/demo

test: setup
	$(PY) -m pytest -n 2 --dist loadfile

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

models: setup
	$(PY) tools/make_models.py --out mulcot_ray/models

clean:
	rm -rf .venv runs build dist *.egg-info
