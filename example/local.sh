#!/usr/bin/env bash
# A file of yours that a job calls: it was copied to the machine together with this folder.
echo "local.sh runs on $(uname -n)"
