"""Views for people who look into the ledger with a tool of their own (Datasette, psql, a spreadsheet): the common
questions, with readable names. kbsync itself asks the tables. docs/ledger.md lists them, and a test holds that each
answers what the reader answers.

They are made anew after every migration. A view that changes needs a new revision, if only an empty one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

__all__ = ["VIEWS", "View", "create_views", "drop_views"]


@dataclass(frozen=True, slots=True)
class View:
    """A view: its name and its query, in which `{label}`, `{seconds}` and `{excluded}` stand for longer words."""

    name: str
    query: str


_WORDS = {
    "sqlite": {
        "seconds": "CAST(round((julianday(got.fetched_at) - julianday(got.as_of)) * 86400) AS INTEGER)",
        "excluded": "EXISTS (SELECT 1 FROM json_each(active.excluded) WHERE json_each.value = taught.delta_column)",
    },
    "postgresql": {
        "seconds": "CAST(round(extract(epoch FROM got.fetched_at - got.as_of)) AS BIGINT)",
        "excluded": "active.excluded::jsonb @> to_jsonb(taught.delta_column)",
    },
}
"""How old an answer was when it came, and whether a version has taken a column out: as each database says it."""

_LABEL = """(SELECT claim.subject_label FROM claim
    WHERE claim.relation = it.relation AND claim.subject_id = it.subject_id ORDER BY claim.id DESC LIMIT 1)"""
"""How the subject of a key was last written."""

VIEWS = (
    View(
        "fact_history",
        """
SELECT fact.relation, fact.subject_label AS subject, fact.object_label AS object, fact.status, fact.since, fact.until,
    fact.source, fact.origin, fact.rule, got.location, got.fetched_at, got.body_sha256,
    fact.since_run AS run_id, run.who, fact.until_run, fact.subject_id, fact.object_id, fact.claim_id,
    fact.id AS fact_id
FROM fact
JOIN run ON run.id = fact.since_run
LEFT JOIN "fetch" AS got ON got.id = (
    SELECT newest.id FROM "fetch" AS newest
    WHERE newest.source = fact.source AND newest.recorded_at <= fact.since ORDER BY newest.recorded_at DESC LIMIT 1)""",
    ),
    View(
        "live_facts",
        """
SELECT relation, subject, object, status, since, source, origin, rule, location, fetched_at, run_id, who,
    subject_id, object_id, claim_id, fact_id
FROM fact_history WHERE until IS NULL""",
    ),
    View(
        "fact_changes",
        """
SELECT * FROM (
    SELECT new.since AS at,
        CASE WHEN old.id IS NULL THEN 'added'
            WHEN old.object_id != new.object_id THEN 'changed'
            WHEN old.status != new.status AND new.status = 'withdrawn' THEN 'withdrawn'
            WHEN old.status != new.status THEN 'restored'
            WHEN old.subject_label != new.subject_label OR old.object_label != new.object_label THEN 'relabelled'
        END AS kind,
        new.relation, new.subject_label AS subject, old.object_label AS before, new.object_label AS after, new.source,
        new.since_run AS run_id, run.who, new.subject_id, old.object_id AS before_id, new.object_id AS after_id
    FROM fact AS new
    JOIN run ON run.id = new.since_run
    LEFT JOIN fact AS old
        ON old.relation = new.relation AND old.subject_id = new.subject_id AND old.until = new.since
    UNION ALL
    SELECT old.until, 'removed', old.relation, old.subject_label, old.object_label, NULL, old.source,
        old.until_run, run.who, old.subject_id, old.object_id, NULL
    FROM fact AS old
    JOIN run ON run.id = old.until_run
    WHERE NOT EXISTS (
        SELECT 1 FROM fact AS new
        WHERE new.relation = old.relation AND new.subject_id = old.subject_id AND new.since = old.until)
) AS step WHERE kind IS NOT NULL""",
    ),
    View(
        "live_claims",
        """
SELECT claim.source, claim.relation, claim.subject_label AS subject, claim.object_label AS object, claim.rank,
    claim.valid_from, claim.valid_to, claim.qualifiers, claim.origin, began.recorded_at AS since,
    coalesce(claim.seen_to, (SELECT max(number) FROM "fetch" WHERE "fetch".source = claim.source)) - claim.seen_from + 1
        AS times_seen,
    began.run_id, claim.subject_id, claim.object_id, claim.id AS claim_id
FROM claim JOIN "fetch" AS began ON began.id = claim.since_fetch
WHERE claim.until_fetch IS NULL""",
    ),
    View(
        "open_conflicts",
        """
SELECT it.relation, {label} AS subject, it.kind, it.reason, it.opened_at, it.opened_run AS run_id, it.claims,
    it.subject_id, it.id AS conflict_id
FROM conflict AS it WHERE it.closed_at IS NULL""",
    ),
    View(
        "waiting_keys",
        """
