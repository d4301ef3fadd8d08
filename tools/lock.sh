#!/bin/sh
# Rewrite requirements.lock: the exact version of everything, for every platform, without download addresses.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.uv/bin:$PATH" uv pip compile -q setup.py --all-extras --universal --python-version 3.11 --upgrade \
  --no-emit-index-url --no-annotate --no-header -o requirements.lock
