"""Checkpoints of other projects: read into a policy folder, and written back from one."""
