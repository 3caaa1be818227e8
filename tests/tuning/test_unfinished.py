"""Which searches are unfinished: what can be gone on with is offered, and nothing else."""

import json

import pytest

from lora_dpo.data.journal import alone
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.tuning.folder import begun_options, discard_search, unfinished_searches
from lora_dpo.tuning.space import parse_axis

AXES = [parse_axis("trainer.beta=0.05..0.5"), parse_axis("lora.rank=4,16")]


@pytest.fixture
def begun(tmp_path):
    """The folder of a search as it was begun."""
    folder = tmp_path / "brief.search"
    folder.mkdir()
    stored = {"axes": [vars(axis) for axis in AXES], "judge": ["rules:chars<=12"], "seed": 3, "all_data": True}
    (folder / "search.json").write_text(json.dumps(stored))
    return folder


def test_one_that_goes_on_elsewhere_is_not_offered_and_not_removed(begun, tmp_path):
    assert unfinished_searches(tmp_path) == ["brief"]
    with alone(begun / "search"):  # as tune holds it
        assert unfinished_searches(tmp_path) == []
        with pytest.raises(OutputError, match="Another process"):
            discard_search(tmp_path / "brief")
    (begun / "search.lock").touch()  # what a killed process leaves
    assert unfinished_searches(tmp_path) == ["brief"]
    discard_search(tmp_path / "brief")
    assert list(tmp_path.iterdir()) == []


def test_what_is_over_is_no_search_or_cannot_be_read_is_not_offered(begun, tmp_path):
    (begun / "result.json").write_text("{}")
    assert unfinished_searches(tmp_path) == []
    (begun / "result.json").unlink()
    (tmp_path / "brief").mkdir()
    assert unfinished_searches(tmp_path) == []
    (tmp_path / "brief").rmdir()
    for text in ('{"axes": [], "seeds": 3}', "{"):  # a sweep; a broken file
        (begun / "search.json").write_text(text)
        assert unfinished_searches(tmp_path) == []
    with pytest.raises(ConfigError, match="cannot be read"):
        begun_options(tmp_path / "brief")


def test_it_goes_on_as_it_was_begun(begun, tmp_path):
    assert begun_options(tmp_path / "brief") == {
        "axes": AXES,
        "judge": ["rules:chars<=12"],
        "seed": 3,
        "all_data": True,
    }
