"""Batches on a cluster: a real Slurm, with a login node that the client reaches over ssh.

The cluster is the one of clusters.py.  A job runs on a node with its own processes and its own
host name, so nothing can find the job from the login node.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import clusters
import pytest
import rig
from batching import (
    NO_GPU,
    RESULTS,
    constants,
    events,
    result,
    wait_until,
    with_constants,
    wrote,
)
from terminals import Terminal

import results_table
import ssh_scheduler

NODE = re.compile(r'n[1-9]\n')


def cluster_of(cluster, **more):
    """Write the machine file of a cluster under a short name, and return the name."""
    path = Path('cluster.yaml')
    path.write_text(Path(cluster.yaml(**more)).read_text())
    return path.name


def journal():
    """Return the events of the journal; a client may be writing one more."""
    (path,) = (RESULTS / '.ssh_scheduler').glob('journal*')
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.endswith('\n')]


def jobs_folder(cluster):
    """Return the folder of the files of jobs, as the login node and the nodes see it."""
    (folder,) = cluster.workdir.glob('*/jobs')
    return folder


def assert_gone(cluster):
    """Assert that nothing of the batch is left on the cluster, and no job of it can still run."""
    wait_until(lambda: all(job.state in ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL',
                                         'PREEMPTED') for job in cluster.squeue()), 'all are over')
    left = [path for path in cluster.workdir.glob('*/*') if path.name != 'cache']
    assert not left, left


# ---- Jobs on a node ----

def test_a_job_runs_on_a_node_and_its_files_come_back(cluster, batches):
    Path('input.txt').write_text('from here\n')
    done = batches.run(['hostname; cat input.txt; pwd -P; echo made >made.txt; rm input.txt',
                        'echo bad >&2; exit 3',
                        'kill -9 $$'], [cluster_of(cluster)], *NO_GPU)
    assert done.returncode == 1, done.stderr
    host, content, folder = result('batch.sh.1').decode().splitlines()
    assert content == 'from here' and folder.startswith(str(cluster.workdir))
    if cluster.apart:
        assert NODE.fullmatch(host + '\n')
    assert (RESULTS / 'batch.sh.1/made.txt').read_text() == 'made\n'
    assert not (RESULTS / 'batch.sh.1/input.txt').exists()
    assert result('batch.sh.2', 'err') == b'bad\n'
    assert {event['job']: event['exit_code'] for event in journal() if event['event'] == 'ended'} \
        == {'batch.sh.1': 0, 'batch.sh.2': 3, 'batch.sh.3': 137}
    assert sorted(events(done.stdout, 'started:', 'finished:', 'failed:')) == [
        'failed: batch.sh.2; echo bad >&2; exit 3', 'failed: batch.sh.3; kill -9 $$',
        *(line for line in done.stdout.splitlines() if line.startswith('finished: batch.sh.1')),
        *sorted(line for line in done.stdout.splitlines() if line.startswith('started:'))]
    assert_gone(cluster)


def test_a_job_has_the_environment_of_the_login_and_what_slurm_gives(cluster, batches):
    (cluster.home / '.profile').write_text('export FROM_LOGIN="a b"; hello() { echo "hello $1"; }\n'
                        '[ -z "${SLURM_JOB_ID-}" ] || echo read again\n')
    lines = ['echo $FROM_LOGIN; hello you; echo $CUDA_VISIBLE_DEVICES; echo $SLURM_JOB_ID; '
             'echo $SLURM_CPUS_PER_TASK; echo ${SSH_CONNECTION-none}; echo $SSH_SCHEDULER_JOB; '
             'umask; ulimit -n']
    done = batches.run(lines, [cluster_of(cluster)], '--num-gpus=2', '--num-cpus=3',
                       '--memory-required=300')
    assert done.returncode == 0, done.stderr + done.stdout
    login, hello, gpus, number, cores, ssh, name, umask, files = result(
        'batch.sh.1').decode().splitlines()
    assert (login, hello, gpus, cores, ssh, name) == (
        'a b', 'hello you', '0,1', '3', 'none', 'batch.sh.1')
    assert number.isdigit()
    assert umask == cluster.login.run('umask').stdout.strip()


def test_a_job_is_wrapped_on_its_node(cluster, batches):
    machine = cluster_of(cluster, wrap='env FROM="{gpu_ids} {gpus} {cores} {memory_mb} {name}"')
    done = batches.run(['echo $FROM; exit 4'], [machine], '--num-gpus=2', '--num-cpus=3',
                       '--memory-required=300')
    assert done.returncode == 1 and result('batch.sh.1') == b'0,1 2 3 300 batch.sh.1\n', done.stderr


def test_a_job_may_run_on_the_disk_of_its_node(cluster, batches, outside):
    Path('input.txt').write_text('from here\n')
    line = ('pwd -P; cat input.txt; mkdir -p "a b/c"; echo deep >"a b/c/d"; ln -s d "a b/c/link"; '
            'chmod 600 input.txt; exit 3')
    done = batches.run([line, 'true'], [cluster_of(cluster, node_folder=str(outside))], *NO_GPU)
    assert done.returncode == 1, done.stderr
    folder, content = result('batch.sh.1').decode().splitlines()
    assert folder.startswith(str(outside)) and content == 'from here'
    assert (RESULTS / 'batch.sh.1/a b/c/d').read_text() == 'deep\n'
    assert os.readlink(RESULTS / 'batch.sh.1/a b/c/link') == 'd'
    assert not [*outside.iterdir()]
    assert_gone(cluster)


def test_a_node_folder_that_is_not_there_is_named(cluster, batches):
    done = batches.run(['true'], [cluster_of(cluster, node_folder='$NOWHERE')], *NO_GPU)
    assert done.returncode == 1
    assert result('batch.sh.1', 'err').decode() == (
        'ssh-scheduler: node_folder: $NOWHERE is no folder on this node\n'
        'ssh-scheduler: the files of the job could not be copied into its folder\n'), done.stderr
    assert_gone(cluster)


# ---- Failures ----

TIMES = {'LISTING_S': 1, 'SILENCE_S': 2, 'MISSING_S': 2, 'RECORD_S': 1, 'LAG_S': 4, 'CANCEL_S': 2}


def hasty(**more):
    """Return an environment in which the program waits for seconds instead of minutes.

    But it gives all machines the time to answer, before the first one gets a job.
    """
    text = ssh_scheduler.REMOTE_ENGINE
    for name, seconds in TIMES.items():
        text, count = re.subn(rf'^{name}=[0-9]+', f'{name}={seconds}', text, flags=re.M)
        assert count == 1, name
    return constants(**{'REMOTE_ENGINE': text, 'REFRESH_S': 0.5, 'ASIDE_S': 0.5,
                        'LATECOMER_S': rig.SAFETY_NET_S, **more})


def hasty_but(**times):
    """Return hasty(), but with these times."""
    engine = hasty_engine()
    for name, seconds in times.items():
        engine = re.sub(rf'(?m)^{name}=[0-9]+', f'{name}={seconds}', engine)
    return hasty(REMOTE_ENGINE=engine)


def hasty_without_news():
    """Return hasty(), but a runner hears nothing of its jobs until its folder has a file `go`."""
    engine, begin = hasty_engine(), '\nhear_news() {'
    assert begin in engine
    return hasty(REMOTE_ENGINE=engine.replace(
        begin, f'{begin} [[ -e $home/go ]] || return 0;'))


def hasty_engine():
    return json.loads(hasty()['CRASH_SETTINGS'])['REMOTE_ENGINE']


def heads(said):
    """Return {head: text} of the lines that --what prints."""
    return {line[:12].strip().rstrip(':'): line[12:] for line in said.splitlines()}


def once(ledger, name='ran'):
    """Return a command that adds a line to the ledger, once for each run."""
    return f'echo {name} >>{ledger}'


def ids(cluster):
    return [job.id for job in cluster.squeue() if job.name.startswith('sshs-')]


def submission(script):
    """Return this stand-in for sbatch, which leaves the --test-only calls to the real one."""
    return f'[[ " $* " != *" --test-only "* ]] || exec "$REAL" "$@"\n{script}'


LIES = {'banners': ('sbatch', clusters.BANNERS),
        'accepted, timed out': ('sbatch', clusters.once(clusters.ACCEPTED_TIMED_OUT)),
        'lost, timed out': ('sbatch', clusters.once(clusters.LOST_TIMED_OUT)),
        'accepted, killed': ('sbatch', clusters.once(clusters.ACCEPTED_KILLED)),
        'lost, killed': ('sbatch', clusters.once(clusters.LOST_KILLED)),
        'twice': ('sbatch', clusters.ACCEPTED_TWICE),
        'silent scancel': ('scancel', clusters.NOTHING),
        'another id': ('sbatch', clusters.once(clusters.says_id(77777)))}


@with_constants
@pytest.mark.parametrize('lie', LIES)
def test_a_job_runs_once_whatever_sbatch_says(make_cluster, batches, ledger, lie):
    cluster = make_cluster(conf=['MessageTimeout=2'])
    name, script = LIES[lie]
    cluster.wrap(name, submission(script) if name == 'sbatch' else script)
    done = batches.run([f'{once(ledger, name)}; sleep 1; exit {code}'
                        for name, code in (('one', 0), ('two', 5))],
                       [cluster_of(cluster)], *NO_GPU, env=hasty())
    assert sorted(ledger.read_text().split()) == ['one', 'two'], done.stderr
    assert events(done.stdout, 'finished:', 'failed:') and done.returncode == 1
    assert {event['job']: event['exit_code'] for event in journal() if event['event'] == 'ended'} \
        == {'batch.sh.1': 0, 'batch.sh.2': 5}
    assert_gone(cluster)


@with_constants
def test_the_fence_alone_lets_one_of_two_run_the_command(make_cluster, batches, ledger):
    """Here neither `singleton` nor scancel keeps the two apart: they run at the same moment."""
    cluster = make_cluster(conf=['MinJobAge=300'])          # it lists both when all is over
    alone = clusters.ACCEPTED_TWICE.replace('"$@"', '"${@/--dependency=singleton/--quiet}"')
    cluster.wrap('sbatch', submission(alone))
    cluster.wrap('scancel', clusters.NOTHING)
    done = batches.run([f'{once(ledger)}; sleep 3; exit 5'], [cluster_of(cluster)], *NO_GPU,
                       env=hasty())
    assert ledger.read_text() == 'ran\n', done.stderr
    assert ends() == {'batch.sh.1': 5} and len(ids(cluster)) == 2
    assert_gone(cluster)


@with_constants
@pytest.mark.parametrize('moment', ['claimed', 'queued', 'running', 'ended', 'collected'])
def test_a_client_that_is_killed_loses_no_job(cluster, batches, ledger, moment):
    lines = [f'{once(ledger, name)}; sleep 1; exit {code}' for name, code in (
        ('one', 0), ('two', 5))]
    machine = cluster_of(cluster)
    first = batches.run(lines, [machine], *NO_GPU, env=hasty() | {
        'CRASH_WHEN': f'after write .*event.*{moment}'})
    assert first.returncode == -signal.SIGKILL, first.stderr
    done = batches.run(lines, [machine], *NO_GPU, env=hasty())
    assert sorted(ledger.read_text().split()) == ['one', 'two'], done.stderr
    ended = {event['job']: event['exit_code'] for event in journal() if event['event'] == 'ended'}
    assert ended == {'batch.sh.1': 0, 'batch.sh.2': 5}, done.stderr
    assert (RESULTS / 'batch.sh.2.out').exists()
    assert_gone(cluster)


def ends():
    """Return {job: exit status} of the ends in the journal."""
    return {event['job']: event['exit_code'] for event in journal() if event['event'] == 'ended'}


def begun(cluster, batches, ledger, line='sleep 60', **settings):
    """Start a batch of one job; return its Follower when its command runs, and its id."""
    settings.setdefault('env', hasty())
    run = batches.start([f'{once(ledger)}; {line}'], [cluster_of(cluster)], *NO_GPU, **settings)
    run.until('started:')
    wrote(ledger, 'ran')
    return run, ids(cluster)[-1]


@with_constants
def test_the_controller_may_be_frozen_while_jobs_are_handed_over(make_cluster, batches, ledger):
    cluster = make_cluster(conf=['MessageTimeout=2'])
    run = batches.start([once(ledger, 'one'), f'{once(ledger, "two")}; exit 4'],
                        [cluster_of(cluster)], *NO_GPU,
                        env=hasty(REMOTE_ENGINES={'slurm': ssh_scheduler.REMOTE_SLURM.replace(
                            'engine_submit() {', 'engine_submit() { until [[ -e $home/go ]]; do '
                            'sleep 0.05; done;')}))
    wait_until(lambda: len([*cluster.workdir.glob('*/jobs/*.more/submitting')]) == 2, 'they are')
    cluster.freeze()
    (jobs_folder(cluster).parent / 'go').touch()
    wait_until(lambda: [*cluster.workdir.glob('*/jobs/*.more/unsure')], 'sbatch has failed')
    cluster.thaw()
    done = run.end()
    assert ends() == {'batch.sh.1': 0, 'batch.sh.2': 4}, done.stderr
    assert sorted(ledger.read_text().split()) == ['one', 'two']


@with_constants
def test_a_controller_that_is_away_is_told_of_and_costs_no_job(cluster, batches, ledger, gate):
    run, _ = begun(cluster, batches, ledger, gate.wait('go'))
    cluster.halt()
    wait_until(lambda: [*cluster.workdir.glob('*/run.*/silent.said')], 'that was said')
    gate.open('go')
    run.until('finished:')
    cluster.resume()
    done = run.end()
    assert 'cluster.yaml: Slurm does not answer. Its jobs keep running or waiting' in done.stderr
    assert ledger.read_text() == 'ran\n' and ends() == {'batch.sh.1': 0}


@with_constants
def test_a_list_that_fails_for_long_changes_nothing(cluster, batches, ledger, gate):
    run, _ = begun(cluster, batches, ledger, gate.wait('go'))
    cluster.wrap('squeue', clusters.AWAY)
    wait_until(lambda: [*cluster.workdir.glob('*/run.*/silent.said')], 'that was said')
    cluster.unwrap('squeue')
    wait_until(lambda: not [*cluster.workdir.glob('*/run.*/silent.said')], 'it answers')
    gate.open('go')
    done = run.end()
    assert 'Slurm answers again' in done.stderr and ends() == {'batch.sh.1': 0}


@with_constants
def test_a_runner_that_is_killed_is_replaced(cluster, batches, ledger, gate):
    run, _ = begun(cluster, batches, ledger, gate.wait('go'))
    (self_file,) = cluster.workdir.glob('*/run.*/self')
    os.kill(int(self_file.read_text().split()[0]), signal.SIGKILL)
    wait_until(lambda: len([*cluster.workdir.glob('*/run.*/self')]) == 2, 'the next one')
    gate.open('go')
    done = run.end()
    assert ends() == {'batch.sh.1': 0}, done.stderr
    assert ledger.read_text() == 'ran\n'
    assert_gone(cluster)


@with_constants
def test_somebody_else_cancels_a_job_that_runs(cluster, batches, ledger):
    run, number = begun(cluster, batches, ledger)
    cluster.command('scancel', number)
    done = run.end()
    assert ends() == {'batch.sh.1': 143}, done.stderr
    assert 'the job was cancelled' in result('batch.sh.1', 'err').decode()
    assert ledger.read_text() == 'ran\n'


@with_constants
def test_somebody_else_cancels_a_job_that_waits(cluster, batches, ledger, run_cli):
    cluster.sbatch('--nodes=2', '--exclusive', script='sleep 100')
    run = batches.start([once(ledger)], [cluster_of(cluster)], *NO_GPU, env=hasty())
    run.until('queued:')
    cluster.command('scancel', ids(cluster)[-1])
    done = run.end()
    assert ends() == {'batch.sh.1': 143}, done.stderr
    assert 'before it began' in result('batch.sh.1', 'err').decode()
    assert ledger.read_text() == ''
    status = run_cli('execute_batch', 'batch.sh', '--status').stdout
    assert re.search(r'1 +failed 143 .*the job was cancelled before it began', status), status
    told = heads(run_cli('execute_batch', 'batch.sh', '--what=1').stdout)
    assert told['outcome'] == 'exit code 143, before it began'
    assert told['why'] == 'the job was cancelled before it began'
    assert 'queued' in told and 'started' not in told
    assert re.fullmatch('cluster.yaml, number [0-9]+ in its queue', told['machine'])


@with_constants
def test_a_lost_node_has_its_job_run_once_more(cluster, batches, ledger):
    run, number = begun(cluster, batches, ledger, f'[ $(wc -l <{ledger}) = 2 ] || sleep 60')
    node = next(job.node for job in cluster.squeue() if job.id == number)
    cluster.crash(node)
    cluster.lose(node)
    done = run.end()
    assert ends() == {'batch.sh.1': 0}, done.stderr
    assert f'lost on cluster.yaml: the node {node} failed' in done.stderr
    assert ledger.read_text() == 'ran\nran\n'


@with_constants
def test_a_node_that_is_out_of_sight_and_back_runs_its_job_on(cluster, batches, ledger, gate):
    run, number = begun(cluster, batches, ledger, gate.wait('go'))
    node = next(job.node for job in cluster.squeue() if job.id == number)
    cluster.part(node)
    gate.open('go')
    run.until('finished:')
    cluster.boot(node)
    done = run.end()
    assert ends() == {'batch.sh.1': 0}, done.stderr
    assert ledger.read_text() == 'ran\n'


@with_constants
def test_a_node_whose_prolog_fails_gets_no_more(make_cluster, batches, ledger):
    cluster = make_cluster(conf=['Prolog={folder}/prolog'])
    prolog = cluster.folder / 'prolog'
    prolog.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != n1 ]\n')
    prolog.chmod(0o755)
    done = batches.run([once(ledger)], [cluster_of(cluster)], *NO_GPU, env=hasty())
    assert ends() == {'batch.sh.1': 0}, done.stderr
    assert 'the node n1 could not start the job' in done.stderr
    assert ledger.read_text() == 'ran\n'


@with_constants
def test_a_node_without_the_folder_is_named(cluster, batches, ledger):
    if not cluster.apart:
        pytest.skip('nodes share their mounts here')
    cluster.hide('n1')
    done = batches.run([once(ledger)], [cluster_of(cluster)], *NO_GPU, env=hasty())
    assert ends() == {'batch.sh.1': 0}, done.stderr
    assert 'the node n1 cannot write in' in done.stderr
    assert ledger.read_text() == 'ran\n'


@with_constants
def test_memory_that_is_too_little_is_told(cluster, batches, ledger, run_cli):
    hungry = 'import time; x = bytearray(500 << 20); time.sleep(30)'
    done = batches.run([f"{once(ledger)}; exec python3 -c '{hungry}'"], [cluster_of(cluster)],
                       *NO_GPU, env=hasty())
    assert ends() == {'batch.sh.1': 137}, done.stderr
    assert re.fullmatch('ssh-scheduler: the job ran out of memory: [^:]*xceeded .*memory limit.*\n',
                        result('batch.sh.1', 'err').decode())
    status = run_cli('execute_batch', 'batch.sh', '--status').stdout
    assert re.search(r'1 +failed 137 .*the job ran out of memory', status), status
    told = heads(run_cli('execute_batch', 'batch.sh', '--what=1').stdout)
    assert told['why'] == 'the job ran out of memory' and 'after 0s' not in told['outcome'], told
    assert re.fullmatch('cluster.yaml, node n[12], number [0-9]+ in its queue', told['machine'])


@with_constants
def test_a_killed_script_is_reported_soon(cluster, batches, ledger):
    """Slurm says that it was killed: so nobody waits a minute for its record."""
    run, number = begun(cluster, batches, ledger, 'sleep 60',
                        env=hasty_but(MISSING_S=300, LAG_S=300))
    cluster.command('scancel', '--batch', '--signal=KILL', number)
    done = run.end()
    assert ends() == {'batch.sh.1': 137}, done.stderr
    assert result('batch.sh.1', 'err').decode() == (
        "ssh-scheduler: the job's shell on the node was killed\n")


@with_constants
def test_a_record_that_comes_late_counts(cluster, batches, ledger):
    """The login node sees the record of the end only after Slurm has reported the end."""
    run, number = begun(cluster, batches, ledger, 'sleep 60', env=hasty_but(RECORD_S=15))
    (jobs,) = cluster.workdir.glob('*/jobs')
    news = jobs.with_name('news')
    (record,) = news.glob('*.began')
    cluster.command('scancel', '--batch', '--signal=KILL', number)
    wait_until(lambda: [*jobs.glob('*.more/missing')], 'there is a doubt')
    assert not ends()
    (news / record.name.replace('.began', '.ended.5.no.200.10.0.0.0')).touch()
    done = run.end()
    assert ends() == {'batch.sh.1': 5}, done.stderr
    assert not result('batch.sh.1', 'err')


@with_constants
def test_the_memory_of_a_job_is_known(cluster, batches):
    hungry = 'import time; x = bytearray(60 << 20); time.sleep(2.5)'
    done = batches.run([f"exec python3 -c '{hungry}'"], [cluster_of(cluster)],
                       '--no-gpu-required', '--memory-required=500', env=hasty())
    (ended,) = (event for event in journal() if event['event'] == 'ended')
    assert 60 < ended['peak_memory_mb'] < 200, done.stderr


@with_constants
def test_a_preempted_job_runs_once_more(make_cluster, batches, ledger):
    cluster = make_cluster(conf=[
        'PreemptType=preempt/partition_prio', 'PreemptMode=REQUEUE',
        'PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1',
        'PartitionName=first Nodes=ALL MaxTime=60 PriorityTier=9'])
    run, number = begun(cluster, batches, ledger, f'[ $(wc -l <{ledger}) = 2 ] || sleep 60')
    other = cluster.sbatch('--partition=first', '--nodes=2', '--exclusive', script='sleep 2')
    done = run.end()
    assert ends() == {'batch.sh.1': 0}, done.stderr
    assert 'batch.sh.1: stopped on cluster.yaml: another job took its place' in done.stderr
    assert ledger.read_text() == 'ran\nran\n' and other != number


@with_constants
def test_a_job_that_an_administrator_puts_back_is_not_run_by_slurm(cluster, batches, ledger, gate):
    run, number = begun(cluster, batches, ledger, gate.wait('go'))
    with pytest.raises(RuntimeError, match='disabled'):
        cluster.scontrol('requeue', number)
    gate.open('go')
    assert run.end().returncode == 0
    assert ledger.read_text() == 'ran\n'


@with_constants
def test_the_time_limit_is_the_same_as_on_any_machine(cluster, batches, ledger):
    done = batches.run([f'{once(ledger)}; sleep 60'], [cluster_of(cluster)], *NO_GPU,
                       '--timeout=1', env=hasty())
    assert ends() == {'batch.sh.1': 124}, done.stderr
    assert 'stopped after 1' in result('batch.sh.1', 'err').decode()


@with_constants
def test_a_short_limit_of_the_cluster_is_not_cut_to_nothing(cluster, batches, ledger, gate):
    """Slurm announces its limit of a minute as the job begins, or up to 30 s later."""
    batches.start([f'{once(ledger)}; {gate.wait("told")}; sleep 3; exit 5'],
                  [cluster_of(cluster, engine_options='--time=1')], *NO_GPU, env=hasty())
    wrote(ledger, 'ran')
    cluster.command('scancel', '--batch', '--signal=USR1', ids(cluster)[-1])
    gate.open('told')
    wait_until(lambda: ends(), 'it has ended')
    assert ends() == {'batch.sh.1': 5}


@pytest.mark.parametrize(('text', 'seconds'), [
    ('2', '120'), ('0:05', '5'), ('1:30:09', '5409'), ('00:00:08', '8'), ('1-2', '93600'),
    ('1-2:03', '93780'), ('1-02:03:04', '93784'), ('UNLIMITED', ''), ('', ''), ('1-', '')])
def test_a_time_of_slurm_is_read(text, seconds):
    done = subprocess.run(['bash', '-c', f'{ssh_scheduler.REMOTE_SLURM}\nslurm_seconds "$1"\n'
                           'printf %s "$REPLY"', 'bash', text], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (seconds, '')


# ---- Where a job goes ----

def full(cluster):
    """Fill the cluster with a job of other people; return its id."""
    number = cluster.sbatch('--nodes=2', '--exclusive', script='sleep 600')
    wait_until(lambda: any(job.id == number and job.state == 'RUNNING'
                           for job in cluster.squeue()), 'it is full')
    return number


@with_constants
def test_a_job_comes_back_when_a_machine_is_free(cluster, lab, batches, ledger, gate):
    machine = lab()
    full(cluster)
    run = batches.start([gate.wait('go'), f'hostname >>{ledger}', f'hostname >>{ledger}'],
                        [machine.yaml(max_jobs=1), cluster_of(cluster)], *NO_GPU,
                        '--cluster-after=0.2', env=hasty())
    lines = [run.until('queued:'), run.until('queued:')]
    assert all(re.fullmatch(
        r'queued: batch\.sh\.[23] at cluster\.yaml \(Slurm [0-9]+: (no room now|others first)'
        r'(, would start about .*)?\)', line) for line in lines), lines
    gate.open('go')
    moved = run.until('moved:')
    assert moved == f'moved: batch.sh.3: {Path(machine.yaml()).name} became free' or (
        moved.startswith('moved: batch.sh.3: '))
    done = run.end()
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith('moved:')][1:]
    assert len(ledger.read_text().splitlines()) == 2
    assert not {job.state for job in cluster.squeue()} & {'COMPLETED', 'FAILED'}
    assert_gone_but(cluster, 1)


def assert_gone_but(cluster, running):
    wait_until(lambda: sum(job.state in ('RUNNING', 'PENDING') for job in cluster.squeue())
               == running, 'Slurm has none of ours')


@with_constants
def test_a_job_that_has_begun_does_not_come_back(cluster, lab, batches, ledger, gate):
    """The client tries to take the job back: it does not know yet that the job runs."""
    machine = lab()
    run = batches.start([gate.wait('one'), f'{once(ledger)}; {gate.wait("two")}'],
                        [machine.yaml(max_jobs=1), cluster_of(cluster)], *NO_GPU,
                        '--cluster-after=0', '--verbose', env=hasty_without_news())
    wrote(ledger, 'ran')
    gate.open('one')
    run.until('finished: batch.sh.1')
    wait_until(lambda: [*cluster.workdir.glob('*/jobs/*.more/claim.cancel')], 'it is asked back')
    (jobs_folder(cluster).parent / 'go').touch()
    gate.open('two')
    done = run.end()
    assert done.returncode == 0 and 'moved:' not in done.stdout, done.stderr
    assert ledger.read_text() == 'ran\n'


@with_constants
def test_a_start_is_reported_once(cluster, batches):
    """The node's note of the start stays on the login node until a job ends."""
    done = batches.run(['for i in 1 2 3 4 5 6; do echo $i; sleep 0.5; done'],
                       [cluster_of(cluster)], *NO_GPU, '--verbose', env=hasty())
    assert done.returncode == 0
    assert len(re.findall(r'(?m): data  growth  batch\.sh\.1\b', done.stderr)) > 2, done.stderr
    assert len(re.findall(r'(?m): started  batch\.sh\.1\b', done.stderr)) == 1


