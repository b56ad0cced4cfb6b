#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests marked gpu, ceilings, microbenchmarks, end to end, the experiment matrix.
#
#   bench/gpu.sh [--stage build,correct,...] [--dry-run] [--out DIR] [--wheels DIR] [--data DIR --encoders DIR] [-- paper.py's options]
#
# Every stage has a time limit, writes its own files at once and never stops the others; the last lines printed are a table.
# --dry-run: every stage at toy size on the CPU, so that CI tests this script. --wheels: a folder of wheels to install first
# (deepspeed, datasets, ... where the machine has no network). --data, --encoders: the matrix (bench/paper.py) runs where both are given.
# --stage large: a student and a teacher of a billion parameters, not among the default stages, which are meant to take nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."

stages=build,correct,ceilings,tune,ops,predicted,launches,amalgamation,train,matrix
dry=0 out=bench/results wheels= data= encoders=
while [ $# -gt 0 ]; do
  case "$1" in
    --stage) stages=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --encoders) encoders=$2; shift 2 ;;
    --) shift; break ;;
    *) echo "gpu.sh: unknown option $1 (see the head of this file)" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
python=${PYTHON:-python3}
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
# The checkout itself, with the extension built in place by the first stage.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ $dry = 1 ]; then device=cpu; else device=cuda; fi

table=
run() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  case ",$stages," in *",$name,"*) ;; *) return ;; esac
  echo "=== $name: $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/gpu_$name.log" | tail -n 40
  code=${PIPESTATUS[0]}
  table+="$(printf '%-14s %-8s %5ds' "$name" "$([ "$code" = 0 ] && echo ok || echo "rc $code")" $((SECONDS - start)))"$'\n'
}

if [ $dry = 1 ]; then
  run build 300 "$python" setup.py -q build_ext --inplace
  run correct 120 "$python" -m pytest -q -m "gpu or not gpu" tests/test_gpu.py
  run ceilings 60 "$python" bench/ceilings.py --device cpu --toy --json "$out/ceilings.json"
  run tune 60 "$python" bench/tune.py --device cpu --toy --json "$out/tuning.json"
  run ops 120 "$python" bench/throughput.py --device cpu --toy --json "$out/throughput.json"
  run predicted 30 "$python" bench/predict.py --out "$out"
  run launches 60 "$python" bench/launches.py --size toy --repetitions 3 --json "$out/launches.json"
  run amalgamation 600 "$python" bench/amalgamation.py --synthetic toy --texts 40 --published_texts 8 --max_length 32 \
    --samples 4 --repetitions 1 --device cpu --workdir "$out/work" --json "$out/amalgamation.json"
  run train 300 "$python" bench/student.py --size toy --stages 0 3 --precision fp32 --device cpu --steps 3 --batch_size 4 \
    --json "$out/student.json"
  run large 300 "$python" bench/teacher.py --size toy --texts 40 --samples 4 --device cpu --json "$out/teacher.json"
  run matrix 300 "$python" bench/paper.py --quick --device cpu --workdir "$out/matrix" --results "$out" "$@"
else
  run build 150 "$python" setup.py -q build_ext --inplace
  run correct 180 "$python" -m pytest -q -m gpu --continue-on-collection-errors tests  # a missing package fails its own tests only
  run ceilings 30 "$python" bench/ceilings.py
  run tune 60 "$python" bench/tune.py --write --json "$out/tuning.json"
  run ops 100 "$python" bench/throughput.py --device "$device" --seconds 1
  for measured in bench/results/throughput_h[12]00_*.json; do
    machine=${measured##*throughput_}
    [ -f "$measured" ] && run predicted 30 "$python" bench/predict.py --machine "${machine%%_*}" --measured "$measured" --out "$out"
  done
  run launches 60 "$python" bench/launches.py
  run amalgamation 180 "$python" bench/amalgamation.py --synthetic base --workdir "$out/work"
  run train 120 "$python" bench/student.py --size base
  run large 180 "$python" bench/student.py --size 1b --stages 3 "3 offload" --steps 6 --batch_size 16
  run large 240 "$python" bench/teacher.py --size 1b
  if [ -n "$data" ] && [ -n "$encoders" ]; then
    run matrix 86400 "$python" bench/paper.py --data "$data" --encoders "$encoders" --workdir "$out/matrix" --results "$out" "$@"
  fi
fi
echo "--- bench/gpu.sh on $device"
printf '%s' "$table"
case "$table" in *" rc "*) exit 1 ;; esac
