#!/bin/sh
# What the server itself costs, beside a shard that answers at once: processor time for a token of 1,000 streams, over 1 connection
# and more, and the time of an empty step, from one token of a lone stream to the next.
#   tests/pace/frontend.sh [CONNECTIONS...]
set -eu
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- 1 8 100 1000

run() {
    RUST_BACKTRACE=0 cargo test --release --workspace --test frontend -- --include-ignored --nocapture "$1" |
        sed -n 's/^.*\(one stream: .*\)/\1/p; s/^\(.* streams over .*\)/\1/p'
}

for connections; do
    LOCKSTEP_FRONTEND_CONNECTIONS=$connections run many_streams
done
run empty_step
