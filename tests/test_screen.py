"""A batch on a terminal: its rows, the area below them, Ctrl-C, and the end."""
import io
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import other_client
import pytest
import rig
from batching import NO_GPU, argv_of, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from terminals import Terminal
from test_reporter import TWO_GPUS, Lab

import ssh_scheduler as s

SIZES = (80, 24), (60, 20), (200, 50)


@pytest.fixture
def terminal(scheduler, client_env, project):
    """Run a batch on a terminal: terminal(lines, machines, *options, size=, env=)."""
    started = []

    def start(lines, machines, *options, size=(80, 24), env=()):
        argv = [sys.executable, scheduler, *argv_of(lines, machines, (*NO_GPU, *options))]
        started.append(Terminal(argv, *size, env={**client_env, **dict(env)}, cwd=project))
        return started[-1]

    yield start
    for each in started:
        each.close()


def has(*words):
    return lambda text: all(word in text for word in words)


# ---- A real batch on a real terminal ----

@pytest.mark.parametrize('size', SIZES)
def test_events_have_machine_and_duration_and_the_area_shows_what_runs(terminal, lab, gate, size):
    machine = lab(cores=8)
    shown = terminal([f'echo one; echo epoch 7: loss 0.25; {gate.wait("a")}', 'echo oh >&2; exit 3',
                      'true'], [machine], size=size)
    text = shown.until(has('epoch 7: loss 0.25', '2/3', '1 ok', '1 failed', '1 running',
                           '0 waiting', 'oh'))
    rule = next(line for line in shown.shown if line.startswith('──'))
    below = text.partition(rule)[2]
    assert re.search(r'^\.1  ', below, re.M) and 'batch.sh.1' not in below
    assert all(len(line) < size[0] for line in shown.shown)
    failed = next(line for line in shown.shown if line.startswith('failed:'))
    assert re.match(r'failed:   \.2  ' if size[0] < 80 else r'failed:   batch\.sh\.2  ', failed)
    assert re.search(r' +[0-9.]+s$', failed)
    assert ' own1  ' in failed and 'exit 3' in failed
    gate.open('a')
    assert shown.end() == 1
    assert any(re.fullmatch(r'done: 3 jobs: 2 finished, 1 failed, [0-9ms .]+', line)
               for line in shown.whole)
    assert re.search('again: .*execute_batch --rerun-failed batch.sh --no-gpu',
                     ' '.join(' '.join(shown.whole).split()))
    assert '──' not in '\n'.join(shown.whole)


def test_on_a_narrow_terminal_the_reason_is_kept_and_names_are_left_out(terminal, lab):
    shown = terminal(['echo "ValueError: shape of the layer" >&2; exit 1'] * 5, [lab(cores=8)],
                     size=(60, 20))
    assert shown.end() == 1
    (row,) = [line for line in shown.whole if line.startswith('failed  ')]
    assert re.fullmatch(r'failed +5 × ValueError: shape of the la… +\.\d and 4 more', row)


def test_a_job_with_a_name_of_its_own_is_shown_by_that(terminal, lab, gate):
    shown = terminal([f"execute_remote --job-name big-run '{gate.wait('a')}'"], [lab(cores=8)])
    shown.until(has('\nbig-run  own1  '))
    gate.open('a')
    assert shown.end() == 0


def test_failures_stand_together_by_their_reason(terminal, lab):
    lines = [*(f'echo "RuntimeError: shape {n}" >&2; exit 1' for n in range(5)), 'exit 4',
             'kill -9 $$', 'no_such_command', 'true']
    shown = terminal(lines, [lab(cores=8)])
    assert shown.end() == 1
    rows = [line for line in shown.whole if line.startswith('failed  ')]
    assert re.fullmatch(r'failed +5 × RuntimeError: shape [0-4] +'
                        r'batch\.sh\.\d, \.\d, \.\d and 2 more', rows[0])
    assert sorted(re.sub(' +', ' ', row) for row in rows[1:]) == [
        'failed 1 × exit code 127: no_such_command: command not found batch.sh.8',
        'failed 1 × exit code 4, empty stderr batch.sh.6',
        'failed 1 × killed by signal 9 (KILL) batch.sh.7']
    text = '\n'.join(shown.whole)
    assert text.index('failed      5') < text.index('done: 9 jobs') < text.index('look:  ')


