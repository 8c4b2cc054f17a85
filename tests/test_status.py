"""execute_batch --status: the text that it shows, and the small functions behind it."""
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rig
from batching import NO_GPU, RESULTS, result, tree_of, wait_until
from commands import Terminal, at_terminal
from hypothesis import given, settings
from hypothesis import strategies as st

import ssh_scheduler as s

quickly = settings(deadline=None, derandomize=True, max_examples=300)


# ---- Durations ----

@pytest.mark.parametrize('seconds, text', [
    (0, '0s'), (0.4, '0s'), (0.6, '1s'), (41, '41s'), (59.4, '59s'), (59.6, '1m 00s'),
    (252, '4m 12s'), (122, '2m 02s'), (3599, '59m 59s'), (3720, '1h 02m'), (86399, '23h 59m'),
    (86400, '1d 0h'), (270000, '3d 3h'), (-5, '0s')])
def test_durations(seconds, text):
    assert s.duration_of(seconds) == text


@quickly
@given(st.floats(0, 1e8))
def test_a_duration_is_right_but_for_its_last_unit(seconds):
    sizes = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
    parts = re.findall('([0-9]+)([smhd])', s.duration_of(seconds))
    told = sum(int(number) * sizes[unit] for number, unit in parts)
    assert -0.5 <= seconds - told <= max(sizes[parts[-1][1]], 0.5)


# ---- The last line of an output ----

@pytest.mark.parametrize('data, line', [
    (b'', ''), (b'\n \n\t\n', ''), (b'one\ntwo\n', 'two'), (b'one\ntwo', 'two'),
    (b'one\n\n  \n', 'one'), (b'one\r\ntwo\r\n', 'two'),
    (b' 1%\r50%\r100%', '100%'), (b' 1%\r50%\r100%\r', '100%'), (b'1%\r\r\n', '1%'),
    (b'50%|##  |\r          \r', '50%|##  |'),
    (b'1/9 [=>]\b\b\b\b\b\b\b\b\r2/9 [==>]\b\b\b\b', '2/9 [==>]'),
    (b'\x1b[32mepoch 3\x1b[0m\x1b[K\n', 'epoch 3'), (b'a\n\x1b[2A\x1b[?25l\n', 'a'),
    (b'a\x1b]0;title\x07b', 'ab'), (b'a\x1b[3', 'a'), (b'a\x1b(B', 'a'),
    (b'epoch\t7\tloss', 'epoch 7 loss'), (b'a\x00\x07b', 'a\\x00\\x07b'),
    (b'\xff\xfe', '\ufffd\ufffd'), ('grün'.encode(), 'grün'),
    ('50 █'.encode()[:-1], '50'), ('a\u202eb'.encode(), 'a\\u202eb')])
def test_last_lines(tmp_path, data, line):
    path = tmp_path / 'out'
    path.write_bytes(data)
    assert s.last_line_of(path) == line


@quickly
@given(st.binary(max_size=60) | st.text('ab\n\r \t\x1b[m█', max_size=60).map(str.encode),
       st.integers(0, 3000))
def test_a_last_line_is_fit_for_a_terminal_and_does_not_depend_on_what_is_before(
        tmp_path_factory, end, length):
    path = tmp_path_factory.getbasetemp() / 'ends'
    path.write_bytes(end)
    line = s.last_line_of(path)
    assert line.isprintable() and line == line.strip()
    path.write_bytes(b'x' * length + b'\n' + end)
    assert s.last_line_of(path) == (line or 'x' * length)


def test_only_the_end_of_a_file_is_read(tmp_path):
    with open(tmp_path / 'out', 'wb') as file:
        file.truncate(10**11)           # a hole: reading it all takes minutes
        file.seek(0, os.SEEK_END)
        file.write(b'\nthe last\n')
    assert s.last_line_of(tmp_path / 'out') == 'the last'
    long = ('█' * 10**6).encode()
    (tmp_path / 'long').write_bytes(b'a\n' + long)
    line = s.last_line_of(tmp_path / 'long')
    assert re.fullmatch('…█{6600,6667}', line)


