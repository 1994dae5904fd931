"""Templates of `data.text_key`."""

from __future__ import annotations

import pytest

from titan_growth.tools.template import pieces_of


def test_a_name_is_a_name_and_braces_make_a_template() -> None:
    assert pieces_of("data.text") == (("", "data.text"),)
    assert pieces_of("{title}\n\n{a.b}!") == (("", "title"), ("\n\n", "a.b"), ("!", None))
    assert pieces_of("{{{a}}}") == (("{", None), ("", "a"), ("}", None))


@pytest.mark.parametrize("template", ["{", "}", "{}", "{ }", "{a!r}", "{a:3}", "{{a}}", "{a"])
def test_bad_templates(template: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        pieces_of(template)