@with_constants
def test_machines_come_before_a_cluster(cluster, lab, batches, gate):
    machine = lab()
    run = batches.start([f'hostname; {gate.wait("one")}', 'hostname', 'hostname'],
                        [cluster_of(cluster), machine.yaml(max_jobs=1)], *NO_GPU,
                        '--cluster-after=0.5', env=hasty())
    for _ in range(2):
        run.until('finished:')                  # in any order
    gate.open('one')
    assert run.end().returncode == 0
    where = {event['job']: event['where'] for event in journal() if event['event'] == 'claimed'}
    assert {name: place == 'cluster.yaml' for name, place in where.items()} == {
        'batch.sh.1': False, 'batch.sh.2': True, 'batch.sh.3': True}


@with_constants
def test_a_job_that_fits_no_machine_goes_to_the_cluster_at_once(cluster, lab, batches):
    machine = lab()
    done = batches.run(['echo $CUDA_VISIBLE_DEVICES'], [machine.yaml(), cluster_of(cluster)],
                       '--memory-required=100', env=hasty(), timeout=25)
    assert done.returncode == 0 and result('batch.sh.1') == b'0\n', done.stderr


def test_a_dry_run_shows_what_the_cluster_will_get(cluster, lab, batches):
    done = batches.run(['true'] * 2, [lab().yaml(max_jobs=1), cluster_of(cluster)], *NO_GPU,
                       '--dry-run')
    assert re.search(r'would start: batch\.sh\.2 on cluster\.yaml', done.stdout), done


