"""A video file -> its frames, decoded by the program ffmpeg in a process of its own.

    file  ->  when each frame is shown: a line of text for each
          ->  the chosen ones, as PNG files one after the other

Whoever made the file is not trusted. ffmpeg gets it as its standard input, so it never sees a name; it may read the
containers in CONTAINERS, none of which is a playlist; and it is killed at the first frame too many and after SECONDS.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import stat
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from .errors import InputError
from .picture_file import MAX_FILE_BYTES, MAX_PIXELS

SECONDS = 60.0  # to decode a file in, which is done twice
MAX_FRAMES = 100_000  # of a file: an hour
LINE = 1000  # bytes of a line that are read
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,gif,apng"  # ffmpeg's names; "mov" is MP4, too
INPUT = (
    *("-v", "error", "-nostdin", "-xerror"),  # -xerror: a damaged file is refused, like a damaged picture
    *("-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-max_pixels", str(MAX_PIXELS)),
    *("-i", "/dev/fd/0"),  # unlike pipe:0 it can be sought in
)
ONE_EACH = "setpts=N/TB"  # with -r 1: every frame that is left, none twice, whatever the file says of their times
# A line "frame:0    pts:0       pts_time:0" for each frame, and one of ours: of the file's own words none is printed.
TIMES = "settb=1/1000000,metadata=add:key=autosteer:value=0,metadata=print:key=autosteer:file=-"
COUNT = ("-an", "-sn", "-vf", f"{TIMES},scale=1:1:flags=neighbor,format=gray,{ONE_EACH}", "-r", "1", "-f", "null", "-")
PNG = ("-r", "1", "-c:v", "png", "-f", "image2pipe", "pipe:1")
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def open_regular(path: Path) -> BinaryIO:
    """Open a file. Raises InputError for a pipe or a device, which is not waited for, and OSError."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError("not a file")
    return file


class VideoFile:
    """An open video file. Its methods raise InputError if ffmpeg fails, or takes too long."""

    def __init__(self, file: BinaryIO):
        """Raises InputError if there is no ffmpeg."""
        if shutil.which("ffmpeg") is None:
            raise InputError("ffmpeg, which reads such files, is not installed: apt-get install ffmpeg")
        self._file, self._deadline = file, time.monotonic() + SECONDS

    def seconds(self) -> list[float]:
        """When each frame is shown: from 0 on, ascending. A frame without a time has that of the frame before.

        Raises InputError if there are no frames, or too many.
        """
        found, first, rest = list[float](), None, b""
        with contextlib.closing(self._run(*COUNT)) as blocks:
            for block in blocks:
                *lines, rest = (rest[:LINE] + block).split(b"\n")
                for line in lines:
                    if not (said := re.match(rb"frame:\d+ +pts:(-?\d+)?", line)):
                        continue
                    time = int(said[1]) if said[1] else None
                    first = time if first is None else first
                    since = 0.0 if time is None or first is None else (time - first) / 1e6
                    found.append(max(since, found[-1] if found else 0.0))
                    if len(found) > MAX_FRAMES:
                        raise InputError(f"more than {MAX_FRAMES} frames")
        if not found:
            raise InputError("it has no frames")
        return found

    def pictures(self, chosen: Sequence[int]) -> Iterator[bytes]:
        """The frames of those indices, which ascend, as PNG files."""
        select = "+".join(f"eq(n,{i})" for i in chosen)
        buffer, found = bytearray(), 0
        with contextlib.closing(self._run("-vf", f"select='{select}',{ONE_EACH}", *PNG)) as blocks:
            for block in blocks:
                buffer += block
                while end := png_end(buffer):
                    yield bytes(buffer[:end])
                    del buffer[:end]
                    found += 1
                if len(buffer) > MAX_FILE_BYTES:
                    raise InputError(f"a frame of more than {MAX_FILE_BYTES} bytes")
        if buffer or found != len(chosen):
            raise InputError("it changed while it was read")

    def _run(self, *output: str) -> Generator[bytes, None, None]:
        """What ffmpeg writes, in blocks. Kills it when left early."""
        self._file.seek(0)
        child = subprocess.Popen(
            ["ffmpeg", *INPUT, *output], stdin=self._file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert child.stdout is not None and child.stderr is not None
        said = b""
        try:
            with selectors.DefaultSelector() as pipes:
                pipes.register(child.stdout, selectors.EVENT_READ)
                pipes.register(child.stderr, selectors.EVENT_READ)
                while pipes.get_map():
                    left = self._deadline - time.monotonic()
                    ready = pipes.select(left) if left > 0 else []
                    if not ready:
                        raise InputError(f"ffmpeg takes more than {SECONDS:g} s to decode it")
                    for key, _ in ready:
                        if not (block := os.read(key.fd, 1 << 16)):
                            pipes.unregister(key.fileobj)
                        elif key.fileobj is child.stdout:
                            yield block
                        else:
                            said = (said + block)[:1000]
            if child.wait():
                raise InputError(f"ffmpeg: {_first_line(said)}")
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
            child.stderr.close()


def png_end(buffer: bytes | bytearray) -> int:
    """Where the PNG file that `buffer` begins with ends; 0 if it is not there yet."""
    at = len(SIGNATURE)
    while at + 12 <= len(buffer):  # a chunk: length, type, data, CRC
        kind = buffer[at + 4 : at + 8]
        at += 12 + int.from_bytes(buffer[at : at + 4], "big")
        if kind == b"IEND" and at <= len(buffer):
            return at
    return 0


def _first_line(said: bytes) -> str:
    """ffmpeg's first line, without the address that it begins with."""
    line = said.decode("utf-8", "replace").strip().partition("\n")[0]
    return (line.partition("] ")[2] if line.startswith("[") else line) or "it failed without a word"
