"""Tables, with and without rich."""

import sys

from fastconv.measure import report


def test_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    table = report.Table("title", ["a", "b"])
    table.add(["1", "2"], is_loss=False)
    table.show(markdown=False)
    assert capsys.readouterr().out == "title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
