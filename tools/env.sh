#!/bin/sh
# Make .venv with exactly what requirements.lock names, on a machine that has python3 and little else.
# uv is used from the PATH, or from .uv, where it is put the first time.
set -eu
cd "$(dirname "$0")/.."

get_uv() {
  command -v uv && return
  [ -x .uv/bin/uv ] && { echo .uv/bin/uv; return; }
  if ! python3 -m pip --version >/dev/null 2>&1 && ! python3 -c 'import ensurepip' >/dev/null 2>&1; then
    sudo=''; [ "$(id -u)" = 0 ] || sudo=sudo
    echo 'python3 has neither pip nor venv here: installing python3-venv' >&2
    { $sudo apt-get update -qq && $sudo apt-get install -y -qq python3-venv; } >&2 ||
      { echo 'Could not install it. Run: sudo apt-get install python3-venv, then call make again.' >&2; exit 1; }
  fi
  if python3 -m pip --version >/dev/null 2>&1; then python3 -m pip install -q --target .uv uv >&2
  else python3 -m venv .uv && .uv/bin/pip install -q uv >&2; fi
  echo .uv/bin/uv
}

uv=$(get_uv)
[ -x .venv/bin/python ] || "$uv" venv -q --python '>=3.11' .venv
"$uv" pip sync -q --python .venv/bin/python requirements.lock
"$uv" pip install -q --python .venv/bin/python --no-deps -e .
touch .venv/.ready
