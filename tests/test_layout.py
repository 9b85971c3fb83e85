"""The layout: the README's table of files is complete, and imports point downwards only."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {path.stem for path in ROOT.glob("*.py")}


def rows():
    """The files of each row of the README's table, from the top row to the bottom one."""
    table = (ROOT / "README.md").read_text().split("| files | their one idea |")[1]
    lines = table.split("\n\n")[0].splitlines()[2:]
    return [re.findall(r"`(\w+)\.py`", line.split("|")[1]) for line in lines]


def imports(name):
    """The files of the project that a file imports, also inside functions, but for __main__."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__")]
    found = set()
    for node in (inner for outer in body for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & FILES


def test_the_table_names_every_file_once():
    named = [name for row in rows() for name in row]
    assert sorted(named) == sorted(FILES)


def test_a_file_imports_only_from_the_rows_below_it():
    floor = {name: -i for i, row in enumerate(rows()) for name in row}
    upwards = [
        f"{name} imports {other}"
        for name in sorted(FILES)
        for other in sorted(imports(name))
        if floor[other] >= floor[name]
    ]
    assert not upwards


def test_no_path_leads_out_of_the_repository():
    texts = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "tests").glob("*.py")]
    outside = "../" + "shared"
    assert not [path.name for path in texts if outside in path.read_text()]
