"""results_table: columns, metrics and means, against made-up folders and real batches."""
import contextlib
import csv
import io
import json
import math
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batching import NO_GPU, tree_of, wait_until
from commands import Terminal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import results_table as module
import ssh_scheduler
from results_table import TableError, UsageError, results_table

PROGRAM = Path(module.__file__).resolve()
quickly = settings(deadline=None, derandomize=True, max_examples=200,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- Folders: job_results as batches leave them ----

class Results:
    """A made-up job_results, to which a test adds jobs."""

    def __init__(self, folder='job_results'):
        self.folder = Path(folder)
        (self.folder / '.ssh_scheduler').mkdir(parents=True)
        self.journal = self.folder / '.ssh_scheduler' / 'journal'
        self.journal.touch()

    def event(self, journal=None, **facts):
        path = journal or self.journal
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'a') as file:
            file.write(json.dumps(facts) + '\n')

    def add(self, name, command, out='', exit_code=0, state='collected', files=None, journal=None,
            ended=(), files_sent='f' * 16, **claim):
        """Add a job: its events, its stdout (None: none) and its files {path: text}."""
        facts = {'attempt': 1, 'machine': '10.0.0.1:22', 'gpus': None, 'where': 'lab1.yaml',
                 'batch': 'grid.sh', 'files': files_sent, 'time': 1000.0, **claim}
        self.event(journal, event='claimed', job=name, command=command, **facts)
        if state in ('ended', 'collected'):
            self.event(journal, event='ended', job=name, exit_code=exit_code, time=1060.0,
                       **{'wall_s': 60.0, **dict(ended)})
        if state not in ('claimed', 'ended'):
            self.event(journal, event=state, job=name)
        if out is not None:
            data = out if isinstance(out, bytes) else out.encode()
            (self.folder / f'{name}.out').write_bytes(data)
            (self.folder / f'{name}.err').touch()
        for path, text in (files_of(files) if files else {}).items():
            path = self.folder / name / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self

    def sweep(self, *words, out='loss: 0.5\n'):
        """Add a job for each word, whose command has the word at its end."""
        for number, word in enumerate(words, 1):
            self.add(f'grid.sh.{number}', f'python3 train.py {word}'.strip(), out)
        return self


def files_of(files):
    return files if isinstance(files, dict) else {'metrics.json': files}


@pytest.fixture
def made(project):
    """An empty job_results in the current folder."""
    return Results()


def column(name, *results, **options):
    """Return one column of the table."""
    return [row.get(name) for row in results_table(*results, **options)]


def said(*results, **options):
    """Return the sentences that are reported about a table."""
    sentences = []
    results_table(*results, report=sentences.append, **options)
    return sentences


def command(*words, **how):
    """Run the file in a pipe, as a user does."""
    return subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, timeout=60,
                          **{'text': True, **how})


def screen(*words, columns=80, env=()):
    """Return the lines that a terminal shows, without colours."""
    with Terminal([sys.executable, str(PROGRAM), *words],
                  {**os.environ, 'TERM': 'xterm', **dict(env)}, columns=columns) as terminal:
        terminal.end()
    text = re.sub(r'\x1b\[[0-9]+m', '', terminal.said.decode())
    return text.replace('\r\n', '\n').splitlines()


# ---- Lines of batch files ----

def test_jobs_of_lines_that_were_fixed_or_deleted_are_told_and_left_out(made):
    made.sweep('1', '2', '3', '4').add('other.sh.1', './b', 'loss: 1', batch='other.sh')
    made.add('single', './c', 'loss: 1', batch=None)
    everything = [f'grid.sh.{number}' for number in range(1, 5)] + ['other.sh.1', 'single']
    missing = 'its batch file was not found in this folder'
    assert said('grid.sh', current=True) == [f'--current leaves out no job of grid.sh: {missing}']
    Path('grid.sh').write_text('# 1\npython3 train.py 2\r\n\npython3 train.py 3 \\\n\n'
                               'python3 train.py 1')
    told = '2 jobs ran lines that grid.sh no longer has (--current leaves them out)'
    assert said('grid.sh') == [told] and told in said()
    assert column('job') == everything
    assert column('job', current=True) == ['grid.sh.1', 'grid.sh.2', 'other.sh.1', 'single']
    assert said('grid.sh', current=True) == [
        'left out: 2 jobs that ran lines that grid.sh no longer has']
    assert said('grid.sh', where='job=1') == []
    done = command('--current', '--columns=job', 'grid.sh')
    assert done.stdout.split() == ['job', 'grid.sh.1', 'grid.sh.2']
    Path('grid.sh').write_bytes(b'\xff\n')
    assert said('grid.sh') == [] and said('grid.sh', current=True) == [
        '--current leaves out no job of grid.sh: grid.sh is not UTF-8 text']
    Path('grid.sh').write_text('')
    assert column('job', 'grid.sh', current=True) == []
    assert said('grid.sh', current=True)[-1] == 'there are no other results.'


@pytest.mark.parametrize('lines, jobs', [
    (['true', 'true'], [1, 2]), (['true'], [1]), (['', 'true'], [2]), (['true'] * 4, [1, 2, 3]),
    (['false', '', '', 'true', 'true', 'true'], [1, 2, 3]), (['execute_remote true'], [1]),
    (["execute_remote --num-gpus 1 --job-name x 'true'", 'execute_remote -- true'], [1, 2]),
    (['  execute_remote \\', ' --exclude a b -- \\', "'true'"], [1]),
    (['execute_remote true true'], [1]), (["execute_remote 'true"], []), (['true x'], [])])
def test_each_line_has_one_job(made, lines, jobs):
    for number in range(1, 4):
        made.add(f'grid.sh.{number}', 'true', time=1000.0 + number)
    Path('grid.sh').write_text('\n'.join(lines))
    assert column('job', current=True) == [f'grid.sh.{number}' for number in jobs]


def test_of_jobs_with_one_command_those_with_the_options_of_today_are_current(made):
    made.add('grid.sh.1', 'true', own='--num-gpus="1"').add(
        'grid.sh.1-2', 'true', own='--num-gpus="2"', time=2000.0)
    Path('grid.sh').write_text('execute_remote --num-gpus 2 true\n')
    assert column('job', current=True) == ['grid.sh.1-2']


def test_earlier_results_are_those_of_the_line_of_their_job(made):
    for number, name in enumerate(('true', 'false'), 1):
        made.add(f'grid.sh.{number}', name)
        made.event(event='renamed', job=f'grid.sh.{number}', to=f'grid.sh.{number}~1')
        (made.folder / f'grid.sh.{number}~1.out').touch()
        made.add(f'grid.sh.{number}', name, attempt=2)
        made.add(f'grid.sh.{number}-again', name, reproduces=f'grid.sh.{number}')
    Path('grid.sh').write_text('false\n')
    assert column('job', earlier=True, current=True) == [
        'grid.sh.2', 'grid.sh.2-again', 'grid.sh.2~1']


@quickly
@given(st.text('a#\\ \t\r\n;', max_size=40), st.text('ab./-_', max_size=12))
@example('a\\\n# no comment\n#b\\\nc', './a/../-b')
def test_a_batch_file_is_read_as_execute_batch_reads_it(text, path):
    """Each file works alone, so both have these functions."""
    assert [*module.split_batch(text)] == [*ssh_scheduler.split_batch(text)]
    name = ssh_scheduler.name_of_batch(path)
    assert path == '-' or (module.name_of_batch(path) or 'batch') == name


@pytest.mark.parametrize('path', ['a_b/c.d/grid-1.sh', 'a/b_c.d_grid-1.sh', 'a b/c.d/grid-1.sh'])
def test_a_batch_file_in_a_folder_is_found(project, path):
    for folder, start in (('one', 'one/'), ('two', '')):
        batch = module.name_of_batch(path if start else os.path.abspath(f'two/{path}'))
        made = Results(f'{folder}/job_results')
        made.add(f'{batch}.1', 'true', batch=batch).add(f'{batch}.2', 'false', batch=batch)
        Path(folder, path).parent.mkdir(parents=True)
        Path(folder, path).write_text('true\n')
        Path(folder, 'a').mkdir(exist_ok=True)
        assert said(folder)[0] == (f'1 job ran lines that {folder}/{path} no longer has '
                                   '(--current leaves them out)')


# ---- Parameters ----

@pytest.mark.parametrize('words, expected', [
    (['--lr=0.1', '--lr 0.2', 'lr=0.3', '-lr 0.4'], {'lr': [0.1, 0.2, 0.3, 0.4]}),
    (['a 1', 'b 2'], {'arg1': ['a', 'b'], 'arg2': [1, 2]}),
    (['a 7', 'b 7'], {'arg1': ['a', 'b']}),
    (['--fast', ''], {'fast': ['yes', None]}),
    (['--fast data', 'data'], {'fast': ['yes', None]}),
    (['--fast --lr 1', '--lr 2'], {'fast': ['yes', None], 'lr': [1, 2]}),
    (['--lr -0.5', '--lr -1e-3'], {'lr': [-0.5, -0.001]}),
    (['-n5', '-n 7', '-n=9'], {'n': [5, 7, 9]}),
    (["--name 'a b'", '--name "c d"'], {'name': ['a b', 'c d']}),
    (['--lr 1 && echo', '--lr 2 && echo'], {'lr': [1, 2]}),
    (['--lr 1; echo', '--lr 2; echo'], {'lr': [1, 2]}),
    (['--lr 1|tee', '--lr 2|tee'], {'lr': [1, 2]}),
    (['--at $(date +%s -d "1 day") 1', '--at $(date +%s -d "1 day") 2'], {'arg1': [1, 2]}),
    (['--lr=1 \\\n --k 2', '--lr=1 --k 3'], {'k': [2, 3]}),
    (['model.lr=1 +a/b=2', 'model.lr=2 +a/b=2'], {'model.lr': [1, 2]}),
    (['--seed 007', '--seed 8'], {'seed': ['007', 8]}),
    (['--out runs/1', '--out runs/2'], {'out': ['runs/1', 'runs/2']}),
    (['--k 1 --k 2', '--k 1 --k 3'], {'k-2': [2, 3]}),
    (["it's", 'its'], {'arg1': ["it's", 'its']}),
    (['--time 1 --exit 2', '--time 2 --exit 3'],
     {'parameter time': [1, 2], 'parameter exit': [2, 3]}),
    (['--loss 1', '--loss 2'], {'loss': [1, 2], 'metric loss': [0.5, 0.5]}),
])
def test_the_words_that_differ_are_columns(made, words, expected):
    made.sweep(*words)
    rows = results_table()
    facts = ('job', 'loss', 'exit', 'state', 'time_s', 'machine', 'gpus', 'command')
    assert [key for key in rows[0] if key not in facts or key in expected] == [*expected]
    assert {name: [row[name] for row in rows] for name in expected} == expected


def test_a_setting_before_the_program_is_a_parameter(made):
    made.add('grid.sh.1', 'LR=0.1 ./train').add('grid.sh.2', 'LR=0.2 ./train')
    assert column('LR') == [0.1, 0.2]


NAMES = st.from_regex(r'[A-Za-z][A-Za-z0-9_]{0,8}', fullmatch=True)
PLAIN_VALUES = st.integers(-99, 999).map(str) | st.floats(
    allow_nan=False, allow_infinity=False).map(repr) | st.text(
        'abcZ /.\'"$&;|<>()*#é', min_size=1, max_size=8)


