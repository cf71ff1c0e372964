"""HTTP inside the daemon: health and metrics. Off unless `server:` in kbsync.yaml says otherwise."""