@pytest.mark.parametrize('columns', [80, 200])
def test_long_commands_that_share_words_show_what_differs(terminal, lab, columns):
    """The differences stand at the end, where a row would be cut."""
    lines = [f'echo train the model of the lab with --lr 0.{n} --seed {n}' for n in range(3)]
    shown = terminal(lines, [lab()], size=(columns, 30))
    assert shown.end() == 0
    text = '\n'.join(shown.whole)
    is_cut = columns == 80
    assert ('all commands: echo train the model of the lab with …' in text) == is_cut
    assert ('batch.sh.3  --lr 0.2 --seed 2  ' in text) == is_cut
    assert (f'batch.sh.3  {lines[2]}  ' in text) != is_cut


def test_lines_with_results_are_one_line(terminal, lab):
    machine = lab()
    lines = ['true', 'false', 'true']
    assert terminal(lines, [machine]).end() == 1
    again = terminal([*lines, 'true'], [machine])
    assert again.end() == 1
    (line,) = [line for line in again.whole if 'have results' in line]
    assert line == 'skipped: 3 lines that have results (1 of them failed: --rerun-failed)'
    assert not any('WARNING' in line for line in again.whole)


def test_what_jobs_write_never_reaches_the_terminal_as_control_characters(terminal, lab, gate):
    hostile = shlex.quote('\x1b]0;title\x07\x1b[2Jred \x1b[31m\x9b7m\rok')
    shown = terminal([f'printf %s {hostile}; printf %s {hostile} >&2; {gate.wait("a")}; exit 5'],
                     [lab()])
    shown.until(has('.1  ', 'ok'))
    gate.open('a')
    assert shown.end() == 1
    for bad in (b'\x1b]0', b'\x1b[2J', b'\x9b7m', b'\x07', b'\x1b[31m\xc2\x9b'):
        assert bad not in shown.raw


def test_what_hooks_print_scrolls_above_the_area_without_control_characters(terminal, lab, gate):
    shown = terminal(['exit 3', gate.wait('a')], [lab()], '--on-finish', 'echo the last line',
                     '--on-failure', "printf 'told \\033]0;title\\007of \\033[2J.2'")
    text = shown.until(has('told ', '1 running'))
    assert text.index('told ') < text.index('──')
    gate.open('a')
    assert shown.end() == 1
    assert [line for line in shown.whole if line][-1] == 'the last line'
    assert b'\x1b]0' not in shown.raw and b'\x1b[2J' not in shown.raw


@pytest.mark.parametrize('env', [{'TERM': 'dumb'}, {'PYTHONPATH': 'blocked'}])
def test_where_nothing_can_be_drawn_the_lines_are_those_of_a_pipe(terminal, lab, project, env):
    (project / 'blocked').mkdir()
    (project / 'blocked/rich.py').write_text("raise ImportError('blocked')\n")
    shown = terminal(['true', 'exit 3'], [lab()], env=env)
    assert shown.end() == 1
    lines = shown.whole
    assert {'started: batch.sh.1;  true', 'finished: batch.sh.1; true',
            'failed: batch.sh.2; exit 3'} <= set(lines)
    assert b'\x1b' not in shown.raw


def test_no_color_means_none(terminal, lab):
    shown = terminal(['exit 3'], [lab()], env={'NO_COLOR': '1'})
    assert shown.end() == 1
    coloured = terminal(['exit 3', 'exit 4'], [lab()])
    assert coloured.end() == 1
    assert (b'\x1b[31m' in coloured.raw, b'\x1b[31m' in shown.raw) == (True, False)


