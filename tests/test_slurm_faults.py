"""Faults of a cluster while the client lives, and while it is dead: a matrix.

The test brings a job to a state: it is submitted, it waits in the queue, or it runs.  Then the
cluster, its login node or the runner fails.  The client may have been killed before that, or is
killed by SIGKILL when it writes a later event into the journal.  The test repeats the command until
all is done.  Then the command of the job must have run once, or as often as the Fault has it, and
its exit status, the messages about it, and what is left on the cluster must be right.
"""
import contextlib
import os
import re
import signal
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import clusters
import pytest
import rig
from batching import (
    NO_GPU,
    RESULTS,
    result,
    wait_until,
    with_constants,
    wrote,
)
from test_slurm import cluster_of, ends, full, hasty, journal, once

STATUS = 5                  # of the command, if it exits by itself
FINAL = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL', 'PREEMPTED', 'OUT_OF_MEMORY')
CONF = ('MessageTimeout=2',)
IMPATIENT = {'RETRY_S': 0.2, 'LONGEST_RETRY_S': 1.0}


class Case:
    """One job on a cluster, which a test brings to a state and then to its end.

    Its command notes each run in the ledger.  The first run then waits for go().
    """

    def __init__(self, cluster, batches, gate, ledger, line='', options=(), machine=None):
        self.cluster, self.gate, self.ledger = cluster, gate, ledger
        self.machines = [cluster_of(cluster, **machine or {})]
        self.said = []                      # the stderr of the clients that have ended
        self._batches, self._options, self._holder = batches, (*NO_GPU, *options), None
        self._line = (line or '{ran}; [ $(wc -l <{ledger}) != 1 ] || {wait}; exit {status}')
        for name, value in (('ran', once(ledger)), ('ledger', ledger), ('status', STATUS),
                            ('wait', gate.wait('go'))):
            self._line = self._line.replace(f'{{{name}}}', str(value))
        self._waits = not line

    # -- the client

    def start(self, moment='', more=()):
        """Start the client, which kills itself at the first event of this name in the journal.

        more: further lines of the batch
        """
        env = hasty(**IMPATIENT)
        if moment:
            env['CRASH_WHEN'] = f'after write .*event.*"{moment}"'
        return self._batches.start([self._line, *more], self.machines, *self._options, env=env)

    def end(self, run, killed=False):
        """Wait until the client ends, by its own SIGKILL or because all is done."""
        done = run.end()
        self.said.append(done.stderr)
        assert (done.returncode == -signal.SIGKILL) == killed, done
        return done

    # -- the job

    def fill(self):
        """Fill the cluster, so that the next job waits in the queue until free()."""
        self._holder = full(self.cluster)

    def free(self):
        if self._holder:
            self.cluster.command('scancel', self._holder)
        self._holder = None

    def reach(self, state):
        """Wait until the job is in this state."""
        if state == 'running':
            self.free()
            wrote(self.ledger, 'ran')
        elif state == 'queued':
            wait_until(lambda: any(job.state == 'PENDING' for job in self.listed()), 'it waits')
        else:
            wait_until(lambda: self.cluster.is_held('sbatch'), 'it is being handed over')

    def go(self):
        """Let the job run to its end."""
        self.free()
        if self._waits:
            self._waits = False
            self.gate.open('go')

    def listed(self):
        return [job for job in self.cluster.squeue() if job.name.startswith('sshs-')]

    @property
    def number(self):
        return self.listed()[0].id

    @property
    def node(self):
        return self.listed()[0].node

    def runners(self):
        return [int(file.read_text().split()[0])
                for file in self.cluster.workdir.glob('*/run.*/self')]

    def kill_runner(self):
        for pid in self.runners():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart_login(self):
        login = self.cluster.login
        login.power_off()
        login.set_boot_id()
        login.start()

    def record(self):
        """Wait until the job has reported its end."""
        wait_until(lambda: [*self.cluster.workdir.glob('*/news/*.ended.*')]
                   or (RESULTS / 'batch.sh.1.out').exists(), 'it has told that')

    def calls(self, name, count):
        """Wait until a stand-in was called this many more times."""
        before = len(self.cluster.calls(name))
        wait_until(lambda: len(self.cluster.calls(name)) >= before + count, f'{name} is called')

    # -- what is left

    def assert_gone(self):
        wait_until(lambda: all(job.state in FINAL for job in self.cluster.squeue()), 'all are over')
        for pid, _ in self.cluster.login.processes():
            assert rig.ends(pid), self.cluster.login.processes()
        left = [path for path in self.cluster.workdir.glob('*/*') if path.name != 'cache']
        left += [path for path in self.cluster.workdir.glob('*/*/*') if path.parent.name != 'cache']
        assert not left, left


