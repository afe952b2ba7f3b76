"""autosteer-run without a prompt, on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import program
from PIL import Image
from terminal import Terminal

from autosteer.runtime.cli.chat import typed_path


def test_chat(package, tmp_path):
    """Two turns, a mistyped picture, a real one, /new, an unknown command, Ctrl-D."""
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    chat = Terminal(program("autosteer-run"), package, "--device", "cpu", "--threads", "1")
    chat.expect("> ")
    chat.type("hello\n")
    assert "world" in chat.expect("tokens, first")
    chat.expect("> ")
    chat.type("bad\n")
    assert "sorry refuse" in chat.expect("on CPUExecutionProvider]")
    chat.expect("(the turn is forgotten)")  # or every later one would be unsafe with it
    chat.expect("> ")
    chat.type("/image gone.png\n")
    chat.expect("error: gone.png: no such image file")
    chat.expect("> ")
    chat.type(f"/image '{tmp_path / 'red.png'}' \n")  # as a terminal writes what is dropped on it
    chat.expect("> ")
    chat.type("red " * 99 + "\n")
    chat.expect("context holds 64")
    chat.expect("> ")
    chat.type("look\n")  # the picture waits for a turn that is answered
    assert "orange yellow green" in chat.expect(" cached) + 4 tokens")
    chat.expect("> ")
    chat.type("/video gone\n")
    chat.expect("error: gone: no such video file or folder")
    chat.expect("> ")
    chat.type("/video\n")  # Path("") is the current folder, whose pictures became a video
    chat.expect("error: the name of the file is empty")
    chat.expect("> ")
    chat.type("/image ''\n")
    chat.expect("error: the name of the file is empty")
    chat.expect("> ")
    chat.type("/nonsense\n")
    chat.expect("/nonsense: not a command. Type a message. ")
    chat.expect("> ")
    chat.type("/help\n")
    chat.expect("/new starts over")
    chat.expect("> ")
    chat.type("/new\n")
    chat.expect("> ")
    chat.type(f"/image {tmp_path / 'red.png'}\n")
    chat.expect("> ")
    chat.type("look\n")
    assert "orange yellow green" in chat.expect("[14 + 4 tokens")  # a fresh dialogue: nothing of the earlier turns
    chat.expect("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_chat_with_a_model_of_text_keeps_no_picture_that_would_fail_every_turn(unguarded_package, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    chat = Terminal(program("autosteer-run"), unguarded_package, "--device", "cpu", "--threads", "1", "--policy", "off")
    for kind in ("image", "video"):
        chat.expect("> ")
        chat.type(f"/{kind} {tmp_path / 'black.png'}\n")
        chat.expect(f"error: this model takes no {kind}s")
    chat.expect("> ")
    chat.type("red\n")
    assert "orange yellow green" in chat.expect("on CPUExecutionProvider]")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("red.png ", "red.png"),
        ("'a b.png' ", "a b.png"),
        ('"a b.png"', "a b.png"),
        ("a\\ b.png", "a b.png"),
        ("a b.png", "a b.png"),
        ("don't.png", "don't.png"),
        ("'odd'.png", "'odd'.png"),  # there is one of that name
        ("~/red.png", "{home}/red.png"),
        ("~nobody-of-this-name/red.png", "~nobody-of-this-name/red.png"),  # it ended the chat
    ],
)
def test_files_are_named_as_somebody_types_them_or_drops_them_on_a_terminal(tmp_path, monkeypatch, typed, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "'odd'.png").touch()
    assert typed_path(typed) == Path(names.format(home=tmp_path))