def test_what_is_no_file_has_no_last_line(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    for name in ('fifo', '', 'nothing'):
        assert s.last_line_of(tmp_path / name) == s.told_by(tmp_path / name) == ''


# ---- The reason in a stderr ----

TRACEBACK = '''\
Traceback (most recent call last):
  File "train.py", line 9, in <module>
    main()
    ~~~~^^
  File "train.py", line 5, in main
    raise RuntimeError(why)
'''


@pytest.mark.parametrize('text, told', [
    ('', ''), ('\n\n', ''), ('oops', 'oops'), ('one\ntwo\n\n', 'two'),
    (f'loading\n{TRACEBACK}RuntimeError: no', 'RuntimeError: no'),
    (f'{TRACEBACK}RuntimeError: no\nFor debugging:\n  set X=1\n', 'RuntimeError: no'),
    (f'{TRACEBACK}KeyError: 1\n\nDuring handling of the above exception, another exception '
     f'occurred:\n\n{TRACEBACK}ValueError: 2\n', 'ValueError: 2'),
    (f'{TRACEBACK}RuntimeError: caught\n' + 'going on\n' * 9 + 'disk full\n', 'disk full'),
    (f'starting\n{TRACEBACK}', 'starting'),                     # killed within the traceback
    (TRACEBACK, 'raise RuntimeError(why)'),
    (''.join(f'[rank0]: {line}\n' for line in (TRACEBACK + '\nOSError: 5').splitlines()),
     'OSError: 5'),
    ('  File "t.py", line 1\n    foo(\n       ^\nSyntaxError: never closed\n',
     'SyntaxError: never closed'),
    (' 10%\r 20%\r' + TRACEBACK + 'IndexError: 20\n', 'IndexError: 20'),
    ('t.sh: line 2: nosuch: command not found\n', 't.sh: line 2: nosuch: command not found'),
    ('+ python3 x.py\nno such model\n+ exit 1\n', 'no such model'),
    ('no such model\n\nreal\t0m0.1s\nuser\t0m0.0s\nsys\t0m0.0s\n', 'no such model'),
    ('cc: no input\nmake[1]: *** [Makefile:3: all] Error 1\nmake: Leaving directory /x\n',
     'cc: no input'),
    ("a.out: x.c:5: main: Assertion `0' failed.\nbash: line 1:  99 Aborted (core dumped) ./a.out\n",
     "a.out: x.c:5: main: Assertion `0' failed."),
    ('bash: line 1:  99 Killed   python3 t.py\n', 'bash: line 1:  99 Killed   python3 t.py'),
    ('Exception in thread "main" java.lang.Error: x\n\tat A.b(A.java:3)\n\t... 2 more\n',
     'Exception in thread "main" java.lang.Error: x'),
    ('Aborted\n', 'Aborted'),
    ('\x1b[31mbad\x1b[0m\n-----\n', 'bad')])
def test_what_a_stderr_tells(tmp_path, text, told):
    (tmp_path / 'err').write_text(text)
    assert s.told_by(tmp_path / 'err') == told


@quickly
@given(st.lists(st.sampled_from([*TRACEBACK.splitlines(), '', 'a', ' b', '[rank1]:', 'E: x', '+ y',
                                 'exit', '\x1b[m', '\r', '---'])))
def test_what_is_told_is_a_line_wherever_there_is_one(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / 'told'
    path.write_text('\n'.join(lines))
    told = s.told_by(path)
    assert told in [line.strip() for line in (*lines, '')]
    assert told or not s.last_line_of(path) or s.last_line_of(path) == '[rank1]:'


# ---- Words that differ ----

@pytest.mark.parametrize('commands, shared, rests', [
    ([], '', []), (['echo  a'], '', ['echo a']), (['true', 'true'], 'true', ['', '']),
    (['python3 train.py --lr 0.1 --seed 1', 'python3 train.py --lr 10 --seed 1'],
     'python3 train.py … --seed 1', ['--lr 0.1', '--lr 10']),
    (['python3 t.py --lr=0.1', 'python3 t.py --lr=1'], 'python3 t.py …', ['--lr=0.1', '--lr=1']),
    (['t --a 1 --b 2', 't --a 1 --amp --b 3', 't --a 1'], 't --a 1 …',
     ['--b 2', '--amp --b 3', '']),
    (['run -n -5 x', 'run -n -6 x'], 'run … x', ['-n -5', '-n -6']),
    (['cd a && ./b --fast && c', 'cd d && ./b --fast && c'], 'cd … && ./b --fast && c',
     ['a', 'd']),
    (["echo 'a  b' c", "echo 'a  d' c"], 'echo … c', ["'a  b'", "'a  d'"]),
    (['cp a b', 'cp b a'], '', ['cp a b', 'cp b a']),
    (['a b', 'c d'], '', ['a b', 'c d']),
    (['echo a', 'sleep 4; echo a'], '', ['echo a', 'sleep 4; echo a']),
    (['N=1 ./a -v', 'N=2 ./a -v'], '… ./a -v', ['N=1', 'N=2']),
    (['./a -v', 'N=2 M=3 ./a -v'], '… ./a -v', ['', 'N=2 M=3']),
    (['a \\\n  b', 'a \\\n  c'], 'a …', ['b', 'c']),
    (['echo "', 'echo \''], 'echo …', ['"', "'"]),
    (['a\x1b[2J b', 'a\x1b[2J c'], 'a\\x1b[2J …', ['b', 'c'])])
def test_words_that_differ(commands, shared, rests):
    assert s.differing_words(commands) == (shared, rests)


words = st.lists(st.sampled_from(['a', 'b', '--lr', '0.1', '10', '-n', '&&', "'x y'"]), max_size=6)


@quickly
@given(st.lists(words, min_size=1, max_size=5))
def test_different_commands_have_different_rests_and_nothing_is_left_out(commands):
    shared, rests = s.differing_words(list(map(' '.join, commands)))
    assert len({*rests}) == len({*map(tuple, commands)})
    for command, rest in zip(commands, rests):
        told = shared.replace('…', '').split() + rest.split()
        assert sorted(told) == sorted(' '.join(command).split())
        assert not re.search(r'--lr$', rest) or command[-1] == '--lr' or '--lr --' in ' '.join(
            command) or '--lr &&' in ' '.join(command) or '--lr -n' in ' '.join(command)


# ---- Columns ----

@pytest.mark.parametrize('text, width', [
    ('abc', 3), ('grün', 4), ('gru\u0308n', 4), ('日本', 4), ('\uff21', 2), ('█…', 2),
    ('\U0001f600', 2),
    ('\u2714\ufe0f', 1)])
def test_widths(text, width):
    assert s.width_of(text) == width


@pytest.mark.parametrize('text, width, keeps_end, shown', [
    ('abcdef', 6, False, 'abcdef'), ('abcdef', 5, False, 'abcd…'), ('abcdef', 5, True, '…cdef'),
    ('日本語', 5, False, '日本…'), ('日本語', 4, False, '日…'),
    ('u\u0308u\u0308u\u0308', 2, False, 'u\u0308…'),
    ('u\u0308u\u0308u\u0308', 2, True, '…u\u0308'),
    ('日\u0308a', 2, True, '…a'), ('abc', 0, False, '')])
def test_cuts(text, width, keeps_end, shown):
    assert s.cut(text, width, keeps_end=keeps_end) == shown


def test_the_last_column_gets_what_is_left():
    assert [*s.in_columns([['a' * 9, 'b' * 9, 'c' * 9]], 20)] == [['aaaa…', 'bbbb…', 'ccccc…']]


cells = st.text(alphabet='ab 日\u0308█', max_size=30)


@quickly
@given(st.lists(st.tuples(*[cells] * 4), min_size=1, max_size=5), st.integers(20, 120),
       st.sampled_from(['…', '...']))
def test_columns_fit_the_terminal_and_are_whole_in_a_pipe(rows, width, mark):
    for row, shown in zip(rows, s.in_columns(rows, width, mark, (1,))):
        assert s.width_of('  '.join(shown)) <= width
        for cell, part in zip(row, shown):
            assert part.startswith(cell) or mark in part
    lines = [*s.in_columns(rows)]
    for row, shown in zip(rows, lines):
        assert [part.startswith(cell) for cell, part in zip(row, shown)] == [True] * 4
    for column in range(3):
        assert len({s.width_of(line[column]) for line in lines}) == 1
    if sum(max(map(s.width_of, column)) for column in zip(*rows)) + 6 <= width:
        assert [*map(list, s.in_columns(rows, width, mark))] == lines


# ---- A real batch ----

JOB = '''\
case $2 in
    10) echo loading; echo 'Traceback (most recent call last):
  File "t.py", line 1
RuntimeError: CUDA out of memory' >&2; exit 3;;
    1) printf '\\033[1mepoch 1\\r\\033[0mepoch 2\\r'; {wait};;
esac
echo done $2
'''


def status_of(run_cli, *options, batch='batch.sh'):
    done = run_cli('execute_batch', batch, '--status', *options)
    assert done.stderr == ''
    return done.returncode, done.stdout.splitlines()


def rows_of(lines):
    """Return {job: its other cells} of a table in the lines, split like the head."""
    head = next(line for line in lines if line.startswith('job '))
    starts = [match.start() for match in re.finditer('(last line|\\S+)', head)]
    table = lines[lines.index(head) + 1:]
    return {row[0]: row[1:] for line in table if not line.startswith('all ') for row in [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])]] if row[0].startswith('.')}


