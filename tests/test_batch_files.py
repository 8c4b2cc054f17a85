"""Batch files: which lines are commands, what each job is called, and what partial lines change."""
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from batching import NO_GPU
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import ssh_scheduler
from ssh_scheduler import Allocation, BatchFileError, Forwards

ANY = settings(deadline=None, derandomize=True, max_examples=120)
BATCH = ssh_scheduler.read_options(ssh_scheduler.EXECUTE_BATCH_USAGE, ['x'])


def jobs_of(text, *words, path='batch.sh', warn=None):
    """Return the Jobs of a batch file's text, with the batch's own options."""
    def refuse(sentence):
        raise AssertionError(f'there was a warning: {sentence}')

    options = ssh_scheduler.read_options(ssh_scheduler.EXECUTE_BATCH_USAGE, [path, *words])
    return ssh_scheduler.read_jobs(path, text, options, warn or refuse)


def complaint(text, *words):
    with pytest.raises(BatchFileError) as caught:
        jobs_of(text, *words)
    return str(caught.value)


def text_of(data):
    return ssh_scheduler.read_batch_text('-', io.BytesIO(data))


def commands(text):
    return [(line, command) for line, command in ssh_scheduler.split_batch(text)]


# ---- From bytes to text ----

def test_a_file_is_read(tmp_path):
    path = tmp_path / 'batch.sh'
    path.write_bytes('echo é\n'.encode())
    assert ssh_scheduler.read_batch_text(str(path), None) == 'echo é\n'


def test_a_dash_is_the_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '-').write_text('not this\n')
    assert text_of(b'echo a\n') == 'echo a\n'
    (job,) = jobs_of('echo a\n', path='-')
    assert job.name == 'stdin.1'


