"""query_machines: what is free, on real machines."""
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


@pytest.fixture
def query(run_cli, project):
    """Run it: query(machines, *options) -> CompletedProcess."""
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
    off.stop()
    done = query([big, small, off])
    user = subprocess.run(['id', '-un'], capture_output=True, text=True).stdout.strip()
    width = max(len(str(m.yaml())) for m in (big, small, off))
    assert done.stdout.splitlines() == [
        'machine'.ljust(width) + '  cores    memory GB  GPU         memory GB  busy  used by',
        str(big.yaml()).ljust(width) + '  14.0/16  32.0/64.0  0 RTX 3090  2.0/24.0   98%   '
        f'{user} (1 process)',
        ' ' * width + '                      1 RTX 3090  24.0/24.0  0%',
        str(small.yaml()).ljust(width) + '  2.0/2    2.0/4.0    has no nvidia-smi, so no GPU is '
        'known',
        str(off.yaml()).ljust(width) + '  cannot be used: nothing listens at '
        f'127.0.0.1 port {off.port}',
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
        assert ('jobs fit' in query([machine], *options).stdout) == (fit is not None)


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
    with open(tmp_path / 'gate', 'w') as gate:
        gate.write('go\n')
    assert batch.end().returncode == 0


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
    assert lines[0].index('busy') == lines[1].index('0%') == lines[2].index('0%')


def test_localhost_needs_no_ssh(query):
    done = query(['localhost'], '--json', env={'PATH': '/usr/bin:/bin'})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['cores_total'] <= os.cpu_count()


@pytest.mark.parametrize('argv, complaint', [
    ([], '--machines is missing'),
    (['--watch=0', '--machines', 'localhost'], '--watch must be a number'),
    (['--watch', '1', '2', '--machines', 'localhost'], '--watch takes one number'),
    (['--machines', 'localhost', '--num-cpus=0'], '--num-cpus must be a number'),
    (['--machines', 'localhost', '--num-gpus=1', '--no-gpu-required'], 'give one of them'),
    (['--machine', 'localhost'], 'did you mean --machines'),
    (['localhost'], "unexpected word 'localhost'")])
def test_wrong_usage(run_cli, project, argv, complaint):
    done = run_cli('query_machines', *argv)
    assert done.returncode == 2 and complaint in done.stderr and not done.stdout