# ---- The faults ----

class Fault(NamedTuple):
    """A fault that hits a job in a state, and the outcome that it must have."""
    state: str                              # handed, queued or running
    act: Callable
    status: int = STATUS                    # of the job, as the journal has it
    runs: int = 1                           # of its command
    said: str = ''                          # a regular expression for stderr
    err: str = ''                           # the same for its .err
    before: Optional[Callable] = None                      # runs before there is a job
    needs_client: bool = False              # act() waits for an action of the client
    line: str = ''                          # the command, instead of the usual
    conf: tuple = ()
    cluster: dict = {}                      # settings of the Cluster
    machine: dict = {}                      # of its machine file


def kill_runner(case):
    case.kill_runner()
    case.go()


def restart_login(case):
    case.restart_login()
    case.go()


def freeze_controller(case):
    case.cluster.freeze()
    if case.ledger.read_text():
        case.go()
        case.record()
    case.cluster.thaw()
    case.go()


def take_controller_away(case):
    case.cluster.halt()
    if case.ledger.read_text():
        case.go()
        case.record()
    case.cluster.resume()
    case.go()


def list_is(script, times=3):
    """Return an act() that replaces squeue by this script for this many calls."""
    def act(case):
        case.cluster.wrap('squeue', script)
        case.calls('squeue', times)
        case.cluster.unwrap('squeue')
        case.go()
    return act


def always(name, script):
    def before(case):
        case.cluster.wrap(name, script)
    return before


def other_job_has_its_number(case):
    case.cluster.wrap('squeue', clusters.renamed(case.number, 'other'))
    case.calls('squeue', 4)
    case.cluster.unwrap('squeue')
    case.go()


def crash_node(case):
    node = case.node
    case.cluster.crash(node)
    case.cluster.lose(node)


def part_node(case):
    node = case.node
    case.cluster.part(node)
    case.go()
    case.record()
    case.cluster.boot(node)


def lose_node_and_boot(case):
    """The first run still lives while the second one runs; at last the first is stopped."""
    node = case.node
    case.cluster.part(node)
    case.cluster.lose(node)
    wrote(case.ledger, 'ran', 'ran')
    case.cluster.boot(node)


def preempt(case):
    case.cluster.sbatch('--partition=first', '--nodes=2', '--exclusive', script='sleep 1')


PREEMPTION = ('PreemptType=preempt/partition_prio',
              'PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1',
              'PartitionName=first Nodes=ALL MaxTime=60 PriorityTier=9')


def requeue(case):
    number = case.number
    case.cluster.scontrol('update', f'jobid={number}', 'requeue=1')
    case.cluster.scontrol('requeue', number)


def requeue_out_of_sight(case):
    node = case.node
    case.cluster.part(node)
    requeue(case)
    case.go()
    case.record()
    case.cluster.boot(node)


def cancel(case):
    case.cluster.command('scancel', case.number)
    case.free()


def cancel_frozen_accounts(case):
    case.cluster.freeze('slurmdbd')
    cancel(case)
    wait_until(lambda: all(job.state in FINAL for job in case.cluster.squeue()), 'it is over')
    case.cluster.thaw('slurmdbd')


def end_its_time(case):
    case.cluster.scontrol('update', f'jobid={case.number}', 'endtime=now')


def end_its_time_in_another_order(case):
    """The job's script gets TERM first, and then the signal that announces the time limit."""
    number = case.number
    case.cluster.command('scancel', '--batch', '--signal=TERM', number)
    wait_until(lambda: case.ledger.with_suffix('.told').exists(), 'it is told to stop')
    case.cluster.command('scancel', '--batch', '--signal=USR1', number)


def go(case):
    case.go()