@pytest.mark.parametrize(('make', 'reason'), [
    (lambda path: None, 'No such file or directory'),
    (Path.mkdir, 'Is a directory'),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, reason):
    path = tmp_path / 'batch.sh'
    make(path)
    with pytest.raises(BatchFileError) as caught:
        ssh_scheduler.read_batch_text(str(path), None)
    assert str(caught.value) == f'the batch file {path} cannot be read: {reason}.'


@pytest.mark.parametrize(('name', 'text'), [
    ('train.py', 'import numpy\n'), ('a b.ipynb', '{}'), ('train', '#!/usr/bin/env python3\n')])
def test_a_python_program_is_no_batch_file(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(BatchFileError) as caught:
        ssh_scheduler.refuse_python(name, ssh_scheduler.read_batch_text(name, None))
    said, _, typed = str(caught.value).partition(' To run one command: ')
    assert said == f'{name} is a Python program. A batch file has one command on each line.'
    *start, command = shlex.split(typed)
    assert start == ['execute_remote', '--machine', 'MACHINE']
    assert shlex.split(command) == ['python3', name]


@pytest.mark.parametrize('text', [
    '#!/home/ann/python-tools/bin/bash\n', '#!/bin/bash # not python\n', 'python3 train.py\n', ''])
def test_a_batch_file_may_name_python(text):
    ssh_scheduler.refuse_python('b.sh', text)


@pytest.mark.parametrize(('words', 'said'), [
    ('--machines lab1 bash run.sh', "'bash run.sh'"),
    ('--machines lab1 bash run.sh --retries 2', "'bash run.sh'"),
    ('--timeout 2h --machines lab1 sudo nice run.sh', "'sudo nice run.sh'")])
def test_a_program_among_the_machines_of_a_batch_is_refused(run_cli, project, words, said):
    (project / 'run.sh').write_text('true\n')
    done = run_cli('execute_batch', *words.split())
    assert (done.returncode, done.stdout) == (2, '')
    program = said.strip("'").split()[0]
    assert done.stderr.splitlines() == [
        f'execute_batch: {program} is a program, not a machine. (If a machine has this name, write '
        '-- between the machines and the batch file.) A batch file has one command on each line. '
        f'To run one command: execute_remote --machine lab1 {said}']
    assert not (project / 'job_results').exists()


@pytest.mark.parametrize(('words', 'said'), [
    ('--machines lab1 a.sh b.sh', 'a.sh is a file like b.sh, not a machine. '),
    ('a.sh b.sh --machines lab1', "unexpected word 'b.sh'. ")])
def test_a_second_batch_file_is_refused(run_cli, project, words, said):
    for name in ('a.sh', 'b.sh'):
        (project / name).write_text('true\n')
    done = run_cli('execute_batch', *words.split())
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.splitlines()[0] == (
        f'execute_batch: {said}execute_batch takes one batch file: put all lines into one.')
    assert not (project / 'job_results').exists()


@pytest.mark.parametrize('words', [
    '--machines localhost jobs.yaml', '--machines localhost lab.yaml',
    '--machines localhost --rerun 3 20240101'])
def test_a_file_that_is_there_may_be_the_batch_file(project, words):
    for name in ('jobs.yaml', '20240101'):
        (project / name).write_text('echo 1\n')
    (project / 'lab.yaml').write_text('ip: lab\n')
    options = ssh_scheduler.read_options(ssh_scheduler.EXECUTE_BATCH_USAGE, words.split())
    assert options['<batch>'] == words.split()[-1]
    if 'lab.yaml' in words:
        with pytest.raises(ssh_scheduler.WordMissing, match='lab.yaml is a machine'):
            ssh_scheduler.refuse_machine(options)
    else:
        ssh_scheduler.refuse_machine(options)


def test_a_command_in_the_place_of_the_batch_file(run_cli, project):
    done = run_cli('execute_batch', 'echo "a b"', '--machines', 'lab1')
    assert (done.returncode, done.stderr) == (2, (
        'execute_batch: the batch file echo "a b" cannot be read: No such file or directory. '
        'A batch file has one command on each line. To run one command: '
        "execute_remote --machine MACHINE 'echo \"a b\"'\n"))


@pytest.mark.parametrize(('data', 'line'), [
    (b'\xff', 1), (b'a\nb\nc\xe9d\ne', 3), ('a\n\n\u00e9'.encode('latin-1'), 3),
    (b'\xef\xbb\xbfa\n\xc3', 2), ('a\nb'.encode('utf-16'), 1)])
def test_the_line_that_is_not_utf8_is_named(data, line):
    with pytest.raises(BatchFileError) as caught:
        text_of(data)
    assert str(caught.value) == f'-, line {line}: this is not UTF-8 text.'


@pytest.mark.parametrize(('data', 'line'), [(b'\0', 1), (b'a\nb\n\nc\0d\n', 4)])
def test_the_line_with_a_nul_is_named(data, line):
    with pytest.raises(BatchFileError) as caught:
        text_of(data)
    assert str(caught.value) == f'-, line {line}: this line has a NUL character.'


def test_a_byte_order_mark_is_no_part_of_the_first_command():
    assert commands(text_of(b'\xef\xbb\xbfecho a\n')) == [(1, 'echo a')]
    assert commands(text_of(b'\xef\xbb\xbf#!/bin/bash\necho a\n')) == [(2, 'echo a')]


# ---- Which lines are commands ----

@pytest.mark.parametrize(('text', 'expected'), [
    ('', []),
    ('\n\n', []),
    ('a', [(1, 'a')]),
    ('a\n', [(1, 'a')]),
    ('a\nb\n', [(1, 'a'), (2, 'b')]),
    # lines without a command are counted, too
    ('#!/bin/bash\n\n# note\n  # note\n \t \na\n\nb', [(6, 'a'), (8, 'b')]),
    ('a # no comment line\n', [(1, 'a # no comment line')]),
    # CRLF
    ('a\r\n\r\nb\r\n', [(1, 'a'), (3, 'b')]),
    ('a \\\r\n b\r\nc\r\n', [(1, 'a \\\n b'), (3, 'c')]),
    ('printf "a\rb"\n', [(1, 'printf "a\rb"')]),
    # bash does not end a line at other line ends of Unicode
    ('echo a\u2028b\x0bc\x0cd\x85e\n', [(1, 'echo a\u2028b\x0bc\x0cd\x85e')]),
    # blanks stay as they are
    ('  a  \n\tb\t', [(1, '  a  '), (2, '\tb\t')]),
    # a backslash at the end continues a line, and bash reads it
    ('a \\\nb\nc', [(1, 'a \\\nb'), (3, 'c')]),
    ('a \\\n\\\nb\n', [(1, 'a \\\n\\\nb')]),
    ('a \\\n# b\n\nc', [(1, 'a \\\n# b'), (4, 'c')]),
    ('a \\\n\nb\n', [(1, 'a \\\n'), (3, 'b')]),
    # two backslashes do not
    ('a \\\\\nb\n', [(1, 'a \\\\'), (2, 'b')]),
    ('a \\\\\\\nb\n', [(1, 'a \\\\\\\nb')]),
    # nor does a backslash before a blank
    ('a \\ \nb\n', [(1, 'a \\ '), (2, 'b')]),
    # nor one in a comment
    ('# a \\\nb\n', [(2, 'b')]),
    # no line follows to continue with
    ('a \\\n', [(1, 'a \\\n')]),
    ('a \\', [(1, 'a ')]),
])
def test_commands_are_numbered_by_their_first_line(text, expected):
    assert commands(text) == expected


@pytest.mark.parametrize('text', ['', '\n', '# only\n#!notes\n', '  \n\t'])
def test_a_file_without_a_command_is_an_error(text):
    assert complaint(text) == 'the batch file batch.sh has no command.'


LINES = st.text(st.characters(blacklist_characters='\0\r\n', blacklist_categories=('Cs',)))
COMMANDS = LINES.filter(lambda line: line.strip() and not line.lstrip().startswith('#')
                        and not line.startswith('\ufeff') and not line.endswith('\\')
                        and not re.match(r'\s*execute_remote(\s|$)', line))


@ANY
@given(lines=st.lists(COMMANDS, min_size=1), end=st.sampled_from(['', '\n', '\n\n']))
def test_commands_come_through_byte_for_byte(lines, end):
    data = ('\n'.join(lines) + end).encode()
    jobs = jobs_of(text_of(data), path='-')
    assert [(job.line, job.command) for job in jobs] == list(enumerate(lines, 1))
    assert [job.name for job in jobs] == [f'stdin.{number}' for number in range(1, len(jobs) + 1)]


@ANY
@given(lines=st.lists(st.sampled_from(
    ['', '#', '# c \\', 'a', 'b \\', 'c\\\\', ' d', '\\', "'", 'e # \\\\\\'])))
def test_any_lines_are_numbered_and_none_is_lost(lines):
    text = '\n'.join(lines)
    found = commands(text)
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers))
    covered = set()
    for number, command in found:
        span = command.split('\n')
        assert lines[number - 1].startswith(span[0]) and span[0] + '\\' != lines[number - 1][:-1]
        covered |= set(range(number, number + len(span)))
    for number, line in enumerate(lines, 1):
        assert number in covered or not line.strip() or line.lstrip().startswith('#') or (
            number == len(lines) and not line.strip('\\'))


