"""The workspace: a folder with kbsync.yaml, sources/, policies/ and data/. Its settings and its paths.

kbsync.yaml says which model, where the ledger is and what the machine may be used for; an environment variable
`KBSYNC_<KEY>` wins over the file. Secrets stand in it as `${NAME}` or `file:PATH` only, and are looked up when used.

    workspace = Workspace.load(Path("."))
    Ledger.open(workspace.ledger_url)
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass
from datetime import datetime, time
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from kbsync.documents import Document, describe, nearest, read_document
from kbsync.editor.job import ExecutorSettings
from kbsync.editor.preset import Preset, load_preset
from kbsync.errors import ConfigError, UsageError
from kbsync.hub import names_no_revision
from kbsync.notify.settings import Notify
from kbsync.policy import Seconds
from kbsync.recheck import Recheck
from kbsync.references import FILE, filled, holds_password, noted, open_to_others, read_secret
from kbsync.retention import Retention
from kbsync.strategy import Strategy
from kbsync.web.settings import Server

__all__ = ["CONFIG", "EditWindow", "Settings", "StatisticsSettings", "Workspace", "examples", "time_zone"]

CONFIG = "kbsync.yaml"
ENVIRONMENT = "KBSYNC_"
OFFLINE_EXAMPLES = (
    "policies/astronomy.yaml",
    "policies/us-elections.yaml",
    "sources/election-results.csv",
    "sources/election-results.yaml",
    "sources/star-catalog.csv",
    "sources/star-catalog.yaml",
)
"""What `init` writes: the shipped policies whose sources are all files of their own."""
FIRST_CONFIG = """\
# What this workspace keeps fresh. `kbsync check` reads it, `kbsync plan` says what it would do.
model: smollm2-135m    # an embedded model, a local folder or a Hugging Face id
device: auto           # auto | cpu | cuda | cuda:1 | balanced
"""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", re.IGNORECASE)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_WINDOW = re.compile(r"(\d{1,2}:\d\d)\s*-\s*(\d{1,2}:\d\d)(?:\s+(\S+))?")


def _bytes(value: object) -> object:
    """`20GiB` -> 21474836480 (K, M, G, T count in 1024s); a number is taken as bytes."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _UNITS[match[2].upper()])
    return value


def time_zone(name: str) -> ZoneInfo:
    """The IANA time zone `name`. Raises ValueError where there is none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"no time zone {name}") from error


def _like(pattern: str, wanted: str) -> AfterValidator:
    """A text must match `pattern` wholly, or the error says what was `wanted`."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {wanted}")
        return value

    return AfterValidator(check)


@dataclass(frozen=True, slots=True)
class EditWindow:
    """The hours of the day in which the model may be edited: `22:00-06:00 Europe/Berlin` (default zone: UTC)."""

    start: time
    end: time
    zone: ZoneInfo

    @classmethod
    def parse(cls, text: str) -> EditWindow:
        """Raises ValueError where `text` is no window."""
        match = _WINDOW.fullmatch(text.strip())
        if match is None:
            raise ValueError("must look like 22:00-06:00 or 22:00-06:00 Europe/Berlin")
        zone = time_zone(match[3] or "UTC")
        start, end = (time.fromisoformat(part.zfill(5)) for part in (match[1], match[2]))
        if start == end:
            raise ValueError("start and end are the same minute")
        return cls(start, end, zone)

    def contains(self, moment: datetime) -> bool:
        """Whether `moment` (timezone-aware) falls into the window; the end is outside."""
        now = moment.astimezone(self.zone).time()
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end


