"""combine_folders: against a model, and against kills, full disks, changes and hostile names."""
import contextlib
import errno
import fcntl
import gc
import io
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import combine_folders as module
from combine_folders import (
    Changed,
    CombineError,
    ConflictsFound,
    Refused,
    Result,
    Stopped,
    UsageError,
    combine_folders,
)

PROGRAM = Path(module.__file__).resolve()
ROOT = PROGRAM.parent
LITTLE = settings(deadline=None, derandomize=True, max_examples=150,
                  suppress_health_check=[HealthCheck.function_scoped_fixture])
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount file systems')
NOT_AS_ROOT = pytest.mark.skipif(os.geteuid() == 0 and not shutil.which('setpriv'),
                                 reason='root may read everything, and there is no setpriv')


# ---- Trees: {path: File, Link or Dir}, made and read back ----

def make(root, tree):
    """Make a tree below root: the content of a file, ('link', target), or None for a folder."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for path, what in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            (root / path).mkdir(exist_ok=True)
        elif isinstance(what, tuple):
            (root / path).symlink_to(what[1])
        else:
            (root / path).write_bytes(what if isinstance(what, bytes) else what.encode())
    return root


def read(root, stats=False):
    """Return the tree below root, as make() takes it; with stats also modes and times."""
    tree = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            what = (('link', os.readlink(path)) if stat.S_ISLNK(status.st_mode) else
                    None if stat.S_ISDIR(status.st_mode) else Path(path).read_bytes())
            tree[os.path.relpath(path, root)] = (
                (what, status.st_mode, status.st_mtime_ns) if stats else what)
    return tree


def temporaries(*roots):
    return [str(path) for root in roots for path in Path(root).rglob('.combine_folders.*')]


@pytest.fixture(autouse=True)
def back():
    """Return to the previous current folder, for the other tests."""
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new current folder; assert that no temporary file stays in it."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    yield Path('.')
    assert temporaries('.') == []


@pytest.fixture
def descriptors():
    """Assert that no descriptor is lost."""
    gc.collect()                # else files that earlier tests left could be closed meanwhile
    before = set(os.listdir('/proc/self/fd'))
    yield
    assert set(os.listdir('/proc/self/fd')) == before


def command(*words, **settings):
    """Run the file as a user does."""
    settings.setdefault('timeout', 60)
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True,
                          **settings)
    done.stderr = unsent(done.stderr)
    return done


def unsent(text):
    """Return a text without the note that the next batch sends dest, of which one test is."""
    return re.sub('(?m)^note: the next batch of this folder sends .*\n', '', text)


def call(*words):
    """Run main() in this process; return (stdout, stderr, status)."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ['combine_folders', *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = module.main()
    finally:
        sys.argv = argv
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
    return out.getvalue(), err.getvalue(), status


# ---- The model ----

NAMES = st.sampled_from(['a', 'b', 'B', 'c.txt', 'a.src2', 'a.src1', 'é\n', b'\xff'.decode(
    errors='surrogateescape')])
CONTENTS = st.sampled_from([b'', b'1', b'2', b'22', ('link', '1'), ('link', '2')])
TREES = st.recursive(CONTENTS, lambda below: st.dictionaries(NAMES, below, max_size=4),
                     max_leaves=6)
SOURCES = st.lists(st.dictionaries(NAMES, TREES, max_size=4), min_size=1, max_size=3)


def flat(tree, top=''):
    """{'a': {'b': b''}} -> {'a': None, 'a/b': b''}, as read() returns it."""
    found = {}
    for name, what in tree.items():
        found[top + name] = None if isinstance(what, dict) else what
        if isinstance(what, dict):
            found.update(flat(what, f'{top}{name}/'))
    return found


def model(trees):
    """Return (merged, conflicts): the first version stays; a conflict hides those below it."""
    merged, conflicts = {}, set()
    for tree in trees:
        for path, what in tree.items():
            if merged.setdefault(path, what) != what:
                conflicts.add(path)
    hidden = {path for path in conflicts
              if any(path.startswith(f'{above}/') for above in conflicts)}
    return merged, conflicts - hidden


@LITTLE
@given(sources=SOURCES, dest=st.none() | st.dictionaries(NAMES, TREES, max_size=3))
def test_random_trees_become_what_the_model_says(sources, dest):
    trees = [flat(tree) for tree in ([dest] if dest is not None else []) + sources]
    merged, conflicts = model(trees)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        paths = [make(top / f'src{number}', flat(tree)) for number, tree in enumerate(sources)]
        if dest is not None:
            make(top / 'dest', flat(dest))
        before = read(top, stats=True)
        files = sum(what is not None for tree in map(flat, sources) for what in tree.values())
        if conflicts:
            with pytest.raises(ConflictsFound) as caught:
                combine_folders(top / 'dest', *paths)
            assert {conflict.path for conflict in caught.value.conflicts} == conflicts
            assert read(top, stats=True) == before
            return
        planned = combine_folders(top / 'dest', *paths, dry_run=True)
        assert read(top, stats=True) == before
        result = combine_folders(top / 'dest', *paths)
        assert result == planned
        assert read(top / 'dest') == merged
        assert result.files + result.duplicates == files
        assert result.files == sum(what is not None for what in merged.values()) - (
            sum(what is not None for what in flat(dest).values()) if dest else 0)
        after = read(top, stats=True)
        assert {path: what for path, what in after.items() if path.split('/')[0] != 'dest'} == {
            path: what for path, what in before.items() if path.split('/')[0] != 'dest'}
        again = combine_folders(top / 'dest', *paths)
        assert again == Result(0, 0, files, 0)
        assert read(top, stats=True) == after


@LITTLE
@given(sources=SOURCES, dest=st.none() | st.dictionaries(NAMES, TREES, max_size=3),
       move=st.booleans())
def test_renaming_keeps_everything_of_everybody(sources, dest, move):
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        paths = [make(top / f'src{number}', flat(tree)) for number, tree in enumerate(sources)]
        if dest is not None:
            make(top / 'dest', flat(dest))
        files = [what for tree in map(flat, sources) for what in tree.values() if what is not None]
        result = combine_folders(top / 'dest', *paths, on_conflict='rename', move=move)
        assert result.files + result.duplicates == len(files)
        after = read(top / 'dest')
        for path, what in flat(dest or {}).items():
            assert after[path] == what              # dest's own files are unchanged
        assert {what for what in after.values() if what} >= {what for what in files if what}
        if move:
            assert [read(path) for path in paths] == [{}] * len(paths)
            return
        stats = read(top, stats=True)
        again = combine_folders(top / 'dest', *paths, on_conflict='rename')
        assert (again.files, again.duplicates) == (0, len(files))
        assert read(top, stats=True) == stats       # the same command again changes nothing


@LITTLE
@given(sources=SOURCES, existing=st.booleans())
def test_a_prefix_leaves_no_conflicts(sources, existing):
    with tempfile.TemporaryDirectory() as folder:
        paths = [make(f'{folder}/src{number}', flat(tree)) for number, tree in enumerate(sources)]
        if existing:
            os.mkdir(f'{folder}/dest')
        combine_folders(f'{folder}/dest', *paths, prefix=True, move=True)
        assert read(f'{folder}/dest') == {
            **{f'src{number}': None for number in range(len(sources))},
            **{f'src{number}/{path}': what for number, tree in enumerate(sources)
               for path, what in flat(tree).items()}}
        assert [read(path) for path in paths] == [{}] * len(sources)


@LITTLE
@given(sources=SOURCES)
def test_links_are_the_files_themselves(sources):
    with tempfile.TemporaryDirectory() as folder:
        trees = [flat(tree) for tree in sources]
        paths = [make(f'{folder}/src{number}', tree) for number, tree in enumerate(trees)]
        if model(trees)[1]:
            return
        combine_folders(f'{folder}/dest', *paths, link=True)
        for path, what in read(f'{folder}/dest').items():
            first = next(f'{source}/{path}' for source in paths
                         if os.path.lexists(f'{source}/{path}'))
            if isinstance(what, bytes):
                assert os.path.samefile(first, f'{folder}/dest/{path}')


# ---- Modes, times and contents that are kept ----

