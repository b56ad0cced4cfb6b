#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests marked gpu, ceilings, microbenchmarks, end to end, the experiment matrix.
#
#   bench/gpu.sh [--stage build,correct,...] [--dry-run] [--out DIR] [--archive FILE] [--seconds N] [--wheels DIR]
#                [--data DIR --encoders DIR] [-- paper.py's options]
#
# Every stage has a time limit, keeps its results at once in --out (bench/results, of a --dry-run a new folder) and stops no other; the last lines printed
# are a table. The default stages are meant to take nine minutes; --seconds ends them by then, whatever they took, later ones being
# skipped. Others:
#   sanitize   compute-sanitizer over the ops           launches   the host's time to launch a scoring step (no GPU needed)
#   large      a student and a teacher of a billion parameters       matrix   bench/paper.py, where --data and --encoders are given
# --archive: all of --out in one .tar.gz, written anew after every stage. --wheels: a folder of wheels to install first, for a machine
# without a network (bench/fetch_wheels.sh). --dry-run: every stage at toy size on the CPU, so that CI tests this script.
set -uo pipefail
cd "$(dirname "$0")/.."

texts=32768  # of the stages end_to_end and train
stages=build,correct,ceilings,tune,ops,predicted,train,end_to_end,amalgamation
known=$stages,matrix,sanitize,launches,large
dry=0 out='' archive='' seconds='' wheels='' data='' encoders=''
refuse() { echo "gpu.sh: $1 (see the head of this file)" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --stage | --out | --archive | --seconds | --wheels | --data | --encoders) [ $# -gt 1 ] || refuse "$1 needs a value" ;;
  esac
  case "$1" in
    --stage) stages=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --out) out=$2; shift 2 ;;
    --archive) archive=$2; shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --encoders) encoders=$2; shift 2 ;;
    --) shift; break ;;
    *) refuse "unknown option $1" ;;
  esac
done
for name in ${stages//,/ }; do
  case ",$known," in *",$name,"*) ;; *) refuse "unknown stage $name; there are $known" ;; esac
done
[ -z "${seconds//[0-9]/}" ] || refuse "--seconds $seconds is no number of seconds"
case ",$stages," in *,matrix,*)
  [ $dry = 1 ] || { [ -n "$data" ] && [ -n "$encoders" ]; } || refuse "the stage matrix needs --data and --encoders"
esac
[ -n "$out" ] || { [ $dry = 1 ] && out=$(mktemp -d) || out=bench/results; }
mkdir -p "$out"
export BENCH_RESULTS="$out" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 1
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# The checkout itself, with the extension built in place by the first stage.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ $dry = 0 ]; then
  # Without a GPU tests would be skipped and benchmarks run on the CPU; without a package most stages would fail one by one.
  "$python" - <<'PY' || exit 1
import importlib.util, sys, torch
needed = "transformers triton deepspeed datasets pydantic hypothesis pytest pytest_timeout".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu.sh: not installed: {', '.join(missing)} (--wheels, bench/fetch_wheels.sh)")
if not torch.cuda.is_available():
    sys.exit("gpu.sh: torch finds no usable CUDA device (--dry-run rehearses on the CPU)")
print(f"gpu.sh: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
PY
fi

table=
run() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  case ",$stages," in *",$name,"*) ;; *) return ;; esac
  [ -z "$seconds" ] || limit=$((limit < seconds - SECONDS - 20 ? limit : seconds - SECONDS - 20))  # 20: to end it, and to pack
  [ "$limit" -gt 0 ] || { told "$(printf '%-14s %-8s' "$name" 'rc none')"; return; }
  echo "=== $name: $*"
  # By Ctrl-C's signal: what a stage has started ends with it, and pytest tells its failures.
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/gpu_$name.log" | tail -n 40  # some run several commands
  code=${PIPESTATUS[0]}
  [ "$name$dry" != tune0 ] || cp kernels/ops/tuning.py "$out/tuning.py"
  told "$(printf '%-14s %-8s %5ds' "$name" "$([ "$code" = 0 ] && echo ok || echo "rc $code")" $((SECONDS - start)))"
}
told() { # a line of the table; then all is packed
  table+="$1"$'\n'
  printf '%s' "$table" >"$out/gpu_stages.txt"
  [ -n "$archive" ] || return
  tar -czf "$work/archive" -C "$out" .
  [ $? -gt 1 ] || { cp "$work/archive" "$archive.new" && mv "$archive.new" "$archive"; }  # 1: a file grew meanwhile
}

