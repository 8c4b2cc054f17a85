#!/usr/bin/env python3
# ssh-scheduler: https://github.com/benblack769/ssh-scheduler.  MIT licence, see LICENSE.
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Combine folders into one that has all their files, or report exactly why that is impossible.

    dest, src1, src2 ... --> Trees: a Cursor in each, with one descriptor
                              |
        walk: all cursors go through the same folder at the same time, depth first
                              |
    1 ComparePass --> troubles or conflicts: then nothing is written at all
          |  Findings: the look of each item, a hash of 8 bytes
    2 WritePass ----> fills a new folder under a temporary name beside its place, then renames it;
          |           makes and renames a file in the same way if dest has its folder
          |  with --move only
    3 EmptyPass ----> syncs, then compares each file of a source once more with the file in dest,
                      and removes it from the source

All three passes see the same items of a folder in the same order.  An item is a name in dest and
its versions, one for each tree that has the name.  Dest is tree 0, so its version comes first.
The FIRST VERSION WINS: it gives the mode and the time of identical files, and of folders.

The program keeps only these 8 bytes for each item in memory, so the second pass lists the folders
again.  The program notices a source that changes: each item must look as it did in the first
pass, and each file must look the same before and after the program reads it.

Some things make the program less simple:

  * The program never opens a long path.  A cursor goes down by one name and up by `..`, because
    a path may be longer than PATH_MAX, and a tree may have more levels than there are descriptors.
  * A killed run leaves temporaries.  The next run recognises their names and removes them.  Each
    run locks the folder that it writes to, so that no other run removes its temporaries.
  * Small files cost more in Python than in the kernel.  So if the sources have many files and the
    computer has a second processor, a Helper, which is a second process, does every other file.
    The Helper gets the open folders through a socket.
  * If a folder has two names that differ only in case, the program tries in dest whether both
    can exist.

Sections: Usage, Words, Errors, Records, Looks; the passes: Compare, Write, Empty; their parts:
Names, Origins, System, Cursor, Trees, Comparing, Copying, Helper, Making, Report; and the edge:
Function, Completion, Options, Terminal, Command.  A section uses only the sections above it, so
the passes get their parts as arguments.

As a library: combine_folders() and the classes it mentions keep their documented behaviour;
everything else may change.  Importing has no effect.
"""
import array
import collections
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

# ---- Usage: the text that read_options parses ----

USAGE = """\
Combine folders into one that has all their files. The same path with the same
content becomes one file. The same path with different content is a conflict:
combine_folders lists all conflicts and writes nothing. If each job wrote files
of the same names, such as metrics.json, take --prefix or --on-conflict=rename.

