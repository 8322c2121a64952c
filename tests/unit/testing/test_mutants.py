"""The stored result of `make mutants` is that of the present list of faults, and each was caught."""

import hashlib
import re

import yaml

from testing.mutants import LIST, ROOT, read_mutants


def test_the_stored_result_is_that_of_the_present_list():
    page = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    assert hashlib.sha256(LIST.read_bytes()).hexdigest() in page, "testing/mutants.yaml changed: run make mutants"
    count = len(yaml.safe_load(LIST.read_text(encoding="utf-8")))
    assert f"{count} of {count} faults caught" in page
    assert len(re.findall(r"^\| \w+ \| `[\w/]+\.py`", page, re.MULTILINE)) == count >= 20


def test_every_fault_still_fits_its_file():
    places = [mutant.file for mutant in read_mutants(LIST, ROOT)]
    assert len(set(places)) >= 20