@quickly
@given(st.lists(st.tuples(NAMES, st.sampled_from(['--{}={}', '--{} {}', '{}={}'])),
                min_size=1, max_size=4, unique_by=lambda one: one[0]), st.data())
def test_values_are_found_however_they_are_written(forms, data):
    """The cell of a column has the value that bash would pass for that name."""
    commands, values = ['python3 train.py'] * 2, []
    for number in range(2):
        values.append({})
        for name, form in forms:
            value = data.draw(PLAIN_VALUES)
            values[-1][name] = value
            commands[number] += ' ' + form.format(name, shlex.quote(value))
    differing = {name for name, _ in forms if values[0][name] != values[1][name]}
    names, parameters, _ = module.find_parameters(commands, ['', ''])
    assert set(names) == differing
    assert parameters == [{name: one[name] for name in names} for one in values]


@quickly
@given(st.lists(st.text('ab-=\'"\\$()`;&| \n0.', max_size=25), min_size=1, max_size=5))
def test_any_command_has_parameters(commands):
    names, parameters, shared = module.find_parameters(commands, [''] * len(commands))
    assert all(set(row) <= set(names) for row in parameters)
    assert shared[''] is None or shared[''].isprintable()


LINES = ['python3 a.py 1', 'python3 a.py 2', 'for i in 1 2; do echo $i; done',
         'for i in 3 4; do echo $i; done', 'if true; then echo 7; fi', 'seq 3 | wc', 'seq 4 | wc',
         'seq 5 6 | wc', 'cd x && python3 a.py --lr 1']


def test_operators_and_keywords_of_the_shell_are_no_parameters(made):
    for number, line in enumerate(LINES, 1):
        made.add(f'grid.sh.{number}', line, 'loss: 1')
    rows = results_table()
    assert [(row['arg1'], row['arg2'], row['lr']) for row in rows] == [
        (1, None, None), (2, None, None), (1, 2, None), (3, 4, None), (None, None, None),
        (3, None, None), (4, None, None), (None, None, None), (None, None, 1)]
    assert [name for name in rows[0] if name.startswith('arg')] == ['arg1', 'arg2']
    lines = screen()
    assert lines[0].split()[-2:] == ['where', 'command']
    assert [line.partition('lab1   ')[2] for line in lines[1:-1]] == LINES
    assert 'command' not in screen('job_results/grid.sh.[67]')[1].split()
    narrow = screen(columns=40)
    assert 'command' not in narrow[0] and 'where, comm' in narrow[-2]


@pytest.mark.parametrize('word', ['if', 'do', '{', 'time', 'in'])
def test_a_word_like_a_keyword_is_a_parameter_where_no_command_begins(made, word):
    made.sweep('a', word)
    assert column('arg1') == ['a', word]


@pytest.mark.parametrize('words, shared', [
    (['--lr 1 --seed 1', '--lr 2 --seed 1'], 'python3 train.py … --seed 1'),
    (['--lr 1', '--lr 2'], 'python3 train.py …'),
    (['', '--fast'], 'python3 train.py …'), (['--lr 1'], 'python3 train.py --lr 1'),
    (['a --lr 1 b', 'c --lr 2 b'], 'python3 train.py … b')])
def test_what_all_commands_share_is_said_once(made, words, shared):
    made.sweep(*words)
    assert screen('--wide')[0] == f'all commands: {shared}'


# ---- Metrics in text ----

@pytest.mark.parametrize('line, expected', [
    ('epoch 90: loss 0.31', {'epoch': 90, 'loss': 0.31}),
    ('loss: 0.3, val_acc=0.9', {'loss': 0.3, 'val_acc': 0.9}),
    ('Test set: Average loss: 0.0312, Accuracy: 9900/10000 (99%)',
     {'Average loss': 0.0312, 'Accuracy': 9900}),
    ('2026-01-01 12:00:00,123 - INFO - loss: 0.3', {'loss': 0.3}),
    ('INFO loss: 0.3', {'loss': 0.3}), ('INFO:root:loss: 0.3', {'loss': 0.3}),
    ("{'loss': 0.5, 'lr': 5e-05}", {'loss': 0.5, 'lr': 5e-05}),
    ("{'loss': np.float64(0.5), 'a': tensor(2.)}", {'loss': 0.5, 'a': 2}),
    ('{"loss": 0.5, "text": "a: 3", "in": {"a": 1}, "no": null}', {'loss': 0.5, 'in.a': 1}),
    ('{"loss": NaN}', {'loss': math.nan}),
    ('epoch 3:  45%|###  | 45/100 [00:01<00:02, 22.1it/s, loss=0.31]', {'loss': 0.31}),
    ('│  test_acc  │   0.9125  │', {'test_acc': 0.9125}),
    ('best accuracy: 91.4%', {'best accuracy': 91.4}), ('F1 (macro): 0.8', {'F1 (macro)': 0.8}),
    ('loss: nan acc: -inf', {'loss': math.nan, 'acc': -math.inf}),
    ('a: 1e-3 b=2E+5 c: .5 d: 6.', {'a': 1e-3, 'b': 2e5, 'c': 0.5, 'd': 6}),
    ('n=1,234,567 m: 1_000', {'n': 1234567, 'm': 1000}),
    ('top1: 0.5 top5: 0.9', {'top1': 0.5, 'top5': 0.9}),
    ('time: 1m 20s, all: 1h 02m, took: 12.3s', {'time': 80, 'all': 3720, 'took': 12.3}),
    ('memory: 3.2 GB, speed: 22.1 it/s', {'memory': 3.2, 'speed': 22.1}),
    ('accuracy is 0.93', {'accuracy': 0.93}), ('größe: 3.5', {'größe': 3.5}),
    ('loss:0.3', {'loss': 0.3}), ('loss : 0.3', {'loss': 0.3}), ('loss:\t0.3', {'loss': 0.3}),
    ('\x1b[32mloss: \x1b[1m0.3\x1b[0m', {'loss': 0.3}),
    ('x: -0.5 +/- 3', {'x': -0.5}), ('loss: 0.31.', {'loss': 0.31}),
    # texts that only look like numbers
    ('device: cuda:0', {}), ('host:8080', {}), ('GPU 0', {}), ('commit: 3fab9c', {}),
    ('version: 1.2.3', {}), ('date: 2026-01-01', {}), ('date: 1/2/2026', {}), ('at: 12:30', {}),
    ('loss: 0,31', {}), ('http://host:8080/x?y=3', {}), ('epoch=3-step=400.ckpt', {}),
    ('model: resnet', {}), ('Saved 3 checkpoints', {}), ('', {}),
])
def test_metrics_of_a_line(line, expected):
    found = {name: reading.value for name, reading in module.metrics_in(line.encode()).items()}
    assert repr(found) == repr(expected) or found == expected


NUMBERS = st.integers(-10**15, 10**15) | st.floats()
WRITTEN = [repr, '{:,}'.format, '{:e}'.format, '{:+}'.format, '{:_}'.format]


@quickly
@given(NUMBERS, st.sampled_from(WRITTEN), st.sampled_from(['loss: {}', 'loss={}', 'loss = {}']),
       st.sampled_from(['', ' %', ' MB', 'it/s', ', b=1', ' (best)', '.', ' |']))
def test_a_number_is_read_as_it_was_meant(number, write, form, end):
    text = write(number)
    found = module.metrics_in((form.format(text) + end).encode())
    value, meant = found['loss'].value, float(text.replace(',', '').replace('_', ''))
    assert value == meant or math.isnan(value) and math.isnan(meant)


@quickly
@given(st.binary(max_size=200) | st.text('a1.:= \r\n{}"%|nif-e', max_size=200).map(str.encode))
@example(b'nan ' * 90 + b'1!')          # a pattern took for ever if nan could also be a name
@example(b'{"a":' * 9000)
def test_the_last_value_is_found_behind_anything(before):
    found = module.metrics_in(before + b'\nzz loss: 0.25\n')
    assert found['zz loss'].value == 0.25
    assert [*found][-1] == 'zz loss'


@pytest.mark.parametrize('out, loss', [
    ('loss: 1\nloss: 2\n', 2), ('loss: 1\nloss: 2', 2), ('loss: 1\rloss: 2\r', 2),
    ('loss: 1\r\nloss: 2\r\n', 2), ('working\rstep 3 loss 2\rstep 4 loss 2\r', 2),
    (b'\xff\xfe loss: 1\nloss: 3 \xe2\x96\n', 3),
    (b'loss: 3\n' + b'x' * 100_000 + b'\n', 3), (b'loss: 3\n' + b'\0' * 1000, 3), ('', None),
    (b'loss: 1\n' * 50_000 + b'loss: 2\n' + b'45%|#|\r' * 5000, 2)])
def test_the_last_value_in_a_stream_counts(made, out, loss):
    made.sweep('1', out=out)
    assert column('loss') == [loss]


def test_the_order_of_metrics_is_that_of_the_last_lines():
    assert [*module.metrics_in(b'b: 1\na: 2\nb = 3\n')] == ['a', 'b']


def test_half_a_line_is_not_read(made, monkeypatch):
    text = 'train_loss: 1\n' + 'noise\n' * 3
    made.sweep('1', out='val_loss: 9\n' + text)
    monkeypatch.setattr(module, 'NEAR_BYTES', len(text) + len('loss: 9\n'))
    assert [*results_table()[0]][:2] == ['job', 'train_loss']


def test_400_jobs_with_10_mb_each_are_quick(made):
    lines = ''.join(f'2026-01-01 12:00:{step % 60:02} INFO trainer: epoch={step // 100} '
                    f'step={step} loss={1 / (step + 1):.5f} lr={step / 1e6:.3g}\n'
                    for step in range(140_000))
    made.add('grid.sh.0', './a --lr 0', lines + 'val_acc: 0.5\n')
    assert (made.folder / 'grid.sh.0.out').stat().st_size > 10**7
    for number in range(1, 400):
        made.add(f'grid.sh.{number}', f'./a --lr {number}', None)
        os.link('job_results/grid.sh.0.out', f'job_results/grid.sh.{number}.out')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command('--columns=val_acc')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == 'val_acc\n' + '0.5\n' * 400
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2


@pytest.mark.parametrize('out, test, holds', [
    ('mem: 1.5 GB', 'mem>1GB', True), ('mem: 1.5 GB', 'mem<1600MB', True),
    ('mem: 1.5 GB', 'mem>1.4', True), ('elapsed: 90 min', 'elapsed<1h', False),
    ('elapsed: 90 min', 'elapsed=1h 30m', True), ('acc: 50%', 'acc>40%', True),
    ('acc: 50%', 'acc>60%', False), ('acc: 0.5', 'acc>60%', False), ('acc: 0.5', 'acc>40%', True),
    ('n: 2k', 'n<1M', True)])
def test_tests_are_in_the_unit_of_the_column(made, out, test, holds):
    made.add('grid.sh.1', './a', out)
    assert len(results_table(where=test)) == holds