@pytest.mark.parametrize('text', [
    'printf "%s|" a \\\nb', 'printf "%s|" a\\\nb', "printf '%s|' 'a\\\nb'",
    'printf "%s|" "a\\\nb" c'])
def test_a_continued_command_means_what_it_means_to_bash(text):
    """The command does what bash does with the same lines in a script."""
    ((_, command),) = commands(text + '\n')
    expected = subprocess.run(['bash'], input=text.encode(), capture_output=True, check=True)
    kept = subprocess.run(['bash', '-c', command], capture_output=True, check=True)
    assert kept.stdout == expected.stdout


# ---- Lines that bash refuses, and lines that do nothing ----

MULTI_LINE = """\
true
for seed in 1 2; do
  echo $seed
done
"""


def batch_of(run_cli, project, text, *words):
    """Run a batch of this text on localhost, and return its CompletedProcess."""
    (project / 'batch.sh').write_bytes(text.encode())
    return run_cli('execute_batch', 'batch.sh', *NO_GPU, '--machines', 'localhost', *words)


@pytest.mark.parametrize(('text', 'lines', 'words'), [
    (MULTI_LINE, 'lines 2 and 4', 'syntax error: unexpected end of file'),
    (MULTI_LINE.replace('\n', '\r\n'), 'lines 2 and 4', 'syntax error: unexpected end of file'),
    ('f() {\n  echo a\n}\nf\n', 'lines 1 and 3', 'syntax error: unexpected end of file'),
    ('true\n\nthen echo\n', 'line 3', 'syntax error near unexpected token `then\''),
    ("execute_remote --job-name x -- 'if true; then'\n", 'line 1', 'syntax error: unexpected end '),
    ('}; touch harm; {\n', 'line 1', 'syntax error near unexpected token `}\''),
    ('if\n' * 7, 'lines 1, 2, 3, 4 and 3 more', 'syntax error: unexpected end of file'),
])
def test_what_bash_refuses_is_named_before_anything_starts(run_cli, project, text, lines, words):
    done = batch_of(run_cli, project, text)
    assert (done.returncode, done.stdout) == (2, ''), done.stderr
    assert done.stderr.startswith(
        f'execute_batch: batch.sh, {lines}: bash refuses this command: {words}')
    assert 'Each line runs by itself: write an if, a loop or a function on one line' in done.stderr
    assert [path.name for path in project.iterdir()] == ['batch.sh']


HERE_DOCUMENT = (
    'a here-document (<<) has no text here, since its text and its end are on other lines. Each '
    "line runs by itself: put the text into a file and write COMMAND <FILE, or write printf "
    "'%s\\n' 'LINE 1' 'LINE 2' | COMMAND.")


