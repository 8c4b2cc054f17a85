#!/usr/bin/env bash
# `make demo`: run the batch of this folder on this machine; needs no sshd, no key and no rsync.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# The program keeps files in the home folder between batches: these are removed with the rest.
export HOME="$folder/home" SHELL=/bin/bash
mkdir "$HOME" "$folder/project"
cp -R "$here" "$folder/project/example"
cd "$folder/project"

show() {
    echo "\$ $*"
    "$@"
    echo
}

show cat example/batch_script.sh
show execute_batch example/batch_script.sh --machines localhost --no-gpu-required --memory-required=100
echo '$ tail job_results/*.out'
tail -n 5 job_results/*.out
echo
echo 'That ran in a folder that is removed now. With a batch of yours, and a machine that ssh can reach:'
echo '  execute_batch BATCH.sh --machines USER@HOST --no-gpu-required'
