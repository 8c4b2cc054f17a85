"""A command sends a request at each point of the client's life, or before the client is killed."""
import concurrent.futures

import pytest
from test_crashes import AT_A_TIME, COMMANDS, Life, tried

CANCEL = {'batch': 'batch.sh', 'action': 'cancel', 'jobs': ['1']}
RERUN = {**CANCEL, 'action': 'rerun'}


def sweep(whole, live, third):
    """Call live for a third of the points of a whole life; assert that it finds no fault."""
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as lives:
        wrong = [text for text in lives.map(live, tried(whole.different_points(), third)) if text]
    assert not wrong, '\n'.join(wrong)


@pytest.fixture
def new_life(lab, client_env, tmp_path):
    machine = lab()
    env = {**client_env, 'SSH_SCHEDULER_PROC': str(machine.proc)}
    return lambda name, like=None: Life(tmp_path / str(name), machine, 'localhost', env,
                                        COMMANDS[1:2], like)


def test_a_job_is_cancelled_at_any_moment(new_life):
    """The first or second run cancels the job, unless it has ended; a later run starts it again."""
    def live(point):
        life = new_life(point)
        first = life.run(point, CANCEL)
        if len(life.points()) < point:
            return ''                   # this life was shorter than the whole one
        runs = life.until_done(first)
        said = '\n'.join(f'{run.stdout}{run.stderr}' for run in runs)
        answers = said.count('batch.sh.1: ')
        try:
            assert runs[-1].returncode == 0 and 'Traceback' not in said
            assert 'asked by another command' in said and answers
            assert not [*life.project.glob('job_results/.ssh_scheduler/inbox/*.request')]
            life.check('localhost', *runs)
        except AssertionError as error:
            return f'{life.points()[point - 1]}: {error}\n{said}'
        return ''

    whole = new_life('whole')
    assert whole.run().returncode == 0
    sweep(whole, live, 2)


@pytest.mark.parametrize('request_', [CANCEL, RERUN], ids=['cancel', 'rerun'])
def test_a_request_is_acted_on_once_wherever_the_program_is_killed(new_life, request_):
    before = new_life('before')
    runs_before = [before.run()] if request_ is RERUN else []
    assert all(run.returncode == 0 for run in runs_before)

    def live(point):
        life = new_life(point, before)
        life.ask(request_)
        runs = [*runs_before, *life.until_done(life.run(point))]
        said = '\n'.join(f'{run.stdout}{run.stderr}' for run in runs)
        asides = {path.name for path in life.project.glob('job_results/batch.sh.1~*')}
        try:
            assert runs[-1].returncode == 0 and 'Traceback' not in said
            assert asides == ({f'batch.sh.1~1{end}' for end in ('', '.out', '.err')}
                              if request_ is RERUN else set())
            assert life.ledger.read_text().count('batch.sh.1 2 end') <= 1
            if request_ is RERUN:
                assert life.ledger.read_text().count(' end') == len(life.jobs) + 1
            life.check('localhost', *runs)
        except AssertionError as error:
            return f'{life.points()[point - 1]}: {error}\n{said}'
        return ''

    whole = new_life('whole', before)
    whole.ask(request_)
    assert whole.run().returncode in (0, 1)
    sweep(whole, live, int(request_ is RERUN))
