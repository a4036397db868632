#!/usr/bin/env bash
# Build an isolated environment for the official hpsv2 package, which pins protobuf < 4 and pytest 7.2.
# Usage: build_hpsv2_venv.sh <folder>. open-clip-torch is there for CLIP's vocabulary, which the hpsv2 wheel lacks.
set -euo pipefail
folder=${1:?usage: build_hpsv2_venv.sh <folder>}
"${PYTHON:-python3.11}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip "torch==2.13.0" "torchvision==0.28.0" "transformers==4.30.2" "timm==1.0.15" "numpy<2" setuptools \
  clint ftfy huggingface-hub regex requests tqdm
pip --no-deps "hpsv2==1.2.0" "open-clip-torch==2.24.0"
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$packages/open_clip/bpe_simple_vocab_16e6.txt.gz" "$packages/hpsv2/src/open_clip/"
touch "$folder/.complete" # a half-built environment has none
