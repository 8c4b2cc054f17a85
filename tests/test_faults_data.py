"""Faults in what machines say and send, each named by its number; the matrix is in test_faults.py.

Rows 18, 33 - 37 and 40: logins, copies, hostile machines, names and GPUs.  The tests run the real
program over a real sshd; hostile programs stand first in the machine's PATH.
"""
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import rig
from batching import NO_GPU, RESULTS, assert_clean, constants, result, tree_of, wait_until
from commands import peak_mb
from ledgers import check_exactly_once, ledger_line
from test_copies import as_usual_here, make_nasty_tree, spy

import ssh_scheduler as s

BIG = 300_000           # more than goes through the channel
MUCH_MB = 150           # the program takes some 40 MB; no input may make it take more than this


PROGRAM = Path(__file__).with_name('crash.py')


def limits(smi_s, **more):
    """Return an environment with this limit for nvidia-smi and for the login shell."""
    limit = 'GPU_LIMIT_S=20 '
    assert limit in s.REMOTE_RUNNER
    return constants(REMOTE_RUNNER=s.REMOTE_RUNNER.replace(limit, f'GPU_LIMIT_S={smi_s} '), **more)


HASTY = limits(2, CONNECT_LIMIT_S=5.0)
LESS_HASTY = limits(6)          # a busy computer may take seconds for what works
PATIENT = constants(LATECOMER_S=30.0)   # each machine answers before the first one gets a job
hasty = pytest.mark.parametrize('scheduler', [PROGRAM], ids=['hasty'])      # with env=…


def put(machine, name, text):
    """Put a program on the machine, before all others of its name."""
    rig.put(machine.bin / name, text, 0o755)


def hostile(machine, name, code):
    """Put a program in Python on the machine; it begins with `import os, sys`."""
    put(machine, name, f'#!{sys.executable}\nimport os, sys\n{code}')


def complaints(done, machine):
    """Return the lines of stderr that name the machine."""
    return [line for line in done.stderr.splitlines()
            if str(machine.yaml()) in line and ': was not used: ' not in line]


def assert_plain(*texts):
    """Assert that the texts have no control characters but tabs and line ends."""
    for text in texts:
        assert not re.search(r'[\0-\x08\x0b-\x1f\x7f-\x9f]', text), repr(text)


# ---- 18: keys ----

def attempts(machine):
    """Return the number of connections, and that of refused keys."""
    log = machine.log.read_text()
    return log.count('Connection from'), len(re.findall('Failed publickey|Permission denied', log))


def other_key(folder, *options):
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', folder / 'key', *options],
                   check=True)
    return folder / 'key'


@hasty
@pytest.mark.parametrize('why, words', [
    ('wrong key', 'was refused (publickey was tried): is the user name right'),
    ('unknown host', 'is not known: log in once with ssh, and compare the key'),
    ('changed host key', 'has changed, so this may be another'),
], ids=['wrong', 'unknown host', 'changed host key'])
def test_18_a_refused_login_is_one_line_and_one_attempt(batches, lab, lab1, tmp_path, why,
                                                            words):
    machine, key = lab(), other_key(tmp_path)
    known = tmp_path / 'known'
    known.write_text('' if why == 'unknown host' else machine.known_hosts.read_text())
    if why == 'changed host key':
        kind, public, _ = key.with_suffix('.pub').read_text().split()
        known.write_text(f'[127.0.0.1]:{machine.port} {kind} {public}\n')
    machine.yaml(ssh_key_path=str(key if why == 'wrong key' else machine.key), ssh_options={
        'UserKnownHostsFile': str(known), 'StrictHostKeyChecking': 'yes'})
    file = machine.folder / f'{machine.name}.yaml'
    done = batches.run(['echo 1', 'echo 2'], [str(file), lab1], *NO_GPU, env=PATIENT)
    complaint, reminder = [line for line in done.stderr.splitlines() if str(file) in line]
    assert reminder.startswith(f'{file}: was not used: ') and words in reminder
    assert complaint.startswith(f'{file}: cannot be used: ') and words in complaint
    connections, refused = attempts(machine)
    assert connections == 1 and refused <= 1 and machine.logins() == 0
    assert (done.returncode, result('batch.sh.1'), result('batch.sh.2')) == (0, b'1\n', b'2\n')


@pytest.mark.parametrize('why, words', [
    ('0644', 'can be read by others, so ssh refuses it. Try: chmod 600'),
    ('passphrase', 'has a passphrase')], ids=['0644', 'passphrase'])
def test_18_a_key_that_cannot_be_used_is_one_line_and_no_attempt(batches, lab, tmp_path, why,
                                                                     words):
    key = other_key(tmp_path, *(['-N', 'secret'] if why == 'passphrase' else []))
    key.chmod(0o644 if why == '0644' else 0o600)
    machine, other = lab(), lab()
    file = machine.yaml(ssh_key_path=str(key))
    done = batches.run(['true'], [other, file], *NO_GPU)
    (line,) = [line for line in done.stderr.splitlines() if str(file) in line]
    assert done.returncode == 1 and words in line and str(key) in line
    assert attempts(machine) == (0, 0) and other.logins() == 1