def test_the_first_of_identical_files_gives_mode_and_time(here, descriptors):
    for number, (mode, when) in enumerate([(0o751, 10**18 + 7), (0o600, 5)], 1):
        make(f'src{number}', {'f': 'same', 'empty': None, 'l': ('link', 'f')})
        os.chmod(f'src{number}/f', mode)
        os.chmod(f'src{number}/empty', mode)
        for name in ('f', 'empty', 'l', '.'):
            os.utime(f'src{number}/{name}', ns=(1, when), follow_symlinks=False)
    assert combine_folders('dest', 'src1', 'src2') == Result(2, 4 + 1, 2, 0)
    assert read('dest', stats=True) == read('src1', stats=True)
    assert os.stat('dest').st_mtime_ns == 10**18 + 7
    combine_folders('dest2', 'src2', 'src1')
    assert read('dest2', stats=True) == read('src2', stats=True)
    combine_folders('dest2', 'src1')
    assert read('dest2', stats=True) == read('src2', stats=True)


def test_a_folder_that_cannot_be_written_to_is_kept_so(here):
    make('src', {'d/e/f': 'x'})
    for name in ('d/e', 'd'):
        os.chmod(f'src/{name}', 0o555)
    combine_folders('dest', 'src')
    assert read('dest', stats=True) == read('src', stats=True)


def test_sparse_files_stay_sparse(here):
    make('src', {})
    with open('src/sparse', 'wb') as file:
        for place in (0, 3_000_000, 9_000_000):
            file.seek(place)
            file.write(b'data' * 1000)
        file.truncate(50_000_000)
    with open('src/hole', 'wb') as file:
        file.truncate(7_000_000)
    combine_folders('dest', 'src')
    for name in ('sparse', 'hole'):
        assert Path('dest', name).read_bytes() == Path('src', name).read_bytes()
        assert os.stat(f'dest/{name}').st_blocks <= os.stat(f'src/{name}').st_blocks + 16


def test_large_files_are_compared_and_copied(here, descriptors):
    content = os.urandom(3_000_000)
    make('src1', {'big': content, 'own': content[:-1]})
    make('src2', {'big': content})
    assert combine_folders('dest', 'src1', 'src2') == Result(2, 5_999_999, 1, 0)
    assert read('dest') == read('src1')
    make('src2', {'big': content[:-1] + bytes([content[-1] ^ 1])})
    os.utime('src2/big', ns=(1, os.stat('src1/big').st_mtime_ns))   # same time and size
    with pytest.raises(ConflictsFound):
        combine_folders('dest2', 'src1', 'src2')


