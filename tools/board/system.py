"""Unpack Debian's arm64 packages and wheels into a folder, on a machine of another kind, without installing them.

Nothing here touches the machine's own dpkg: apt-get reads the archive with a state of its own, and dpkg-deb unpacks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from environment import ROOT

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NEEDED = {  # a program or file, and Debian's package that has it
    "qemu-aarch64-static": "qemu-user-static",
    "clang++": "clang",
    "ld.lld": "lld",
    "readelf": "binutils",
    "cmake": "cmake",
    "make": "make",
    "pkg-config": "pkg-config",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    str(KEYRING): "debian-archive-keyring",
}
WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


class ToolError(Exception):
    """Something that whoever called the tool can mend; one line."""


def missing(found: Callable[[str], object] = shutil.which) -> list[str]:
    """Debian packages without which nothing here works."""
    return [
        package
        for name, package in NEEDED.items()
        if not (Path(name).exists() if name.startswith("/") else found(name))
    ]


def call(*command: str | Path, **options: str | Path | dict[str, str]) -> str:
    """Run a command and give its stdout; ToolError with the end of its stderr where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise ToolError(f"{' '.join(words[:6])} ... failed ({done.returncode}): {said}")
    return str(done.stdout)


def once(folder: Path, made_of: object, make: Callable[[Path], None]) -> bool:
    """Have `make` fill `folder`, unless that was done for the same `made_of`. Returns whether it was made now.

    It is made beside its place and renamed, so that what is there is whole.
    """
    stamp, wanted = folder / ".made-of", json.dumps(made_of)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return False
    part = folder.with_name(folder.name + ".part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    make(part)
    (part / ".made-of").write_text(wanted, encoding="utf-8")
    part.rename(folder)
    return True


def debian_mirror() -> str:
    """Where this machine gets Debian from."""
    listed = call("apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Identifier: Packages")
    for line in listed.splitlines():
        label, _, uri = line.partition(" ")
        if label == "Debian":
            return uri.rstrip("/")
    raise ToolError("this machine's apt knows no Debian archive: run `apt-get update`, or give one with --mirror URL")


def unpack(root: Path, mirror: str, suite: str, packages: Sequence[str], alone: Sequence[str] = ()) -> None:
    """Debian packages of `suite` for arm64, with what they depend on, unpacked into `root`; `alone` without.

    Links to absolute paths are made relative, so that a compiler finds what they mean inside of `root`.
    """
    state = root.with_name(root.name + ".apt")
    shutil.rmtree(state, ignore_errors=True)
    for folder in ("sources", "lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    source = f"Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n"
    (state / "sources" / "debian.sources").write_text(source, encoding="utf-8")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::sourceparts": state / "sources",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]
    call(*apt, "update")
    call(*apt, "install", "--yes", "--download-only", *packages)
    archives = state / "cache" / "archives"
    if alone:
        call(*apt, "download", *alone, cwd=archives)
    for name in ("bin", "lib", "sbin"):  # as on a system: packages write to either
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for archive in sorted(archives.glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as files:
            command = ["tar", "-x", "-C", str(root), "--keep-directory-symlink"]
            unpacked = subprocess.run(command, stdin=files.stdout, check=False)
        if files.returncode or unpacked.returncode:
            raise ToolError(f"{archive.name}: it cannot be unpacked; is the disk full?")
    for folder, names, files_here in os.walk(root):
        for name in (*names, *files_here):
            link = Path(folder, name)
            if link.is_symlink() and os.readlink(link).startswith("/"):
                inside = os.path.relpath(root / os.readlink(link).lstrip("/"), folder)
                link.unlink()
                link.symlink_to(inside)
    shutil.rmtree(state)


def wheels(folder: Path, python: str, onnxruntime: str, version: str) -> None:
    """onnxruntime and what the runtime depends on, for aarch64 and Python `version` ("3.13"), into `folder`.

    Of the dependencies, those versions that `python` has: what differs between two machines is then the arithmetic.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = (\[.*\])$", project, re.MULTILINE)
    assert listed, "pyproject.toml lists the runtime's dependencies on one line"
    names = [re.split("[<>=]", wish)[0] for wish in json.loads(listed[1])]
    code = "import importlib.metadata as m, sys; print(*(f'{n}=={m.version(n)}' for n in sys.argv[1:]))"
    pinned = call(python, "-c", code, *names).split()
    platforms = [word for wheel in WHEELS for word in ("--platform", wheel)]
    call(
        *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"),
        *("--target", str(folder), "--python-version", version, "--implementation", "cp", *platforms),
        *("--only-binary=:all:", f"onnxruntime=={onnxruntime}", *pinned),
    )
