"""Files to machines and back: byte for byte, frozen, sent once, and replacing nothing."""
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import rig
from batching import (
    NO_GPU,
    RESULTS,
    assert_clean,
    events,
    places,
    result,
    tree_of,
    wait_until,
)

import ssh_scheduler

BIG = 300_000           # more than goes through the channel


@pytest.fixture(params=['channel', 'rsync', 'tar', 'localhost', 'localhost rsync',
                        'localhost tar'])
def way(request, lab, lab1, project, client_home, tmp_path):
    """Return (machine, its home, environment of the client); padding forces rsync or tar."""
    kind = request.param
    if kind in ('rsync', 'tar', 'localhost rsync', 'localhost tar'):
        (project / 'padding').write_bytes(random.Random(1).randbytes(BIG))
    env = {}
    if kind in ('localhost', 'localhost tar'):      # without rsync, tar fetches files
        env['PATH'] = str(rig.farm(tmp_path / 'bin', ('ssh', 'rsync', 'nvidia-smi')))
    if kind.startswith('localhost'):
        return 'localhost', client_home, env
    machine = lab(leave_out=('rsync',)) if kind == 'tar' else lab1
    return machine, machine.home, env


def as_usual_here(tree):
    """Return a result of tree_of without the permissions that the client's umask removes."""
    os.umask(mask := os.umask(0o77))
    return {path: what if what[0] == 'link' else (what[0], what[1] & ~mask, *what[2:])
            for path, what in tree.items()}


def work_folders(home):
    """Return the folders of this test's jobs in the home of a machine."""
    return sorted(path for path in home.glob(
        f'.ssh_scheduler/{ssh_scheduler.project_name()}/jobs/work.*')
        if ssh_scheduler.FOLDER.fullmatch(path.name))


