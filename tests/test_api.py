"""The program as a library: another package has a copy of the file, and uses its two classes."""
import json
import math
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import rig

# A program as a user would write it.  It prints each event as a line of JSON.
RUN = '''\
import json, sys
from experiments.vendor.ssh_scheduler import MachineRunner, SchedulerError, find_machine

def say(*words):
    print(json.dumps(words), flush=True)

try:
    with MachineRunner(find_machine(sys.argv[1]), **json.loads(sys.argv[2])) as runner:
        runner.register_started(lambda name: say('started', name))
        runner.register_ended(lambda name: say('ended', *runner.ended[name]))
        for event in ('ready', 'failed', 'collected', 'uncollected', 'returned', 'lost', 'warning'):
            runner.register(event, lambda *words, event=event: say(event, *words))
        for positional, named in json.loads(sys.argv[3]):
            runner.queue_up(*positional, **named)
        say('waiting', runner.busy)
        runner.wait()
        say('done', runner.state, runner.busy, runner.running, runner.unfinished)
except SchedulerError as error:
    say('error', str(error))
say('left')
'''


@pytest.fixture
def foreign(tmp_path, scheduler):
    """A repository with a copy of the file in a package of its own."""
    vendor = tmp_path / 'foreign/experiments/vendor'
    vendor.mkdir(parents=True)
    for package in (vendor, vendor.parent):
        (package / '__init__.py').write_text('')
    shutil.copy(scheduler, vendor)
    return tmp_path / 'foreign'


@pytest.fixture
def python(foreign, project, client_env):
    """Run Python text with the foreign repository on the path, and without this one."""
    def run(text, *words, status=0):
        done = subprocess.run(
            [sys.executable, '-c', textwrap.dedent(text), *map(str, words)], cwd=project,
            env={**client_env, 'PYTHONPATH': str(foreign)}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=60)
        assert (done.returncode, done.stderr) == (status, '')
        return done.stdout
    return run


@pytest.fixture
def run_jobs(python):
    """Run jobs, given as (positional, named) arguments of queue_up; return the events of RUN."""
    def run(machine, *jobs, **settings):
        said = python(RUN, machine, json.dumps(settings), json.dumps(jobs))
        return [json.loads(line) for line in said.splitlines()]
    return run


@pytest.fixture(params=['ssh', 'localhost'])
def home(request):
    """A machine of the rig, or the home folder that the tests give to this computer."""
    return request.getfixturevalue('lab1' if request.param == 'ssh' else 'client_home')


@pytest.fixture
def word(home):
    """The word for the machine."""
    return str(home.yaml()) if isinstance(home, rig.Machine) else 'localhost'


@pytest.fixture
def machine(home, word):
    """The word for the machine; afterwards, check that at most the cache is left on the machine."""
    yield word
    folder = home.home if isinstance(home, rig.Machine) else home
    assert {path.name for path in folder.glob('.ssh_scheduler/*/*')} <= {'cache'}


# ---- Importing ----

def test_importing_has_no_effect(python, project, client_home):
    said = python('''
        import os, signal, sys, threading
        before = set(sys.modules), [signal.getsignal(n) for n in signal.valid_signals()]
        import experiments.vendor.ssh_scheduler as s
        print([signal.getsignal(n) for n in signal.valid_signals()] == before[1])
        print(threading.active_count(), sorted(os.listdir('.')))
        print({'yaml', 'docopt', 'rich'} & set(sys.modules))
        print(s.__file__.endswith('foreign/experiments/vendor/ssh_scheduler.py'))
    ''')
    assert said == 'True\n1 []\nset()\nTrue\n'
    assert [path.name for path in client_home.iterdir()] == ['tmp']


def test_importing_runs_no_program(foreign, client_env, tmp_path):
    done = subprocess.run([sys.executable, '-c', 'import experiments.vendor.ssh_scheduler'],
                          env={**client_env, 'PYTHONPATH': str(foreign), 'PATH': str(tmp_path)},
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b'', b'')


# ---- MachineResources ----

