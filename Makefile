# The commands of this repository. Each one sets up what it needs; nothing has to be typed before it.
#
#   make demo        Label Studio + backend + core on this machine, with sample images, until Ctrl-C
#   make demo IMAGES=folder [NAMES=nose,left_eye | LABELS=annotations.json | CONFIG=config.xml]   the same with your own images
#   make demo ONCE=1 the whole tour by itself: label, predict, correct, train, decide, predict again
#   make test        every test but the long ones;  make test-slow  the long ones;  make lint  ruff and mypy
#   make test-loop   of the long tests those of the correction loop and of several objects, which continuous integration runs, too
#   make setup       only the environments: .venv, and .labelstudio/venv for Label Studio
#   make nano        trains the shipped model's recipe from nothing on KEYPOINTS; make nano-research on all sets there
#   make card        measures the shipped model on KEYPOINTS (real sets, not part of this repository) into its model card
#   make rounds      what a LoRA round is worth there;  ABLATE=benchmarks/recipes.json  compares recipes on two sets
#   make clean       removes what the tools made (caches, the tour's data), nothing that you labelled or trained;  make distclean  the environments too
#
# LABEL_STUDIO_BIN=/path/to/label-studio   uses a Label Studio 1.23.2 that is already installed

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
LS_VENV := .labelstudio/venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest

ifeq ($(LABEL_STUDIO_BIN),)
LABEL_STUDIO := $(LS_VENV)/.ready
else
LABEL_STUDIO :=
export LABEL_STUDIO_BIN
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-loop lint nano nano-research card rounds clean distclean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

# An environment is ready when its file .ready is newer than its requirements. `.installing` marks an install that did
# not come to its end: such a folder is made anew, whatever state it is in, and so is one whose Python does not run
# (the repository was moved, or the Python it was made with is gone).
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Found Python {v[0]}.{v[1]}; 3.11 or later is needed. Name one: make PYTHON=python3.11 setup")'
	@if [ -e $(1)/.installing ] || ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then rm -rf $(1); $(PYTHON) -m venv $(1); fi
	@echo "Installing $(2) into $(1) (some minutes the first time) ..."
	@touch $(1)/.installing
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(2)
	@rm $(1)/.installing
	@touch $@
endef

setup: $(VENV)/.ready $(LABEL_STUDIO)

$(VENV)/.ready: requirements.txt requirements/backend.txt requirements/dev.txt requirements/lock.txt
	$(call install,$(VENV),requirements/dev.txt)

$(LS_VENV)/.ready: requirements/label-studio.txt requirements/label-studio-lock.txt
	$(call install,$(LS_VENV),requirements/label-studio.txt)

# `exec`: Ctrl-C reaches the demo itself, which then stops everything that it started.
demo: setup
	@exec $(RUN) -m backend.demo $(if $(IMAGES),--images "$(IMAGES)") $(if $(LABELS),--labels "$(LABELS)") \
		$(if $(NAMES),--names "$(NAMES)") \
		$(if $(CONFIG),--config "$(CONFIG)") $(if $(filter-out 0,$(ONCE)),--once) $(DEMO_ARGS)

test: setup
	@exec $(PYTEST) $(ARGS)

test-slow: setup
	@exec $(PYTEST) -m slow $(ARGS)

# Three rounds in the real Label Studio, kill -9 in the middle, rounds that must not be promoted or must be rolled back, the page; several
# objects in an image, with their exports, and the smart tools.
LOOP := $(addprefix tests/end_to_end/test_,three_rounds.py kills.py bad_rounds.py page.py objects.py smart.py)
test-loop: setup
	@exec $(PYTEST) -m slow $(LOOP) $(ARGS)

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# The folder of the labelled sets, as in the model card. VALIDATION is never trained on; unseen groups of TRAINED are named.
KEYPOINTS ?= ../shared/keypoints
MODEL ?= nano
VALIDATION ?= dlc_horse_walk glue_tubes dlc_reaching_mouse dpk_fly fly_wing
TRAINED ?= udacity_face68 car_wheel sudoku_corners sleap_fly_pair lightning_mirror_mouse coco_mini_person carfusion_sample
RESEARCH ?= $(TRAINED) lspet_person hand_realworld ultrasound_tongue lips dental_incisor
BUDGET ?= 14400
ABLATE ?=
ROUNDS_ON ?= $(if $(ABLATE),dlc_horse_walk dpk_fly,$(VALIDATION))
ROUND_LABELS ?= $(if $(ABLATE),20,10 20 50)

# From nothing to a checkpoint in runs/: trains for BUDGET seconds, then fits how sure found boxes are. Stopped, it goes on with
# ARGS=--resume. On a GPU, in sessions of ten minutes: make nano BUDGET=1500 ARGS="--stop-after 570 --resume", again and again until it says
# `Wrote runs/nano` (loading counts towards the session, not towards BUDGET; a session that ends before fails with Error 3).
# glibc hands large blocks back to the kernel at once and asks for them again; keeping them makes a step a tenth faster.
define pretrain
	@MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
		$(RUN) -m kptllm_core train --model nano $(foreach set,$(2),--data $(KEYPOINTS)/$(set)) \
		--watch $(KEYPOINTS)/dlc_horse_walk --seconds $(BUDGET) --out runs/$(1) $(ARGS)
	@exec $(RUN) -m kptllm_core calibrate --model runs/$(1)
endef

nano: $(VENV)/.ready
	$(call pretrain,nano,$(TRAINED))

nano-research: $(VENV)/.ready
	$(call pretrain,nano-research,$(RESEARCH))

card: $(VENV)/.ready
	@exec $(RUN) benchmarks/model_card.py --model $(MODEL) $(foreach set,$(VALIDATION),--data $(KEYPOINTS)/$(set)) \
		$(foreach set,$(TRAINED),--trained $(KEYPOINTS)/$(set)) $(ARGS)

rounds: $(VENV)/.ready
	@exec $(RUN) benchmarks/rounds.py --model $(MODEL) $(foreach set,$(ROUNDS_ON),--data $(KEYPOINTS)/$(set)) \
		$(foreach n,$(ROUND_LABELS),--labels $(n)) $(if $(ABLATE),--ablate $(ABLATE)) $(ARGS)

clean:
	rm -rf .data/tour .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -not -path "./.labelstudio/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .labelstudio
