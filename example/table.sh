#!/usr/bin/env bash
# Run a sweep on this machine and show its results as a table; leave nothing behind.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HOME="$folder/home" SHELL=/bin/bash
mkdir "$HOME" "$folder/project"
cp -R "$here" "$folder/project/example"
cd "$folder/project"

show() {
    echo "\$ $*"
    "$@"
    echo
}

execute_batch example/grid.sh --machines localhost --no-gpu-required --memory-required=100 \
    >batch.log 2>&1 || true         # its last line fails
show results_table
show results_table job_results --mean-over seed --sort test_loss
show results_table job_results --mean-over seed --sort test_loss --csv job_results/table.csv
show cat job_results/table.csv
show results_table job_results --html job_results/report.html