HUNGRY = "{ran}; exec python3 -c 'import time; x = bytearray(500 << 20); time.sleep(60)'"
STUBBORN = "trap 'touch {ledger}.told' TERM; {ran}; while :; do sleep 0.1; done"
FAULTS = {
    'runner killed': Fault('running', kill_runner),
    'runner killed, queued': Fault('queued', kill_runner),
    'login restarted': Fault('running', restart_login),
    'login restarted, queued': Fault('queued', restart_login),
    'controller frozen': Fault('running', freeze_controller),
    'controller frozen, queued': Fault('queued', freeze_controller),
    'controller away': Fault('running', take_controller_away),
    'controller away, queued': Fault('queued', take_controller_away),
    'list empty': Fault('running', list_is(clusters.NOTHING, 5), needs_client=True),
    'list empty, queued': Fault('queued', list_is(clusters.NOTHING, 5), needs_client=True),
    'list fails, queued': Fault('queued', list_is(clusters.AWAY), needs_client=True),
    'list lags': Fault('running', go, before=always('squeue', clusters.LAGS)),
    'list lags, queued': Fault('queued', list_is(clusters.LAGS), needs_client=True),
    'id reused': Fault('running', other_job_has_its_number, needs_client=True),
    'id reused, queued': Fault('queued', other_job_has_its_number, needs_client=True),
    'scancel silent': Fault('running', go, before=always('scancel', clusters.NOTHING)),
    'time limit': Fault('running', end_its_time, status=124, err='time limit of the cluster'),
    'time limit, told late': Fault('running', end_its_time_in_another_order, status=137,
                                   err='did not stop after SIGTERM', line=STUBBORN),
    'time is near': Fault('running', lambda case: None, status=124,
                          machine={'engine_options': '--time=1'}),
    'memory': Fault('running', lambda case: None, status=137, err='ran out of memory',
                    line=HUNGRY),
    'node crashed': Fault('running', crash_node, runs=2, said='the node n[12] failed'),
    'node parted': Fault('running', part_node),
    'node lost, then back': Fault('running', lose_node_and_boot, runs=2, needs_client=True,
                                  said='the node n[12] failed'),
    'preempted': Fault('running', preempt, runs=2, said='another job took its place',
                       conf=(*PREEMPTION, 'PreemptMode=REQUEUE')),
    'preempted by cancel': Fault('running', preempt, runs=2, said='another job took its place',
                                 conf=(*PREEMPTION, 'PreemptMode=CANCEL')),
    'requeued': Fault('running', requeue, runs=2, said='put back into the queue'),
    'requeued out of sight': Fault('running', requeue_out_of_sight),
    'cancelled by root': Fault('running', cancel, status=143, err='cancelled by root',
                               cluster={'accounting': True, 'uid': 4321}),
    'cancelled by root, queued': Fault('queued', cancel, status=143, runs=0,
                                       err='cancelled by root before it began',
                                       cluster={'accounting': True, 'uid': 4321}),
    'cancelled, no accounts': Fault('running', cancel, status=143, err='was cancelled',
                                    cluster={'accounting': True},
                                    before=always('sacct', clusters.NO_ACCOUNTS)),
    'cancelled, accounts lag': Fault('running', cancel, status=143, err='was cancelled',
                                     cluster={'accounting': True},
                                     before=always('sacct', clusters.once(clusters.NOTHING))),
    'cancelled, accounts frozen': Fault('running', cancel_frozen_accounts, status=143,
                                        err='was cancelled', cluster={'accounting': True}),
}


def live(case, fault, moment):
    """Bring the job through the fault; kill the client at this moment, unless it is ''."""
    comes_first = moment == 'claimed' or moment in ('queued', 'running')[:(
        2 if fault.state == 'running' else 1)]
    if fault.before:
        fault.before(case)
    if moment in ('queued', 'running') or fault.state == 'queued':
        case.fill()
    run = case.start(moment)
    if comes_first:
        if moment == 'running':
            case.reach('queued')
            case.free()
        case.end(run, killed=True)
    if moment == 'claimed' or comes_first and fault.needs_client:
        run = case.start()
    case.reach(fault.state)
    fault.act(case)
    if moment and not comes_first:
        case.end(run, killed=True)
    if moment and moment != 'claimed' and not (comes_first and fault.needs_client):
        # With all collected, a run has nothing to do and does not tidy up: it gets one more line.
        run = case.start(more=['true'] if moment == 'collected' else [])
    return case.end(run)


def check(case, fault, moment):
    assert case.ledger.read_text() == 'ran\n' * fault.runs, case.said
    assert ends() == {'batch.sh.1': fault.status,
                      **({'batch.sh.2': 0} if moment == 'collected' else {})}, case.said
    assert re.search(fault.said, ''.join(case.said)), case.said
    assert re.search(fault.err, result('batch.sh.1', 'err').decode()), result('batch.sh.1', 'err')
    assert 'Traceback' not in ''.join(case.said)
    case.assert_gone()