Usage:
  combine_folders [options] [--exclude=<pattern>]... [--] <dest> <source>...
  combine_folders --help | --completion=<shell>

  A <dest> that exists counts as the first source; none of its files change. Of
  identical files the first gives the mode and the time. Options may stand
  anywhere; all words after -- are folders.
  combine_folders skips the files of execute_batch: .ssh_scheduler in a
  <source>, and, where a pattern such as job_results/* names them, streams
  (NAME.out, NAME.err), earlier results (NAME~1) of jobs that are named, too,
  files of jobs that run (NAME.partial), and tables and pages of results_table.
  <dest> must not be a folder of results or lie in one. If it lies in a folder
  with job_results, the next batch of that folder sends <dest>, too.

Options:
  --dry-run               Compare all files and show the outcome; write nothing.
  --exclude=<pattern>     Skip files that match this pattern of rsync, such as
                          '*.ckpt', '/top' or 'tmp/'. ONE pattern; for more give
                          the option again.
  --on-conflict=<what>    error: list conflicts and write nothing. rename: keep
                          all versions; each gets .SOURCE behind its name. Only
                          a file of <dest>, and a folder that is the first
                          version, keep their names [default: error].
  --prefix                Put each source into a folder of its own in <dest>,
                          named after the source.
  --move                  Empty the sources when all files are in <dest>. The
                          folders of the sources stay.
  --link                  Make hard links instead of copies, where the file
                          system allows.
  --skip-special          Skip sockets, fifos and devices. By default they are
                          an error.
  --quiet                 Print only errors.
  -h --help               Show this help.
  --completion=<shell>    Print the script by which bash, zsh or fish completes
                          this command; the shell reads it at its start.

Exit code: 0 combined; 1 conflicts, or 2 wrong usage or a path that cannot be
used: nothing was written; 3 failed halfway (full disk, a source that changed),
130 interrupted: the same command completes the work.

Example:
  combine_folders --prefix all_results job_results/*
"""


# ---- Words: how names, counts and errors are shown ----

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
    """Return the system's message, such as 'No space left on device', without numbers."""
    return error.strerror or str(error)


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

    conflicts: a tuple of Conflict.  result: the Result, which counts the other files.
    """
    exit_code = 1

    def __init__(self, conflicts, result):
        super().__init__(f'{many(len(conflicts), "conflict")}; nothing was written. '
                         'Try: --prefix, which puts each source into a folder of its own, or '
                         '--on-conflict rename, which puts .SOURCE behind their names.')
        self.conflicts, self.result = conflicts, result


class Stopped(CombineError):
    """The run failed halfway; the same command completes the work."""
    exit_code = 3


class Changed(Stopped):
    """A source changed while it was read."""

    def __init__(self, path):
        super().__init__(f'{printable(path)}, or something beside it, changed while it was read. '
                         'Run the same command again when nothing writes there.')


# ---- Records: what the passes hand to each other and to the parts ----

# A tree is a number: 0 is dest, and the sources follow in the order of the command line.  A version
# is (tree, name, kind): how one tree has an item.  A member is (tree, name).
FILE_KIND, FOLDER_KIND, OTHER_KIND = 1, 2, 3
# A name has two bits for each tree: its kind in that tree, or 0.  The lowest two are dest's.
ONLY_IN_DEST = 3            # no source has a name whose bits are at most this number

BATCH = 512                 # files that the program compares, or copies, at a time


class Options(NamedTuple):
    """The options of the command line; the usage text explains them."""
    dry_run: bool = False
    link: bool = False
    move: bool = False
    on_conflict: str = 'error'
    exclude: tuple = ()
    prefix: bool = False
    skip_special: bool = False

    @property
    def makes_links(self):
        return self.link or self.move


class Version(NamedTuple):
    """A version of a path in a conflict, for the user."""
    source: str             # as the user wrote it
    kind: str               # 'file', 'folder' or 'symlink'
    name: str               # differs between versions only where dest ignores case
    size: int
    mtime_ns: int
    content: int            # versions with the same number have the same content


class Conflict(NamedTuple):
    """A path, below dest, and its Versions."""
    path: str
    versions: tuple


class Result(NamedTuple):
    """How much was combined; with dry_run, how much would be.

    files + duplicates + skipped is the number of files and symlinks in the sources.
    """
    files: int = 0          # made in dest, symlinks among them
    bytes: int = 0          # of these
    duplicates: int = 0     # not made, because dest or an earlier source has the same file
    conflicts: int = 0      # kept under different names
    skipped: int = 0        # sockets, fifos, devices
    renamed: tuple = ()     # (path in its source, path below dest) of each that was renamed


class Place(NamedTuple):
    """Where dest is, or where the program will make it."""
    path: str               # as the user wrote it
    cursor: object          # the Cursor in it, or None
    base: int               # a descriptor of dest, or of the folder in which dest will be made
    name: str               # the last component of the path

    @property
    def exists(self):
        """Whether dest was there when the program began."""
        return self.cursor is not None

    def advice(self):
        """Return the sentence for a user whose run stopped."""
        if self.exists:
            return 'What was added is complete; the same command adds the rest.'
        return f'There is no {printable(self.path)} yet; the same command makes it.'


class Folder:
    """A folder of dest that the walk has entered or will enter.

    members: ((tree, name in that tree), ...).  number: how many folders the walk entered before it.
    below: the Folders to enter from it, which each pass chooses.  made: the second pass made it.
    """
    __slots__ = ('name', 'members', 'number', 'below', 'made')

    def __init__(self, name, members, made=False):
        self.name, self.members, self.made = name, members, made
        self.number, self.below = 0, []

    def is_in_dest(self):
        return self.members[0][0] == 0


# The events of a walk.  At GOING_IN and GONE_OUT the cursors are in the parent folder.  At IN and
# OUT they are in the folder itself, before and after the walk enters its subfolders.
GOING_IN, IN, OUT, GONE_OUT = 'going in', 'in', 'out', 'gone out'


class Listing:
    """All that the trees have in one folder.

    found: {name: its bits}.  leftovers: (tree, name) of each temporary that a killed run left.
    bookkeeping: the number of skipped folders in which execute_batch keeps its own files.
    """
    __slots__ = ('found', 'leftovers', 'bookkeeping')

    def __init__(self):
        self.found, self.leftovers, self.bookkeeping = {}, [], 0


class Content:
    """One content of an item, and the versions that have this content.

    data: the bytes of a small file, the target of a symlink, or None.  found: (version, status) of
    each version, in the order of the trees.
    """
    __slots__ = ('data', 'found')

    def __init__(self, data, version, status):
        self.data, self.found = data, [(version, status)]

    def versions(self):
        return tuple(version for version, _ in self.found)


class Plan:
    """How the items of a folder differ from its names: by special files and renamed conflicts.

    kept: {name: the versions that keep it, possibly none}.  extra: {new name: the versions that
    are renamed to it}.
    """
    __slots__ = ('kept', 'extra')

    def __init__(self):
        self.kept, self.extra = {}, {}


class Draft:
    """The items of a folder while the first pass compares it.

    found: {name: bits}.  plan: its Plan so far.  below: {name: versions} of the folders in it.
    """
    __slots__ = ('found', 'plan', 'below')

    def __init__(self, found):
        self.found, self.plan, self.below = found, Plan(), {}


class Copy(NamedTuple):
    """A file to copy: its tree, its name there, the look that it must have, its name in dest."""
    tree: int
    name: str
    look: int
    new: str


class Findings:
    """The results of the first pass; the other passes only read them.

    They have no list of files to make: the second pass lists the folders again and compares each
    item with the look that the first pass noted.  A list would need some hundred bytes a file, and
    would not show a change between the passes.
    """

    def __init__(self):
        self.looks = array.array('q')       # of all items, in the order of the walk
        self.plans = {}                     # number of a folder that needs a Plan -> the Plan
        self.conflicts = []                 # a Conflict for each that is not renamed
        self.bookkeeping = 0                # skipped folders of execute_batch
        # These become the Result.
        self.files = self.bytes = self.duplicates = self.skipped = self.conflict_count = 0
        self.renamed = []

    def result(self):
        return Result(self.files, self.bytes, self.duplicates, self.conflict_count, self.skipped,
                      tuple(self.renamed))


def members_of(versions):
    """Return the versions without their kinds."""
    return tuple([(tree, name) for tree, name, _ in versions])


def is_missing(versions):
    """Whether dest does not have the item."""
    return versions[0][0] > 0


def batches(items):
    """Yield the items in lists of at most BATCH."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH)):
        yield batch


# ---- Looks: 8 bytes that tell whether an item is as it was ----

class LooksChanged(Exception):
    """A file does not look as it did before; the argument, if any, is its version."""


def look_of_file(name, status, with_ctime):
    """Return 8 bytes that change with the file.

    A hard link changes the ctime of its file, so with_ctime is False where the program makes links.
    """
    return hash((name, status.st_ino, status.st_size, status.st_mtime_ns,
                 with_ctime and status.st_ctime_ns))


def look_of_link(name, target):
    """Return 8 bytes that change with the symlink."""
    return hash((name, target))


def look_of_uncopied(name, tree):
    """Return 8 bytes for an item that is not copied: a folder, or a file that dest already has."""
    return hash((name, tree > 0))


# ---- Compare: the first pass ----

class ComparePass:
    """Compares all items of the sources and writes nothing; owns the Findings."""

    def __init__(self, trees, comparer, workers, options, report):
        self.trees, self.comparer, self.workers = trees, comparer, workers
        self.options, self.report = options, report
        self.findings = Findings()
        self.troubles = []              # sentences about what cannot be combined

    def run(self):
        """Return the Findings; raise Refused, with all troubles, if the sources have any."""
        self.report.begin('comparing')
        with self.trees.failing(Refused):
            for event, folder in self.trees.walk(self.trees.root(self.trees.place.exists)):
                if event is IN:
                    self.trees.refuse_loops()
                    self.compare_folder(folder)
        if self.troubles:
            raise Refused('\n'.join(self.troubles))
        return self.findings

    def add_trouble(self, sentence):
        self.troubles.append(printable(sentence))

    # -- One folder --

    def compare_folder(self, folder):
        """Compare the items of the folder that the cursors are in, and choose the ones to enter."""
        draft, others = Draft(self.list_folder(folder)), []
        files_before = self.findings.files
        for names, glanced in self.glances(draft.found):
            if glanced:                 # the usual case, and quick: all versions are one file
                size, look = glanced
                self.add_file(size, look, self.trees.versions(draft.found, names[0]))
            else:
                others += self.compare_item(names, draft)
        for content in others:
            self.rename(content, draft)
        if draft.plan.kept or draft.plan.extra:
            self.findings.plans[folder.number] = draft.plan
        is_changed = self.findings.files > files_before or any(
            map(is_missing, draft.below.values()))
        if is_changed and folder.is_in_dest() and not self.trees.cursors[0].can_change():
            self.add_trouble(f'{self.trees.path_in(0)}: nothing can be added: Permission denied.')
        self.enter_later(folder, draft.below)

    def list_folder(self, folder):
        """Return {name: bits} of the folder; note troubles with the folder as a whole."""
        trees = self.trees
        for tree, _ in folder.members if self.options.move else ():
            if tree and not trees.cursors[tree].can_change():
                self.add_trouble(f'{trees.path_in(tree)}: nothing can be moved out of it: '
                                 'Permission denied.')
        listing = trees.list_folder()
        for tree, name in listing.leftovers:
            if tree:
                self.add_trouble(f'{trees.path_in(tree, name)} was left by a killed '
                                 'combine_folders. Run its command again, or remove it.')
        self.findings.bookkeeping += listing.bookkeeping
        return listing.found

    def enter_later(self, folder, below):
        """Let the walk enter the readable ones of these subfolders, {name: versions}."""
        for name, versions in below.items():
            for tree, its_name, _ in versions:
                if not self.trees.cursors[tree].can_enter(its_name):
                    self.add_trouble(f'{self.trees.path_in(tree, its_name)}: cannot be read: '
                                     'Permission denied.')
                    break
            else:
                folder.below.append(Folder(name, members_of(versions)))

    # -- At a glance --

    def glances(self, found):
        """Yield (names, (size, look) or None) of each item that a source has in the folder.

        names: the names of the item; it has several only where dest ignores case.  None: a glance
        does not show whether all versions of the item are the same file.
        """
        in_sources = (names for names in self.trees.name_groups(found)
                      if any(found[name] > ONLY_IN_DEST for name in names))
        for groups in batches(in_sources):
            files = []
            for names in groups:
                versions = self.trees.versions(found, names[0])
                if len(names) == 1 and all(kind == FILE_KIND for _, _, kind in versions):
                    files.append(members_of(versions))
            shown = {}
            for part, glanced in self.workers.glance_all(files):
                shown.update(zip((members[0][1] for members in part), glanced))
            for names in groups:
                yield names, shown.get(names[0])

    # -- One item --

    def compare_item(self, names, draft):
        """Compare the versions of an item, which may have several names where dest ignores case.

        Return the Contents for the caller to rename.  A single Content keeps its name, and the
        first of several does if it is in dest or is a folder.
        """
        contents = []
        for name in names:
            versions = self.trees.versions(draft.found, name)
            contents += self.contents_of(versions)
        if len(contents) > 1:
            self.add_conflict(contents)
            if self.options.on_conflict != 'rename':
                return []
        is_plain = len(names) == len(contents) == 1 and len(contents[0].found) == len(versions)
        if not is_plain:
            draft.plan.kept.update(dict.fromkeys(names, ()))
        if len(contents) > 1:
            (tree, _, kind), _ = contents[0].found[0]
            if tree and kind != FOLDER_KIND:        # so that each name shows whose file it is
                return contents
        if contents:
            (_, name, _), _ = contents[0].found[0]
            if not is_plain:
                draft.plan.kept[name] = contents[0].versions()
            self.add_item(name, contents[0], draft)
        return contents[1:]

    def contents_of(self, versions):
        """Return the different Contents of versions of one name, in the order of the versions."""
        contents = []
        for version in versions:
            self.add_version(contents, version)
        return contents

    def add_version(self, contents, version):
        """Add the version to the Content that it has, or to a new one; note an unreadable file."""
        tree, name, _ = version
        try:
            status, data = self.comparer.read(version)
            is_special = status and data is None and not stat.S_ISREG(status.st_mode)
            if is_special and tree:         # one in dest is harmless: the program does not copy it
                self.add_special(version, status)
                return
            for content in contents:
                if self.comparer.has(content, version, status, data):
                    content.found.append((version, status))
                    return
            contents.append(Content(data, version, status))
        except FileNotFoundError:
            raise Changed(self.trees.path_in(tree, name)) from None
        except LooksChanged as change:
            tree, name, _ = change.args[0] if change.args else version
            raise Changed(self.trees.path_in(tree, name)) from None
        except OSError as error:
            self.add_trouble(f'{self.trees.path_in(tree, name)}: cannot be read: '
                             f'{reason_of(error)}.')

    def add_special(self, version, status):
        """Count a socket, a fifo or a device; without --skip-special note a trouble."""
        tree, name, _ = version
        self.findings.skipped += 1
        if not self.options.skip_special:
            kinds = {stat.S_IFIFO: 'fifo', stat.S_IFSOCK: 'socket', stat.S_IFBLK: 'block device',
                     stat.S_IFCHR: 'character device'}
            kind = kinds.get(stat.S_IFMT(status.st_mode), 'special file')
            self.add_trouble(f'{self.trees.path_in(tree, name)} is a {kind}, which cannot be '
                             'combined. Try: --skip-special')

    def add_item(self, name, content, draft):
        """Note an item that dest will have under this name."""
        (tree, its_name, kind), status = content.found[0]
        if kind == FOLDER_KIND:
            draft.below[name] = content.versions()
            self.findings.looks.append(look_of_uncopied(name, tree))
        else:
            look = self.comparer.look_of(its_name, status, content.data)
            self.add_file(status.st_size, look, content.versions())

    def add_file(self, size, look, versions):
        """Note a file or a symlink that dest will have, and count its versions."""
        findings = self.findings
        findings.duplicates += len(versions) - 1
        tree, name, _ = versions[0]
        if tree:                            # dest does not have it
            findings.files += 1
            findings.bytes += size
        findings.looks.append(look if tree else look_of_uncopied(name, 0))
        self.report.step(len(versions), 0)

    # -- Conflicts --

    def add_conflict(self, contents):
        """Count a conflict; describe it to the user, unless its contents are renamed."""
        self.findings.conflict_count += 1
        if self.options.on_conflict == 'rename':
            return
        versions = []
        for number, content in enumerate(contents):
            for (tree, name, kind), status in content.found:
                path = self.trees.path_of(tree)
                if kind == FOLDER_KIND:
                    versions.append(Version(path, 'folder', name, 0, 0, number))
                else:
                    kind = ('file' if stat.S_ISREG(status.st_mode) else
                            'symlink' if stat.S_ISLNK(status.st_mode) else 'special file')
                    versions.append(Version(path, kind, name, status.st_size, status.st_mtime_ns,
                                            number))
        self.findings.conflicts.append(Conflict(self.trees.below_dest(versions[0].name),
                                                tuple(versions)))

    def rename(self, content, draft):
        """Rename the content to NAME.SOURCE, or to NAME.SOURCE.2 and so on if that name is taken.

        If the versions that have the name have the same content, as when a user repeats the
        command, the content joins them.
        """
        trees, plan = self.trees, draft.plan
        first, _ = content.found[0]
        tree, name, _ = first
        for number in itertools.count(1):
            new = f'{name}.{trees.short_names[tree]}' + (f'.{number}' if number > 1 else '')
            holder = plan.extra.get(new)
            if holder is None and new in draft.found:
                holder = plan.kept.get(new) if new in plan.kept else (
                    trees.versions(draft.found, new))
            if holder == ():                # the versions of that name get other names, too
                continue
            if holder is None:
                plan.extra[new] = content.versions()
                self.add_item(new, content, draft)
                break
            try:
                is_same = self.comparer.same(holder[0], first)
            except (LooksChanged, FileNotFoundError):
                raise Changed(trees.path_in(tree, name)) from None
            if is_same and self.can_join(content, holder):
                self.join(content, holder, new, draft)
                break
        if len(os.fsencode(new)) > 255:
            self.add_trouble(f'{trees.path_in(tree, name)} cannot be renamed to {new}: '
                             'the name is too long.')
        self.findings.renamed.append((trees.path_in(tree, name), trees.below_dest(new)))

    @staticmethod
    def can_join(content, holder):
        """Whether content and holder can be one item: a cursor cannot be in two folders at once."""
        versions = content.versions()
        return versions[0][2] != FOLDER_KIND or {tree for tree, _, _ in holder}.isdisjoint(
            tree for tree, _, _ in versions)

    def join(self, content, holder, new, draft):
        """Add the content to the holder, the versions that already have the name `new`."""
        plan, joined = draft.plan, holder + content.versions()
        if new in plan.extra:
            plan.extra[new] = joined
        elif new in plan.kept or draft.found[new] > ONLY_IN_DEST:
            plan.kept[new] = joined
        else:                               # no source had the name, so it has no look yet
            plan.extra[new] = joined
            self.findings.looks.append(look_of_uncopied(new, 0))
        if joined[0][2] == FOLDER_KIND:
            draft.below[new] = joined
        else:
            self.findings.duplicates += len(content.found)


# ---- Write: the second pass ----

class WritePass:
    """Makes in dest all items that the first pass found missing, if they have not changed since."""

    def __init__(self, trees, comparer, workers, maker, options, report, findings):
        self.trees, self.comparer, self.workers, self.maker = trees, comparer, workers, maker
        self.options, self.report, self.findings = options, report, findings
        self.looks = iter(findings.looks)

    def run(self):
        self.report.begin('copying', self.findings.bytes)
        try:
            with self.trees.failing(Stopped):
                self.write_all()
        except BaseException:
            self.workers.stop()
            self.maker.clean_up()
            raise

    def write_all(self):
        """Make the missing folders, and the missing files of all folders."""
        place, maker = self.trees.place, self.maker
        root = self.trees.root(place.exists)
        if not place.exists:
            maker.begin_dest(root)
        for event, folder in self.trees.walk(root):
            if event is GOING_IN and not folder.is_in_dest():
                maker.begin_folder(folder)
            elif event is IN:
                self.write_folder(folder)
            elif event is OUT and folder.made:
                maker.finish_folder(folder)
            elif event is GONE_OUT:
                maker.show_folder(folder)
        if next(self.looks, None) is not None:      # an item has vanished from the sources
            raise Changed(place.path)
        if not place.exists:
            try:
                maker.show_folder(root)
            except FileExistsError:
                raise Stopped(f'{printable(place.path)} appeared meanwhile. '
                              'The same command adds to it.') from None

    def write_folder(self, folder):
        """Make the missing files of the folder that the cursors are in."""
        listing = self.trees.list_folder()
        self.maker.prepare(name for tree, name in listing.leftovers if tree == 0)
        for copies in batches(self.copies(folder, listing.found)):
            self.copy_files(copies)

    def copies(self, folder, found):
        """Yield a Copy for each missing file; make missing symlinks and hard links at once.

        Also choose the folders to enter.
        """
        for name, versions in self.trees.items(found, self.findings.plans.get(folder.number)):
            tree, its_name, kind = versions[0]
            look = next(self.looks, None)
            is_kept = kind == FOLDER_KIND or not tree
            if look is None or is_kept and look != look_of_uncopied(name, tree):
                raise Changed(self.trees.path_in(tree, its_name))
            if kind == FOLDER_KIND:
                folder.below.append(Folder(name, members_of(versions)))
            elif not tree:
                continue                            # dest has it
            elif kind == OTHER_KIND:
                self.make_symlink(versions[0], name, look)
            elif not (self.options.makes_links and self.make_link(versions[0], name, look)):
                yield Copy(tree, its_name, look, name)

    def make_symlink(self, version, name, look):
        tree, its_name, _ = version
        status, target = self.comparer.read(version)
        if target is None or self.comparer.look_of(its_name, status, target) != look:
            raise Changed(self.trees.path_in(tree, its_name))
        self.maker.make_symlink(name, target, status)
        self.report.step(1, 0)

    def make_link(self, version, name, look):
        """Make a hard link; return False where that is not possible."""
        tree, its_name, _ = version
        folder = self.trees.cursors[tree].fd
        status = os.lstat(its_name, dir_fd=folder)
        if self.comparer.look_of(its_name, status, None) != look:
            raise Changed(self.trees.path_in(tree, its_name))
        is_made = self.maker.make_link(name, folder, its_name)
        if is_made:
            self.report.step(1, status.st_size)
        return is_made

    def copy_files(self, copies):
        direct = self.maker.begin_copies(copies)
        for part, (size, failure) in self.workers.copy_all(copies, direct):
            if failure:
                self.raise_failure(part[failure[0]], failure[1])
            self.report.step(len(part), size)
        self.maker.end_copies()

    def raise_failure(self, copy, error_number):
        path = self.trees.path_in(copy.tree, copy.name)
        if error_number is None:
            raise Changed(path)
        raise Stopped(f'{printable(path)} -> {printable(self.trees.path_in(0, copy.new))}: '
                      f'{os.strerror(error_number)}. {self.trees.place.advice()}')


# ---- Empty: the third pass, with --move ----

class EmptyPass:
    """Removes from the sources the files that dest has, each after one more comparison."""

    def __init__(self, trees, comparer, maker, report, findings):
        self.trees, self.comparer, self.maker = trees, comparer, maker
        self.report, self.findings = report, findings

    def run(self):
        self.report.begin('emptying')
        with self.trees.failing(Stopped):
            self.maker.sync()
            for event, folder in self.trees.walk(self.trees.root(True)):
                if event is IN:
                    self.empty_folder(folder)
                elif event is GONE_OUT:
                    self.remove_folder(folder)

    def empty_folder(self, folder):
        """Remove the files from the sources' folders, and choose the folders to enter."""
        found = self.trees.list_folder().found
        for name, versions in self.trees.items(found, self.findings.plans.get(folder.number)):
            in_sources = [version for version in versions if version[0] > 0]
            kind = versions[0][2]
            if kind == FOLDER_KIND:
                folder.below.append(Folder(name, ((0, name), *members_of(in_sources))))
                continue
            for version in in_sources:
                self.remove_file(version, (0, name, version[2]))
            self.report.step(len(in_sources), 0)

    def remove_file(self, version, in_dest):
        tree, name, _ = version
        try:
            is_same = self.comparer.same(in_dest, version)
        except (LooksChanged, FileNotFoundError):
            is_same = False
        if not is_same:
            raise Changed(self.trees.path_in(tree, name))
        os.unlink(name, dir_fd=self.trees.cursors[tree].fd)

    def remove_folder(self, folder):
        """Remove the folder, which the cursors have left, from each source where it is empty."""
        for tree, name in folder.members:
            cursor = self.trees.cursors[tree]
            if tree and not cursor.at_prefix():
                with contextlib.suppress(OSError):      # skipped files are in it
                    os.rmdir(name, dir_fd=cursor.fd)


# ---- Names: of temporaries, streams and sources; patterns ----

BOOKKEEPING = '.ssh_scheduler'          # a folder of execute_batch, in job_results
WRITTEN = ('.csv', '.html', '.json', '.md', '.tex')     # tables and pages of results_table
TEMPORARY = re.compile(r'\.combine_folders\.[0-9a-f]{16}\.tmp')


def temporary_name(name):
    """Return the temporary name for `name`: always the same, so that the next run finds it."""
    import hashlib
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    return f'.combine_folders.{digest}.tmp'


def left_out(sources):
    """Return {source: kind} of the sources that match job_results/* but are no results to combine.

    To skip no file of the user, look at more than the name: the other stream or .ssh_scheduler
    must lie beside the source.
    """
    named, found = {os.path.normpath(source) for source in sources}, {}
    for source in sources:
        path = os.path.normpath(source)
        stem, end = os.path.splitext(path)
        other = {'.out': '.err', '.err': '.out'}.get(end)
        is_beside = os.path.isdir(os.path.join(os.path.dirname(path), BOOKKEEPING))
        if other and os.path.isfile(path) and (is_beside or os.path.isfile(stem + other)):
            found[source] = 'stream file'
        elif is_beside and re.sub('~[0-9]+$', '', path) in named - {path}:
            found[source] = 'earlier result'
        elif is_beside and end == '.partial' and os.path.isdir(path):
            found[source] = 'partial result'
        elif is_beside and end in WRITTEN and os.path.isfile(path):
            found[source] = 'results_table file'
    return found


def results_above(path):
    """Return the folder of results that a path is or lies in, with a journal, or ''."""
    folder = os.path.realpath(path)
    while folder != os.path.dirname(folder):
        if any(os.path.exists(os.path.join(folder, BOOKKEEPING, name))
               for name in ('journal', 'commands')):
            return folder
        folder = os.path.dirname(folder)
    return ''


def refusal_of(dest, sources):
    """Return why dest must not be changed, since it has results of execute_batch, or ''.

    Users swap the words, or forget dest before job_results/*.
    """
    folder = results_above(dest)
    if not folder:
        return ''
    import shlex
    where = 'is a folder' if os.path.realpath(dest) == folder else 'lies in a folder'
    # Are the words swapped, or is the destination missing?
    words = shlex.join([sources[0], dest]) if (
        where == 'is a folder' and not results_above(sources[0])) else (
            f'all_results {shlex.quote(os.path.relpath(folder))}/*')
    return (f'{printable(dest)} {where} of results of execute_batch, to which combine_folders '
            f'adds nothing. Name the destination first: combine_folders {printable(words)}')


def sent_with_batches(dest):
    """Return a sentence if the next batch of the current folder sends dest with its files; '' else.

    A batch was run here if job_results has a journal.  Of a .rsync-filter file look only for rules
    that name dest.
    """
    path = os.path.relpath(os.path.realpath(dest), os.path.realpath('.'))
    if path.split('/')[0] in ('.', '..', '.git') or not results_above('job_results'):
        return ''
    rules = ()
    with contextlib.suppress(OSError), open('.rsync-filter', 'rb') as file:
        rules = os.fsdecode(file.read()).split('\n')
    if any(f'{word} {start}{path}{end}' in rules for word in ('-', 'exclude')
           for start in ('', '/') for end in ('', '/')):
        return ''
    import shlex
    return (f'the next batch of this folder sends {printable(path)}, too, unless you give '
            f'execute_batch --exclude={printable(shlex.quote("/" + path))} or combine outside this '
            'folder')


def case_key(name):
    """Return the same key for names that a case-insensitive file system may take for one."""
    if name.isascii():
        return name.lower()
    import unicodedata
    return unicodedata.normalize('NFD', unicodedata.normalize('NFD', name).casefold())


def source_names(paths):
    """Return a short name for each source: its last component, or more if that is ambiguous."""
    parts = [[part for part in os.path.abspath(path).split('/') if part] or ['root']
             for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ['_'.join(components[-depth:]) for components in parts]
        if len(set(names)) == len(names):
            break
    return names


def exclusion(patterns):
    """Return excluded(path below the source, is_folder), or None if the user gave no patterns.

    As in rsync: `*` and `?` stop at a slash and `**` does not; a pattern with a leading slash
    starts at the top of the source, any other at any component; a trailing slash matches folders
    only.
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


# ---- Origins: the files with which the jobs of these results ran ----

def mixed_files(sources):
    """Return a sentence if the sources are results of jobs that had different files; '' else.

    If files were only added, the sentence names these.

    The journal beside the results has the digest of the files of each job, and files.json has the
    files of each digest.  The batch file is ignored, because users add lines to it.
    """
    by_digest, groups = {}, {}          # each: the files of some jobs -> the names of these jobs
    for folder, names in jobs_by_results(sources).items():
        for name, had in files_of_jobs(folder, names).items():
            by_digest.setdefault((folder, *had), []).append(name)
    for had, names in by_digest.items():        # read each list of files once: it may be long
        groups.setdefault(what_they_had(*had), []).extend(names)
    if len(groups) < 2:
        return ''
    added, count = only_added(groups)
    if added:
        added[3:] = [f'{len(added) - 3} more'] * (len(added) > 3)
        return f'{many(count, "job")} ran without {", ".join(added)}, which other jobs had'
    first, *others = (names[0] for names in groups.values())
    return (f'these results were made with {len(groups)} different sets of files, for example '
            f'{printable(first)} and {printable(others[0])}. What each had: execute_batch --what '
            f'{printable(first)}')


def only_added(groups):
    """Return (paths that some jobs did not have, how many jobs); ([], 0) if other files differ.

    Such a path is often a table or a log that somebody wrote beside the code.
    groups: {the files of some jobs, see what_they_had: the names of these jobs}
    """
    if frozenset() in groups or not all(isinstance(had, frozenset) for had in groups):
        return [], 0
    ordered = sorted(groups, key=len)
    if not all(few <= more for few, more in zip(ordered, ordered[1:])):
        return [], 0
    return (sorted(printable(path) for path, *_ in ordered[-1] - ordered[0]),
            sum(len(names) for had, names in groups.items() if had != ordered[-1]))


def jobs_by_results(sources):
    """Return {folder of results: names of jobs} of the sources that lie in such a folder."""
    found = {}
    for source in sources:
        folder, name = os.path.split(os.path.abspath(source))
        if os.path.isdir(os.path.join(folder, '.ssh_scheduler')):
            found.setdefault(folder, set()).add(name)
    return found


def files_of_jobs(folder, names):
    """Return {name of a job: (digest of its files, name of its batch)} from the journals."""
    inner, known = os.path.join(folder, '.ssh_scheduler'), {}
    for path in (inner, *(os.path.join(inner, 'commands', name) for name in names)):
        for event in events_in(os.path.join(path, 'journal')):
            job = event.get('job')
            if event.get('event') == 'claimed':
                known[job] = event.get('files'), event.get('batch')
            elif event.get('event') == 'renamed' and job in known:
                known[event.get('to')] = known[job]
    return {name: known[name] for name in sorted(names & known.keys())
            if isinstance(known[name][0], str)}


def events_in(path):
    """Yield the events of a journal; skip what cannot be read."""
    import json
    with contextlib.suppress(OSError), open(path, 'rb') as journal:
        for line in journal:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                yield event if isinstance(event, dict) else {}


def what_they_had(folder, digest, batch):
    """Return a value that is equal for equal sets of sent files; ignore the batch file.

    It is a frozenset of tuples that begin with the path, or the digest if its files are unknown.
    """
    import json
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        with open(os.path.join(folder, '.ssh_scheduler', 'sent', digest, 'files.json'),
                  encoding='utf-8') as file:
            files = json.load(file)
        return frozenset(
            (path, mode, size, content or changed)
            for path, (mode, size, changed, content) in files.items()
            if re.sub(r'[^A-Za-z0-9._+=@%-]', '_', path).lstrip('.-')[-150:] != batch)
    return digest


# ---- System: what Python's os does not offer ----

FICLONE = 0x40049409        # ioctl: share the blocks of another file
RENAME_NOREPLACE = 1
NOT_OFFERED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM,
               errno.ENOTTY, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.EBADF}


@functools.lru_cache(maxsize=None)
def c_library():
    """Return the C library, for renameat2 and syncfs: Python's os has neither."""
    import ctypes
    return ctypes.CDLL(None, use_errno=True)


def rename_new(folder, old, new):
    """Rename within an open folder; raise FileExistsError if `new` exists.

    So the program replaces nothing that somebody else made meanwhile.
    """
    import ctypes
    function = getattr(c_library(), 'renameat2', None)
    if function:
        if not function(folder, os.fsencode(old), folder, os.fsencode(new), RENAME_NOREPLACE):
            return
        if ctypes.get_errno() not in NOT_OFFERED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), new)
    # NFS has no such rename, but a link never replaces a file; vfat has the rename and no links.
    # Folders cannot be linked; renaming one replaces at most an empty folder.
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
    """Wait until everything that was written to the file system is on disk.

    One syncfs replaces an fsync for each file, because each fsync would cost a journal commit.
    Since Linux 5.8 syncfs reports every failed write since the descriptor was opened.
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


def permitted(name, mode, folder):
    """Whether the system permits the access `mode` (os.R_OK ...) to a name in an open folder."""
    return os.access(name, mode, dir_fd=folder, effective_ids=True)


def identity(descriptor):
    """Return a value that is equal for two descriptors only if they are of the same folder."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def lock(descriptor, path, say):
    """Lock the folder until this process ends; wait for another combine_folders that holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f'waiting: another combine_folders works in {printable(path)}')
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass                        # NFS cannot lock folders: the run goes without a lock


def same_case_is_same_name(folder):
    """Try whether names that differ only in case are one name in the open folder.

    Looking up an existing name in another case would not work in an empty folder.  Restore the
    folder's time.
    """
    before = os.fstat(folder)
    name = temporary_name('case')
    try:
        with contextlib.suppress(FileExistsError):      # a killed run left it
            os.mkdir(name, dir_fd=folder)
        try:
            return exists(folder, name.upper())
        finally:
            os.rmdir(name, dir_fd=folder)
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    except OSError:
        return False                # the folder is not writable, which is reported later


# ---- Cursor: where the program is in one tree ----

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Cursor:
    """A place in dest or in a source: owns one descriptor, which goes down and up by single names.

    path: the top, as the user wrote it.  prefix: the name of the source's folder in dest, or None.
    With a prefix the cursor begins one level above the source's top.
    """

    def __init__(self, path, descriptor, prefix=None):
        self.path, self.fd, self.prefix = path, descriptor, prefix
        self._above = []            # identity of each folder on the way up; None: the prefix

    def at_prefix(self):
        return self.prefix is not None and not self._above

    def entries(self):
        """Yield (name, kind) of everything in the folder."""
        if self.at_prefix():
            yield self.prefix, FOLDER_KIND
            return
        with os.scandir(self.fd) as found:
            for entry in found:
                yield entry.name, (FILE_KIND if entry.is_file(follow_symlinks=False) else
                                   FOLDER_KIND if entry.is_dir(follow_symlinks=False) else
                                   OTHER_KIND)

    def can_enter(self, name):
        return self.at_prefix() or permitted(name, os.R_OK | os.X_OK, self.fd)

    def can_change(self):
        """Whether names can be added to the folder and removed from it."""
        return self.at_prefix() or permitted('.', os.W_OK | os.X_OK, self.fd)

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


def identities_upward(folder):
    """Yield the identity of an open folder, and of each above it."""
    here = None
    descriptor = os.dup(folder)
    try:
        while here != identity(descriptor):         # the root is above itself
            here = identity(descriptor)
            yield here
            above = os.open('..', FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = above
    except PermissionError:
        pass                                        # the folders above cannot be known
    finally:
        os.close(descriptor)


def discard(folder, name):
    """Remove a temporary: a file, or a folder with its contents."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        cursor = Cursor('', os.dup(folder))
        try:
            discard_folder(cursor, name)
        finally:
            cursor.close()


def discard_folder(cursor, name):
    """Remove a folder, which lies in the cursor's folder, with its contents."""
    pending = [[name]]          # names of folders at each level; the cursor is in the last one
    while pending:
        if pending[-1]:
            os.chmod(pending[-1][-1], 0o700, dir_fd=cursor.fd)
            cursor.enter(pending[-1][-1])
            entries = list(cursor.entries())
            for entry, kind in entries:
                if kind != FOLDER_KIND:
                    os.unlink(entry, dir_fd=cursor.fd)
            pending.append([entry for entry, kind in entries if kind == FOLDER_KIND])
        else:
            pending.pop()
            if pending:
                cursor.leave()
                os.rmdir(pending[-1].pop(), dir_fd=cursor.fd)


# ---- Trees: dest and the sources, which are walked together ----

class Trees:
    """Dest and the sources: owns the Cursors and the walk, and lists the items of a folder.

    cursors: the first one, dest's, is None while dest does not exist.
    """

    def __init__(self, place, sources, options):
        self.place = place
        self.cursors = [place.cursor, *sources]
        self.short_names = ['dest', *source_names([source.path for source in sources])]
        if options.prefix:
            for source, name in zip(sources, self.short_names[1:]):
                source.prefix = name
        self._excluded = exclusion(options.exclude)
        self._base = identity(place.base)
        self._sources = {identity(source.fd): source.path for source in sources}
        self._kinds = {}                    # bits of a name -> ((tree, kind), ...)
        self._tells_case = None             # whether dest tells case; None: not tried yet
        self._way = [self.root(False)]      # the Folders from the top to where the cursors are

    # -- The walk --

    def root(self, with_dest):
        """Return the Folder that is dest, where a walk begins."""
        return Folder('', tuple((tree, '') for tree in range(0 if with_dest else 1,
                                                             len(self.cursors))))

    def walk(self, root):
        """Move the cursors through all folders together, depth first; yield (event, Folder)."""
        way = self._way = [root]
        count = 1
        yield IN, root
        while True:
            here = way[-1]
            if here.below:
                below = here.below.pop()
                below.number = count
                count += 1
                yield GOING_IN, below       # the write pass adds dest to its members
                for tree, name in below.members:
                    self.cursors[tree].enter(name)
                way.append(below)
                yield IN, below
                below.below.reverse()
                continue
            yield OUT, here
            if here is root:
                return
            for tree, _ in here.members:
                self.cursors[tree].leave()
            way.pop()
            yield GONE_OUT, here

    def descriptors(self):
        """Return {tree: descriptor} of the folder that the cursors are in."""
        return {tree: self.cursors[tree].fd for tree, _ in self._way[-1].members}

    def refuse_loops(self):
        """Refuse dest in a source, a source in dest, or a folder in both, as by a bind mount."""
        here = {tree: identity(self.cursors[tree].fd) for tree, _ in self._way[-1].members}
        for tree, folder in here.items():
            if tree and folder == self._base:
                raise Refused(f'{printable(self.place.path)} lies inside the source '
                              f'{printable(self.cursors[tree].path)}.')
            if not tree and folder in self._sources:
                raise Refused(f'the source {printable(self._sources[folder])} lies inside '
                              f'{printable(self.place.path)}.')
            if tree and folder == here.get(0):
                raise Refused(f'{printable(self.path_in(tree))} and '
                              f'{printable(self.path_in(0))} are one folder.')

    # -- Paths, for sentences only --

    def path_of(self, tree):
        """Return the path of dest or a source as the user wrote it."""
        return self.cursors[tree].path if tree else self.place.path

    def path_in(self, tree, *name):
        """Return the folder's path in a tree, or that of a name in it, as a user would write it."""
        return '/'.join([self.path_of(tree).rstrip('/'), *self._names(tree), *name]) or '/'

    def below_dest(self, name):
        """Return the path below dest of a name in the folder."""
        return '/'.join([*self._names(0), name])

    def _names(self, tree):
        """Return the names that lead from the top of a tree to the folder."""
        if tree == 0:
            return [folder.name for folder in self._way[1:]]
        top = 1 if self.cursors[tree].prefix is None else 2
        return [dict(folder.members)[tree] for folder in self._way[top:]]

    @contextlib.contextmanager
    def failing(self, kind):
        """Turn an OSError into an error of this kind, a sentence with the path."""
        try:
            yield
        except OSError as error:
            name = error.filename if isinstance(error.filename, str) else ''
            is_shown = name and not TEMPORARY.fullmatch(name)
            path = self.path_in(0, name) if is_shown else self.path_in(0)
            advice = f' {self.place.advice()}' if kind is Stopped else ''
            raise kind(f'{printable(path)}: {reason_of(error)}.{advice}') from None

    # -- The items of a folder --

    def list_folder(self):
        """Return the Listing of the folder that the cursors are in, without skipped files."""
        folder, listing = self._way[-1], Listing()
        for tree, _ in folder.members:
            if tree or not folder.made:         # nothing is in a new folder
                self._list_tree(tree, listing)
        return listing

    def _list_tree(self, tree, listing):
        cursor, found, top = self.cursors[tree], listing.found, None
        in_source = tree > 0 and not cursor.at_prefix()
        if in_source and self._excluded:
            top = ''.join(name + '/' for name in self._names(tree))
        for name, kind in cursor.entries():
            if name.startswith('.combine_folders.') and TEMPORARY.fullmatch(name):
                listing.leftovers.append((tree, name))
            elif name == BOOKKEEPING and kind == FOLDER_KIND and in_source:
                listing.bookkeeping += 1
            elif top is None or not self._excluded(top + name, kind == FOLDER_KIND):
                found[name] = found.get(name, 0) | kind << 2 * tree

    def versions(self, found, name):
        """Return the versions of a name that was found, dest's first."""
        bits = found[name]
        kinds = self._kinds.get(bits)
        if kinds is None:
            kinds = self._kinds[bits] = tuple((tree, bits >> 2 * tree & 3)
                                              for tree in range(len(self.cursors))
                                              if bits >> 2 * tree & 3)
        return tuple([(tree, name, kind) for tree, kind in kinds])

    def items(self, found, plan):
        """Yield (name in dest, versions) of each item of the sources, always in the same order."""
        for name in sorted(found):
            if plan and name in plan.kept:
                if plan.kept[name]:
                    yield name, plan.kept[name]
            elif found[name] > ONLY_IN_DEST:
                yield name, self.versions(found, name)
        if plan:
            yield from plan.extra.items()

    def name_groups(self, found):
        """Yield the names in groups; the names of a group are one name in dest."""
        names = sorted(found)
        # Try dest only if two names differ in nothing but case.
        if len({case_key(name) for name in names}) == len(names) or self._dest_tells_case():
            for name in names:
                yield (name,)
            return
        alike = {}
        for name in names:
            alike.setdefault(case_key(name), []).append(name)
        for group in alike.values():        # the first tree's name comes first
            group.sort(key=lambda name: self.versions(found, name)[0][0])
        yield from sorted(alike.values())

    def _dest_tells_case(self):
        """Whether dest can have names that differ only in case."""
        if self._tells_case is None:
            self._tells_case = not same_case_is_same_name(self.place.base)
        return self._tells_case


# ---- Comparing: whether versions have one content ----

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
SMALL = 256 * 1024          # bytes to read at a time; a file of at most this size is small


def unchanged(before, after):
    return (before.st_mtime_ns == after.st_mtime_ns and before.st_size == after.st_size
            and before.st_ctime_ns == after.st_ctime_ns)


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


def glance(members, folders, with_ctime):
    """Return (size, look) if the members are equal small files, or one file of any size.

    Return None if the caller has to look closer.
    """
    (tree, name), *others = members
    try:
        if others:
            status, content = read_small(name, folders[tree])
            for other_tree, other_name in others:
                if content is None or content != read_small(other_name, folders[other_tree])[1]:
                    return None
        else:
            status = os.lstat(name, dir_fd=folders[tree])
            is_mine = status.st_uid == os.geteuid() and status.st_mode & stat.S_IRUSR
            if not is_mine and not permitted(name, os.R_OK, folders[tree]):
                return None
    except (OSError, LooksChanged):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, look_of_file(name, status, with_ctime)


def glance_all(files, folders, with_ctime):
    """Return a list of glance's results; files: [members]; folders: {tree: open folder}."""
    return [glance(members, folders, with_ctime) for members in files]


class Comparer:
    """Reads versions in the cursors' folder, and tells whether their contents are equal."""

    def __init__(self, trees, with_ctime, report):
        self._trees, self._with_ctime, self._report = trees, with_ctime, report

    def read(self, version):
        """Return (status, data); data: a small file's bytes, a symlink's target, or None.

        Of a folder both are None: only its kind is compared.
        """
        tree, name, kind = version
        folder = self._trees.cursors[tree].fd
        if kind == FOLDER_KIND:
            return None, None
        if kind == OTHER_KIND:
            status = os.lstat(name, dir_fd=folder)
            is_link = stat.S_ISLNK(status.st_mode)
            return status, os.readlink(name, dir_fd=folder) if is_link else None
        return read_small(name, folder)

    def look_of(self, name, status, target):
        """Return the look of a file, or of a symlink with its target."""
        if stat.S_ISLNK(status.st_mode):
            return look_of_link(name, target)
        return look_of_file(name, status, self._with_ctime)

    def same(self, one, other):
        """Whether two versions have one content."""
        status, data = self.read(one)
        return self.has(Content(data, one, status), other, *self.read(other))

    def has(self, content, version, status, data):
        """Whether the version has the content; status and data: the results of read(version)."""
        first, first_status = content.found[0]
        if first[2] == FOLDER_KIND or version[2] == FOLDER_KIND:
            return first[2] == version[2]
        if stat.S_IFMT(first_status.st_mode) != stat.S_IFMT(status.st_mode):
            return False
        if not stat.S_ISREG(status.st_mode):
            return content.data == data
        if first_status.st_size != status.st_size:
            return False
        if first_status.st_ino == status.st_ino and first_status.st_dev == status.st_dev:
            return True
        if data is not None:
            return content.data == data
        return self._have_same_bytes((first, first_status), (version, status))

    def _have_same_bytes(self, *pair):
        """Whether two large files have the same bytes; pair: (version, earlier status) of each."""
        with contextlib.ExitStack() as opened:
            descriptors = []
            for (tree, name, _), _ in pair:
                descriptors.append(os.open(name, READ, dir_fd=self._trees.cursors[tree].fd))
                opened.callback(os.close, descriptors[-1])
            is_equal = self.equal_bytes(*descriptors)
            for (version, before), descriptor in zip(pair, descriptors):
                if not unchanged(before, os.fstat(descriptor)):
                    raise LooksChanged(version)
            return is_equal

    def equal_bytes(self, one, other):
        """Whether two open files have the same bytes."""
        buffers = memoryview(bytearray(SMALL)), memoryview(bytearray(SMALL))
        while True:
            counts = [os.readv(descriptor, [buffer])
                      for descriptor, buffer in zip((one, other), buffers)]
            if counts[0] != counts[1] or buffers[0][:counts[0]] != buffers[1][:counts[1]]:
                return False
            if not counts[0]:
                return True
            self._report.step(0, counts[0])


# ---- Copying: one file into an open folder ----

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
CHUNK = 8 * 1024 * 1024


class Copier:
    """Copies files between open folders; remembers which file systems cannot share blocks.

    alive(): whether the process that needs the copies still runs.  copied(count): called after
    each part of a large file, with its number of bytes.
    """

    def __init__(self, with_ctime, alive=lambda: True, copied=lambda count: None):
        self._no_clone = set()      # devices whose file systems cannot share blocks
        self._with_ctime = with_ctime
        self._alive, self._copied = alive, copied

    def copy_all(self, copies, folders, direct):
        """Make the copies; folders: {tree: open folder}, dest's is 0.  Return (bytes, failure).

        failure: None, or (number of the copy, errno); errno is None if the file has changed.
        direct: give the files their own names at once, because the folder has a temporary one.
        """
        total = number = 0
        try:
            for number, copy in enumerate(copies):      # noqa: B007
                if not self._alive():
                    raise SystemExit(1)
                total += self._copy(copy, folders[copy.tree], folders[0], direct)
        except LooksChanged:
            return total, (number, None)
        except OSError as error:
            return total, (number, error.errno)
        return total, None

    def _copy(self, copy, source_folder, folder, direct):
        """Make one file and return its size."""
        try:
            source = os.open(copy.name, READ, dir_fd=source_folder)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                raise LooksChanged from None
            raise
        try:
            status = os.fstat(source)
            if look_of_file(copy.name, status, self._with_ctime) != copy.look:
                raise LooksChanged
            made = copy.new if direct else temporary_name(copy.new)
            target = os.open(made, CREATE, 0o600, dir_fd=folder)
            try:
                whole = self._copy_content(source, target, status)
                if not whole or not unchanged(status, os.fstat(source)):
                    raise LooksChanged
                copy_attributes(target, status)
            finally:
                os.close(target)
        finally:
            os.close(source)
        if not direct:
            rename_new(folder, made, copy.new)
        return status.st_size

    def _copy_content(self, source, target, status):
        """Copy the content; return whether the source had as many bytes as its status says."""
        size = status.st_size
        if size and self._clone(source, target, status.st_dev):
            return os.fstat(target).st_size == size
        has_holes = status.st_blocks * 512 < size
        if size <= SMALL and not has_holes:
            content = os.read(source, size + 1)
            while content and (written := os.write(target, content)) < len(content):
                content, size = content[written:], size - written
            return len(content) == size
        if has_holes:
            os.ftruncate(target, size)
            for start, end in data_segments(source, size):
                os.lseek(source, start, os.SEEK_SET)
                os.lseek(target, start, os.SEEK_SET)
                if not self._copy_bytes(source, target, end - start):
                    return False
            return True
        return self._copy_bytes(source, target, size)

    def _clone(self, source, target, device):
        """Let the target share the source's blocks; return False where that is not possible."""
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
        """Copy `count` bytes at the files' positions; return whether the source had that many."""
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
            if not done:            # not offered, or the end of the file: read() tells which
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
    """Yield (start, end) of each part of a file that is not a hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:      # the rest is a hole
                return
            raise
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, end


def copy_attributes(target, status):
    """Give an open file or folder the mode, the times and, if permitted, the owner of another."""
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or status.st_gid != os.getegid():
        try:
            os.fchown(target, status.st_uid, status.st_gid)
        except OSError:
            mode &= ~(stat.S_ISUID | stat.S_ISGID)      # they would lend this user's rights
    os.fchmod(target, mode)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


# ---- Helper: a second process for every other file ----

HELP_FROM = 1000            # files; with fewer a helper would start too late to help
MOST_FOLDERS = 250          # descriptors that the kernel sends through a socket at a time


class Helper:
    """Owns a second process, which compares or copies files while this process does others.

    With a Helper the program makes 20,000 small files faster than rsync.  A file costs 20
    microseconds in Python, and less in system calls.  Threads made the program slower, because the
    interpreter lock changes hands around each call.  The second process is forked, so it holds the
    locks of this one: after a kill, the next run waits until both processes have exited.
    """

    def __init__(self, with_ctime):
        import marshal
        import signal
        import socket
        self._marshal, self._socket = marshal, socket
        self._channel, other_end = socket.socketpair()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid:
            other_end.close()
            return
        try:                        # only the second process runs this, and exits below
            signal.signal(signal.SIGINT, signal.SIG_IGN)    # the parent kills this process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._channel.close()
            self._channel = other_end
            self._serve(Copier(with_ctime, alive=lambda: os.getppid() == parent))
        finally:                    # also if the parent was killed
            os._exit(0)

    def _serve(self, copier):
        """Do the tasks of the parent one by one; the second process runs this."""
        while True:
            (trees, tasks, argument), descriptors = self._receive()
            folders = dict(zip(trees, descriptors))
            if isinstance(tasks[0][0], int):        # a Copy begins with a tree, members do not
                copies = [Copy(*task) for task in tasks]
                self._send(copier.copy_all(copies, folders, argument))
            else:
                self._send(glance_all(tasks, folders, argument))
            for descriptor in descriptors:
                os.close(descriptor)

    @staticmethod
    def can_help():
        """Whether there is a second processor, and no other thread, which a fork would lose."""
        threads = sys.modules.get('threading')
        return (hasattr(os, 'sched_getaffinity') and len(os.sched_getaffinity(0)) > 1
                and (threads is None or threads.active_count() == 1))

    def start(self, tasks, folders, argument):
        """Send the second process Copies for Copier.copy_all, or members for glance_all.

        folders: {tree: open folder}.  argument: the last argument of that function.
        """
        self._send((list(folders), [tuple(task) for task in tasks], argument),
                   list(folders.values()))

    def finish(self):
        """Wait for the second process; return the result of its function."""
        return self._receive()[0]

    def kill(self):
        """Kill the second process: it is idle, or an error has made its task useless."""
        if self._pid:
            self._channel.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def _send(self, message, descriptors=()):
        data = self._marshal.dumps(message)
        size = len(data).to_bytes(8, 'big')
        self._socket.send_fds(self._channel, [size], descriptors)
        self._channel.sendall(data)

    def _receive(self):
        size, descriptors, _, _ = self._socket.recv_fds(self._channel, 8, 252)
        if len(size) < 8:
            raise Stopped('the second process was killed. The same command completes it.')
        with self._channel.makefile('rb') as stream:
            data = stream.read(int.from_bytes(size, 'big'))
        return self._marshal.loads(data), descriptors


class Workers:
    """Divides files between this process and, after HELP_FROM files, a Helper, which it owns."""

    def __init__(self, trees, with_ctime, report):
        self._trees, self._with_ctime = trees, with_ctime
        self._copier = Copier(with_ctime, copied=lambda count: report.step(0, count))
        self._helper, self._count = None, 0

    def glance_all(self, files):
        """Return [(some of the files, [(size, look) or None of each])]."""
        return self._share(files, glance_all, self._with_ctime)

    def copy_all(self, copies, direct):
        """Return [(some of the copies, (bytes, failure))]."""
        return self._share(copies, self._copier.copy_all, direct)

    def _share(self, tasks, function, argument):
        """Return [(tasks, function(tasks, ...))]; with a Helper, one such pair for each half."""
        folders = self._trees.descriptors()
        self._count += len(tasks)
        if self._helper is None and self._count > HELP_FROM:
            self._helper = Helper.can_help() and Helper(self._with_ctime)
        if not self._helper or len(tasks) < 8 or len(folders) > MOST_FOLDERS:
            return [(tasks, function(tasks, folders, argument))]
        mine, others = tasks[::2], tasks[1::2]
        self._helper.start(others, folders, argument)
        return [(mine, function(mine, folders, argument)), (others, self._helper.finish())]

    def stop(self):
        if self._helper:
            self._helper.kill()


# ---- Making: things in dest, first under a temporary name ----

class Building:
    """A new Folder that is being filled.

    above: a descriptor of the folder that it lies in.  name: its temporary name.
    """
    __slots__ = ('folder', 'above', 'name')

    def __init__(self, folder, above, name):
        self.folder, self.above, self.name = folder, above, name


class Maker:
    """Makes files and folders in dest under temporary names and renames them; owns unfinished ones.

    A missing folder is made and renamed as a whole, so the files in it get their own names at once.
    O_TMPFILE with a link would leave nothing after a kill, but NFS does not have it.

    syncs: whether sync() will be called.
    """

    def __init__(self, trees, syncs, say):
        self._trees, self._syncs, self._say = trees, syncs, say
        self._building = None       # the outermost new folder that contains the cursors' folder
        self._at_work = []          # temporary names of files in the cursors' folder
        self._written = {}          # device -> a descriptor of a folder on it, to sync
        self._locks = []            # descriptors of the locked folder

    @property
    def _folder(self):
        """The descriptor of dest's folder that the cursors are in."""
        return self._trees.cursors[0].fd

    # -- Folders --

    def begin_dest(self, root):
        """Make the folder that will be dest under a temporary name, and lock it."""
        place = self._trees.place
        temporary = temporary_name(place.name)
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(temporary, dir_fd=place.base)
            descriptor = os.open(temporary, FOLDER | os.O_NOFOLLOW, dir_fd=place.base)
            lock(descriptor, place.path, self._say)
            if exists(place.base, temporary) and os.path.samestat(
                    os.lstat(temporary, dir_fd=place.base), os.fstat(descriptor)):
                break
            os.close(descriptor)            # another run renamed or removed it during the wait
        cursor = self._trees.cursors[0] = Cursor(place.path, descriptor)
        self._locks.append(os.dup(descriptor))      # the cursor closes its own when it moves
        self._building = Building(root, os.dup(place.base), temporary)
        for name, _ in list(cursor.entries()):
            discard(descriptor, name)       # a killed run left it
        root.made = True
        root.members = ((0, ''), *root.members)

    def begin_folder(self, folder):
        """Make a folder that dest does not have; the cursors are above it."""
        above, name = self._folder, folder.name
        if self._building is None:
            name = temporary_name(name)
            self._building = Building(folder, os.dup(above), name)
        os.mkdir(name, 0o700, dir_fd=above)
        folder.made = True
        folder.members = ((0, name), *folder.members)

    def finish_folder(self, folder):
        """Give a complete folder the attributes that it has in the first source."""
        source = self._trees.cursors[next(tree for tree, _ in folder.members if tree)]
        if not source.at_prefix():
            copy_attributes(self._folder, os.fstat(source.fd))

    def show_folder(self, folder):
        """Rename the folder to its own name, if it has a temporary one."""
        building = self._building
        if building and building.folder is folder:
            rename_new(building.above, building.name, folder.name or self._trees.place.name)
            self._building = None
            os.close(building.above)

    # -- Files --

    def prepare(self, leftovers):
        """Remove the temporaries of a killed run, before this run writes to the folder."""
        for name in leftovers:
            discard(self._folder, name)
        if self._syncs and (device := os.fstat(self._folder).st_dev) not in self._written:
            self._written[device] = os.dup(self._folder)

    def make_symlink(self, name, target, status):
        """Make a symlink with the owner and the times of the status."""
        folder, made = self._folder, name
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

    def make_link(self, name, source_folder, source_name):
        """Make a hard link; return False where that is not possible.

        A link needs no temporary name: it is complete at once, and replaces nothing.
        """
        try:
            os.link(source_name, name, src_dir_fd=source_folder,
                    dst_dir_fd=self._folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in NOT_OFFERED:
                return False
            raise
        return True

    def begin_copies(self, copies):
        """Return whether the files get their own names at once; else note the temporary names."""
        if not self._building:
            self._at_work += [temporary_name(copy.new) for copy in copies]
        return self._building is not None

    def end_copies(self):
        self._at_work.clear()

    # -- The end --

    def sync(self):
        """Wait until all new files are on disk.

        Only --move needs the sync: without --move the sources keep their files.
        """
        for descriptor in self._written.values():
            sync_file_system(descriptor)

    def clean_up(self):
        """Remove everything with a temporary name, after an error or an interrupt."""
        with contextlib.suppress(OSError):
            for name in self._at_work:
                discard(self._folder, name)
            if self._building:
                discard(self._building.above, self._building.name)

    def close(self):
        """Close the descriptors, which releases the lock."""
        cursor = self._trees.cursors[0]
        if cursor and not self._trees.place.exists:
            cursor.close()
        for descriptor in (*self._written.values(), *self._locks,
                           *([self._building.above] if self._building else [])):
            os.close(descriptor)


# ---- Report: hears of the progress ----

class Report:
    """Receives the events and prints nothing; Terminal, below, is a Report that prints."""

    def say(self, line):
        """Receive an event: its word, a colon, and the rest."""

    def begin(self, doing, total_bytes=0):
        """Receive the start of a pass over all files; total_bytes: their size, or 0 if unknown."""

    def step(self, files, size):
        """Receive progress: the pass has done `files` more files and `size` more bytes."""

    def end(self):
        """Receive the end of the last pass."""


# ---- Function: combine_folders, for main and for other programs ----

def combine_folders(dest, *sources, dry_run=False, link=False, move=False, on_conflict='error',
                    exclude=(), prefix=False, skip_special=False, report=None):
    """Combine the source folders into the folder dest, and return a Result.

    dest and sources are paths.  The keywords are the options of the command; exclude is a list of
    patterns; on_conflict is 'error' or 'rename'.  report is a Report, which receives the progress.
    Skip the files that execute_batch keeps for itself in job_results; see the usage text.

    All errors are CombineErrors whose text is for users.  ConflictsFound (whose `conflicts` lists
    all), Refused and UsageError mean that nothing was written.  After Stopped (Changed is one) or
    an interrupt, the same call completes the work.
    """
    if on_conflict not in ('error', 'rename'):
        raise UsageError(f'--on-conflict must be error or rename, not {on_conflict!r}.')
    if isinstance(exclude, (str, bytes)):
        raise UsageError('exclude must be a list of patterns.')
    if not sources:
        raise UsageError('<source> is missing.')
    sources = list(map(os.fsdecode, sources))
    others = left_out(sources)
    folders = [source for source in sources if source not in others]
    if not folders:
        raise Refused('no <source> is a folder of results: all are streams of jobs (.out, .err), '
                      'files of jobs that run (.partial), or tables and pages.')
    options = Options(dry_run, link, move, on_conflict, tuple(exclude), prefix, skip_special)
    report = report or Report()
    with contextlib.ExitStack() as opened:
        opened.callback(report.end)
        place, cursors = open_folders(os.fsdecode(dest), folders, move, opened)
        if place.exists and not dry_run:
            lock(place.base, place.path, report.say)
        trees = Trees(place, cursors, options)
        return run_passes(trees, options, report, collections.Counter(others.values()), opened)


def run_passes(trees, options, report, others, opened):
    """Run the three passes, and return the Result.

    others: {kind: number} of the skipped sources.  opened: an ExitStack, which closes the parts.
    """
    with_ctime = not options.makes_links
    comparer = Comparer(trees, with_ctime, report)
    maker = Maker(trees, options.move, report.say)
    opened.callback(maker.close)
    workers = Workers(trees, with_ctime, report)
    opened.callback(workers.stop)
    findings = ComparePass(trees, comparer, workers, options, report).run()
    parts = [many(count, noun) for noun, count in (
        *others.items(), (f'{BOOKKEEPING} folder', findings.bookkeeping)) if count]
    if parts:
        report.say(f'left out: {", ".join(parts)}')
    if findings.conflicts:
        raise ConflictsFound(tuple(findings.conflicts), findings.result())
    if not options.dry_run:
        WritePass(trees, comparer, workers, maker, options, report, findings).run()
        if options.move:
            EmptyPass(trees, comparer, maker, report, findings).run()
    return findings.result()


def open_folders(dest, sources, move, opened):
    """Return (Place, [Cursor]); raise Refused with all paths that cannot be combined.

    opened: an ExitStack, which closes them.
    """
    troubles, cursors, earlier = [*filter(None, [refusal_of(dest, sources)])], [], {}
    for path in sources:
        try:
            cursor = Cursor(path, os.open(path, FOLDER))
        except OSError as error:
            troubles.append(f'the source {printable(path)} {no_folder(error)}')
            continue
        opened.callback(cursor.close)
        first = earlier.setdefault(identity(cursor.fd), cursor)
        if first is not cursor:
            troubles.append(f'the source {printable(path)} is the same folder as '
                            f'{printable(first.path)}.')
        cursors.append(cursor)
    try:
        place = open_place(dest, opened)
    except OSError as error:
        raise Refused('\n'.join([*troubles, f'{printable(dest)} {no_folder(error)}'])) from None
    if not place.exists and not permitted('.', os.W_OK | os.X_OK, place.base):
        troubles.append(f'{printable(dest)} cannot be made: Permission denied.')
    for outer in identities_upward(place.base):
        if outer in earlier:
            troubles.append(f'{printable(dest)} lies inside the source '
                            f'{printable(earlier[outer].path)}.')
    for cursor in cursors:
        for outer in list(identities_upward(cursor.fd))[1:]:
            if place.exists and outer == identity(place.base):
                troubles.append(f'the source {printable(cursor.path)} lies inside '
                                f'{printable(dest)}.')
            elif move and outer in earlier:
                troubles.append(f'the source {printable(cursor.path)} lies inside the source '
                                f'{printable(earlier[outer].path)}, which --move would empty.')
    if troubles:
        raise Refused('\n'.join(troubles))
    return place, cursors


def open_place(dest, opened):
    """Return the Place of dest: the existing folder, or the one in which dest will be made."""
    path = dest.rstrip('/') or dest
    name = os.path.basename(path)
    try:
        cursor = Cursor(dest, os.open(path, FOLDER))
        opened.callback(cursor.close)
        base = os.open(path, FOLDER)
    except FileNotFoundError:
        if os.path.islink(path) or name in ('', '.', '..'):
            raise
        cursor, base = None, os.open(os.path.dirname(path) or '.', FOLDER)
    opened.callback(os.close, base)
    return Place(dest, cursor, base, name)


def no_folder(error):
    """Return the end of the sentence about a path that is not a usable folder."""
    return {errno.ENOENT: 'does not exist.', errno.ENOTDIR: 'is not a folder.'}.get(
        error.errno, f'cannot be used: {reason_of(error)}.')


# ---- Completion: this section is the same in all three modules, each of which works alone ----

# The name of a value in the usage text -> the kinds of words that complete it; `files`: any path.
VALUES = {'machine': 'machines files', 'job': 'jobs', 'name': 'jobs', 'path': 'files',
          'file': 'files', 'shell': 'bash zsh fish', 'action': 'show collect remove',
          'what': 'error rename'}

# Programs for sh that print the words of these names, one a line.  They have no ' and no \\, which
# the strings of one of the three shells would read.
WORD_LISTS = {
    'machines': r'''
sed -n "s/#.*//; s/^[[:blank:]]*[Hh][Oo][Ss][Tt][[:blank:]=]//p" ~/.ssh/config 2>/dev/null |
    tr -s " \t=\"" "\n\n\n\n" | grep "^[[:alnum:]_.][[:alnum:]_.@:-]*$"