class StatisticsSettings(BaseModel):
    """What replaces the preset's choice of text for the covariance statistics; null: as the preset says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: Annotated[str, _like(r"self|(file|hf):.+", "self, file:PATH or hf:DATASET")] | None = None
    """`self` (sampled from the model), `file:PATH` or `hf:DATASET`."""
    sample_tokens: Annotated[int, Field(ge=1000)] | None = None


class Settings(BaseSettings):
    """kbsync.yaml. Paths are relative to the workspace."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, extra="forbid", frozen=True, hide_input_in_errors=True)

    model: Annotated[str, Field(min_length=1)]
    """An embedded model's name (smollm2-135m), a local folder or a Hugging Face id."""
    device: Annotated[str, _like(r"auto|balanced|cpu|cuda(:\d+)?", "auto, balanced, cpu, cuda or cuda:N")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: as the checkpoint is stored."""
    preset: str | None = None
    """Name or file of the editing preset; default: the model's own."""
    data: Path = Path("data")
    ledger: SecretStr | None = None
    """Database URL, with `${NAME}` for secrets, or `file:PATH` of a file that holds it; default: SQLite in `data`."""
    allowed_dirs: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders, beside the workspace itself, that sources may read local files from."""
    on_publish: str | None = None
    """Command run when `live` names another version, which and where in its environment; its failure is only logged."""
    hook_secrets: Annotated[tuple[str, ...], NoDecode] = ()
    """Variables with secrets that commands which kbsync runs may see; the others are left out of their environment."""
    grace: Annotated[Seconds, Field(gt=0)] = 30.0
    """Seconds that the daemon has for ending the current edit when it is stopped."""
    stall: Annotated[Seconds, Field(gt=0)] = 1800.0
    """Seconds without progress after which the daemon cancels what it does: longer than any source's `deadline`."""
    max_gpu_memory: Annotated[int, BeforeValidator(_bytes), Field(gt=0)] | None = None
    """Bytes of GPU memory that an edit may take (`20GiB`)."""
    edit_window: str | None = None
    """When the model may be edited: `22:00-06:00 Europe/Berlin`; default: always."""
    statistics: StatisticsSettings = StatisticsSettings()
    executor: ExecutorSettings = ExecutorSettings()
    """Who computes target vectors."""
    strategy: Strategy = Strategy()
    """How versions are made: on HEAD, or anew from the base."""
    retention: Retention = Retention()
    """For how long versions stay restorable."""
    recheck: Recheck = Recheck()
    """When old facts are asked again."""
    notify: Notify = Notify()
    """Who is told of what."""
    server: Server | None = None
    """Health and metrics over HTTP; null: nothing listens."""

    @field_validator("allowed_dirs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """KBSYNC_ALLOWED_DIRS is one text, parted as PATH is."""
        return tuple(value.split(os.pathsep)) if isinstance(value, str) else value

    @field_validator("hook_secrets", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        """KBSYNC_HOOK_SECRETS is one text of names with blanks or commas between."""
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("edit_window")
    @classmethod
    def _window(cls, value: str | None) -> str | None:
        if value is not None:
            EditWindow.parse(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file; nothing else is read."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder that kbsync works in. All paths are absolute; none needs to exist but the root and kbsync.yaml."""

    root: Path
    settings: Settings

    @classmethod
    def load(cls, root: Path) -> Workspace:
        """Read `root`/kbsync.yaml. Raises ConfigError naming file, line and key."""
        root = root.absolute()
        file = root / CONFIG
        if not file.is_file():
            raise ConfigError(
                "is not there: this folder is no workspace", file=file, hint=f"kbsync init --workspace {root}"
            )
        document = read_document(file)
        if unknown := [key for key in document.value if key not in Settings.model_fields]:
            raise document.error((unknown[0],), "is not a known key", hint=nearest(unknown[0], Settings.model_fields))
        try:
            return cls(root, Settings(**document.value))
        except ValidationError as error:
            raise _explain(document, error) from error

    @staticmethod
    def init(root: Path) -> list[Path]:
        """Make a workspace of an empty folder (made where it is absent) with the examples that work offline.

        Returns the files written, relative to `root`. Files whose names begin with a dot (.git) may be there.
        Raises UsageError where the folder is not empty; then, and where writing fails, nothing is left behind.
        """
        root = root.absolute()
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is not a folder", hint="kbsync init --workspace DIR")
        if root.is_dir() and (taken := sorted(p.name for p in root.iterdir() if not p.name.startswith("."))):
            raise UsageError(f"{root} is not empty: it has {taken[0]}", hint="choose an empty folder: --workspace DIR")
        return _write_examples(root)

    @property
    def sources(self) -> Path:
        """Folder of the declared sources."""
        return self.root / "sources"

    @property
    def policies(self) -> Path:
        """Folder of the sync policies."""
        return self.root / "policies"

    @property
    def data(self) -> Path:
        """Folder of everything that kbsync writes."""
        return self.root / self.settings.data

    @property
    def deltas(self) -> Path:
        """Content-addressed delta files."""
        return self.data / "deltas" / "sha256"

    @property
    def versions(self) -> Path:
        """Manifests and HEAD, one folder per model."""
        return self.data / "versions"

    @property
    def targets(self) -> Path:
        """Cache of target vectors z."""
        return self.data / "targets"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes."""
        return self.data / "lock"

    @property
    def socket(self) -> Path:
        """Where the daemon takes write commands."""
        return self.data / "control.sock"

    @property
    def allowed_dirs(self) -> tuple[Path, ...]:
        """Folders that local sources may be read from: the workspace and what kbsync.yaml adds."""
        return (self.root, *(self.root / folder for folder in self.settings.allowed_dirs))

    @property
    def edit_window(self) -> EditWindow | None:
        """When the model may be edited; None: always."""
        return EditWindow.parse(self.settings.edit_window) if self.settings.edit_window else None

    @property
    def ledger_url(self) -> str:
        """The ledger's database URL with its secrets filled in: for opening it, never for printing."""
        if self.settings.ledger is None:
            return f"sqlite:///{self.data / 'ledger.db'}"
        return self.secret("ledger", self.settings.ledger)

    @property
    def server_token(self) -> str | None:
        """The server's bearer token, looked up; None where kbsync makes its own. Raises ConfigError."""
        server = self.settings.server
        return None if server is None or server.token is None else self.secret("server.token", server.token)

    def preset(self, model: str) -> Preset:
        """The editing preset of `model` (a name), or the one that kbsync.yaml names, with its choice of statistics.

        Raises ModelError where there is none, ConfigError where its file is wrong.
        """
        name = self.settings.preset or model
        found = load_preset(self.root / name if name.endswith(".yaml") else name)
        return found.model_copy(update=self.settings.statistics.model_dump(exclude_none=True))

    def warnings(self) -> list[str]:
        """What is allowed but unwise in kbsync.yaml, one line each."""
        found = [
            f"{path}: everybody may write there, and so decide what is run and published: chmod o-w {path}"
            for path in (self.root, self.root / CONFIG, self.sources, self.policies, self.data)
            if path.exists() and path.stat().st_mode & stat.S_IWOTH
        ]
        if names_no_revision(self.settings.model, root=self.root):
            found.append(
                f"{self.root / CONFIG}: model: names no revision, so that `model pull` may bring another: @COMMIT"
            )
        ledger = self.settings.ledger
        if ledger is not None and holds_password(ledger.get_secret_value()):
            found.append(f"{self.root / CONFIG}: ledger: holds a password; write ${{NAME}} or file:PATH instead")
            if exposed := open_to_others(self.root / CONFIG, ledger.get_secret_value()):
                found.append(f"{self.root / CONFIG}: ledger: {exposed}")
        executor = self.settings.executor
        if executor.backend == "ray" and executor.address == "local":
            found.append(
                f"{self.root / CONFIG}: executor: a local Ray cluster opens ports to all users of this machine,"
                " protected by a token; `backend: process` opens none"
            )
        return found

    def secret(self, key: str, value: SecretStr) -> str:
        """`value` with `${NAME}` taken from the environment, or the content of the file that `file:PATH` names.

        Raises ConfigError, naming `key`, where it is not there.
        """
        text, file = value.get_secret_value(), self.root / CONFIG
        noted(text)
        if text.startswith(FILE):
            try:
                return read_secret(self.root / text.removeprefix(FILE))
            except OSError as error:
                raise ConfigError(f"cannot read {text}: {error.strerror}", file=file, key=key) from error
            except ValueError as error:
                raise ConfigError(f"cannot read {text}: {error}", file=file, key=key) from None
        try:
            return filled(text)
        except ValueError as error:
            raise ConfigError(str(error), file=file, key=key) from error


def _explain(document: Document, error: ValidationError) -> ConfigError:
    """The finding, at its line of kbsync.yaml or at the environment variable that it came from."""
    finding = error.errors(include_url=False)[0]
    if (name := f"{ENVIRONMENT}{finding['loc'][0]}".upper()) in os.environ:
        return ConfigError(describe(finding), file="environment", key=name)
    return document.explain(error, Settings)


def examples() -> Path:
    """The folder with the shipped sources/ and policies/: inside the installed package, or the checkout itself."""
    package = Path(str(resources.files("kbsync")))
    return package / "examples" if (package / "examples").is_dir() else package.parent


def _write_examples(root: Path) -> list[Path]:
    """Write kbsync.yaml and the offline examples into `root`; where that fails, take back what was written."""
    made = not root.exists()
    written: list[Path] = []
    try:
        for name in (CONFIG, *OFFLINE_EXAMPLES):
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            written.append(Path(name))
            target.write_bytes(FIRST_CONFIG.encode() if name == CONFIG else (examples() / name).read_bytes())
    except OSError as error:
        for path in (root,) if made else {root / name.parts[0] for name in written}:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise UsageError(f"{root} cannot be written: {error.strerror or error}") from error
    return written