@pytest.mark.parametrize(('text', 'complaints'), [
    ('echo a\necho "b\nc" d\n', [
        'lines 2 and 3: bash refuses this command: unexpected EOF while looking for matching `"\'. '
        'A quote is missing: write another " on the same line. Each line runs by itself.']),
    ("a 'b\na $(b\n", [
        "line 1: bash refuses this command: unexpected EOF while looking for matching `''. "
        "A quote is missing: write another ' on the same line. Each line runs by itself.",
        'line 2: bash refuses this command: unexpected EOF while looking for matching `)\'. '
        'A bracket is missing: write ) on the same line. Each line runs by itself.']),
    ('cat <<END\nhello\nEND\nx=$(cat <<-"E F")\n', [
        f'lines 1 and 4: {HERE_DOCUMENT}']),
    ("execute_remote 'if true; then cat <<END'\n", [f'line 1: {HERE_DOCUMENT}']),
    ('a (b)\n', [
        "line 1: bash refuses this command: syntax error near unexpected token `b'."])])
def test_what_bash_misses_is_named(run_cli, project, text, complaints):
    done = batch_of(run_cli, project, text)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.removeprefix('execute_batch: ').splitlines() == [
        f'batch.sh, {complaint_}' for complaint_ in complaints]


FINE = """\
for seed in 1 2; do echo $seed; done
if true; then \\
  echo continued; fi
cat <<<END || true; echo '<<END' $((1<<2)) # <<END
! ls !(batch.sh) "$(echo 'x)')" 2>&1 | cat |& cat &>>log &
[[ a == @(a|b) ]]; case a in a) ;; esac; (echo) ; { echo; }
set +n; echo $((1 + 1)) `date` ${HOME:-x}  # if
"""


def test_what_bash_can_read_is_not_refused(run_cli, project):
    done = batch_of(run_cli, project, FINE, '--dry-run')
    assert (done.returncode, done.stderr, done.stdout.count('would ')) == (0, '', 6)
    assert [path.name for path in project.iterdir()] == ['batch.sh']


@pytest.mark.parametrize('version', [None, 3])
def test_where_no_bash_can_tell_nothing_is_refused(tmp_path, monkeypatch, version):
    """macOS has bash 3.2, which knows only half of the syntax; other systems may have no bash."""
    if version:
        fake = f'#!/bin/sh\nshift 2; shift; script="BASH_VERSINFO=({version}) {{}}"\n'
        (tmp_path / 'bash').write_text(fake + 'echo "$1" | grep -q "BASH_VERSINFO.0. >= 4"\n')
        (tmp_path / 'bash').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/bin' if version else str(tmp_path))
    ssh_scheduler.check_syntax('batch.sh', jobs_of('if\necho "a\n'))


def test_plain_lines_are_not_given_to_bash(monkeypatch):
    monkeypatch.setattr(ssh_scheduler, 'Processes', None)
    ssh_scheduler.check_syntax('batch.sh', jobs_of('python3 train.py --seed 3\n'))


PIECES = ['a', ' ', '"', "'", '$', '$b', '|', '&', '&&', ';', '>', '<', '2>&1', '(', ')', '{', '}',
          '`', '#', '!', '\\', '=', '[', ']', '*', '~', ' if ', ' then ', ' do ', ' done ', 'time',
          'é', '\t', '-', '0', '$(', '"a $b"', "'a'"]


@settings(ANY, max_examples=1000)      # some 200 of them are plain
@given(text=st.lists(st.sampled_from(PIECES), max_size=10).map(''.join))
def test_a_plain_line_is_one_that_bash_can_read(text):
    if ssh_scheduler.PLAIN_LINE.fullmatch(text):
        checked = subprocess.run(['bash', '-n'], input=text.encode(), capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, b'')


@pytest.mark.parametrize('text', [
    'python3 train.py --lr 0.1 --seed 3', 'cd x && python3 -u t.py "$A" > log 2>&1 | tee a; b &',
    "A='x y' b --time 3 *.py"])
def test_usual_lines_are_plain(text):
    assert ssh_scheduler.PLAIN_LINE.fullmatch(text)


@pytest.mark.parametrize('command', ['true', './train --seed=3 >out', 'python3 a.py | tee "b c"'])
def test_a_usual_line_is_not_split_to_know_that_it_is_no_setting(monkeypatch, command):
    """To split all 50,000 lines of a large batch would take seconds."""
    monkeypatch.setattr(shlex, 'shlex', None)
    assert ssh_scheduler.setting_of(command) is None


