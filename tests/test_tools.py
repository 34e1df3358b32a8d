"""Checks of the source."""

import pytest

from tools.check_language import findings


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\nraise UserError('cifar10 cannot\x20be had')\n", 2),
        ("# A seed stands\n# twice here.\n", 1),
        ("    # text\n    # what is\n    # to be done\n", 2),
    ],
)
def test_phrases_are_found_across_comment_lines(text, line):
    assert [finding[0] for finding in findings(text)] == [line]


def test_plain_english_is_accepted():
    text = "There is no file. It is no longer used; the stand_in is requested.\n"
    assert findings(text) == []
