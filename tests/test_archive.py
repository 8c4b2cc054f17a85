"""Archives: GNU tar reads the program's, and the program unpacks hostile ones without harm."""
import io
import os
import shutil
import stat
import subprocess
import tarfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ssh_scheduler
from ssh_scheduler import Entry

ANY = settings(deadline=None, derandomize=True, max_examples=60,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

NASTY = [b'plain', b'new\nline', b' blanks  ', b'-rf', b'--', b'#note', b';note', b'\xff\xfe\x80',
         'é€\U0001f600'.encode(), b'*?[a]', b'$(a)`b`', b"it's \"so\"", b'\\n\\',
         b'tab\t\r\x1b[31m', b'a=b', b'%s', b'~', b'...', b'x' * 255, 'ü'.encode() * 127]
LONG = [b'/'.join([b'd' * 60, b'e' * 60]), b'/'.join([b'f' * 90] * 3 + [b'\xe9' * 100]),
        b'/'.join([b'g' * 200] * 6)]
TIMES = [0, 1, 999_999_999, 10**9, 1234567890123456789, 1700000000000000001, -1, -500_000_000,
         -1_500_000_000, 2**33 * 10**9 + 5]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    folder = tmp_path / 'here'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def make_tree():
    """Fill the current folder with files that are hard to pack."""
    here = os.fsencode(os.getcwd())
    for number, name in enumerate(NASTY + LONG):
        path = os.path.join(here, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(bytes([number]) * (number * 100 if number % 3 else 512 * number))
        os.chmod(path, [0o644, 0o755, 0o600, 0o444][number % 4])
        os.symlink(name, os.path.join(here, b'link%d' % number))
        os.utime(path, ns=(0, TIMES[number % len(TIMES)]))
    os.mkdir('empty')
    os.makedirs('nested/empty/\n')
    for number, target in enumerate(('/', '../..', 'nowhere', 'empty', 'x' * 300, ' \n', '-rf')):
        os.symlink(target, f'to{number}')
    os.chmod('nested', 0o500)
    os.utime('empty', ns=(0, 1111111111222222222))


def what_lies_in(folder):
    """Return {path: (type and mode, time, content)}: an archive must preserve these."""
    found = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            path = os.path.join(parent, name)
            info = os.lstat(path)
            mode = stat.S_IFMT(info.st_mode), stat.S_IMODE(info.st_mode)
            content = None
            if stat.S_ISLNK(info.st_mode):
                mode, content = mode[:1], os.readlink(path)
            elif stat.S_ISREG(info.st_mode):
                with open(path, 'rb') as file:
                    content = file.read()
            found[os.path.relpath(path, os.fsencode(folder))] = mode, info.st_mtime_ns, content
    return found


def archive_of(paths=('.',)):
    entries = ssh_scheduler.scan_tree(paths, ()).entries
    return b''.join(ssh_scheduler.archive((entry.path, entry) for entry in entries))


def untar(data, folder):
    """Extract as the machine does."""
    os.mkdir(folder)
    done = subprocess.run(['tar', '-xpof', '-', '-C', str(folder)], input=data,
                          capture_output=True)
    assert done.returncode == 0, done.stderr


def unpack(data, folder):
    """Extract as the client does, into a new folder; return the names that were refused."""
    os.mkdir(folder)
    path = f'{folder}.tar'
    with open(path, 'wb') as file:
        file.write(data)
    return ssh_scheduler.unpack_archive(path, str(folder))


# ---- Archives of the program, read by GNU tar ----

def test_a_nasty_tree_is_the_same_after_tar(here, tmp_path):
    make_tree()
    untar(archive_of(), tmp_path / 'there')
    assert what_lies_in(tmp_path / 'there') == what_lies_in(here)
    os.chmod('nested', 0o700)
    os.chmod(tmp_path / 'there' / 'nested', 0o700)


def test_a_nasty_tree_is_the_same_after_our_own_unpacking(here, tmp_path):
    make_tree()
    assert unpack(archive_of(), tmp_path / 'there') == []
    assert what_lies_in(tmp_path / 'there') == what_lies_in(here)
    os.chmod('nested', 0o700)
    os.chmod(tmp_path / 'there' / 'nested', 0o700)


def test_names_in_the_archive_may_be_others(here, tmp_path):
    (here / 'a').write_bytes(b'1')
    (entry,) = ssh_scheduler.scan_tree(('a',), ()).entries
    untar(b''.join(ssh_scheduler.archive([('copy/x', entry), ('link/y', entry)])),
          tmp_path / 'there')
    assert (tmp_path / 'there' / 'copy' / 'x').read_bytes() == b'1'
    assert (tmp_path / 'there' / 'link' / 'y').read_bytes() == b'1'


def test_an_archive_of_nothing_is_one(here, tmp_path):
    data = b''.join(ssh_scheduler.archive(()))
    untar(data, tmp_path / 'there')
    assert unpack(data, tmp_path / 'too') == []
    assert os.listdir(tmp_path / 'there') == os.listdir(tmp_path / 'too') == []


RAW_NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: not set(name) & set(b'/\0') and name not in (b'.', b'..', b'.git'))


@ANY
@given(names=st.lists(RAW_NAMES, min_size=1, max_size=4, unique=True),
       ns=st.integers(-10**18, 10**19), size=st.integers(0, 70000), target=RAW_NAMES)
def test_any_names_and_times_come_through_tar(tmp_path, here, names, ns, size, target):
    content = os.urandom(16) * (size // 16 + 1)
    for name in names:
        with open(name, 'wb') as file:
            file.write(content[:size])
        os.utime(name, ns=(0, ns))
    os.symlink(target, b'd' * 250)
    data = archive_of()
    untar(data, tmp_path / 'there')
    assert unpack(data, tmp_path / 'here too') == []
    try:
        assert what_lies_in(tmp_path / 'there') == what_lies_in(here)
        assert what_lies_in(tmp_path / 'here too') == what_lies_in(here)
    finally:
        for folder in (tmp_path / 'there', tmp_path / 'here too', here):
            shutil.rmtree(folder)
        here.mkdir()
        os.chdir(here)


# ---- Files that change while they are packed ----

@pytest.mark.parametrize('size', [0, 1, 511, 512, 513, 2**16, 2**16 + 1, 200_000])
@pytest.mark.parametrize('change', [-100_000, -1, 0, 1, 100_000])
def test_a_file_that_changes_spoils_no_other(here, tmp_path, size, change):
    (here / 'a').write_bytes(b'1' * size)
    (here / 'b').write_bytes(b'2')
    entries = ssh_scheduler.scan_tree(('a', 'b'), ()).entries
    now = max(size + change, 0)
    (here / 'a').write_bytes(b'1' * now)
    untar(b''.join(ssh_scheduler.archive((e.path, e) for e in entries)), tmp_path / 'there')
    expected = (b'1' * min(size, now)).ljust(size, b'\0')
    assert (tmp_path / 'there' / 'a').read_bytes() == expected
    assert (tmp_path / 'there' / 'b').read_bytes() == b'2'


def test_a_file_that_is_gone_spoils_no_other(here, tmp_path):
    for path in ('a', 'd/a', 'e/a', 'z'):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        (here / path).write_bytes(b'1' * 600)
    entries = ssh_scheduler.scan_tree(('.',), ()).entries
    os.remove('a')
    shutil.rmtree('d')
    shutil.rmtree('e')
    (here / 'e').write_bytes(b'no folder any more')
    untar(b''.join(ssh_scheduler.archive((e.path, e) for e in entries)), tmp_path / 'there')
    assert set(what_lies_in(tmp_path / 'there')) == {b'd', b'e', b'z'}
    assert (tmp_path / 'there' / 'z').read_bytes() == b'1' * 600


def test_a_large_file_is_not_held_in_memory(here):
    with open('a', 'wb') as file:
        file.truncate(50 * 2**20)
    entry = Entry('a', 'f', 50 * 2**20)
    sizes = [len(piece) for piece in ssh_scheduler.archive([('a', entry)])]
    assert max(sizes) <= 2**16 and sum(sizes) % 512 == 0 and sum(sizes) >= 50 * 2**20


# ---- Archives of GNU tar, unpacked by the program ----

@pytest.mark.parametrize('format_', ['gnu', 'oldgnu', 'pax'])
def test_an_archive_of_gnu_tar_is_unpacked(here, tmp_path, format_):
    make_tree()
    if format_ != 'pax':                # the other formats have whole seconds
        for path in what_lies_in(here):
            ns = max(os.lstat(path).st_mtime_ns, 0) // 10**9 * 10**9
            os.utime(path, ns=(0, ns), follow_symlinks=False)
    names = b''.join(path + b'\0' for path in sorted(what_lies_in(here)))
    data = subprocess.run(
        ['tar', '-c', f'--format={format_}', '--null', '--no-recursion', '-T', '-', '-f', '-'],
        input=names, capture_output=True, check=True).stdout
    assert unpack(data, tmp_path / 'there') == []
    assert what_lies_in(tmp_path / 'there') == what_lies_in(here)
    os.chmod('nested', 0o700)
    os.chmod(tmp_path / 'there' / 'nested', 0o700)


def test_a_whole_folder_with_its_dot_is_unpacked(here, tmp_path):
    os.makedirs('a/b')
    (here / 'a' / 'c').write_bytes(b'1')
    data = subprocess.run(['tar', '-c', '-f', '-', '.'], stdout=subprocess.PIPE, check=True).stdout
    assert unpack(data, tmp_path / 'there') == []
    assert set(what_lies_in(tmp_path / 'there')) == {b'a', b'a/b', b'a/c'}


def test_a_path_without_its_folder_is_unpacked(here, tmp_path):
    os.makedirs('a/b')
    (here / 'a' / 'b' / 'c').write_bytes(b'1')
    data = subprocess.run(['tar', '-c', '-f', '-', './a/b/c'], stdout=subprocess.PIPE,
                          check=True).stdout
    assert unpack(data, tmp_path / 'there') == []
    assert (tmp_path / 'there/a/b/c').read_bytes() == b'1'


# ---- Archives from a machine that is not trusted ----

def member(name, kind=tarfile.REGTYPE, link='', content=b'', mode=0o777, **pax):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(content), mode
    info.pax_headers = pax
    return info, content


def packed(*members):
    """Return an archive of these members, without any check."""
    data = io.BytesIO()
    for info, content in members:
        data.write(info.tobuf(tarfile.PAX_FORMAT, 'utf-8', 'surrogateescape'))
        data.write(content + bytes(-len(content) % 512))
    return data.getvalue() + bytes(1024)


@pytest.fixture
def outside(tmp_path):
    """Make a folder that must stay unchanged; tests unpack into its neighbour 'in'."""
    folder = tmp_path / 'outside'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'file').write_bytes(b'mine')
    os.chmod(folder, 0o750)
    before = what_lies_in(tmp_path), os.stat(folder)
    yield folder
    found = what_lies_in(tmp_path)
    mine = {path: known for path, known in found.items() if path.split(b'/')[0] != b'in'}
    mine.pop(b'in.tar', None)
    assert mine == before[0], 'something outside was touched'
    assert os.stat(folder).st_mtime_ns == before[1].st_mtime_ns


LINK, HARD, FOLDER = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
HOSTILE = {
    'parent': ([member('../x', content=b'1')], ['../x']),
    'parent inside': ([member('a/../../x', content=b'1')], ['a/../../x']),
    'parent folder': ([member('a/..', FOLDER)], ['a/..']),
    'through a link': ([member('a', LINK, '../outside'), member('a/x', content=b'1')], ['a/x']),
    'over what is behind a link': (
        [member('a', LINK, '../outside'), member('a/file', content=b'1')], ['a/file']),
    'folders through a link': (
        [member('a', LINK, '../outside'), member('a/b/c/x', content=b'1'),
         member('a/b/d', FOLDER)], ['a/b/c/x', 'a/b/d']),
    'a folder over a link': (
        [member('a', LINK, '../outside'), member('a', FOLDER, mode=0o777, mtime='1')], ['a']),
    'a folder over a link to itself': ([member('a', LINK, 'a'), member('a', FOLDER)], ['a']),
    'through two links': (
        [member('a', LINK, '.'), member('a/b', LINK, '../outside'), member('b/x')], ['a/b']),
    'through a link inside': (
        [member('d', FOLDER), member('a', LINK, 'd'), member('a/x', content=b'1')], ['a/x']),
    'through a dangling link': (
        [member('a', LINK, '../outside/new'), member('a/x'), member('a', FOLDER)], ['a/x', 'a']),
    'a file over a link': (
        [member('a', LINK, '../outside/file'), member('a', content=b'1')], []),
    'a file over a dangling link': (
        [member('a', LINK, '../outside/new'), member('a', content=b'1')], []),
    'a hard link': (
        [member('a', HARD, '../outside/file'), member('b', HARD, 'a')], ['a', 'b']),
    'devices': ([member('a', tarfile.CHRTYPE), member('b', tarfile.BLKTYPE),
                 member('c', tarfile.FIFOTYPE)], ['a', 'b', 'c']),
    'an unknown kind': ([member('a', b'Z')], None),
    'below a file': ([member('a'), member('a/b', content=b'1')], ['a/b']),
    'a folder over a file': ([member('a'), member('a', FOLDER)], ['a']),
    'a NUL': ([member('x', path='a\0b', content=b'1'), member('l', LINK, linkpath='a\0b')],
              ['a\0b', 'l']),
    'the folder itself': ([member('.', FOLDER, mode=0), member('./', FOLDER, mode=0)], []),
    'twice': ([member('a', content=b'1'), member('a', content=b'2'), member('./a')], []),
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_a_hostile_archive_writes_nothing_outside(tmp_path, outside, kind):
    members, refused = HOSTILE[kind]
    said = unpack(packed(*members, member('last', content=b'good')), tmp_path / 'in')
    if refused is not None:
        assert said == refused
    assert (tmp_path / 'in' / 'last').read_bytes() == b'good'       # the good member is extracted
    for _, (mode, _, content) in what_lies_in(tmp_path / 'in').items():
        assert mode[0] in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
        assert content != b'2'
    assert os.stat(tmp_path / 'in').st_mode & 0o777 != 0


def test_absolute_paths_are_refused(tmp_path, outside):
    name = f'{outside}/x'
    members = [member(name, content=b'1'), member('//x'), member('a', path=f'{outside}/y')]
    assert unpack(packed(*members), tmp_path / 'in') == [name, '//x', f'{outside}/y']


def test_no_file_becomes_another_user_s_power(tmp_path, outside):
    unpack(packed(member('a', mode=0o6777), member('d', FOLDER, mode=0o7777)), tmp_path / 'in')
    assert [os.stat(tmp_path / 'in' / name).st_mode & 0o7777 for name in 'ad'] == [0o777, 0o777]


@pytest.mark.parametrize('mtime', ['nan', 'inf', '-inf', '1e300', '9' * 400, '-5', 'x', '', '1.5x'])
def test_a_time_of_any_kind_is_no_crash(tmp_path, outside, mtime):
    data = packed(member('a', content=b'1', mtime=mtime), member('d', FOLDER, mtime=mtime))
    assert unpack(data, tmp_path / 'in') == []
    assert (tmp_path / 'in' / 'a').read_bytes() == b'1'


STEPS = st.lists(st.builds(
    member, st.sampled_from(['a', 'b', 'a/b', 'a/b/c', 'b/a', '../outside/x', './a', 'a//b', '/x',
                             'a/../b', '..', 'a/.']),
    st.sampled_from([tarfile.REGTYPE, LINK, LINK, HARD, FOLDER]),
    st.sampled_from(['', 'a', 'b', '..', '../outside', '../outside/file', '/', '.', '../in',
                     '../outside/new']), mode=st.sampled_from([0o777, 0o500, 0])), max_size=6)


@settings(ANY, max_examples=250)
@given(members=STEPS)
@example(members=[])
def test_no_sequence_of_members_writes_outside(tmp_path, outside, members):
    before = what_lies_in(outside), os.stat(outside)
    receiver = ssh_scheduler.TarReceiver(str(tmp_path / 'in.tar'), 'token')
    receiver.receive(b'\ntoken\n' + packed(*members))
    os.mkdir(tmp_path / 'in')
    try:
        receiver.unpack(str(tmp_path / 'in'))
        after = what_lies_in(outside), os.stat(outside)
        assert after[0] == before[0]
        assert (after[1].st_mode, after[1].st_mtime_ns) == (before[1].st_mode,
                                                             before[1].st_mtime_ns)
        assert sorted(os.listdir(tmp_path)) == ['in', 'outside']
    finally:
        subprocess.run(['chmod', '-R', 'u+rwx', str(tmp_path / 'in')], check=True)
        shutil.rmtree(tmp_path / 'in')


# ---- TarReceiver: the archive behind its first line ----

WHOLE = packed(member('a', content=b'x' * 700), member('d', FOLDER), member('d/b', content=b'y'))


@ANY
@given(noise=st.binary(max_size=40), cuts=st.lists(st.integers(0, len(WHOLE) + 50), max_size=6))
def test_a_receiver_takes_bytes_in_any_pieces(tmp_path, noise, cuts):
    data = noise + b'\ntoken\n' + WHOLE
    ends = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    receiver = ssh_scheduler.TarReceiver(str(tmp_path / 'in.tar'), 'token')
    for start, end in zip(ends, ends[1:]):
        receiver.receive(data[start:end])
    os.mkdir(tmp_path / 'in')
    assert receiver.unpack(str(tmp_path / 'in')) == [] and receiver.trouble == ''
    assert set(what_lies_in(tmp_path / 'in')) == {b'a', b'd', b'd/b'}
    shutil.rmtree(tmp_path / 'in')


@ANY
@given(data=st.binary(max_size=600), at=st.integers(0, len(WHOLE)), cut=st.booleans())
def test_a_broken_archive_is_a_trouble_and_no_crash(tmp_path, data, at, cut):
    receiver = ssh_scheduler.TarReceiver(str(tmp_path / 'in.tar'), 'token')
    receiver.receive(b'\ntoken\n' + WHOLE[:at] + data + (b'' if cut else WHOLE[at + len(data):]))
    os.mkdir(tmp_path / 'in')
    receiver.unpack(str(tmp_path / 'in'))
    assert receiver.trouble.isprintable() and os.listdir(tmp_path) == ['in']
    subprocess.run(['chmod', '-R', 'u+rwx', str(tmp_path / 'in')], check=True)
    shutil.rmtree(tmp_path / 'in')


def test_a_receiver_that_heard_nothing_says_so(tmp_path):
    receiver = ssh_scheduler.TarReceiver(str(tmp_path / 'in.tar'), 'token')
    receiver.receive(b'Welcome\ntoke')
    assert receiver.unpack(str(tmp_path)) == [] and receiver.trouble == 'nothing arrived'
    for _ in range(300):
        receiver.receive(b'noise' * 1000)
    assert len(receiver._behind.head) <= ssh_scheduler.LONGEST_NOISE + 5000
    receiver.receive(b'x' * ssh_scheduler.LONGEST_NOISE + b'\ntok')
    receiver.receive(b'en\n' + WHOLE)
    os.mkdir(tmp_path / 'in')
    receiver.trouble = ''
    assert receiver.unpack(str(tmp_path / 'in')) == [] and receiver.trouble == ''
    assert (tmp_path / 'in' / 'a').read_bytes() == b'x' * 700


def test_a_receiver_that_cannot_be_written_says_so(tmp_path):
    receiver = ssh_scheduler.TarReceiver(str(tmp_path / 'none' / 'in.tar'), 'token')
    receiver.receive(b'\ntoken\n' + WHOLE)
    assert receiver.trouble == 'No such file or directory'
