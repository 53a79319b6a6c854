#!/usr/bin/env bash
# Makes or completes a virtual environment: scripts/venv.sh FOLDER ARGUMENTS_OF_UV_PIP_INSTALL...
# The requirements are complete and pinned, so nothing is resolved here.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "unslothd needs Python 3.11 to 3.14, and none of these is one: ${PYTHON:-python3 python3.11 … python3.14}." >&2
    echo "Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
    return 1
}

if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$python cannot make virtual environments: its modules venv and ensurepip are missing." >&2
        echo "Install them (Debian, Ubuntu: apt-get install python3-venv), then run this again." >&2
        exit 1
    fi
    rm -rf "$folder"
    "$python" -m venv "$folder"
fi

# The same uv for everyone; only a changed pin costs a second.
wanted=$(grep -o '^uv==.*' requirements/uv.txt)
if [ "$("$folder/bin/uv" --version 2>/dev/null | cut -d' ' -f2)" != "${wanted#uv==}" ]; then
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements/uv.txt
fi
UV_PYTHON_DOWNLOADS=never "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --no-deps "$@"
