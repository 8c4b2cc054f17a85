"""Logins as they are in the wild: shells, start files, accounts, and machines out of reach."""
import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import rig
from batching import NO_GPU, RESULTS, Batches, assert_clean, result

import ssh_scheduler

SHELLS = ['bash', 'dash', 'zsh', 'fish', 'tcsh']

# For each shell: a file with text that only an interactive login runs, and this text.
LOGIN_FILES = {
    'bash': ('.bashrc', 'case $- in *i*) ;; *) return;; esac\n'
                        'PATH=$HOME/tools:$PATH\nexport FROM="bash $HOME"\n'),
    'dash': ('.profile', 'PATH=$HOME/tools:$PATH\nexport PATH FROM="dash $HOME"\n'),
    'zsh': ('.zshrc', 'path=(~/tools $path)\nexport FROM="zsh $HOME"\n'),
    'fish': ('.config/fish/config.fish', 'if status is-login\nset -gx PATH ~/tools $PATH\n'
                                         'set -gx FROM "fish $HOME"\nend\n'),
    'tcsh': ('.tcshrc', 'if ($?prompt) then\nsetenv PATH ~/tools:$PATH\n'
                        'setenv FROM "tcsh $HOME"\nendif\n'),
}
# The file that each shell reads for every command over ssh.  dash has none.
NOISY_FILES = {'bash': '.bashrc', 'zsh': '.zshenv', 'fish': '.config/fish/config.fish',
               'tcsh': '.tcshrc'}


@pytest.fixture
def batches(run_cli, start_cli, project):
    return Batches(run_cli, start_cli)


@pytest.fixture
def big_file(project):
    """Return the content of a file so large that rsync, if installed, copies it."""
    data = bytes(range(256)) * 1200
    (project / 'data').write_bytes(data)
    return data


def add_tool(machine):
    (machine.home / 'tools').mkdir()
    (machine.home / 'tools/mytool').write_text('#!/bin/sh\necho tool\n')
    (machine.home / 'tools/mytool').chmod(0o755)


def complaints(done, machine):
    """Return the lines of stderr that name the machine, without the reminder at the end."""
    return [line for line in done.stderr.splitlines()
            if str(machine) in line and ': was not used: ' not in line]


# ---- The environment of an interactive login ----

@pytest.mark.parametrize('shell', SHELLS)
def test_what_an_interactive_login_exports_reaches_the_jobs(batches, lab, shell):
    machine = lab(shell=rig.program(shell))
    name, text = LOGIN_FILES[shell]
    file = machine.home / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'a') as out:
        out.write(text)
    add_tool(machine)
    done = batches.run(['mytool; echo "$FROM"', 'bash -c mytool'], [machine], *NO_GPU)
    assert done.returncode == 0, done.stderr
    assert result('batch.sh.1').decode() == f'tool\n{shell} {machine.home}\n'
    assert result('batch.sh.2') == b'tool\n'
    assert done.stderr.count('\n') == 1         # only the note of the sent files


def test_functions_of_bashrc_can_be_called(batches, lab):
    machine = lab(startup={'.bashrc': '''
        case $- in *i*) ;; *) return;; esac
        export CONDA_EXE=/opt/conda
        __conda_exe() ( echo "$CONDA_EXE $*" )
        conda() {
            local answer
            answer="$(__conda_exe "$@")" && export CONDA_ENV=$2 && echo "$answer"
        }
        spaced() { printf '<%s>' "a  b" 'it'"'"'s' $'tab\\t' "$(cat <<'END'
here  document
END
        )"; }
    '''})
    lines = ['conda activate ml; echo $CONDA_ENV', 'spaced', 'bash -c "type conda" 2>&1; true']
    done = batches.run(lines, [machine], *NO_GPU)
    assert done.returncode == 0
    assert result('batch.sh.1') == b'/opt/conda activate ml\nml\n'
    assert result('batch.sh.2') == b"<a  b><it's><tab\t><here  document>"
    assert b'not found' in result('batch.sh.3')         # as over ssh


def test_odd_values_arrive(batches, lab):
    machine = lab(startup={'.bashrc': r'''
        export LINES_OF=$'one\ntwo' QUOTES="it's \"so\"" EMPTY= EQUALS=a=b BYTES=$'\xff\x01'
        export -f greet 2>/dev/null; export -n HIDDEN=no
    '''})
    show = r'''printf '%s|' "$LINES_OF" "$QUOTES" "${EMPTY-unset}" "$EQUALS" "$BYTES" "$HIDDEN"'''
    batches.run([show], [machine], *NO_GPU)
    assert result('batch.sh.1') == b'one\ntwo|it\'s "so"||a=b|\xff\x01||'


def test_a_job_does_not_know_of_the_connection(batches, lab1):
    done = batches.run(['env | grep -E "^(SSH_(CLIENT|CONNECTION|TTY)|SSH_SCHEDULER_CAP)"',
                        'env | grep -i -E "token|capture"'], [lab1], *NO_GPU)
    assert (done.returncode, result('batch.sh.1'), result('batch.sh.2')) == (1, b'', b'')


def test_two_jobs_that_share_a_machine_do_not_share_a_name_of_the_login(batches, lab, gate):
    """The login exports variables whose names the runner uses, or could use."""
    names = {'gpus': '0,1', 'dir': '/data', 'program': '/data/cmd', 'mask': '0777', 'name': 'x',
             'project': 'y', 'status': '3', 'environment': 'z', 'run': '/data', 'home': '/data',
             'setup': 'false', 'shell': '/bin/false', 'functions': 'f', 'entry': 'e', 'id': '7'}
    exports = ''.join(f"export {name}='{value}'\n" for name, value in names.items())
    machine = lab(gpus=rig.fake_gpus(2), startup={'.bashrc': exports})
    meet = gate.meeting(2)
    show = '; '.join(f'echo "${name}"' for name in names)
    show += '; umask >&2; echo $CUDA_VISIBLE_DEVICES >&2'
    done = batches.run([f'{meet[n]}; {show}' for n in (0, 1)], [machine.yaml(setup='export SET=1')])
    assert done.returncode == 0, done.stderr
    assert [result(f'batch.sh.{n}').decode().split() for n in (1, 2)] == [[*names.values()]] * 2
    umask, *gpus = sorted({line for n in (1, 2)
                           for line in result(f'batch.sh.{n}', 'err').decode().split()})
    assert sorted([umask, *gpus]) == ['0', '0022', '1']


