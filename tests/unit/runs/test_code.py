"""The code of a run: equal for what does the same, and different, with the file's name, for what may not."""

import ast
import shutil
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import case

import sushi_research
from sushi_research.errors import UserError
from sushi_research.runs import code
from sushi_research.runs.code import changed_files, code_of, full_hash
from sushi_research.runs.syntax_tree import parsed

SCRIPTS = Path(__file__).parents[3] / "scripts"
SCRIPT = '''\
"""Trains."""

import json
from typing import TYPE_CHECKING

import numpy

from losses import mse
if TYPE_CHECKING:
    from shapes import Shape


def loss(a: "Shape", b):
    """Of a batch."""
    return mse(a, b)  # plain


def main():
    import lazily
    return lazily.run(loss, "a text", f"{lazily!r:>4}", b"bytes", 10**3, 1.5, None, ...)
'''
HELPERS = {
    "losses.py": "from tools import scale\n\ndef mse(a, b):\n    return scale * (a - b) ** 2\n",
    "tools/__init__.py": "from .numbers import scale\n",
    "tools/numbers.py": "scale = 2\n",
    "lazily.py": "import importlib\nrun = importlib.import_module('extra').run\n",
    "extra.py": "def run(*_): return 0\n",
    "shapes.py": "class Shape: ...\n",
    "unused.py": "1 / 0\n",
}


@pytest.fixture
def project(tmp_path):
    """Writes a script and the modules beside it; gives the script's path."""

    def write(script=SCRIPT, name="train.py", folder="project", **helpers):
        root = tmp_path / folder
        for file, text in (HELPERS | helpers).items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
        (root / name).write_text(script)
        return root / name

    return write


def test_the_files_are_the_script_and_what_it_imports_of_the_users_own(project):
    found = code_of(project())
    assert found["script"] == "train.py" and found["named"] == {}
    assert list(found["files"]) == [
        "extra.py",
        "lazily.py",
        "losses.py",
        "script",
        "tools/__init__.py",
        "tools/numbers.py",
    ]


SAME = {
    "a comment": SCRIPT.replace("  # plain", "  # the plain loss"),
    "no docstrings": SCRIPT.replace('"""Trains."""\n', "").replace('    """Of a batch."""\n', ""),
    "blank lines": "\n\n" + SCRIPT.replace("\n\n\n", "\n\n\n\n\n"),
    "other quotes and parentheses": SCRIPT.replace('"a text"', "('a ' 'text')"),
    "a statement without effect": SCRIPT.replace("    import lazily\n", "    pass\n    'a note'\n    import lazily\n"),
    "an import for type checkers": SCRIPT.replace("import Shape", "import Shape as S, Shape").replace(
        "shapes", "unused"
    ),
}
OTHER = {
    "another number": SCRIPT.replace("1.5", "1.25"),
    "another type of number": SCRIPT.replace("1.5", "15"),
    "another name": SCRIPT.replace("(a, b)  #", "(b, a)  #"),
    "another text": SCRIPT.replace("a text", "the text"),
    "one more statement": SCRIPT.replace("    import lazily\n", "    import lazily\n    lazily.x = 1\n"),
    "None left out": SCRIPT.replace("None, ...", "..."),
}


def test_what_does_the_same_has_the_same_hash(project):
    plain = code_of(project())
    for name, script in SAME.items():
        with case(name):
            assert script != SCRIPT and code_of(project(script, folder=name))["files"] == plain["files"]
    for name, script in OTHER.items():
        with case(name):
            other = code_of(project(script, folder=name))
            assert other["hash"] != plain["hash"] and changed_files(plain, other) == ["train.py"]


def test_a_copy_under_another_name_and_place_is_the_same_code(project):
    one, other = code_of(project()), code_of(project(name="mine.py", folder="elsewhere"))
    assert one["hash"] == other["hash"] and changed_files(one, other) == []
    changed = code_of(project(SCRIPT.replace("mse(a", "2 * mse(a"), name="mine.py", folder="third"))
    assert changed_files(one, changed) == ["train.py / mine.py"]


def test_a_changed_module_is_named(project):
    one = code_of(project())
    other = code_of(project(folder="b", **{"tools/numbers.py": "scale = 3\n", "unused.py": "2 / 0\n"}))
    assert changed_files(one, other) == ["tools/numbers.py"] and one["hash"] != other["hash"]
    fewer = code_of(project(folder="c", **{"lazily.py": "run = print\n"}))
    assert changed_files(one, fewer) == ["extra.py", "lazily.py"]


