#!/bin/sh
# How long a running stream waits for its next token while a picture is encoded beside it, at several --max-step-tokens.
#   tests/pace/picture.sh [MODEL [SIDE [BUDGET...]]]
# SIDE is the picture's for the model, in pixels, a multiple of 28. LOCKSTEP names the program, if it is not built here.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
model=${1:-$root/tests/checkpoints/a}
side=${2:-3584}
shift "$(($# < 2 ? $# : 2))"
[ $# -gt 0 ] || set -- 64 512 32768
lockstep=${LOCKSTEP:-$root/target/release/lockstep}

log=$(mktemp)
server=
trap 'kill $server 2>/dev/null || true; rm -f "$log"' EXIT

for budget; do
    "$lockstep" serve --model "$model" --listen 127.0.0.1:0 --max-step-tokens "$budget" >"$log" 2>&1 &
    server=$!
    until address=$(sed -n 's/^ready: \([^ ]*\) .*/\1/p' "$log") && [ -n "$address" ]; do
        kill -0 $server 2>/dev/null || { cat "$log" >&2; exit 1; }
        sleep 0.2
    done
    echo "== --max-step-tokens $budget"
    "$lockstep" bench --server "$address" --max-tokens 32 --beside-picture "$root/tests/pictures/cat.jpg" \
        --resized-width "$side" --resized-height "$side"
    kill $server
    wait $server || true
done
