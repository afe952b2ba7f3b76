"""What ffmpeg, or who made the video, may do wrong: in both runtimes, with programs in ffmpeg's place.

Frames of real files, playlists and pipes: tests/conformance/videos.json.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autosteer.runtime import InputError, ffmpeg, open_video

Open = Callable[[Path], Any]
THREE = "printf 'frame:%s pts:0 pts_time:0\\n' 0 1 2"  # what ffmpeg prints of three frames
PNG_HEAD = r"printf '\211PNG\r\n\032\n\177\377\377\377IDAT'"  # of a picture that does not end


@pytest.fixture(params=["python", pytest.param("cpp", marks=pytest.mark.cpp)])
def opened(request: pytest.FixtureRequest) -> Open:
    """Opens a video of at most three frames; an InputError is what either runtime raises."""
    if request.param == "python":
        return lambda path: open_video(path, 3)
    parts = request.getfixturevalue("parts")

    def in_cpp(path: Path) -> Any:
        answer = parts.run({"part": "frames", "path": str(path), "frames": 3})
        if "error" in (answer := answer[0]) and answer["exit_code"] == 5:
            raise InputError(answer["error"])
        return answer

    return in_cpp


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in ffmpeg's place; returns a file to open. $COUNT is set if frames are to be counted."""

    def pretend(script: str | None) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        if script is not None:
            text = f'#!/bin/sh\nPATH=/usr/bin:/bin\ncase "$*" in *null*) COUNT=1;; esac\n{script}\n'
            (folder / "ffmpeg").write_text(text)
            (folder / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        video = tmp_path / "clip.mp4"
        video.write_bytes(b"a clip")
        return video

    return pretend


def test_without_ffmpeg_a_line_says_what_to_install(opened: Open, pretend: Any) -> None:
    with pytest.raises(InputError, match=r"clip\.mp4: .*not installed: apt-get install ffmpeg"):
        opened(pretend(None))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exec yes 'frame:0    pts:0       pts_time:0'", "more than 100000 frames"),
        ("exit 0", "it has no frames"),
        ("echo '[mov @ 0x55] moov atom not found' >&2; exit 1", r"\(ffmpeg: moov atom not found\)"),
        ("printf xxx; exit 3", "it failed without a word"),
        ("printf xxx; kill -9 $$", "it failed without a word"),
        ("yes worse | head -c 10000000 >&2; exit 1", r"\(ffmpeg: worse\)"),
        (f'[ -z "$COUNT" ] || {THREE}', "it changed while it was read"),
        ('if [ "$COUNT" ]; then yes | tr -d "\\n" | head -c 10000000; exit 0; fi', "it has no frames"),
        (
            f'if [ "$COUNT" ]; then {THREE}; else {PNG_HEAD}; exec cat /dev/zero; fi',
            "a frame of more than",
        ),
        (f'if [ "$COUNT" ]; then {THREE}; else {PNG_HEAD}; fi', "it changed while it was read"),
    ],
)
def test_whatever_ffmpeg_does_a_line_says_so(opened: Open, pretend: Any, script: str, says: str) -> None:
    video = pretend(script)
    with pytest.raises(InputError, match=says) as refused:
        opened(video)
    assert "\n" not in str(refused.value) and str(video) in str(refused.value)


def test_python_waits_no_longer_than_it_may(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for one that writes all the time, and it does not outlive the refusal."""
    monkeypatch.setattr(ffmpeg, "SECONDS", 1.0)
    video = pretend("echo $$ > ${0%/bin/ffmpeg}/pid; while :; do printf x; sleep 0.01; done")
    before = time.monotonic()
    with pytest.raises(InputError, match="more than 1 s"):
        open_video(video)
    assert time.monotonic() - before < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((video.parent / "pid").read_text()), 0)


def test_cpp_waits_no_longer_than_it_may(parts: Any, pretend: Any) -> None:
    video = pretend("echo $$ > ${0%/bin/ffmpeg}/pid; while :; do printf x; sleep 0.01; done")
    (answer,) = parts.run({"part": "count", "path": str(video), "seconds": 1})
    assert "ffmpeg takes more than 1 s" in answer["error"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((video.parent / "pid").read_text()), 0)


def test_ffmpeg_ends_on_ctrl_c_and_when_its_reader_has_gone(built: Path, cpp_package: Path, pretend: Any) -> None:
    """It had autosteer-cli's blocked SIGINT and ignored SIGPIPE, and worked on when the command had ended."""
    video = pretend("grep -E '^Sig(Blk|Ign)' /proc/self/status > ${0%/bin/ffmpeg}/signals; exit 1")
    command = [built / "autosteer-cli", cpp_package, "--video", video, "--prompt", "look"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 5
    blocked, ignored = (int(line.split()[1], 16) for line in (video.parent / "signals").read_text().splitlines())
    assert (blocked, ignored & (1 << (signal.SIGINT - 1) | 1 << (signal.SIGPIPE - 1))) == (0, 0)


def test_ffmpeg_never_sees_a_name(opened: Open, pretend: Any, tmp_path: Path) -> None:
    """Nor could it take one for an option, a pattern or an address."""
    video = pretend('echo "$@" >> ${0%/bin/ffmpeg}/words; cat > ${0%/bin/ffmpeg}/read')
    for name in ("-y", "concat:x", "%d.png", "http:", "a clip"):
        path = video.rename(tmp_path / name)
        with pytest.raises(InputError, match="no frames"):
            opened(path)
        assert (tmp_path / "read").read_bytes() == b"a clip"
        assert name not in (tmp_path / "words").read_text().replace("-nostdin", "")
        video = path


def test_a_file_of_a_terabyte_of_nothing_is_no_video(opened: Open, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    video.touch()
    os.truncate(video, 1 << 40)
    if subprocess.run(["which", "ffmpeg"], capture_output=True, check=False).returncode:
        pytest.skip("no ffmpeg: apt-get install ffmpeg")
    with pytest.raises(InputError, match="not a readable video"):
        opened(video)


def test_a_device_is_no_video(opened: Open) -> None:
    with pytest.raises(InputError, match="not a file"):
        opened(Path("/dev/zero"))