@with_constants
def test_no_more_jobs_are_in_the_queue_than_max_jobs(cluster, batches):
    full(cluster)
    run = batches.start(['true'] * 6, [cluster_of(cluster, max_jobs=3)], *NO_GPU, env=hasty())
    for _ in range(3):
        run.until('queued:')
    assert len(ids(cluster)) == 3
    cluster.command('scancel', min(job.id for job in cluster.squeue()))
    done = run.end()
    assert done.returncode == 0, done.stderr


# ---- Nodes out of use, and clusters that are given back ----

def drain(cluster, state='drain'):
    cluster.scontrol('update', 'nodename=n[1-2]', f'state={state}', 'reason=maintenance')


@with_constants
def test_jobs_wait_for_nodes_that_are_drained(cluster, batches, run_cli):
    """sbatch --test-only takes such nodes for missing, but sbatch accepts the jobs."""
    drain(cluster)
    run = batches.start(['echo 1', 'echo 2'], [cluster_of(cluster)], *NO_GPU, env=hasty())
    assert 'nodes are down or reserved' in run.until('queued:')
    run.process.kill()
    run.end()
    follow = run_cli('execute_batch', 'batch.sh', '--status')
    assert re.search(r'\.1 +queued ', follow.stdout), follow
    again = batches.start(None, [cluster_of(cluster)], *NO_GPU, env=hasty())
    again.until('queued:')
    drain(cluster, 'resume')
    assert again.end().returncode == 0
    assert (result('batch.sh.1'), result('batch.sh.2')) == (b'1\n', b'2\n')


