#!/usr/bin/env bash
# Builds what run.sh runs, strips it, and packs it, to be carried to a machine without a compiler.
#   tests/gpu/pack.sh FILE.tar.gz
# The machine must have this one's processor architecture, and a C library that is no older.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$(dirname "$1")"
pack=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
to=$(mktemp -d)
trap 'rm -rf "$to"' EXIT
cd "$root"
built=${CARGO_TARGET_DIR:-target}/release

cargo build --release -p lockstep --bin lockstep
cargo build --release -p lockstep-tests --bin random-checkpoint
cargo build --release -p lockstep-shard --example gpu
# Cargo says where it put each test.
tests=$(cargo test --release -p lockstep-shard --test kernels --test cuda --test nvrtc --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))$/\1/p')

for program in "$built/lockstep" "$built/random-checkpoint" "$built/examples/gpu" $tests; do
  name=$(basename "$program")
  strip -o "$to/${name%-????????????????}" "$program"
done
# The folder that goes with it need not be a repository.
{ git describe --always --abbrev=40 --dirty 2>/dev/null || echo "(no repository)"; } >"$to/commit"
tar czf "$pack" -C "$to" .
(cd "$to" && wc -c -- *)
wc -c "$pack"