def test_functions_behind_one_with_extended_patterns_are_there(batches, lab):
    """bash-completion has functions with such patterns."""
    machine = lab(startup={'.bashrc': """
        case $- in *i*) ;; *) return;; esac
        shopt -s extglob
        _a_completion() { case $1 in @(a|b)) echo "one of them";; !(c)*) echo other;; esac; }
        module() { echo "module $1"; }
        once() { case $1 in +(x)) echo xs;; esac; }
        shopt -u extglob
    """})
    done = batches.run(['module load; true', 'once xxx; shopt extglob'], [machine], *NO_GPU)
    assert (result('batch.sh.1'), result('batch.sh.1', 'err')) == (b'module load\n', b'')
    assert (result('batch.sh.2').split()[-1], result('batch.sh.2', 'err')) == (b'off', b'')
    assert done.stderr.count('\n') == 1


def test_functions_with_extended_patterns_work_where_the_login_has_them(batches, lab):
    machine = lab(startup={'.bashrc': '''
        shopt -s extglob
        which_of() { case $1 in @(a|b)) echo one of them;; esac; }
    '''})
    setup = machine.yaml(setup='also() { case $1 in +(x)) which_of a;; esac; }')
    batches.run(['which_of b; also xx'], [setup], *NO_GPU)
    assert (result('batch.sh.1'), result('batch.sh.1', 'err')) == (b'one of them\n' * 2, b'')


# ---- Functions that only an interactive shell calls ----

INTERACTIVE = f"""
    . {rig.BASH_COMPLETION}
    export CALL=_complete_me COMMAND_OF_A_LOGIN=greet
    _complete_me() {{ _helper_of_it; }}
    _helper_of_it() {{ echo called; }}
    complete -F _complete_me me
    _shared() {{ echo "hello $1"; }}
    _complete_it() {{ _shared; greet; }}
    complete -F _complete_it it
    greet() {{ _shared "$1"; }}
    _dispatch_by_name() {{ echo dispatched; }}
    dispatch() {{ "_dispatch_$1"; }}
    exported() {{ echo exported; }}
    complete -F exported what
    export -f exported
"""
# Lines that name a function in all the places where a shell may find its name.
NAMED = ['command -v {}', 'true;command -v {}', 'x=$(command -v {}); [ "$x" ]', '(command -v {})',
         'if command -v "{}"; then :; else exit 1; fi', 'true&&command -v {}|grep .',
         "command -v '{}'", '{{ command -v {};}}', '"${{NONE:-command}}" -v ${{NONE:-{}}}',
         'f={};command -v "$f"', 'command -v \\{}', 'true\tand;command\t-v\t{}\t',
         'test `command -v {}` = {}']
# Lines that call a function without its name.
UNNAMED = ['$CALL', '"$CALL"', 'true; $CALL', 'true;"$CALL"', 'true && "$CALL"', '! $CALL; true',
           'for i in 1; do $CALL; done', 'if true; then\t"$CALL"; fi', 'echo "$($CALL)"',
           '{ $CALL; }', '`echo $CALL`', '(${CALL})', 'eval "$CALL"', '. ./calls', 'source ./calls',
           'true; . ./calls']


@pytest.fixture(params=['login', 'setup', 'BASH_ENV'])
def with_completion(request, lab, project):
    """A machine, or its file, whose jobs have bash-completion and functions of a user."""
    (project / 'calls').write_text('$CALL\n')
    if request.param == 'setup':
        return lab().yaml(setup=INTERACTIVE)
    machine = lab(startup={'.bashrc': f'case $- in *i*) ;; *) return;; esac\n{INTERACTIVE}',
                           '.bashenv': 'of_bash_env() { echo too; }\n'})
    if request.param == 'BASH_ENV':
        with open(machine.home / '.profile', 'a') as out:
            out.write('export BASH_ENV=~/.bashenv\n')
    return machine


def outputs(batches, machine, lines):
    """Return the output of each of these lines; assert that none fails or writes to stderr."""
    done = batches.run(lines, [machine], *NO_GPU)
    assert done.returncode == 0, done.stderr
    numbers = range(1, len(lines) + 1)
    assert not [lines[number - 1] for number in numbers if result(f'batch.sh.{number}', 'err')]
    return [result(f'batch.sh.{number}').decode() for number in numbers]


def test_each_function_that_a_line_names_is_there(batches, with_completion):
    names = subprocess.run(['bash', '--norc', '-ic', f'{INTERACTIVE}\ncompgen -A function'],
                           check=True, capture_output=True, text=True).stdout.split()
    assert len(names) > 50
    forms = [NAMED[number % len(NAMED)].format(name, name) for number, name in enumerate(names)]
    outputs(batches, with_completion, forms)


def test_a_function_that_a_line_calls_without_its_name_is_there(batches, with_completion):
    assert set(outputs(batches, with_completion, UNNAMED)) == {'called\n'}


def test_functions_of_the_user_are_there_and_those_for_completion_are_not(
        batches, with_completion):
    lines = {'greet me': 'hello me\n', 'true | $COMMAND_OF_A_LOGIN you': 'hello you\n',
             'dispatch by_name': 'dispatched\n', "bash -c 'exported'": 'exported\n',
             'echo !(b*)': 'calls\n', 'set | grep -c COMP_WORDS; true': '0\n',
             'set | grep -c COMP_WORDS; true ./eval.py --type . "$CALL" $CALL a__b': '0\n'}
    assert outputs(batches, with_completion, [*lines]) == [*lines.values()]


