"""Stands in front of an installed EnvPool: importing it fails as if there were none."""

raise ImportError("No module named 'envpool'")
