from headlong.profiling.head_map import head_map_lines, head_summary


def test_one_line_a_layer() -> None:
    assert head_map_lines([[True, False, True], [False, False, False]]) == [
        "layer 0  ● · ●  2",
        "layer 1  · · ·  0",
    ]


def test_lines_align_from_ten_layers_on() -> None:
    lines = head_map_lines([[True]] * 11)
    assert lines[0] == "layer  0  ●  1"
    assert lines[10] == "layer 10  ●  1"


def test_no_layers() -> None:
    assert head_map_lines([]) == []
    assert head_summary([]) == "0 of 0 KV heads retrieve, 0 stream (0.0%)"


def test_summary() -> None:
    labels = [[True, False], [False, False]]
    assert head_summary(labels) == "1 of 4 KV heads retrieve, 3 stream (75.0%)"
