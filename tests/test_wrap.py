"""Wrappers of jobs (`wrap:` of a machine file): its allowed values, and jobs in real wrappers."""
import re
import shlex
import signal
import subprocess
import textwrap
import types
from pathlib import Path

import pytest
from batching import NO_GPU, RESULTS, assert_clean, result, wrote
from commands import Running, assert_ended, at_terminal, nasty_pids, nasty_tree
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_past import ask, claims, heads, journal, lines_of  # noqa: F401
from test_runner_script import channel, env  # noqa: F401
from test_visits import variables

import ssh_scheduler as s

ANY = settings(deadline=None, derandomize=True, max_examples=150,
               suppress_health_check=[HealthCheck.function_scoped_fixture])

# A container made by the kernel alone.  It has the job's folder, and an empty folder in place of
# all else that the program keeps on the machine.
CONTAINER = r'''
cd "$HOME/.."
mkdir -p aside && mount --bind "$OLDPWD" aside && mount -t tmpfs none "$HOME/.ssh_scheduler" &&
  mkdir -p "$OLDPWD" && mount --bind aside "$OLDPWD" && cd "$OLDPWD" && exec "$@"
'''
# This wrapper ignores TERM and does not pass it on.
DEAF = """bash -c 'trap "" TERM INT HUP; "$@"; exit "$?"' deaf"""


def in_container():
    """Return the `wrap` of a machine with such containers; skip if the kernel allows none."""
    can = subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'none', '/mnt'],
                         capture_output=True, check=False)
    if can.returncode:
        pytest.skip('no mount namespace can be had here')
    return f'unshare -rm bash -c {shlex.quote(CONTAINER).replace("{", "{{").replace("}", "}}")} in'


@pytest.fixture
def start(start_cli, project):
    """Start execute_remote: start(machine file, command, *options) -> Running."""
    def begin(yaml, command, *options, stdin=subprocess.DEVNULL):
        return Running(start_cli('execute_remote', *options, '--machine', yaml, '--', command,
                                 binary=True, stdin=stdin))

    return begin


@pytest.fixture
def run(start):
    """Run execute_remote to its end."""
    return lambda *words, **streams: start(*words, **streams).end()


# ---- Values in the file ----

@pytest.fixture
def read(project):
    """Return the `wrap` that is read from a machine file with this text for the key."""
    def reading(wrap):
        (project / 'lab.yaml').write_text(f'ip: lab\nmax_jobs: 3\nwrap: {wrap}\n')
        return s.read_machine_file('lab.yaml', 'lab').wrap

    return reading


@pytest.fixture
def complaint(read):
    def complaining(wrap):
        with pytest.raises(s.MachineFileError) as caught:
            read(wrap)
        return str(caught.value)

    return complaining


def filled(wrap):
    return s.fill_placeholders(wrap, {'cores': '1.5', 'memory_mb': '200', 'gpu_ids': '0,3',
                                      'gpus': '2', 'name': 'batch.sh.7'})


@pytest.mark.parametrize('wrap, words', [
    ('apptainer exec --nv image.sif', 'apptainer exec --nv image.sif'),
    ('''docker run --gpus '"device={gpu_ids}"' -v "$PWD:$PWD" -w "$PWD" my/image''',
     '''docker run --gpus '"device=0,3"' -v "$PWD:$PWD" -w "$PWD" my/image'''),
    ('systemd-run --user --scope -p MemoryMax={memory_mb}M', 'systemd-run --user --scope -p '
     'MemoryMax=200M'),
    ('run -c{cores} -g{gpus} "{name}"', 'run -c1.5 -g2 "batch.sh.7"'),
    ('run "${{PWD%/jobs/*}}" {{{name}}} {{name}}', 'run "${PWD%/jobs/*}" {batch.sh.7} {name}'),
    ('run --user "$(id -u "me"):$(id -g)" $((2 * {memory_mb})) `id`',
     'run --user "$(id -u "me"):$(id -g)" $((2 * 200)) `id`'),
    ('|-\n  run a#b\n    $\'it\\\'s\' "(" \\; \'#\'', 'run a#b\n  $\'it\\\'s\' "(" \\; \'#\''),
    ('run "$(echo ")")" "$(echo \'"\')" "${{X:-"a b"}}"',
     'run "$(echo ")")" "$(echo \'"\')" "${X:-"a b"}"'),
    ("run ${{X:-'}}'}} x", "run ${X:-'}'} x"),
    ('run $$""{gpus}', 'run $$""2'),
])
def test_what_bash_gets(read, wrap, words):
    assert filled(read(wrap)) == words
    assert subprocess.run(['bash', '-n', '-c', f'words=(\n{words}\n)']).returncode == 0