WORDS = ['export', 'cd', 'ml', 'load', 'conda', 'activate', '.', 'A=1', 'true', './x', "'", '"',
         ' ', '\t', '\n', '\\', '\\\n', '\v', '\xa0', ';', '&&', '|', '(', '#', '>', '$A', '/', 'é']


@ANY
@given(command=st.lists(st.sampled_from(WORDS), max_size=8).map(''.join))
def test_the_first_word_alone_never_decides_otherwise_than_all_words(command):
    quick = ssh_scheduler.setting_of(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssh_scheduler, 'SETTING_WORDS', Everything())
        assert ssh_scheduler.setting_of(command) == quick


class Everything:
    """A set that contains everything."""

    def __contains__(self, _):
        return True


@pytest.mark.parametrize(('command', 'begin', 'setup'), [
    ('cd data', 'cd', False), ('cd', 'cd', False), ('  cd "my data"  # go there', 'cd', False),
    ('export A=1 B="2 3"', 'export', True), ('A=1', 'NAME=value', False),
    ('export A=1 && \\\n export B=2', 'export', True), ('cd x; . env.sh', 'cd', False),
    ('source ~/.bashrc', 'source', True), ('. env/bin/activate', '.', True),
    ('set -eu', 'set', False), ('shopt -s extglob', 'shopt', False), ('umask 077', 'umask', False),
    ('conda activate ml', 'conda activate', True), ('module load cuda/12', 'module load', True),
    ('ml cuda', 'ml', True), ('ulimit -v 4', 'ulimit', False), ('alias a=b', 'alias', False),
    ('eval "$(conda shell.bash hook)"', 'eval', True), ('unset A', 'unset', True),
])
def test_a_line_that_changes_only_its_own_shell_is_warned_of(command, begin, setup):
    warnings = []
    ssh_scheduler.warn_of_settings('b.sh', jobs_of(f'true\n{command}\n'), warnings.append)
    also = ', or put it into setup: of the machine file' if setup else ''
    assert warnings == [
        f'b.sh, line 2: {begin} alone changes nothing for the other lines, since each line runs by '
        f'itself. Write {begin} … && command on one line{also}']


@pytest.mark.parametrize('command', ['wait', ' wait 3', 'wait $!'])
def test_a_line_that_only_waits_is_warned_of(command):
    warnings = []
    ssh_scheduler.warn_of_settings('b.sh', jobs_of(f'true\n{command}\nwait\n'), warnings.append)
    assert warnings == [
        'b.sh, lines 2 and 3: wait does not wait for other lines, since each line runs by itself. '
        'Write the lines that run later into a second batch file: execute_batch part1.sh … && '
        'execute_batch part2.sh …']


@pytest.mark.parametrize('command', [
    'sleep 1 & wait', 'wait && echo x', 'cd x && python t.py',
    'A=1 python t.py', 'export A=1; python t.py', 'cd x || exit 1', 'set',
    'export', 'module list', 'cdx', 'echo cd x', "echo 'cd x'", '(cd x)', 'cd x | cat',
    'conda list', 'source env.sh > log', 'A=$(make)', './set', 'for', 'pip install x', 'time cd x'])
def test_a_line_that_does_more_is_not(command):
    ssh_scheduler.warn_of_settings('b.sh', jobs_of(command), pytest.fail)


def test_one_warning_for_each_kind_and_none_where_nothing_is_started(run_cli, project):
    text = 'cd x\nexport A=1\ncd y\necho\n' + 'execute_remote "cd z"\n' * 4
    done = batch_of(run_cli, project, text, '--dry-run')
    assert [line.split(' alone')[0] for line in done.stderr.splitlines()] == [
        'WARNING: batch.sh, lines 1, 3, 5, 6 and 2 more: cd', 'WARNING: batch.sh, line 2: export']
    for word in ('--status', '--cancel'):
        assert batch_of(run_cli, project, f'{text}if\n', word).stderr == ''


# ---- What jobs are called ----

@pytest.mark.parametrize(('path', 'stem'), [
    ('batch.sh', 'batch.sh'),
    ('example/batch_script.sh', 'example_batch_script.sh'),     # the spec's name
    ('./a//b/./c.sh', 'a_b_c.sh'),
    ('/srv/a/b.sh', 'srv_a_b.sh'),
    ('../b.sh', 'b.sh'),
    ('../../x/../b.sh', 'b.sh'),
    ('.hidden', 'hidden'),
    ('a/.hidden', 'a_.hidden'),
    ('-x.sh', 'x.sh'),
    ('a b$(c);d\n.sh', 'a_b__c__d_.sh'),
    ('é.sh', '_.sh'),
    ('...', 'batch'),
    ('-', 'stdin'),
    ('a' * 300 + '.sh', 'a' * 147 + '.sh'),
])
def test_jobs_are_called_like_their_batch_file(path, stem):
    assert ssh_scheduler.name_of_batch(path) == stem
    ssh_scheduler.check_job_name(f'{stem}.1', 'here')


