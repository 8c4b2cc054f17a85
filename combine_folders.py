#!/usr/bin/env python3
# ssh-scheduler: https://github.com/benblack769/ssh-scheduler.  MIT licence, see LICENSE.
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Combine folders into one that has everything they have, or say exactly why not.

    dest, src1, src2 ... --> Tree (a cursor in each)
                              |
          walk: the same folder in all trees at once, depth first, one descriptor a tree
                              |
    1 compare --> conflicts, troubles: nothing has been written, nothing is
          |  (8 bytes a file: what it looked like)
    2 write ----> a new folder is filled under a temporary name beside its place, then renamed;
          |       a file for a folder that was there is made and renamed likewise
    3 empty ----> with --move only: sync, then each file of a source is compared once more with
                  what dest has, and removed

All three passes see the same Items of a folder in the same order.  An item is a name in dest and
its versions, one for each tree that has it; dest is tree 0, so it comes first, and the FIRST
VERSION WINS: it gives the mode and the time of identical files, and of folders.

Nothing is planned in memory but those 8 bytes a file, since the second pass lists the folders
again.  What it finds must look as it did in the first pass, item by item, and every file must look
the same before and after it was read; a source that changes is noticed that way.

As usual, some things make this less simple:

  * No path is ever put together to be opened.  A cursor goes down by one name and up by `..`,
    because a path may be longer than PATH_MAX and a tree deeper than there are descriptors.
  * A kill leaves temporaries.  Their names are recognised, and the next run removes them.  So
    that it does not remove those of a run that is at work, runs lock the folder they write to.
  * Small files cost more in Python than in the kernel, so where there are many and a second
    processor, a Helper takes every other one.  It gets open folders through a socket.
  * Whether names that differ only in case can be together is asked of dest itself, by trying,
    and only when there are two such names.

Sections: Usage, Errors, Names, System, Tree, Copying, Comparing, Helper, Report, Combination,
Function, Options, Terminal, Command.

As a library: combine_folders() and the classes it mentions keep their documented behaviour;
everything else may change.  Importing has no effect.
"""
import array
import contextlib
import errno
import fcntl
import functools
import itertools
import os
import re
import stat
import sys
import time
from typing import NamedTuple

# ---- Usage: what read_options parses ----

USAGE = """\
Combine folders into one with everything that they have. The same path with the same content is
one file; with different content it is a conflict: all are listed, and nothing is written.

Usage:
  combine_folders [options] [--exclude=<pattern>]... [--] <dest> <source>...
  combine_folders --help

  If <dest> is there, it counts as the first source, and nothing in it is changed. Of identical
  files, the first gives the mode and the time. Options may stand anywhere; -- ends them.
  What execute_batch keeps for itself is left out: .ssh_scheduler in a <source>, and the streams of
  jobs (NAME.out, NAME.err) that job_results/* names as sources.

Options:
  --dry-run               Compare everything and say what would happen; write nothing.
  --link                  Hard links instead of copies, where the file system allows.
  --move                  Empty the sources, after all is safely in <dest>. The folders stay.
  --on-conflict=<what>    What to do with conflicts: error, or rename. The latter keeps all: the
                          first keeps its name, others get .SOURCE behind it [default: error].
  --exclude=<pattern>     What to leave out, with rsync's patterns ('*.ckpt', '/top', 'tmp/').
                          ONE pattern; give the option again for more.
  --prefix                Put each source in a folder of its own in <dest>, by its name.
  --skip-special          Leave out sockets, fifos and devices instead of refusing.
  --quiet                 Say nothing unless something is wrong.
  -h --help               Show this.

Exit status: 0 combined, 1 conflicts, 2 wrong usage or a path that cannot be used (in both nothing
was written), 3 stopped on the way (full disk, a source that changed), 130 interrupted. After 3 and
130 the same command completes it.
"""


# ---- Errors: each a sentence, with what to do ----

class CombineError(Exception):
    """Anything that a user can cause; shown without a traceback."""
    exit_code = 2


class UsageError(CombineError):
    """The command line is wrong."""


class Refused(CombineError):
    """Paths that cannot be combined, one sentence each; nothing was written."""


class ConflictsFound(CombineError):
    """The same path has different content; nothing was written.

    conflicts: a tuple of Conflict.  result: the Result, with what could have been combined.
    """
    exit_code = 1

    def __init__(self, conflicts, result):
        super().__init__(f'{many(len(conflicts), "conflict")}; nothing was written. '
                         'Try: --on-conflict rename, which keeps all of them, or --prefix.')
        self.conflicts, self.result = conflicts, result


class Stopped(CombineError):
    """Something went wrong on the way; the same command completes it."""
    exit_code = 3


class Changed(Stopped):
    """A source changed while it was read."""

    def __init__(self, path):
        super().__init__(f'{printable(path)}, or something beside it, changed while it was read. '
                         'Run the same command again when nothing writes there.')


# ---- Names: how they are shown, and which are ours ----

BOOKKEEPING = '.ssh_scheduler'          # a folder of execute_batch, in job_results
TEMPORARY = re.compile(r'\.combine_folders\.[0-9a-f]{16}\.tmp')


def temporary_name(name):
    """Return the name under which `name` is made: always the same one, so that it is found."""
    import hashlib
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    return f'.combine_folders.{digest}.tmp'


def is_stream_file(path):
    """Whether this is what a job of execute_batch printed: NAME.out or NAME.err in job_results."""
    stem, end = os.path.splitext(path)
    other = {'.out': '.err', '.err': '.out'}.get(end)
    return bool(other) and os.path.isfile(path) and (os.path.isfile(stem + other) or os.path.isdir(
        os.path.join(os.path.dirname(path), BOOKKEEPING)))


def printable(text):
    """Return any file name on one line, fit for a terminal: no control characters, no escapes."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else f'\\x{ord(c) - 0xdc00:02x}'
                   if 0xdc80 <= ord(c) <= 0xdcff else repr(c)[1:-1] for c in text)


def many(count, noun):
    """Return '1 file', '2,000 files'."""
    return f'{count:,} {noun}{"" if count == 1 else "s"}'


def reason_of(error):
    """Return what the system said, as 'No space left on device', without numbers."""
    return error.strerror or str(error)


def case_key(name):
    """Return what two names share that a case-insensitive file system may take for one."""
    if name.isascii():
        return name.lower()
    import unicodedata
    return unicodedata.normalize('NFD', unicodedata.normalize('NFD', name).casefold())


def source_names(paths):
    """Return a short name for each source: its last component, or as many as tell all apart."""
    parts = [[part for part in os.path.abspath(path).split('/') if part] or ['root']
             for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ['_'.join(components[-depth:]) for components in parts]
        if len(set(names)) == len(names):
            break
    return names


def exclusion(patterns):
    """Return excluded(path below the source, is_folder), or None if there are no patterns.

    As in rsync: `*` and `?` stop at a slash and `**` does not; a pattern with a leading slash
    starts at the source's top, another one at any component; a trailing slash means folders only.
    """
    wild = {'**': '.*', '*': '[^/]*', '?': '[^/]'}

    def translate(token):
        if len(token) > 1 and token.startswith('['):
            return re.sub(r'^\[!', '[^', token.replace('\\', '\\\\'))
        return wild.get(token) or re.escape(token[-1])

    def expression(patterns):
        for pattern in patterns:
            tokens = re.findall(r'\*\*|\\.|\[!?\]?[^]]*\]|.', pattern.strip('/'), re.DOTALL)
            start = '' if pattern.startswith('/') else '(?:.*/)?'
            if not tokens:
                raise UsageError(f'--exclude: {pattern!r} is not a pattern.')
            yield start + ''.join(map(translate, tokens))

    if not patterns:
        return None
    try:
        for_folders = re.compile('|'.join(expression(patterns)), re.DOTALL)
        for_all = re.compile('|'.join(expression(
            pattern for pattern in patterns if not pattern.endswith('/'))) or r'(?!)', re.DOTALL)
    except re.error as error:
        raise UsageError(f'--exclude: not a pattern: {error}.') from None
    return lambda path, is_folder: (for_folders if is_folder else for_all).fullmatch(path)