@pytest.mark.parametrize('wrap, why', [
    ('run {gpu}', 'unknown placeholder {gpu} (did you mean gpu_ids or gpus?)'),
    ('run {CORES }', 'unknown placeholder {CORES } (did you mean cores?)'),
    ('run {} {cores}', 'unknown placeholder {}'),
    ('run {cores', "the placeholder '{cores' is not closed"),
    ('run {cor{{es}', "the placeholder '{cor{{es}' is not closed"),
    ('run cores}', 'a } closes nothing'),
    ('run {{cores}', 'a } closes nothing'),
    ('run ${name}', '${name} is neither a placeholder nor a variable of bash. Write ${{name}} for '
     'the variable, or quotes between the two'),
    ('run "$PREFIX{gpus}"', '$PREFIX{gpus} is neither a placeholder nor a variable of bash. Write '
     '${{gpus}} for the variable, or quotes between the two'),
])
def test_what_is_no_placeholder(complaint, wrap, why):
    assert complaint(wrap) == (
        f'lab.yaml, line 3: wrap: {why}. The placeholders are {{cores}}, {{memory_mb}}, '
        '{gpu_ids}, {gpus}, {name}; write {{ and }} for braces.')


@pytest.mark.parametrize('wrap, why', [
    ('run; rm x', '; stands without quotes'),
    ('run && x', '& stands without quotes'),
    ('run | x', '| stands without quotes'),
    ('run >x', '> stands without quotes'),
    ('run <(x)', '< stands without quotes'),
    ('run (x)', '( stands without quotes'),
    ('run) ; rm x; y=(', ') stands without quotes'),
    ('|\n  run\n  # x', 'a word begins with # without quotes'),
    ('run [0]=x', 'a word begins with [ without quotes'),
    ('run "x', 'a " is missing'),
    ("run it's", "a ' is missing"),
    ("run $'it\\'", "a ' is missing"),
    ('run $(x', 'a ) is missing'),
    ('run ${{x', 'a } is missing'),
    ('run `x', 'a ` is missing'),
    ('CUDA=1 run', 'it begins with a variable. Write: env CUDA=…'),
])
def test_what_are_no_words(complaint, wrap, why):
    assert complaint(wrap) == f'lab.yaml, line 3: wrap must be words of one command: {why}.'


@pytest.mark.parametrize('wrap', ['', '" "', '[a, b]', '5', f'run {"x" * 2000}', r'"run \x02"'])
def test_what_is_no_text_of_words(complaint, wrap):
    assert complaint(wrap).startswith(
        'lab.yaml, line 3: wrap must be words of bash, with at most 2000 characters, not ')


def test_the_examples_of_the_docs(project):
    text = (Path(__file__).parent.parent / 'docs/options.md').read_text()
    examples = [textwrap.dedent(block) for block in re.findall(
        r'(?ms)^ *```yaml\n(.*?)^ *```', text) if 'wrap:' in block]
    wraps = []
    for number, lines in enumerate(examples):
        (project / f'{number}.yaml').write_text(f'ip: lab\n{lines}')
        wraps.append(filled(s.read_machine_file(f'{number}.yaml', 'lab').wrap))
    assert [wrap.split()[0] for wrap in wraps] == ['apptainer', 'docker']
    assert '"device=0,3"' in wraps[1] and wraps[1].endswith(' my/image')


def test_a_wrong_one_is_an_error(run_cli, project):
    (project / 'lab.yaml').write_text('ip: 127.0.0.1\nport: 1\nwrap: run {cpus}\n')
    done = run_cli('execute_remote', '--machine=lab.yaml', 'true')
    assert (done.returncode, done.stdout) == (2, '')
    assert 'lab.yaml, line 3: wrap: unknown placeholder {cpus}' in done.stderr


# `$(...)` and the like are left out: only the machine knows what they contain.
@ANY
@given(st.lists(st.sampled_from([*'ab \n;&|<>()#[]{}!=~$', "'", '"', '\\$', '\\"', "\\'", "$'",
                                 '${', '`']), min_size=1, max_size=12).map(''.join))