@ANY
@given(path=st.text(st.characters(blacklist_characters='\0', blacklist_categories=())),
       line=st.integers(1, 10**9))
def test_every_path_gives_a_safe_name(path, line):
    name = f'{ssh_scheduler.name_of_batch(path)}.{line}'
    ssh_scheduler.check_job_name(name, 'here')
    assert '/' not in name and name[0] not in '.-' and len(name.encode()) <= 200


@pytest.mark.parametrize('name', ['a', 'A.b_c-d+e=f@g%h', '0', '_', 'a' * 180, 'a..b'])
def test_a_good_job_name_is_taken(name):
    ssh_scheduler.check_job_name(name, 'here')


@pytest.mark.parametrize('name', [
    '.', '..', '.a', '../a', 'a/b', '/a', '-a', '', 'a b', 'a\n', 'a\nb', 'é', '٣', 'a\x1b', "a'b",
    'a*', '~', 'a' * 181])
def test_a_bad_job_name_is_refused(name):
    with pytest.raises(BatchFileError) as caught:
        ssh_scheduler.check_job_name(name, 'batch.sh, line 3')
    assert str(caught.value).startswith(f'batch.sh, line 3: the job name {name!r} must have ')


def test_the_line_of_a_bad_job_name_is_named():
    assert complaint('a\nexecute_remote --job-name ../x true\n').startswith(
        "batch.sh, line 2: the job name '../x' must")


@pytest.mark.parametrize('names, line', [(('a', 'a.out'), 2), (('a.err', 'b', 'a'), 1)])
def test_a_job_whose_results_would_lie_in_another_s_place(run_cli, project, names, line):
    (project / 'batch.sh').write_text(''.join(
        f"execute_remote --job-name {name} 'echo {name}'\n" for name in names))
    done = run_cli('execute_batch', 'batch.sh', *NO_GPU, '--machines', 'localhost')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == (
        f'execute_batch: batch.sh: the results of the job {names[line - 1]}, line {line}, would '
        f'lie where a, line {names.index("a") + 1}, has a stream; give one of them another '
        '--job-name.\n')
    assert [path.name for path in project.iterdir()] == ['batch.sh']


def test_two_jobs_with_one_name_name_both_lines():
    assert complaint('a\nexecute_remote --job-name x b\n\nexecute_remote --job-name=x c\n') == (
        'batch.sh: the lines 2 and 4 have the same job name x; '
        'give one of them another --job-name.')
    assert 'the lines 1 and 2 have the same job name batch.sh.2' in complaint(
        'execute_remote --job-name batch.sh.2 a\nb\n')


# ---- Partial commands ----

SPEC_LINES = """\
execute_remote --copy-forwards example1 test.py --copy-backwards example1 --job-name example1 \
'python test.py example1'
execute_remote --copy-forwards example2 test.py --copy-backwards example2 --job-name example2 \
'python test.py example2'
"""


def test_the_partial_commands_of_the_spec():
    one, two = jobs_of(SPEC_LINES)
    assert one == ssh_scheduler.Job(
        'example1', 'python test.py example1', 1, Allocation(),
        Forwards(('example1', 'test.py'), (), ()), ('example1',),
        '--copy-forwards=["example1", "test.py"] --copy-backwards=["example1"]')
    assert two == ssh_scheduler.Job(
        'example2', 'python test.py example2', 2, Allocation(),
        Forwards(('example2', 'test.py'), (), ()), ('example2',),
        '--copy-forwards=["example2", "test.py"] --copy-backwards=["example2"]')