# ---- System: what Python's os does not offer ----

FICLONE = 0x40049409        # ioctl: share the blocks of another file
RENAME_NOREPLACE = 1
NOT_OFFERED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM,
               errno.ENOTTY, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.EBADF}


@functools.lru_cache(maxsize=None)
def c_library():
    import ctypes
    return ctypes.CDLL(None, use_errno=True)


def rename_new(folder, old, new):
    """Rename within an open folder; FileExistsError if `new` is there."""
    import ctypes
    function = getattr(c_library(), 'renameat2', None)
    if function:
        if not function(folder, os.fsencode(old), folder, os.fsencode(new), RENAME_NOREPLACE):
            return
        if ctypes.get_errno() not in NOT_OFFERED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), new)
    # NFS has no such rename, but a link never replaces; vfat is the other way round.  Folders
    # cannot be linked; a plain rename of one replaces at most an empty folder.
    if not stat.S_ISDIR(os.lstat(old, dir_fd=folder).st_mode):
        try:
            os.link(old, new, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            return os.unlink(old, dir_fd=folder)
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
            if exists(folder, new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from None
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def sync_file_system(descriptor):
    """Wait until all that was written is on disk.

    One syncfs instead of an fsync for each file, which would cost a journal commit each.  Since
    Linux 5.8 it reports every failed write since the descriptor was opened.
    """
    import ctypes
    function = getattr(c_library(), 'syncfs', None)
    if function is None:
        os.sync()
    elif function(descriptor):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def exists(folder, name):
    try:
        os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def lock(descriptor, path, say):
    """Hold the folder until this process ends; wait for another combine_folders that does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f'waiting: another combine_folders is at work in {printable(path)}')
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass                        # NFS cannot lock folders; then there is no such protection


def same_case_is_same_name(folder):
    """Whether names that differ only in case are one name in the open folder: by trying."""
    before = os.fstat(folder)
    name = temporary_name('case')
    try:
        with contextlib.suppress(FileExistsError):      # what a killed run left
            os.mkdir(name, dir_fd=folder)
        try:
            return exists(folder, name.upper())
        finally:
            os.rmdir(name, dir_fd=folder)
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    except OSError:
        return False                # nothing can be written there, which is said later


# ---- Tree: a cursor in a folder ----

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
FILE_KIND, FOLDER_KIND, OTHER_KIND = 1, 2, 3        # two bits for each tree that has a name


def identity(descriptor):
    """Return what is the same for two descriptors only if they are of one folder."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


class Tree:
    """A folder and all below it: owns one descriptor, which goes down and up by single names.

    path: as the user wrote it.  prefix: the name that all of it has in dest, or None.
    """

    def __init__(self, path, descriptor, prefix=None):
        self.path, self.fd, self.prefix = path, descriptor, prefix
        self._above = []            # identity of each folder on the way up; None: the prefix

    def at_prefix(self):
        return self.prefix is not None and not self._above

    def entries(self):
        """Yield (name, kind) of all that is here."""
        if self.at_prefix():
            yield self.prefix, FOLDER_KIND
            return
        with os.scandir(self.fd) as found:
            for entry in found:
                yield entry.name, (FILE_KIND if entry.is_file(follow_symlinks=False) else
                                   FOLDER_KIND if entry.is_dir(follow_symlinks=False) else
                                   OTHER_KIND)

    def enter(self, name):
        if self.at_prefix():
            self._above.append(None)
            return
        below = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        self._above.append(identity(self.fd))
        os.close(self.fd)
        self.fd = below

    def leave(self):
        expected = self._above.pop()
        if expected is None:
            return
        above = os.open('..', FOLDER, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = above
        if identity(above) != expected:
            raise Changed(self.path)

    def close(self):
        os.close(self.fd)


class Folder:
    """A folder in dest that the walk is in, or will be.

    members: ((tree, name there), ...).  number: how many were entered before.  below: the
    Folders to enter from here; who walks puts them there.  made: it was not there before.
    """
    __slots__ = ('name', 'members', 'number', 'below', 'made', 'leftovers')

    def __init__(self, name, members, made=False):
        self.name, self.members, self.made = name, members, made
        self.number, self.below, self.leftovers = 0, [], []


GOING_IN, IN, OUT, GONE_OUT = 'going in', 'in', 'out', 'gone out'


def walk(trees, root):
    """Yield (event, way): all cursors go through the folders together, depth first.

    way: the Folders from root to the present one.  GOING_IN and GONE_OUT come while the cursors
    are in the folder above, IN and OUT while they are inside, before and after what is below.
    """
    way, count = [root], 1
    yield IN, way
    while True:
        here = way[-1]
        if here.below:
            below = here.below.pop()
            below.number = count
            count += 1
            way.append(below)
            yield GOING_IN, way
            for tree, name in below.members:
                trees[tree].enter(name)
            yield IN, way
            below.below.reverse()
            continue
        yield OUT, way
        if len(way) == 1:
            return
        for tree, _ in here.members:
            trees[tree].leave()
        yield GONE_OUT, way
        way.pop()


def discard(folder, name):
    """Remove one of our temporaries with all that is in it."""
    try:
        os.unlink(name, dir_fd=folder)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
    tree = Tree('', os.dup(folder))
    try:
        pending = [[name]]          # the folders that are left at each level; we are in the last
        while pending:
            if pending[-1]:
                os.chmod(pending[-1][-1], 0o700, dir_fd=tree.fd)
                tree.enter(pending[-1][-1])
                below = []
                for entry, kind in list(tree.entries()):
                    if kind == FOLDER_KIND:
                        below.append(entry)
                    else:
                        os.unlink(entry, dir_fd=tree.fd)
                pending.append(below)
            else:
                pending.pop()
                if pending:
                    tree.leave()
                    os.rmdir(pending[-1].pop(), dir_fd=tree.fd)
    finally:
        tree.close()


# ---- Copying: one file into an open folder ----

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
SMALL = 256 * 1024          # bytes that are read in one go
CHUNK = 8 * 1024 * 1024


def look_of(name, status, with_ctime):
    """Return 8 bytes that change with the file.  Making a hard link changes the ctime."""
    return hash((name, status.st_ino, status.st_size, status.st_mtime_ns,
                 with_ctime and status.st_ctime_ns))


def mark(name, tree):
    """Return the look of what is not copied: that there is something, and whether dest has it."""
    return hash((name, tree > 0))


def unchanged(before, after):
    return (before.st_mtime_ns == after.st_mtime_ns and before.st_size == after.st_size
            and before.st_ctime_ns == after.st_ctime_ns)


class Job(NamedTuple):
    """A file to copy: the tree whose open folder has it, the look it must have, its new name."""
    tree: int
    name: str
    look: int
    new: str


CHANGED = 0                 # where otherwise an errno stands


class LooksChanged(Exception):
    """A file does not look as it did, or not after reading it; its version, if that is known."""


class Copier:
    """Copies files between open folders; knows by now which file systems share no blocks."""

    def __init__(self, with_ctime, alive=lambda: True, copied=lambda count: None):
        self._no_clone = set()      # devices
        self._with_ctime = with_ctime
        self._alive, self._copied = alive, copied

    def copy_all(self, jobs, folders, straight):
        """Do the jobs; folders: {tree: open folder}, dest's is 0.  Return (bytes, failure).

        failure: None, or which of the jobs failed and its errno, or CHANGED.  straight: under
        their own names, since the folder itself has a temporary one.
        """
        total = done = 0
        try:
            for done, job in enumerate(jobs):       # noqa: B007
                if not self._alive():
                    raise SystemExit(1)
                total += self._copy(job, folders[job.tree], folders[0], straight)
        except LooksChanged:
            return total, (done, CHANGED)
        except OSError as error:
            return total, (done, error.errno)
        return total, None

    def _copy(self, job, source_folder, folder, straight):
        """Make the job's file and return its size."""
        try:
            source = os.open(job.name, READ, dir_fd=source_folder)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                raise LooksChanged from None
            raise
        try:
            status = os.fstat(source)
            if look_of(job.name, status, self._with_ctime) != job.look:
                raise LooksChanged
            made = job.new if straight else temporary_name(job.new)
            target = os.open(made, CREATE, 0o600, dir_fd=folder)
            try:
                whole = self._copy_content(source, target, status)
                if not whole or not unchanged(status, os.fstat(source)):
                    raise LooksChanged
                dress(target, status)
            finally:
                os.close(target)
        finally:
            os.close(source)
        if not straight:
            rename_new(folder, made, job.new)
        return status.st_size

    def _copy_content(self, source, target, status):
        """Return whether there was exactly as much as the size says."""
        size = status.st_size
        if size and self._clone(source, target, status.st_dev):
            return os.fstat(target).st_size == size
        if size <= SMALL and status.st_blocks * 512 >= size:
            content = os.read(source, size + 1)
            while content and (written := os.write(target, content)) < len(content):
                content, size = content[written:], size - written
            return len(content) == size
        if status.st_blocks * 512 < size:
            os.ftruncate(target, size)
            for start, end in data_segments(source, size):
                os.lseek(source, start, os.SEEK_SET)
                os.lseek(target, start, os.SEEK_SET)
                if not self._copy_bytes(source, target, end - start):
                    return False
            return True
        return self._copy_bytes(source, target, size)

    def _clone(self, source, target, device):
        if device in self._no_clone:
            return False
        try:
            fcntl.ioctl(target, FICLONE, source)
            return True
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
            self._no_clone.add(device)
            return False

    def _copy_bytes(self, source, target, count):
        """Copy so many bytes from where both are; return whether there were so many."""
        in_kernel = hasattr(os, 'copy_file_range')
        while count:
            if not self._alive():
                raise SystemExit(1)
            done = 0
            if in_kernel:
                try:
                    done = os.copy_file_range(source, target, min(count, CHUNK))
                except OSError as error:
                    if error.errno not in NOT_OFFERED:
                        raise
            if not done:            # not offered, or the end, which read() knows for sure
                in_kernel = False
                content = os.read(source, min(count, SMALL))
                if not content:
                    return False
                while done < len(content):
                    done += os.write(target, content[done:])
            count -= done
            self._copied(done)
        return True


def data_segments(descriptor, size):
    """Yield (start, end) of what is not a hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:      # nothing but a hole behind here
                return
            raise
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, end


def dress(target, status):
    """Give an open file or folder the owner, where we may, the mode and the times of another."""
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or status.st_gid != os.getegid():
        try:
            os.fchown(target, status.st_uid, status.st_gid)
        except OSError:
            mode &= ~(stat.S_ISUID | stat.S_ISGID)      # would lend our rights, not the owner's
    os.fchmod(target, mode)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


# ---- Comparing: small files ----

def may(name, what, folder):
    """Whether we may: os.R_OK ... of a name in an open folder, asked of the file system."""
    return os.access(name, what, dir_fd=folder, effective_ids=True)


def read_small(name, folder):
    """Return (status, content) of a file; content is None if it is not small."""
    descriptor = os.open(name, READ, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        if status.st_size > SMALL:
            return status, None
        content = os.read(descriptor, status.st_size + 1)
        if len(content) != status.st_size or not unchanged(status, os.fstat(descriptor)):
            raise LooksChanged
        return status, content
    finally:
        os.close(descriptor)


def glance(versions, folders, with_ctime):
    """Return (size, look) if all ((tree, name), ...) are one small file, or one that is alone.

    None: whoever asked has to look closer.
    """
    (tree, name), *others = versions
    try:
        if others:
            first, content = read_small(name, folders[tree])
            for other_tree, other_name in others:
                if content is None or content != read_small(other_name, folders[other_tree])[1]:
                    return None
        else:
            first = os.lstat(name, dir_fd=folders[tree])
            is_mine = first.st_uid == os.geteuid() and first.st_mode & stat.S_IRUSR
            if not is_mine and not may(name, os.R_OK, folders[tree]):
                return None
    except (OSError, LooksChanged):
        return None
    if not stat.S_ISREG(first.st_mode):
        return None
    return first.st_size, look_of(name, first, with_ctime)


def glance_all(items, folders, with_ctime):
    return [glance(versions, folders, with_ctime) for versions in items]


# ---- Helper: a second process for every other file ----

HELP_FROM = 1000            # files: fewer are done before a helper has started
BATCH = 512                 # files that are shared out at a time
MOST_FOLDERS = 250          # that the kernel lets through a socket at a time


class Helper:
    """Owns a process that does jobs at the same time as we do others; it ends when we do.

    It is forked, so it has our locks: they last until it has ended as well.  Threads would take
    turns here, as each file costs more Python than system calls.
    """

    def __init__(self, with_ctime):
        import marshal
        import signal
        import socket
        self._marshal, self._socket = marshal, socket
        self._ours, theirs = socket.socketpair()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid:
            theirs.close()
            return
        try:                        # from here to the end: in the helper
            signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent hears it and kills us
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._ours.close()
            self._ours = theirs
            copier = Copier(with_ctime, alive=lambda: os.getppid() == parent)
            while True:
                (trees, jobs, argument), descriptors = self._receive()
                folders = dict(zip(trees, descriptors))
                if isinstance(jobs[0][0], int):
                    jobs = [Job(*job) for job in jobs]
                    self._send(copier.copy_all(jobs, folders, argument))
                else:
                    self._send(glance_all(jobs, folders, argument))
                for descriptor in descriptors:
                    os.close(descriptor)
        finally:                    # also when the parent is gone
            os._exit(0)

    @staticmethod
    def can_help():
        """Whether there is a processor for it, and no thread that a fork would cut off."""
        threads = sys.modules.get('threading')
        return (hasattr(os, 'sched_getaffinity') and len(os.sched_getaffinity(0)) > 1
                and (threads is None or threads.active_count() == 1))

    def start(self, jobs, folders, argument):
        """Let it begin what copy_all does with Jobs, or glance_all with versions."""
        self._send((list(folders), [tuple(job) for job in jobs], argument),
                   list(folders.values()))

    def finish(self):
        """Wait for what was started; return what the function returned."""
        return self._receive()[0]

    def end(self):
        """Kill it: between jobs it has nothing to lose, and after an error nothing to finish."""
        if self._pid:
            self._ours.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def _send(self, message, descriptors=()):
        data = self._marshal.dumps(message)
        size = len(data).to_bytes(8, 'big')
        self._socket.send_fds(self._ours, [size], descriptors)
        self._ours.sendall(data)

    def _receive(self):
        size, descriptors, _, _ = self._socket.recv_fds(self._ours, 8, 252)
        if len(size) < 8:
            raise Stopped('the second process was killed. The same command goes on.')
        with self._ours.makefile('rb') as stream:
            data = stream.read(int.from_bytes(size, 'big'))
        return self._marshal.loads(data), descriptors


# ---- Report: what is shown while it goes on ----

class Report:
    """Hears what happens; this one says nothing.  The one for terminals stands below."""

    def say(self, line):
        """One event: its word, a colon, and what happened."""

    def begin(self, doing, total_bytes=0):
        """A pass over all files begins; its bytes, where they are known."""

    def step(self, files, size):
        """So many files more, and bytes."""

    def end(self):
        """No pass goes on any more."""


# ---- Combination: the three passes ----

class Options(NamedTuple):
    dry_run: bool = False
    link: bool = False
    move: bool = False
    on_conflict: str = 'error'
    exclude: tuple = ()
    prefix: bool = False
    skip_special: bool = False


class Version(NamedTuple):
    """How one source has a path that others have differently."""
    source: str             # as the user wrote it
    kind: str               # 'file', 'folder' or 'symlink'
    name: str               # differs from the others' only where dest does not tell case
    size: int
    mtime_ns: int
    content: int            # the same number: the same content


class Conflict(NamedTuple):
    """A path, below dest, and its Versions."""
    path: str
    versions: tuple


class Result(NamedTuple):
    """What was combined; with dry_run, what would be.

    files + duplicates + skipped is the number of files and symlinks that the sources have.
    """
    files: int = 0          # made in dest, symlinks among them
    bytes: int = 0          # of these
    duplicates: int = 0     # not made, since dest or an earlier source has the same
    conflicts: int = 0      # kept under different names
    skipped: int = 0        # sockets, fifos, devices
    renamed: tuple = ()     # (path in its source, path below dest) of each that was renamed


def members_of(versions):
    """Return what a Folder takes."""
    return tuple((tree, name) for tree, name, _ in versions)


class Place(NamedTuple):
    """Where dest is, or will be."""
    path: str               # as the user wrote it
    tree: object            # the Tree in it, or None
    nearest: int            # a descriptor of dest, or of the folder it will be in
    name: str               # in that folder

    @property
    def exists(self):
        return self.tree is not None


class Plan(NamedTuple):
    """Where the items of a folder are not simply its names: special files, conflicts."""
    kept: dict              # name -> the versions that go by it
    extra: dict             # new name -> the versions that are renamed to it


class Same:
    """Versions with the same content.  found: [((tree, name, kind), status)]; first: the first."""
    __slots__ = ('content', 'found')

    def __init__(self, content, version, status):
        self.content, self.found = content, [(version, status)]

    def versions(self):
        return tuple(version for version, _ in self.found)


class Combination:
    """One combination: owns the cursors, what was seen, and what is being made."""

    def __init__(self, place, sources, options, report):
        self.place, self.options, self.report = place, options, report
        self.trees = [place.tree, *sources]
        self.names = ['dest', *source_names([tree.path for tree in sources])]
        if options.prefix:
            for tree, name in zip(sources, self.names[1:]):
                tree.prefix = name
        self._nearest = identity(place.nearest)
        self.roots = {identity(tree.fd): tree.path for tree in sources}
        self.excluded = exclusion(options.exclude)
        self.seen = array.array('q')        # looks of all items, in their order
        self.plans = {}                     # number of a folder -> Plan
        self.troubles, self.conflicts = [], []
        self.files = self.bytes = self.duplicates = self.skipped = self.conflict_count = 0
        self.renamed = []
        self.bookkeeping = set()            # paths of folders that are left out
        self._pairs = {}                    # bits -> ((tree, kind), ...)
        self._tells_case = None
        self._copier = Copier(not self.links(),
                              copied=lambda count: report.step(0, count))
        self._helper, self._shared = None, 0        # jobs so far
        self._way = [self.root(False)]      # where the walk is, for errors
        self._is_above = False              # and the cursors are in front of its end
        self._unsynced = {}                 # device -> a descriptor of what --move wrote to
        self._lock = None
        self._building = None               # (Folder, descriptor above it, its temporary name)
        self._at_work = []                  # temporary names of files in the present folder

    def result(self):
        return Result(self.files, self.bytes, self.duplicates, self.conflict_count, self.skipped,
                      tuple(self.renamed))

    def root(self, with_dest):
        return Folder('', tuple((tree, '') for tree in range(0 if with_dest else 1,
                                                             len(self.trees))))

    # -- What is in a folder --

    def names_in(self, way, tree):
        """Return the names that lead to here in a source, or in dest (tree 0)."""
        if tree == 0:
            return [folder.name for folder in way[1:]]
        return [dict(folder.members)[tree] for folder in way[2 if self.options.prefix else 1:]]

    def path_in(self, way, tree, *name):
        """Return a path as a user would write it."""
        path = self.trees[tree].path if tree else self.place.path
        return '/'.join([path.rstrip('/'), *self.names_in(way, tree), *name]) or '/'

    def below_dest(self, way, name):
        return '/'.join([*self.names_in(way, 0), name])

    def entries(self, way):
        """Return {name: two bits for each tree}; what is excluded is left out."""
        folder, found = way[-1], {}
        for tree, _ in folder.members:
            if tree == 0 and folder.made:
                continue
            top = None
            if tree and self.excluded and not self.trees[tree].at_prefix():
                top = ''.join(name + '/' for name in self.names_in(way, tree))
            for name, kind in self.trees[tree].entries():
                if name.startswith('.combine_folders.') and TEMPORARY.fullmatch(name):
                    if tree == 0:
                        folder.leftovers.append(name)
                    else:
                        self.trouble(f'{self.path_in(way, tree, name)} is what a killed '
                                     'combine_folders left. Run its command again, or remove it.')
                    continue
                if (name == BOOKKEEPING and kind == FOLDER_KIND and tree
                        and not self.trees[tree].at_prefix()):
                    self.bookkeeping.add(self.path_in(way, tree, name))
                    continue
                if top is not None and self.excluded(top + name, kind == FOLDER_KIND):
                    continue
                found[name] = found.get(name, 0) | kind << 2 * tree
        return found

    def versions(self, found, name):
        """Return ((tree, name, kind), ...) of a name that was found, dest first."""
        bits = found[name]
        pairs = self._pairs.get(bits)
        if pairs is None:
            pairs = self._pairs[bits] = tuple((tree, bits >> 2 * tree & 3)
                                              for tree in range(len(self.trees))
                                              if bits >> 2 * tree & 3)
        return tuple([(tree, name, kind) for tree, kind in pairs])

    def items(self, way, found):
        """Yield (final name, versions) of all that sources have here, in the same order always."""
        plan = self.plans.get(way[-1].number)
        for name in sorted(found):
            if plan and name in plan.kept:
                if plan.kept[name]:
                    yield name, plan.kept[name]
            elif found[name] > 3:           # a source has it, not only dest
                yield name, self.versions(found, name)
        if plan:
            yield from plan.extra.items()

    # -- First pass --

    def compare(self):
        """Look at everything; afterwards troubles, conflicts, seen and plans are known."""
        self.report.begin('comparing')
        with self.failing(Refused):
            for event, way in walk(self.trees, self.root(self.place.exists)):
                self._way, self._is_above = way, event in (GOING_IN, GONE_OUT)
                if event is IN:
                    self.refuse_loops(way)
                    self.compare_folder(way)
        if self.troubles:
            raise Refused('\n'.join(self.troubles))

    def trouble(self, sentence):
        self.troubles.append(printable(sentence))

    def refuse_loops(self, way):
        """A folder that is reached twice, as through a bind mount, must not be both ends."""
        here = {tree: identity(self.trees[tree].fd) for tree, _ in way[-1].members}
        for tree, folder in here.items():
            if tree and folder == self._nearest:
                raise Refused(f'{printable(self.place.path)} lies inside the source '
                              f'{printable(self.trees[tree].path)}.')
            if not tree and folder in self.roots:
                raise Refused(f'the source {printable(self.roots[folder])} lies inside '
                              f'{printable(self.place.path)}.')
            if tree and folder == here.get(0):
                raise Refused(f'{printable(self.path_in(way, tree))} and '
                              f'{printable(self.path_in(way, 0))} are one folder.')
            if tree and self.options.move and not self.trees[tree].at_prefix() and not may(
                    '.', os.W_OK | os.X_OK, self.trees[tree].fd):
                self.trouble(f'{self.path_in(way, tree)}: nothing can be moved out of it: '
                             'Permission denied.')

    def compare_folder(self, way):
        """Compare all that the trees have here, and put the folders to enter into way[-1].below."""
        folder = way[-1]
        found = self.entries(way)
        kept, others, below = {}, [], {}
        count_before = self.files
        for names, glanced in self.glances(found):
            if glanced:                     # the usual case, and quick: nothing but one file
                size, look = glanced
                self.settle_file(size, look, self.versions(found, names[0]))
                continue
            classes, is_plain = [], len(names) == 1
            for name in names:
                versions = self.versions(found, name)
                classes += self.classes(way, versions)
                is_plain = is_plain and len(classes) == 1 and (
                    len(classes[0].found) == len(versions))
            if len(classes) > 1:
                self.conflict(way, classes)
                if self.options.on_conflict != 'rename':
                    continue
                others += classes[1:]
            if not is_plain:
                kept.update(dict.fromkeys(names, ()))
            if classes:
                name = classes[0].found[0][0][1]
                if not is_plain:
                    kept[name] = classes[0].versions()
                self.settle(name, classes[0], below)
        extra = self.rename(way, found, kept, others, below)
        if kept or extra:
            self.plans[folder.number] = Plan(kept, extra)
        if self.place.exists and (self.files > count_before or any(
                versions[0][0] for versions in below.values())) and folder.members[0][0] == 0:
            if not may('.', os.W_OK | os.X_OK, self.trees[0].fd):
                self.trouble(f'{self.path_in(way, 0)}: nothing can be added: Permission denied.')
        for name, versions in below.items():
            for tree, there, _ in versions:
                if not self.trees[tree].at_prefix() and not may(
                        there, os.R_OK | os.X_OK, self.trees[tree].fd):
                    self.trouble(f'{self.path_in(way, tree, there)}: cannot be read: '
                                 'Permission denied.')
                    break
            else:
                folder.below.append(Folder(name, members_of(versions)))

    def glances(self, found):
        """Yield (names, what a glance showed or None) of all that a source has here."""
        waiting = []
        for names in self.same_names(found):
            if any(found[name] > 3 for name in names):      # not only dest has it
                waiting.append(names)
            if len(waiting) == BATCH:
                yield from self.glance_at(found, waiting)
                waiting = []
        yield from self.glance_at(found, waiting)

    def glance_at(self, found, waiting):
        jobs = []
        for names in waiting:
            versions = self.versions(found, names[0])
            if len(names) == 1 and all(kind == FILE_KIND for _, _, kind in versions):
                jobs.append(members_of(versions))
        shown = {}
        for part, glanced in self.share(jobs, glance_all, not self.links()) if jobs else ():
            shown.update(zip((versions[0][1] for versions in part), glanced))
        for names in waiting:
            yield names, shown.get(names[0])

    def same_names(self, found):
        """Yield lists of names that can only be one name in dest."""
        names = sorted(found)
        if len({case_key(name) for name in names}) < len(names) and not self.tells_case():
            alike = {}
            for name in names:
                alike.setdefault(case_key(name), []).append(name)
            for group in alike.values():    # first the one that dest has, or the first source
                group.sort(key=lambda name: self.versions(found, name)[0][0])
            yield from sorted(alike.values())
        else:
            for name in names:
                yield (name,)

    def tells_case(self):
        """Whether dest can have names that differ only in case; asked at most once."""
        if self._tells_case is None:
            self._tells_case = not same_case_is_same_name(self.place.nearest)
        return self._tells_case

    def classes(self, way, versions):
        """Return the versions as lists of Same, in the order in which they came."""
        classes = []
        for version in versions:
            tree, name, kind = version
            try:
                status, content = self.look(version)
                if status and not stat.S_ISREG(status.st_mode) and content is None:
                    if tree:                # dest may have what it has
                        self.special(way, version, status)
                        continue
                for same in classes:
                    if self.equal(same, version, status, content):
                        same.found.append((version, status))
                        break
                else:
                    classes.append(Same(content, version, status))
            except FileNotFoundError:
                raise Changed(self.path_in(way, tree, name)) from None
            except LooksChanged as change:
                tree, name, _ = change.args[0] if change.args else version
                raise Changed(self.path_in(way, tree, name)) from None
            except OSError as error:
                self.trouble(f'{self.path_in(way, tree, name)}: cannot be read: '
                             f'{reason_of(error)}.')
        return classes

    def look(self, version):
        """Return (status, content): a symlink's target, a small file's bytes, or None."""
        tree, name, kind = version
        folder = self.trees[tree].fd
        if kind == FOLDER_KIND:
            return None, None
        if kind == OTHER_KIND:
            status = os.lstat(name, dir_fd=folder)
            is_link = stat.S_ISLNK(status.st_mode)
            return status, os.readlink(name, dir_fd=folder) if is_link else None
        return read_small(name, folder)

    def equal(self, same, version, status, content):
        """Whether the version is what the others are."""
        first, first_status = same.found[0]
        if first[2] == FOLDER_KIND or version[2] == FOLDER_KIND:
            return first[2] == version[2]
        if stat.S_IFMT(first_status.st_mode) != stat.S_IFMT(status.st_mode):
            return False
        if not stat.S_ISREG(status.st_mode):
            return same.content == content
        if first_status.st_size != status.st_size:
            return False
        if first_status.st_ino == status.st_ino and first_status.st_dev == status.st_dev:
            return True
        if content is not None:
            return same.content == content
        with contextlib.ExitStack() as opened:
            pair = []
            for (tree, name, _), before in ((first, first_status), (version, status)):
                descriptor = os.open(name, READ, dir_fd=self.trees[tree].fd)
                opened.callback(os.close, descriptor)
                pair.append((descriptor, before))
            is_equal = self.equal_bytes(*(descriptor for descriptor, _ in pair))
            for read, (descriptor, before) in zip((first, version), pair):
                if not unchanged(before, os.fstat(descriptor)):
                    raise LooksChanged(read)
            return is_equal

    def equal_bytes(self, one, other):
        buffers = memoryview(bytearray(SMALL)), memoryview(bytearray(SMALL))
        while True:
            counts = [os.readv(descriptor, [buffer])
                      for descriptor, buffer in zip((one, other), buffers)]
            if counts[0] != counts[1] or buffers[0][:counts[0]] != buffers[1][:counts[1]]:
                return False
            if not counts[0]:
                return True
            self.report.step(0, counts[0])

    def special(self, way, version, status):
        """A socket, a fifo or a device is left out, or refused."""
        tree, name, _ = version
        self.skipped += 1
        if not self.options.skip_special:
            kinds = {stat.S_IFIFO: 'fifo', stat.S_IFSOCK: 'socket', stat.S_IFBLK: 'block device',
                     stat.S_IFCHR: 'character device'}
            kind = kinds.get(stat.S_IFMT(status.st_mode), 'special file')
            self.trouble(f'{self.path_in(way, tree, name)} is a {kind}, which cannot be combined. '
                         'Try: --skip-special')

    def settle(self, name, same, below):
        """Count what goes by a name: what is made, and what is the same and is not."""
        (tree, there, kind), status = same.found[0]
        if kind == FOLDER_KIND:
            below[name] = same.versions()
            self.seen.append(mark(name, tree))
            return
        self.settle_file(status.st_size, self.look_of(there, status, same.content),
                         same.versions())

    def settle_file(self, size, look, versions):
        self.duplicates += len(versions) - 1
        if versions[0][0]:                  # the first is not dest's own
            self.files += 1
            self.bytes += size
        self.seen.append(look if versions[0][0] else mark(versions[0][1], 0))
        self.report.step(len(versions), 0)

    def look_of(self, name, status, target):
        if stat.S_ISLNK(status.st_mode):
            return hash((name, target))
        return look_of(name, status, not self.links())

    def links(self):
        return self.options.link or self.options.move

    # -- Conflicts --

    def conflict(self, way, classes):
        self.conflict_count += 1
        if self.options.on_conflict == 'rename':
            return
        versions = []
        for number, same in enumerate(classes):
            for (tree, name, kind), status in same.found:
                path = self.trees[tree].path if tree else self.place.path
                if kind == FOLDER_KIND:
                    versions.append(Version(path, 'folder', name, 0, 0, number))
                else:
                    kind = ('file' if stat.S_ISREG(status.st_mode) else
                            'symlink' if stat.S_ISLNK(status.st_mode) else 'special file')
                    versions.append(Version(path, kind, name, status.st_size, status.st_mtime_ns,
                                            number))
        self.conflicts.append(Conflict(self.below_dest(way, versions[0].name), tuple(versions)))

    def rename(self, way, found, kept, others, below):
        """Give each of the other classes a name behind which its source stands.

        It is the first that is free, or that the same content goes by already: as when the same
        command is run again.  Return {new name: versions}; what joins others is put into kept.
        """
        extra = {}
        for same in others:
            (tree, name, kind), _ = same.found[0]
            for number in range(1, len(found) + len(others) + 2):
                final = f'{name}.{self.names[tree]}' + (f'.{number}' if number > 1 else '')
                taken = (extra.get(final) or kept.get(final)
                         or (self.versions(found, final) if final in found else None))
                if taken is None:
                    extra[final] = same.versions()
                    self.settle(final, same, below)
                    break
                status, content = self.look(taken[0])
                apart = {tree for tree, *_ in taken}.isdisjoint(
                    tree for tree, *_ in same.versions())       # no cursor is in two folders
                if self.equal(Same(content, taken[0], status), same.found[0][0],
                              *self.look(same.found[0][0])) and (apart or kind != FOLDER_KIND):
                    joined = taken + same.versions()
                    if final in extra or final in kept or found[final] > 3:
                        (extra if final in extra else kept)[final] = joined
                    else:                   # only dest has it so far
                        extra[final] = joined
                        self.seen.append(mark(final, 0))
                    if kind == FOLDER_KIND:
                        below[final] = joined
                    else:
                        self.duplicates += len(same.found)
                    break
            if len(os.fsencode(final)) > 255:
                self.trouble(f'{self.path_in(way, tree, name)} cannot be renamed to {final}: '
                             'the name is too long.')
            self.renamed.append((self.path_in(way, tree, name), self.below_dest(way, final)))
        return extra

    # -- Second pass --

    @contextlib.contextmanager
    def failing(self, kind):
        """What the system refuses becomes one sentence, with the place where it happened."""
        try:
            yield
        except OSError as error:
            name = error.filename if isinstance(error.filename, str) else ''
            way = self._way[:-1] if self._is_above and len(self._way) > 1 else self._way
            path = printable(self.path_in(way, 0, *[name] * (
                bool(name) and not TEMPORARY.fullmatch(name))))
            rest = f' {self.what_is_left()}' if kind is Stopped else ''
            raise kind(f'{path}: {reason_of(error)}.{rest}') from None

    def what_is_left(self):
        if self.place.exists:
            return 'What was added is complete; the same command adds the rest.'
        return f'There is no {printable(self.place.path)} yet; the same command makes it.'

    def write(self):
        """Make in dest what the first pass found missing."""
        self.report.begin('copying', self.bytes)
        seen = iter(self.seen)
        root = self.root(self.place.exists)
        self._way = [root]
        try:
            with self.failing(Stopped):
                if not self.place.exists:
                    self.begin_dest(root)
                for event, way in walk(self.trees, root):
                    self._way, self._is_above = way, event in (GOING_IN, GONE_OUT)
                    if event is GOING_IN:
                        self.begin_folder(way[-1])
                    elif event is IN:
                        self.write_folder(way, seen)
                    elif event is OUT and way[-1].made:
                        self.finish_folder(way)
                    elif event is GONE_OUT:
                        self.show_folder(way[-1])
                if next(seen, None) is not None:        # there is less than there was
                    raise Changed(self.place.path)
                if not self.place.exists:
                    try:
                        self.show_folder(root)
                    except FileExistsError:
                        raise Stopped(f'{printable(self.place.path)} has appeared meanwhile. '
                                      'The same command adds to it.') from None
        except BaseException:
            self.clean_up()
            raise

    def begin_dest(self, root):
        """Make the folder that will be dest under a temporary name; it is ours alone."""
        folder, temporary = self.place.nearest, temporary_name(self.place.name)
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(temporary, dir_fd=folder)
            descriptor = os.open(temporary, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            lock(descriptor, self.place.path, self.report.say)
            if exists(folder, temporary) and os.path.samestat(
                    os.lstat(temporary, dir_fd=folder), os.fstat(descriptor)):
                break
            os.close(descriptor)            # it has become dest, or was removed, while we waited
        self.trees[0] = Tree(self.place.path, descriptor)
        self._lock = os.dup(descriptor)     # the cursor's descriptor does not stay the same
        self._building = root, os.dup(folder), temporary
        for name, _ in list(self.trees[0].entries()):
            discard(descriptor, name)       # what a killed run left
        root.made = True
        root.members = ((0, ''), *root.members)

    def begin_folder(self, folder):
        """Make a folder that dest does not have; the cursors are above it."""
        if folder.members[0][0] == 0:
            return
        above, name = self.trees[0].fd, folder.name
        if self._building is None:
            name = temporary_name(name)
            self._building = folder, os.dup(above), name
        os.mkdir(name, 0o700, dir_fd=above)
        folder.made = True
        folder.members = ((0, name), *folder.members)

    def finish_folder(self, way):
        """Nothing comes into it any more: give it the look of the first source's."""
        source = next(tree for tree, _ in way[-1].members if tree)
        if not self.trees[source].at_prefix():
            dress(self.trees[0].fd, os.fstat(self.trees[source].fd))

    def show_folder(self, folder):
        """A folder that was filled under a temporary name gets its own."""
        if self._building and self._building[0] is folder:
            _, above, name = self._building
            rename_new(above, name, folder.name or self.place.name)
            self._building = None
            os.close(above)

    def clean_up(self):
        """After an error or an interrupt nothing with a temporary name stays."""
        if self._helper:
            self._helper.end()
        with contextlib.suppress(OSError):
            for name in self._at_work:
                discard(self.trees[0].fd, name)
            if self._building:
                discard(self._building[1], self._building[2])

    def write_folder(self, way, seen):
        """Make what is missing in the folder that the cursors are in."""
        folder, dest = way[-1], self.trees[0].fd
        found = self.entries(way)
        for name in folder.leftovers:
            discard(dest, name)
        if self.options.move and (device := os.fstat(dest).st_dev) not in self._unsynced:
            self._unsynced[device] = os.dup(dest)
        jobs = []
        for name, versions in self.items(way, found):
            tree, there, kind = versions[0]
            look = next(seen, None)
            if look is None or (kind == FOLDER_KIND or not tree) and look != mark(name, tree):
                raise Changed(self.path_in(way, tree, there))
            if kind == FOLDER_KIND:
                folder.below.append(Folder(name, members_of(versions)))
            elif tree and kind == OTHER_KIND:
                self.make_symlink(way, versions[0], name, look)
            elif tree and not (self.links() and self.make_link(way, versions[0], name, look)):
                jobs.append(Job(tree, there, look, name))
            if len(jobs) == BATCH:
                self.copy_files(way, jobs)
                jobs = []
        if jobs:
            self.copy_files(way, jobs)

    def make_symlink(self, way, version, name, look):
        tree, there, _ = version
        status, target = self.look(version)
        if target is None or self.look_of(there, status, target) != look:
            raise Changed(self.path_in(way, tree, there))
        folder, made = self.trees[0].fd, name
        if not self._building:
            made = temporary_name(name)
            self._at_work.append(made)
        os.symlink(target, made, dir_fd=folder)
        with contextlib.suppress(PermissionError):
            os.chown(made, status.st_uid, status.st_gid, dir_fd=folder, follow_symlinks=False)
        os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=folder,
                 follow_symlinks=False)
        if made != name:
            rename_new(folder, made, name)
            self._at_work.remove(made)
        self.report.step(1, 0)

    def make_link(self, way, version, name, look):
        """Return whether a hard link could be made.  It is there at once, and replaces nothing."""
        tree, there, _ = version
        source = self.trees[tree].fd
        status = os.lstat(there, dir_fd=source)
        if self.look_of(there, status, None) != look:
            raise Changed(self.path_in(way, tree, there))
        try:
            os.link(there, name, src_dir_fd=source, dst_dir_fd=self.trees[0].fd,
                    follow_symlinks=False)
        except OSError as error:
            if error.errno in NOT_OFFERED:
                return False
            raise
        self.report.step(1, status.st_size)
        return True

    def copy_files(self, way, jobs):
        straight = self._building is not None
        if not straight:
            self._at_work += [temporary_name(job.new) for job in jobs]
        for part, (size, failure) in self.share(jobs, self._copier.copy_all, straight):
            if failure:
                self.fail(way, part[failure[0]], failure[1])
            self.report.step(len(part), size)
        self._at_work.clear()

    def share(self, jobs, function, argument):
        """Return [(jobs, what function(jobs, ...) returned)]; the second half is the helper's."""
        folders = {tree: self.trees[tree].fd for tree, _ in self._way[-1].members}
        self._shared += len(jobs)
        if self._helper is None and self._shared > HELP_FROM:
            self._helper = Helper.can_help() and Helper(not self.links())
        if not self._helper or len(jobs) < 8 or len(folders) > MOST_FOLDERS:
            return [(jobs, function(jobs, folders, argument))]
        mine, others = jobs[::2], jobs[1::2]
        self._helper.start(others, folders, argument)
        return [(mine, function(mine, folders, argument)), (others, self._helper.finish())]

    def fail(self, way, job, reason):
        """Raise the error that a job ended with."""
        path = self.path_in(way, job.tree, job.name)
        if reason == CHANGED:
            raise Changed(path)
        raise Stopped(f'{printable(path)} -> {printable(self.path_in(way, 0, job.new))}: '
                      f'{os.strerror(reason)}. {self.what_is_left()}')

    # -- Third pass, with --move --

    def empty(self):
        """Remove from the sources what dest has, each file only after it was compared again."""
        self.report.begin('emptying')
        with self.failing(Stopped):
            for descriptor in self._unsynced.values():
                sync_file_system(descriptor)
            for event, way in walk(self.trees, self.root(True)):
                self._way, self._is_above = way, event in (GOING_IN, GONE_OUT)
                if event is IN:
                    self.empty_folder(way)
                elif event is GONE_OUT:
                    for tree, name in way[-1].members:
                        if tree and not self.trees[tree].at_prefix():
                            with contextlib.suppress(OSError):      # what was left out is in it
                                os.rmdir(name, dir_fd=self.trees[tree].fd)

    def empty_folder(self, way):
        for name, versions in self.items(way, self.entries(way)):
            sources = [version for version in versions if version[0]]
            if versions[0][2] == FOLDER_KIND:
                way[-1].below.append(Folder(name, ((0, name), *members_of(sources))))
                continue
            for version in sources:
                tree, there, kind = version
                kept = 0, name, kind
                try:
                    status, content = self.look(kept)
                    if not self.equal(Same(content, kept, status), version, *self.look(version)):
                        raise LooksChanged
                except (LooksChanged, FileNotFoundError):
                    raise Changed(self.path_in(way, tree, there)) from None
                os.unlink(there, dir_fd=self.trees[tree].fd)
            self.report.step(len(sources), 0)

    def close(self):
        """Give back what was taken on the way: the helper, descriptors, the lock among them."""
        if self._helper:
            self._helper.end()
        if not self.place.exists and self.trees[0]:
            self.trees[0].close()
        for descriptor in (*self._unsynced.values(), self._lock,
                           self._building and self._building[1]):
            if descriptor is not None:
                os.close(descriptor)


# ---- Function: what main calls, and other programs may ----

def combine_folders(dest, *sources, dry_run=False, link=False, move=False, on_conflict='error',
                    exclude=(), prefix=False, skip_special=False, report=None):
    """Combine the source folders into the folder dest, and return a Result.

    dest and sources are paths.  The keywords are the options of the command; exclude is a list of
    patterns; on_conflict is 'error' or 'rename'.  report is a Report that hears what goes on.
    What execute_batch keeps for itself in job_results is left out; see the usage text.

    All errors are CombineErrors whose text is for users.  Nothing was written after
    ConflictsFound, whose `conflicts` has them all, and after Refused and UsageError.  After
    Stopped (Changed is one) the same call completes what was begun, as after an interrupt.
    """
    if on_conflict not in ('error', 'rename'):
        raise UsageError(f'--on-conflict must be error or rename, not {on_conflict!r}.')
    if isinstance(exclude, (str, bytes)):
        raise UsageError('exclude must be a list of patterns.')
    if not sources:
        raise UsageError('<source> is missing.')
    sources = list(map(os.fsdecode, sources))
    folders = [source for source in sources if not is_stream_file(source)]
    if not folders:
        raise Refused('no <source> is a folder: all are streams of jobs (.out, .err).')
    options = Options(dry_run, link, move, on_conflict, tuple(exclude), prefix, skip_special)
    report = report or Report()
    with contextlib.ExitStack() as opened:
        opened.callback(report.end)
        place, trees = open_folders(os.fsdecode(dest), folders, move, opened)
        if place.exists and not dry_run:
            lock(place.nearest, place.path, report.say)
        combination = Combination(place, trees, options, report)
        opened.callback(combination.close)
        combination.compare()
        left_out = [many(count, noun) for count, noun in (
            (len(sources) - len(folders), 'stream file'),
            (len(combination.bookkeeping), f'{BOOKKEEPING} folder')) if count]
        if left_out:
            report.say(f'left out: {", ".join(left_out)}')
        if combination.conflicts:
            raise ConflictsFound(tuple(combination.conflicts), combination.result())
        if not dry_run:
            combination.write()
            if move:
                combination.empty()
        return combination.result()


def open_folders(dest, sources, move, opened):
    """Return (Place, [Tree]), or say which paths cannot be combined.  opened: an ExitStack."""
    troubles, trees, known = [], [], {}
    for path in sources:
        try:
            tree = Tree(path, os.open(path, FOLDER))
        except OSError as error:
            troubles.append(f'the source {printable(path)} {no_folder(error)}')
            continue
        opened.callback(tree.close)
        same = known.setdefault(identity(tree.fd), tree)
        if same is not tree:
            troubles.append(f'the source {printable(path)} is the same folder as '
                            f'{printable(same.path)}.')
        trees.append(tree)
    try:
        place = open_place(dest, opened)
    except OSError as error:
        raise Refused('\n'.join([*troubles, f'{printable(dest)} {no_folder(error)}'])) from None
    if not place.exists and not may('.', os.W_OK | os.X_OK, place.nearest):
        troubles.append(f'{printable(dest)} cannot be made: Permission denied.')
    for inner in (identity for identity in way_up(place.nearest) if identity in known):
        troubles.append(f'{printable(dest)} lies inside the source {printable(known[inner].path)}.')
    for tree in trees:
        for outer in list(way_up(tree.fd))[1:]:
            if place.exists and outer == identity(place.nearest):
                troubles.append(f'the source {printable(tree.path)} lies inside {printable(dest)}.')
            elif move and outer in known:
                troubles.append(f'the source {printable(tree.path)} lies inside the source '
                                f'{printable(known[outer].path)}, which --move would empty.')
    if troubles:
        raise Refused('\n'.join(troubles))
    return place, trees


def open_place(dest, opened):
    """Return the Place of dest: the folder that is there, or the one that it will be in."""
    path = dest.rstrip('/') or dest
    name = os.path.basename(path)
    try:
        tree = Tree(dest, os.open(path, FOLDER))
        opened.callback(tree.close)
        nearest = os.open(path, FOLDER)
    except FileNotFoundError:
        if os.path.islink(path) or name in ('', '.', '..'):
            raise
        tree, nearest = None, os.open(os.path.dirname(path) or '.', FOLDER)
    opened.callback(os.close, nearest)
    return Place(dest, tree, nearest, name)


def no_folder(error):
    """Return the end of the sentence about a path that is not a folder to use."""
    return {errno.ENOENT: 'is not there.', errno.ENOTDIR: 'is not a folder.'}.get(
        error.errno, f'cannot be used: {reason_of(error)}.')


def way_up(folder):
    """Yield the identity of an open folder, and of each above it."""
    tree = Tree('', os.dup(folder))
    try:
        here = None
        while here != identity(tree.fd):    # the root is above itself
            here = identity(tree.fd)
            yield here
            above = os.open('..', FOLDER, dir_fd=tree.fd)
            tree.close()
            tree.fd = above
    except PermissionError:
        pass                                # what is above cannot be known
    finally:
        tree.close()


# ---- Options: argv -> what combine_folders takes ----

def option_kinds():
    """Return {option: 'flag' | 'value'} as the usage text describes them."""
    lines = re.findall(r'(?m)^  (-\w )?(--[a-z-]+)(=<\w+>)?  ', USAGE)
    kinds = {long: 'value' if value else 'flag' for _, long, value in lines}
    return {**kinds, **{short.strip(): kinds[long] for short, long, _ in lines if short}}


def read_options(argv):
    """Return (words, {option: value}); --exclude is a list, a flag is True."""
    kinds, words, options = option_kinds(), [], {}
    rest = iter(argv)
    for word in rest:
        if word == '--':
            words += rest
        elif not word.startswith('-') or word == '-':
            words.append(word)
        else:
            name, equals, value = word.partition('=')
            if name not in kinds:
                raise UsageError(f'unknown option {printable(name)}{nearest(name, kinds)}.')
            if kinds[name] == 'flag':
                if equals:
                    raise UsageError(f'{name} takes no value.')
                options[name] = True
                continue
            if not equals:
                value = next(rest, None)
                if value is None:
                    raise UsageError(f'{name} needs a value.')
            if name == '--exclude':
                options.setdefault(name, []).append(value)
            elif name in options:
                raise UsageError(f'{name} is there twice.')
            else:
                options[name] = value
    return words, options


def nearest(word, known):
    """Return ' (did you mean X?)' with the known words that this one may stand for, or ''.

    It may be the beginning of one, have typing errors, or name its parts in another order.
    --no-x never stands for x, nor the other way round.
    """
    import difflib

    def parts(text):
        return re.findall('[^-_]+', text.lower())

    def likeness(other):
        for order in itertools.permutations(parts(other)):
            spelled = ''.join(order)
            for beginning in {spelled, spelled[:len(typed)]}:
                share = difflib.SequenceMatcher(None, typed, beginning).ratio()
                yield share, list(order) == parts(other), beginning == spelled

    typed, found = ''.join(parts(word)), {}
    for other in sorted(known) if typed else ():
        negates = 'no' in parts(other)
        if negates == typed.startswith('no') or not negates and parts(word)[0] != 'no' and (
                parts(other)[0][0] == 'n'):
            found.setdefault(max(likeness(other)), []).append(other)
    best = max(found, default=(0,))
    alike = found[best] if best[0] >= 0.7 else []
    return f' (did you mean {" or ".join(alike)}?)' if 0 < len(alike) < 4 else ''


# ---- Terminal: the only printer ----

def size_in_words(count):
    """Return '0 bytes', '1.5 kB', '2.0 GB'."""
    if count < 1000:
        return many(count, 'byte')
    for unit in ('kB', 'MB', 'GB', 'TB', 'PB'):
        count /= 1000
        if count < 999.95 or unit == 'PB':
            return f'{count:.1f} {unit}'


class Terminal(Report):
    """Events go to stdout, a line each; the bar goes to stderr, where that is a terminal."""

    def __init__(self, out, err, quiet):
        self._out, self._err, self._quiet = out, err, quiet
        self._shows_bar = not quiet and err.isatty()
        self._doing, self._shown_at = None, 0.0
        self._files = self._bytes = self._total = 0

    def say(self, line):
        if not self._quiet:
            self._clear()
            write_line(self._out, line)

    def complain(self, text):
        self._clear()
        write_line(self._err, text)

    def begin(self, doing, total_bytes=0):
        self._doing, self._total = doing, total_bytes
        self._files = self._bytes = self._shown_at = 0

    def step(self, files, size):
        self._files += files
        self._bytes += size
        if self._shows_bar and time.monotonic() > self._shown_at + 0.1:
            self._shown_at = time.monotonic()
            share = f' {min(self._bytes / self._total, 1):4.0%}' if self._total else ''
            bar = ''
            if self._total:
                filled = int(30 * min(self._bytes / self._total, 1))
                bar = f' [{"#" * filled}{"-" * (30 - filled)}]'
            self._err.write(f'\r\x1b[K{self._doing}{share}{bar} {many(self._files, "file")}, '
                            f'{size_in_words(self._bytes)}')
            self._err.flush()

    def end(self):
        self._clear()
        self._doing = None

    def _clear(self):
        if self._shows_bar and self._doing:
            self._err.write('\r\x1b[K')
            self._err.flush()


def write_line(stream, line):
    try:
        stream.write(line + '\n')
        stream.flush()
    except UnicodeEncodeError:
        stream.write(line.encode('ascii', 'backslashreplace').decode() + '\n')
        stream.flush()
    except BrokenPipeError:             # as in `| head`: what is being done matters more
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def conflict_lines(conflict):
    """Yield the lines about a conflict; versions with the same content have the same number."""
    yield f'conflict: {printable(conflict.path)}'
    width = max(len(printable(version.source)) for version in conflict.versions)
    for version in conflict.versions:
        about = version.kind
        if version.kind != 'folder':
            when = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(version.mtime_ns // 10**9))
            about = f'{version.kind}, {many(version.size, "byte")}, {when}'
        other_name = os.path.basename(conflict.path) != version.name
        yield (f'  {printable(version.source):<{width}}  {about}, content {version.content + 1}'
               + (f', named {printable(version.name)}' if other_name else ''))


def summary(word, result, dest, conflicts, sources):
    """Return the last line: files, bytes, duplicates, conflicts."""
    skipped = f', {many(result.skipped, "special file")} skipped' if result.skipped else ''
    return (f'{word}: {many(result.files, "file")}, {size_in_words(result.bytes)} from '
            f'{many(sources, "folder")}, {many(result.duplicates, "duplicate")} collapsed, '
            f'{many(conflicts, "conflict")}{skipped} -> {printable(dest)}')


# ---- Command ----

class Terminated(BaseException):
    """SIGTERM or SIGHUP: like Ctrl-C, but the exit status says which."""


def terminate(number, _frame):
    raise Terminated(128 + number)


def run(argv, terminal):
    """Do what the command line says; return the exit status."""
    words, options = read_options(argv)
    if len(words) < 2:
        raise UsageError(f'<{("dest", "source")[len(words)]}> is missing.')
    keywords = {name[2:].replace('-', '_'): value for name, value in options.items()}
    keywords.pop('quiet', None)
    dest, *sources = words
    folders = sum(not is_stream_file(source) for source in sources)
    try:
        result = combine_folders(dest, *sources, report=terminal, **keywords)
    except ConflictsFound as found:
        for conflict in found.conflicts:
            for line in conflict_lines(conflict):
                terminal.complain(line)
        terminal.say(summary('not combined', found.result, dest, len(found.conflicts),
                             folders))
        raise
    except Refused as refused:
        hint = ' Each --exclude takes ONE pattern.'
        raise Refused(str(refused) + hint * ('--exclude' in options)) from None
    dry_run = '--dry-run' in options
    for source, path in result.renamed:
        terminal.say(f'{"would rename" if dry_run else "renamed"}: {printable(source)} -> '
                     f'{printable(path)}')
    terminal.say(summary('would combine' if dry_run else 'combined', result, dest,
                         result.conflicts, folders))
    return 0


def main():
    """Run the command; return its exit status."""
    import resource
    import signal
    argv = sys.argv[1:]
    before_end = argv[:argv.index('--')] if '--' in argv else argv
    if '--help' in before_end or '-h' in before_end:
        print(USAGE, end='')
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, terminate)
    # Each source needs a descriptor.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    terminal = Terminal(sys.stdout, sys.stderr, '--quiet' in before_end)
    try:
        return run(argv, terminal)
    except CombineError as error:
        for line in str(error).split('\n'):
            terminal.complain(f'combine_folders: {line}')
        if isinstance(error, UsageError):
            terminal.complain(USAGE.partition('\n\n')[2].partition('\n\n')[0])
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as interrupt:
        terminal.complain('combine_folders: interrupted. The same command completes it.')
        return interrupt.args[0] if isinstance(interrupt, Terminated) else 130


if __name__ == '__main__':
    sys.exit(main())
