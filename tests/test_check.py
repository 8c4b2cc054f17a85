"""execute_batch --check and execute_to --init: each possible problem has its own sentence."""
import json
import os
import re
import shlex
import signal
import subprocess
import time
import types

import pytest
import rig
import yaml
from batching import NO_GPU, constants, result, with_constants
from commands import at_terminal
from hosts import faketime, why_not
from test_logins import SAID_BY_SSH, TRIED_AGAIN
from test_slurm import hasty

import ssh_scheduler

ROOT = pytest.mark.skipif(os.getuid() != 0, reason='only root can log in as another uid')


@pytest.fixture
def check(run_cli, project):
    """Check machines: (exit status, {machine: {check: [(mark, text), ...]}}, the JSON objects)."""
    def run(*machines, env=None):
        files = [file_of(machine) for machine in machines]
        done = run_cli('execute_batch', '--check', '--json', '--machines', *files, env=env)
        assert done.stderr == ''
        objects = [json.loads(line) for line in done.stdout.splitlines()]
        found = {}
        for one in objects:
            found[one['machine']] = {}
            for line in one['findings']:
                found[one['machine']].setdefault(line['check'], []).append(
                    (line['mark'], line['text']))
        assert [*found] == [str(file) for file in files]
        return done.returncode, found, objects

    return run


def file_of(machine):
    return machine.yaml() if isinstance(machine, rig.Machine) else machine


def only(check, file, name):
    """Return the report of one check of one machine: (exit status, mark, text, checks not made)."""
    status, found, (whole,) = check(file)
    ((mark, text),) = found[str(file_of(file))][name]
    return status, mark, text, whole['not_checked']


def new_key(folder, *options):
    path = folder / 'other'
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', path, *options],
                   check=True)
    return path


# ---- Machines without problems ----

def test_a_good_machine_is_all_ticks_in_the_order_in_which_things_go_wrong(lab, run_cli, project):
    machine = lab(gpus=rig.fake_gpus(2))
    done = run_cli('execute_batch', '--check', '--machines', machine.yaml())
    head, *lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, head) == (0, '', str(machine.yaml()))
    assert {line[:8] for line in lines} == {'  ok    '}
    texts = [(line[8:22].strip(), line[22:]) for line in lines]
    assert [name for name, _ in texts] == [
        'machine file', 'key file', 'host name', 'port', 'host key', 'login', 'start files', 'bash',
        'folder', 'login shell', 'space', 'inodes', 'rsync', 'memory', 'cores', 'GPUs', '',
        'logout', 'clock']
    facts = dict(texts)
    assert facts['machine file'] == str(machine.yaml())
    assert facts['key file'] == str(machine.key)
    assert facts['port'] == f'sshd answers at port {machine.port}'
    assert (facts['host key'], facts['login']) == ('known', 'as ben')
    assert facts['folder'] == f'{machine.home}/.ssh_scheduler'
    assert facts['memory'] == '15.6 of 31.2 GB free'
    assert facts['GPUs'] == '0: NVIDIA Rig 16GB, 15.6 of 15.6 GB free'
    assert facts[''] == '1: NVIDIA Rig 16GB, 15.6 of 15.6 GB free'
    assert not list((machine.home / '.ssh_scheduler').iterdir()) and machine.logins() == 1


def test_on_a_terminal_there_are_coloured_ticks(scheduler, client_env, lab, project):
    good, bad = lab(), lab()
    file = bad.yaml(ssh_key_path=str(project / 'none'))
    with at_terminal(scheduler, client_env, 'execute_batch', '--check', '--machines', good.yaml(),
                     file) as terminal:
        assert terminal.end() == 1
    text = terminal.said.decode()
    assert '\x1b[32m✓\x1b[m host name' in text and '\x1b[31m✗\x1b[m key file' in text
    assert '\x1b[33m!\x1b[m GPUs' in text and 'WRONG' not in text
    with at_terminal(scheduler, {**client_env, 'PYTHONIOENCODING': 'ascii', 'NO_COLOR': '1'},
                     'execute_batch', '--check', '--machines', file) as terminal:
        assert terminal.end() == 1
    assert '  WRONG key file' in terminal.said.decode()


def test_this_computer_needs_no_login(check):
    status, found, _ = check('localhost')
    names = [*found['localhost']]
    assert names[:3] == ['machine file', 'bash', 'folder'] and 'login' not in names
    assert found['localhost']['machine file'] == [('ok', 'this computer')]