def spy(folder, name, script):
    """Put a script in front of the program `name`, and return the PATH with it."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f'#!/bin/bash\nreal={rig.program(name)}\n{script}\n')
    file.chmod(0o755)
    return {'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}'}


# ---- A nasty tree ----

NASTY = [b'new\nline', b' blanks ', b'-dash', b'#hash', b';semicolon', b'\xff\xfe not UTF-8',
         b'x' * 255, b'tab\there', b'back\\slash', b'*star?', b'[bracket', b'quotes\'"`', b'!bang',
         'ünïcödé→🚀'.encode(), b'$HOME ${x} $(y)', b'a\rb', b'~', b'host:path', b'.hidden',
         b'.-', b'%s%n', b'{a,b}', b'...', b'\\012', b'\x01\x7f', b'trailing\n', b'::', b'+', b'@']


def make_nasty_tree(project):
    base = os.fsencode(project)
    for number, name in enumerate(NASTY):
        path = os.path.join(base, b'files', name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(b'%d\0\n' % number * number)
        os.chmod(path, [0o644, 0o755, 0o600, 0o444, 0o777][number % 5])
        os.utime(path, ns=(0, [0, 1, 1_234_567_890_123_456_789, 4_102_444_800 * 10**9][number % 4]
                           + number * 1001))
        folder = os.path.join(base, b'folders', name)
        os.makedirs(os.path.join(folder, b'empty'))
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(name)
        os.chmod(folder, [0o755, 0o700, 0o750][number % 3])
        os.makedirs(os.path.join(base, b'links'), exist_ok=True)
        link = os.path.join(base, b'links', name)
        os.symlink([b'../files/' + name, b'no such\nfile', b'../folders/' + name][number % 3], link)
        os.utime(link, ns=(0, 10**18 + number), follow_symlinks=False)
    os.makedirs(os.path.join(base, b'-rf', b'--delete'))
    Path('-e', ).write_text('an option?')


def test_a_nasty_tree_goes_and_comes_byte_for_byte(batches, project, gate, way):
    machine, home, env = way
    make_nasty_tree(project)
    batch = batches.start([f'{gate.wait("here")}; {gate.wait("go")}'], [machine], *NO_GPU,
                          '--copy-backwards', '.', env=env)
    sent = tree_of('.')
    sent = {path: what for path, what in sent.items() if not path.startswith(b'job_results')}
    batch.until('started:')
    gate.open('here')               # the job runs, so its folder is complete
    (work,) = work_folders(home)
    arrived = tree_of(work)
    gate.open('go')
    done = batch.end()
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    assert arrived == sent
    assert tree_of(RESULTS / 'batch.sh.1') == as_usual_here(sent)
    files = sum(1 for what in sent.values() if what[0] != 'folder')
    size = sum(len(what[-1]) for what in sent.values() if what[0] == 'file')
    assert f'sent {files} files, {size / 1000:.1f} kB' in done.stderr


def test_nasty_names_that_a_job_made_come_back(batches, project, way):
    machine, _home, env = way
    make_nasty_tree(project)
    for name in ('files', 'folders', 'links'):
        shutil.move(name, f'../{name}')
    lines = [f'cp -a {project.parent}/files {project.parent}/folders {project.parent}/links .']
    done = batches.run(lines, [machine], *NO_GPU, env=env)
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    made = {path: what for path, what in tree_of('..').items()
            if path.split(b'/')[0] in (b'files', b'folders', b'links')}
    assert tree_of(RESULTS / 'batch.sh.1') == as_usual_here(made)


# ---- What is sent ----

def test_git_and_results_are_never_sent_and_patterns_leave_out(batches, project, lab1):
    for name in ('.git/config', 'sub/.git/config', 'job_results/old/file', 'keep.txt', 'a.log',
                 'sub/b.log', 'sub/keep.py', 'build/out', 'sub/build', 'secret', 'sub/secret',
                 'sub/deep/secret', 'job_results.txt', '.gitignore'):
        file = project / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (project / 'sub/.rsync-filter').write_text('# ours\n- /secret\n+ keep.py\n')
    done = batches.run(['find . ! -type d | sort'], [lab1], *NO_GPU,
                       '--exclude', '*.log', 'build/')
    assert result('batch.sh.1').decode().split() == [
        './.gitignore', './batch.sh', './job_results.txt', './keep.txt', './secret',
        './sub/.rsync-filter', './sub/build', './sub/deep/secret', './sub/keep.py']
    assert '.git' in done.stderr and 'exclude' in done.stderr


def test_only_the_named_paths_go(batches, project, lab1):
    for name in ('one/a', 'one/b', 'two/c', 'three', 'four'):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(name)
    batches.run(['find . -type f | sort; cat one/a'], [lab1], *NO_GPU, '--copy-forwards', 'one',
                f'{project}/two/c', './three')
    assert result('batch.sh.1').decode().split() == ['./one/a', './one/b', './three', './two/c',
                                                     'one/a']
    (RESULTS / 'batch.sh.1').rmdir()        # empty, since the job changed no file


def test_links_that_are_named_arrive_as_links(batches, project, lab1):
    (project / 'real').mkdir()
    (project / 'real/file').write_text('x')
    (project / 'link').symlink_to('real')
    batches.run(['readlink link; cat link/file'], [lab1], *NO_GPU)
    assert result('batch.sh.1') == b'real\nx'


def test_links_that_jobs_cannot_follow_are_told_once(batches, run_cli, project, lab1, lab2):
    (project.parent / 'outside').mkdir()
    (project / 'sets').mkdir()
    (project / 'sets/data').write_text('x')
    (project / 'a').symlink_to('../outside')
    (project / 'b').symlink_to('a')
    (project / 'c').symlink_to(project / 'sets/data')
    (project / 'd').symlink_to('sets/data')
    (project / 'e').symlink_to('nowhere')
    lines = ['cat d', "execute_remote --copy-forwards c --job-name other 'true'"]
    done = batches.run(lines, [lab1, lab2], *NO_GPU)
    warning = ('jobs cannot follow 3 links, because the target is not sent: a -> ../outside, b -> '
               f'a, c -> {project}/sets/data. A link into this folder must be relative: ln -srfn '
               'sets/data c. Move the files into this folder (and name large data with '
               '--link-forwards), or leave out the links with --exclude')
    warnings = [line for line in done.stderr.splitlines() if 'WARNING' in line]
    assert (done.returncode, warnings) == (0, [f'WARNING: {warning}'])
    subprocess.run(['ln', '-srfn', 'sets/data', 'c'], check=True)
    shutil.rmtree(RESULTS)
    done = batches.run(['cat c'], [lab1, lab2], *NO_GPU, '--exclude', '/a', '/b')
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    for command, option in (('execute_to', '--machines'), ('execute_remote', '--machine')):
        done = run_cli(command, '--copy-forwards', 'd', option, lab1.yaml(), '--', 'true')
        assert ('WARNING: jobs cannot follow 1 link, because the target is not sent: '
                'd -> sets/data. Move') in done.stderr


def test_a_machine_file_with_variables_that_is_sent_is_told_once(batches, run_cli, project, lab1,
                                                                 lab2):
    for lab, env in (lab1, {'TOKEN': 'secret'}), (lab2, None):
        shutil.copy(lab.yaml(env=env), project / f'{lab.name}.yaml')
    options, lines = ('--machines', 'lab1', 'lab2', *NO_GPU), ['true', "execute_remote -- 'true'"]
    Path('batch.sh').write_text('\n'.join(lines))
    done = run_cli('execute_batch', 'batch.sh', *options)
    warnings = [line for line in done.stderr.splitlines() if 'WARNING' in line]
    text = ('lab1.yaml has env, and is sent to the machines with the other files. If env has '
            'secrets, move it to the folder where --machines looks, too: mkdir -p ~/.local/var && '
            'mv -i lab1.yaml ~/.local/var/')
    assert (done.returncode, warnings) == (0, [f'WARNING: {text}']), done.stderr
    done = run_cli('execute_remote', '--machine', 'lab1', '--', 'true')
    assert f'WARNING: {text}' in done.stderr
    for words in (['--exclude', 'lab1.yaml'], ['--copy-forwards', 'batch.sh']):
        done = run_cli('execute_remote', '--machine', 'lab1', *words, '--', 'echo "$TOKEN"')
        assert (done.stdout, 'WARNING' in done.stderr) == ('secret\n', False), done.stderr
    shutil.rmtree(RESULTS)
    subprocess.run(text.rpartition(': ')[2], shell=True, check=True, env={
        **os.environ, 'HOME': str(project.parent)})
    done = run_cli('execute_batch', 'batch.sh', *options, env={'HOME': str(project.parent)})
    assert (done.returncode, 'WARNING' in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize('size', [10, BIG], ids=['small', 'large'])
def test_linked_paths_are_sent_once_and_not_brought_back(batches, project, lab1, gate, size):
    (project / 'sets/mnist').mkdir(parents=True)
    (project / 'sets/mnist/data').write_bytes(bytes(size))
    (project / 'sets/other').write_text('copied')
    lines = ['[ -L sets/mnist ] && wc -c <sets/mnist/data; cat sets/other; echo 1 >new',
             'find . | sort; stat -L -c %i sets/mnist/data', 'stat -L -c %i sets/mnist/data']
    options = ['--link-forwards', 'sets/mnist', *NO_GPU]
    done = batches.run(lines, [lab1], *options)
    assert done.returncode == 0, done.stderr
    assert result('batch.sh.1').decode() == f'{size}\ncopied'
    *listed, inode = result('batch.sh.2').decode().split()
    assert listed == ['.', './batch.sh', './sets', './sets/mnist', './sets/other']
    assert result('batch.sh.3').decode().strip() == inode
    assert set(tree_of(RESULTS / 'batch.sh.1')) == {b'new'}
    assert set(tree_of(RESULTS / 'batch.sh.2')) == set()
    shutil.rmtree(RESULTS)
    batches.run(lines[:1], [lab1], *options, '--copy-backwards', '.')
    assert set(tree_of(RESULTS / 'batch.sh.1')) == {b'new', b'batch.sh', b'sets', b'sets/other'}


@pytest.mark.parametrize('options, words', [
    (['--copy-forwards', 'missing'], '--copy-forwards missing: there is no such file or folder'),
    (['--link-forwards', 'missing'], '--link-forwards missing: there is no such file or folder'),
    (['--copy-forwards', '..'], 'lies outside the current folder'),
    (['--copy-forwards', '/etc/passwd'], 'lies outside the current folder'),
    (['--copy-forwards', 'out'], 'lies outside the current folder'),
    (['--copy-forwards', '.git'], '.git is never sent'),
    (['--copy-backwards', '../x'], 'lies outside the current folder'),
])
def test_a_path_that_cannot_be_sent_is_an_error_without_a_login(batches, project, lab1, options,
                                                               words):
    (project / '.git').mkdir()
    (project / 'out').symlink_to('/etc')
    before = lab1.logins()
    done = batches.run(['true'], [lab1], *NO_GPU, *options)
    assert (done.returncode, done.stdout, lab1.logins()) == (2, '', before)
    (line,) = done.stderr.splitlines()
    assert words in line
    assert not RESULTS.exists()


def test_a_home_folder_is_not_sent(batches, lab1, client_home, monkeypatch):
    monkeypatch.chdir(client_home)
    before = lab1.logins()
    done = batches.run(['true'], [lab1], *NO_GPU)
    assert (done.returncode, lab1.logins()) == (2, before)
    assert f'all of {client_home} would be sent' in done.stderr
    named = batches.run(['ls'], [lab1], *NO_GPU, '--copy-forwards', 'batch.sh')
    assert (named.returncode, result('batch.sh.1')) == (0, b'batch.sh\n')


@pytest.mark.parametrize('size', [10, BIG], ids=['small', 'large'])
def test_what_was_sent_is_frozen(batches, project, lab1, gate, size):
    (project / 'config').write_bytes(b'old' + bytes(size))
    batch = batches.start([gate.wait('a'), 'head -c 3 config; ls'], [lab1.yaml(max_jobs=1)],
                          *NO_GPU)
    batch.until('started:')
    (project / 'config').write_bytes(b'new')
    (project / 'later').write_text('too late')
    gate.open('a')
    assert batch.end().returncode == 0
    assert result('batch.sh.2') == b'oldbatch.sh\nconfig\n'


def test_a_job_cannot_spoil_the_files_of_the_next(batches, project, lab1):
    (project / 'data').write_bytes(b'good' + bytes(BIG))
    spoil = 'head -c 4 data; echo; printf evil | dd of=data conv=notrunc 2>&-; rm batch.sh; ls'
    machine = lab1.yaml(max_jobs=1)
    for _ in range(2):          # the second round uses the cache
        batches.run([spoil, spoil], [machine], *NO_GPU)
        assert [result(f'batch.sh.{n}') for n in (1, 2)] == [b'good\ndata\n'] * 2
        shutil.rmtree(RESULTS)


def copies(done):
    """Return the number of rsyncs that a run with --verbose started."""
    return sum(' rsync ' in line for line in events(done.stderr, '+'))


def test_large_files_go_only_where_a_job_may_run(batches, project, lab):
    useless, useful = lab(), lab(gpus=rig.fake_gpus(1))
    (project / 'data').write_bytes(bytes(BIG))
    lines = ['wc -c <data', "execute_remote --num-gpus=2 --job-name two 'true'"]
    done = batches.run(lines[:1], [useless, useful], '--copy-backwards', '--verbose')
    assert (done.returncode, result('batch.sh.1')) == (0, b'%d\n' % BIG), done.stderr
    assert copies(done) == 1 and f'{useful.yaml()}: sent 2 files' in done.stderr
    assert places(useless.home) == {}
    done = batches.run(lines[1:], [useless, useful], '--verbose')
    assert (done.returncode, copies(done)) == (2, 0) and 'no machine has that' in done.stderr


@pytest.mark.parametrize('live', [True, False])
def test_large_files_go_where_there_may_be_room_later(batches, project, lab, gate, live):
    full, free = lab(gpus=rig.fake_gpus(1, memory_free_mb=10)), lab(gpus=rig.fake_gpus(1))
    (project / 'data').write_bytes(bytes(BIG))
    batch = batches.start([gate.wait('a')] * 2, [full, free], '--copy-backwards', '--verbose',
                          *['--no-live'] * (not live))
    batch.until('started:')
    if live:
        wait_until(lambda: [*full.home.glob('.ssh_scheduler/*/stage/*/copy/data')], 'its files')
    gate.open('a')
    batch.until('started:')
    gate.open('a')
    done = batch.end()
    assert (done.returncode, copies(done)) == (0, 1 + live)


def test_a_job_that_runs_already_gets_no_files(batches, project, lab, gate):
    machine = lab()
    (project / 'data').write_bytes(bytes(BIG))
    batch = batches.start([gate.wait('a')], [machine], *NO_GPU, '--copy-backwards')
    batch.until('started:')
    batch.process.kill()
    batch.process.wait()
    again = batches.start(None, [machine], *NO_GPU, '--copy-backwards', '--verbose')
    again.until('running:')
    gate.open('a')
    done = again.end()
    assert (done.returncode, copies(done), 'sent' in done.stderr) == (0, 0, False)


# ---- Only the difference is sent again ----

# Runs a program, passes its streams through, and adds a line with the number of bytes.
COUNT = """
import os, subprocess, sys, threading
log, *argv = sys.argv[1:]
child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
counts = [0, 0]
def copy(number, source, target):
    while True:
        data = os.read(source, 65536)
        counts[number] += len(data)
        if not data:
            return os.close(target)
        while data:
            data = data[os.write(target, data):]