def test_a_batch_while_it_runs_after_a_kill_and_at_the_end(batches, run_cli, lab, gate):
    machine = lab(gpus=rig.fake_gpus(1))
    Path('t.sh').write_text(JOB.format(wait=gate.wait('a')))
    lines = [f'bash t.sh {lr} --seed 1' for lr in ('--lr 10', '--lr 1', '--lr 0.1')]
    batch = batches.start(lines, [machine])
    batch.until('started: batch.sh.2')
    wait_until(lambda: (RESULTS / 'batch.sh.2.out').exists() and b'2' in result('batch.sh.2'),
               'its output')
    journal = RESULTS / '.ssh_scheduler/journal'
    wait_until(lambda: '"collected"' in journal.read_text(), 'the results of the first job')
    wait_until(lambda: '"python"' in journal.read_text(), 'all facts of the machine')
    where = f'{machine.yaml()} GPU 0'
    def tree():
        """Return all files except `seen`, to which the client adds as time passes."""
        return {path: what for path, what in tree_of('.').items() if not path.endswith(b'/seen')}

    before = tree()
    code, shown = status_of(run_cli)
    assert re.fullmatch(r'a client runs here since \d\d:\d\d \(process '
                        rf'{batch.process.pid}\), 1 running, 1 waiting', shown[0])
    rows = rows_of(shown)
    failed = ['failed 3', where, rows['.1'][2], '--lr 10', 'CUDA out of memory']
    waiting = ['waiting', '', '', '--lr 0.1', 'a GPU of its own']
    assert rows == {'.1': failed, '.3': waiting,
                    '.2': ['running', where, rows['.2'][2], '--lr 1', 'epoch 2']}
    assert all(re.fullmatch(r'\d+s|\dm \d\ds', rows[name][2]) for name in ('.1', '.2'))
    assert shown[-2:] == ['all commands: bash t.sh … --seed 1',
                          '3 jobs: 0 finished, 1 failed, 1 on a machine, 1 waiting']
    assert code == 1

    for options, names in ((['--failed'], ['.1']), (['--running', '--waiting'], ['.2', '.3']),
                           (['--waiting'], ['.3'])):
        code, part = status_of(run_cli, *options)
        assert [*rows_of(part)] == names and (code, part[-1]) == (1, shown[-1])
    _, found = status_of(run_cli, '--json')
    first, second, third = map(json.loads, found)
    assert (first['state'], first['exit_code'], first['machine'], first['gpus']) == (
        'failed', 3, str(machine.yaml()), [0])
    assert 0 <= first['wall_s'] < 60 and 0 <= first['ended_at'] - first['started_at'] < 60
    assert abs(time.time() - second['started_at']) < 120
    assert {**second, 'started_at': 0} == {
        'job': 'batch.sh.2', 'line': 2, 'state': 'running', 'exit_code': None,
        'machine': str(machine.yaml()), 'gpus': [0], 'attempt': 1, 'started_at': 0,
        'ended_at': None, 'wall_s': None, 'command': lines[1], 'last_line': 'epoch 2',
        'client': batch.process.pid}
    assert (third['state'], third['machine'], third['client']) == (
        'waiting', None, batch.process.pid)
    assert tree() == before, 'it wrote something'

    batch.process.kill()
    batch.end()
    code, shown = status_of(run_cli)
    assert shown[0] == ('no client runs this batch, 1 started, 1 waiting. To continue, type the '
                        'command that started it')
    rows = rows_of(shown)
    assert rows == {'.1': failed, '.3': [*waiting[:-1], ''],     # it waits for a client
                    '.2': ['started', where, rows['.2'][2], '--lr 1', 'epoch 2']}
    assert rows['.2'][2].endswith(' ago') and code == 1
    assert json.loads(status_of(run_cli, '--json', '--running')[1][0])['client'] is None

    batch = batches.start(lines[1:], [machine])     # the first line is gone, the others moved up
    batch.until('running: batch.sh.2')
    gate.open('a')
    assert batch.end().returncode == 0
    code, shown = status_of(run_cli)
    assert (code, shown[0], shown[-1]) == (
        0, 'no client runs this batch, all jobs have ended',
        '2 jobs: 2 finished, 0 failed, 0 on a machine, 0 waiting')
    assert [row[0] + row[-1] for row in rows_of(shown).values()] == [
        'finisheddone 1', 'finisheddone 0.1']