def test_the_area_follows_the_size_of_the_terminal(terminal, lab, gate):
    shown = terminal([gate.wait('a')], [lab()])
    shown.until(has('1 running'))
    shown.resize(60, 20)
    shown.until(lambda text: any(line == '─' * 57 for line in text.split('\n')), 'a shorter rule')
    gate.open('a')
    assert shown.end() == 0


def test_ctrl_c_leaves_no_part_of_the_area_behind(terminal, lab, gate):
    """The terminal's own ^C may follow a row that has the greatest width."""
    shown = terminal(['sleep 0.1'] * 3 + [gate.wait('a')] + ['true'] * 30,
                     [lab().yaml(max_jobs=1)], size=(80, 12))
    shown.until(has('3/34', ' left', '1 running'))
    shown.settle()
    shown.press('\x03')
    shown.until(has('Press a key'))
    shown.settle()
    assert sum(line.startswith('───') for line in shown.shown) == 1
    shown.press('c')
    assert shown.end() == 130


def test_a_machine_that_does_not_answer_is_shown_while_it_is_waited_for(terminal, lab, gate):
    machine, silent = lab(), lab()
    silent.freeze()
    shown = terminal([gate.wait('a')], [silent, machine])
    shown.until(has('own2: connecting'))
    shown.until(has('1 running'))
    gate.open('a')
    assert shown.end() in (0, 1)
    silent.thaw()


def test_the_cursor_is_there_whatever_ends_the_client(terminal, lab, gate):
    shown = terminal([gate.wait('a')], [lab()])
    shown.until(has('1 running'))
    assert shown.raw.rindex(b'\x1b[?25h') > shown.raw.rindex(b'\x1b[?25l')
    shown.process.kill()
    shown.end()
    gate.open('a')


# ---- Ctrl-C ----

def test_ctrl_c_asks_and_enter_continues(terminal, lab, gate):
    shown = terminal([gate.wait('a')], [lab()])
    shown.until(has('1 running'))
    shown.press('\x03')
    shown.until(has('Press a key', 'detach', 'cancel', 'continue'))
    shown.press('x\r')
    shown.until(lambda text: 'Press a key' not in text and '1 running' in text)
    gate.open('a')
    assert shown.end() == 0


@pytest.mark.parametrize('keys', ['c', '\x03'])
def test_ctrl_c_and_c_or_ctrl_c_again_cancel(terminal, lab, gate, ledger, keys):
    shown = terminal([f'echo $$ >>{ledger}; {gate.wait("a")}', 'true'], [lab().yaml(max_jobs=1)])
    shown.until(has('1 running'))
    wait_until(ledger.read_text, 'the job')
    shown.press('\x03')
    shown.until(has('Press a key'))
    shown.press(keys)
    assert shown.end() == 130
    assert any(line.startswith('interrupted: 2 jobs: 0 finished, 0 failed, 1 cancelled, '
                               '1 not started') for line in shown.whole)
    assert rig.ends(int(ledger.read_text()))


def test_ctrl_c_and_d_leave_the_jobs_running(terminal, lab, gate, batches, ledger):
    lines = [f'echo $$ >>{ledger}; {gate.wait("a")}; echo done', 'true']
    where = [lab().yaml(max_jobs=1)]
    shown = terminal(lines, where, '--on-finish', 'echo $SSH_SCHEDULER_STATUS, '
                     '$SSH_SCHEDULER_NOT_COLLECTED runs, $SSH_SCHEDULER_NOT_STARTED waits',
                     size=(200, 30))
    shown.until(has('1 running'))
    wait_until(ledger.read_text, 'the job')
    shown.press('\x03')
    shown.until(has('Press a key'))
    shown.press('d')
    assert shown.end() == 130
    text = ' '.join(shown.whole)
    assert '130, 1 runs, 1 waits' in text
    assert 'left: 1 job keeps running on ' in text and '1 line has not started' in text
    os.kill(int(ledger.read_text()), 0)
    gate.open('a')
    done = batches.run(lines, where, *NO_GPU)
    assert done.returncode == 0, done.stderr
    assert 'finished: batch.sh.1' in done.stdout and 'finished: batch.sh.2' in done.stdout