threading.Thread(target=copy, args=(0, 0, child.stdin.fileno()), daemon=True).start()
back = threading.Thread(target=copy, args=(1, child.stdout.fileno(), 1))
back.start()
status = child.wait()
with open(log, 'a') as out:
    print(sum(counts), file=out)
back.join()
os._exit(status)
"""


@pytest.mark.parametrize('known', [True, False])
def test_many_files_come_back_whatever_rsync_knows(batches, lab1, tmp_path, known):
    """rsync checks many names slowly, so the client turns the check off if rsync has the option."""
    env = spy(tmp_path / 'spies', 'rsync', (
        'words=()\n'
        'for word; do\n'
        '  [[ $word == --trust-sender ]] || { words+=("$word"); continue; }\n'
        f'  {":" if known else "exit 1"}\n'
        'done\n'
        'exec "$real" "${words[@]}"'))
    done = batches.run([f'touch {{1..{ssh_scheduler.MANY_NAMES + 1}}}'], [lab1], *NO_GPU,
                       '--verbose', env=env)
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    assert len(os.listdir(RESULTS / 'batch.sh.1')) == ssh_scheduler.MANY_NAMES + 1
    copies = ['--trust-sender' in line for line in events(done.stderr, '+') if ' rsync ' in line]
    trusts = ssh_scheduler.confine('.') is not None
    assert copies == [True] * trusts + [False] * (not (trusts and known))


def test_a_second_batch_sends_only_the_difference(batches, project, lab, tmp_path, gate):
    machine = lab()
    log = tmp_path / 'bytes'
    (tmp_path / 'count.py').write_text(COUNT)
    env = spy(tmp_path / 'spies', 'ssh', (
        'case "$*" in *ssh-scheduler-copy*) ;; *) exec "$real" "$@" ;; esac\n'
        f'exec {sys.executable} {tmp_path}/count.py {log} "$real" "$@"'))
    data = bytearray(random.Random(2).randbytes(20_000_000))
    (project / 'data').write_bytes(data)
    (project / 'same').write_bytes(data[:1_000_000])

    def wire_bytes(copies):
        counts = log.read_text().split()
        assert len(counts) == copies
        return sum(map(int, counts))

    def file_there(name):
        (cached,) = machine.home.glob(f'.ssh_scheduler/*/cache/copy/{name}')
        return cached

    done = batches.run(['cksum <data >sum'], [machine], *NO_GPU, '--copy-backwards', env=env)
    first = wire_bytes(1)
    assert done.returncode == 0
    assert first > 21_000_000
    inode = file_there('same').stat().st_ino

    data[5_000_000:5_000_010] = b'0123456789'
    (project / 'data').write_bytes(data)
    shutil.rmtree(RESULTS)
    batch = batches.start([f'cmp data {project}/data && {gate.wait("a")}'], [machine], *NO_GPU,
                          '--copy-backwards', env=env)
    batch.until('started:')
    (staged,) = machine.home.glob('.ssh_scheduler/*/stage/*/copy/same')
    assert staged.stat().st_ino == inode        # a hard link into the cache
    gate.open('a')
    done = batch.end()
    assert done.returncode == 0, done.stderr
    assert wire_bytes(2) - first < 500_000
    assert (file_there('same').stat().st_ino, file_there('data').read_bytes()) == (inode, data)
    assert_clean(machine, cache=True)
    (kept,) = machine.home.glob('.ssh_scheduler/*')
    assert sum(f.stat().st_size for f in kept.rglob('*') if f.is_file()) < 21_100_000


def test_what_is_gone_here_is_gone_there(batches, project, lab):
    machine = lab()
    for name in ('a', 'b'):
        (project / name).write_bytes(bytes(BIG))
    batches.run(['ls'], [machine], *NO_GPU)
    (project / 'a').unlink()
    batches.run(['true', 'ls -1'], [machine], *NO_GPU)
    assert (result('batch.sh.1'), result('batch.sh.2')) == (b'a\nb\nbatch.sh\n', b'b\nbatch.sh\n')


# ---- What comes back ----

def test_by_default_what_was_made_or_changed_comes(batches, project, way):
    machine, _home, env = way
    for name in ('untouched', 'same_size', 'touched', 'grown', 'gone', 'dir/old', 'same/again',
                 'link_target'):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text('x')
        os.utime(name, ns=(0, 1_600_000_000_123_456_789))
    for name in ('link', 'link2'):
        (project / name).symlink_to('link_target')
    (project / 'empty').mkdir()
    lines = ['printf y >same_size; touch touched; echo more >>grown; rm gone; mkdir new_empty;'
             'mkdir -p dir/sub; echo 1 >dir/sub/new; touch -r untouched same/again;'
             'printf z >same/again; touch -r untouched same/again; ln -sfn untouched link2;'
             'chmod 755 link_target; mkfifo fifo; echo out',
             'echo failed >made; exit 1', 'true']
    done = batches.run(lines, [machine], *NO_GPU, env=env)
    assert done.returncode == 1
    assert set(tree_of(RESULTS / 'batch.sh.1')) == {
        b'same_size', b'touched', b'grown', b'new_empty', b'dir', b'dir/sub', b'dir/sub/new',
        b'link2'}
    assert (RESULTS / 'batch.sh.1/grown').read_text() == 'xmore\n'
    assert os.readlink(RESULTS / 'batch.sh.1/link2') == 'untouched'
    assert set(tree_of(RESULTS / 'batch.sh.2')) == {b'made'}
    assert set(tree_of(RESULTS / 'batch.sh.3')) == set()
    (warning,) = [line for line in done.stderr.splitlines() if 'WARNING' in line]
    assert warning.startswith('WARNING: batch.sh.1: ') and 'fifo is no file' in warning


def test_named_paths_come_whole_and_missing_ones_are_named(batches, project, lab1):
    (project / 'model').mkdir()
    (project / 'model/config').write_text('as it was sent')
    lines = ['echo 1 >model/weights; echo 2 >other; mkdir -p a/b; echo 3 >a/b/c',
             'echo 1 >model/weights; exit 2']
    done = batches.run(lines, [lab1], *NO_GPU, '--copy-backwards', 'model', 'a/b', './log file')
    assert done.returncode == 1
    assert set(tree_of(RESULTS / 'batch.sh.1')) == {
        b'model', b'model/config', b'model/weights', b'a', b'a/b', b'a/b/c'}
    assert set(tree_of(RESULTS / 'batch.sh.2')) == {b'model', b'model/config', b'model/weights'}
    warnings = sorted(line for line in done.stderr.splitlines() if 'WARNING' in line)
    assert [line.split(', so')[0] for line in warnings] == [
        'WARNING: batch.sh.1: it did not make log file',
        'WARNING: batch.sh.2: it did not make a/b', 'WARNING: batch.sh.2: it did not make log file']


@pytest.mark.parametrize('leave_out', [(), ('rsync',)], ids=['rsync', 'tar'])
def test_a_pattern_fetches_what_it_matches(batches, lab, leave_out):
    machine = lab(leave_out=leave_out)
    lines = ["mkdir res; echo >res/a.csv; echo >$'b c\\n\\xff.csv'; echo >res/log; echo >.csv",
             'echo 5 >a.csv; exit 2']
    done = batches.run(lines, [machine], *NO_GPU, '--copy-backwards', '*.csv', 'r?s/[a-c]*',
                       'res/l*g')
    assert set(tree_of(RESULTS / 'batch.sh.1')) == {b'res', b'res/a.csv', b'res/log',
                                                    b'b c\n\xff.csv'}
    assert set(tree_of(RESULTS / 'batch.sh.2')) == {b'a.csv'}
    warnings = sorted(line for line in done.stderr.splitlines() if 'WARNING' in line)
    assert [line.split(', so')[0] for line in warnings] == [
        'WARNING: batch.sh.2: it did not make r?s/[a-c]*', 'WARNING: batch.sh.2: it did not make '
        'res/l*g']


@pytest.mark.parametrize('leave_out', [(), ('rsync',)], ids=['rsync', 'tar'])
def test_hard_links_and_paths_named_twice_come(batches, lab, leave_out):
    machine = lab(leave_out=leave_out)
    lines = ['mkdir a; echo x >a/b; ln a/b a/c; ln -s b a/d']
    done = batches.run(lines, [machine], *NO_GPU, '--copy-backwards', 'a', 'a/b', 'a/d', '.')
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    assert set(tree_of(RESULTS / 'batch.sh.1/a')) == {b'b', b'c', b'd'}
    assert (RESULTS / 'batch.sh.1/a/c').read_text() == 'x\n'


def test_nothing_comes_with_the_bare_option(batches, lab1):
    done = batches.run(['echo 1 >made; echo out'], [lab1], *NO_GPU, '--copy-backwards')
    assert done.returncode == 0
    assert result('batch.sh.1') == b'out\n'
    assert not os.path.lexists(RESULTS / 'batch.sh.1')


def test_three_hundred_results_come_with_few_rsyncs(batches, lab):
    machine = lab()
    lines = [f'echo {n} >made.{n}; mkdir d; seq 1000 >d/{n}' for n in range(300)]
    done = batches.run(lines, [machine], '--no-gpu-required', '--memory-required=10',
                       '--num-cpus=0.1', '--copy-forwards', '--verbose')
    assert (done.returncode, machine.logins()) == (0, 1), done.stderr[-3000:]
    for n in range(300):
        assert (RESULTS / f'batch.sh.{n + 1}/made.{n}').read_text() == f'{n}\n'
        assert (RESULTS / f'batch.sh.{n + 1}/d/{n}').stat().st_size == 3893
    assert 1 <= done.stderr.count('+ rsync ') <= 25
    assert_clean(machine)


def test_a_folder_appears_complete_or_not_at_all(batches, lab, gate):
    machine = lab()
    make = 'for n in {1..1500}; do echo $n >"$n has a rather long name"; done'
    batch = batches.start([f'{gate.wait("a")}; {make}'],
                          [machine], *NO_GPU)
    batch.until('started:')
    gate.open('a')
    folder = RESULTS / 'batch.sh.1'
    wait_until(folder.exists, folder)
    assert len(list(folder.iterdir())) == 1500
    assert batch.end().returncode == 0


def test_streams_grow_while_a_job_runs(batches, lab1, gate):
    lines = [f'echo first; echo error >&2; {gate.wait("a")}; seq 60000; {gate.wait("b")}; '
             'echo last; head -c 100 /dev/zero']
    batch = batches.start(lines, [lab1], *NO_GPU)
    batch.until('started:')
    out, err = RESULTS / 'batch.sh.1.out', RESULTS / 'batch.sh.1.err'
    wait_until(lambda: out.exists() and out.read_bytes() == b'first\n', 'the first line')
    wait_until(lambda: err.exists() and err.read_bytes() == b'error\n', 'the first complaint')
    assert not os.path.lexists(RESULTS / 'batch.sh.1')
    gate.open('a')
    numbers = b''.join(b'%d\n' % n for n in range(1, 60001))
    wait_until(lambda: out.read_bytes() == b'first\n' + numbers, 'more than one piece')
    gate.open('b')
    assert batch.end().returncode == 0
    assert out.read_bytes() == b'first\n' + numbers + b'last\n' + bytes(100)
    assert err.read_bytes() == b'error\n'


@pytest.fixture
def mask():
    """Set the umask of the client; a machine has a different one."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def modes_of(*paths):
    return [oct(stat.S_IMODE((RESULTS / path).stat().st_mode)) for path in paths]