def test_units_that_differ_between_jobs_are_made_the_same(made):
    for number, words in enumerate(['took: 41s, acc: 91%, mem: 512MB, n: 2k',
                                    'took: 1m 02s, acc: 0.9, mem: 1.5 GB, n: 1500'], 1):
        made.add(f'grid.sh.{number}', f'./run {number}', words)
    assert column('took') == [41, 62] and column('acc') == [0.91, 0.9]
    assert column('mem') == [512, 1536] and column('n') == [2000, 1500]
    made.add('grid.sh.3', './run 3', 'acc: 5s')         # another unit: no value is converted
    assert column('acc') == [91, 0.9, 5]


def test_a_pattern_finds_a_metric_wherever_it_stands(made):
    made.add('grid.sh.1', './a 1', 'best accuracy 91.5 %\n' + 'loss: 1\n' * 400_000)
    made.add('grid.sh.2', './a 2', 'loss: 2\n')
    (made.folder / 'grid.sh.2.err').write_text('best accuracy 1,080\nbest accuracy 80 at the end')
    made.add('grid.sh.3', './a 3', 'best accuracy unknown\nloss: 3\n')
    rows = results_table(metric=r'acc=best accuracy (\S+)')
    assert [row['acc'] for row in rows] == [91.5, 80, 'unknown']
    assert [row['loss'] for row in rows] == [1, 2, 3]
    assert column('loss', metric='loss=^loss: .') == ['loss: 1', 'loss: 2', 'loss: 3']
    assert column('n', metric='n=nothing') == [None] * 3


def test_a_pattern_does_not_miss_a_line_between_two_steps(made, monkeypatch):
    monkeypatch.setattr(module, 'STEP_BYTES', 7)
    made.sweep('1', out='acc = 0.123456789\n' + 'x' * 50 + '\ny\n')
    assert column('acc', metric='acc=^acc = (.*)$') == [0.123456789]


def test_only_the_ends_of_streams_are_read(made):
    made.sweep('1', out='')
    with open(made.folder / 'grid.sh.1.out', 'wb') as file:
        file.truncate(10**11)           # a hole: reading it all takes minutes
        file.seek(0, os.SEEK_END)
        file.write(b'\nloss: 0.25\n')
    assert column('loss') == [0.25]
    assert column('acc', metric='acc=loss: (.*)') == [0.25]


def test_what_is_no_file_has_no_metrics(made):
    made.sweep('1', out=None)
    os.mkfifo(made.folder / 'grid.sh.1.out')
    (made.folder / 'grid.sh.1' / 'metrics.json').mkdir(parents=True)
    assert column('loss') == [None]


# ---- Metrics in files ----

def test_files_come_before_streams(made):
    made.add('grid.sh.1', './a 1', 'loss: 9\nnoise: 1\n', files='{"loss": 0.5, "name": "x"}')
    made.add('grid.sh.2', './a 2', 'loss: 9\nnoise: 1\n', files={'results.json': '{"loss": 0.6}'})
    made.add('grid.sh.3', './a 3', 'loss: 0.7\nnoise: 1\n', exit_code=1)        # it has no files
    rows = results_table()
    assert [row['loss'] for row in rows] == [0.5, 0.6, 0.7]
    assert [row['name'] for row in rows] == ['x', None, None] and 'noise' not in rows[0]
    made.add('eval.sh.1', './b', 'noise: 1\n', batch='eval.sh')     # another batch, without files
    assert column('noise') == [1, None, None, None]


def test_jobs_that_end_well_without_a_file_have_what_they_print(made):
    """Other jobs of the batch have metrics.json: two programs, of which one prints its numbers."""
    made.add('m.sh.1', 'python3 a.py 1', files='{"auc": 0.7, "n": 9}', batch='m.sh')
    made.add('m.sh.2', 'python3 b.py 1', 'Accuracy: 93\nauc: 0.8\n', batch='m.sh')
    made.add('m.sh.3', 'python3 b.py 2', 'Accuracy: 5\nepoch: 3\n', batch='m.sh', exit_code=1)
    assert [(row['auc'], row['n'], row['Accuracy']) for row in results_table()] == [
        (0.7, 9, None), (0.8, None, 93), (None, None, 5)]
    assert 'epoch' not in results_table()[0]
    assert said() == ['left out: epoch, since only outputs of jobs that failed or still run have '
                      'it. To see it: --columns=job,epoch']


def test_a_metric_that_the_user_names_is_taken_from_any_output(made):
    made.add('grid.sh.1', './a 1', 'noise: 1\nbest acc: 2\n', files='{"loss": 0.5}')
    made.add('grid.sh.2', './a 2', 'noise: 2\nbest acc: 3\nloss: 9\n', exit_code=1)
    assert said() == ['left out: best acc and noise, since only outputs of jobs that failed or '
                      "still run have them. To see them: --columns='job,best acc,noise'"]
    assert results_table(columns='loss,noise') == [
        {'loss': 0.5, 'noise': 1}, {'loss': 9, 'noise': 2}]
    assert column('job', where='noise>1') == ['grid.sh.2'] and said(columns='noise') == []
    assert column('noise', sort='-noise') == [2, 1]
    assert 'noise' not in results_table(sort='-job')[0]


@pytest.mark.parametrize('path, text, expected', [
    ('runs/log.csv', 'step,loss\n1,0.9\n2,0.5\n', {'step': 2, 'loss': 0.5}),
    ('runs/log.csv', 'step;loss\n1;0.9\n2;0.5', {'step': 2, 'loss': 0.5}),
    ('runs/log.csv', '\ufeffstep\tloss\r\n2\tnan\r\n', {'step': 2, 'loss': math.nan}),
    ('runs/log.csv', 'step,train,val\n1,0.9,\n1,,0.8\n', {'step': 1, 'train': 0.9, 'val': 0.8}),
    ('runs/log.csv', 'step,loss\n1,0.9\n2', {'step': 1, 'loss': 0.9}),
    ('runs/log.csv', 'a,b\n"x,y",2\n', {'a': 'x,y', 'b': 2}),
    ('runs/log.csv', 'step,loss\n' + '1,0.9\n' * 60_000 + '2,0.5\n', {'step': 2, 'loss': 0.5}),
    ('runs/a.json', '[{"loss": 1}, {"loss": 2, "ok": true}]', {'loss': 2, 'ok': 'yes'}),
    ('runs/a.jsonl', '{"loss": 1}\n{"loss": 2}\n', {'loss': 2}),
    ('runs/a.csv', '', {}), ('runs/a.csv', 'step,loss\n', {}),
])
def test_files_that_are_named(made, path, text, expected):
    made.add('grid.sh.1', './a', files={path: text})
    (row,) = results_table(from_='runs/*')
    assert repr({name: row[name] for name in expected}) == repr(expected)


def test_files_and_patterns_that_no_job_has_are_told(made):
    made.add('grid.sh.1', './a 1', 'loss: 1', files={'out/results.csv': 'acc\n1\n'})
    made.add('grid.sh.2', './a 2', 'loss: 2')
    assert said(from_=['nothing.csv', 'results.csv', 'out/*.csv'], metric='acc=best (\\S+)') == [
        '--metric acc: no output of 2 jobs has a match',
        '--from nothing.csv: none of 2 jobs has such a file. A path begins in the folder of the '
        'job: job_results/grid.sh.1/',
        "--from results.csv: none of 2 jobs has such a file. Try: --from '**/results.csv'"]
    assert said(from_='**/results.csv', metric='loss=(\\S+)$') == []


def test_of_several_files_the_last_name_counts_and_metrics_json_comes_first(made):
    made.add('grid.sh.1', './a', files={
        'v9.csv': 'a,b,c\n9,9,9', 'v10.csv': 'a,b\n10,10', 'metrics.json': '{"a": 1}'})
    (row,) = results_table(from_=['v*.csv'])
    assert (row['a'], row['b'], row['c']) == (1, 10, 9)


def test_of_lines_of_json_the_last_value_of_each_name_counts(made):
    text = '\ufeff{"loss": 3, "first": 1}\n{"loss": 2, "acc": 0.5}\n{"loss": 1}\n{"loss": 0.'
    made.add('grid.sh.1', './a', files={'log.jsonl': text})
    (row,) = results_table(from_='log.jsonl')
    assert (row['loss'], row['first'], row['acc']) == (1, 1, 0.5)
    assert said(from_='log.jsonl') == []
    made.add('grid.sh.2', './a', files={'log.jsonl': 'no\n{"loss": 7}\n'})
    assert column('loss', from_='*.jsonl') == [1, 7]
    assert said(from_='log.jsonl') == [
        'job_results/grid.sh.2/log.jsonl has lines that are not JSON; they are left out.']


def test_metrics_json_may_have_a_byte_order_mark(made):
    made.add('grid.sh.1', './a', files='\ufeff{"loss": 2}')
    assert column('loss') == [2] and said() == []


def test_files_in_all_folders_are_found_and_links_are_not_followed(made):
    made.add('grid.sh.1', './a', files={'a/b/c.csv': 'loss\n2\n', 'd.csv': 'acc\n1\n'})
    for name in 'xyz':
        (made.folder / 'grid.sh.1' / name).symlink_to('.')
    (row,) = results_table(from_='**/*.csv')
    assert (row['loss'], row['acc']) == (2, 1)
    folder = str(made.folder / 'grid.sh.1')
    below = [os.path.relpath(path, folder) for path in module.files_matching(folder, 'a/**')]
    assert sorted(below) == ['a/b', 'a/b/c.csv']
    assert len(module.files_matching(folder, '**/*.csv')) == 2


def test_a_file_that_is_not_json_is_named(made):
    made.add('grid.sh.1', './a', 'loss: 1', files='{"loss": ')
    assert said() == ['job_results/grid.sh.1/metrics.json is not JSON; its metrics are left out.']
    assert column('loss') == [1]


def test_a_metric_that_repeats_a_parameter_is_no_column(made):
    for seed in (1, 2):
        made.add(f'grid.sh.{seed}', f'./a --seed {seed}', f'seed: {seed}\nloss: 0.5\n')
    assert [*results_table()[0]][:3] == ['job', 'seed', 'loss']


def test_a_metric_stays_where_a_job_has_no_such_parameter(made):
    made.add('grid.sh.1', './a', 'lr: 0.01\n').add('grid.sh.2', './a --lr 0.1', 'lr: 0.1\n')
    assert column('lr') == [None, 0.1] and column('metric lr') == [0.01, 0.1]


def test_large_whole_numbers_are_exact(made):
    numbers = [9007199254740992, 9007199254740993, 1234567890123456789]
    for number in numbers:
        for seed in (1, 2):
            made.add(f'{number}.{seed}', f'./a --n={number} --seed={seed}', f'loss: {number}')
    assert sorted(column('n', mean_over='seed')) == numbers
    rows = map(json.loads, command('--json').stdout.splitlines())
    assert sorted({row['loss'] for row in rows}) == numbers


def test_each_column_takes_little_time(made):
    made.add('grid.sh.1', './a', json.dumps({f'm{number}': number for number in range(300)}))
    began = time.process_time()
    assert column('m299') == [299]
    assert time.process_time() - began < 3              # it once took 40 ms for each column


def test_a_csv_file_with_a_very_long_line(made):
    made.add('grid.sh.1', './a', files={'a.csv': 'x' * 200_000 + '\n1\n', 'b.csv': 'loss\n2\n'})
    assert column('loss', from_='*.csv') == [2]


