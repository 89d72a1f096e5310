#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ./quickstart without a terminal: one prompt, a streamed answer, the curl line, everything stopped afterwards.
set -uo pipefail
cd "${TD_SOURCE_DIR:?}"
out=$(./quickstart </dev/null 2>&1) || { echo "$out"; echo "quickstart ended with $?"; exit 1; }
echo "$out"
case $out in
*"ready in "*"http://127.0.0.1:"*"> What is 23 + 48?"*71*"curl -N"*) ;;
*) echo "an expected part is missing"; exit 1 ;;
esac
line=$(printf '%s\n' "$out" | sed -n 's/^  curl/curl/p; s/^    -d/-d/p' | tr -d '\\\n')
build/release/tandem serve models/glm-tiny --listen 127.0.0.1:0 >"${TMPDIR:-/tmp}/qs.$$" 2>&1 &
server=$!
trap 'kill $server; wait $server; rm -f "${TMPDIR:-/tmp}/qs.$$"' EXIT
for _ in $(seq 200); do
    url=$(sed -n 's/^ready in .*: \(http:.*\)$/\1/p' "${TMPDIR:-/tmp}/qs.$$")
    [ -z "$url" ] || break
    sleep 0.05
done
answer=$(eval "${line/http:\/\/127.0.0.1:8080/$url}" 2>/dev/null) || { echo "the curl line failed: $line"; exit 1; }
case $answer in
*'data: [DONE]'*) ;;
*) echo "the curl line gave: $answer"; exit 1 ;;
esac
