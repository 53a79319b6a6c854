#!/usr/bin/env bash
# Compiles the requirements: the newest versions that fit together, without the address of any registry.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1/bin/uv
compile() {
    "$uv" pip compile --quiet --upgrade --universal --python-version 3.11 --no-emit-index-url --no-annotate \
        --custom-compile-command "make lock" "$@"
}
compile pyproject.toml --extra cli --extra server --extra otel --extra mcp --extra dev \
    --override requirements/overrides.txt --output-file requirements/dev.txt
sed -i "2a # Versions of $(date --utc +%F)" requirements/dev.txt
compile requirements/generate.in --output-file requirements/generate.txt
