"""A real terminal for a program: a pty, and pyte that draws what the program writes to it."""
import errno
import fcntl
import os
import pty
import struct
import subprocess
import termios
import time

import pyte
import pytest
import rig


class Terminal:
    """A program on its own terminal; `until` waits for a text on the screen."""

    def __init__(self, argv, columns=80, rows=24, env=None, cwd=None):
        self.leader, follower = pty.openpty()
        self.raw = b''
        self._screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self._stream = pyte.ByteStream(self._screen)
        self.resize(columns, rows)
        try:
            self.process = subprocess.Popen(
                [*map(str, argv)], stdin=follower, stdout=follower, stderr=follower, cwd=cwd,
                env={'TERM': 'xterm-256color', **(env or os.environ)}, preexec_fn=own_terminal)
        finally:
            os.close(follower)

    def resize(self, columns, rows):
        """Change the size of the terminal."""
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))
        self._screen.resize(rows, columns)

    def press(self, keys):
        """Type these keys."""
        os.write(self.leader, keys.encode())

    @property
    def shown(self):
        """Return the lines that are on the screen."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def whole(self):
        """Return the lines that scrolled up, and those on the screen."""
        scrolled = [''.join(line[x].data for x in range(self._screen.columns)).rstrip()
                    for line in self._screen.history.top]
        return [*scrolled, *self.shown]

    def until(self, is_so, what=''):
        """Read until is_so(the text on the screen); return that text."""
        until = time.monotonic() + rig.SAFETY_NET_S
        while not is_so(text := '\n'.join(self.shown)):
            if not self._read() or time.monotonic() > until:
                pytest.fail(f'wanted {what or is_so}; shown:\n' + '\n'.join(self.whole))
        return text

    def settle(self):
        """Read until no output comes for a moment, because a picture comes in pieces.

        Call this before Ctrl-C, too: the kernel then discards written output that nobody has read.
        """
        while rig.wait_readable(self.leader, timeout_s=0.05) and self._read():
            pass

    def watch(self, time_s):
        """Read the output that comes within this time."""
        until = time.monotonic() + time_s
        while (left_s := until - time.monotonic()) > 0 and (
                rig.wait_readable(self.leader, timeout_s=left_s)) and self._read():
            pass

    def end(self):
        """Read to the end; return the exit status."""
        while self._read():
            pass
        return self.process.wait(rig.SAFETY_NET_S)

    def close(self):
        """Kill the program if it runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.leader)

    def _read(self):
        if not rig.wait_readable(self.leader):
            pytest.fail('silent; shown:\n' + '\n'.join(self.whole))
        try:
            data = os.read(self.leader, 65536)
        except OSError as error:        # EIO: on Linux, the other end is closed
            assert error.errno == errno.EIO
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)


def own_terminal():
    """Start a session with the standard input as its controlling terminal."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
