#!/usr/bin/env bash
# Makes .venv where it is missing and installs the tested versions. Running it again takes seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=""
for candidate in "${PYTHON:-python3.11}" python3 python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "install.sh: no Python 3.11 or newer is found; install it, or name it: PYTHON=/path/to/python bash $0" >&2
  exit 1
fi

.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check -r requirements-tested.txt |
  sed '/^Requirement already satisfied/d'
