"""Command lines -> options: docopt parses the usage texts, so the tests use these texts."""
import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_golden
from hypothesis import given, settings
from hypothesis import strategies as st

import combine_folders
import results_table
import ssh_scheduler

ANY = settings(deadline=None, derandomize=True, max_examples=60)

ROOT = Path(__file__).resolve().parent.parent
USAGES = {
    'execute_batch': ssh_scheduler.EXECUTE_BATCH_USAGE,
    'execute_remote': ssh_scheduler.EXECUTE_REMOTE_USAGE,
}
OTHER_USAGES = {
    'execute_to': ssh_scheduler.EXECUTE_TO_USAGE,
    'query_machines': ssh_scheduler.QUERY_MACHINES_USAGE,
}
HELP = {**USAGES, **OTHER_USAGES, 'ssh_scheduler': ssh_scheduler.OVERVIEW,
        'combine_folders': combine_folders.USAGE, 'results_table': results_table.USAGE}
POSITIONALS = {'execute_batch': '<batch>', 'execute_remote': '<command>', 'execute_to': '<command>'}
LISTS = ('--copy-forwards', '--link-forwards', '--exclude', '--copy-backwards')
# Words that a shell can pass: no NUL; bytes that are not UTF-8 arrive as lone surrogates.
WORDS = st.text(st.characters(blacklist_characters='\0', blacklist_categories=()), max_size=12)
PATHS = WORDS.filter(lambda word: word == '-' or word and not word.startswith('-'))


def split(line):
    return shlex.split(line.replace('\\\n', ''), comments=True)


def read(line):
    """Return the Options of a command line, split as a shell does."""
    command, *words = line if isinstance(line, list) else split(line)
    return ssh_scheduler.read_options({**USAGES, **OTHER_USAGES}[command], words)


def said(line):
    """Return the options that a command line gives, and its positional."""
    options, command = read(line), (line if isinstance(line, list) else line.split())[0]
    positional = POSITIONALS[command]
    return {positional: options[positional], **{name: options[name] for name in options.given}}


def complaint(*words, command='execute_batch'):
    with pytest.raises(ssh_scheduler.UsageError) as caught:
        ssh_scheduler.read_options(USAGES[command], list(words))
    return str(caught.value)


def call_main(*argv):
    """Run main() in this process; return (stdout, stderr, status)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        with pytest.raises(SystemExit) as caught:
            ssh_scheduler.main(list(argv))
    return stdout.getvalue(), stderr.getvalue(), caught.value.code


# ---- Tables: command line -> its options ----

SPEC = [
    ('execute_batch example/batch_script.sh --machines example/machine.yaml example/machine2.yaml',
     {'<batch>': 'example/batch_script.sh',
      '--machines': ('example/machine.yaml', 'example/machine2.yaml')}),
    ('execute_batch example/batch_script.sh --machines example/machine.yaml --no-gpu-required',
     {'<batch>': 'example/batch_script.sh', '--machines': ('example/machine.yaml',),
      '--no-gpu-required': True}),
    ("""execute_batch example/batch_script.sh --machines example/machine.yaml \\
    --memory-required=10000 --gpu-memory-required=3000 --no-reserve-gpu""",
     {'<batch>': 'example/batch_script.sh', '--machines': ('example/machine.yaml',),
      '--memory-required': '10000', '--gpu-memory-required': '3000', '--no-reserve-gpu': True}),
    ("""execute_batch example/batch_script.sh --machines example/machine.yaml \\
    --num-cpus=8 --gpu-utilization=0.5""",
     {'<batch>': 'example/batch_script.sh', '--machines': ('example/machine.yaml',),
      '--num-cpus': '8', '--gpu-utilization': '0.5'}),
    ("""execute_batch example/batch_script.sh --machines example/machine.yaml \\
    --reserve""",
     {'<batch>': 'example/batch_script.sh', '--machines': ('example/machine.yaml',),
      '--reserve': True}),
    ('execute_batch example/batch_script.sh --machines my_machine.yaml --memory-required=2000',
     {'<batch>': 'example/batch_script.sh', '--machines': ('my_machine.yaml',),
      '--memory-required': '2000'}),
    ('execute_remote --copy-forwards example1 test.py --copy-backwards example1'
     " --job-name example1 'python test.py example1'",
     {'<command>': 'python test.py example1', '--copy-forwards': ('example1', 'test.py'),
      '--copy-backwards': ('example1',), '--job-name': 'example1'}),
    ('execute_remote --copy-forwards example2 test.py --copy-backwards example2'
     " --job-name example2 'python test.py example2'",
     {'<command>': 'python test.py example2', '--copy-forwards': ('example2', 'test.py'),
      '--copy-backwards': ('example2',), '--job-name': 'example2'}),
]

OTHERS = [
    ('execute_batch b', {'<batch>': 'b'}),
    ('execute_batch --check --machines a b',
     {'<batch>': None, '--check': True, '--machines': ('a', 'b')}),
    ('execute_batch --machines a b --check --json',
     {'<batch>': None, '--check': True, '--json': True, '--machines': ('a', 'b')}),
    ('execute_to --init ben@gpu7', {'<command>': None, '--init': 'ben@gpu7'}),
    ('execute_batch -', {'<batch>': '-'}),
    ('execute_batch - --machines a', {'<batch>': '-', '--machines': ('a',)}),
    # a list has the words up to the next option
    ('execute_batch b --machines a b --num-cpus 2',
     {'<batch>': 'b', '--machines': ('a', 'b'), '--num-cpus': '2'}),
    ('execute_batch b --machines a --reserve --machines b c',
     {'<batch>': 'b', '--machines': ('a', 'b', 'c'), '--reserve': True}),
    ('execute_batch b --machines=a b', {'<batch>': 'b', '--machines': ('a', 'b')}),
    ('execute_batch b --copy-forwards - --machines a',
     {'<batch>': 'b', '--copy-forwards': ('-',), '--machines': ('a',)}),
    # a list without words is empty, which differs from no list
    ('execute_batch b --machines a --copy-forwards',
     {'<batch>': 'b', '--machines': ('a',), '--copy-forwards': ()}),
    ('execute_batch --copy-forwards --copy-backwards --machines a -- b',
     {'<batch>': 'b', '--copy-forwards': (), '--copy-backwards': (), '--machines': ('a',)}),
    ('execute_batch b --exclude= --machines a',
     {'<batch>': 'b', '--exclude': (), '--machines': ('a',)}),
    # -- ends a list
    ('execute_batch --machines a b -- c', {'<batch>': 'c', '--machines': ('a', 'b')}),
    ('execute_batch --machines -- c', {'<batch>': 'c', '--machines': ()}),
    ('execute_batch --machines a -- --dry-run', {'<batch>': '--dry-run', '--machines': ('a',)}),
    ('execute_batch --machines a -- --', {'<batch>': '--', '--machines': ('a',)}),
    ('execute_batch --machines a -- -h', {'<batch>': '-h', '--machines': ('a',)}),
    # the positional is taken back from the last list
    ('execute_batch --machines a b c', {'<batch>': 'c', '--machines': ('a', 'b')}),
    ('execute_batch --machines a --exclude x b',
     {'<batch>': 'b', '--machines': ('a',), '--exclude': ('x',)}),
    ('execute_batch --exclude x --machines a b --dry-run',
     {'<batch>': 'b', '--exclude': ('x',), '--machines': ('a',), '--dry-run': True}),
    ("execute_remote --copy-forwards a b 'echo c'",
     {'<command>': 'echo c', '--copy-forwards': ('a', 'b')}),
    # --option value is --option=value, whatever the value looks like
    ('execute_batch b --num-cpus 0.5', {'<batch>': 'b', '--num-cpus': '0.5'}),
    ('execute_batch b --memory-required -5', {'<batch>': 'b', '--memory-required': '-5'}),
    ('execute_batch b --joblog --x', {'<batch>': 'b', '--joblog': '--x'}),
    ('execute_remote --machine=a=b x', {'<command>': 'x', '--machine': 'a=b'}),
    ('execute_batch --num-cpus 3 b', {'<batch>': 'b', '--num-cpus': '3'}),
    # commands that run one thing
    ("execute_remote --machine lab1 --stdin -- 'cat'",
     {'<command>': 'cat', '--machine': 'lab1', '--stdin': True}),
    ('execute_remote --attach name', {'<command>': None, '--attach': 'name'}),
    ('execute_remote --cancel=name --verbose',
     {'<command>': None, '--cancel': 'name', '--verbose': True}),
    ("execute_remote --machine a --detach --job-name n --copy-forwards -- 'x y'",
     {'<command>': 'x y', '--machine': 'a', '--detach': True, '--job-name': 'n',
      '--copy-forwards': ()}),
    ("execute_to --machines a b @c -- 'uname -r'",
     {'<command>': 'uname -r', '--machines': ('a', 'b', '@c')}),
    ("execute_to --machines a --gather --fanout=3 --timeout 5 'x'",
     {'<command>': 'x', '--machines': ('a',), '--gather': True, '--fanout': '3',
      '--timeout': '5'}),
    ("execute_to --copy-backwards made --machines a --diff --job-name n -- 'x'",
     {'<command>': 'x', '--copy-backwards': ('made',), '--machines': ('a',), '--diff': True,
      '--job-name': 'n'}),
    ("execute_batch b --machines a --joblog log --on-finish 'echo x' --on-failure='mail -s x y'",
     {'<batch>': 'b', '--machines': ('a',), '--joblog': 'log', '--on-finish': 'echo x',
      '--on-failure': 'mail -s x y'}),
    # flags take no word
    ('execute_batch --reserve b --dry-run --verbose',
     {'<batch>': 'b', '--reserve': True, '--dry-run': True, '--verbose': True}),
]


@pytest.mark.parametrize(('line', 'expected'), SPEC + OTHERS)
def test_a_command_line_says(line, expected):
    assert said(line) == expected


@pytest.mark.parametrize(('line', 'expected'), SPEC + OTHERS)
def test_an_option_takes_its_value_with_or_without_equals(line, expected):
    """Each --option=word of the tables means the same as --option word."""
    words = split(line)
    end = words.index('--') if '--' in words else len(words)
    apart = [part for word in words[:end]
             for part in (word.split('=', 1) if re.match(r'--[a-z-]+=.', word) else [word])]
    assert said([*apart, *words[end:]]) == expected


def test_the_defaults_stand_in_the_usage_text():
    for command in USAGES:
        options = read([command, 'x'])
        assert options.given == frozenset()
        assert {name: options[name] for name in LISTS} == dict.fromkeys(LISTS)
        assert ssh_scheduler.read_allocation(options) == ssh_scheduler.Allocation(
            cores=1, memory_mb=2000, reserve=False, gpus=1, gpu_memory_mb=1000,
            gpu_utilization=0.75, reserve_gpu=True)
        assert ssh_scheduler.read_forwards(options) == ssh_scheduler.Forwards(('.',), (), ())
        assert ssh_scheduler.read_backwards(options) is None
    assert read('execute_batch x')['--machines'] is None


def test_every_option_of_a_usage_text_is_known():
    """docopt and spell_out find the same options in a text."""
    for command, usage in USAGES.items():
        names = set(re.findall(r'(?<![\w-])--[a-z][a-z-]+', usage))
        assert names == {name for name in ssh_scheduler.option_kinds(usage) if name[:2] == '--'}
        assert names <= set(read([command, 'x']))


# ---- README and docs/ ----

ALONE = {'--init'}      # a command with it has no --machines


def shown_lines():
    """Return the command lines in the code blocks of the pages, continued lines joined."""
    pages = [path for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
             if path.exists()]
    text = '\n'.join(page.read_text(encoding='utf-8') for page in pages)
    blocks = re.findall(r'(?ms)^ *```[^\n]*\n(.*?)^ *```', text)
    lines = [line.strip() for block in blocks
             for line in block.replace('\\\n', ' ').splitlines()]
    lines = [line[2:] if line.startswith('$ ') else line for line in lines]
    known = {**USAGES, **OTHER_USAGES}
    return [line for line in lines if line.split()[:1] and line.split()[0] in known
            and not {*line.split()} & ALONE]


def first_command(line):
    """Return the words of a line up to a pipe, a redirection or a semicolon."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars='|>;')
    lexer.whitespace_split, lexer.commenters = True, ''
    return [*itertools.takewhile(lambda word: not re.fullmatch('[|>;]+', word), lexer)]


