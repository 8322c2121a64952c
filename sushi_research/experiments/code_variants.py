"""The code of runs in a comparison: which runs were trained with the same code, and in which files the others differ.

The code of a run is a sequence, because a run may continue with other code than it began with. Such a run is a variant of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from sushi_research.errors import some
from sushi_research.reports.run_record import RunRecord
from sushi_research.runs import code

CONSEQUENCE = "the code may cause the difference"
NOT_RECORDED = "not recorded"

# (step, hash) for each stretch of steps that was trained with one code; the hash is None if it is not recorded.
History = tuple[tuple[int, str | None], ...]


def history(run: RunRecord) -> History | None:
    """With which code a run was trained, from which step on; None if no code is recorded."""
    found = [(step, code.full_hash(each)) for step, each in stretches(run)]
    return tuple(found) if any(digest for _, digest in found) else None


def label(run: RunRecord) -> str:
    """The code of a run for a table: the script and the hash of each stretch."""
    if history(run) is None:
        return NOT_RECORDED
    texts = []
    for step, each in stretches(run):
        digest = code.full_hash(each)
        text = f"{each.get('script')} {digest[:6]}" if digest else NOT_RECORDED
        texts.append(f"{text} from step {step}" if step else text)
    return ", ".join(texts)


def differing(variants: Sequence[Sequence[RunRecord]], is_file: Sequence[bool]) -> dict[str, list[Any]]:
    """The row "code" of the table of differing settings, from the runs of each variant; empty if the codes do not differ."""
    histories = {history(run) for runs, file in zip(variants, is_file, strict=True) for run in runs if not file}
    if len(histories) < 2:
        return {}
    values = [
        "" if file else " | ".join(dict.fromkeys(map(label, runs)))
        for runs, file in zip(variants, is_file, strict=True)
    ]
    return {"code": values}


def warnings(records: Sequence[RunRecord], pooled: bool = False) -> list[str]:
    """Sentences about runs whose code differs or is not known. `pooled`: runs of any code are pooled, as the user asked."""
    trained = [run for run in records if run.state != "file" and run.entries]
    recorded = [run for run in trained if history(run) is not None]
    unknown = [run for run in trained if history(run) is None]
    found = _between(recorded) + _between_files(records)
    for run in trained:
        found += [f"{text}{'' if pooled else ': it is a variant of its own'}" for text in _continued(run)]
    if unknown and recorded:
        names = _some(unknown)
        found.append(f"no code is recorded for {names}, which an earlier version of this suite trained: {CONSEQUENCE}")
    found += _by_commit([run for run in records if run.entries and history(run) is None])
    if pooled and len({history(run) for run in trained}) > 1:
        found.append("runs with equal settings are pooled although their code differs, because --pool-code asks for it")
    return found


def _between(recorded: Sequence[RunRecord]) -> list[str]:
    """A sentence for each code that differs from that of the first run, with the files."""
    groups: dict[str, list[RunRecord]] = {}
    for run in recorded:
        last = _codes(run)[-1]
        groups.setdefault(str(code.full_hash(last)), []).append(run)
    first, *others = groups.values() if groups else [[]]
    found = []
    for group in others:
        files = code.changed_files(_codes(first[0])[-1], _codes(group[0])[-1])
        if files:
            text = f"the code of {_some(group)} differs from that of {_some(first)} in {code.listed(files)}"
            found.append(f"{text}: {CONSEQUENCE}")
    return found


def _between_files(records: Sequence[RunRecord]) -> list[str]:
    """A sentence for each evaluated adapter file whose evaluation shares modules with the first record and found others in them."""
    known = [run for run in records if code.is_recorded(run.entry.get("code") or {})]
    found = []
    for run in known[1:]:
        if "file" in (run.state, known[0].state):
            files = code.shared_files_changed(known[0].entry["code"], run.entry["code"])
            if files:
                text = (
                    f"the code that evaluated {run.name} differs from that of {known[0].name} in {code.listed(files)}"
                )
                found.append(f"{text}: {CONSEQUENCE}")
    return found


def _continued(run: RunRecord) -> list[str]:
    """The sentence about a run that continued with other code than it began with, or with code that is not recorded."""
    found, trained = [], stretches(run)
    for (_, before), (step, after) in itertools.pairwise(trained):
        if code.is_recorded(before) and code.is_recorded(after):
            files = code.listed(code.changed_files(before, after))
            is_back = code.full_hash(after) == code.full_hash(trained[0][1])
            which = "the code that it began with again" if is_back else "other code than it began with"
            found.append(f"{run.name} was continued at step {step} with {which} ({files})")
        else:
            found.append(
                f"{run.name} was continued at step {step}, and its code before or after that step is not recorded"
            )
    return found


def _by_commit(unknown: Sequence[RunRecord]) -> list[str]:
    """What the commits say about the code of runs whose code is not recorded."""
    found: list[str] = []
    commits: dict[str, list[RunRecord]] = {}
    for run in unknown:
        if commit := (run.entry.get("code") or {}).get("commit"):
            commits.setdefault(commit, []).append(run)
    if len(commits) > 1:
        values = "; ".join(f"{commit[:12]}: {_some(runs)}" for commit, runs in commits.items())
        found.append(f"not all runs have the same code ({values}): {CONSEQUENCE}")
    if dirty := [run for run in unknown if (run.entry.get("code") or {}).get("dirty")]:
        found.append(f"the code had uncommitted changes in {_some(dirty)}: the exact code is not recorded")
    for run in unknown:
        if len({(entry.get("code") or {}).get("commit") for entry in run.entries}) > 1:
            found.append(f"{run.name} was resumed with other code than it was started with")
    return found


def _codes(run: RunRecord) -> list[dict[str, Any]]:
    """The recorded codes that a run was trained with, in order."""
    return [each for _, each in stretches(run) if code.is_recorded(each)]


def stretches(run: RunRecord) -> list[tuple[int, dict[str, Any]]]:
    """(first step, code) of each stretch of steps that was trained with one code."""
    found: list[tuple[int, dict[str, Any]]] = []
    for entry in run.launches:
        each = entry.get("code") or {}
        step = entry.get("step")
        if not found or code.full_hash(found[-1][1]) != code.full_hash(each):
            found.append((step if isinstance(step, int) else 0, each))
    return found


def _some(runs: Sequence[RunRecord]) -> str:
    return some([run.name for run in runs])