@pytest.mark.parametrize('startup, env', [
    ({'.bashrc': 'readonly TMOUT=900 UIDS=1; export TMOUT UIDS\n'}, {}),
    ({'.bashenv': 'readonly TMOUT=900; export TMOUT\n'}, {'BASH_ENV': '{home}/.bashenv'}),
    ({'.bashrc': 'export UID EUID PPID SHELLOPTS BASHOPTS BASH_VERSINFO\n'}, {}),
], ids=['bashrc', 'BASH_ENV', "bash's own"])
def test_readonly_variables_make_no_noise(batches, lab, startup, env):
    machine = lab(startup=startup)
    if env:
        (machine.home / '.profile').write_text(
            f'export BASH_ENV={machine.home}/.bashenv\n' + (machine.home / '.profile').read_text())
    done = batches.run(['echo "fine"'], [machine], *NO_GPU)
    assert (done.returncode, result('batch.sh.1', 'err')) == (0, b''), done.stderr


@pytest.mark.parametrize('first, second', [
    ('bash', 'zsh'), ('bash', 'fish'), ('dash', 'bash'), ('tcsh', 'bash'), ('zsh', 'fish'),
    ('fish', 'zsh'), ('bash', 'tcsh')])
def test_a_start_file_that_puts_another_shell_in_its_place(batches, lab, first, second):
    """Users do so where chsh is not allowed.  The exports of the first shell are kept, too."""
    program = rig.program(second) + (' -l' if second == 'fish' else '')
    hand_over = {
        'bash': f'export FIRST=1\ncase $- in *i*) exec {program};; esac\n',
        'dash': f'export FIRST=1\nexec {program}\n',
        'zsh': f'export FIRST=1\nexec {program}\n',
        'tcsh': f'setenv FIRST 1\nif ($?prompt) then\nexec {program}\nendif\n',
        'fish': f'set -gx FIRST 1\nif status is-login\nexec {program}\nend\n'}[first]
    name, text = LOGIN_FILES[second]
    machine = lab(shell=rig.program(first))
    for file, lines in ((machine.home / LOGIN_FILES[first][0], hand_over),
                        (machine.home / name, text)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, 'a') as out:
            out.write(lines)
    add_tool(machine)
    done = batches.run(['mytool; echo "$FROM $FIRST"'], [machine], *NO_GPU)
    assert done.returncode == 0, done.stderr
    assert result('batch.sh.1').decode() == f'tool\n{second} {machine.home} 1\n', done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('text', ['exit', 'exec true', 'exec tmux-is-not-here', 'exec cat'])
def test_an_environment_that_cannot_be_had_is_said(batches, lab, text):
    machine = lab(startup={'.bashrc': f'export EARLY=1\ncase $- in *i*) {text};; esac\n'})
    done = batches.run(['echo fine'], [machine], *NO_GPU)
    assert (done.returncode, result('batch.sh.1')) == (0, b'fine\n')
    (complaint,) = [line for line in complaints(done, machine.yaml()) if 'sent' not in line]
    assert 'the login shell did not report its environment: a start file of /bin/bash' in complaint


def test_the_locale_of_a_login_is_that_of_its_jobs(batches, lab):
    machine = lab(env={'LC_ALL': 'C.UTF-8', 'LANG': 'de_DE.UTF-8'})
    batches.run(['echo "$LC_ALL $LANG ${LC_TIME-unset}"'], [machine], *NO_GPU)
    assert result('batch.sh.1') == b'C.UTF-8 de_DE.UTF-8 unset\n'


def test_of_a_locale_that_is_not_there_bash_warns_once(batches, lab):
    machine = lab(startup={'.bashrc': 'export LC_ALL=no_SUCH.UTF-8\n'})
    batches.run(['true'], [machine], *NO_GPU)
    assert result('batch.sh.1', 'err').count(b'\n') == 1


@pytest.mark.parametrize('way', ['login', 'setup', 'env'])
def test_an_nvidia_smi_that_only_the_login_or_setup_finds(batches, lab, way):
    """WSL2 and environment modules have nvidia-smi in such folders."""
    lines = 'export PATH=~/tools:$PATH LIBRARY=here\n'
    guarded = f'case $- in *i*) {lines};; esac\n'
    machine = lab(gpus=rig.fake_gpus(2), startup={'.bashrc': guarded if way == 'login' else ''})
    (machine.home / 'tools').mkdir()
    (machine.bin / 'nvidia-smi').rename(machine.folder / 'nvidia-smi')
    rig.put(machine.home / 'tools/nvidia-smi', '#!/bin/bash\n[[ $LIBRARY ]] || exit 12\n'
            f'exec {machine.bin}/nvidia-smi.real "$@"\n', 0o755)
    machine._script('nvidia-smi.real', rig.NVIDIA_SMI)
    more = {'setup': lines} if way == 'setup' else {}
    if way == 'env':
        more['env'] = {'PATH': f'{machine.home}/tools:{machine.path}', 'LIBRARY': 'here'}
    done = batches.run(['echo $CUDA_VISIBLE_DEVICES'] * 2, [machine.yaml(**more)])
    assert done.returncode == 0, done.stderr
    assert {result('batch.sh.1'), result('batch.sh.2')} <= {b'0\n', b'1\n'}
    assert 'machine gpu choices: [[0, 1]]' in done.stdout


def test_an_nvidia_smi_that_needs_what_the_login_exports(batches, lab):
    """LD_LIBRARY_PATH, for example: without its library nvidia-smi exits with 12."""
    machine = lab(gpus=rig.fake_gpus(1), startup={
        '.bashrc': 'case $- in *i*) export LIBRARY=here;; esac\n'})
    machine._script('nvidia-smi.real', rig.NVIDIA_SMI)
    machine._script('nvidia-smi', '#!/bin/bash\n[[ $LIBRARY ]] || exit 12\n'
                    'exec "$0.real" "$@"\n')
    done = batches.run(['echo $CUDA_VISIBLE_DEVICES'], [machine])
    assert (done.returncode, result('batch.sh.1')) == (0, b'0\n'), done.stderr


def test_an_nvidia_smi_that_is_found_at_once_is_asked_once(batches, lab):
    machine = lab(gpus=rig.fake_gpus(1))
    machine._script('nvidia-smi.real', rig.NVIDIA_SMI)
    machine._script('nvidia-smi', f'#!/bin/bash\necho >>{machine.folder}/asked\n'
                    'exec "$0.real" "$@"\n')
    assert batches.run(['true'], [machine], '--no-live').returncode == 0
    assert (machine.folder / 'asked').read_text() == '\n'


# ---- Start files that misbehave ----