ls ~/.local/var 2>/dev/null | sed -n "s/[.]yaml$//p"
echo localhost''',
    'jobs': r'''
cat job_results/.ssh_scheduler/journal job_results/.ssh_scheduler/*/*/journal 2>/dev/null |
    sed -n "s/^{\"event\": \"claimed\", \"job\": \"\([^\"]*\)\".*/\1/p" | sort -u'''}

# In all of these the option is the last one before the word, with its value if it takes one.
BASH_COMPLETION = r'''# Completion of COMMAND for bash, made by: COMMAND --completion bash
_COMMAND_words() {      # the words of these lists that begin with $1, one a line
    local found word=$1
    shift
    for found; do
        case $found in
LISTS
        files) compgen -f -- "$word" ;;
        *) echo "$found" ;;
        esac
    done | while IFS= read -r found; do
        [[ $found != "$word"* || ! $found ]] || printf '%s\n' "$found"
    done
}
_COMMAND() {
    local IFS=$' \t\n' option='' lists='' found
    local word=${COMP_WORDS[COMP_CWORD]} place=$((COMP_CWORD - 1))
    COMPREPLY=()
    [[ $word != = ]] || { word=''; place=$COMP_CWORD; }
    if [[ ${COMP_WORDS[place]} == = ]]; then        # --option=word is three words
        ((place -= 1))
        option=${COMP_WORDS[place]}
    else
        for ((; place > 0; place--)); do
            [[ ${COMP_WORDS[place]} != -* ]] || { option=${COMP_WORDS[place]}; break; }
        done
        case $option in
        ONE_VALUE) ((place == COMP_CWORD - 1)) || option='' ;;
        esac
    fi
    [[ $word != -* || " ${COMP_WORDS[*]:0:COMP_CWORD} " == *' -- '* ]] || option=-
    case $option in
    -) lists='OPTIONS' ;;
