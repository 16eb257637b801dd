"""Files on disk: atomic writes, JSON, checksums, locks."""
