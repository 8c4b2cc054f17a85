#!/usr/bin/env bash
# Run three jobs on this machine and combine their results in one folder; leave nothing behind.
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
    "$@" || echo "exit status $?"
    echo
}

execute_batch example/sweep.sh --machines localhost --no-gpu-required --memory-required=100 >batch.log
show combine_folders all job_results/example_sweep.sh.{1,2,3}
show find all -type f
# A user edits the results of one job by hand, for another model.
echo '{"model": "large", "steps": 3}' >job_results/example_sweep.sh.2/results/config.json
show combine_folders again job_results/example_sweep.sh.{1,2,3}
show combine_folders again job_results/example_sweep.sh.{1,2,3} --on-conflict rename