CASES
    *) lists=files ;;
    esac
    [[ $lists == *files* ]] || compopt +o default 2>/dev/null       # of bash 4
    while IFS= read -r found; do
        COMPREPLY+=("$found")
    done < <(
        # shellcheck disable=SC2086
        _COMMAND_words "$word" $lists)
}
complete -o default -o filenames -F _COMMAND COMMAND
'''

ZSH_COMPLETION = r'''#compdef COMMAND
# Completion of COMMAND for zsh, made by: COMMAND --completion zsh
_COMMAND() {
    local place option='' lists='' found
    local -a options names
    options=(
OPTIONS
    )
    if [[ $PREFIX == --*=* ]]; then
        option=${PREFIX%%=*}
        compset -P 1 '*='
    else
        for ((place = CURRENT - 1; place > 1; place--)); do
            [[ $words[place] != -* ]] || { option=${words[place]%%=*}; break }
        done
        case $option in
        ONE_VALUE) ((place == CURRENT - 1)) && [[ $words[place] != *=* ]] || option='' ;;
        esac
        if [[ $PREFIX == -* && -z ${(M)words[1,CURRENT-1]:#--} ]]; then
            _describe -o option options
            return
        fi
    fi
    case $option in
CASES
    *) lists=files ;;
    esac
    for found in ${=lists}; do
        case $found in
LISTS
        files) _files ;;
        *) compadd -- $found ;;
        esac
    done
}
if [[ $funcstack[1] == _COMMAND ]]; then _COMMAND "$@"; else compdef _COMMAND COMMAND; fi
'''

FISH_COMPLETION = r'''# Completion of COMMAND for fish, made by: COMMAND --completion fish
function __COMMAND_after
    set -l options (string match -- '-*' (commandline -opc) | string replace -r '=.*' '')
    contains -- "$options[-1]" $argv