def test_resources_are_scored_allocated_and_given_back(python):
    said = python('''
        import math
        from experiments.vendor.ssh_scheduler import (
            Allocation, Capacity, DoesNotFit, Gpu, MachineResources)
        gpus = (Gpu(0, 16000), Gpu(1, 8000))
        resources = MachineResources(Capacity(cores=8, memory_mb=16000, gpus=gpus))
        small, large = Allocation(gpus=0), Allocation(gpu_memory_mb=12000)
        print(resources.score(small), resources.score(Allocation(memory_mb=16001)))
        first = resources.allocate(large)
        print(first.gpus, first.visible_gpus, resources.score(large), resources.jobs)
        try:
            resources.allocate(large)
        except DoesNotFit as error:
            print(error)
        second = resources.allocate(Allocation(gpu_memory_mb=100))
        print(second.visible_gpus)
        resources.deallocate(first)
        print(resources.score(large) > -math.inf)
        resources.deallocate(second)
        try:
            resources.deallocate(second)
        except ValueError:
            print('twice')
        print(resources.jobs, resources.score(small), small.memory_mb)
    ''')
    lines = said.splitlines()
    small, impossible = map(float, lines[0].split())
    assert 0 > small > impossible == -math.inf       # a machine with GPUs is kept for GPU jobs
    assert lines[1] == '(0,) 0 -inf 1'
    assert 'GPU 1 has 8000 MB' in lines[2]
    assert lines[3:] == ['1', 'True', 'twice', f'0 {small} 2000']


def test_resources_take_anything_with_the_fields(python):
    said = python('''
        from types import SimpleNamespace as Record
        from experiments.vendor.ssh_scheduler import Allocation, MachineResources
        resources = MachineResources(Record(
            cores=1, memory_mb=100, gpus=(), total_cores=1, max_jobs=None, gpu_trouble=''))
        wanted = Record(cores=1, memory_mb=60, reserve=False, gpus=0, gpu_memory_mb=0,
                        gpu_utilization=0, reserve_gpu=False)
        placement = resources.allocate(wanted)
        print(resources.score(wanted))
        resources.deallocate(placement)
        print(resources.score(wanted))
    ''')
    taken, free = map(float, said.split())
    assert taken == -math.inf < free


# ---- MachineRunner ----

def test_a_job_as_in_the_docstring(run_jobs, project, machine):
    (project / 'train.py').write_text('import os; os.mkdir("model"); open("model/w", "w").write('
                                      '"weights"); open("other", "w"); print("trained")\n')
    said = run_jobs(machine, [['python3 train.py', ['train.py'], ['model'], 'first'], {}])
    assert said[0] == ['waiting', True]
    assert [words[:2] for words in said[1:-2]] == [
        ['ready'], ['started', 'first'], ['ended', 'first'], ['collected', 'first']]
    name, where, exit_code, wall_s, gpus, cpu_s, *peaks, started = said[3][1:]
    assert 0 <= cpu_s < 60 and len(peaks) == 2 and 0 <= time.time() - started < 60
    assert (where, exit_code, gpus) == (machine, 0, None) and 0 <= wall_s < 60
    assert said[-2:] == [['done', 'ready', False, [], []], ['left']]
    results = project / 'job_results'
    assert (results / 'first.out').read_text() == 'trained\n'
    assert (results / 'first.err').read_text() == ''
    assert [path.name for path in (results / 'first').iterdir()] == ['model']
    assert (results / 'first/model/w').read_text() == 'weights'


def test_many_jobs_with_the_defaults(run_jobs, project, machine):
    jobs = [[[f'echo {n}; echo {n} >made; exit {n % 2}'], {'job_name': f'job{n}'}]
            for n in range(40)]
    said = run_jobs(machine, *jobs)
    ended = {words[1]: words[3] for words in said if words[0] == 'ended'}
    assert ended == {f'job{n}': n % 2 for n in range(40)}
    for n in range(40):
        assert said.index(['started', f'job{n}']) < said.index(['collected', f'job{n}'])
        assert (project / f'job_results/job{n}/made').read_text() == f'{n}\n'


@pytest.mark.parametrize('command', ['echo short', 'seq 1000', 'echo made >made', 'exit 3'])
def test_a_job_has_ended_before_it_is_collected(run_jobs, machine, command):
    """The results of a job may come with the event of its end, or have to be fetched."""
    said = run_jobs(machine, [[command], {'job_name': 'job'}])
    assert [words[0] for words in said if words[1:2] == ['job']] == [
        'started', 'ended', 'collected']


def test_a_job_has_ended_before_its_results_cannot_be_stored(run_jobs, project, lab):
    (project / 'job_results/job').mkdir(parents=True)
    said = run_jobs(str(lab().yaml()), [['echo short'], {'job_name': 'job'}])
    assert [words[0] for words in said if words[1:2] == ['job']] == [
        'started', 'ended', 'uncollected']


