# Every target makes .venv first if it has to; a second run reuses it.
#   make notebook   run mllama-3.2.ipynb from top to bottom without a screen
#   make test       run the tests
#   make lab        open the notebook in JupyterLab
#   make lint       ruff on .py and .ipynb
# MODEL_ID=<hub id or folder> runs the notebook on another checkpoint.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu installs torch from there (0.2 GB) instead of PyPI (5 GB).

PYTHON ?= python3
TORCH_INDEX ?=
MODEL_ID ?=
BIN := .venv/bin
comma := ,
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: notebook test lab lint clean

notebook: .venv/.run
	$(BIN)/python -c "import notebook_utils; notebook_utils.execute('mllama-3.2.ipynb', 'build'$(if $(MODEL_ID),$(comma) MODEL_ID='$(MODEL_ID)'))"

lab: .venv/.run
	$(BIN)/jupyter lab mllama-3.2.ipynb

test: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build models

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.torch: .venv/bin/python
ifneq ($(TORCH_INDEX),)
	$(PIP) --extra-index-url $(TORCH_INDEX) $$(grep -oE '^(torch|torchvision)==[0-9.]+' requirements.txt)
endif
	touch $@

.venv/.run: requirements.txt .venv/.torch
	$(PIP) -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(PIP) -r requirements-dev.txt
	touch $@
