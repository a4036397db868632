# Every target installs into .venv first when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
BENCHMARK ?= tiny-final
LIMIT ?= null

.PHONY: demo reproduce web test train lint tiny slow clean

demo: $(READY)  ## the shipped agent against a few other methods on 48 prompts
	$(BIN)/addiff evaluate

# By the s/image in docs/results.md half an hour on two cores with bfloat16, an hour without; ARGS='--methods all': hours.
reproduce: $(READY)  ## every number of the README and of docs/results.md; resumes where it was stopped
	$(BIN)/addiff reproduce --benchmark $(BENCHMARK) --limit $(LIMIT) $(ARGS)

web: $(READY)  ## a page to type prompts on; ARGS='--port 8000'
	$(BIN)/addiff web $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

train: $(READY)  ## train an agent on the embedded world
	$(BIN)/addiff train

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy addiff_env
	$(BIN)/lint-imports

tiny: $(READY)  ## train the embedded world's models anew; resumes where it was stopped
	$(BIN)/addiff world train
	$(BIN)/addiff world quality

slow: $(READY)
	$(BIN)/python -m pytest -m slow

clean:  ## caches and build products; leaves .venv and runs/ alone
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find addiff_env tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml setup.py constraints.txt
	@echo "installing (about 2-3 minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