def test_all_are_asked_at_once_and_told_in_the_order_of_the_user(check, lab, gate):
    """The first machine answers only once the program has logged in to the second one."""
    meet = gate.meeting(2)
    machines = [lab(startup={'.bashrc': f'case $- in *i*) {meet[n]};; esac'}) for n in (0, 1)]
    status, found, _ = check(*machines)
    assert status == 0
    assert [lines['login shell'] for lines in found.values()] == [[('ok', '/bin/bash')]] * 2


def test_a_machine_that_is_wrong_does_not_hide_the_others(check, lab, project):
    (project / 'broken.yaml').write_text('username ben\nip: gpu7\n')
    status, found, objects = check('broken.yaml', lab(), 'what is/this')
    assert status == 1
    ((mark, text),) = found['broken.yaml']['machine file']
    assert mark == 'WRONG' and 'broken.yaml, line 1: this is not "key: value"' in text
    assert objects[0]['not_checked'][:2] == ['key file', 'host name']
    assert [one['is_usable'] for one in objects] == [False, True, False]


def test_ctrl_c_ends_it(start_cli, lab, project, gate):
    machine = lab(startup={'.bashrc': f'case $- in *i*) {gate.wait("never")};; esac'})
    process = start_cli('execute_batch', '--check', '--machines', machine.yaml())
    while not machine.logins():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=rig.SAFETY_NET_S)
    assert (process.returncode, out) == (130, '')
    assert err.startswith(f'{machine.yaml()}: did not answer within ') and 'interrupted' in err


@pytest.mark.parametrize('words, complaint', [
    (['--check'], '--machines is missing'),
    (['--check', '--machines'], '--machines names no machine'),
    (['--check', '--status', '--machines', 'a'], '--status and --check: give one of them'),
    (['--check', 'b.sh', '--machines', 'localhost'], "unexpected word 'b.sh'"),
    (['b.sh', '--json', '--machines', 'localhost'], '--json can only be given with'),
    (['--check', '--machines', '@none'], 'the list of machines @none cannot be read')])
def test_wrong_usage_is_2(run_cli, project, words, complaint):
    done = run_cli('execute_batch', *words)
    assert (done.returncode, done.stdout) == (2, '') and complaint in done.stderr


# ---- The way to the machine ----

@pytest.mark.parametrize('kind, words', [
    ('missing', 'cannot be read: No such file or directory. Make one with ssh-keygen'),
    ('readable', 'can be read by others, so ssh refuses it. Try: chmod 600'),
    ('passphrase', 'has a passphrase, which nobody could type here')])
def test_key_files(check, lab, tmp_path, kind, words):
    key = new_key(tmp_path, *(['-N', 'secret'] if kind == 'passphrase' else []))
    key.chmod(0o644 if kind == 'readable' else 0o600)
    path = tmp_path / 'none' if kind == 'missing' else key
    status, mark, text, rest = only(check, lab().yaml(ssh_key_path=str(path)), 'key file')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'host name') and words in text


def test_a_host_name_that_is_unknown(check, lab):
    file = lab().yaml(ip='no-such-machine.invalid')
    status, mark, text, rest = only(check, file, 'host name')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'port')
    assert text == ('the host name no-such-machine.invalid is unknown. Correct `ip` in '
                    f'{file}. To look it up: getent hosts no-such-machine.invalid')


def test_a_misspelt_name(run_cli, client_home, project):
    (client_home / '.ssh').mkdir()
    (client_home / '.ssh/config').write_text('Include more\nHost gpu-* lab7\n  User ben\n')
    (client_home / '.ssh/more').write_text('Host "quoted" cluster\n  User ben\n')
    (project / 'gpubox.yaml').write_text('ip: 127.0.0.1\n')
    for word, likely in (('lba7', 'lab7'), ('clustre', 'cluster'), ('gpu-bxo', 'gpubox')):
        done = run_cli('execute_batch', '--check', '--machines', word)
        assert (f'the host name {word} is unknown (did you mean {likely}?). Correct the name, or '
                f'put `Host {word}` into ~/.ssh/config. To look it up: getent hosts {word}'
                in done.stdout)
    done = run_cli('execute_batch', '--check', '--machines', 'another')
    assert 'the host name another is unknown. Correct' in done.stdout