def test_results_have_the_permissions_that_the_umask_here_leaves(batches, project, way, mask):
    machine, _home, env = way
    lines = ['seq 1000; seq 1000 >&2; umask 0; mkdir d d/locked; echo >plain; echo >d/program;'
             'echo >secret; echo >d/locked/file; chmod 777 d/program; chmod 600 secret;'
             'chmod 555 d/locked', 'echo short; echo short >&2']
    done = batches.run(lines, [machine], *NO_GPU, env=env)
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    assert modes_of('batch.sh.1.out', 'batch.sh.1.err', 'batch.sh.2.out', 'batch.sh.2.err') == [
        '0o640'] * 4
    assert modes_of(*(f'batch.sh.1{path}' for path in (
        '', '/d', '/plain', '/d/program', '/secret', '/d/locked'))) == [
        '0o750', '0o750', '0o640', '0o750', '0o600', '0o550']


def test_the_permissions_of_a_stream_stay_as_they_were_while_it_grew(batches, lab1, gate):
    batch = batches.start([f'echo begun >&2; {gate.wait("a")}; seq 1000 >&2'], [lab1], *NO_GPU)
    err = RESULTS / 'batch.sh.1.err'
    wait_until(lambda: err.exists() and err.read_bytes() == b'begun\n', 'the first line')
    before = modes_of('batch.sh.1.err')
    gate.open('a')
    assert batch.end().returncode == 0
    assert err.stat().st_size > 3000 and modes_of('batch.sh.1.err') == before


