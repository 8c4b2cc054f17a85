"""The clusters of the tests work as documented: a real Slurm, its faults, and its stand-ins."""
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import clusters
import pytest
import rig
from batching import wait_until

BATCH = 'sbatch --parsable --chdir=/ --output=/dev/null'
WHO = 'hostname; id -u; id -un; echo $HOME; cd; pwd -P; getent passwd "$(id -u)" | cut -d: -f6'


def submitted(cluster, script, options=''):
    """Submit bash text on the login node; return the job's id."""
    done = cluster.login.run(f'{BATCH} {options}', stdin=f'#!/bin/bash\n{script}\n')
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def await_state(cluster, number, *states):
    """Wait for one of the states, and return what Slurm lists of the job."""
    wait_until(lambda: listed(cluster, number).state in states, f'{number} is {states}')
    return listed(cluster, number)


def listed(cluster, number):
    return next(job for job in cluster.squeue() if job.id == number)


def started(cluster, options=''):
    """Start a job that runs until work/go exists; return its id when it has begun."""
    number = submitted(cluster, f'cd {cluster.workdir}; hostname >at; until [ -e go ]; do '
                       'sleep 0.05; done; echo >gone', options)
    wait_until((cluster.workdir / 'at').exists, 'the job has begun')
    wait_until((cluster.workdir / 'at').read_text, 'and said where')
    return number


def running(cluster, name):
    """Return the pids of Slurm's programs of this name; each running job has a slurmstepd."""
    return [pid for pid in rig.knowing(cluster.folder)
            if rig.read_proc(pid, 'comm') == f'{name}\n'.encode()]


def ask(cluster, script, command=None):
    """Submit a job to a stand-in for sbatch; return (status, stdout, stderr)."""
    cluster.wrap('sbatch', script)
    done = cluster.login.run(command or BATCH, stdin='#!/bin/bash\nexit 7\n')
    return done.returncode, done.stdout, done.stderr


# ---- A cluster ----

@pytest.mark.parametrize('uid', [None, pytest.param(20001, marks=pytest.mark.skipif(
    os.getuid() != 0, reason='only root can log in as another uid'))])
def test_a_job_runs_on_a_node_as_the_account_of_the_login(make_cluster, uid):
    cluster = make_cluster(uid=uid)
    place = cluster.workdir / 'said'
    submitted(cluster, f'{{ {WHO}; }} >{place}.new; mv {place}.new {place}')
    wait_until(place.exists, 'the job has written')
    here, *account = cluster.login.run(WHO).stdout.splitlines()
    there, *job_account = place.read_text().splitlines()
    number = os.getuid() if uid is None else uid
    assert job_account == account == [str(number), 'ben', *[str(cluster.home)] * 3]
    assert place.stat().st_uid == number
    if cluster.apart and os.getuid() == 0:
        assert (here, there) == ('login1', 'n1')
    assert [job.id for job in cluster.squeue()] == [1]
    mine = cluster.login.run('squeue -h -t all -u "$USER" -o %i; squeue -h -t all --me -o %i')
    assert mine.stdout.split() == ['1', '1']


def test_two_gpus_are_given_to_a_job(cluster):
    place = cluster.workdir / 'gpus'
    submitted(cluster, f'echo $CUDA_VISIBLE_DEVICES >{place}', '--gres=gpu:2')
    wait_until(lambda: place.exists() and place.read_text(), 'the job has written')
    assert place.read_text() == '0,1\n'
    refused = cluster.login.run(f'{BATCH} --gres=gpu:3 --wrap true')
    assert 'Requested node configuration is not available' in refused.stderr


def test_sizes_and_lines_of_the_configuration(make_cluster):
    cluster = make_cluster(3, cpus=5, gpus=0, memory=3000,
                           conf=['MaxJobCount=77', 'Prolog={folder}/prolog'])
    node = cluster.node('n3')
    assert (node['CPUTot'], node['RealMemory'], node['Gres']) == ('5', '3000', '(null)')
    assert 'MaxJobCount             = 77\n' in cluster.scontrol('show', 'config')
    assert f'= {cluster.folder}/prolog\n' in cluster.scontrol('show', 'config')


def test_the_machine_file_names_the_engine(cluster):
    text = cluster.yaml(max_jobs=3, engine_options='--partition=main').read_text()
    assert text.splitlines()[-5:] == [
        'engine: "slurm"', f'workdir: "{cluster.workdir}"',
        f'env: {{"SLURM_CONF": "{cluster.conf}"}}', 'max_jobs: 3',
        'engine_options: "--partition=main"']
    assert cluster.login.yaml() == cluster.yaml()