def test_a_port_at_which_nothing_listens(check, lab):
    file = lab().yaml(port=(port := rig.free_port()))
    status, mark, text, rest = only(check, file, 'port')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'host key')
    assert text == (f'nothing listens at 127.0.0.1 port {port}. Correct `port` in {file}, or start '
                    'sshd there: sudo systemctl start ssh')


def test_host_keys(check, lab, tmp_path):
    machine, known = lab(), tmp_path / 'known'
    kind, key, _ = new_key(tmp_path).with_suffix('.pub').read_text().split()
    known.write_text(f'[127.0.0.1]:{machine.port} {kind} {key}\n')
    file = machine.yaml(ssh_options={'UserKnownHostsFile': str(known)})
    status, mark, text, rest = only(check, file, 'host key')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'login')
    assert text.endswith(f'Try: ssh-keygen -f "{known}" -R "[127.0.0.1]:{machine.port}"')
    known.unlink()
    said = [only(check, file, 'host key')[:3] for _ in range(2)]
    assert said == [(0, 'ok', 'new here: it is known from now on'), (0, 'ok', 'known')]
    file = machine.yaml(ssh_options={'UserKnownHostsFile': '/dev/null',
                                     'StrictHostKeyChecking': 'yes'})
    assert 'is not known: log in once with ssh' in only(check, file, 'host key')[2]


def test_a_login_that_is_refused(check, lab, tmp_path):
    machine, key = lab(), new_key(tmp_path)
    status, mark, text, rest = only(check, machine.yaml(ssh_key_path=str(key)), 'login')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'start files')
    assert 'was refused (publickey was tried)' in text
    assert text.endswith(f' Try: ssh-copy-id -i {key} -p {machine.port} ben@127.0.0.1')


# check: the complaints of ssh that belong to it; all others belong to the login
ABOUT = {
    'host key': ['another machine', 'compare the key.', 'could not be verified.'],
    'host name': ['could be asked for the host name', 'no name server answered',
                  'finds no address of', 'is unknown.'],
    'port': ['AllowTcpForwarding', ': Connection refused.', 'could not connect to', 'ProxyCommand',
             'nothing listens', 'cannot be reached', 'did not answer in time',
             'method in common', 'closed the connection before'],
    'bash': [' has no bash.'],
}


@pytest.mark.parametrize(('text', 'expected'), SAID_BY_SSH + TRIED_AGAIN)
def test_each_complaint_of_ssh_is_about_one_check(text, expected):
    machine = ssh_scheduler.Machine('lab1', 'row')
    found = ssh_scheduler.MachineCheck('lab1', machine)
    found.worker = types.SimpleNamespace(
        state='failed', contact=types.SimpleNamespace(runs_bash=False),
        why=ssh_scheduler.explain_login(machine, 255, '', text)[0])
    check, _ = found.failure()
    about = [name for name, parts in ABOUT.items() if any(part in expected for part in parts)]
    assert [check] == (about or ['login'])


# ---- Its start files, shell and programs ----

def test_start_files(check, lab):
    noisy = lab(startup={'.bashrc': 'echo "Welcome to lab9"\n'})
    status, mark, text, _ = only(check, noisy, 'start files')
    assert (status, mark) == (0, 'note')
    assert text.startswith("print 'Welcome to lab9', which rsync cannot stand") and text.endswith(
        'in ~/.bashrc behind this line: [[ $- == *i* ]] || return')
    held = lab(startup={'.bashrc': 'sleep 1000 &\n'})
    status, mark, text, _ = only(check, held, 'start files')
    assert (status, mark) == (1, 'WRONG') and text.startswith(
        'start sleep, which holds each connection open, so rsync waits for its end. Let them')
    status, mark, text, rest = only(check, lab(startup={'.bashrc': 'exit 3\n'}), 'start files')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'bash')
    assert 'is there an exit in one of its start files' in text


def test_a_login_shell_that_does_not_end(check, lab):
    machine = lab(startup={'.bashrc': 'case $- in *i*) exec true;; esac\n'})
    status, mark, text, _ = only(check, machine, 'login shell')
    assert (status, mark) == (1, 'WRONG')
    assert 'a start file of /bin/bash ends it' in text and '~/.bashrc' in text


def test_a_setup_that_fails(check, lab):
    status, mark, text, rest = only(check, lab().yaml(setup='echo no such module; false'),
                                    'login shell')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'space')
    assert text == 'setup failed (1): no such module.'


def test_another_shell_is_named(check, lab):
    shell = rig.program('zsh')
    assert only(check, lab(shell=shell), 'login shell')[:3] == (0, 'ok', shell)


