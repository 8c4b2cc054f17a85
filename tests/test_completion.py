"""--completion: what bash, zsh and fish complete with the scripts, and the man pages."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import rig

import combine_folders
import results_table
import ssh_scheduler

ROOT = Path(__file__).resolve().parent.parent
SHELLS = ('bash', 'zsh', 'fish')
USAGES = {
    'execute_batch': ssh_scheduler.EXECUTE_BATCH_USAGE,
    'execute_remote': ssh_scheduler.EXECUTE_REMOTE_USAGE,
    'execute_to': ssh_scheduler.EXECUTE_TO_USAGE,
    'query_machines': ssh_scheduler.QUERY_MACHINES_USAGE,
    'combine_folders': combine_folders.USAGE,
    'results_table': results_table.USAGE,
}
OPTION = r'(?m)^  (?:-\w )?(--[a-z-]+)'


def file_of(command):
    """Return the words to call the command by: its file, and its name if the file has several."""
    alone = ROOT / f'{command}.py'
    return [alone] if alone.exists() else [ROOT / 'ssh_scheduler.py', command]


def call(command, *words):
    """Run the command as a copied file; return the process that has ended."""
    return subprocess.run([sys.executable, *map(str, file_of(command)), *words],
                          capture_output=True, text=True, timeout=rig.SAFETY_NET_S)


def script_of(command, shell):
    return ssh_scheduler.completion(USAGES[command], shell)


@pytest.fixture
def person(tmp_path):
    """A home with machines, and a folder with a batch and results; return the environment."""
    home, folder = tmp_path / 'home', tmp_path / 'project'
    for path in (home / '.ssh', home / '.local/var', folder / 'data',
                 folder / 'job_results/.ssh_scheduler/commands/train-0412'):
        path.mkdir(parents=True)
    (home / '.ssh/config').write_text(
        'Host gpu1 gpu2 *.lab !gpu9 gpu? $(touch$IFS"bad")\n  HostName 192.0.2.1\n'
        'Match host gpu7\nhost=gpu3\n\tHOST "gpu4"   # gpu5\n#Host gpu6\n')
    (home / '.local/var/gpu-cluster.yaml').touch()
    (home / '.local/var/gpu-notes.txt').touch()
    (folder / 'gpu8.yaml').touch()
    (folder / 'b.sh').write_text('true\n')
    results = folder / 'job_results/.ssh_scheduler'
    for journal, jobs in ((results / 'journal', ('b.sh.1', 'b.sh.2', 'b.sh.1')),
                          (results / 'commands/train-0412/journal', ('train-0412',))):
        journal.write_text('{"event": "journal", "identity": "1", "version": 2}\n' + ''.join(
            f'{{"event": "claimed", "job": "{job}", "attempt": 1, "machine": "gpu1"}}\n'
            f'{{"event": "ended", "job": "{job}", "exit_code": 0}}\n' for job in jobs))
    return {'HOME': str(home), 'PATH': os.environ['PATH'], 'TERM': 'dumb', 'LC_ALL': 'C.UTF-8',
            'PWD': str(folder)}


def in_bash(script, line, env):
    words = shlex.split(re.sub(r'=(\S*)$', r' = \1', line))     # as readline's word breaks do
    words += [''] * (line[-1] in ' =')
    command = words[0]
    return ['bash', '--norc', '-c', f'{script}\nCOMP_WORDS=({shlex.join(words)})\n'
            f'COMP_CWORD={len(words) - 1}\n_{command}\nprintf "%s\\n" "${{COMPREPLY[@]}}"']


def in_zsh(script, line, env):
    """Complete in a second zsh with its own terminal: zsh completes only in its line editor."""
    driver = r'''
zmodload zsh/zpty
zpty inner zsh -f -i
zpty -w inner "PS1='' PS2='' PROMPT_EOL_MARK='' && autoload -Uz compinit && compinit -u -D"
zpty -w inner "source $HOME/script; unsetopt auto_list; setopt no_always_to_end"
zpty -w inner "zstyle ':completion:*' matcher-list ''; unset 'zle_bracketed_paste'"
# What compadd would show goes to a file.
zpty -w inner 'compadd() {
    [[ " $* " == *" -O "* || " $* " == *" -A "* || " $* " == *" -D "* ]] ||
        { local -a all; builtin compadd -O all "$@"; print -rl -- $all >>$HOME/shown; }
    builtin compadd "$@"; }'
zpty -w inner 'done-it() { print -r -- END >>$HOME/shown; }; zle -N done-it; bindkey "^X^E" done-it'
zpty -w -n inner "$LINE"$'\t\C-x\C-e'
'''
    Path(env['HOME'], 'script').write_text(script)
    os.mkfifo(Path(env['HOME'], 'shown'))
    env['LINE'] = line
    return ['zsh', '-f', '-c', driver + '''
while IFS= read -r found; do
    [[ $found != END ]] || break
    print -r -- $found
done <>$HOME/shown
zpty -d inner
''']


def in_fish(script, line, env):
    return ['fish', '--no-config', '-c', f'{script}\ncomplete -C {shlex.quote(line)}']


def completed(shell, line, env):
    """Return the set of words that the shell offers at the end of the line."""
    if not rig.program(shell):
        pytest.skip(f'{shell} is not installed')
    script = script_of(line.split()[0], shell)
    argv = {'bash': in_bash, 'zsh': in_zsh, 'fish': in_fish}[shell](script, line, env)
    done = subprocess.run(argv, env=env, cwd=env['PWD'], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=rig.SAFETY_NET_S)
    assert not done.stderr, done.stderr
    shown = {one.partition('\t')[0].rstrip('/') for one in done.stdout.splitlines()} - {''}
    assert not Path(env['PWD'], 'bad').exists()
    return {re.sub('^--[a-z-]+=', '', one) for one in shown}


JOBS = {'b.sh.1', 'b.sh.2', 'train-0412'}
MACHINES = {'gpu1', 'gpu2', 'gpu3', 'gpu4', 'gpu-cluster', 'gpu8.yaml'}


@pytest.mark.parametrize('shell', SHELLS)
@pytest.mark.parametrize('line, expected', [
    ('execute_batch --ma', {'--machines', '--max-result-size'}),
    ('execute_batch --machines gpu', MACHINES),
    ('execute_batch --machines=gpu', MACHINES),
    ('execute_batch b.sh --machines gpu1 gpu', MACHINES),           # a list continues
    ('execute_batch --machines lo', {'localhost'}),
    ('execute_batch b.sh --drop-machine gpu2', {'gpu2'}),
    ('execute_batch b.sh --cancel ', JOBS),
    ('execute_batch b.sh --rerun b.sh.1 b.sh.2 tr', {'train-0412'}),
    ('execute_batch b.sh --follow b', {'b.sh.1', 'b.sh.2'}),
    ('execute_batch --what b', {'b.sh.1', 'b.sh.2'}),
    ('execute_batch --what b.sh.1 b', {'b.sh'}),                    # one value, then a batch
    ('execute_batch --timeout ', set()),
    ('execute_batch b', {'b.sh'}),
    ('execute_batch --machines gpu1 -- --m', set()),                # no options behind --
    ('execute_batch --earlier ', {'show', 'collect', 'remove'}),
    ('execute_batch --completion=', {*SHELLS}),
    ('execute_remote --attach t', {'train-0412'}),
    ('execute_remote --shell b.sh.2', {'b.sh.2'}),
    ('execute_remote --machine gpu3', {'gpu3'}),
    ('execute_to --machines gpu1 --fan', {'--fanout'}),
    ('query_machines --machines gpu-', {'gpu-cluster'}),
    ('combine_folders --on', {'--on-conflict'}),
    ('combine_folders --on-conflict ', {'error', 'rename'}),
    ('combine_folders d', {'data'}),
    ('results_table --me', {'--metric', '--mean-over'}),
    ('results_table job', {'job_results'}),
])
def test_a_shell_completes(person, shell, line, expected):
    assert completed(shell, line, person) == expected


@pytest.mark.parametrize('shell', SHELLS)
@pytest.mark.parametrize('command', USAGES)
def test_a_shell_completes_all_options_and_the_script_has_no_fault(person, shell, command):
    options = {*re.findall(OPTION, USAGES[command])}
    assert len(options) > 8
    assert {one for one in completed(shell, f'{command} --', person) if one != '-h'} == options


def test_bash_completes_at_a_terminal(person, tmp_path):
    script = tmp_path / 'script'
    script.write_text(script_of('execute_batch', 'bash'))
    Path(person['PWD'], 'two words.yaml').touch()
    with commands.Terminal([rig.program('bash'), '--norc', '-i'], person) as terminal:
        terminal.type(f'cd {person["PWD"]}; source {script}\n'
                      'execute_batch() { printf "<%s>" "$@"; }; echo rea""dy\n'.encode())
        terminal.until(b'ready')
        terminal.type(b'execute_batch b.s\t--drop\tgpu-\ttwo\\ \tda\t --timeout \tx\n')
        terminal.until(rb'<b.sh><--drop-machine><gpu-cluster><two words.yaml><data/><--timeout><x>')


@pytest.mark.parametrize('shell', SHELLS)
@pytest.mark.parametrize('command', USAGES)
def test_a_command_prints_the_script(command, shell):
    done = call(command, '--completion', shell)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    assert done.stdout == script_of(command, shell)


@pytest.mark.parametrize('command', USAGES)
@pytest.mark.parametrize('words, why', [
    (['--completion', 'csh'], "--completion must be bash, zsh or fish, not 'csh'."),
    (['--completion'], '--completion needs a shell.')])
def test_another_shell_is_one_sentence(command, words, why):
    done = call(command, *words)
    assert (done.returncode, done.stdout) == (2, '')
    said = done.stderr.splitlines()[0].replace('needs a value.', 'needs a shell.')
    assert said == f'{command}: {why}'


def test_the_section_is_the_same_in_all_modules():
    pattern = r'(?ms)^# ---- Completion: .*?(?=^# ---- Options)'
    sections = {re.search(pattern, (ROOT / name).read_text(encoding='utf-8'))[0] for name in (
        'ssh_scheduler.py', 'combine_folders.py', 'results_table.py')}
    assert len(sections) == 1


@pytest.mark.parametrize('command', USAGES)
def test_a_man_page_has_the_whole_usage_text(command, tmp_path):
    """Each word of the text is there, in its order, and each option begins a paragraph."""
    done = subprocess.run([sys.executable, ROOT / '.ci/manual', command], capture_output=True,
                          text=True, timeout=rig.SAFETY_NET_S)
    assert (done.returncode, done.stderr) == (0, '')
    options = {*re.findall(OPTION, USAGES[command])}
    begun = re.findall(r'(?m)^\.TP\n\\fB(?:-h, )?(\S+?)\\fR', done.stdout.replace('\\-', '-'))
    assert {*begun} == options
    if not rig.program('groff'):
        pytest.skip('groff is not installed')
    shown = subprocess.run(['groff', '-man', '-ww', '-Tutf8', '-Kutf8', '-P-cbou'],
                           input=done.stdout, capture_output=True, encoding='utf-8',
                           timeout=rig.SAFETY_NET_S)
    assert (shown.returncode, shown.stderr) == (0, '')
    # Headings lose their colon, and `-h --help` gets a comma.
    words = iter([word.rstrip(':,') for word in shown.stdout.partition('SYNOPSIS')[2].split()])
    for word in USAGES[command].partition('Usage:')[2].split():
        assert word.rstrip(':,') in words, word         # `in` consumes the words up to the match


@pytest.mark.parametrize('command', USAGES)
def test_each_value_with_words_to_choose_from_is_in_the_help(command):
    """The help text of the option has each word of VALUES."""
    for option, value, _, text in ssh_scheduler.option_texts(USAGES[command]):
        words = ssh_scheduler.VALUES.get(value, '').split()
        if {'machines', 'jobs', 'files'}.isdisjoint(words):
            assert [word for word in words if word not in text] == [], option