@pytest.mark.parametrize('refuses', [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_the_kernel_copies_nothing_we_do(here, monkeypatch, refuses):
    def refuse(*_, **__):
        raise OSError(refuses, os.strerror(refuses))
    monkeypatch.setattr(os, 'copy_file_range', refuse)
    monkeypatch.setattr(os, 'link', refuse)
    monkeypatch.setattr(module, 'c_library', object)
    make('src', {'big': os.urandom(700_000), 'd/small': 'x', 'l': ('link', 'x')})
    make('dest', {})
    combine_folders('dest', 'src', link=True)
    assert read('dest', stats=True) == read('src', stats=True)


def test_a_file_system_that_shares_blocks_is_asked_to(here, monkeypatch):
    asked = []

    def ioctl(target, request, source):
        asked.append(request)
        os.write(target, os.pread(source, 10**6, 0))
    monkeypatch.setattr(fcntl, 'ioctl', ioctl)
    make('src', {'a': 'x' * 300_000, 'b': 'y', 'empty': ''})
    combine_folders('dest', 'src')
    assert read('dest', stats=True) == read('src', stats=True)
    assert asked == [0x40049409] * 2


def test_hard_links_need_no_reading(here, monkeypatch):
    make('src1', {'big': b'x' * 300_000})
    os.mkdir('src2')
    os.link('src1/big', 'src2/big')
    monkeypatch.setattr(module.Comparer, 'equal_bytes', None)
    assert combine_folders('dest', 'src1', 'src2').duplicates == 1


# ---- Conflicts ----

@pytest.mark.parametrize(('one', 'other'), [
    ({'x': 'a'}, {'x': 'b'}), ({'x': 'a'}, {'x': 'aa'}), ({'x': 'a'}, {'x/y': 'a'}),
    ({'x': 'a'}, {'x': ('link', 'a')}), ({'x': ('link', 'a')}, {'x': ('link', 'b')}),
    ({'x': None}, {'x': ('link', '.')}),
])
@pytest.mark.parametrize('dest_is_first', [False, True])
def test_a_path_with_two_contents_is_a_conflict(here, descriptors, one, other, dest_is_first):
    make('dest' if dest_is_first else 'src1', one)
    make('src2', {**other, 'more': 'm'})
    before = read('.', stats=True)
    with pytest.raises(ConflictsFound) as caught:
        combine_folders('dest', *([] if dest_is_first else ['src1']), 'src2')
    (conflict,) = caught.value.conflicts
    assert (conflict.path, len(conflict.versions)) == ('x', 2)
    assert [version.source for version in conflict.versions] == [
        'dest' if dest_is_first else 'src1', 'src2']
    assert caught.value.result.files == 1
    assert read('.', stats=True) == before


def test_all_conflicts_are_listed_with_sizes_and_times(here):
    make('src1', {'a': '1', 'd/b': '1', 'd/same': 's'})
    make('src2', {'a': '22', 'd/b': '1', 'd/same': 's', 'x\n\x1b[31m': ''})
    make('src3', {'a': '22', 'd/b': '3'})
    for number in (1, 2, 3):
        for name in ('a', 'd/b'):
            os.utime(f'src{number}/{name}', (0, 86400 * number))
    done = command('dest', 'src1', 'src2', 'src3', env={**os.environ, 'TZ': 'UTC'})
    assert done.returncode == 1
    assert done.stderr == """\
conflict: a
  src1  file, 1 byte, 1970-01-02 00:00:00, content 1
  src2  file, 2 bytes, 1970-01-03 00:00:00, content 2
  src3  file, 2 bytes, 1970-01-04 00:00:00, content 2
conflict: d/b
  src1  file, 1 byte, 1970-01-02 00:00:00, content 1
  src2  file, 1 byte, 1970-01-03 00:00:00, content 1
  src3  file, 1 byte, 1970-01-04 00:00:00, content 2
combine_folders: 2 conflicts; nothing was written. Try: --prefix, which puts each source into a \
folder of its own, or --on-conflict rename, which puts .SOURCE behind their names.
"""
    assert done.stdout == ('not combined: 2 files, 1 byte from 3 folders, 1 duplicate collapsed, '
                           '2 conflicts -> dest\n')
    assert not os.path.exists('dest')


def test_many_conflicts_are_a_line_each(here):
    names = [f'job_results/b.sh.{number}' for number in range(12)]
    for number, name in enumerate(names):
        make(name, {'metrics.json': str(number), 'log': str(number // 6), 'same': 's'})
    make(names[0], {'more': '1'})
    make(names[1], {'more': '2'})
    out, err, status = call('all', *names)
    assert (out.count('\n'), status) == (1, 1)
    assert err.splitlines() == [
        '2 conflicts between job_results/b.sh.0, job_results/b.sh.1, job_results/b.sh.2 and 9 '
        'more:', '  log  2 different versions', '  metrics.json  12 different versions',
        '1 conflict between job_results/b.sh.0 and job_results/b.sh.1:',
        '  more  2 different versions',
        'combine_folders: 3 conflicts; nothing was written. Try: --prefix, which puts each source '
        'into a folder of its own, or --on-conflict rename, which puts .SOURCE behind their names.']
    assert call('all', *names, '--prefix')[2] == 0
    assert Path('all/b.sh.7/metrics.json').read_text() == '7'


def test_each_renamed_file_shows_its_source_and_a_file_of_dest_keeps_its_name(here):
    for number in (1, 2, 3):
        make(f'src{number}', {'metrics.json': str(number), 'log': 'a' if number < 3 else 'b'})
    expected = {'metrics.json.src1': b'1', 'metrics.json.src2': b'2', 'metrics.json.src3': b'3',
                'log.src1': b'a', 'log.src3': b'b'}
    for _ in range(2):
        assert call('dest', 'src1', 'src2', 'src3', '--on-conflict=rename')[1:] == ('', 0)
        assert read('dest') == expected
    make('other', {'log': 'c'})
    call('other', 'src1', 'src3', '--on-conflict=rename')
    assert read('other') == {name: what for name, what in {
        **expected, 'log': b'c'}.items() if 'src2' not in name}


def test_a_name_whose_versions_get_other_names_is_not_given_again(here):
    make('src1', {'a': '1', 'a.src2': ''})
    make('src2', {'a': '', 'a.src2': '1'})
    for _ in range(2):
        assert call('dest', 'src1', 'src2', '--on-conflict=rename')[1:] == ('', 0)
        assert read('dest') == {'a.src1': b'1', 'a.src2.2': b'', 'a.src2.src1': b'',
                                'a.src2.src2': b'1'}


def test_renamed_files_have_the_name_of_their_source(here):
    make('run/1/out', {'log': 'one', 'd/x': '1', 'k': 'k'})
    make('run/2/out', {'log': 'two', 'd': 'a file', 'k': 'k'})
    out, err, status = call('dest', 'run/1/out', 'run/2/out', '--on-conflict', 'rename')
    assert (err, status) == ('', 0)
    assert read('dest') == {'log.1_out': b'one', 'log.2_out': b'two', 'd': None, 'd/x': b'1',
                            'd.2_out': b'a file', 'k': b'k'}
    assert out == ('renamed: run/2/out/d -> d.2_out\nrenamed: run/1/out/log -> log.1_out\n'
                   'renamed: run/2/out/log -> log.2_out\n'
                   'combined: 5 files, 14 bytes from 2 folders, 1 duplicate collapsed, '
                   '2 conflicts -> dest\n')


def test_a_renamed_file_that_would_have_too_long_a_name_is_refused(here):
    for number in (1, 2):
        make(f'src{number}', {'x' * 254: str(number)})
    with pytest.raises(Refused, match='the name is too long'):
        combine_folders('dest', 'src1', 'src2', on_conflict='rename')
    assert not os.path.exists('dest')


@pytest.fixture
def ignores_case(monkeypatch):
    """Let dest ignore case, according to the one function that asks about it."""
    monkeypatch.setattr(module, 'same_case_is_same_name', lambda folder: True)


def test_names_that_differ_only_in_case_are_conflicts_there(here, ignores_case):
    make('src1', {'Data': '1', 'É': 'e', 'd/same': ''})
    make('src2', {'data': '1', 'e\u0301': 'e', 'd/same': ''})
    with pytest.raises(ConflictsFound) as caught:
        combine_folders('dest', 'src1', 'src2')
    assert [[version.name for version in conflict.versions]
            for conflict in caught.value.conflicts] == [['Data', 'data'], ['É', 'e\u0301']]
    make('src1', {'A': '1', 'b': '1'})
    make('src2', {'B': '2', 'a': '2'})
    combine_folders('dest', 'src1', 'src2', on_conflict='rename')
    assert sorted(read('dest')) == sorted([
        'A.src1', 'Data.src1', 'a.src2', 'b.src1', 'B.src2', 'd', 'd/same', 'data.src2',
        'e\u0301.src2', 'É.src1'])


def test_elsewhere_they_are_not_and_asking_changes_nothing(here):
    make('src1', {'Data': '1'})
    make('src2', {'data': '2'})
    make('dest', {})
    os.utime('dest', ns=(5, 7))
    combine_folders('dest', 'src1', 'src2', dry_run=True)
    assert os.stat('dest').st_mtime_ns == 7
    combine_folders('dest', 'src1', 'src2')
    assert read('dest') == {'Data': b'1', 'data': b'2'}


@AS_ROOT
def test_a_real_file_system_that_ignores_case(tmp_path):
    """ext4 with casefold, where the kernel has it."""
    (tmp_path / 'mount').mkdir()
    image = tmp_path / 'image'
    with open(image, 'wb') as file:
        file.truncate(8 << 20)
    if not shutil.which('mkfs.ext4') or subprocess.run(
            ['mkfs.ext4', '-q', '-O', 'casefold', image], capture_output=True).returncode:
        pytest.skip('mkfs.ext4 makes no file system that ignores case')
    if subprocess.run(['mount', '-o', 'loop', image, tmp_path / 'mount'],
                      capture_output=True).returncode:
        pytest.skip('this kernel mounts no file system that ignores case')
    try:
        (tmp_path / 'mount/folder').mkdir()
        subprocess.run(['chattr', '+F', tmp_path / 'mount/folder'], check=True)
        make(tmp_path / 'src1', {'Data': '1'})
        make(tmp_path / 'src2', {'data': '1'})
        with pytest.raises(ConflictsFound):
            combine_folders(tmp_path / 'mount/folder/dest', tmp_path / 'src1', tmp_path / 'src2')
        assert os.listdir(tmp_path / 'mount/folder') == []
    finally:
        subprocess.run(['umount', tmp_path / 'mount'], check=True)


# ---- Special files and hostile names ----

@pytest.fixture
def special(here):
    make('src', {'d/file': 'x'})
    os.mkfifo('src/fifo')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind('src/d/socket')
        yield here


def test_special_files_are_named_and_refused(special):
    with pytest.raises(Refused) as caught:
        combine_folders('dest', 'src')
    assert str(caught.value).split('\n') == [
        'src/fifo is a fifo, which cannot be combined. Try: --skip-special',
        'src/d/socket is a socket, which cannot be combined. Try: --skip-special']
    assert not os.path.exists('dest')


def test_special_files_can_be_skipped(special):
    make('src2', {'fifo': 'a file'})
    result = combine_folders('dest', 'src', 'src2', skip_special=True, move=True)
    assert result == Result(2, 7, 0, 0, skipped=2)
    assert read('dest') == {'d': None, 'd/file': b'x', 'fifo': b'a file'}
    assert sorted(os.listdir('src')) == ['d', 'fifo'] and os.listdir('src2') == []


@AS_ROOT
def test_devices_are_special(here):
    make('src', {})
    try:
        os.mknod('src/null', 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip('no devices can be made here')
    with pytest.raises(Refused, match='src/null is a character device'):
        combine_folders('dest', 'src')


HOSTILE = [b'\n', b'\x1b[2J', b'\xff\xfe', b' ', b'-rf', b'*', b'\\', b"'", b'"', b'\x7f', b'a\rb',
           'é‮x'.encode(), b'.' * 3, b'x' * 255, '💥'.encode()]


def test_any_file_name_comes_through_and_is_shown_safely(here):
    names = [os.fsdecode(name) for name in HOSTILE]
    for number in (1, 2):
        make(f'src{number}', {name: name.encode(errors='surrogateescape') for name in names})
    combine_folders('dest', 'src1', 'src2')
    assert read('dest') == read('src1')
    make('src2', {name: b'other' for name in names})
    for encoding in ('utf-8', 'ascii'):
        done = subprocess.run([sys.executable, PROGRAM, 'new', 'src1', 'src2'],
                              capture_output=True, env={**os.environ, 'PYTHONIOENCODING': encoding})
        assert done.returncode == 1
        lines = done.stderr.decode(encoding).split('\n')
        assert len(lines) == len(names) + 3
        assert all(line.isprintable() for line in lines)


# ---- Large ----

def deep_enter(folder, names):
    """Open folders downward, one name at a time; return the descriptor of the last."""
    for name in names:
        below = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    return folder


def make_deep(root, names, file, content):
    os.mkdir(root)
    folder = os.open(root, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=folder)
        folder = deep_enter(folder, [name])
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, dir_fd=folder)
    os.write(descriptor, content)
    os.close(descriptor)
    os.close(folder)


@pytest.mark.parametrize('names', [['x' * 200] * 40, ['d'] * 3000], ids=['long', 'deep'])
def test_paths_longer_than_path_max_and_trees_deeper_than_recursion(tmp_path, names):
    assert sum(map(len, names)) + len(names) > os.pathconf('/', 'PC_PATH_MAX') or len(
        names) > sys.getrecursionlimit()
    roots = [str(tmp_path / name) for name in ('src1', 'src2', 'dest')]
    src1, src2, dest = roots
    try:
        make_deep(src1, names, 'f', b'1')
        make_deep(src2, names, 'f', b'2')
        with pytest.raises(ConflictsFound) as caught:
            combine_folders(dest, src1, src2)
        assert caught.value.conflicts[0].path == '/'.join([*names, 'f'])
        result = combine_folders(dest, src1, src2, on_conflict='rename')
        assert (result.files, result.conflicts) == (2, 1)
        folder = deep_enter(os.open(dest, os.O_RDONLY), names)
        assert sorted(os.listdir(folder)) == ['f.src1', 'f.src2']
        descriptor = os.open('g', os.O_WRONLY | os.O_CREAT, dir_fd=folder)
        os.close(descriptor)
        os.close(folder)
        assert combine_folders(src1, dest, move=True).files == 3
        assert os.listdir(dest) == []
    finally:
        folder = os.open(tmp_path, os.O_RDONLY)
        for name in ('src1', 'src2', 'dest'):       # pytest itself could not remove these
            module.discard(folder, name)
        os.close(folder)


def test_few_descriptors_are_enough(here):
    for number in range(20):
        make_deep(f'src{number}', ['d'] * 50, f'f{number}', b'x')
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir('/proc/self/fd'))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20 + 10, hard))
    try:
        result = combine_folders('dest', *(f'src{number}' for number in range(20)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result.files == 20


# ---- The helper ----

@pytest.fixture
def helped(monkeypatch):
    """Let helpers start from the first file on; return the list of those that were started."""
    if not module.Helper.can_help():
        monkeypatch.setattr(module.Helper, 'can_help', staticmethod(lambda: True))
    monkeypatch.setattr(module, 'HELP_FROM', 0)
    monkeypatch.setattr(module, 'BATCH', 20)
    started = []
    begin = module.Helper.__init__
    monkeypatch.setattr(module.Helper, '__init__',
                        lambda *args: (started.append(args), begin(*args))[1])
    return started


def test_a_helper_does_every_other_file(here, helped, descriptors):
    for number in (1, 2):
        make(f'src{number}', {f'd/{name}': str(name) * name for name in range(100)})
    make('dest', {'d/5': '5' * 5})
    assert combine_folders('dest', 'src1', 'src2') == Result(
        99, sum(len(str(name)) * name for name in range(100)) - 5, 101, 0)
    assert read('dest') == read('src1')
    make('src2', {'d/50': 'other', 'd/51': 'other'})
    with pytest.raises(ConflictsFound) as caught:
        combine_folders('dest', 'src1', 'src2')
    assert [conflict.path for conflict in caught.value.conflicts] == ['d/50', 'd/51']
    assert len(helped) == 2
    for helper, *_ in helped:
        with pytest.raises(ChildProcessError):      # the helper ended, and was waited for
            os.waitpid(helper._pid, os.WNOHANG)


def test_what_fails_in_the_helper_is_said_by_us(here, helped, monkeypatch):
    make('src', {str(number): 'x' for number in range(10)})
    make('dest', {})
    begin = module.WritePass.copy_files

    def change_one(self, copies):
        Path('src', copies[1].name).write_text('changed')
        begin(self, copies)
    monkeypatch.setattr(module.WritePass, 'copy_files', change_one)
    with pytest.raises(Changed, match=r'src/1, or something'):
        combine_folders('dest', 'src')
    assert temporaries('dest') == [] and set(read('dest').values()) == {b'x'}


def test_there_is_no_helper_in_a_program_with_threads(here, monkeypatch):
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    try:
        assert not module.Helper.can_help()
    finally:
        event.set()
        thread.join()


# ---- Kills ----

WRITES = ('open', 'write', 'copy_file_range', 'mkdir', 'symlink', 'link', 'rename', 'unlink',
          'rmdir', 'utime', 'fchmod', 'fchown', 'chmod', 'ftruncate')


def killed_at(count, dest, sources, options, interrupt=False):
    """Combine in a child that is killed before its count-th write; return whether it was killed.

    interrupt: raise KeyboardInterrupt there instead.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    try:
        left = count

        def counting(function):
            def counted(*args, **kwargs):
                nonlocal left
                if function is not opened or args[1] & (os.O_WRONLY | os.O_CREAT):
                    left -= 1
                    if left == 0 and interrupt:
                        raise KeyboardInterrupt
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return counted

        opened, library = os.open, module.c_library()

        counted = types.SimpleNamespace(renameat2=counting(library.renameat2),
                                        syncfs=counting(library.syncfs))
        module.c_library = lambda: counted
        for name in WRITES:
            setattr(os, name, counting(getattr(os, name)))
        combine_folders(dest, *sources, **options)
        os._exit(0)
    except BaseException:
        os._exit(1)


KILL_SOURCES = (
    {'a': b'1', 'd/b': b'2', 'd/e/c': b'3', 'd/l': ('link', 'b'), 'empty': None,
     'own': b'o' * 300_000},
    {'a': b'1', 'd/b': b'2', 'd/e/c2': b'4', 'more/x/y': b'5', 'l': ('link', 'd')})


@pytest.mark.parametrize('how', ['killed', 'interrupted'])
@pytest.mark.parametrize('dest', [None, {'d/old': b'o', 'a': b'1'}], ids=['new', 'existing'])
@pytest.mark.parametrize('options', [{}, {'link': True}, {'move': True}, {'move': None}],
                         ids=['copy', 'link', 'move', 'move to another file system'])
def test_after_a_kill_at_any_write_the_same_command_completes_it(tmp_path, monkeypatch, how, dest,
                                                                 options):
    os.chdir(tmp_path)
    if options == {'move': None}:
        options = {'move': True}

        def refuse(*_, **__):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        monkeypatch.setattr(os, 'link', refuse)
    merged, _ = model([{'d': None, **dest} if dest else {}, *(
        {**tree, 'd': None, 'd/e': None} for tree in KILL_SOURCES), {'more': None, 'more/x': None}])
    sources = ['src1', 'src2']
    count = 0
    while True:
        count += 1
        assert count < 500, 'it never comes to its end'
        for name in ('src1', 'src2', 'dest'):
            shutil.rmtree(name, ignore_errors=True)
        for name, tree in zip(sources, KILL_SOURCES):
            make(name, tree)
        if dest:
            make('dest', dest)
        old = read('dest', stats=True) if dest else {}
        if not killed_at(count, 'dest', sources, options, how == 'interrupted'):
            break
        # Each file with its final name is whole, and no file is lost.
        found = read('dest') if os.path.exists('dest') else {}
        finals = {path: what for path, what in found.items() if '.combine_folders' not in path}
        assert finals.items() <= merged.items()
        for path, what in old.items():
            assert what[0] is None or read('dest', stats=True)[path] == what
        if not dest and found:
            assert found == merged
        if not options.get('move'):
            assert [read(name).items() >= tree.items()
                    for name, tree in zip(sources, KILL_SOURCES)] == [True, True]
        for name, tree in zip(sources, KILL_SOURCES):
            assert all(path in read(name) or finals.get(path) == what
                       for path, what in {**tree}.items() if what is not None
                       and not isinstance(what, tuple))
        if how == 'interrupted':
            assert temporaries('.') == []
        combine_folders('dest', *sources, **options)
        assert read('dest') == merged
        assert temporaries('.') == []
        if options.get('move'):
            assert [read(name) for name in sources] == [{}, {}]
    assert read('dest') == merged
    assert count > 10


def test_a_killed_parent_takes_its_helper_along(tmp_path, helped):
    """The next run waits until the helper is gone, and removes the files that both left."""
    os.chdir(tmp_path)
    for existing in (False, True):
        make('src', {f'd{folder}/{name}': str(name) for folder in range(4) for name in range(50)})
        if existing:
            make('dest', {f'd{folder}/old': '' for folder in range(4)})
        for count in range(1, 400, 37):
            killed_at(count, 'dest', ['src'], {})
            combine_folders('dest', 'src')
            assert temporaries('.') == []
            assert {path: what for path, what in read('dest').items() if 'old' not in path
                    } == read('src')
            for folder in range(4):
                for name in range(50):
                    os.unlink(f'dest/d{folder}/{name}')
            if not existing:
                shutil.rmtree('dest')
        shutil.rmtree('dest', ignore_errors=True)


def test_two_runs_at_once_wait_for_each_other(here):
    make('src', {f'{number}': 'x' for number in range(20)})
    make('dest', {})
    holder = os.open('dest', os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    second = subprocess.Popen([sys.executable, PROGRAM, 'dest', 'src'], stdout=subprocess.PIPE,
                              text=True)
    assert second.stdout.readline() == 'waiting: another combine_folders works in dest\n'
    assert os.listdir('dest') == []
    os.close(holder)
    assert second.stdout.read().startswith('combined: 20 files')
    assert second.wait(60) == 0
    second.stdout.close()


# ---- Full disks ----

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB at ./disk."""
    os.chdir(tmp_path)
    os.mkdir('disk')
    if os.geteuid() or subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=1m,nr_inodes=200', 'none', 'disk'],
            capture_output=True).returncode:
        pytest.skip('only root can mount a small disk')
    yield Path('disk')
    os.chdir('/')
    subprocess.run(['umount', tmp_path / 'disk'], check=True)


@pytest.mark.parametrize('existing', [False, True])
@pytest.mark.parametrize('option', [[], ['--move']])
@pytest.mark.parametrize('size', [300_000, 2_000_000])
def test_a_full_disk(small_disk, existing, option, size):
    tree = {f'd/{number}': os.urandom(size) for number in range(4 if size < 10**6 else 1)}
    make('src', {**tree, 'd/small': 'x', 'l': ('link', 'x')})
    if existing:
        make('disk/dest', {'d/old': 'o'})
    out, err, status = call('disk/dest', 'src', *option)
    assert (out, status) == ('', 3)
    number = 3 if size < 10**6 else 0
    assert err.startswith(f'combine_folders: src/d/{number} -> disk/dest/d/{number}: '
                          'No space left on device. ')
    assert temporaries('disk') == []
    assert os.path.exists('disk/dest') == existing
    assert set(read('src')) == {*tree, 'd', 'd/small', 'l'}      # nothing was moved
    if existing:
        for path, what in read('disk/dest').items():
            assert what in (None, b'o', b'x', ('link', 'x')) or what == tree[path]
    subprocess.run(['mount', '-o', 'remount,size=20m', 'disk'], check=True)
    assert call('disk/dest', 'src', *option)[2] == 0
    assert read('disk/dest').items() >= {**tree, 'd/small': b'x', 'l': ('link', 'x')}.items()
    assert read('src') == {} if option else read('src')


def test_no_inodes_left(small_disk):
    make('src', {f'd{folder}/{name}': '' for folder in range(30) for name in range(10)})
    make('disk/dest', {})
    out, err, status = call('disk/dest', 'src')
    assert status == 3 and 'No space left on device' in err
    assert temporaries('disk') == []
    for path, what in read('disk/dest').items():
        assert what == b'' or len(os.listdir(f'disk/dest/{path}')) == 10


@AS_ROOT
def test_a_move_between_file_systems(small_disk):
    make('src', {'d/a': 'a', 'd/l': ('link', 'a')})
    make('src2', {'d/a': 'a', 'd/b': os.urandom(300_000)})
    content = {**read('src2'), **read('src')}
    combine_folders('disk/dest', 'src', 'src2', move=True, link=True)
    assert (read('disk/dest'), read('src'), read('src2')) == (content, {}, {})


# ---- Sources that change ----

def changing(monkeypatch, name, act, at=1):
    """Run act() after the at-th call of this function of os."""
    function, count = getattr(os, name), [0]

    def changed(*args, **kwargs):
        result = function(*args, **kwargs)
        count[0] += 1
        if count[0] == at:
            act()
        return result
    monkeypatch.setattr(os, name, changed)


@pytest.mark.parametrize('existing', [False, True])
@pytest.mark.parametrize('size', [10, 600_000])
@pytest.mark.parametrize('change', ['grow', 'shrink', 'same size', 'vanish', 'replace'])
def test_a_file_that_changes_while_it_is_copied_is_noticed(here, monkeypatch, existing, size,
                                                           change):
    make('src', {'f': b'a' * size, 'g': 'g'})
    if existing:
        make('dest', {'old': ''})

    def act():
        path = Path('src/f')
        if change == 'vanish':
            path.unlink()
        elif change == 'replace':
            Path('new').write_bytes(b'b' * size)
            os.rename('new', path)
        else:
            path.write_bytes({'grow': b'a' * (size + 1), 'shrink': b'a' * (size - 1),
                              'same size': b'b' * size}[change])
    name = 'read' if size < module.SMALL else 'copy_file_range'
    if change in ('vanish', 'replace'):
        monkeypatch.setattr(module.WritePass, 'run', lambda self: (act(), WRITE(self)))
    else:
        changing(monkeypatch, name, act)
    with pytest.raises(Changed, match='src/[fg], or something beside it, changed'):
        combine_folders('dest', 'src')
    assert not os.path.exists('dest/f') and os.path.exists('dest') == existing


WRITE = module.WritePass.run


@pytest.mark.parametrize('size', [10, 600_000])
def test_a_file_that_changes_while_it_is_compared_is_noticed(here, monkeypatch, size):
    for number in (1, 2):
        make(f'src{number}', {'f': b'a' * size})
    changing(monkeypatch, 'read' if size < module.SMALL else 'readv',
             lambda: Path('src1/f').write_bytes(b'b' * size))
    # The program compares a small file once more, and then finds a conflict.
    with pytest.raises(ConflictsFound if size < module.SMALL else Changed, match='src1/f|1 conf'):
        combine_folders('dest', 'src1', 'src2')
    assert not os.path.exists('dest')


@pytest.mark.parametrize('act', [
    lambda: Path('src/new').write_text('x'), lambda: Path('src/a').unlink(),
    lambda: (os.unlink('src/l'), os.symlink('other', 'src/l'))])
def test_a_folder_that_changes_before_it_is_copied_is_noticed(here, monkeypatch, act):
    make('src', {'a': 'x', 'b': 'y', 'l': ('link', 'a')})
    monkeypatch.setattr(module.WritePass, 'run', lambda self: (act(), WRITE(self)))
    with pytest.raises(Changed):
        combine_folders('dest', 'src')
    assert not os.path.exists('dest')


@pytest.mark.parametrize('path', ['src/a', 'src2/a', 'src/d/new'])
def test_what_changed_is_not_removed_from_a_source(here, monkeypatch, path):
    """Neither a copied file, nor a duplicate, nor a new file."""
    make('src', {'a': 'x', 'd/b': 'y'})
    make('src2', {'a': 'x'})
    empty = module.EmptyPass.run
    monkeypatch.setattr(module.EmptyPass, 'run',
                        lambda self: (Path(path).write_text('X'), empty(self)))

    def refuse(*_, **__):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    monkeypatch.setattr(os, 'link', refuse)
    with pytest.raises(Changed, match=f'{path}, or something'):
        combine_folders('dest', 'src', 'src2', move=True)
    assert Path(path).read_text() == 'X'
    assert read('dest') == {'a': b'x', 'd': None, 'd/b': b'y'}


@pytest.mark.parametrize('moment', ['run', 'copy_files', 'make_link', 'make_symlink',
                                    'show_folder'])
@pytest.mark.parametrize('what', ['file', 'folder', 'symlink', 'hard link'])
def test_what_appears_in_dest_meanwhile_is_not_replaced(here, monkeypatch, what, moment):
    make('src', {'folder': {'f/x': 'ours'}, 'symlink': {'f': ('link', 'ours')}}.get(
        what, {'f': 'ours'}))
    make('dest', {})
    owner = module.Maker if moment == 'show_folder' else module.WritePass
    function = getattr(owner, moment)

    def late(self, *args):
        if not os.path.exists('dest/f'):
            make('dest', {'f': 'theirs'})
        return function(self, *args)
    monkeypatch.setattr(owner, moment, late)
    try:
        combine_folders('dest', 'src', link=what == 'hard link')
    except Stopped as error:
        assert 'dest/f: File exists' in str(error) or 'dest/f, or something' in str(error)
    else:                                           # the run did not call this function
        assert not os.path.exists('dest/f') or b'theirs' not in read('dest').values()
        return
    assert read('dest') == {'f': b'theirs'}


def test_a_dest_that_appears_meanwhile_is_not_replaced(here, monkeypatch):
    make('src', {'f': 'ours'})
    monkeypatch.setattr(module.WritePass, 'run',
                        lambda self: (make('dest', {'f': 'theirs'}), WRITE(self)))
    with pytest.raises(Stopped, match='dest appeared meanwhile'):
        combine_folders('dest', 'src')
    assert read('dest') == {'f': b'theirs'}


# ---- Paths that cannot be combined ----

@pytest.mark.parametrize(('words', 'sentence'), [
    ('dest missing', 'the source missing does not exist.'),
    ('dest file', 'the source file is not a folder.'),
    ('file src1', 'file is not a folder.'),
    ('no/dest src1', 'no/dest does not exist.'),
    ('dangling src1', 'dangling does not exist.'),
    ('dest src1 src1', 'the source src1 is the same folder as src1.'),
    ('dest src1 src2 ./src1/', 'the source ./src1/ is the same folder as src1.'),
    ('dest src1 alias', 'the source alias is the same folder as src1.'),
    ('src1/new src1', 'src1/new lies inside the source src1.'),
    ('src1/d src1', 'src1/d lies inside the source src1.'),
    ('alias/d/new src2 src1', 'alias/d/new lies inside the source src1.'),
    ('src1 src1', 'src1 lies inside the source src1.'),
    ('src1 src2 src1/d', 'the source src1/d lies inside src1.'),
    ('. src1', 'the source src1 lies inside ..'),
    ('dest src1 src1/d --move',
     'the source src1/d lies inside the source src1, which --move would empty.'),
    ('dest src1 --exclude /', "--exclude: '/' is not a pattern."),
])
@pytest.mark.parametrize('dry_run', [[], ['--dry-run']])
def test_a_path_that_cannot_be_used_is_one_sentence(here, descriptors, words, sentence, dry_run):
    make('.', {'src1/d/f': '1', 'src2/f': '2', 'file': '', 'alias': ('link', 'src1'),
               'dangling': ('link', 'nowhere')})
    before = read('.', stats=True)
    out, err, status = call(*words.split(), *dry_run)
    assert (out, err.split('\n')[0], status) == ('', f'combine_folders: {sentence}', 2)
    assert read('.', stats=True) == before


def test_all_that_is_wrong_is_said(here):
    make('src', {'a': ''})
    with pytest.raises(Refused) as caught:
        combine_folders('no/dest', 'src', 'one', 'two', 'src')
    assert len(str(caught.value).split('\n')) == 4


@AS_ROOT
def test_a_source_that_is_also_elsewhere_through_a_bind_mount(tmp_path):
    os.chdir(tmp_path)
    make('.', {'src/d/f': '1', 'bind': None, 'dest/d': None, 'other/f': ''})

    @contextlib.contextmanager
    def bound(folder, to):
        if subprocess.run(['mount', '--bind', folder, to], capture_output=True).returncode:
            pytest.skip('bind mounts are not allowed here')
        try:
            yield
        finally:
            subprocess.run(['umount', to], check=True)
    with bound('src', 'bind'), pytest.raises(Refused, match='bind is the same folder as src'):
        combine_folders('new', 'src', 'bind')
    with bound('src/d', 'bind'), pytest.raises(Refused, match='bind/new lies inside the source'):
        combine_folders('bind/new', 'src')
    with bound('src/d', 'dest/d'), pytest.raises(Refused, match='are one folder'):
        combine_folders('dest', 'src', move=True)
    assert read('src') == {'d': None, 'd/f': b'1'} and not os.path.exists('new')


def test_leftovers_in_a_source_are_refused(here):
    name = module.temporary_name('x')
    make('src', {f'd/{name}': 'half'})
    with pytest.raises(Refused, match='was left by a killed combine_folders'):
        combine_folders('dest', 'src')
    os.unlink(f'src/d/{name}')


def python_as_another_user():
    """Return words that run Python as another user, who may not reach a Python in root's home."""
    user = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups']
    for python in (sys.executable, '/usr/bin/python3'):
        words = [*user, python, '-c', 'import sys; sys.exit(sys.version_info < (3, 9))']
        if subprocess.run(words, capture_output=True).returncode == 0:
            return [*user, python]
    return pytest.skip(f'another user can run neither {sys.executable} nor /usr/bin/python3')


@NOT_AS_ROOT
@pytest.mark.parametrize(('path', 'mode', 'options', 'sentence'), [
    ('src/f', 0, [], 'src/f: cannot be read: Permission denied.'),
    ('src/d', 0, [], 'src/d: cannot be read: Permission denied.'),
    ('src/d', 0o444, [], 'src/d: cannot be read: Permission denied.'),
    ('src', 0, [], 'the source src cannot be used: Permission denied.'),
    ('dest', 0o555, [], 'dest: nothing can be added: Permission denied.'),
    ('dest/d', 0o555, [], 'dest/d: nothing can be added: Permission denied.'),
    ('src/d', 0o555, ['--move'], 'src/d: nothing can be moved out of it: Permission denied.'),
    ('.', 0o555, ['new'], 'new cannot be made: Permission denied.'),
])
def test_what_may_not_be_read_or_written_is_known_before(path, mode, options, sentence):
    """If the tests run as root, the command runs as another user."""
    with tempfile.TemporaryDirectory() as folder:       # pytest's own folders are for root alone
        top = make(f'{folder}/top', {'src/f': 'x', 'src/d/g': 'y', 'dest/d': None})
        shutil.copy(PROGRAM, folder)
        os.chmod(folder, 0o755)
        python = [sys.executable]
        if os.geteuid() == 0:
            python = python_as_another_user()
            for name in ['', *read(top)]:
                os.lchown(top / name, 65534, 65534)
        before = read(top, stats=True)
        os.chmod(top / path, mode)
        words = ['new' if 'new' in options else 'dest', 'src', *(set(options) - {'new'})]
        done = subprocess.run([*python, '-S', f'{folder}/{PROGRAM.name}', *words], cwd=top,
                              capture_output=True, text=True, timeout=60)
        os.chmod(top / path, 0o755)
        assert (done.stdout, done.stderr, done.returncode) == (
            '', f'combine_folders: {sentence}\n', 2)
        os.chmod(top / path, before[path][1] & 0o777 if path in before else 0o755)
        assert set(read(top)) == set(before)


# ---- Command lines ----

@pytest.mark.parametrize(('line', 'words', 'options'), [
    ('dest a b', ['dest', 'a', 'b'], {}),
    ('--dry-run dest a', ['dest', 'a'], {'--dry-run': True}),
    ('dest --link a --move b', ['dest', 'a', 'b'], {'--link': True, '--move': True}),
    ('dest a --quiet', ['dest', 'a'], {'--quiet': True}),
    ('--exclude x dest a', ['dest', 'a'], {'--exclude': ['x']}),
    ('--exclude x --exclude=y dest a --exclude z', ['dest', 'a'], {'--exclude': ['x', 'y', 'z']}),
    ('--exclude=--link dest a', ['dest', 'a'], {'--exclude': ['--link']}),
    ('--on-conflict rename dest a', ['dest', 'a'], {'--on-conflict': 'rename'}),
    ('dest --on-conflict=error a', ['dest', 'a'], {'--on-conflict': 'error'}),
    ('--prefix -- dest --link', ['dest', '--link'], {'--prefix': True}),
    ('dest a -- --', ['dest', 'a', '--'], {}),
    ('- a', ['-', 'a'], {}),
    ('--skip-special --quiet dest a', ['dest', 'a'], {'--skip-special': True, '--quiet': True}),
])
def test_a_command_line_says(line, words, options):
    assert module.read_options(shlex.split(line)) == (words, options)


@pytest.mark.parametrize(('line', 'sentence'), [
    ('', '<dest> is missing.'), ('dest', '<source> is missing.'),
    ('dest a --zebra', 'unknown option --zebra.'), ('dest a -x', 'unknown option -x.'),
    ('dest a --excude=x', 'unknown option --excude (did you mean --exclude?).'),
    ('dest a --exclude', '--exclude needs a value.'),
    ('dest a --exclude --move', '--exclude needs a value, and --move is an option. If you mean it '
     'as the value: --exclude=--move'), ('dest a --link=1', '--link takes no value.'),
    ('dest a --on-conflict rename --on-conflict error', '--on-conflict is given twice.'),
    ('dest a --on-conflict keep', "--on-conflict must be error or rename, not 'keep'."),
    ('dest a --exclude [z-a]', '--exclude: not a pattern: bad character range z-a'),
])
def test_a_wrong_command_line_is_named(here, line, sentence):
    make('a', {'f': ''})
    out, err, status = call(*shlex.split(line))
    assert (out, status) == ('', 2)
    assert err.startswith(f'combine_folders: {sentence}')
    assert 'combine_folders [options]' in err and not os.path.exists('dest')


def test_the_usage_text_and_the_function_have_the_same_options():
    import inspect
    parameters = inspect.signature(combine_folders).parameters
    keywords = {f'--{name.replace("_", "-")}' for name, parameter in parameters.items()
                if parameter.kind is parameter.KEYWORD_ONLY}
    known = {name for name in module.option_kinds() if name.startswith('--')}
    assert known - {'--help', '--completion', '--quiet'} == keywords - {'--report'}
    assert all(len(line) <= 100 for line in module.USAGE.splitlines())


def test_an_excluded_word_too_many_is_a_source_that_is_not_there(here):
    make('src', {'f': ''})
    assert call('dest', 'src', '--exclude', '*.a', '*.b')[1:] == (
        'combine_folders: the source *.b does not exist. Each --exclude takes ONE pattern.\n', 2)


@pytest.mark.parametrize(('pattern', 'left'), [
    ('*.tmp', 'a a/b a/b/x b b/x d.x'), ('/a', 'b b/x b/x.tmp d.x d.x/'), ('b', 'a a/y.tmp d.x'),
    ('b/', 'a a/y.tmp d.x'), ('a/b', 'a a/y.tmp b b/x b/x.tmp d.x'), ('/b/x', None),
    ('d.?', None), ('a/**', 'a b b/x b/x.tmp d.x'), ('[!a]', 'a a/y.tmp d.x'), ('x/', None),
    ('d*', None), ('*', ''), ('**/x', None), ('a/*', None), ('y?tmp', None), ('[a-b]/x*', None),
])
def test_patterns_are_those_of_rsync(here, pattern, left):
    make('src', {'a/b/x': '1', 'a/y.tmp': '2', 'b/x': '3', 'b/x.tmp': '4', 'd.x': '5'})
    combine_folders('dest', 'src', exclude=[pattern])
    if shutil.which('rsync'):
        subprocess.run(['rsync', '-a', f'--exclude={pattern}', 'src/', 'peer/'], check=True)
        assert read('dest') == read('peer')
    elif left is not None:
        assert ' '.join(sorted(read('dest'))) == left


# ---- The function ----

def test_the_function_says_what_is_wrong(here):
    make('src', {'f': 'x'})
    for arguments, keywords in ((('dest',), {}), (('dest', 'src'), {'on_conflict': 'keep'}),
                                (('dest', 'src'), {'exclude': '*.x'})):
        with pytest.raises(UsageError):
            combine_folders(*arguments, **keywords)
    assert issubclass(ConflictsFound, CombineError) and not os.path.exists('dest')
    assert combine_folders(Path('dest'), b'src') == Result(1, 1)


# ---- The terminal ----

def test_quiet_says_nothing_unless_something_is_wrong(here):
    make('src', {'f': 'x'})
    assert call('dest', 'src', '--quiet') == ('', '', 0)
    make('src', {'f': 'y'})
    out, err, status = call('dest', 'src', '--quiet')
    assert (out, status) == ('', 1) and err.startswith('conflict: f\n')


def test_a_dry_run_says_what_would_happen(here):
    make('src1', {'f': 'x' * 1500})
    make('src2', {'f': 'y'})
    assert call('dest', 'src1', 'src2', '--dry-run', '--on-conflict=rename') == (
        'would rename: src1/f -> f.src1\nwould rename: src2/f -> f.src2\n'
        'would combine: 2 files, 1.5 kB from 2 folders, 0 duplicates collapsed, 1 conflict '
        '-> dest\n', '', 0)
    assert not os.path.exists('dest')


def on_terminal(*words):
    """Run the command with a terminal for its stderr; return (stdout, what was shown, status)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, PROGRAM, *words], stdout=subprocess.PIPE,
                               stderr=theirs, text=True)
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError):          # the terminal's end
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    out = process.communicate()[0]
    return out, shown.decode(), process.returncode


def test_a_terminal_has_a_progress_bar(here):
    make('src', {'big': os.urandom(30_000_000)})
    out, shown, status = on_terminal('dest', 'src')
    assert status == 0 and out.startswith('combined: 1 file, 30.0 MB')
    assert 'copying' in shown and '%' in shown and '[#' in shown
    assert shown.endswith('\r\x1b[K')           # the bar is erased
    assert on_terminal('dest2', 'src', '--quiet')[1] == ''


def test_ctrl_c_and_sigterm_end_it_and_leave_nothing(here):
    """Each signal arrives while the program waits for a lock, which is a known state."""
    make('src', {'f': 'x'})
    make('dest', {})
    holder = os.open('dest', os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        process = subprocess.Popen([sys.executable, PROGRAM, 'dest', 'src'], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.readline().startswith('waiting: ')
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (out, err, process.returncode) == (
            '', 'combine_folders: interrupted. The same command completes it.\n', status)
    os.close(holder)


def test_a_reader_that_goes_away_is_no_trouble(here):
    make('src', {'f': 'x'})
    done = subprocess.run(f'{shlex.quote(sys.executable)} {shlex.quote(str(PROGRAM))} dest src | :',
                          shell=True, stderr=subprocess.PIPE, text=True)
    assert done.stderr == '' and os.path.exists('dest/f')


def test_it_needs_no_library_and_no_environment(here):
    make('src', {'f': 'x'})
    done = subprocess.run([sys.executable, '-I', '-S', PROGRAM, 'dest', 'src'], env={},
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and read('dest') == {'f': b'x'}


# ---- Results of execute_batch: its bookkeeping, and streams ----

RESULTS = {'b.sh.1/model': 'one', 'b.sh.2/table': 'two', 'b.sh.1.out': 'x', 'b.sh.1.err': '',
           'b.sh.2.out': '', 'b.sh.2.err': 'y', 'b.sh.3.out': 'z', 'b.sh.3.err': ''}
KEPT = {'.ssh_scheduler/journal': '{}', '.ssh_scheduler/lock': '',
        '.ssh_scheduler/cancelled/b.sh.4/part': 'p'}


def content(tree):
    return {path: what.encode() for path, what in tree.items()}


def files(root):
    return {path: what for path, what in read(root).items() if what is not None}


@pytest.mark.parametrize('options', [(), ('--move',), ('--link',), ('--prefix',)])
@pytest.mark.parametrize('existing', [False, True])
@pytest.mark.parametrize('where', ['job_results', 'project/job_results'])
def test_the_bookkeeping_of_a_source_is_left_out(here, descriptors, options, existing, where):
    make(where, {**RESULTS, **KEPT})
    source, below = where.split('/')[0], where.partition('/')[2]
    if existing:
        make('all', {'.ssh_scheduler/note': 'of dest'})
    done = command('all', source, *options)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines()[0] == 'left out: 1 .ssh_scheduler folder'
    assert done.stdout.splitlines()[1].startswith('combined: 8 files, 9 bytes from 1 folder, ')
    top = Path('all', *[source] * ('--prefix' in options), below)
    found = files('all')
    own = found.pop('.ssh_scheduler/note', None)
    assert own == (b'of dest' if existing else None)
    assert found == {str(top.relative_to('all') / path): what
                     for path, what in content(RESULTS).items()}
    left = files(where)
    assert left == content(KEPT if '--move' in options else {**RESULTS, **KEPT})


@pytest.mark.parametrize('bookkeeping', [KEPT, {}], ids=['', 'copied'])
@pytest.mark.parametrize('options', [(), ('--move',), ('--dry-run',)])
def test_streams_that_are_named_as_sources_are_left_out(here, descriptors, options, bookkeeping):
    make('job_results', {**RESULTS, **bookkeeping})
    done = subprocess.run(['bash', '-c', '"$@" job_results/*', '', sys.executable, PROGRAM, 'all',
                           *options], capture_output=True, text=True, timeout=60)
    assert (done.returncode, unsent(done.stderr)) == (0, '')
    first, second = done.stdout.splitlines()
    assert first == 'left out: 6 stream files'
    assert ': 2 files, 6 bytes from 2 folders, ' in second
    if '--dry-run' not in options:
        assert files('all') == {'model': b'one', 'table': b'two'}
    streams = {path: what for path, what in RESULTS.items() if '/' not in path}
    assert files('job_results') == content({**(streams if '--move' in options else RESULTS),
                                            **bookkeeping})
    assert combine_folders('again', *map(str, Path('job_results').glob('[!.]*'))).files == (
        0 if '--move' in options else 2)


def test_earlier_and_partial_results_are_left_out_where_all_are_named(here):
    make('job_results', {**RESULTS, **KEPT, 'b.sh.1~1/model': 'zero', 'b.sh.1~1.out': '',
                         'b.sh.9~2/other': 'of a job that has no other results',
                         'b.sh.5.partial/model': 'so far'})
    names = [f'job_results/{path.name}' for path in Path('job_results').glob('[!.]*')]
    done = command('all', *names)
    assert (done.returncode, done.stderr) == (0, '')
    assert {*done.stdout.splitlines()[0].removeprefix('left out: ').split(', ')} == {
        '7 stream files', '1 earlier result', '1 partial result'}
    assert files('all').keys() == {'model', 'table', 'other'}
    assert command('one', 'job_results/b.sh.1~1').returncode == 0       # named, so combined
    assert files('one') == {'model': b'zero'}
    make('own', {'b.sh.1/a': '1', 'b.sh.1~1/b': '2', 'b.partial/c': '3'})
    assert command('two', 'own/b.sh.1', 'own/b.sh.1~1', 'own/b.partial').returncode == 0
    assert files('two').keys() == {'a', 'b', 'c'}


def test_files_of_results_that_are_left_out_are_not_mixed_in(here):
    claims = [{'event': 'claimed', 'job': 'b.sh.1', 'files': 'a' * 16, 'batch': 'b.sh'},
              {'event': 'renamed', 'job': 'b.sh.1', 'to': 'b.sh.1~1'},
              {'event': 'claimed', 'job': 'b.sh.1', 'files': 'b' * 16, 'batch': 'b.sh'}]
    make('job_results', {**RESULTS, **KEPT, 'b.sh.1~1/model': 'zero',
                         '.ssh_scheduler/journal': '\n'.join(map(json.dumps, claims))})
    done = command('all', 'job_results/b.sh.1', 'job_results/b.sh.1~1')
    assert (done.returncode, unsent(done.stderr)) == (0, '')
    assert done.stdout.startswith('left out: 1 earlier result\n')
    with open('job_results/.ssh_scheduler/journal', 'a') as journal:
        journal.write('\n' + json.dumps({**claims[0], 'job': 'b.sh.2'}) + '\n')
    done = command('two', 'job_results/b.sh.1', 'job_results/b.sh.2', 'job_results/b.sh.1~1')
    assert 'made with 2 different sets of files, for example b.sh.1 and b.sh.2. ' in done.stderr


def test_tables_and_pages_beside_results_are_left_out(here):
    tables = {'table.csv': 'a', 'report.html': 'b'}
    make('job_results', {**RESULTS, **KEPT, **tables})
    names = [f'job_results/{path.name}' for path in Path('job_results').glob('[!.]*')]
    done = command('all', *names)
    assert (done.returncode, done.stderr) == (0, '')
    assert {*done.stdout.splitlines()[0].removeprefix('left out: ').split(', ')} == {
        '6 stream files', '2 results_table files'}
    assert files('all').keys() == {'model', 'table'}
    make('.', tables)
    assert command('two', 'table.csv').stderr == (
        'combine_folders: the source table.csv is not a folder.\n')


@pytest.mark.parametrize(('words', 'told'), [
    ('job_results all', 'job_results is a folder of results of execute_batch, to which '
     'combine_folders adds nothing. Name the destination first: combine_folders all job_results'),
    ('job_results/b.sh.1 job_results/b.sh.2', 'job_results/b.sh.1 lies in a folder of results of '
     'execute_batch, to which combine_folders adds nothing. Name the destination first: '
     'combine_folders all_results job_results/*'),
    ('job_results/all job_results/b.sh.1', 'job_results/all lies in a folder of results of '
     'execute_batch, to which combine_folders adds nothing. Name the destination first: '
     'combine_folders all_results job_results/*')])
@pytest.mark.parametrize('options', [(), ('--dry-run',), ('--prefix',)])
def test_nothing_is_added_to_results(here, words, told, options):
    make('job_results', {**RESULTS, **KEPT})
    make('all', {'a': 'b'})
    before = read('.', stats=True)
    assert call(*words.split(), *options) == ('', f'combine_folders: {told}\n', 2)
    assert read('.', stats=True) == before
    make('work', {'.ssh_scheduler/jobs/x': ''})         # the workdir of a machine
    assert call('work', 'all')[2] == 0


def test_the_results_of_a_real_batch_are_combined_without_its_bookkeeping(run_cli, project):
    (project / 'batch.sh').write_text('echo 1 >a\necho 2 >b\ntrue\n')
    batch = run_cli('execute_batch', 'batch.sh', '--no-gpu-required', '--memory-required=1',
                    '--copy-forwards', '--machines', 'localhost')
    assert batch.returncode == 0, batch.stderr
    done = command('all', *map(str, Path('job_results').glob('[!.]*')))
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('left out: 6 stream files\ncombined: 2 files, 4 bytes from ')
    assert files('all') == {'a': b'1\n', 'b': b'2\n'}
    done = command('whole', 'job_results')
    assert done.stdout.startswith('left out: 1 .ssh_scheduler folder\ncombined: 8 files, ')
    assert not Path('whole/.ssh_scheduler').exists() and Path('whole/batch.sh.3.out').exists()


def test_that_the_next_batch_sends_the_combined_folder_is_told(here):
    make('job_results', {**RESULTS, **KEPT})
    told = ('note: the next batch of this folder sends {0}, too, unless you give execute_batch '
            '--exclude=/{0} or combine outside this folder\n')
    for dest in ('all', 'out/all'):
        Path('out').mkdir(exist_ok=True)
        done = call(dest, 'job_results/b.sh.1')
        assert done[1:] == (told.format(dest), 0) and done[0].startswith('combined: ')
    assert call('../beside', 'job_results/b.sh.1')[1:] == ('', 0)
    assert call('all', 'job_results/b.sh.1', '--quiet') == ('', '', 0)
    assert call('all', 'job_results/b.sh.1', '--dry-run')[1] == ''
    for rule, is_told in (('- /all', False), ('exclude all/', False), ('- *.ckpt', True)):
        Path('.rsync-filter').write_text(f'# rules\n{rule}\n')
        assert bool(call('all', 'job_results/b.sh.1')[1]) == is_told, rule
    Path('.rsync-filter').unlink()
    shutil.rmtree('job_results/.ssh_scheduler')
    assert call('all', 'job_results/b.sh.1')[1] == ''       # no batch was run here


def test_both_are_said_in_one_line_also_beside_a_conflict(here):
    make('job_results', {**RESULTS, **KEPT})
    make('other', {'model': 'three'})
    done = command('all', 'job_results/b.sh.1', 'job_results/b.sh.1.out', 'job_results', 'other')
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == 'left out: 1 stream file, 1 .ssh_scheduler folder'
    assert ' from 3 folders, ' in done.stdout.splitlines()[1]
    assert command('all', '--quiet', 'job_results').stdout == ''


def test_a_user_s_own_files_are_no_bookkeeping(here):
    """All files of a source are combined; only a folder named .ssh_scheduler is left out."""
    tree = {'run.out': '1', 'run.err': '2', 'deep/run.out': '3', 'deep/.ssh_scheduler.txt': '4',
            'file/.ssh_scheduler': '5', 'x.out/inside': '6'}
    make('src', tree)
    make('job_results', {**KEPT, 'b.sh.1.err/y': '7'})      # a folder may have such a name
    done = command('all', 'src', 'src/x.out', 'job_results/b.sh.1.err')
    assert (done.returncode, done.stderr) == (0, '') and 'left out' not in done.stdout
    assert files('all') == content({**tree, 'inside': '6', 'y': '7'})
    assert command('kept', 'job_results/.ssh_scheduler').returncode == 0      # named, so combined
    assert files('kept') == {path.partition('/')[2]: what for path, what in content(KEPT).items()}


@pytest.mark.parametrize(('words', 'sentence'), [
    (['job_results/b.sh.1.out', 'job_results/b.sh.1.err'],
     'no <source> is a folder of results: all are streams of jobs (.out, .err), files of jobs '
     'that run (.partial), or tables and pages.'),
    (['job_results/b.sh.1', 'own.out'], 'the source own.out is not a folder.'),
    (['job_results/b.sh.1', 'job_results/notes.txt'],
     'the source job_results/notes.txt is not a folder.'),
    (['job_results/b.sh.1', 'job_results/none.out'],
     'the source job_results/none.out does not exist.')])
def test_what_is_no_stream_is_still_named(here, words, sentence):
    make('job_results', {**RESULTS, **KEPT, 'notes.txt': ''})
    make('.', {'own.out': ''})
    done = command('all', *words)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, '', f'combine_folders: {sentence}\n')


def test_the_example_combines_what_its_batch_brought_back(tmp_path):
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(['bash', ROOT / 'example/combine.sh'], capture_output=True, text=True,
                          env={**os.environ, 'PATH': path, 'TMPDIR': str(tmp_path)}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'combined: 4 files, 85 bytes from 3 folders, 2 duplicates collapsed' in done.stdout
    assert 'conflict: results/config.json\n' in done.stderr and 'exit status 1\n' in done.stdout
    assert 'config.json.example_sweep.sh.2\n' in done.stdout
    assert os.listdir(tmp_path) == []


def test_a_file_that_changes_while_its_new_name_is_looked_at_is_told(tmp_path, monkeypatch):
    for folder, text in (('a', 'one'), ('b', 'two'), ('dest', 'three')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'x').write_text(text)
    (tmp_path / 'dest/x.a').write_text('one')

    def changes(comparer, first, second):
        raise module.LooksChanged

    monkeypatch.setattr(module.Comparer, 'same', changes)
    with pytest.raises(Changed, match='a/x, or something beside it, changed while'):
        combine_folders(str(tmp_path / 'dest'), str(tmp_path / 'a'), str(tmp_path / 'b'),
                        on_conflict='rename')
