#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: kernels and captured sampling against their references, then benchmarks.
#
#   scripts/checks/gpu_check.sh [--cpu] [DIRECTORY]        results/gpu unless told; PYTHON=... chooses the interpreter
#
# Writes correctness.json and a JSON file and a log per benchmark. Ends with 0 unless a test failed or did not finish; a benchmark
# that fails or is out of time is reported and left out. Needs no network: packages missing here are installed for the time being
# from wheels/, where that exists (python -m pip download --no-deps -d wheels fla-core). --cpu takes the same steps on few numbers.

set -u
cd "$(dirname "$0")/../.." || exit 1

command="scripts/checks/gpu_check.sh${*:+ $*}"
cpu=""
[ "${1:-}" = "--cpu" ] && { cpu=yes; shift; }
out=${1:-results/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

if [ -z "$cpu" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: $python finds no CUDA GPU: run it where one is, or give --cpu for the same steps on few numbers" >&2
    exit 1
fi
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
if [ -d wheels ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --find-links wheels --target "$packages" wheels/*.whl
    export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1

# Seconds that a step may take, its name, and the words behind python. The later ones are left out first.
if [ -n "$cpu" ]; then
    tests="tests/test_scan_backends.py -k adapters"
    steps="60 scan_d16     scripts/benchmark.py scan --depth=1 --pn=1_2,1_2_3 --batch=1 --repeats=2
           60 training_d16 scripts/benchmark.py training --depth=1 --pn=1_2_3 --batch=2 --repeats=2 --tfast=0
           60 sampling_d16 scripts/benchmark.py sampling --family=var --depth=1 --pn=1_2 --batch=1 --repeats=1
           60 training_d24 scripts/benchmark.py training --family=mvar --depth=1 --pn=1_2 --batch=2 --repeats=1 --tfast=0
           60 sampling_d24 scripts/benchmark.py sampling --family=mvar --depth=1 --pn=1_2 --batch=1 --repeats=1
           60 attention    scripts/benchmark.py attention --sides=9 --heads=1 --repeats=1
           60 sampling_fp16 scripts/benchmark.py sampling --family=mvar --depth=1 --pn=1_2 --batch=1 --repeats=1 --precision=bfloat16
           60 table        scripts/benchmark.py table --family=mvar --depth=1 --pn=1_2 --batch=1 --repeats=1"
else
    tests="-m gpu $(grep -l mark.gpu tests/test_*.py)" # others may need packages that are not there
    steps="170 scan_d16     scripts/benchmark.py scan --depth=16 --batch=32
            90 training_d16 scripts/benchmark.py training --family=mvar,var --depth=16 --batch=48
            60 sampling_d16 scripts/benchmark.py sampling --depth=16 --batch=64 --repeats=5
            90 training_d24 scripts/benchmark.py training --family=mvar --depth=24 --batch=16
            60 sampling_d24 scripts/benchmark.py sampling --family=mvar --depth=24 --batch=64 --repeats=3
            40 attention    scripts/benchmark.py attention
            60 sampling_fp16 scripts/benchmark.py sampling --family=mvar --depth=16 --batch=64 --repeats=3 --precision=float16
            60 table        scripts/benchmark.py table
            90 scan_others  scripts/benchmark.py scan --depth=12,24 --batch=32"
fi
test_seconds=200
total_seconds=525 # the last step is given a few more to end in

# run NAME SECONDS WORDS...: python with these words, its output in NAME.log, for as long as there is time. Sets code.
run() {
    local name=$1 seconds=$2 left=$((total_seconds - SECONDS)) start=$SECONDS result
    shift 2
    rm -f "$out/$name.json" "$out/$name.log"
    [ "$left" -lt "$seconds" ] && seconds=$left
    if [ "$seconds" -lt 5 ]; then
        code=124 result="left out, there was no time"
    else
        timeout --kill-after=5 "$seconds" "$python" "$@" >"$out/$name.log" 2>&1
        code=$?
        case $code in
            0) result=done ;;
            124 | 137) result="out of time" ;;
            *) result="failed, see $out/$name.log: $(tail -n 1 "$out/$name.log" | cut -c1-120)" ;;
        esac
    fi
    printf '%-14s %4d s  %s\n' "$name" $((SECONDS - start)) "$result"
}

# shellcheck disable=SC2086 # words
run correctness "$test_seconds" -m pytest -p no:cacheprovider -rs --junitxml "$out/correctness.xml" $tests
tests_code=$code
"$python" - "$out" "$tests_code" "$command" <<'PYTHON'
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, ".")
from utils import evidence

out, code, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
report, counts = out / "correctness.xml", {}
if report.exists():
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    counts["failed"] = [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]
    report.unlink()
evidence.store(out / "correctness.json", {"command": command, "exit_code": code, **counts})
print(f"               {counts or 'nothing was counted'}")
PYTHON

while read -r seconds name words; do
    # shellcheck disable=SC2086
    run "$name" "$seconds" $words --overwrite --json "$out/$name.json" </dev/null
done <<<"$steps"

echo
for log in "$out"/*.log; do
    name=$(basename "$log" .log)
    [ -e "$out/$name.json" ] && [ "$name" != correctness ] && grep '^|' "$log" | sed "1s/^/$name\n/" && echo
done
if [ "$tests_code" -ne 0 ]; then
    echo "gpu_check: the tests ended with $tests_code: see $out/correctness.log" >&2
    exit 1
fi