def test_paths_may_be_written_in_any_way(run_jobs, project, machine):
    for path in ('data/deep/file', 'other'):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(path)
    said = run_jobs(machine, [
        ['cat data/deep/file other; mkdir -p out/deep; echo >out/deep/new; echo >x',
         ['./data/', f'{project}/other'], ['./out/', './/x'], 'job'], {}])
    assert [words for words in said if words[0] == 'warning'] == []
    results = project / 'job_results'
    assert (results / 'job.out').read_text() == 'data/deep/fileother'
    found = [str(path.relative_to(results / 'job')) for path in (results / 'job').rglob('*')]
    assert sorted(found) == ['out', 'out/deep', 'out/deep/new', 'x']


def test_all_of_the_folder_comes_back_with_a_dot(run_jobs, project, machine):
    (project / 'sent').write_text('sent')
    run_jobs(machine, [['mkdir new; echo >new/made', ['sent'], ['.'], 'job'], {}])
    found = sorted(str(path.relative_to(project / 'job_results/job'))
                   for path in (project / 'job_results/job').rglob('*'))
    assert found == ['new', 'new/made', 'sent']


def test_gpus_links_and_excludes(run_jobs, project, machine):
    (project / 'data').mkdir()
    for name in ('data/big', 'kept.py', 'left.pyc'):
        (project / name).write_text(name)
    run_jobs(machine, [
        ['ls; cat data/big; echo; echo $CUDA_VISIBLE_DEVICES', ['.'], [], 'job'],
        {'link_loc': ['data'], 'exclude': ['*.pyc'], 'gpus': '3'}])
    assert (project / 'job_results/job.out').read_text() == 'data\nkept.py\ndata/big\n3\n'
    assert not (project / 'job_results/job').exists()


def test_jobs_without_a_name_get_one(run_jobs, project, machine):
    said = run_jobs(machine, [['true'], {}], [['true'], {}])
    assert len({words[1] for words in said if words[0] == 'started'}) == 2


def starts(project):
    """Return when the client sent the start of each job, in their order.

    The machine may start them later, each after another delay.
    """
    lines = (project / 'job_results/.ssh_scheduler/journal').read_text().splitlines()
    return [event['time'] for event in map(json.loads, lines) if event['event'] == 'claimed']


def test_spacing_is_the_least_time_between_starts(run_jobs, project, machine):
    run_jobs(machine, *[[['true'], {'job_name': f'job{n}'}] for n in range(3)], spacing_s=0.5)
    first, _, third = starts(project)
    assert third - first > 0.9          # two intervals, less what this process needs for a start


@pytest.mark.parametrize('name', ['/', '../up', '-x', 'a b', '.hidden'])
def test_names_that_are_no_file_names_are_refused(run_jobs, word, name):
    said = run_jobs(word, [['true', [], [], name], {}])
    assert said[0][0] == 'error' and 'the job name' in said[0][1]
    assert said[1:] == [['left']]


@pytest.mark.parametrize('path, reason', [('missing', 'there is no such file'),
                                          ('/etc/hosts', 'outside the current folder'),
                                          ('../up', 'outside the current folder')])
def test_paths_that_cannot_be_sent_are_refused(run_jobs, word, path, reason):
    said = run_jobs(word, [['true', [path]], {}])
    assert said[0][0] == 'error' and reason in said[0][1]


def test_a_machine_that_cannot_be_reached_raises_in_wait(run_jobs, lab1):
    file = lab1.yaml(port=rig.free_port())
    said = run_jobs(file, [['true', [], [], 'job'], {}])
    assert [words[0] for words in said] == ['waiting', 'returned', 'failed', 'error', 'left']
    assert 'nothing listens at 127.0.0.1 port' in said[3][1]
    lab1.yaml()


def test_a_job_may_be_queued_before_there_is_a_connection(python, project, machine):
    (project / 'data').write_text('data\n')
    said = python('''
        import sys
        from experiments.vendor.ssh_scheduler import MachineRunner, find_machine
        runner = MachineRunner(find_machine(sys.argv[1]))
        runner.queue_up('cat data', ['data'], [], 'job')
        with runner:
            runner.wait()
        print(runner.ended['job'].exit_code)
    ''', machine)
    assert said == '0\n'
    assert (project / 'job_results/job.out').read_text() == 'data\n'


