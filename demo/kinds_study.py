"""The study of adapter kinds: its page, from the runs of configs/experiments/kinds.yaml.

make experiment EXP=configs/experiments/kinds.yaml
python -m demo.kinds_study         # keeps the records of the runs that are here, and writes the page
python -m demo.kinds_study page    # the page alone, from what is recorded
"""

from __future__ import annotations

import json
import sys
from functools import cached_property
from statistics import mean, median
from typing import Any

import yaml

from demo.evidence.texts import INTERVALS
from demo.recorded_runs import keep
from demo.records import ROOT
from sushi_research.config.process import begin, run_main
from sushi_research.files import write_atomic, write_json
from sushi_research.reports import page
from sushi_research.reports.page import Block
from sushi_research.runs.run_folder import RunFolder

EXPERIMENT = ROOT / "configs/experiments/kinds.yaml"
FOLDER = ROOT / "docs/examples/kinds"
PAGE, FILES, RATES = FOLDER / "kinds.md", FOLDER / "files.json", FOLDER / "learning_rates.json"
TITLE = "Kinds of adapters at equal parameters"
LEAD = (
    "The embedded SDXL base ([demo.md](../../demo.md)) learns a star plate with each kind of adapter "
    "([kinds.md](../../kinds.md)), with the same number of trained parameters within 1 %, and with training of its text"
    " encoders ([text_encoders.md](../../text_encoders.md)). `plain` is a LoRA of rank 8 on the modules of kohya's "
    "networks.lora.",
    "`make experiment EXP=configs/experiments/kinds.yaml` trains and scores the runs, and `python -m demo.kinds_study` "
    "writes this page from them. Their records are in `runs`, so that `compare_runs.py docs/examples/kinds/runs "
    "--reference plain` compares them again; its page, with all tests, is [comparison.md](comparison.md).",
)
READING = (
    "Means of the seeds. Learned and kept are logs of the loss over the base's: of held-out images at the noisiest "
    "quarter of the timesteps (below 0 is learned), and of pictures that the base itself drew (above 0 is lost). "
    "Concept and base's world are pictures that are right of 32, drawn with the adapter file and read by the demo's "
    "checker, with those of each seed in brackets. A step is its CPU time on one core in fp32; on a GPU the kinds "
    "compare differently. Result: by all tests of all pairs as one family (Holm)."
)
LIMITS = (
    "The base is tiny: 3 million weights, layers 32 to 256 wide. What low rank costs, and what a Kronecker product or "
    "an elementwise product gains, depends on how wide layers are. DoRA's and LoKr's small parts weigh more here than "
    "in SDXL.",
    "One concept, one recipe, fp32 on a CPU, three seeds. No difference shown is not no difference.",
    "The learning rate of each kind was chosen from the listed ones by the validation loss of one run with another "
    "seed. Scales are 1 but for rsLoRA, whose only effect at one rank is its scale of alpha / sqrt(rank).",
    "`text` trains its text encoders at the UNet's learning rate. The last layer of the first one does not reach the UNet: "
    "4,480 of its numbers change nothing.",
    "Equal numbers of parameters are not equal files: a DoRA or LoKr of the same count may be slower and load in fewer "
    "programs.",
)