def test_a_json_file_takes_no_more_memory_than_it_has(made, monkeypatch):
    made.add('grid.sh.1', './a', files='{"loss": 2}')
    sizes, pread = [], os.pread
    monkeypatch.setattr(os, 'pread', lambda fd, size, at: sizes.append(size) or pread(fd, size, at))
    assert column('loss') == [2] and max(sizes) == len('{"loss": 2}')


# ---- Facts ----

def test_facts_of_jobs_in_all_states(made):
    made.add('grid.sh.1', './a 1', gpus='0,2', ended={'peak_memory_mb': 900,
                                                      'peak_gpu_memory_mb': 8120})
    made.add('grid.sh.2', './a 2', exit_code=3, where='/x/y/lab2.yaml', gpus='1')
    made.add('grid.sh.3', './a 3', state='claimed', time=time.time() - 90)
    made.add('grid.sh.4', './a 4', state='ended')
    made.add('grid.sh.10', './a 5', state='lost')
    made.add('grid.sh.9', './a 6', state='cancelled')
    rows = {row.pop('job'): row for row in results_table()}
    assert [*rows] == [f'grid.sh.{number}' for number in (1, 2, 3, 4, 9, 10)]
    assert [(row['exit'], row['state']) for row in rows.values()] == [
        (0, 'finished'), (3, 'failed'), (None, 'running'), (0, 'ended'), (None, 'cancelled'),
        (None, 'lost')]
    one, two, three = list(rows.values())[:3]
    assert (one['machine'], one['gpus'], one['memory_mb'], one['gpu_memory_mb']) == (
        'lab1', '0,2', 900, 8120)
    assert two['machine'] == 'lab2' and 89 < three['time_s'] < 150
    shown = screen(columns=100)
    assert shown[1].split() == 'job arg1 exit time MB GPU MB where'.split()
    assert [line.split() for line in shown[2:5]] == [
        '.1 1 0 1m 00s 900 8120 lab1 GPUs 0,2'.split(), '.2 2 3 1m 00s lab2 GPU 1'.split(),
        f'.3 3 … {shown[4].split()[3]} {shown[4].split()[4]} lab1'.split()]
    assert shown[-2] == '6 jobs: 1 finished, 1 failed, 1 running, 1 ended, 1 lost, 1 cancelled'


def held(made, text, inner=''):
    """Write the lines of a lock, and return it open."""
    path = made.folder / '.ssh_scheduler' / inner / 'lock'
    path.write_text(text)
    return open(path)


def test_a_job_that_no_client_watches_may_still_run(made):
    made.add('grid.sh.1', './a 1', 'loss: 0.25')
    made.add('grid.sh.2', './a 2', 'loss: 0.5', state='claimed', time=time.time() - 90)
    here, elsewhere = os.uname().nodename, 'process 1 on elsewhere\ngrid.sh\n[]\n'
    told = ['1 job may still run, but no client fetches the results. Type: the command that '
            'started grid.sh']
    me = f'process {os.getpid()} on {here}\n'
    with held(made, f'{me}grid.sh\n[]\n'):
        assert column('state') == ['finished', 'running'] and said() == []
    assert column('state') == ['finished', 'started'] and said() == told        # it has ended
    with held(made, f'{me}other.sh\n[]\n'):
        assert said() == told
    for text, state in ((elsewhere, 'running'), (f'{elsewhere}exit status 0\n', 'started'),
                        ('process 99999999 on ' + here + '\n\n[]\n', 'started'), ('', 'running')):
        held(made, text).close()
        assert column('state', where="job=2") == [state], text
    held(made, f'{me}grid.sh\n[]\n').close()
    shown = screen()
    assert shown[3].split() == '.2 2 0.5 started 1m 30s ago lab1'.split()
    assert shown[4:] == ['2 jobs: 1 finished, 1 started', f'results_table: {told[0]}']
    assert column('job', where='exit=started') == ['grid.sh.2'] and column('time_s') == [60, None]
    assert 'left out of the means: 1 started (--unfinished takes them)' in said(mean_over='arg1')


def test_results_that_no_client_fetches(made):
    made.sweep('1').add('grid.sh.2', './a 2', state='ended')
    journal = made.folder / '.ssh_scheduler/commands/first/journal'
    made.add('first', './eval', state='claimed', journal=journal, batch=None)
    here = os.uname().nodename
    with held(made, f'process {os.getpid()} on {here}\ngrid.sh\n[]\n'):
        held(made, f'process {os.getpid()} on {here}\nfirst\n[]\n', 'commands/first').close()
        assert said('first') == [
            '1 job may still run, but no client fetches the results. Type: execute_remote '
            '--attach=first', 'no metrics were found. Have jobs print lines such as `loss: 0.31` '
            "or write metrics.json, or try: --metric 'loss=final loss (\\S+)'"]
        assert column('state') == ['started', 'finished', 'ended']
    assert said()[0] == (
        '1 job may still run and 1 job ended, but no client fetches the results. Type: the command '
        'that started grid.sh and execute_remote --attach=first')


def test_results_that_a_client_fetches_just_now_are_not_left(made, monkeypatch):
    """It writes the last event, and ends, after the first look at the journal."""
    made.add('grid.sh.1', './a 1', 'loss: 0.5', state='claimed')

    def fetched(_inner, _batch):
        made.event(event='ended', job='grid.sh.1', exit_code=0, wall_s=1.0)
        made.event(event='collected', job='grid.sh.1')
        return True

    monkeypatch.setattr(module, 'is_unwatched', fetched)
    assert column('state') == ['finished'] and said() == []


def test_a_lock_is_never_taken(made, monkeypatch):
    import fcntl
    made.add('grid.sh.1', './a 1', state='claimed')
    held(made, 'process 1 on elsewhere\ngrid.sh\n[]\n').close()
    monkeypatch.setattr(fcntl, 'flock', None)
    before = tree_of('job_results')
    assert column('state') == ['running'] and tree_of('job_results') == before


def test_memory_that_nothing_measured_is_no_column(made):
    made.sweep('1', '2')
    assert not {'memory_mb', 'gpu_memory_mb', 'files', 'folder', 'batch'} & {*results_table()[0]}


def test_results_of_different_files_are_told(made):
    made.sweep('1', '2')
    assert said() == []
    made.add('grid.sh.3', './a 3', files=None, **{'state': 'collected'})
    with open(made.journal) as file:
        text = file.read()
    made.journal.write_text(text[::-1].replace('f' * 16, 'e' * 16, 1)[::-1])
    assert said() == ['results of 2 different sets of files are mixed: 2 jobs ran with ffffffff '
                      'and 1 job ran with eeeeeeee. For one of them: --where files=ffffffff']
    assert column('files', where='files=ffffffff') == ['ffffffff'] * 2
    assert said(where='files=ffffffff') == []


def test_a_batch_that_is_being_written_is_read(made):
    made.sweep('1', '2')
    with open(made.journal, 'a') as file:
        file.write('{"event": "lost", "jo')
    assert column('state') == ['finished', 'finished']
    with open(made.journal, 'a') as file:
        file.write('\n')
    with pytest.raises(TableError, match=r'journal, line 7 cannot be read\.'):
        results_table()


def test_events_that_nobody_knows_are_passed_over(made):
    made.sweep('1')
    made.event(event='journal', identity='00000000')
    made.event(event='painted', colour='red')
    made.event(event='committing', job='grid.sh.1', inode=1, kept=[])
    assert column('state') == ['finished']


@pytest.mark.parametrize('facts', [
    {'gpus': 7}, {'command': 7}, {'files': 7}, {'batch': 7}, {'attempt': 'x'}, {'time': 'x'}])
def test_a_strange_fact_in_a_journal_is_no_traceback(made, facts):
    made.add('a', './a', 'loss: 1').add('b', './b', 'loss: 1')
    for job in 'ab':
        made.event(event='claimed', **{'job': job, 'command': './a', **facts})
    assert column('loss') == [1, 1]


def test_the_output_of_an_earlier_attempt_is_not_that_of_the_running_one(made):
    made.add('grid.sh.1', './a', 'loss: 9\n', state='claimed', attempt=2, time=time.time() + 99)
    assert column('loss') == [None]
    made.event(event='ended', job='grid.sh.1', exit_code=0)
    assert column('loss') == [9]


def test_results_that_were_deleted_are_no_rows(made):
    made.sweep('1', '2')
    for end in ('out', 'err'):
        (made.folder / f'grid.sh.1.{end}').unlink()
    assert column('job') == ['grid.sh.2']


def test_earlier_results_are_rows_only_if_asked_for(made):
    made.sweep('1', '2')
    made.event(event='renamed', job='grid.sh.1', to='grid.sh.1~1')
    for end in ('out', 'err'):
        (made.folder / f'grid.sh.1.{end}').rename(made.folder / f'grid.sh.1~1.{end}')
    made.add('grid.sh.1', 'python3 train.py 1', 'loss: 0.4')
    left_out = 'left out: 1 result of jobs that were run again (--earlier shows them)'
    assert column('loss') == [0.4, 0.5] and said() == said('grid.sh') == [left_out]
    assert command().stderr == command('--html', 'page.html').stderr.partition(
        'results_table: wrote')[0] == f'results_table: {left_out}\n'
    assert said(earlier=True) == []
    (job,) = module.read_jobs(module.Place('job_results', ('grid.sh.2',)), None)
    assert (job.began, job.wall_s) == (1000, 60)        # not the time of its end
    rows = results_table(earlier=True)
    assert [(row['job'], row['state'], row['loss']) for row in rows] == [
        ('grid.sh.1', 'finished', 0.4), ('grid.sh.1~1', 'earlier', 0.5),
        ('grid.sh.2', 'finished', 0.5)]
    assert said('job_results/grid.sh.1', 'job_results/grid.sh.1~1.out') == [left_out]


def put_aside(made, name, number=1):
    """Rename a job's results as a client does that runs it again."""
    made.event(event='renamed', job=name, to=f'{name}~{number}')
    for end in ('out', 'err'):
        (made.folder / f'{name}.{end}').rename(made.folder / f'{name}~{number}.{end}')


@pytest.mark.parametrize('state', ['cancelled', 'lost', None])
def test_a_newest_attempt_without_results_takes_none_out_of_the_table(made, state):
    made.sweep('1', '2', out='loss: 0.9')
    for number in (1, 2):
        put_aside(made, 'grid.sh.1', number)
        if number == 1:
            made.add('grid.sh.1', 'python3 train.py 1', 'loss: 0.5')
    if state:
        made.add('grid.sh.1', 'python3 train.py 1', out=None, state=state)
    told = ['earlier results stand for jobs whose newest attempt has none: grid.sh.1~2 for '
            'grid.sh.1', 'left out: 1 result of jobs that were run again (--earlier shows them)']
    assert said() == told
    rows = [(row['job'], row['loss'], row['exit'], row['state']) for row in results_table()]
    assert rows == [('grid.sh.1~2', 0.5, 0, 'earlier'), ('grid.sh.2', 0.9, 0, 'finished')]
    assert column('loss', mean_over='arg1') == [0.7]
    assert screen()[2].split() == '.1~2 1 0.5 0 1m 00s lab1'.split()
    if state:
        assert column('job', 'job_results/grid.sh.1') == ['grid.sh.1~2']
    assert column('job', earlier=True) == [
        *['grid.sh.1'] * bool(state), 'grid.sh.1~1', 'grid.sh.1~2', 'grid.sh.2']
    assert said(earlier=True) == []
    made.event(event='unwanted', jobs=['grid.sh.1'], client=1)      # it was cancelled while waiting
    assert said() == told
    made.add('grid.sh.1', 'python3 train.py 1', 'loss: 0.3')
    assert column('loss') == [0.3, 0.9]