def test_the_pages_show_command_lines():
    assert len(shown_lines()) > 40


@pytest.mark.parametrize('line', dict.fromkeys(shown_lines()))
def test_a_command_line_of_the_pages_is_understood(line):
    try:
        options = read(first_command(line))
    except ssh_scheduler.HelpAsked:     # --help and --version
        return
    command = line.split()[0]
    if command == 'execute_remote':     # in a batch file, the line names no machine
        assert options['<command>'] or options['--attach'] or options['--shell']
    else:
        assert options['--machines'] or options.given & {'--status', '--cancel', '--what',
                                                           '--reproduce'}
        assert command not in POSITIONALS or options[POSITIONALS[command]] or options['--check']
    if command != 'execute_to':
        ssh_scheduler.read_allocation(options)


# ---- Errors name their cause ----

@pytest.mark.parametrize(('words', 'expected'), [
    (['b', '--machnes', 'a'], 'unknown option --machnes (did you mean --machines?).'),
    (['b', '--nogpu-required'],
     'unknown option --nogpu-required (did you mean --no-gpu-required?).'),
    (['b', '--num-cpu=3'], 'unknown option --num-cpu (did you mean --num-cpus?).'),
    (['b', '--memory_required=3'],
     'unknown option --memory_required (did you mean --memory-required?).'),
    (['b', '--zebra'], 'unknown option --zebra.'),
    (['b', '-x'], 'unknown option -x.'),
    (['b', '--machines', 'a', '-x'], 'unknown option -x.'),
    ([], '<batch> is missing.'),
    (['--reserve'], '<batch> is missing.'),
    (['--machines'], '<batch> is missing.'),
    (['--machines='], '<batch> is missing.'),
    (['--machines', 'a', '--copy-forwards'], '<batch> is missing.'),
    (['--machines', 'a', '--'], None),
    (['a', 'b'], "unexpected word 'b'. To name machines: --machines b."),
    (['a', '--reserve', 'b', 'c d'], "unexpected word 'b'. To name machines: --machines b 'c d'."),
    (['a', '--status', '3'],
     "unexpected word '3'. For one job: --what 3, or --follow 3 for its output."),
    (['a', '--failed', '.3', '--status'],
     "unexpected word '.3'. For one job: --what .3, or --follow .3 for its output."),
    (['a', '--rerun-failed', '3'], "unexpected word '3'. For one job: --rerun 3."),
    (['a', '--check'], "unexpected word 'a'. --check takes no batch file."),
    (['--earlier', 'show', 'a'], "unexpected word 'a'. --earlier takes no batch file."),
    (['bash', 'a'], "unexpected word 'a'. <batch> is a file with one command on each line. For one "
     'command: execute_remote.'),
    (['--machines', 'a', '--reserve', 'b', 'c'], "unexpected word 'c'."),
    (['--machines', 'a', '--', 'b', 'c'], "unexpected word 'c'."),
    (['b', '--num-cpus'], '--num-cpus needs a number of cores.'),
    (['b', '--report', '--rerun', '2'], '--report needs a file before --rerun.'),
    (['b', '--earlier', '--machines', 'a'], '--earlier needs an action before --machines.'),
    (['--timeout', '--', 'b'], '--timeout needs a time before --.'),
    (['--', 'b', '--machines', 'a'], "unexpected word '--machines'. Words behind -- are no "
     'options: write --machines before the --.'),
    (['b', '--reserve=yes'], '--reserve takes no value.'),
    (['b', '--num-cpus=1', '--num-cpus', '2'], '--num-cpus is given twice.'),
    (['b', '--reserve', '--dry-run', '--reserve'], '--reserve is given twice.'),
])
def test_a_wrong_command_line_is_named(words, expected):
    if expected is None:                # the word comes from the list before the --
        assert ssh_scheduler.read_options(USAGES['execute_batch'], words)['<batch>'] == 'a'
    else:
        assert complaint(*words) == expected


