"""The list of mutants against the code: every bug can still be made, compiles, and names tests that
exist. `python tests/mutants.py` runs the mutants; nothing here does.
"""

import re

import pytest

from conftest import ROOT
from mutants import CURVES, MUTANTS, MutantError, changed, panel_order


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_bug_can_still_be_made_and_its_tests_exist(mutant):
    text = changed(mutant)
    compile(text, mutant.file, "exec")
    assert text != (ROOT / mutant.file).read_text()
    for test in mutant.tests:
        file, name = test.split("::")
        source = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{test} is gone"


def test_a_text_that_is_not_there_once_names_its_mutant(tmp_path):
    (tmp_path / "grpo.py").write_text("gain = 1\ngain = 1\n")
    for old, count in (("gain = 1", 2), ("loss", 0)):
        mutant = type(MUTANTS[0])("some_bug", "", "grpo.py", old, "", ())
        with pytest.raises(MutantError,
                           match=f"some_bug: its old text stands {count} times in grpo.py"):
            changed(mutant, tmp_path)


def test_names_are_different_and_the_panels_are_six():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 28 and set(CURVES) <= set(names)
    assert sorted(panel_order()) == sorted(CURVES) and len(CURVES) == 6
