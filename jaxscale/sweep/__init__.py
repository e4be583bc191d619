"""Curves: one knob is varied, each point runs in a process of its own."""