# ---- Nothing that exists is replaced ----

@pytest.mark.parametrize('what', ['file', 'empty folder', 'full folder', 'dangling link', '.out',
                                  '.err'])
def test_existing_results_are_skipped(batches, lab1, what):
    name = RESULTS / 'batch.sh.1'
    RESULTS.mkdir()
    if what == 'file':
        name.write_text('mine')
    elif what.endswith('folder'):
        name.mkdir()
        if what == 'full folder':
            (name / 'mine').write_text('mine')
    elif what == 'dangling link':
        name.symlink_to('nowhere')
    else:
        Path(f'{name}{what}').write_text('mine')
    before = tree_of(RESULTS)
    done = batches.run(['echo replaced; echo >made', 'echo second'], [lab1], *NO_GPU)
    assert ('WARNING: job results already exists for line 1, skipping evaluation: delete if you '
            'wish to rerun') in done.stdout.splitlines()
    assert events(done.stdout, 'started:') == ['started: batch.sh.2;  echo second']
    after = tree_of(RESULTS)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if path.startswith(b'batch.sh.1') and path not in before]


def test_results_of_another_command_are_kept_and_the_new_one_is_run(batches, lab1):
    batches.run(['echo one', 'echo two'], [lab1], *NO_GPU)
    done = batches.run(['echo one', 'echo 2'], [lab1], *NO_GPU)
    warnings = events(done.stdout, 'WARNING:')
    assert warnings[0] == ('WARNING: job results already exists for line 1, skipping evaluation: '
                           'delete if you wish to rerun')
    assert len(warnings) == 1 and 'line 2: batch.sh.2-2' in done.stderr
    assert (result('batch.sh.2'), result('batch.sh.2-2')) == (b'two\n', b'2\n')
    assert events(done.stdout, 'started:') == ['started: batch.sh.2-2;  echo 2']