def test_a_name_of_its_own_is_whole_and_another_batch_is_named(batches, run_cli, lab, gate):
    batch = batches.start([f"execute_remote --job-name mine '{gate.wait('a')}'", 'true'],
                          [lab().yaml(max_jobs=1)], *NO_GPU)
    batch.until('started: mine')
    _, lines = status_of(run_cli)
    assert lines[2].startswith('mine  running  ')
    assert re.fullmatch(r'\.2 +waiting +true +1 core, 100 MB of memory', lines[3])
    Path('other.sh').write_text('true\n')
    code, shown = status_of(run_cli, batch='other.sh')
    assert re.fullmatch(rf'no client runs this batch \(process {batch.process.pid} runs batch.sh '
                        r'here since \d\d:\d\d\), 1 waiting', shown[0])
    gate.open('a')
    assert batch.end().returncode == 0


# ---- Made-up journals ----

class Made:
    """A job_results as a run of batch.sh would leave it, with times that the test chooses."""

    def __init__(self, *commands, identity=True):
        Path('batch.sh').write_text(''.join(f'{command}\n' for command in commands))
        self.commands = commands
        self.inner = RESULTS / '.ssh_scheduler'
        self.inner.mkdir(parents=True)
        self.journal = open(self.inner / 'journal', 'w')
        if identity:
            self.write(event='journal', identity='0123abcd')

    def write(self, **event):
        self.journal.write(json.dumps(event) + '\n')
        self.journal.flush()

    def claim(self, line, machine='lab1', gpus=None, age_s=0.0, attempt=1, **more):
        self.write(event='claimed', job=f'batch.sh.{line}', attempt=attempt, machine='ben@lab1:22',
                   gpus=gpus, command=self.commands[line - 1], where=machine, batch='batch.sh',
                   time=time.time() - age_s, **more)

    def end(self, line, code=0, wall_s=1.0, out='', err=''):
        self.write(event='ended', job=f'batch.sh.{line}', exit_code=code, wall_s=wall_s,
                   time=time.time())
        self.say(line, out, err)
        (RESULTS / f'batch.sh.{line}').mkdir()
        self.write(event='collected', job=f'batch.sh.{line}', kept=[])

    def say(self, line, out='', err=''):
        (RESULTS / f'batch.sh.{line}.out').write_text(out)
        (RESULTS / f'batch.sh.{line}.err').write_text(err)

    def hold(self, computer=None, run='\nbatch.sh\n'):
        """Take the lock, as a client of the batch does; return the open file.

        run: what an older version wrote, or, with a third line, its options for hardware
        """
        lock = open(self.inner / 'lock', 'w')
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f'process {os.getpid()} on {computer or os.uname().nodename}{run}')
        lock.flush()
        return lock


