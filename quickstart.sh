#!/usr/bin/env bash
# Installs, trains a LoRA on a miniature FLUX.2-klein or Z-Image-Turbo, and draws a contact sheet. Arguments are passed
# to benchmarks/miniature/quickstart.py; paths among them are relative to the current folder.
set -euo pipefail

cat <<'TEXT'
Quick start: teaches a miniature FLUX.2-klein, or with --model zimage a miniature Z-Image-Turbo, a new object from four
pictures: with this repository's training script and, for comparison, with ordinary LoRA training. Both miniatures are
part of the repository. It needs no GPU and downloads no model.

The first run installs requirements-tested.txt into .venv: about 400 MB if pip installs the CPU build of torch, several
GB if it installs the CUDA build (on Linux). After that, a run takes two to four minutes.

TEXT

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/install.sh"
# -P: modules are not looked up in the current folder.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$here/.venv/bin/python" -P -m benchmarks.miniature.quickstart "$@"
