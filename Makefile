# make demo: record and report the bundled model.   make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test matrix lint docs browser slow first-hour gpu kernels engines views fuzz faults coverage-of-intervals false-alarms mutants pins clean

demo: $(INSTALLED)
	$(BIN)/mixlens demo --out out/demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Oldest and newest Python, torch and transformers, by hand before a release: half an hour on two cores.
matrix:
	.ci/matrix

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports --no-logo

# The site, in out/site. A warning, such as a broken reference, fails it.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/site/pages.py out/site-source
	$(BIN)/sphinx-build -q -W --keep-going out/site-source out/site

browser: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m browser

# The JavaScript of live views, after a change in mixlens/live/assets: checked, tested and bundled. Needs npm.
views:
	npm install --silent --no-package-lock --no-audit --no-fund
	npm run --silent check && npm run --silent test
	npm run --silent bundle -- --log-level=error \
	  --banner:js="/* $$(cat mixlens/live/assets/*.js mixlens/live/assets/mixlens.css | sha256sum | cut -d' ' -f1) */"

# On a machine with a CUDA device.
gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu tests/gpu

# Kernels on a CPU, in Triton's interpreter; Triton stays out of the environment, which has none without CUDA.
kernels: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target out/triton triton==3.6.0
	TRITON_INTERPRET=1 PYTHONPATH=out/triton $(BIN)/python -m pytest tests/models/test_decode_kernels.py

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

# An installed wheel outside the repository: what the README says, then forty tasks of a newcomer with data of their own.
first-hour: $(VENV)/.installed-test
	$(BIN)/python tests/first_hour.py

# vLLM beside transformers, in an environment of its own: ENGINE is its Python. By hand and before a release.
ENGINE ?= python3
engines:
	PYTHONPATH=. $(ENGINE) tests/engines/by_hand.py

# By hand: see CONTRIBUTING.md. N ways of driving a model and N streams, or N mutants, drawn by SEED.
SEED ?= 0
fuzz: N ?= 20000
fuzz: $(VENV)/.installed-test
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python fuzz_drivers.py --n $(N) --seed $(SEED)
	cd tests && ../$(BIN)/python fuzz_streams.py --n $(N) --seed $(SEED)

# Kills, tampering and limits, of every verb; a quarter of an hour and more. VERBS="record topk" for some.
faults: N ?= 500
faults: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/run.py --n $(N) --seed $(SEED) $(if $(VERBS),--verbs $(VERBS))

# How often intervals hold the truth; some minutes.
coverage-of-intervals: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage_of_intervals.py

# How often a family of cells has a survivor where nothing is to be found; half an hour.
false-alarms: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/false_alarms.py

mutants: N ?= 300
mutants: $(VENV)/.installed-mutants
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py --n $(N) --seed $(SEED)

# After a change of dependencies: packages keep their pins unless pyproject.toml forbids them.
pins: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra test --extra browser --extra dev --extra docs --extra mutants --python-version 3.11 \
	  --no-annotate --no-emit-index-url --custom-compile-command 'make pins' --output-file constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,browser,dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(VENV)/.installed-mutants: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	@touch $@

clean:
	rm -rf $(VENV) out
