"""The workspace's sources and policies, read and checked as a whole: what kbsync is told to keep fresh.

Every relation belongs to exactly one policy, a policy's sources exist and give one of its relations, and the sources
of one relation name their subjects in one id space, or their facts could never meet (ARCHITECTURE: Identity).

    catalog = load_catalog(Workspace.load(Path(".")))
    policy = catalog.policy_of("constellation")
    snapshot = catalog.connector("star-catalog").fetch(previous)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from kbsync.config import Workspace
from kbsync.documents import Document, KeyPath, nearest, read_document
from kbsync.errors import UsageError
from kbsync.policy import Gate, Policy, Relation, Schedule, Seconds, Source
from kbsync.references import open_to_others
from kbsync.schedule import trigger

if TYPE_CHECKING:
    from kbsync.connectors import Connector

__all__ = ["Catalog", "load_catalog"]

ROWS_WITH_COLUMNS = ("csv", "jsonl", "sql")
"""Types whose objects are in the source's own id space, unless it says `object_ids`."""

_EXAMPLE_CONTACT = re.compile(r"\bexample\.(?:com|net|org)\b")

DeclaredT = TypeVar("DeclaredT", Source, Policy)


@dataclass(frozen=True, slots=True)
class Catalog:
    """Sources and policies by name, with the files that declare them."""

    workspace: Workspace
    sources: Mapping[str, Source]
    policies: Mapping[str, Policy]
    source_files: Mapping[str, Document]
    policy_files: Mapping[str, Document]

    def policy(self, name: str) -> Policy:
        """The policy of this name. Raises UsageError where there is none."""
        if name not in self.policies:
            raise UsageError(f"no policy {name}", hint=nearest(name, self.policies))
        return self.policies[name]

    @property
    def relations(self) -> frozenset[str]:
        """Every relation that some policy keeps, the inverse ones too."""
        return frozenset(name for policy in self.policies.values() for name in policy.wording())

    @property
    def gates(self) -> dict[str, Gate]:
        """Each policy's gate."""
        return {name: policy.gate for name, policy in self.policies.items()}

    def policy_of(self, relation: str) -> Policy:
        """The one policy that keeps `relation` (an inverse one, too). Raises UsageError where there is none."""
        for policy in self.policies.values():
            if relation in policy.wording():
                return policy
        known = [name for policy in self.policies.values() for name in policy.wording()]
        raise UsageError(f"no policy keeps the relation {relation}", hint=nearest(relation, known))

    def sources_of(self, policy: Policy) -> list[Source]:
        """The policy's sources, in its order."""
        return [self.sources[name] for name in policy.sources]

    def connector(self, source: str) -> Connector:
        """What reads the source. Raises ConfigError for a key that the source's type does not take."""
        from kbsync.connectors import make_connector

        document = self.source_files[source]
        folder, allowed = document.path.parent, self.workspace.allowed_dirs
        try:
            return make_connector(self.sources[source], folder=folder, allowed_dirs=allowed)
        except ValidationError as error:
            raise document.explain(error) from error

    def controls(self, relation: str) -> Path | None:
        """The file of never-synced subjects of `relation`; None: the shipped prompts are the controls."""
        policy = self.policy_of(relation)
        name = policy.wording()[relation].controls
        return None if name is None else self.policy_files[policy.policy].path.parent / name

    def check(self) -> list[str]:
        """What is allowed but looks like a mistake, one line each. (What is wrong, `load_catalog` refuses.)"""
        return [*self.workspace.warnings(), *self._source_warnings(), *self._policy_warnings()]

    def _source_warnings(self) -> Iterator[str]:
        used = {name for policy in self.policies.values() for name in policy.sources}
        for name, source in self.sources.items():
            document = self.source_files[name]
            if name not in used:
                yield document.note(("source",), "no policy names this source; it is never read")
            if _EXAMPLE_CONTACT.search(str(source.options.get("user_agent", ""))):
                yield document.note(("user_agent",), "names an example address; put a contact of your own there")
            stall = self.workspace.settings.stall
            if (given := source.options.get("deadline")) and TypeAdapter(Seconds).validate_python(given) >= stall:
                yield document.note(("deadline",), f"kbsync.yaml's `stall` ({stall:g} s) cancels the pass before")
            if exposed := open_to_others(document.path, source.options):
                yield document.note((), exposed)
            for warning in self.connector(name).warnings:
                yield document.note((), warning)

    def _policy_warnings(self) -> Iterator[str]:
        if not self.policies:
            yield f"{self.workspace.policies}: no policies; nothing is kept fresh"
        for name, policy in self.policies.items():
            document = self.policy_files[name]
            for relation, at in _relation_names(policy.relations):
                if policy.wording()[relation].prompt.endswith(" "):
                    yield document.note((*at, "prompt"), "ends with a space; the object follows after one anyway")
            for relation in policy.relations:
                for problem in self._feed_warnings(policy, relation):
                    yield document.note(("relations", relation), problem)

    def _feed_warnings(self, policy: Policy, relation: str) -> Iterator[str]:
        feeding = [source for source in self.sources_of(policy) if source.relation == relation]
        if not feeding:
            yield "no source of this policy gives it"
        spaces = sorted({_object_space(source) for source in feeding})
        if policy.precedence != "order" and len(spaces) > 1:
            yield (
                f"its sources name their objects by different ids ({', '.join(spaces)}), so that {policy.precedence} "
                "compares unlike things; give them the same `object_ids`"
            )


