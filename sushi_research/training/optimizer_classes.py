"""The optimizers by name: their classes, the arguments that a name gives them, and which of them get joined tensors."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sushi_research.config.learning import OPTIMIZER_NAMES
from sushi_research.errors import UserError, first_line, nearest


@dataclass(frozen=True)
class Named:
    """An optimizer with a name of ours.

    `path` is its class. `arguments` replace defaults of the class; `unused` are arguments of it that have no effect here, each
    with what to set instead. `is_flat` says that it gets joined tensors though it is not elementwise.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    is_flat: bool = False


NAMED = {
    "adamw8bit": Named("bitsandbytes.optim.AdamW8bit"),
    "adamw": Named("torch.optim.AdamW"),
    # Without these two the rate would be that of the paper, a share of each tensor's norm that follows from the step alone.
    "adafactor": Named("transformers.optimization.Adafactor", {"scale_parameter": False, "relative_step": False}),
    "adamw_schedulefree": Named("schedulefree.AdamWScheduleFree"),
    "came": Named("pytorch_optimizer.CAME"),
    "lion": Named("bitsandbytes.optim.Lion"),
    "lion8bit": Named("bitsandbytes.optim.Lion8bit"),
    # The factor 0.2 sqrt(larger side) of arXiv 2502.16982, with which the learning rate of AdamW fits.
    "muon": Named(
        "pytorch_optimizer.Muon", {"use_adjusted_lr": True}, {"adamw_lr": "optimizer.lr, which holds for both parts"}
    ),
    # Its step adds numbers over all tensors: the same estimate whether they are joined or not, up to the order of the sums. Joined,
    # it waits for the device twice a step instead of twice for each tensor.
    "prodigy": Named("prodigyopt.Prodigy", is_flat=True),
    "stableadamw": Named("pytorch_optimizer.StableAdamW"),
}
assert NAMED.keys() == set(OPTIMIZER_NAMES)
# Packages of the extra `optimizers`, as Python imports them.
EXTRA = ("prodigyopt", "pytorch_optimizer", "schedulefree")
# Their classes take any further argument and ignore it.
_TAKES_ANYTHING = "pytorch_optimizer"

# Optimizers whose step treats every number by itself, read in their sources (torch 2.13, bitsandbytes 0.48 and 0.50, schedulefree
# 1.4): the package and the class. Not Adafactor, LAMB, LARS and Muon, whose steps depend on a tensor's norm or shape.
# bitsandbytes' AdEMAMix32bit keeps one average too few for its kernel.
_BITSANDBYTES = ("Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "SGD")
_PAGED = ("Adam", "AdamW", "Lion")
ELEMENTWISE = {
    "torch": {*"ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split()},
    "bitsandbytes": {
        *(f"{name}{bits}" for name in _BITSANDBYTES for bits in ("", "8bit", "32bit")),
        *(f"Paged{name}{bits}" for name in _PAGED for bits in ("", "8bit", "32bit")),
        *(f"{paged}AdEMAMix{bits}" for paged in ("", "Paged") for bits in ("", "8bit")),
    },
    "schedulefree": {
        *(f"{name}ScheduleFree" for name in ("AdamW", "RAdam", "SGD")),
        *("AdamWScheduleFreePaper", "AdamWScheduleFreeReference", "SGDScheduleFreeReference"),
    },
}
# Arguments that make a step depend on whole tensors, with the values that do not. `min_8bit_size` speaks of single tensors.
PER_TENSOR = {
    "args": (None,),
    "block_wise": (True,),
    "max_unorm": (0, None),
    "min_8bit_size": (),
    "percentile_clipping": (100,),
    "slice_p": (1,),
}


def class_path(name: str) -> str:
    """The import path of the class of a name, or the name itself, which is such a path."""
    return NAMED[name].path if name in NAMED else name


def is_elementwise(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the optimizer is known to treat every number by itself, so that tensors can be joined into one.

    Decided by `ELEMENTWISE`, `Named.is_flat` and the arguments `kwargs`, without importing anything; a class that is not known is
    not.
    """
    package, _, rest = class_path(name).partition(".")
    is_known = rest.rpartition(".")[2] in ELEMENTWISE.get(package, ()) or (name in NAMED and NAMED[name].is_flat)
    return is_known and all(kwargs[key] in harmless for key, harmless in PER_TENSOR.items() if key in kwargs)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of this name. UserError if there is none, or none that can be used."""
    module_name, _, class_name = class_path(name).rpartition(".")
    if not module_name:
        raise UserError(
            f"{name} is not an optimizer{nearest(name, NAMED)}: choose from {', '.join(NAMED)}, or give the "
            "import path of a class, such as torch.optim.SGD."
        )
    package = module_name.partition(".")[0]
    if package in EXTRA and importlib.util.find_spec(package) is None:
        raise UserError(
            f"the optimizer {name} is in the package {package}, which is not installed: install the extra (pip install --editable "
            "'.[optimizers]'), or choose another optimizer.name."
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: running it may raise anything
        raise UserError(
            f"the optimizer {name} cannot be imported ({first_line(error)}): install or correct it."
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        ]
        raise UserError(f"{name} is no torch optimizer class{nearest(class_name, classes)}: correct optimizer.name.")
    arguments = list(_parameters(found.step).values())[1:]
    if any(a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise UserError(f"the step of the optimizer {name} needs arguments (as LBFGS does): choose another one.")
    return found


def arguments_of(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the class of this name besides the tensors and the rate: those of the name, and `kwargs`.

    UserError for an argument that the class does not take (naming the nearest one), or that has no effect.
    """
    known = _parameters(optimizer_class(name))
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in known.values())
    if "lr" not in known and not takes_any:
        raise UserError(f"the optimizer {name} takes no lr: choose another one.")
    if not takes_any or class_path(name).startswith(f"{_TAKES_ANYTHING}."):
        named = NAMED.get(name, Named(name))
        allowed = [
            argument
            for argument, value in known.items()
            if argument not in ("params", "lr", *named.unused) and value.kind is not value.VAR_KEYWORD
        ]
        for argument in kwargs:
            if argument in named.unused:
                raise UserError(
                    f"optimizer.kwargs.{argument} has no effect on the optimizer {name}: set {named.unused[argument]}."
                )
            if argument not in allowed:
                raise UserError(
                    f"the optimizer {name} has no argument {argument}{nearest(argument, allowed)}: "
                    f"it takes {', '.join(allowed)}."
                )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    return {**NAMED[name].arguments, **given} if name in NAMED else given


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments by name. A function without a readable signature may take any."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