@with_constants
def test_a_cluster_without_such_nodes_refuses_also_while_some_are_drained(cluster, batches, lab,
                                                                         run_cli):
    drain(cluster)
    done = batches.run(['true'], [cluster_of(cluster)], '--no-gpu-required',
                       '--memory-required=1T', env=hasty())
    assert done.returncode == 1 and '1 job not started: no machine is left' in done.stderr, done
    assert 'Requested node configuration is not available' in done.stderr, done.stderr
    status = run_cli('execute_batch', 'batch.sh', '--status').stdout
    assert re.search(r'\.1 +waiting ', status), status         # it never began
    done = batches.run(['true'], [cluster_of(cluster), lab().yaml()], '--no-gpu-required',
                       '--memory-required=1T', env=hasty())
    assert done.returncode != 0 and 'WARNING: cluster.yaml: refuses jobs: ' in done.stderr
    drain(cluster, 'resume')


@with_constants
def test_queued_jobs_come_back_from_a_cluster_that_is_given_back(cluster, lab, batches, run_cli,
                                                                 ledger, gate):
    full(cluster)
    machine = lab().yaml(max_jobs=1)
    run = batches.start([gate.wait('go'), *[f'hostname >>{ledger}'] * 2],
                        [machine, cluster_of(cluster)], *NO_GPU, '--cluster-after=0.2',
                        env=hasty())
    run.until('queued:')
    run.until('queued:')
    follow = run_cli('execute_batch', 'batch.sh', '--status').stdout
    assert '2 queued at a cluster, 0 waiting' in follow.splitlines()[0], follow
    done = run_cli('execute_batch', 'batch.sh', '--drop-machine', 'cluster.yaml')
    assert done.stdout == ('cluster.yaml: gets no more jobs, its jobs run to their end, and queued '
                           'ones are taken back\n'), done
    assert_gone_but(cluster, 1)
    await_return(run_cli, 2, 3)
    gate.open('go')
    assert run.end().returncode == 0
    assert len(ledger.read_text().splitlines()) == 2


