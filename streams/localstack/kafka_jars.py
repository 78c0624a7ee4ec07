"""Java, Maven and the jars of Apache Kafka: found, downloaded once, shared between all stacks of a user.

The jars live in a cache outside any checkout (`PINTAIL_CACHE`, else `~/.cache/pintail`), so that a fresh clone starts
as fast as an old one. A folder there is complete or absent: it is filled under a temporary name and then renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streams.errors import LocalStackError, MissingProgramError

FILES = Path(__file__).resolve().parent / "kafka_files"
JAVA_VERSION_MIN = 17
#: Without the ways around Kafka: whether there are any, only the command that starts the stack knows.
_WHAT_TO_INSTALL = (
    "Debian, Ubuntu: sudo apt-get install openjdk-17-jre-headless maven; macOS: brew install openjdk@17 maven"
)


@dataclass(frozen=True)
class Java:
    """A Java virtual machine that can run the broker."""

    program: str
    #: Differs between builds of Java: names what is prepared for one of them.
    fingerprint: str


def find_java() -> Java:
    """The Java of JAVA_HOME or of PATH. Raises MissingProgramError when there is none that is new enough."""
    home = os.environ.get("JAVA_HOME")
    program = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    program = program or shutil.which("java")
    if program is None:
        raise MissingProgramError(
            f"Kafka needs Java {JAVA_VERSION_MIN} or newer, and there is no `java`", hint=_WHAT_TO_INSTALL
        )
    answer = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(\d+)', answer.stderr)
    if answer.returncode or not version or int(version[1]) < JAVA_VERSION_MIN:
        found = answer.stderr.strip().splitlines()
        raise MissingProgramError(
            f"Kafka needs Java {JAVA_VERSION_MIN} or newer; {program} says: {found[0] if found else 'nothing'}",
            hint=_WHAT_TO_INSTALL,
        )
    return Java(program, hashlib.sha256(answer.stderr.encode()).hexdigest()[:12])


def cache_dir() -> Path:
    """Where the jars are kept."""
    given = os.environ.get("PINTAIL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pintail"


def kafka_jars(progress: Callable[[str], None]) -> Path:
    """The folder with the jars, downloaded through Maven if it is not there yet.

    Raises MissingProgramError without Maven, LocalStackError when the download fails.
    """
    pom = (FILES / "pom.xml").read_bytes()
    version = re.search(rb"<kafka.version>([\d.]+)<", pom)
    assert version is not None
    folder = cache_dir() / f"kafka-{version[1].decode()}-{hashlib.sha256(pom).hexdigest()[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            if not folder.exists():
                _download(pom, folder, progress)
    return folder


def _download(pom: bytes, folder: Path, progress: Callable[[str], None]) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise MissingProgramError("Maven downloads Kafka once, and there is no `mvn`", hint=_WHAT_TO_INSTALL)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / "pom.xml").write_bytes(pom)
    command = [maven, "-B", "-Dstyle.color=never", "--strict-checksums", "-f", str(partial / "pom.xml")]
    command += ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={partial}"]
    said: list[str] = []
    files = 0
    progress("downloading Kafka (once, about 45 MB)")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            if "Downloaded from" in line:
                files += 1
                if files % 10 == 0:
                    progress(f"downloading Kafka (once, about 45 MB): {files} files")
    if process.returncode or not list(partial.glob("kafka_*.jar")):
        shutil.rmtree(partial, ignore_errors=True)
        faults = [line for line in said if "ERROR" in line] or said
        raise LocalStackError(
            "Maven could not download Kafka:\n" + "\n".join(f"  {line[:300]}" for line in faults[:8]),
            hint="check the network and Maven's settings.xml, then try again",
        )
    partial.rename(folder)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