def load_catalog(workspace: Workspace) -> Catalog:
    """Read and check sources/*.yaml and policies/*.yaml. Raises ConfigError naming file, line, key and value."""
    source_files, sources = _declared(workspace.sources, Source, "source")
    policy_files, policies = _declared(workspace.policies, Policy, "policy")
    catalog = Catalog(workspace, sources, policies, source_files, policy_files)
    for name in sources:
        catalog.connector(name)
    for name, policy in policies.items():
        _check_sources(policy, policy_files[name], sources)
        _check_schedule(policy.schedule, policy_files[name])
    _check_relations_unique(catalog)
    for policy in policies.values():
        _check_controls(catalog, policy)
    return catalog


def _object_space(source: Source) -> str:
    """The id space of the source's objects, as far as its file says."""
    if source.match == "label":
        return source.space
    return str(source.options.get("object_ids", source.source if source.type in ROWS_WITH_COLUMNS else source.space))


def _declared(folder: Path, model: type[DeclaredT], key: str) -> tuple[dict[str, Document], dict[str, DeclaredT]]:
    """Every YAML file of `folder`, by the name that it declares under `key`."""
    documents: dict[str, Document] = {}
    values: dict[str, DeclaredT] = {}
    paths = folder.iterdir() if folder.is_dir() else ()
    for path in sorted(p for p in paths if p.suffix in {".yaml", ".yml"} and not p.name.startswith(".")):
        document = read_document(path)
        value = document.validate(model)
        name = str(getattr(value, key))
        if name in documents:
            raise document.error((key,), f"{name} is declared in {documents[name].path}, too")
        documents[name], values[name] = document, value
    return documents, values


def _check_sources(policy: Policy, document: Document, sources: Mapping[str, Source]) -> None:
    for index, name in enumerate(policy.sources):
        at: KeyPath = ("sources", index)
        if name not in sources:
            raise document.error(at, f"no source {name}", hint=nearest(name, sources))
        if name in policy.sources[:index]:
            raise document.error(at, f"{name} is named twice")
        if (relation := sources[name].relation) not in policy.relations:
            problem = f"source {name} gives the relation {relation}, which this policy does not have"
            raise document.error(at, problem, hint=f"add it under relations, or take {name} out of sources")
    for relation, words in policy.relations.items():
        feeding = [source for name in policy.sources if (source := sources[name]).relation == relation]
        _check_joined(relation, policy, feeding, document)
        for index, name in enumerate(words.prefer):
            if name not in (known := [source.source for source in feeding]):
                at = ("relations", relation, "prefer", index)
                raise document.error(at, f"no source {name} of this policy gives {relation}", hint=nearest(name, known))


def _check_joined(relation: str, policy: Policy, sources: list[Source], document: Document) -> None:
    """Sources of one relation must mean the same subject by the same id, and be enough for the quorum."""
    for one, other in pairwise(sources):
        if one.space != other.space:
            problem = f"sources {one.source} and {other.source} of {relation} share no ids ({one.space}, {other.space})"
            raise document.error(("sources",), problem, hint="give both the same `ids:`, or both `match: label`")
    if sources and policy.quorum is not None and policy.quorum > len(sources):
        problem = f"{policy.precedence} can never be reached: {relation} has {len(sources)} of these sources"
        raise document.error(("precedence",), problem)


def _check_controls(catalog: Catalog, policy: Policy) -> None:
    """A named file of control subjects exists, within the folders that may be read."""
    document = catalog.policy_files[policy.policy]
    for relation, at in _relation_names(policy.relations):
        path = catalog.controls(relation)
        if path is None:
            continue
        if not any(path.resolve().is_relative_to(folder.resolve()) for folder in catalog.workspace.allowed_dirs):
            raise document.error(
                (*at, "controls"), f"{path} is outside the folders that may be read (allowed_dirs in kbsync.yaml)"
            )
        if not path.is_file():
            raise document.error((*at, "controls"), f"no file {path}")


def _check_schedule(schedule: Schedule, document: Document) -> None:
    try:
        trigger(schedule)
    except ValueError as error:
        raise document.error(("schedule",), str(error)) from error


def _check_relations_unique(catalog: Catalog) -> None:
    """A relation belongs to exactly one policy, and once; inverse relations count as well."""
    seen: dict[str, Path] = {}
    for name, policy in catalog.policies.items():
        document = catalog.policy_files[name]
        for relation, at in _relation_names(policy.relations):
            if relation in seen:
                raise document.error(at, f"the relation {relation} is already kept by {seen[relation]}")
            seen[relation] = document.path


def _relation_names(relations: Mapping[str, Relation]) -> Iterator[tuple[str, KeyPath]]:
    """Every relation, the inverse ones too, with where its wording stands."""
    for name, relation in relations.items():
        yield name, ("relations", name)
        if relation.inverse is not None:
            yield relation.inverse.relation, ("relations", name, "inverse")
