"""query_machines: the free resources of real machines."""
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
import rig
from batching import Follower, places
from commands import at_terminal


@pytest.fixture
def query(run_cli, project):
    """Run query_machines: query(machines, *options) -> CompletedProcess."""
    def run(machines, *options, **settings):
        return run_cli('query_machines', *options, '--machines', *words(machines), **settings)

    return run


def words(machines):
    return [m.yaml() if isinstance(m, rig.Machine) else m for m in machines]


def assert_nothing_left(machine):
    assert all(rig.ends(pid) for pid, _ in machine.processes())
    assert places(machine.home) == {} and not [*machine.shared.iterdir()]


@pytest.fixture
def stranger():
    with subprocess.Popen(['sleep', '1000']) as process:
        yield process.pid
        process.kill()


def test_a_table_of_machines(query, lab, stranger):
    gpus = [{'index': 0, 'memory_total_mb': 24576, 'memory_free_mb': 2048, 'utilization': 98,
             'name': 'RTX 3090'}, {'index': 1, 'memory_total_mb': 24576, 'name': 'RTX 3090'}]
    big = lab(name='big', gpus=gpus, cores=16, memory_mb=32768, busy_cores=2)
    (big.folder / 'gpus.apps').write_text(f'{rig.gpu_row(0)[1]}, {stranger}, 22000\n')
    small, off = lab(name='small', cores=2, memory_mb=2048), lab(name='off')
    old = lab(name='old', gpus=[], nvidia_smi='#!/bin/sh\necho it broke; exit 9\n')
    off.stop()
    done = query([big, small, old, off])
    user = subprocess.run(['id', '-un'], capture_output=True, text=True).stdout.strip()
    width = max(len(str(m.yaml())) for m in (big, small, old, off))
    assert done.stdout.splitlines() == [
        'machine'.ljust(width) + '  free cores, GPUs      free memory  busy  used by',
        str(big.yaml()).ljust(width) + '  14.0 of 16 cores    32.0 of 64 GB',
        ' ' * width + f'  GPU 0 RTX 3090       2.0 of 24 GB   98%  {user} (1 process)',
        ' ' * width + '  GPU 1 RTX 3090      24.0 of 24 GB    0%',
        str(small.yaml()).ljust(width) + '  2.0 of 2 cores        2.0 of 4 GB        no nvidia-smi',
        str(old.yaml()).ljust(width) + '  8.0 of 8 cores    15.6 of 31.2 GB',
        ' ' * width + '  has an nvidia-smi that fails with status 9: it broke',
        str(off.yaml()).ljust(width) + '  cannot be used: nothing listens at '
        f'127.0.0.1 port {off.port}',
        '3 of 4 machines answer; free: 24.0 of 26 cores, 1 of 2 GPUs',
    ]
    assert (done.returncode, done.stderr) == (1, '')
    assert_nothing_left(big)
    assert big.logins() == 1
    assert not os.listdir('.')


def test_how_many_jobs_fit(query, lab):
    machine = lab(gpus=rig.fake_gpus(3), cores=8, memory_mb=16000)
    for options, fit in (((), None), (('--num-cpus=1',), 3), (('--num-gpus=2',), 1),
                         (('--no-gpu-required', '--memory-required=5000'), 3),
                         (('--memory-required=99999',), 0)):
        done = query([machine], '--json', *options)
        assert json.loads(done.stdout).get('jobs_fit') == fit
        table = query([machine], *options).stdout
        said = [f'{fit} such job{"" if fit == 1 else "s"} fit'] * (fit is not None)
        assert re.findall(r'\d+ such jobs? fit', table) == said * 2        # per machine, and in all