# ---- 33: what a login does ----

INTERACTIVE = 'case $- in *i*) {};; esac\n'
TMUX = 'export TMUX_TMPDIR=$RIG_MACHINE; exec tmux'

LOGINS_THAT_WORK = {
    'noisy .bashrc': ('bash', '.bashrc', 'echo "Welcome!"; printf "no newline"; echo oh >&2\n'),
    'noisy fish': ('fish', '.config/fish/config.fish', 'echo Welcome; echo oh >&2\n'),
    'noisy tcsh': ('tcsh', '.tcshrc', 'echo Welcome\n'),
    'fish': ('fish', '.config/fish/config.fish', ''),
    'tcsh': ('tcsh', '.tcshrc', ''),
    'exit 0': ('bash', '.bashrc', INTERACTIVE.format('exit 0')),
    'read': ('bash', '.bashrc', INTERACTIVE.format('read -r line')),
    'sleep 30': ('bash', '.bashrc', INTERACTIVE.format('sleep 30')),
    'exec tmux': ('bash', '.bashrc', INTERACTIVE.format(TMUX)),
}
LOGINS_THAT_CANNOT = {
    'exit 0': ({'startup': {'.bashrc': 'exit 0\n'}}, 'is there an exit in one of its start files'),
    'read': ({'startup': {'.bashrc': 'read -r line\n'}},
             'does one of its start files, such as ~/.bashrc, wait or read?'),
    'sleep 30': ({'startup': {'.bashrc': 'sleep 30\n'}},
                 'does one of its start files, such as ~/.bashrc, wait or read?'),
    'exec tmux': ({'startup': {'.bashrc': f'{TMUX}\n'}}, 'is there an exit in one of its start'),
    'nologin': ({'shell': '/usr/sbin/nologin'}, 'this account allows no login'),
    'sftp-only': ({'sshd_options': 'ForceCommand internal-sftp'}, 'sftp only, no commands'),
    'forced': ({'sshd_options': 'ForceCommand cat >/dev/null'}, 'the login succeeded, but no '
               'command runs: does one of its start files, such as ~/.bashrc, wait or read? Or is '
               'another command forced on this login, by ForceCommand in sshd_config or command= '),
    'forced, speaks': ({'sshd_options': 'ForceCommand echo Choose a node:; exec cat >/dev/null'},
                       'wait or read? It printed: Choose a node: Or is another command forced'),
    'forced, ends': ({'sshd_options': 'ForceCommand echo Closed'}, 'such as ~/.bashrc, or another '
                     'command forced on this login, by ForceCommand in sshd_config'),
}


@hasty
@pytest.mark.parametrize('kind', LOGINS_THAT_WORK)
def test_33_a_login_that_does_odd_things_works(batches, lab, project, kind):
    data = random.Random(3).randbytes(BIG)
    (project / 'data').write_bytes(data)
    shell, file, text = LOGINS_THAT_WORK[kind]
    machine = lab(shell=rig.program(shell), startup={file: text, '.local/of_fish': ''})
    done = batches.run(['cp data copy; echo out; echo err >&2; exit 3', 'cmp data data'],
                       [machine], *NO_GPU, '--verbose', env=LESS_HASTY)
    assert done.returncode == 1 and 'batch.sh.1: exit code 3 on' in done.stdout, done.stderr
    assert (result('batch.sh.1'), result('batch.sh.1', 'err')) == (b'out\n', b'err\n')
    assert (RESULTS / 'batch.sh.1/copy').read_bytes() == data
    assert 'finished: batch.sh.2' in done.stdout and machine.logins() == 1
    assert ('+ rsync ' in done.stderr) == (not kind.startswith('noisy'))
    assert ('did not report its environment in time' in done.stderr) == (kind == 'sleep 30')
    assert_clean(machine, cache=True)


@hasty
def test_33_a_login_that_cannot_work_is_one_precise_line(batches, lab):
    machines = {kind: lab(**settings) for kind, (settings, _) in LOGINS_THAT_CANNOT.items()}
    done = batches.run(['true'], machines.values(), *NO_GPU, env=HASTY)
    assert done.returncode == 2 and done.stdout == ''
    for kind, (_, words) in LOGINS_THAT_CANNOT.items():
        (complaint,) = complaints(done, machines[kind])
        assert ': cannot be used: ' in complaint and words in complaint, (kind, complaint)
        assert machines[kind].logins() == 1