def test_bash_is_missing_or_old(check, lab):
    machine = lab(shell=rig.program('dash'), tools=['env', 'ls'])
    status, mark, text, _ = only(check, machine, 'bash')
    assert (status, mark, text) == (1, 'WRONG', f'127.0.0.1 port {machine.port} has no bash.')
    machine = lab(env={'FAKE_VERSINFO': '4'})
    machine._script('bash', '#!/bin/bash\n[[ $1 != -pc ]] || exec 0< <(exec sed -uz '
                    's/BASH_VERSINFO/FAKE_VERSINFO/g)\nexec /bin/bash "$@"\n')
    status, mark, text, rest = only(check, machine, 'bash')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'folder')
    assert re.fullmatch(r'its bash has version \S+, and 4.2 or later is needed: install a newer '
                        r'one, or .*\.', text)


def test_rsync_is_missing(check, lab):
    status, mark, text, _ = only(check, lab(leave_out=['rsync']), 'rsync')
    assert (status, mark) == (0, 'note')
    assert text == ('is not there, so tar sends all files again each time. Install it there: sudo '
                    'apt install rsync')


# ---- Its folders and its size ----

def test_a_workdir_that_cannot_be_written(check, lab):
    file = lab().yaml(workdir='/proc/none')
    status, mark, text, rest = only(check, file, 'folder')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'account')
    assert text.startswith('cannot write there: ') and text.endswith(
        f'Set `workdir` in {file} to a folder that you can write there.')
    assert 'full' not in text


def with_disk(machine, facts):
    """Let `stat -f` on the machine print these facts: free blocks, size, inodes, …"""
    machine._script('stat', f'#!/bin/bash\n[[ "$*" != *"%a %S %d %c %T"* ]] || {{ echo {facts}; '
                    f'exit; }}\nexec {rig.program("stat")} "$@"\n')
    return machine


def test_a_disk_that_is_nearly_full(check, lab):
    _, found, _ = check(with_disk(lab(), '300000 4096 17 100000 ext2/ext3'))
    (lines,) = found.values()
    ((mark, text),) = lines['space']
    assert mark == 'note' and text.startswith('only 1171 MB are free where jobs run. To see the')
    ((mark, text),) = lines['inodes']
    assert mark == 'note' and text.startswith('only 17 more files and folders fit')
    _, found, _ = check(with_disk(lab(), '600000 4096 0 0 btrfs'))
    (lines,) = found.values()
    assert lines['space'] == [('ok', '2.3 GB free (btrfs)')] and 'inodes' not in lines


def test_a_full_disk(host, run_cli, project):
    machine = host(disk={'size': 1 << 20})
    machine.fill_disk()
    done = run_cli('execute_batch', '--check', '--machines', machine.yaml())
    assert done.returncode == 1 and '  WRONG folder ' in done.stdout
    assert 'No space left on device' in done.stdout


def test_gpus_as_a_job_sees_them(check, lab, gate):
    machine = lab(gpus=[*rig.fake_gpus(1), {'index': 1, 'memory_free_mb': 4000}])
    machine._script('stranger', f'#!/bin/bash\n{gate.wait("end")}\n')
    with subprocess.Popen([str(machine.bin / 'stranger')]) as stranger:
        (machine.folder / 'gpus.apps').write_text(
            f'GPU-00000000-0000-0000-0000-000000000001, {stranger.pid}, 12000\n')
        _, found, _ = check(machine.yaml())
        _, listed, _ = check(machine.yaml(gpus=[0]))
        gate.open('end')
    user = subprocess.run(['id', '-un'], capture_output=True, text=True).stdout.strip()
    free = ('ok', '0: NVIDIA Rig 16GB, 15.6 of 15.6 GB free')
    assert found[str(machine.yaml())]['GPUs'] == [
        free, ('ok', f'1: NVIDIA Rig 16GB, 3.9 of 15.6 GB free, used by {user}')]
    assert listed[str(machine.yaml())]['GPUs'] == [free]


@pytest.mark.parametrize('settings, mark, words', [
    ({}, 'note', 'none: it has no nvidia-smi, so no GPU is known. Jobs need --no-gpu-required'),
    ({'gpus': []}, 'note', 'none: it has an nvidia-smi, but no GPU. Jobs need --no-gpu-required'),
    ({'nvidia_smi': '#!/bin/bash\necho broken driver; exit 9\n'}, 'WRONG',
     'it has an nvidia-smi that fails with status 9: broken driver. Look there: nvidia-smi'),
    ({'gpus': rig.fake_gpus(1, compute_mode='Prohibited')}, 'WRONG',
     'it has GPU 0 in compute mode Prohibited. Look there: nvidia-smi')])
