"""A PostgreSQL server for the tests: the one that POSTGRES_TEST_URL names, else a private one in a temporary folder.

    python -m tests.postgres      # says which one it will be; installs Debian's package where it can and none is there

POSTGRES_TEST_URL is a SQLAlchemy URL of a user who may create databases, for instance
`postgresql+psycopg://tester@localhost/postgres`. The private server listens on a socket in its own folder alone, does
not sync to disk, and ends with the process that started it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url

from kbsync.ledger import Ledger

VARIABLE = "POSTGRES_TEST_URL"
PROGRAMS = ("initdb", "postgres", "pg_isready")
PATIENCE = 60.0
"""Seconds for the private server to answer."""
INSTALL_PATIENCE = 240
"""Seconds for each of apt-get's two steps."""
SETTINGS = {
    "listen_addresses": "''",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_connections": "60",
    "timezone": "Asia/Kolkata",  # never UTC: times must not depend on it
}
CAREFUL = SETTINGS | {"synchronous_commit": "on"}
"""Keeps what was committed through an immediate shutdown."""


class Unavailable(Exception):
    """There is no PostgreSQL to test with: why, and what would change that."""


@dataclass(frozen=True)
class Server:
    """A running server, and a database of it that statements about databases are given in."""

    admin: URL
    private: bool

    def url(self, name: str) -> str:
        """The address of a database."""
        return self.admin.set(database=name).render_as_string(hide_password=False)

    @property
    def version(self) -> str:
        """The server's own, for instance `15.18`."""
        with self._engine.connect() as connection:
            return str(connection.exec_driver_sql("SHOW server_version").scalar_one()).split()[0]

    def create(self, name: str, *, template: str = "template0") -> None:
        """A new database, as a copy of another one."""
        self._run(f'CREATE DATABASE "{name}" TEMPLATE "{template}" ENCODING \'UTF8\'')

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self._run(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    @cached_property
    def empty_ledger(self) -> str:
        """A database that holds a ledger without entries, to copy: quicker than migrating each time."""
        name = f"kbsync_template_{os.getpid()}"
        self.drop(name)
        self.create(name)
        Ledger.open(self.url(name)).close()
        return name

    def close(self) -> None:
        """Remove what was made for all tests."""
        if "empty_ledger" in self.__dict__:
            self.drop(self.empty_ledger)
        self._engine.dispose()

    @cached_property
    def _engine(self) -> Engine:
        return create_engine(self.admin, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def _run(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement)


@contextmanager
def server() -> Iterator[Server]:
    """The server to test with, for the time of the block. Raises Unavailable where there is none."""
    _need_driver()
    address = os.environ.get(VARIABLE)
    if address:
        yield from _closing(Server(make_url(address), private=False))
        return
    with restartable(SETTINGS) as (found, _):
        yield found


@contextmanager
def restartable(settings: Mapping[str, str] = CAREFUL) -> Iterator[tuple[Server, Callable[[int], None]]]:
    """A private server that may be shut down by a signal and started again at any time. Raises Unavailable."""
    _need_driver()
    programs = _programs()
    if programs is None:
        raise Unavailable(f"no PostgreSQL server here; ends with: apt-get install postgresql, or {VARIABLE}=URL")
    folder = Path(mkdtemp(prefix="kbsync-pg-"))
    cluster = _Cluster(programs, folder, settings)

    def restart(number: int) -> None:
        cluster.stop(number)
        cluster.start()

    try:
        cluster.make()
        cluster.start()
        found = Server(make_url(f"postgresql+psycopg://tester@/postgres?host={folder}"), private=True)
        for one in _closing(found):
            yield one, restart
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _need_driver() -> None:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise Unavailable("psycopg is not installed; ends with: pip install 'kbsync[postgres]'") from None


def _closing(one: Server) -> Iterator[Server]:
    try:
        yield one
    finally:
        one.close()


def _programs() -> Path | None:
    """The folder with PostgreSQL's own programs: the newest of Debian's, or on PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name))
    folders += [Path(folder) for folder in os.get_exec_path()]
    return next((folder for folder in folders if all((folder / name).exists() for name in PROGRAMS)), None)


@dataclass
class _Cluster:
    """A server on a fresh cluster in `folder`, which is also where its socket lies."""

    programs: Path
    folder: Path
    settings: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        """The cluster itself. Raises Unavailable."""
        command = [self.programs / "initdb", "-D", self.folder / "data", "-U", "tester", "-A", "trust", "-E", "UTF8"]
        command += ["--locale=C.UTF-8", "-N"]
        made = subprocess.run(
            [*_owner(self.folder), *command], capture_output=True, text=True, check=False, cwd=self.folder
        )
        if made.returncode:
            raise Unavailable(f"initdb failed: {made.stderr.strip()}; ends when that works")

    def start(self) -> None:
        """Until it answers. Raises Unavailable."""
        options = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value.strip(chr(39))}")]
        log = self.folder / "log"
        with log.open("a") as output:
            run = [*_owner(self.folder), self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder]
            self.process = subprocess.Popen([*run, *options], stdout=output, stderr=output, cwd=self.folder)
        deadline = time.monotonic() + PATIENCE
        while subprocess.run([self.programs / "pg_isready", "-q", "-h", self.folder], check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"the server does not start: {log.read_text().strip()}; ends when it does")
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: PostgreSQL's fast shutdown; SIGQUIT: its immediate one, after which it recovers as from a crash."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()


def _owner(folder: Path) -> list[str]:
    """What to run PostgreSQL's programs with: it refuses to run as root, and should not outlive the tests."""
    setpriv = shutil.which("setpriv")
    if os.geteuid():
        return [setpriv, "--pdeathsig", "INT"] if setpriv else []
    if setpriv is None:
        raise Unavailable("PostgreSQL does not run as root and setpriv is not here; ends as another user")
    shutil.chown(folder, "postgres", "postgres")
    return [setpriv, "--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--pdeathsig", "INT"]


def _install() -> None:
    """Debian's package, where we are root and apt-get can reach it."""
    apt = shutil.which("apt-get")
    if os.geteuid() or apt is None:
        return
    print("tests: installing Debian's postgresql", flush=True)  # noqa: T201  # a program's output
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
        try:
            subprocess.run(
                [apt, "-q", *step], env=environment, capture_output=True, timeout=INSTALL_PATIENCE, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return


def main() -> None:
    """Say what the tests will use. Never fails: the tests that need a server skip."""
    if not os.environ.get(VARIABLE) and _programs() is None:
        _install()
    try:
        with server() as found:
            kind = "of its own" if found.private else "as POSTGRES_TEST_URL says"
            print(f"tests: PostgreSQL {found.version}, a server {kind}")  # noqa: T201
    except Unavailable as error:
        print(f"tests: the PostgreSQL half is skipped: {error}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