@pytest.mark.parametrize(('line', 'expected'), [
    # words of other programs
    ('execute_batch b --shell 1', ' To open a shell beside a job: execute_remote --shell '
     'batch.sh.57.'),
    ('execute_batch b --kill 7', ' To cancel a job: --cancel.'),
    ('execute_batch b --logs', ' To see what job 57 prints: --follow 57.'),
    ('execute_batch b --tail=5', ' To see what job 57 prints: --follow 57.'),
    ('execute_batch b -j 2', ' To limit the number of jobs on a machine: the key max_jobs of its '
     'machine file. To write such a file: execute_to --init lab1.'),
    ('execute_batch b -o out', ' The output of each job is in job_results, such as '
     'job_results/batch.sh.57.out. To see it: --follow 57.'),
    ('execute_batch b -S a', ' To name machines: --machines lab1 lab2.'),
    ('execute_batch b -a x', ' Write each command on a line of the batch file. To write many: for '
     'i in {1..9}; do echo "python3 train.py $i"; done >batch.sh'),
    ('execute_batch b -n 4', ' To ask for processor cores: --num-cpus 4. To start nothing: '
     '--dry-run.'),
    ('execute_batch b --cpus-per-task=4', ' To ask for processor cores: --num-cpus 4.'),
    ('execute_batch b --after a.sh', ' To run a batch after another one: execute_batch part1.sh … '
     '&& execute_batch part2.sh …'),
    ('execute_batch b --env X=1', ' To set a variable of a job, write its line as: NAME=VALUE '
     'COMMAND. For all jobs: the key env of a machine file.'),
    ('execute_batch b --setup x', ' To prepare a machine for its jobs: the key setup of its '
     'machine file. For one job, write its line as: PREPARE && COMMAND.'),
    ('execute_remote --status', ' To see what a job prints: --attach NAME. To list the names: ls '
     'job_results/.ssh_scheduler/commands. For a batch: execute_batch --status.'),
    ("execute_remote --export X=1 'a b'", " To set a variable: 'NAME=VALUE COMMAND', or the key "
     'env of a machine file.'),
    ('execute_batch b --return x', ' To fetch files: --copy-backwards.'),
    ('execute_batch b --hosts lab1', ' To name machines: --machines lab1 lab2.'),
    ('execute_batch b --gpu 1', ' To ask for GPUs: --num-gpus 2.'),
    ("execute_remote 'a b' --host lab1", ' To name a machine: --machine lab1.'),
    ('execute_remote --kill a', ' To cancel a job: --cancel.'),
    ('execute_remote --logs a', ' To see what a job prints, and to fetch its results: --attach '
     'NAME.'),
    ("execute_to --gres 2 'a b'", ''),
    ('query_machines --host a', ' To name machines: --machines lab1 lab2.'),
    # options of another command
    ('execute_batch b --gather', ' --gather is an option of execute_to.'),
    ('query_machines --timeout 3', ' --timeout is an option of execute_batch and execute_remote '
     'and execute_to.'),
    # the nearest word is right
    ('execute_batch b --gpus 2', ' (did you mean --num-gpus?).'),
    ('execute_batch b --time 2', ' (did you mean --timeout?).'),
    # an option of a command without quotes
    ('execute_remote ./x --output 3', " Put the command in quotes. Try: execute_remote './x "
     "--output 3'")])
def test_an_option_of_another_program_is_told_what_stands_for_it(line, expected):
    with pytest.raises(ssh_scheduler.UsageError) as caught:
        read(line)
    option = next(word for word in line.split() if word.startswith('-')).partition('=')[0]
    end = expected if expected.startswith(' (') else f'.{expected}'
    assert str(caught.value) == f'unknown option {option}{end}'


def test_each_remedy_for_an_option_of_another_program_is_known():
    """Each option in a remedy exists, and no command has an option that has a remedy there."""
    kinds = {usage: ssh_scheduler.option_kinds(usage)
             for usage in (*USAGES.values(), *OTHER_USAGES.values())}
    for names, known, remedy in ssh_scheduler.GUESSES:
        having = [one for one in kinds.values() if known in one]
        assert having and not any(names & one.keys() for one in having)
        typed, all_usages = having, {**USAGES, **OTHER_USAGES}
        for word in re.findall(r'(?<=\s)(?:--[a-z-]+|execute_\w+)', remedy):
            if word in all_usages:      # the options behind it are its own
                typed = [kinds[all_usages[word]]]
            else:
                assert all(word in {**one, '--machine': '', '--machines': ''} for one in typed)


@pytest.mark.parametrize(('line', 'expected'), [
    ('execute_batch status b', "unexpected word 'status' (did you mean --status?)."),
    ('execute_batch b --status failed', "unexpected word 'failed' (did you mean --failed?)."),
    ('execute_batch b cancel 3', "unexpected word 'cancel' (did you mean --cancel?)."),
    ('query_machines watch', "unexpected word 'watch' (did you mean --watch?)."),
    ('execute_remote attach a', "unexpected word 'attach' (did you mean --attach?)."),
    ('execute_remote --machine a ./x attach', "unexpected word 'attach'. Put the command in "
     "quotes. Try: execute_remote --machine a './x attach'"),
    ('execute_batch --timeout 5 min --dry-run b', "unexpected word 'min'. Write the unit without a "
     'blank: --timeout 5m.'),
    ('execute_batch b --memory-required=8 GB', "unexpected word 'GB'. Write the unit without a "
     'blank: --memory-required 8G.'),
    ("execute_remote --timeout 1.5 hours 'x y'", "unexpected word 'hours'. Write the unit without "
     'a blank: --timeout 1.5h.'),
    ('execute_batch b --retries 5 min', "unexpected word 'min'. To name machines: --machines "
     'min.')])
def test_a_word_in_a_wrong_place_is_named(line, expected):
    with pytest.raises(ssh_scheduler.UsageError) as caught:
        read(line)
    assert str(caught.value) == expected


@pytest.mark.parametrize(('words', 'expected'), [
    ('lab1 lab2 b.sh', "'lab1'. To name machines: --machines lab1 lab2."),
    ('a.sh b.sh --status', "'b.sh'. Name one batch file at a time.")])
