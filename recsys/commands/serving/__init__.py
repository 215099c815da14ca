"""The commands on packages of finished runs."""
