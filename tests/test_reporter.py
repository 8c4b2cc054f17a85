"""The output of a batch, its order and its streams; and the scheduling, with fake workers.

A FakeWorker records which jobs would start and ends those that the test names (the idea is
ninja's), so the real Run is followed step by step without a process.  The last tests run the
program itself, which prints into a pipe and on a terminal.
"""
import errno
import io
import math
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssh_scheduler as s

# ---- A lab that obeys the test ----


class Lab:
    """A batch on fake machines.  Each wait of the Run advances the generator `steps`.

    The Lab also stands in for the Client and its Processes.
    """

    def __init__(self, results, machines, text, words=(), path='example/batch_script.sh',
                 live=False):
        self.out, self.err = io.StringIO(), io.StringIO()
        self.results, self.journal, self.processes, self.live = results, results.journal, self, live
        self.reporter = s.Reporter(out=self.out, err=self.err)
        self.workers = [FakeWorker(name, capacity) for name, capacity in machines.items()]
        options = s.read_options(s.EXECUTE_BATCH_USAGE, ['--machines', *machines, *words, path])
        self.jobs = s.read_jobs(path, text, options, self.reporter.warning)
        self.options, self.allocation, self.path = options, s.read_allocation(options), path
        self.batch = None                       # the Run
        self.steps = iter(())

    def run(self, steps=()):
        """Do what run_batch does; return the exit status."""
        name = s.name_of_batch(self.path)
        lines = s.match_lines(self.jobs, name, self.results)
        plan = s.plan_lines(lines, self.results, [worker.machine for worker in self.workers])
        view = s.BatchView(self.reporter, self.results, plan, self.allocation, self.options,
                           self.path)
        run = self.batch = s.Run((*lines.jobs, *lines.gone), self.workers, self, view,
                                 s.Policy(asks_late=True, noted={'batch': name}))
        s.take_up_lines(run, plan)
        view.names()
        run.fleet.log_in()
        for worker in self.workers:
            worker.become_ready()
        run.fleet.meet()
        view.limits(self.workers)
        view.check_room()
        view.skipped()
        self.steps = iter(steps)
        return s.finish_batch(run, view, self.reporter, True)

    def wait(self, timeout_s=None):
        try:
            next(self.steps)
        except StopIteration:
            pytest.fail(f'the batch waits for ever; it said\n{self.out.getvalue()}')

    def call_later(self, delay_s, function):
        pass

    @property
    def running(self):
        return [attempt for worker in self.workers for attempt in worker.attempts]

    def started(self):
        """Report the start of every job whose start was requested."""
        for attempt in self.running:
            if attempt.state == 'claimed':
                self.batch.lives.move(attempt, 'running')

    def end(self, name, exit_code=0, collected=True):
        """End the job with this suffix.  collected: None if its results are on their way"""
        attempt = next(attempt for attempt in self.running if attempt.name.endswith(name))
        attempt.result = s.JobResult(attempt.name, attempt.machine.name, exit_code, 0.1)
        self.batch.lives.move(attempt, 'ended', exit_code=exit_code, wall_s=0.1)
        self.results.commit(attempt.name, {'out': b'', 'err': b''}, None, False)
        if collected:
            self.batch.lives.move(attempt, 'collected', kept=())
        elif collected is not None:
            self.batch.lives.move(attempt, 'kept')


class FakeWorker:
    """Has the methods of a Worker that a Run calls."""

    away_since = is_stopping = None
    was_ready = False

    def __init__(self, name, capacity):
        self.name, self.capacity = name, capacity
        self.machine = s.Machine(name, host=name)
        self.run, self.state, self.why = None, 'new', ''
        self.retry, self.same_as = 'never', None
        self.history = []                   # names in the order of their starts
        self.asked = 0                      # how often it was asked for free resources

    @property
    def attempts(self):
        """The attempts that run on this machine, as far as the Run knows."""
        return self.run.lives.of(self, *s.ALIVE) if self.state != 'failed' else []

    @property
    def busy(self):
        return bool(self.attempts)

    def connect(self, want_gpus, tied):
        self.state = 'connecting'

    def probe(self):
        pass

    def ask(self):
        pass

    def prepare(self, forwards):
        pass

    def measure(self, within_s=0.0):
        self.asked += 1

    def start(self, attempt):
        attempt.stage = 'its files'
        self.run.lives.move(attempt, 'claimed', **attempt.record)
        self.history.append(attempt.name)

    def become(self, state, why=''):
        before, self.state, self.why = self.state, state, why
        self.was_ready = self.was_ready or state == 'ready'
        self.run.machine_changed(self, before)

    def become_ready(self):
        self.become('ready')