def test_the_word_that_is_no_batch_file_is_named(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    for name in ('a.sh', 'b.sh'):
        (tmp_path / name).touch()
    assert complaint(*words.split()) == f'unexpected word {expected}'


@pytest.mark.parametrize(('line', 'missing'), [
    ('execute_remote --machine a --forward 9002:8123', '<command>'),
    ('execute_remote --machine a --forward 9002', '<command>'),
    ('execute_remote --forward 9002 6006', '<command>'),
    ('execute_batch --status --watch 5', '<batch>'),
    ('execute_batch --status --watch 1h30m', '<batch>'),
    ('execute_batch --cancel 3 .5', '<batch>'), ('execute_batch --rerun 3', '<batch>')])
def test_a_number_of_a_list_is_not_taken_for_a_missing_word(line, missing):
    with pytest.raises(ssh_scheduler.WordMissing) as caught:
        read(line)
    assert str(caught.value) == f'{missing} is missing.'


@pytest.mark.parametrize(('word', 'expected'), [
    # an abbreviation means the option that begins with it, however long
    ('--no-gpu', ['--no-gpu-required']), ('--nogpu', ['--no-gpu-required']),
    ('--no_gpu', ['--no-gpu-required']), ('--no-reserve', ['--no-reserve-gpu']),
    ('--memory', ['--memory-required']), ('--gpu', ['--gpu-memory-required', '--gpu-utilization']),
    ('--mem', ['--memory-required']), ('-v', ['--verbose', '--version']),
    # or that contains it
    ('--gpus', ['--num-gpus']), ('--cpus', ['--num-cpus']),
    ('--forwards', ['--copy-forwards', '--link-forwards']),
    # in any order
    ('--no-gpu-reserve', ['--no-reserve-gpu']), ('--required-memory', ['--memory-required']),
    # with typing errors
    ('--no-gpus', ['--no-gpu-required']), ('--nom-gpus', ['--num-gpus']),
    ('--machnies', ['--machines']), ('--dryrun', ['--dry-run']),
    # no suggestion: neither the opposite nor a word unlike all options
    ('--no-timeout', []), ('--no_timeout', []), ('--notimeout', []), ('--no-nice', []),
    ('--live', []), ('--no-copy-forwards', []), ('--zebra', []), ('-x', []), ('--', []), ('-', []),
])
def test_the_nearest_word_is_one_that_may_be_meant(word, expected):
    known = ssh_scheduler.option_kinds(ssh_scheduler.EXECUTE_BATCH_USAGE)
    assert set(expected) <= set(known)
    # each file stands alone, so it has its own function
    for module in (ssh_scheduler, combine_folders, results_table):
        assert module.nearest(word, known) == (
            f' (did you mean {" or ".join(expected)}?)' if expected else '')


@ANY
@given(word=WORDS, known=st.sets(st.sampled_from(
    [*ssh_scheduler.option_kinds(ssh_scheduler.EXECUTE_BATCH_USAGE),
     *ssh_scheduler.MACHINE_KEYS, *ssh_scheduler.COMMANDS])))
def test_any_word_has_at_most_three_nearest_ones(word, known):
    named = ssh_scheduler.nearest(word, known)
    assert named.count(' or ') <= 2
    assert not named or set(named[15:-2].split(' or ')) <= known


@pytest.mark.parametrize(('option', 'expected'), [
    ('--no-reserve-gpu', '--reserve-gpu'), ('--no-live', '--live'),
    ('--timeout', '--no-timeout'), ('--nice', '--no-nice')])
def test_an_option_is_never_proposed_for_its_opposite(option, expected):
    assert option not in ssh_scheduler.nearest(
        expected, ssh_scheduler.option_kinds(ssh_scheduler.EXECUTE_BATCH_USAGE))


def test_the_missing_command_of_a_partial_line_is_named():
    assert complaint('--job-name', 'a', command='execute_remote') == '<command> is missing.'


@pytest.mark.parametrize(('words', 'expected'), [
    ('--num-cpus 0', "--num-cpus must be a number above 0, not '0'."),
    ('--num-cpus=-1', "--num-cpus must be a number above 0, not '-1'."),
    ('--num-cpus=two', "--num-cpus must be a number above 0, not 'two'."),
    ('--num-cpus=', "--num-cpus must be a number above 0, not ''."),
    ('--num-cpus=inf', "--num-cpus must be a number above 0, not 'inf'."),
    *[(f'--{option}={value}', f"--{option} must be a size of at least 0 MB, not '{value}'. "
       'Examples: 2000 (MB), 500M, 8G.')
      for option in ('memory-required', 'gpu-memory-required')
      for value in ('-5', 'nan', '1e999', '8X', '8GG', 'G', '-8G', '1e3G', '8,5G', '٣G', '8\u212a',
                    '')],
    ('--gpu-utilization=nan',
     "--gpu-utilization must be a number above 0 and at most 1, not 'nan'."),
    ('--gpu-utilization=0', "--gpu-utilization must be a number above 0 and at most 1, not '0'."),
    ('--gpu-utilization=1.01',
     "--gpu-utilization must be a number above 0 and at most 1, not '1.01'."),
])
def test_a_bad_number_is_named(words, expected):
    for command in USAGES:
        options = read([command, 'x', *words.split()])
        with pytest.raises(ssh_scheduler.UsageError) as caught:
            ssh_scheduler.read_allocation(options)
        assert str(caught.value) == expected


@pytest.mark.parametrize(('words', 'expected'), [
    ('--num-cpus=0.25', {'cores': 0.25}),
    ('--memory-required=0', {'memory_mb': 0}),
    ('--memory-required=10.5', {'memory_mb': 11}),      # never less than requested
    ('--gpu-memory-required 0', {'gpu_memory_mb': 0}),
    ('--memory-required=8G', {'memory_mb': 8192}),
    ('--memory-required 1.5gb', {'memory_mb': 1536}),
    ('--memory-required=1T', {'memory_mb': 1048576}),
    ('--memory-required=1K', {'memory_mb': 1}),
    ('--gpu-memory-required=500M', {'gpu_memory_mb': 500}),
    ('--gpu-memory-required 2GiB', {'gpu_memory_mb': 2048}),
    ('--gpu-utilization=1', {'gpu_utilization': 1.0}),
    ('--reserve', {'reserve': True}),
    ('--no-gpu-required', {'gpus': 0}),
    ('--no-reserve-gpu', {'reserve_gpu': False}),
])
def test_a_number_changes_one_part_of_the_allocation(words, expected):
    allocation = ssh_scheduler.read_allocation(read(['execute_batch', 'x', *words.split()]))
    assert allocation == ssh_scheduler.Allocation()._replace(**expected)


# ---- Sizes and times ----

UNITS_MB = {'K': 1 / 1024, 'M': 1, 'G': 1024, 'T': 1024 * 1024}
UNITS_S = {'d': 86400, 'h': 3600, 'm': 60, 's': 1}
NUMBERS = st.integers(0, 10**6).map(str) | st.decimals(0, 10**6, places=3).map(str)


@ANY
@given(number=NUMBERS, unit=st.sampled_from('KMGT'), end=st.sampled_from(['', 'B', 'iB']),
       blank=st.sampled_from(['', ' ']), lower=st.booleans())
def test_any_size_with_a_unit_is_read(number, unit, end, blank, lower):
    text = f'{number}{blank}{unit}{end}'
    assert ssh_scheduler.size_mb(text.lower() if lower else text) == pytest.approx(
        float(number) * UNITS_MB[unit])
    assert ssh_scheduler.size_mb(number) == ssh_scheduler.seconds(number) == float(number)


@ANY
@given(parts=st.dictionaries(st.sampled_from('dhms'), NUMBERS, min_size=1),
       blank=st.sampled_from(['', ' ']), upper=st.booleans())
def test_any_time_with_units_is_read(parts, blank, upper):
    text = blank.join(f'{parts[unit]}{unit}' for unit in UNITS_S if unit in parts)
    assert ssh_scheduler.seconds(text.upper() if upper else text) == pytest.approx(
        sum(float(number) * UNITS_S[unit] for unit, number in parts.items()))


@ANY
@given(text=st.text('0123456789.dhmsKMGTBi -+e_٣\u212a\u017f', max_size=8) | WORDS)
def test_any_text_is_a_size_or_a_time_or_neither(text):
    """A text without a unit is a plain number, as before there were units."""
    try:
        plain = float(text)
    except ValueError:
        plain = None
    for read, units in ((ssh_scheduler.size_mb, 'kmgtib'), (ssh_scheduler.seconds, 'dhms')):
        value = read(text)
        if plain is not None:
            assert value == plain or value != value and plain != plain
        elif value == value:
            assert value >= 0 and set(text.lower().strip()) <= set(f'0123456789. {units}')
            assert text.isascii() and text.strip()[-1].lower() in units


@pytest.mark.parametrize('text', ['1h30', '30m1h', '1h1h', 'h', '1.h.', '1:30', '2hours', '1m-5s',
                                  '', ' ', '5ms', '1w'])
def test_what_is_no_time_is_nan(text):
    assert ssh_scheduler.seconds(text) != ssh_scheduler.seconds(text)


@pytest.mark.parametrize(('command', 'option', 'text', 'value'), [
    ('execute_batch', '--timeout', '2h', 7200), ('execute_batch', '--lost-after', '10m', 600),
    ('execute_batch', '--away-limit', '1h30m', 5400), ('execute_remote', '--timeout', '1.5h', 5400),
    ('execute_remote', '--away-limit', '1d', 86400), ('execute_to', '--timeout', '90', 90)])
def test_a_time_is_read_in_seconds(command, option, text, value):
    options = read([command, 'x', option, text])
    assert options.seconds(option, above=0) == value


@pytest.mark.parametrize(('words', 'complaint'), [
    (['execute_batch', 'b', '--timeout', '2hours'], "--timeout must be a time above 0 s, not "
     "'2hours'. Examples: 90 (seconds), 10m, 1h30m."),
    (['execute_batch', 'b', '--timeout=0s'], '--timeout must be a time above 0 s'),
    (['execute_batch', 'b', '--lost-after=-1'], '--lost-after must be a time of at least 0 s'),
    (['execute_batch', 'b', '--away-limit=1h30'], '--away-limit must be a time of at least 0 s'),
    (['execute_batch', 'b', '--max-result-size=2Q'], '--max-result-size must be a size of at least '
     "0 MB, not '2Q'. Examples: 2000 (MB), 500M, 8G."),
    (['execute_remote', 'true', '--timeout=x'], '--timeout must be a time above 0 s'),
    (['execute_remote', 'true', '--away-limit=x'], '--away-limit must be a time of at least 0 s'),
    (['execute_to', 'true', '--timeout=x'], '--timeout must be a time above 0 s')])
def test_a_wrong_size_or_time_is_one_sentence(run_cli, project, words, complaint):
    (project / 'b').write_text('true\n')
    machine = '--machine' if words[0] == 'execute_remote' else '--machines'
    done = run_cli(words[0], machine, 'localhost', *words[1:])
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'{words[0]}: {complaint}') and 'Traceback' not in done.stderr


