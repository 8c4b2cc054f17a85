"""Runs the program and kills it at a point of its life: python3 crash.py execute_batch …

Points are the moments before and after each write to the journal or to a child, each start of a
child, each rename and each new folder; of a write, also when a half of it is done.  CRASH_AT is
the number of the point (none: it lives), CRASH_LOG a file to which those that it came to are added.
CRASH_SETTINGS, JSON, changes constants of the module.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ssh_scheduler  # noqa: E402

LAST = int(os.environ.get('CRASH_AT', 0))
LOG = os.environ.get('CRASH_LOG', os.devnull)
passed = 0


def point(what):
    """Count this moment, and end here if it is the one."""
    global passed
    passed += 1
    with open(LOG, 'a') as log:
        log.write(f'{passed} {what}\n')
    if passed == LAST:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(function, what):
    def call(*args, **settings):
        point(f'before {what}')
        result = function(*args, **settings)
        point(f'after {what}')
        return result
    return call


def write(fd, data):
    """os.write; only what goes to the journal or to a child is counted."""
    path = os.readlink(f'/proc/self/fd/{fd}')
    if not path.endswith('/journal') and not (path.startswith('pipe:') and len(data) > 1):
        return real_write(fd, data)
    what = f'write to {os.path.basename(path).partition(":")[0]}: {bytes(data[-60:])!r}'
    point(f'before {what}')
    half = passed + 1 == LAST
    done = real_write(fd, data[:len(data) // 2] if half else data)
    point(f'amid {what}')
    point(f'after {what}')
    return done


real_write, os.write = os.write, write
for name in ('rename', 'replace', 'mkdir'):
    setattr(os, name, counted(getattr(os, name), name))
subprocess.Popen = counted(subprocess.Popen, 'start')
for name, value in json.loads(os.environ.get('CRASH_SETTINGS', '{}')).items():
    setattr(ssh_scheduler, name, value)
ssh_scheduler.main()
