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
demo: $(VENV)/installed
	$(BIN)/python stream_demo.py --wav $(LANGUAGES:%=samples/question_%.wav) \
	  --out $(LANGUAGES:%=reply_%.wav)
	@echo "Listen to $(LANGUAGES:%=reply_%.wav): a toy model speaks; your own training replaces it."

# Two processes of one thread each: small tensors gain nothing from more.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	@if command -v shellcheck >/dev/null; then shellcheck runpod_setup.sh .ci/run; \
	  else echo "shellcheck is not installed: shell scripts not checked (apt-get install shellcheck)"; fi

# bf16 makes the codec's training a third faster on a CPU that multiplies it, and ten times slower on
# one that does not.
PRECISION ?= $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo bf16 || echo fp32)
# The codec's sound and voice: minutes on a GPU, hours on a CPU, which learns less in them. Without
# the spectral loss, as what ships was taught.
RECORDED := data/other $(LANGUAGES:%=data/%)
ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
define TEACH_SOUND
	$(BIN)/python train_codec.py --data_dirs $(RECORDED) --preset tiny --teacher none \
	  --batch_size 36 --window_seconds 2 --epoch_hours 19 --num_epochs 10 --augment_share 0.15 \
	  --gen_lr 1e-3 --disc_lr 8e-4 --warmup_steps 200 --disc_start 0.75 --mel_weight 2 \
	  --spectral_weight 0 --lm_rate 0.65 --keep_words --init_from runs/codec_listen \
	  --num_workers 13 --seed 5 --cuda_graph --checkpoint_dir runs/codec_voice
endef
else
define TEACH_SOUND
	$(BIN)/python train_codec.py --data_dirs $(RECORDED) \
	  --preset tiny --batch_size 6 --window_seconds 2 --epoch_hours 0.5 --num_epochs 84 \
	  --gen_lr 8e-4 --warmup_steps 200 --disc_start 1 --spectral_weight 0 \
	  --language_temperature 3 --keep_words --precision $(PRECISION) \
	  --init_from runs/codec_listen --num_workers 1 --seed 1 --checkpoint_dir runs/codec
	$(BIN)/python train_codec.py --data_dirs $(RECORDED) \
	  --preset tiny --batch_size 6 --window_seconds 2 --epoch_hours 0.25 --num_epochs 18 \
	  --gen_lr 5e-4 --disc_lr 1e-3 --warmup_steps 30 --disc_start 0 --disc_seconds 0.75 \
	  --mel_weight 2 --spectral_weight 0 --language_temperature 3 --decoder_only \
	  --init_from runs/codec --num_workers 1 --seed 3 --checkpoint_dir runs/codec_voice
endef
endif
# The models in checkpoints/tiny, from nothing; each step resumes when the same line is given again.
INTENTS := greeting,name,weather,capitals,colours,counting,small_talk,goodbye
tiny: $(VENV)/installed-dev
	$(BIN)/python download_data.py --corpora packages --data_dir data
	$(BIN)/python make_conversations.py --clips_dir data --clips_hours 1.8
	$(BIN)/python train_codec.py --data_dirs $(LANGUAGES:%=data/%/synthetic) \
	  --preset tiny --batch_size 24 --window_seconds 2 --epoch_hours 1 --num_epochs 40 \
	  --gen_lr 1e-3 --listen_share 1 --augment_share 0.4 --teacher none \
	  --num_workers 1 --seed 1 --checkpoint_dir runs/codec_listen
	$(TEACH_SOUND)
	$(BIN)/python train_codec.py --checkpoint_dir runs/codec_voice --export checkpoints/tiny/codec
	$(BIN)/python make_conversations.py --codec checkpoints/tiny/codec --hours 3.3 \
	  --intents $(INTENTS) --exchanges archetypes --output_dir data/conversations/scripted
	$(BIN)/python make_conversations.py --codec checkpoints/tiny/codec --hours 0.06 \
	  --split validation --intents $(INTENTS) --exchanges archetypes \
	  --output_dir data/conversations/scripted_validation
	$(BIN)/python train_s2s.py --data_dirs data/conversations/scripted \
	  data/conversations/scripted_validation --codec checkpoints/tiny/codec --preset tiny \
	  --batch_size 8 --epoch_hours 2 --num_epochs 44 --lr 8e-4 --warmup_steps 100 \
	  --listen_share 0.4 --depth_fraction 0.17 --emotion_drop 0.5 --acoustic_drop 0.8 \
	  --agent_deaf 1 --vocab_size 640 --num_workers 1 --seed 1 --checkpoint_dir runs/s2s
	$(BIN)/python make_conversations.py --codec checkpoints/tiny/codec --hours 5 --seed 5 \
	  --intents $(INTENTS) --exchanges archetypes --output_dir data/conversations/scripted_more
	$(BIN)/python train_s2s.py --data_dirs data/conversations/scripted_more \
	  data/conversations/scripted data/conversations/scripted_validation \
	  --codec checkpoints/tiny/codec --preset tiny \
	  --batch_size 8 --epoch_hours 2 --num_epochs 46 --lr 7e-4 --warmup_steps 100 \
	  --listen_share 0.25 --depth_fraction 0.17 --emotion_drop 0.5 --acoustic_drop 0.8 \
	  --agent_deaf 1 --vocab_size 640 --num_workers 1 --seed 2 --init_from runs/s2s \
	  --checkpoint_dir runs/s2s_more
	$(BIN)/python train_s2s.py --checkpoint_dir runs/s2s_more --export checkpoints/tiny/s2s
