"""All messages of the three files in one table, where a reviewer sees each new one.

The table is tests/golden/messages.txt.  `make golden` rewrites it.
"""
import ast
import re
from pathlib import Path

import pytest
import test_golden

ROOT = Path(__file__).resolve().parent.parent
FILES = ('combine_folders.py', 'results_table.py', 'ssh_scheduler.py')
HELP = re.compile(r'(\w+_)?(USAGE|OPTIONS)|UNITS|OVERVIEW')     # these have other golden files
WORDS = re.compile(r'[A-Za-z]{2,}[,:;]? (.* )?[A-Za-z{]')
# Strings that are no messages: regular expressions, file formats, options of ssh_config.
OTHER = re.compile(r'\(\?|\\[sSdwWbAZ(.]|\.\*|\[\^|^  [A-Z]|%[YmdH]|\[0-9\]'
                   r'|printf |\(exec|_FAILED\||unset |eval |^export |^set \+')
# In a shell program: the text of an event, a text for a job's stderr, a text used for either.
BASH = re.compile(
    r"""(?:say_text\ (?:note|broken|unfit|lost|preempted|refused)\ (?:"\$\w+"\ )?
        | (?:end_untold|lose_queued|refuse_queued)\ (?:"?\$?\w+"?\ )?
        | (?:REPLY|answer)= | why\[\$key\]= | \$\{why\[\$key\]-)
        (?:"(?P<double>(?:[^"\\]|\\.)*)" | '(?P<single>[^']*)' | (?P<bare>[a-z][^"}]*)\})
        | (?P<own>(?:ssh-scheduler|note(?:\t|\\t)%s):\ [^\n'"]*(?:\\\n[^\n'"]*)?)""", re.VERBOSE)
# What to write instead -> the pattern that no message may match.
WRONG = {
    'name the machine': r'\bover there\b|\bout there\b',
    'keep, continue': r'\bgo(es|ing)? on\b|\bwent on\b|\bruns? on,|\bruns? on\.',
    'name whose': r'\bours?\b|\bwe\b|\bus\b',
    'this long': r'\bso (long|many|much|often)\b',
    'name the thing': r'\bwhat (is|are|was|were|came|comes|it|they|had|has|made)\b',
    'who does it': r'\bit is (said|told|asked|ended)\b|\bis to be said\b',
    'print, report': r'\bsa(y|ys|id|ying)\b',
    'fetch, send': r'\b(bring|brings|brought|bringing)\b',
    'arrive': r'\b(come|comes|came|coming)\b(?! first)',
    'stop': r'\b(ended by|be ended|are ended|end that|end the job)\b',
    'stays': r'\bleaves? (it|them|the jobs?) (over|there|alone)\b|\bin the hands of\b',
    'connection': r'\bcontact\b',
    'exit code': r'\bexit status\b(?! ?$)',
    'again': r'\banew\b|\bonce more: ',
}


def text_of(node):
    """Return the text of a string, with the expressions of an f-string in braces."""
    if isinstance(node, ast.Constant):
        return node.value
    return ''.join(part.value if isinstance(part, ast.Constant) else
                   '{' + ast.unparse(part.value) + '}' for part in node.values)


def strings(node):
    """Yield each string of a file that is no docstring and no help text."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (
            HELP.fullmatch(node.targets[0].id)):
        return
    if isinstance(node, ast.JoinedStr):
        yield text_of(node)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from strings(part.value)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
        return
    for child in ast.iter_child_nodes(node):
        is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if not is_docstring:
            yield from strings(child)


def messages_of(text):
    """Yield the messages to users in a string of a file."""
    if text.count('\n') < 8:
        if WORDS.search(text) and not OTHER.search(text):
            yield text
        return
    for match in BASH.finditer(text):       # a program
        found = next(filter(None, match.groups()), '').replace('\\\n', '')
        if WORDS.search(found):
            yield found


def messages(name):
    """Return the messages of a file, each once, on one line, sorted."""
    tree = ast.parse((ROOT / name).read_text())
    found = {message for text in strings(tree) for message in messages_of(text)}
    return sorted(message.strip().replace('\n', '\\n') for message in found)


def without_code(text):
    """Return a message without the expressions in braces, and without variables of bash."""
    text, before = re.sub(r'\$\w+', '', text), ''
    while text != before:
        text, before = re.sub(r'\{[^{}]*[^{}\s][^{}]*\}', '', text), text
    return text


def test_the_table_of_all_messages():
    test_golden.compare({'messages.txt': ''.join(
        f'{name}: {message}\n' for name in FILES for message in messages(name))})


@pytest.mark.parametrize('name', FILES)
def test_no_message_has_a_word_that_says_nothing(name):
    wrong = [f'{better}: {match[0]!r} in: {message}' for message in messages(name)
             for better, pattern in WRONG.items()
             for match in [re.search(pattern, without_code(message))] if match]
    assert wrong == []


def test_no_help_text_has_such_a_word():
    wrong = [f'{path.name}: {better}: {match[0]!r}'
             for path in (test_golden.GOLDEN / 'help').iterdir()
             for better, pattern in WRONG.items()
             for match in [re.search(pattern, path.read_text())] if match]
    assert wrong == []


def test_the_patterns_find_sentences_that_were_there_once():
    for text in ('lost contact (3 jobs go on there)', 'what is left of it', 'nothing said',
                 'they are ended there', 'so long a job may run', 'the files are brought back',
                 'its stdout on ours', 'contact is looked for, it is said'):
        assert any(re.search(pattern, text) for pattern in WRONG.values()), text


def test_messages_of_each_kind_are_found():
    found = messages('ssh_scheduler.py')
    for beginning in ('--machines is missing.', 'nothing listens at', 'ssh-scheduler: stopped ',
                      'the machine was restarted', 'setup failed ($status)'):
        assert [one for one in found if one.startswith(beginning)] != [], beginning
