"""Runs the program as on a client that is no Linux: python3 other_client.py execute_batch …

CLIENT_LACKS    words: what is taken away, of PARTS below

What is another thing there than on Linux must not be used at all: that ends the program at once,
with a sentence and the exit status 99.
"""
import os
import resource
import runpy
import select
import selectors
import signal
import stat
import sys
import time
from pathlib import Path

LINUX_ONLY = {
    os: 'O_PATH O_TMPFILE copy_file_range eventfd fdatasync getrandom getxattr listxattr setns '
        'memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate sched_getaffinity setresuid '
        'sched_setaffinity setxattr splice unshare',
    select: 'epoll', resource: 'prlimit',
    signal: 'SIGPOLL SIGPWR SIGSTKFLT SIGRTMIN SIGRTMAX sigtimedwait sigwaitinfo pidfd_send_signal',
    time: 'CLOCK_BOOTTIME'}
OPEN_MAX = 10240            # no limit of open files is above it


def misused(what):
    os.write(2, f'{what} is used, which is Linux\'s alone\n'.encode())
    os._exit(99)


def platform():
    """It says that it is a Mac, and system calls have other numbers."""
    import subprocess  # noqa: F401  first: what it does depends on the platform
    here = os.uname()
    sys.platform = 'darwin'
    os.uname = lambda: os.uname_result(('Darwin', here.nodename, '23.6.0', 'Darwin', 'arm64'))
    import ctypes
    ctypes.CDLL.syscall = property(lambda _: misused('syscall'))


def names():
    """Python has fewer names."""
    for module, words in LINUX_ONLY.items():
        for word in words.split():
            if hasattr(module, word):
                delattr(module, word)
    select.PIPE_BUF = 512


def proc():
    """There is no /proc and no /dev/shm."""
    def hook(event, words):
        if event in ('open', 'os.listdir', 'os.scandir') and str(words[0]).startswith(
                ('/proc', '/sys', '/dev/shm')):
            if sys.platform != 'linux':
                misused(words[0])
            raise FileNotFoundError(2, 'No such file or directory', words[0])
    sys.addaudithook(hook)


def library():
    """The C library has fewer functions."""
    import ctypes

    def find(library, name):
        if name in ('prctl', 'renameat2', 'syncfs'):
            raise AttributeError(name)
        return getattr_of(library, name)
    getattr_of, ctypes.CDLL.__getattr__ = ctypes.CDLL.__getattr__, find


def ctypes():
    """This Python cannot call the C library."""
    sys.modules['ctypes'] = None


def files():
    """Few files may be open, and a limit beyond OPEN_MAX is refused."""
    def limit(what, values):
        if what == resource.RLIMIT_NOFILE and not 0 <= values[0] <= OPEN_MAX:
            raise ValueError('current limit exceeds maximum limit')
        set_limit(what, values)
    set_limit, resource.setrlimit = resource.setrlimit, limit
    limit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def kqueue():
    """What tells of streams that are ready does not tell of the end of a file."""
    class Kqueue(selectors.PollSelector):
        def select(self, timeout=None):
            found = [(key, events) for key, events in super().select(timeout) if not at_end(key.fd)]
            time.sleep(0 if found else 0.01)
            return found

    def at_end(fd):
        info = os.fstat(fd)
        return stat.S_ISREG(info.st_mode) and os.lseek(fd, 0, os.SEEK_CUR) == info.st_size
    selectors.DefaultSelector = Kqueue


def zombies():
    """Nothing can be sent to a group of which only a zombie is left."""
    def send(pid, number):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise PermissionError(1, 'Operation not permitted')
        killpg(pid, number)
    killpg, os.killpg = os.killpg, send


def case():
    """The file system takes names for the same that differ in case only."""
    def is_there(path):
        folder, name = os.path.split(path)
        return name.casefold() in map(str.casefold, os.listdir(folder))
    os.path.lexists = is_there


PARTS = (names, platform, proc, library, ctypes, files, kqueue, zombies, case)

if __name__ == '__main__':
    for part in PARTS:
        if part.__name__ in os.environ['CLIENT_LACKS'].split():
            part()
    program = Path(__file__).resolve().parent.parent / 'ssh_scheduler.py'
    sys.argv[0] = str(program)
    runpy.run_path(sys.argv[0], run_name='__main__')