def test_earlier_results_that_were_deleted_are_no_rows(made):
    made.sweep('1')
    made.event(event='renamed', job='grid.sh.1', to='grid.sh.1~1')
    for end in ('out', 'err'):
        (made.folder / f'grid.sh.1.{end}').unlink()
    assert column('job', earlier=True) == []
    (made.folder / 'grid.sh.1~1.out').touch()
    assert column('job', earlier=True) == ['grid.sh.1~1']


def test_jobs_of_execute_remote_are_rows(made):
    made.sweep('1')
    journal = made.folder / '.ssh_scheduler/commands/first/journal'
    made.add('first', './eval', 'score: 3\n', journal=journal, batch=None)
    assert column('job') == ['first', 'grid.sh.1'] and column('score') == [3, None]
    assert column('batch') == [None, 'grid.sh']


def test_a_folder_of_an_older_version(made):
    """Its journal has no batch, no files and no memory."""
    made.event(event='claimed', job='old.sh.1', attempt=1, machine='lab1', command='./a 1')
    made.event(event='ended', job='old.sh.1', exit_code=0)
    made.event(event='collected', job='old.sh.1')
    (made.folder / 'old.sh.1.out').write_text('loss: 1')
    (row,) = results_table()
    assert (row['job'], row['loss'], row['exit'], row['time_s']) == ('old.sh.1', 1, 0, None)
    assert screen()[2].split() == ['.1', '1', '0', 'lab1']


def test_a_folder_without_a_journal(project):
    Path('results').mkdir()
    Path('results/a.1.out').write_text('loss: 1')
    Path('results/a.1').mkdir()
    Path('results/a.1/notes.out').touch()
    for words in (['results'], ['results/a.1'], ['results/a.1.out']):
        assert [(row['job'], row['loss'], row['state']) for row in results_table(*words)] == [
            ('a.1', 1, None)]


# ---- Which results ----

def test_results_may_be_named_as_a_shell_does(made):
    made.sweep('1', '2').add('eval.sh.1', './eval', files='{"a": 1}', batch='eval.sh')
    everything = sorted(str(path) for path in made.folder.glob('grid.sh.*'))
    assert column('job', *everything) == ['grid.sh.1', 'grid.sh.2']
    assert column('job', *made.folder.glob('eval*')) == ['eval.sh.1']
    assert column('job', 'job_results/grid.sh.1', 'job_results/') == [
        'eval.sh.1', 'grid.sh.1', 'grid.sh.2']
    assert column('job', 'job_results/grid.sh') == ['grid.sh.1', 'grid.sh.2']     # the batch
    os.chdir(made.folder)
    assert column('job', 'grid.sh.2') == ['grid.sh.2'] and len(results_table('.')) == 3


def test_a_name_that_looks_like_a_stream_is_a_job_all_the_same(made):
    made.add('a.out', './a').add('a', './b')
    assert column('job', 'job_results/a.out') == ['a.out']
    assert column('job', 'job_results/a.out.err') == ['a.out']


def test_what_a_job_has_written_so_far_is_no_result(made):
    made.sweep('1', '2').add('grid.sh.3', './a 3', state='claimed')
    names = made.folder / '.ssh_scheduler' / 'partial' / 'names'
    names.mkdir(parents=True)
    (names / 'old').symlink_to('.')
    for name in ('grid.sh.3', 'old'):
        (made.folder / f'{name}.partial').mkdir()
        (made.folder / f'{name}.partial' / 'a.out').touch()
    paths = sorted(map(str, made.folder.glob('[!.]*')))
    assert said(*paths) == [] and len(results_table(*paths)) == 3
    (made.folder / 'new.partial').mkdir()
    with pytest.raises(TableError, match='new.partial'):
        results_table('job_results/new.partial')


def test_results_with_and_without_a_journal_are_rows(made):
    made.sweep('1')
    (made.folder / 'old.2.out').write_text('loss: 2\n')
    assert column('loss') == [0.5, 2]


def test_results_without_a_journal_are_told(made):
    made.sweep('1', '2')
    (made.folder / 'old.out').write_text('loss: 1')
    unknown = 'so commands, exit codes, times and machines are unknown'
    assert f'job_results has no journal of 1 job, {unknown}' in said()
    Path('both').mkdir()
    for name in ('a.1', 'a.2'):
        Path(f'both/{name}.out').write_text('loss: 1')
    assert said('both') == [
        f'both has no journal of 2 jobs, {unknown}. If combine_folders made it, name the folders '
        'that it combined: results_table one/job_results two/job_results']
    made.journal.unlink()
    assert said() == [f'job_results has no journal of 3 jobs, {unknown}']


def test_an_empty_line_in_a_journal_is_passed_over(made):
    with open(made.journal, 'a') as file:
        file.write('\n')
    made.sweep('1')
    assert column('loss') == [0.5]


def test_what_is_no_result_is_named(made):
    made.sweep('1')
    (made.folder / 'mine.txt').touch()
    assert said('job_results/grid.sh.1', 'job_results/mine.txt') == [
        'left out, since no job has such results: job_results/mine.txt']
    Path('eval.sh').touch()
    Path('empty').mkdir()
    for word, sentence in (
            ('eval.sh', 'eval.sh has no results of jobs. Name a folder job_results, or results in '
                        'one.'),
            ('nothing', 'nothing does not exist.'),
            ('empty', 'empty has no results of jobs. Name a folder job_results, or results in '
                      'one.')):
        with pytest.raises(TableError) as raised:
            results_table(word)
        assert str(raised.value) == sentence


@pytest.mark.parametrize('words, sentence', [
    (['job_results/grid.sh.1'], 'no job has such results: job_results/grid.sh.1. job_results has '
     '2 jobs of grid.sh (grid.sh.2 to grid.sh.10) and 1 job of execute_remote (single).'),
    (['job_results/gird.sh.2'], 'no job has such results: job_results/gird.sh.2 (did you mean '
     'grid.sh.2?). job_results has 2 jobs of grid.sh (grid.sh.2 to grid.sh.10) and 1 job of '
     'execute_remote (single).'),
    (['job_results/table.csv'], 'no job has such results: job_results/table.csv. job_results has '
     '2 jobs of grid.sh (grid.sh.2 to grid.sh.10) and 1 job of execute_remote (single).'),
    (['gird.sh'], 'gird.sh does not exist (did you mean grid.sh?).'),
    (['job_result'], 'job_result does not exist (did you mean job_results?).')])
def test_results_that_no_job_has_are_an_error(made, words, sentence):
    made.add('grid.sh.2', './a 2').add('grid.sh.10', './a 3')
    made.add('single', './b', journal=made.folder / '.ssh_scheduler/commands/single/journal',
             batch=None)
    (made.folder / 'table.csv').touch()
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == f'results_table: {sentence}\n'


def test_results_that_one_of_two_folders_lacks_are_told(made):
    made.sweep('1')
    Results('other').add('eval.sh.1', './b', batch='eval.sh')
    assert column('job', 'job_results', 'other/x.1') == ['grid.sh.1']
    assert said('job_results', 'other/x.1')[0] == (
        'no job has such results: other/x.1. other has 1 job of eval.sh (eval.sh.1).')


def test_a_project_or_a_batch_file_stands_for_its_results(made):
    made.sweep('1', '2').add('deep_eval.sh.1', './b', batch='deep_eval.sh').add(
        'single', './c', batch=None)
    for path in ('grid.sh', 'deep/eval.sh'):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    for word in ('grid.sh', './grid.sh', 'grid.sh.*', os.path.abspath('grid.sh')):
        assert column('job', word) == ['grid.sh.1', 'grid.sh.2'], word
    assert column('job', 'grid.sh.2') == ['grid.sh.2'] and column('job', 'single') == ['single']
    assert column('job', 'deep/eval.sh') == ['deep_eval.sh.1']
    assert len(results_table('.')) == 4
    Results('exp7/job_results').add('sweep.sh.1', './d', batch='sweep.sh')
    Path('exp7/slurm.out').touch()              # alone, this would make it a folder of results
    assert column('job', 'exp7') == column('job', 'exp7/') == column('job', 'exp7/sweep.sh') == [
        'sweep.sh.1']
    os.chdir('deep')
    assert column('job', '../grid.sh') == ['grid.sh.1', 'grid.sh.2'] and len(
        results_table('..')) == 4


def test_tables_and_pages_lie_beside_results_and_are_no_results(made):
    made.sweep('1', '2').add('odd.csv', './b', state='claimed')
    before = tree_of('job_results')
    for option, path in (('--csv', 'job_results/table.csv'), ('--html', 'job_results/page.html')):
        done = command(option, path)
        assert done.returncode == 0 and f'wrote {path}' in done.stderr
    assert tree_of('job_results').keys() - before.keys() == {b'table.csv', b'page.html'}
    everything = sorted(map(str, made.folder.glob('[!.]*')))
    assert 'job_results/table.csv' in everything and said(*everything) == said()
    assert len(results_table(*everything)) == 3
    (made.folder / 'grid.sh.1').mkdir()
    for path in ('grid.sh.1/a.csv', 'grid.sh.1.out', '.ssh_scheduler/a.csv', 'notes', 'odd.csv'):
        done = command('--csv', f'job_results/{path}')
        assert done.returncode == 2 and 'Name another file, such as job_results/table.csv.' in (
            done.stderr), path


def test_a_job_that_was_cancelled_before_its_start_is_told(made):
    made.sweep('1')
    made.event(event='unwanted', jobs=['grid.sh.1', 'grid.sh.2', 'grid.sh.10'], client=1)
    told = 'left out, since cancelled before the start: '
    assert column('job') == ['grid.sh.1'] and said() == [f'{told}grid.sh.2 and grid.sh.10']
    made.event(event='wanted', jobs=['grid.sh.10'], client=1)
    assert said('job_results/grid.sh') == [f'{told}grid.sh.2']
    assert said('job_results/grid.sh.1') == []
    made.add('grid.sh.2', 'python3 train.py 2', 'loss: 1')
    assert said() == [] and len(results_table()) == 2


def test_an_attempt_that_never_began_is_no_row(made):
    """It was held back, refused, or taken back from the queue of a cluster."""
    made.sweep('1')
    claim = {'event': 'claimed', 'job': 'grid.sh.2', 'command': 'python3 train.py 2', 'attempt': 1,
             'machine': 'lab1', 'gpus': None, 'time': 1.0, 'key': 'grid.sh.2.1-0',
             'batch': 'grid.sh'}
    for how in ('absent', 'held', 'refused'):
        made.event(**claim)
        made.event(event='lost', job='grid.sh.2', how=how, time=2.0)
        assert column('job') == ['grid.sh.1']
    made.event(**claim)                 # it was told to stop before it began
    made.event(event='stopping', job='grid.sh.2')
    made.event(event='lost', job='grid.sh.2', how='absent', time=2.0)
    made.event(event='cancelled', job='grid.sh.2', kept=[], time=3.0)
    assert column('job') == ['grid.sh.1']
    results_table(html='page.html')
    made.event(**claim)
    made.event(event='lost', job='grid.sh.2', how='preempted', time=2.0)
    assert column('state') == ['finished', 'lost']