def await_return(run_cli, *numbers):
    """Wait until the client knows that these jobs are back; Slurm removes them before that."""
    def status():
        return run_cli('execute_batch', 'batch.sh', '--status').stdout

    for number in numbers:
        wait_until(lambda number=number: re.search(rf'\.{number} +waiting ', status()),
                   f'the return of job {number}')


@with_constants
def test_a_job_that_is_being_submitted_comes_back_too(cluster, lab, batches, run_cli, ledger, gate):
    full(cluster)
    cluster.wrap('sbatch', submission(clusters.QUESTION_HELD))
    run = batches.start([gate.wait('go'), f'hostname >>{ledger}'],
                        [lab().yaml(max_jobs=1), cluster_of(cluster)], *NO_GPU,
                        '--cluster-after=0.2', env=hasty())
    run.until('started: batch.sh.1')
    wait_until(lambda: cluster.is_held('sbatch'), 'its submission')
    drop = ('execute_batch', 'batch.sh', '--drop-machine', 'cluster.yaml')
    assert run_cli(*drop).returncode == 0
    cluster.release('sbatch')
    await_return(run_cli, 2)
    gate.open('go')
    assert run.end().returncode == 0 and ledger.read_text()
    assert_gone_but(cluster, 1)


@with_constants
def test_a_folder_with_a_cancelled_job_that_only_waited_can_be_read(cluster, batches):
    full(cluster)
    run = batches.start(['true'], [cluster_of(cluster)], *NO_GPU, env=hasty())
    run.until('queued:')
    os.killpg(run.process.pid, signal.SIGINT)
    run.end()
    assert results_table.results_table() == []