@hasty
def test_33_a_login_that_runs_no_command_is_named_before_it_is_given_up(batches, lab, gate,
                                                                        tmp_path):
    machine, good = lab(sshd_options='ForceCommand cat >/dev/null'), lab()
    with open(tmp_path / 'stderr', 'w') as errors:
        batch = batches.start([gate.wait('a')], [machine, good], *NO_GPU, stderr=errors, env={
            'CRASH_SETTINGS': json.dumps({'SLOW_LOGIN_S': 0.5, 'LATECOMER_S': 0.1})})
    batch.until('started: batch.sh.1')
    why = ('the login succeeded, but no command runs: does one of its start files, such as '
           '~/.bashrc, wait or read? Or is another command forced on this login')
    wait_until(lambda: f'{machine.yaml()}: no answer within 0 s, still waiting: {why}'
               in (tmp_path / 'stderr').read_text(), 'the warning')
    gate.open('a')
    assert batch.end().returncode == 0
    last = (tmp_path / 'stderr').read_text().splitlines()[-1]
    assert re.match(rf'{re.escape(str(machine.yaml()))}: did not answer within \d+ s; the batch '
                    rf'ended without it: {re.escape(why)}', last)


def test_33_noise_that_begins_later_makes_rsync_fall_back_to_tar(batches, lab):
    machine = lab(startup={'.bashrc': '[ ! -e ~/noisy ] || echo noise\n'})
    line = 'head -c 300000 /dev/zero >made; touch ~/noisy'
    done = batches.run([line], [machine], *NO_GPU, '--verbose')
    assert done.returncode == 0, done.stderr
    assert re.search(r'rsync ended with \d+, now tar', done.stderr)
    assert (RESULTS / 'batch.sh.1/made').read_bytes() == bytes(300_000)
    (machine.home / 'noisy').unlink()
    assert_clean(machine, cache=True)


# ---- 34: no rsync over there ----

OPENRSYNC = """#!/bin/bash
echo 'rsync: unknown option -- s' >&2
echo 'usage: openrsync [-aDgloprtvx] [-e program] [--del] [--rsync-path=prog] source ...' >&2
exit 1
"""


@pytest.mark.parametrize('stub', [None, OPENRSYNC], ids=['none', 'openrsync'])
def test_34_without_a_proper_rsync_the_result_is_the_same(batches, lab, project, stub):
    (project / 'padding').write_bytes(random.Random(4).randbytes(BIG))
    make_nasty_tree(project)
    usual, other = lab(), lab(leave_out=() if stub else ('rsync',))
    if stub:
        put(other, 'rsync', stub)
    trees = []
    for machine in (usual, other):
        done = batches.run(['mkdir made; cp -a files folders links padding made; ls -R'],
                           [machine], *NO_GPU, '--verbose')
        assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
        trees.append((tree_of(RESULTS / 'batch.sh.1'), result('batch.sh.1')))
        assert_clean(machine, cache=True)
        RESULTS.rename(f'../results of {machine.name}')
    assert len(trees[0][0]) > 100 and trees[0] == trees[1]
    assert ('now tar' in done.stderr) == bool(stub)


# ---- 35: a machine that means harm ----

FILE, FOLDER, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777
WORK = ['{work}', FOLDER, '']
MADE = '{work}/made'


@pytest.fixture
def canary(project):
    """Make a folder beside job_results; the test fails if anything changes it."""
    folder = project / 'canary'
    folder.mkdir()
    (folder / 'file').write_text('alive')
    os.utime(folder, ns=(10**18, 10**18))
    before = tree_of(folder), folder.stat().st_mtime_ns
    yield folder
    assert (tree_of(folder), folder.stat().st_mtime_ns) == before, 'the canary was touched'
    found = {path for path in tree_of(project.parent) if b'evil' in path}
    assert not found, found


@pytest.fixture
def fetch(batches, lab, lab1, canary, gate, tmp_path):
    """Fetch `made` of a job from a hostile machine, and of another job from a good one.

    Return the results of the first job, the warnings, which must name its machine, and stderr.
    """
    def run(meddle, line='echo good >made', env=None, **settings):
        machine = lab(**settings)
        meddle(machine)
        lines = [f'{meet}; [ "$RIG_MACHINE" != {machine.folder} ] || {{ {line}; echo here; exit; }}'
                 '; echo other >made' for meet in gate.meeting(2)]
        done = batches.run(lines, [machine.yaml(max_jobs=1), lab1.yaml(max_jobs=1)], *NO_GPU,
                           '--copy-forwards', '--verbose', env=env or trusting(tmp_path))
        assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
        assert_plain(done.stdout, done.stderr)
        bad, good = sorted(('batch.sh.1', 'batch.sh.2'), key=lambda job: result(job) == b'')
        assert tree_of(RESULTS / good)[b'made'][-1] == b'other\n'
        assert not [*RESULTS.glob('.ssh_scheduler/incoming*')]
        said = [text for text in done.stderr.splitlines() if text.startswith('WARNING')]
        assert all(str(machine.yaml()) in text for text in said), said
        return RESULTS / bad, ''.join(said), done.stderr

    return run


