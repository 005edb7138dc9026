"""Samplers: in this process (local), scripted (tests)."""
