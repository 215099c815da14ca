"""Layers that ranking backbones share: attention, fields, standardisation and output heads."""