PIPED = ('trap : INT; execute_batch batch.sh --no-gpu-required --machines {} 2>&1 | tee log; '
         'echo "status ${{PIPESTATUS[0]}}"; stty -a | tr " " "\\n" | grep -x -e icanon -e echo')


@pytest.mark.parametrize('keys, status, ended', [
    ('d', 130, False), ('c', 130, True), ('\x03', 130, True), ('\r', 0, False)])
def test_ctrl_c_asks_also_where_the_output_goes_through_a_pipe(
        client_env, project, lab, gate, ledger, keys, status, ended):
    """Ctrl-C ends tee, too, so the question goes to the terminal itself."""
    (project / 'batch.sh').write_text(f'echo $$ >>{ledger}; {gate.wait("a")}\n')
    programs = project.parent / 'bin'
    programs.mkdir()
    (programs / 'execute_batch').symlink_to(Path(s.__file__).resolve())
    python = Path(sys.executable).parent
    shown = Terminal(['bash', '-c', PIPED.format(lab().yaml())], cwd=project,
                     env={**client_env, 'PATH': f'{programs}:{python}:{client_env["PATH"]}'})
    def tee():
        return [pid for pid in rig.knowing(client_env['HOME']) if rig.cmdline(pid) == 'tee log']

    try:
        wait_until(ledger.read_text, 'the job')
        wait_until(tee, 'tee')
        (reader,) = tee()
        shown.press('\x03')
        shown.until(has('press a key', 'detach', 'cancel', 'continue'))
        assert rig.ends(reader)
        shown.press(keys)
        if keys == '\r':
            shown.until(has('The batch continues. Nothing reads its output any more'))
            gate.open('a')
            shown.until(has('finished: batch.sh.1;', 'done: 1 job: 1 finished'))
        shown.until(has(f'status {status}', 'icanon', 'echo'))
        assert rig.ends(int(ledger.read_text())) if ended or keys == '\r' else (
            not os.kill(int(ledger.read_text()), 0))
    finally:
        shown.close()


def test_ctrl_c_while_a_machine_is_connected_to(terminal, lab):
    silent = lab()
    silent.freeze()
    shown = terminal(['true'], [silent])
    shown.until(has('own1: connecting'))
    shown.press('\x03')
    shown.until(has('Press a key'))
    shown.press('c')
    assert shown.end() == 130
    silent.thaw()


def test_ctrl_c_while_jobs_are_cancelled_does_not_ask_again(terminal, lab, gate, ledger):
    shown = terminal([f"trap '' TERM; echo $$ >>{ledger}; {gate.wait('a')}"], [lab()])
    shown.until(has('1 running'))
    wait_until(ledger.read_text, 'the job')
    shown.press('\x03')
    shown.until(has('Press a key'))
    shown.press('c')
    shown.until(has('interrupted: stopping all jobs'))
    shown.press('\x03')
    assert shown.end() == 130
    assert rig.ends(int(ledger.read_text()))


def test_the_terminal_is_as_it_was_after_a_question(terminal, lab, gate):
    import termios
    shown = terminal([gate.wait('a')], [lab()])
    before = termios.tcgetattr(shown.leader)
    shown.until(has('1 running'))
    shown.press('\x03')
    shown.until(has('Press a key'))
    assert not termios.tcgetattr(shown.leader)[3] & termios.ICANON
    shown.process.send_signal(signal.SIGTERM)
    assert shown.end() == 130
    assert termios.tcgetattr(shown.leader) == before


# ---- Rows that fit ----

TEXTS = st.text(st.characters(codec='utf-8'), max_size=80)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(left=TEXTS, right=st.text(st.characters(codec='utf-8'), max_size=30),
       width=st.integers(20, 120), encoding=st.sampled_from(['utf-8', 'ascii']))