SELECT it.relation, {label} AS subject, it.reason, it.detail, it.since, it.since_run AS run_id,
    it.subject_id, it.object_id
FROM waiting AS it WHERE it.until IS NULL""",
    ),
    View(
        "held_keys",
        """
SELECT it.model, it.relation, {label} AS subject, it.reason, it.evidence, it.held_out, it.since, it.run_id, it.version,
    it.subject_id, it.id AS hold_id
FROM hold AS it WHERE it.until IS NULL""",
    ),
    View(
        "quarantined_rows",
        """
SELECT quarantine.source, quarantine.origin, quarantine.reason, quarantine.raw, began.recorded_at AS since,
    began.run_id, quarantine.subject_id, quarantine.id AS quarantine_id
FROM quarantine JOIN "fetch" AS began ON began.id = quarantine.since_fetch
WHERE quarantine.until_fetch IS NULL""",
    ),
    View(
        "version_contents",
        """
SELECT model, version,
    CASE WHEN version = coalesce(
        (SELECT version FROM promotion WHERE promotion.model = held.model AND alias = 'live' ORDER BY id DESC LIMIT 1),
        (SELECT head.version FROM head WHERE head.model = held.model ORDER BY head.id DESC LIMIT 1))
        THEN 'live' ELSE 'not live' END AS state,
    relation, subject, target AS object, prompt, delta, delta_column, subject_id, object_id
FROM (
    SELECT active.model, active.version, taught.*,
        row_number() OVER (
            PARTITION BY active.model, active.version, taught.relation, taught.key_id
            ORDER BY active.position DESC, taught.delta_column DESC) AS place
    FROM version_delta AS active
    JOIN (
        SELECT delta_fact.model AS of_model, delta_fact.delta, delta_fact.delta_column, delta_fact.relation,
            delta_fact.subject, delta_fact.target, delta_fact.prompt, delta_fact.subject_id, delta_fact.object_id,
            coalesce(redirect.new_id, delta_fact.subject_id) AS key_id
        FROM delta_fact LEFT JOIN redirect ON redirect.old_id = delta_fact.subject_id
    ) AS taught ON taught.of_model = active.model AND taught.delta = active.delta
    WHERE NOT {excluded}
) AS held WHERE place = 1""",
    ),
    View(
        "fetch_log",
        """
SELECT got.id AS fetch_id, got.source, got.relation, got.number, got.fetched_at, got.status, got.rows,
    got.complete, got.not_modified, got.as_of, {seconds} AS lag_seconds, got.location, got.body_sha256,
    got.verified, got.recorded_at, got.run_id, run.who
FROM "fetch" AS got JOIN run ON run.id = got.run_id""",
    ),
    View(
        "source_health",
        """
SELECT source.source, newest.number AS fetches, newest.fetched_at AS last_fetch, newest.rows AS last_rows,
    newest.lag_seconds, newest.location,
    (SELECT count(*) FROM claim WHERE claim.source = source.source AND claim.until_fetch IS NULL) AS live_claims,
    (SELECT count(*) FROM quarantine WHERE quarantine.source = source.source AND quarantine.until_fetch IS NULL)
        AS quarantined,
    coalesce(state.failures, 0) AS failures, state.last_error, state.retry_at
FROM (SELECT source FROM "fetch" UNION SELECT source FROM source_state) AS source
LEFT JOIN source_state AS state ON state.source = source.source
LEFT JOIN fetch_log AS newest ON newest.source = source.source
    AND newest.number = (SELECT max(number) FROM "fetch" WHERE "fetch".source = source.source)""",
    ),
    View(
        "entity_labels",
        """
SELECT said.entity_id, said.label, said.kind, said.source, min(began.recorded_at) AS since,
    CASE WHEN count(*) = count(ended.id) THEN max(ended.recorded_at) END AS until
FROM (
    SELECT source, subject_id AS entity_id, subject_label AS label, 'label' AS kind, since_fetch, until_fetch FROM claim
    UNION ALL
    SELECT source, object_id, object_label, 'label', since_fetch, until_fetch FROM claim
    UNION ALL
    SELECT source, entity_id, label, 'alias', since_fetch, until_fetch FROM alias
) AS said
JOIN "fetch" AS began ON began.id = said.since_fetch
LEFT JOIN "fetch" AS ended ON ended.id = said.until_fetch
GROUP BY said.entity_id, said.label, said.kind, said.source""",
    ),
)
"""Each after those that it is made of."""


def create_views(connection: Connection) -> None:
    """Make the views, in the caller's transaction."""
    words = _WORDS[connection.dialect.name] | {"label": _LABEL}
    for view in VIEWS:
        query = view.query
        for name, word in words.items():
            query = query.replace(f"{{{name}}}", word)
        connection.exec_driver_sql(f"CREATE VIEW {view.name} AS{query}")


def drop_views(connection: Connection) -> None:
    """Remove them: a table cannot be altered while a view reads it."""
    for view in reversed(VIEWS):
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view.name}")