def test_several_folders_are_told_apart(project):
    for name in ('one', 'two'):
        Results(name).sweep('--lr 1', '--lr 2', out=f'loss: {len(name)}')
    rows = results_table('one', 'two', 'one')
    assert [(row['folder'], row['lr']) for row in rows] == [
        ('one', 1), ('one', 2), ('two', 1), ('two', 2)]
    assert len(results_table('one', 'two', mean_over='lr')) == 2


def test_two_batches_are_told_apart(made):
    made.sweep('--lr 1', '--lr 2').add('eval.sh.1', 'bash eval.sh m --k 3', batch='eval.sh')
    rows = results_table()
    assert [*rows[0]][:4] == ['batch', 'job', 'k', 'lr'] and 'arg1' not in rows[0]
    lines = screen('--wide')
    assert lines[:3] == ['eval.sh: bash eval.sh m …', 'grid.sh: python3 train.py …',
                         'batch    job  k  lr  loss  exit  time    where']
    assert said() == ['these are jobs of 2 batches. For one of them: '
                      'results_table job_results/eval.sh']
    assert said(where='batch=grid.sh') == []
    assert screen('--wide', '--where', 'batch=grid.sh')[0] == 'all commands: python3 train.py …'
    assert [(row['batch'], row['jobs']) for row in results_table(mean_over='lr')] == [
        ('eval.sh', 1), ('grid.sh', 2)]


# ---- Means ----

@pytest.fixture
def sweep(made):
    """2 learning rates, 3 seeds; one job failed, one still runs, and one has no val_acc."""
    for number, (lr, seed) in enumerate(((lr, seed) for lr in ('0.1', '1e-1', '1')
                                         for seed in (1, 2, 3)), 1):
        out = f'loss: {float(lr) * seed}\n' + f'val_acc: 0.{seed}\n' * (number != 5)
        made.add(f'grid.sh.{number}', f'./a --lr {lr} --seed {seed}', out,
                 exit_code=int(number == 8), state='claimed' if number == 9 else 'collected')
    return made


def test_words_that_few_jobs_of_several_batches_have_take_no_room(made):
    for number in range(1, 21):
        made.add(f'grid.sh.{number}', f'python3 train.py --lr {number}', 'loss: 1')
    made.add('bad.sh.1', 'sh -x -c "exit 3"', batch='bad.sh')
    made.add('bad.sh.2', 'ls -l one two three', batch='bad.sh')
    for number in range(1, 4):
        made.add(f'one{number}', f'./eval --k {number}', batch=None)
    head, more = screen(columns=200)[1].split(), [
        line for line in screen(columns=200) if 'more column' in line]
    assert head == 'batch job lr loss exit time where'.split()
    (more,) = more
    assert more == '7 more columns with --wide: arg1, x, c, l, arg2, arg3, k'
    assert {'k', 'arg1'} < {*screen('--wide', columns=400)[1].split()}
    assert {'k', 'arg1', 'lr'} < {*results_table()[0]} and command().stdout.startswith(
        ','.join([*results_table()[0]]))
    assert screen('--columns=job,k')[1].split() == ['job', 'k']
    assert 'arg1' in screen('job_results/bad.sh')[0] + screen('job_results/bad.sh')[1]
    assert screen('--where', 'batch=grid.sh')[1].split()[:3] == ['batch', 'job', 'lr']
    command('--html', 'page.html')
    data = json.loads(re.search('id="data">(.*)</script>', Path('page.html').read_text())[1])
    heads = [one['head'] for one in data['columns']]
    assert heads.index('loss') < heads.index('where') < heads.index('k')
    assert heads.index('lr') < heads.index('loss')


def test_means_over_a_parameter(sweep):
    low, high = results_table(mean_over='seed')
    assert (low['lr'], low['jobs'], high['lr'], high['jobs']) == (0.1, 6, 1, 1)
    assert low['loss'] == pytest.approx(0.2)
    assert low['loss std'] == pytest.approx(statistics.stdev([0.1, 0.2, 0.3] * 2))
    assert (low['val_acc count'], high['val_acc count'], high['loss std']) == (5, None, None)
    assert low['time_s'] == 60 and not {'seed', 'exit', 'job', 'loss count'} & {*low}
    assert said(mean_over='seed') == [
        'left out of the means: 1 failed and 1 running (--unfinished takes them)']
    assert [row['jobs'] for row in results_table(mean_over=['seed'], unfinished=True)] == [6, 3]
    assert [row['jobs'] for row in results_table(mean_over='seed,lr')] == [7]
    assert screen('--mean-over', 'seed')[:5] == [
        'all commands: ./a …', 'lr   jobs  loss           val_acc             time',
        '0.1  6     0.200 ± 0.089  0.20 ± 0.10 (of 5)  1m 00s',
        '1    1     1              0.1                 1m 00s',
        '2 rows of 9 jobs: 7 finished, 1 failed, 1 running']


def test_of_times_there_is_a_mean_and_of_memory_the_most(made):
    for seed in (1, 2, 3):
        made.add(f'grid.sh.{seed}', f'./a --seed {seed}', 'loss: 1', ended={
            'wall_s': 10 * seed, 'peak_memory_mb': 100 * seed})
    (row,) = results_table(mean_over='seed')
    assert (row['time_s'], row['memory_mb']) == (20, 300)
    assert 'memory_mb std' not in row and 'time_s std' not in row


@quickly
@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=9))
def test_mean_and_deviation(values):
    mean, deviation = module.mean_and_deviation(values)
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    assert deviation == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)


@quickly
@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_any_numbers_have_a_mean_and_a_text(values):
    mean, deviation = module.mean_and_deviation(values)
    assert module.mean_text(mean, deviation)
    if any(map(math.isnan, values)):
        assert math.isnan(mean)


@pytest.mark.parametrize('mean, deviation, text', [
    (0.9088, 0.0156, '0.909 ± 0.016'), (1234.5, 67.8, '1234 ± 68'), (0.5, None, '0.5'),
    (3.0, 0.0, '3'), (2.0, math.nan, '2 ± nan'), (1e-7, 2e-8, '1e-07 ± 2e-08'),
    (0.5, 1e-12, '0.500000 ± 0.000000')])
def test_a_mean_is_rounded_by_its_deviation(mean, deviation, text):
    assert module.mean_text(mean, deviation) == text


@pytest.mark.parametrize('name, sentence', [
    ('loss', '--mean-over takes a parameter, in which commands differ; loss is not one.'),
    ('sed', 'there is no column sed (did you mean seed?). Columns: '
            'job, lr, seed, loss, val_acc, exit, time, where')])
def test_a_mean_over_no_parameter_is_an_error(sweep, name, sentence):
    with pytest.raises(UsageError) as raised:
        results_table(mean_over=name)
    assert str(raised.value) == sentence


def test_means_of_one_job_each_are_told(made):
    made.sweep('--seed 1 --out a', '--seed 2 --out b')
    assert said(mean_over='seed') == [
        'each mean is of one job, since all jobs differ in out, too. For means over these: '
        '--mean-over=seed,out']
    assert said(mean_over='seed,out') == []


# ---- Rows, columns, order ----

@pytest.mark.parametrize('test, jobs', [
    ('lr>0.1', '789'), ('lr >= 1', '789'), ('lr=0.1', '123456'), ('lr==1e-1', '123456'),
    ('lr!=1', '123456'), ('seed<2', '147'), ('seed<=1', '147'), ('exit=1', '8'),
    ('exit!=0', '89'), ('state=running', '9'), ('val_acc=', '5'), ('val_acc!=', '12346789'),
    ('job=.3', '3'), ('job=grid.sh.3', '3'), ('where=lab1', '123456789'), ('time>1h', '9'),
    ('time<=1m', '12345678'), ('machine<lab2', '123456789'), ('exit=…', '9'), ('exit=lost', '')])
def test_rows_are_chosen(sweep, test, jobs):
    assert ''.join(job[-1] for job in column('job', where=test)) == jobs


@pytest.mark.parametrize('test, jobs', [
    ('job=3', [3]), ('job=.3', [3]), ('job=grid.sh.3', [3]), ('job!=.3', [1, 2, 4, 12]),
    ('job<3', [1, 2]), ('job>=.4', [4, 12]), ('job=99', []), ('job=3~1', [])])
def test_a_job_has_a_number_and_a_name(made, test, jobs):
    made.sweep('1', '2', '3', '4').add('grid.sh.12', './b')
    assert column('job', where=test) == [f'grid.sh.{number}' for number in jobs]
    put_aside(made, 'grid.sh.3')
    made.add('3', './eval', batch=None)
    assert column('job', where='job=3~1', earlier=True) == ['grid.sh.3~1']
    assert column('job', where='job=3') == ['3']


def test_all_tests_have_to_hold(sweep):
    assert column('job', where=['lr<1', 'seed=2', 'val_acc>0']) == ['grid.sh.2']
    assert said(where='lr>9') == ['none of 9 jobs fits --where']


@pytest.mark.parametrize('test, sentence', [
    ('lr>0.1 and loss<0.5', "--where takes one test. Give it again for each: --where 'lr>0.1' "
                            "--where 'loss<0.5'"),
    ('lr>0.1, loss<0.5', "--where takes one test. Give it again for each: --where 'lr>0.1' "
                         "--where 'loss<0.5'"),
    ('lr<1 && time>2m', "--where takes one test. Give it again for each: --where 'lr<1' "
                        "--where 'time>2m'"),
    ('lr<1 OR lr>2', "--where has no OR. Make a table for each test: --where 'lr<1', then "
                     "--where 'lr>2'"),
    ('lr=>0.1', "--where lr=>0.1: the operator is >=. Type: --where 'lr>=0.1'"),
    ('lr=<0.1', "--where lr=<0.1: the operator is <=. Type: --where 'lr<=0.1'"),
    ('lr<>1', "--where lr<>1: the operator is !=. Type: --where 'lr!=1'"),
    ('time<abc', '--where time<abc: abc is not a number, and time has only numbers.'),
    ('lr>=abc', '--where lr>=abc: abc is not a number, and lr has only numbers.'),
    ('lr=x', '--where lr=x: x is not a number, and lr has only numbers.'),
    ('exit=failed', '--where exit=failed: failed is not a number, and exit has only numbers. '
                    'For the states of jobs: --where state=failed'),
    ('machine<3', '--where machine<3: machine has no numbers, so none is above or below 3.'),
    ('los<3', 'there is no column los (did you mean loss?). Columns: job, lr, seed, loss, '
              'val_acc, exit, time, where'),
    ('zebra=3', 'there is no column zebra. Columns: job, lr, seed, loss, val_acc, exit, time, '
                'where')])
def test_a_test_that_can_hold_for_no_row_is_an_error(sweep, test, sentence):
    with pytest.raises(UsageError) as raised:
        results_table(where=test)
    assert str(raised.value) == sentence


def test_a_value_that_a_job_has_is_right_in_any_test(made):
    made.sweep('--opt "a and b>1"', '--opt ">2"', '--opt "a, c=1"')
    assert column('job', where='opt=a and b>1') == ['grid.sh.1']
    assert column('job', where='opt=>2') == ['grid.sh.2']
    assert column('job', where='opt!=a, c=1') == ['grid.sh.1', 'grid.sh.2']


