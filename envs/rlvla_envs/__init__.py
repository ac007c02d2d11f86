"""Worlds: simulators behind one interface. gymnasium and numpy; simulators are imported inside functions."""
