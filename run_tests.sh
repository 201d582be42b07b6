#!/usr/bin/env bash
# Installs, then checks style and runs the tests. Arguments go to pytest: bash run_tests.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash install.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -q "$@"