@pytest.fixture
def made(project):
    train = 'python3 train.py --lr {} --seed 1'
    it = Made(*(train.format(lr) for lr in ('0.001', '0.01', '10', '1.0', '2.0', '3.0')))
    it.claim(1, gpus='0')
    it.end(1, wall_s=3725.2, out='epoch 89: loss 0.40\r\nepoch 90: loss 0.31\r\n')
    it.claim(2, gpus='1', age_s=7230)
    it.say(2, 'epoch 57 日本語: loss 0.44, 3.2 s per batch\r')
    it.claim(3, machine='lab2', gpus='0,1')
    it.end(3, 1, 9.1, out='loading\n', err='RuntimeError: \x1b[31mCUDA out of memory\n')
    it.claim(4, machine='lab2')
    it.write(event='lost', job='batch.sh.4')
    it.claim(5, machine='lab2')
    it.write(event='cancelled', job='batch.sh.5', kept=[])
    return it


GOLDEN_80 = '''\
a client runs here since TIME (process PID), 1 running, 3 waiting
job  state     where          time    command     last line
.1   finished  lab1 GPU 0     1h 02m  --lr 0.001  epoch 90: loss 0.31
.2   running   lab1 GPU 1     2h 00m  --lr 0.01   epoch 57 日本語: loss 0.44, 3…
.3   [failed 1]  lab2 GPUs 0,1  9s      --lr 10     CUDA out of memory
.4   lost      lab2                   --lr 1.0    starts from the beginning
.5   waiting                          --lr 2.0    starts from the beginning
.6   waiting                          --lr 3.0
all commands: python3 train.py … --seed 1
6 jobs: 1 finished, 1 failed, 1 on a machine, 3 waiting
'''

GOLDEN_60 = '''\
a client runs here since TIME (process PID), 1 running, 3 waiting
job  state     where        time    command     last line
.1   finished  lab1 GPU 0   1h 02m  --lr 0.001  epoch 90: l…
.2   running   lab1 GPU 1   2h 00m  --lr 0.01   epoch 57 日…
.3   [failed 1]  …2 GPUs 0,1  9s      --lr 10     CUDA out of…
.4   lost      lab2                 --lr 1.0    starts from…
.5   waiting                        --lr 2.0    starts from…
.6   waiting                        --lr 3.0
all commands: python3 train.py … --seed 1
6 jobs: 1 finished, 1 failed, 1 on a machine, 3 waiting
'''


def shown_at(scheduler, env, *options, columns=80, **more):
    """Return what the terminal receives, with [] for red and PID for this process's id.

    The first line is without the blanks at which it wraps: they depend on the length of that id.
    """
    argv = ('execute_batch', 'batch.sh', '--status', *options)
    env = {**env, 'TERM': 'xterm', **more}
    with Terminal([sys.executable, str(scheduler), *argv], env, columns=columns) as terminal:
        assert terminal.end() == 1
    first, _, rest = terminal.said.decode().replace('\r\n', '\n').partition('\n')
    first = re.sub(' +', ' ', first).replace(f'(process {os.getpid()})', '(process PID)')
    said = f'{first}\n{rest}'
    return re.sub(r'since \d\d:\d\d', 'since TIME', said.replace('\x1b[31m', '[').replace(
        '\x1b[m', ']'))


@pytest.mark.parametrize('columns, golden', [(80, GOLDEN_80), (60, GOLDEN_60)])
def test_on_a_terminal_rows_are_cut_to_its_width(made, scheduler, client_env, columns, golden):
    with made.hold():
        said = shown_at(scheduler, client_env, columns=columns)
    assert said == golden
    assert all(s.width_of(re.sub(r'[][]', '', line)) <= columns
               for line in said.splitlines()[1:-1])