@with_constants
def test_jobs_of_a_cluster_that_was_given_back_can_still_be_moved(cluster, lab, batches, run_cli,
                                                                  ledger, gate):
    machine = lab().yaml(max_jobs=1)
    run = batches.start([gate.wait('go'), f'echo >>{ledger}; test -z "$SLURM_JOB_ID" || sleep 600'],
                        [machine, cluster_of(cluster)], *NO_GPU, '--cluster-after=0.2',
                        env=hasty())
    wait_until(ledger.read_text, 'the job on the cluster')
    drop = ('execute_batch', 'batch.sh', '--drop-machine', 'cluster.yaml')
    assert run_cli(*drop).returncode == 0
    done = run_cli(*drop, '--now')
    assert done.stdout == ('cluster.yaml: gets no more jobs, and its jobs stop and start '
                           'elsewhere\n'), done
    gate.open('go')
    done = run.end()
    assert done.returncode == 0 and ledger.read_text() == '\n\n', done
    assert 'partial results of' not in done.stderr


# ---- Messages ----

@with_constants
def test_a_word_that_sbatch_does_not_know_is_told(cluster, lab, batches):
    file = cluster_of(cluster, engine_options='--partiton=main')
    done = batches.run(['true'], [file], *NO_GPU)
    assert (done.returncode, done.stdout.count('started')) == (2, 0)
    assert re.search("line 1 cannot run: cluster.yaml refuses the job .*'--partiton=main'",
                     done.stderr), done.stderr
    done = batches.run(['true'], [file, lab().yaml()], *NO_GPU, env=hasty())
    assert done.returncode == 0
    assert re.search("WARNING: cluster.yaml: refuses jobs: .*'--partiton=main'", done.stderr)