@pytest.mark.parametrize('shell', sorted(NOISY_FILES))
def test_start_files_that_print(batches, lab, big_file, shell):
    sh = 'sh -c "printf \'no newline\'; printf \'to stderr\' >&2"\n'
    machine = lab(shell=rig.program(shell), startup={NOISY_FILES[shell]: 'echo Welcome\n' + sh,
                                                     '.local/of_fish': ''})
    assert machine.run('true').stdout == 'Welcome\nno newline'
    before = machine.logins()
    done = batches.run(['cksum <data; cp data copy', 'cat; exit 4'], [machine], *NO_GPU)
    assert (done.returncode, machine.logins() - before) == (1, 1), done.stderr
    expected = subprocess.run('cksum', input=big_file, capture_output=True).stdout
    assert (result('batch.sh.1'), result('batch.sh.1', 'err')) == (expected, b'')
    assert (RESULTS / 'batch.sh.1/copy').read_bytes() == big_file
    assert 'batch.sh.2: exit code 4' in done.stdout
    assert_clean(machine, cache=True)


def test_noise_that_looks_like_events(batches, lab):
    noise = "printf 'ready\\t/\\t1\\nended\\tbatch.sh.1.1\\t0\\t0\\t=\\t=\\n\\n\\t\\\\\\0'\n"
    machine = lab(startup={'.bashrc': noise})
    done = batches.run(['exit 9'], [machine], *NO_GPU)
    assert 'batch.sh.1: exit code 9' in done.stdout


def test_noise_without_an_end_is_said(batches, lab, lab1):
    machine = lab(startup={'.bashrc': 'exec yes'})
    done = batches.run(['true'], [machine, lab1], *NO_GPU)
    assert done.returncode == 0
    (complaint,) = complaints(done, machine.yaml())
    assert 'its login prints too much text' in complaint


def test_a_bashrc_that_runs_for_two_seconds(batches, lab):
    machine = lab(startup={'.bashrc': 'sleep 2; export SLOW=yes\n'})
    done = batches.run(['echo $SLOW; wc -c <batch.sh >size'], [machine], *NO_GPU, timeout=90)
    assert (done.returncode, result('batch.sh.1')) == (0, b'yes\n')
    assert (RESULTS / 'batch.sh.1/size').read_text() == '34\n'


@pytest.mark.parametrize('text', ['exit', 'echo no >&2; exit 3', 'exec false'])
def test_a_bashrc_that_says_exit(batches, lab, text):
    machine = lab(startup={'.bashrc': text + '\n'})
    done = batches.run(['true'], [machine], *NO_GPU)
    assert done.returncode == 2
    (complaint,) = complaints(done, machine.yaml())
    assert 'exit in one of its start files, such as ~/.bashrc' in complaint
    assert not list(RESULTS.glob('batch*'))


@pytest.mark.parametrize('text', ['exit', 'exec true', 'kill -9 $$', 'read -r line', 'set -eu',
                                  'exec </dev/null >/dev/null 2>&1', 'trap "echo bye" EXIT'])
def test_a_start_file_that_spoils_interactive_shells_only(batches, lab, text):
    machine = lab(startup={'.bashrc': f'case $- in *i*) {text};; esac\n'})
    done = batches.run(['echo fine; false; echo still here'], [machine], *NO_GPU)
    assert (done.returncode, result('batch.sh.1')) == (0, b'fine\nstill here\n'), done.stderr
    assert_clean(machine)


def test_an_account_for_sftp_only(batches, lab, lab1):
    machine = lab(sshd_options='ForceCommand internal-sftp')
    done = batches.run(['echo here'], [machine, lab1], *NO_GPU)
    (complaint,) = complaints(done, machine.yaml())
    assert 'sftp' in complaint
    assert (done.returncode, result('batch.sh.1')) == (0, b'here\n')
    alone = batches.run(['true # again'], [machine], *NO_GPU, cwd='..')
    assert alone.returncode == 2


@pytest.mark.parametrize('command', ['nologin', 'echo This account is closed.'])
def test_an_account_that_runs_something_else(batches, lab, command):
    machine = lab(sshd_options=f'ForceCommand {command}')
    done = batches.run(['true'], [machine], *NO_GPU)
    assert done.returncode == 2
    (complaint,) = complaints(done, machine.yaml())
    assert 'login' in complaint


# ---- Settings of the machine's file ----

def test_setup_and_env_of_the_machines_file(batches, lab1):
    file = lab1.yaml(
        setup='module() { export MODULE=$1; }\nmodule load || exit\nexport BOTH=setup\necho x\n',
        env={'BOTH': 'env', 'ODD': 'it\'s "odd" $HOME %', 'NUMBER': 3})
    show = ('echo "$MODULE $BOTH $NUMBER"; echo "$ODD"; module again; echo $MODULE')
    done = batches.run([show], [file], *NO_GPU)
    assert done.returncode == 0, done.stderr
    assert result('batch.sh.1') == b'load env 3\nit\'s "odd" $HOME %\nagain\n'
    assert result('batch.sh.1', 'err') == b''


def test_setup_sees_what_the_login_has(batches, lab):
    machine = lab(startup={'.bashrc': 'export BASE=/opt\nuse() { export USED=$BASE/$1; }\n'})
    batches.run(['echo $USED'], [machine.yaml(setup='use ml')], *NO_GPU)
    assert result('batch.sh.1') == b'/opt/ml\n'


@pytest.mark.parametrize('setup, status', [
    ('echo cannot do it >&2; exit 3', 3), ('no_such_command_x', 127), ('if', None),
    ('echo cannot do it; false', 1)])
def test_a_setup_that_fails(batches, lab, lab2, setup, status):
    machine = lab()
    file = machine.yaml(setup=setup)
    done = batches.run(['true'], [file, lab2], *NO_GPU)
    (complaint,) = complaints(done, f'{file}: cannot')
    assert 'setup failed' in complaint and (status is None or f'({status})' in complaint)
    assert ('cannot do it' in complaint) == ('cannot' in setup)
    assert done.returncode == 0             # the other machine ran the job
    assert_clean(machine)