@example("'\n'#")
@example("$'a\\''#")
@example('"$\'x"')
def test_bash_takes_for_words_what_is_let_pass(text):
    if not text.isspace() and '$(' not in text and '$[' not in text and (
            text.count('`') < 2 and not s.why_no_words(text)):
        said = subprocess.run(['bash', '-n', '-c', f'words=(\n{text}\n)'], capture_output=True,
                              text=True, check=False)
        assert said.returncode == 0, said.stderr


NAMES = st.text('abcXYZ019._+=@%-', min_size=1, max_size=9).filter(
    lambda name: name[0] not in '.-')
VALUES = st.fixed_dictionaries({
    'cores': st.sampled_from(['1', '0.5', '12.125']), 'memory_mb': st.integers(0, 10**6).map(str),
    'gpu_ids': st.lists(st.integers(0, 15), max_size=4).map(lambda ids: ','.join(map(str, ids))),
    'gpus': st.integers(0, 9).map(str), 'name': NAMES})
# Parts of a word: text, or a placeholder between quotes of some kind.
PARTS = st.lists(st.tuples(
    st.sampled_from(['', "'", '"', '$']), st.sampled_from(s.PLACEHOLDERS)
    | st.text('a {}$"\'\\`*~;#é\n', min_size=1, max_size=4)), min_size=1, max_size=4)


@ANY
@given(words=st.lists(PARTS, min_size=1, max_size=4), values=VALUES)
def test_values_are_text_wherever_they_stand(words, values):
    """The values pass through bash unchanged; so does all other text, with its braces."""
    wrap, expected = '', []
    for word in words:
        expected.append('')
        wrap += ' '
        for quotes, part in word:
            if part in s.PLACEHOLDERS:
                end = quotes.replace('$', "'")
                begin = "$'" if quotes == '$' else quotes
                wrap += f'{begin}{{{part}}}{end}'
                expected[-1] += values[part]
            else:
                wrap += shlex.quote(part).replace('{', '{{').replace('}', '}}')
                expected[-1] += part
    # An empty word without quotes is no word.
    expected = [word for word, parts in zip(expected, words) if word or any(
        quotes or part not in s.PLACEHOLDERS for quotes, part in parts)]
    s.check_wrap(f'x{wrap}', 'here')
    text = s.fill_placeholders(wrap, values)
    said = subprocess.run(['bash', '-c', f'words=(\n{text}\n)\nprintf "%s\\0" "${{words[@]}}"'],
                          capture_output=True, check=True).stdout.decode()
    assert said.split('\0')[:-1] == (expected or [''])


@pytest.mark.parametrize('allocation, gpus, values', [
    (s.Allocation(2, 3000, gpus=2), (1, 3), ('2', '3000', '1,3', '2')),
    (s.Allocation(0.0625, 0, gpus=0), (), ('0.062', '0', '', '0')),
    (s.Allocation(100, 1, gpus=1), (0,), ('100', '1', '0', '1')),
    (s.Allocation(reserve=True, gpus=1), (2,), ('\2', '\3', '0,2,5', '3')),
    (s.Allocation(reserve=True, gpus=0), (), ('\2', '\3', '', '0')),
    (None, (), ('\2', '\3', '', '0')),
])
def test_the_values_of_an_attempt(allocation, gpus, values):
    placement = allocation and s.Placement(1, allocation, gpus)
    capacity = types.SimpleNamespace(gpus=[s.Gpu(index, 1) for index in (0, 2, 5)])
    attempt = types.SimpleNamespace(
        name='a.1', placement=placement,
        machine=types.SimpleNamespace(capacity=capacity, machine=s.Machine('a')),
        gpus=placement and placement.visible_gpus)
    assert s.values_of(attempt) == dict(zip(s.PLACEHOLDERS, (*values, 'a.1')))


def test_without_the_key_nothing_more_is_sent():
    sent = []
    worker = types.SimpleNamespace(
        client=None, machine=s.Machine('a'),
        contact=types.SimpleNamespace(send=lambda *words: sent.append(words)))
    attempt = types.SimpleNamespace(
        job=s.Job('a', 'true', 1, None, s.Forwards()), how=s.How(), key='a.1-0', gpus=None,
        placement=None, name='a', stage=types.SimpleNamespace(id='1'), machine=worker)
    control = s.JobControl(worker)
    control.send_start(attempt)
    start = ('start', 'a.1-0', '1', '-', '0 0 0', '', '', 'true', 'changed')
    assert sent == [start]
    worker.machine = s.Machine('a', wrap='nice -n {gpus}')
    control.send_start(attempt)
    assert sent == [start, ('wrap', 'a.1-0', 'nice -n 0'), start]


