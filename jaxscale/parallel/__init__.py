"""Meshes, sharding rules and what crosses devices."""
