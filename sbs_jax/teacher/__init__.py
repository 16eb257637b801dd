"""The teacher's side: what it replied, and how a reply is read."""
