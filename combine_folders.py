#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Combine a set of folders into one, to collate the output of a batch of commands.

Usage: combine_folders DEST SRC...

Collating is not in this version yet: the command says so and exits with status 2.
This file stands alone and imports nothing of ssh_scheduler.
"""

import sys


def main():
    """Show the help where it is asked for; otherwise say what is missing and return 2."""
    if '--help' in sys.argv[1:] or '-h' in sys.argv[1:]:
        print(__doc__.strip())
        return 0
    print('combine_folders: collating folders is not in this version yet.', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
