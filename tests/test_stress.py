"""A short form of tests/stress.py: every attack, a few rounds each. `make stress` runs it whole."""
import os

import pytest

import stress


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.parametrize("attack", stress.ATTACKS, ids=lambda attack: attack.__name__)
def test_what_is_promised_holds(attack, tmp_path):
    attack(stress.ATTACKS[attack][1], tmp_path)
