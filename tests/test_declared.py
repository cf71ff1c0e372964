"""Which files a workspace declares: what is taken along, what is secret, what has no place in a backup."""

from __future__ import annotations

from pathlib import Path

from kbsync.config import Workspace
from kbsync.declared import declared_files

FILES = {
    "kbsync.yaml": "model: tiny\nstatistics: {corpus: file:texts/corpus.txt}\n"
    "server: {tls: {certificate: tls/cert.pem, key: tls/key.pem}}\n",
    "tls/cert.pem": "",
    "tls/key.pem": "",
    "texts/corpus.txt": "",
    "sources/stars.yaml": "location: ../feeds/stars.csv\nurl: sqlite:///../feeds/crm.db\n"
    "lists: [../data/list.txt, ../.cache/list.txt, ../index.json, ../feeds/absent.csv]\nnote: 'line\n\n  line'\n",
    "feeds/stars.csv": "",
    "feeds/stars.csv.minisig": "",
    "feeds/crm.db": "",
    "feeds/other.csv": "",
    "data/list.txt": "",
    ".cache/list.txt": "",
    "index.json": "",
    "policies/sky.yaml": "prompt: 'Where is {subject}'\nlong: " + "x" * 5000,
    "policies/.hidden": "",
}


def test_what_is_named_is_taken_along_and_what_cannot_be_is_left_out_with_the_reason(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    taken, left_out = declared_files(Workspace.load(tmp_path))
    assert taken == [
        "feeds/crm.db",
        "feeds/stars.csv",
        "feeds/stars.csv.minisig",
        "kbsync.yaml",
        "policies/sky.yaml",
        "sources/stars.yaml",
        "texts/corpus.txt",
        "tls/cert.pem",
    ]
    no_place = "lies where a backup has its own files, or is hidden"
    assert left_out == {
        ".cache/list.txt": no_place,
        "data/list.txt": no_place,
        "index.json": no_place,
        "tls/key.pem": "holds a secret",
    }