def test_a_partial_command_changes_only_what_it_says():
    batch = ['--num-cpus=3', '--memory-required=7', '--no-gpu-required', '--copy-forwards', 'a',
             'b', '--link-forwards', 'data', '--exclude', '*.o', '--copy-backwards', 'out']
    lines = ['true', "execute_remote 'true'", 'execute_remote --num-cpus=2 true',
             'execute_remote --copy-forwards c --copy-backwards -- true',
             'execute_remote --exclude x --link-forwards -- true',
             'execute_remote --copy-backwards . -- true',
             'execute_remote --reserve --gpu-memory-required 5 true']
    jobs = jobs_of('\n'.join(lines), *batch)
    assert {job.command for job in jobs} == {'true'}
    plain = jobs[0]
    assert plain.allocation == Allocation(3.0, 7, False, 0, 1000, 0.75, True)
    assert plain.forwards == Forwards(('a', 'b'), ('data',), ('*.o',))
    assert plain.backwards == ('out',)
    changes = [
        {}, {'allocation': plain.allocation._replace(cores=2.0)},
        {'forwards': plain.forwards._replace(copy=('c',)), 'backwards': ()},
        {'forwards': plain.forwards._replace(link=(), exclude=('x',))},
        {'backwards': ('.',)},
        {'allocation': plain.allocation._replace(reserve=True, gpu_memory_mb=5)}]
    for number, (job, change) in enumerate(zip(jobs[1:], changes), 2):
        assert job == plain._replace(name=f'batch.sh.{number}', line=number, own=job.own, **change)
    assert [job.own for job in jobs] == [
        '', '', '', '--copy-forwards=["c"] --copy-backwards=[]',
        '--link-forwards=[] --exclude=["x"]', '--copy-backwards=["."]', '--reserve=true']


def test_a_partial_command_has_the_flags_of_the_batch():
    (job,) = jobs_of('execute_remote true', '--reserve', '--no-reserve-gpu')
    assert job.allocation == Allocation(reserve=True, reserve_gpu=False)


def test_a_machine_in_a_partial_command_is_ignored_with_a_warning():
    warnings = []
    (job,) = jobs_of("\nexecute_remote --machine m.yaml 'echo a'", warn=warnings.append)
    assert job.command == 'echo a'
    assert warnings == [
        'batch.sh, line 2: --machine is ignored: machines are allocated automatically']


@pytest.mark.parametrize('machines', ['--machines m', '--machines m n --', '--machine=m',
                                      '--machine m --machines n o --'])
def test_either_form_and_any_number_of_machines_is_ignored(machines):
    warnings = []
    (job,) = jobs_of(f"execute_remote {machines} 'echo a'", warn=warnings.append)
    assert job.command == 'echo a'
    assert warnings == [
        'batch.sh, line 1: --machine is ignored: machines are allocated automatically']


def test_sizes_in_a_line_may_have_units():
    (job,) = jobs_of('execute_remote --memory-required=8G --gpu-memory-required 1.5G true',
                     '--memory-required', '500M')
    assert (job.allocation.memory_mb, job.allocation.gpu_memory_mb) == (8192, 1536)


@pytest.mark.parametrize(('line', 'command'), [
    ('execute_remote true', 'true'),
    ('  execute_remote\ttrue', 'true'),
    ("execute_remote 'a  b | c > \"d\" $e \\\\'", 'a  b | c > "d" $e \\\\'),
    ("execute_remote \\\n --job-name x \\\n 'a b'", 'a b'),
    ("execute_remote 'a \\\nb'", 'a \\\nb'),
    ('execute_remote "a \\\nb \\"c\\""', 'a b "c"'),
    ('execute_remote a\\\nb', 'ab'),
    ("execute_remote \"it's \\\n it's\"", "it's  it's"),
    ("execute_remote 'é \u3000'", 'é \u3000'),
    ('execute_remote -- --help', '--help'),
    ('execute_remote_not a', 'execute_remote_not a'),
    ('./execute_remote a', './execute_remote a'),
    ('echo execute_remote a', 'echo execute_remote a'),
])
def test_the_command_of_a_partial_command(line, command):
    (job,) = jobs_of(line)
    assert job.command == command


@ANY
@given(command=LINES)
def test_a_quoted_command_comes_through_byte_for_byte(command):
    assume('\\\n' not in command)
    (job,) = jobs_of(f'execute_remote -- {shlex.quote(command)}\n')
    assert job.command == command


