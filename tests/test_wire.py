"""The language of the channel: bytes in any pieces give the same events, and memory is bounded."""
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssh_scheduler

TOKEN = '0123456789abcdef'
settings.register_profile('wire', deadline=None, derandomize=True, max_examples=150)
settings.load_profile('wire')

words = st.binary(min_size=1, max_size=20).filter(lambda word: word != b'data')


def escaped(field):
    """Return the field as the remote runner sends it."""
    return field.replace(b'\\', b'\\\\').replace(b'\t', b'\\t').replace(b'\n', b'\\n')


def line_of(fields):
    return b'\t'.join(map(escaped, fields)) + b'\n'


def pieces_of(data, cuts):
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in zip(ends, ends[1:])]


def events_of(pieces, token=TOKEN):
    reader = ssh_scheduler.EventReader(token)
    return [event for piece in pieces for event in reader.feed(piece)], reader


@given(st.lists(st.lists(words, min_size=1, max_size=4), max_size=8), st.binary(max_size=60),
       st.lists(st.integers(0, 400), max_size=12))
def test_events_do_not_depend_on_how_their_bytes_arrive(events, noise, cuts):
    data = noise + f'\n{TOKEN}\n'.encode() + b''.join(map(line_of, events))
    read, reader = events_of(pieces_of(data, cuts))
    assert read == events
    assert reader.noise == noise


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=12))
def test_raw_bytes_are_given_whole_and_what_follows_is_read(raw, cuts):
    data = (f'\n{TOKEN}\n'.encode() + b'data\t%d\tgrowth\tjob.1\n' % len(raw) + raw
            + b'note\tafter\n')
    read, _ = events_of(pieces_of(data, cuts))
    assert read == [[b'data', b'growth', b'job.1', raw], [b'note', b'after']]


@pytest.mark.parametrize('raw', [b'', b'abc'])
def test_raw_bytes_are_given_as_soon_as_they_are_there(raw):
    read, _ = events_of([f'\n{TOKEN}\n'.encode() + b'data\t%d\tgrowth\n' % len(raw) + raw])
    assert read == [[b'data', b'growth', raw]]


def test_many_short_lines_at_once_are_no_line_without_an_end():
    lines = b'note\tx\n' * ssh_scheduler.LONGEST_LINE
    read, _ = events_of([f'\n{TOKEN}\n'.encode() + lines])
    assert read == [[b'note', b'x']] * ssh_scheduler.LONGEST_LINE


@given(st.binary(max_size=400))
def test_no_bytes_break_the_reader(data):
    try:
        events_of([f'\n{TOKEN}\n'.encode() + data])
    except ssh_scheduler.WireError:
        pass


def test_nothing_is_an_event_before_the_token():
    read, reader = events_of([b'ended\tjob.1\t0\n', b'Welcome to lab1\n'])
    assert read == [] and not reader.greeted
    assert reader.noise == b'ended\tjob.1\t0\nWelcome to lab1\n'


def test_a_token_inside_a_line_is_noise():
    read, reader = events_of([f'xx{TOKEN}\nended\n'.encode()])
    assert read == [] and not reader.greeted


@pytest.mark.parametrize('said', [
    b'x' * (ssh_scheduler.LONGEST_LINE + 2),
    b'data\t%d\tgrowth\n' % (ssh_scheduler.LONGEST_DATA + 1),
    b'data\t5\n',
], ids=['a line without an end', 'too much announced', 'of nothing'])
def test_what_would_fill_the_memory_is_refused(said):
    with pytest.raises(ssh_scheduler.WireError):
        events_of([f'\n{TOKEN}\n'.encode() + said])


def test_endless_noise_is_refused():
    reader = ssh_scheduler.EventReader(TOKEN)
    with pytest.raises(ssh_scheduler.WireError):
        for _ in range(ssh_scheduler.LONGEST_NOISE // 4096 + 2):
            list(reader.feed(b'y\n' * 2048))


def test_a_request_is_a_verb_a_count_and_fields_that_end_with_nul():
    fields = (7, b'\xff', 'a\udcff')
    assert ssh_scheduler.request('start', *fields) == b'start\x003\x007\x00\xff\x00a\xff\x00'
    assert ssh_scheduler.request('probe') == b'probe\x000\x00'
    assert ssh_scheduler.nul_ended(*fields) == b'7\x00\xff\x00a\xff\x00'
    with pytest.raises(ValueError):
        ssh_scheduler.request('a\0b')


def test_what_bash_escapes_is_unescaped():
    texts = [b'', b'\\', b'\\t', b'a\tb\nc\\d', b'\\\\n\n', '\xe4 \u20ac'.encode(),
             b'\xff\xfe\n', b'%s%%']
    start = ssh_scheduler.REMOTE_RUNNER.index('escape() {')
    function = ssh_scheduler.REMOTE_RUNNER[start:].partition('\n}\n')[0] + '\n}\n'
    script = function + 'LC_ALL=C\nfor text; do escape "$text"; printf "%s\\n" "$REPLY"; done'
    done = subprocess.run([b'bash', b'-c', script.encode(), b'bash', *texts], capture_output=True,
                          check=True)
    lines = done.stdout.split(b'\n')[:-1]
    assert [ssh_scheduler.unescape(line) for line in lines] == texts


# ---- Events: from fields to values ----

EVENT = st.tuples(
    st.sampled_from([b'data', b'', b'nonsense', *(word.encode() for word in ssh_scheduler.EVENTS)]),
    st.lists(st.sampled_from([b'', b'out', b'0', b'7', b'-1', b'1_0', b' 3', b'9' * 400, b'=text',
                              b'@5', b'@' + b'9' * 30, b'+./a', b'm644 ./a', b'm ./a', b's99', b's',
                              b'@', b'a\0b\0', b'\xff', *map(str.encode, ssh_scheduler.EVENTS)]),
             max_size=9)).map(lambda event: [event[0], *event[1]])


@settings(deadline=None, derandomize=True, max_examples=1000)
@given(EVENT)
def test_any_fields_are_an_event_with_values_or_refused(fields):
    try:
        word, values = ssh_scheduler.decode(fields)
    except ssh_scheduler.WireError as error:
        assert str(error).isprintable()
        return
    needed, optional, rest = ssh_scheduler.EVENTS[word]
    assert len(needed) <= len(values) and (rest or len(values) <= len(needed + optional))
    for value in values:
        assert not isinstance(value, int) or 0 <= value < 2**60


@pytest.mark.parametrize('number', [b'9' * 400, b'-1', b'', b'x', b'0x1', b'1' * 20])
def test_a_number_that_makes_no_sense_is_refused(number):
    for fields in ([b'used', b'job.1', number], [b'measured', b'1', number],
                   [b'ended', b'job.1', number, b'0', b'0', b'=', b'='],
                   [b'ended', b'job.1', b'0', number, b'0', b'=', b'='],
                   [b'ended', b'job.1', b'0', b'0', b'0', b'@' + number, b'='],
                   [b'ended', b'job.1', b'0', b'0', b'0', b'=', b'=', b's' + number]):
        with pytest.raises(ssh_scheduler.WireError, match='cannot be understood'):
            ssh_scheduler.decode(fields)


def test_each_event_has_one_part_that_hears_it():
    parts = (ssh_scheduler.Worker, ssh_scheduler.JobControl, ssh_scheduler.Collector,
             ssh_scheduler.Gauge, ssh_scheduler.Queued)
    for word in ssh_scheduler.EVENTS:
        assert sum(hasattr(part, f'on_{word}') for part in parts) == 1, word