@pytest.mark.parametrize('workdir', ['~/a folder/with  blanks', "{}/it's $HOME; *"])
def test_a_workdir_with_blanks(batches, lab, big_file, workdir):
    machine = lab()
    place = workdir.format(machine.home)
    done = batches.run(['pwd; cp data copy', 'cat batch.sh'],
                       [machine.yaml(workdir=place)], *NO_GPU)
    assert done.returncode == 0, done.stderr
    real = place.replace('~', str(machine.home), 1)
    assert result('batch.sh.1').decode().startswith(f'{real}/project-')
    assert (RESULTS / 'batch.sh.1/copy').read_bytes() == big_file
    assert not os.path.exists(machine.home / '.ssh_scheduler')
    for project in os.listdir(real):
        assert os.listdir(f'{real}/{project}') == ['cache']


def test_a_workdir_that_cannot_be_written(batches, lab1, lab2):
    file = lab1.yaml(workdir='/proc/nothing')
    done = batches.run(['true'], [file, lab2], *NO_GPU)
    (complaint,) = complaints(done, f'{file}: cannot')
    assert 'cannot write there' in complaint and '/proc/nothing' in complaint
    assert done.returncode == 0


# ---- Machines out of reach ----

def new_key(folder, *options):
    path = folder / 'other_key'
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', path, *options],
                   check=True)
    return path


def unreachable(machine, why, folder):
    """Return a machine file with this error, and words of the expected explanation."""
    place = f'{machine.address} port {machine.port}'
    if why == 'nothing listens':
        port = rig.free_port()
        return machine.yaml(port=port), f'nothing listens at 127.0.0.1 port {port}.'
    if why == 'unknown host':
        return (machine.yaml(ip='no-such-machine.invalid'),
                'the host name no-such-machine.invalid is unknown.')
    if why == 'wrong user':
        return (machine.yaml(username='nobody_here'),
                f'the login as nobody_here at 127.0.0.1 port {machine.port} was refused')
    if why == 'wrong key':
        return (machine.yaml(ssh_key_path=str(new_key(folder))),
                f'the login as ben at 127.0.0.1 port {machine.port} was refused (publickey was '
                'tried)')
    kind, key, _ = new_key(folder).with_suffix('.pub').read_text().split()
    known = folder / 'known'
    known.write_text(f'[127.0.0.1]:{machine.port} {kind} {key}\n')
    return (machine.yaml(ssh_options={'UserKnownHostsFile': str(known)}),
            f'the host key of {place} has changed, so this may be another '
            f'machine. Was it reinstalled? Try: ssh-keygen -f "{known}" -R '
            f'"[127.0.0.1]:{machine.port}"')


@pytest.mark.parametrize('why', ['nothing listens', 'unknown host', 'wrong user', 'wrong key',
                                 'changed host key'])
def test_an_unreachable_machine_is_one_line_and_the_others_go_on(
        batches, lab, lab1, tmp_path, why):
    file, words = unreachable(lab(), why, tmp_path)
    done = batches.run(['echo here'], [file, lab1], *NO_GPU)
    (complaint,) = complaints(done, file)
    assert complaint.startswith(f'{file}: cannot be used: ') and words in complaint
    reminder = done.stderr.splitlines()[-1]
    assert reminder.startswith(f'{file}: was not used: ') and words in reminder
    assert (done.returncode, result('batch.sh.1')) == (0, b'here\n')
    assert done.stdout.startswith(f"machine limits:  {{'{lab1.yaml()}': ")


def test_no_machine_at_all(batches, lab, tmp_path, client_home):
    files = [unreachable(lab(), why, tmp_path)[0] for why in ('nothing listens', 'wrong user')]
    done = batches.run(['true'], files, *NO_GPU)
    assert (done.returncode, done.stdout) == (2, '')
    assert [line.split(':')[0] for line in sorted(done.stderr.splitlines())] == sorted(
        [*map(str, files), 'execute_batch'])
    assert 'no machine can be used' in done.stderr
    assert not list(RESULTS.glob('batch*'))
    assert not list((client_home / 'tmp').iterdir())


def test_a_host_key_that_nobody_knows_yet_is_learnt(batches, lab, tmp_path):
    machine = lab()
    file = machine.yaml(ssh_options={'UserKnownHostsFile': str(tmp_path / 'known')})
    assert batches.run(['true'], [file], *NO_GPU).returncode == 0
    found = subprocess.run(['ssh-keygen', '-F', f'[127.0.0.1]:{machine.port}',
                            '-f', tmp_path / 'known'], capture_output=True, text=True)
    assert (machine.folder / 'host_key.pub').read_text().split()[1] in found.stdout


@pytest.mark.parametrize('why, words', [
    ('readable', 'can be read by others, so ssh refuses it. Try: chmod 600'),
    ('passphrase', 'has a passphrase'), ('missing', 'cannot be read: No such file'),
    ('public', 'looks like the public key')])
def test_a_key_that_ssh_could_not_use_is_found_before_any_login(
        batches, lab, lab1, tmp_path, why, words):
    key = new_key(tmp_path, *(['-N', 'secret'] if why == 'passphrase' else []))
    if why == 'readable':
        key.chmod(0o644)
    path = {'missing': tmp_path / 'none', 'public': key.with_suffix('.pub')}.get(why, key)
    if why == 'public':
        path.chmod(0o600)
    machine = lab()
    file = machine.yaml(ssh_key_path=str(path))
    alone = batches.run(['true'], [file], *NO_GPU)
    assert (alone.returncode, alone.stdout, RESULTS.exists()) == (2, '', False)
    done = batches.run(['true'], [lab1, file], *NO_GPU)
    assert (done.returncode, result('batch.sh.1'), machine.logins()) == (1, b'', 0)
    (line,) = alone.stderr.splitlines()
    assert words in line and str(path) in line and str(file) in line
    assert done.stderr.splitlines()[0] == line.replace('execute_batch', 'cannot be used')


@pytest.fixture
def broken(tmp_path):
    """A machine file with a line that lacks its colon; *.yaml may name such a file."""
    (tmp_path / 'broken.yaml').write_text('username ben\nip: gpu7\n')
    return tmp_path / 'broken.yaml'


def complaint_of(file):
    return f'{file}, line 1: this is not "key: value": \'username ben\'.\n'


