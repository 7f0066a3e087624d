"""The seeded faults of mutants.toml can be made, and the tests that they name exist."""

import ast
import re

from mutants import ROOT, Suite, load

MUTANTS = load()
PACKAGE = ROOT / "blr_optax"


def test_there_are_enough():
    assert len(MUTANTS) >= 60
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


def test_every_fault_can_be_made():
    wrong = []
    for mutant in MUTANTS:
        source = (PACKAGE / mutant.file).read_text()
        if source.count(mutant.old) != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.file}: {mutant.old!r} must occur once, and change")
        else:
            ast.parse(mutant.fault(source))
    assert not wrong


def test_every_named_test_exists():
    assert all(mutant.tests for mutant in MUTANTS)
    missing = [name for m in MUTANTS for name in m.tests if Suite(ROOT).find(name) is None]
    assert not missing


def test_every_optimizer_has_a_fault():
    body = ast.parse((PACKAGE / "optimizers" / "__init__.py").read_text()).body
    (names,) = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    covered = {word for m in MUTANTS for word in re.findall(r"\w+", f"{m.file} {m.about}")}
    assert not set(names) - covered


def test_a_test_is_found_where_it_has_moved_to(tmp_path):
    """What takes long lies in a file of its own; an old suite has other files and names."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text("def test_short(): ...")
    (tests / "test_a_long.py").write_text("def test_c3_long(): ...")
    suite = Suite(tmp_path)
    assert suite.find("test_a.py::test_short[x]") == "tests/test_a.py::test_short[x]"
    assert suite.find("test_a.py::test_c3_long") == "tests/test_a_long.py::test_c3_long"
    assert suite.find("test_a.py::test_long") is None
    assert suite.find("test_b.py::test_short") is None
    old = suite._replace(old=True)
    assert old.find("b/test_b.py::test_long[x]") == "tests/test_a_long.py::test_c3_long[x]"
