# Every target sets itself up: in a fresh clone, `make demo` or `make test` is all there is to type.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes of the test run; each takes about 2 GB.
WORKERS ?= 2
LOCK := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet

# Threads that wait give their core to others: steadier where torch is not alone on the machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install check test demo serve bench openapi lock audit sbom

install: $(READY)

$(READY): requirements/install.sh requirements/lock.txt requirements/uv.txt pyproject.toml
	bash requirements/install.sh $(VENV)
	touch $@

check: $(READY)
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy --strict && $(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

demo: $(READY)
	$(BIN)/python examples/demo.py

serve: $(READY)
	$(BIN)/python -m server

bench: $(READY)
	$(BIN)/python benchmarks/text_path.py
	$(BIN)/python benchmarks/throughput.py

# docs/openapi.json; `tests/test_fuzz.py` fails where the app says something else.
openapi: $(READY)
	$(BIN)/python -c "from server import app, fake, openapi, settings; \
	print(openapi.text(app.create_app(settings.Settings(), fake.FakeClassifier())), end='')" > docs/openapi.json

lock: $(READY)
	$(BIN)/uv pip compile $(LOCK) --extra demo --extra evaluate --extra otel --extra ray --extra dev pyproject.toml -o requirements/lock.txt
	$(BIN)/uv pip compile $(LOCK) -c requirements/lock.txt --extra otel pyproject.toml -o requirements/server.txt
	$(BIN)/uv pip compile $(LOCK) -c requirements/lock.txt --extra otel --extra ray pyproject.toml -o requirements/ray.txt
	echo uv | $(BIN)/uv pip compile $(LOCK) - -o requirements/uv.txt

# Known security faults of everything that is locked, and a licence for every file.
audit: $(READY)
	$(BIN)/uv tool run reuse@6.2.0 lint
	$(BIN)/uv tool run pip-audit@2.10.1 --strict --disable-pip --require-hashes -r requirements/lock.txt
	$(BIN)/uv tool run pip-audit@2.10.1 --strict --disable-pip --require-hashes -r requirements/ray.txt

# docker/sbom.cdx.json and docs/licences.md, of what the image installs.
sbom: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/uv tool run --from cyclonedx-bom@7.5.0 --with 'cyclonedx-python-lib[json-validation]' \
		python requirements/sbom.py
