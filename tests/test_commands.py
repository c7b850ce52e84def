import importlib.util

from lightsparse.__main__ import COMMANDS, main


def test_every_command_is_listed_on_a_line_and_exists(capsys):
    main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == len(COMMANDS) and max(map(len, lines)) <= 80
    for command, line in zip(COMMANDS, lines, strict=True):
        assert line.startswith(command)
        words = command.split()
        assert words == ["python", "train.py"] or importlib.util.find_spec(words[2])
