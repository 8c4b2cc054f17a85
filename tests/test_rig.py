"""The rig works as documented: otherwise no other test with a machine means anything."""
import os
import subprocess
import sys
import textwrap

import pytest
import rig
from batching import wait_until

QUERY = 'nvidia-smi --query-gpu={} --format=csv,noheader,nounits'


# ---- One machine ----

def test_a_machine_has_its_own_home_path_and_name(lab1, lab2):
    for machine in (lab1, lab2):
        answer = machine.run('pwd; echo "$HOME"; echo "$PATH"; echo "$RIG_MACHINE $USER"')
        home, home_variable, path, mark = answer.stdout.splitlines()
        assert home == home_variable == str(machine.home)
        assert path.split(':')[0] == str(machine.bin)
        assert mark == f'{machine.folder} {machine.user}'
    assert lab1.home != lab2.home


@pytest.mark.parametrize('shell', ['bash', 'dash', 'zsh', 'fish', 'tcsh'])
def test_the_login_shell_is_the_one_asked_for_and_keeps_path(lab, shell):
    machine = lab(shell=rig.program(shell))
    name = machine.run("sh -c 'ps -o comm= -p $PPID'; true")
    assert (name.stdout.strip(), name.stderr) == (shell, '')
    login = '-ic' if shell == 'tcsh' else '-ilc'        # tcsh accepts -l only as its sole option
    assert machine.run(f'exec $SHELL {login} env').stdout.count(f'PATH={machine.bin}:') == 1


@pytest.mark.parametrize('shell, file', [
    ('bash', '.bashrc'), ('zsh', '.zshenv'), ('fish', '.config/fish/config.fish'),
    ('tcsh', '.tcshrc')])
def test_start_files_are_read(lab, shell, file):
    machine = lab(shell=rig.program(shell), startup={file: 'echo from the start file\n'})
    assert machine.run('echo done').stdout == 'from the start file\ndone\n'


def test_profile_leads_to_bashrc_in_a_login_shell(lab):
    machine = lab(startup={'.bashrc': 'export CONDA=yes\n'})
    assert machine.run("bash -lc 'echo $CONDA'").stdout == 'yes\n'


def test_environment_reaches_sessions_byte_for_byte(lab):
    value = r'''a "b" \ $c 'd' #e'''
    assert lab(env={'ODD': value}).run('printenv ODD').stdout == value + '\n'


def test_options_for_sshd_win(lab):
    machine = lab(sshd_options='ForceCommand echo forced\nPrintMotd yes')
    assert machine.run('echo asked').stdout == 'forced\n'


def test_options_that_sshd_refuses_are_said_before_it_starts(lab):
    with pytest.raises(ValueError, match='NoSuchOption'):
        lab(sshd_options='NoSuchOption yes')


@pytest.mark.skipif(os.getuid() != 0, reason='only root can log in as another uid')
def test_root_has_machines_with_an_unprivileged_account(lab):
    machine = lab(uid=20001, startup={'.config/deep/file': 'text'})
    answer = machine.run('id -u; id -G; echo text >new && cat new .config/deep/file; mkdir /no')
    assert answer.stdout == '20001\n20001\ntext\ntext'
    assert 'Permission denied' in answer.stderr


def test_machine_file_names_what_a_login_needs(lab1):
    text = lab1.yaml(gpus=[0], ip=None).read_text()
    assert text == textwrap.dedent(f'''\
        username: "ben"
        port: {lab1.port}
        ssh_key_path: "{lab1.key}"
        ssh_options: {{"UserKnownHostsFile": "{lab1.known_hosts}"}}
        gpus: [0]
    ''')


def test_rsync_works_with_a_machine(lab, tmp_path):
    machine = lab()
    (tmp_path / 'a b').write_text('text')
    ssh, target = machine.ssh_argv()[:-1], machine.ssh_argv()[-1]
    subprocess.run(['rsync', '-a', '-e', ' '.join(ssh), tmp_path / 'a b', f'{target}:'],
                   check=True)
    assert (machine.home / 'a b').read_text() == 'text'