def test_what_appears_while_a_job_runs_is_not_replaced_either(batches, lab, gate):
    lab1 = lab()
    lines = [f'{gate.wait("a")}; echo run >made', 'echo other >made']
    batch = batches.start(lines, [lab1], *NO_GPU)
    batch.until('finished: batch.sh.2')
    (RESULTS / 'batch.sh.1').mkdir()
    (RESULTS / 'batch.sh.1/mine').write_text('mine')
    gate.open('a')
    done = batch.end()
    assert done.returncode in (1, 2)
    assert 'Traceback' not in done.stderr
    assert 'another program made job_results/batch.sh.1' in done.stderr
    assert set(tree_of(RESULTS / 'batch.sh.1')) == {b'mine'}
    assert (RESULTS / 'batch.sh.2/made').read_text() == 'other\n'
    shutil.rmtree(RESULTS / 'batch.sh.1')
    again = batches.run(None, [lab1], *NO_GPU)      # a second start would wait for ever
    assert again.returncode == 0
    assert (RESULTS / 'batch.sh.1/made').read_text() == 'run\n'
    assert_clean(lab1)


@pytest.mark.parametrize('what', ['a file', 'read-only'])
def test_job_results_that_cannot_be_used(batches, lab1, what):
    if what == 'a file':
        RESULTS.write_text('mine')
    elif os.getuid() == 0:
        pytest.skip('root may write anywhere')
    else:
        RESULTS.mkdir()
        RESULTS.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = lab1.logins()
    done = batches.run(['true'], [lab1], *NO_GPU)
    assert (done.returncode, done.stdout, lab1.logins()) == (2, '', before)
    (line,) = done.stderr.splitlines()
    assert 'job_results, where results go, cannot be used' in line


