#!/bin/sh
# Makes /opt/headlong, a virtual environment with all that Headlong depends on, in the versions of
# constraints.txt: install-dependencies.sh EXTRAS TORCH_INDEX
set -eu
cd /tmp

extras=$1 torch_index=$2
python3 -m venv /opt/headlong
pip() { /opt/headlong/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

# Alone and first: PyTorch's index of CPU builds is asked for PyTorch, and for nothing else. Without
# an index of its own it comes from where all comes from, as a CUDA build.
torch=$(grep '^torch==' constraints.txt)
pip install --no-deps ${torch_index:+--index-url "$torch_index"} "$torch"

python3 requirements.py pyproject.toml "$extras" >requirements.txt
pip install --constraint constraints.txt --requirement requirements.txt
pip check