@pytest.fixture
def results(project):
    with_lock = s.ResultStore('job_results').open()
    yield with_lock
    with_lock.close()


GPUS = (s.Gpu(0, 16000), s.Gpu(1, 16000))
TWO_GPUS = s.Capacity(cores=16, memory_mb=32000, gpus=GPUS)
NO_GPUS = s.Capacity(cores=8, memory_mb=16000, total_cores=8, gpu_trouble='has no GPU')


# ---- The spec's sample ----

# Step 5 of the spec, without the remarks.  The warning of the spec names line 3, yet line 3 starts;
# here a fifth line is the one that has results.
SAMPLE = '''\
machine limits:  {'my_machine.yaml': 2}
machine gpu choices: [[0, 1]]
WARNING: job results already exists for line 5, skipping evaluation: delete if you wish to rerun
started: example_batch_script.sh.1;  export CUDA_VISIBLE_DEVICES=0 && echo "one job"
started: example_batch_script.sh.2;  export CUDA_VISIBLE_DEVICES=1 && echo "jobs will tell you if \
they fail" && exit 1
finished: example_batch_script.sh.1; echo "one job"
started: example_batch_script.sh.3;  export CUDA_VISIBLE_DEVICES=0 && echo "another job" && echo \
"a combined job (bash syntax applies)"
failed: example_batch_script.sh.2; echo "jobs will tell you if they fail" && exit 1
started: example_batch_script.sh.4;  export CUDA_VISIBLE_DEVICES=1 && bash local.sh && echo "you \
can also call local files because they are copied by the remote by the default value of \
--copy-forwards"
finished: example_batch_script.sh.3; echo "another job" && echo "a combined job (bash syntax \
applies)"
failed: example_batch_script.sh.4; bash local.sh && echo "you can also call local files because \
they are copied by the remote by the default value of --copy-forwards"
'''
LINES = '''\
echo "one job"
echo "jobs will tell you if they fail" && exit 1
echo "another job" && echo "a combined job (bash syntax applies)"
bash local.sh && echo "you can also call local files because they are copied by the remote by the \
default value of --copy-forwards"
echo "done before"
'''


def test_the_sample_of_the_spec(results, project):
    (project / 'job_results/example_batch_script.sh.5.out').write_text('done before\n')
    lab = Lab(results, {'my_machine.yaml': TWO_GPUS}, LINES, ['--memory-required=2000'])

    def steps():
        lab.started()
        lab.end('.1')
        yield
        lab.started()
        lab.end('.2', 1)
        yield
        lab.started()
        lab.end('.3')
        yield
        lab.end('.4', 127)
        yield

    status = lab.run(steps())
    sample, rest = lab.out.getvalue()[:len(SAMPLE)], lab.out.getvalue()[len(SAMPLE):]
    assert sample == SAMPLE
    assert re.sub(r'\d+\.\d s', 'N s', rest) == '''\
done: 5 jobs: 2 finished, 2 failed, 1 skipped, N s
example_batch_script.sh.2: exit code 1 on my_machine.yaml, see \
job_results/example_batch_script.sh.2.err
example_batch_script.sh.4: exit code 127 on my_machine.yaml, see \
job_results/example_batch_script.sh.4.err
'''
    assert (status, lab.err.getvalue()) == (1, '''\
only a part of the results is left for line 5: job_results/example_batch_script.sh.5.out. To run \
this line again: rm -r job_results/example_batch_script.sh.5.out
the journal does not know which commands made example_batch_script.sh.5
skipped: 1 line that has results
''')


def test_the_last_line_tells_why_the_exit_status_is_1_where_nothing_failed_now(results):
    for number, counts in enumerate(['2 finished, 1 failed', '0 finished, 0 failed, 3 skipped '
                                     '(1 of them failed)']):
        lab = Lab(results, {'m': NO_GPUS}, 'true\nfalse\necho\n', ['--no-gpu-required'])

        def steps(lab=lab):
            lab.started()
            for name, code in (('.1', 0), ('.2', 3), ('.3', 0)):
                lab.end(name, code)
            yield

        assert lab.run(() if number else steps()) == 1
        assert f'done: 3 jobs: {counts}, ' in lab.out.getvalue()