def test_a_start_that_comes_later_has_its_words(channel):       # noqa: F811
    """Other jobs may start between the two requests."""
    runner = channel()
    runner.ready()
    runner.send('wrap', 'b.1', 'env "A=b  \3"')
    runner.start('a', 'echo "<$A>"')
    assert runner.ended('a')[:2] == (0, '=<>\n')
    runner.start('b', 'echo "<${A%% [0-9]*}>"')
    assert runner.ended('b')[:2] == (0, '=<b >\n')
    runner.start('c', 'echo "<$A>"')
    assert runner.ended('c')[:2] == (0, '=<>\n')


# ---- Jobs ----

# All that a job can find out about its start, except what differs in each start.
LOOK = r'''
echo "$0 $# $LINENO" | sed 's/[0-9]*-.*-[0-9a-f]* / /'
env -0 >env; umask; ulimit -a; pwd -P | sed 's/work.*/work/'
read -r _ _ _ _ group _ <"/proc/$$/stat"; ((group == $$)) && echo leader
ls /proc/$$/fd >fds; grep -vc 255 fds; cat; echo error >&2
f() { echo "$LINENO" "${FUNCNAME[0]}"
}; f
undefined_command
exit 9'''


def without_key(text):
    """Return the text without the parts that differ between the starts of two jobs."""
    return re.sub(rb'\.\./[^ :]+', b'KEY', text)


def test_a_job_is_as_without_it(start, lab1):
    looks = []
    for name, wrap in (('plain', None), ('wrapped', 'nice -n 0')):
        done = start(lab1.yaml(wrap=wrap, env={'OF_FILE': 'a "b'}), LOOK, '--job-name', name)
        done.end()
        looks.append((done.status, without_key(done.out), without_key(done.err),
                      variables((RESULTS / name / 'env').read_text())))
    plain, wrapped = looks
    assert wrapped[0] == plain[0] == 9
    assert wrapped[1].splitlines() == plain[1].splitlines()
    assert b'leader' in plain[1] and b'KEY: line 8: undefined_command' in plain[2]
    assert wrapped[2] == plain[2]
    assert {**wrapped[3], 'SSH_SCHEDULER_JOB': 'plain'} == plain[3]
    assert plain[3]['OF_FILE'] == 'a "b'
    assert_clean(lab1)


def test_jobs_of_a_batch_have_their_values(batches, lab1):
    yaml = lab1.yaml(
        wrap='env C={cores} M={memory_mb} I={gpu_ids} G={gpus} N={name} nice -n {gpus}')
    show = 'echo $C $M $I $G $N $CUDA_VISIBLE_DEVICES; nice'
    lines = [show, f"execute_remote --num-gpus 1 '{show}'",
             f"execute_remote --job-name=own '{show}'"]
    done = batches.run(lines, [yaml], '--num-cpus=1.5', '--memory-required=300', '--num-gpus=2')
    assert done.returncode == 0, done.stderr
    assert result('batch.sh.1') == b'1.5 300 0,1 2 batch.sh.1 0,1\n12\n'
    of_one, nice = result('batch.sh.2').splitlines()
    assert (of_one, nice) in ((b'1.5 300 0 1 batch.sh.2 0', b'11'),
                              (b'1.5 300 1 1 batch.sh.2 1', b'11'))
    assert result('own') == b'1.5 300 0,1 2 own 0,1\n12\n'
    assert_clean(lab1)


def test_a_job_that_asks_for_nothing_may_have_the_machine(run, batches, lab1):
    yaml = lab1.yaml(wrap='env C={cores} M={memory_mb} I="<{gpu_ids}>" G={gpus}')
    show = 'echo $C $M "$I" $G'
    machine = re.search(r'MemTotal: *([0-9]+)', (lab1.proc / 'meminfo').read_text())
    memory = int(machine[1]) // 1024
    assert run(yaml, show).out == f'8 {memory} <> 0\n'.encode()
    batches.run([show], [yaml], '--reserve', '--memory-required=100')
    assert result('batch.sh.1') == f'8 {memory} <0,1> 2\n'.encode()