# The moments at which the client is killed; '': it is not killed.  SLURM_FAULTS=all tries each
# fault with all of them, which takes 10 minutes.  tests/test_slurm.py tries further faults.
MATRIX = {
    'runner killed': ('queued',), 'controller frozen': ('collected',), 'list empty': ('',),
    'node lost, then back': ('',), 'preempted': ('running',),
    'requeued': ('',), 'cancelled by root, queued': ('queued',),
    'time limit': ('',), 'time limit, told late': ('',)}
HELD = [('client', 'ANSWER_HELD'), ('controller', 'QUESTION_HELD')]
if os.environ.get('SLURM_FAULTS') == 'all':
    MATRIX = {name: ['', *(moment for moment in (
        'claimed', 'queued', 'running', 'ended', 'collected') if fault.runs or moment != 'running')]
        for name, fault in FAULTS.items()}
    HELD = [(what, held) for what in ('client', 'runner', 'login', 'controller')
            for held in ('ANSWER_HELD', 'QUESTION_HELD')]
MATRIX = [(name, moment) for name, moments in MATRIX.items() for moment in moments]


@with_constants
@pytest.mark.parametrize(('name', 'moment'), MATRIX)
def test_a_fault_of_a_cluster(make_cluster, batches, gate, ledger, name, moment):
    fault = FAULTS[name]
    cluster = make_cluster(conf=[*CONF, *fault.conf], **fault.cluster)
    case = Case(cluster, batches, gate, ledger, line=fault.line, machine=fault.machine)
    live(case, fault, moment)
    check(case, fault, moment)


# ---- While a job is handed over ----

HANDED = Fault('handed', go)
# Before it submits, the runner asks with --test-only whether Slurm would refuse such jobs.
LATER = '[[ " $* " != *" --test-only "* ]] || exec "$REAL" "$@"\n'


@with_constants
@pytest.mark.parametrize(('what', 'held'), HELD)
def test_a_fault_while_a_job_is_handed_over(make_cluster, batches, gate, ledger, what, held):
    case = Case(make_cluster(conf=CONF), batches, gate, ledger)
    case.cluster.wrap('sbatch', LATER + getattr(clusters, held))
    run = case.start()
    case.reach('handed')
    if what == 'client':
        run.process.kill()
        case.end(run, killed=True)
        run = case.start()
    elif what == 'runner':
        case.kill_runner()
    elif what == 'login':
        case.restart_login()
    else:
        case.cluster.freeze()
    case.cluster.release('sbatch')
    if what == 'controller':
        case.cluster.thaw()
    case.go()
    case.end(run)
    check(case, HANDED, '')


# ---- Login nodes ----

@with_constants
def test_another_login_node_leaves_jobs_to_the_one_that_began_them(
        make_cluster, batches, gate, ledger):
    """The journal knows a machine by its address, so another login node is a new machine."""
    cluster = make_cluster(conf=CONF)
    with cluster.another_login() as other:
        case = Case(cluster, batches, gate, ledger)
        case.end(case.start('running'), killed=True)
        address, file = cluster.login.account, Path('cluster.yaml')
        first = file.read_text()
        file.write_text(Path(other.yaml()).read_text())
        done = case.end(case.start())
        assert f'WARNING: line 1 was started on {address} by an earlier run. Name that ' \
            'machine too, to collect' in done.stdout
        assert done.returncode == 1 and '1 not collected' in done.stdout and not ends()
        case.go()
        Path('first.yaml').write_text(first)
        case.machines.append('first.yaml')
        case.end(case.start())
        check(case, HANDED, '')


@with_constants
def test_two_login_nodes_of_one_cluster_share_its_jobs(make_cluster, batches, gate, ledger):
    cluster = make_cluster(conf=CONF)
    with cluster.another_login() as other:
        for name, login in ('one', cluster), ('two', other):
            Path(f'{name}.yaml').write_text(Path(login.yaml(max_jobs=2)).read_text())
        done = batches.run([f'{once(ledger, n)}; sleep 0.2; exit {n}' for n in range(6)],
                           ['one.yaml', 'two.yaml'], *NO_GPU, env=hasty())
        assert sorted(ledger.read_text().split()) == [*'012345'], done.stderr
        assert ends() == {f'batch.sh.{n + 1}': n for n in range(6)}, done.stderr
        assert {event['where'] for event in journal() if event['event'] == 'claimed'} == {
            'one.yaml', 'two.yaml'}
        Case(cluster, batches, gate, ledger).assert_gone()


