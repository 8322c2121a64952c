"""The comparison of an experiment's runs, by the experiment's own variants and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sushi_research.errors import UserError, some
from sushi_research.experiments import code_variants, comparison, repetitions
from sushi_research.experiments.comparison import Comparison
from sushi_research.experiments.variants import Variant, variants_of
from sushi_research.reports.run_record import RunRecord


def comparison_of(runs: Mapping[str, Sequence[RunRecord]], pairs: Sequence[tuple[str, str]]) -> Comparison:
    """Compares the `pairs` (candidate, reference) of variants, as one family. `runs`: those of each variant.

    `compare_runs.py` finds the variants by the runs' settings and code. Here they are given. UserError as `checked_variants`.
    """
    records = [run for of_it in runs.values() for run in of_it]
    variants = checked_variants(runs)
    found = Comparison(list(variants.values()), False, comparison.differing(list(variants.values())))
    found.problems = [problem for record in records for problem in record.problems]
    found.warnings = [*comparison.warnings_of(records), *code_variants.warnings(records)]
    found.warnings += repetitions.warnings(records)
    comparison.compared_outcomes(found, [(variants[one], variants[other]) for one, other in pairs], None)
    return found


def checked_variants(runs: Mapping[str, Sequence[RunRecord]]) -> dict[str, Variant]:
    """The variants of these runs. UserError for a run with other code than the others, or with other settings than its variant."""
    _require_one_code([run for of_it in runs.values() for run in of_it])
    return {name: _variant(name, of_it) for name, of_it in runs.items()}


def _variant(name: str, runs: Sequence[RunRecord]) -> Variant:
    """The variant of these runs. UserError if their settings differ in more than the seed."""
    groups, by_run = variants_of(runs)
    if len(groups) > 1 and not by_run:
        odd = min(groups, key=lambda group: len(group.runs)).runs[0]
        raise UserError(
            f"{odd.path} was not trained with the settings of the other runs of {name}: train it again with the experiment's file."
        )
    return Variant(name, tuple(sorted((run.with_sorted_names() for run in runs), key=lambda run: run.seed or 0)))


def _require_one_code(records: Sequence[RunRecord]) -> None:
    """UserError that names the runs whose code differs from that of most.

    The code of a named class, such as an optimizer of another package, is not meant: it is what differs between variants. Runs of
    one variant must have the same (`_variant`).
    """
    groups: dict[tuple[tuple[int, str | None], ...], list[RunRecord]] = {}
    for record in records:
        own = tuple((step, each.get("hash")) for step, each in code_variants.stretches(record))
        groups.setdefault(own, []).append(record)
    if len(groups) > 1:
        most = max(groups.values(), key=len)
        odd = [record.name for of_it in groups.values() if of_it is not most for record in of_it]
        raise UserError(
            f"{some(odd)} in {most[0].path.parent}: trained with other code than the other runs, which may cause a difference; "
            "train all of them with one code."
        )