def test_why_there_are_no_gpus(check, lab, settings, mark, words):
    status, *said, _ = only(check, lab(**settings), 'GPUs')
    assert said[0] == mark and said[1].startswith(words) and status == (mark == 'WRONG')


# ---- Jobs that end too early, clocks, names ----

@ROOT
@pytest.mark.parametrize('way, ends', [('busctl true', True), ('busctl false', False),
                                       ('logind.conf yes', True), ('logind.conf no', False)])
def test_a_logind_that_ends_what_a_login_leaves(check, lab, way, ends):
    where, value = way.split()
    machine = lab(uid=20001, leave_out=['busctl'])
    etc = machine.folder / 'etc/systemd'
    etc.mkdir(parents=True)
    if where == 'busctl':
        machine._script('busctl', f'#!/bin/bash\necho b {value}\n')
    else:
        (etc / 'logind.conf').write_text(f'[Login]\nKillUserProcesses={value}\n')
    file = machine.yaml()
    machine.stop()
    machine.env['SSH_SCHEDULER_ETC'] = str(etc.parent)
    machine._write_sshd_config()
    machine.start()
    status, mark, text, _ = only(check, file, 'logout')
    assert (status, mark) == ((1, 'WRONG') if ends else (0, 'ok'))
    assert ('Ask for KillUserProcesses=no in /etc/systemd/logind.conf' in text) == ends


@pytest.mark.skipif(bool(why_not()), reason='the tests of hosts bring faketime')
@pytest.mark.parametrize('offset, words', [
    ('+100s', 'ahead of the one here'), ('-100s', 'behind the one here'), ('+2s', None)])
def test_a_clock_that_is_wrong(check, lab, offset, words):
    machine = lab(env={'LD_PRELOAD': faketime(), 'FAKETIME': offset, 'FAKETIME_DONT_FAKE_MONOTONIC':
                       '1'})
    began = time.monotonic()
    status, mark, text, _ = only(check, machine, 'clock')
    took_s = time.monotonic() - began           # its time may be that long on its way
    assert (status, mark) == (0, 'note' if words else 'ok')
    if words:
        minutes, seconds = re.match(rf'it is (\d)m (\d\d)s {words}', text).groups()
        late_s = (100 - 60 * int(minutes) - int(seconds)) * (1 if offset == '+100s' else -1)
        assert -1 <= late_s <= took_s + 1 and 'timedatectl' in text


def by_another_name(machine, folder):
    file = folder / 'alias.yaml'
    file.write_text(machine.yaml(ip='alias', ssh_options={
        'HostName': machine.address, 'UserKnownHostsFile': str(machine.known_hosts)}).read_text())
    machine.yaml()
    return file


def test_two_names_of_one_account(check, lab, tmp_path):
    machine = lab()
    first, second = machine.yaml(), by_another_name(machine, tmp_path)
    status, found, objects = check(first, second)
    assert status == 1 and objects[0]['is_usable']
    ((mark, text),) = found[str(second)]['account']
    assert mark == 'WRONG' and f'{first} and {second} are the same account' in text
    assert found[str(second)]['login'] == [('ok', 'as ben')]
    done = check(first, 'ben@127.0.0.1:%d' % machine.port)
    assert done[0] == 1 and 'are the same account' in done[2][1]['findings'][0]['text']


def test_two_machines_that_share_a_folder(check, lab, outside):
    files = [lab().yaml(workdir=str(outside / 'work')) for _ in range(2)]
    status, found, _ = check(*files)
    said = [lines.get('shared folder') for lines in found.values()]
    named = [text for (mark, text), in filter(None, said)]
    assert status == 0 and named
    assert all('has the same home, which is safe' in text for text in named)
    assert 'shared folder' not in check(files[0])[1][str(files[0])]


# ---- Clusters ----

