"""Packaging of ssh-scheduler: three modules, six executables, and nothing to compile."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def read_version():
    """Read the version from the text of ssh_scheduler.py: importing it may need what we install."""
    source = (HERE / 'ssh_scheduler.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'$", source, re.MULTILINE).group(1)


def read_readme():
    """Return the README, or nothing where only the modules were copied."""
    readme = HERE / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


setup(
    name='ssh-scheduler',
    version=read_version(),
    description='Run batches of commands on many machines over ssh, with nothing to install there',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    url='https://github.com/benblack769/ssh-scheduler',
    author='ssh-scheduler contributors',
    license='MIT',
    keywords='ssh rsync batch scheduler gpu cluster machine-learning experiments',
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Environment :: Console',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3',
        'Topic :: System :: Clustering',
        'Topic :: System :: Distributed Computing',
    ],
    py_modules=['ssh_scheduler', 'combine_folders', 'results_table'],
    # The same two facts stand in the `# /// script` block of ssh_scheduler.py, for `uv run`.
    python_requires='>=3.9',
    install_requires=['PyYAML', 'docopt-ng', 'rich'],
    entry_points={
        'console_scripts': [
            # ssh_scheduler.main picks the command from the name that it was called by.
            'execute_remote = ssh_scheduler:main',
            'execute_batch = ssh_scheduler:main',
            'execute_to = ssh_scheduler:main',
            'query_machines = ssh_scheduler:main',
            'combine_folders = combine_folders:main',
            'results_table = results_table:main',
        ],
    },
)
