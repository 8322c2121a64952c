"""What `accelerate launch` without options would start a script with: accelerate's config file, and what of it is refused here."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sushi_research.errors import UserError, first_line

# Attributes of the launcher's arguments -> what the launcher then sets for the script (accelerate/utils/launch.py).
_EXPORTED = {
    "use_deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "use_fsdp": "ACCELERATE_USE_FSDP",
    "use_megatron_lm": "ACCELERATE_USE_MEGATRON_LM",
    "use_parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
    "tpu": "XLA_USE_BF16",
}


@dataclass(frozen=True)
class DefaultLaunch:
    """`accelerate launch` without options: its config file (None without one), processes, and the environment of the script."""

    file: Path | None
    processes: int
    environment: Mapping[str, str]


def default_launch() -> DefaultLaunch:
    """What the launcher reads and would set, by its own functions. Nothing is started.

    Raises UserError for a config file that the launcher cannot use.
    """
    from accelerate.commands import launch
    from accelerate.commands.config import default_config_file
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    file = Path(default_config_file) if os.path.isfile(default_config_file) else None
    logger = logging.getLogger("accelerate.commands.launch")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it lists the values that were not given
    try:
        arguments = launch.launch_command_parser().parse_args(["script.py"])
        arguments, *_ = launch._validate_launch_command(arguments)
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    except Exception as error:  # of YAML, of the system, or of accelerate for values that it does not know
        where = file or "no config file"
        raise UserError(
            f"`accelerate launch` cannot start ({where}: {first_line(error)}): run `accelerate config` again, or remove that file."
        ) from error
    finally:
        logger.setLevel(level)
    environment |= {name: "true" for attribute, name in _EXPORTED.items() if getattr(arguments, attribute, False)}
    return DefaultLaunch(file, arguments.num_processes or 1, environment)