def test_a_good_cluster(check, cluster):
    file = cluster.yaml(engine_options='--partition=main')
    status, found, _ = check(file)
    lines = found[str(file)]
    assert status == 0, lines
    assert [*lines][-4:] == ['engine', 'partition', 'job', 'clock']
    assert lines['engine'][0][1].startswith('Slurm ')
    assert lines['partition'] == [('ok', 'takes jobs with --partition=main: main')]
    ((mark, text),) = lines['job']
    assert mark == 'ok' and re.fullmatch(rf'ran on \S+, which sees {cluster.workdir}', text)
    assert len(cluster.squeue()) == 1 and not list(cluster.workdir.iterdir())


def test_an_engine_that_is_not_there(check, lab):
    file = lab(leave_out=['squeue']).yaml(engine='slurm')
    status, mark, text, rest = only(check, file, 'engine')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'partition')
    assert text.startswith('its engine is missing: ') and 'squeue' in text


def test_an_engine_that_does_not_answer(check, cluster):
    file = cluster.yaml()
    for name in ('sbatch', 'sinfo', 'squeue'):
        cluster.wrap(name, 'exec "$REAL" "$@"')
    cluster.halt()
    status, found, _ = check(file)
    ((mark, text),) = found[str(file)]['engine']
    assert (status, mark) == (1, 'WRONG') and 'Slurm does not answer' in text
    assert found[str(file)]['job'] == [('note', 'none was submitted')]
    assert 'partition' not in found[str(file)]
    # Each question would take as long as the first one.
    assert not cluster.calls('sbatch') + cluster.calls('squeue')


def test_a_slow_cluster_is_not_told_to_look_at_nvidia_smi():
    machine = ssh_scheduler.Machine('cluster', 'c', engine='slurm')
    contact = types.SimpleNamespace(_reader=types.SimpleNamespace(greeted=True),
                                    _worker=types.SimpleNamespace(machine=machine))
    said = ssh_scheduler.Contact.hindrance(contact)
    assert said.endswith('~/.bashrc, or the programs of Slurm')


def test_a_configuration_of_slurm_that_is_not_there_is_told_at_once(check, cluster):
    began = time.monotonic()
    status, mark, text, rest = only(check, cluster.yaml(env={'SLURM_CONF': '/none/slurm.conf'}),
                                    'engine')
    assert (status, mark, rest[0]) == (1, 'WRONG', 'partition')
    assert text == ('its engine cannot be asked: /none/slurm.conf cannot be read (SLURM_CONF of '
                    'the login, or of env in the machine file).')
    assert time.monotonic() - began < 30


def test_nodes_that_are_all_out_of_service(check, cluster, run_cli):
    cluster.scontrol('update', 'nodename=n1', 'state=drain', 'reason="disk swap | ask eve"')
    cluster.part('n2')          # else it would register again, and be idle
    cluster.lose('n2')
    file = cluster.yaml()
    status, found, _ = check(file)
    assert status == 0 and cluster.squeue() == []
    ((mark, text),) = found[str(file)]['partition']
    assert mark == 'note' and text.startswith('no node takes jobs now: in main ')
    assert '1 node is drained (disk swap | ask eve)' in text and '1 node is down (lost)' in text
    assert text.endswith('. Jobs wait until one is in service again. To look at them, there: '
                         'sinfo -R')
    assert found[str(file)]['job'] == [('note', 'none was submitted')]
    shown = run_cli('query_machines', '--machines', file).stdout
    assert 'main: 0 of 2 nodes idle, 1 ' in shown and '1 drained' in shown and '1 down' in shown
    said = json.loads(run_cli('query_machines', '--json', '--machines', file).stdout)
    assert {part['reason'] for part in said['partitions']} == {'disk swap | ask eve', 'lost'}


def test_a_type_of_gpu_that_no_node_has(check, cluster):
    file = cluster.yaml(gpu_types={'a100': '40G', 'v100': 16000})
    status, found, _ = check(file)
    good, *wrong = found[str(file)]['partition']
    assert (status, good[0], [mark for mark, _ in wrong]) == (1, 'ok', ['WRONG'] * 2)
    assert wrong[0][1] == (
        'it refuses a job with a GPU of the type v100: Requested node configuration is not '
        f'available. Slurm knows no types of its GPUs. Correct gpu_types in {file}')
    assert found[str(file)]['job'][0][0] == 'ok'        # jobs without a GPU can run
    cluster.wrap('sinfo', '"$REAL" "$@" | sed s/gpu:2/gpu:t4:1,gpu:v100:1/')
    _, found, _ = check(file)
    assert any('Its types are t4, v100.' in text for _, text in found[str(file)]['partition'])


