"""The command line of the scripts that have no config: a mistake is one sentence, and a number may be negative."""

import pytest
from script_runs import script

from sushi_research.adapters.tools import arguments as of_tools

MERGE = ["merge", "a.safetensors", "--output", "b.safetensors", "--weights"]
SCRIPTS = ("convert_lora", "compare_runs", "push_to_hub")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("words", [["--unknown"], ["--hel"], []])
def test_a_mistake_is_one_sentence(name, words, capsys):
    module = script(name)
    with pytest.raises(SystemExit) as ended:
        module.parse([*words])
    found = capsys.readouterr()
    assert ended.value.code == 2 and found.out == ""
    assert found.err.startswith("error: ") and found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "a.safetensors"], "error: the following arguments are required: --base ("),
        (["resize", "a.safetensors", "--output", "b"], "error: give --rank, --kept or both: how far it is reduced\n"),
        (["resize", "a", "--output", "b", "--rank", "x"], "error: argument --rank: invalid int value: 'x' ("),
        ([*MERGE, "-inf"], "error: --weights holds a number that is not finite"),
    ],
)
def test_a_mistake_of_a_command(words, said, capsys):
    with pytest.raises(SystemExit):
        of_tools.parse(words, None)
    found = capsys.readouterr().err
    assert found.startswith(said) and found.count("\n") == 1


def test_a_negative_number_is_no_option():
    for text in ("-1e-3", "-1", "-.5", "-2.", "-1.5E+2"):
        assert of_tools.parse([*MERGE, text], None).weights == [float(text)]
    assert of_tools.parse(["merge", "a", "b", "--weights", "1", "-1e-3", "--output", "c"], None).weights == [1, -1e-3]
