"""What computes: one engine per framework behind one Protocol."""