def test_many_jobs_may_be_queued_before_there_is_a_connection(python, project, word):
    said = python('''
        import sys
        from experiments.vendor.ssh_scheduler import MachineRunner, find_machine
        runner = MachineRunner(find_machine(sys.argv[1]))
        for number in range(2000):
            runner.queue_up('true', job_name=f'job{number}')
        runner.connect()
        print(runner.busy, runner.state)
        runner.close()
        runner.__exit__()
    ''', word)
    assert said == 'True connecting\n'


def test_the_sink_has_all_when_a_job_has_ended(python, project, machine):
    said = python('''
        import sys, time
        from experiments.vendor.ssh_scheduler import MachineRunner, find_machine
        sizes = []

        def sink(stream, data):
            time.sleep(0.05)                # so that not all of it has come by then
            sizes.append(len(data))

        with MachineRunner(find_machine(sys.argv[1])) as runner:
            for event in ('ended', 'collected'):
                runner.register(event, lambda name, event=event: print(event, sum(sizes)))
            runner.queue_up('sleep 0.4; head -c 3000000 /dev/zero', job_name='job', sink=sink)
            runner.wait()
    ''', machine)
    assert said == 'ended 3000000\ncollected 3000000\n'


def test_what_a_callback_raises_reaches_the_caller(python, project, word):
    said = python('''
        import sys
        from experiments.vendor.ssh_scheduler import MachineRunner, find_machine

        def fail(name):
            raise FileNotFoundError('mine')

        try:
            with MachineRunner(find_machine(sys.argv[1])) as runner:
                runner.register('collected', fail)
                runner.register('warning', print)
                runner.queue_up('echo; echo >made', job_name='job')
                runner.wait()
        except FileNotFoundError as error:
            print(error)
    ''', word)
    assert said == 'mine\n' and (project / 'job_results/job/made').exists()


def test_an_event_that_does_not_exist_is_refused(python, project, word):
    said = python('''
        import sys
        from experiments.vendor.ssh_scheduler import MachineRunner, find_machine
        with MachineRunner(find_machine(sys.argv[1])) as runner:
            try:
                runner.register('colected', print)
            except ValueError as error:
                print(error)
    ''', word)
    assert said == "there is no event 'colected' (did you mean collected?)\n"


def test_spaced_jobs_wait_while_a_first_login_is_refused(python, project, lab):
    """The jobs still start at their intervals, and all run."""
    machine = lab(sshd_options='MaxStartups 1:100:1')
    said = python('''
        import socket, sys
        from experiments.vendor.ssh_scheduler import MachineRunner, find_machine
        machine = find_machine(sys.argv[1])
        other = socket.create_connection((machine.host, machine.port))
        other.recv(100)
        runner = MachineRunner(machine, spacing_s=0.5)
        with runner:
            for name in 'abc':
                runner.queue_up('true', job_name=name)
            while 'drop connection' not in open(sys.argv[2]).read():
                runner.session.processes.wait(0.1)
            other.close()
            runner.wait()
        print(*sorted(runner.ended))
    ''', machine.yaml(), machine.log)
    first, _, third = starts(project)
    assert (said, third - first > 0.9) == ('a b c\n', True)


def test_an_exception_in_the_block_ends_all_that_was_begun(python, project, word):
    said = python('''
        import sys
        from experiments.vendor.ssh_scheduler import MachineRunner, find_machine
        try:
            with MachineRunner(find_machine(sys.argv[1])) as runner:
                raise KeyError('mine')
        except KeyError as error:
            print(error)
    ''', word)
    assert said == "'mine'\n"


def test_two_machines_share_a_session(python, project, lab1, lab2):
    (project / 'data').write_text('data\n')
    said = python('''
        import sys
        from experiments.vendor import ssh_scheduler as s
        results = s.ResultStore('job_results').open()
        session = s.Client(results)
        runners = [s.MachineRunner(s.find_machine(word), session, number)
                   for number, word in enumerate(sys.argv[1:])]
        for runner in runners:
            runner.connect()
            runner.probe()
            runner.queue_up('cat data', ['data'], [], f'job{runner.machine.port}')
        while any(runner.busy for runner in runners):
            session.processes.wait()
        print(*(runner.capacity.total_cores for runner in runners))
        for runner in runners:
            runner.close()
        while any(runner.state == 'closing' for runner in runners):
            session.processes.wait()
        session.close()
        results.close()
    ''', lab1.yaml(), lab2.yaml())
    assert said == '8.0 8.0\n'
    for lab in (lab1, lab2):
        assert (project / f'job_results/job{lab.port}.out').read_text() == 'data\n'
