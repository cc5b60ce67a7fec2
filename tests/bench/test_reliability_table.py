"""The kept table of scenarios."""

from bench.reliability.table import Row, keep


def row(number, figure, machine="a machine", as_promised=True):
    return Row(number, f"scenario {number}", figure, as_promised, "2026-01-02", "abc", machine)


def test_a_run_replaces_the_rows_of_what_it_tried_and_keeps_the_others(tmp_path):
    keep(tmp_path, [row(3, "old"), row(1, "first")])
    keep(tmp_path, [row(3, "new", "another machine", as_promised=False), row(2, "second")])
    table = (tmp_path / "reliability.md").read_text()
    lines = [line for line in table.splitlines() if line[2:3].isdigit()]
    assert [line.split(" | ")[2] for line in lines] == ["first", "second", "new"]
    assert [line.split(" | ")[3] for line in lines] == ["as promised"] * 2 + ["NOT as promised"]
    assert lines[0].endswith("| A |") and lines[2].endswith("| B |")
    assert "* A: a machine" in table and "* B: another machine" in table
