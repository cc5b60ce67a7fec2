"""The kept table of scenarios."""

from bench.reliability.table import Row, keep


def row(name, figure, machine="a machine", as_promised=True):
    return Row(name, f"about {name}", figure, as_promised, "2026-01-02", "abc", machine)


def test_a_run_replaces_the_rows_of_what_it_tried_and_keeps_the_others(tmp_path):
    keep(tmp_path, [row("kills", "old"), row("bombs", "first")])
    keep(
        tmp_path, [row("kills", "new", "another machine", as_promised=False), row("urls", "second")]
    )
    table = (tmp_path / "reliability.md").read_text()
    lines = [line for line in table.splitlines() if " | about " in line]
    assert [line.split(" | ")[2] for line in lines] == ["new", "first", "second"]
    assert [line.split(" | ")[3] for line in lines] == ["NOT as promised", *["as promised"] * 2]
    assert lines[0].endswith("| A |") and lines[1].endswith("| B |")
    assert "* A: another machine" in table and "* B: a machine" in table
