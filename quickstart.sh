#!/usr/bin/env bash
# Installs, trains a LoRA on a miniature FLUX.2-klein, draws what came of it. Arguments go to
# benchmarks/miniature/quickstart.py.
set -euo pipefail

cat <<'TEXT'
Quick start: teaches a miniature FLUX.2-klein, which lies in this repository, a new object from four pictures with
train_dopsd_flux2.py, and by ordinary LoRA training for comparison. It needs no GPU and downloads no model.

The first run installs requirements-tested.txt into .venv: about 400 MB where pip's torch is the CPU build, several
GB where it is the CUDA build (Linux). After that, a run takes two to four minutes.

TEXT

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/install.sh"
exec "$here/.venv/bin/python" "$here/benchmarks/miniature/quickstart.py" "$@"