def test_json_for_programs(query, lab, lab1):
    off = lab(name='off')
    off.stop()
    done = query([lab1, off], '--json')
    found, failed = map(json.loads, done.stdout.splitlines())
    assert failed == {'machine': str(off.yaml()),
                      'error': f'nothing listens at 127.0.0.1 port {off.port}'}
    assert (found['machine'], found['cores_free'], found['cores_total']) == (
        str(lab1.yaml()), 8, 8)
    assert (found['memory_free_mb'], found['memory_total_mb']) == (16000, 32000)
    assert found['gpus'][1] == {
        'index': 1, 'name': 'NVIDIA Rig 16GB', 'uuid': rig.gpu_row(1)[1], 'memory_free_mb': 16000,
        'memory_total_mb': 16000, 'utilization': 0, 'users': [], 'processes': 0, 'batch_jobs': 0}
    assert found['gpu_trouble'] is None and done.returncode == 1


def test_the_jobs_of_batches_are_shown(query, start_cli, lab, tmp_path):
    machine = lab(gpus=rig.fake_gpus(2))
    os.mkfifo(tmp_path / 'gate')
    with open('batch.sh', 'w') as file:
        file.write(f'read -r <{tmp_path}/gate\n')
    batch = Follower(start_cli('execute_batch', 'batch.sh', '--machines', machine.yaml()))
    batch.until('started: ')
    found = json.loads(query([machine], '--json').stdout)
    assert found['batch_jobs'] == 1
    assert [gpu['batch_jobs'] for gpu in found['gpus']] == [1, 0]
    assert found['batch_users'] == {'': 1}
    table = query([machine]).stdout.splitlines()
    assert table[1].endswith('GB        batch jobs: you 1') and table[2].endswith(' 1 batch job')
    assert re.fullmatch(r'1 of 1 machine answers; free: 7.* of 8 cores, 1 of 2 GPUs', table[-1])
    with open(tmp_path / 'gate', 'w') as gate:
        gate.write('go\n')
    assert batch.end().returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason='only root can have machines of another user')
def test_the_batch_jobs_of_others_have_their_names(query, start_cli, lab):
    machine = lab(name='mine')
    other = lab(name='theirs', beside=machine, uid=65534)
    gates = [machine.folder / f'gate{number}' for number in range(2)]
    for path in gates:
        os.mkfifo(path)
        path.chmod(0o666)
    with open('batch.sh', 'w') as file:
        file.writelines(f'read -r <{path}\n' for path in gates)
    batch = Follower(start_cli('execute_batch', 'batch.sh', '--no-gpu-required',
                               '--memory-required=10', '--machines', other.yaml()))
    batch.until('started: ')
    batch.until('started: ')
    assert query([machine]).stdout.splitlines()[1].endswith('  batch jobs: nobody 2; no nvidia-smi')
    assert query([other]).stdout.splitlines()[1].endswith('  batch jobs: you 2; no nvidia-smi')
    found = json.loads(query([machine], '--json').stdout)
    assert (found['batch_jobs'], found['batch_users']) == (2, {'nobody': 2})
    for path in gates:
        with open(path, 'w') as gate:
            gate.write('go\n')
        batch.until('finished: ')
    assert batch.end().returncode == 0


NAMES = ['lab1', 'gpu-server-of-the-whole-institute-17.informatics.example.org']


@pytest.mark.parametrize('columns', [60, 80, 200])
@pytest.mark.parametrize('name', NAMES)
def test_the_table_fits_the_terminal(scheduler, client_env, lab, project, stranger, columns, name):
    gpus = [{'index': n, 'memory_total_mb': 81920, 'memory_free_mb': free, 'name': f'NVIDIA {kind}'}
            for n, free, kind in ((0, 59920, 'GeForce RTX 2080 Ti'),
                                  (1, 81920, 'Tesla V100-SXM2-32GB'), (2, 81920, 'H100 80GB HBM3'))]
    machine = lab(gpus=gpus, cores=128, memory_mb=1031000)
    (machine.folder / 'gpus.apps').write_text(f'{rig.gpu_row(0)[1]}, {stranger}, 22000\n')
    (project / 'm.yaml').write_text(f'{machine.yaml().read_text()}\nname: {name}\n')
    with at_terminal(scheduler, client_env, 'query_machines', '--machines', 'm.yaml',
                     columns=columns) as terminal:
        assert terminal.end() == 0
    lines = re.sub('\x1b\\[\\d*m', '', terminal.said.decode()).splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= columns
    assert lines[1].startswith(f'{name} ') == (len(name) < 12 or columns == 200)
    assert ('…' in lines[1]) == (len(name) > 12 and columns < 200)
    assert lines[1][:5] == name[:5].ljust(5)
    assert ' 128 of 128 cores ' in lines[1] and 'of 2014 GB' in lines[1]
    assert (' GPU 1 V100-SXM2-32GB ' if columns > 60 else ' GPU 1 V100-SXM2…') in lines[3]
    assert ' GPU 0 RTX 2080 Ti ' in lines[2] and '(1 process)' in lines[2] or columns == 60
    assert lines[-1] == '1 of 1 machine answers; free: 128 of 128 cores, 2 of 3 GPUs'