def test_slurm_beside_a_machine_file_without_an_engine(check, cluster):
    file = rig.Machine.yaml(cluster.login)
    status, found, _ = check(file)
    (_, (mark, text)) = found[str(file)]['cores']
    assert (status, mark) == (0, 'note')
    assert text == ('Slurm is there, with the partition main, but jobs would run on this machine '
                    f'itself. To use Slurm, add this line to {file}: engine: slurm')


def test_a_partition_that_is_not_there(check, cluster):
    file = cluster.yaml(engine_options='--partition=gpu')
    status, found, _ = check(file)
    ((mark, text),) = found[str(file)]['partition']
    assert (status, mark, cluster.squeue()) == (1, 'WRONG', [])
    assert text.startswith('it refuses a job with --partition=gpu: invalid partition') and (
        text.endswith(f'Correct engine_options in {file}; the partitions: sinfo'))


@with_constants
def test_a_node_that_does_not_see_the_folder(check, make_cluster):
    cluster = make_cluster(1)
    if not (os.getuid() == 0 and cluster.apart):
        pytest.skip('only root can hide a folder from a node, where unshare is allowed')
    cluster.hide('n1')
    file = cluster.yaml()
    status, found, _ = check(file, env=hasty())
    ((mark, text),) = found[str(file)]['job']
    assert (status, mark) == (1, 'WRONG'), text
    assert text == (f'the node n1 cannot write in {cluster.workdir}: let `workdir` be a folder '
                    'that the nodes see, and no other node is left.')


@with_constants
def test_a_queue_in_which_the_job_waits_too_long(check, cluster):
    cluster.sbatch('--nodes=2', '--exclusive', script='sleep 1000')
    file = cluster.yaml()
    status, found, _ = check(file, env=constants(CHECK_JOB_S=3.0, REFRESH_S=0.5))
    ((mark, text),) = found[str(file)]['job']
    assert (status, mark) == (0, 'note')
    assert re.fullmatch(r'it did not run within 3s and was taken back \(.+\). To look at the '
                        'queue: squeue', text)
    assert [job.state for job in cluster.squeue()][1:] in ([], ['CANCELLED'])


# ---- Other commands point to --check ----

def test_what_leaves_open_what_to_do_points_to_the_check_once_a_run(run_cli, lab, project, lab1):
    (project / 'batch.sh').write_text('true\n')
    off = [lab().yaml(port=rig.free_port()) for _ in range(2)]
    done = run_cli('execute_batch', 'batch.sh', '--no-gpu-required', '--machines', *off,
                   lab1.yaml())
    lines = [line for line in done.stderr.splitlines()
             if 'nothing listens' in line and 'was not used' not in line]
    (pointing,) = [line for line in lines if '--check' in line]
    name = pointing.partition(':')[0]
    assert len(lines) == 2 and pointing.endswith(
        f'. To find the cause: execute_batch --check --machines {name}')


def test_what_says_what_to_type_does_not_point_to_it(run_cli, lab, project, tmp_path, lab1):
    (project / 'batch.sh').write_text('true\n')
    refused = lab().yaml(ssh_key_path=str(new_key(tmp_path)))
    done = run_cli('execute_batch', 'batch.sh', '--no-gpu-required', '--machines', refused,
                   lab1.yaml())
    assert 'was refused' in done.stderr and '--check' not in done.stderr


# ---- --init writes a new machine file ----

@pytest.fixture
def init(run_cli, client_home, project):
    """Run execute_to --init HOST with this ~/.ssh/config; return (CompletedProcess, new file)."""
    def run(host, machine, config='', **lines):
        (client_home / '.ssh').mkdir(exist_ok=True)
        (client_home / '.ssh/config').write_text(config or ''.join((
            'Host gpu7\n', f' HostName {machine.address}\n User ben\n Port {machine.port}\n',
            f' IdentityFile {machine.key}\n', f' UserKnownHostsFile {machine.known_hosts}\n')))
        done = run_cli('execute_to', '--init', host)
        return done, client_home / '.local/var' / f'{host.rpartition("@")[2]}.yaml'

    return run