def test_unlike_a_text_are_all_numbers(made):
    """A script may ask so of batches of which only some have the text."""
    made.sweep('--lr 1', '--lr 2')
    assert column('job', where='lr!=auto') == ['grid.sh.1', 'grid.sh.2']


def test_a_unit_of_another_kind_is_an_error(made):
    made.add('grid.sh.1', './a', 'mem: 2 GB')
    with pytest.raises(UsageError) as raised:
        results_table(where='mem>1h')
    assert str(raised.value) == '--where mem>1h: mem is in GB, so give 1h in that unit.'


@pytest.mark.parametrize('test', ['lr>', 'lr<= '])
def test_a_test_needs_a_value(sweep, test):
    with pytest.raises(UsageError, match='is no test'):
        results_table(where=test)


def test_nan_is_found(made):
    made.add('grid.sh.1', './a 1', 'loss: nan').add('grid.sh.2', './a 2', 'loss: 1')
    assert column('job', where='loss=nan') == ['grid.sh.1']
    assert column('job', where='loss!=nan') == ['grid.sh.2']
    assert column('job', where='loss<9') == ['grid.sh.2']


def test_rows_are_sorted_and_what_is_missing_is_last(made):
    for number, loss in enumerate(['2', '10', 'nan', '', 'inf', '-3'], 1):
        made.add(f'grid.sh.{number}', f'./a --k {number % 2} --f x{number + 7}',
                 loss and f'loss: {loss}')

    def order(sort):
        return ''.join(job[-1] for job in column('job', sort=sort))
    assert order('loss') == '612534' and order('-loss') == '521634'
    assert order('f') == '123456' and order('k,-loss') == '264513'
    assert order(['-k', 'loss']) == '153624' and order('-job') == '654321'


def test_means_are_counted_the_same_way_with_any_columns(sweep):
    whole, some = screen('--mean-over=seed'), screen('--mean-over=seed', '--columns=lr,loss')
    counts = [[line for line in lines if re.match('[0-9]+ rows? of', line)]
              for lines in (whole, some)]
    assert counts[0] == counts[1] != []


def test_columns_are_chosen(sweep):
    assert results_table(columns='val_acc,lr,time', where='seed=1')[0] == {
        'val_acc': 0.1, 'lr': 0.1, 'time_s': 60}
    assert screen('--columns', 'command,state', '--where', 'job=.1')[1:3] == [
        'command                state', './a --lr 0.1 --seed 1  finished']
    with pytest.raises(UsageError, match='there is no column nothing'):
        results_table(columns='nothing')


def test_equal_files_are_named_after_the_first_job_that_had_them(made):
    """The order that Python gives to a set must not matter."""
    for number, digest in enumerate(('a' * 16, 'b' * 16, 'c' * 16), 1):
        made.add(f'grid.sh.{number}', f'true {number}', files_sent=digest)
        sent = made.folder / '.ssh_scheduler/sent' / digest
        sent.mkdir(parents=True)
        (sent / 'files.json').write_text(json.dumps({
            'grid.sh': [420, number, number, ''], 't.py': [420, 1, 1, 'c' * (number > 2)]}))
    for seed in range(5):
        rows = csv.DictReader(io.StringIO(command(
            env={**os.environ, 'PYTHONHASHSEED': str(seed)}).stdout))
        assert [row['files'][0] for row in rows] == ['a', 'a', 'c'], seed


# ---- Output formats ----

def test_a_pipe_gets_csv(sweep):
    done = command()
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert (done.returncode, done.stderr) == (0, '')
    assert [*rows[0]] == ['job', 'lr', 'seed', 'loss', 'val_acc', 'exit', 'state', 'time_s',
                          'machine', 'gpus', 'command']
    assert [row['lr'] for row in rows] == ['0.1'] * 3 + ['1e-1'] * 3 + ['1'] * 3   # as typed
    assert rows[8]['exit'] == '' and rows[4]['val_acc'] == '' and rows[0]['loss'] == '0.1'


def test_csv_goes_to_a_file_and_never_over_results(sweep):
    before = tree_of('job_results')
    done = command('--csv', 'out.csv', '--mean-over=seed')
    assert (done.stdout, done.returncode) == ('', 0)
    assert done.stderr.splitlines()[-1] == 'results_table: wrote out.csv: 2 rows, 8 columns'
    assert Path('out.csv').read_text().startswith('lr,jobs,loss,loss std,val_acc,')
    assert command('--csv', '-', '--mean-over=seed').stdout == Path('out.csv').read_text()
    assert sorted(os.listdir()) == ['job_results', 'out.csv']
    for path, why in (('job_results/grid.sh.1.out', 'not write where results of jobs may be'),
                      ('.', 'this is a folder'), ('no/a.csv', 'cannot be written: No such file')):
        done = command('--csv', path)
        assert done.returncode == 2 and why in done.stderr
    assert tree_of('job_results') == before


def test_csv_goes_where_a_link_leads_and_into_a_fifo(sweep):
    Path('target.csv').touch()
    os.symlink('target.csv', 'link.csv')
    os.mkfifo('fifo')
    expected = command().stdout
    assert command('--csv', 'link.csv').returncode == 0
    assert os.path.islink('link.csv') and 'grid.sh.1,' in Path('target.csv').read_text()
    with subprocess.Popen(['cat', 'fifo'], stdout=subprocess.PIPE, text=True) as reader:
        assert command('--csv', 'fifo').returncode == 0
        lines = reader.communicate()[0].splitlines()
    assert lines[:5] == expected.splitlines()[:5]       # the last job runs, so its time differs
    assert not list(Path().glob('*.tmp'))


HOSTILE = ['=1+1', '+cmd|x', '-2+3', '@SUM(A1)', '\t=1', '\r=1', '＝1', "=HYPERLINK('x')"]