if [ $dry = 1 ]; then
  run build 300 "$python" setup.py -q build_ext --inplace
  run correct 120 "$python" -m pytest -q -m "gpu or not gpu" tests/test_gpu.py tests/test_gpu_training.py
  run sanitize 60 "$python" -m pytest -q -m "gpu or not gpu" tests/test_sanitizer.py
  run ceilings 60 "$python" bench/ceilings.py --device cpu --toy --json "$out/ceilings.json"
  run tune 60 "$python" bench/tune.py --device cpu --toy --json "$out/tuning.json"
  run ops 120 "$python" bench/throughput.py --device cpu --toy --json "$out/throughput.json"
  run predicted 30 "$python" bench/predict.py
  run launches 60 "$python" bench/launches.py --size toy --repetitions 3 --json "$out/launches.json"
  run amalgamation 600 "$python" bench/amalgamation.py --synthetic toy --texts 40 --published_texts 8 --max_length 32 \
    --precisions fp32 bf16 --samples 4 --repetitions 1 --device cpu --workdir "$work/amalgamation" --json "$out/amalgamation.json"
  run end_to_end 300 "$python" bench/amalgamation.py --synthetic toy --texts 40 --published_texts 8 --max_length 32 --scopes last:1 \
    --samples 4 --seeds 1 --repetitions 1 --device cpu --workdir "$work/amalgamation" --json "$out/amalgamation_end_to_end.json"
  run train 60 "$python" bench/step.py --size toy --batch_size 2 --length 8 --precision fp32 --device cpu --seconds 0.05 \
    --json "$out/step.json"
  run train 300 "$python" bench/student.py --size toy --stages 0 3 --precision fp32 --device cpu --steps 3 --batch_size 4 \
    --json "$out/student.json"
  run large 300 "$python" bench/teacher.py --size toy --texts 40 --samples 4 --precisions fp32 bf16 --device cpu --json "$out/teacher.json"
  run matrix 300 "$python" bench/paper.py --quick --device cpu --workdir "$work/matrix" "$@"
else
  parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 10")  # most of the time goes into compiling kernels
  run build 90 "$python" setup.py -q build_ext --inplace
  # While the tests run, what later stages time is compiled, and what they read is made: nothing of this is timed.
  background() {
    local limit=100
    [ -z "$seconds" ] || limit=$((limit < seconds - SECONDS - 40 ? limit : seconds - SECONDS - 40))
    [ "$limit" -le 0 ] || timeout --kill-after=10 "$limit" "$python" "$@" >>"$out/gpu_background.log" 2>&1 &
  }
  case ",$stages," in *,end_to_end,*|*,train,*)
    background -c "import sys; sys.path.insert(0, 'bench'); import synthetic as s; from pathlib import Path; s.make_texts(Path('$work'), $texts)"
  esac
  case ",$stages," in *,tune,* | *,ops,*)
    background bench/tune.py --seconds 0.01
    background bench/throughput.py --device cuda --seconds 0.01 --json "$work/float32.json"
    background bench/throughput.py --device cuda --dtype bfloat16 --compare eager,ours --seconds 0.01 --json "$work/bfloat16.json"
  esac
  # shellcheck disable=SC2086
  run correct 150 "$python" -m pytest -q -m gpu $parallel tests/test_gpu.py tests/test_gpu_training.py
  wait
  mkdir -p "$work/amalgamation" "$work/student"
  for folder in amalgamation student; do cp "$work"/{pool,eval}.jsonl "$work/$folder" 2>/dev/null; done
  run ceilings 30 "$python" bench/ceilings.py
  run tune 75 "$python" bench/tune.py --write --seconds 0.3 --json "$out/tuning.json"
  for dtype in float32 bfloat16; do
    case $dtype in float32) stem=throughput compare=() ;; *) stem=throughput_$dtype compare=(--compare eager,ours) ;; esac
    run ops 90 "$python" bench/throughput.py --device cuda --dtype "$dtype" --seconds 0.3 "${compare[@]}"
    for measured in "$out/$stem"_h[12]00_*.json; do
      machine=${measured##*"$stem"_}
      [ -f "$measured" ] && run predicted 30 "$python" bench/predict.py --machine "${machine%%_*}" --dtype "$dtype" --measured "$measured"
    done
  done
  # Enough texts that loading teachers does not hide what a text costs.
  run end_to_end 240 "$python" bench/amalgamation.py --synthetic base --texts $texts --scopes last:1 --precisions bf16 --seeds 1 \
    --repetitions 1 --workdir "$work/amalgamation" --stem amalgamation_end_to_end
  run train 150 "$python" bench/step.py
  run train 200 "$python" bench/student.py --size base --batch_size 1024 --steps $((texts / 1024)) --workdir "$work/student"
  run large 180 "$python" bench/student.py --size 1b --stages 3 "3 offload" --steps 6 --batch_size 16
  run large 240 "$python" bench/teacher.py --size 1b --precisions bf16 fp32
  run amalgamation 120 "$python" bench/amalgamation.py --synthetic base --texts 4096 --precisions bf16 --repetitions 1 \
    --workdir "$work/few_texts"
  run sanitize 300 "$python" -m pytest -q -m gpu tests/test_sanitizer.py
  run launches 60 "$python" bench/launches.py
  run matrix 86400 "$python" bench/paper.py --data "$data" --encoders "$encoders" --workdir "$out/matrix" "$@"
fi
echo "--- bench/gpu.sh on $([ $dry = 1 ] && echo cpu || echo cuda), results in $out"
printf '%s' "$table"
case "$table" in *" rc "*) exit 1 ;; esac