class Results:
    """The recorded runs, by variant in the order of the experiment file, the reference first."""

    def __init__(self) -> None:
        content = yaml.safe_load(EXPERIMENT.read_text(encoding="utf-8"))
        self.seeds, self.trained = content["seeds"], ROOT / content["folder"]
        self.variants = [content["reference"], *(name for name in content["variants"] if name != content["reference"])]

    def names(self, variant: str) -> list[str]:
        return [f"{variant}-seed{seed}" for seed in self.seeds]

    def last(self, variant: str, key: str) -> float:
        """The mean over the seeds of a value of the last evaluation."""
        return mean(
            next(line[key] for line in reversed(self.lines(name)) if key in line) for name in self.names(variant)
        )

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (FOLDER / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def seconds(self, variant: str) -> float:
        """The median CPU seconds of a step, of all seeds together."""
        return median(
            line["cpu_seconds"] for name in self.names(variant) for line in self.lines(name) if "cpu_seconds" in line
        )

    def parameters(self, variant: str) -> int:
        """The number of trained parameters."""
        [name, *_] = self.names(variant)
        return json.loads((FOLDER / "runs" / name / "plan.json").read_text(encoding="utf-8"))["trainable_parameters"]

    def right(self, variant: str, score: str) -> list[int]:
        """How many pictures are right, for each seed."""
        found = [json.loads((FOLDER / "runs" / name / "scores.json").read_text()) for name in self.names(variant)]
        return [sum(each[score]["values"].values()) for each in found]

    @cached_property
    def bytes(self) -> dict[str, int]:
        """The bytes of each run's adapter file."""
        return json.loads(FILES.read_text(encoding="utf-8"))

    @cached_property
    def comparison(self) -> dict[str, Any]:
        return json.loads((FOLDER / "comparison.json").read_text(encoding="utf-8"))

    def outcome(self, variant: str) -> dict[str, Any]:
        """The result of a variant's pair with the reference."""
        return next(each for each in self.comparison["results"] if each["candidate"] == variant)

    def is_trained(self) -> bool:
        """Whether all runs are compared here."""
        return (self.trained / "comparison/comparison.json").is_file()

    def keep(self) -> None:
        """Copies the comparison and the records of the trained runs, and notes the sizes of their files."""
        names = [name for variant in self.variants for name in self.names(variant)]
        keep(self.trained, names, FOLDER)
        sizes = {name: RunFolder(self.trained / name, None).adapter.stat().st_size for name in names}
        write_json(FILES, sizes)


def table(found: Results) -> list[list[str]]:
    """A row for each variant."""
    rows = [
        [
            "",
            "parameters",
            "validation loss",
            "learned",
            "kept",
            "concept",
            "base's world",
            "file, kB",
            "ms a step",
            "result",
        ]
    ]
    for variant in found.variants:
        right = [found.right(variant, score) for score in ("concept", "kept")]
        rows.append(
            [
                variant,
                f"{found.parameters(variant):,}",
                f"{found.last(variant, 'evaluation/loss'):.5f}",
                f"{found.last(variant, 'evaluation/learned'):+.3f}",
                f"{found.last(variant, 'evaluation/kept'):+.3f}",
                *(f"{mean(each):.1f} ({', '.join(map(str, each))})" for each in right),
                f"{mean(found.bytes[name] for name in found.names(variant)) / 1000:.0f}",
                f"{1000 * found.seconds(variant):.0f}",
                "" if variant == found.variants[0] else found.outcome(variant)["result"],
            ]
        )
    return rows


def claims(found: Results) -> list[str]:
    """The sentence of the test of each variant against the plain one."""
    return [found.outcome(variant)["sentence"] for variant in found.variants[1:]]


def rates(found: Results) -> list[list[str]]:
    """The validation losses by which the learning rates were chosen: a row for each variant, the chosen one marked."""
    content = json.loads(RATES.read_text(encoding="utf-8"))
    tried = sorted({float(rate) for of in content["loss"].values() for rate in of})
    rows = [["validation loss at a learning rate of", *(f"{rate:g}" for rate in tried)]]
    for variant in found.variants:
        losses = {float(rate): loss for rate, loss in content["loss"][variant].items()}
        best = min(losses, key=losses.__getitem__)
        shown = [f"{losses[rate]:.5f}" if rate in losses else "-" for rate in tried]
        rows.append(
            [variant, *(f"**{text}**" if rate == best else text for rate, text in zip(tried, shown, strict=True))]
        )
    return rows


def write() -> None:
    """Writes the page from what is recorded."""
    found = Results()
    seeds = f"The seed was {json.loads(RATES.read_text())['seed']}, which no run of the study has."
    blocks = [
        Block("title", TITLE),
        *(Block("text", text) for text in LEAD),
        Block("table", rows=table(found)),
        Block("text", READING),
        Block("heading", "Test results"),
        Block("list", items=claims(found)),
        Block("text", INTERVALS),
        Block("heading", "Learning rates"),
        Block("table", rows=rates(found)),
        Block("text", f"Of one run each; the lowest, in bold, is that of the study. {seeds}"),
        Block("heading", "Limits"),
        Block("list", items=list(LIMITS)),
    ]
    write_atomic(PAGE, page.to_markdown(blocks).encode())


def main(arguments: list[str]) -> int:
    """Writes docs/examples/kinds; returns the exit status."""
    if arguments not in ([], ["page"]):
        print("error: say python -m demo.kinds_study, or python -m demo.kinds_study page.", file=sys.stderr)
        return 2
    found = Results()
    if not arguments and found.is_trained():
        found.keep()
    write()
    return 0


if __name__ == "__main__":
    begin()
    run_main(main, sys.argv[1:])