# ---- A command without quotes ----

def advice(line):
    """Return (the error up to the advice, the line to type) for a command line."""
    with pytest.raises(ssh_scheduler.UsageError) as caught:
        read(line)
    error, _, typed = str(caught.value).partition(' Put the command in quotes. Try: ')
    return error, typed


@pytest.mark.parametrize(('words', 'typed'), [
    ('execute_remote --machine a python3 train.py --lr 0.2',
     "execute_remote --machine a 'python3 train.py --lr 0.2'"),
    ('execute_remote --machine a ./train 3', "execute_remote --machine a './train 3'"),
    ('execute_remote --machine a -- ./train --lr 3',
     "execute_remote --machine a -- './train --lr 3'"),
    ('execute_remote --machine a ls -l', "execute_remote --machine a 'ls -l'"),
    ('execute_remote --machine a bash -c "b c"', """execute_remote --machine a "bash -c 'b c'\""""),
    # options of this program may stand among the words of the command
    ('execute_remote --stdin ./train 3 --machine a --lr 3 --num-gpus 2',
     "execute_remote --stdin --machine a --num-gpus 2 './train 3 --lr 3'"),
    # an option of the command may be like one of this program
    ('execute_remote --machine a ./train 3 --num-gpuz 2',
     "execute_remote --machine a './train 3 --num-gpuz 2'"),
    # a list ends where the command begins
    ('execute_remote --machine a --copy-forwards b python3 t.py --lr 3',
     "execute_remote --machine a --copy-forwards b 'python3 t.py --lr 3'"),
    ('execute_remote --machines a python3 t.py', "execute_remote --machines a 'python3 t.py'"),
    ('execute_to --machines a b ls -l', "execute_to --machines a b 'ls -l'"),
    ('execute_to --machines=a A=1 ./x --lr 3', "execute_to --machines=a 'A=1 ./x --lr 3'"),
    ('execute_to --machines a b strange -l', "execute_to --machines a b 'strange -l'"),
    ('execute_to --machines a --gather -- b c', "execute_to --machines a --gather -- 'b c'")])
def test_a_command_without_quotes_is_shown_with_them(words, typed):
    error, shown = advice(words)
    assert error.endswith('.') and shown == typed
    assert read(typed)['<command>']


@pytest.mark.parametrize(('words', 'error'), [
    ("execute_remote --machine a 'b c' --lr 3", 'unknown option --lr.'),
    ("execute_remote --machine a 'b c' d", "unexpected word 'd'."),
    ("execute_remote --machin a 'b c'", 'unknown option --machin (did you mean'),
    ('execute_remote ./x --machin a', 'unknown option --machin (did you mean'),
    ('execute_remote --lr 3', 'unknown option --lr.'),
    ('execute_remote --attach a ./b c', "unexpected word './b'. --attach takes no command."),
    ('execute_to --init a b', "unexpected word 'b'. --init takes no command."),
    ('execute_to --machines a b --zebra', 'unknown option --zebra.'),
    # machines, and no words of a command
    ("execute_remote a 'b c'", "unexpected word 'a'. To name a machine: --machine a."),
    ("execute_to a b 'b c'", "unexpected word 'a'. To name machines: --machines a b."),
    ('execute_to a bash', "unexpected word 'a'. To name machines: --machines a."),
    *[(f'execute_remote --machine a b {command}', 'the command runs on one machine, and 2 are '
       'named: a, b. For many machines: execute_to or execute_batch.')
      for command in ("'c d'", 'bash')],
    # other commands take none
    ('execute_batch a --lr 3 b c', 'unknown option --lr.'),
    ('query_machines a b', "unexpected word 'a'. To name machines: --machines a b.")])
def test_quotes_are_advised_only_where_they_are_missing(words, error):
    shown, typed = advice(words)
    assert shown.startswith(error) and typed == ''


@ANY
@given(words=st.lists(WORDS.filter(bool), min_size=2, max_size=5))
def test_the_shown_line_has_the_words_as_they_were(words):
    """Any arguments of a program: quotes, variables and blanks in them are still theirs."""
    argv = ['execute_remote', '--machine', 'a', '--', 'bash', *words]
    _, typed = advice(argv)
    if all(word.isprintable() for word in words):
        assert shlex.split(read(typed)['<command>']) == ['bash', *words]