# ---- Its GPUs, load and programs ----

def test_gpus_answer_in_the_order_asked(lab1):
    answer = lab1.run(QUERY.format('memory.free,index,uuid,mig.mode.current'))
    assert answer.stdout == ('16000, 0, GPU-00000000-0000-0000-0000-000000000000, [N/A]\n'
                             '16000, 1, GPU-00000000-0000-0000-0000-000000000001, [N/A]\n')
    unknown = lab1.run(QUERY.format('index,no.such'))
    assert unknown.returncode == 2
    assert unknown.stdout == 'Field "no.such" is not a valid field to query.\n'


def test_gpus_can_change(lab):
    machine = lab(gpus=[{'index': 3, 'memory_total_mb': 9, 'memory_free_mb': 4,
                         'utilization': 50, 'compute_mode': 'Exclusive_Process'}])
    columns = 'index,memory.used,memory.total,utilization.gpu,compute_mode'
    assert machine.run(QUERY.format(columns)).stdout == '3, 5, 9, 50, Exclusive_Process\n'
    machine.set_gpus([])
    none = machine.run(QUERY.format('index'))
    assert (none.stdout, none.returncode) == ('No devices were found\n', 6)
    machine.set_gpus('recorded, text\n')
    assert machine.run(QUERY.format('index')).stdout == 'recorded, text\n'
    machine.set_gpus(None, nvidia_smi='#!/bin/sh\necho broken; exit 9\n')
    broken = machine.run(QUERY.format('index'))
    assert (broken.stdout, broken.returncode) == ('broken\n', 9)
    machine.set_gpus(None)
    assert machine.run('command -v nvidia-smi').returncode != 0


def test_load_is_what_was_asked_for(lab):
    machine = lab(cores=3, memory_mb=100, busy_cores=1.5)
    answer = machine.run('nproc; grep -c "^cpu[0-9]" "$SSH_SCHEDULER_PROC"/stat; '
                         'grep Available "$SSH_SCHEDULER_PROC"/meminfo; '
                         'cut -d" " -f1 "$SSH_SCHEDULER_PROC"/loadavg')
    assert answer.stdout.split() == ['3', '3', 'MemAvailable:', '102400', 'kB', '1.50']


def test_path_without_a_program_and_with_only_some(lab):
    find = 'command -v rsync cat nvidia-smi'
    without = lab(leave_out=('rsync',)).run(find).stdout.split()
    assert [os.path.basename(path) for path in without] == ['cat']
    only = lab(tools=('rsync',)).run(find).stdout.split()
    assert [os.path.basename(path) for path in only] == ['rsync']


def test_farm_leaves_out(tmp_path):
    names = os.listdir(rig.farm(tmp_path / 'all'))
    assert {'rsync', 'nvidia-smi'}.isdisjoint(names) and {'bash', 'cat', 'python3'} <= set(names)
    assert sorted(os.listdir(rig.farm(tmp_path / 'two', only=('sh', 'ls')))) == ['ls', 'sh']


# ---- Its life ----

def test_logins_are_counted(lab):
    machine = lab()
    assert machine.logins() == 0
    for count in (1, 2, 3):
        machine.run('true')
        assert machine.logins() == count


def start_job(machine):
    """Leave a process on the machine that outlives its login, and return its pid."""
    pid = int(machine.run('sleep 1000 </dev/null >/dev/null 2>&1 & echo $!').stdout)
    wait_until(lambda: rig.cmdline(pid) == 'sleep 1000', 'what was forked has become it')
    return pid


def test_processes_are_those_of_the_machine(lab, lab1):
    machine = lab()
    pid = start_job(machine)
    assert machine.processes() == [(pid, 'sleep 1000')]
    assert pid not in dict(lab1.processes())