def test_two_clusters_know_nothing_of_each_other(make_cluster):
    one, other = make_cluster(1), make_cluster(1)
    submitted(one, 'true')
    assert ([job.id for job in one.squeue()], other.squeue()) == ([1], [])


def test_with_accounting_sacct_knows_jobs(make_cluster):
    cluster = make_cluster(1, accounting=True)
    number = submitted(cluster, 'exit 7')
    ask = f'sacct -X -n -P -j {number} --format=JobIDRaw,State,ExitCode'
    wait_until(lambda: cluster.login.run(ask).stdout == f'{number}|FAILED|7:0\n', 'sacct knows')
    cluster.freeze('slurmdbd')
    later = submitted(cluster, 'exit 8')
    await_state(cluster, later, 'FAILED')       # Slurm works without slurmdbd
    with subprocess.Popen([*cluster.login.ssh_argv(), f'sacct -X -n -P -j {number} -o State'],
                          text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as login:
        with pytest.raises(subprocess.TimeoutExpired):
            login.wait(1)
        cluster.thaw('slurmdbd')
        assert (login.stdout.read(), login.wait(rig.SAFETY_NET_S)) == ('FAILED\n', 0)


def test_without_accounting_sacct_says_so(cluster):
    real = cluster.login.run('sacct')
    cluster.wrap('sacct', clusters.NO_ACCOUNTS)
    done = cluster.login.run('sacct')
    assert (real.returncode, real.stderr) == (done.returncode, done.stderr)


# ---- Its faults ----

def test_a_crash_ends_jobs_and_a_boot_brings_the_node_back(make_cluster):
    cluster = make_cluster(1)
    number = started(cluster, '--no-requeue')
    cluster.crash('n1')
    assert running(cluster, 'slurmstepd') == []
    assert listed(cluster, number).state == 'RUNNING'       # Slurm does not know yet
    cluster.lose('n1')
    assert listed(cluster, number).state == 'NODE_FAIL'
    (cluster.workdir / 'at').unlink()
    cluster.boot('n1')
    started(cluster)
    (cluster.workdir / 'go').touch()
    wait_until((cluster.workdir / 'gone').exists, 'a job runs there')


def test_jobs_run_on_where_slurm_lost_sight_of_a_node(make_cluster):
    cluster = make_cluster(1)
    number = started(cluster, '--no-requeue')
    cluster.part('n1')
    wait_until(lambda: not running(cluster, 'slurmd'), 'the daemon is gone')
    cluster.lose('n1')
    assert listed(cluster, number).state == 'NODE_FAIL'
    (cluster.workdir / 'go').touch()
    wait_until((cluster.workdir / 'gone').exists, 'the job works on')
    assert listed(cluster, number).state == 'NODE_FAIL'


def test_a_node_that_is_back_in_sight_ends_jobs_that_slurm_gave_up(make_cluster):
    cluster = make_cluster(1)
    started(cluster, '--no-requeue')
    cluster.part('n1')
    cluster.lose('n1')
    cluster.boot('n1')
    wait_until(lambda: not running(cluster, 'slurmstepd'), 'the job was ended')
    assert not (cluster.workdir / 'gone').exists()
    wait_until(lambda: cluster.node('n1')['State'] == 'IDLE', 'the node can be used')


def test_a_frozen_controller_takes_a_job_and_gives_no_answer(make_cluster):
    cluster = make_cluster(1, conf=['MessageTimeout=2'])
    cluster.freeze()
    status, said, complaint = ask(cluster, 'exec "$REAL" "$@"\n')
    assert (status, said, complaint) == (1, '', clusters.TIMED_OUT + '\n')
    cluster.thaw()
    wait_until(cluster.squeue, 'the job is there all the same')


def test_a_controller_that_is_away_comes_back_with_its_jobs(make_cluster):
    cluster = make_cluster(1)
    number = started(cluster)
    cluster.halt()
    real = cluster.login.run('squeue')
    cluster.wrap('squeue', clusters.AWAY)
    stand_in = cluster.login.run('squeue')
    assert 'Unable to contact slurm controller' in real.stderr
    assert (real.returncode, real.stderr) == (stand_in.returncode, stand_in.stderr)
    (cluster.workdir / 'go').touch()
    wait_until((cluster.workdir / 'gone').exists, 'jobs run without it')
    cluster.resume()
    await_state(cluster, number, 'COMPLETED')


def test_a_node_without_the_folder(make_cluster):
    cluster = make_cluster(1)
    if os.getuid() != 0 or not cluster.apart:
        pytest.skip('only root can hide a folder from a node, where unshare is allowed')
    file = cluster.workdir / 'file'
    cluster.hide('n1')
    number = submitted(cluster, 'true', f'--output={file}')
    await_state(cluster, number, 'FAILED')
    assert cluster.job(number)['ExitCode'] == '0:53'
    assert not file.exists()
    cluster.show('n1')
    await_state(cluster, submitted(cluster, 'true', f'--output={file}'), 'COMPLETED')
    assert file.exists()


def test_jobs_outlive_their_login_node(cluster):
    number = started(cluster)
    assert cluster.login.processes() == []
    cluster.login.power_off()
    assert running(cluster, 'slurmstepd')
    cluster.login.start()
    (cluster.workdir / 'go').touch()
    await_state(cluster, number, 'COMPLETED')


def test_another_login_node_has_the_same_home_and_slurm(cluster):
    cluster.login.run('echo text >file')
    number = submitted(cluster, 'true')
    with cluster.another_login() as login:
        assert login.run('cat file').stdout == 'text\n'
        assert login.run('squeue -h -t all -o %i').stdout == f'{number}\n'
        if cluster.apart and os.getuid() == 0:
            assert login.run('hostname').stdout == 'login2\n'


# ---- Counted requests ----

def test_requests_of_logins_are_counted_and_others_are_not(cluster):
    assert cluster.rpcs() == Counter()
    for _ in range(3):
        number = submitted(cluster, 'true')
    await_state(cluster, number, 'COMPLETED')
    cluster.login.run('squeue; scancel 1')
    assert cluster.rpcs() == Counter(REQUEST_SUBMIT_BATCH_JOB=3, REQUEST_JOB_INFO=1,
                                     REQUEST_PARTITION_INFO=1, REQUEST_KILL_JOB=1)


# ---- Stand-ins ----

def test_banners_stand_around_the_id(cluster):
    status, said, complaint = ask(cluster, clusters.BANNERS)
    before, number, after = said.splitlines()
    assert (status, number) == (0, '1') and complaint
    assert not before.isdigit() and not after.isdigit()


@pytest.mark.parametrize('script, status, complaint, jobs', [
    (clusters.ACCEPTED_TIMED_OUT, 1, clusters.TIMED_OUT, 1),
    (clusters.LOST_TIMED_OUT, 1, clusters.TIMED_OUT, 0),
    (clusters.ACCEPTED_KILLED, 137, '', 1), (clusters.LOST_KILLED, 137, '', 0)])
def test_an_answer_that_does_not_come(cluster, script, status, complaint, jobs):
    done = ask(cluster, script, f'{BATCH}; exit $?')
    assert (done[0], done[1]) == (status, '') and complaint in done[2]
    assert len(cluster.squeue()) == jobs


def test_accepted_twice(cluster):
    assert ask(cluster, clusters.ACCEPTED_TWICE) == (0, '2\n', '')
    for number in (1, 2):
        await_state(cluster, number, 'FAILED')      # each has run the script
        assert cluster.job(number)['ExitCode'] == '7:0'


def test_the_id_of_another(cluster):
    submitted(cluster, 'true')
    assert ask(cluster, clusters.says_id(1)) == (0, '1\n', '')
    cluster.wrap('squeue', clusters.renamed(2, 'other'))
    said = cluster.login.run("squeue -h -t all -o '%i|%T|%j' | cut -d'|' -f1,3").stdout
    assert sorted(said.split()) == ['1|sbatch', '2|other']


def test_a_listing_that_lags(cluster):
    ask_all, ask_ids = "squeue -h -t all -o '%i %j'", "squeue -h -t all -o %i"
    cluster.wrap('squeue', clusters.LAGS)
    assert cluster.login.run(ask_all).stdout == ''
    submitted(cluster, 'true')
    assert cluster.login.run(ask_all).stdout == ''
    assert cluster.login.run(ask_ids).stdout == '1\n'
    cluster.unwrap('squeue')
    assert cluster.login.run(ask_all).stdout == '1 sbatch\n'


def test_a_scancel_that_does_nothing(cluster):
    number = started(cluster)
    cluster.wrap('scancel', clusters.NOTHING)
    done = cluster.login.run(f'scancel {number}')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert cluster.rpcs()['REQUEST_KILL_JOB'] == 0
    assert cluster.calls('scancel') == [[str(number)]]


@pytest.mark.parametrize('script, jobs', [(clusters.ANSWER_HELD, 1), (clusters.QUESTION_HELD, 0)])
def test_a_call_is_held_until_it_is_released(cluster, script, jobs):
    cluster.wrap('sbatch', script)
    assert not cluster.is_held('sbatch')
    with subprocess.Popen([*cluster.login.ssh_argv(), f'{BATCH} --wrap true'], text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as login:
        wait_until(lambda: cluster.is_held('sbatch'), 'it waits')
        assert len(cluster.squeue()) == jobs and login.poll() is None
        cluster.release('sbatch')
        assert (login.stdout.read(), login.wait(rig.SAFETY_NET_S)) == ('1\n', 0)


def test_once_is_once(cluster):
    script = clusters.once(clusters.LOST_TIMED_OUT)
    assert ask(cluster, script)[0] == 1
    assert cluster.login.run(BATCH, stdin='#!/bin/bash\ntrue\n').stdout == '1\n'
    assert len(cluster.calls('sbatch')) == 2
    cluster.unwrap('sbatch')
    assert cluster.login.run('command -v sbatch').stdout == rig.program('sbatch') + '\n'
    assert ask(cluster, script)[0] == 1             # no trace of the first call is left


# ---- What is left ----

def test_nothing_is_left_of_a_cluster():
    if clusters.why_not():
        pytest.skip(clusters.why_not())
    with clusters.Cluster() as cluster:
        started(cluster)
        submitted(cluster, f'cd {cluster.home}; exec env -i setsid sleep 1000')
        wait_until(lambda: any('sleep 1000' in line for line in clusters.leftovers()), 'it runs')
        left = '\n'.join(rig.leftovers())
        for what in ('slurmctld', 'slurmd', 'munged', f'folder {cluster.folder}'):
            assert what in left
    assert not cluster.folder.exists()
    left = rig.leftovers() + clusters.leftovers()
    assert not [line for line in left if str(cluster.folder) in line or 'sleep 1000' in line]


TESTS = '''\
import os, time

def test_waits(cluster):
    cluster.sbatch(script=f'touch {cluster.workdir}/began; exec setsid sleep 1000')
    while not (cluster.workdir / 'began').exists():
        time.sleep(0.01)
    with open('ready.new', 'w') as file:
        file.write(f'{cluster.folder} {cluster.login.folder}')
    os.rename('ready.new', 'ready')
    time.sleep(1000)
'''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_tests_that_were_killed(tmp_path, number):
    if clusters.why_not():
        pytest.skip(clusters.why_not())
    (tmp_path / 'test_it.py').write_text(TESTS)
    (tmp_path / 'conftest.py').write_text(textwrap.dedent(f'''\
        import sys
        sys.path.insert(0, {str(Path(clusters.__file__).parent)!r})
        from conftest_of_all import *
    '''))
    (tmp_path / 'conftest_of_all.py').symlink_to(Path(clusters.__file__).with_name('conftest.py'))
    with subprocess.Popen([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-q',
                           'test_it.py'], cwd=tmp_path, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        ready = tmp_path / 'ready'
        wait_until(lambda: ready.exists() or tests.poll() is not None, 'the cluster is there')
        folders = list(map(Path, ready.read_text().split()))
        os.killpg(tests.pid, number)
        said = tests.communicate(timeout=rig.SAFETY_NET_S)[0]
    assert number == signal.SIGKILL or 'KeyboardInterrupt' in said, said
    wait_until(lambda: not rig.knowing(*folders), f'no process is left: {said}')
    wait_until(lambda: not any(folder.exists() for folder in folders), 'nor a folder')


# ---- Where there is no Slurm ----

def test_tests_are_skipped_aloud_where_slurm_is_missing(make_cluster, monkeypatch):
    monkeypatch.setattr(rig, 'SYSTEM_FOLDERS', ('/nowhere',))
    clusters.why_not.cache_clear()
    try:
        with pytest.raises(pytest.skip.Exception, match='apt-get install slurmctld slurmd '
                           'slurm-client munge slurmdbd mariadb-server$'):
            make_cluster(accounting=True)
    finally:
        clusters.why_not.cache_clear()


def test_shellcheck_finds_nothing_in_the_rig():
    found = subprocess.run([rig.program('shellcheck'), clusters.SLURM_RIG], capture_output=True,
                           text=True)
    assert (found.returncode, found.stdout) == (0, '')


def test_a_start_that_fails_says_why_and_leaves_nothing():
    if clusters.why_not():
        pytest.skip(clusters.why_not())
    cluster = clusters.Cluster(conf=['SelectType=select/nonsense'])
    with pytest.raises(RuntimeError, match='(?s)slurm_rig start .*select/nonsense'):
        cluster.__enter__()
    assert not cluster.folder.exists() and not rig.knowing(cluster.folder)
