"""The README tells the truth: every command in it is run by ``.ci/run``, every path it names exists."""

import pathlib
import re

from gpt2rt.checkpoint.resolve import embedded_models

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKS = ("<!-- first-command -->", "<!-- second-command -->", "<!-- run -->")


def test_every_block_of_commands_is_marked_to_be_run():
    blocks = list(re.finditer(r"^```(bash|python)$", README, re.MULTILINE))
    assert len(blocks) >= 5
    for block in blocks:
        before = README[: block.start()].rstrip().splitlines()[-1]
        assert before in MARKS, f"the block at {block.start()} is not run by .ci/run: {before!r}"


def test_ci_runs_all_three_kinds():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "readme_command first-command" in script
    assert "readme_command second-command" in script
    assert "readme_commands.py" in script
    assert README.count("<!-- first-command -->") == README.count("<!-- second-command -->") == 1


def test_every_path_in_the_readme_exists():
    names = set(re.findall(r"`((?:gpt2rt|csrc|kernels|tests|benchmarks|examples)/[\w./-]+)`", README))
    files = names - set(embedded_models())
    assert files
    for name in files:
        assert (ROOT / name).exists(), f"README.md names {name}, which does not exist"
