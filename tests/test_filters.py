"""Which files are sent: the rules of rsync, compared with what rsync itself copies."""
import contextlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ssh_scheduler
from ssh_scheduler import FilesError

ANY = settings(deadline=None, derandomize=True, max_examples=50,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FIXED = [f'--exclude={name}' for name in ssh_scheduler.NEVER_SENT]


@pytest.fixture
def spare(tmp_path, monkeypatch):
    """Return a function that makes a new empty folder the current one."""
    numbers = itertools.count()

    def fresh():
        folder = tmp_path / f'tree{next(numbers)}'
        folder.mkdir()
        monkeypatch.chdir(folder)
        return folder

    yield fresh
    monkeypatch.undo()
    shutil.rmtree(tmp_path)


def make(paths, filters=None):
    """Make empty files, folders (with a slash at the end), and .rsync-filter files.

    A path is left out if one of its folders is a file already.
    """
    for path in paths:
        folder = path if path.endswith('/') else os.path.dirname(path) or '.'
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            os.makedirs(folder, exist_ok=True)
            if not os.path.isdir(path):
                Path(path).touch()
    for folder, text in (filters or {}).items():
        if os.path.isdir(folder):
            Path(folder, '.rsync-filter').write_bytes(os.fsencode(text))


def by_rsync(exclude, *options):
    """Return the paths below the current folder that rsync copies."""
    target = os.getcwd() + '.copy'
    argv = ['rsync', '-a', *options, *FIXED, *(f'--exclude={pattern}' for pattern in exclude),
            '-F', './', target]
    done = subprocess.run(argv, capture_output=True)
    assert done.returncode == 0, (argv, done.stderr)
    return {os.path.relpath(os.path.join(parent, name), target)
            for parent, folders, files in os.walk(target) for name in folders + files}


def by_us(exclude=(), paths=('.',)):
    return {entry.path for entry in ssh_scheduler.scan_tree(paths, exclude).entries}


def assert_same(exclude=()):
    theirs, ours = by_rsync(exclude), by_us(exclude)
    assert ours == theirs, (f'rsync alone: {sorted(theirs - ours)}, '
                            f'we alone: {sorted(ours - theirs)}')


# ---- Patterns: each in the filter file of a folder of its own ----

NAMES = ['a', 'b', 'ab', 'a.b', 'A', '-', ']', '[a]', '*', '\\', 'a\\b', 'é', '\u20ac', 'b\udcff',
         '!', '^', 'a b', '1', 'c\nd', '#', '+ a', '\x85']
PATHS = [*NAMES, 'd/', 'd/a', 'd/ab', 'd/d/', 'd/d/a', 'd/d/d/b', 'ad/', 'ad/a.b', 'e/d/a', 'e/a/',
         'e/a/b', 'd/é']

PIECES = st.sampled_from([
    'a', 'b', 'd', 'e', 'A', '.', '/', '/', '*', '*', '**', '***', '?', '[a]', '[ab]', '[!a]',
    '[^a]', '[a-c]', '[]]', '[!]a]', '[]-a]', '[a-]', '[a', '[[:alpha:]]', '[[:digit:][:upper:]]',
    '[[:x:]]', '[\\]]', '[\\a]', '[b-a]', '[--a]', '[a/b]', '[!-~]', '[é]', '\\', '\\*', '\\\\',
    '\\[', 'é', '-', '\udcff', ' ', '#', '!', '^', ']', '[[:punct:]]', '[[:space:]]', '[*]',
    '[a\\-c]', '[]', '[!]', '[[:a]', '[[:]', '[[:alpha:]-b]', '[a-b-d]', '[a-\\]]', '[[::]]'])
PATTERNS = st.lists(PIECES, min_size=1, max_size=6).map(''.join).filter(lambda p: p.strip())


AT_ONCE = 20


@pytest.fixture
def twenty_folders(spare):
    """Folders 0 to 19 with the same files, below the current one."""
    spare()
    make([f'{number}/{path}' for number in range(AT_ONCE) for path in PATHS])


@settings(ANY, max_examples=45)
@given(patterns=st.lists(PATTERNS, min_size=AT_ONCE, max_size=AT_ONCE))
@example(patterns=[
    '[a/b]', '/', '//', '*\\', 'a\\', 'a\\b', '[a*', '[[:x:]]*', '*[[:space:]]*', '/d?a', '/d[!x]a',
    '?', '\\*', 'e**a', '/e/**/b', 'd/***', '**/a', '/**/a', '?***', '/d/**'])
def test_patterns_match_what_they_match_for_rsync(twenty_folders, patterns):
    make([], {str(number): f'- {pattern}\n' for number, pattern in enumerate(patterns)})
    theirs, ours = by_rsync((), '--delete-excluded', '--delete'), by_us()
    for number, pattern in enumerate(patterns):
        wrong = sorted(path for path in theirs ^ ours if path.startswith(f'{number}/'))
        assert not wrong, f'{pattern!r}: rsync and we differ in {wrong}'
    assert ours == theirs


# ---- Rules: nested filter files, and excludes of the command line ----

FOLDERS = ['.', 'd', 'd/d', 'd/e', 'e']
LEAVES = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(
    ['a', 'b', 'ab', 'd', 'a.o', 'job_results', '.git', 'é', '.hidden/', 'x/'])).map('/'.join)
