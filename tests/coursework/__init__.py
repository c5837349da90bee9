"""Assignments on the real code: see README.md (teachers) and tasks.py."""
