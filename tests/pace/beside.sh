#!/bin/sh
# How long a running stream waits for its next token while a large picture or a long prompt is computed beside it, at several
# --max-step-tokens; as many as the newcomer has tokens is no budget at all.
#   tests/pace/beside.sh picture [SIDE [MODEL [BUDGET...]]]
#   tests/pace/beside.sh prompt [TOKENS [MODEL [BUDGET...]]]
# SIDE is the picture's for the model, in pixels, a multiple of 28. LOCKSTEP names the program, if it is not built here.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
case ${1:-} in
picture)
    side=${2:-3584}
    newcomer="--resized-width $side --resized-height $side --beside-picture $root/tests/pictures/cat.jpg"
    ;;
prompt) newcomer="--beside-prompt ${2:-30000}" ;;
*)
    sed -n '2,5p' "$0" >&2
    exit 2
    ;;
esac
model=${3:-$root/tests/checkpoints/a}
shift "$(($# < 3 ? $# : 3))"
[ $# -gt 0 ] || set -- 64 512 32768
lockstep=${LOCKSTEP:-$root/target/release/lockstep}

log=$(mktemp)
server=
trap 'kill $server 2>/dev/null || true; rm -f "$log"' EXIT

for budget; do
    # One more context than the newcomer's, for the stream.
    "$lockstep" serve --model "$model" --listen 127.0.0.1:0 --kv-tokens 65536 --max-step-tokens "$budget" >"$log" 2>&1 &
    server=$!
    until address=$(sed -n 's/^ready: \([^ ]*\) .*/\1/p' "$log") && [ -n "$address" ]; do
        kill -0 $server 2>/dev/null || { cat "$log" >&2; exit 1; }
        sleep 0.2
    done
    echo "== --max-step-tokens $budget"
    # shellcheck disable=SC2086 # it is several words
    "$lockstep" bench --server "$address" --max-tokens 32 $newcomer
    kill $server
    wait $server || true
done
