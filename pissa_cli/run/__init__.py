"""The run folder: what lies where, how far it has come, what it says."""
