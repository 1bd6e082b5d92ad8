#!/usr/bin/env bash
# Build sdist and wheel, install each into an empty environment, run from an empty directory.
#   tests/support/try_dist.sh PYTHON
set -euo pipefail
python=$(realpath --no-symlinks "$1")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 ||
    { tail -50 "$work/build.log"; exit 1; }
for package in "$work"/dist/*.whl "$work"/dist/*.tar.gz; do
    echo "== $(basename "$package")"
    cd "$work"
    rm -rf "$work/env" "$work/empty"
    "$python" -m venv "$work/env"
    "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" "$package"
    mkdir "$work/empty"
    cd "$work/empty"
    "$work/env/bin/everstep" --version
    "$work/env/bin/everstep" config list >/dev/null
    "$work/env/bin/everstep" train demo train.steps=3 train.eval_batches=1 train.sample_tokens=0
    test -s runs/demo/metrics.jsonl
done
echo "wheel and sdist install and run"
