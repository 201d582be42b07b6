#!/usr/bin/env bash
# Installs, checks style and runs the tests on two cores. --fast runs the quick selection; other arguments go to
# pytest: bash run_tests.sh -m exhaustive
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "not slow and not exhaustive" "$@"
fi
bash install.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal "$@"
