"""The checker finds each way in which a job can fail to run exactly once."""
import json

import pytest
from batching import NO_GPU, RESULTS
from ledgers import check_exactly_once, ledger_line, ledgers_of

JOB, LAB1, LAB2 = 'batch.sh.1', 'ben@lab1:22', 'ben@lab2:22'


class Story:
    """The files of a batch whose only job ran correctly on lab1; the tests spoil them."""

    def __init__(self, folder):
        self.folder = folder
        self.results = folder / 'job_results'
        (self.results / '.ssh_scheduler').mkdir(parents=True)
        self.ledgers = {LAB1: folder / 'lab1', LAB2: folder / 'lab2'}
        for file in self.ledgers.values():
            file.touch()
        self.ran(LAB1)
        self.stdout = f'started: {JOB};  x\nfinished: {JOB}; x\ndone: 1 job: 1 finished, 0 failed\n'
        self.journal = [self.claimed(1, LAB1), {'event': 'ended', 'exit_code': 0},
                        {'event': 'collected'}]
        self.bring('one', attempt=1)

    @staticmethod
    def claimed(attempt, machine):
        return {'event': 'claimed', 'attempt': attempt, 'machine': machine, 'command': 'x'}

    def ran(self, account, attempt=1, words=('start', 'end')):
        with open(self.ledgers[account], 'a') as file:
            file.writelines(f'{JOB} {attempt} {word}\n' for word in words)

    def bring(self, text, attempt):
        lines = [f'{JOB} {attempt} start\n', f'{JOB} {attempt} end\n']
        (self.results / JOB).mkdir(exist_ok=True)
        (self.results / JOB / 'ran').write_text(''.join(lines))
        (self.results / f'{JOB}.out').write_text(f'\n{text}\n'.join((lines[0][:-1], lines[1])))
        (self.results / f'{JOB}.err').write_text('')

    def check(self, **settings):
        (self.results / '.ssh_scheduler/journal').write_text(
            ''.join(json.dumps({'job': JOB, **event}) + '\n' for event in self.journal))
        check_exactly_once(self.ledgers, self.results, self.stdout, jobs=[JOB], **settings)


@pytest.fixture
def story(tmp_path):
    return Story(tmp_path)


# ---- Correct runs ----

def test_a_job_that_ran_once(story):
    story.check()


def test_a_job_that_a_cluster_had_in_its_queue(story):
    story.journal[1:1] = [{'event': word} for word in ('queued', 'running', 'stopping')]
    story.check()


def test_a_job_that_failed(story):
    story.stdout = story.stdout.replace('finished: b', 'failed: b')
    story.journal[1]['exit_code'] = 3
    story.check()


def test_a_second_attempt_is_right_when_the_first_was_lost(story):
    story.ledgers[LAB1].write_text('')
    story.ran(LAB1, words=['start'])
    story.ran(LAB2, attempt=2)
    story.journal[1:1] = [{'event': 'lost'}, story.claimed(2, LAB2)]
    story.bring('two', attempt=2)
    story.stdout = [f'failed: {JOB}; x\n', story.stdout]
    story.check()


def test_a_run_may_collect_what_another_began(story):
    story.journal[1:1] = [story.claimed(1, LAB1)]
    story.stdout = [f'started: {JOB};  x\n', story.stdout]
    story.check()


def test_a_torn_last_line_of_the_journal_says_nothing(story):
    story.check()
    with open(story.results / '.ssh_scheduler/journal', 'a') as file:
        file.write('{"event": "clai')
    check_exactly_once(story.ledgers, story.results, story.stdout)


# ---- Runs with an error ----

def spoil_runs_twice_there(story):
    story.ran(LAB1)


def spoil_runs_twice_elsewhere(story):
    story.ran(LAB2, words=['start'])


def spoil_runs_again_after_it_was_whole(story):
    story.ran(LAB2, attempt=2)
    story.journal[1:1] = [{'event': 'lost'}, story.claimed(2, LAB2)]


def spoil_never_ran(story):
    story.ledgers[LAB1].write_text('')


def spoil_did_not_end(story):
    story.ledgers[LAB1].write_text(f'{JOB} 1 start\n')


def spoil_missing_folder(story):
    (story.results / JOB / 'ran').unlink()
    (story.results / JOB).rmdir()


def spoil_missing_stream(story):
    (story.results / f'{JOB}.err').unlink()


def spoil_partial_stream(story):
    (story.results / f'{JOB}.out').write_text(f'{JOB} 1 start\non')


def spoil_empty_stream(story):
    (story.results / f'{JOB}.out').write_text('')


def spoil_partial_folder(story):
    (story.results / JOB / 'ran').write_text(f'{JOB} 1 start\n')


def spoil_overwritten_stream(story):
    (story.results / f'{JOB}.out').write_text('something else\n')


def spoil_result_of_another_attempt(story):
    story.bring('two', attempt=2)


def spoil_doubled_stream(story):
    text = (story.results / f'{JOB}.out').read_text()
    (story.results / f'{JOB}.out').write_text(text + text)


def spoil_unclaimed(story):
    story.journal.clear()