def trusting(folder):
    """Return an environment whose rsync trusts the sender, as older versions did."""
    return spy(folder / 'spies', 'rsync', (
        'case $("$real" --help) in *trust-sender*) set -- --trust-sender "$@" ;; esac\n'
        'exec "$real" "$@"'))


def sends(entries):
    """Return a function that lets the rsync of a machine send these entries."""
    def meddle(machine):
        file = machine.folder / 'entries.json'
        file.write_text(json.dumps(entries))
        put(machine, 'rsync', f'#!/bin/bash\nexec {sys.executable} '
            f'{Path(__file__).with_name("hostile_rsync.py")} {file} "$@"\n')
    return meddle


# The entries that the machine sends, and the complaint: of rsync, or of the client if rsync accepts
ATTACKS = {
    '..': ([['../../../canary/evil', FILE, '']], r'\.\./canary/evil'),
    '.. inside': ([[f'{MADE}/../../../../../canary/evil', FILE, '']], r'\.\./canary/evil|made'),
    'absolute': ([['{canary}/evil', FILE, '']], 'canary/evil|made'),
    'link and through it': (
        [WORK, [MADE, LINK, '{canary}'], [f'{MADE}/evil', FILE, '']],
        'made/evil|made .* leads out'),
    'folder that is a link': (
        [['{work}', LINK, '{canary}'], [MADE, FILE, '']], r'work\.\S*/made|made could not'),
    'twice, a link first': (
        [WORK, [MADE, LINK, '{canary}/file'], [MADE, FILE, '']], 'made .* leads out|^$'),
    'not asked for': (
        [WORK, [MADE, FILE, ''], ['{work}/evil', FILE, '']], 'evil from .* was not requested'),
    'beside its folder': ([['evil', FOLDER, ''], ['evil/evil', FILE, '']], 'made could not be fe'),
    'terminal escapes': ([WORK, ['{work}/\x1b[31mevil', FILE, '']],
                         r'\[31mevil from .* was not requested'),
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_35_a_hostile_rsync_writes_nothing_outside(fetch, canary, attack):
    """The machine speaks rsync's protocol, and sends unrequested files to a trusting rsync."""
    entries, words = ATTACKS[attack]
    entries = json.loads(json.dumps(entries).replace('{canary}', str(canary)))
    folder, said, _ = fetch(sends(entries))
    assert re.search(words, said), said
    assert set(tree_of(folder)) <= {b'made'}
    for what in tree_of(folder).values():       # good from tar, evil from the hostile rsync
        assert what[0] == 'file' and what[-1] in (b'good\n', b'evil\n')


def test_35_a_hostile_rsync_gives_no_rights_and_no_devices(fetch):
    kinds = {'fifo': stat.S_IFIFO | 0o644, 'disk': stat.S_IFBLK | 0o644, 'setuid': FILE | 0o6111,
             'device': stat.S_IFCHR | 0o644, 'twice': FILE}
    entries = [WORK, ['{work}/twice', FILE, ''], *(
        [f'{{work}}/{name}', mode, ''] for name, mode in kinds.items())]
    folder, said, _ = fetch(sends(entries), line='touch fifo disk setuid device twice')
    tree = tree_of(folder)
    assert {name: what[:2] for name, what in tree.items()} == {
        b'setuid': ('file', 0o755), b'twice': ('file', 0o644)}
    assert 'device, disk, fifo could not be fetched: ' in said


def test_35_an_rsync_with_a_hole_is_confined(fetch, canary, tmp_path):
    if s.confine(str(tmp_path)) is None:
        pytest.skip('this kernel has no Landlock')
    env = spy(tmp_path / 'holed', 'rsync', (
        f'echo evil >{canary}/evil && exit 3\n'
        f'echo evil >>{canary}/file && exit 3\nrm {canary}/file && exit 3\n'
        f'mv {canary}/file "${{!#}}" && exit 3\nln -s {canary} "${{!#}}/link" || exit 3\n'
        'echo evil >"${!#}/link/evil" && exit 3\nexit 12'))
    folder, _, trace = fetch(lambda machine: None, env=env)
    assert 'rsync ended with 12, now tar' in trace and 'evil: Permission denied' in trace
    assert (folder / 'made').read_text() == 'good\n'


HOSTILE_TAR = """
import json, tarfile
if '-c' not in sys.argv:
    os.execv(REAL, ['tar', *sys.argv[1:]])
work = sys.stdin.buffer.read().decode().split('\\0')[0].split('/')[1]
with open(ENTRIES) as file:
    for name, kind, mode, link in json.load(file):
        info = tarfile.TarInfo(name.replace('{work}', work))
        info.type, info.mode, info.linkname = kind.encode(), mode, link
        info.size = 5 if kind == '0' else 0
        sys.stdout.buffer.write(info.tobuf(tarfile.PAX_FORMAT, 'utf-8', 'surrogateescape'))
        sys.stdout.buffer.write(b'evil\\n'.ljust(512, b'\\0') if kind == '0' else b'')
sys.stdout.buffer.write(bytes(10240))
"""


def test_35_a_hostile_tar_writes_nothing_outside(fetch, canary):
    work = '{work}/'
    entries = [
        ['../../../canary/evil', '0', 0o644, ''], [f'{canary}/evil', '0', 0o644, ''],
        [f'{work}link', '2', 0o777, str(canary)], [f'{work}link/evil', '0', 0o644, ''],
        [f'{work}hard', '1', 0o644, f'{canary}/file'], [f'{work}hard', '0', 0o644, ''],
        [f'{work}fifo', '6', 0o644, ''], [f'{work}device', '3', 0o644, ''],
        [f'{work}made', '0', 0o6755, ''], [f'{work}made', '0', 0o6755, ''],
        [f'{work}\x1b[31mevil', '0', 0o644, ''], ['other/evil', '0', 0o644, '']]

    def meddle(machine):
        file = machine.folder / 'entries.json'
        file.write_text(json.dumps(entries))
        hostile(machine, 'tar', f'ENTRIES, REAL = {str(file)!r}, {rig.program("tar")!r}\n'
                + HOSTILE_TAR)

    folder, said, _ = fetch(meddle, line='touch made link hard fifo device', leave_out=('rsync',))
    tree = tree_of(folder)
    assert tree.pop(b'made')[:2] == ('file', 0o755)
    assert set(tree) <= {b'hard'}           # the second entry of that name, a file
    for name in ('canary/evil', 'link/evil', 'hard', 'fifo', 'device'):
        assert re.search(f'refused the file [^W]*{name}', said), (name, said)
    assert 'link' in said and '[31mevil' in said
    assert (canary / 'file').stat().st_nlink == 1


@pytest.mark.parametrize(('line', 'below'), [
    ('echo good >made', ''), ('echo good >made; head -c 9000 /dev/zero', '/file')])
def test_35_a_link_in_the_place_of_a_folder_or_a_stream_is_not_followed(batches, lab, canary, line,
                                                                        below):
    """The link takes the place of the first path requested: the job's folder, or its stdout."""
    machine = lab(leave_out=('rsync',))
    file = machine.folder / 'entries.json'
    file.write_text(json.dumps([['{work}', '2', 0o777, f'{canary}{below}']]))
    hostile(machine, 'tar', f'ENTRIES, REAL = {str(file)!r}, {rig.program("tar")!r}\n'
            + HOSTILE_TAR)
    done = batches.run([line], [machine], *NO_GPU, '--copy-forwards')
    assert done.returncode == 1 and '1 not collected' in done.stdout, done.stdout
    assert 'its results could not be fetched' in done.stderr and 'Traceback' not in done.stderr
    assert not os.path.lexists(RESULTS / 'batch.sh.1')


def test_35_names_of_jobs_of_others_are_names(run_cli, lab, project, tmp_path):
    """--earlier=collect makes files with these names on the client."""
    machine = lab()
    keys = ['../../evil.1-deadbeef', '/tmp/evil.1-deadbeef', '.evil.1-deadbeef', 'e/vil.1-deadbeef',
            'good.1-deadbeef', 'good.1-deadbeef']
    data = b''.join(b'\0'.join([key.encode(), b'ended', b'0', b'true', b'']) for key in keys)
    hostile(machine, 'bash', HOSTILE_RUNNER.replace('SAY', (
        f'say(b"ready\\t/tmp\\t0\\ndata\\t{len(data)}\\tothers\\n" + {data!r})')))
    done = run_cli('execute_batch', '--earlier=show', '--machines', machine.yaml())
    assert done.stdout == f'ended with exit code 0: good on {machine.yaml()};  true\n', done.stderr


def test_35_a_nul_in_a_name_is_no_name(batches, lab):
    machine = lab()
    hostile(machine, 'bash', HOSTILE_RUNNER.replace('SAY', (
        'say(b"ready\\t/tmp/a\\0b\\t0\\n")')))
    done = batches.run(['true'], [machine], *NO_GPU)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert "cannot be understood (ready: ValueError('a NUL'))" in done.stderr


@pytest.mark.parametrize('rsync', [True, False], ids=['rsync', 'tar'])
def test_35_a_folder_that_its_job_has_shut_and_that_has_a_link_out(batches, lab, rsync):
    machine = lab(leave_out=() if rsync else ('rsync',))
    done = batches.run(['ln -s /etc/passwd out; echo x >made; chmod 555 .'], [machine], *NO_GPU,
                       '--copy-forwards')
    assert done.returncode == 0 and 'leads out of its folder' in done.stderr, done.stderr
    assert [path.name for path in (RESULTS / 'batch.sh.1').iterdir()] == ['made']


@pytest.mark.parametrize('how', ['rm -rf job_results', 'mv job_results moved'])
def test_35_job_results_that_go_while_results_come_are_a_sentence(batches, lab, outside, how):
    """tar fetches the results; its archive lies in job_results."""
    machine = lab(leave_out=('rsync',))
    put(machine, 'tar', f'''#!/bin/bash
[[ " $* " != *" -c "* ]] || {{
  head -c 30000 /dev/zero | tr "\\0" x >{outside}/padding
  {rig.program("tar")} "$@"; status=$?
  touch {outside}/awaited; until [[ -e {outside}/go ]]; do sleep 0.05; done; exit $status
}}
exec {rig.program("tar")} "$@"
''')
    batch = batches.start(['head -c 300000 /dev/zero >made'], [machine], *NO_GPU, '--copy-forwards',
                          stderr=subprocess.PIPE)
    wait_until((outside / 'awaited').exists, 'a fetch')
    subprocess.run(how, shell=True, check=True)
    (outside / 'go').touch()
    done = batch.end()
    said = done.stderr or batch.process.stderr.read()
    assert done.returncode in (1, 2) and 'Traceback' not in said, said
    assert 'job_results was removed or moved away' in said or 'could not be fetched' in said


def test_35_five_thousand_files_come(batches, lab1):
    done = batches.run(['mkdir d; cd d; touch {1..5000}'], [lab1], *NO_GPU, '--copy-forwards')
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(RESULTS / 'batch.sh.1/d')) == 5000