def test_bash_reads_the_words_in_the_folder_of_the_job(run, lab1):
    wrap = (r'''env "W=$PWD" 'S=$HOME "x"' F="$OF_FILE" D="$(echo "a  b")" J=$SSH_SCHEDULER_JOB '''
            r'''L="$(echo *.txt)" {{B1,B2}}=x''')
    (RESULTS.parent / 'sent.txt').write_text('')
    done = run(lab1.yaml(wrap=wrap, env={'OF_FILE': '$HOME  *'}),
               '[ "$W" = "$PWD" ] && echo "$S|$F|$D|$J|$L|$B1$B2"', '--job-name=j')
    assert done.out == b'$HOME "x"|$HOME  *|a  b|j|sent.txt|xx\n', done


def test_a_container_that_has_the_folder_of_the_job_only(batches, lab1):
    (RESULTS.parent / 'sent.txt').write_text('sent')
    line = 'ls .. | wc -l; cat sent.txt; echo "${0%/*} $LINENO" >made; exit 3'
    done = batches.run([line], [lab1.yaml(wrap=in_container())], *NO_GPU)
    assert done.returncode == 1, done
    assert result('batch.sh.1') == b'1\nsent', result('batch.sh.1', 'err')
    assert (RESULTS / 'batch.sh.1/made').read_text() == '.. 1\n'
    assert result('batch.sh.1', 'err') == b''
    assert_clean(lab1)


def test_an_environment_that_is_cleared(batches, lab1):
    batches.run(['env | cut -d= -f1 | sort | xargs', 'exit 5'],
                [lab1.yaml(wrap='env -i "PATH=$PATH"')], *NO_GPU)
    assert result('batch.sh.1') == b'PATH PWD SHLVL _\n'
    assert claims()['batch.sh.2']['wrap'] == 'env -i "PATH=$PATH"'


@pytest.mark.parametrize('size, seen', [(100_000, b'-c'), (300_000, b'')])
def test_long_commands(batches, lab1, size, seen):
    """bash reads a command of more than 128 KiB from a file."""
    line = f': {"x" * size}; echo "$-" | grep -o c; tail -c 5 "$0" | wc -c'
    done = batches.run([line], [lab1.yaml(wrap='nice -n 1')], *NO_GPU)
    assert done.returncode == 0, done.stderr
    assert result('batch.sh.1') == seen.replace(b'-c', b'c\n') + b'5\n'


def test_functions_of_the_login_are_for_the_job_alone(batches, lab):
    machine = lab(startup={'.bashenv': '[ -z "$SSH_SCHEDULER_JOB" ] || echo read\n', '.bashrc': '''
        export BASH_ENV=~/.bashenv
        hello() { echo "hello $1"; }
        timeout() { echo of the login; }; export -f timeout
        type() { echo of the login; }
    '''})
    batches.run(['hello ben; timeout; type'], [machine.yaml(wrap='timeout 60')], *NO_GPU)
    assert result('batch.sh.1') == b'read\nhello ben\nof the login\nof the login\n'


@pytest.mark.parametrize('wrap, word', [
    ('no-such-wrapper --x', 'no-such-wrapper'), ('"/no/such wrapper"', '/no/such wrapper'),
    ('$NOTHING', '""'), ('"$NOTHING" x', '""'), ('-x', '-x'), ('/etc/passwd', '/etc/passwd')])
def test_a_wrapper_that_is_not_there(run, lab1, wrap, word):
    done = run(lab1.yaml(wrap=wrap), 'echo ran')
    assert (done.status, done.out) == (127, b'')
    assert done.notes[1] == (f'ssh-scheduler: the wrapper {word} is missing on this machine, or '
                             'is no program (wrap: of the machine file)')


def test_status_and_signals_come_through(batches, lab1):
    batches.run(['exit 7', 'kill -9 $$', 'kill -TERM 0'],
                [lab1.yaml(wrap='nice -n 1')], *NO_GPU)
    ends = {event['job']: event['exit_code'] for event in journal() if event['event'] == 'ended'}
    assert [ends[f'batch.sh.{line}'] for line in (1, 2, 3)] == [7, 137, 143]


def test_a_command_on_many_machines(run_cli, project, lab1, lab2):
    machines = [lab1.yaml(wrap='env A={gpus} nice -n 4'), lab2.yaml()]
    done = run_cli('execute_to', '--machines', *machines, '--', 'echo "$A" $(nice)')
    assert done.returncode == 0, done
    assert sorted(line.rpartition(': ')[2] for line in done.stdout.splitlines()) == [' 0', '0 4']


