"""The README's Python runs as written."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_first_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example.group(1), {})


def test_commands_that_it_names_exist():
    from turnout.cli import app

    named = set(re.findall(r"turnout (demo|contracts|audit|doctor|bench)\b", README))
    commands = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert named <= commands
    assert {"demo", "contracts", "audit", "doctor"} <= named | {"demo"}
