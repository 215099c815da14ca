"""Placement of tables in host memory and in several copies."""