@pytest.mark.parametrize(('line', 'option', 'typed'), [
    ('execute_to --machines a b df -h /', '-h', "execute_to --machines a b 'df -h /'"),
    ('execute_remote --machine a ls -h', '-h', "execute_remote --machine a 'ls -h'"),
    ('execute_remote --machines a ls -h', '-h', "execute_remote --machines a 'ls -h'"),
    ('execute_remote ls -h', '-h', "execute_remote 'ls -h'"),
    ('execute_remote --machine a ./x --help', '--help', "execute_remote --machine a './x --help'"),
    ('execute_remote --machine a python3 --version', '--version',
     "execute_remote --machine a 'python3 --version'")])
def test_help_of_a_command_without_quotes_needs_quotes(line, option, typed):
    command = typed.split("'")[1].split()[0]
    assert advice(line) == (
        f'{option} is an option of {line.split()[0]} here, not of {command}.', typed)
    assert advice(f'{line} --zebra')[1] == f"{typed[:-1]} --zebra'"


@pytest.mark.parametrize('line', [
    'execute_to --machines a -h', 'execute_to --machines a b -h', 'execute_to a b -h',
    'execute_remote -h', 'execute_remote --machine a --help', "execute_remote --machine a 'b c' -h",
    'execute_remote -h ls', 'execute_remote strange --help', 'execute_batch b --help',
    'execute_batch ls -h', 'execute_remote --machine a --completion bash'])
def test_help_is_asked_for_where_no_command_stands_before(line):
    with pytest.raises(ssh_scheduler.HelpAsked):
        read(line)


# ---- Both forms of --machines ----

@pytest.mark.parametrize(('line', 'expected'), [
    ('execute_batch b --machine a', {'<batch>': 'b', '--machines': ('a',)}),
    ('execute_batch --machine a b c', {'<batch>': 'c', '--machines': ('a', 'b')}),
    ('execute_batch b --machine a --machines b --machine=c',
     {'<batch>': 'b', '--machines': ('a', 'b', 'c')}),
    ("execute_to --machine a b -- 'x'", {'<command>': 'x', '--machines': ('a', 'b')}),
    ("execute_remote --machines a 'x'", {'<command>': 'x', '--machine': 'a'}),
    ("execute_remote 'x' --machines=a", {'<command>': 'x', '--machine': 'a'}),
    ('execute_remote --attach n --machines a',
     {'<command>': None, '--attach': 'n', '--machine': 'a'})])
def test_either_form_of_machines_is_taken(line, expected):
    assert said(line) == expected


def test_either_form_of_machines_is_taken_by_query_machines():
    assert read('query_machines --machine a b')['--machines'] == ('a', 'b')


@pytest.mark.parametrize('words', [
    ['--machines', 'a', 'b', 'x'], ['--machines', 'a', 'b', '--', 'x'],
    ['--machine', 'a', '--machines', 'b', '--', 'x'], ['x', '--machines=a', '--machines', 'b']])
def test_a_second_machine_of_one_command_is_a_sentence(words):
    assert complaint(*words, command='execute_remote') == (
        'the command runs on one machine, and 2 are named: a, b. For many machines: execute_to or '
        'execute_batch.')


def test_a_word_behind_the_end_of_the_options_is_no_machine():
    assert said(['execute_remote', '--machines', 'a', '--', '--machine=b']) == {
        '<command>': '--machine=b', '--machine': 'a'}


# ---- The whole command, to type it again ----

@pytest.mark.parametrize(('words', 'expected'), [
    (['b.sh', '--machines', 'a'], '--added b.sh --machines a'),
    (['--machines', 'a', 'b c.sh'], "--added --machines a 'b c.sh'"),
    (['b', '--num-gpus', '2', '--machines', 'a'], '--added b --machines a'),
    (['--num-gpus=2', '--exclude', '*', '--', 'b'], "--added --exclude '*' -- b"),
    (['--machines', 'a', '--', '--num-gpus=2'], '--added --machines a -- --num-gpus=2')])
def test_a_command_line_with_an_option_more(words, expected):
    options = ssh_scheduler.read_options(USAGES['execute_batch'], words)
    assert options.typed('--added', without='--num-gpus') == f'execute_batch {expected}'


@ANY
@given(argv=st.lists(WORDS, max_size=5), batch=PATHS)
def test_what_is_shown_to_be_typed_is_read_as_it_was(argv, batch):
    options = ssh_scheduler.read_options(USAGES['execute_batch'], [
        '--machines', 'a', *(f'--exclude={word}' for word in argv), '--', batch])
    command, *words = shlex.split(options.typed('--no-gpu-required', without='--num-gpus'))
    again = ssh_scheduler.read_options(USAGES['execute_batch'], words)
    assert command == 'execute_batch' and again['--no-gpu-required']
    assert {**again, '--no-gpu-required': False} == options


@pytest.mark.parametrize(('words', 'expected'), [
    (['--rerun', '3', '4', '--machines', 'a', 'b.sh'], '--added --machines a b.sh'),
    (['b.sh', '--rerun=3', '--machines', 'a'], '--added b.sh --machines a'),
    (['--machines', 'a', '--rerun', '3', '4', '--', 'b'], '--added --machines a -- b')])
def test_a_command_line_with_an_option_more_and_without_a_list(words, expected):
    options = ssh_scheduler.read_options(USAGES['execute_batch'], words)
    assert options.typed('--added', without='--rerun') == f'execute_batch {expected}'


# ---- Any words at all ----

@ANY
@given(lists=st.dictionaries(st.sampled_from(LISTS), st.lists(PATHS, max_size=4)), batch=WORDS)
def test_lists_of_any_words_come_through(lists, batch):
    argv = [word for name, values in lists.items() for word in (name, *values)]
    options = ssh_scheduler.read_options(USAGES['execute_batch'], [*argv, '--', batch])
    assert options['<batch>'] == batch
    assert options.given == frozenset(lists)
    for name in LISTS:
        assert options[name] == (tuple(lists[name]) if name in lists else None)


@ANY
@given(words=st.lists(WORDS.filter(bool), min_size=1, max_size=4), batch=PATHS)
def test_a_word_behind_an_equals_sign_may_look_like_an_option(words, batch):
    argv = [f'--exclude={word}' for word in words]
    options = ssh_scheduler.read_options(USAGES['execute_batch'], [batch, *argv])
    assert (options['<batch>'], options['--exclude']) == (batch, tuple(words))


@ANY
@given(words=st.lists(PATHS, min_size=1, max_size=4))
def test_the_last_word_of_the_last_list_is_the_batch(words):
    options = ssh_scheduler.read_options(USAGES['execute_batch'], ['--copy-forwards', *words])
    assert (options['<batch>'], options['--copy-forwards']) == (words[-1], tuple(words[:-1]))


def test_several_words_are_taken_back_in_their_order():
    kinds = {'--list': 'list', '--flag': 'flag'}
    spelled, given = ssh_scheduler.spell_out(['--list', 'a', 'b', 'c', '--flag'], kinds, 2)
    assert (spelled, given) == (['--list=a', '--flag', '--', 'b', 'c'], {'--list', '--flag'})
    assert ssh_scheduler.spell_out(['x', '--list', 'a'], kinds, 2)[0] == [
        '--list=', '--', 'x', 'a']


@ANY
@given(value=WORDS, command=WORDS)
def test_a_value_of_any_text_comes_through(value, command):
    for argv in (['--job-name', value], [f'--job-name={value}']):
        options = ssh_scheduler.read_options(USAGES['execute_remote'], [*argv, '--', command])
        assert (options['--job-name'], options['<command>']) == (value, command)


OPTION_LIKE = st.sampled_from([
    '-', '--', '-h', '--help', '--version', '--machines', '--machines=', '--exclude=*',
    '--num-cpus', '--num-cpus=1', '--reserve', '--reserve=1', '--copy-forwards', '--no-gpu', '=',
    '[options]', '<batch>', '--=', '-=', '...'])


