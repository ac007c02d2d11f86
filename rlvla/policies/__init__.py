"""Policies, one file each, behind the Protocol of `rlvla.policies.base`."""
