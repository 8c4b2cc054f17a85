"""The client on a computer without Linux, as far as one can test without a Mac: other_client.py
removes the features that a Mac lacks, one by one and all at once, and every command must work.
"""
import os
import resource
import shutil
from pathlib import Path

import other_client
import pytest
import rig
from batching import NO_GPU, RESULTS, result

import ssh_scheduler as s

MAC = 'names platform proc library files kqueue zombies'
PARTS = [part.__name__ for part in other_client.PARTS if part.__name__ != 'case']

# The real rsync, but it refuses the options of a pattern with the words of these versions.
RSYNCS = {
    '2.6.9': ('-@*|--trust-sender', 'rsync: $word: unknown option\nrsync error: syntax or usage '
              'error (code 1) at /SourceCache/rsync/rsync-52/rsync/main.c(1333) [client=2.6.9]'),
    'openrsync': ('-@*|--trust-sender|--no-D|--from0|--files-from=*',
                  "rsync: unrecognized option \\`$word'\nusage: rsync [-46aDdgIlLoprtuvWxz] [-e"),
}


@pytest.fixture
def scheduler():
    return Path(other_client.__file__)


@pytest.fixture
def client(tmp_path, client_home):
    """client(lacks, rsync): return the environment of a client that lacks these parts."""
    def make(lacks, rsync=''):
        folder = tmp_path / 'programs'
        folder.mkdir()
        rig.put(folder / 'bash', '#!/bin/sh\necho "an old bash is used here" >&2; exit 99\n', 0o755)
        if rsync in RSYNCS:
            pattern, complaint = RSYNCS[rsync]
            rig.put(folder / 'rsync', f'''#!/bin/sh
for word; do case $word in {pattern}) printf '%s\\n' "{complaint}" >&2; exit 1; esac; done
exec {shutil.which("rsync")} "$@"
''', 0o755)
        # As long as TMPDIR on a Mac, where the path of a socket has at most 104 bytes.
        temporary = client_home / 'var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T'
        temporary.mkdir(parents=True)
        return {'CLIENT_LACKS': lacks, 'TMPDIR': f'{temporary}/',
                'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}'}
    return make


def check_all_commands(run_cli, env, machine, project):
    """Run each command; copy files too large for the channel both ways; return the traces."""
    data = os.urandom(300_000)
    (project / 'data').write_bytes(data)
    (project / 'batch.sh').write_text('cat data data >twice\nsleep 0.5; echo {1..900}\n')
    there = machine.yaml()
    done = run_cli('execute_batch', 'batch.sh', *NO_GPU, '--verbose', '--machines', there, env=env)
    assert (done.returncode, 'WARNING' in done.stderr) == (0, False), done.stderr
    assert (RESULTS / 'batch.sh.1/twice').read_bytes() == data * 2
    assert result('batch.sh.2').split()[-1] == b'900'
    said = [done.stderr]
    done = run_cli('execute_remote', '--machine', there, '--job-name', 'one', '--verbose', '--',
                   'sleep 0.3; md5sum <data; cat data data >twice; exit 3', env=env)
    assert done.returncode == 3, done.stderr
    assert done.stdout.endswith('  -\n') and len(done.stdout) == 36
    assert (RESULTS / 'one/twice').read_bytes() == data * 2
    said.append(done.stderr)
    done = run_cli('execute_to', '--verbose', '--machines', there, '--copy-forwards', 'data',
                   '--copy-backwards', 'twice', '--job-name', 'all', '--',
                   'cat data data >twice; echo fine', env=env)
    assert (done.returncode, done.stdout.count('fine')) == (0, 1), done.stderr
    assert [path.read_bytes() == data * 2 for path in RESULTS.glob('all_*/twice')] == [True]
    said.append(done.stderr)
    done = run_cli('query_machines', '--machines', there, env=env)
    assert done.returncode == 0, done.stderr
    return said


@pytest.mark.parametrize('lacks', ['', *PARTS, MAC, f'{MAC} ctypes'],
                         ids=['nothing', *PARTS, 'a Mac', 'all'])
def test_a_client_that_lacks_it(client, run_cli, lab1, project, lacks):
    check_all_commands(run_cli, client(lacks), lab1, project)


@pytest.mark.parametrize('lacks', ['', MAC], ids=['Linux', 'a Mac'])
@pytest.mark.parametrize('rsync', RSYNCS)
def test_an_rsync_that_knows_less_is_started_once(client, run_cli, lab1, project, rsync, lacks):
    """After rsync fails, tar copies; a test of rsync beforehand would cost a process each time."""
    for said in check_all_commands(run_cli, client(lacks, rsync), lab1, project):
        assert said.count('rsync ended with 1, now tar: ') == said.count('+ rsync ') == 1