@pytest.mark.parametrize('how', [{'NO_COLOR': '1'}, {'TERM': 'dumb'}])
def test_without_colours(made, scheduler, client_env, how):
    with made.hold():
        assert shown_at(scheduler, client_env, **how) == GOLDEN_80.replace(
            '[failed 1]', 'failed 1')


def test_a_terminal_without_unicode(made, scheduler, client_env):
    with made.hold():
        said = shown_at(scheduler, client_env, PYTHONIOENCODING='ascii')
    assert said.isascii() and 'all commands: python3 train.py ... --seed 1\n' in said
    assert '--lr 0.01   epoch 57 \\u65e5\\u672c\\u8a9e...\n' in said
    assert max(map(len, said.splitlines()[1:])) <= 82       # with [] for red


def test_in_a_pipe_the_table_is_whole(made, run_cli, client_env):
    made.claim(6, machine='/a/long/path/to/machines/' + 'x' * 60 + '.yaml')
    made.say(6, err='warned: ' + 'y' * 3000)
    code, lines = status_of(run_cli)
    assert re.search(r'x\.yaml  \d+s ago +--lr 3\.0    warned: y{3000}$', lines[-3])
    assert '.1   finished   lab1 GPU 0' in lines[2]
    assert not re.search('[\x00-\x1f…]', ''.join(lines[:-2]))


def test_a_client_elsewhere_and_one_that_has_ended(made, run_cli):
    rest, cancelled = ', 1 started, 3 waiting', ' (1 of them cancelled)'
    with made.hold(computer='lab9'):
        assert re.fullmatch(rf'a client runs on lab9 since \d\d:\d\d \(process {os.getpid()}\), '
                            '1 running, 3 waiting', status_of(run_cli)[1][0])
    # The lock looks free, as on a network that passes no locks on.
    assert re.fullmatch(
        rf'a client was started on lab9 at \d\d:\d\d \(process {os.getpid()}\); only --status '
        f'on that computer tells whether it still runs{rest}{re.escape(cancelled)}',
        status_of(run_cli)[1][0])
    with subprocess.Popen(['sleep', '1000']) as other:      # another process has the id
        (made.inner / 'lock').write_text(f'process {other.pid} on {os.uname().nodename}\n')
        first = status_of(run_cli)[1][0]
        other.kill()
    assert first.startswith(f'no client runs this batch{rest}{cancelled}')
    (made.inner / 'lock').write_text('garbage')
    assert status_of(run_cli)[1][0] == first


def test_the_name_of_a_batch_whose_file_is_gone_needs_no_ending(project, run_cli):
    made = Made('true')
    made.claim(1)
    journal = RESULTS / '.ssh_scheduler/journal'
    journal.write_text(journal.read_text().replace('batch.sh', 'grid'))
    done = run_cli('execute_batch', '--drop-machine', 'localhost', 'grid')
    assert (done.returncode, done.stdout.partition(',')[0]) == (0, 'no client runs grid')
    done = run_cli('execute_batch', '--drop-machine', 'localhost', 'other')
    assert (done.returncode, '<batch> is missing, or there is no file other' in done.stderr) == (
        2, True)


def test_a_batch_whose_file_is_gone_may_have_more_jobs_while_a_client_runs(project, run_cli):
    made = Made('true', 'false')
    made.claim(1)
    made.end(1)
    (project / 'batch.sh').unlink()
    done = run_cli('execute_batch', 'batch.sh', '--status')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0, '1 job: 1 finished, 0 failed, 0 on a machine, 0 waiting')
    assert 'no batch file batch.sh any more' in done.stderr
    with made.hold():
        done = run_cli('execute_batch', 'batch.sh', '--status', '--json')
        assert (done.returncode, json.loads(done.stdout)['line']) == (1, 1)
        first = run_cli('execute_batch', 'batch.sh', '--status').stdout.splitlines()[0]
        assert first.endswith(', 0 running, 0 waiting')
    done = run_cli('execute_batch', 'other.sh', '--status')
    assert (done.returncode, 'cannot be read: No such file' in done.stderr) == (2, True)


def test_the_time_left_is_told_as_by_the_client_while_it_runs(project, run_cli):
    made = Made(*(f'python3 train.py {number}' for number in range(7)))
    for line in (1, 2):
        made.claim(line)
        made.end(line, line % 2, wall_s=100.0)
    made.claim(4, age_s=40)
    with made.hold():
        assert status_of(run_cli)[1][0].endswith(', 1 running, 4 waiting')
        made.claim(3)
        made.end(3, wall_s=100.0)
        _, lines = status_of(run_cli)
        assert lines[0].endswith(', 1 running, 3 waiting, 6m–7m left')      # 360 s
        assert 'left' not in ''.join(lines[1:])
        made.claim(5, machine='lab2', age_s=10)
        assert status_of(run_cli)[1][0].endswith(', 2 running, 2 waiting, 3m–4m left')     # 190 s
        made.write(event='unwanted', jobs=['batch.sh.7'], client=os.getpid())
        assert re.search(r', 2 running, 2 waiting \(1 of them cancelled\), (2m–)?3m left$',
                         status_of(run_cli)[1][0])                          # 160 s, or less
    assert 'left' not in status_of(run_cli)[1][0]