def test_a_batch_runs_without_the_machine_whose_file_is_wrong(batches, lab1, broken):
    done = batches.run(['echo here'], [broken, lab1], *NO_GPU)
    assert (done.returncode, result('batch.sh.1')) == (1, b'here\n')
    assert done.stderr.startswith(f'cannot be used: {complaint_of(broken)}')
    assert 'done: 1 job: 1 finished, 0 failed' in done.stdout
    again = batches.run(['echo here'], [broken, lab1], *NO_GPU, '--dry-run')
    assert (again.returncode, again.stderr.splitlines()[0] + '\n') == (
        1, f'cannot be used: {complaint_of(broken)}')


def test_what_runs_is_cancelled_though_the_file_of_a_machine_is_wrong(
        batches, run_cli, lab1, broken):
    batch = batches.start(['sleep 1000'], [lab1], *NO_GPU)
    batch.until('started: ')
    batch.process.kill()
    batch.end()
    done = run_cli('execute_batch', 'batch.sh', '--cancel', '--machines', broken, lab1.yaml())
    assert done.returncode == 1 and done.stdout.startswith('batch.sh.1: stopped, on ')
    assert done.stderr.startswith(f'cannot be used: {complaint_of(broken)}The next run of ')
    assert_clean(lab1, cache=True)


def test_the_other_commands_do_without_it_too(run_cli, lab1, project, broken):
    to = run_cli('execute_to', '--machines', broken, lab1.yaml(), '--', 'echo here')
    query = run_cli('query_machines', '--json', '--machines', broken, lab1.yaml())
    for done in (to, query):
        assert (done.returncode, done.stderr) == (1, f'cannot be used: {complaint_of(broken)}')
    assert to.stdout == f'{lab1.yaml()}: here\n' and query.stdout.count('\n') == 1


@pytest.mark.parametrize('command', ['execute_batch', 'execute_to', 'query_machines',
                                     'execute_remote'])
def test_where_no_machine_file_is_right_nothing_is_run(run_cli, project, broken, command):
    (project / 'batch.sh').write_text('true\n')
    words = {'execute_batch': ['batch.sh', '--machines', broken],
             'execute_to': ['--machines', broken, '--', 'true'],
             'query_machines': ['--machines', broken],
             'execute_remote': ['--machine', broken, 'true']}[command]
    done = run_cli(command, *words)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, '', f'{command}: {complaint_of(broken)}')


def test_a_machine_that_hangs_does_not_hold_up_the_others(batches, lab, lab1):
    machine = lab()
    machine.freeze()
    lines = [f'echo {n}' for n in range(30)]
    done = batches.run(lines, [machine, lab1], *NO_GPU)
    assert (done.returncode, result('batch.sh.30')) == (0, b'29\n')
    (complaint,) = complaints(done, f'{machine.yaml()}: did')
    assert re.fullmatch(r'.*: did not answer within \d+ s; the batch ended without it', complaint)
    assert not complaints(done, f'{lab1.yaml()}: did')
    machine.thaw()


@pytest.mark.parametrize(('noise', 'complaint', 'words'), [
    ('', 'exec request failed on channel 0', 'the sshd of lab1 could not start a shell: '),
    ('', 'bash: fork: Resource temporarily unavailable', 'this account can start no more '),
    ('', 'dash: 1: Cannot fork', 'this account can start no more '),
    ('', 'zsh:1: fork failed: resource temporarily unavailable', 'this account can start no more '),
    ('', 'bash: fork: Cannot allocate memory', 'this account can start no more '),
])
def test_what_is_said_where_no_process_can_be_started(noise, complaint, words):
    machine = ssh_scheduler.Machine('lab1', 'lab1', username='ben')
    why, again = ssh_scheduler.explain_login(machine, 254, noise, complaint)
    assert why.startswith(words) and 'of ben' in why and again == 'later'


def test_a_machine_that_hangs_alone_is_given_up(batches, lab):
    machine = lab()
    machine.freeze()
    options = {'UserKnownHostsFile': str(machine.known_hosts), 'ConnectTimeout': 1}
    done = batches.run(['true'], [machine.yaml(ssh_options=options)], *NO_GPU)
    assert done.returncode == 2
    (complaint,) = complaints(done, machine.yaml())
    assert f'127.0.0.1 port {machine.port} did not answer in time' in complaint
    machine.thaw()


# ---- Each complaint is a sentence ----

