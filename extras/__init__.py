"""What a reader of the lesson may skip: what makes it safe, fast, resumable, visible, larger."""
