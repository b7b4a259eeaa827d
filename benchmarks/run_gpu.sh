#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, GPU tests, compute-sanitizer, benchmarks; JSON under $OUT.
#
#   benchmarks/run_gpu.sh              PYTHON and CAPE_CUDA_ARCHS choose the interpreter and the architectures
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
export CAPE_CUDA=1 CAPE_CUDA_ARCHS=${CAPE_CUDA_ARCHS:-90}
mkdir -p "$out"

echo "== build"
$python setup.py --quiet build_ext --inplace
$python -c "import torch, cape._C as c; print(torch.cuda.get_device_name(), c.build_info())"

echo "== C++ tests"
ctest --test-dir "$($python setup.py --quiet build_dir)" --output-on-failure --no-tests=error

# With ray and xgboost installed also the fits of the meta-regressor (tests/metamodel/test_gpu_fit.py).
echo "== tests on the GPU"
$python -m pytest -m gpu tests --junitxml="$out/gpu_tests.xml"

# A few shapes per operator: under the sanitizer every launch takes a hundred times as long.
echo "== compute-sanitizer"
for tool in memcheck racecheck initcheck synccheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 --log-file "$out/sanitizer_$tool.txt" \
    $python -m pytest -q -p no:cacheprovider tests/probing/test_ops_cuda.py -k "sanitizer"
done

echo "== benchmarks"
$python -m benchmarks.calibrate --json "$out/calibration_cuda.json"
$python -m benchmarks.roofline --json "$out/roofline_cuda.json"
$python -m benchmarks.probe --device cuda --json "$out/probe_cuda.json"
$python -m benchmarks.truth --device cuda --json "$out/truth_cuda.json"
# The same units without graphs, for their share in it.
$python -m benchmarks.truth --device cuda --only compared --no-graphs --json "$out/truth_cuda_no_graphs.json"