def test_results_on_localhost_leave_nothing_behind(batches, project, client_home):
    (project / 'data').write_bytes(bytes(BIG))
    done = batches.run(['cp data copy'], ['localhost'], *NO_GPU)
    assert done.returncode == 0
    assert (RESULTS / 'batch.sh.1/copy').read_bytes() == bytes(BIG)
    assert set().union(*places(client_home).values()) <= {'cache'}
    assert not list((client_home / 'tmp').iterdir())


def test_results_that_cannot_come_stay_there_until_they_can(batches, lab):
    machine = lab(sshd_options='MaxSessions 1')         # no room for a copy beside the channel
    key = machine.folder / 'client_key.pub'             # without it, no other login
    done = batches.run([f'mv {key} {key}.away; echo made >made; echo $$'], [machine], *NO_GPU)
    assert done.returncode == 1
    assert 'batch.sh.1: its results could not be fetched: ' in done.stderr
    assert not os.path.lexists(RESULTS / 'batch.sh.1')
    pid = [file.read_text() for file in machine.home.glob('.ssh_scheduler/*/jobs/*.out')]
    os.rename(f'{key}.away', key)
    again = batches.run(None, [machine], *NO_GPU)
    assert again.returncode == 0, again.stderr
    assert (RESULTS / 'batch.sh.1/made').read_text() == 'made\n'
    assert [result('batch.sh.1').decode()] == pid       # the job did not run again


@pytest.mark.parametrize('mode', [0, 0o300, 0o400])
def test_what_a_job_shut_comes_with_the_permissions_that_it_has(batches, lab, project, mode, way):
    """A job removes permissions from its files: they are fetched even if no login is root."""
    machine, _home, env = way
    if os.getuid() == 0 and isinstance(machine, rig.Machine):
        machine = lab(uid=20001, leave_out=machine.leave_out)
    mode = oct(mode)[2:].rjust(3, '0')
    (project / 'sent').mkdir()
    (project / 'sent/kept').write_text('as it was sent')
    job = ('mkdir -p shut/in; echo x >shut/in/x; touch -d @1 shut/in/x; echo y >sent/new;'
           f'echo z >secret; chmod {mode} secret shut/in; chmod {mode} shut sent; echo done')
    for named in ([], ['--copy-backwards', 'shut/in', 'secret', 'sent/new']):
        done = batches.run([job], [machine], *NO_GPU, *named, env=env)
        assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
        folders = [RESULTS / f'batch.sh.1/{name}' for name in ('shut', 'shut/in', 'sent')]
        for folder in folders:
            now = oct(stat.S_IMODE(folder.stat().st_mode))[2:].rjust(3, '0')
            assert now == mode or named and folder != folders[1]        # above a named path
            folder.chmod(0o700)
        secret = RESULTS / 'batch.sh.1/secret'
        assert oct(stat.S_IMODE(secret.stat().st_mode))[2:].rjust(3, '0') in (mode, '300')
        assert [(folder / name).read_text() for folder, name in zip(
            folders[1:], ('x', 'new'))] == ['x\n', 'y\n']
        assert os.listdir(folders[2]) == ['new'] and (folders[1] / 'x').stat().st_mtime == 1
        secret.chmod(0o600)
        assert secret.read_text() == 'z\n'
        if isinstance(machine, rig.Machine):
            assert_clean(machine, cache=True)
        shutil.rmtree(RESULTS)


def test_what_comes_of_a_folder_of_its_own_that_a_job_shut(batches, lab):
    machine = lab(uid=20001) if os.getuid() == 0 else lab()
    done = batches.run(['echo x >made; chmod 0 .'], [machine], *NO_GPU, '--copy-forwards')
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    assert (RESULTS / 'batch.sh.1/made').read_text() == 'x\n'


@pytest.fixture(params=['rsync', 'tar'])
def other_login(request, lab):
    """A machine on which root may leave files that its login cannot read."""
    if os.getuid() != 0:
        pytest.skip('only root can make files of another user')
    return lab(uid=20001, leave_out=('rsync',) if request.param == 'tar' else ())


def left_by_root(machine):
    """Leave files of root in the job's folder, as a container does; return the folder."""
    (work,) = work_folders(machine.home)
    (work / 'root/deep').mkdir(parents=True)
    (work / 'root/deep/model').write_text('m' * 1000)
    (work / 'open').mkdir()
    (work / 'open/secret').write_text('s')
    for path, mode in (('root/deep/model', 0o644), ('root', 0o700), ('open/secret', 0o600)):
        (work / path).chmod(mode)
    return work


