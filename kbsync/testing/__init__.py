"""For packages with a connector of their own: what every connector must do, as tests that pytest runs.

    # tests/test_contract.py of your package
    from kbsync.testing import ConnectorContract, Said

    class TestMyConnector(ConnectorContract):
        type = "mine"

        def arrange(self, folder, rows):
            (folder / "rows.txt").write_text("".join(f"{row.id}|{row.subject}|{row.object}\\n" for row in rows))
            return {"file": "rows.txt"}

        def ruin(self, folder):
            (folder / "rows.txt").unlink()

docs/connectors.md has the whole of it.
"""

from kbsync.testing.contract import SECRET, ConnectorContract, Said

__all__ = ["SECRET", "ConnectorContract", "Said"]