PATTERN = st.sampled_from([
    'a', 'b', 'd', 'd/', '/d', '/a', 'd/a', '/d/a', '/d/d/', '*', '*/', '**', '*.o', 'a*', 'd/**',
    '/d/***', '**/a', '/**/a', 'd/*/a', 'd**a', '?', '[ab]', '.*', 'job_results', '.git', 'é', '/*',
    'd/d/***', '**d/', 'e/../a', './a', '/', '//', 'a/', '/a/'])
PREFIXES = st.sampled_from(
    ['- ', '- ', '+ ', '+ ', 'exclude ', 'include ', 'hide ', 'show ', 'H ', 'S ', 'P ', 'R ',
     'protect ', 'risk ', '-r ', '-s ', '-,p ', '+sr ', 'exclude,s ', 'include,r ', '-_', 'H_'])
FILTER_LINES = st.one_of(
    st.tuples(PREFIXES, PATTERN).map(''.join), st.tuples(PREFIXES, PATTERN).map(''.join),
    st.tuples(PREFIXES, PATTERN).map(''.join), st.sampled_from(
        ['!', 'clear', '# note', '; note', '', '- a\r', '- a ', '-  a', '- # a']))
FILTERS = st.dictionaries(st.sampled_from(FOLDERS), st.lists(FILTER_LINES, max_size=4).map(
    '\n'.join), max_size=3)


@settings(ANY, max_examples=80)
@given(paths=st.lists(LEAVES, min_size=3, max_size=10), filters=FILTERS,
       exclude=st.lists(PATTERN, max_size=2))
@example(paths=['d/a', 'a', 'd/d/a'], filters={'d': '- d/a'}, exclude=[])
@example(paths=['d/a', 'a', 'd/d/a'], filters={'.': '- a', 'd': '+ /a'}, exclude=[])
@example(paths=['d/a', 'a', 'd/d/a'], filters={'.': '- a', 'd': '!', 'd/d': '- *'}, exclude=[])
@example(paths=['d/a', 'a'], filters={'.': '+ a\n- a', 'd': '- a\n!\n- b'}, exclude=['/d/b'])
@example(paths=['a', 'b/a'], filters={}, exclude=['[a/b]'])
@example(paths=['a', 'e/a', 'b'], filters={}, exclude=['**/a'])
@example(paths=['e/d', 'd/a'], filters={}, exclude=['d/***'])
@example(paths=['d/a', 'e/d/a'], filters={}, exclude=['d/**'])
@example(paths=['a', 'b'], filters={'.': 'S a\n- *'}, exclude=[])
@example(paths=['a', 'b'], filters={'.': '+sr a\n- *'}, exclude=[])
@example(paths=['a', 'b'], filters={'.': '+ a'}, exclude=['a'])
@example(paths=['d/job_results', '.git/a', 'a'], filters={'.': '+ .git\n+ job_results'}, exclude=[])
def test_rules_choose_what_they_choose_for_rsync(spare, paths, filters, exclude):
    spare()
    make(paths, filters)
    assert_same(exclude)


LETTERS = st.text(st.sampled_from('+-HSPR!aceinp:.,_ #;srx/'), max_size=5)
WORDS = st.sampled_from(['exclude', 'include', 'hide', 'show', 'protect', 'risk', 'clear', 'merge'])


@settings(ANY, max_examples=60)
@given(line=LETTERS | st.tuples(WORDS, LETTERS).map(''.join) | PATTERN)
@example(line='- a\x0b')
@example(line='- \x85')
@example(line='-! a')
@example(line='. b')
@example(line='!p')
def test_a_line_is_a_rule_as_for_rsync_or_is_named(spare, line):
    """A line is a rule with the effect that it has for rsync, or an error names it."""
    spare()
    make(['a', 'b', 'c', 'd/a', ' a', 'a\x0b', '\x85'], {'.': line})
    try:
        ours = by_us()
    except FilesError as error:
        assert str(error).startswith('./.rsync-filter, line 1: ') and str(error).endswith('.')
        return
    if line.strip() and line[-1:] not in (' ', '_'):
        assert ours == by_rsync(())


