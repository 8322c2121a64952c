"""Experiment files: variants of a training, each with several seeds, and how they are run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from sushi_research.config.section import Bounded, Location, Section, Seed, Text
from sushi_research.experiments import scoring, search_space, sweep_files
from sushi_research.runs import identity

ONE_PROCESS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
# Settings that the experiment sets itself for each run.
OWN = ("train.seed", "run.name", "run.folder", "dry_run")
NESTED = "as in a config file, nested by section"
# Of one machine, or of one cluster's queue.
MOST_JOBS = 1000
# What submitit takes: minutes, GiB, GPUs and CPUs, and the texts of sbatch.
JobParameter = (
    bool
    | Annotated[int, Field(ge=0, le=1_000_000)]
    | Annotated[float, Field(ge=0, le=1_000_000)]
    | Text
    | Annotated[list[Text], Bounded]
)


class Experiment(Section):
    """Variants of a training, the seeds that each variant is trained with, and how the runs are launched.

    A W&B sweep file is read as one too (`sweep_files`).
    """

    title: Text = Field(description="Title of the comparison page")
    script: Location = Field(
        description="Training script: any that reads its command line with the config class of an architecture, such as a copy of "
        "scripts/train_sdxl_lora.py with another loss"
    )
    configs: Annotated[list[Location], Field(min_length=1), Bounded] = Field(
        description="Config files of all runs; later files override earlier ones"
    )
    settings: dict[str, Any] = Field(
        {},
        description=f"Settings of all runs, which override the config files, {NESTED}",
        json_schema_extra={"allowed": "a section"},
    )
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")], Any] = Field(
        {}, description=f"Name of each variant and its settings, {NESTED}", json_schema_extra={"allowed": "settings"}
    )
    grid: dict[str, Any] = Field(
        {},
        description=f"Instead of variants: lists of values, {NESTED}; each combination is a variant",
        json_schema_extra={"allowed": "a section with lists of values"},
    )
    search: dict[str, Any] = Field(
        {},
        description=f"Instead of a grid, or next to variants: what is drawn at random for each of the samples, {NESTED}; each key "
        f"has W&B's form of a parameter, such as {search_space.EXAMPLE}",
        json_schema_extra={"allowed": "a section with parameters as W&B's sweeps have them"},
    )
    samples: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Number of variants that search draws; null where there is no search"
    )
    search_seed: Seed = Field(
        0, description="Seed of the draws of search; with more samples, the earlier ones stay as they are"
    )
    seeds: Annotated[list[Seed], Field(min_length=1), Bounded] = Field(
        [0, 1, 2], description="Training seeds of each variant; a test between variants needs two or more"
    )
    reference: Text | None = Field(
        None, description="Variant that all others are compared with; null = all pairs, which has less power"
    )
    pool_code: bool = Field(
        False, description="Compare runs that were trained with different code as one variant; the page then says so"
    )
    score: Annotated[Text, AfterValidator(scoring.checked)] | None = Field(
        None,
        description=f"Command that writes scores.json into a finished run's folder ({scoring.PLACE}), such as "
        f"{scoring.EXAMPLE}; it is not run by a shell",
    )
    folder: Location = Field(description="Folder of the runs and the page")
    launch: Annotated[list[Text], Bounded] = Field(ONE_PROCESS, description="Arguments of accelerate launch")
    jobs: Annotated[int, Field(ge=1, le=MOST_JOBS)] | None = Field(
        None,
        description="Runs side by side; null = one for each GPU of this machine (or for as many GPUs as launch has processes), one "
        "without a GPU, and on a cluster all of them",
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        1,
        description="How often in a row a run that failed without having come further is launched again; not after an error that "
        "says what to correct",
    )
    cluster: Literal["slurm", "local"] | None = Field(
        None,
        description="Where runs are launched: null = by this command, slurm = as jobs of a SLURM cluster, local = as jobs of this "
        "machine, to try that out; both need submitit",
    )
    slurm: dict[str, JobParameter] = Field(
        {},
        description="Parameters of a job, by the names of submitit's AutoExecutor: timeout_min (needed), gpus_per_node, "
        "slurm_partition ...",
        json_schema_extra={"allowed": "a text, a number or a list of texts"},
    )
    write_sweep: Location | None = Field(
        None,
        description="Only write the grid or the search as a sweep of W&B to this file, with the same runs' settings",
    )
    dry_run: bool = Field(False, description="List the runs and their states without training")
    status: bool = Field(
        False, description="Print the table of the runs, also while another command trains them, and change nothing"
    )

    read_file = staticmethod(sweep_files.read_experiment)

    @model_validator(mode="after")
    def _variants_are_given(self) -> Experiment:
        if bool(self.variants) == bool(self.grid) and not self.search:
            raise ValueError("variants and grid are both set or both empty: give one of the two, or search")
        if self.search and self.grid:
            raise ValueError("search and grid are both set: give one of the two")
        for name, settings in [
            *self.variants.items(),
            ("settings", self.settings),
            ("grid", self.grid),
            ("search", self.search),
        ]:
            if not isinstance(settings, dict):
                raise ValueError(
                    f"{name} is not a mapping of settings: nest them by section, as in {{lora: {{rank: 8}}}}"
                )
        if (self.samples is None) != (not self.search):
            raise ValueError("samples and search belong together: give both, or neither")
        if self.slurm and self.cluster is None:
            raise ValueError("slurm has parameters of jobs, and cluster is null: set cluster slurm, or remove them")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a duplicate: it would be the same run")
        parts = (self.settings, self.grid, *self.variants.values())
        own = [key for part in parts for key in identity.flatten(part)]
        own += [key for key, _ in search_space.leaves(self.search)]
        if taken := [key for key in own if key in OWN]:
            raise ValueError(f"{taken[0]} is set by the experiment itself: remove it")
        return self
