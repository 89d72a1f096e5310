#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The official Node client as judge. Needs node, npm and their registry; the modules are kept in the build tree.
set -uo pipefail
skip() { echo "SKIP test_openai_node: $1"; exit 77; }
command -v node >/dev/null && command -v npm >/dev/null || skip "node and npm are missing (packages nodejs, npm)"
dir=${TD_BINARY_DIR:?}/sdk/node
if [ ! -e "$dir/ok" ]; then
    rm -rf "$dir"
    mkdir -p "$dir"
    echo '{"private":true,"type":"module"}' >"$dir/package.json"
    (cd "$dir" && npm install --no-audit --no-fund --silent openai >log 2>&1) || skip "npm cannot reach its registry: $(tail -n 1 "$dir/log")"
    touch "$dir/ok"
fi
cp "$TD_SOURCE_DIR/tests/sdk/openai_client.mjs" "$dir/"
exec python3 -B "$TD_SOURCE_DIR/tests/sdk/with_server.py" node "$dir/openai_client.mjs"