# ---- Messages about files, and files that are never sent ----

def test_what_was_left_out_is_said(spare):
    spare()
    make(['a', 'b', '.git/x', 'd/job_results/y', 'job_results/z'])
    tree = ssh_scheduler.scan_tree(('.',), ('b',))
    assert [entry.path for entry in tree.entries] == ['a', 'd']
    assert tree.left_out == ('.git', 'files that the exclude rules name', 'job_results')
    shutil.rmtree('d')
    assert ssh_scheduler.scan_tree(('.',), ()).left_out == ('.git',)


@pytest.mark.parametrize('name', ['big', 'b[i]g*'])
def test_what_is_linked_is_not_left_out_by_a_rule(spare, name):
    spare()
    make(['a', f'{name}/x', 'd/big/x', 'big2'])
    copy, link = ssh_scheduler.Files().trees(ssh_scheduler.Forwards(('.',), (name,)))
    assert {entry.path for entry in copy.entries} == {'a', 'd', 'd/big', 'd/big/x', 'big2'}
    assert {entry.path for entry in link.entries} == {name, f'{name}/x'}
    assert copy.left_out == link.left_out == ()


def test_a_rule_that_includes_leaves_nothing_out(spare):
    spare()
    make(['a', 'b'])
    with open('.rsync-filter', 'w') as file:
        file.write('include b\n')
    tree = ssh_scheduler.scan_tree(('.',), ())
    assert {entry.path for entry in tree.entries} == {'.rsync-filter', 'a', 'b'}
    assert tree.left_out == ()


def test_a_wrong_filter_file_is_named(spare):
    spare()
    make(['d/a'], {'d': '- x\n\n?? \x1b[m\n'})
    with pytest.raises(FilesError) as caught:
        by_us()
    assert str(caught.value) == (
        "d/.rsync-filter, line 3: '?? \\\\x1b[m': only include, exclude, hide, show, protect, risk "
        'and clear rules are understood here.')


@pytest.mark.parametrize('line', [
    'a', ' - a', ' # a', '-', '- ', '+', 'exclude', '-a a', '- \n!x', '! a', 'clear_a', ': a',
    '. a', 'merge a', 'dir-merge a', '-! a', '-/ a', '-C', 'excludes a', 'Exclude a', 's a'])
def test_a_line_that_is_no_rule_is_refused(spare, line):
    spare()
    make(['a'], {'.': line})
    with pytest.raises(FilesError, match='rules are understood here'):
        by_us()


def test_a_folder_named_alone_has_the_rules_above_it(spare):
    spare()
    make(['d/a', 'd/b', 'd/d/a', 'e/a'], {'.': '- /d/d\n', 'd': '- b\n'})
    assert by_us(paths=('d', 'e/a')) == {'d', 'd/.rsync-filter', 'd/a', 'e', 'e/a'}


def test_an_entry_says_what_lies_there(spare):
    spare()
    make(['d/', 'f'])
    Path('f').write_bytes(b'12345')
    os.chmod('f', 0o754)
    os.chmod('d', 0o750)
    os.utime('f', ns=(0, 1234567890123456789))
    os.symlink('nowhere/../x', 'l')
    os.mkfifo('p')
    tree = ssh_scheduler.scan_tree(('.',), ())
    found = {entry.path: entry for entry in tree.entries}
    assert found['f'] == ssh_scheduler.Entry('f', 'f', 5, 1234567890123456789, 0o754)
    assert (found['d'].kind, found['d'].mode, found['d'].size) == ('d', 0o750, 0)
    assert (found['l'].kind, found['l'].target, found['l'].size) == ('l', 'nowhere/../x', 0)
    assert set(found) == {'f', 'd', 'l'} and tree.left_out == ('sockets, fifos and devices',)
    assert (tree.files, tree.size) == (2, 5)


@ANY
@given(paths=st.lists(LEAVES, max_size=8), named=st.lists(st.sampled_from(FOLDERS), min_size=1))
def test_a_folder_comes_before_what_it_holds_and_nothing_comes_twice(spare, paths, named):
    spare()
    make([f'{folder}/' for folder in FOLDERS] + paths)
    order = [entry.path for entry in ssh_scheduler.scan_tree(named, ()).entries]
    assert len(set(order)) == len(order)
    for path in order:
        parent = os.path.dirname(path)
        assert not parent or order.index(parent) < order.index(path)


