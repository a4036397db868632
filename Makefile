# Every target installs into .venv first when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
RECIPES := data autoencoder diffusion generate clip dino reward

.PHONY: demo reproduce test train lint tiny slow clean

demo: $(READY)  ## the shipped agent against a few other methods on 48 prompts
	$(BIN)/python evaluate.py

reproduce: $(READY)  ## every method on the whole test split, hours; resumes where it was stopped
	$(BIN)/python evaluate.py methods=all benchmark.limit=null hydra.run.dir=runs/reproduce

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

train: $(READY)  ## train an agent on the embedded world
	$(BIN)/python train_sb3.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy addiff_env

tiny: $(READY)  ## train the embedded world's models anew; resumes where it was stopped
	set -e; for recipe in $(RECIPES); do $(BIN)/python -m addiff_env.tiny.recipes.$$recipe; done
	$(BIN)/python -m addiff_env.tiny.quality

slow: $(READY)
	$(BIN)/python -m pytest -m slow

clean:  ## caches and build products; leaves .venv and runs/ alone
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find addiff_env tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@echo "installing (about 2-3 minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