def test_stop_ends_connections_and_not_jobs(lab):
    machine = lab()
    pid, port = start_job(machine), machine.port
    with subprocess.Popen([*machine.ssh_argv(), 'echo in; cat'], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as connection:
        assert connection.stdout.readline() == 'in\n'
        machine.stop()
        assert connection.wait(rig.SAFETY_NET_S) == 255
    assert machine.run('true').returncode == 255
    assert pid in dict(machine.processes())
    machine.start()
    assert (machine.run('echo back').stdout, machine.port) == ('back\n', port)


def test_power_off_leaves_no_process(lab):
    machine = lab()
    pid = start_job(machine)
    machine.power_off()
    assert machine.processes() == []
    assert rig.ends(pid)
    machine.start()
    assert machine.run('echo on').stdout == 'on\n'


def test_a_frozen_machine_answers_when_it_thaws(lab):
    machine = lab()
    with subprocess.Popen([*machine.ssh_argv(), 'echo in; cat'], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as connection:
        assert connection.stdout.readline() == 'in\n'
        machine.freeze()
        connection.stdin.write('late\n')
        connection.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            connection.wait(0.1)
        machine.thaw()
        assert connection.stdout.read() == 'late\n'


def test_a_frozen_machine_can_be_stopped(lab):
    machine = lab()
    machine.freeze()
    machine.stop()


def test_nothing_is_left_of_a_machine(tmp_path):
    (tmp_path / 'locked').mkdir()
    with rig.Machine('gone') as machine:
        pid = start_job(machine)
        machine.run('mkdir -p a/b; chmod 0 a')
        sshd = machine.sshd.pid
        left = rig.leftovers()
        assert any(f'folder {machine.folder} ' in line for line in left)
        assert any(f'process {pid} ' in line for line in left)
        assert any(f'process {sshd} ' in line for line in left)
    assert not machine.folder.exists()
    assert not any(str(machine.folder) in line or 'sleep 1000' in line
                   for line in rig.leftovers())


# ---- The fixtures for the client ----

@pytest.fixture
def scheduler(tmp_path):
    """A stand-in for the program, which runs the Python text of its first argument."""
    file = tmp_path / 'stand_in.py'
    file.write_text('import sys; exec(sys.argv[1])')
    return file


def test_run_cli_gives_a_private_environment(run_cli, project, client_home, monkeypatch):
    monkeypatch.setenv('SSH_AUTH_SOCK', '/somewhere')
    done = run_cli('import os; print(os.environ["HOME"], os.getcwd(), os.environ["NEW"],'
                   '"SSH_AUTH_SOCK" in os.environ, sys.stdin.read()); sys.exit(3)',
                   stdin='input', env={'NEW': 'new'})
    assert done.stdout == f'{client_home} {project} new False input\n'
    assert (done.stderr, done.returncode) == ('', 3)
    assert list(project.iterdir()) == []


def test_run_cli_shows_what_was_printed_before_a_timeout(run_cli):
    with pytest.raises(pytest.fail.Exception, match='(?s)did not end.*half a line'):
        run_cli('print("half a line", flush=True); import time; time.sleep(1000)', timeout=4)


def test_run_cli_notices_who_holds_the_output_open(run_cli):
    with pytest.raises(pytest.fail.Exception, match='(?s)exited with 0, but something holds'):
        run_cli('import subprocess; subprocess.Popen(["sleep", "1000"])', timeout=4)


def test_start_cli_is_ended_with_the_test(start_cli):
    assert start_cli('print("up", flush=True); sys.stdin.read()').stdout.readline() == 'up\n'


def test_missing_packages_are_listed_for_make():
    done = subprocess.run([sys.executable, rig.__file__, '--missing'], capture_output=True,
                          text=True)
    missing = rig.missing_extras()
    assert set(missing) <= {*rig.HOST_PACKAGES, *rig.BROWSER_PACKAGES, *rig.SLURM_PACKAGES,
                            *rig.ACCOUNTING_PACKAGES}
    assert (done.stdout.split(), done.returncode) == (missing, bool(missing))


def test_the_name_of_each_test_fits_into_the_environment_of_a_process(request):
    assert max(len(item.nodeid) for item in request.session.items) < 500