@pytest.mark.parametrize('rsync', RSYNCS)
def test_an_rsync_that_knows_less_and_fetches_only(client, run_cli, lab1, project, rsync):
    (project / 'batch.sh').write_text('head -c 300000 /dev/zero >made\n')
    done = run_cli('execute_batch', 'batch.sh', *NO_GPU, '--verbose', '--machines', lab1.yaml(),
                   env=client('', rsync))
    assert (done.returncode, done.stderr.count('+ rsync ')) == (0, 1), done.stderr
    assert (RESULTS / 'batch.sh.1/made').read_bytes() == bytes(300_000)
    assert 'WARNING' not in done.stderr
    assert done.stderr.count('rsync ended with 1, now tar: ') == (rsync == 'openrsync')


@pytest.mark.parametrize('word', ['localhost', ':'])
@pytest.mark.parametrize('argv', [
    ('execute_batch', 'batch.sh', '--machines'), ('execute_to', '--', 'true', '--machines'),
    ('execute_remote', '--', 'true', '--machine'), ('query_machines', '--machines')],
    ids=lambda argv: argv[0])
def test_jobs_run_on_linux_machines(client, run_cli, project, argv, word):
    (project / 'batch.sh').write_text('true\n')
    command, *words = argv
    if '--' in words:           # words behind -- are no options
        words = [*words[2:], word, '--', 'true']
    else:
        words = [*words, word]
    done = run_cli(command, *words, env=client(MAC))
    assert (done.returncode, done.stdout, done.stderr) == (
        2, '', f'{command}: {word}: jobs run on Linux machines only, and this is Darwin. '
        'Name a machine that ssh can reach.\n')


@pytest.mark.parametrize('argv', [('execute_batch', 'batch.sh'), ('execute_to', 'true'),
                                  ('execute_remote', 'true'), ('query_machines',)])
def test_no_machine_is_named_where_that_could_not_be_localhost(client, run_cli, project, argv):
    done = run_cli(*argv, env=client(MAC))
    assert done.returncode == 2 and 'is missing. ' in done.stderr
    assert 'localhost' not in done.stderr.splitlines()[0]


def test_a_missing_program_is_not_looked_for_in_debian(client, run_cli, lab1, project):
    env = {**client(MAC), 'PATH': '/nowhere'}
    done = run_cli('query_machines', '--machines', lab1.yaml(), env=env)
    assert (done.returncode, done.stderr) == (
        2, 'query_machines: the program ssh is missing here. Install openssh-client.\n')


def test_the_end_of_a_file_that_is_the_input(client, start_cli, lab1, project):
    (project / 'input').write_bytes(os.urandom(300_000))
    with open('input', 'rb') as file:
        process = start_cli('execute_remote', '--machine', lab1.yaml(), '--stdin', '--', 'wc -c',
                            env=client('kqueue'), stdin=file)
        assert process.communicate(timeout=60)[0] == '300000\n'


def test_the_limit_of_open_files_is_one_that_the_system_takes(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    set_limit = resource.setrlimit
    monkeypatch.setattr(resource, 'setrlimit', set_limit)       # monkeypatch restores it at the end
    try:
        other_client.files()
        s.allow_files(3)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(10240, before[1])
    finally:
        set_limit(resource.RLIMIT_NOFILE, before)


# ---- File systems ----

def test_names_that_hfs_decomposes(tmp_path, monkeypatch):
    """HFS lists e and an accent where é was written."""
    (tmp_path / 'e\u0301').mkdir()
    (tmp_path / 'e\u0301/u\u0308').touch()
    monkeypatch.setattr(s, 'LINUX', False)
    assert [*s.vet(str(tmp_path), ['./\xe9/\xfc'])] == []


def test_names_that_differ_in_case_only_stay_there(client, run_cli, lab1, project, tmp_path):
    """The client's file system does not distinguish b and B, as on macOS or Windows below WSL."""
    env = client('case')
    rig.put(tmp_path / 'programs/rsync', f'''#!/bin/sh
{shutil.which("rsync")} "$@" || exit
for last; do :; done
case $last in *incoming*) cd "$last"work.* && mv b B; esac    # B came, then b as B
''', 0o755)
    (project / 'batch.sh').write_text('echo 1 >B; echo 2 >b; echo 3 >c\n')
    done = run_cli('execute_batch', 'batch.sh', *NO_GPU, '--copy-forwards', '--machines',
                   lab1.yaml(), env=env)
    warned = sorted(line for line in done.stderr.splitlines() if 'WARNING' in line)
    (line,) = warned
    assert line.startswith('WARNING: batch.sh.1: B, b could not be fetched: the file system here '
                           'does not distinguish names that differ in case only. It is kept on ')
    assert sorted(path.name for path in (RESULTS / 'batch.sh.1').iterdir()) == ['c']
    folder = Path(warned[0].rpartition(', in ')[2])
    assert [(folder / name).read_text() for name in 'Bb'] == ['1\n', '2\n']
    shutil.rmtree(folder.parent.parent)