def test_a_formula_in_csv_is_harmless(made):
    for number, text in enumerate(HOSTILE):
        made.add(f'grid.sh.{number}', f'./a {shlex.quote(text)}', f'=x: 1\nloss: -{number}',
                 files={'metrics.json': json.dumps({'=name': text, 'loss': -number})})
    command('--csv', 'out.csv')
    with open('out.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row["'=name"] for row in rows] == [f"'{text}" for text in HOSTILE]
    assert [row['loss'] for row in rows][1:3] == ['-1', '-2']       # numbers stay numbers
    assert not [cell for row in rows for cell in [*row, *row.values()]
                if cell.startswith(module.FORMULA) and not module.PLAIN.fullmatch(cell)]


@quickly
@given(st.lists(st.lists(st.text(st.characters(blacklist_characters='\0'), max_size=5), min_size=2,
                         max_size=2), max_size=4))
def test_csv_is_read_back(texts):
    columns = [module.Column(name, name, module.FACT) for name in 'ab']
    rows = [{name: module.cell_of(text) for name, text in zip('ab', row)} for row in texts]
    text = module.as_csv(module.Table(columns, rows, (), ()))
    _, *back = csv.reader(io.StringIO(text, newline=''))
    assert back == [[module.harmless(text) for text in row] for row in texts]


@quickly
@given(st.text(min_size=1, max_size=12))
def test_no_text_is_a_formula(text):
    shown = module.harmless(text)
    assert not shown.startswith(module.FORMULA)
    assert shown in (text, f"'{text}")


def test_json_is_valid_and_has_all_digits(made):
    made.add('grid.sh.1', './a', 'loss: 0.123456789012345\nbad: nan\nworse: -inf')
    (line,) = command('--json').stdout.splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert (row['loss'], row['bad'], row['worse'], row['gpus']) == (
        0.123456789012345, 'nan', '-inf', None)


def test_markdown(made):
    made.add('grid.sh.1', './a --m "x|y" --k `1`', 'loss: 0.31').add(
        'grid.sh.2', './a --m z --k `1`', '')
    assert command('--markdown').stdout.splitlines() == [
        '    all commands: ./a … --k `1`', '',
        '| job | m    | loss | exit | time   | where |',
        '| --- | ---- | ---: | ---: | -----: | ----- |',
        r'| .1  | x\|y | 0.31 | 0    | 1m 00s | lab1  |',
        '| .2  | z    |      | 0    | 1m 00s | lab1  |']


def test_latex(sweep):
    text = command('--latex', '--mean-over', 'seed', '--columns', 'lr,val_acc').stdout
    assert text.splitlines() == [
        r'% needs \usepackage{booktabs}', '% all commands: ./a …', r'\begin{tabular}{rr}',
        r'\toprule', r'lr & val\_acc \\', r'\midrule', r'0.1 & 0.20 $\pm$ 0.10 (of 5) \\',
        r'1 & 0.1 \\', r'\bottomrule', r'\end{tabular}']


# ---- The terminal ----

def test_the_table_on_a_terminal(made):
    made.add('grid.sh.2', 'python3 train.py --lr 0.001 --seed 1', 'epoch 90: loss 0.31',
             gpus='0', ended={'wall_s': 3720, 'peak_gpu_memory_mb': 8120})
    made.add('grid.sh.3', 'python3 train.py --lr=10 --seed 1', '', gpus='1', exit_code=1,
             ended={'wall_s': 9})
    assert screen() == [
        'all commands: python3 train.py … --seed 1',
        'job  lr     epoch  loss  exit  time    GPU MB  where',
        '.2   0.001  90     0.31  0     1h 02m  8120    lab1 GPU 0',
        '.3   10                  1     9s              lab1 GPU 1',
        '2 jobs: 1 finished, 1 failed']


@pytest.fixture
def wide(made):
    metrics = '\n'.join(f'a_rather_long_metric_{number}: {number}.25' for number in range(12))
    return made.sweep(*(f'--lr {n} --name {"näme" * n}' for n in range(1, 12)), out=metrics)


@pytest.mark.parametrize('columns', [20, 40, 79, 80, 200])
def test_the_table_fits_the_terminal(wide, columns):
    lines = screen(columns=columns)
    table = lines[:lines.index(next(line for line in lines if 'finished' in line)) + 1]
    assert max(map(module.width_of, table[:-1])) <= columns
    assert table[1].split()[:2] == ['job', 'lr'] and 'exit' in table[1]
    assert re.match('[0-9]+ more column', table[-2])


def test_wide_shows_all(wide):
    for lines in (screen('--wide', columns=80), command('--wide').stdout.splitlines()):
        assert all(f'a_rather_long_metric_{number}' in lines[1] for number in range(12))
        assert 'näme' * 11 in lines[12] and len(lines) == 14


def test_latex_takes_no_cell_for_an_argument(made):
    made.sweep('[1,64]', '*1', '"a')
    lines = module.as_latex(module.with_columns(
        module.read_table([], module.read_wishes(*[()] * 5, (), (), False, False), print),
        ['arg1'])).splitlines()
    assert lines[-5:-2] == [r'{}[1,64] \\', r'{}*1 \\', r"''a \\"]


def test_markdown_shows_each_character(made):
    made.sweep("'a_b~c&d<e'", 'f')
    assert r'| a\_b\~c\&d\<e |' in command('--markdown', '--columns=arg1').stdout


def test_csv_moves_no_cursor_of_a_terminal(made):
    made.sweep("'a\x1b[2Jb'", 'c')
    assert r'a\x1b[2Jb' in screen('--csv', '-', '--columns=arg1')
    assert '\x1b[2J' in command('--csv', '-').stdout


def test_colours_are_for_terminals_that_have_them(made):
    made.add('grid.sh.1', './a', exit_code=1)
    for env, has_colour in (({}, True), ({'NO_COLOR': '1'}, False), ({'TERM': 'dumb'}, False)):
        with Terminal([sys.executable, str(PROGRAM)],
                      {**os.environ, 'TERM': 'xterm', **env}) as terminal:
            terminal.end()
        assert ('\x1b[31m1\x1b[0m' in terminal.said.decode()) == has_colour


def test_nothing_in_a_command_or_output_moves_the_cursor(made):
    made.add('grid.sh.1', "./a '\x1b[2Jx\u202e'", files='{"a\\u001bb": "c\\u0007\\nd"}')
    made.add('grid.sh.2', './a y')
    for form in ([], ['--markdown'], ['--latex'], ['--wide']):
        assert all(line.isprintable() for line in screen(*form, env={'NO_COLOR': '1'}))


def test_results_behind_an_option_are_results(sweep):
    assert command('--columns', 'lr', 'job_results').returncode == 0
    done = command('--columns', 'lr acc', 'job_results')
    assert 'there is no column lr acc' in done.stderr
    done = command('--columns', 'lr seed')
    assert 'there is no column lr seed (join names by commas: lr,seed). Columns: ' in done.stderr


def test_a_terminal_without_unicode(sweep):
    done = command('--wide', '--mean-over', 'seed',
                   env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert '0.200 +- 0.089' in done.stdout and done.returncode == 0


# ---- The command line ----

@pytest.mark.parametrize('words, sentence', [
    (['--whre', 'a=1'], 'unknown option --whre (did you mean --where?).'),
    (['--where', 'lr'], "--where lr is no test. Try: --where 'lr>0.001', in quotes, since a shell "
                        'writes to a file behind >.'),
    (['--where'], '--where needs a value.'),
    (['--csv'], '--csv needs a value. Type: --csv=<file>, or --csv=- for stdout'),
    (['--csv', '--where', 'exit=0'], '--csv needs a value, and --where is an option. Type: '
                                     '--csv=<file>, or --csv=- for stdout'),
    (['--sort', '--wide'], '--sort needs a value, and --wide is an option. Type: '
                           '--sort=<columns>'),
    (['-o', 't.csv'], 'unknown option -o. To write the table to a file: --csv=t.csv.'),
    (['--format=csv'], 'unknown option --format. The forms of the table are --csv=t.csv, --json, '
                       '--markdown, --latex and --html=page.html.'),
    (['--filter', 'a=1'], "unknown option --filter. To choose rows: --where 'lr>0.001'."),
    (['--json=1'], '--json takes no value.'),
    (['--sort', 'a', '--sort', 'b'], '--sort is given twice.'),
    (['--json', '--latex'], '--json and --latex: give one of them.'),
    (['--metric', 'loss'], "--metric needs a name and a regular expression: "
                           "--metric 'acc=best accuracy (\\S+)', not loss."),
    (['--metric', 'loss=('], '--metric loss=(: this regular expression is wrong: missing ), '
                             'unterminated subpattern at position 0.'),
    (['--columns', 'lr', 'acc'], '--columns takes names that are joined by commas: '
                                 '--columns=lr,acc'),
    (['--columns=lr,', 'acc', '--wide'], '--columns takes names that are joined by commas: '
                                         '--columns=lr,acc'),
    (['--sort', 'lr', '-acc'], '--sort takes names that are joined by commas: --sort=lr,-acc'),
    (['--mean-over', 'seed', 'fold', '--json'], '--mean-over takes names that are joined by '
                                                'commas: --mean-over=seed,fold'),
    (['--where', 'lr>1', 'loss<2'], "--where takes one test. Give it again for each: "
                                    "--where 'lr>1' --where 'loss<2'"),
    (['--from', '../x'], "--from ../x: name files in the folders of jobs, such as 'runs/*.csv'."),
])
def test_a_wrong_command_line(made, words, sentence):
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'results_table: {sentence}\nUsage:\n  results_table [options]')


def test_without_results(project):
    done = command()
    assert (done.returncode, done.stdout, done.stderr) == (
        2, '', 'results_table: job_results does not exist. Start in the folder of the batch, or '
        'name one: results_table FOLDER\n')
    Results()
    done = command()
    assert (done.returncode, done.stdout, done.stderr) == (
        0, 'job\n', 'results_table: there are no results yet.\n')


def test_a_folder_of_that_name_alone_is_no_results(made):
    Path('work/project').mkdir(parents=True)
    Path('work/.ssh_scheduler/jobs').mkdir(parents=True)            # a machine's workdir
    done = command('work/project')
    assert done.returncode == 2 and 'has no results of jobs' in done.stderr
    assert command('work').returncode == 2
    made.sweep('1')
    assert command('--csv', 'work/project/a.csv').returncode == 0


def test_without_metrics_there_is_advice(made):
    made.sweep('1', out='hello')
    (sentence,) = said()
    assert sentence.startswith('no metrics were found.')
    assert not said(columns='job') and not said(where='exit=0') and not said(sort='-job')


def test_a_metric_that_repeats_a_parameter_was_found_all_the_same(made):
    for number in (1, 2):
        made.add(f'grid.sh.{number}', f'echo r={number}', f'r={number}\n')
    assert said() == []


def test_a_reader_that_leaves_is_no_error(made):
    made.sweep(*map(str, range(2000)))
    process = subprocess.Popen([sys.executable, PROGRAM], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    with contextlib.closing(process.stderr):
        assert process.stderr.read() == b''
    assert process.wait(60) == 0


def test_the_help_without_unicode_and_into_a_closed_pipe():
    done = command('--help', env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert (done.returncode, done.stderr) == (0, '') and 'exit (... while' in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'wb') as closed:
        done = subprocess.run([sys.executable, PROGRAM, '--help'], stdout=closed,
                              stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b'')


@pytest.mark.parametrize('words', ['', '--help'])
def test_a_closed_stdout_is_no_traceback(made, words):
    made.sweep('1')
    done = subprocess.run(['bash', '-c', f'"$0" "$1" {words} >&-', sys.executable, PROGRAM],
                          stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b'')


def test_a_closed_stdin_loses_no_metric(made):
    """Without a stdin, the first file that is opened gets the descriptor 0."""
    made.sweep('1')
    words = [sys.executable, PROGRAM, '--metric=best=loss: (.*)']
    shown = [subprocess.run(['bash', '-c', f'"$@" {stdin}', 'bash', *words], timeout=60,
                            stdout=subprocess.PIPE).stdout for stdin in ('</dev/null', '<&-')]
    assert shown[0] == shown[1] and b'0.5' in shown[0]


def test_the_help_has_every_option():
    done = command('--help')
    assert done.stdout == module.USAGE and [
        line for line in module.USAGE.splitlines() if len(line) > 80] == []
    names = set(re.findall(r'(?m)^  (?:-h )?(--[a-z-]+)', module.USAGE))
    assert names == {name for name in module.option_kinds() if name.startswith('--')}


PAGES = ''.join((PROGRAM.parent / name).read_text(encoding='utf-8')
                for name in ('README.md', 'docs/results.md'))


@pytest.mark.parametrize('line', re.findall(r'(?m)^\$ results_table *(.*)$', PAGES))
def test_a_command_line_of_the_pages_is_understood(made, line):
    for seed in (1, 2):
        made.add(f'grid.sh.{seed}', f'./a --seed {seed} --lr {seed}', 'test_loss: 1\nval_acc: 1')
    done = command(*shlex.split(line))
    assert done.returncode == 0 and 'Usage' not in done.stderr


# ---- Real batches ----

def test_a_real_batch_while_it_runs_and_after(batches, lab1, gate):
    last = f'echo "loss: 0.5"; {gate.wait("go")}; echo "loss: 0.25"; exit 3'
    lines = ['./run.sh --seed 1', './run.sh --seed 2', './run.sh --seed 3']
    Path('run.sh').write_text(f'''#!/bin/bash
        [ "$2" = 3 ] && {{ {last}; }}
        for e in 1 2; do printf "epoch $e: loss 0.$2$e\\r\\n"; done
        [ "$2" = 1 ] || echo '{{"loss": 0.75}}' >metrics.json
    ''')
    Path('run.sh').chmod(0o755)
    follower = batches.start(lines, [lab1], '--memory-required=100', '--gpu-memory-required=100')
    for _ in range(2):
        follower.until('finished:')
    wait_until(lambda: column('state') == ['finished', 'finished', 'running'], 'the results of two')
    rows = {row['seed']: row for row in results_table()}
    assert rows[3]['exit'] is None
    follower.process.kill()
    follower.end()
    assert column('state')[2] == 'started' and said() == [
        '1 job may still run, but no client fetches the results. Type: the command that started '
        'batch.sh']
    follower = batches.start(lines, [lab1], '--memory-required=100', '--gpu-memory-required=100')
    follower.until('running:')
    assert column('state')[2] == 'running' and said() == []
    gate.open('go')
    assert follower.end().returncode == 1
    before = tree_of('job_results')
    rows = results_table()
    assert tree_of('job_results') == before
    assert [(row['job'], row['seed'], row['loss'], row['exit']) for row in rows] == [
        ('batch.sh.1', 1, 0.12, 0), ('batch.sh.2', 2, 0.75, 0), ('batch.sh.3', 3, 0.25, 3)]
    assert {row['gpus'] for row in rows} <= {'0', '1'}
    assert all(line.split()[-3:-1] == [Path(lab1.yaml()).stem, 'GPU']
               for line in screen()[2:5])


def test_a_job_of_execute_remote_and_a_rerun_with_other_files(batches, run_cli, lab1):
    Path('value').write_text('0.5')
    batches.run(['echo "loss: $(cat value)"; : --k 1'], [lab1], *NO_GPU)
    Path('value').write_text('0.25')
    batches.run(['echo "loss: $(cat value)"; : --k 1', 'echo "loss: $(cat value)"; : --k 2'],
                [lab1], *NO_GPU)
    run_cli('execute_remote', '--machine', lab1.yaml(), '--copy-forwards', '--job-name', 'single',
            'echo score=7')
    rows = results_table()
    assert [(row['job'], row['loss'], row['score']) for row in rows] == [
        ('batch.sh.1', 0.5, None), ('batch.sh.2', 0.25, None), ('single', None, 7)]
    assert len({row['files'] for row in rows[:2]}) == 2
    assert any('different sets of files are mixed' in sentence for sentence in said())


def test_the_current_jobs_are_those_that_a_batch_counts(batches, run_cli, lab1):
    batches.run(['echo loss: 1', 'exit 1', 'true', 'true', 'execute_remote --copy-backwards a -- '
                 'true', 'execute_remote --job-name old "echo x=1"'], [lab1], *NO_GPU)
    batches.run(['exit 0', 'echo loss: 1', 'true', '# none', 'execute_remote --copy-backwards b -- '
                 'true', 'execute_remote --job-name new \\', '  "echo x=1"'], [lab1], *NO_GPU)
    done = run_cli('execute_batch', 'batch.sh', '--status', '--json')
    names = sorted(json.loads(line)['job'] for line in done.stdout.splitlines())
    assert sorted(column('job', current=True)) == names and len(names) == 5
    assert said()[-1] == ('3 jobs ran lines that batch.sh no longer has '
                          '(--current leaves them out)')