# ---- 36: output without an end, or output that deceives ----

MUCH = 'head -c 1000000000 /dev/zero | tr "\\0" x'       # a line of 1 GB

# Speaks in place of the remote runner: the code SAY runs once the token was sent.
HOSTILE_RUNNER = """
def field():
    data = b''
    while not data.endswith(b'\\0'):
        piece = os.read(0, 1)
        if not piece:
            sys.exit()
        data += piece
    return data[:-1]
def say(data):
    while data:
        data = data[os.write(1, data):]
field()
size = int(field())
while size:
    size -= len(os.read(0, size))
say(b'\\n' + field() + b'\\n')
try:
    SAY
except BrokenPipeError:
    sys.exit()
while os.read(0, 65536):
    pass
"""
GIGABYTE = 'for _ in range(1000): say(b"x" * 10**6)'
RUNNERS = {
    'a line of 1 GB': (GIGABYTE, 'it sent a line that is too long'),
    'a terabyte is announced': ('say(b"data\\t1099511627776\\tback\\tx\\n")\n    ' + GIGABYTE,
                                'it announced an event that is too long'),
    'a million facts': ('for _ in range(1000): say(b"probe\\tgpu\\tx\\n" * 1000)\n'
                        '    say(b"nonsense\\n")', 'it sent an unknown event'),
    'jobs of others': ('say(b"ready\\t/tmp\\t1\\nended\\tbatch.sh.1.1\\t0\\t0\\t0\\t=\\t=\\n"'
                       ' b"started\\tbatch.sh.1.1\\n")',
                       'it sent something that cannot be understood'),
    'a word with escapes': ('say(b"broken\\t\\x1b[2J\\x1b]0;title\\x07 lies\\n")', ' lies'),
}


