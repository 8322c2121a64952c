"""What a launcher asks for: what has no effect is refused by name, and several processes report one error."""

from __future__ import annotations

import argparse

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from sushi_research.errors import UserError
from sushi_research.runs import launch
from testing.forked_scripts import ranks

PAIR = ranks(2, 29500)


def exported(*options: str) -> dict[str, str]:
    """The ACCELERATE_ variables that `accelerate launch` exports for these options."""
    arguments = launch_command_parser().parse_args(
        ["--mixed_precision", "no", "--dynamo_backend", "no", *options, "script.py"]
    )
    arguments.num_processes, arguments.num_machines, arguments.num_cpu_threads_per_process = 1, 1, 1
    arguments.use_cpu = False  # which an accelerate config sets
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    environment |= prepare_multi_gpu_env(argparse.Namespace(**vars(arguments)))
    return {
        name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_", "MEGATRON_"))
    }


def test_what_a_launcher_exports_when_nothing_was_asked_for():
    for environment in (
        {},
        exported(),
        exported("--cpu"),
        *PAIR,
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "-1"},
        {"MASTER_PORT": "x"},
    ):
        launch.require_launch(environment)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--dynamo_backend", "inductor"], "--dynamo_backend (ACCELERATE_DYNAMO_BACKEND is INDUCTOR)"),
        (["--dynamo_mode", "max-autotune"], "--dynamo_mode"),
        (["--dynamo_use_fullgraph"], "--dynamo_use_fullgraph"),
        (["--use_fsdp"], "--use_fsdp"),
        (["--use_megatron_lm"], "--use_megatron_lm"),
        (["--use_parallelism_config"], "--use_parallelism_config"),
    ],
)
def test_an_option_without_effect(options, named):
    with pytest.raises(UserError) as caught:
        launch.require_launch(exported(*options))
    assert named in str(caught.value) and "has no effect here: launch with" in str(caught.value)


@pytest.mark.parametrize(
    "environment, named",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "set train.accumulation in the config instead"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU is perhaps"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "1"}, "RANK is 1, but LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE is 'x', which is not a number"),
        (PAIR[0] | {"OMP_NUM_THREADS": "x"}, "OMP_NUM_THREADS is 'x', which is not a number"),
        (PAIR[0] | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        (PAIR[0] | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        (
            PAIR[0] | {"MASTER_ADDR": "no-such-host.invalid"},
            "MASTER_ADDR is no-such-host.invalid, which cannot be resolved",
        ),
    ],
)
def test_a_launch_that_cannot_be(environment, named):
    with pytest.raises(UserError) as caught:
        launch.require_launch(environment)
    assert named in str(caught.value)


def test_the_other_processes_say_nothing():
    with pytest.raises(SystemExit) as caught:
        launch.require_launch(PAIR[1] | {"ACCELERATE_USE_FSDP": "true"})
    assert caught.value.code == 2