def test_a_job_is_counted_once_though_its_results_are_not_here(results):
    lab = Lab(results, {'m': NO_GPUS}, 'true\nfalse\ntrue\n', ['--no-gpu-required'])

    def steps():
        lab.started()
        for name, code in (('.1', 0), ('.2', 3), ('.3', 0)):
            lab.end(name, code, collected=name == '.3')
        yield

    assert lab.run(steps()) == 1
    assert 'done: 3 jobs: 1 finished, 0 failed, 2 not collected (2 of them ended), ' in (
        lab.out.getvalue())


def test_jobs_that_have_ended_are_counted_when_the_others_are_left(results):
    lab = Lab(results, {'m': NO_GPUS}, 'true\nfalse\ntrue\n', ['--no-gpu-required'])

    def steps():
        lab.started()
        lab.end('.2', 1, collected=None)
        lab.batch.leave()
        yield

    assert lab.run(steps()) == 130
    assert 'interrupted: 3 jobs: 0 finished, 0 failed, 3 not collected (1 of them ended), ' in (
        lab.out.getvalue())
    assert 'left: 2 jobs keep running on m; 1 job has ended. The same command' in (
        lab.err.getvalue())


def test_what_an_earlier_run_started_is_announced_as_such(results):
    """It is printed as `running`, and a job that starts now as `started`."""
    results.journal.write(event='claimed', job='batch.sh.1', attempt=1, machine='m', gpus=None,
                          command='true', where='m', batch='batch.sh')
    lab = Lab(results, {'m': NO_GPUS}, 'true\nfalse\n', ['--no-gpu-required'], path='batch.sh')
    results.journal.jobs['batch.sh.1']['machine'] = lab.workers[0].machine.address

    def steps():
        lab.started()
        lab.end('.1')
        lab.end('.2')
        yield

    assert lab.run(steps()) == 0
    said = lab.out.getvalue()
    assert 'running: batch.sh.1;  true\n' in said and 'started: batch.sh.2;  false\n' in said
    assert 'started: batch.sh.1' not in said


def test_a_command_that_changed_is_run_under_a_name_of_its_own(results):
    first = Lab(results, {'m': NO_GPUS}, 'echo old\n', ['--no-gpu-required'])

    def steps(lab):
        lab.started()
        lab.end('.1')
        yield

    assert first.run(steps(first)) == 0
    second = Lab(results, {'m': NO_GPUS}, 'echo new\necho more\n', ['--no-gpu-required'])

    def more():
        second.started()
        second.end('.1-2')
        second.end('.sh.2')
        yield

    assert second.run(more()) == 0
    assert 'WARNING' not in second.out.getvalue()
    assert ('new names for results, because other commands have the usual ones: line 1: '
            'example_batch_script.sh.1-2\n') in second.err.getvalue()
    assert second.workers[0].history == ['example_batch_script.sh.1-2', 'example_batch_script.sh.2']


@pytest.mark.parametrize('words, prefix', [
    (['--no-gpu-required'], ''), (['--reserve'], ''),
    ([], 'export CUDA_VISIBLE_DEVICES=0 && ')])
def test_cuda_visible_devices_is_shown_where_it_is_set(results, words, prefix):
    lab = Lab(results, {'m': TWO_GPUS}, 'true\n', words)

    def steps():
        lab.started()
        lab.end('.1')
        yield

    assert lab.run(steps()) == 0
    assert f'started: example_batch_script.sh.1;  {prefix}true\n' in lab.out.getvalue()


def test_a_command_of_many_lines_or_with_escapes_is_one_plain_line(results):
    lab = Lab(results, {'m': NO_GPUS}, 'echo a \\\n  b \x1b[31m \x07é\n', ['--no-gpu-required'])

    def steps():
        lab.started()
        lab.end('.1')
        yield

    lab.run(steps())
    assert 'finished: example_batch_script.sh.1; echo a    b \\x1b[31m \\x07é\n' in (
        lab.out.getvalue())


# ---- Placement ----