def test_36_whatever_a_runner_says_memory_is_bounded(batches, lab, lab1, gate, tmp_path):
    machines = {kind: lab() for kind in RUNNERS}
    for kind, (say, _) in RUNNERS.items():
        hostile(machines[kind], 'bash', HOSTILE_RUNNER.replace('SAY', say))
    with open(tmp_path / 'stderr', 'w') as errors:
        batch = batches.start([f'{gate.wait("a")}; exit 7'], [lab1, *machines.values()], *NO_GPU,
                              stderr=errors)
    batch.until('started: ')
    errors = tmp_path / 'stderr'
    for kind, machine in machines.items():
        # On a busy computer, a warning that the machine has not answered yet comes first.
        wait_until(lambda machine=machine, words=RUNNERS[kind][1]: any(
            str(machine.yaml()) in line and words in line
            for line in errors.read_text().splitlines()), kind)
    peak = peak_mb(batch.process.pid)
    gate.open('a')
    done = batch.end()
    done.stderr = errors.read_text()
    assert peak < MUCH_MB, f'{peak} MB'
    assert done.returncode == 1 and 'batch.sh.1: exit code 7 on' in done.stdout
    for kind, (_, words) in RUNNERS.items():
        assert words in ''.join(complaints(done, machines[kind])), (kind, done.stderr)
    assert_plain(done.stdout, done.stderr)