end
LISTS
CASES
'''


def option_texts(usage):
    """Return [(option, name of its value or None, is it a list, what it does)] of a usage text."""
    return [(match[2], match[3], bool(match[4]), ' '.join((match[5] or '').split()))
            for match in re.finditer(r'(?m)^  (-\w )?(--[a-z-]+)(?:=<([^>]+)>)?(\.\.\.)?'
                                     r'(?:  +(.*(?:\n {20,}\S.*)*)|$)', usage)]


def completion(usage, shell):
    """Return the script by which bash, zsh or fish completes the command of a usage text."""
    command = usage.partition('Usage:')[2].split()[0]
    options = option_texts(usage)
    texts = {name: re.split(r'(?<=[a-z0-9)])[.;] |\.$| \[default:', text)[0]
             for name, *_, text in options}
    kinds = {}          # the lists for a value -> the options that have such a value
    for name, value, *_ in options:
        if value:
            kinds.setdefault(VALUES.get(value, ''), []).append(name)
    needed = {name: text for name, text in WORD_LISTS.items() if name in ' '.join(kinds).split()}
    if shell == 'fish':
        return filled(FISH_COMPLETION, {
            'LISTS': '\n'.join(f"function __COMMAND_{name}\n    sh -c '{text}'\nend"
                               for name, text in needed.items()),
            'CASES': '\n'.join(fish_lines(options, texts))}, command)
    prints = {'bash': "        {}) sh -c '{}' ;;",
              'zsh': "        {}) names=(${{(f)\"$(sh -c '{}')\"}}); compadd -a names ;;"}[shell]
    parts = {
        'ONE_VALUE': '|'.join(name for name, value, is_list, _ in options if value and not is_list),
        'CASES': '\n'.join(f"    {'|'.join(names)}) lists='{lists}' ;;"
                           for lists, names in kinds.items()),
        'LISTS': '\n'.join(prints.format(*pair) for pair in needed.items())}
    if shell == 'bash':
        return filled(BASH_COMPLETION, {**parts, 'OPTIONS': ' '.join(['-h', *texts])}, command)
    about = (f'{name}:{text}'.replace("'", "'\\''") for name, text in texts.items())
    return filled(ZSH_COMPLETION, {
        **parts, 'OPTIONS': '\n'.join(f"        '{one}'" for one in about)}, command)


def fish_lines(options, texts):
    """Yield the lines by which fish completes these options, as option_texts returns them."""
    for name, value, is_list, _ in options:
        lists = VALUES.get(value, '').split()
        words = ' '.join(f'(__COMMAND_{one})' if one in WORD_LISTS else one
                         for one in lists if one != 'files')
        takes = (' -r' if 'files' in lists else ' -x') if value else ''
        words = f" -a '{words}'" if words else ''
        about = texts[name].replace('\\', '\\\\').replace("'", "\\'")
        yield f"complete -c COMMAND -l {name[2:]}{takes}{words} -d '{about}'"
        if is_list and words:
            yield f"complete -c COMMAND -n '__COMMAND_after {name}'{words}"


def filled(script, parts, command):
    """Return the script with these parts in the places of their names, for the command."""
    pattern = '|'.join(parts)
    return re.sub(pattern, lambda match: parts[match[0]], script).replace('COMMAND', command)


def check_for_shell(shell):
    """Return why --completion cannot be for this shell, or ''."""
    return '' if shell in VALUES['shell'].split() else (
        f'--completion must be bash, zsh or fish, not {shell!r}.')


# ---- Options: from argv to the arguments of combine_folders ----

def option_kinds():
    """Return {option: 'flag' | 'value'} of the usage text."""
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
                if value.startswith('--') and value.partition('=')[0] in kinds:
                    raise UsageError(f'{name} needs a value, and {printable(value)} is an option. '
                                     f'If you mean it as the value: {name}={printable(value)}')
            if name == '--exclude':
                options.setdefault(name, []).append(value)
            elif name in options:
                raise UsageError(f'{name} is given twice.')
            else:
                options[name] = value
    return words, options


def nearest(word, known):
    """Return ' (did you mean X?)' with the known words that the user may have meant, or ''.

    The word may be the beginning of one, have typing errors, or have its parts in another order.
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

MOST_LINES = 20             # about conflicts; of more than these a summary is shown


def size_in_words(count):
    """Return '0 bytes', '1.5 kB', '2.0 GB'."""
    if count < 1000:
        return many(count, 'byte')
    for unit in ('kB', 'MB', 'GB', 'TB', 'PB'):
        count /= 1000
        if count < 999.95 or unit == 'PB':
            return f'{count:.1f} {unit}'


class Terminal(Report):
    """Prints each event as a line on stdout, and the bar on stderr if that is a terminal."""

    def __init__(self, quiet):
        self._out, self._err, self._quiet = sys.stdout, sys.stderr, quiet
        self._shows_bar = not quiet and self._err.isatty()
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
    except BrokenPipeError:             # as with `| head`: finish the work without printing
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show(text):
    """Print the text that the user requested: the usage, or a completion."""
    print(text, end='')


def lines_of(conflicts):
    """Yield the lines about all conflicts: a line for each version, or, if these would be many,
    a line for each path, below the sources that have it.
    """
    if sum(1 + len(conflict.versions) for conflict in conflicts) <= MOST_LINES:
        for conflict in conflicts:
            yield from conflict_lines(conflict)
        return
    groups = {}                     # sources -> the conflicts between them
    for conflict in conflicts:
        sources = tuple(version.source for version in conflict.versions)
        groups.setdefault(tuple(dict.fromkeys(sources)), []).append(conflict)
    for sources, members in groups.items():
        names = [*map(printable, sources[:3]), *[f'{len(sources) - 3:,} more'] * (len(sources) > 3)]
        yield f'{many(len(members), "conflict")} between {", ".join(names[:-1])} and {names[-1]}:'
        for conflict in members:
            contents = len({version.content for version in conflict.versions})
            yield f'  {printable(conflict.path)}  {many(contents, "different version")}'


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


# ---- Command: from argv to the exit status ----

class Terminated(BaseException):
    """SIGTERM or SIGHUP: like Ctrl-C, but the exit status shows which signal it was."""


def terminate(number, _frame):
    raise Terminated(128 + number)


def run(argv, terminal):
    """Run the command line; return the exit status."""
    words, options = read_options(argv)
    if '--completion' in options:
        shell = options['--completion']
        if check_for_shell(shell):
            raise UsageError(check_for_shell(shell))
        show(completion(USAGE, shell))
        return 0
    if len(words) < 2:
        raise UsageError(f'<{("dest", "source")[len(words)]}> is missing.')
    keywords = {name[2:].replace('-', '_'): value for name, value in options.items()}
    keywords.pop('quiet', None)
    dest, *sources = words
    others = left_out(sources)
    combined = [source for source in sources if source not in others]
    try:
        result = combine_folders(dest, *sources, report=terminal, **keywords)
    except ConflictsFound as found:
        for line in lines_of(found.conflicts):
            terminal.complain(line)
        terminal.say(summary('not combined', found.result, dest, len(found.conflicts),
                             len(combined)))
        raise
    except Refused as refused:
        hint = ' Each --exclude takes ONE pattern.'
        raise Refused(str(refused) + hint * ('--exclude' in options)) from None
    dry_run = '--dry-run' in options
    for source, path in result.renamed:
        terminal.say(f'{"would rename" if dry_run else "renamed"}: {printable(source)} -> '
                     f'{printable(path)}')
    terminal.say(summary('would combine' if dry_run else 'combined', result, dest,
                         result.conflicts, len(combined)))
    mixed = mixed_files(combined)
    if mixed:
        terminal.complain(f'note: {mixed}')
    sent = '' if dry_run or '--quiet' in options else sent_with_batches(dest)
    if sent:
        terminal.complain(f'note: {sent}')
    return 0


def main():
    """Run the command; return its exit status."""
    import resource
    import signal
    argv = sys.argv[1:]
    before_end = argv[:argv.index('--')] if '--' in argv else argv
    if '--help' in before_end or '-h' in before_end:
        show(USAGE)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, terminate)
    # Each source needs a descriptor.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    terminal = Terminal('--quiet' in before_end)
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
