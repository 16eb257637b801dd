"""The `sbs` command."""