def test_lines_start_in_their_order(results):
    lab = Lab(results, {'m': NO_GPUS}, 'true\n' * 30, ['--no-gpu-required', '--memory-required=1'])

    def steps():
        while True:
            lab.started()
            lab.end(lab.running[0].name)
            yield

    assert lab.run(steps()) == 0
    assert lab.workers[0].history == [job.name for job in lab.jobs]


def test_jobs_are_spread_over_the_machines(results):
    lab = Lab(results, {'a': NO_GPUS, 'b': NO_GPUS}, 'true\n' * 4, ['--no-gpu-required'])

    def steps():
        assert [len(worker.attempts) for worker in lab.workers] == [2, 2]
        for number in range(1, 5):
            lab.end(f'.{number}')
        yield

    assert lab.run(steps()) == 0


PARTIAL = 'execute_remote --job-name {name} --no-gpu-required {options} true'
options_of_a_job = st.one_of(
    st.builds('--num-cpus={} --memory-required={}'.format, st.sampled_from([0.5, 1, 2, 4]),
              st.sampled_from([10, 500, 1000])),
    st.just('--reserve'))
capacities = st.builds(
    lambda cores, memory_mb: s.Capacity(cores, memory_mb, total_cores=8.0),
    st.sampled_from([0.0, 3.5, 8.0]), st.sampled_from([1000, 4000]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(options_of_a_job, min_size=1, max_size=15), st.lists(
    capacities, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_no_machine_idles_while_a_waiting_job_fits_it(tmp_path_factory, options, machines, chance):
    """Jobs end in any order.  Each job runs once, and no machine is ever overbooked."""
    folder = tmp_path_factory.mktemp('batch')
    results = s.ResultStore(str(folder / 'job_results')).open()
    text = ''.join(PARTIAL.format(name=f'job{n}', options=words) + '\n'
                   for n, words in enumerate(options))
    lab = Lab(results, {f'm{n}': capacity for n, capacity in enumerate(machines)}, text,
              ['--no-gpu-required', '--memory-required=10'])
    wanted = {job.name: job.allocation for job in lab.jobs}

    def steps():
        while True:
            lab.started()
            seen = {name for worker in lab.workers for name in worker.history}
            for worker in lab.workers:
                own = s.MachineResources(worker.capacity)
                for attempt in worker.attempts:
                    own.allocate(wanted[attempt.name])      # raises if overbooked
                assert all(own.score(wanted[name]) == -math.inf for name in set(wanted) - seen)
            lab.end(chance.choice([attempt.name for attempt in lab.running]))
            yield

    try:
        assert lab.run(steps()) == 0
    finally:
        results.close()
    done = [name for worker in lab.workers for name in worker.history]
    assert sorted(done) == sorted(wanted)


def test_an_impossible_job_is_an_error_before_anything_starts(results):
    text = ('true\nexecute_remote --memory-required=64000 true\n'
            'execute_remote --memory-required=64000 false\n')
    lab = Lab(results, {'a': NO_GPUS, 'b': TWO_GPUS}, text, ['--no-gpu-required'])
    with pytest.raises(s.DoesNotFit) as error:
        lab.run()
    assert str(error.value) == (
        'line 2 (and 1 more line) needs 64000 MB of memory (--memory-required), and no machine has '
        'that free: a has 16000 MB of memory free; b has 32000 MB of memory free.')
    assert [worker.history for worker in lab.workers] == [[], []]
    assert results.journal.jobs == {}


@pytest.mark.parametrize('words, line, why', [
    ([], 'true', 'a has no GPU. If the jobs need no GPU, type\n'
     'execute_batch --no-gpu-required --machines a example/batch_script.sh'),
    (['--num-gpus=2'], 'true', 'a has no GPU. If the jobs need no GPU, type\n'
     'execute_batch --no-gpu-required --machines a example/batch_script.sh'),
    ([], 'execute_remote --num-gpus 2 true', 'a has no GPU. If the job needs no GPU: '
     '--no-gpu-required instead of --num-gpus in its line.'),
    (['--num-cpus=9'], 'true', 'a has 8.0 of 8 cores free.'),       # no option would help
    (['--no-gpu-required', '--num-cpus=9'], 'true', 'a has 8.0 of 8 cores free.')])
def test_the_error_of_an_impossible_job_names_the_way_out(results, words, line, why):
    lab = Lab(results, {'a': NO_GPUS}, f'{line}\n', words)
    with pytest.raises(s.DoesNotFit, match=f'{re.escape(why)}$'):
        lab.run()


def test_a_machine_that_fails_leaves_its_jobs_unknown_and_the_rest_goes_on(results):
    lab = Lab(results, {'a': NO_GPUS, 'b': NO_GPUS}, 'true\n' * 3,
              ['--no-gpu-required', '--memory-required=9000'])

    def steps():
        lab.started()
        lab.workers[0].become('failed', 'the connection broke')
        yield
        lab.end('.2')
        yield
        lab.started()
        lab.end('.3')
        yield

    assert lab.run(steps()) == 1
    assert lab.err.getvalue() == ('a: connection lost (1 job may still run): the connection '
                                  'broke.\n')
    assert lab.workers[1].history == ['example_batch_script.sh.2', 'example_batch_script.sh.3']
    assert 'done: 3 jobs: 2 finished, 0 failed, 1 not collected, ' in lab.out.getvalue()


def test_a_machine_that_starts_nothing_rests_also_after_contact_was_lost(results):
    lab = Lab(results, {'lab1': NO_GPUS}, 'true\n', ['--no-gpu-required'])
    worker, = lab.workers

    def refuse():
        attempt, = worker.attempts
        lab.batch.lives.move(attempt, 'refused', 'its disk is full')

    def steps():
        refuse()
        yield
        assert not worker.attempts
        worker.become('away', 'the connection broke')
        worker.become_ready()
        yield
        refuse()
        yield
        assert not worker.attempts
        lab.batch.fleet.bring_back(worker)            # its rest is over
        yield
        lab.end('1')
        yield

    assert lab.run(steps()) == 0
    assert len(worker.history) == 3
    assert lab.err.getvalue().count('gets no more jobs for a while') == 2


# ---- stdout and stderr ----

JOB = s.Job('name', 'command', 1, s.Allocation(), s.Forwards())


class Closed(io.StringIO):
    """A pipe whose reader is gone: `| head`."""

    def __init__(self, fd):
        super().__init__()
        self.fileno = lambda: fd

    def flush(self):
        raise BrokenPipeError(errno.EPIPE, 'Broken pipe')


def test_a_closed_pipe_does_not_stop_a_batch(tmp_path):
    with open(tmp_path / 'file', 'w') as file:
        reporter = s.Reporter(out=Closed(file.fileno()))
        reporter.ended(JOB, 0)
        assert os.readlink(f'/proc/self/fd/{file.fileno()}') == os.devnull


def test_an_ascii_terminal_gets_ascii():
    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    s.Reporter(out=out).ended(JOB._replace(command='echo é'), 0)
    assert out.buffer.getvalue() == b'finished: name; echo \\xe9\n'


def test_diagnostics_and_events_have_a_stream_each():
    out, err = io.StringIO(), io.StringIO()
    for verbose in (False, True):
        reporter = s.Reporter(verbose, out, err)
        reporter.line('event')
        reporter.note('note')
        reporter.warning('warning')
        reporter.trace('trace')
    assert out.getvalue() == 'event\n' * 2
    assert err.getvalue() == 'note\nWARNING: warning\n' * 2 + 'trace\n'


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_a_full_disk_behind_a_stream_does_not_stop_a_batch(start_cli, project, stream):
    (project / 'batch.sh').write_text('cat data\necho two\n')
    (project / 'data').write_text('one\n')
    words = [word for word in WORDS if word != '--copy-forwards']       # so the amount is printed
    with open('/dev/full', 'w') as full:
        process = start_cli(*words, **{stream: full})
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 0
    assert [(project / f'job_results/batch.sh.{n}.out').read_text() for n in (1, 2)] == [
        'one\n', 'two\n']
    if stream == 'stdout':
        assert sorted(complaint.splitlines()) == [
            'WARNING: stdout cannot be written: No space left on device',
            'localhost: sent 2 files, 22 bytes']
    else:
        assert 'done: 2 jobs: 2 finished, ' in said


@pytest.mark.parametrize('words, status', [
    (('execute_batch', '--help'), 0), (('query_machines', '--version'), 0),
    (('query_machines', '--machines', 'localhost'), 1),
    (('execute_to', '--machines', 'localhost', '--', 'echo x; echo y >&2'), 1),
    (('execute_remote', '--machine', 'localhost', 'echo x; echo y >&2'), 125),
    (('execute_remote', '--machine', 'localhost', '--detach', 'true'), 125)])
def test_a_full_disk_behind_what_is_printed_is_one_sentence(start_cli, project, words, status):
    with open('/dev/full', 'w') as full:
        out = start_cli(*words, stdout=full)
        both = start_cli(*words, stdout=full, stderr=full)
    complaint = out.communicate(timeout=60)[1]
    assert complaint.count('No space left on device') == 1 and 'Traceback' not in complaint
    assert (out.returncode, both.wait(60)) == (status, status)


def test_what_is_wrong_is_told_by_the_exit_status_where_it_cannot_be_said(start_cli, project):
    with open('/dev/full', 'w') as full:
        assert start_cli('execute_batch', stderr=full).wait(60) == 2


BATCH = ('true\n' * 5 + 'echo out; echo err >&2; false\n', [
    *(f'finished: batch.sh.{n}; true' for n in range(1, 6)),
    'failed: batch.sh.6; echo out; echo err >&2; false'])
WORDS = ('execute_batch', 'batch.sh', '--no-gpu-required', '--memory-required=1',
         '--copy-forwards', '--machines', 'localhost')


def test_a_pipe_gets_plain_lines_only(run_cli, project):
    (project / 'batch.sh').write_text(BATCH[0])
    done = run_cli(*WORDS)
    assert (done.returncode, done.stderr) == (1, '')
    assert sorted(line for line in done.stdout.splitlines() if line in BATCH[1]) == sorted(BATCH[1])
    assert not re.search(r'[^\n -~]', done.stdout)
    for line in done.stdout.splitlines():
        assert re.match(r'machine |started: |finished: |failed: |done: |batch\.sh\.6: ', line)


# ---- Messages that are printed once ----

def test_why_a_machine_cannot_be_used_is_said_when_it_is_news(results):
    lab = Lab(results, {'m': NO_GPUS, 'dead': NO_GPUS}, 'true\n', ['--no-gpu-required'])

    def steps():
        for why in ('nothing listens', 'nothing listens', 'it has no bash', 'nothing listens'):
            lab.workers[1].become('failed', why)
        lab.started()
        lab.end('.1')
        yield

    lab.run(steps())
    assert [line for line in lab.err.getvalue().splitlines() if line.startswith('dead')] == [
        'dead: cannot be used: nothing listens. To find the cause: execute_batch --check '
        '--machines dead', 'dead: cannot be used: it has no bash.',
        'dead: cannot be used: nothing listens.']


def test_a_job_that_starts_in_a_moment_does_not_wait():
    """Its machine has just become free."""
    scheduler, job = s.Scheduler(), s.Job('b.1', 'true', 1, s.Allocation(gpus=0), s.Forwards())
    scheduler.add_machine(FakeWorker('a', NO_GPUS), 0, NO_GPUS)
    scheduler.add(job)
    scheduler.add(job._replace(name='b.2', allocation=s.Allocation()))
    assert s.why_all_wait(scheduler, True) == (
        'waiting: 1 job for a GPU of its own with 1000 MB: a has no GPU')


def test_that_all_machines_are_full_of_this_batch_is_no_news_on_a_terminal():
    books = {FakeWorker(name, TWO_GPUS): s.MachineResources(TWO_GPUS) for name in ('a', 'b')}
    for own in books.values():
        for _ in range(2):
            own.allocate(s.Allocation())
    said = ('waiting: 3 jobs for a GPU of its own with 1000 MB: each of a, b has 2 in use by this '
            'batch')
    assert s.why_waiting(books, s.Allocation(), 3, s.BatchView.IS_OWN_NEWS) == said
    assert s.why_waiting(books, s.Allocation(), 3, s.TerminalView.IS_OWN_NEWS) == ''
    others = TWO_GPUS._replace(gpus=tuple(
        gpu._replace(reserved=True, batch_jobs=1) for gpu in GPUS))
    books[FakeWorker('c', others)] = s.MachineResources(others)
    for view in (s.BatchView, s.TerminalView):
        assert s.why_waiting(books, s.Allocation(), 3, view.IS_OWN_NEWS) == (
            f'{said}; c has 2 in use by others')