# Messages of ssh or a login shell, and the sentence for each.  All but the last four: OpenSSH 9.2.
CLOSED = 'kex_exchange_identification: Connection closed by remote host'
SAID_BY_SSH = [
    ('@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @',
     'has changed, so this may be another machine.'),
    ('Offending RSA key in /home/ben/.ssh/known_hosts:3\nHost key for [gpu]:7 has changed and you '
     'have requested strict checking.', 'has changed, so this may be another '
     'machine. Was it reinstalled? Try: ssh-keygen -f "/home/ben/.ssh/known_hosts" -R "[gpu]:7"'),
    ('No ED25519 host key is known for [gpu]:7 and you have requested strict checking.\nHost key '
     'verification failed.', 'is not known: log in once with ssh, and compare the key.'),
    ('Host key verification failed.', 'could not be verified.'),
    ('ssh: Could not resolve hostname gpu.uni: Temporary failure in name resolution',
     'no name server answered for the host name gpu.uni.'),
    (f'channel 0: open failed: administratively prohibited: open failed\n{CLOSED}',
     '(AllowTcpForwarding or PermitOpen in its sshd_config).'),
    (f'channel 0: open failed: connect failed: Name or service not known\n{CLOSED}',
     'jump host finds no address of row'),
    (f'channel 0: open failed: connect failed: Connection refused\n{CLOSED}',
     ': Connection refused.'),
    (f'stdio forwarding failed\n{CLOSED}', 'jump host could not connect to row'),
    (f'sh: 1: exec: nc: not found\n{CLOSED}',
     'its ProxyCommand needs nc, which is not installed here.'),
    ('Unable to negotiate with 10.0.0.7 port 22: no matching host key type found. Their offer: '
     'ssh-rsa', '10.0.0.7 port 22 and ssh here have no method in common: no matching host key type '
     'found. Their offer: ssh-rsa.'),
    ('ssh: Could not resolve hostname gpu.invalid: Name or service not known',
     'the host name gpu.invalid is unknown.'),
    ('ncat: Name or service not known\nkex_exchange_identification: Connection closed by remote '
     'host\nConnection closed by UNKNOWN port 65535', 'is unknown.'),
    ('ssh: connect to host 10.0.0.7 port 2222: Connection refused',
     'nothing listens at 10.0.0.7 port 2222.'),
    ('ben@10.0.0.7: Permission denied (publickey,password).',
     'the login as ben at 10.0.0.7 was refused (publickey,password was tried): is the user name '
     'right, and is the key in its ~/.ssh/authorized_keys?'),
    ('Received disconnect from 10.0.0.7 port 22:2: Too many authentication failures\n'
     'Disconnected from 10.0.0.7 port 22',
     'too many keys were offered to 10.0.0.7 port 22: set ssh_key_path (for '
     'a jump host IdentityFile and IdentitiesOnly in ~/.ssh/config).'),
    ('ssh: connect to host 10.0.0.7 port 22: No route to host',
     '10.0.0.7 port 22 cannot be reached: is the machine on, and the VPN?'),
    ('ssh: connect to host fe80::7 port 22: Network is unreachable',
     'fe80::7 port 22 cannot be reached: is the machine on, and the VPN?'),
    ('ssh: connect to host 10.0.0.7 port 22: Connection timed out',
     '10.0.0.7 port 22 did not answer in time: is the machine on, and the VPN?'),
    ('Connection timed out during banner exchange\nConnection to 10.0.0.7 port 22 timed out',
     '10.0.0.7 port 22 did not answer in time: is the machine on, and the VPN?'),
    ('Bad owner or permissions on /home/ben/.ssh/config',
     'ssh refuses /home/ben/.ssh/config: others may write it.'),
    ('/tmp/0.config: line 3: Bad configuration option: frobnicate\r\n/tmp/0.config: terminating, '
     '1 bad configuration options', 'ssh does not know the option frobnicate.'),
    ('This service allows sftp connections only.', 'this account allows sftp only, no commands.'),
    ('This account is currently not available.', 'this account allows no login.'),
    ('fish: Unknown command: bash', ' has no bash.'),
    ('shell request failed on channel 0',
     ' could not start a shell: is the limit of processes of you reached?'),
    ('bash: fork: Resource temporarily unavailable',
     ' can start no more processes: is the limit of you (ulimit -u) reached?'),
    ('rbash: exec: restricted', 'its login shell is a restricted one.'),
    ('Something else went wrong.', 'Something else went wrong.'),
    ('Is the agent gone?', 'Is the agent gone?'),
    ('Wait for it ...', 'Wait for it.'),
    ('', 'the connection broke.'),
]
TRIED_AGAIN = [
    ('kex_exchange_identification: read: Connection reset by peer\r\nConnection reset by 10.0.0.7 '
     'port 2222', '10.0.0.7 port 2222 closed the connection before the login.'),
    ('Connection closed by 10.0.0.7 port 22',
     '10.0.0.7 port 22 closed the connection before the login.'),
]
FAKE_SSH = '''#!/bin/sh
while [ "$1" != -- ]; do shift; done
cat "$(dirname "$0")/$2" >&2
exit 255
'''


@pytest.fixture
def ssh_that_fails(tmp_path):
    """An environment whose ssh prints these complaints: the first for the host row0, and so on."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/ssh').write_text(FAKE_SSH)
    (tmp_path / 'bin/ssh').chmod(0o755)
    for number, (text, _) in enumerate(SAID_BY_SSH):
        (tmp_path / f'bin/row{number}').write_text(text + '\n' * bool(text))
    return {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}'}


def test_there_is_a_sample_of_each_complaint():
    unseen = [sentence for table in (ssh_scheduler.SSH_COMPLAINTS, ssh_scheduler.LOGIN_COMPLAINTS)
              for pattern, _, sentence in table
              if not any(re.search(pattern, text) for text, _ in SAID_BY_SSH + TRIED_AGAIN)]
    assert not unseen


@pytest.mark.parametrize(('text', 'expected'), SAID_BY_SSH + TRIED_AGAIN)
def test_a_complaint_is_explained(text, expected):
    why, _ = ssh_scheduler.explain_login(ssh_scheduler.Machine('x', 'row'), 255, '', text)
    said = ssh_scheduler.sentence(why)
    assert expected in said and not re.search(r'[.?!]\.', said)


def test_each_command_makes_one_sentence_of_each_complaint(run_cli, project, ssh_that_fails):
    rows = [f'row{number}' for number in range(len(SAID_BY_SSH))]
    (project / 'batch.sh').write_text('true\n')
    batch = run_cli('execute_batch', 'batch.sh', '--machines', *rows, env=ssh_that_fails)
    assert (batch.returncode, batch.stdout) == (2, '')
    said = re.sub(' To find the cause: execute_batch --check --machines row[0-9]+', '',
                  batch.stderr)
    assert said.count('\n') == batch.stderr.count('\n') and said != batch.stderr
    words = dict(line.split(': cannot be used: ') for line in said.splitlines()[:-1])
    to = run_cli('execute_to', '--machines', *rows, '--', 'true', env=ssh_that_fails)
    query = run_cli('query_machines', '--machines', *rows, env=ssh_that_fails)
    assert (to.returncode, query.returncode) == (1, 1)
    for row, (_, expected) in zip(rows, SAID_BY_SSH):
        assert expected in words[row]
        assert f'{words[row].removesuffix(".")})\n' in to.stderr
        assert f'  cannot be used: {words[row].removesuffix(".")}\n' in query.stdout
        if expected[-4:] in ('VPN?', 'too.', 'ong.', 'one?'):
            alone = run_cli('execute_remote', '--machine', row, 'true', '--job-name', 'a',
                            env=ssh_that_fails)
            assert (alone.returncode, alone.stderr) == (
                125, f'a: {row} cannot be used: {words[row]}\n')
        assert re.search(r'[.?]$|Try: ', words[row]) and not re.search(r'[.?!]\.', words[row])


def test_what_comes_from_elsewhere_is_ended_in_one_place():
    """No f-string adds a full stop to a text that may end with one: only sentence() does."""
    free = {'why', 'what', 'reason', 'trouble', 'complaint', 'said', 'last_line', 'str'}
    tree = ast.parse(Path(ssh_scheduler.__file__).read_text(encoding='utf-8'))
    wrong = []
    for node in ast.walk(tree):
        for part, follower in zip(node.values, node.values[1:]) if isinstance(
                node, ast.JoinedStr) else ():
            if isinstance(part, ast.FormattedValue) and isinstance(follower, ast.Constant) and (
                    follower.value[:1] == '.' and follower.value[1:2] in ('', ' ')):
                value = part.value.func if isinstance(part.value, ast.Call) else part.value
                name = getattr(value, 'id', getattr(value, 'attr', ''))
                wrong += [f'line {node.lineno}: {{{name}}}.'] if name in free else []
    assert not wrong


# ---- One account by two names ----

def by_another_name(machine, folder, **more):
    """Return a machine's file that leads to the same account."""
    options = {'HostName': machine.address, 'UserKnownHostsFile': str(machine.known_hosts), **more}
    file = folder / 'alias.yaml'
    file.write_text(machine.yaml(ip='alias', ssh_options=options).read_text())
    machine.yaml()
    return file