@pytest.mark.parametrize(('path', 'expected'), [
    ('none', '--copy-forwards none: there is no such file or folder.'),
    ('.git', '--copy-forwards .git: .git is never sent.'),
    ('job_results/a', '--copy-forwards job_results/a: job_results is never sent.'),
    ('beside', '--copy-forwards beside: this is '),
    ('out', '--copy-forwards out: this is /, which lies outside the current folder'),
    ('up/x', None),
])
def test_a_named_path_that_is_never_sent(spare, path, expected):
    here = spare()
    make(['.git/a', 'job_results/a', 'd/x'])
    os.symlink('/', 'out')
    os.symlink('..', 'up')
    os.symlink(f'{here}.x', 'beside')
    if expected is None:
        (here.parent / 'x').touch()
        expected = f'--copy-forwards up/x: this is {here.parent}/x, which lies outside'
    with pytest.raises(FilesError) as caught:
        ssh_scheduler.scan_tree((path,), ())
    assert str(caught.value).startswith(expected)


def test_a_whole_home_is_not_sent(spare, monkeypatch):
    here = spare()
    make(['d/a'])
    monkeypatch.setenv('HOME', str(here))
    with pytest.raises(FilesError, match='all of .* would be sent to every machine'):
        by_us()
    assert by_us(paths=('d',)) == {'d', 'd/a'}
    os.chdir('/')
    with pytest.raises(FilesError, match='all of / would be sent'):
        by_us()


def test_a_file_that_cannot_be_read_is_named(spare):
    spare()
    make(['d/a'])
    os.symlink('a', 'd/l')
    os.remove('d/a')
    assert by_us() == {'d', 'd/l'}          # a link is sent as a link, wherever it leads
    make(['d/b'], {})
    os.mkdir('d/.rsync-filter')
    with pytest.raises(FilesError, match=r'^d/.rsync-filter cannot be read: Is a directory\.$'):
        by_us()


@pytest.mark.parametrize('mode', [0, 0o300, 0o400])
def test_a_folder_that_cannot_be_read_is_named(spare, mode, monkeypatch):
    spare()
    make(['d/a', 'e'])
    os.chmod('d', mode)
    if os.getuid() == 0:                    # permissions do not stop root
        access = os.access
        monkeypatch.setattr(os, 'access', lambda path, how: access(path, how) and (
            how & os.stat(path).st_mode >> 6) == how)
    try:
        with pytest.raises(FilesError, match='^--copy-forwards: you may not read the folder d. '
                           'Leave it out with --exclude.$'):
            ssh_scheduler.scan_tree(('.',), ())
        assert by_us(['d']) == {'e'}
    finally:
        os.chmod('d', 0o700)


def lost(copy=('.',), link=(), exclude=()):
    without = tuple(f'/{path}' for path in link) + exclude
    trees = ssh_scheduler.scan_tree(copy, without), ssh_scheduler.scan_tree(link, exclude)
    return set(ssh_scheduler.lost_links(*trees, link))


def test_links_that_lead_nowhere_on_a_machine_are_found(spare):
    here = spare()
    outside = here.parent / 'outside'
    outside.mkdir()
    (outside / 'file').touch()
    make(['d/file', 'd/deep/file', 'left/out', 'sets/data/file', 'sets/other/file'])
    links = {
        # links that jobs can follow
        'in': 'd/file', 'd/up': '../d/deep/../file', 'd/self': '..', 'd/deep/chain': '../../in',
        'dangling': 'no/such', 'gone': f'{outside}/none', 'loop': 'loop', 'system': '/etc/passwd',
        'null': '/dev/null', 'd/again/../folder': 'deep', 'to_set': 'sets/data/file',
        'sets/data/inner': 'file', 'sets/data/beside': '../data/file',
        # links that they cannot follow
        'out': f'../{outside.name}/file', 'out_folder': str(outside), 'absolute': f'{here}/d/file',
        'chained': 'out', 'd/through': '../out_folder/file', 'excluded': 'left/out',
        'twice': 'd/../../' + here.name + '/d/file', 'sets/data/back': '../../d/file',
        'sets/data/unlinked': '../other/file', 'sets/data/out': str(outside),
    }
    for path, target in links.items():
        os.symlink(target, os.path.normpath(path))
    names = [os.path.normpath(path) for path in links]
    bad = set(names[names.index('out'):])
    assert lost(link=('sets/data',), exclude=('left',)) == bad
    assert lost(link=('sets/data', 'sets/other'), exclude=('left',)) == bad - {
        'sets/data/unlinked'}
    # without --link-forwards all sent files lie in one folder
    assert lost() == bad - {'excluded', 'sets/data/back', 'sets/data/unlinked'}
    assert lost(copy=('in',)) == {'in'} and lost(copy=('in', 'd/file')) == set()