def test_what_slurm_refuses_is_said_before_anything_starts(cluster, batches):
    done = batches.run(['true'], [cluster_of(cluster, engine_options='--partition=nope')], *NO_GPU)
    assert done.returncode == 2 and 'started' not in done.stdout
    assert 'invalid partition specified: nope' in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr


def test_a_refused_type_of_gpu_is_named(cluster, batches):
    done = batches.run(['true'], [cluster_of(cluster, gpu_types={'a100': 40000})],
                       '--gpu-memory-required=20G')
    assert done.returncode == 2
    assert 'cluster.yaml refuses the job with a GPU of type a100 (Slurm ' in done.stderr, done


def test_too_much_memory_is_refused_in_the_words_of_slurm(cluster, batches):
    done = batches.run(['true'], [cluster_of(cluster)], '--no-gpu-required', '--memory-required=1T')
    assert done.returncode == 2
    assert 'Requested node configuration is not available' in done.stderr, done.stderr


@with_constants
def test_the_status_has_the_reason(cluster, batches, run_cli):
    number = full(cluster)
    run = batches.start(['true'], [cluster_of(cluster)], *NO_GPU, env=hasty())
    run.until('queued:')
    status = run_cli('execute_batch', 'batch.sh', '--status').stdout
    assert re.search(r'1 +queued +cluster\.yaml .*queued as [0-9]+: no room now', status), status
    shown = json.loads(run_cli('execute_batch', 'batch.sh', '--status', '--json').stdout)
    assert shown['state'] == 'queued' and shown['queued']['why'] == 'no room now'
    cluster.command('scancel', number)
    assert run.end().returncode == 0
    facts = {event['event']: {*event} - {'event', 'time'} for event in journal()}
    assert facts['queued'] == {'job', 'number', 'why', 'start'}
    assert facts['running'] == {'job', 'number', 'node'}
    assert 'queued' not in run_cli('execute_batch', 'batch.sh', '--status').stdout


def test_what_a_cluster_has_is_shown(cluster, lab1, run_cli, project):
    full(cluster)
    done = run_cli('query_machines', '--machines', cluster_of(cluster))
    assert done.returncode == 0, done.stderr
    both = run_cli('query_machines', '--machines', 'cluster.yaml', lab1.yaml()).stdout
    assert both.splitlines()[-1].startswith('2 of 2 machines answer; free beside the cluster: ')
    assert re.search(r'cluster\.yaml  Slurm 22\.[0-9.]+ .*your jobs: 1 running, 0 waiting',
                     done.stdout), done.stdout
    assert 'main: 0 of 2 nodes idle; each with gpu:2' in done.stdout
    found = json.loads(run_cli('query_machines', '--json', '--machines', 'cluster.yaml').stdout)
    assert found['partitions'][0]['cores_total'] == 8 and found['own_jobs_running'] == 1


# ---- Stopping jobs ----

@with_constants
def test_jobs_are_cancelled_that_run_and_that_wait(cluster, batches, run_cli, ledger):
    trap = f"trap 'echo told >>{ledger}; exit 3' TERM; {once(ledger)}; sleep 60 & wait"
    lines = [trap, f'{once(ledger, "second")}; true']
    run = batches.start(lines, [cluster_of(cluster, max_jobs=1)], *NO_GPU, env=hasty())
    run.until('started:')
    wrote(ledger, 'ran')
    done = run_cli('execute_batch', 'batch.sh', '--cancel')
    assert run.end().returncode in (1, 130)
    assert ledger.read_text().split() == ['ran', 'told'], done.stderr
    assert_gone_but(cluster, 0)


@with_constants
def test_ctrl_c_ends_jobs_on_their_nodes(cluster, batches, ledger):
    run, _ = begun(cluster, batches, ledger, 'sleep 60')
    os.killpg(run.process.pid, signal.SIGINT)
    done = run.end()
    assert done.returncode == 130 and 'may still run on' not in done.stderr
    assert_gone_but(cluster, 0)


@with_constants
def test_what_ignores_a_cancel_is_killed(cluster, batches, run_cli, ledger):
    run, _ = begun(cluster, batches, ledger, "trap '' TERM; while :; do sleep 0.1; done")
    done = run_cli('execute_batch', 'batch.sh', '--cancel', '1')
    assert 'is being stopped' in done.stdout
    assert run.end().returncode == 1
    assert_gone_but(cluster, 0)


# ---- Looks ----

@pytest.mark.parametrize(('engine', 'busy_from_s', 'looks_at_s'), [
    ('', 0.0, 2.03), ('slurm', 9.0, 2.5), ('slurm', 0.0, 0.5), ('slurm', 1.2, 1.5)])