@ANY
@given(argv=st.lists(OPTION_LIKE | WORDS, max_size=7))
def test_any_command_line_is_options_or_one_sentence(argv):
    try:
        options = ssh_scheduler.read_options(USAGES['execute_batch'], argv)
    except ssh_scheduler.UsageError as error:
        assert str(error).endswith('.') and 'Option(' not in str(error)
    except ssh_scheduler.HelpAsked as asked:
        assert str(asked)
    else:
        assert options['<batch>'] in {*argv, *(word.partition('=')[2] for word in argv)}
        assert options.given <= {word.partition('=')[0] for word in argv}


# ---- main() ----

@pytest.mark.parametrize('option', ['--help', '-h'])
@pytest.mark.parametrize('start', [['/usr/bin/execute_batch'], ['x.py', 'execute_batch']])
def test_help_is_the_usage_text(option, start):
    usage = ssh_scheduler.EXECUTE_BATCH_USAGE
    assert call_main(*start, option) == (usage, '', 0)
    assert call_main(*start, 'b', '--machines', 'a', option) == (usage, '', 0)


def test_the_help_of_execute_remote_is_its_usage_text():
    assert call_main('execute_remote', '--help') == (ssh_scheduler.EXECUTE_REMOTE_USAGE, '', 0)


@pytest.mark.parametrize('words', [
    ['--attach', 'a', '--cancel', 'b'], ['--attach', 'a', '--copy-forwards', 'b']])
def test_what_cannot_be_given_together_is_named(words):
    assert complaint(*words, command='execute_remote') == (
        f'{words[2]} cannot be given with --attach.')


def test_help_fits_a_terminal_of_80_columns():
    for usage in HELP.values():
        assert [line for line in usage.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize('command', HELP)
def test_each_help_is_its_golden_file(command):
    test_golden.compare({f'help/{command}.txt': HELP[command]})


def test_each_help_ends_with_an_example_that_is_read():
    for command, usage in HELP.items():
        example = usage.rpartition('\n\nExample:\n  ')[2].rstrip('\n')
        words = split(example)
        assert words.pop(0) in (command, f'{command}.py')
        if command == 'combine_folders':
            combine_folders.read_options(words)
        elif command == 'results_table':
            results_table.read_options(words)
        else:
            read(words if command == 'ssh_scheduler' else [command, *words])


@pytest.mark.parametrize('option', ['--timeout', '--nice', '--cancel', '--copy-forwards'])
def test_the_help_gives_the_reason_where_commands_differ(option):
    """Each help gives the reason of its command; that of execute_to also if it lacks the option."""
    reasons = {'--timeout': ('counts as failed', 'its exit code', 'no machine delays'),
               '--nice': ('people at the machine', 'a person waits', 'a person waits'),
               '--cancel': ('Without a name: all', 'may have many', 'nothing to cancel'),
               '--copy-forwards': ('most commands need files', 'most commands need files',
                                   'since most such commands')}
    for usage, reason in zip((*USAGES.values(), ssh_scheduler.EXECUTE_TO_USAGE), reasons[option]):
        assert ' '.join(reason.split()) in ' '.join(usage.split())


def test_version_is_shown():
    shown = f'execute_batch {ssh_scheduler.__version__}\n'
    assert call_main('execute_batch', '--version') == (shown, '', 0)


@pytest.mark.parametrize('command', ssh_scheduler.COMMANDS)
def test_a_wrong_option_is_named_before_an_example(command):
    """The whole usage would scroll the error away."""
    out, err, status = call_main(command, '--machne', 'a')
    said, example, more = err.splitlines()
    assert said == f'{command}: unknown option --machne (did you mean --machine?).'
    assert example.startswith(f'Example: {command} ') and example[9:] in HELP[command]
    assert (more, out, status) == (f'All options: {command} --help', '', 2)


def test_a_line_to_type_needs_no_example_beside_it():
    _, err, _ = call_main('execute_to', '--machines', 'a', 'ls', '-l')
    said, more = err.splitlines()
    assert said.endswith("Try: execute_to --machines a 'ls -l'")
    assert more == 'All options: execute_to --help'


def test_the_batches_of_the_folder_are_named_where_one_is_missing(run_cli, project):
    words = ['--machines', 'localhost', '--no-gpu-required', '--memory-required=1']
    for name in ('b.sh', 'a.sh'):
        (project / name).write_text('true\n')
        assert run_cli('execute_batch', '--cancel').stderr.splitlines()[0].endswith(
            'missing.' if name == 'b.sh' else 'execute_batch b.sh --cancel')
        assert run_cli('execute_batch', name, *words).returncode == 0
    done = run_cli('execute_batch', '--status')
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2, 'execute_batch: <batch> is missing. Batches of this folder: a.sh, b.sh.')


def test_a_question_is_for_the_only_batch_of_the_folder(run_cli, project):
    (project / 'b.sh').write_text('echo said\n')
    run_cli('execute_batch', 'b.sh', '--machines', 'localhost', '--no-gpu-required',
            '--memory-required=1')
    note = 'execute_batch: the only batch of this folder is b.sh\n'
    for words, out in ((['--status', '--json', '--watch', '5'], '{"job": "b.sh.1"'),
                       (['--follow', '1'], 'said\n'), (['--wait'], '1 job: 1 finished')):
        done = run_cli('execute_batch', *words)
        assert (done.returncode, done.stderr) == (0, note) and done.stdout.startswith(out)
    for word in ('1', '.1'):
        done = run_cli('execute_batch', '--what', word)
        assert (done.returncode, done.stderr, 'echo said' in done.stdout) == (0, note, True)
    assert run_cli('execute_batch', '--what', 'b.sh.1').stderr == ''
    (project / 'b.sh').rename(project / 'c.sh')
    assert run_cli('execute_batch', '--status').returncode == 2
    assert run_cli('execute_batch', '--what', '1').returncode == 0      # the journal has it all
    done = run_cli('execute_batch', '--reproduce', '1')
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, 'b.sh.1: echo said')


def test_no_machines_are_an_error():
    stdout, stderr, status = call_main('execute_batch', 'b')
    assert (stdout, status) == ('', 2)
    assert stderr.startswith('execute_batch: --machines is missing')


@pytest.mark.parametrize(('command', 'end'), [
    ('execute_batch', ', or <batch> is missing.'), ('execute_to', ', or <command> is missing.'),
    ('query_machines', '.')])
def test_a_word_that_the_list_of_machines_lost_may_be_meant_for_it(command, end):
    words = ['--machines'] + ([] if command == 'query_machines' else ['lab1'])
    stdout, stderr, status = call_main(command, *words)
    assert (stdout, status, stderr.splitlines()[0]) == (
        '', 2, f'{command}: --machines names no machine{end}')


@pytest.mark.parametrize(('words', 'expected'), [
    (['--machines', 'lab1', 'lab2'], '<batch> is missing: lab2 is a machine. '),
    (['--machines', 'lab1', 'lab2.yaml'], '<batch> is missing: lab2.yaml is a machine. '),
    (['--machines', 'lab1', '--dry-run', 'lab3'],
     '<batch> is missing, or there is no file lab3. ')])
def test_a_machine_is_not_taken_for_the_batch_file(run_cli, project, words, expected):
    (project / 'lab2.yaml').write_text('ip: 192.0.2.1\n')
    done = run_cli('execute_batch', *words)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2, f'execute_batch: {expected}For the standard input write - as <batch>.')


BEFORE = ' takes all words up to the next option, here also a.sh.'