def test_every_way_to_write_an_import_is_followed(project):
    nested = {"losses/__init__.py": "", "losses/huber.py": "delta = 1\n"}
    for number, script in enumerate(
        [
            "import losses.huber as h",
            "from losses import huber as h",
            "from .losses import huber",
            "from losses import *",
            "from . import losses\nfrom losses.huber import *",
            "from ..shared import of_all",
            "from importlib import import_module\nimport_module(name='losses.huber')",
            "from importlib import import_module as load\nNAME = 'losses.huber'\nload(NAME)",
            "import importlib as i\ni.import_module('.huber', 'losses')",
            "import importlib as i\ni.import_module('.huber', package='losses')",
            "import runpy\nrunpy.run_path('huber.py')",
        ]
    ):
        with case(script):
            codes = []
            for value in (1, 2):
                above = f"{number}-{value}"
                project(f"x = {value}\n", name="of_all.py", folder=f"{above}/shared")
                changed = nested | {file: f"delta = {value}\n" for file in ("losses/huber.py", "huber.py")}
                codes.append(code_of(project(script, folder=f"{above}/mine", **changed)))
            places = {"shared": "shared/of_all.py", "runpy": "huber.py"}
            expected = next((file for word, file in places.items() if word in script), "losses/huber.py")
            assert changed_files(*codes) == [expected] and codes[0]["hash"] != codes[1]["hash"]


def test_a_class_that_the_config_names_counts_and_does_not_change_the_hash_of_the_rest(project, tmp_path, monkeypatch):
    own = {"optimizers.py": "import losses\nfrom base_of_all import Base\nclass Mine(Base): pass\n"}
    installed = tmp_path / "site-packages"
    for package, text in (("prodigious", "import json\nfrom .core import Fast\n"), ("base_of_all", "Base = 1\n")):
        (installed / package).mkdir(parents=True)
        (installed / package / "__init__.py").write_text(text)
    (installed / "prodigious/core.py").write_text("class Fast: pass\n")
    monkeypatch.syspath_prepend(str(installed))
    script = project(SCRIPT + "\nimport prodigious\n", **own)
    plain = code_of(script)
    for name, files in {
        "optimizers.Mine": ["optimizers.py"],  # losses.py counts already; what is installed has a version
        "prodigious.Fast": ["prodigious/__init__.py", "prodigious/core.py"],  # but that version is not recorded
        "torch.optim.SGD": [],
        "nowhere.Class": [],
    }.items():
        with case(name):
            found = code_of(script, [name])
            assert list(found["named"]) == files and found["hash"] == plain["hash"]
            assert (full_hash(found) == plain["hash"]) is (not files)
    changed = project(
        SCRIPT + "\nimport prodigious\n", folder="b", **{"optimizers.py": own["optimizers.py"] + "x = 1\n"}
    )
    before, after = code_of(script, ["optimizers.Mine"]), code_of(changed, ["optimizers.Mine"])
    assert changed_files(before, after) == ["optimizers.py"] and full_hash(before) != full_hash(after)
    # The config says that another class is used; no file differs.
    assert changed_files(before, code_of(script, ["prodigious.Fast"])) == []


def test_a_script_of_the_suite_and_the_package(tmp_path, monkeypatch):
    """What the training imports counts, wherever the checkout lies; what it does not import and the version do not."""
    script = SCRIPTS / "train_sd15_lora.py"
    found = code_of(script)
    assert {
        "script",
        "sushi_research/objectives/schedule.py",
        "sushi_research/models/sd15.py",
        "sushi_research/files.py",
    } <= set(found["files"])
    assert "sushi_research/models/formats/sdxl.py" in found["files"], "imported by a name that is put together"
    assert not [name for name in found["files"] if name.startswith(("sushi_research/experiments", "testing", "demo"))]
    assert "sushi_research/models/sdxl.py" not in found["files"] and len(found["files"]) > 50

    moved = tmp_path / "sushi_research"
    shutil.copytree(Path(sushi_research.__file__).parent, moved, ignore=shutil.ignore_patterns("__pycache__"))
    spec = PathFinder.find_spec("sushi_research", [str(tmp_path)])
    monkeypatch.setattr(code, "sushi_research", SimpleNamespace(__spec__=spec))
    (moved / "__init__.py").write_text(
        (moved / "__init__.py").read_text().replace('__version__ = "', '__version__ = "9.')
    )
    (moved / "experiments/plots.py").write_text("")
    assert code_of(script) == found
    text = (moved / "objectives/schedule.py").read_text()
    (moved / "objectives/schedule.py").write_text(text.replace("NUM_TIMESTEPS = 1000", "NUM_TIMESTEPS = 999"))
    assert changed_files(found, code_of(script)) == ["sushi_research/objectives/schedule.py"]


def test_the_hash_is_that_of_every_version_of_python(project, monkeypatch):
    """It is stored in run folders. A later Python adds fields to the syntax tree, which are empty where they are not used."""
    found = code_of(project())["files"]["script"]
    assert found == "5ec4e3aa90e1059c14ea1dae9d5d1048"
    parsed.cache_clear()
    for kind in (ast.FunctionDef, ast.Call, ast.Constant):
        monkeypatch.setattr(kind, "_fields", (*kind._fields, "later", "later_list"))
        monkeypatch.setattr(kind, "later", None, raising=False)
        monkeypatch.setattr(kind, "later_list", [], raising=False)
    assert code_of(project())["files"]["script"] == found
    parsed.cache_clear()


def test_what_is_not_python_is_hashed_by_its_bytes(project):
    one = code_of(project(**{"extra.py": "print 1\n"}))
    other = code_of(project(folder="b", **{"extra.py": "print 2\n"}))
    assert changed_files(one, other) == ["extra.py"]
    with pytest.raises(UserError, match="gone.py cannot be read"):
        code_of("gone.py")
