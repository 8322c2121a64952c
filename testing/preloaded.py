"""What the fork server does once for the processes that it forks: the imports of a run, the hashes of its code, its keys' defaults.

A run hashes the syntax tree of every module that its script imports, which takes two seconds in a new process. The trees are kept
by the content of the files (`syntax_tree.parsed`), so a forked process finds those of the files as they are.
"""

import gc
from pathlib import Path

from sushi_research import models
from sushi_research.config.keys import default_values
from sushi_research.runs.code import code_of
from testing import process  # noqa: F401

for _script in sorted((Path(__file__).resolve().parents[1] / "scripts").glob("train_*_lora.py")):
    code_of(_script)
for _config in models.config_classes().values():
    default_values(_config)
# As in a new process, where `imports.importing` does it: the collector leaves out what the imports left.
gc.freeze()