def test_watch_looks_again_until_it_is_interrupted(start_cli, lab, project):
    machine = lab(gpus=rig.fake_gpus(1))
    query = Follower(start_cli('query_machines', '--watch', '1', '--json', '--machines',
                               machine.yaml()))
    assert json.loads(query.until('{'))['gpus'][0]['utilization'] == 0
    machine.set_gpus(rig.fake_gpus(1, utilization=50))
    while json.loads(query.until('{'))['gpus'][0]['utilization'] != 0.5:
        pass
    os.kill(query.process.pid, signal.SIGINT)
    done = query.end()
    assert (done.returncode, done.stderr) == (0, '')
    assert machine.logins() == 1
    assert_nothing_left(machine)


def test_watch_ends_with_its_reader(start_cli, lab1, project):
    query = start_cli('query_machines', '--watch=1', '--machines', lab1.yaml())
    assert query.stdout.readline().startswith('machine')
    query.stdout.close()
    assert query.wait(rig.SAFETY_NET_S) == 0


def test_on_a_terminal_it_has_colours(client_env, scheduler, lab1, project):
    out, terminal = pty.openpty()
    try:
        subprocess.run([sys.executable, scheduler, 'query_machines', '--machines', lab1.yaml()],
                       env={**client_env, 'TERM': 'xterm'}, stdout=terminal, check=True,
                       timeout=rig.SAFETY_NET_S)
        said = os.read(out, 65536).decode()
    finally:
        os.close(out)
        os.close(terminal)
    lines = re.sub('\x1b\\[\\d*m', '', said).splitlines()
    assert (said.count('\x1b[32m'), said.count('\x1b[33m')) == (5, 1)
    assert lines[0].index('busy') + 2 == lines[2].index('0%') == lines[3].index('0%')


def test_either_form_of_machines_is_taken(run_cli, project):
    assert run_cli('query_machines', '--json', '--machine', 'localhost').returncode == 0


def test_localhost_needs_no_ssh(query):
    done = query(['localhost'], '--json', env={'PATH': '/usr/bin:/bin'})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['cores_total'] <= os.cpu_count()


@pytest.mark.parametrize('argv, complaint', [
    ([], '--machines is missing'),
    (['--watch=0', '--machines', 'localhost'], '--watch must be a time of at least 1 s'),
    (['--watch', '1', '2', '--machines', 'localhost'], '--watch takes one time'),
    (['--machines', 'localhost', '--num-cpus=0'], '--num-cpus must be a number'),
    (['--machines', 'localhost', '--num-gpus=1', '--no-gpu-required'], 'give one of them'),
    (['--machnes', 'localhost'], 'did you mean --machines'),
    (['--watch', '5x', '--machines', 'localhost'], "not '5x'. Examples: 90 (seconds), 10m, 1h30m."),
    (['localhost'], "unexpected word 'localhost'. To name machines: --machines localhost.")])
def test_wrong_usage(run_cli, project, argv, complaint):
    done = run_cli('query_machines', *argv)
    assert done.returncode == 2 and complaint in done.stderr and not done.stdout