def test_its_input_comes_through(start, lab1):
    done = start(lab1.yaml(wrap='nice -n 1'), 'cat; nice', '--stdin', stdin=subprocess.PIPE)
    done.process.stdin.write(b'\0in\n')
    done.process.stdin.close()
    assert (done.end().status, done.out) == (0, b'\0in\n1\n')


def test_a_terminal_comes_through(scheduler, client_env, project, lab1):
    yaml = lab1.yaml(wrap='nice -n 3 env "A=a  b"')
    with at_terminal(scheduler, client_env, 'execute_remote', '--machine', yaml, '--tty', '--',
                     'read -r line; stty size; nice; echo "<$A> <$line> ${0%/*}"; exit 6') as at:
        at.type(b'typed\n')
        assert at.end() == 6
    said = bytes(at.said).replace(b'\r', b'')
    assert b'30 90\n3\n<a  b> <typed> ..\n' in said


def test_a_shell_beside_it(start_cli, start, lab1, gate, outside, ledger):
    yaml = lab1.yaml(wrap='nice -n 3', env={'OF_FILE': 'x'})
    job = start(yaml, f'echo mine >made; env -0 >{outside}/env; echo ran $(nice) >>{ledger}; '
                f'{gate.wait("end")}', '--job-name=job')
    wrote(ledger, 'ran 3')
    visit = Running(start_cli('execute_remote', '--shell', 'job', binary=True))
    visit.process.stdin.write(f'cat made; nice; env -0 >{outside}/shell'.encode())
    visit.process.stdin.close()
    assert (visit.end().status, visit.out) == (0, b'mine\n0\n'), visit
    gate.open('end')
    assert job.end().status == 0
    assert variables((outside / 'shell').read_text()) == variables((outside / 'env').read_text())


@pytest.mark.parametrize('wrap, inside', [
    (DEAF, b'\0deaf\0'), (f'env -i "PATH=$PATH" setsid -w {DEAF}', b'\0deaf\0'),
    ('unshare -rpf', b'<1>')])
def test_a_time_limit_in_a_wrapper_that_tells_nobody(run, lab1, ledger, wrap, inside):
    if wrap.startswith('unshare'):
        in_container()
    done = run(lab1.yaml(wrap=wrap), f'echo begun >>{ledger}; echo "<$$>"; '
               'cat /proc/$PPID/cmdline; sleep 1000 & wait', '--timeout=2', '--job-name=late')
    assert done.status == 124
    assert inside in done.out
    assert ledger.read_text() == 'begun\n'
    assert_clean(lab1)


def test_a_cancel_in_a_wrapper_that_tells_nobody(start, lab1, ledger):
    job = start(lab1.yaml(wrap=DEAF), f'cat /proc/$PPID/cmdline; {nasty_tree(ledger)}',
                '--job-name=tree')
    pids = nasty_pids(ledger)
    job.until(b'\0deaf\0')
    job.until(b'started')
    job.signal(signal.SIGINT)
    assert job.end().status == 130
    assert_ended(pids)
    assert_clean(lab1)


# ---- Where a wrapper is shown ----

def test_where_it_is_seen(batches, ask, lab1):     # noqa: F811
    yaml = lab1.yaml(wrap='nice -n {gpus}\n  env "A={name}"')
    told = 'nice -n {gpus}\\n  env "A={name}"'
    done = batches.run(['echo $A'], [yaml], '--dry-run', *NO_GPU)
    assert f'would start: batch.sh.1 on lab1, wrapped in {told};  echo $A' in (
        done.stdout.replace(str(yaml), 'lab1')), done.stdout
    assert not (RESULTS / 'batch.sh.1.out').exists()
    batches.run(None, [yaml], *NO_GPU)
    assert claims()['batch.sh.1']['wrap'] == 'nice -n {gpus}\n  env "A={name}"'
    assert heads(ask('--what', 'batch.sh.1'))['wrapped in'] == [told]
    assert result('batch.sh.1') == b'batch.sh.1\n'
    again = lines_of(ask('--reproduce', 'batch.sh.1', '--machines', lab1.yaml()))
    assert f'not the same: wrap none (then {told})' in again
    batches.run(['echo $A', 'true'], [lab1.yaml()], *NO_GPU)
    assert 'wrap' not in claims()['batch.sh.2']
    assert 'wrapped in' not in heads(ask('--what', 'batch.sh.2'))
