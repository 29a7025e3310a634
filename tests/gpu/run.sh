#!/usr/bin/env bash
# Everything there is to do on a machine with a GPU, stage by stage, with a results file that grows as stages end.
#   tests/gpu/run.sh [--out DIR] [--binaries PACK|DIR] [--model DIR] [--scratch DIR] [--libraries DIR] [--python PYTHON]
#                    [--budget SECONDS] [--dry] [STAGE...]
# README.md beside this says what the stages are, how long each may take, and how to bring binaries that were built elsewhere.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

# Memory, where there is enough of it for the checkpoint.
scratch=/dev/shm
[ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)" -gt $((24 << 20)) ] 2>/dev/null || scratch=${TMPDIR:-/tmp}
scratch=$scratch/lockstep-gpu
out=$PWD/gpu-results binaries= model= libraries= python=python3 budget= dry=
stages=()
while [ $# -gt 0 ]; do
  case $1 in
  --out | --binaries | --model | --scratch | --libraries | --python | --budget)
    declare "${1#--}=$2"
    shift
    ;;
  --dry) dry=yes ;;
  -*)
    sed -n '2,5p' "$0" >&2
    exit 2
    ;;
  *) stages+=("$1") ;;
  esac
  shift
done

mkdir -p "$out" "$scratch"
out=$(cd "$out" && pwd)
export LOCKSTEP_REPOSITORY=$root LOCKSTEP_TEST_GPU=${LOCKSTEP_TEST_GPU:-0} PYTHONUNBUFFERED=1 RUST_BACKTRACE=0
rm -f "$out"/{results.md,results.json,stages.jsonl,logs.txt,dry} "$out"/*.measures.jsonl
[ -z "$dry" ] || touch "$out/dry"
if [ -z "$binaries" ]; then
  binaries=$scratch/programs.tar.gz
  "$here/pack.sh" "$binaries" || { echo "the programs are not built: bring them with --binaries" >&2; exit 1; }
  # Building is no part of the budget.
  SECONDS=0
fi
if [ -f "$binaries" ]; then
  mkdir -p "$scratch/programs"
  tar xf "$binaries" -C "$scratch/programs"
  binaries=$scratch/programs
fi

# CUDA's libraries under the names that are looked for: those of the Python packages have none that a loader finds.
if [ -z "$libraries" ]; then
  libraries=$scratch/libraries
  "$python" "$here/libraries.py" "$libraries" >"$scratch/libraries.txt" 2>&1 || cat "$scratch/libraries.txt"
fi
export peer_library_path=${LD_LIBRARY_PATH:-}
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}:/usr/local/nvidia/lib64"
export XDG_CACHE_HOME=$scratch/cache

program() { echo "$binaries/$1"; }

# stage NAME SECONDS COMMAND...: runs it if it is wanted, within its time, and writes down how it went.
stage() {
  local name=$1 limit=$2
  shift 2
  if [ ${#stages[@]} -gt 0 ] && [[ " ${stages[*]} " != *" $name "* ]]; then return; fi
  # On stand-ins a second of a GPU is minutes.
  [ -z "$dry" ] || limit=$((limit * 10))
  local shown=${shown:-$*}
  local start=$SECONDS log=$scratch/$name.log logs=$out/logs.txt code=0
  if [ -n "$budget" ]; then
    # What is left, but for the end of a stage that is stopped.
    local left=$((budget - SECONDS - 15))
    [ "$limit" -le "$left" ] || limit=$left
  fi
  echo "== $name ($limit s): $shown" | tee -a "$logs"
  local begins=$(($(stat -c %s "$logs") + 1))
  if [ "$limit" -lt 10 ]; then
    echo "left out: no time is left" >>"$logs"
    code=77
  else
    timeout --kill-after=10 "$limit" "$@" >>"$logs" 2>&1 || code=$?
  fi
  local took=$((SECONDS - start))
  tail -c "+$begins" "$logs" >"$log"
  printf '== %s: exit %s after %s s\n\n' "$name" "$code" "$took" >>"$logs"
  "$python" "$here/report.py" add "$out" "$name" "$code" "$took" "$limit" "$log" "$shown"
  tail -n 3 "$log" | cut -c1-200 | sed 's/^/   /'
  echo "   exit $code after $took s"
}

# Each file of tests is a process of its own: a kernel that fails takes its process's GPU with it.
kernel_tests() {
  local failed=0 kernels
  kernels=$(program kernels)
  for tests in gemv gemm attention attention_sm90 rowwise rotary reduce patches sampling hash; do
    say "$kernels" --test-threads=1 "$tests::" || failed=1
  done
  return $failed
}

sanitize() {
  command -v compute-sanitizer || { echo "left out: there is no compute-sanitizer"; return 77; }
  local failed=0 kernels
  kernels=$(program kernels)
  for tests in hash rotary rowwise patches reduce::sums gemv sampling gemm::every attention::vision attention_sm90::vision; do
    say timeout 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$kernels" --test-threads=1 "$tests" || failed=1
  done
  say timeout 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$kernels" --test-threads=1 rowwise:: || failed=1
  return $failed
}

# Settings of NCCL that may let ranks share a GPU; what it says of them is the result.
nccl_on_one_gpu() {
  local cuda code=1
  cuda=$(program cuda)
  for settings in NCCL_MULTI_RANK_GPU_ENABLE=1 "LOCKSTEP_TEST_HOSTS_APART=1 NCCL_SOCKET_IFNAME=lo" ""; do
    # shellcheck disable=SC2086
    if say env $settings NCCL_DEBUG=WARN timeout 25 "$cuda" --ignored --nocapture ranks_that_share_a_gpu; then code=0; fi
  done
  return $code
}

# Says what it runs.
say() {
  echo "+ $*"
  "$@"
}

in_process() { say "$(program gpu)" "${measured[@]}" --model "$model" --json "$out/in_process.measures.jsonl" --kernel-cache "$scratch/cache/lockstep"; }
helper() { say "$python" "$here/stack.py" "$@" --lockstep "$(program lockstep)"; }
# PyTorch finds its libraries by itself.
peer() { say env LD_LIBRARY_PATH="$peer_library_path" HF_HUB_OFFLINE=1 "$python" "$here/transformers_bench.py" "$@" --json "$out/transformers.measures.jsonl"; }

# What runs as a stage is a command: functions are, through bash.
export -f say program kernel_tests sanitize nccl_on_one_gpu in_process helper peer
export here root binaries python scratch out

if [ -n "$dry" ]; then
  model=${model:-$root/tests/checkpoints/shapes}
  measured="--contexts 64 --batches 1,2 --prompts 64 --step-tokens 64 --picture 112x84 --square 64 --bytes 4194304 --measure-ms 1 --steps 2"
  dimensions=small size=dry
else
  measured="" dimensions=7b size=full
fi
checkpoint=$scratch/$dimensions
model=${model:-$checkpoint}
export model dry measured
function_stage() {
  local name=$1 limit=$2 call=$3
  local shown=$call
  stage "$name" "$limit" bash -c "set -uo pipefail; measured=(\$measured); $call"
}

# What needs weights has them made, whichever stages were asked for.
if [ ${#stages[@]} -gt 0 ] && [ ! -e "$model/model.safetensors" ]; then stages+=(checkpoint); fi

stage versions 30 "$python" "$here/versions.py" "$out" "$(program lockstep)"
if [ -z "$dry" ] && [ -e "$checkpoint/model.safetensors" ]; then
  echo "== checkpoint: $checkpoint is there already"
else
  stage checkpoint 180 "$(program random-checkpoint)" --config "$dimensions" --tokenizer "$root/tests/tokenizer" "$checkpoint"
fi
function_stage kernels 120 kernel_tests
stage cuda 90 "$(program cuda)" --nocapture
stage memory 30 "$(program cuda)" --ignored --nocapture memory::
function_stage goldens 120 "helper answers --size $size --world-sizes 1 && helper goldens --size $size --world-sizes 1,2"
function_stage in_process 150 in_process
function_stage service 150 "helper measure --size $size --model \$model --measures \$out/service.measures.jsonl"
function_stage transformers 180 "peer --size $size --config \$model/config.json"
function_stage worlds 100 "helper answers --size $size --world-sizes 2,4 --sums host,peers"
function_stage replay 90 "helper replay --size $size --model \$model"
function_stage nccl 80 nccl_on_one_gpu
function_stage sanitizer 150 sanitize
stage nvrtc 120 env LOCKSTEP_NVRTC=required "$(program nvrtc)" --nocapture
stage cost_model 10 "$python" "$here/cost_model.py" --config "$model/config.json" --check "$out/in_process.measures.jsonl"

echo "results: $out/results.md, results.json, logs.txt"
"$python" "$here/report.py" summary "$out"
