"""The fault matrix (docs/faults.md): what must hold whatever stops, refuses or misleads kbsync; `make faults`."""
