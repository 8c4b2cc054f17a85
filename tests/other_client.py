"""Runs the program as on a client without Linux: python3 other_client.py execute_batch …

CLIENT_LACKS    words: the names of the PARTS below to apply

If the program makes a system call by number or reads /proc as on Linux, it stops at once with a
sentence and the exit status 99.
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
OPEN_MAX = 10240            # the highest limit of open files


def misused(what):
    os.write(2, f'{what} is used, which is Linux\'s alone\n'.encode())
    os._exit(99)


def platform():
    """Pretend to be a Mac, on which system calls have other numbers."""
    import subprocess  # noqa: F401  first: it depends on the platform
    here = os.uname()
    sys.platform = 'darwin'
    os.uname = lambda: os.uname_result(('Darwin', here.nodename, '23.6.0', 'Darwin', 'arm64'))
    import ctypes
    ctypes.CDLL.syscall = property(lambda _: misused('syscall'))


def names():
    """Remove the names that Python has only on Linux."""
    for module, words in LINUX_ONLY.items():
        for word in words.split():
            if hasattr(module, word):
                delattr(module, word)
    select.PIPE_BUF = 512


def proc():
    """Hide /proc, /sys and /dev/shm."""
    def hook(event, words):
        if event in ('open', 'os.listdir', 'os.scandir') and str(words[0]).startswith(
                ('/proc', '/sys', '/dev/shm')):
            if sys.platform != 'linux':
                misused(words[0])
            raise FileNotFoundError(2, 'No such file or directory', words[0])
    sys.addaudithook(hook)


def library():
    """Remove functions from the C library."""
    import ctypes

    def find(library, name):
        if name in ('prctl', 'renameat2', 'syncfs'):
            raise AttributeError(name)
        return getattr_of(library, name)
    getattr_of, ctypes.CDLL.__getattr__ = ctypes.CDLL.__getattr__, find


def ctypes():
    """Remove ctypes, so that Python cannot call the C library."""
    sys.modules['ctypes'] = None


def files():
    """Lower the limit of open files to 64, and refuse a limit beyond OPEN_MAX."""
    def limit(what, values):
        if what == resource.RLIMIT_NOFILE and not 0 <= values[0] <= OPEN_MAX:
            raise ValueError('current limit exceeds maximum limit')
        set_limit(what, values)
    set_limit, resource.setrlimit = resource.setrlimit, limit
    limit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def kqueue():
    """Let the selector ignore files at their end."""
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
    """Refuse a signal to a process group of which only a zombie is left."""
    def send(pid, number):
        try:
            has_ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:       # it was awaited already, so it is no zombie
            has_ended = None
        if has_ended:
            raise PermissionError(1, 'Operation not permitted')
        killpg(pid, number)
    killpg, os.killpg = os.killpg, send


def case():
    """Let os.path.lexists ignore case, as on a case-insensitive file system."""
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
