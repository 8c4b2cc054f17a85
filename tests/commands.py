"""Helpers of the tests of execute_remote and execute_to: start them, and follow both streams.

The tests compare the output byte for byte, so nothing here decodes it.
"""
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import rig


def word(machine):
    """Return the word for a machine on a command line."""
    return str(machine.yaml()) if isinstance(machine, rig.Machine) else machine


class Running:
    """A running program; `out` and `err` are its output so far, as bytes."""

    def __init__(self, process):
        self.process, self.status = process, None
        self.out, self.err = bytearray(), bytearray()
        self._open = {pipe.fileno(): said for pipe, said in (
            (process.stdout, self.out), (process.stderr, self.err)) if pipe}

    def until(self, text, stream='out'):
        """Read until the program has printed the text (bytes)."""
        said = getattr(self, stream)
        limit = time.monotonic() + rig.SAFETY_NET_S
        while text not in said:
            assert self._read(limit), f'it did not say {text}: {self}'

    def size(self, number):
        """Read until stdout has at least this many bytes."""
        limit = time.monotonic() + rig.SAFETY_NET_S
        while len(self.out) < number:
            assert self._read(limit), f'it did not say {number} bytes: {self}'

    def end(self):
        """Read to the end of both streams and wait; return self."""
        limit = time.monotonic() + 2 * rig.SAFETY_NET_S
        while self._open:
            assert self._read(limit), f'it does not end: {self}'
        self.status = self.process.wait(rig.SAFETY_NET_S)
        assert b'Traceback' not in self.err, self.err.decode(errors='replace')
        return self

    def kill(self):
        """SIGKILL the program alone, like a crash; return self."""
        self.process.kill()
        return self.end()

    def signal(self, number=signal.SIGINT):
        """Send a signal to the process group of the program, as a terminal does."""
        os.killpg(self.process.pid, number)

    @property
    def notes(self):
        """Return the lines of stderr, as text."""
        return self.err.decode(errors='replace').splitlines()

    def __str__(self):
        return f'exit {self.status}, stdout {bytes(self.out[-500:])}, stderr {bytes(self.err)}'

    def _read(self, limit):
        """Read from both streams once; return False if both have ended, or at the time limit."""
        ready = rig.wait_readable(*self._open, timeout_s=max(limit - time.monotonic(), 0))
        for fd in ready if self._open else ():
            data = os.read(fd, 2**18)
            self._open[fd].extend(data)
            if not data:
                del self._open[fd]
        return bool(ready)


class Terminal:
    """A program on its own pty, as its controlling terminal; a context manager."""

    def __init__(self, argv, env, rows=30, columns=90):
        self.said = bytearray()
        self.pid, self.fd = pty.fork()
        if not self.pid:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))
                os.execve(argv[0], argv, env)
            finally:
                os._exit(127)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def type(self, text):
        os.write(self.fd, text)

    def until(self, pattern):
        """Read until the output matches the pattern (bytes); return the match."""
        limit = time.monotonic() + rig.SAFETY_NET_S
        while not re.search(pattern, self.said):
            assert self._read(limit), f'it did not show {pattern}: {bytes(self.said)}'
        return re.search(pattern, self.said)

    def end(self):
        """Read to the end; return the exit status."""
        limit = time.monotonic() + rig.SAFETY_NET_S
        while self._read(limit):
            pass
        assert rig.ends(self.pid), f'it does not end: {bytes(self.said)}'
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = None
        assert b'Traceback' not in self.said
        return status

    def _read(self, limit):
        if not rig.wait_readable(self.fd, timeout_s=max(limit - time.monotonic(), 0)):
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:         # no process has the terminal open any more
            return False
        self.said += data
        return bool(data)


def at_terminal(scheduler, env, *argv, **size):
    return Terminal([sys.executable, str(scheduler), *map(str, argv)],
                    {**env, 'TERM': 'xterm'}, **size)


# A tree of processes that is hard to kill; each notes its pid in the ledger.  The process with a
# wiped environment can still be found by its inherited descriptors.
NASTY_TREE = r'''
note() {{ echo "$1 $BASHPID" >>{ledger}; }}
(note plain; exec sleep 1000) &
setsid bash -c 'echo "setsid $$" >>{ledger}; exec sleep 1000' &
(setsid bash -c '(echo "double $BASHPID" >>{ledger}; exec sleep 1000) & exit' &)
env -i setsid /bin/bash -c 'echo "wiped $$" >>{ledger}; exec /bin/sleep 1000' &
nohup bash -c 'echo "nohup $$" >>{ledger}; exec sleep 1000' >/dev/null 2>&1 &
(trap "" TERM INT HUP; note deaf; while :; do sleep 1000; done) &
echo "$(bash -c 'trap "" TERM; echo "capture $$" >>{ledger}; sleep 1000; :')" &
echo started
wait
'''
NASTY_KINDS = ('plain', 'setsid', 'double', 'wiped', 'nohup', 'deaf', 'capture')


def nasty_tree(ledger):
    return NASTY_TREE.format(ledger=ledger)


def nasty_pids(ledger):
    """Return {kind: pid} of the processes of nasty_tree(), as soon as all have started."""
    found = {}

    def look():
        found.update(line.split() for line in ledger.read_text().splitlines())
        return len(found) == len(NASTY_KINDS)

    limit = time.monotonic() + rig.SAFETY_NET_S
    while not look():
        assert time.monotonic() < limit, found
        time.sleep(0.01)
    return {kind: int(pid) for kind, pid in found.items()}


def assert_ended(pids):
    left = [kind for kind, pid in pids.items() if not rig.ends(pid)]
    for kind in left:
        rig.kill(pids[kind], lambda pid: True)
    assert not left, f'still there: {left}'


def peak_mb(pid):
    """Return the peak memory of a process in MB."""
    for line in Path(f'/proc/{pid}/status').read_text().splitlines():
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) / 1024