def test_a_row_is_one_line_that_fits(left, right, width, encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline='')
    screen = s.Screen(file, lambda columns, rows: [s.Row(left, right)])
    screen._console = Console(file=file, width=width, height=10, force_terminal=True,
                              color_system=None)
    text = screen._text(s.Row(left, right), width).plain
    assert text.isprintable() and cell_len(text) < width
    assert encoding == 'utf-8' or text.isascii()
    if cell_len(s.printable(right)) < width - 4 and encoding == 'utf-8':
        assert text.endswith(s.printable(right))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ended=st.integers(0, 99999), failed=st.integers(0, 99999), width=st.integers(30, 200),
       total=st.integers(1, 99999), left=st.sampled_from(['', '5h–6h left']))
def test_the_counts_are_never_cut_in_a_number(ended, failed, width, total, left):
    row = s.counts_row(width, ended + failed, total, [f'{ended} ok', f'{failed} failed',
                                                      '6 running', '358 waiting'], left)
    assert len(row.left) + 2 + len(row.right) < width
    assert f'{ended + failed}/{total}' in row.left
    assert not re.search(r'\d$', row.left.replace(f'{ended + failed}/{total}', '').rstrip())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text('ab/ ', max_size=200), st.integers(5, 40))
def test_a_long_line_breaks_between_words_and_is_still_the_same_line(text, width):
    padded = s.padded_at_words(text, width)
    assert padded.split() == text.split() and '\n' not in padded
    rows = [padded[at:at + width] for at in range(0, len(padded), width)]
    words = text.split()
    if text == ' '.join(words) and max(map(len, words), default=0) < width:
        assert not any(row.startswith(' ') for row in rows)
        assert [word for row in rows for word in row.split()] == words
    assert s.padded_at_words(f"'{text}'", width) == f"'{text}'"


class Sent:
    """A Stage, partly sent."""
    amount = 214, 61_000_000

    def __init__(self, sent):
        self.sent_bytes = lambda: sent


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 70_000_000), st.floats(0, 1e6), st.integers(60, 200))
def test_a_row_of_files_that_are_sent_fits_and_tells_no_time_before_any_rate(sent, since_s, width):
    row = s.sending_row('lab1', Sent(sent), since_s, width)
    assert len(row.left) + 2 + len(row.right) < width
    assert (' left' in row.right) == (610_000 <= sent < 61_000_000)
    assert width < 80 or '/s' in row.right
    bar = row.left.partition('MB')[2].strip()
    assert not bar or 8 <= len(bar) <= 20


def test_the_row_of_files_that_are_sent():
    row = s.sending_row('lab1', Sent(39_040_000), 3.2, 80)
    assert (row.left, row.right) == ('lab1: sending 214 files, 61.0 MB  ━━━━━━━━━━━━━───────',
                                     '64%  12.2 MB/s  2s left')
    assert s.sending_row('lab1', Sent(None), 3.2, 80).right == '3s'


def test_on_other_systems_tar_tells_how_much_was_sent(lab, project, outside, client_env):
    """A client without /proc; the machine's tar begins late, so the data only fills the buffers."""
    machine = lab(leave_out=('rsync',))
    machine._script('tar', f"""#!/bin/bash
until [ -e {outside / 'free'} ]; do sleep 0.02; done
exec {rig.program('tar')} "$@"
""")
    sparse(project / 'data', 20_000_000)
    shown = Terminal(
        [sys.executable, other_client.__file__, *argv_of(['true'], [machine], NO_GPU)], cwd=project,
        env={**client_env, 'CLIENT_LACKS': 'platform proc'})
    try:
        shown.until(lambda text: re.search(r'20.0 MB +.* ([1-9]|[1-8][0-9])%  .*/s', text))
        (outside / 'free').touch()
        assert shown.end() == 0, shown.whole
    finally:
        shown.close()


# ---- The time that is left ----