@pytest.mark.parametrize('asked, options, needs', [
    ([], (), ['a GPU of its own', '2 GPUs of its own']),
    (['--no-gpu-required', '--memory-required=8G'], (),
     ['1 core, 8192 MB of memory', '2 GPUs of its own']),
    (['--reserve'], (), ['a machine of its own'] * 2),
    (['--no-reserve-gpu'], (), ['a share of a GPU', 'a share of 2 GPUs']),
    (['--reserve'], ('--no-gpu-required', '--num-cpus=2'),
     ['2 cores, 2000 MB of memory', '2 GPUs of its own']),
    (['--of-a-later-version'], (), ['', '']), ('x', (), ['', '']), (None, (), ['', '']),
    (None, ('--num-gpus=3',), ['3 GPUs of its own', '2 GPUs of its own'])])
def test_a_job_that_waits_tells_what_it_needs(project, run_cli, asked, options, needs):
    """Its needs follow the options of the client that runs the batch, or ran it last."""
    made = Made('a', "execute_remote --num-gpus 2 'b'")
    for _ in range(2):
        with made.hold(run=f'\nbatch.sh\n{json.dumps(asked)}\n'):
            rows = rows_of(status_of(run_cli, *options)[1])
        assert [row[-1] for row in rows.values()] == needs
    (made.inner / 'lock').write_text((made.inner / 'lock').read_text().replace('batch', 'other'))
    assert [row[-1] for row in rows_of(status_of(run_cli)[1]).values()] == ['', '']


def test_output_of_an_earlier_attempt_is_not_shown(made, run_cli):
    old = time.time() - 8000        # before its claim: a file server's clock may be behind
    os.utime(RESULTS / 'batch.sh.2.out', (old, old))
    assert 'epoch 57' in ' '.join(status_of(run_cli)[1])
    made.claim(2, attempt=2)
    assert 'epoch 57' not in ' '.join(status_of(run_cli)[1])
    made.say(2, 'anew')
    assert rows_of(status_of(run_cli)[1])['.2'][-1] == 'anew'


def test_results_that_were_deleted_and_a_name_of_another_command(made, run_cli):
    for end in ('', '.out', '.err'):
        path = RESULTS / f'batch.sh.1{end}'
        shutil.rmtree(path) if not end else path.unlink()
    text = Path('batch.sh').read_text()
    Path('batch.sh').write_text(text.replace('2.0', '2.5'))
    rows = rows_of(status_of(run_cli)[1])
    assert rows['.1'] == ['waiting', '', '', '--lr 0.001',
                          'its results were deleted: starts from the beginning']
    assert rows['.5'] == ['waiting', '', '', '--lr 2.5', '']


def test_what_older_versions_left(project, run_cli):
    made = Made('echo a', 'echo b', 'echo c', 'echo d', identity=False)
    for line in (1, 2, 3):
        made.write(event='claimed', job=f'batch.sh.{line}', attempt=1, machine='ben@lab1:22',
                   gpus=None, command=made.commands[line - 1])
    for line, code in ((1, 0), (2, 1)):
        made.write(event='ended', job=f'batch.sh.{line}', exit_code=code)
        made.write(event='collected', job=f'batch.sh.{line}')
        made.say(line, 'said\n')
    made.say(4, 'of nobody\n')
    before = tree_of('.')
    for run in ('', '\n'):
        with made.hold(run=run):
            code, lines = status_of(run_cli)
        assert re.fullmatch(r'a client runs here since \d\d:\d\d \(process \d+\), 1 running, '
                            '0 waiting', lines[0])
        assert rows_of(lines) == {
            '.1': ['finished', 'ben@lab1:22', '', 'a', 'said'],
            '.2': ['failed 1', 'ben@lab1:22', '', 'b', 'said'],
            '.3': ['running', 'ben@lab1:22', '', 'c', ''],
            '.4': ['finished', '', '', 'd',
                   'the journal does not know which command made these results']}
    assert json.loads(status_of(run_cli, '--json')[1][0])['started_at'] is None
    (made.inner / 'lock').unlink()
    assert tree_of('.') == before


