"""The tables of `scripts/gpu`."""

from benchmarks.gpu.table import cell, markdown, number

RESULT = {
    "part": "speed",
    "status": "timed out",
    "reason": "",
    "seconds": 61.4,
    "rows": [
        {
            "table": "Speed",
            "case": "decode",
            "ms": 4.125,
            "share": 0.8125,
            "reached": True,
        },
        {"table": "Limits", "GB": 4300},
        {"table": "Speed", "case": "a|b", "ms": None, "wanted_share": 0.6, "reached": False},
    ],
}


def test_rows_of_one_table_stand_together() -> None:
    text = markdown({"device": "a card", "cores": "16"}, [RESULT], dry_run=False)
    assert text.split("\n\n") == [
        "device a card, cores 16",
        "| part | status | seconds | reason |\n| --- | --- | --- | --- |\n"
        "| speed | timed out | 61 |  |",
        "### Speed",
        "| case | ms | share | reached | wanted share |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| decode | 4.12 | 81.2% | yes |  |\n"
        "| a\\|b |  |  | **no** | 60.0% |",
        "### Limits",
        "| GB |\n| --- |\n| 4,300 |\n",
    ]


def test_every_figure_of_a_dry_run_is_marked() -> None:
    text = markdown({"device": "CPU"}, [RESULT], dry_run=True)
    assert text.startswith("Dry run on the CPU at toy size: no figure says anything about a card")
    assert "| decode | 4.12 (dry) | 81.2% (dry) | yes (dry) |  |" in text
    assert "| 4,300 (dry) |" in text


def test_numbers_keep_about_three_digits() -> None:
    values = (0, 0.00001234, 0.1234, 1.234, 123.4, 12345.6)
    assert [number(value) for value in values] == [
        "0.0000",
        "1.2e-05",
        "0.1234",
        "1.23",
        "123.4",
        "12,346",
    ]
    assert cell("share_of_step", 0, "") == "0.0%"
