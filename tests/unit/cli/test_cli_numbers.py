"""Numbers and texts of the command line that no command can work with are refused before it begins."""

from __future__ import annotations

import pytest

from clipo_megatron.cli.main import main

MANY_DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "run.yaml", "--gpus", "many"], "argument --gpus: 'many' is no whole number from 1 on"),
        (["plan", "run.yaml", "--gpus", "0"], "'0' is no whole number from 1 on"),
        (["plan", "run.yaml", "--gpus", f"8,{MANY_DIGITS}"], "is no whole number from 1 on"),
        (["plan", "run.yaml", "--rank", "-1"], "'-1' is no whole number from 0 on"),
        (["scale", "run.yaml", "--nodes", "1,two"], "'two' is no whole number from 1 on"),
        (
            ["scale", "run.yaml", "--nodes", "1", "--wait", "nan"],
            "argument --wait: 'nan' is no number of hours from 0 on",
        ),
        (["scale", "run.yaml", "--nodes", "1", "--steps", "0"], "'0' is no whole number from 1 on"),
        (["submit", "run.yaml", "--nodes", "0"], "argument --nodes: '0' is no whole number from 1 on"),
        (["submit", "run.yaml", "--nodes", MANY_DIGITS], "argument --nodes: '99999"),
        (["submit", "run.yaml", "--nodes", "1", "--restarts", "1e9"], "'1e9' is no whole number from 0 on"),
        (["compare", "a.json", "b.json", "--resamples", "5"], "'5' is no whole number from 100 to 1000000"),
        (["compare", "a.json", "b.json", "--seed", "-1"], "'-1' is no whole number from 0 to 4294967295"),
        (["convert", "to-megatron", "a", "b", "--tp", "²"], "'²' is no whole number from 1 on"),
        (["convert", "to-hf", "a", "b", "--max-shard-gb", "inf"], "'inf' is no number above 0"),
        (["convert", "verify", "a", "b", "--tolerance", "-1"], "'-1' is no number above 0"),
        (["convert", "verify", "a", "b", "--show", "1.5"], "'1.5' is no whole number from 0 on"),
        (["train", "run\0.yaml"], "argument 2, 'run\\\\0.yaml', holds a NUL character"),
        (["train", "run.yaml", "name=\udcff"], "argument 3, 'name=\\\\udcff', holds bytes that are not UTF-8"),
    ],
)
def test_what_no_command_can_work_with_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert message in said.err and len(said.err) < 1500 and not said.out