@pytest.mark.parametrize('paths', [(), ('root/deep', 'open', 'fine')], ids=['all', 'named'])
def test_what_the_login_cannot_read_is_kept_and_fetched_when_it_can(batches, other_login, gate,
                                                                    paths):
    machine, options = other_login, (*NO_GPU, '--copy-forwards')
    options += ('--copy-backwards', *paths) if paths else ()
    batch = batches.start([f'echo y >fine; {gate.wait("a")}; echo ran'], [machine], *options)
    batch.until('started:')
    wait_until(lambda: work_folders(machine.home), 'its folder')
    wait_until(lambda: (work_folders(machine.home)[0] / 'fine').exists(), 'its file')
    work = left_by_root(machine)
    gate.open('a')
    first = batch.end()
    for done in (first, batches.run(None, [machine], *options)):    # nothing has changed meanwhile
        assert done.returncode == 0, done.stderr
        (warning,) = [line for line in done.stderr.splitlines() if line.startswith('WARNING: ')]
        assert f'batch.sh.1: the login on {machine.yaml()} may not read ' in warning, warning
        assert 'open/secret, root' in warning or 'root, open/secret' in warning, warning
        assert warning.endswith(f' in {work}') and (work / 'root/deep/model').exists()
        assert sorted(map(str, (RESULTS / 'batch.sh.1').rglob('*'))) == [
            f'job_results/batch.sh.1/{name}' for name in ('fine', 'open')]

    (work / 'open/secret').chmod(0o644)
    second = batches.run(None, [machine], *options)
    assert 'may not read root, so' in second.stderr, second.stderr
    assert (RESULTS / 'batch.sh.1/open/secret').read_text() == 's'

    (RESULTS / 'batch.sh.1/fine').unlink()      # a fetched file is not fetched again
    (work / 'root').chmod(0o755)
    for path in (work / 'open', *(work / 'open').iterdir(), work / 'root', *(
            work / 'root').rglob('*')):
        os.chown(path, 20001, 20001)            # else the login could not remove it
    third = batches.run(None, [machine], *options)
    assert (third.returncode, third.stderr.count('WARNING')) == (0, 0), third.stderr
    assert 'skipping evaluation' in third.stdout and 'started:' not in third.stdout
    assert (RESULTS / 'batch.sh.1/root/deep/model').read_text() == 'm' * 1000
    assert not (RESULTS / 'batch.sh.1/fine').exists()
    assert result('batch.sh.1') == b'ran\n'
    assert_clean(machine)
    before = machine.logins()
    batches.run(None, [machine], *options)
    assert machine.logins() == before           # nothing is left to be fetched


@pytest.fixture
def with_kept(batches, other_login, gate):
    """(machine, options, folder) of a batch whose job left files that the login cannot read."""
    options = (*NO_GPU, '--copy-forwards')
    batch = batches.start([f'echo y >fine; {gate.wait("a")}; echo ran'], [other_login], *options)
    wait_until(lambda: work_folders(other_login.home), 'its folder')
    wait_until(lambda: (work_folders(other_login.home)[0] / 'fine').exists(), 'its file')
    work = left_by_root(other_login)
    gate.open('a')
    assert 'may not read ' in batch.end().stderr
    return other_login, options, work


def test_what_was_kept_and_is_gone_with_its_folder_is_told(batches, with_kept):
    machine, options, work = with_kept
    shutil.rmtree(work.parent)
    done = batches.run(None, [machine], *options)
    for path in ('open/secret', 'root'):
        assert (f'{path}, which could not be fetched before, is not on {machine.yaml()} any more'
                in done.stderr), done.stderr
    assert_clean(machine)


def test_what_was_kept_is_no_job_of_another_journal(run_cli, with_kept):
    machine, _options, work = with_kept
    done = run_cli('execute_batch', '--machines', machine.yaml(), '--earlier=collect')
    assert done.returncode == 0 and 'no jobs of an earlier' in done.stderr, done.stderr
    shutil.rmtree(work.parent)


def test_what_was_kept_goes_when_its_line_runs_again(batches, gate, with_kept):
    machine, options, work = with_kept
    for path in (work / 'open', *(work / 'open').iterdir(), work / 'root', *(
            work / 'root').rglob('*')):
        os.chown(path, 20001, 20001)
    for path in RESULTS.glob('batch.sh.1*'):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    batch = batches.start(None, [machine], *options)
    batch.until('started:')
    gate.open('a')
    assert batch.end().returncode == 0
    assert_clean(machine)


def test_what_was_kept_and_is_gone_or_is_another_here_is_told(batches, lab, gate):
    if os.getuid() != 0:
        pytest.skip('only root can make files of another user')
    machine, options = lab(uid=20001), (*NO_GPU, '--copy-forwards')
    batch = batches.start([f'echo y >fine; {gate.wait("a")}'], [machine], *options)
    batch.until('started:')
    wait_until(lambda: work_folders(machine.home) and (
        work_folders(machine.home)[0] / 'fine').exists(), 'its file')
    work = left_by_root(machine)
    gate.open('a')
    batch.end()
    (work / 'open/secret').unlink()
    (work / 'root').chmod(0o755)
    (RESULTS / 'batch.sh.1/root/deep').mkdir(parents=True)
    (RESULTS / 'batch.sh.1/root/deep/model').write_text('mine')
    done = batches.run(None, [machine], *options)
    assert 'open/secret, which could not be fetched before, is not on ' in done.stderr
    assert 'has another root/deep/model than ' in done.stderr
    assert (RESULTS / 'batch.sh.1/root/deep/model').read_text() == 'mine'
    (RESULTS / 'batch.sh.1/root/deep/model').unlink()
    done = batches.run(None, [machine], *options)
    assert done.stderr.count('WARNING') == 0, done.stderr
    assert (RESULTS / 'batch.sh.1/root/deep/model').read_text() == 'm' * 1000
