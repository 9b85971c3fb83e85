"""The layout: the README's list of files is complete, and imports point downwards only."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {path.stem for path in ROOT.glob("*.py")}


def levels():
    """The files of each level of the README's list, from the top level to the bottom one."""
    section = (ROOT / "README.md").read_text().split("## The files")[1].split("## ")[0]
    lines = re.findall(r"^\d+\. (.*)", section, re.MULTILINE)
    # A file begins its entry. Others that the entry names do not count.
    return [re.findall(r"(?:^|; )`(\w+)\.py`", line) for line in lines]


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


def test_the_list_names_every_file_once():
    named = [name for level in levels() for name in level]
    assert sorted(named) == sorted(FILES)


def test_a_file_imports_only_from_the_levels_below_it():
    floor = {name: -i for i, level in enumerate(levels()) for name in level}
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