@settings(ANY, max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@given(text=st.text(st.sampled_from('\'"\\\n ab'), max_size=12))
def test_words_of_a_continued_line_are_bash_s(text):
    """The program reads the same words as bash, where bash can read them at all."""
    done = subprocess.run(['bash', '-c', f'printf "%s\\0" {text}'], capture_output=True)
    in_error = done.returncode != 0 or done.stderr
    unquoted = re.sub(r"""(?s)'[^']*'|"(?:\\.|[^"\\])*"|\\.""", '', text)
    assume(not in_error and '\n' not in unquoted and not text.endswith('\\'))
    words = shlex.split(ssh_scheduler.without_continuations(text))
    assert ''.join(f'{word}\0' for word in words or ['']) == done.stdout.decode()


@pytest.mark.parametrize(('line', 'expected'), [
    ('execute_remote', '<command> is missing.'),
    ('execute_remote --num-gpus=2 python test.py --lr 3', 'unknown option --lr. Put the command in '
     "quotes. Try: execute_remote --num-gpus=2 'python test.py --lr 3'"),
    ('execute_remote python test.py', "unexpected word 'test.py'. Put the command in quotes. Try: "
     "execute_remote 'python test.py'"),
    ("execute_remote --num-gpuz 1 'a b'", 'unknown option --num-gpuz (did you mean --num-gpus?).'),
    ("execute_remote --detach 'a b'", '--detach has no meaning in a batch file.'),
    ("execute_remote 'a", 'a quote is missing, or a word behind the last backslash.'),
    ('execute_remote --job-nam x y', 'unknown option --job-nam (did you mean --job-name?).'),
    ('execute_remote --num-cpus=0 y', "--num-cpus must be a number above 0, not '0'."),
    ('execute_remote --memory-required=8X y', "--memory-required must be a size of at least 0 MB, "
     "not '8X'. Examples: 2000 (MB), 500M, 8G."),
    ('execute_remote --timeout=2h y', '--timeout has no meaning in a batch file. To limit the time '
     'of this job, write its command as: timeout 10m COMMAND.'),
    ('execute_remote --copy-forwards ../x -- y', '--copy-forwards ../x: this lies outside '),
])
def test_a_wrong_partial_command_is_named(line, expected):
    said = complaint(f'true\n{line}\n')
    assert said.startswith(f'batch.sh, line 2: execute_remote: {expected}')
    assert line.startswith('execute_remote --copy') or said.endswith(expected)


def test_all_wrong_lines_are_named_up_to_five():
    assert complaint('execute_remote\ntrue\nexecute_remote --detach a\n'
                     'execute_remote --job-name a b\nexecute_remote --job-name a c') == (
        'batch.sh, line 1: execute_remote: <command> is missing.\n'
        'batch.sh, line 3: execute_remote: --detach has no meaning in a batch file.\n'
        'batch.sh: the lines 4 and 5 have the same job name a; give one of them another '
        '--job-name.')
    for count, end in ((5, 'line 5: execute_remote: <command> is missing.'),
                       (6, 'and 1 more line.'), (9, 'and 4 more lines.')):
        assert complaint('execute_remote\n' * count).splitlines()[-1].endswith(end)


def test_lines_that_are_wrong_in_any_way_are_named_at_once(run_cli, project):
    text = 'true\nif true\nexecute_remote --zebra x\necho "a\nexecute_remote "b\n'
    for words in ([], ['--status']):
        done = batch_of(run_cli, project, text, *words)
        assert (done.returncode, done.stdout) == (2, '')
        said = done.stderr.removeprefix('execute_batch: ').splitlines()
        assert [line[:16] for line in said] == [f'batch.sh, line {n}' for n in (2, 3, 4, 5)]


def test_the_lines_whose_files_are_not_there_are_named(run_cli, project):
    text = 'true\n' + 'execute_remote --copy-forwards none -- true\n' * 2
    text += 'execute_remote --copy-forwards --link-forwards other -- true\n'
    done = batch_of(run_cli, project, text)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, '', 'execute_batch: batch.sh, lines 2 and 3: --copy-forwards none: there is no such '
        'file or folder.\nbatch.sh, line 4: --link-forwards other: there is no such file or '
        'folder.\n')
    done = batch_of(run_cli, project, text, '--copy-forwards', 'some')
    assert done.stderr == 'execute_batch: --copy-forwards some: there is no such file or folder.\n'


def test_help_in_a_partial_command_does_not_end_the_program(capsys):
    """--help in a batch file is an error, and prints no help."""
    complaint('execute_remote --help\n')
    assert capsys.readouterr().out == ''


# ---- Paths ----

@pytest.mark.parametrize(('path', 'inside'), [
    ('a', 'a'), ('./a', 'a'), ('a/', 'a'), ('a//b/../c', 'a/c'), ('.', '.'), ('./', '.'),
    ('..a', '..a'), ('a/..', '.'), ('-x', '-x')])
def test_paths_are_normal_and_inside(path, inside):
    assert ssh_scheduler.inside_paths((path,), '--copy-forwards') == (inside,)


def test_a_path_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ('a', './a', str(tmp_path / 'b'), 'b', str(tmp_path))
    assert ssh_scheduler.inside_paths(paths, '--copy-forwards') == ('a', 'b', '.')


@pytest.mark.parametrize('path', ['..', '../a', 'a/../../b', '/', '/etc/passwd'])
def test_paths_outside_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ssh_scheduler.FilesError) as caught:
        ssh_scheduler.inside_paths((path,), '--copy-backwards')
    assert str(caught.value).startswith(f'--copy-backwards {path}: this lies outside the current ')
