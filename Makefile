PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

python := $(VENV)/bin/python
ready := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup fit test lint docs

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) (test processes) ARGS= (passed on by fit and test)'

setup: $(ready)  ## make the virtual environment, with everything that the other targets need

fit: $(ready)  ## train the default model; e.g. make fit ARGS="trainer.max_steps=2"
	$(python) -m cod_lightning fit $(ARGS)

test: $(ready)  ## run the test suite; e.g. make test WORKERS=0 ARGS="-k rooms"
	$(python) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(ready)  ## check style, format and types
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m ty check --python $(VENV) src

docs: $(ready)  ## build the documentation into site/; open site/index.html
	$(python) -m mkdocs build

# .unfinished becomes .ready at the very end: where an earlier attempt left it behind, start afresh.
$(ready): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("$(PYTHON) is Python " + sys.version.split()[0] + "; 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@if [ -e $(VENV)/.unfinished ]; then echo 'The last set-up did not finish: starting afresh.'; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.unfinished
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --editable '.[dev]'
	@if $(python) -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	    echo 'This torch has no CUDA. litdata brought a torchvision built for CUDA, beside which lightning cannot be'; \
	    echo 'imported; nothing here uses torchvision, so it is removed.'; \
	    $(python) -m pip uninstall --yes torchvision; \
	fi
	$(python) -c 'import lightning, litdata'
	@mv $(VENV)/.unfinished $(ready)