def test_36_a_login_that_says_a_line_without_an_end(batches, lab, lab1, gate, tmp_path):
    out = lab(startup={'.bashrc': MUCH + '\n'})
    err = lab(startup={'.bashrc': 'case $- in *i*) ;; *) head -c 50000000 /dev/zero >&2;; esac\n'})
    with open(tmp_path / 'stderr', 'w') as errors:
        lines = [f'{meet}; {gate.wait(name)}' for meet, name in zip(gate.meeting(2), 'ab')]
        batch = batches.start(lines,
                              [out, *(m.yaml(max_jobs=1) for m in (err, lab1))], *NO_GPU,
                              stderr=errors)
    errors = tmp_path / 'stderr'
    wait_until(lambda: 'its login prints too much text' in errors.read_text(), 'the end')
    batch.until('started: ')
    batch.until('started: ')
    peak = peak_mb(batch.process.pid)
    gate.open('a')
    gate.open('b')
    done = batch.end()
    assert peak < MUCH_MB, f'{peak} MB'
    assert done.returncode == 0, errors.read_text()
    assert_plain(done.stdout, errors.read_text())


def test_36_a_job_that_says_a_line_without_an_end(batches, lab1, gate):
    size = 100_000_000
    lines = [f'head -c {size} /dev/zero | tr "\\0" x; head -c {size} /dev/zero >&2',
             gate.wait('a')]
    batch = batches.start(lines, [lab1], *NO_GPU)
    batch.until('finished: batch.sh.1')
    peak = peak_mb(batch.process.pid)
    gate.open('a')
    assert batch.end().returncode == 0
    assert peak < MUCH_MB, f'{peak} MB'
    assert [(RESULTS / f'batch.sh.1.{stream}').stat().st_size for stream in ('out', 'err')] == [
        size, size]


def test_36_words_that_look_like_something_else(batches, lab1):
    """A job prints error messages of ssh, rsync and the runner: they are only output of the job."""
    text = ('kex_exchange_identification: Connection closed by remote host\n'
            'mux_client_request_session: session request failed: Session open refused by peer\n'
            'Connection closed\nSSH_SCHEDULER_NO_MASTER\nrsync error: (code 12)\n'
            '0123456789abcdef0123456789abcdef\nended\tbatch.sh.1.1\t0\t0\t0\t=\t=\nbye\n'
            'data\t99999999999\tback\tbatch.sh.1.1\n\x1b[2J\x1b]0;title\x07')
    with open('text', 'w') as file:
        file.write(text)
    lines = ['cat text text; cat text >&2; exit 255', 'true \x1b[31m',
             "cp text $'\\e[31mred'; mkfifo $'\\e[2Jf'"]
    done = batches.run(lines, [lab1], *NO_GPU)
    assert done.returncode == 1 and 'batch.sh.1: exit code 255 on' in done.stdout
    assert 'connection lost' not in done.stderr
    assert (result('batch.sh.1'), result('batch.sh.1', 'err')) == (
        2 * text.encode(), text.encode())
    assert (RESULTS / 'batch.sh.3/\x1b[31mred').read_text() == text
    assert '[2Jf is no file, folder or link' in done.stderr
    assert_plain(done.stdout, done.stderr)


# ---- 37: names ----

@pytest.mark.parametrize('way', ['channel', 'rsync', 'tar'])
def test_37_names_of_any_bytes_go_and_come(batches, lab, project, way):
    """The names are copied, linked one by one, and fetched."""
    make_nasty_tree(project)
    (project / 'sets').mkdir()
    (project / 'files').rename('sets/files')
    linked = [os.fsdecode(path) for path in tree_of(project) if path.startswith(b'sets/files/')]
    if way != 'channel':
        (project / 'links/padding').write_bytes(random.Random(5).randbytes(BIG))
    line = ('find sets -type l -printf x | wc -c; find folders links ! -type d -printf x | wc -c; '
            'mkdir made; cp -aL sets made; cp -a folders links made')
    machine = lab(leave_out=('rsync',) if way == 'tar' else ())
    done = batches.run([line], [machine], *NO_GPU, '--verbose', '--copy-forwards', 'folders',
                       'links', '--link-forwards', *linked)
    assert (done.returncode, done.stderr.count('WARNING')) == (0, 0), done.stderr
    sent = {path: what for path, what in tree_of(project).items()
            if path.startswith((b'folders', b'links', b'sets/files/'))}
    others = sum(what[0] != 'folder' for what in sent.values()) - len(linked)
    assert len(linked) > 25 and f'sent {len(linked) + others} files' in done.stderr
    assert result('batch.sh.1').decode().split() == [str(len(linked)), str(others)]
    came = tree_of(RESULTS / 'batch.sh.1/made')
    assert {came.pop(path)[0] for path in (b'sets', b'sets/files')} == {'folder'}
    assert came == as_usual_here(sent)
    assert done.stderr.count('+ rsync ') == {'channel': 1, 'rsync': 3, 'tar': 0}[way]


# ---- 40: an nvidia-smi that does not work ----

