"""Debian packages as files: one version, one checksum, unpacked once."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.errors import UserError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A package as a text's definition names it. ``sha256`` is of the .deb; None takes what comes and notes it."""

    name: str
    version: str | None = None
    sha256: str | None = None

    @classmethod
    def parse(cls, line: str) -> Package:
        """From ``NAME``, or ``NAME VERSION SHA256``.

        Raises:
            UserError: for anything else.
        """
        words = line.split()
        if len(words) not in (1, 3):
            raise UserError(f"{line!r} is no package; write NAME, or NAME VERSION SHA256")
        return cls(*words)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.version, self.sha256)))


def fetch(package: Package, folder: Path) -> tuple[Path, Package]:
    """The .deb in ``folder``, downloaded by apt where it is not there yet; and the package with what was found.

    Raises:
        UserError: when apt does not have that version any more, or the file is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    version = (package.version or "*").replace(":", "%3a")
    found = sorted(folder.glob(f"{package.name}_{version}_*.deb"))
    if not found:
        wanted = package.name if package.version is None else f"{package.name}={package.version}"
        done = subprocess.run(["apt-get", "download", wanted], cwd=folder, capture_output=True, text=True)
        found = sorted(folder.glob(f"{package.name}_{version}_*.deb"))
        if done.returncode or not found:
            raise UserError(
                f"apt-get download {wanted} fails: {done.stderr.strip()[-300:]}; run apt-get update, or take the "
                "version that Debian has now (--update) and the text with it"
            )
    path = found[-1]
    digest = sha256_of(path)
    if package.sha256 not in (None, digest):
        raise UserError(f"{path} has SHA-256 {digest}, the text is made of {package.sha256}; remove it and fetch again")
    return path, Package(package.name, path.name.split("_")[1].replace("%3a", ":"), digest)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_members(deb: Path, inner: str | None = None) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the plain files of a .deb in the archive's order; of the tar archive ``inner`` inside it.

    Content is read one file at a time; nothing is written to disk.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                path = member.name.removeprefix("./")
                if inner is None:
                    yield path, stream.read()
                elif path == inner:
                    with tarfile.open(fileobj=stream, mode="r|*") as tree:
                        for leaf in tree:
                            content = tree.extractfile(leaf) if leaf.isfile() else None
                            if content is not None:
                                yield leaf.name, content.read()