def test_no_lock_is_taken(made, scheduler, client_env):
    """A client that starts while --status reads must not find the folder in use."""
    with open(made.inner / 'lock', 'w') as lock:
        lock.write(f'process {os.getpid()} on {os.uname().nodename}\nbatch.sh\n')
        lock.flush()
        with subprocess.Popen([sys.executable, scheduler, 'execute_batch', 'batch.sh', '--status'],
                              env=client_env, stdout=subprocess.DEVNULL) as looking:
            while looking.poll() is None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(lock, fcntl.LOCK_UN)
        assert looking.returncode == 1


def test_ten_thousand_jobs(project, run_cli):
    count = 10_000
    made = Made(*(f'python3 train.py --lr {number / 1000} --seed 1' for number in range(count)))
    for line in range(1, count + 1):
        made.claim(line)
        made.write(event='ended', job=f'batch.sh.{line}', exit_code=line % 2, wall_s=1.0, time=2.0)
        made.write(event='collected', job=f'batch.sh.{line}', kept=[])
        made.say(line, f'epoch {line}\n' * 50, f'{TRACEBACK}KeyError: {line}\n')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, lines = status_of(run_cli)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(lines) == count + 4
    assert [lines[2].split()[-2:], lines[3].split()[-2:]] == [['KeyError:', '1'], ['epoch', '2']]
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2


# ---- --watch ----

def test_watch_shows_what_has_changed_and_ends_with_the_batch(made, scheduler, client_env):
    argv = ('execute_batch', 'batch.sh', '--status', '--watch', '0.5')
    with made.hold(), at_terminal(scheduler, client_env, *argv, columns=80) as terminal:
        terminal.until(b'1 running, 3 waiting')
        for line in (4, 5, 6):
            made.claim(line)
        terminal.until(b'4 running, 0 waiting')
        for line in (2, 4, 5, 6):
            made.end(line, out='the end')
        terminal.until(b'5 finished, 1 failed, 0 on a machine, 0 waiting')
        assert terminal.end() == 1
    assert terminal.said.count(b'\x1b[H\x1b[2J') == terminal.said.count(b' jobs: ') >= 3


def test_watch_shows_first_what_runs_where_not_all_fits(made, scheduler, client_env):
    argv = ('execute_batch', 'batch.sh', '--status', '--watch')
    with made.hold(), at_terminal(scheduler, client_env, *argv, columns=80, rows=9) as terminal:
        terminal.until(b'3 waiting\r\n(?s:.*)3 waiting\r\n')
        terminal.type(b'\x03')
        assert terminal.end() == 1
    lines = terminal.said.decode().split('2J')[1].split('\r\n')
    assert [line.split(' ')[0] for line in lines[2:7]] == ['.1', '.2', '.3', '…', 'all']
    assert lines[5] == '… 3 more' and len(lines) == 9


def test_watch_shows_the_next_of_those_that_wait(project, scheduler, client_env):
    Made(*(f'run {number}' for number in range(1, 41)))
    argv = ('execute_batch', 'batch.sh', '--status', '--watch')
    with at_terminal(scheduler, client_env, *argv, columns=50, rows=12) as terminal:
        terminal.until(rb'40 waiting\r\n(?s:.*)40\s+waiting\r\n')
        terminal.type(b'\x03')
        assert terminal.end() == 1
    lines = terminal.said.decode().split('2J')[1].split('\r\n')
    assert [line.split(' ')[0] for line in lines[2:8]] == ['.1', '.2', '.3', '.4', '.5', '…']
    # Each of the two long lines takes two rows of the screen, and the cursor takes one.
    assert sum(len(line) > 50 for line in lines) == 1 and len(lines) == 11


def test_watch_ends_with_its_reader(made, start_cli):
    status = start_cli('execute_batch', 'batch.sh', '--status', '--watch=0.5', '--json')
    assert json.loads(status.stdout.readline())['job'] == 'batch.sh.1'
    status.stdout.close()
    assert status.wait(rig.SAFETY_NET_S) == 1


def test_watch_ends_with_an_interrupt(made, start_cli):
    status = start_cli('execute_batch', 'batch.sh', '--watch', '--status')
    while 'jobs: ' not in status.stdout.readline():
        pass
    status.send_signal(signal.SIGINT)
    assert (status.wait(rig.SAFETY_NET_S), status.stderr.read()) == (1, '')


@pytest.mark.parametrize('argv, complaint', [
    (['--failed'], '--failed can only be given with --status.'),
    (['--json', '--watch', '--dry-run'], '--watch can only be given with --status.'),
    (['--status', '--watch', '1', '2'], '--watch takes one time.'),
    (['--status', '--watch=0'], '--watch must be a time of at least 0.5 s'),
    (['--status', '--wait'], '--status and --wait: give one of them.'),
    (['--status', '--waitin'], 'did you mean --waiting')])
def test_wrong_usage(run_cli, project, argv, complaint):
    Path('batch.sh').write_text('true\n')
    done = run_cli('execute_batch', 'batch.sh', *argv)
    assert done.returncode == 2 and complaint in done.stderr and not done.stdout
