# Every target makes .venv first if it has to; a second run reuses it.
#   make notebook   run mllama-3.2.ipynb from top to bottom without a screen
#   make test       run the tests
#   make quick      a minute of it: parity on one checkpoint, sessions, the layout
#   make torture    hostile pictures and prompts, faults and kills, in their long form; prints counts
#   make lab        open the notebook in JupyterLab
#   make chat       open the chat in a browser, on the demo model, on MODEL_ID=<hub id, folder or ollama:NAME> or on
#                   MODEL_DIR=<converted>; DRAFT=<hub id or folder>: draft model; REFERENCE=meta or transformers: code that
#                   the weights were trained with, where the checkpoint does not say (docs/upstream.md); BASE=<hub id or
#                   folder>: base of a LoRA adapter that MODEL_ID names, here and for serve and caption
#                   IMAGE_STORE_MB=0: no encoded pictures on disk, here and for serve; HOST, PORT and ROOT_PATH (of a
#                   proxy in front) likewise
#   make serve      answer other programs as OpenAI's API does, on the demo model, MODEL_ID or MODEL_DIR; CHAT=1 with the page;
#                   OLLAMA=1 at Ollama's port, for programs that speak its API;
#                   TRUSTED_HOSTS and KEY_FILE as its options (the key also from OV_MLLAMA_KEY)
#   make caption    ask QUESTION about every picture of the folder PICTURES; answers go to OUT, whose ending is .parquet,
#                   .csv, .jsonl or .json
#   make bench      measure time and memory beside PyTorch, on random weights of the 11B's widths
#   make lint       ruff on .py and .ipynb, types of the package, spelling
# chat, serve and caption call `ov-mllama`, which does the same without make.
# MODEL_ID=<hub id or folder> runs the notebook on another checkpoint; its other settings go the same way, such as
# CALIBRATION_DATA=photographs QUESTIONS=0.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu installs torch from there (0.2 GB) instead of PyPI (5 GB).

PYTHON ?= python3
TORCH_INDEX ?=
MODEL_DIR ?=
CHAT ?=
OLLAMA ?=
QUESTION ?= Describe this image.
OUT ?= captions.parquet
DRAFT ?=
BASE ?=
REFERENCE ?=
SETTINGS := MODEL_ID REFERENCE CALIBRATION_DATA DRAFT_MODEL MAX_NEW_TOKENS COMPARE_WITH_PYTORCH QUESTIONS
# values reach commands by the environment, as they were typed: neither make nor a shell reads them
VALUES := $(SETTINGS) MODEL_DIR BASE DRAFT QUESTION PICTURES OUT HOST PORT ROOT_PATH KEY_FILE IMAGE_STORE_MB
$(foreach name,$(VALUES),$(if $(value $(name)),$(eval override $(name) := $$(value $(name)))))
export $(VALUES)
option = $(if $($(2)),--$(1) "$$$(2)")
model = $(call option,checkpoint,MODEL_ID) $(call option,base,BASE) $(call option,model-dir,MODEL_DIR) $(call option,reference,REFERENCE)
listen = $(call option,host,HOST) $(call option,port,PORT) $(call option,root-path,ROOT_PATH)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: notebook test quick torture lab chat serve caption bench lint clean

notebook: .venv/.run
	$(BIN)/python -c "import sys, notebook_utils as nb; nb.execute('mllama-3.2.ipynb', 'build', **dict(a.split('=', 1) for a in sys.argv[1:]))" $(foreach name,$(SETTINGS),$(if $($(name)),"$(name)=$$$(name)"))

lab: .venv/.run
	$(BIN)/jupyter lab mllama-3.2.ipynb

chat: .venv/.run
	$(BIN)/python -m ov_mllama chat $(model) $(call option,draft,DRAFT) $(listen) $(call option,image-store-mb,IMAGE_STORE_MB)

serve: .venv/.scale
	$(BIN)/python -m ov_mllama serve $(model) $(if $(CHAT),--chat) $(if $(OLLAMA),--ollama) $(listen) $(if $(TRUSTED_HOSTS),--trusted-hosts $(foreach host,$(TRUSTED_HOSTS),'$(host)')) $(call option,key-file,KEY_FILE) $(call option,image-store-mb,IMAGE_STORE_MB)

caption: .venv/.run
	$(BIN)/python -m ov_mllama caption $(model) --question="$$QUESTION" --out="$$OUT" -- "$$PICTURES"

bench: build/slice/config.json
	$(BIN)/python -m benchmarks.benchmark --checkpoint build/slice --pictures 2 --json build/benchmark.json

# 5 of the 11B's 40 text layers, 4 + 1 of its 32 + 8 vision layers
build/slice/config.json: .venv/.run
	$(BIN)/python -m benchmarks.make_checkpoint --out build/slice --text-layers 5 --vision-layers 4 --global-layers 1

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m 'not alone'
	$(BIN)/python -m pytest -n 1 --max-worker-restart 0 -m alone $$(grep -rl "mark.alone" tests --include="test_*.py")

quick: .venv/.dev
	$(BIN)/python -m pytest tests/runtime/test_parity.py tests/runtime/test_sessions.py tests/test_house.py -k 'gqa-llama3 or sessions or house'

torture: .venv/.dev
	$(BIN)/python -m pytest -m torture --torture --timeout 7200 -o faulthandler_timeout=7260

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

clean:
	rm -rf .venv build models

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.torch: .venv/bin/python
ifneq ($(TORCH_INDEX),)
	$(PIP) --extra-index-url $(TORCH_INDEX) $$(grep -ohE '^(torch|torchvision)==[0-9.]+' requirements.txt requirements-dev.txt)
endif
	touch $@

.venv/.run: requirements.txt .venv/.torch
	$(PIP) -r requirements.txt
	touch $@

.venv/.scale: requirements-scale.txt .venv/.run
	$(PIP) -r requirements-scale.txt
	touch $@

# Meta's reference, which tests compare with (tests/meta_reference.py), without the packages that it asks for: what tests
# need of those is in requirements-dev.txt, and fairscale is not needed
.venv/.dev: requirements-dev.txt .venv/.scale
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps llama-models==0.3.0
	touch $@