def test_nothing_is_said_before_three_jobs_have_ended():
    pace = s.Pace()
    for _ in range(2):
        pace.ended('kind', 'lab1', 60)
    assert pace.left([('kind', 'lab1', 0)], {'kind': 5}) is None
    pace.ended('kind', 'lab1', 60)
    assert pace.left([('kind', 'lab1', 0)], {'kind': 5}) is not None
    assert pace.left([], {'kind': 5}) is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(took=st.floats(0.5, 5000), places=st.integers(1, 40), waiting=st.integers(0, 8000))
def test_equal_jobs_take_as_many_rounds_as_they_need(took, places, waiting):
    pace = s.Pace()
    for _ in range(20):
        pace.ended('kind', 'lab1', took)
    least, most = pace.left([('kind', 'lab1', 0)] * places, {'kind': waiting})
    rounds = -(-(waiting + places) // places)
    assert least * 0.97 <= rounds * took <= most * 1.03


def test_a_slow_machine_and_a_long_kind_are_counted_as_such():
    pace = s.Pace()
    for machine, kind, took in (('fast', 'a', 10), ('slow', 'a', 100), ('fast', 'b', 1000)):
        for _ in range(9):
            pace.ended(kind, machine, took)
    least, most = pace.left([('a', 'fast', 0), ('a', 'slow', 0)], {'a': 8})
    assert least <= 100 <= most
    least, most = pace.left([('b', 'fast', 400)], {})
    assert least <= 600 <= most


def test_a_job_that_exceeds_what_is_typical_may_take_as_long_again():
    pace = s.Pace()
    for _ in range(20):
        pace.ended('kind', 'lab1', 10)
    least, most = pace.left([('kind', 'lab1', 60)], {})
    assert least <= 50 <= most


@pytest.mark.parametrize('least, most, words', [
    (17000, 22000, '5h–7h'), (17900, 18100, '5h–6h'), (65, 110, '65s–110s'), (100, 170, '2m–3m'),
    (0.2, 0.9, '1s'), (200000, 300000, '2d–4d'), (3, 3, '3s')])
def test_a_range_is_short(least, most, words):
    assert s.range_of(least, most) == words


# ---- Why a job failed ----

TRACEBACK = '''Traceback (most recent call last):
  File "train.py", line 3, in <module>
    step()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
See https://example.org
'''


@pytest.mark.parametrize('code, text, words', [
    (1, TRACEBACK, 'CUDA out of memory'),
    (1, TRACEBACK.replace('CUDA out of memory', 'no'),
     'torch.OutOfMemoryError: no. Tried to allocate 2.00 GiB.'),
    (1, 'jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while', 'GPU out of memory'),
    (1, 'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling', 'CUDA out of memory'),
    (3, '', 'exit code 3, empty stderr'), (3, ' \n\n', 'exit code 3, empty stderr'),
    (1, 'a\n 10%\r 20%\rbroken\n', 'broken'),
    (127, '../b.sh.3.1-0: line 1: foo: command not found\n',
     'exit code 127: foo: command not found'),
    (126, '', 'exit code 126: a command could not be executed'),
    (137, '', 'killed by signal 9 (KILL)'), (139, 'x', 'killed by signal 11 (SEGV)'),
    (137, 'x\nssh-scheduler: the kernel killed a process for lack of memory, and then this job '
          'ended\n', 'lab1 ran out of memory (signal 9)'),
    (124, 'ssh-scheduler: stopped after 5 s, its time limit\n',
     'stopped after 5 s, its time limit'),
    (137, 'ssh-scheduler: the job ran out of memory: Exceeded job memory limit\n',
     'the job ran out of memory'),
    (137, "ssh-scheduler: the job's shell on the node was killed\n",
     "the job's shell on the node was killed"),
    (143, 'x\nssh-scheduler: the job was cancelled by the user 4321 before it began\n',
     'the job was cancelled by the user 4321 before it began'),
    (143, 'x\n', 'killed by signal 15 (TERM)'),
    (255, 'ssh: no route', 'ssh: no route'), (-1, '', 'lab1 lost the job')])
def test_a_failure_in_words(code, text, words):
    assert s.failure_words(code, 'lab1', s.lines_shown(text.encode())) == words


@pytest.mark.parametrize('count, words', [
    (1, 'g.sh.1'), (3, 'g.sh.1, .2, .3'), (1003, 'g.sh.1, .2, .3 and 1,000 more')])
def test_names_are_short(count, words):
    assert s.names_in_short([f'g.sh.{n}' for n in range(1, count + 1)]) == words


# ---- Large files and folders ----

def sparse(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        os.truncate(file.fileno(), size)


def test_what_is_large_is_named_before_it_is_sent(batches, project, lab):
    sparse(project / 'runs/one/last one.ckpt', 600_000_000)
    sparse(project / 'small', 1000)
    machine = lab()
    done = batches.run(['true'], [machine], *NO_GPU, '--dry-run')
    assert ('600.0 MB are sent to 1 machine, 600.0 MB of it runs/one/last one.ckpt.\n'
            "To leave it out: --exclude 'runs/one/last one.ckpt'\n"
            "To send it once, for reading: --link-forwards 'runs/one/last one.ckpt'\n"
            ) in done.stderr
    done = batches.run(['true'], [machine], *NO_GPU, '--dry-run', '--exclude',
                       'runs/one/last one.ckpt')
    assert 'are sent' not in done.stderr


# ---- The area, as a whole ----

AREA = {60: '''\
───────────────────────────────────────────────────────────
lab3: connecting                                         7s
.1  lab1 GPU 0   1h 02m  epoch 57: loss 0.44
.3  lab1 GPU 1   2m 10s  10%
 … 2 more
 0/400   0 ok  0 failed  4 running  396 waiting''', 80: '''\
───────────────────────────────────────────────────────────────────────────────
lab3: connecting                                                             7s
.1  lab1 GPU 0   1h 02m  epoch 57: loss 0.44
.3  lab1 GPU 1   2m 10s  10%
 … 2 more
 ──────────────────────  0/400   0 ok  0 failed  4 running  396 waiting'''}


@pytest.fixture
def results(project):
    with_lock = s.ResultStore('job_results').open()
    yield with_lock
    with_lock.close()


@pytest.mark.parametrize('width', AREA)
def test_the_area_is_this(results, project, monkeypatch, width):
    """A real Run on fake machines; its four running jobs have three lines."""
    machines = {'lab1': TWO_GPUS, 'lab2': TWO_GPUS, 'lab3': TWO_GPUS}
    lab = Lab(results, machines, ''.join(f'train {n}\n' for n in range(400)))
    silent = lab.workers.pop()

    def steps():
        lab.started()
        board = s.Board(lab.batch, 0, s.Question(lab.batch))
        board.shows_counts, board.MOST_JOBS = True, 3
        lab.batch.fleet.workers.append(silent)
        silent.run, silent.state = lab.batch, 'connecting'
        for worker in lab.workers:
            worker.contact = SimpleNamespace(stages=SimpleNamespace(on_their_way=()))
        now, uptime_s = time.time(), time.monotonic()       # the clocks stand still from now on
        monkeypatch.setattr(time, 'time', lambda: now)
        monkeypatch.setattr(time, 'monotonic', lambda: uptime_s)
        board._since[silent] = uptime_s - 7
        for attempt, age, said in zip(lab.running, (3725, 130, 12, 5), (
                b'epoch 56: loss 0.46\nepoch 57: loss 0.44\n\n', b' 5%\r10%\r', b'', b'')):
            lab.journal.record(attempt.name).time = now - age
            attempt.streams = {'out': s.Stream(), 'err': s.Stream()}
            attempt.streams['out'].bring(0, said)
            attempt.streams['out'].moved = age
        screen = s.Screen(io.TextIOWrapper(io.BytesIO(), 'utf-8'), lambda *size: ())
        drawn.append('\n'.join(screen._text(row, width).plain.rstrip()
                               for row in board.rows(width, 24)))
        raise KeyboardInterrupt             # the test has seen all
        yield

    drawn = []
    with pytest.raises(KeyboardInterrupt):
        lab.run(steps())
    assert drawn == [AREA[width]]