SAID_OF_GPUS = {
    'hangs': ([], '#!/bin/bash\nkill -STOP $$\n', 'has an nvidia-smi that does not answer'),
    'ERR!': ([{'memory.free': 'ERR!'}], None, 'free memory nvidia-smi does not report'),
    '[N/A]': ([{'utilization.gpu': '[N/A]'}], None, 'to use it nevertheless'),
    'exit 18': ([], '#!/bin/bash\necho it is broken\nexit 18\n', 'fails with status 18: it is'),
    'none': ([], None, 'has an nvidia-smi, but no GPU'),
    'MIG': ([{'mig.mode.current': 'Enabled'}], None, 'divided into parts (MIG)'),
    'CRLF': ([{}, {'index': 1}], '#!/bin/bash\n"$0.real" "$@" | sed "s/$/\\r/"\n', None),
    'sixteen': ([{'index': n} for n in range(16)], None, None),
}


@pytest.fixture
def oddities(lab):
    """{name: a machine with such GPUs}"""
    machines = {}
    for name, (gpus, script, _) in SAID_OF_GPUS.items():
        machines[name] = lab(gpus=gpus, nvidia_smi=script, cores=16)
        put(machines[name], 'nvidia-smi.real', rig.NVIDIA_SMI)
    return machines


@hasty
def test_40_no_nvidia_smi_holds_a_query_up(run_cli, project, oddities):
    done = run_cli('query_machines', '--json', '--memory-required=10', '--machines',
                   *(machine.yaml() for machine in oddities.values()), env=LESS_HASTY)
    assert done.returncode == 0, done.stderr
    for found, (name, (gpus, _, words)) in zip(map(json.loads, done.stdout.splitlines()),
                                               SAID_OF_GPUS.items()):
        assert found['machine'] == str(oddities[name].yaml())
        if words:
            assert words in found['gpu_trouble'] and not found['gpus'], (name, found)
            assert found['jobs_fit'] == 0, name
        else:
            assert found['gpu_trouble'] is None, (name, found)
            assert found['jobs_fit'] == len(found['gpus']) == len(gpus), (name, found)
    assert_clean(oddities['hangs'])


@hasty
def test_40_gpu_jobs_begin_only_where_the_gpus_are_known(batches, gate, oddities):
    lines = [ledger_line(f'{meet}; echo "$RIG_MACHINE $CUDA_VISIBLE_DEVICES"')
             for meet in gate.meeting(18)]
    done = batches.run(lines, oddities.values(), '--memory-required=10', '--num-cpus=0.1',
                       env=LESS_HASTY)
    assert done.returncode == 0, done.stderr
    ran = sorted(result(f'batch.sh.{n}').decode().splitlines()[1] for n in range(1, 19))
    assert ran == sorted([*(f'{oddities["CRLF"].folder} {n}' for n in range(2)),
                          *(f'{oddities["sixteen"].folder} {n}' for n in range(16))])
    check_exactly_once(oddities.values(), RESULTS, done.stdout,
                       jobs=[f'batch.sh.{n}' for n in range(1, 19)])
    for name, machine in oddities.items():
        assert bool(machine.ledger.read_text()) == (name in ('CRLF', 'sixteen')), name
        assert_clean(machine, cache=True)


@hasty
def test_40_a_machine_whose_nvidia_smi_hangs_has_no_gpu_and_other_jobs_run(batches, lab):
    machine = lab(gpus=[], nvidia_smi=SAID_OF_GPUS['hangs'][1])
    alone = batches.run(['true'], [machine], env=LESS_HASTY)
    assert alone.returncode == 2 and 'does not answer' in alone.stderr, alone.stderr
    done = batches.run(['echo 1'], [machine], *NO_GPU, env=LESS_HASTY)
    assert (done.returncode, result('batch.sh.1')) == (0, b'1\n'), done.stderr
    assert_clean(machine)


# ---- Jobs whose end was not confirmed ----

@hasty
def test_a_job_that_was_not_seen_to_end_is_remembered_and_ended_by_the_next_run(
        batches, lab, ledger):
    """The machine answers only after the first run gave up waiting; the next run tidies up."""
    machine = lab()
    batch = batches.start([f"trap '' TERM; echo begun >>{ledger}; exec sleep 1000"], [machine],
                          *NO_GPU, env={'CRASH_SETTINGS': json.dumps({'INTERRUPT_S': 0.5})},
                          stderr=subprocess.PIPE)
    wait_until(lambda: ledger.read_text(), 'its begin')
    machine.freeze()
    batch.process.send_signal(signal.SIGINT)
    for line in iter(batch.process.stderr.readline, ''):
        if 'may still run on' in line:
            break
    machine.thaw()
    assert batch.end().returncode == 130
    journal = s.ResultStore('job_results').peek().journal
    assert journal.record('batch.sh.1')['state'] == 'cancelled'
    assert journal.remains(journal.record('batch.sh.1')['machine'])[1] == [
        journal.key('batch.sh.1', 1)]
    again = batches.run([f'echo begun >>{ledger}'], [machine], *NO_GPU)
    assert (again.returncode, ledger.read_text()) == (0, 'begun\nbegun\n'), again.stderr
    assert_clean(machine)
