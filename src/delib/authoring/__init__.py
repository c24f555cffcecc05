"""For those who write a policy: what to look at again, what an edit changes, first drafts, importing, showing."""