@pytest.mark.parametrize(('words', 'why', 'line'), [
    ('--rerun 1 2 a.sh --machines lab1 --dry-run', f': lab1 is a machine. --rerun{BEFORE}',
     'a.sh --rerun 1 2 --machines lab1 --dry-run'),
    ('--rerun g.sh.3 --machines lab1', ': lab1 is a machine.',
     'g.sh --rerun g.sh.3 --machines lab1'),
    ('--machines lab1 lab2 a.sh --rerun 1 --dry-run', f'. --machines{BEFORE}',
     'a.sh --machines lab1 lab2 --rerun 1 --dry-run'),
    ('--copy-forwards x a.sh --machines lab1 lab2', f': lab2 is a machine. --copy-forwards{BEFORE}',
     'a.sh --copy-forwards x --machines lab1 lab2'),
    ('--cancel g.sh.3', ': g.sh.3 is a job.', 'g.sh --cancel g.sh.3'),
    ('--follow g.sh.3', '.', 'g.sh --follow g.sh.3'),
    # no file can be meant
    ('--rerun-failed --machines lab1 lab2', ': lab2 is a machine.', None),
    ('--rerun-failed --machines lab2 lab1.yaml', ': lab1.yaml is a machine.', None),
    ('--drop-machine lab1 lab2', ': lab2 is a machine.', None),
    ('--copy-forwards a.sh --machines lab1 lab2',
     ': lab2 is a machine. For the standard input write - as <batch>.', None)])
def test_the_batch_file_is_to_come_first(run_cli, project, words, why, line):
    for name in ('a.sh', 'g.sh'):
        (project / name).write_text('true\n')
    for name in ('lab1.yaml', 'lab2.yaml'):
        (project / name).write_text('ip: 192.0.2.1\n')
    done = run_cli('execute_batch', *words.split())
    first = f' Write the batch file first. Try: execute_batch {line}' if line else ''
    assert (done.returncode, re.sub('Try: .* execute_batch', 'Try: execute_batch',
                                    done.stderr.splitlines()[0])) == (
        2, f'execute_batch: <batch> is missing{why}{first}')


def test_the_file_to_type_is_the_only_batch_of_the_folder(run_cli, project):
    (project / 'lab2.yaml').write_text('ip: 192.0.2.1\n')
    (project / 'b.sh').write_text('true\n')
    run_cli('execute_batch', 'b.sh', '--machines', 'localhost', '--no-gpu-required',
            '--memory-required=1')
    for words in (['--rerun-failed', '--machines', 'lab1', 'lab2'], ['--rerun', 'b.sh.1']):
        done = run_cli('execute_batch', *words)
        assert done.stderr.splitlines()[0].endswith(f'execute_batch b.sh {" ".join(words)}')
        assert done.returncode == 2 and '<batch> is missing' in done.stderr


@pytest.mark.parametrize(('command', 'words', 'line'), [
    ('execute_to', '--machines lab1 lab2 --copy-forwards sim.py', 'cp -r sim.py ~/'),
    ('execute_to', '--machines lab1 --copy-forwards data sim.py', 'cp -r data sim.py ~/'),
    ('execute_remote', '--machine lab1 --link-forwards sim.py', 'cp -r sim.py ~/')])
def test_a_file_to_send_is_not_taken_for_the_command(run_cli, project, command, words, line):
    (project / 'sim.py').touch()
    done = run_cli(command, *words.split())
    assert done.returncode == 2 and done.stderr.startswith(
        f'{command}: <command> is missing: sim.py is a file to send. ')
    assert done.stderr.splitlines()[0].endswith(f" {command} {words} -- '{line}'")


@pytest.mark.parametrize('words', [
    ['--machines', 'localhost', '--copy-forwards', 'run', './run'],
    ['--copy-forwards', 'run', '--machines', 'localhost', './run'],
    ['--machines', 'localhost', '--copy-forwards', 'run', '--', 'sh run']])
def test_a_file_that_can_be_run_is_a_command(run_cli, project, words):
    (project / 'run').write_text('#!/bin/sh\necho ran\n')
    (project / 'run').chmod(0o755)
    done = run_cli('execute_to', *words)
    assert (done.returncode, done.stdout) == (0, 'localhost: ran\n'), done.stderr


@pytest.mark.parametrize('words', [['status'], ['status', '--machines', 'lab1']])
def test_an_option_without_dashes_is_not_taken_for_the_batch_file(words):
    stdout, stderr, status = call_main('execute_batch', *words)
    assert (stdout, status, stderr.splitlines()[0]) == (
        '', 2, 'execute_batch: there is no batch file status (did you mean --status?).')


# ---- The current folder ----

WORDS = {'execute_batch': ['batch.sh', '--machines', 'localhost'],
         'execute_remote': ['--machine', 'localhost', 'true'],
         'execute_to': ['--machines', 'localhost', '--', 'true'],
         'query_machines': ['--machines', 'localhost']}


@pytest.mark.parametrize('command', WORDS)
def test_a_folder_that_was_removed_is_one_sentence(scheduler, client_env, project, command):
    line = f'rmdir {project}; exec "$@"'
    done = subprocess.run(['bash', '-c', line, 'bash', sys.executable, scheduler, command,
                           *WORDS[command]], env=client_env, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, '', f'{command}: the current folder was removed: cd to another folder.\n')


@pytest.mark.parametrize('command', WORDS)
def test_a_home_that_is_not_there_is_one_sentence(run_cli, project, command):
    (project / 'batch.sh').write_text('true\n')
    done = run_cli(command, *WORDS[command], env={'HOME': '/nowhere'})
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.splitlines()[-1] == (
        f'{command}: your HOME, the folder /nowhere, does not exist.')


@pytest.mark.parametrize('command', WORDS)
def test_a_locale_that_is_not_utf8_is_one_sentence(run_cli, project, command):
    locale = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = run_cli(command, *WORDS[command], env=locale)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, '', f'{command}: the locale here is not UTF-8. Try: export PYTHONUTF8=1\n')
    assert run_cli(command, '--version', env={**locale, 'PYTHONUTF8': '1'}).returncode == 0


@pytest.mark.parametrize('option', ['--help', '-h'])
def test_the_help_of_the_file_has_a_line_for_each_command(option):
    assert call_main('x.py', option) == (ssh_scheduler.OVERVIEW, '', 0)
    for command in ssh_scheduler.COMMANDS:
        first = {**USAGES, **OTHER_USAGES}[command].splitlines()[0]
        assert len(re.findall(rf'(?m)^  {command} +{re.escape(first)}$',
                              ssh_scheduler.OVERVIEW)) == 1


def test_the_version_of_the_file_is_shown():
    assert call_main('x.py', '--version') == (f'ssh_scheduler {ssh_scheduler.__version__}\n', '', 0)


@pytest.mark.parametrize(('words', 'expected'), [
    ([], '<command> is missing.'), ([''], '<command> is missing.'),
    (['execute_bach'], 'there is no command execute_bach (did you mean execute_batch?).'),
    (['batch', '--help'], 'there is no command batch (did you mean execute_batch?).'),
    (['--verbose', 'execute_batch'], 'there is no command --verbose.'),
    (['\x1b[m'], r'there is no command \x1b[m.')])
def test_without_a_command_all_are_shown(words, expected):
    stdout, stderr, status = call_main('x.py', *words)
    assert (stdout, status) == ('', 2)
    said, shown = stderr.split('\n', 1)
    assert said == f'ssh_scheduler: {expected}'
    assert shown in ssh_scheduler.OVERVIEW and all(name in shown for name in ssh_scheduler.COMMANDS)