def test_it_writes_a_file_that_works(init, lab, run_cli, project, client_home):
    machine = lab(gpus=rig.fake_gpus(2))
    done, path = init('gpu7', machine)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines() == [f'wrote {path}',
                                        'next: execute_batch --check --machines gpu7']
    assert yaml.safe_load(path.read_text()) == {
        'name': 'gpu7', 'ip': '127.0.0.1', 'username': 'ben', 'port': machine.port,
        'ssh_key_path': str(machine.key),
        'ssh_options': {'userknownhostsfile': str(machine.known_hosts)}}
    assert '# GPU 1: NVIDIA Rig 16GB, 16000 MB' in path.read_text().splitlines()
    (client_home / '.ssh/config').unlink()          # the machine file does not need it
    (project / 'batch.sh').write_text('echo here\n')
    batch = run_cli('execute_batch', 'batch.sh', '--machines', 'gpu7', *NO_GPU)
    assert (batch.returncode, result('batch.sh.1')) == (0, b'here\n'), batch.stderr
    done = run_cli('execute_batch', *shlex.split('--check --machines gpu7'))
    assert done.returncode == 0, done.stdout


def test_it_replaces_no_file(init, lab):
    machine = lab()
    _, path = init('gpu7', machine)
    path.write_text('mine\n')
    logins = machine.logins()
    done, _ = init('gpu7', machine)
    assert (done.returncode, done.stdout, path.read_text()) == (2, '', 'mine\n')
    assert f'{path} is there already' in done.stderr and machine.logins() == logins


def test_a_machine_that_cannot_be_used_leaves_no_file(init, lab):
    machine = lab()
    machine.stop()
    done, path = init('gpu7', machine)
    assert (done.returncode, done.stdout, path.exists()) == (1, '', False)
    assert done.stderr.startswith(f'gpu7 cannot be used: nothing listens at 127.0.0.1 port '
                                  f'{machine.port}.')


def test_the_key_is_the_one_that_was_accepted(init, lab, tmp_path):
    machine = lab()
    wrong = new_key(tmp_path)
    config = (f'Host gpu7\n HostName 127.0.0.1\n User ben\n Port {machine.port}\n'
              f' IdentityFile {wrong}\n IdentityFile {machine.key}\n'
              f' UserKnownHostsFile {machine.known_hosts}\n')
    _, path = init('gpu7', machine, config)
    assert yaml.safe_load(path.read_text())['ssh_key_path'] == str(machine.key)


def test_a_jump_host_is_kept(init, lab):
    machine, jump = lab(), lab()
    known = machine.folder / 'all_known'
    known.write_text(machine.known_hosts.read_text() + jump.known_hosts.read_text())
    config = ''.join(f'Host {name}\n HostName 127.0.0.1\n User ben\n Port {one.port}\n'
                     f' IdentityFile {one.key}\n UserKnownHostsFile {known}\n{more}'
                     for name, one, more in (('gpu7', machine, ' ProxyJump gate\n'),
                                             ('gate', jump, '')))
    done, path = init('gpu7', machine, config)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(path.read_text())['proxy_jump'] == 'gate' and jump.logins() >= 2


def test_a_small_home_beside_a_large_scratch(init, lab):
    machine = lab(env={'SCRATCH': '/tmp'})
    with_disk(machine, '$([[ ${!#} = /tmp ]] && echo 90000000 4096 9 9 xfs ||'
              ' echo 1000000 4096 9 9 nfs)')
    _, path = init('gpu7', machine)
    lines = path.read_text().splitlines()
    assert '# workdir: /tmp' in lines and 'workdir' not in yaml.safe_load(path.read_text())
    assert '# The home has 3.8 GB free (nfs), this folder 343.3 GB:' in lines


def test_a_cluster_gets_its_engine(init, cluster):
    _, path = init('gpu7', cluster.login)
    found = yaml.safe_load(path.read_text())
    assert (found['engine'], found['workdir']) == ('slurm', '~/.ssh_scheduler')
    lines = path.read_text().splitlines()
    at = lines.index('# engine_options: --partition=main --account=NAME')
    assert lines[at - 1] == '# The partitions are main. To choose one, and your account:'
    assert ssh_scheduler.read_machine_file(str(path), 'gpu7').engine == 'slurm'


@pytest.mark.parametrize('words, complaint', [
    (['--init', 'a b'], 'is neither a machine file, a name from'),
    (['--init', 'gpu7', '--gather'], '--gather cannot be given with --init'),
    (['--init'], '--init needs a host'), (['--init', 'gpu7', 'true'], "unexpected word 'true'")])
def test_wrong_usage_of_init_is_2(run_cli, project, words, complaint):
    done = run_cli('execute_to', *words)
    assert (done.returncode, done.stdout) == (2, '') and complaint in done.stderr