# ---- All nodes fail ----

@with_constants
def test_where_the_prolog_fails_on_all_nodes_a_job_waits_until_one_is_well(
        make_cluster, batches, gate, ledger):
    cluster = make_cluster(conf=[*CONF, 'Prolog={folder}/prolog'])
    prolog = cluster.folder / 'prolog'
    rig.put(prolog, '#!/bin/sh\nfalse\n', 0o755)
    case = Case(cluster, batches, gate, ledger)
    run = case.start()
    run.until('queued: batch.sh.1')
    wait_until(lambda: any(job.reason.startswith(('ReqNode', 'Nodes')) for job in case.listed()),
               'no node is left')
    rig.put(prolog, '#!/bin/sh\n', 0o755)
    cluster.scontrol('update', 'nodename=n1,n2', 'state=resume')
    case.go()
    done = case.end(run)
    for node in 'n1', 'n2':
        assert f'the node {node} could not start the job: Error running slurm prolog' in done.stderr
    check(case, HANDED, '')


@with_constants
def test_where_no_node_has_the_folder_each_is_named(make_cluster, batches, gate, ledger):
    cluster = make_cluster(conf=CONF)
    if not cluster.apart:
        pytest.skip('nodes share their mounts here')
    nodes = ['n1', 'n2']
    for node in nodes:
        cluster.hide(node)
    case = Case(cluster, batches, gate, ledger)
    run = case.start()
    wait_until(lambda: {job.node for job in cluster.squeue()} >= {*nodes}, 'each was tried')
    for node in nodes:
        cluster.show(node)
    case.go()
    done = case.end(run)
    assert any(f'the node {node} cannot write in {cluster.workdir}: let `workdir` be a folder that '
               'the nodes see' in done.stderr for node in nodes), done.stderr
    check(case, HANDED, '')


# ---- Limits, and job numbers that Slurm uses again ----

@with_constants
def test_an_account_that_may_have_few_jobs_in_the_queue(make_cluster, batches, gate, ledger):
    cluster = make_cluster(conf=[*CONF, 'AccountingStorageEnforce=limits'], accounting=True)
    user = cluster.command('id', '-un').strip()
    cluster.command('sacctmgr', '-i', 'add', 'account', 'lab')
    cluster.command('sacctmgr', '-i', 'add', 'user', user, 'account=lab', 'MaxSubmitJobs=2')
    cluster.wrap('sbatch', 'exec "$REAL" "$@"')
    machine = cluster_of(cluster, engine_options='--account=lab')
    run = batches.start([f'{once(ledger, n)}; {gate.wait("go")}' for n in range(4)], [machine],
                        *NO_GPU, env=hasty())
    run.until('started:')
    run.until('started:')
    wait_until(lambda: len([event for event in journal() if event['event'] == 'lost']) == 2,
               'two were not taken')
    before = cluster.rpcs()
    wait_until(lambda: cluster.rpcs()['REQUEST_JOB_INFO'] >= before['REQUEST_JOB_INFO'] + 3, 'time')
    assert cluster.rpcs()['REQUEST_SUBMIT_BATCH_JOB'] == 4      # no repeats
    for _ in range(4):
        gate.open('go')
    done = run.end()
    assert done.returncode == 0 and sorted(ledger.read_text().split()) == [*'0123'], done.stderr
    assert len(cluster.calls('sbatch')) <= 1 + 4 + 3            # one is --test-only
    Case(cluster, batches, gate, ledger).assert_gone()


@with_constants
def test_numbers_that_come_again_are_those_of_other_jobs(make_cluster, batches, gate, ledger):
    cluster = make_cluster(conf=[*CONF, 'FirstJobId=10', 'MaxJobId=14', 'MinJobAge=2'])
    done = batches.run([f'{once(ledger, n)}; exit {n}' for n in range(6)],
                       [cluster_of(cluster, max_jobs=2)], *NO_GPU, env=hasty())
    assert sorted(ledger.read_text().split()) == [*'012345'], done.stderr
    assert ends() == {f'batch.sh.{n + 1}': n for n in range(6)}, done.stderr
    numbers = [int(number) for number in re.findall(
        r'submit_batch_job: JobId=([0-9]+)', cluster.log())]        # squeue forgets them soon
    assert len(numbers) >= 6 and {*numbers} == {*range(10, 14)}
    Case(cluster, batches, gate, ledger).assert_gone()
