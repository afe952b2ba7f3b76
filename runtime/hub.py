"""Packages on the Hugging Face hub: `hf:owner/name[@revision]` wherever a command takes a package's folder."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import AutoSteerError, InputError, first_line
from .manifest import MANIFEST_FILE, Manifest

PREFIX = "hf:"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # owner/name, revision


def package_folder(package: str) -> Path:
    """The folder of a package. One on the hub is downloaded: only what its manifest lists, and what an earlier download
    has left out. Without a network, an earlier download is used.

    Its hashes are compared when it is loaded, like any folder's. Downloads are kept in Hugging Face's cache
    ($HF_HOME/autosteer), one folder for each revision. Raises InputError if `package` is no such name, if the hub does
    not have it or cannot be asked, or if huggingface_hub is not installed.
    """
    if not package.startswith(PREFIX):
        return Path(package)
    found = _NAME.fullmatch(package.removeprefix(PREFIX))
    if found is None:
        raise InputError(f"{package}: write {PREFIX}owner/name, or {PREFIX}owner/name@revision")
    repo, revision = found[1], found[2] or "main"
    try:
        from huggingface_hub import constants, hf_hub_download, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise InputError(f"{package}: downloads need huggingface_hub: pip install 'autosteer-edge[hub]'") from None
    folder = Path(constants.HF_HOME) / "autosteer" / repo.replace("/", "--") / revision.replace("/", "--")
    try:
        hf_hub_download(repo, MANIFEST_FILE, revision=revision, local_dir=folder)
        files = list(Manifest.load(folder).paths())
        snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=files)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as err:
        raise InputError(f"{package}: not downloaded yet, and the hub cannot be reached ({first_line(err)})") from err
    except AutoSteerError:
        raise
    except Exception as err:  # of the hub, or of the HTTP library that this huggingface_hub uses
        raise InputError(f"{package}: not downloaded ({first_line(err)}); run the command again to go on") from err
    return folder
