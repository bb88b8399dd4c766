"""Tables whose cells span rows and columns."""

from services.commands.evaluation.olmocr.tables import (
    DOWN,
    LEFT,
    RIGHT,
    UP,
    Place,
    Table,
    find_tables,
)


def only(html: str) -> Table:
    (table,) = find_tables(f"<table>{html}</table>")
    return table


def texts(table: Table, names: set[Place]) -> set[str]:
    return {table.cells[name].text for name in names}


def test_a_cell_has_all_neighbours_along_its_side() -> None:
    table = only(
        "<tr><td rowspan=3>a</td><td>b</td><td>c</td></tr>"
        "<tr><td colspan=2>d</td></tr><tr><td>e</td><td>f</td></tr>"
    )
    assert texts(table, table.neighbours((0, 0), RIGHT)) == {"b", "d", "e"}
    assert texts(table, table.neighbours((1, 1), UP)) == {"b", "c"}
    assert texts(table, table.neighbours((1, 1), DOWN)) == {"e", "f"}
    assert texts(table, table.neighbours((2, 2), LEFT)) == {"e"}
    assert table.neighbours((0, 0), LEFT) == set()


def test_the_nearest_neighbour_is_beyond_missing_cells() -> None:
    table = only("<tr><td>a</td><td>b</td></tr><tr><td>c</td></tr><tr><td>d</td><td>e</td></tr>")
    assert texts(table, table.neighbours((0, 1), DOWN)) == {"e"}


def test_a_cell_of_no_rows_reaches_to_the_end() -> None:
    table = only("<tr><td rowspan=0>a</td><td>b</td></tr><tr><td>c</td></tr><tr><td>d</td></tr>")
    assert texts(table, table.neighbours((0, 0), RIGHT)) == {"b", "c", "d"}


def test_spans_that_are_no_numbers_count_as_one() -> None:
    table = only("<tr><td rowspan=x colspan=-2>a</td><td colspan=''>b</td></tr>")
    assert (table.num_rows, table.num_columns) == (1, 2)


def test_a_table_that_claims_to_be_huge_is_ignored() -> None:
    assert find_tables("<table><tr><td rowspan=65534 colspan=1000>a</td></tr></table>") == []
    rows = "<tr><td>a</td></tr>" * 9
    assert find_tables(f"<table><tr><td colspan=999999999>a</td></tr>{rows}</table>") == []


def test_line_breaks_and_nested_tags_are_text() -> None:
    table = only("<tr><td>a<br>b <i>c</i></td><td></td></tr>")
    assert table.cells[0, 0].text == "a\nb c"


def test_markdown_tables_are_lines_with_pipes() -> None:
    (first, second) = find_tables("a|b\n1|2\n\ntext\n| c |\n|---|\n| d |")
    assert [cell.text for cell in first.cells.values()] == ["a", "b", "1", "2"]
    assert [cell.text for cell in second.cells.values()] == ["c", "d"]
    assert [cell.is_heading for cell in first.cells.values()] == [True, True, True, False]
