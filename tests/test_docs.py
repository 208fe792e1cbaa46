"""The pages in docs/: their Python and commands run in order, and print what the page shows.

A page whose first line is `<!-- needs: a, b -->` is skipped if one of these modules is missing.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest

from maefast import cli

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    assert program == "maefast", f"only commands of maefast run here, not {program}"
    assert cli.main(arguments) == 0, line


@mock.patch.dict(os.environ)  # a page may set variables
@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    needs = re.match(r"<!-- needs: (.*) -->\n", text)
    for module in needs[1].split(", ") if needs else ():
        pytest.importorskip(module, reason=f"{page.name} needs {module}")
    namespace, printed = {"__name__": page.stem}, ""
    for block in BLOCK.finditer(text):
        language, content = block.groups()
        if language == "text":
            assert content == printed, f"{page.name} does not show what the block before it prints"
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            if language == "python":
                exec(compile("\n" * text[: block.start(2)].count("\n") + content, str(page), "exec"), namespace)
            elif language == "sh":
                for command in content.splitlines():
                    run_command(command)
        printed = stream.getvalue()