def held_back(machine, folder, gate):
    """Return a file by another name, whose login begins when the gate `login` is opened."""
    connect = (f"bash -c '{gate.wait('login')}; exec 3<>/dev/tcp/{machine.address}/{machine.port}; "
               "cat <&3 & exec cat >&3'")
    return by_another_name(machine, folder, ProxyCommand=connect)


def same(machine, kept, left):
    """Return the message about the name that is left out."""
    account = machine.account if kept == machine.yaml() else (
        f'{machine.user}@alias:{machine.port} HostName={machine.address}')
    return f'{kept} and {left} are the same account, {account}: name one of them'


def test_of_two_names_of_an_account_the_first_is_used(batches, lab, tmp_path):
    machine = lab()
    files = [machine.yaml(), by_another_name(machine, tmp_path)]
    for names in (files, files[::-1]):
        before = machine.logins()
        done = batches.run([f'echo {n} # {names[0]}' for n in range(6)], names, *NO_GPU)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('\nfinished: ') == 6
        assert complaints(done, 'same account') == [
            f'{names[1]}: cannot be used: {same(machine, *names)}.']
        assert machine.logins() - before == 2
        assert_clean(machine, cache=True)
        os.rename('job_results', f'results of {names[0].name}')


@pytest.mark.parametrize('late', [0, 1])
def test_a_name_that_answers_late_is_left_out(batches, lab, tmp_path, gate, late):
    machine = lab()
    names = [machine.yaml(), held_back(machine, tmp_path, gate)]
    batch = batches.start([gate.wait('job')], names if late else names[::-1], *NO_GPU)
    batch.until('started: batch.sh.1')
    gate.open('login')
    line = batch.process.stderr.readline()
    while 'cannot be used' not in line:
        line = batch.process.stderr.readline()
    assert line == f'{names[1]}: cannot be used: {same(machine, *names)}.\n'
    machine.stop()                              # the client reconnects by the name in use
    machine.start()
    while 'connected again' not in line:
        line = batch.process.stderr.readline()
    gate.open('job')
    done = batch.end()
    assert (done.returncode, machine.logins()) == (0, 3), done.stderr
    assert 'cannot be used' not in done.stderr
    assert_clean(machine, cache=True)


def started_by_two_names(batches, machine, tmp_path, gate):
    """Start one job by each name, in runs that are killed; return both names."""
    names = [machine.yaml(), by_another_name(machine, tmp_path)]
    lines = [f'echo one; {gate.wait("one")}', f'echo two; {gate.wait("two")}']
    for number, name in enumerate(names, 1):
        batch = batches.start(lines[:number], [name], *NO_GPU)
        batch.until(f'started: batch.sh.{number}')
        batch.process.kill()
        batch.process.wait()
    return names


def test_what_was_started_by_either_name_is_collected(batches, lab, tmp_path, gate):
    machine = lab()
    names = started_by_two_names(batches, machine, tmp_path, gate)
    batch = batches.start(None, names, *NO_GPU)
    for job in ('one', 'two'):
        gate.open(job)
    done = batch.end()
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert [result(f'batch.sh.{number}') for number in (1, 2)] == [b'one\n', b'two\n']
    assert 'done: 2 jobs: 2 finished' in done.stdout and same(machine, *names) in done.stderr
    assert_clean(machine, cache=True)


def test_what_was_started_by_either_name_is_cancelled(run_cli, batches, lab, tmp_path, gate):
    machine = lab()
    names = started_by_two_names(batches, machine, tmp_path, gate)
    done = run_cli('execute_batch', 'batch.sh', '--cancel')
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.splitlines() == [
        f'batch.sh.1: stopped, on {names[0]}', f'batch.sh.2: stopped, on {names[1]}',
        'cancelled: 2 jobs']
    assert_clean(machine, cache=True)


@pytest.mark.parametrize('options', [(), ('--fanout', '1')])
def test_a_command_runs_once_on_an_account_of_two_names(run_cli, lab, tmp_path, options):
    machine = lab()
    names = [machine.yaml(), by_another_name(machine, tmp_path)]
    done = run_cli('execute_to', '--machines', *names, *options, '--', 'echo here')
    assert (done.returncode, done.stdout.count('here\n')) == (1, 1)
    assert done.stderr in [             # without --fanout, the second name may begin first
        f'left out: {left} ({same(machine, kept, left)})\n'
        for kept, left in ([names] if options else [names, names[::-1]])]
    done = run_cli('query_machines', '--machines', *names)
    assert done.returncode == 1 and done.stdout.splitlines()[2].endswith(
        f'cannot be used: {same(machine, *names)}')


def test_two_computers_may_share_a_home(batches, lab, outside, gate):
    machines = [lab(), lab()]
    files = [machine.yaml(workdir=str(outside / 'work')) for machine in machines]
    done = batches.run(gate.meeting(2), files, *NO_GPU[:1], '--reserve')
    assert done.returncode == 0, done.stderr
    assert [machine.logins() for machine in machines] == [1, 1]
