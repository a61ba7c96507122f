"""Matches error messages by the words that they must contain."""

import re


def words(text: str) -> str:
    """Returns a pattern for pytest.raises: one line that contains every word."""
    found = "".join(rf"(?=.*{re.escape(word)})" for word in text.split())
    return rf"\A{found}.{{1,1200}}\Z"  # a dot matches no line break
