"""Runs the program and kills it at a point of its run: python3 crash.py execute_batch …

Points are the moments before and after each write to the journal or to a child, each start of a
child, each rename and each new folder; for a write, also the moment when half of it is done.

CRASH_AT        the number of the point, or
CRASH_WHEN      a regular expression that matches its description; with neither, no kill happens
CRASH_AFTER     a file: wait at the point until it is not empty
CRASH_SIGNAL    the signal that the program sends itself: SIGKILL
CRASH_REQUEST   JSON: instead of a signal, leave this request of another command
CRASH_LOG       a file to which the program adds the points that it passes
CRASH_SETTINGS  JSON: new values of constants of the module
"""
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    import ssh_scheduler
except KeyboardInterrupt:           # the program has not started; it also exits with 130
    sys.exit(130)

LAST = int(os.environ.get('CRASH_AT', 0))
WHEN = os.environ.get('CRASH_WHEN')
AFTER = os.environ.get('CRASH_AFTER')
REQUEST = os.environ.get('CRASH_REQUEST')
SIGNAL = getattr(signal, os.environ.get('CRASH_SIGNAL', 'SIGKILL'))
LOG = os.environ.get('CRASH_LOG', os.devnull)
passed, stopped, has_waited = 0, False, False


def point(what):
    """Count this point; if it is the chosen one, leave the request or send the signal."""
    global passed, stopped, has_waited
    passed += 1
    with open(LOG, 'a') as log:
        log.write(f'{passed} {what}{", after a wait" if has_waited else ""}\n')
    has_waited = False
    if passed == LAST or WHEN and not stopped and re.search(WHEN, what):
        stopped = True
        while AFTER and not os.path.getsize(AFTER):
            time.sleep(0.01)
        if REQUEST:
            leave_request()
        else:
            os.kill(os.getpid(), SIGNAL)


def leave_request():
    """Leave a request in the inbox as another command does."""
    inbox = Path('job_results/.ssh_scheduler/inbox')
    inbox.mkdir(0o700, parents=True, exist_ok=True)
    path = inbox / f'{time.time_ns():020}-1'
    path.with_suffix('.new').write_text(REQUEST)
    real_rename(path.with_suffix('.new'), path.with_suffix('.request'))


def counted(function, word):
    def call(*args, **settings):
        what = f'{word} {args[0]}'
        point(f'before {what}')
        result = function(*args, **settings)
        point(f'after {what}')
        return result
    return call


def write(fd, data):
    """Do os.write; count only writes to the journal or to a child."""
    path = os.readlink(f'/proc/self/fd/{fd}')
    if not path.endswith('/journal') and not (path.startswith('pipe:') and len(data) > 1):
        return real_write(fd, data)
    where = os.path.basename(path).partition(':')[0]
    begin = b' '.join(line[:90] for line in bytes(data[:1000]).split(b'\n')[:2])
    what = f'write to {where}: {begin!r} … {bytes(data[-60:])!r}'
    point(f'before {what}')
    half = passed + 1 == LAST and not REQUEST
    done = real_write(fd, data[:len(data) // 2] if half else data)
    point(f'amid {what}')
    point(f'after {what}')
    return done


def select(*args):
    """Note a wait of the selector: events during it may change the outcome of a kill."""
    global has_waited
    has_waited = True
    return real_select(*args)


real_write, os.write = os.write, write
real_select = selectors.DefaultSelector.select
selectors.DefaultSelector.select = select
real_rename = os.rename
for name in ('rename', 'replace', 'mkdir'):
    setattr(os, name, counted(getattr(os, name), name))
subprocess.Popen = counted(subprocess.Popen, 'start')
for name, value in json.loads(os.environ.get('CRASH_SETTINGS', '{}')).items():
    setattr(ssh_scheduler, name, value)
ssh_scheduler.main()
