"""The C++ runtime for boards: any aarch64 Linux since glibc 2.31 (JetPack 5, Debian 11, Ubuntu 20.04).

    bin/autosteer-cli  lib/libautosteer.so  lib/libautosteer.a  include/autosteer/
    lib/autosteer/libonnxruntime.so.1       of the wheel: any version since 1.21 may lie there instead
    lib/autosteer/libonig.so.5              of Debian 11, which has it as a shared library only
    share/doc/autosteer/                    licences, of what is linked statically, too

clang compiles against Debian 11's arm64 packages. libstdc++, libcrypto, libpng, libjpeg and utf8proc are linked
statically: boards have other versions of them. What the result asks of a board is read back from its files (`check`).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from environment import ROOT

from .system import ToolError, call

SUITE = "bullseye"
TRIPLE = "aarch64-linux-gnu"
STATIC = {  # Debian's package, and the library that it has as an archive
    "libssl-dev": "crypto",
    "libpng-dev": "png16",
    "zlib1g-dev": "z",
    "libjpeg62-turbo-dev": "jpeg",
    "libutf8proc-dev": "utf8proc",
}
PACKAGES = ("libc6-dev", "libstdc++-10-dev", "nlohmann-json3-dev", "libonig-dev", *STATIC)
LICENCES = (*STATIC, "libstdc++-10-dev", "libonig5")
NEWEST = {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28)}  # what JetPack 5 and Debian 11 have; newer systems have it, too
SYSTEM = {  # libraries of every board
    *("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-aarch64.so.1"),
    *("libstdc++.so.6", "libgcc_s.so.1"),
}
TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER clang++)
set(CMAKE_CXX_COMPILER_TARGET {triple})
# By itself clang finds /lib/gcc, a link, and calls headers by names with `..` that make does not find.
set(CMAKE_CXX_COMPILER_EXTERNAL_TOOLCHAIN {root}/usr)
set(CMAKE_SYSROOT {root})
set(CMAKE_FIND_ROOT_PATH {root})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
set(CMAKE_EXE_LINKER_FLAGS_INIT "{flags}")
# Debian's archives are made for programs: in a library, their symbols must be known to be its own.
set(CMAKE_SHARED_LINKER_FLAGS_INIT "{flags} -Wl,--exclude-libs,ALL")
set(OPENSSL_USE_STATIC_LIBS ON)
"""
FLAGS = "-fuse-ld=lld -static-libstdc++ -static-libgcc"


def only_archives(root: Path) -> None:
    """Remove the shared libraries' links that linkers look for, where there is an archive."""
    for name in STATIC.values():
        archive = root / "usr" / "lib" / TRIPLE / f"lib{name}.a"
        if not archive.is_file():
            raise ToolError(f"{archive}: Debian's package does not have it any more")
        archive.with_suffix(".so").unlink()
    (root / "usr" / "lib" / TRIPLE / "libpng.so").unlink()  # another name of png16's


def cross_compile(build: Path, root: Path, headers: Path) -> None:
    """CMake's build in `build`, in which the next call builds again what has changed. `headers`: onnxruntime's."""
    build.mkdir(exist_ok=True)
    toolchain = build / "toolchain.cmake"
    toolchain.write_text(TOOLCHAIN.format(triple=TRIPLE, root=root, flags=FLAGS), encoding="utf-8")
    pkg_config = {
        "PKG_CONFIG_SYSROOT_DIR": str(root),
        "PKG_CONFIG_LIBDIR": str(root / "usr" / "lib" / TRIPLE / "pkgconfig"),
    }
    call(
        *("env", *(f"{key}={value}" for key, value in pkg_config.items())),
        *("cmake", "-S", ROOT / "runtime" / "cpp", "-B", build, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"),
        *(f"-DONNXRUNTIME_INCLUDE_DIR={headers}", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON"),
    )
    call("cmake", "--build", build, "-j1")


def assemble(folder: Path, build: Path, root: Path, wheel: Path) -> None:
    """The release in `folder`, with the libonnxruntime of `wheel` (an unpacked wheel's folder onnxruntime/)."""
    shutil.rmtree(folder, ignore_errors=True)
    (library,) = (wheel / "capi").glob("libonnxruntime.so.*")
    bundle = root / "usr" / "lib" / TRIPLE / "libonig.so.5"
    licences = build / "licences"
    shutil.rmtree(licences, ignore_errors=True)
    licences.mkdir()
    for package in LICENCES:
        shutil.copy(root / "usr" / "share" / "doc" / package / "copyright", licences / f"{package}.copyright")
    with_it = (f"-DONNXRUNTIME_LIBRARY={library}", f"-DAUTOSTEER_BUNDLE={bundle}", f"-DAUTOSTEER_LICENCES={licences}")
    call("cmake", *with_it, build)
    call("cmake", "--install", build, "--prefix", folder, "--strip")
    call("cpack", "--config", build / "CPackConfig.cmake", "-B", folder / "packages")
    shutil.rmtree(folder / "packages" / "_CPack_Packages")


def needs(file: Path) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """What an ELF file asks of the system: libraries by name, and the newest version of each kind of symbol."""
    return parse_needs(call("readelf", "--wide", "--dynamic", "--version-info", file))


def parse_needs(said: str) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """The same, of readelf's words."""
    newest: dict[str, tuple[int, ...]] = {}
    for kind, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)", said):
        newest[kind] = max(newest.get(kind, ()), tuple(map(int, version.split("."))))
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", said)), newest


def elf_files(folder: Path) -> list[Path]:
    """Programs and shared libraries in it."""
    return [file for file in folder.iterdir() if file.is_file() and file.suffix != ".a"] if folder.is_dir() else []


def check(folder: Path) -> list[str]:
    """One line for each file of a release on what it needs; ToolError where that is more than an old board has."""
    lines = []
    beside = {file.name for file in elf_files(folder / "lib" / "autosteer")}
    for file in sorted(
        {file.resolve() for part in ("bin", "lib", "lib/autosteer") for file in elf_files(folder / part)}
    ):
        libraries, newest = needs(file)
        versions = ", ".join(f"{kind} {'.'.join(map(str, version))}" for kind, version in sorted(newest.items()))
        lines.append(f"{file.relative_to(folder)}: {file.stat().st_size / 1e6:.1f} MB, needs {versions}")
        if unknown := libraries - SYSTEM - beside:
            raise ToolError(f"{file}: it needs {', '.join(sorted(unknown))}, which is neither beside it nor on boards")
        for kind, limit in NEWEST.items():
            if newest.get(kind, ()) > limit:
                raise ToolError(f"{lines[-1]}, and boards have {kind} {'.'.join(map(str, limit))}")
    return lines
