#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The official Python client as judge. Needs pip and its registry; the environment is kept in the build tree.
set -uo pipefail
skip() { echo "SKIP test_openai_python: $1"; exit 77; }
dir=${TD_BINARY_DIR:?}/sdk/python
if [ ! -e "$dir/ok" ]; then
    rm -rf "$dir"
    python3 -m venv "$dir" >/dev/null 2>&1 || skip "python3 -m venv does not work (package python3-venv)"
    "$dir/bin/pip" install -q --disable-pip-version-check 'openai>=1.60,<3' >"$dir/log" 2>&1 || skip "pip cannot reach its registry: $(tail -n 1 "$dir/log")"
    touch "$dir/ok"
fi
exec "$dir/bin/python" -B "$TD_SOURCE_DIR/tests/sdk/openai_client.py"
