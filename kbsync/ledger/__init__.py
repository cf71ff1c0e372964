"""The fact ledger: what sources said, what was accepted, what each version of each model holds, who did what when.

with Ledger.open("sqlite:///data/ledger.db") as ledger, ledger.write() as db:
    run = db.start_run("astronomy", model=None, trigger="sync", user="me")
    db.record(run, snapshot)
"""
