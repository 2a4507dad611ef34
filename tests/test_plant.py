"""The faults of tests/plant.py: their texts are in the sources once, and their tests are there."""

import plant

BACKENDS = {"portable", "cpu", "triton", "cuda"}


def test_faults_can_be_planted_and_their_tests_are_there():
    for fault in plant.FAULTS:
        assert plant.holder(fault, plant.ROOT) is not None, fault.name
        file, words = fault.tests.split(" ", 1)
        text = (plant.ROOT / "tests" / file).read_text(encoding="utf-8")
        assert any(word in text for word in words.split(" and ") if word not in BACKENDS), fault.name


def test_a_text_that_is_gone_or_there_twice_is_said(capsys):
    gone = plant.FAULTS[0]._replace(old="no such text")
    assert plant.verdict(gone, plant.ROOT) == "not planted"
    assert "NOT PLANTED: the text 'no such text' is in no file of bcl_fast/portable.py" in capsys.readouterr().out
    assert plant.verdict(gone._replace(old="Stage `"), plant.ROOT) == "not planted"
    assert "times) of bcl_fast/portable.py" in capsys.readouterr().out
