#!/usr/bin/env bash
# Installs, trains a LoRA on a tiny FLUX.2-klein, draws before and after. Arguments go to quickstart/quickstart.py.
set -euo pipefail

cat <<'TEXT'
Quick start: makes a tiny FLUX.2-klein with random weights and four pictures, trains a LoRA on them with
train_dopsd_flux2.py, and draws what changed. It needs no GPU and downloads no model.

The first run installs requirements-tested.txt into .venv: about 400 MB where pip's torch is the CPU build, several
GB where it is the CUDA build (Linux). After that, a run takes about a minute.

TEXT

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/install.sh"
exec "$here/.venv/bin/python" "$here/quickstart/quickstart.py" "$@"