def spoil_claimed_elsewhere(story):
    story.journal[0]['machine'] = LAB2


def spoil_claimed_anew(story):
    story.journal[1:1] = [story.claimed(2, LAB1)]


def spoil_claimed_on_two(story):
    story.journal[1:1] = [story.claimed(1, LAB2)]


def spoil_claimed_after_its_end(story):
    story.journal.append(story.claimed(1, LAB1))


def spoil_collected_without_end(story):
    del story.journal[1]


def spoil_set_aside_after_it_was_collected(story):
    story.journal.append({'event': 'cancelled', 'job': JOB})


def spoil_queued_after_it_was_collected(story):
    story.journal.append({'event': 'queued'})


def spoil_not_collected(story):
    del story.journal[2]


def spoil_another_exit_code(story):
    story.journal[1]['exit_code'] = 1


def spoil_reported_failed(story):
    story.stdout = story.stdout.replace('finished: b', 'failed: b')


def spoil_reported_twice(story):
    story.stdout += f'finished: {JOB}; x\n'


def spoil_reported_both(story):
    story.stdout += f'failed: {JOB}; x\n'


def spoil_not_reported(story):
    story.stdout = ''


def spoil_only_started(story):
    story.stdout = f'started: {JOB};  x\n'


@pytest.mark.parametrize('spoil, sentence', [
    (spoil_runs_twice_there, f'ran twice: attempt 1 was started 2 times on {LAB1}'),
    (spoil_runs_twice_elsewhere, f'ran twice: attempt 1 on {LAB1}, attempt 1 on {LAB2}'),
    (spoil_runs_again_after_it_was_whole, 'ran twice from its start to its end'),
    (spoil_never_ran, 'reported finished, but it never ran'),
    (spoil_did_not_end, 'reported finished, but it began and did not end'),
    (spoil_missing_folder, 'result is missing: '),
    (spoil_missing_stream, 'result is missing: '),
    (spoil_partial_stream, 'is partial: '),
    (spoil_empty_stream, 'is partial: '),
    (spoil_partial_folder, 'is partial: '),
    (spoil_overwritten_stream, 'was overwritten: '),
    (spoil_result_of_another_attempt, 'was overwritten: '),
    (spoil_doubled_stream, 'was overwritten: '),
    (spoil_unclaimed, 'which was not claimed'),
    (spoil_claimed_elsewhere, 'which was not claimed'),
    (spoil_claimed_anew, 'claimed anew'),
    (spoil_claimed_on_two, f'is claimed on {LAB1} and on {LAB2}'),
    (spoil_claimed_after_its_end, 'is claimed again, but was collected'),
    (spoil_collected_without_end, 'is collected, but was claimed'),
    (spoil_set_aside_after_it_was_collected, 'is cancelled, but was collected'),
    (spoil_queued_after_it_was_collected, 'is queued, but was collected'),
    (spoil_not_collected, 'reported finished, but there it is ended'),
    (spoil_another_exit_code, 'with exit code 1'),
    (spoil_reported_failed, 'reported failed, but there its exit code is 0'),
    (spoil_reported_twice, 'reported finished and then finished'),
    (spoil_reported_both, 'reported finished and then failed'),
    (spoil_not_reported, 'missing in the report'),
    (spoil_only_started, 'not reported as ended'),
], ids=lambda value: getattr(value, '__name__', '')[6:])
def test_each_fault_is_found(story, spoil, sentence):
    spoil(story)
    with pytest.raises(AssertionError) as found:
        story.check()
    assert sentence in str(found.value) and JOB in str(found.value)


def test_a_journal_that_cannot_be_read(story):
    story.check()
    (story.results / '.ssh_scheduler/journal').write_text('{"job"\n')
    with pytest.raises(AssertionError, match='no event in line 1'):
        check_exactly_once(story.ledgers, story.results, story.stdout)


# ---- A real batch ----

def test_what_a_batch_notes_is_enough(batches, lab):
    machines = lab(), lab()
    lines = [ledger_line(command) for command in (
        'echo one', 'printf unended; exit 3', "echo '# quoted' \"$PWD\" >made", 'kill -9 $BASHPID')]
    done = batches.run(lines, machines, *NO_GPU)
    assert done.returncode == 1, done.stderr
    names = [f'batch.sh.{n}' for n in range(1, 5)]
    check_exactly_once(machines, RESULTS, done.stdout, jobs=names)
    assert 'failed: batch.sh.2; ' in done.stdout and 'failed: batch.sh.4; ' in done.stdout
    assert ledgers_of(machines).keys() == {machine.account for machine in machines}
    assert (RESULTS / 'batch.sh.1.out').read_text() == (
        'batch.sh.1 1 start\none\nbatch.sh.1 1 end\n')
    assert (RESULTS / 'batch.sh.3/made').exists()

    machines[0].ledger.write_text(machines[0].ledger.read_text() + 'batch.sh.3 1 start\n')
    with pytest.raises(AssertionError, match=r'batch\.sh\.3 ran twice'):
        check_exactly_once(machines, RESULTS, done.stdout)