def test_the_next_look_comes_soon_where_something_happens(monkeypatch, engine, busy_from_s,
                                                          looks_at_s):
    now = [0.0]
    monkeypatch.setattr(ssh_scheduler, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    worker = SimpleNamespace(machine=SimpleNamespace(engine=engine),
                             lives=SimpleNamespace(of=lambda *_: [None] * 3))
    for pause_s in ssh_scheduler.await_look(worker, lambda: now[0] >= busy_from_s):
        now[0] += pause_s
    assert now[0] == pytest.approx(looks_at_s)


# ---- execute_remote, execute_to ----

def test_a_command_runs_through_the_engine_with_live_output(cluster, start_cli, project):
    process = start_cli('execute_remote', '--machine', cluster_of(cluster),
                        'hostname; echo first; read -r line; echo $line; exit 7', '--stdin')
    first = [process.stdout.readline(), process.stdout.readline()]
    assert first[1] == 'first\n' and NODE.fullmatch(first[0]) or not cluster.apart
    rest, said = process.communicate('from here\n', timeout=60)
    assert (rest, process.returncode) == ('from here\n', 7), said


def test_a_command_is_detached_attached_and_cancelled(cluster, run_cli, project, gate, ledger):
    machine = cluster_of(cluster)
    done = run_cli('execute_remote', '--machine', machine, '--job-name=one', '--detach',
                   f'echo begun; {gate.wait("go")}; echo over')
    assert (done.stdout, done.returncode) == ('one\n', 0), done.stderr
    gate.open('go')
    done = run_cli('execute_remote', '--attach=one')
    assert (done.stdout, done.returncode) == ('begun\nover\n', 0), done.stderr
    done = run_cli('execute_remote', '--machine', machine, '--job-name=two', '--detach',
                   f'{once(ledger)}; sleep 60')
    assert (done.stdout, done.returncode) == ('two\n', 0), done.stderr
    wrote(ledger, 'ran')
    done = run_cli('execute_remote', '--cancel=two')
    assert done.returncode == 0 and 'stopped on cluster.yaml' in done.stderr, done.stderr
    assert_gone_but(cluster, 0)


def test_a_command_that_waits_is_detached_and_cancelled(cluster, run_cli, project, ledger):
    full(cluster)
    done = run_cli('execute_remote', '--machine', cluster_of(cluster), '--job-name=one',
                   '--detach', once(ledger))
    assert (done.stdout, done.returncode) == ('one\n', 0), done.stderr
    done = run_cli('execute_remote', '--cancel=one')
    assert done.returncode == 0, done.stderr
    assert 'one: removed from the queue of cluster.yaml. It had not started' in done.stderr
    assert_gone_but(cluster, 1)
    assert ledger.read_text() == ''


def test_ctrl_c_takes_a_command_out_of_the_queue(cluster, start_cli, project, ledger):
    full(cluster)
    process = start_cli('execute_remote', '--machine', cluster_of(cluster), '--job-name=one',
                        once(ledger))
    wait_until(lambda: ids(cluster), 'it waits')
    wait_until(lambda: [*Path('job_results').glob('.ssh_scheduler/commands/one/journal')]
               and 'queued' in Path('job_results/.ssh_scheduler/commands/one/journal').read_text(),
               'the client knows that')
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'one: removed from the queue of cluster.yaml. It had not started' in said, said
    assert 'Partial results' not in said


def test_execute_to_means_the_login_node(cluster, run_cli, project):
    done = run_cli('execute_to', '--machines', cluster_of(cluster), '--', 'hostname')
    assert done.returncode == 0 and (not cluster.apart or 'login1' in done.stdout)
    assert 'cluster.yaml is a cluster: the command runs on its login node' in done.stderr


def test_a_shell_opens_on_the_node(cluster, run_cli, start_cli, project, gate):
    start_cli('execute_remote', '--machine', cluster_of(cluster), '--job-name=one', '--num-gpus=1',
              f'export MINE=yes; touch here; {gate.wait("go")}')
    wait_until(lambda: [*cluster.workdir.glob('*/jobs/work.*/here')], 'it runs')
    done = run_cli('execute_remote', '--shell=one',
                   stdin='hostname; pwd -P; ls; echo $CUDA_VISIBLE_DEVICES\n')
    gate.open('go')
    assert done.returncode == 0, done.stderr
    host, folder, *names, gpus = done.stdout.splitlines()
    assert (names, gpus) == (['cluster.yaml', 'here'], '0'), done.stderr
    assert folder.startswith(str(cluster.workdir))
    assert NODE.fullmatch(host + '\n') or not cluster.apart


# ---- docs/cluster.md ----

@with_constants
def test_the_transcript_of_the_page(make_cluster, lab, start_cli, project):
    """The commands and lines are those of the page, except names, numbers and times."""
    section = (Path(ssh_scheduler.__file__).parent / 'docs/cluster.md').read_text()
    transcript = section.split('```')[3].strip().splitlines()
    at = next(number for number, line in enumerate(transcript) if line.startswith('$ execute'))
    assert transcript[0] == '$ cat experiments.sh'
    Path('experiments.sh').write_text('\n'.join(transcript[1:at]) + '\n')
    cluster = make_cluster(nodes=1, cpus=1)
    cluster_of(cluster)
    Path('lab1.yaml').write_text(Path(lab().yaml(max_jobs=1)).read_text())
    process = start_cli(*transcript[at].split()[1:],
                        env=constants(LATECOMER_S=rig.SAFETY_NET_S))
    said, complaint = process.communicate(timeout=90)
    assert process.returncode == 0, complaint

    def plain(line):
        line = re.sub(r', would start about [0-9:]+', '', line)
        return re.sub(r'Slurm [0-9]+: (no room now|others first)|[0-9.]+ s$', 'N', line)

    # Slurm lists the job that waits before or after it has started the other one.
    assert sorted(map(plain, said.splitlines())) == sorted(map(plain, transcript[at + 1:]))
    order = [said.index(line) for line in ('queued: experiments.sh.3', 'moved: experiments.sh.3',
                                           'started: experiments.sh.3', 'done: ')]
    assert order == sorted(order)
    keys = re.findall(r'^(\w+): ', section.split('```')[1], re.M)
    assert {*keys} <= {*ssh_scheduler.MACHINE_KEYS}


# ---- Load on Slurm ----

def test_slurm_is_asked_once_for_each_job(cluster, batches):
    before = cluster.rpcs()
    began = time.monotonic()
    done = batches.run(['true'] * 20, [cluster_of(cluster)], *NO_GPU)
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    asked = cluster.rpcs() - before
    assert asked.pop('REQUEST_SUBMIT_BATCH_JOB') == 20
    lists = asked.pop('REQUEST_JOB_INFO', 0) + asked.pop('REQUEST_JOB_USER_INFO', 0)
    assert lists <= 2 + took_s / 15, asked
    assert sum(asked.values()) <= 6, asked          # for the whole batch: settings, and a test


def test_a_command_has_the_terminal_on_its_node(cluster, scheduler, client_env, project):
    at = Terminal([sys.executable, scheduler, 'execute_remote', '--machine', cluster_of(cluster),
                   '--job-name=one', '--tty', 'hostname; tty; read -r x; echo "got $x"; exit 5'],
                  env=client_env)
    try:
        shown = at.until(lambda text: '/dev/pts/' in text, 'a terminal')
        at.press('typed\n')
        at.until(lambda text: 'got typed' in text, 'what was typed')
        assert at.end() == 5
        assert not cluster.apart or re.search('^n[12]$', shown, re.M)
    finally:
        at.close()
