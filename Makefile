# make demo | make test do all the set-up: a virtual environment in .venv, by pip alone, no root.
#   PYTHON=python3.12   the interpreter to build it with (3.10 to 3.13)
#   CPU=1               PyTorch's CPU builds, a tenth of the download, for a machine without a GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ifeq ($(CPU),1)
TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
endif
LANGUAGES := english hindi telugu

.PHONY: demo test lint tiny help
.DEFAULT_GOAL := help

help:
	@echo "make demo   answer the spoken questions in samples/ -> reply_<language>.wav"
	@echo "make test   run the tests"
	@echo "make lint   ruff, and shellcheck where it is installed"
	@echo "make tiny   retrain the shipped models in checkpoints/tiny from nothing (hours)"
	@echo "First time on a machine without a GPU: make demo CPU=1 (a tenth of the download)"

# Debian's python3 without python3-venv has no ensurepip: then the pip at hand fills the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info)' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install pip; } || \
	  { rm -rf $(VENV); echo "error: no virtual environment: install pip (Debian: apt-get install python3-venv)" >&2; exit 1; }

# The stamps are written last, so that an install which was cut off is taken up again.
$(VENV)/installed: requirements.txt | $(BIN)/python
	$(PIP) install -q $(TORCH_INDEX) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PIP) install -q $(TORCH_INDEX) -r requirements-dev.txt
	@touch $@

# Paced in real time, so that the ledger is that of a live call; one process, one ledger for all three.
#   FLAGS="--seed 3"    more flags for stream_demo.py
demo: $(VENV)/installed
	$(BIN)/python stream_demo.py --wav $(LANGUAGES:%=samples/question_%.wav) \
	  --out $(LANGUAGES:%=reply_%.wav) $(FLAGS)
	@echo "Listen to $(LANGUAGES:%=reply_%.wav): a toy model speaks; your own training replaces it."

# Two processes of one thread each: small tensors gain nothing from more.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	@if command -v shellcheck >/dev/null; then shellcheck runpod_setup.sh tools/*.sh .ci/run; \
	  else echo "shellcheck is not installed: shell scripts not checked (apt-get install shellcheck)"; fi

# The models in checkpoints/tiny, from nothing; each step resumes when the same line is given again.
tiny: $(VENV)/installed-dev
	PYTHON=$(BIN)/python tools/make_tiny.sh
