"""Packaging of ssh-scheduler: three modules, their types, six executables, and nothing to compile.

An installation makes a man page and completions of each executable from its usage text.
"""

import os
import re
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.dist import Distribution

HERE = Path(__file__).resolve().parent
MODULES = ['ssh_scheduler', 'combine_folders', 'results_table']
TYPED = [name for name in MODULES if (HERE / 'stubs' / name).is_dir()]


def read_version():
    """Return the version, from the text of ssh_scheduler.py: an import may lack dependencies."""
    source = (HERE / 'ssh_scheduler.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'$", source, re.MULTILINE).group(1)


def read_readme():
    """Return the README, or '' if only the modules were copied."""
    readme = HERE / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


def shared_files():
    """Return [(folder, name, text)] of the files for man and the shells; [] without .ci/manual."""
    manual = HERE / '.ci/manual'
    return list(runpy.run_path(str(manual))['shared_files']()) if manual.exists() else []


class InstallShared(Distribution().get_command_class('install_data')):
    """Installs the generated files: man pages and completions."""

    def run(self):
        """Write the files below the prefix."""
        for folder, name, text in shared_files():
            place = os.path.join(self.install_dir, folder)
            self.mkpath(place)
            path = os.path.join(place, name)
            with open(path, 'w', encoding='utf-8') as file:
                file.write(text)
            self.outfiles.append(path)


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
    py_modules=MODULES,
    # A type checker finds the types of a single-file module only in a package of this name.
    packages=[f'{name}-stubs' for name in TYPED],
    package_dir={f'{name}-stubs': f'stubs/{name}' for name in TYPED},
    package_data={'': ['*.pyi']},
    data_files=[('share/man/man1', [])],        # without any, InstallShared would not run
    cmdclass={'install_data': InstallShared},
    # The `# /// script` block of ssh_scheduler.py repeats these two facts for `uv run`.
    python_requires='>=3.9',
    install_requires=['PyYAML', 'docopt-ng', 'rich'],
    entry_points={
        'console_scripts': [
            # ssh_scheduler.main takes the command from the name of the executable.
            'execute_remote = ssh_scheduler:main',
            'execute_batch = ssh_scheduler:main',
            'execute_to = ssh_scheduler:main',
            'query_machines = ssh_scheduler:main',
            'combine_folders = combine_folders:main',
            'results_table = results_table:main',
        ],
    },
)
